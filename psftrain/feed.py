"""Batches for this process's share of every step, on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from psftrain import schedules
from psftrain.batch import Batch
from psftrain.config import FitConfig
from psftrain.data import Places
from psftrain.ddp import Ranks
from psftrain.order import Order
from psftrain.smoothness import GridNeighbours, neighbours_of
from psftrain.sources import Source


class Feed:
    """What each step sees: a function of the seed and the step alone, whatever the number of processes."""

    def __init__(
        self, config: FitConfig, places: Places, source: Source, order: Order, ranks: Ranks, latent: int
    ) -> None:
        self.config, self.source, self.order, self.ranks, self.latent = config, source, order, ranks, latent
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.number = places.number
        self.condition = places.condition.to(ranks.device, self.dtype)
        self.neighbours = neighbours_of(
            config.loss,
            self.condition,
            places.neighbours(),
            places.slices,
            lambda position: self._rows(position.cpu())[0],
        )

    def __call__(self, step: int) -> list[Batch]:
        """The parts of this process's share of the batch of a step."""
        share, parts = self.ranks.share(self.config.batch), self.config.accumulate
        position = self.order.batch(step)[share]
        noise = self.order.noise(step, self.latent, self.ranks.device)[share].to(self.dtype)
        beta = torch.full((), schedules.beta(self.config, step), device=self.ranks.device, dtype=self.dtype)
        return [self._batch(p, n, beta, step) for p, n in zip(position.chunk(parts), noise.chunk(parts), strict=True)]

    def _batch(self, position: Tensor, noise: Tensor, beta: Tensor, step: int) -> Batch:
        kernels, relative = self._rows(position, step)
        position = position.to(self.ranks.device, non_blocking=True)
        half = self.config.loss.noise_half
        weight = torch.ones_like(relative) if half is None else 1 / (1 + (relative / half).square())
        neighbours = None if self.neighbours is None else self.neighbours(position, self._slice(step))
        return Batch(kernels, self.condition[position], noise, weight, neighbours, beta)

    def _slice(self, step: int) -> int:
        return self.order.slice_of(step, self.neighbours.shares) if isinstance(self.neighbours, GridNeighbours) else 0

    def _rows(self, position: Tensor, step: int | None = None) -> tuple[Tensor, Tensor]:
        kernels, noise = self.source.rows(self.number.index_select(0, position), step)
        device = self.ranks.device
        return kernels.to(device, self.dtype, non_blocking=True), noise.to(device, self.dtype, non_blocking=True)
