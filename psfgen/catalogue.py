"""The lenses that come with psfgen, as documents; nothing here needs DeepLens."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any


def names() -> list[str]:
    """Names of the shipped lenses, sorted."""
    return sorted(Path(entry.name).stem for entry in files("psfgen.lenses").iterdir() if entry.name.endswith(".json"))


def text(name: str) -> str:
    """The prescription of a shipped lens, as its file says it."""
    return files("psfgen.lenses").joinpath(f"{name}.json").read_text(encoding="utf-8")


def shipped() -> dict[str, dict[str, Any]]:
    """Name -> prescription document of every shipped lens."""
    return {name: json.loads(text(name)) for name in names()}
