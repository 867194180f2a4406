"""The error to expect at a field point, from the errors at training points that were left out.

An error goes with two things that are known anywhere: how far the nearest training radii are, as the Gaussian process
counts it, and how far the field-aligned and the plain model disagree. What is left of the training points' errors
when both are divided out changes slowly over the field.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.covariance import PARITIES, Setting, covariance, variance
from psftrain.canonical.frame import Polar

Array = NDArray[np.float64]
NEIGHBOURS = 4  # about so many training points speak for a place
LEAST = 1e-6  # of an error, a distance or a disagreement


@dataclass(frozen=True)
class Expectation:
    """Errors of the training `points` [M, 2] in units of what they go with, `scaled` [M]."""

    points: Array
    scaled: Array

    @classmethod
    def of(cls, points: Array, errors: Array, ignorance: Array, disagreement: Array) -> Expectation:
        """From errors, ignorance and disagreement at points left out [M]."""
        return cls(points, np.maximum(errors, LEAST) / _units(ignorance, disagreement))

    def __call__(self, field: Array, ignorance: Array, disagreement: Array) -> Array:
        """Relative L2 errors to expect at field points [Q, 2]."""
        squared = np.square(field[:, None] - self.points).sum(axis=-1)
        between = np.sort(np.square(self.points[:, None] - self.points).sum(axis=-1), axis=1)
        typical = np.median(between[:, min(NEIGHBOURS, len(between) - 1)])
        near = np.exp(-0.5 * (squared - squared.min(axis=1, keepdims=True)) / typical)
        smooth = np.exp(near @ np.log(self.scaled) / near.sum(axis=1))
        return np.asarray(smooth * _units(ignorance, disagreement))


def ignorance(setting: Setting, precision: Array, at: Polar, points: Polar) -> Array:
    """Standard deviation that the Gaussian process has left at a place, relative to its scale [Q].

    `precision` [M, M] is the inverse covariance of the training points' even part.
    """
    known = covariance(setting, PARITIES[0], at, points)
    own = variance(setting, PARITIES[0], at)
    return np.asarray(np.sqrt(np.maximum(own - np.einsum("qm,qm->q", known @ precision, known), 0)))


def ignorance_left_out(precision: Array, groups: NDArray[np.int64]) -> Array:
    """The same at each training point where its group is left out [M]."""
    found = np.zeros(len(precision))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        found[members] = np.sqrt(np.diagonal(np.linalg.inv(precision[np.ix_(members, members)])))
    return found


def disagreement(one: Array, other: Array) -> Array:
    """|A - B| / |A| of each kernel [M, D]; 1 where A is dark."""
    size = np.linalg.norm(one, axis=1)
    return np.asarray(np.divide(np.linalg.norm(one - other, axis=1), size, out=np.ones_like(size), where=size > 0))


def _units(ignorance: Array, disagreement: Array) -> Array:
    return np.sqrt(np.maximum(ignorance, LEAST) * np.maximum(disagreement, LEAST))
