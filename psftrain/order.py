"""What a training step sees and how large it is: functions of the seed and the step alone, so that a run
can stop and go on anywhere.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from psftrain.config import FitConfig


class Order:
    """Which examples and which noise a step sees: a function of (seed, step) alone."""

    def __init__(self, seed: int, examples: int, batch: int) -> None:
        self.seed, self.examples, self.size = seed, examples, batch
        self._epochs: dict[int, Tensor] = {}

    def batch(self, step: int) -> Tensor:
        """Indices of the examples of a step; every epoch is a new permutation, epochs follow seamlessly."""
        position = np.arange(step * self.size, (step + 1) * self.size)
        epochs = position // self.examples
        for epoch in set(epochs.tolist()) - self._epochs.keys():
            generator = torch.Generator().manual_seed(_key(self.seed, 0, epoch))
            self._epochs[epoch] = torch.randperm(self.examples, generator=generator)
        self._epochs = {epoch: order for epoch, order in self._epochs.items() if epoch >= epochs[0]}
        parts = [self._epochs[e][torch.from_numpy(position[epochs == e] % self.examples)] for e in np.unique(epochs)]
        return torch.cat(parts)

    def noise(self, step: int, latent: int, slices: int) -> tuple[Tensor, int]:
        """Standard-normal noise [B, L] of a step, and the slice whose smoothness it looks at."""
        generator = torch.Generator().manual_seed(_key(self.seed, 1, step))
        noise = torch.randn(self.size, latent, generator=generator)
        return noise, int(torch.randint(max(slices, 1), (), generator=generator))


def _key(seed: int, stream: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, stream, step]).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 1 % (Loshchilov and Hutter, "SGDR", ICLR 2017)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
