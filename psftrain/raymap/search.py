"""From kernels to a ray map: many starts, few terms and a blurred picture first.

The misfit of kernels has many valleys: which way rays cross between two foci is not seen in one kernel, only in how
kernels change. So the search starts from many random maps of few terms on a coarse picture, where valleys are wide,
and keeps the best while terms are added and the picture sharpens. It begins with one wavelength, at one depth and one
focus; the others are then a small change of few terms away.

Legend: M places, T terms, W wavelengths, k samples a side.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap import distances
from psftrain.raymap.solve import Done, Fit, Seen, part_of, parts_of, unheard
from psftrain.raymap.stages import Stage, refined
from psftrain.raymap.terms import Reach, Sites, Terms

Array = NDArray[np.float64]

STARTS = (
    Stage(48, Reach(pupil=4, field=8, charge=1), 32, 8, 256, 20),
    Stage(12, Reach(pupil=6, field=14, charge=2), 64, 8, 256, 30),
    Stage(4, Reach(pupil=8, field=14, curl=6, charge=3), 64, 16, 512, 30),
)
FINEST = Reach(pupil=10, field=14, curl=9, charge=7)
LAST = (Stage(1, FINEST, 128, 16, 512, 25), Stage(1, FINEST, 128, 32, 1024, 15))

FEW, TRIES = 32, 3  # of so few kernels so many maps are searched for
SYMMETRIC = 1.05  # by how much the misfit may grow without the terms of a misalignment where there is none
CONTINUOUS = 1.1  # by how much it may grow for a map that changes little with the wavelength


@dataclass(frozen=True)
class RayMap:
    """Coefficients [W, T] of `terms` at the wavelengths `wavelength_um` [W]; `misfit` [W] on the finest cells."""

    terms: Terms
    wavelength_um: Array
    coefficients: Array
    misfit: Array


def fit_raymap(
    sites: Sites,
    kernels: NDArray[np.float32],
    captured: Array,
    wavelength_um: Array,
    *,
    seed: int,
    threads: Executor,
    done: Done = unheard,
) -> RayMap:
    """The ray map of kernels [M, W, k, k], which caught `captured` [M, W] of their light, at places `sites` [M].

    Of a few kernels several maps are nearly true: they are searched for more than once, and the truest is taken. `done`
    is told what share of the work is done, again and again.
    """
    tries = TRIES if len(sites) <= FEW else 1
    found = [
        _found(sites, kernels, captured, wavelength_um, tries * seed + number, threads, its_share)
        for number, its_share in enumerate(parts_of(done, tries))
    ]
    return min(found, key=lambda one: float(np.linalg.norm(one.misfit)))


def _found(
    sites: Sites,
    kernels: NDArray[np.float32],
    captured: Array,
    wavelength_um: Array,
    seed: int,
    threads: Executor,
    done: Done,
) -> RayMap:
    seen = [Seen(sites, kernels[:, i], captured[:, i]) for i in range(len(wavelength_um))]
    middle, home = len(seen) // 2, distances.home(sites, kernels)
    depth, focus = distances.distances_of(sites)
    several = distances.several(replace(FINEST, depth=depth, focus=focus))
    pool = search(seen[middle][home], seed, threads, part_of(done, 0, 0.1 if several else 0.2))
    reach, start = replace(FINEST, depth=depth, focus=focus), pool[0]
    if not _misaligned(start, seen[middle][home], STARTS[-1], threads):
        reach = replace(reach, charge=-1)
    if several:
        start = distances.spread_out(seen[middle], pool, reach, threads, part_of(done, 0.1, 0.2))
        if not _misaligned(start, seen[middle], distances.SHARPER, threads):  # of many kernels that is surer
            reach = replace(reach, charge=-1)
    found = {middle: _polished(seen[middle], start, reach, threads, part_of(done, 0.2, 0.4))}
    others = sorted(set(range(len(seen))) - {middle}, key=lambda i: abs(i - middle))
    for i, its_share in zip(others, parts_of(part_of(done, 0.4, 1.0), len(others)), strict=True):
        beside = found[i + 1 if i < middle else i - 1]
        found[i] = _other_wavelength(seen[i], home, beside, seed, threads, its_share)
    done(1.0)
    maps = [found[i] for i in range(len(seen))]
    return RayMap(
        maps[0].terms, wavelength_um, np.stack([fit.coefficients for fit in maps]), np.array([f.error for f in maps])
    )


def _other_wavelength(
    seen: Seen, home: NDArray[np.bool_], beside: Fit, seed: int, threads: Executor, done: Done
) -> Fit:
    """The map of a wavelength beside one that is known: near that, unless another fits much better."""
    reach = beside.terms.reach
    several = distances.several(reach)
    moved, polished = (0.3, 1.0) if several else (0.1, 0.3)
    near = refined(seen, [beside], replace(distances.MOVED, reach=reach), threads, part_of(done, 0, moved))[0]
    near = _polished(seen, near, reach, threads, part_of(done, moved, polished))
    if several:
        return near
    alone = search(seen[home], seed, threads, part_of(done, polished, 0.8))[0]
    if near.error < CONTINUOUS * alone.error:
        return near
    alone = _polished(seen, alone, reach, threads, part_of(done, 0.8, 1.0))
    return min(near, alone, key=lambda fit: fit.error * (1 if fit is near else CONTINUOUS))


def search(seen: Seen, seed: int, threads: Executor, done: Done = unheard) -> list[Fit]:
    """The best ray maps for kernels of one wavelength, depth and focus, the best first.

    `done` is told what share of the work is done.
    """
    terms = Terms(STARTS[0].reach)
    rng = np.random.default_rng(seed)
    pool = [Fit(terms, _random(terms, rng), np.inf) for _ in range(STARTS[0].keep)]
    for stage, its_share in zip(STARTS, parts_of(done, len(STARTS)), strict=True):
        pool = refined(seen, pool[: stage.keep], stage, threads, its_share)
    return pool


def _polished(seen: Seen, start: Fit, reach: Reach, threads: Executor, done: Done) -> Fit:
    fit, stages = start, (distances.LAST,) if distances.several(reach) else LAST
    for stage, its_share in zip(stages, parts_of(done, len(stages)), strict=True):
        fit = refined(seen, [fit], replace(stage, reach=reach), threads, its_share)[0]
    return fit


def _misaligned(fit: Fit, seen: Seen, stage: Stage, threads: Executor) -> bool:
    """Whether the design alone fits worse than a map that a stage has found."""
    stage = replace(stage, reach=replace(fit.terms.reach, charge=-1), steps=5)
    alone = refined(seen, [fit], stage, threads)[0]
    return alone.error > SYMMETRIC * fit.error


SPREAD = {1: 0.1, 2: 0.4, 3: 0.12}  # of random coefficients, by degree of the mode, in half windows


def _random(terms: Terms, rng: np.random.Generator) -> Array:
    """A design at random, without misalignment."""
    width = [0.0 if term.charge else SPREAD.get(term.n, 0.03) / (1 + term.i) for term in terms.terms]
    return np.array(width) * rng.normal(size=len(terms))
