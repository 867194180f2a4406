"""Copying arrays into a store block by block: what `merge` and `rechunk` share.

A block is cut into tiles of whole target chunks, and dask's threads read and write a few of them at once, so memory
stays bounded whatever the size of the stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, Protocol

import dask.array as da
import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from psfgen.errors import ConfigError
from psfgen.store import Store, schema

MEMORY = 512 * 2**20  # bytes that all threads may take
TILE = MEMORY // 16  # what a thread reads at once, unless a chunk is larger
LARGEST_CHUNK = MEMORY // 4
COPIES = 3  # of a chunk while it is read and written
OWN = ("block", "index", "plan_sha256", "chunks", "crc32c")  # what a ledger entry says of its own store


class Source(Protocol):
    """What a store is copied from, in the coordinates of the target."""

    def read(self, name: str, **index: slice) -> NDArray[Any]: ...
    def chunks(self, name: str) -> tuple[int, ...]: ...
    def entry(self, block: int) -> dict[str, Any]: ...


def fill(target: Store, source: Source, on_block: Callable[[], object]) -> None:
    """Write the blocks that `target` lacks. `on_block()` is called after each.

    Raises StoreCorrupt where a checksum of the source fails; nothing of that block is committed then.
    """
    for block in target.missing():
        try:
            for name in target.spec.arrays:
                _copy(target, source, block, name)
            target.commit(block, source.entry(block))
        except BaseException:
            target.abandon(block)
            raise
        on_block()
    target.finalise()


def carried(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ledger entry holds in another store too."""
    return {key: value for key, value in entry.items() if key not in OWN}


def check_chunks(spec: schema.StoreSpec) -> None:
    """Raise ConfigError where a chunk is too large to be copied in bounded memory."""
    for name in schema.BANDED:
        size = 4 * math.prod(spec.chunks(name))
        if size > LARGEST_CHUNK:
            raise ConfigError(
                f"chunks of {name} would hold {size / 2**20:.0f} MiB, more than {LARGEST_CHUNK // 2**20}; "
                "give smaller --chunks"
            )


def _copy(target: Store, source: Source, block: int, name: str) -> None:
    view = _View(target, source, block, name)
    tile = _tile(view.shape, target.spec.chunks(name), view.stored)
    needed = COPIES * view.dtype.itemsize * (math.prod(tile) + math.prod(view.stored))
    array = da.from_array(  # type: ignore[no-untyped-call]
        view, chunks=tile, name=False, asarray=False, meta=np.empty((0,) * len(tile), view.dtype)
    )
    threads = max(1, min(CPU_COUNT, MEMORY // needed))
    sink: Any = _Sink(target, block, name)
    with ThreadPoolExecutor(threads) as pool:  # of our own: the one that dask keeps would not survive a fork
        da.store(array, sink, lock=False, scheduler="threads", pool=pool)


def _tile(shape: tuple[int, ...], chunks: tuple[int, ...], stored: tuple[int, ...]) -> tuple[int, ...]:
    """Whole chunks of the target; as far as TILE allows so many that no chunk of the source is read twice."""
    tile = list(chunks)
    for axis in reversed(range(len(tile))):
        wider = tile.copy()
        wider[axis] = min(shape[axis], -(-stored[axis] // chunks[axis]) * chunks[axis])
        if 4 * math.prod(wider) <= TILE:
            tile = wider
    return tuple(tile)


class _View:
    """One block of an array of the source, as far as dask asks for it."""

    def __init__(self, target: Store, source: Source, block: int, name: str) -> None:
        self.source, self.name, self.dims = source, name, target.spec.dims(name)
        self.here = target.spec.block_at(block)
        self.shape = tuple(1 if d in self.here else len(target.coords[d]) for d in self.dims)
        self.ndim = len(self.shape)
        self.stored = tuple(map(min, source.chunks(name), self.shape))
        self.dtype = target.read(name, depth=slice(0, 0)).dtype

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        out = np.empty([at.stop - at.start for at in key], self.dtype)
        for piece in product(*map(_cut, key, self.stored)):  # a chunk of the source at a time
            places = {dim: at for dim, at in zip(self.dims, piece, strict=True) if dim not in self.here}
            block = {dim: slice(at, at + 1) for dim, at in self.here.items()}
            inside = tuple(slice(p.start - k.start, p.stop - k.start) for p, k in zip(piece, key, strict=True))
            out[inside] = self.source.read(self.name, **places, **block)
        return out


def _cut(span: slice, size: int) -> list[slice]:
    """`span` cut at the multiples of `size`."""
    first = span.start - span.start % size
    return [slice(max(at, span.start), min(at + size, span.stop)) for at in range(first, span.stop, size)]


class _Sink:
    """One block of an array of the target, as far as dask writes to it."""

    def __init__(self, target: Store, block: int, name: str) -> None:
        self.target, self.block, self.name = target, block, name

    def __setitem__(self, key: tuple[slice, ...], data: NDArray[Any]) -> None:
        places = dict(zip(self.target.spec.dims(self.name), key, strict=True))
        for dim in self.target.spec.block_dims:
            del places[dim]
        self.target.write(self.block, self.name, data, **places)
