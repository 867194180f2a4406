"""The loss of a CVAE, whole, in one module: what a DDP wrapper must see is its forward.

Every term is a mean over the batch of this process: with equal shards the mean over processes is that of the whole
batch. Nothing waits for the device and no shape depends on a value, so that a step can be one CUDA graph. Under
autocast the networks may compute in bf16; what they give is widened to float32 before it enters a loss.

Legend: B batch, L latent, C condition, W wavelengths, y x bins, Q further places, P pairs of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psftrain.batch import Batch
from psftrain.config import LossConfig
from psftrain.models.base import CVAE, Gaussian
from psftrain.models.layers import widened

FLOOR = 1e-8
ACTIVE_NATS = 0.01
SMOOTH_L1_BETA = 0.1  # of a kernel's RMS: nearly the mean absolute error, rounded at 0
HUBER_DELTA = 1.0  # of a kernel's RMS: nearly the mean squared error, whose outliers count linearly

# --- reconstructions: (found, truth) [B, W, y, x] -> [B] --------------------------------------------------------------


def mse(found: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over wavelengths and bins."""
    return (found - truth).flatten(1).square().mean(dim=-1)


def mae(found: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error over wavelengths and bins."""
    return (found - truth).flatten(1).abs().mean(dim=-1)


def rel_l2(found: Tensor, truth: Tensor) -> Tensor:
    """|K^ - K| / |K|, the norm over the whole stack of an example."""
    error = (found - truth).flatten(1).square().sum(dim=-1)
    relative: Tensor = (error + FLOOR**2).sqrt() / truth.flatten(1).norm(dim=-1)
    return relative


def nll(found: Tensor, truth: Tensor) -> Tensor:
    """Multinomial negative log likelihood per ray, less the entropy of the truth: 0 where they agree.

    The rays of a channel fall into its bins as K says, so that -sum K log K^ is their likelihood; mean over channels.
    """
    ratio = (truth + FLOOR).log() - (found + FLOOR).log()
    return (truth * ratio).sum(dim=(-2, -1)).mean(dim=-1)


def smooth_l1(found: Tensor, truth: Tensor) -> Tensor:
    """e^2 / (2 b) where e < b, else e - b / 2 (Girshick, "Fast R-CNN", ICCV 2015, with PyTorch's b), mean over bins.

    e is the error of a bin in units of the RMS of its stack: bins of a kernel that sums to 1 are about 0.01, and on
    those PyTorch's b = 1 would be the squared error and nothing else. Where all errors are small it is
    rel_l2^2 / (2 b).
    """
    return F.smooth_l1_loss(*_in_rms(found, truth), reduction="none", beta=SMOOTH_L1_BETA).mean(dim=-1)


def huber(found: Tensor, truth: Tensor) -> Tensor:
    """e^2 / 2 where e < d, else d (e - d / 2) (Huber, Ann. Math. Statist. 35, 1964), mean over bins; e as in smooth_l1.

    Where all errors are small it is rel_l2^2 / 2.
    """
    return F.huber_loss(*_in_rms(found, truth), reduction="none", delta=HUBER_DELTA).mean(dim=-1)


def _in_rms(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    scale = truth.flatten(1).square().mean(dim=-1, keepdim=True).sqrt()
    return found.flatten(1) / scale, truth.flatten(1) / scale


RECONSTRUCTIONS = {"mse": mse, "rel_l2": rel_l2, "nll": nll, "mae": mae, "smooth_l1": smooth_l1, "huber": huber}

# --- differences of neighbours: -> [P] --------------------------------------------------------------------------------


def squared(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of latents [P, L]."""
    return (a - b).square().sum(dim=-1)


def relative_energy(a: Tensor, b: Tensor) -> Tensor:
    """|A - B|^2 over the mean of |A|^2 and |B|^2, of kernels [P, W, y, x]: 0 where equal, 2 where disjoint.

    Without the division the sharpest kernels alone would count, another number of bins would need another weight,
    and the loss could be lowered by blurring every kernel alike.
    """
    energy = (a.square() + b.square()).flatten(1).sum(dim=-1) / 2
    return (a - b).square().flatten(1).sum(dim=-1) / energy


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """sum |A - B| of kernels [P, W, y, x], mean over wavelengths: 0 where equal, 2 where disjoint.

    Summed over the grid it is the anisotropic total variation of the field of kernels (Rudin, Osher and Fatemi,
    Physica D 60, 1992): it minds a gradual change no more than the same change in one step.
    """
    return (a - b).abs().sum(dim=(-2, -1)).mean(dim=-1)


DIFFERENCES = {
    "prior_mean": squared,
    "posterior_mean": squared,
    "kernels": relative_energy,
    "kernels_tv": total_variation,
}

# --- the whole --------------------------------------------------------------------------------------------------------


def kl_per_dim(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, by latent dimension [B, L]."""
    ratio = (q.logvar - p.logvar).exp()
    return 0.5 * (p.logvar - q.logvar + ratio + (q.mean - p.mean).square() / p.logvar.exp() - 1)


def alone(value: Tensor) -> Tensor:
    """The mean over processes where there is one."""
    return value


class Objective(nn.Module):
    """A model and its loss. `mean_over_ranks` averages a tensor over processes; free bits need it."""

    def __init__(self, model: CVAE, config: LossConfig, mean_over_ranks: Callable[[Tensor], Tensor] = alone) -> None:
        super().__init__()
        self.model, self.config, self.mean_over_ranks = model, config, mean_over_ranks

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of a batch, unweighted, and their weighted sum `total`.

        recon; prior, the same from the prior's mean, where the config has it; kl, in nats; kl_dims [L], its parts,
        detached; smooth, where the batch has neighbours. The weight of the KL is `batch.beta`.
        """
        config, near, size = self.config, batch.neighbours, len(batch.kernels)
        condition, kernels = batch.condition, batch.kernels
        if near is not None:
            condition = torch.cat([condition, near.places])
            kernels = kernels if near.kernels is None else torch.cat([kernels, near.kernels])
        priors = _widened(self.model.prior(condition))
        posteriors = _widened(self.model.posterior(kernels, condition[: len(kernels)]))
        posterior = _first(posteriors, size)

        kl = kl_per_dim(posterior, _first(priors, size)).mean(dim=0)
        terms = {
            "recon": self._reconstruction(self._decode(posterior.sample(batch.noise), batch.condition), batch),
            "kl": kl.sum(),
            "kl_dims": kl.detach(),
        }
        total = terms["recon"] + batch.beta * self._charged(kl)
        means = {"prior_mean": priors.mean, "posterior_mean": posteriors.mean}
        painted = near is not None and config.smooth_on not in means
        if painted or config.prior:
            count = len(condition) if painted else size
            decoded = self._decode(priors.mean[:count], condition[:count])
        if config.prior:
            terms["prior"] = self._reconstruction(decoded[:size], batch)
            total = total + config.prior * terms["prior"]
        if near is not None:
            values = decoded if painted else means[config.smooth_on]
            differences = DIFFERENCES[config.smooth_on](values[near.pairs[:, 0]], values[near.pairs[:, 1]])
            terms["smooth"] = (near.weight * differences).sum()
            total = total + config.smooth * terms["smooth"]
        return {**terms, "total": total}

    def _decode(self, z: Tensor, condition: Tensor) -> Tensor:
        return widened(self.model.decode(z, condition))

    def _reconstruction(self, found: Tensor, batch: Batch) -> Tensor:
        parts = [weight * RECONSTRUCTIONS[name](found, batch.kernels) for name, weight in self.config.recon.items()]
        return (batch.weight * torch.stack(parts).sum(dim=0)).mean()

    def _charged(self, kl: Tensor) -> Tensor:
        """The KL that is paid for, from its mean by dimension [L]: free bits (Kingma et al., NeurIPS 2016, C.8).

        A dimension whose mean over the whole batch is below config.kl costs that much and has no gradient. Each
        process gives its own part of the others, so that the mean over processes is that of one alone.
        """
        if not self.config.kl:
            return kl.sum()
        overall = self.mean_over_ranks(kl.detach())
        return torch.where(overall >= self.config.kl, kl, self.config.kl).sum()


def _widened(found: Gaussian) -> Gaussian:
    return Gaussian(widened(found.mean), widened(found.logvar))


def _first(found: Gaussian, count: int) -> Gaussian:
    return Gaussian(found.mean[:count], found.logvar[:count])
