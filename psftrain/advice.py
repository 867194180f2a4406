"""What a run that goes wrong is told, with what to change."""

from __future__ import annotations

import logging

from psftrain.config import FitConfig, LossConfig

log = logging.getLogger(__name__)
SETTLED = 0.3  # share of the steps after which a posterior that tells nothing is worth a warning
WORSE = 3.0  # validation error / training error from which on a user is warned


def collapse(kl_nats: float, latent_dims: int, loss: LossConfig) -> str:
    """The posterior tells nothing that the prior does not."""
    remedies = [f"a lower beta (now {loss.beta:g}: --set loss.beta={loss.beta / 100:g})"]
    if loss.anneal is None:
        remedies.append("an annealed beta (--set 'loss.anneal=[0.1,0.5]')")
    if not loss.kl:
        remedies.append("free bits (--set loss.kl=0.05)")
    if "rel_l2" not in loss.recon:
        remedies.append("an energy-normalised reconstruction (--set loss.recon=rel_l2)")
    way_out = " or ".join([", ".join(remedies[:-1]), remedies[-1]] if remedies[1:] else remedies)
    return (
        f"the posterior has collapsed: KL {kl_nats:.3f} nats, 0 of {latent_dims} latent dimensions active, so the "
        f"latent carries nothing; try {way_out}"
    )


def overfit(train: float, val: float, config: FitConfig) -> str:
    """The model is much worse on points that it has not seen."""
    return (
        f"the prior's mean errs {val:.1%} on the validation points and {train:.1%} on the training points: the grid is "
        f"too coarse for the lens, or the model too free; try a denser grid, a smaller network "
        f"(--set model.width={max(8, config.model.width // 2)}) or fewer octaves (--set model.octaves=0)"
    )


class Warnings:
    """What a user is told once, while there is still time to change it."""

    def __init__(self, config: FitConfig, latent: int) -> None:
        self.config, self.latent, self.said = config, latent, set[str]()

    def of_collapse(self, metrics: dict[str, float], step: int) -> None:
        """Where the KL counts in full, warm-up and a good part of the steps are done, and no dimension is active."""
        begun = step > max(SETTLED * self.config.steps, self.config.warmup)
        full = metrics["train/beta"] == self.config.loss.beta
        if begun and full and not metrics["kl/active_dims"]:
            self._say("collapse", collapse(metrics["loss/kl"], self.latent, self.config.loss))

    def of_overfit(self, errors: dict[str, float]) -> None:
        """Where the validation error is many times that of the training points."""
        train, val = errors["train_prior/rel_l2"], errors["val_prior/rel_l2"]
        if val > WORSE * train:
            self._say("overfit", overfit(train, val, self.config))

    def _say(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            log.warning("warning: %s", text)
