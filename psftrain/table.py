"""A baked model: a store of kernels on a grid, read between its nodes faster than any model decodes.

Legend: Q queries, K numbers of a kernel stack, 16 corners: two values each of focus, depth, field y and field x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psfgen.errors import ConfigError
from psfgen.store import Store
from psftrain.places import Array, Domain, words

ENGINE = "bake"  # of a store that is a table
LEAST = 1e-6  # the share of a node that a place lies on is as close to 1 as rounding has it

# As the tracer is compiled: nothing is rounded otherwise than it is written.
jit: Any = njit(cache=True, nogil=True, fastmath={"nsz"}, error_model="numpy")


class Table:
    """A baked model to ask for kernels, with what its numbers mean, as `psftrain.predict.PsfModel` has it.

    `wavelength_um` [W]; `pitch_um`, `y_um` [y] (descending: row 0 is scene +y) and `x_um` [x]: the bins; `field_max`:
    how far the field reaches, in half sensor sides; `depth_mm`, `focus_mm`: the nearest and farthest distance.
    `bake`: the run it is of, and the error of baking.
    """

    def __init__(self, store: Store) -> None:
        if store.attrs["engine"] != ENGINE:
            raise ConfigError(f"{store.path} is no table but a render; `psftrain bake RUN` makes a table of a run")
        coords = store.coords
        self.path = store.path
        self.bake: dict[str, Any] = store.attrs["bake"]
        self.wavelength_um = coords["wavelength"]
        self.pitch_um: float = store.attrs["pitch_um"]
        self.y_um, self.x_um = coords["ky"], coords["kx"]
        self.lattice = Lattice(coords)
        self.domain = self.lattice.domain(f"table {store.path}")
        self.field_max = self.domain.field_max
        self.depth_mm, self.focus_mm = self.domain.depth_mm, self.domain.focus_mm
        self.kernels = _decode(store)

    def __repr__(self) -> str:
        waves = ", ".join(f"{w:g}" for w in self.wavelength_um)
        nodes = " x ".join(f"{len(axis)}" for axis in self.lattice.axes)
        return (
            f"<Table {self.path}: {waves} um, {len(self.y_um)} x {len(self.x_um)} bins of {self.pitch_um:.4g} um, "
            f"field to {self.field_max:g}, depth {words(self.depth_mm)} mm, focus {words(self.focus_mm)} mm, "
            f"{nodes} nodes (focus, depth, y, x)>"
        )

    def psf(self, field: Any, depth_mm: Any = None, focus_mm: Any = None) -> NDArray[np.float32]:
        """Kernels float32 [..., W, y, x] at `field` [..., 2] (field_x, field_y) and distances in mm.

        Bilinear in the field, linear in dioptres. Takes what `PsfModel.psf` takes: lists, arrays and tensors; the
        distances broadcast with the leading axes of `field`, may be inf, and may be left out where there is one.
        NaN in cells that touch a node without light. Raises RunMismatch outside what was baked, ConfigError for
        what is no place.
        """
        xy, depth, focus = self.domain.places(field, depth_mm, focus_mm)
        shape, count = xy.shape[:-1], xy[..., 0].size
        index, weight = self.lattice.corners(xy.reshape(count, 2), depth.reshape(count), focus.reshape(count))
        found = blend(self.kernels, index, weight)
        return found.reshape(*shape, len(self.wavelength_um), len(self.y_um), len(self.x_um))


def _decode(store: Store) -> NDArray[np.float32]:
    """The kernels of a table [nodes, K], nodes in the order focus, depth, y, x."""
    shape, rows = store.spec.shape("psf"), store.spec.band_rows
    kernels = np.empty(shape, dtype=np.float32)
    for focus, depth, band in np.ndindex(*shape[:2], shape[2] // rows):
        at = {"focus": focus, "depth": depth, "field_y": band * rows}
        size = {"focus": 1, "depth": 1, "field_y": rows}
        index = {dim: slice(first, first + size[dim]) for dim, first in at.items()}
        store.read_into(kernels[tuple(index.values())], "psf", **index)
    return kernels.reshape(int(np.prod(shape[:4])), -1)


def axes_of(coords: Mapping[str, Array]) -> tuple[Array, ...]:
    """The axes between whose values a table is linear, ascending: minus dioptres of focus and depth, field y and x."""
    return -coords["focus_dioptre"], -coords["depth_dioptre"], coords["field_y"], coords["field_x"]


class Lattice:
    """The nodes of a table, numbered in the order focus, depth, field y, field x."""

    def __init__(self, coords: Mapping[str, Array]) -> None:
        self.axes = axes_of(coords)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes))

    def domain(self, what: str) -> Domain:
        """The places between the nodes."""
        focus, depth, _, field_x = self.axes
        spans = [(float(-axis[-1]), float(-axis[0])) for axis in (depth, focus)]
        return Domain(what, "baked for", "bake the run with other --depth or --focus", float(field_x[-1]), *spans)

    def corners(self, xy: Array, depth_mm: Array, focus_mm: Array) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Numbers and weights of the nodes [Q, 16] about field points [Q, 2] at distances [Q]."""
        with np.errstate(divide="ignore"):
            wanted = np.stack([-1000 / focus_mm, -1000 / depth_mm, xy[:, 1], xy[:, 0]], axis=-1)
        index, weight = np.empty((len(xy), 16), dtype=np.int64), np.empty((len(xy), 16), dtype=np.float32)
        _corners(self.axes, wanted, index, weight)
        return index, weight


def blend(kernels: NDArray[np.float32], index: NDArray[np.int64], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums [Q, K] of rows of `kernels` [nodes, K]: those of `index` [Q, 16], times `weight` [Q, 16]."""
    found = np.empty((len(index), kernels.shape[1]), dtype=np.float32)
    _blend(kernels, index, weight, found)
    return found


@jit
def bracket(axis, value):  # type: ignore[no-untyped-def]
    """The number of the node of an ascending axis before a value, and the share of the one after it.

    Beyond the ends the share leaves [0, 1]; where there is one node, it has all.
    """
    if len(axis) == 1:
        return 0, 0.0
    lower = min(max(np.searchsorted(axis, value, side="right") - 1, 0), len(axis) - 2)
    return lower, (value - axis[lower]) / (axis[lower + 1] - axis[lower])


@jit
def _corners(axes, wanted, index, weight):  # type: ignore[no-untyped-def]
    """Twice as many corners axis by axis; what weighs nothing is replaced by the heaviest: it may have no kernel."""
    for q in range(len(wanted)):
        at, share = index[q], weight[q]
        at[0], share[0], count = 0, 1, 1
        for dim in range(4):
            axis = axes[dim]
            lower, after = bracket(axis, wanted[q, dim])
            after = min(max(after, 0.0), 1.0)
            for i in range(count - 1, -1, -1):  # from the last, whose successors overwrite nothing that is needed
                node, whole = at[i] * len(axis) + lower, share[i]
                at[2 * i], share[2 * i] = node, whole * (1 - after)
                at[2 * i + 1], share[2 * i + 1] = node + 1, whole * after
            count *= 2
        heaviest = at[np.argmax(share)]
        for i in range(count):
            at[i] = at[i] if share[i] > LEAST else heaviest


@jit
def _blend(kernels, index, weight, found):  # type: ignore[no-untyped-def]
    """All 16 rows in one pass: a row, or four, at a time would wait for memory twice to four times as long."""
    for q in range(len(found)):
        rows, shares, out = index[q], weight[q], found[q]
        a, of_a = _four(kernels, rows[0:4], shares[0:4])
        b, of_b = _four(kernels, rows[4:8], shares[4:8])
        c, of_c = _four(kernels, rows[8:12], shares[8:12])
        d, of_d = _four(kernels, rows[12:16], shares[12:16])
        for k in range(len(out)):
            out[k] = _sum(a, of_a, k) + _sum(b, of_b, k) + _sum(c, of_c, k) + _sum(d, of_d, k)


@jit
def _four(kernels, rows, shares):  # type: ignore[no-untyped-def]
    some = (kernels[rows[0]], kernels[rows[1]], kernels[rows[2]], kernels[rows[3]])
    return some, (shares[0], shares[1], shares[2], shares[3])


@jit
def _sum(some, shares, k):  # type: ignore[no-untyped-def]
    return shares[0] * some[0][k] + shares[1] * some[1][k] + shares[2] * some[2][k] + shares[3] * some[3][k]
