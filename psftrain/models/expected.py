"""How far the kernels of a copy are expected to be from the true ones.

Two things make them wrong: latents that the measured kernels leave open, which is what their covariance says, and
what no latents of the family can tell, which depends on the place, and shows in the measured kernels where they are met
worse than is usual there. How both add up is learned on the training copies: each is adapted to some of its kernels,
and judged by the others.

Legend: B places, N measured places, L latent, P numbers of a pattern over the field, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor

from psftrain.models.rays import RAYS, Place, RayCVAE, columns, placed, relative
from psftrain.raymap.family import Copy
from psftrain.raymap.images import bins
from psftrain.raymap.terms import CORNER2, Reach

Array = NDArray[np.float64]

DRAWS = 8  # of latents, from which the spread of kernels is taken
DRAFT_RAYS = RAYS // 4  # of a kernel of such a draw
WAVES = 6  # cosines of the field radius
NEAR2 = 0.05  # squared distance in the field within which measured kernels count alike
MEASURED = (1, 4, 9, 25)  # kernels of a training copy that it is adapted to
CASES = 120  # copies that are adapted, many of them more than once
TAME = 1e-2  # holds the weights of features where training copies hardly tell them
SMOOTH = 1.0  # times the square of its number it holds the weight of a cosine: between rings of field points none tells
FAINT = 1e-6
BATCH = 256


class Case(NamedTuple):
    """A copy of which some kernels are known: where [N, 4], and by how much they are missed [N]. Others are not: where
    these are [B, 4], how far apart likely ones are there, and the error of the likeliest [B].
    """

    measured: Tensor
    residual: Tensor
    place: Tensor
    spread: Tensor
    error: Tensor


def expected_of(model: RayCVAE, place: Place, usual: Tensor, rest: Tensor) -> Tensor:
    """The relative L2 error [B] to be expected of kernels at some places: the root of (weight x spread)^2 +
    exp(weights x features)^2, whose weights `usual` and `rest` `calibrated` has found; NaN where they are dark.

    Where nothing was measured it is how far copies differ from the mean one, and how far they are from their maps.
    """
    parts = zip(*(torch.split(column, BATCH) for column in place), strict=True)
    if not len(model.measured):
        unmet = model.noise.square().mean().sqrt().to(place[0])
        return torch.cat([torch.hypot(spread(model, some), unmet) for some in parts])
    found = []
    for some in parts:
        told = features(columns(some), model.measured, model.residual, usual)
        found.append(_total(rest, spread(model, some), told))
    return torch.cat(found)


def spread(model: RayCVAE, place: Place) -> Tensor:
    """The root mean square [B] of how far kernels are apart, |K^ - K| / |K|, for what is not known of the copy; NaN
    where a channel of the most likely one gets no light.
    """
    decoder = model.decoder_of(Reach(*model.reach.tolist()), DRAFT_RAYS).to(place[0])
    noise = torch.randn(DRAWS, model.latent, generator=torch.Generator().manual_seed(0)).to(place[0])

    def kernels(z: Tensor) -> Tensor:
        return model.rays(place, model.matrix(z[None]), decoder)

    mean = kernels(model.centre)
    far2 = [relative(kernels(model.centre + model.root @ draw), mean).square() for draw in noise]
    lit = (mean.sum(dim=(-2, -1)) > 0).all(dim=1)
    return torch.where(lit, torch.stack(far2).mean(dim=0).sqrt(), torch.nan)


def pattern(place: Tensor) -> Tensor:
    """Where places [B, 4] are in the field [B, P]: cosines of the radius; whether along a side of the bins, which are
    square, or across.
    """
    x, y = place[:, :2].clamp(-1, 1).T  # beyond the field powers of it would tell anything
    radius2 = x**2 + y**2
    waves = [torch.cos(k * torch.pi * (radius2 / CORNER2).sqrt()) for k in range(WAVES + 1)]
    fourfold = x**4 - 6 * x**2 * y**2 + y**4
    return torch.stack([*waves, fourfold, fourfold * radius2**2], dim=1)


def features(place: Tensor, measured: Tensor, residual: Tensor, usual: Tensor) -> Tensor:
    """What tells how large the rest is at places [B, 4]: their pattern; by how much the residuals [N] at `measured`
    [N, 4] exceed the `usual` [P + 1], near by and on the average; and of how many kernels [B, F].
    """
    excess = (residual + FAINT).log() - _counted(measured, len(measured)) @ usual
    share = 1 / (torch.cdist(place, measured).square() + NEAR2)
    near = share @ excess / share.sum(dim=1)
    return torch.column_stack([_counted(place, len(measured)), near, excess.mean().expand_as(near)])


def _counted(place: Tensor, count: int) -> Tensor:
    """The pattern of places of a copy that was measured at so many [B, P + 1]."""
    found = pattern(place)
    return torch.column_stack([found, torch.full_like(found[:, 0], count).log()])


@torch.no_grad()
def calibrated(
    model: RayCVAE, copies: Sequence[Copy], threads: Executor, seed: int, done: Callable[[float], None]
) -> tuple[Tensor, Tensor]:
    """The weights of a usual residual [P + 1]; that of the spread and, as logarithms, those of the features [1 + F].

    They are found from copies of which some kernels are taken and the others foretold. Afterwards the model knows no
    copy.
    """
    rng, cells = np.random.default_rng(seed), bins(int(model.kernel_px), model.shape[-1])
    cases = []
    for number in range(CASES):
        copy = copies[number % len(copies)]
        count = min(int(rng.choice(MEASURED)), len(copy) - 1)
        order = rng.permutation(len(copy))
        model.take(copy[order[:count]], threads)
        others = copy[order[count:]]
        place, truth = placed(others.sites), torch.tensor(cells.image(others.kernels)).float()
        error = relative(model.rays(place, model.matrix(model.centre[None]), model.decoder), truth)
        far = spread(model, place)
        lit = far.isfinite()  # what was rendered with light, a map may take for dark
        cases.append(Case(model.measured, model.residual, columns(place)[lit], far[lit], error[lit]))
        done((number + 1) / CASES)
    model.forget()
    usual = usual_of(cases)
    told = torch.cat([features(case.place, case.measured, case.residual, usual) for case in cases])
    return usual, fitted(torch.cat([case.spread for case in cases]), told, torch.cat([case.error for case in cases]))


def usual_of(cases: Sequence[Case]) -> Tensor:
    """The weights [P + 1] of the logarithm of a residual, by where it was measured and with how many others."""
    told = torch.cat([_counted(case.measured, len(case.measured)) for case in cases]).double()
    target = torch.cat([case.residual + FAINT for case in cases]).double().log()
    firm = torch.from_numpy(_firm(told.shape[1]))
    weights: Tensor = torch.linalg.solve(told.T @ told + torch.diag(firm.square()), told.T @ target)
    return weights.float()


def fitted(spread: Tensor, features: Tensor, error: Tensor) -> Tensor:
    """The weights [1 + F] of a spread [B] and of features [B, F] that tell errors [B]: off by the same factor above and
    below, with little swing from ring to ring of the field.
    """
    spread, features, target = spread.double(), features.double(), (error.double() + FAINT).log()
    firm = np.append(TAME, _firm(features.shape[1]))
    start = np.append(0, np.where(np.arange(len(firm) - 1) == 0, target.mean(), 0))

    def off(weights: Array) -> Array:
        hoped = _total(torch.from_numpy(weights), spread, features)
        return np.append(((hoped + FAINT).log() - target).numpy(), firm * weights)

    return torch.from_numpy(least_squares(off, start).x).float()


def _firm(count: int) -> Array:
    """What holds the weights of a pattern, and of what comes after it."""
    found = np.full(count, TAME)
    found[1 : 1 + WAVES] = SMOOTH * np.arange(1, WAVES + 1) ** 2
    return found


def _total(rest: Tensor, spread: Tensor, features: Tensor) -> Tensor:
    return torch.hypot(rest[0].exp() * spread, (features @ rest[1:]).exp())
