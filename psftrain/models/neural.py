"""A CVAE trained by gradient steps, whose decoder paints each bin in the frame of the field direction.

A lens with an axis has one kernel per field radius, turned by the azimuth. So the decoder is an implicit
function of a bin's place along (u) and across (|v|) the field direction, of the field radius, depth, focus
and the latent; a network over whole kernels cannot see that turn and errs about twice as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psftrain.conditioning import Conditioning
from psftrain.config import ModelConfig
from psftrain.models.base import CVAE, Gaussian
from psftrain.models.layers import GaussianHead, fourier, mlp, widened

DEFAULTS: dict[str, Any] = {}

PIXEL_GAIN = 3.0  # places in the window as the decoder sees them: +-3, so that its first layer resolves bins
KERNEL_GAIN = 10.0  # kernels as the encoder sees them: of order 1


def octaves_for(grid: int) -> int:
    """Fourier octaves that a grid of `grid` points a side carries without ringing between its nodes.

    The highest octave must turn less than once in 16 nodes; at most 2. On a 10 x 10 grid of the default lens
    2 octaves doubled the error near the rim of the field.
    """
    return min(2, int(grid >= 16) + int(grid >= 32))


class NeuralCVAE(CVAE):
    """Prior and posterior are MLPs of the condition; the decoder is a rotated per-bin network."""

    pixel_uv: Tensor
    aspect: Tensor
    on_axis: Tensor

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
        super().__init__()
        channels, rows, columns = shape
        self.latent, self.shape = config.latent, shape
        self.octaves = octaves_for(conditioning.grid) if config.octaves is None else config.octaves
        encoded = 4 + 4 * self.octaves
        self.encoder = GaussianHead(
            channels * rows * columns + encoded, config.width, config.layers, config.latent, nn.SiLU
        )
        self.prior_net = GaussianHead(encoded, config.width, config.layers, config.latent, nn.SiLU)
        self.from_pixel = nn.Linear(3, config.width)
        self.from_condition = nn.Linear(4 + config.latent, config.width, bias=False)
        # Without a last bias: the softmax over bins does not see it.
        to_logits = mlp(config.width, config.width, config.layers - 1, channels, nn.SiLU, bias=False)
        self.decoder = nn.Sequential(nn.SiLU(), to_logits)
        y = -(torch.arange(rows) - (rows - 1) / 2) / (rows / 2)  # row 0 is +y
        x = (torch.arange(columns) - (columns - 1) / 2) / (columns / 2)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        self.register_buffer("pixel_uv", torch.stack([grid_x.flatten(), grid_y.flatten()]), persistent=False)
        self.register_buffer("aspect", torch.tensor([1.0, conditioning.aspect]), persistent=False)
        self.register_buffer("on_axis", torch.tensor([1.0, 0.0]), persistent=False)  # there any direction will do

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c) of kernels [B, W, y, x]."""
        found: Gaussian = self.encoder(KERNEL_GAIN * kernels.flatten(1), self._encode(condition))
        return found

    def prior(self, condition: Tensor) -> Gaussian:
        """p(z | c) of conditions [B, C]."""
        found: Gaussian = self.prior_net(self._encode(condition))
        return found

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Kernels [B, W, y, x] of latents [B, L] under conditions [B, C]."""
        place = condition[:, :2] * self.aspect
        radius = place.norm(dim=-1, keepdim=True)
        along = torch.where(radius > 0, place / radius.clamp_min(1e-9), self.on_axis)
        across = torch.stack([-along[:, 1], along[:, 0]], dim=-1)
        u, v = along @ self.pixel_uv, across @ self.pixel_uv  # [B, y x]
        pixel = PIXEL_GAIN * torch.stack([u, v.abs(), torch.hypot(u, v)], dim=-1)
        about = torch.cat([radius, radius.square(), condition[:, 2:], z], dim=-1)
        logits = widened(self.decoder(self.from_pixel(pixel) + self.from_condition(about)[:, None]))
        return logits.softmax(dim=1).transpose(1, 2).reshape(-1, *self.shape)

    def _encode(self, condition: Tensor) -> Tensor:
        return torch.cat([condition, fourier(condition[:, :2], self.octaves)], dim=-1)
