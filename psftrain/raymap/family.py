"""Many copies of one lens: ray maps that differ from their mean by a few numbers.

How far a ray lands from where it should is to first order linear in how far each part of the lens is from where it
should be. So the coefficients of copies are their mean plus a few loadings, each times a latent number z that is
normally distributed over copies. A copy is known once its z are, and a handful of kernels tell them.

Legend: M places, W wavelengths, T terms, Q modes, L latents, k samples a side.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.images import Cells
from psftrain.raymap.modes import Pupil
from psftrain.raymap.solve import Problem, Seen
from psftrain.raymap.terms import Sites, Terms

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """The ray maps of copies: `mean` [W, T] and `loadings` [L, W, T] of the coefficients of `terms`.

    `noise` [W] is how far kernels of a copy are from its map, |K^ - K| / |K|, of which each kernel is one witness.
    """

    terms: Terms
    wavelength_um: Array
    mean: Array
    loadings: Array
    noise: Array

    def __len__(self) -> int:
        return len(self.loadings)

    def coefficients(self, z: Array) -> Array:
        """The coefficients [..., W, T] of copies whose latents are z [..., L]."""
        return self.mean + np.tensordot(z, self.loadings, axes=1)


@dataclass(frozen=True)
class Copy:
    """One specimen, as far as it was measured: kernels [M, W, k, k], which caught `captured` [M, W] of their light."""

    sites: Sites
    kernels: NDArray[np.float32]
    captured: Array

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, some: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Copy:
        return Copy(self.sites[some], self.kernels[some], self.captured[some])

    def seen(self, wavelength: int) -> Seen:
        """Its kernels of one wavelength."""
        return Seen(self.sites, self.kernels[:, wavelength], self.captured[:, wavelength])


class Witness:
    """What the kernels of a copy say about its latents: squares whose sum is -2 log of the likelihood."""

    def __init__(self, family: Family, copy: Copy, cells: Cells, pupil: Pupil, threads: Executor) -> None:
        self.weight = len(copy) / np.square(family.noise)
        self.problems = [
            Problem(family.terms, copy.seen(w), cells, pupil, threads) for w in range(len(family.wavelength_um))
        ]
        features, terms = self.problems[0].features, family.terms
        self.modes = features @ terms.matrix(family.mean).swapaxes(-1, -2)
        self.drives = np.moveaxis(features @ terms.matrix(family.loadings).swapaxes(-1, -2), 0, -1)

    def _by_wavelength(self, z: Array) -> list[tuple[float, Problem, Array, Array]]:
        return list(zip(self.weight, self.problems, self.modes + self.drives @ z, self.drives, strict=True))

    def loss(self, z: Array) -> float:
        """-2 log of the likelihood of z [L], but for a constant."""
        return sum(weight * problem.loss_of(modes) for weight, problem, modes, _ in self._by_wavelength(z))

    def misfits(self, z: Array) -> Array:
        """The mean squared relative misfit by wavelength [W]."""
        return np.array([problem.loss_of(modes) for _, problem, modes, _ in self._by_wavelength(z)])

    def normal(self, z: Array) -> tuple[float, Array, Array]:
        """(loss, gradient [L], hessian [L, L]), the derivatives halved and after Gauss and Newton."""
        total, gradient, hessian = 0.0, np.zeros(len(z)), np.zeros((len(z), len(z)))
        for weight, problem, modes, drive in self._by_wavelength(z):
            loss, slopes, curves = problem.normal_of(modes)
            total += weight * loss
            gradient += weight * np.einsum("mql,mq->l", drive, slopes)
            hessian += weight * np.tensordot(drive, curves @ drive, axes=([0, 1], [0, 1]))
        return total, gradient, hessian
