"""What all copies together say about the rows that make up their maps, once the weights of each copy are known.

Legend: K copies, T terms, D terms of the design, C pairs of terms of a misalignment; J rows of the design and E rows
of the misalignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from psftrain.raymap.turns import Turns

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

STEPS = 60  # of conjugate gradients
CLOSE = 1e-3  # the share of the gradient at which they end
FLOOR = 1e-9  # added to curvatures, which are of the order of 1 where kernels tell anything


@dataclass(frozen=True)
class Rows:
    """Rows of the `design` [J, D] and of the misalignment, `errors` [E, C], real as all directions are alike."""

    design: Array
    errors: Array

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.design + other.design, self.errors + other.errors)

    def times(self, factor: float | Rows) -> Rows:
        """All of them times a number, or number by number."""
        if isinstance(factor, Rows):
            return Rows(self.design * factor.design, self.errors * factor.errors)
        return Rows(self.design * factor, self.errors * factor)

    def dot(self, other: Rows) -> float:
        """The sum of the products."""
        return float(np.vdot(self.design, other.design) + np.vdot(self.errors, other.errors))


@dataclass(frozen=True)
class Weights:
    """How much of each row a copy has: `design` [K, J] and `errors` [K, E]."""

    turns: Turns
    design: Array
    errors: Complex

    def coefficients(self, rows: Rows) -> Array:
        """The coefficients [K, T] of copies."""
        return self.turns.joined(self.design @ rows.design, self.errors @ rows.errors)

    def back(self, slopes: Array) -> Rows:
        """The mean derivatives by rows, from those by the coefficients of each copy [K, T]."""
        design, errors = self.turns.split(slopes)
        return Rows(self.design.T @ design / len(slopes), (self.errors.conj().T @ errors).real / len(slopes))


def pooled_step(weights: Weights, rows: Rows, gradients: Array, hessians: Array, ridge: Rows) -> Rows:
    """The Gauss-Newton step of `rows` that gradients [K, T] and hessians [K, T, T] of copies ask for.

    `ridge` holds rows near 0. Conjugate gradients leave alone what hardly matters.
    """

    def curved(step: Rows) -> Rows:
        return weights.back(np.einsum("ktu,ku->kt", hessians, weights.coefficients(step))) + step.times(ridge)

    near = _Nearly(weights, hessians.mean(axis=0), ridge)
    left = (weights.back(gradients) + rows.times(ridge)).times(-1.0)
    step, ahead = left.times(0.0), near.solve(left)
    along, size = ahead, left.dot(ahead)
    first = size
    for _ in range(STEPS):
        image = curved(along)
        far = size / along.dot(image)
        step, left = step + along.times(far), left + image.times(-far)
        ahead = near.solve(left)
        before, size = size, left.dot(ahead)
        if size < CLOSE**2 * first:
            break
        along = ahead + along.times(size / before)
    return step


class _Nearly:
    """The hessian of rows if copies had the mean hessian, turned in all directions, and no two rows went together."""

    def __init__(self, weights: Weights, hessian: Array, ridge: Rows) -> None:
        parts = weights.turns.averaged(hessian)
        shares = (np.square(weights.design).mean(axis=0), np.square(abs(weights.errors)).mean(axis=0))
        self.factors = [
            [cho_factor(share * part + np.diag(held + FLOOR)) for share, held in zip(of_rows, firm, strict=True)]
            for part, of_rows, firm in zip(parts, shares, (ridge.design, ridge.errors), strict=True)
        ]

    def solve(self, rows: Rows) -> Rows:
        """The rows that it makes `rows` of."""
        return Rows(
            *(
                np.array([cho_solve(factor, row) for factor, row in zip(factors, part, strict=True)]).reshape(
                    part.shape
                )
                for factors, part in zip(self.factors, (rows.design, rows.errors), strict=True)
            )
        )
