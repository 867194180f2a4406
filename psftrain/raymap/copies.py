"""From the kernels of many copies of a lens to their family.

The ray map of one copy is searched for; those of the others are a small change away. Where it is found copy by copy,
these changes are seen to be a few loadings. To them all copies are then fitted together: what they share and the
latents of each, in turn.

Legend: K copies, M places, W wavelengths, T terms, L latents, D terms of the design, C pairs of terms of a
misalignment, E loadings of the misalignment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky

from psftrain.raymap.family import Copy, Family
from psftrain.raymap.images import hats
from psftrain.raymap.infer import Posterior, infer
from psftrain.raymap.modes import Pupil
from psftrain.raymap.pooled import Rows, Weights, pooled_step
from psftrain.raymap.search import FINEST, STARTS, RayMap, fit_raymap
from psftrain.raymap.shared import Shared, principal
from psftrain.raymap.solve import Fit, Prior, Problem, Seen, ridge, solve
from psftrain.raymap.terms import Reach, Sites, Terms
from psftrain.raymap.turns import Turns

log = logging.getLogger(__name__)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Round:
    """All copies fitted together, at most so often: the terms, cells a side, rays."""

    reach: Reach
    cells: int
    rays: int
    most: int


COARSE = replace(STARTS[-1].reach, charge=5)
ALONE = ((8, 256, 6), (16, 512, 6))  # cells a side, rays and most steps of the fit of each copy alone
TOGETHER = (Round(COARSE, 16, 512, 1), Round(FINEST, 16, 1024, 4), Round(FINEST, 32, 2048, 8))
ENOUGH = 24  # copies that tell the loadings; more of them tell how much there is of each
SLIGHT = 0.02  # the gain in misfit below which a round is not repeated
FIRM = 1e-2  # holds the design where the misalignment of a copy is looked for
LOST = 1.5  # times the misfit of the better half: such a copy is in another valley
FEWEST = 4  # copies that make up the first loadings
WEAK = 0.03  # of the misfit: loadings of ENOUGH copies that change kernels less are left out; many stand for squares
MOVES = 6  # most steps of the latents in a round
HALVINGS = 4  # of a step that makes the fit worse, until it is given up


def lit_copies(sites: Sites, kernels: NDArray[np.float32], captured: Array) -> list[Copy]:
    """Copies whose kernels at the same places [M] are [K, M, W, k, k], NaN where there is no light."""
    lit = ~np.isnan(kernels).any(axis=(2, 3, 4))
    return [Copy(sites[some], k[some], c[some]) for some, k, c in zip(lit, kernels, captured, strict=True)]


def fit_family(
    sites: Sites,
    kernels: NDArray[np.float32],
    captured: Array,
    wavelength_um: Array,
    *,
    latent: int = 64,
    seed: int,
    threads: Executor,
    done: Callable[[float], None] = lambda share: None,
) -> tuple[Family, list[Posterior]]:
    """The family, of at most `latent` latents, of copies whose kernels are [K, M, W, k, k], at places `sites` [M], and
    what is then known of each copy. `captured` [K, M, W] is the share of light caught; NaN kernels are left out.

    `done` is told what share of the work is done.
    """
    copies = lit_copies(sites, kernels, captured)
    first = copies[_plainest(kernels)]
    base = fit_raymap(first.sites, first.kernels, first.captured, wavelength_um, seed=seed, threads=threads)
    done(0.3)
    shared, misfit = _first_loadings(copies[:ENOUGH], base, latent, threads)
    done(0.4)
    few = copies[:ENOUGH]
    family = shared.family(np.sqrt(misfit))
    known = [infer(family, copy, threads, stages=ALONE) for copy in few]
    rounds, ended = sum(stage.most for stage in TOGETHER), 0
    for stage in TOGETHER:
        shared, best = shared.lifted(Terms(stage.reach)), np.inf
        for number in range(stage.most):
            done(0.4 + 0.5 * (ended + number) / rounds)
            shared, hessians = _improved(shared, few, np.array([each.mean for each in known]), stage, threads)
            family, shared, known = _settled(shared, few, known, hessians, latent, stage, threads)
            before, best = best, float(np.linalg.norm(family.noise))
            if best > (1 - SLIGHT) * before:
                break
        ended += stage.most
    done(0.9)
    if len(copies) > len(few):
        known += [infer(family, copy, threads) for copy in copies[ENOUGH:]]
        family, _, known = _settled(shared, copies, known, hessians, latent, TOGETHER[-1], threads)
    done(1.0)
    return family, known


def _plainest(kernels: NDArray[np.float32]) -> int:
    """The copy that is closest to their mean: of small errors, so that its map is easy to find."""
    far = [np.nanmean(np.square(own - np.nanmean(kernels, axis=0))) for own in kernels]
    return int(np.argmin(far))


def _noise(known: Sequence[Posterior]) -> Array:
    """How far kernels are from the maps of their copies [W]."""
    found: Array = np.sqrt(np.mean([each.misfit for each in known], axis=0))
    return found


def _least(misfit: float | np.floating[Any], copies: int) -> float:
    """What a loading has to change in kernels to be told from chance, which grows as copies become few."""
    return float(WEAK * np.sqrt(ENOUGH / min(copies, ENOUGH)) * misfit)


def _first_loadings(copies: Sequence[Copy], base: RayMap, latent: int, threads: Executor) -> tuple[Shared, Array]:
    """The loadings by which maps of each copy alone differ, where these were found, and their misfit [W]."""
    turns = Turns(Terms(COARSE))
    starts = [turns.terms.taken_from(base.terms, c) for c in base.coefficients]
    found = [[_alone(copy.seen(w), turns, start, threads) for w, start in enumerate(starts)] for copy in copies]
    misfit = np.array([[fit.error**2 for fit, _ in fits] for fits in found])
    lost = np.sqrt(misfit / np.quantile(misfit, 0.25, axis=0)).max(axis=1)
    good = np.flatnonzero((lost < LOST) | (lost.argsort().argsort() < FEWEST))
    log.debug("%d of %d copies were found alone", len(good), len(copies))
    coefficients = np.array([[fit.coefficients for fit, _ in found[k]] for k in good])
    hessians = np.mean([[hessian for _, hessian in found[k]] for k in good], axis=0)
    design, errors = turns.split(coefficients)
    misfit = misfit[good].mean(axis=0)
    shared = principal(
        turns,
        base.wavelength_um,
        design.mean(axis=0),
        (design - design.mean(axis=0)) / np.sqrt(len(good)),
        np.concatenate([errors.real, errors.imag]) / np.sqrt(2 * len(good)),
        hessians,
        latent,
        _least(np.sqrt(misfit.sum()), len(copies)),
    )
    return shared, misfit


def _alone(seen: Seen, turns: Turns, start: Array, threads: Executor) -> tuple[Fit, Array]:
    """One wavelength of one copy fitted from the design of `start` [T], and the hessian [T, T] there."""
    terms = turns.terms
    design, errors = turns.split(start)
    mean = turns.joined(design, 0 * errors)
    firm = ridge(terms).precision
    firm[turns.design] = FIRM
    fit = Fit(terms, mean, np.inf)
    for cells, rays, steps in ALONE:
        problem = Problem(terms, seen, hats(seen.kernels.shape[-1], cells), Pupil(rays), threads)
        fit = solve(problem, fit.coefficients, steps, Prior(mean, firm))
    loss, _, hessian = problem.normal(fit.coefficients)
    return replace(fit, error=float(np.sqrt(loss))), hessian


def _improved(
    shared: Shared, copies: Sequence[Copy], z: Array, stage: Round, threads: Executor
) -> tuple[Shared, Array]:
    """The rows that fit copies of latents z [K, L] best, one step nearer, and mean hessians [W, T, T]."""
    cells, pupil = hats(copies[0].kernels.shape[-1], stage.cells), Pupil(stage.rays)
    found = []
    for w, rows in enumerate(shared.rows):
        problems = [Problem(shared.turns.terms, copy.seen(w), cells, pupil, threads) for copy in copies]
        found.append(_stepped(shared.weights(z), rows, problems))
    return replace(shared, rows=tuple(rows for rows, _ in found)), np.array([hessian for _, hessian in found])


def _stepped(weights: Weights, rows: Rows, problems: Sequence[Problem]) -> tuple[Rows, Array]:
    """Rows one step nearer to what fits the copies best, and their mean hessian [T, T]."""
    turns = weights.turns
    firm = ridge(turns.terms).precision
    held = Rows(np.tile(firm[turns.design], (len(rows.design), 1)), np.tile(firm[turns.real], (len(rows.errors), 1)))

    def loss(rows: Rows) -> float:
        each = zip(problems, weights.coefficients(rows), strict=True)
        return float(np.mean([problem.loss(c) for problem, c in each])) + rows.dot(rows.times(held))

    each = zip(problems, weights.coefficients(rows), strict=True)
    _, gradients, hessians = map(np.array, zip(*(problem.normal(c) for problem, c in each), strict=True))
    step, before = pooled_step(weights, rows, gradients, hessians, held), loss(rows)
    tried = (rows + step.times(0.5**n) for n in range(HALVINGS))
    return next((better for better in tried if loss(better) < before), rows), hessians.mean(axis=0)


def _settled(
    shared: Shared,
    copies: Sequence[Copy],
    known: Sequence[Posterior],
    hessians: Array,
    latent: int,
    stage: Round,
    threads: Executor,
) -> tuple[Family, Shared, list[Posterior]]:
    """The same rows so that latents have the variance 1 and no correlation, and the copies seen that way."""
    shared, z = _whitened(shared, known, hessians, latent)
    family, stages = shared.family(_noise(known)), ((stage.cells, stage.rays, MOVES),)
    known = [infer(family, copy, threads, start, stages) for copy, start in zip(copies, z, strict=True)]
    log.debug("%s: %d latents, misfit %s", stage, len(family), _noise(known).round(4))
    return replace(family, noise=_noise(known)), shared, known


def _whitened(shared: Shared, known: Sequence[Posterior], hessians: Array, latent: int) -> tuple[Shared, Array]:
    """The same rows so that latents have the variance 1 and no correlation, and these latents [K, L]."""
    z = np.array([each.mean for each in known])
    spread = np.mean([each.covariance for each in known], axis=0)
    count, _ = shared.sizes
    x, y, rest = slice(0, count), slice(count, 2 * count), slice(2 * count, None)
    of_errors = (z[:, x].T @ z[:, x] + z[:, y].T @ z[:, y]) / (2 * len(z)) + (spread[x, x] + spread[y, y]) / 2
    centre = z[:, rest].mean(axis=0)
    off = z[:, rest] - centre
    of_design = off.T @ off / len(z) + spread[rest, rest]
    errors = np.stack([row.errors for row in shared.rows], axis=1)
    design = np.stack([row.design for row in shared.rows], axis=1)
    found = principal(
        shared.turns,
        shared.wavelength_um,
        design[0] + np.tensordot(centre, design[1:], axes=1),
        np.tensordot(cholesky(of_design), design[1:], axes=1),
        np.tensordot(cholesky(of_errors), errors, axes=1),
        hessians,
        latent,
        _least(np.linalg.norm(_noise(known)), len(known)),
    )
    new = [np.stack(part, axis=1) for part in zip(*((r.errors, r.design[1:]) for r in found.rows), strict=True)]
    turned = _expressed(errors, new[0])
    return found, np.column_stack([z[:, x] @ turned, z[:, y] @ turned, off @ _expressed(design[1:], new[1])])


def _expressed(old: Array, new: Array) -> Array:
    """The matrix [N, N'] by which weights of old rows [N, W, C] become those of new rows [N', W, C]."""
    if not len(new) or not len(old):
        return np.zeros((len(old), len(new)))
    found: Array = np.linalg.lstsq(new.reshape(len(new), -1).T, old.reshape(len(old), -1).T)[0].T
    return found
