"""From any number of kernels of one copy to its latents.

Legend: M places, W wavelengths, L latents.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.family import Copy, Family, Witness
from psftrain.raymap.images import hats
from psftrain.raymap.modes import Pupil
from psftrain.raymap.solve import Prior, descend

Array = NDArray[np.float64]

STAGES = ((8, 256, 12), (16, 512, 12), (32, 1024, 12))  # cells a side, rays, most steps


@dataclass(frozen=True)
class Posterior:
    """What is known of a copy's latents: normally distributed about `mean` [L], with `covariance` [L, L].

    `misfit` [W] is the mean squared relative error of the kernels that it was found from.
    """

    mean: Array
    covariance: Array
    misfit: Array


def infer(
    family: Family,
    copy: Copy,
    threads: Executor,
    start: Array | None = None,
    stages: tuple[tuple[int, int, int], ...] = STAGES,
) -> Posterior:
    """The latents of a copy, of which z ~ N(0, 1) is known beforehand; from `start` [L] (default: the mean copy)."""
    count, prior = len(family), Prior(np.zeros(len(family)), np.ones(len(family)))
    z = np.zeros(count) if start is None else start
    for cells, rays, steps in stages:
        witness = Witness(family, copy, hats(copy.kernels.shape[-1], cells), Pupil(rays), threads)
        z, _ = descend(witness, z, steps, prior)
    _, _, hessian = witness.normal(z)
    return Posterior(z, np.linalg.inv(hessian + np.eye(count)), witness.misfits(z))
