"""Kernels counted from the rays of a map over field, depth and focus: of one lens, or of copies that a latent tells
apart.

Legend: B places, C condition, L latent, W wavelengths, N measured places, y x bins.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import astuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.store import Store
from psftrain.conditioning import Conditioning
from psftrain.config import ModelConfig
from psftrain.models.base import Gaussian
from psftrain.models.solved import SolvedCVAE
from psftrain.raymap.decoder import RayDecoder, matrix_of
from psftrain.raymap.defocus import Newton, newton_of
from psftrain.raymap.family import Copy, Family
from psftrain.raymap.images import bins
from psftrain.raymap.infer import Posterior, infer
from psftrain.raymap.terms import Reach, Sites, Terms

Array = NDArray[np.float64]
Place = tuple[Tensor, Tensor, Tensor]  # field [B, 2], depth [B] and defocus [B], as `Sites` has them

RAYS = 4096  # of a kernel: its sampling error is then 0.2 %
STEP = 0.05  # of a latent, by which kernels are differentiated: half of a bin or so


class RayCVAE(SolvedCVAE):
    """The ray maps of a family of copies, which may be a single lens, and what is known of one of them."""

    wavelength_um: Tensor
    reach: Tensor
    kernel_px: Tensor
    coefficients: Tensor
    loadings: Tensor
    noise: Tensor
    newton: Tensor
    centre: Tensor
    root: Tensor
    measured: Tensor
    residual: Tensor
    lens: Newton
    decoder: RayDecoder
    mean_matrix: Tensor
    loading_matrices: Tensor

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
        super().__init__()
        self.config, self.shape, self.conditioning = config, shape, conditioning
        self.latent = 0  # of one specimen there is nothing to tell

    # --- what it holds ------------------------------------------------------------------------------------------------

    def hold_lens(self, stores: list[Store]) -> None:
        """Keep how the lens of some stores is focused, which says where they were rendered."""
        self.lens = newton_of(stores)
        self.hold("newton", torch.tensor(astuple(self.lens), dtype=torch.float64))

    def hold_family(self, family: Family, kernel_px: int) -> None:
        """Keep what the solver has found from kernels of so many samples a side."""
        self.hold("wavelength_um", torch.tensor(family.wavelength_um))
        self.hold("reach", torch.tensor(astuple(family.terms.reach), dtype=torch.int64))
        self.hold("kernel_px", torch.tensor(kernel_px))
        self.hold("coefficients", torch.tensor(family.mean))
        self.hold("loadings", torch.tensor(family.loadings))
        self.hold("noise", torch.tensor(family.noise))
        self.forget()
        self.prepare()

    def forget(self) -> None:
        """Know no copy more than others: latents are as in the prior."""
        count = len(self.loadings)
        self.hold("centre", torch.zeros(count))
        self.hold("root", torch.eye(count))
        self.hold("measured", torch.zeros(0, 4))
        self.hold("residual", torch.zeros(0))

    def take(self, copy: Copy, threads: Executor) -> Posterior:
        """Take a copy, of which some kernels are known, for the lens from now on.

        What they tell of its latents is kept and returned; kept too is how far its kernels are then from those that
        were measured, `residual` [N], relative, and where, `measured` [N, 4].
        """
        found = infer(self.family, copy, threads)
        self.hold("centre", torch.tensor(found.mean).float())
        self.hold("root", torch.tensor(np.linalg.cholesky(found.covariance)).float())
        place = placed(copy.sites)
        truth = torch.tensor(bins(int(self.kernel_px), self.shape[-1]).image(copy.kernels)).float()
        self.hold("measured", columns(place))
        self.hold("residual", relative(self.rays(place, self.matrix(self.centre[None]), self.decoder), truth))
        return found

    def prepare(self) -> None:
        """Make what follows from the tensors that are held."""
        self.lens = Newton(*self.newton.tolist())
        self.decoder = self.decoder_of(Reach(*self.reach.tolist()))
        family = self.family
        self.latent = len(family)
        self.register_buffer("mean_matrix", matrix_of(family.terms, family.mean), persistent=False)
        self.register_buffer("loading_matrices", matrix_of(family.terms, family.loadings), persistent=False)

    @property
    def family(self) -> Family:
        """The copies as the solver knows them: their mean and loadings."""
        terms = Terms(Reach(*self.reach.tolist()))
        parts = (self.wavelength_um, self.coefficients, self.loadings, self.noise)
        return Family(terms, *(part.numpy() for part in parts))

    # --- latents ------------------------------------------------------------------------------------------------------

    def prior(self, condition: Tensor) -> Gaussian:
        """p(z) under conditions [B, C]: a standard normal distribution, until a copy is taken."""
        count = condition.shape[0]
        if not self.latent:
            return Gaussian(condition.new_zeros(count, 0), condition.new_zeros(count, 0))
        variance = self.root.square().sum(dim=1)
        return Gaussian(self.centre.expand(count, -1), variance.log().expand(count, -1))

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c) of one kernel each [B, W, y, x], to first order about the prior's mean.

        `take` takes any number of kernels of one copy, and leaves nothing out.
        """
        before = self.prior(condition)
        if not self.latent:
            return before
        nearby, slopes = self._slopes(condition)
        rms = kernels.flatten(1).norm(dim=1) * self.noise.square().mean().sqrt().to(kernels)
        slopes, left = slopes / rms[:, None, None], (kernels - nearby).flatten(1) / rms[:, None]
        precision = torch.linalg.inv(self.root @ self.root.T) + slopes.transpose(1, 2) @ slopes
        covariance = torch.linalg.inv(precision)
        step = covariance @ (slopes.transpose(1, 2) @ left[..., None])
        return Gaussian(before.mean + step[..., 0], covariance.diagonal(dim1=1, dim2=2).log())

    def draw(self, count: int, seed: int) -> Tensor:
        """Latents [count, L] of copies that are as likely as those that were seen."""
        if not self.latent:
            return super().draw(count, seed)
        generator = torch.Generator().manual_seed(seed)
        return self.centre + torch.randn(count, self.latent, generator=generator).to(self.root) @ self.root.T

    # --- kernels ------------------------------------------------------------------------------------------------------

    def mapped(self, condition: Tensor, z: Tensor | None = None) -> Tensor:
        """Kernels [B, W, y, x] of the map alone, of latents [B, L] or of the mean copy."""
        return self.rays(self.place(condition), self.matrix(z), self.decoder)

    def matrix(self, z: Tensor | None) -> Tensor:
        """The maps [B or 1, W, Q, S] of latents [B or 1, L], or of the mean copy."""
        mean = self.mean_matrix[None]
        return mean if z is None or not self.latent else mean + torch.tensordot(z, self.loading_matrices, dims=1)

    def rays(self, place: Place, matrix: Tensor, decoder: RayDecoder) -> Tensor:
        """Kernels [B, W, y, x] of maps [B or 1, W, Q, S]."""
        kernels: Tensor = decoder(matrix, decoder.features(*place))
        return kernels

    def decoder_of(self, reach: Reach, rays: int = RAYS) -> RayDecoder:
        """What counts the rays of maps of a reach."""
        return RayDecoder(Terms(reach), bins(int(self.kernel_px), self.shape[-1]), rays)

    def place(self, condition: Tensor) -> Place:
        """Where conditions [B, C] are."""
        ranges = self.conditioning.depth_dioptre, self.conditioning.focus_dioptre
        dioptres = [(low + high) / 2 + (high - low) / 2 * condition[:, 2 + i] for i, (low, high) in enumerate(ranges)]
        aspect = torch.tensor([1.0, self.conditioning.aspect]).to(condition)
        return condition[:, :2] * aspect, condition[:, 2], self.lens.defocus(*dioptres)

    def sites(self, condition: Tensor) -> Sites:
        """The same for the solver."""
        return Sites(*(part.numpy() for part in self.place(condition.double())))

    def _slopes(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels [B, W, y, x] at the prior's mean, and their derivatives by the latents [B, W y x, L]."""
        centre = self.centre.expand(len(condition), -1)
        here = self.mapped(condition, centre)
        steps = [self.mapped(condition, centre + STEP * one) - here for one in torch.eye(self.latent)]
        return here, torch.stack([step.flatten(1) / STEP for step in steps], dim=-1)


def placed(sites: Sites) -> Place:
    """What the solver calls sites."""
    return torch.tensor(sites.field).float(), torch.tensor(sites.depth).float(), torch.tensor(sites.defocus).float()


def columns(place: Place) -> Tensor:
    """The same as coordinates [B, 4], for distances."""
    field, depth, defocus = place
    return torch.column_stack([field, depth, defocus])


def relative(found: Tensor, truth: Tensor) -> Tensor:
    """|K^ - K| / |K| [B] of kernels [B, W, y, x]."""
    errors: Tensor = (found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    return errors
