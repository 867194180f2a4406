"""How a place in a store becomes the model's input.

Legend: C condition (field x, field y, depth, focus).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.store import Store
from psftrain.places import Domain

CONDITION = ("field_x", "field_y", "depth", "focus")


@dataclass(frozen=True)
class Conditioning:
    """How a place in a store becomes the model's input, fixed by the training store.

    field / field_max; depth and focus in dioptres, scaled to [-1, 1] over the training range, 0 where
    there is one value. `aspect` = sensor height / width, for angles on the sensor; `grid` = field points a
    side of the coarsest training store.
    """

    field_max: float
    depth_dioptre: tuple[float, float]
    focus_dioptre: tuple[float, float]
    aspect: float
    grid: int

    @property
    def varies(self) -> list[str]:
        """Which of depth and focus take several values."""
        spans = {"depth": self.depth_dioptre, "focus": self.focus_dioptre}
        return [name for name, (low, high) in spans.items() if high > low]

    def encode(self, field_x: Any, field_y: Any, depth_dioptre: Any, focus_dioptre: Any) -> NDArray[np.float32]:
        """Conditions [..., C] of places; the arguments broadcast."""
        columns = [np.asarray(field_x) / self.field_max, np.asarray(field_y) / self.field_max]
        for values, (low, high) in ((depth_dioptre, self.depth_dioptre), (focus_dioptre, self.focus_dioptre)):
            half = (high - low) / 2
            columns.append((np.asarray(values) - low - half) / half if half else np.zeros_like(values, dtype=float))
        return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float32)

    def domain(self, what: str) -> Domain:
        """Where kernels of `what` may be: within what was trained on."""
        way_out = "render other points or train on a wider range"
        return Domain(what, "trained on", way_out, self.field_max, self.depth_dioptre, self.focus_dioptre)

    def require(self, depth_dioptre: NDArray[np.float64], focus_dioptre: NDArray[np.float64], what: str) -> None:
        """Raise RunMismatch where a depth or focus of `what` lies outside what was trained on."""
        self.domain(what).require(depth_dioptre, focus_dioptre)


def conditioning_of(stores: Sequence[Store]) -> Conditioning:
    """The conditioning that a set of training stores fixes."""

    def span(name: str) -> tuple[float, float]:
        values = np.concatenate([store.coords[name] for store in stores])
        return float(values.min()), float(values.max())

    width, height = stores[0].attrs["sensor_mm"]
    field = np.concatenate([np.abs(store.coords[name]) for store in stores for name in ("field_x", "field_y")])
    return Conditioning(
        field_max=float(field.max()) or 1.0,
        depth_dioptre=span("depth_dioptre"),
        focus_dioptre=span("focus_dioptre"),
        aspect=height / width,
        grid=min(min(len(store.coords["field_x"]), len(store.coords["field_y"])) for store in stores),
    )


def conditioning_document(conditioning: Conditioning) -> dict[str, Any]:
    """A conditioning as plain data."""
    return asdict(conditioning)


def conditioning_from(document: dict[str, Any]) -> Conditioning:
    """A conditioning from plain data."""
    spans = {key: tuple(document[key]) for key in ("depth_dioptre", "focus_dioptre")}
    return Conditioning(**{**document, **spans})
