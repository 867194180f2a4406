"""Checkpoints: written whole or not at all, read without running what they hold."""

from __future__ import annotations

import io
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from psfgen.errors import FitError, RunMismatch

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{8})\.pt")


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step-{step:08d}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. Raises FitError where it cannot, and leaves nothing of it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # of a full disk torch makes errors that say nothing
    with writing(f"checkpoint {path}"):
        write_whole(path, buffer.getvalue())  # getbuffer() in an error's traceback crashes Python 3.12.1


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that whoever is killed leaves the one before or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise FitError where the disk does not take `what`."""
    try:
        yield
    except OSError as error:
        raise FitError(
            f"{what} cannot be written: {error.strerror}; what was saved before is kept, the same command goes on"
        ) from None


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: plain data and tensors only. Raises RunMismatch where it is none, or not as it was written."""
    try:
        with zipfile.ZipFile(path) as parts:
            if (broken := parts.testzip()) is not None:  # torch does not look at the checksums that it writes
                raise zipfile.BadZipFile(f"{broken} does not have the checksum it was written with")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunMismatch(f"checkpoint {path} does not exist") from None
    except Exception as error:  # torch raises many kinds for a broken file
        reason = " ".join(str(error).split())[:120]
        raise RunMismatch(f"checkpoint {path} cannot be read ({reason})") from None
    if not isinstance(state, dict) or not {"model", "step", "config", "fingerprint", "ended"} <= state.keys():
        raise RunMismatch(f"checkpoint {path} is not one of psftrain's, or of an older version")
    return state


def load_best(run: Path) -> dict[str, Any]:
    """Read the checkpoint that a run is judged by. Raises RunMismatch, with the way out, where it cannot be."""
    path = run / "checkpoints" / "best.pt"
    if not path.exists():
        raise RunMismatch(f"checkpoint {path} does not exist; fit the run to its end, or delete {run} and fit it anew")
    try:
        return load(path)
    except RunMismatch as error:
        raise RunMismatch(f"{error}; delete {run} and fit it anew") from None


def newest(run: Path) -> dict[str, Any] | None:
    """The last checkpoint of a run that can be read, which is the last unless somebody cut it short; None without any.

    Raises RunMismatch where there are some and none can be read.
    """
    found = steps(run)
    for step in reversed(found):
        try:
            return load(path_of(run, step))
        except RunMismatch as error:
            if step == found[0]:
                raise RunMismatch(f"{error}; delete {run} and fit it anew") from None
            log.warning("%s; the one before is used", error)
    return None


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = (NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def prune(run: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what a killed process had begun to write."""
    left = (run / "checkpoints").glob(".*.pt.tmp")
    for path in [*left, *(path_of(run, step) for step in steps(run)[:-keep])]:
        path.unlink(missing_ok=True)
