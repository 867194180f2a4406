"""How much of each model to take where: the canonical one, the spline of what it leaves, the spline of kernels.

All from predictions at training points that are left out, by field radius: near the axis of a crooked lens
the field-aligned frame turns faster than the kernels do, and there the plain spline is the better model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NODES = 33
PRIOR = 0.05  # of the mean evidence, for the canonical model with all of its residual


@dataclass(frozen=True)
class Blend:
    """Shares at `radius` [n]: of the residual's spline, and of the plain spline [n] each."""

    radius: Array
    residual: Array
    plain: Array

    def mix(self, radius: Array, canonical: Array, residual: Array, plain: Array) -> Array:
        """The blend of three models' kernels [Q, D] at field radii [Q]."""
        of_residual, of_plain = (
            np.interp(radius, self.radius, share)[:, None] for share in (self.residual, self.plain)
        )
        mended = canonical + of_residual * residual
        return np.asarray(mended + of_plain * (plain - mended))


def fit_blend(radius: Array, width: float, truth: Array, canonical: Array, residual: Array, plain: Array) -> Blend:
    """The shares that bring predictions [C, D] at left-out points of field radii [C] nearest to the truth.

    Points count by their distance in radius, as a Gaussian of deviation `width`; kernels by their energy.
    """
    nodes = np.linspace(0, radius.max(), NODES)
    near = np.exp(-0.5 * np.square((nodes[:, None] - radius) / width))
    near /= np.square(truth).sum(axis=1)
    of_residual = _share(near, truth - canonical, residual, prior=1.0)
    mended = canonical + np.interp(radius, nodes, of_residual)[:, None] * residual
    return Blend(nodes, of_residual, _share(near, truth - mended, plain - mended, prior=0.0))


def _share(near: Array, wanted: Array, step: Array, prior: float) -> Array:
    """The best multiple of `step` [C, D] as a stand-in for `wanted` [C, D], in [0, 1] at each node [n]."""
    along, squared = near @ (wanted * step).sum(axis=1), near @ np.square(step).sum(axis=1)
    belief = PRIOR * squared.mean() + np.finfo(float).tiny
    return np.asarray(np.clip((along + belief * prior) / (squared + belief), 0, 1))
