"""How unsure a ray map is, against draws of its coefficients from the posterior and against rings that are lacking."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from psftrain.raymap.images import bins, hats
from psftrain.raymap.laplace import FIRM, STAGE, unsure
from psftrain.raymap.modes import Pupil
from psftrain.raymap.solve import Fit, Problem, Seen, drawn, ridge
from psftrain.raymap.terms import Reach, Sites, Terms

Array = NDArray[Any]
PX = 32
CELLS = bins(PX, 15)
REACH = Reach(pupil=4, field=8, curl=0)


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def on_rings(*radii: float) -> Sites:
    """Eight field points a ring, in half sides of the field."""
    angle = 2 * np.pi * np.arange(8) / 8
    field = np.concatenate([radius * np.column_stack([np.cos(angle), np.sin(angle)]) for radius in radii])
    return Sites(field, np.zeros(len(field)), np.zeros(len(field)))


def some_map() -> Fit:
    terms = Terms(REACH)
    size = np.array([0.4 / term.order**2 for term in terms.terms])
    return Fit(terms, size * np.random.default_rng(1).normal(size=len(terms)), 0.0)


def seen_of(fit: Fit, sites: Sites) -> Seen:
    light = drawn(fit.terms, fit.coefficients, sites, bins(PX, PX), Pupil(4096))
    caught = light.sum(axis=(1, 2))
    return Seen(sites, (light / caught[:, None, None]).astype(np.float32), caught)


def test_it_is_how_far_kernels_of_the_posterior_are_apart(threads: Executor) -> None:
    """Coefficients drawn about the map, with the covariance of Gauss, Newton and the ridge, and their kernels."""
    fit, at = some_map(), on_rings(0.2, 0.6, 1.0, 1.3)
    seen = seen_of(fit, on_rings(0.0, 0.5, 1.0))
    found = unsure(fit, seen, at, CELLS, threads)

    problem = Problem(fit.terms, seen, hats(PX, STAGE.cells), Pupil(STAGE.rays), threads)
    covariance = np.linalg.inv(problem.normal(fit.coefficients)[2] + FIRM * ridge(fit.terms).matrix)
    little = 1e-4
    size, axes = np.linalg.eigh(covariance)
    noise = np.random.default_rng(7).normal(size=(200, len(fit.terms)))
    moves = little * (np.sqrt(np.maximum(size, 0)) * noise) @ axes.T
    pupil = Pupil(512)
    here = drawn(fit.terms, fit.coefficients, at, CELLS, pupil)
    far2 = [np.square(drawn(fit.terms, fit.coefficients + m, at, CELLS, pupil) - here).sum(axis=(1, 2)) for m in moves]
    told = np.sqrt(np.mean(far2, axis=0) / np.square(here).sum(axis=(1, 2))) / little
    # Two estimates of a standard deviation, from 48 and from 200 draws.
    assert found == pytest.approx(told, rel=0.35)
    assert spearmanr(found, told).statistic > 0.97


def test_it_is_larger_where_no_kernel_tells(threads: Executor) -> None:
    """Between rings, and above all beyond the last one."""
    fit = some_map()
    seen = seen_of(fit, on_rings(0.0, 0.35, 0.7, 1.05))
    at_ring, beyond = (unsure(fit, seen, on_rings(radius), CELLS, threads).mean() for radius in (0.7, 1.4))
    assert beyond > 2 * at_ring
    fewer = seen_of(fit, on_rings(0.0, 0.35, 1.05))
    lacking = unsure(fit, fewer, on_rings(0.7), CELLS, threads).mean()
    assert lacking > 1.5 * at_ring


def test_dark_places_are_not_numbers(threads: Executor) -> None:
    """Where all rays miss the window nothing can be told."""
    fit = some_map()
    away = fit.coefficients.copy()
    # The mode that moves a kernel as a whole, along the field and as its radius.
    along = next(t for t, term in enumerate(fit.terms.terms) if (term.n, term.m, term.i) == (1, 1, 0))
    away[along] += 20
    moved = Fit(fit.terms, away, 0.0)
    found = unsure(moved, seen_of(fit, on_rings(0.0, 0.5)), on_rings(0.0, 1.2), CELLS, threads)
    assert np.isfinite(found[:8]).all()
    assert np.isnan(found[8:]).all()
