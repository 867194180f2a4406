"""What every model is.

Legend: B batch, C condition, L latent, W wavelengths, y x the bins of a kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psfgen.errors import RunMismatch


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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the conditions that it takes."""
        return next((value.dtype for value in self.parameters()), torch.float32)

    def for_wavelengths(self, wavelength_um: NDArray[np.float64]) -> CVAE:
        """The same model with other channels [V], um. Raises RunMismatch where it cannot answer for them."""
        raise RunMismatch(
            f"model {type(self).__name__} knows the wavelengths that it was trained on and no others; field_cvae does"
        )

    def expected_error(self, condition: Tensor) -> Tensor | None:
        """The relative L2 error [B] to be expected of the prior mean under conditions [B, C]; None: it cannot say."""
        return None

    def draw(self, count: int, seed: int) -> Tensor:
        """Latents [count, L] of lenses as likely as those seen. Raises RunMismatch for a model that has seen one."""
        raise RunMismatch(
            f"model {type(self).__name__} has learned one lens and can draw no others; train model field_cvae on a "
            "store with copies (psfgen render --copies 24 --tolerances FILE)"
        )

    @abstractmethod
    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        """q(z | K, c) of kernels [B, W, y, x] under conditions [B, C]."""

    @abstractmethod
    def prior(self, condition: Tensor) -> Gaussian:
        """p(z | c) of conditions [B, C]."""

    @abstractmethod
    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """p(K | z, c): kernels [B, W, y, x], non-negative, each channel summing to 1."""
