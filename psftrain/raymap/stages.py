"""One stage of a search: several maps fitted with some terms to some kernels on cells of some size."""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.images import hats
from psftrain.raymap.modes import Pupil
from psftrain.raymap.solve import RIDGE, Done, Fit, Prior, Problem, Seen, parts_of, ridge, solve, unheard
from psftrain.raymap.terms import Reach, Sites, Terms

log = logging.getLogger(__name__)

LOW = 6  # order of the terms that change with the wavelength, depth and focus before others do


@dataclass(frozen=True)
class Stage:
    """`keep` maps of a reach are fitted to `kernels` kernels on `cells` cells a side with `rays` rays, in at most
    `steps`. `anchor` holds all but the terms of low order where they are, `ridge` all of them near 0.
    """

    keep: int
    reach: Reach
    kernels: int
    cells: int
    rays: int
    steps: int
    anchor: float = 0.0
    ridge: float = RIDGE


def problem_of(seen: Seen, stage: Stage, threads: Executor) -> Problem:
    """What a stage fits."""
    some = seen[spread(seen.sites, stage.kernels)]
    cells = hats(seen.kernels.shape[-1], stage.cells)
    return Problem(Terms(stage.reach), some, cells, Pupil(stage.rays), threads)


def refined(seen: Seen, pool: list[Fit], stage: Stage, threads: Executor, done: Done = unheard) -> list[Fit]:
    """Some maps fitted with the terms and on the cells of a stage, the best first.

    `done` is told what share of the work is done.
    """
    problem = problem_of(seen, stage, threads)
    terms, found = problem.terms, []
    for fit, its_share in zip(pool, parts_of(done, len(pool)), strict=True):
        start, prior = terms.taken_from(fit.terms, fit.coefficients), ridge(terms, stage.ridge)
        if stage.anchor:
            prior = Prior(start, np.where(terms.order > LOW, stage.anchor, prior.precision))
        found.append(solve(problem, start, stage.steps, prior, done=its_share))
    found.sort(key=lambda fit: fit.error)
    log.debug("%s: %s", stage, ", ".join(f"{fit.error:.4f}" for fit in found[:8]))
    return found


def spread(sites: Sites, count: int) -> NDArray[np.int64]:
    """`count` places far from each other, radius before azimuth."""
    if len(sites) <= count:
        return np.arange(len(sites))
    radius = np.hypot(*sites.field.T)
    at = np.column_stack([2 * radius, sites.field, sites.depth, sites.defocus])
    chosen = [int(radius.argmax())]
    distance = np.full(len(at), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.square(at - at[chosen[-1]]).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return np.sort(chosen)
