"""What copies of a lens share: their mean design, and loadings by which they differ.

Loadings of a misalignment are real in the sense of `turns`: each stands for two latents, x and y. Loadings of the
design (a lens too thick, a glass of another index) stand for one.

Legend: K copies, W wavelengths, T terms, L latents, D terms of the design, C pairs of terms of a misalignment, E
loadings of the misalignment, J rows of the design, the first of them the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from psftrain.raymap.family import Family
from psftrain.raymap.pooled import Rows, Weights
from psftrain.raymap.terms import Terms
from psftrain.raymap.turns import Turns

Array = NDArray[np.float64]

FLOOR = 1e-7  # added to curvatures, so that terms on which kernels do not depend at all have a length too


@dataclass(frozen=True)
class Shared:
    """The rows of each wavelength [W]; a copy's latents are x of each loading, y of each, then those of the design."""

    turns: Turns
    wavelength_um: Array
    rows: tuple[Rows, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """E, and J less the mean."""
        return len(self.rows[0].errors), len(self.rows[0].design) - 1

    def weights(self, z: Array) -> Weights:
        """Of copies with latents z [K, L]."""
        count, _ = self.sizes
        design = np.column_stack([np.ones(len(z)), z[:, 2 * count :]])
        return Weights(self.turns, design, z[:, :count] + 1j * z[:, count : 2 * count])

    def family(self, noise: Array) -> Family:
        """As coefficients."""
        design, errors = (
            np.stack([r.design for r in self.rows], axis=1),
            np.stack([r.errors for r in self.rows], axis=1),
        )
        none = np.zeros(errors.shape[2])
        found = [
            self.turns.joined(design[0], none),
            *self.turns.joined(np.zeros(design.shape[2]), errors),
            *self.turns.joined(np.zeros(design.shape[2]), np.multiply(1j, errors)),
            *self.turns.joined(design[1:], none),
        ]
        loadings = np.array(found[1:]).reshape(-1, *found[0].shape)
        return Family(self.turns.terms, self.wavelength_um, found[0], loadings, noise)

    def lifted(self, terms: Terms) -> Shared:
        """With other terms; those that are new are 0."""
        turns, old = Turns(terms), self.turns
        if terms.reach == old.terms.reach:
            return self

        def of(design: Array, errors: Array) -> Array:
            return np.array([terms.taken_from(old.terms, c) for c in old.joined(design, errors)])

        rows = []
        for row in self.rows:
            design = turns.split(of(row.design, np.zeros(row.errors.shape[1])))[0]
            errors = turns.split(of(np.zeros(row.design.shape[1]), row.errors).reshape(-1, len(terms)))[1].real
            rows.append(Rows(design, errors))
        return Shared(turns, self.wavelength_um, tuple(rows))


def principal(
    turns: Turns,
    wavelength_um: Array,
    mean: Array,
    design: Array,
    errors: Array,
    hessians: Array,
    latent: int,
    least: float,
) -> Shared:
    """Loadings as few as can be: principal components in the measure of what they change in kernels.

    `design` [N, W, D] and `errors` [E, W, C] are any whose squares sum to the covariance over copies, about `mean`
    [W, D]; `hessians` [W, T, T] those of the mean squared misfit. At most `latent` latents are kept, those that change
    kernels by more than `least`, |K^ - K| / |K| over all wavelengths.
    """
    found = []
    for which, factors in enumerate((design, errors)):
        lengths = [turns.averaged(hessian)[which] for hessian in hessians]
        found.append(_components(factors, [cholesky(a + FLOOR * np.eye(len(a))) for a in lengths]))
    (of_design, design), (of_errors, errors) = found
    kept = _kept(of_errors, of_design, latent, least)
    together = np.concatenate([mean[None], design[: kept[1]]])
    rows = tuple(Rows(together[:, w], errors[: kept[0], w]) for w in range(len(hessians)))
    return Shared(turns, wavelength_um, rows)


def _components(factors: Array, lengths: list[Array]) -> tuple[Array, Array]:
    """(what they change in kernels [N], components [N, W, C]) of `factors`; `lengths` [C, C] are upper triangles."""
    white = np.concatenate([factors[:, w] @ length.T for w, length in enumerate(lengths)], axis=1)
    _, sizes, directions = np.linalg.svd(white, full_matrices=False)
    parts = np.split(sizes[:, None] * directions, len(lengths), axis=1)
    found = [solve_triangular(length, part.T).T for length, part in zip(lengths, parts, strict=True)]
    return sizes, np.stack(found, axis=1)


def _kept(of_errors: Array, of_design: Array, latent: int, least: float) -> tuple[int, int]:
    """How many of each kind, which change kernels so much (descending), are kept, the larger first."""
    kept, left = [0, 0], latent
    sizes = [(size, 0, 2) for size in of_errors] + [(size, 1, 1) for size in of_design]
    for size, kind, cost in sorted(sizes, reverse=True):
        if size < least or cost > left:
            break
        kept[kind] += 1
        left -= cost
    return kept[0], kept[1]
