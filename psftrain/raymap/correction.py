"""What a ray map leaves of the kernels, interpolated over the field; and how far each is to be trusted.

Kernels are `trust` x (those of the map) + `share` x (thin-plate spline of what that leaves at the training points):
trust 0 is plain interpolation, share 0 the map alone. Both are chosen by predicting points that were left out.

Legend: N field points (nodes), S slices (a depth and a focus each), V numbers of a kernel stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.thinplate import ThinPlate

Array = NDArray[np.float64]

# The plainer of two that do equally well comes first.
FEWEST = 3
HOLE = 0.5  # what interpolation errs between points, of what it errs at one of them that was left out
CHOICES = ((1.0, 0.0), (1.0, 1.0), (1.0, 0.5), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Trust:
    """What was chosen, and the relative L2 error `errors` [S, N] of each point when it was left out; NaN: dark."""

    trust: float
    share: float
    errors: Array

    @property
    def error(self) -> float:
        return float(np.nanmean(self.errors))

    @property
    def expected(self) -> Array:
        """The error to be expected at each point [S, N], had it not been trained on; where it is dark, the mean."""
        gap = 1 - (1 - HOLE) * self.share  # a map errs as much between points as at them
        return gap * np.where(np.isnan(self.errors), self.error, self.errors)


def choose(splines: ThinPlate, truth: Array, unseen: Array) -> Trust:
    """The choice for kernels `truth` [S, N, V] (NaN: dark), which a map that has not seen them gives as `unseen`."""
    size = np.linalg.norm(truth, axis=-1)
    found = []
    for trust, share in CHOICES:
        left = np.nan_to_num(truth - trust * unseen)
        between = np.stack([splines.left_out(slice_) for slice_ in left]) if share else 0.0
        guess = trust * unseen + share * between
        found.append(Trust(trust, share, np.linalg.norm(guess - truth, axis=-1) / size))
    return min(found, key=lambda one: one.error)


def weights(splines: ThinPlate, chosen: Trust, truth: Array, mapped: Array) -> NDArray[np.float32]:
    """The weights [S, N + 3, V] of the splines of what the map, as `mapped` [S, N, V], leaves of `truth`."""
    left = np.nan_to_num(truth - chosen.trust * mapped)
    return np.stack([chosen.share * splines.weights(slice_) for slice_ in left]).astype(np.float32)


def spans(nodes: Array) -> bool:
    """Whether splines through some nodes [N, 2] are defined."""
    return len(nodes) > FEWEST and bool(np.linalg.matrix_rank(np.column_stack([nodes, np.ones(len(nodes))])) == 3)
