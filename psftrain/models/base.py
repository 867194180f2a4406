"""What every model is.

Legend: B batch, C condition, L latent, W wavelengths, y x the bins of a kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over the latent: `mean` and `logvar` [B, L]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draw with standard-normal `noise` [B, L]."""
        return self.mean + (0.5 * self.logvar).exp() * noise


class CVAE(nn.Module, ABC):
    """A conditional VAE of kernels; built from (ModelConfig, shape (W, y, x), Conditioning)."""

    latent: int

    @abstractmethod
    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c) of kernels [B, W, y, x] under conditions [B, C]."""

    @abstractmethod
    def prior(self, condition: Tensor) -> Gaussian:
        """p(z | c) of conditions [B, C]."""

    @abstractmethod
    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """p(K | z, c): kernels [B, W, y, x], non-negative, each channel summing to 1."""
