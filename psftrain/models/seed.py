"""The published conditional VAE, as it was: one focus distance, one depth, ten Fourier octaves of the field.

Each of its three networks has an input layer and four hidden layers of 512 (4,234,915 parameters for 15 x 15
bins of three wavelengths). With its published loss its posterior collapses; it is kept to show that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psfgen.errors import RunMismatch
from psftrain.conditioning import Conditioning
from psftrain.config import ModelConfig
from psftrain.models.base import CVAE, Gaussian
from psftrain.models.layers import GaussianHead, fourier, mlp, widened

DEFAULTS = {
    "batch": 64,
    "lr": 1e-4,
    "warmup": 0,
    "schedule": "constant",
    "clip": None,
    "model": {"latent": 128, "width": 512, "layers": 4, "octaves": 10},
    "loss": {"recon": {"mse": 1.0}, "prior": 0.0, "beta": 1e-4, "smooth": 1e-3, "smooth_over": "grid"},
}


class SeedCVAE(CVAE):
    """The published networks: ReLU, PyTorch's default initialisation, softplus and division by the sum."""

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
        super().__init__()
        if conditioning.varies:
            raise RunMismatch(
                f"model seed_cvae takes one focus and one depth, as published; the store varies "
                f"{' and '.join(conditioning.varies)}; use model field_cvae or a store of one pair"
            )
        self.latent, self.shape, self.octaves = config.latent, shape, 10 if config.octaves is None else config.octaves
        size, encoded = shape[0] * shape[1] * shape[2], 4 * self.octaves
        hidden = config.layers + 1  # the input layer, then `layers` from hidden to hidden
        self.encoder = GaussianHead(size + encoded, config.width, hidden, config.latent, nn.ReLU)
        self.prior_net = GaussianHead(encoded, config.width, hidden, config.latent, nn.ReLU)
        self.decoder = mlp(config.latent + encoded, config.width, hidden, size, nn.ReLU)

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c) of kernels [B, W, y, x]."""
        found: Gaussian = self.encoder(kernels.flatten(1), self._encode(condition))
        return found

    def prior(self, condition: Tensor) -> Gaussian:
        """p(z | c) of conditions [B, C]."""
        found: Gaussian = self.prior_net(self._encode(condition))
        return found

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Kernels [B, W, y, x] of latents [B, L] under conditions [B, C]."""
        positive = F.softplus(widened(self.decoder(torch.cat([z, self._encode(condition)], dim=-1))))
        kernels: Tensor = positive.view(-1, *self.shape)
        return kernels / kernels.sum(dim=(-2, -1), keepdim=True)

    def _encode(self, condition: Tensor) -> Tensor:
        return fourier(condition[:, :2], self.octaves)
