"""Checkpoints: written whole or not at all, read without running what they hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from psfgen.errors import FitError, RunMismatch

NAME = re.compile(r"step-(\d{8})\.pt")


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step-{step:08d}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint by temp file and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FitError(f"checkpoint {path} cannot be written: {error.strerror}") from None


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: plain data and tensors only. Raises RunMismatch where it is none."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunMismatch(f"checkpoint {path} does not exist") from None
    except Exception as error:  # torch raises many kinds for a broken file
        reason = " ".join(str(error).split())[:120]
        raise RunMismatch(
            f"checkpoint {path} cannot be read ({reason}); delete it to go on from the one before"
        ) from None
    if not isinstance(state, dict) or not {"model", "step", "config", "fingerprint"} <= state.keys():
        raise RunMismatch(f"checkpoint {path} is not one of psftrain's")
    return state


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def prune(run: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for step in steps(run)[:-keep]:
        path_of(run, step).unlink(missing_ok=True)
