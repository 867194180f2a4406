"""Kernels out of the chunks of a store: whole chunks at a time, each decoded once and checked for NaN.

Legend: n places with light, W wavelengths, y x bins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.errors import StoreCorrupt, progress
from psfgen.store import Store

CATALOGUE = ("copy", "depth", "focus", "field_y", "field_x")  # the order in which examples are numbered
TOLD_BYTES = 2**28  # decoding as many takes long enough for a progress bar


@dataclass(frozen=True)
class Unit:
    """Whole chunks of one store whose places follow one another in the catalogue.

    `index` picks them (dim -> slice); `lit` says which of them, in that order, have light: those are the examples
    `start` to `stop` of the catalogue.
    """

    store: int
    index: dict[str, slice]
    lit: NDArray[np.bool_]
    start: int
    stop: int


def units_of(number: int, store: Store, array: str, lit: NDArray[np.bool_], first: int) -> Iterator[Unit]:
    """The units of store `number`; `lit` has the dims of CATALOGUE that the store has; examples count from `first`.

    A chunk longer than one along a dim spans all dims within it, so that no chunk falls into two units.
    """
    dims = [dim for dim in CATALOGUE if dim in store.coords]
    chunks = dict(zip(store.spec.dims(array), store.spec.chunks(array), strict=True))
    level = next((i for i, dim in enumerate(dims) if chunks[dim] > 1), len(dims) - 1)
    for outer in np.ndindex(*lit.shape[:level]):
        for at in range(0, lit.shape[level], chunks[dims[level]]):
            along = slice(at, min(at + chunks[dims[level]], lit.shape[level]))
            index = {dim: slice(i, i + 1) for dim, i in zip(dims, outer, strict=False)} | {dims[level]: along}
            part = lit[(*outer, along)].ravel()
            stop = first + int(part.sum())
            yield Unit(number, index, part, first, stop)
            first = stop


def decode(
    stores: Sequence[Store], array: str, unit: Unit, scratch: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Kernels [n, W, y, x] of the places of a unit that have light, and the relative noise of each stack [n].

    `scratch`, contiguous, with room for every place of the unit, is decoded into, and the kernels may lie in it.
    Raises StoreCorrupt where one of them holds NaN.
    """
    store = stores[unit.store]
    kernels = _read(store, array, unit, scratch)
    relative = _read(store, "noise_binned" if array == "psf_binned" else "noise", unit)
    energy = np.einsum("nwyx,nwyx->nw", kernels, kernels)
    total, lost = energy.sum(axis=-1), (relative**2 * energy).sum(axis=-1)
    if np.isnan(lost).any():  # the energy of a kernel is NaN where one of its numbers is
        raise StoreCorrupt(f"{store.path} has NaN where light arrives; `psfgen verify {store.path}` shows what")
    return kernels, np.sqrt(np.divide(lost, total, out=np.zeros_like(lost), where=total > 0))


def _read(store: Store, name: str, unit: Unit, scratch: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The places of a unit that have light, in the order of the catalogue [n, W, ...]."""
    dims, sizes = store.spec.dims(name), store.spec.shape(name)
    shape = [len(range(*unit.index.get(dim, slice(None)).indices(n))) for dim, n in zip(dims, sizes, strict=True)]
    count = math.prod(shape)
    values = (np.empty(count, np.float32) if scratch is None else scratch.reshape(-1)[:count]).reshape(shape)
    store.read_into(values, name, **unit.index)
    places = values.swapaxes(dims.index("focus"), dims.index("depth"))
    places = places.reshape(-1, *shape[dims.index("wavelength") :])
    return np.asarray(places if unit.lit.all() else places[unit.lit])


def decode_into(stores: Sequence[Store], array: str, units: Sequence[Unit], kernels: Tensor, noise: Tensor) -> None:
    """Decode every unit into `kernels` [M, W, y, x] and `noise` [M], a few at once."""

    def one(unit: Unit) -> int:
        into = kernels[unit.start : unit.stop]
        scratch = into.numpy() if into.device.type == "cpu" and unit.lit.all() else None
        found, relative = decode(stores, array, unit, scratch)
        if scratch is None or not np.may_share_memory(found, scratch):
            into[...] = torch.from_numpy(found)
        noise[unit.start : unit.stop] = torch.from_numpy(relative)
        return unit.stop - unit.start

    bar = progress(len(noise), "decode", "psf") if kernels.nbytes > TOLD_BYTES else None
    pool = ThreadPoolExecutor(workers())
    try:
        for done in pool.map(one, units):
            if bar is not None:
                bar.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
        if bar is not None:
            bar.close()


def workers() -> int:
    """Threads that decode: the cores that this process may use, shared with others of the same run here, at most 4."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // local_processes()))


def local_processes() -> int:
    """Processes of this run on this machine (torchrun says so)."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1
