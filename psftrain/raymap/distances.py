"""From the map of one depth and one focus to that of all.

At one depth rays are straight lines, so with the focus, which moves the sensor, all of them move at a speed of their
own: nearly that of a perfect lens, whose blur is known but for its scale. So the step from one focus to all is a
search for one number, of either sign, since kernels do not tell a map from the same with the pupil turned by half a
turn as long as the sensor stands still.

Legend: M places, T terms.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.solve import Done, Fit, Seen, parts_of
from psftrain.raymap.stages import Stage, problem_of, refined
from psftrain.raymap.terms import Reach, Sites, Term, Terms

DEFOCUS = 0.75  # of the mode (2, 0) that sends the rim of the pupil one half window out
SCALES = DEFOCUS * 2.0 ** np.arange(-4, 4.25, 0.25)  # the F-number and focal length are not always known
SPEEDS = np.concatenate([SCALES, -SCALES])

MOVED = Stage(3, Reach(pupil=8, field=14, curl=6, charge=3), 100, 8, 512, 20, anchor=0.1)
FREED = replace(MOVED, keep=2, kernels=192, steps=30, anchor=0.0)
SHARPER = replace(FREED, keep=1, cells=16)
# Blurs that fill the window need many rays, and have nothing to show on finer cells.
LAST = replace(SHARPER, kernels=768, rays=2048, steps=20, ridge=1e-6)


def distances_of(sites: Sites) -> tuple[int, bool]:
    """The power of depth and whether the focus, that terms must reach: (0, False) of one depth and focus."""
    depths = len(np.unique(sites.depth))
    return min(2, depths - 1), bool(np.ptp(sites.defocus) > 0)


def several(reach: Reach) -> bool:
    """Whether a map is of more than one depth and focus."""
    return reach.depth > 0 or reach.focus


def home(sites: Sites, kernels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The places [M] of the depth and focus at which kernels [M, W, k, k] are smallest."""
    sharpness = np.square(kernels[:, kernels.shape[1] // 2]).sum(axis=(-2, -1))
    slices, of = np.unique(np.column_stack([sites.depth, sites.defocus]), axis=0, return_inverse=True)
    mean = np.bincount(of.ravel(), sharpness) / np.bincount(of.ravel())
    return np.asarray(of.ravel() == mean.argmax()) if len(slices) > 1 else np.ones(len(sites), bool)


def spread_out(seen: Seen, pool: list[Fit], reach: Reach, threads: Executor, done: Done) -> Fit:
    """The best of some maps of one depth and focus, fitted to all with the terms of a reach.

    `done` is told what share of the work is done.
    """
    pool = [*pool[: MOVED.keep - 1], _perfect(pool[0].terms)]
    if reach.focus:
        pool = [fit for one in pool for fit in _moving(one, seen, threads)]
    stages = (MOVED, FREED, SHARPER)
    for stage, its_share in zip(stages, parts_of(done, len(stages)), strict=True):
        own = replace(stage.reach, charge=min(stage.reach.charge, reach.charge), depth=reach.depth, focus=reach.focus)
        pool = refined(seen, pool[: 2 * stage.keep], replace(stage, reach=own), threads, its_share)
    return pool[0]


def _perfect(terms: Terms) -> Fit:
    """A lens without aberrations: with much defocus all of them look like this."""
    return Fit(terms, np.zeros(len(terms)), np.inf)


def _moving(fit: Fit, seen: Seen, threads: Executor) -> list[Fit]:
    """A map whose rays move with the defocus as those of a perfect lens, at the best speed of either sign."""
    stage = replace(MOVED, reach=replace(fit.terms.reach, focus=True))
    problem = problem_of(seen, stage, threads)
    terms = problem.terms
    known = terms.taken_from(fit.terms, fit.coefficients)
    speed = np.array([term == Term(2, 0, False, 0, 0, False, 0, 1) for term in terms.terms])
    tried = [Fit(terms, c, problem.loss(c)) for c in (known + scale * speed for scale in SPEEDS)]
    half = len(SCALES)
    return [min(some, key=lambda one: one.error) for some in (tried[:half], tried[half:])]
