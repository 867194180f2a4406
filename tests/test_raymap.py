"""The ray map: its modes and terms, its images and their derivatives, the search, and its torch twin."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from psfgen.optics.splat import deposit, normalise
from psftrain.raymap import distances
from psftrain.raymap import search as searching
from psftrain.raymap.decoder import RayDecoder, matrix_of
from psftrain.raymap.images import bins, hats
from psftrain.raymap.modes import Mode, Pupil, modes_to
from psftrain.raymap.search import RayMap, fit_raymap
from psftrain.raymap.solve import Fit, Prior, Problem, Seen, drawn, ridge, solve
from psftrain.raymap.stages import Stage, refined, spread
from psftrain.raymap.terms import Reach, Sites, Terms

Array = NDArray[Any]
PX = 32
SMALL = Reach(pupil=4, field=4, curl=3, charge=2)


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def some_sites(count: int, seed: int = 0, depth: float = 0.0, defocus: float = 0.0) -> Sites:
    field = np.random.default_rng(seed).uniform(-1, 1, (count, 2))
    return Sites(field, np.full(count, depth), np.full(count, defocus))


def some_map(reach: Reach, seed: int = 0, charged: bool = True) -> tuple[Terms, Array]:
    """A map whose kernels are about a third of the window across."""
    terms = Terms(reach)
    rng = np.random.default_rng(seed)
    spread = np.array([0.25 / t.order if charged or not t.charge else 0.0 for t in terms.terms])
    return terms, spread * rng.normal(size=len(terms))


def kernels_of(terms: Terms, coefficients: Array, sites: Sites, rays: int = 4096) -> tuple[Array, Array]:
    """Kernels [M, k, k] of a map and the light that they caught [M]."""
    light = drawn(terms, coefficients, sites, hats(PX, PX), Pupil(rays))[:, 1:-1, 1:-1]
    caught = light.sum(axis=(1, 2))
    return (light / caught[:, None, None]).astype(np.float32), caught


# --- modes and terms --------------------------------------------------------------------------------------------------


def zernike(n: int, m: int, x: Array, y: Array, sine: bool) -> Array:
    rho, phi = np.hypot(x, y), np.arctan2(y, x)
    radial = np.zeros_like(rho)
    for k in range((n - m) // 2 + 1):
        down = factorial(k) * factorial((n + m) // 2 - k) * factorial((n - m) // 2 - k)
        radial = radial + (-1) ** k * factorial(n - k) / down * rho ** (n - 2 * k)
    return np.asarray(radial * (np.sin(m * phi) if sine else np.cos(m * phi)))


@pytest.mark.parametrize("mode", [mode for mode in modes_to(5) if not mode.curl], ids=str)
def test_modes_are_gradients_of_zernike_polynomials(mode: Mode) -> None:
    pupil, step = Pupil(200), 1e-6
    found = pupil.displacements((mode,))[..., 0]
    rho, phi = pupil.polar
    x, y = rho * np.cos(phi), rho * np.sin(phi)
    slope = [
        zernike(mode.n, mode.m, x + dx, y + dy, mode.sine) - zernike(mode.n, mode.m, x - dx, y - dy, mode.sine)
        for dx, dy in ((step, 0), (0, step))
    ]
    size = np.sqrt(mode.n * (mode.n + 1) / 2) * np.sqrt(mode.n + 1)
    assert np.allclose(found, np.array(slope) / (2 * step) / size, atol=1e-6)


def test_curl_modes_are_gradients_turned_by_a_right_angle() -> None:
    pupil = Pupil(100)
    gradient = pupil.displacements((Mode(3, 1, False, False),))
    curl = pupil.displacements((Mode(3, 1, True, False),))
    assert np.allclose(curl, [-gradient[1], gradient[0]])
    assert not any(mode.curl and mode.n == mode.m for mode in modes_to(6, 6))


def test_pupil_points_fill_the_disc_evenly() -> None:
    rho, phi = Pupil(5000).polar
    assert (rho < 1).all()
    assert np.mean(rho**2) == pytest.approx(0.5, abs=1e-3)
    assert abs(np.mean(rho * np.exp(1j * phi))) < 2e-3


def test_a_design_turns_with_the_field() -> None:
    terms, coefficients = some_map(Reach(pupil=5, field=6, curl=4))
    sites = some_sites(6)
    quarter = Sites(np.stack([-sites.field[:, 1], sites.field[:, 0]], -1), sites.depth, sites.defocus)
    cells, pupil = bins(PX, 8), Pupil(20000)
    here, there = (drawn(terms, coefficients, at, cells, pupil) for at in (sites, quarter))
    assert np.allclose(np.rot90(here, axes=(1, 2)), there, atol=2e-3)


def test_a_design_is_its_own_mirror_image() -> None:
    terms, coefficients = some_map(Reach(pupil=5, field=6, curl=4))
    sites = some_sites(6)
    mirrored = Sites(sites.field * [1, -1], sites.depth, sites.defocus)
    cells, pupil = bins(PX, 8), Pupil(20000)
    here, there = (drawn(terms, coefficients, at, cells, pupil) for at in (sites, mirrored))
    assert np.allclose(here[:, ::-1], there, atol=2e-3)


def test_misalignment_turns_once_with_the_field() -> None:
    """Terms of charge 1 at a turned field are those of a lens whose misalignment is turned back."""
    terms, coefficients = some_map(SMALL)
    turned = coefficients.astype(complex)
    by_key = {t: i for i, t in enumerate(terms.terms)}
    for t, i in by_key.items():
        if t.charge and not t.quarter:
            other = by_key[replace(t, quarter=True)]
            value = (coefficients[i] + 1j * coefficients[other]) * np.exp(-0.5j * np.pi * t.charge)
            turned[i], turned[other] = value.real, value.imag
    sites = some_sites(5)
    quarter = Sites(np.stack([-sites.field[:, 1], sites.field[:, 0]], -1), sites.depth, sites.defocus)
    cells, pupil = bins(PX, 8), Pupil(20000)
    there = drawn(terms, turned.real.copy(), quarter, cells, pupil)
    assert np.allclose(np.rot90(drawn(terms, coefficients, sites, cells, pupil), axes=(1, 2)), there, atol=2e-3)


def test_defocus_scales_the_pupil() -> None:
    """Of a perfect lens, whose rays move with the defocus alone, kernels are discs of that radius."""
    terms = Terms(Reach(pupil=2, field=2, focus=True))
    coefficients = np.zeros(len(terms))
    coefficients[[t.n == 2 and t.m == 0 and t.focus == 1 and t.i == 0 for t in terms.terms].index(True)] = 0.75
    light = drawn(terms, coefficients, some_sites(1, defocus=0.5), hats(64, 64), Pupil(20000))[0]
    radius = np.sqrt((light > light.max() / 2).sum() / np.pi)
    assert radius == pytest.approx(0.5 * 32, rel=0.02)


# --- images -----------------------------------------------------------------------------------------------------------


def hits_of(terms: Terms, coefficients: Array, sites: Sites, pupil: Pupil) -> Array:
    """Where rays land [2, M, P], in samples."""
    modes = terms.at(sites) @ terms.matrix(coefficients).T
    return np.asarray(np.einsum("dpq,mq->dmp", pupil.displacements(terms.modes), modes) * PX / 2)


@pytest.mark.parametrize("width", [1, 4], ids=["inside", "over the edge"])
def test_rays_are_counted_as_the_renderer_counts_them(width: float) -> None:
    """The same hits through psfgen's splat, with its normalisation and binning; at the edge too, half inside."""
    terms, coefficients = some_map(SMALL)
    coefficients = width * coefficients
    sites, pupil = some_sites(4), Pupil(2000)
    x, y = hits_of(terms, coefficients, sites, pupil)
    halves = deposit(torch.tensor(np.stack([x, y], -1)), torch.ones(x.shape, dtype=torch.bool), PX, 1.0)
    binned = normalise(halves.numpy().astype(np.float32), 5).psf_binned
    found = drawn(terms, coefficients, sites, bins(PX, 5), pupil)
    caught = found.sum(axis=(1, 2))
    assert np.allclose(found / caught[:, None, None], binned, atol=1e-4)
    assert np.allclose(caught, halves.numpy().sum(axis=(1, 2, 3)) / 2000, atol=1e-6)
    at_the_edge = (np.abs(x) > PX / 2 - 0.5) & (np.abs(x) < PX / 2 + 0.5)
    assert at_the_edge.any() == (width > 1)
    assert caught.min() < 0.9 or width == 1


def test_the_gradient_is_that_of_the_loss_at_the_edge_too(threads: Executor) -> None:
    """Of one ray at a time, that lies within a sample of the edge."""
    terms, pupil = Terms(Reach(pupil=1, field=1)), Pupil(1)
    sites = Sites(np.array([[0.3, 0.2]]), np.zeros(1), np.zeros(1))
    seen = Seen(sites, np.full((1, PX, PX), 1 / PX**2, np.float32), np.array([0.5]))
    problem = Problem(terms, seen, hats(PX, 8), pupil, threads)
    farthest = np.abs(hits_of(terms, np.ones(len(terms)), sites, pupil)).max()
    for at_px in (PX / 2 - 0.3, PX / 2 + 0.3):
        one, step = np.full((2, len(terms)), [[at_px / farthest], [1e-5]])
        _, gradient, _ = problem.normal(one)
        difference = (problem.loss(one + step) - problem.loss(one - step)) / 2
        assert difference != 0
        assert 2 * gradient @ step == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("cells", [hats(PX, 8), hats(PX, 16), bins(PX, 5), bins(PX, PX)], ids=["8", "16", "bins", "px"])
def test_cells_share_samples_out_whole(cells: Any) -> None:
    assert np.allclose(cells.share[1:-1].sum(axis=1), 1)
    kernels = np.random.default_rng(0).random((2, PX, PX))
    assert np.allclose(cells.image(kernels).sum(axis=(1, 2)), 1)


def test_the_gradient_is_that_of_the_loss(threads: Executor) -> None:
    terms, coefficients = some_map(SMALL)
    sites = some_sites(10)
    truth, caught = kernels_of(*some_map(SMALL, seed=1), sites)
    problem = Problem(terms, Seen(sites, truth, caught), hats(PX, 8), Pupil(500), threads)
    loss, gradient, hessian = problem.normal(coefficients)
    assert loss == pytest.approx(problem.loss(coefficients))
    for seed in range(3):
        step = 1e-4 * np.random.default_rng(seed).normal(size=len(terms))
        difference = (problem.loss(coefficients + step) - problem.loss(coefficients - step)) / 2
        assert 2 * gradient @ step == pytest.approx(difference, rel=0.05)
    assert np.allclose(hessian, hessian.T)
    assert np.linalg.eigvalsh(hessian).min() > -1e-9


# --- fits -------------------------------------------------------------------------------------------------------------


def test_a_map_is_found_again_from_nearby(threads: Executor) -> None:
    reach = Reach(pupil=3, field=3, charge=1)
    terms, true = some_map(reach)
    sites = some_sites(30)
    seen = Seen(sites, *kernels_of(terms, true, sites))
    start = true + 0.02 * np.random.default_rng(1).normal(size=len(terms))
    found = solve(Problem(terms, seen, hats(PX, 16), Pupil(4096), threads), start, 30, gain=1e-6)
    assert found.error < 0.02
    assert np.linalg.norm(found.coefficients - true) < 0.1 * np.linalg.norm(start - true)


def test_a_prior_holds_what_the_kernels_do_not_tell(threads: Executor) -> None:
    terms, true = some_map(Reach(pupil=3, field=3))
    seen = Seen(sites := some_sites(5), *kernels_of(terms, true, sites))
    start = true + 0.05
    firm = Prior(start, np.full(len(terms), 1e6))
    held = solve(Problem(terms, seen, hats(PX, 8), Pupil(500), threads), start, 10, firm)
    assert np.allclose(held.coefficients, start, atol=1e-4)
    assert ridge(terms).precision[terms.order.argmax()] > ridge(terms).precision[terms.order.argmin()]


SHORT = (
    Stage(16, Reach(pupil=3, field=4, charge=1), 16, 8, 128, 15),
    Stage(4, Reach(pupil=4, field=4, charge=1), 25, 16, 256, 15),
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for small lenses."""
    finest = Reach(pupil=4, field=4, charge=2)
    monkeypatch.setattr(searching, "STARTS", SHORT)
    monkeypatch.setattr(searching, "TRIES", 1)
    monkeypatch.setattr(distances, "MOVED", replace(distances.MOVED, reach=SHORT[-1].reach, kernels=25))
    monkeypatch.setattr(searching, "FINEST", finest)
    monkeypatch.setattr(searching, "LAST", (Stage(1, finest, 25, 16, 512, 15),))


def test_a_search_foretells_kernels_it_has_not_seen(short: None, threads: Executor) -> None:
    """A misaligned lens of two wavelengths on a 5 x 5 grid: it errs far less than neighbours differ."""
    terms, true = some_map(Reach(pupil=4, field=4, charge=1), seed=3)
    other = true.copy()
    other[[t.n == 2 for t in terms.terms]] += 0.03
    at = np.linspace(-1, 1, 5)
    field = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
    sites, held = Sites(field, np.zeros(25), np.zeros(25)), some_sites(20, seed=5)
    both = [kernels_of(terms, c, sites) for c in (true, other)]
    kernels, captured = (np.stack(part, 1) for part in zip(*both, strict=True))
    found = fit_raymap(sites, kernels, captured, np.array([0.5, 0.6]), seed=0, threads=threads)
    cells = bins(PX, 8)
    for w, c in enumerate((true, other)):
        truth = cells.image(kernels_of(terms, c, held)[0])
        guess = drawn(found.terms, found.coefficients[w], held, cells, Pupil(4096))
        guess /= guess.sum(axis=(1, 2), keepdims=True)
        error = np.linalg.norm(guess - truth, axis=(1, 2)) / np.linalg.norm(truth, axis=(1, 2))
        nearest = np.linalg.norm(held.field[:, None] - field, axis=-1).argmin(axis=1)
        apart = np.linalg.norm(cells.image(kernels[nearest, w]) - truth, axis=(1, 2)) / np.linalg.norm(
            truth, axis=(1, 2)
        )
        assert error.mean() < 0.2 * apart.mean()
    again = fit_raymap(sites, kernels, captured, np.array([0.5, 0.6]), seed=0, threads=threads)
    assert np.array_equal(found.coefficients, again.coefficients)


@pytest.mark.parametrize("several", [False, True], ids=["one distance", "several"])
def test_it_tells_how_far_it_is(short: None, threads: Executor, monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    """From 0 to 1, often, and never back."""
    small = replace(distances.MOVED, reach=SHORT[-1].reach, kernels=8, rays=64, steps=4)
    for name in ("MOVED", "FREED", "SHARPER", "LAST"):
        monkeypatch.setattr(distances, name, replace(small, keep=1))
    terms, true = some_map(Reach(pupil=3, field=3, focus=True), seed=1, charged=False)
    one = some_sites(16)
    sites = Sites(np.tile(one.field, (2, 1)), np.zeros(32), np.repeat([0.0, 0.2 if several else 0.0], 16))
    kernels, captured = (np.stack([part] * 3, 1) for part in kernels_of(terms, true, sites))
    told: list[float] = []
    found = fit_raymap(sites, kernels, captured, np.array([0.4, 0.5, 0.6]), seed=0, threads=threads, done=told.append)
    assert found.terms.reach.focus == several
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, pytest.approx(1))
    assert np.diff(told).max() <= 0.2
    assert len(told) > 30


@pytest.mark.parametrize(("of_one", "of_all", "charge"), [(True, False, -1), (True, True, 2), (False, True, -1)])
def test_whether_a_lens_is_misaligned_is_asked_of_all_distances(
    short: None, threads: Executor, monkeypatch: pytest.MonkeyPatch, of_one: bool, of_all: bool, charge: int
) -> None:
    """Of one distance, where it is hard to tell, the answer may be wrong."""
    small = replace(distances.MOVED, reach=SHORT[-1].reach, kernels=8, rays=64, steps=4)
    for name in ("MOVED", "FREED", "SHARPER", "LAST"):
        monkeypatch.setattr(distances, name, replace(small, keep=1))
    one, asked = some_sites(16), list[int]()
    sites = Sites(np.tile(one.field, (2, 1)), np.zeros(32), np.repeat([0.0, 0.3], 16))
    kernels, captured = (part[:, None] for part in kernels_of(*some_map(Reach(pupil=3, field=3, focus=True)), sites))

    def answer(fit: Fit, seen: Seen, stage: Stage, threads: Executor) -> bool:
        asked.append(len(seen))
        return of_one if len(asked) == 1 else of_all

    monkeypatch.setattr(searching, "_misaligned", answer)
    found = fit_raymap(sites, kernels, captured, np.array([0.5]), seed=0, threads=threads)
    assert asked == [16, 32]
    assert found.terms.reach.charge == charge


def test_more_threads_give_the_same_bits(threads: Executor) -> None:
    terms, coefficients = some_map(SMALL)
    sites = some_sites(30)
    seen = Seen(sites, *kernels_of(*some_map(SMALL, seed=1), sites))
    stage = Stage(1, SMALL, 30, 8, 256, 5)
    start = [Fit(terms, coefficients, np.inf)]
    one = refined(seen, start, stage, threads)[0]
    with ThreadPoolExecutor(4) as more:
        four = refined(seen, start, stage, more)[0]
    assert np.array_equal(one.coefficients, four.coefficients)


def test_places_that_are_chosen_lie_far_apart() -> None:
    sites = some_sites(200)
    chosen = spread(sites, 20)
    assert len(np.unique(chosen)) == 20
    field = sites.field[chosen]
    apart = np.linalg.norm(field[:, None] - field, axis=-1)[np.triu_indices(20, 1)].min()
    assert apart > 0.15
    assert np.array_equal(spread(sites, 500), np.arange(200))


# --- the torch twin ---------------------------------------------------------------------------------------------------


def test_torch_counts_rays_as_the_solver_does() -> None:
    reach = replace(SMALL, depth=1, focus=True)
    terms, coefficients = some_map(reach)
    sites = some_sites(7, depth=0.3, defocus=-0.1)
    cells = bins(PX, 5)
    truth = drawn(terms, coefficients, sites, cells, Pupil(1024))
    truth /= truth.sum(axis=(1, 2), keepdims=True)
    decoder, matrix = RayDecoder(terms, cells, 1024), matrix_of(terms, coefficients)[None, None]
    features = decoder.features(*(torch.tensor(part).float() for part in (sites.field, sites.depth, sites.defocus)))
    assert np.allclose(features, terms.at(sites), atol=1e-5)
    assert np.allclose(decoder(matrix, features)[:, 0], truth, atol=1e-5)
    modes = torch.einsum("wqs,bs->bwq", matrix[0], features)
    exported = decoder._summed(modes)
    assert np.allclose((exported / exported.sum(dim=(-2, -1), keepdim=True))[:, 0], truth, atol=1e-5)


def test_of_a_few_kernels_the_truest_map_is_taken(
    short: None, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three searches, from three seeds; of more kernels there is one."""
    asked = list[int]()

    def found(sites: Sites, *rest: Any) -> RayMap:
        asked.append(rest[3])
        return RayMap(Terms(SHORT[-1].reach), np.ones(1), np.zeros((1, 1)), np.array([0.1 + abs(rest[3] - 22)]))

    monkeypatch.setattr(searching, "TRIES", 3)
    monkeypatch.setattr(searching, "_found", found)
    for count, seeds in ((searching.FEW, [21, 22, 23]), (searching.FEW + 1, [7])):
        asked.clear()
        best = fit_raymap(some_sites(count), *np.zeros((2, 1)), np.ones(1), seed=7, threads=threads)
        assert asked == seeds
        assert best.misfit[0] == pytest.approx(min(0.1 + abs(seed - 22) for seed in seeds))
