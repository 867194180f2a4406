"""Few kernels, each of which shapes the map: what maps say that have not seen some of them.

Legend: M places, W wavelengths, S slices (a depth and a focus each), y x bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from psftrain.data import Examples
from psftrain.models.rays import RayCVAE
from psftrain.raymap.decoder import matrix_of
from psftrain.raymap.gather import Gathered
from psftrain.raymap.images import bins
from psftrain.raymap.laplace import unsure
from psftrain.raymap.search import RayMap
from psftrain.raymap.solve import Fit, Seen

FOLDS = 3
WITNESSES = 41  # places a side at which maps of few kernels are compared
LACKING = 1.5  # how much more a map errs that has not seen some of them
LEAST_ERROR = 1e-5
FAINT = 0.02
BATCH = 256

Fold = tuple[Tensor, RayMap]


def folds(model: RayCVAE, gathered: Gathered, find: Callable[..., RayMap]) -> list[Fold]:
    """Maps of the middle wavelength that have not seen some places, and which [M] these are.

    A ring of the field is left out whole, since its other points are the same of a lens with an axis.
    """
    middle = model.shape[0] // 2
    one, wavelength_um = gathered.of_wavelength(middle), model.wavelength_um[middle : middle + 1].numpy()
    _, ring = np.unique(np.round(np.hypot(*one.sites.field.T), 6), return_inverse=True)
    inside = ring.ravel() < ring.max()  # beyond the rim none can tell
    left_out = [inside & (ring.ravel() % FOLDS == fold) for fold in range(FOLDS)]
    return [(torch.from_numpy(out), find(one.some(~out), wavelength_um)) for out in left_out if out.any()]


def foretold(model: RayCVAE, examples: Examples, folds: list[Fold]) -> tuple[Tensor, Tensor]:
    """Kernels [M, 1, y, x] of the middle wavelength, and what maps that have not seen them make of them."""
    middle = model.shape[0] // 2
    truth = examples.kernels[:, middle : middle + 1].clone()
    found = torch.full_like(truth, torch.nan)
    for out, of_others in folds:
        found[out] = _kernels(model, of_others, examples.condition[out])
    truth[found[:, 0, 0, 0].isnan()] = torch.nan
    return truth, found


def doubts(model: RayCVAE, gathered: Gathered, folds: list[Fold], slices: Tensor, threads: Executor) -> Tensor:
    """The logarithm of the error to be expected at WITNESSES x WITNESSES places all over the field, in each slice
    [S, 2] of a depth and a focus [S, V], x before y; NaN in the dark.

    Three tell it, and their mean is taken: how far, relatively, the maps of the folds are from this one; the same on
    the average of all places; and how unsure this one is, of which only the pattern is known.
    """
    middle, axis = model.shape[0] // 2, torch.linspace(-1, 1, WITNESSES)
    witnesses, told = torch.cartesian_prod(axis, axis), []
    for slice_ in slices:
        condition = torch.cat([witnesses, slice_.expand(len(witnesses), -1)], dim=1)
        here = torch.cat([model.mapped(some) for some in torch.split(condition, BATCH)])
        own = here[:, middle].flatten(1)
        others = (_kernels(model, found, condition).flatten(1) for _, found in folds)
        apart = torch.stack([(other - own).norm(dim=1) / own.norm(dim=1) for other in others])
        far = apart.clamp_min(LEAST_ERROR).log().mean(dim=0) - math.log(LACKING)
        pattern = _spread(model, gathered, here, condition, threads).log()
        lit = far.isfinite() & pattern.isfinite()
        level = far[lit].mean()
        told.append(torch.where(lit, (far + level + level + pattern - pattern[lit].mean()) / 3, torch.nan))
    return torch.stack(told)


def _spread(model: RayCVAE, gathered: Gathered, here: Tensor, condition: Tensor, threads: Executor) -> Tensor:
    """How unsure the map is of its kernels `here` [V, W, y, x], relatively and but for a factor [V]."""
    sites, cells, terms = model.sites(condition), bins(gathered.kernel_px, model.shape[-1]), model.family.terms
    square = here.square().sum(dim=(-2, -1))
    far2 = torch.zeros(len(here))
    for number, coefficients in enumerate(model.coefficients.numpy()):
        seen = Seen(gathered.sites, gathered.kernels[:, number], gathered.captured[:, number])
        spread = torch.from_numpy(unsure(Fit(terms, coefficients, 0.0), seen, sites, cells, threads))
        far2 += spread.square().to(far2) * square[:, number]
    spread = (far2 / square.sum(dim=1)).sqrt()
    return spread.clamp_min(FAINT * spread.nanmedian())  # a kernel within one bin seems sure


def _kernels(model: RayCVAE, found: RayMap, condition: Tensor) -> Tensor:
    """Kernels [B, 1, y, x] of a map of one wavelength."""
    matrix, decoder = matrix_of(found.terms, found.coefficients)[None], model.decoder_of(found.terms.reach)
    with torch.no_grad():
        return torch.cat([model.rays(model.place(some), matrix, decoder) for some in torch.split(condition, BATCH)])
