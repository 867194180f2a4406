"""How far the kernels of a copy are expected to be from the true ones.

Two things make them wrong: latents that the measured kernels leave open, which is what their covariance says, and
what no latents of the family can tell, which depends on the place, and shows in how well the measured kernels are met.
How both add up is learned on the training copies: each is adapted to some of its kernels, and judged by the others.

Legend: B places, N measured places, L latent, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

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
CASES = 60  # copies that are adapted, many of them more than once
TAME = 1e-2  # holds the weights of features where training copies hardly tell them
FAINT = 1e-6
BATCH = 256


def expected_of(model: RayCVAE, place: Place, rest: Tensor) -> Tensor:
    """The relative L2 error [B] to be expected of kernels at some places, whose `rest` [1 + F] `calibrated` has found:
    the root of (weight x spread)^2 + exp(weights x features)^2; NaN where they are dark.

    Where nothing was measured it is how far copies differ from the mean one, and how far they are from their maps.
    """
    parts = zip(*(torch.split(column, BATCH) for column in place), strict=True)
    if not len(model.measured):
        usual = model.noise.square().mean().sqrt().to(place[0])
        spreads = [spread(model, some) for some in parts]
        return torch.cat([_of_the_lit(mean, torch.hypot(far, usual)) for far, mean in spreads])
    found = []
    for some in parts:
        far, mean = spread(model, some)
        found.append(_of_the_lit(mean, _total(rest, far, features(model, some, mean))))
    return torch.cat(found)


def spread(model: RayCVAE, place: Place) -> tuple[Tensor, Tensor]:
    """The root mean square [B] of how far kernels are apart, |K^ - K| / |K|, for what is not known of the copy; and
    the kernels that are most likely [B, W, y, x].
    """
    decoder = model.decoder_of(Reach(*model.reach.tolist()), DRAFT_RAYS).to(place[0])
    noise = torch.randn(DRAWS, model.latent, generator=torch.Generator().manual_seed(0)).to(place[0])

    def kernels(z: Tensor) -> Tensor:
        return model.rays(place, model.matrix(z[None]), decoder)

    mean = kernels(model.centre)
    far2 = [relative(kernels(model.centre + model.root @ draw), mean).square() for draw in noise]
    return torch.stack(far2).mean(dim=0).sqrt(), mean


def features(model: RayCVAE, place: Place, kernels: Tensor) -> Tensor:
    """What tells how large the rest is [B, F]: the field radius; whether the field point lies along a side of the bins,
    which are square, or across; how sharp kernels [B, W, y, x] are; and the residuals of near and of all measured ones.
    """
    (x, y), radius2 = place[0].unbind(dim=1), place[0].square().sum(dim=1)
    waves = [torch.cos(k * torch.pi * (radius2 / CORNER2).sqrt()) for k in range(WAVES + 1)]
    fourfold = x**4 - 6 * x**2 * y**2 + y**4
    share = 1 / (torch.cdist(columns(place), model.measured).square() + NEAR2)
    residual = (model.residual + FAINT).log()
    near = share @ residual / share.sum(dim=1)
    sharp = kernels.flatten(1).norm(dim=1).log()
    return torch.stack([*waves, fourfold, fourfold * radius2**2, sharp, near, residual.mean().expand_as(near)], dim=1)


@torch.no_grad()
def calibrated(
    model: RayCVAE, copies: Sequence[Copy], threads: Executor, seed: int, done: Callable[[float], None]
) -> Tensor:
    """The weight of the spread and, as logarithms, those of the features [1 + F], from copies of which some kernels are
    taken and the others foretold. Afterwards the model knows no copy.
    """
    rng, cells = np.random.default_rng(seed), bins(int(model.kernel_px), model.shape[-1])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(CASES):
        copy = copies[number % len(copies)]
        count = min(int(rng.choice(MEASURED)), len(copy) - 1)
        order = rng.permutation(len(copy))
        model.take(copy[order[:count]], threads)
        others = copy[order[count:]]
        place, truth = placed(others.sites), torch.tensor(cells.image(others.kernels)).float()
        error = relative(model.rays(place, model.matrix(model.centre[None]), model.decoder), truth)
        far, mean = spread(model, place)
        lit = _of_the_lit(mean, far).isfinite()  # what was rendered with light, a map may take for dark
        found.append((far[lit], features(model, place, mean)[lit], error[lit]))
        done((number + 1) / CASES)
    model.forget()
    return torch.tensor(_fitted(*(torch.cat(parts).double() for parts in zip(*found, strict=True)))).float()


def _of_the_lit(kernels: Tensor, values: Tensor) -> Tensor:
    """Values [B], NaN where a channel of the kernels [B, W, y, x] gets no light."""
    return torch.where((kernels.sum(dim=(-2, -1)) > 0).all(dim=1), values, torch.nan)


def _total(rest: Tensor, spread: Tensor, features: Tensor) -> Tensor:
    return torch.hypot(rest[0].exp() * spread, (features @ rest[1:]).exp())


def _fitted(spread: Tensor, features: Tensor, error: Tensor) -> Array:
    """What is wrong by the same factor above and below."""
    target = (error + FAINT).log()

    def off(weights: Array) -> Array:
        hoped = _total(torch.from_numpy(weights), spread, features)
        return np.append(((hoped + FAINT).log() - target).numpy(), TAME * weights)

    start = np.zeros(1 + features.shape[1])
    start[1] = target.mean()
    found: Array = least_squares(off, start).x
    return found
