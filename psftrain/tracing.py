"""What it costs to trace the lens itself, as wrong as the model is: the row that a known lens may do best with.

Legend: S chosen places of one slice (copy, depth, focus), W wavelengths, y x bins.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from psfgen.errors import PsfError
from psfgen.store import Store
from psftrain import metrics
from psftrain.data import COLUMN, COPY, DEPTH, FOCUS, ROW, Examples

if TYPE_CHECKING:
    from psfgen.points import PointTracer

Array = NDArray[np.float64]
MOST_PLACES = 256  # of a slice: their mean error is known to some 5 %
MOST_SLICES = 4
FEWEST_RAYS, MOST_RAYS = 16, 2**17


@dataclass(frozen=True)
class Traced:
    """Kernels [n, W, y, x] of the examples `at` [n], traced with `spp` rays in `ms_per_psf` each."""

    at: NDArray[np.int64]
    kernels: Array
    spp: int
    ms_per_psf: float


def trace(store: Store, held: Examples, scored: NDArray[np.bool_], errors: Array) -> Traced | str:
    """Trace some of the scored examples of a store with the fewest rays, doubled, that err no more than `errors`.

    `errors` [n]: those of the model on the scored examples. Where as many rays as are tried do not suffice, the most
    that were tried. Returns in words why the lens cannot be traced where it cannot.
    """
    slices = _slices(held, scored)
    at = np.concatenate(slices)
    allowed = errors[np.searchsorted(np.flatnonzero(scored), at)].mean()
    truth = held.kernels[at].numpy().astype(np.float64)
    try:
        tracers = _tracers(store, held, slices)
        spp = FEWEST_RAYS
        while True:
            kernels, seconds = _timed(tracers, store, held, slices, spp)
            if spp >= MOST_RAYS or metrics.rel_l2(kernels, truth).mean() <= allowed:
                return Traced(at, kernels, spp, 1000 * seconds / len(at))
            spp *= 2
    except (PsfError, ValidationError) as error:
        return f"the lens of {store.path} cannot be traced: {' '.join(str(error).split())}"


def _slices(held: Examples, scored: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Examples to trace, evenly over some slices that are evenly chosen."""
    lit = [numbers[numbers >= 0].numpy() for numbers in held.slices]
    kept = [numbers for numbers in (some[scored[some]] for some in lit) if len(numbers)]
    return [_evenly(kept[i], MOST_PLACES) for i in _evenly(np.arange(len(kept)), MOST_SLICES)]


def _evenly(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return np.asarray(values[np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)])


def _tracers(store: Store, held: Examples, slices: list[NDArray[np.int64]]) -> dict[int, PointTracer]:
    """A tracer of each specimen that is asked for."""
    from psfgen.points import PointTracer  # brings DeepLens, which takes seconds

    return {copy: PointTracer(store, copy) for copy in {int(held.index[some[0], COPY]) for some in slices}}


def _timed(
    tracers: dict[int, PointTracer], store: Store, held: Examples, slices: list[NDArray[np.int64]], spp: int
) -> tuple[Array, float]:
    """Kernels of all slices [n, W, y, x], and the seconds they took once everything was set up."""
    parts, seconds, coords = [], 0.0, store.coords
    for some in slices:
        copy, focus, depth = (int(held.index[some[0], column]) for column in (COPY, FOCUS, DEPTH))
        field_xy = np.stack(
            [coords["field_x"][held.index[some, COLUMN]], coords["field_y"][held.index[some, ROW]]], axis=-1
        )
        place = float(coords["depth"][depth]), focus, spp
        tracers[copy].kernels(field_xy[:1], *place)
        started = time.perf_counter()
        found = tracers[copy].kernels(field_xy, *place)
        seconds += time.perf_counter() - started
        parts.append(found.psf_binned if held.places.array == "psf_binned" else found.psf)
    return np.concatenate(parts).astype(np.float64), seconds
