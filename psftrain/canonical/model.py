"""The canonical field model, fitted in seconds; every choice is made by points that are left out.

Legend: M training points, Q query points, W wavelengths, k kernel side, b bins a side, D = W b b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.blend import Blend
from psftrain.canonical.covariance import PARITIES, Parity, Setting, of_training
from psftrain.canonical.expectation import Expectation, disagreement, ignorance
from psftrain.canonical.frame import Polar, binning, from_canonical, nodes_of, on_simplex, over_points
from psftrain.canonical.shape import Part, Shape
from psftrain.canonical.thinplate import at_field
from psftrain.canonical.warp import Warp

Array = NDArray[np.float64]
Numbers = NDArray[Any]

CHUNK = 256  # kernels predicted at once


@dataclass(frozen=True)
class Canonical:
    """A fitted field of kernels. Fields are (x, y), y up, in units in which angles are those on the sensor."""

    points: Array  # [M, 2] that it was fitted to
    warp: Warp
    shape: Shape
    splines: Array  # [M + 3, 2 D]: of what the canonical images leave, and of the kernels
    blend: Blend
    errors: Array  # [M] rel_l2 with each point left out
    expectation: Expectation
    kernel_px: int
    bins: int

    @property
    def cv_error(self) -> float:
        """Mean relative L2 error of training points left out with all others of their field radius."""
        return float(self.errors.mean())

    @property
    def settings(self) -> dict[str, Any]:
        """What was given and what cross-validation chose, as plain data."""
        return {
            "kernel_px": self.kernel_px,
            "bins": self.bins,
            "warp": asdict(self.warp.setting),
            "shape": asdict(self.shape.setting),
        }

    def predict(self, field: Numbers) -> NDArray[np.float32]:
        """Kernels [Q, W, b, b] at field points [Q, 2]: non-negative, each channel summing to 1."""
        field = np.asarray(field, dtype=np.float64)
        found = np.empty((len(field), len(self.warp.size), self.bins, self.bins), dtype=np.float32)
        for first in range(0, len(field), CHUNK):
            some = field[first : first + CHUNK]
            mixed = self.blend.mix(Polar.of(some).radius, *self._models(some))
            found[first : first + CHUNK] = on_simplex(mixed.reshape(-1, *found.shape[1:]))
        return found

    def expected_error(self, field: Numbers) -> Array:
        """The relative L2 error to expect at field points [Q, 2], from those of the training points left out [Q]."""
        field = np.asarray(field, dtype=np.float64)
        at, known = Polar.of(field), self._nodes
        unsure = ignorance(self.shape.setting, self._precision, at, known)
        apart = np.zeros(len(field))
        for first in range(0, len(field), CHUNK):
            canonical, _, plain = self._models(field[first : first + CHUNK])
            apart[first : first + CHUNK] = disagreement(canonical, plain)
        return self.expectation(field, unsure, apart)

    def _models(self, field: Array) -> tuple[Array, Array, Array]:
        """The canonical kernels, the spline of what they leave and the spline of kernels, [Q, D] each."""
        (at, of), known = nodes_of(field), self._nodes
        shares = binning(self.kernel_px, self.bins)
        kernels = over_points(from_canonical(self.shape(at, known), at.theta, self.warp(at, known), shares), of)
        residual, plain = np.split(at_field(field, self.points, self.splines), 2, axis=1)
        return kernels.reshape(len(field), -1), residual, plain

    @cached_property
    def _precision(self) -> Array:
        return np.asarray(np.linalg.inv(of_training(self.shape.setting, PARITIES[0], self._nodes)))

    @cached_property
    def _nodes(self) -> Polar:
        return nodes_of(self.points)[0]

    def arrays(self) -> dict[str, Numbers]:
        """All that `from_arrays` needs beside `settings`."""
        found: dict[str, Numbers] = {
            "points": self.points,
            "splines": self.splines,
            "errors": self.errors,
            "expectation": self.expectation.scaled,
            "warp.weights": self.warp.weights,
            "warp.size": self.warp.size,
            "blend.radius": self.blend.radius,
            "blend.residual": self.blend.residual,
            "blend.plain": self.blend.plain,
        }
        for part in self.shape.parts:
            found[_name(part.parity, "weights")] = part.scores
            found[_name(part.parity, "components")] = part.components
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Numbers], settings: Mapping[str, Any]) -> Canonical:
        """The model that gave these arrays and settings."""
        parts = tuple(
            Part(parity, arrays[_name(parity, "weights")], arrays[_name(parity, "components")])
            for parity in PARITIES
            if _name(parity, "weights") in arrays
        )
        return cls(
            arrays["points"],
            Warp(Setting(**settings["warp"]), arrays["warp.weights"], arrays["warp.size"]),
            Shape(Setting(**settings["shape"]), parts),
            arrays["splines"],
            Blend(arrays["blend.radius"], arrays["blend.residual"], arrays["blend.plain"]),
            arrays["errors"],
            Expectation(arrays["points"], arrays["expectation"]),
            settings["kernel_px"],
            settings["bins"],
        )


def _name(parity: Parity, what: str) -> str:
    """Such as shape.even.odd.weights, of the part that is even in u and odd in v."""
    even_odd = {1: "even", -1: "odd"}
    return f"shape.{even_odd[parity.u]}.{even_odd[parity.v]}.{what}"
