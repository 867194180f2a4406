"""The default model: kernels counted from rays, whose map over field, depth and focus is found from the kernels.

A neural decoder that paints kernels bin by bin errs ten times as much (see docs/results.md): kernels of neighbouring
places differ by rays that move. What the map leaves at the training points is interpolated and added, as far as
points that were left out say that it helps.

Legend: B places, C condition, L latent, W wavelengths, N field points (nodes), V numbers of a kernel stack, y x bins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from psfgen.errors import RunMismatch
from psfgen.store import Store
from psftrain.canonical.thinplate import ThinPlate
from psftrain.conditioning import Conditioning
from psftrain.config import ModelConfig
from psftrain.data import COPY, STORE, Examples, Places, read_examples
from psftrain.models.base import Gaussian
from psftrain.models.layers import hats, on_the_simplex
from psftrain.models.solved import SolvedCVAE, require_one_store
from psftrain.raymap import correction
from psftrain.raymap.copies import fit_family
from psftrain.raymap.correction import Trust, spans
from psftrain.raymap.decoder import RayDecoder, matrix_of
from psftrain.raymap.defocus import Newton, newton_of
from psftrain.raymap.family import Copy, Family
from psftrain.raymap.gather import Gathered, field_nodes, gather, gather_copies, unfolded
from psftrain.raymap.images import bins
from psftrain.raymap.infer import Posterior, infer
from psftrain.raymap.search import RayMap, fit_raymap
from psftrain.raymap.terms import Reach, Sites, Terms

Array = NDArray[np.float64]

DEFAULTS: dict[str, Any] = {"steps": 1}
RAYS = 4096  # of a kernel: its sampling error is then 0.2 %
FEW = 64  # kernels so few that each shapes the map: it is found anew to foretell those left out
FOLDS = 3
WITNESSES = 21  # places a side at which maps of few kernels are compared
LEAST_ERROR = 1e-5
MOST_WEIGHTS = 2**26  # numbers of a correction; a larger one is left out
BATCH = 256
NEARLY_UM = 1e-6
STEP = 0.05  # of a latent, by which kernels are differentiated: half of a bin or so
NEAR = 1e-3  # of the field: as near as that is the node itself
SHARE_OF_MAP = 0.7  # of the time that solving takes


def lagrange(at: Array, known: Array) -> Array:
    """The weights [V, W] of values at `known` [W] in the polynomial through them at `at` [V]."""
    weights = np.ones((len(at), len(known)))
    for i, j in permutations(range(len(known)), 2):
        weights[:, i] *= (at - known[j]) / (known[i] - known[j])
    return weights


def _find(gathered: Gathered, wavelength_um: Array, **options: Any) -> RayMap:
    return fit_raymap(gathered.sites, gathered.kernels, gathered.captured, wavelength_um, **options)


class FieldCVAE(SolvedCVAE):
    """A ray map of one lens, corrected by an interpolation of what it leaves; or the maps of many copies of a lens."""

    wavelength_um: Tensor
    reach: Tensor
    kernel_px: Tensor
    coefficients: Tensor
    loadings: Tensor
    centre: Tensor
    root: Tensor
    noise: Tensor
    newton: Tensor
    lens: Newton
    decoder: RayDecoder
    mean_matrix: Tensor
    loading_matrices: Tensor
    trust: Tensor
    nodes: Tensor
    weights: Tensor
    depth_knots: Tensor
    focus_knots: Tensor
    witnesses: Tensor
    left_out: Tensor

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
        super().__init__()
        self.config, self.latent, self.shape, self.conditioning = (
            config,
            0,
            shape,
            conditioning,
        )  # of one specimen there is nothing to tell

    # --- what is learned ----------------------------------------------------------------------------------------------

    def require(self, train: Places) -> None:
        """Raise RunMismatch for places of several stores."""
        require_one_store("field_cvae", train)

    def solve(self, stores: list[Store], train: Places, seed: int, done: Callable[[float], None]) -> dict[str, float]:
        """Find the ray map, and how far it and interpolation are to be trusted; of several copies, their family."""
        self.lens = newton_of(stores)
        self.hold("newton", torch.tensor(astuple(self.lens), dtype=torch.float64))
        wavelength_um = np.asarray(stores[0].coords["wavelength"], dtype=float)
        with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            if len(np.unique(train.index[:, [STORE, COPY]], axis=0)) > 1:
                copies = gather_copies(stores, train, self._sites(train.condition))
                family, _ = fit_family(*copies, wavelength_um, seed=seed, threads=threads, done=done)
                self._hold_family(family, copies.kernel_px)
                return {f"misfit/{w:g}um": float(e) for w, e in zip(wavelength_um, family.noise, strict=True)}
            gathered = gather(stores, train, self._sites(train.condition))
            examples = read_examples(stores, self.conditioning, train.array).of(train)
            find = partial(_find, seed=seed, threads=threads)
            found = find(gathered, wavelength_um, done=lambda share: done(SHARE_OF_MAP * share))
            none = np.zeros((0, *found.coefficients.shape))
            alone = Family(found.terms, wavelength_um, found.coefficients, none, found.misfit)
            self._hold_family(alone, gathered.kernel_px)
            left_out = self._correct(examples, gathered, partial(find, done=lambda share: done(SHARE_OF_MAP)))
        done(1.0)
        misfit = {f"misfit/{w:g}um": float(error) for w, error in zip(wavelength_um, found.misfit, strict=True)}
        return misfit | ({} if left_out is None else {"left_out/rel_l2": left_out})

    def _hold_family(self, family: Family, kernel_px: int) -> None:
        self.hold("wavelength_um", torch.tensor(family.wavelength_um))
        self.hold("reach", torch.tensor(astuple(family.terms.reach), dtype=torch.int64))
        self.hold("kernel_px", torch.tensor(kernel_px))
        self.hold("coefficients", torch.tensor(family.mean))
        self.hold("loadings", torch.tensor(family.loadings))
        self.hold("noise", torch.tensor(family.noise))
        self.hold("centre", torch.zeros(len(family)))
        self.hold("root", torch.eye(len(family)))
        nothing = Trust(1.0, 0.0, np.ones((1, 1)))
        self._hold_correction(nothing, np.zeros((0, 2)), np.zeros((1, 0, 0), np.float32), ((0,), (0,)))
        self.prepare()

    @property
    def family(self) -> Family:
        """The copies as the solver knows them: their mean and loadings."""
        terms = Terms(Reach(*self.reach.tolist()))
        parts = (self.wavelength_um, self.coefficients, self.loadings, self.noise)
        return Family(terms, *(part.numpy() for part in parts))

    def adapt(self, stores: list[Store], places: Places) -> Posterior:
        """Take the kernels of one copy for those of the lens from now on; returns what they tell of its latents."""
        measured = gather(stores, places, self._sites(places.condition))
        copy = Copy(measured.sites, measured.kernels, measured.captured)
        with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = infer(self.family, copy, threads)
        self.hold("centre", torch.tensor(found.mean).float())
        self.hold("root", torch.tensor(np.linalg.cholesky(found.covariance)).float())
        return found

    def _hold_correction(
        self, chosen: Trust, nodes: Array, weights: NDArray[np.float32], knots: tuple[Any, Any]
    ) -> None:
        self.hold("trust", torch.tensor(chosen.trust))
        self.hold("nodes", torch.tensor(nodes).float())
        self.hold("weights", torch.tensor(weights).float())
        self.hold("depth_knots", torch.as_tensor(knots[0]).float())
        self.hold("focus_knots", torch.as_tensor(knots[1]).float())
        self.hold("witnesses", torch.tensor(nodes).float())
        self.hold("left_out", torch.tensor(np.log(np.maximum(chosen.expected, LEAST_ERROR))).float())

    def _correct(self, examples: Examples, gathered: Gathered, find: Callable[..., RayMap]) -> float | None:
        """Choose and hold the correction; returns the mean error of points left out, None without a correction."""
        nodes, node, depth, focus = field_nodes(examples.condition)
        knots = [torch.unique(examples.condition[:, column]) for column in (2, 3)]
        slices, slice_ = len(knots[0]) * len(knots[1]), depth * len(knots[1]) + focus
        if slices * (len(nodes) + 3) * math.prod(self.shape) > MOST_WEIGHTS or not spans(nodes):
            return None
        shape = (slices, len(nodes))
        with torch.no_grad():
            parts = [self._mapped(some) for some in torch.split(examples.condition, BATCH)]
        truth, mapped = (unfolded(kernels, node, slice_, shape) for kernels in (examples.kernels, torch.cat(parts)))
        splines = ThinPlate.of(nodes)
        if len(examples) > FEW:
            chosen, folds = correction.choose(splines, truth, mapped), []
        else:
            folds = self._folds(gathered, find)
            foretold = self._foretold(examples, folds)
            chosen = correction.choose(splines, *(unfolded(kernels, node, slice_, shape) for kernels in foretold))
        self._hold_correction(chosen, nodes, correction.weights(splines, chosen, truth, mapped), (knots[0], knots[1]))
        if folds:
            self._expect_by(folds)
        return chosen.error

    def _folds(self, gathered: Gathered, find: Callable[..., RayMap]) -> list[tuple[Tensor, RayMap]]:
        """Maps of the middle wavelength that have not seen some places, and which [M] these are.

        A ring of the field is left out whole, since its other points are the same of a lens with an axis.
        """
        middle = self.shape[0] // 2
        one, wavelength_um = gathered.of_wavelength(middle), self.wavelength_um[middle : middle + 1].numpy()
        _, ring = np.unique(np.round(np.hypot(*one.sites.field.T), 6), return_inverse=True)
        inside = ring.ravel() < ring.max()  # beyond the rim none can tell
        left_out = [inside & (ring.ravel() % FOLDS == fold) for fold in range(FOLDS)]
        return [(torch.from_numpy(out), find(one.some(~out), wavelength_um)) for out in left_out if out.any()]

    def _by(self, found: RayMap, condition: Tensor) -> Tensor:
        """Kernels [B, 1, y, x] of a map of one wavelength."""
        matrix = matrix_of(found.terms, found.coefficients)[None]
        with torch.no_grad():
            return self._rays(condition, matrix, self._decoder(found.terms.reach))

    def _foretold(self, examples: Examples, folds: list[tuple[Tensor, RayMap]]) -> tuple[Tensor, Tensor]:
        """Kernels [M, 1, y, x] of the middle wavelength, and what maps that have not seen them make of them."""
        middle = self.shape[0] // 2
        truth = examples.kernels[:, middle : middle + 1].clone()
        foretold = torch.full_like(truth, torch.nan)
        for out, found in folds:
            foretold[out] = self._by(found, examples.condition[out])
        truth[foretold[:, 0, 0, 0].isnan()] = torch.nan
        return truth, foretold

    def _expect_by(self, folds: list[tuple[Tensor, RayMap]]) -> None:
        """Expect errors as large as the map is unsure: as far as the nearest of the others is from it, over the field.

        A map that lacks a ring errs much more there than one that lacks none, and about as much far from it.
        """
        middle, at = self.shape[0] // 2, torch.linspace(-1, 1, WITNESSES)
        witnesses, far = torch.cartesian_prod(at, at), []
        for slice_ in torch.cartesian_prod(self.depth_knots, self.focus_knots).view(-1, 2):
            condition = torch.cat([witnesses, slice_.expand(len(witnesses), -1)], dim=1)
            own = self._mapped(condition)[:, middle : middle + 1].flatten(1)
            apart = [(self._by(found, condition).flatten(1) - own).norm(dim=1) / own.norm(dim=1) for _, found in folds]
            far.append(torch.stack(apart).amin(dim=0))
        self.hold("witnesses", witnesses)
        self.hold("left_out", torch.stack(far).clamp_min(LEAST_ERROR).log())

    # --- other wavelengths --------------------------------------------------------------------------------------------

    def for_wavelengths(self, wavelength_um: Array) -> FieldCVAE:
        """The same model with other channels [V], between those that it was trained on.

        Coefficients are interpolated by a polynomial in 1 / wavelength: dispersion is nearly linear in it.
        """
        known = self.wavelength_um.numpy()
        if wavelength_um.min() < known.min() - NEARLY_UM or wavelength_um.max() > known.max() + NEARLY_UM:
            raise RunMismatch(
                f"wavelengths {', '.join(f'{w:g}' for w in wavelength_um)} um are not all within those trained on, "
                f"{known.min():g} to {known.max():g} um; render more, or ask for others"
            )
        mix = torch.tensor(lagrange(1 / wavelength_um, 1 / known))
        slices, rows, numbers = self.weights.shape
        by_wave = self.weights.view(slices, rows, len(known), -1) if numbers else None
        state = self.state_dict() | {
            "wavelength_um": torch.tensor(wavelength_um),
            "coefficients": mix @ self.coefficients,
            "loadings": mix @ self.loadings,
            "noise": mix.abs() @ self.noise,
            "weights": self.weights
            if by_wave is None
            else torch.einsum("vw,snwk->snvk", mix.float(), by_wave).flatten(2),
        }
        found = FieldCVAE(self.config, (len(wavelength_um), *self.shape[1:]), self.conditioning)
        found.load_state_dict(state)
        return found.eval()

    # --- what it answers ----------------------------------------------------------------------------------------------

    def prior(self, condition: Tensor) -> Gaussian:
        """p(z) under conditions [B, C]: a standard normal distribution, until the model is adapted to a copy."""
        count = condition.shape[0]
        if not self.latent:
            return Gaussian(condition.new_zeros(count, 0), condition.new_zeros(count, 0))
        variance = self.root.square().sum(dim=1)
        return Gaussian(self.centre.expand(count, -1), variance.log().expand(count, -1))

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c) of one kernel each [B, W, y, x], to first order about the prior's mean.

        `adapt` takes any number of kernels of one copy, and leaves nothing out.
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
        return self.centre + torch.randn(count, self.latent, generator=generator) @ self.root.T

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Kernels [B, W, y, x] of latents [B, L] under conditions [B, C]."""
        if not self.solved:
            return self.flat(len(condition)).to(condition)
        mapped = self._mapped(condition, z)
        if not self.weights.numel():
            return mapped
        parts = (self._of_slices(condition)[:, :, None] * self._bending(condition[:, :2])[:, None]).flatten(1)
        between = (parts @ self.weights.flatten(0, 1)).reshape(-1, *self.shape)
        return on_the_simplex(self.trust * mapped + between)

    def _slopes(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels [B, W, y, x] at the prior's mean, and their derivatives by the latents [B, W y x, L]."""
        centre = self.centre.expand(len(condition), -1)
        here = self._mapped(condition, centre)
        steps = [self._mapped(condition, centre + STEP * one) - here for one in torch.eye(self.latent)]
        return here, torch.stack([step.flatten(1) / STEP for step in steps], dim=-1)

    def expected_error(self, condition: Tensor) -> Tensor | None:
        """What points left out near by erred, on the average of its logarithm by inverse squared distance; where the
        kernels were few, how unsure the map is there.

        Of copies: how far kernels of the likely ones are from the mean.
        """
        if self.solved and self.latent:
            return self._spread(condition)
        if not self.solved or not len(self.witnesses):
            return None
        near = 1 / ((condition[:, None, :2] - self.witnesses).square().sum(dim=-1) + NEAR**2)
        of_nodes = near / near.sum(dim=-1, keepdim=True)
        return torch.einsum("bs,bn,sn->b", self._of_slices(condition), of_nodes, self.left_out).exp()

    def _spread(self, condition: Tensor) -> Tensor:
        """RMS relative difference [B] of the kernels of likely copies from those of the mean one, to first order."""
        parts = []
        for some in torch.split(condition, BATCH):
            here, slopes = self._slopes(some)
            moved = (slopes @ self.root).square().sum(dim=(1, 2)) / here.flatten(1).square().sum(dim=1)
            parts.append((moved + self.noise.square().mean().to(moved)).sqrt())
        return torch.cat(parts)

    def _of_slices(self, condition: Tensor) -> Tensor:
        """The weights [B, S] of the trained depths and focus distances in linear interpolation between them."""
        depth, focus = hats(condition[:, 2], self.depth_knots), hats(condition[:, 3], self.focus_knots)
        return (depth[:, :, None] * focus[:, None]).flatten(1)

    def _mapped(self, condition: Tensor, z: Tensor | None = None) -> Tensor:
        matrix = self.mean_matrix[None]
        if self.latent and z is not None:
            matrix = matrix + torch.tensordot(z, self.loading_matrices, dims=1)
        return self._rays(condition, matrix, self.decoder)

    def _rays(self, condition: Tensor, matrix: Tensor, decoder: RayDecoder) -> Tensor:
        """Kernels [B, W, y, x] of maps [B or 1, W, Q, S]."""
        field, depth, defocus = self._place(condition)
        kernels: Tensor = decoder(matrix, decoder.features(field, depth, defocus))
        return kernels

    def _decoder(self, reach: Reach) -> RayDecoder:
        return RayDecoder(Terms(reach), bins(int(self.kernel_px), self.shape[-1]), RAYS)

    def prepare(self) -> None:
        """Make what follows from the tensors that are held."""
        self.lens = Newton(*self.newton.tolist())
        self.decoder = self._decoder(Reach(*self.reach.tolist()))
        family = self.family
        self.latent = len(family)
        self.register_buffer("mean_matrix", matrix_of(family.terms, family.mean), persistent=False)
        self.register_buffer("loading_matrices", matrix_of(family.terms, family.loadings), persistent=False)

    def _place(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Field [B, 2], depth [B] and defocus [B] of conditions [B, C]."""
        ranges = self.conditioning.depth_dioptre, self.conditioning.focus_dioptre
        dioptres = [(low + high) / 2 + (high - low) / 2 * condition[:, 2 + i] for i, (low, high) in enumerate(ranges)]
        aspect = torch.tensor([1.0, self.conditioning.aspect]).to(condition)
        return condition[:, :2] * aspect, condition[:, 2], self.lens.defocus(*dioptres)

    def _sites(self, condition: Tensor) -> Sites:
        return Sites(*(part.numpy() for part in self._place(condition.double())))

    def _bending(self, field: Tensor) -> Tensor:
        """The basis [B, N + 3] of thin-plate splines through the nodes."""
        squared = (field[:, None] - self.nodes).square().sum(dim=-1)
        plate = squared * squared.clamp_min(torch.finfo(squared.dtype).tiny).log() / 2
        return torch.cat([plate, torch.ones_like(field[:, :1]), field], dim=-1)
