"""Executors: where the blocks of a plan run. To add one, add a line to EXECUTORS."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from psfgen.errors import ConfigError, nearest

EXECUTORS = {
    "local": "psfgen.executors.local:run",
    "dask": "psfgen.executors.dask:run",
    "slurm": "psfgen.executors.slurm:run",
}


def executor(name: str) -> Any:
    """The function of an executor. Raises ConfigError for an unknown name."""
    if name not in EXECUTORS:
        raise ConfigError(f"unknown executor '{name}'{nearest(name, EXECUTORS)}; known: {', '.join(EXECUTORS)}")
    module, _, attribute = EXECUTORS[name].partition(":")
    return getattr(import_module(module), attribute)
