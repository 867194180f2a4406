"""How well a model answers while it trains, and the pictures that show it.

Legend: N examples, C condition, W wavelengths, y x bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psftrain.board import Board
from psftrain.data import Places
from psftrain.ddp import Ranks
from psftrain.models.base import CVAE
from psftrain.models.solved import SolvedCVAE
from psftrain.sources import Source

MOST = 8192  # examples that a validation looks at; their mean error is known to about 1 % of itself
FITTED = 1024  # training examples that the same is asked of, to compare
PICTURES = 12
BATCH = 512


@dataclass(frozen=True)
class Rows:
    """`kernels` [N, W, y, x] and `condition` [N, C] on the device that trains."""

    kernels: Tensor
    condition: Tensor

    @classmethod
    def spread(cls, places: Places, source: Source, most: int, device: torch.device, dtype: torch.dtype) -> Rows:
        """At most `most` examples, evenly spread over a set."""
        count = len(places.condition)
        chosen = torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long()
        kernels, _ = source.rows(places.number[chosen])
        return cls(kernels.to(device, dtype), places.condition[chosen].to(device, dtype))

    def every(self, first: int, step: int) -> Rows:
        """Every `step`-th example."""
        return Rows(self.kernels[first::step], self.condition[first::step])


def errors(model: CVAE, rows: Rows) -> dict[str, Tensor]:
    """Relative L2 error [N] of the path from the prior's mean and of that from the posterior's."""
    found: dict[str, list[Tensor]] = {"prior": [], "posterior": []}
    with torch.no_grad():
        for kernels, condition in zip(
            torch.split(rows.kernels, BATCH), torch.split(rows.condition, BATCH), strict=True
        ):
            for name, latent in (
                ("prior", model.prior(condition)),
                ("posterior", model.posterior(kernels, condition)),
            ):
                decoded = model.decode(latent.mean, condition)
                if isinstance(model, SolvedCVAE):
                    decoded = decoded.nan_to_num()  # what it takes for dark is wholly wrong: all these have light
                difference = (decoded - kernels).flatten(1).norm(dim=-1)
                found[name].append(difference / kernels.flatten(1).norm(dim=-1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def validate(model: CVAE, rows: Rows, ranks: Ranks) -> dict[str, float]:
    """Mean errors over `rows`, of which every process takes its share."""
    mine = errors(model, rows.every(ranks.rank, ranks.world)) if len(rows.condition) > ranks.rank else {}
    sums = [mine[name].double().sum() if mine else torch.zeros((), dtype=torch.float64) for name in PATHS]
    total = ranks.mean(torch.stack([value.to(ranks.device) for value in sums])) * ranks.world
    return {name: float(value) / len(rows.condition) for name, value in zip(PATHS, total, strict=True)}


PATHS = ("prior", "posterior")


class Look:
    """The examples that a run is looked at by, fetched once: some to draw, and those its errors are taken on."""

    def __init__(
        self,
        train: tuple[Places, Source],
        held: tuple[Places, Source] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`train` and `held` (the validation set, where there is one): places, and where their kernels are."""
        sets = {"train": (train, FITTED), **({"val": (held, MOST)} if held else {})}
        self.drawn = {name: Rows.spread(*of, PICTURES, device, dtype) for name, (of, _) in sets.items()}
        self.judged = {name: Rows.spread(*of, most, device, dtype) for name, (of, most) in sets.items() if held}

    def draw(self, board: Board, model: CVAE, step: int) -> None:
        """Truth, posterior reconstruction and prior mean, row by row."""
        for name, rows in self.drawn.items():
            board.kernels(f"{name}/truth_posterior_prior", gallery(model, rows), step)

    def errors(self, model: CVAE, ranks: Ranks) -> dict[str, float]:
        """Mean relative L2 errors of both paths on training and validation examples, as they are logged."""
        return {
            f"{name}_{path}/rel_l2": error
            for name, rows in self.judged.items()
            for path, error in validate(model, rows, ranks).items()
        }


def gallery(model: CVAE, rows: Rows) -> list[Tensor]:
    """Truth, posterior reconstruction and prior mean of some examples, each [N, W, y, x]."""
    with torch.no_grad():
        posterior = model.decode(model.posterior(rows.kernels, rows.condition).mean, rows.condition)
        prior = model.decode(model.prior(rows.condition).mean, rows.condition)
    return [rows.kernels, posterior, prior]
