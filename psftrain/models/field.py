"""The default model: kernels counted from rays, whose map over field, depth and focus is found from the kernels.

A neural decoder that paints kernels bin by bin errs ten times as much (see docs/results.md): kernels of neighbouring
places differ by rays that move. What the map leaves at the training points is interpolated and added, as far as
points that were left out say that it helps.

Legend: B places, C condition, L latent, W wavelengths, N field points (nodes), V numbers of a kernel stack, y x bins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
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
from psftrain.data import COPY, STORE, Examples, Places, read_examples
from psftrain.models.expected import calibrated, expected_of
from psftrain.models.folds import LEAST_ERROR, WITNESSES, doubts, folds, foretold
from psftrain.models.layers import hats, lit, on_the_simplex
from psftrain.models.rays import RayCVAE
from psftrain.models.solved import require_one_store
from psftrain.raymap import correction
from psftrain.raymap.copies import fit_family, lit_copies
from psftrain.raymap.correction import Trust, spans
from psftrain.raymap.family import Copy, Family
from psftrain.raymap.gather import Gathered, field_nodes, gather, gather_copies, unfolded
from psftrain.raymap.infer import Posterior
from psftrain.raymap.search import RayMap, fit_raymap

Array = NDArray[np.float64]

DEFAULTS: dict[str, Any] = {"steps": 1}
FEW = 64  # kernels so few that each shapes the map: it is found anew to foretell those left out
MOST_WEIGHTS = 2**26  # numbers of a correction; a larger one is left out
BATCH = 256
NEARLY_UM = 1e-6
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


@contextmanager
def _threads() -> Iterator[Executor]:
    """As many as there are cores, none of which starts more."""
    with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        yield threads


class FieldCVAE(RayCVAE):
    """A ray map of one lens, corrected by an interpolation of what it leaves; or the maps of many copies of a lens."""

    trust: Tensor
    nodes: Tensor
    weights: Tensor
    depth_knots: Tensor
    focus_knots: Tensor
    witnesses: Tensor
    left_out: Tensor
    usual: Tensor
    rest: Tensor

    # --- what is learned ----------------------------------------------------------------------------------------------

    def require(self, train: Places) -> None:
        """Raise RunMismatch for places of several stores."""
        require_one_store("field_cvae", train)

    def solve(self, stores: list[Store], train: Places, seed: int, done: Callable[[float], None]) -> dict[str, float]:
        """Find the ray map, and how far it and interpolation are to be trusted; of several copies, their family."""
        self.hold_lens(stores)
        learn = self._learn_copies if len(np.unique(train.index[:, [STORE, COPY]], axis=0)) > 1 else self._learn_lens
        with _threads() as threads:
            found = learn(stores, train, seed, threads, done)
        done(1.0)
        return found

    def _learn_lens(
        self, stores: list[Store], train: Places, seed: int, threads: Executor, done: Callable[[float], None]
    ) -> dict[str, float]:
        wavelength_um = np.asarray(stores[0].coords["wavelength"], dtype=float)
        gathered = gather(stores, train, self.sites(train.condition))
        examples = read_examples(stores, self.conditioning, train.array).of(train)
        find = partial(_find, seed=seed, threads=threads)
        found = find(gathered, wavelength_um, done=lambda share: done(SHARE_OF_MAP * share))
        none = np.zeros((0, *found.coefficients.shape))
        alone = Family(found.terms, wavelength_um, found.coefficients, none, found.misfit)
        self._hold(alone, gathered.kernel_px)
        left_out = self._correct(examples, gathered, partial(find, done=lambda share: done(SHARE_OF_MAP)), threads)
        return _misfits(alone) | ({} if left_out is None else {"left_out/rel_l2": left_out})

    def _learn_copies(
        self, stores: list[Store], train: Places, seed: int, threads: Executor, done: Callable[[float], None]
    ) -> dict[str, float]:
        wavelength_um = np.asarray(stores[0].coords["wavelength"], dtype=float)
        gathered = gather_copies(stores, train, self.sites(train.condition))
        share = SHARE_OF_MAP
        family, _ = fit_family(
            *gathered, wavelength_um, seed=seed, threads=threads, done=lambda part: done(share * part)
        )
        self._hold(family, gathered.kernel_px)
        copies = lit_copies(*gathered)
        usual, rest = calibrated(self, copies, threads, seed, lambda part: done(share + (1 - share) * part))
        self.hold("usual", usual)
        self.hold("rest", rest)
        return _misfits(family)

    def _hold(self, family: Family, kernel_px: int) -> None:
        """Keep maps that nothing corrects."""
        self.hold_family(family, kernel_px)
        nothing = Trust(1.0, 0.0, np.ones((1, 1)))
        self._hold_correction(nothing, np.zeros((0, 2)), np.zeros((1, 0, 0), np.float32), ((0,), (0,)))

    def adapt(self, stores: list[Store], places: Places) -> Posterior:
        """Take the kernels of one copy for those of the lens from now on; returns what they tell of its latents."""
        measured = gather(stores, places, self.sites(places.condition))
        with _threads() as threads:
            return self.take(Copy(measured.sites, measured.kernels, measured.captured), threads)

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

    def _correct(
        self, examples: Examples, gathered: Gathered, find: Callable[..., RayMap], threads: Executor
    ) -> float | None:
        """Choose and hold the correction; returns the mean error of points left out, None without a correction."""
        nodes, node, depth, focus = field_nodes(examples.condition)
        knots = [torch.unique(examples.condition[:, column]) for column in (2, 3)]
        slices, slice_ = len(knots[0]) * len(knots[1]), depth * len(knots[1]) + focus
        if slices * (len(nodes) + 3) * math.prod(self.shape) > MOST_WEIGHTS or not spans(nodes):
            return None
        shape = (slices, len(nodes))
        with torch.no_grad():
            parts = [self.mapped(some) for some in torch.split(examples.condition, BATCH)]
        truth, mapped = (unfolded(kernels, node, slice_, shape) for kernels in (examples.kernels, torch.cat(parts)))
        splines = ThinPlate.of(nodes)
        if len(examples) > FEW:
            chosen, others = correction.choose(splines, truth, mapped), []
        else:
            others = folds(self, gathered, find)
            if not others:  # all lie on one ring, and none can be left out
                return None
            judged = foretold(self, examples, others)
            chosen = correction.choose(splines, *(unfolded(kernels, node, slice_, shape) for kernels in judged))
        self._hold_correction(chosen, nodes, correction.weights(splines, chosen, truth, mapped), (knots[0], knots[1]))
        if others:
            told = doubts(self, gathered, others, torch.cartesian_prod(*knots).view(-1, 2), threads)
            self.hold("witnesses", torch.linspace(-1, 1, WITNESSES))
            self.hold("left_out", told)
        return chosen.error

    # --- other wavelengths --------------------------------------------------------------------------------------------

    def for_wavelengths(self, wavelength_um: Array) -> FieldCVAE:
        """The same model with other channels [V], between those that it was trained on.

        Coefficients are interpolated by a polynomial in 1 / wavelength: dispersion is nearly linear in it.
        """
        if not self.solved:
            raise RunMismatch("the run was checked, not solved (steps 0), and knows no wavelengths; fit another --run")
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

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Kernels [B, W, y, x] of latents [B, L] under conditions [B, C]; NaN where no light falls into the window."""
        if not self.solved:
            return self.flat(len(condition)).to(condition)
        mapped = self.mapped(condition, z)
        if not self.weights.numel():
            return lit(mapped, mapped.sum(dim=(-2, -1)))
        parts = (self._of_slices(condition)[:, :, None] * self._bending(condition[:, :2])[:, None]).flatten(1)
        between = (parts @ self.weights.flatten(0, 1)).reshape(-1, *self.shape)
        found = self.trust * mapped + between
        return lit(on_the_simplex(found), found.sum(dim=(-2, -1)))

    def expected_error(self, condition: Tensor) -> Tensor | None:
        """What points left out near by erred, on the average of its logarithm by inverse squared distance; where the
        kernels were few, how unsure the map is there. Witnesses in the dark, whose `left_out` is NaN, do not count.

        Of copies: how far those that are still likely differ, and what the family cannot tell.
        """
        if self.solved and self.latent:
            return expected_of(self, self.place(condition), self.usual, self.rest)
        if not self.solved or not len(self.witnesses):
            return None
        of_nodes = self._of_witnesses(condition[:, :2])
        known = self.left_out.isfinite().to(of_nodes)
        told, over_nodes = self.left_out.nan_to_num() * known, "bn,sn->bs"
        of_slices = torch.einsum(over_nodes, of_nodes, told) / torch.einsum(over_nodes, of_nodes, known)
        return (self._of_slices(condition) * of_slices).sum(dim=1).exp()

    def _of_witnesses(self, field: Tensor) -> Tensor:
        """The weights [B, V] of witnesses: of those on a grid in linear interpolation, of others by distance."""
        if self.witnesses.dim() == 1:
            across, up = (hats(column, self.witnesses) for column in field.T)
            return (across[:, :, None] * up[:, None]).flatten(1)
        near = 1 / ((field[:, None] - self.witnesses).square().sum(dim=-1) + NEAR**2)
        return near / near.sum(dim=-1, keepdim=True)

    def _of_slices(self, condition: Tensor) -> Tensor:
        """The weights [B, S] of the trained depths and focus distances in linear interpolation between them."""
        depth, focus = hats(condition[:, 2], self.depth_knots), hats(condition[:, 3], self.focus_knots)
        return (depth[:, :, None] * focus[:, None]).flatten(1)

    def _bending(self, field: Tensor) -> Tensor:
        """The basis [B, N + 3] of thin-plate splines through the nodes."""
        squared = (field[:, None] - self.nodes).square().sum(dim=-1)
        plate = squared * squared.clamp_min(torch.finfo(squared.dtype).tiny).log() / 2
        return torch.cat([plate, torch.ones_like(field[:, :1]), field], dim=-1)


def _misfits(family: Family) -> dict[str, float]:
    """What of the kernels their maps leave, by wavelength."""
    return {f"misfit/{w:g}um": float(e) for w, e in zip(family.wavelength_um, family.noise, strict=True)}
