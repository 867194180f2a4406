"""The loss of a CVAE, whole, in one module: what a DDP wrapper must see is its forward.

Legend: B batch, L latent, W wavelengths, P pairs of neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psftrain.config import LossConfig
from psftrain.models.base import CVAE, Gaussian

FLOOR = 1e-8
ACTIVE_NATS = 0.01


def mse(found: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over batch, wavelengths and bins."""
    return (found - truth).square().mean()


def rel_l2(found: Tensor, truth: Tensor) -> Tensor:
    """Mean over the batch of |K^ - K| / |K|, the norm over the whole stack of an example."""
    error = (found - truth).flatten(1).square().sum(dim=-1)
    relative: Tensor = (error + FLOOR**2).sqrt() / truth.flatten(1).norm(dim=-1)
    return relative.mean()


def nll(found: Tensor, truth: Tensor) -> Tensor:
    """Multinomial negative log likelihood per ray, less the entropy of the truth: 0 where they agree."""
    ratio = (truth + FLOOR).log() - (found + FLOOR).log()
    return (truth * ratio).sum(dim=(-2, -1)).mean()


RECONSTRUCTIONS = {"mse": mse, "rel_l2": rel_l2, "nll": nll}


def kl_per_dim(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, by latent dimension [B, L]."""
    ratio = (q.logvar - p.logvar).exp()
    return 0.5 * (p.logvar - q.logvar + ratio + (q.mean - p.mean).square() / p.logvar.exp() - 1)


class Objective(nn.Module):
    """A model and its loss. `forward` returns the terms, unweighted, and their weighted sum as `total`."""

    def __init__(self, model: CVAE, config: LossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self, kernels: Tensor, condition: Tensor, noise: Tensor, places: Tensor, pairs: Tensor
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        `kernels` [B, W, y, x], `condition` [B, C], `noise` [B, L] standard normal; `places` [Q, C] are
        conditions of field points and `pairs` [P, 2] the neighbours among them, for the smoothness.
        """
        model, config = self.model, self.config
        both = model.prior(torch.cat([condition, places]))
        prior = Gaussian(both.mean[: len(condition)], both.logvar[: len(condition)])
        posterior = model.posterior(kernels, condition)
        kl = kl_per_dim(posterior, prior)
        terms = {
            "recon": self._reconstruction(model.decode(posterior.sample(noise), condition), kernels),
            "kl": kl.sum(dim=-1).mean(),
            "active_dims": (kl.detach().mean(dim=0) > ACTIVE_NATS).sum().float(),
        }
        charged = kl.mean(dim=0).clamp_min(config.kl).sum() if config.kl else terms["kl"]
        total = terms["recon"] + config.beta * charged
        if config.prior:
            terms["prior"] = self._reconstruction(model.decode(prior.mean, condition), kernels)
            total = total + config.prior * terms["prior"]
        if len(pairs):
            mean = both.mean[len(condition) :]
            terms["smooth"] = (mean[pairs[:, 0]] - mean[pairs[:, 1]]).square().sum(dim=-1).mean()
            total = total + config.smooth * terms["smooth"]
        return {**terms, "total": total}

    def _reconstruction(self, found: Tensor, truth: Tensor) -> Tensor:
        parts = [weight * RECONSTRUCTIONS[name](found, truth) for name, weight in self.config.recon.items()]
        return torch.stack(parts).sum()
