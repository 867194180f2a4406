"""The network that a CVAE must be worth its trouble against: condition in, kernels out, no latent.

An MLP of about as many parameters as the model, trained on the same points for as many steps with what serves such a
network best: few octaves of the field, relative L2, a cosine learning rate. Legend: B batch, C condition, W
wavelengths, y x bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from psfgen.errors import progress
from psftrain.config import FitConfig
from psftrain.data import Examples
from psftrain.losses import nll, rel_l2
from psftrain.models.layers import fourier, mlp
from psftrain.schedules import learning_rate

HIDDEN = 3
WIDTHS = (64, 512)
BATCH = 32
LR, WARMUP, CLIP = 3e-3, 100, 1.0
NLL = 0.1  # beside 1 of the relative L2


class Regression(nn.Module):
    """Kernels [B, W, y, x], each channel a softmax over its bins, from conditions [B, C]."""

    def __init__(self, shape: tuple[int, int, int], octaves: int, parameters: int) -> None:
        super().__init__()
        self.shape, self.octaves = shape, octaves
        inputs, outputs = 4 + 4 * octaves, math.prod(shape)
        self.net = mlp(inputs, width_for(parameters, inputs, outputs), HIDDEN, outputs, nn.SiLU)

    def forward(self, condition: Tensor) -> Tensor:
        """Kernels of conditions."""
        logits = self.net(torch.cat([condition, fourier(condition[:, :2], self.octaves)], dim=-1))
        kernels: Tensor = logits.view(-1, self.shape[0], self.shape[1] * self.shape[2]).softmax(dim=-1)
        return kernels.view(-1, *self.shape)


def octaves_for(grid: int) -> int:
    """Octaves that serve a plain network best on a grid of so many points a side: more ring between the nodes."""
    return int(grid >= 8) + int(grid >= 16)


def width_for(parameters: int, inputs: int, outputs: int) -> int:
    """The width at which the network has about so many parameters, within what trains well."""
    a, b = HIDDEN - 1, inputs + outputs + HIDDEN
    width = (math.sqrt(b * b + 4 * a * max(parameters - outputs, 0)) - b) / (2 * a)
    return min(max(round(width), WIDTHS[0]), WIDTHS[1])


def regress(train: Examples, grid: int, *, parameters: int, steps: int, seed: int) -> Regression:
    """Train a network of about `parameters` on the CPU for `steps`; the same seed gives the same network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Regression(train.places.shape, octaves_for(grid), parameters)
        optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
        rates = FitConfig(steps=steps, lr=LR, warmup=min(WARMUP, steps // 10), schedule="cosine")
        bar = progress(steps, "eval, a plain network", "step")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(rates, step)
            chosen = torch.randint(len(train), (min(BATCH, len(train)),))
            found, truth = network(train.condition[chosen]), train.kernels[chosen]
            loss = (rel_l2(found, truth) + NLL * nll(found, truth)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            bar.update()
        bar.close()
    return network.requires_grad_(False)
