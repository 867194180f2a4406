"""How many nodes a table takes to follow its model, found out before it is made.

Interpolation along each axis alone is measured at some random places, and the axis that errs most is refined until
the table adds little to the error of the model, or is as large as it may get.

Legend: N places, C corners of a place along one axis, W wavelengths, y x the bins of a kernel.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psftrain.fidelity import kernels_of
from psftrain.metrics import rel_l2
from psftrain.places import Array
from psftrain.predict import PsfModel

log = logging.getLogger(__name__)

GOAL = 0.25  # of the error that the model expects of itself: where both are independent, 1.03 times that in all
UNTOLD = 0.01  # the goal for a model that expects nothing
MOST_BYTES = 256 * 2**20  # of a table whose nodes nobody asked for
PLACES = 128
FEWEST = 17  # field points a side to begin with, and
DEFAULT = 49  # in a table of one depth and one focus distance
MATTERS = 0.25  # of the error of the worst axis
FINER = 2**0.5  # times as many cells of an axis in a step


@dataclass(frozen=True)
class Asked:
    """The nodes that a user has asked for; None: as many as it takes."""

    grid: int | None = None
    depth_mm: Array | None = None
    focus_mm: Array | None = None


class Nodes(NamedTuple):
    """Field points a side, depths and focus distances of a table."""

    field: int
    depth_mm: Array
    focus_mm: Array


@dataclass(frozen=True)
class _Cells:
    """Cells of the field along one side; cells of the table between two distances trained on."""

    field: int
    depth: int = 1
    focus: int = 1

    def finer(self, axis: str) -> _Cells:
        """More of them along an axis; an even number over the field, so that a node lies on the axis."""
        now = getattr(self, axis)
        more = 2 * round(now * FINER / 2) if axis == "field" else max(now + 1, round(now * FINER))
        return replace(self, **{axis: more})


def nodes_for(model: PsfModel, asked: Asked, depth_mm: Array, focus_mm: Array) -> Nodes:
    """The nodes of a table of a model, at least at the distances given unless others are asked for.

    Over what is left open, as few as add `GOAL` to the error that the model expects of itself, as far as `MOST_BYTES`
    reach; what is asked for is taken as it is. Raises FitError where the model gives no numbers.
    """
    depth_mm, focus_mm = (
        given if asking is None else asking
        for given, asking in ((depth_mm, asked.depth_mm), (focus_mm, asked.focus_mm))
    )
    if asked.grid is not None and asked.depth_mm is not None and asked.focus_mm is not None:
        return Nodes(asked.grid, depth_mm, focus_mm)
    chosen = _Choice(model, asked, depth_mm, focus_mm)
    single = len(depth_mm) == len(focus_mm) == 1
    cells = _Cells((asked.grid or (DEFAULT if single else FEWEST)) - 1)
    errors = {axis: chosen.error(axis, cells) for axis in ("field", "depth", "focus")}
    while sum(errors.values()) > chosen.goal:
        worst = max(errors.values())
        open_ = [
            axis
            for axis in chosen.open
            if errors[axis] > MATTERS * worst and chosen.size_bytes(cells.finer(axis)) <= MOST_BYTES
        ]
        if not open_:
            break
        # The field has two sides, so that refining it costs twice as many nodes.
        axis = max(open_, key=lambda axis: errors[axis] / (2 if axis == "field" else 1))
        cells = cells.finer(axis)
        errors[axis] = chosen.error(axis, cells)
    log.info("nodes %s: errors %s, goal %.4f", cells, errors, chosen.goal)
    return chosen.nodes(cells)


class _Choice:
    """The places at which axes are tried, and what the model says there."""

    def __init__(self, model: PsfModel, asked: Asked, depth_mm: Array, focus_mm: Array) -> None:
        self.model, self.depth_mm, self.focus_mm = model, depth_mm, focus_mm
        given = {"field": asked.grid is not None, "depth": asked.depth_mm is not None}
        given["focus"] = asked.focus_mm is not None
        several = {"field": True, "depth": len(depth_mm) > 1, "focus": len(focus_mm) > 1}
        self.open = [axis for axis in several if several[axis] and not given[axis]]
        rng = np.random.default_rng(PLACES)
        self.field = model.field_max * rng.uniform(-1, 1, (PLACES, 2))
        self.dioptre = {
            name: rng.uniform(_dioptre(values).min(), _dioptre(values).max(), PLACES)
            for name, values in (("depth", depth_mm), ("focus", focus_mm))
        }
        self.truth = self._asked(self.field[:, None])[:, 0]
        expected = model.expected_error(self.field, *map(_mm, self.dioptre.values()))
        told = None if expected is None else expected[np.isfinite(expected)]
        self.goal = UNTOLD if told is None or not told.size else GOAL * float(told.mean())

    def nodes(self, cells: _Cells) -> Nodes:
        """What some cells come to."""
        return Nodes(cells.field + 1, between(self.depth_mm, cells.depth), between(self.focus_mm, cells.focus))

    def size_bytes(self, cells: _Cells) -> int:
        """That of a table's kernels."""
        field, depth_mm, focus_mm = self.nodes(cells)
        numbers = len(self.model.wavelength_um) * len(self.model.x_um) ** 2
        return 4 * numbers * field**2 * len(depth_mm) * len(focus_mm)

    def error(self, axis: str, cells: _Cells) -> float:
        """Mean relative L2 of interpolation along an axis alone."""
        nodes = self.nodes(cells)
        if axis == "field":
            side = np.linspace(-self.model.field_max, self.model.field_max, nodes.field)
            (x, of_x), (y, of_y) = (_corners(side, self.field[:, i]) for i in (0, 1))
            corners = [(x[:, i], y[:, j], of_x[:, i] * of_y[:, j]) for i in (0, 1) for j in (0, 1)]
            field = np.stack([np.stack([right, up], axis=-1) for right, up, _ in corners], axis=1)
            found, weight = self._asked(field), np.stack([share for *_, share in corners], axis=1)
        else:
            known = np.sort(_dioptre(nodes.depth_mm if axis == "depth" else nodes.focus_mm))
            if len(known) == 1:
                return 0.0
            at, weight = _corners(known, self.dioptre[axis])
            found = self._asked(np.repeat(self.field[:, None], 2, axis=1), **{axis: at})
        blended = np.einsum("nc,ncwyx->nwyx", weight, found)
        errors = rel_l2(blended, self.truth)
        errors = errors[np.isfinite(errors)]  # some places, or what lies about them, may be dark
        return float(errors.mean()) if errors.size else 0.0

    def _asked(self, field: Array, **dioptre: Array) -> NDArray[np.float32]:
        """Kernels [N, C, W, y, x] at fields [N, C, 2], and other dioptres [N, C] than those of the places."""
        at = {name: dioptre.get(name, values[:, None]) for name, values in self.dioptre.items()}
        return kernels_of(self.model, field, _mm(at["depth"]), _mm(at["focus"]))


def between(distances_mm: Array, cells: int) -> Array:
    """The distances given, and others between neighbours, evenly in dioptres so that each gap becomes so many cells."""
    dioptre = _dioptre(distances_mm)
    at = np.arange((len(dioptre) - 1) * cells + 1) / cells
    found = _mm(np.interp(at, np.arange(len(dioptre)), dioptre))
    found[::cells] = distances_mm
    return found


def _corners(axis: Array, wanted: Array) -> tuple[Array, Array]:
    """The two values of an ascending axis about each of those wanted [N, 2], and their shares [N, 2]."""
    lower = np.clip(np.searchsorted(axis, wanted, side="right") - 1, 0, len(axis) - 2)
    after = (wanted - axis[lower]) / (axis[lower + 1] - axis[lower])
    return np.stack([axis[lower], axis[lower + 1]], axis=1), np.stack([1 - after, after], axis=1)


def _dioptre(distances_mm: Array) -> Array:
    return 1000 / distances_mm


def _mm(dioptre: Array) -> Array:
    with np.errstate(divide="ignore"):
        return 1000 / dioptre
