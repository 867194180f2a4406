"""The kernels of one specimen out of its stores, as a ray map is found from them.

Legend: M places, N field points, S slices (a depth and a focus each), W wavelengths, k samples a side, V numbers of a
kernel stack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from psfgen.store import Store
from psftrain.data import COLUMN, COPY, DEPTH, FOCUS, ROW, STORE, Places
from psftrain.raymap.stages import spread
from psftrain.raymap.terms import Sites

Array = NDArray[np.float64]

MOST = 4096  # places whose kernels a map is found from
FEWEST = 48  # of a slice
MOST_OF_COPIES = 256  # places of each copy


@dataclass(frozen=True)
class Gathered:
    """Kernels [M, W, k, k] of the store's own samples at some places, and the light that each caught [M, W]."""

    sites: Sites
    kernels: NDArray[np.float32]
    captured: Array

    @property
    def kernel_px(self) -> int:
        return int(self.kernels.shape[-1])

    def some(self, chosen: NDArray[np.bool_]) -> Gathered:
        """The places where `chosen` [M] holds."""
        return Gathered(self.sites[chosen], self.kernels[chosen], self.captured[chosen])

    def of_wavelength(self, number: int) -> Gathered:
        """The kernels of one wavelength."""
        one = slice(number, number + 1)
        return Gathered(self.sites, self.kernels[:, one], self.captured[:, one])


def gather(stores: list[Store], places: Places, sites: Sites) -> Gathered:
    """Read the kernels of some places, as many of every slice; `sites` are those of all places."""
    chosen = _some_of_each_slice(places, sites)
    index = places.index[chosen]
    kernels: list[NDArray[np.float32]] = []
    captured: list[NDArray[np.float32]] = []
    # Places are ordered by these, so that those of a slice follow one another.
    slices, first = np.unique(index[:, [STORE, COPY, DEPTH, FOCUS]], axis=0, return_index=True)
    for number, start in enumerate(first):
        rows = slice(start, first[number + 1] if number + 1 < len(first) else len(index))
        store, copy, depth, focus = slices[number]
        at = {name: slice(i, i + 1) for name, i in (("focus", focus), ("depth", depth))}
        if "copy" in stores[store].coords:
            at["copy"] = slice(copy, copy + 1)
        for name, found in (("psf", kernels), ("captured", captured)):
            values = stores[store].read(name, **at)
            values = values.reshape(values.shape[len(at) :])
            found.append(values[index[rows, ROW], index[rows, COLUMN]])
    return Gathered(sites[chosen], np.concatenate(kernels), np.concatenate(captured).astype(float))


class Copies(NamedTuple):
    """Kernels [K, M, W, k, k] of K copies at the same places, and the light that each caught; NaN: dark."""

    sites: Sites
    kernels: NDArray[np.float32]
    captured: Array

    @property
    def kernel_px(self) -> int:
        return int(self.kernels.shape[-1])


def gather_copies(stores: list[Store], places: Places, sites: Sites) -> Copies:
    """Read the kernels of every copy of a store at the same places."""
    at = places.index[:, [FOCUS, DEPTH, ROW, COLUMN]]
    _, first, of = np.unique(at, axis=0, return_index=True, return_inverse=True)
    chosen = spread(sites[first], MOST_OF_COPIES)
    copies, copy = np.unique(places.index[:, COPY], return_inverse=True)
    parts = []
    for number in range(len(copies)):
        mine = (copy.ravel() == number) & np.isin(of.ravel(), chosen)
        parts.append((gather(stores, places.select(mine), sites[mine]), np.searchsorted(chosen, of.ravel()[mine])))
    shape = (len(copies), len(chosen), *parts[0][0].kernels.shape[1:])
    kernels, captured = np.full(shape, np.nan, np.float32), np.full(shape[:3], np.nan)
    for number, (part, here) in enumerate(parts):
        kernels[number, here], captured[number, here] = part.kernels, part.captured
    return Copies(sites[first][chosen], kernels, captured)


def _some_of_each_slice(places: Places, sites: Sites) -> NDArray[np.int64]:
    """At most about `most` places, as many of every slice, far apart in the field."""
    _, of = np.unique(places.index[:, [STORE, COPY, FOCUS, DEPTH]], axis=0, return_inverse=True)
    of = of.ravel()
    each = max(FEWEST, MOST // (int(of.max()) + 1))
    found = []
    for slice_ in range(of.max() + 1):
        inside = np.flatnonzero(of == slice_)
        found.append(inside[spread(sites[inside], each)])
    return np.sort(np.concatenate(found))


def field_nodes(condition: Tensor) -> tuple[Array, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct field points [N, 2] of conditions [M, C], and the node, depth and focus [M] of each, numbered.

    Depths and focus distances are numbered as their condition ascends.
    """
    values = condition.double().numpy()
    nodes, node = np.unique(values[:, :2], axis=0, return_inverse=True)
    depth, focus = (np.unique(values[:, column], return_inverse=True)[1] for column in (2, 3))
    return nodes, node.ravel(), depth.ravel(), focus.ravel()


def unfolded(kernels: Tensor, node: NDArray[np.int64], slice_: NDArray[np.int64], shape: tuple[int, int]) -> Array:
    """Kernels [M, W, y, x] as [S, N, V], NaN where there is none."""
    found = np.full((*shape, math.prod(kernels.shape[1:])), np.nan)
    found[slice_, node] = kernels.flatten(1).double().numpy()
    return found
