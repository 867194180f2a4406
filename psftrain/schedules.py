"""What changes in the course of a run, as functions of the step alone, so that a run can go on anywhere."""

from __future__ import annotations

import math

from psftrain.config import FitConfig

LOWEST = 0.01  # of the rate, at the end of a cosine
HELD = 0.01  # of beta, before its ramp


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up over config.warmup steps, then constant, or cosines down to 1 % (Loshchilov and Hutter, "SGDR",
    ICLR 2017): a single one, or with schedule restarts one more for each of config.restarts, each twice as long as
    the one before (T_mult = 2) and all together as long as the rest of the run.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    restarts = config.restarts if config.schedule == "restarts" else 0
    length, units = max(1, config.steps - config.warmup), 2 ** (restarts + 1) - 1  # the first cosine is one unit
    passed = (step - config.warmup) * units
    part = min((passed // length + 1).bit_length() - 1, restarts)  # it begins after 2^part - 1 units
    done = (passed / length - (2**part - 1)) / 2**part
    return config.lr * (LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * done)))


def beta(config: FitConfig, step: int) -> float:
    """The weight of the KL: config.loss.beta, or with anneal (a, b) a hundredth of it up to a x steps, then rising to
    the whole at b x steps.

    So the decoder learns to use the latent before the posterior is drawn to the prior (Bowman et al., CoNLL 2016).
    The ramp is linear, as in Sønderby et al. (NeurIPS 2016): the optimizer sees the loss change at an even rate,
    where a geometric one would crowd half of the rise into the last seventh.
    """
    full = config.loss.beta
    if config.loss.anneal is None:
        return full
    start, end = (share * config.steps for share in config.loss.anneal)
    if step >= end:
        return full
    risen = 0.0 if step <= start else (step - start) / (end - start)
    return full * (HELD + (1 - HELD) * risen)
