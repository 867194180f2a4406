"""Thin-plate splines over the field that know their own error at points left out.

Legend: M training points, Q query points, D numbers a point has. Duchon, Splines minimizing rotation-invariant
semi-norms (1977).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import FitError

Array = NDArray[np.float64]
LEAST_POINTS = 4
ALONE = 1e-9  # of the inverse's diagonal, below which the other points do not span a field


@dataclass(frozen=True)
class ThinPlate:
    """Splines through the training `points` [M, 2]; `inverse` [M + 3, M + 3] is that of their equations."""

    points: Array
    inverse: Array

    @classmethod
    def of(cls, points: Array) -> ThinPlate:
        """Raises FitError where the points are too few, lie on one line or stand in one place."""
        if len(points) < LEAST_POINTS or np.linalg.matrix_rank(np.column_stack([points, np.ones(len(points))])) < 3:
            raise FitError(
                f"canonical: {len(points)} field points with light do not span a field; render at least "
                f"{LEAST_POINTS} that do not lie on a line"
            )
        if len(np.unique(points, axis=0)) < len(points):
            raise FitError("canonical: two training kernels at one field point; give one lens at one depth and focus")
        plane = _plane(points)
        equations = np.block([[_bending(points, points), plane], [plane.T, np.zeros((3, 3))]])
        return cls(points, np.linalg.inv(equations))

    def weights(self, values: Array) -> Array:
        """What `predict` needs of values [M, D]: [M + 3, D]."""
        return np.asarray(self.inverse[:, : len(self.points)] @ values)

    def left_out(self, values: Array) -> Array:
        """At each training point the prediction from all others [M, D]; their mean where they lie on one line."""
        count = len(self.points)
        own = np.diagonal(self.inverse)[:count, None]
        spans = np.abs(own) > ALONE * np.abs(own).max()
        predicted = values - self.weights(values)[:count] / np.where(spans, own, 1)
        return np.where(spans, predicted, (values.sum(axis=0) - values) / (count - 1))


def at_field(field: Array, points: Array, weights: Array) -> Array:
    """Values [Q, D] of the splines of `weights` [M + 3, D] through `points` [M, 2]."""
    return np.asarray(_bending(field, points) @ weights[: len(points)] + _plane(field) @ weights[len(points) :])


def _bending(at: Array, points: Array) -> Array:
    squared = np.square(at[:, None] - points).sum(axis=-1)
    return np.asarray(squared * np.log(np.maximum(squared, np.finfo(float).tiny)) / 2)


def _plane(points: Array) -> Array:
    return np.column_stack([np.ones(len(points)), points])
