"""The choice of a setting by the error at training points that are left out with all others of their radius.

On a square grid a radius is met up to eight times; leaving out one point of eight would say nothing of the radii
in between. The points of the largest radius are never judged, because nothing is asked beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.covariance import Setting
from psftrain.canonical.frame import Polar

Indices = NDArray[np.int64]
ROUNDS = 3
FEW_RINGS = 3  # below, points are left out one by one
PRICE = 0.03  # share of its score by which another row of HARMONICS must pay


@dataclass(frozen=True)
class Folds:
    """The group of each point [M], left out as one, and the points that are judged [C]."""

    groups: Indices
    judged: Indices

    @classmethod
    def of(cls, points: Polar) -> Folds:
        """By radius, or by point where the radii are too few."""
        rings = points.ring
        if rings.max() + 1 < FEW_RINGS:
            return cls(np.arange(len(points)), np.arange(len(points)))
        return cls(rings, np.flatnonzero(rings < rings.max()))

    def judging(self, count: int, draw: np.random.Generator) -> Folds:
        """The same with at most `count` of the judged points."""
        return Folds(self.groups, np.sort(draw.permutation(self.judged)[:count]))


def search(
    start: Setting, score: Callable[[Setting], float], lengths: tuple[float, ...], noises: tuple[float, ...]
) -> tuple[Setting, float]:
    """The setting with the least score, one thing after the other, and that score."""

    def priced(setting: Setting) -> float:
        return score(setting) * (1 + PRICE * setting.harmonics)

    known = {start: priced(start)}
    best = start
    for _ in range(ROUNDS):
        before = best
        for things in range(3):
            for setting in list(best.neighbours(lengths, noises))[things]:
                if setting not in known:
                    known[setting] = priced(setting)
            best = min(known, key=lambda setting: known[setting])
        if best == before:
            break
    return best, known[best]
