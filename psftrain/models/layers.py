"""Pieces that models share."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from psftrain.models.base import Gaussian


def fourier(xy: Tensor, octaves: int) -> Tensor:
    """sin and cos of 2^i pi x, i < `octaves`, for each column: [B, D] -> [B, 2 D octaves].

    Positional encoding of Mildenhall et al., "NeRF", ECCV 2020, without the raw coordinates.
    """
    scaled = xy[..., None] * (math.pi * 2.0 ** torch.arange(octaves, device=xy.device, dtype=xy.dtype))
    return torch.cat([scaled.sin(), scaled.cos()], dim=-1).flatten(-2)


def widened(values: Tensor) -> Tensor:
    """`values` in float32 where autocast has made them narrower: 8 bits of bf16 do not make kernels that sum to 1."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mlp(
    inputs: int, width: int, hidden: int, outputs: int, activation: type[nn.Module], bias: bool = True
) -> nn.Sequential:
    """`hidden` layers of `width`, each followed by the activation, then a linear layer (without `bias` if so asked)."""
    sizes = [inputs, *[width] * hidden]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs, bias=bias))


class GaussianHead(nn.Module):
    """An MLP to the mean and log variance of a diagonal Gaussian."""

    def __init__(self, inputs: int, width: int, hidden: int, latent: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.net = mlp(inputs, width, hidden, 2 * latent, activation)

    def forward(self, *inputs: Tensor) -> Gaussian:
        mean, logvar = self.net(torch.cat(inputs, dim=-1)).chunk(2, dim=-1)
        return Gaussian(mean, logvar)


def hats(at: Tensor, knots: Tensor) -> Tensor:
    """The weight of each ascending knot [K] in linear interpolation at [B]: [B, K]; beyond the ends, the nearest."""
    at = at[:, None].clamp(knots[0], knots[-1])
    if len(knots) == 1:
        return torch.ones_like(at)
    step = knots.diff()
    rising = torch.cat([torch.ones_like(at), (at - knots[:-1]) / step], dim=-1)
    falling = torch.cat([(knots[1:] - at) / step, torch.ones_like(at)], dim=-1)
    return torch.minimum(rising, falling).clamp(0, 1)


def lit(kernels: Tensor, light: Tensor) -> Tensor:
    """Kernels [..., y, x], NaN where less than half of one has any `light` [...] to it, as dark ones are in stores."""
    return torch.where((light > 0.5)[..., None, None], kernels, torch.nan)


def on_the_simplex(kernels: Tensor) -> Tensor:
    """The nearest kernels [..., y, x] that are non-negative and sum to 1 (Duchi et al., ICML 2008)."""
    flat = kernels.flatten(-2)
    falling = flat.sort(dim=-1, descending=True).values
    excess = falling.cumsum(dim=-1) - 1
    count = torch.arange(1, flat.shape[-1] + 1, device=flat.device)
    kept = (falling * count > excess).sum(dim=-1, keepdim=True).clamp_min(1)  # 0 of NaN
    level = excess.gather(-1, kept - 1) / kept
    return (flat - level).clamp_min(0).view_as(kernels)
