"""Few kernels, each of which shapes the map: what maps say that have not seen some of them.

Legend: M places, W wavelengths, S slices (a depth and a focus each), y x bins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from psftrain.data import Examples
from psftrain.models.rays import RayCVAE
from psftrain.raymap.decoder import matrix_of
from psftrain.raymap.gather import Gathered
from psftrain.raymap.search import RayMap

FOLDS = 3
WITNESSES = 21  # places a side at which maps of few kernels are compared

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


def doubts(model: RayCVAE, folds: list[Fold], slices: Tensor) -> tuple[Tensor, Tensor]:
    """Places all over the field [V, 2], and how unsure the map is there in each slice [S, 2] of a depth and a focus:
    how far, relatively, the nearest of the others is from it [S, V].

    A map that lacks a ring errs much more there than one that lacks none, and about as much far from it.
    """
    middle, at = model.shape[0] // 2, torch.linspace(-1, 1, WITNESSES)
    witnesses, far = torch.cartesian_prod(at, at), []
    for slice_ in slices:
        condition = torch.cat([witnesses, slice_.expand(len(witnesses), -1)], dim=1)
        own = model.mapped(condition)[:, middle : middle + 1].flatten(1)
        apart = [(_kernels(model, found, condition).flatten(1) - own).norm(dim=1) for _, found in folds]
        far.append(torch.stack(apart).amin(dim=0) / own.norm(dim=1))
    return witnesses, torch.stack(far)


def _kernels(model: RayCVAE, found: RayMap, condition: Tensor) -> Tensor:
    """Kernels [B, 1, y, x] of a map of one wavelength."""
    matrix = matrix_of(found.terms, found.coefficients)[None]
    with torch.no_grad():
        return model.rays(model.place(condition), matrix, model.decoder_of(found.terms.reach))
