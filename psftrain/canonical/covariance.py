"""How alike the kernels of two field points are, and what that says of a point that is left out.

A rotationally symmetric lens has one image a radius, and following it through the axis to the negative radius turns
it by 180 degrees: what is even under that turn has a covariance even in both radii, what is odd has an odd one.
Decentred and tilted elements add terms that go as cos m theta, sin m theta; to first order in
the error it is m = 1. So the covariance is a sum over m of a_m cos m (theta - theta') times one of the radii.

Legend: M training points, Q query points, D numbers a point has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.frame import Polar

Array = NDArray[np.float64]

# Variance of the terms m = 0, 1, ... relative to the symmetric one: a perfect lens to a crooked one.
HARMONICS: tuple[tuple[float, ...], ...] = ((1.0,), (1.0, 0.03, 0.01), (1.0, 1.0, 0.3), (1.0, 1.0, 0.3, 0.1, 0.03))
MEAN_VARIANCE = 20.0  # of what does not change over the field at all; large, so that it is free


class Parity(NamedTuple):
    """Whether a number keeps (1) or changes (-1) its sign where u, and where v, does."""

    u: int
    v: int


PARITIES = tuple(Parity(u, v) for u in (1, -1) for v in (1, -1))


@dataclass(frozen=True)
class Setting:
    """A covariance: its `length` in field radii, the row of HARMONICS, and the variance of `noise` beside its own."""

    length: float
    harmonics: int
    noise: float

    def neighbours(self, lengths: tuple[float, ...], noises: tuple[float, ...]) -> Iterator[list[Setting]]:
        """The settings that differ from this one in one thing, thing by thing."""
        yield [replace(self, length=length) for length in lengths]
        yield [replace(self, noise=noise) for noise in noises]
        yield [replace(self, harmonics=harmonics) for harmonics in range(len(HARMONICS))]

    def has(self, parity: Parity) -> bool:
        """Whether such a part exists: nothing of a symmetric lens is odd in v."""
        return parity.v > 0 or self.harmonics > 0


def covariance(setting: Setting, parity: Parity, at: Polar, other: Polar) -> Array:
    """Between the values of a part at two sets of points [Q, M]."""
    turn = at.theta[:, None] - other.theta
    return _covariance(setting, parity, turn, at.radius[:, None] - other.radius, at.radius[:, None] + other.radius)


def variance(setting: Setting, parity: Parity, at: Polar) -> Array:
    """Of the values of a part at points [Q]."""
    none = np.zeros(len(at))
    return _covariance(setting, parity, none, none, 2 * at.radius)


def _covariance(setting: Setting, parity: Parity, turn: Array, difference: Array, total: Array) -> Array:
    """From the difference of the azimuths, and the difference and the sum of the radii."""
    terms = HARMONICS[setting.harmonics]
    same, across = _matern(difference, setting.length), _matern(total, setting.length)
    even, odd = same + across, same - across
    found = np.zeros_like(same)
    for m, share in enumerate(terms):
        radial = even if parity.u * parity.v * (-1) ** m > 0 else odd
        if m == 0 and parity.v < 0:
            found += terms[1] * radial  # two errors can give a lens a handedness
        elif m == 0 and parity.u > 0:
            found += share * (radial + MEAN_VARIANCE)
        else:
            found += share * np.cos(m * turn) * radial
    return found


def of_training(setting: Setting, parity: Parity, points: Polar) -> Array:
    """Of the noisy values at the training points [M, M]."""
    return covariance(setting, parity, points, points) + setting.noise * np.eye(len(points))


def left_out(precision: Array, groups: NDArray[np.int64], chosen: NDArray[np.int64]) -> Array:
    """Weights of all points in the prediction at `chosen` ones [C] from all outside of their own group [C, M].

    `precision` [M, M] is the inverse of the covariance (Rasmussen and Williams 2006, section 5.4.2, by blocks).
    """
    weights = np.zeros((len(chosen), len(precision)))
    for group in np.unique(groups[chosen]):
        members = np.flatnonzero(groups == group)
        rows = -np.linalg.solve(precision[np.ix_(members, members)], precision[members])
        rows[:, members] = 0
        of_group = np.flatnonzero(groups[chosen] == group)
        weights[of_group] = rows[np.searchsorted(members, chosen[of_group])]
    return weights


def _matern(distance: Array, length: float) -> Array:
    """The Matern covariance of smoothness 5/2."""
    scaled = np.sqrt(5) * np.abs(distance) / length
    return np.asarray((1 + scaled + scaled**2 / 3) * np.exp(-scaled))
