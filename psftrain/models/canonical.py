"""Kernels by regularised least squares in the frame of the field direction: no rays, no network.

What is solved (`psftrain.canonical`) is kept as a table over the field, one a depth and focus distance, and read
bilinearly: exact at the table's nodes, and within 1 % of the model's own error between them.

Legend: B places, C condition, S slices (a depth and a focus each), G nodes a side, V numbers of a kernel stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psfgen.store import Store
from psftrain.canonical.fitting import fit_canonical
from psftrain.conditioning import Conditioning
from psftrain.config import ModelConfig
from psftrain.data import Places, read_examples
from psftrain.models.base import Gaussian
from psftrain.models.layers import hats
from psftrain.models.solved import SolvedCVAE, require_one_specimen
from psftrain.raymap.gather import gather
from psftrain.raymap.terms import Sites

DEFAULTS: dict[str, Any] = {"steps": 1}
FINE, COARSE = 97, 33  # nodes a side of the table, of few slices and of many
FEW_SLICES = 4


class CanonicalModel(SolvedCVAE):
    """The canonical field model of one specimen at each trained depth and focus; linear in dioptres between them."""

    table: Tensor  # [S, G, G, V]
    expected: Tensor  # [S, G, G]
    depth_knots: Tensor
    focus_knots: Tensor

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
        super().__init__()
        self.latent, self.shape, self.conditioning = 0, shape, conditioning

    def require(self, train: Places) -> None:
        """Raise RunMismatch for places of several specimens."""
        require_one_specimen("canonical", train)

    def solve(self, stores: list[Store], train: Places, seed: int, done: Callable[[float], None]) -> dict[str, float]:
        """Fit every depth and focus distance on its own."""
        condition = train.condition
        knots = [torch.unique(condition[:, column]) for column in (2, 3)]
        slices = torch.cartesian_prod(*knots).view(-1, 2)
        side = FINE if len(slices) <= FEW_SLICES else COARSE
        aspect = np.array([1.0, self.conditioning.aspect])
        at = np.linspace(-1, 1, side)
        field = np.stack(np.meshgrid(at, at, indexing="xy"), axis=-1).reshape(-1, 2) * aspect
        examples = read_examples(stores, self.conditioning, train.array).of(train)
        tables, expected, errors = [], [], []
        for number, pair in enumerate(slices):
            here = (condition[:, 2:] == pair).all(dim=1).numpy()
            places = train.select(here)
            none = np.zeros(len(places))
            gathered = gather(stores, places, Sites(places.condition[:, :2].double().numpy() * aspect, none, none))
            binned = examples.kernels[torch.from_numpy(here)].numpy()
            found = fit_canonical(gathered.sites.field, gathered.kernels, binned, seed=seed)
            tables.append(found.predict(field).reshape(side, side, -1))
            expected.append(found.expected_error(field).reshape(side, side))
            errors.append(found.cv_error)
            done((number + 1) / len(slices))
        self.hold("table", torch.tensor(np.stack(tables)))
        self.hold("expected", torch.tensor(np.stack(expected)).float())
        self.hold("depth_knots", knots[0])
        self.hold("focus_knots", knots[1])
        return {"left_out/rel_l2": float(np.mean(errors))}

    def prepare(self) -> None:
        """Nothing follows from the table."""

    def prior(self, condition: Tensor) -> Gaussian:
        """p(z) of a latent of no dimensions, for conditions [B, C]."""
        nothing = condition.new_zeros(condition.shape[0], 0)
        return Gaussian(nothing, nothing)

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c): the prior."""
        return self.prior(condition)

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Kernels [B, W, y, x] under conditions [B, C]."""
        if not self.solved:
            return self.flat(len(condition)).to(condition)
        return self._read(self.table, condition).reshape(-1, *self.shape)

    def expected_error(self, condition: Tensor) -> Tensor | None:
        """What points left out erred, as the fit interpolates it."""
        return self._read(self.expected[..., None], condition)[:, 0] if self.solved else None

    def _read(self, table: Tensor, condition: Tensor) -> Tensor:
        """A table [S, G, G, V] at conditions [B, C]: [B, V]."""
        at = (condition[:, :2].clamp(-1, 1) + 1) / 2 * (table.shape[1] - 1)
        low = at.floor().clamp_max(table.shape[1] - 2)
        (x, y), (beyond_x, beyond_y) = low.long().unbind(-1), (at - low).unbind(-1)
        depth, focus = hats(condition[:, 2], self.depth_knots), hats(condition[:, 3], self.focus_knots)
        of_slices = (depth[:, :, None] * focus[:, None]).flatten(1)
        found = torch.zeros_like(table[0, 0, 0]).expand(condition.shape[0], -1)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share_y = beyond_y if row else 1 - beyond_y
            share_x = beyond_x if column else 1 - beyond_x
            corner = table[:, y + row, x + column]
            found = found + torch.einsum("b,bs,sbv->bv", share_y * share_x, of_slices, corner)
        return found
