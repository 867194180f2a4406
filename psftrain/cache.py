"""Decoded kernels in files that every process maps: FOLDER/KEY/{kernels,noise}.npy.

KEY stands for what is in the stores, so that a store that was rendered again or repaired gets another. An entry
appears whole, by a rename, and is never changed; one process makes it, the others wait at the lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor

from psfgen.errors import FitError
from psfgen.store import Store
from psftrain.data import Places
from psftrain.decode import decode_into

VERSION = 1
ADVICE = "choose another with --set data.cache=FOLDER, or --set data.mode=stream"


def folder_of(given: str | None) -> Path:
    """The folder of decoded files: the one given, else the user's cache folder."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psftrain"


def entry(stores: Sequence[Store], array: str, folder: Path) -> Path:
    """Where the decoded kernels of some stores lie, or would lie."""
    chunks = [
        [store.attrs["plan_sha256"], [sorted(store.ledger.read(block)["chunks"].items()) for block in store.blocks]]
        for store in stores
    ]
    text = json.dumps([VERSION, array, chunks])
    return folder / hashlib.sha256(text.encode()).hexdigest()[:32]


def decoded(stores: Sequence[Store], places: Places, folder: Path) -> tuple[Tensor, Tensor]:
    """Kernels [M, W, y, x], mapped from the cache, and noise [M]; they are decoded into it where it has none.

    Raises FitError where the folder cannot be written, or has no room.
    """
    path = entry(stores, places.array, folder)
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(_lock(folder, path.name)):
                _sweep(folder, path.name)
                if not path.exists():
                    _make(stores, places, path)
        except OSError as error:
            raise FitError(f"decoded kernels cannot be kept in {folder}: {error.strerror or error}; {ADVICE}") from None
    try:
        kernels, noise = np.load(path / "kernels.npy", mmap_mode="c"), np.load(path / "noise.npy")
        if kernels.shape != (len(places), *places.shape) or noise.shape != (len(places),):
            raise ValueError(f"kernels {kernels.shape} and noise {noise.shape} of {len(places)} examples")
        return torch.from_numpy(kernels), torch.from_numpy(noise)
    except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
        raise FitError(f"decoded kernels in {path} cannot be read ({error}); delete that folder") from None


def _make(stores: Sequence[Store], places: Places, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        kernels = open_memmap(temporary / "kernels.npy", "w+", np.float32, (len(places), *places.shape))
        with open(temporary / "kernels.npy", "r+b") as file:  # a map of a file without its space would kill the process
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        noise = torch.empty(len(places))
        decode_into(stores, places.array, places.units, torch.from_numpy(kernels), noise)
        kernels.flush()
        np.save(temporary / "noise.npy", noise.numpy())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path, key: str) -> None:
    """Delete what killed processes left: unfinished entries that nobody holds the lock of; that of `key` is ours."""
    for path in folder.glob(".*.tmp"):
        other = path.name.split(".")[1]
        try:
            with FileLock(_lock(folder, other), timeout=0) if other != key else nullcontext():
                shutil.rmtree(path, ignore_errors=True)
        except Timeout:  # somebody is making it
            continue


def _lock(folder: Path, key: str) -> Path:
    return folder / f".{key}.lock"
