"""From hits to kernels: the bilinear splat, binning by area, normalisation, the noise estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from psfgen.optics.splat import MOST_NOISE, normalise, overlap, sampling
from psfgen.optics.splat import deposit as deposit_mm
from psfgen.store.schema import centres_um

Array = NDArray[np.float64]
PITCH = 3.0
SINGLE = 3e-7  # what is left of a sum in single precision


def deposit(xy_um: Array, valid: NDArray[np.bool_], kernel_px: int) -> Array:
    """The splat of hits in um at PITCH, in float64."""
    found = deposit_mm(torch.from_numpy(xy_um / 1000), torch.from_numpy(valid), kernel_px, PITCH / 1000)
    return np.asarray(found, np.float64)


def one(x_um: float, y_um: float, kernel_px: int = 8) -> Array:
    """The deposit of a single hit."""
    hit = np.array([[[x_um, y_um]]])
    halves = deposit(hit, np.ones((1, 1), bool), kernel_px)
    assert halves[0, 1].sum() == 0, "the first ray belongs to the even half"
    return halves[0, 0]


@pytest.mark.parametrize("kernel_px", [7, 8])
def test_a_hit_on_a_sample_stays_there(kernel_px: int) -> None:
    """At the sample's own coordinates: ascending x to the right, row 0 at +y."""
    x, y = centres_um(kernel_px, PITCH), centres_um(kernel_px, PITCH)[::-1]
    for row, column in ((0, 0), (2, 5), (kernel_px - 1, 1)):
        expected = np.zeros((kernel_px, kernel_px))
        expected[row, column] = 1
        np.testing.assert_allclose(one(x[column], y[row], kernel_px), expected, atol=1e-12)


@pytest.mark.parametrize(("fx", "fy"), [(0.25, 0.0), (0.0, 0.6), (0.3, 0.9), (0.5, 0.5)])
def test_a_hit_between_samples_splits_linearly(fx: float, fy: float) -> None:
    x, y = centres_um(8, PITCH), centres_um(8, PITCH)[::-1]
    found = one(x[3] + fx * PITCH, y[4] - fy * PITCH)
    np.testing.assert_allclose(found[4:6, 3:5], np.outer([1 - fy, fy], [1 - fx, fx]), atol=1e-12)
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize(("beyond", "kept"), [(0.25, 0.75), (0.999, 0.001), (1.0, 0.0), (40.0, 0.0)])
@pytest.mark.parametrize("side", [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_what_falls_beyond_the_last_sample_is_lost(side: tuple[int, int], beyond: float, kept: float) -> None:
    edge = (3.5 + beyond) * PITCH
    assert one(side[0] * edge + 1.5 * abs(side[1]), side[1] * edge + 1.5 * abs(side[0])).sum() == pytest.approx(kept)


def test_invalid_hits_leave_nothing_and_halves_hold_every_other_ray() -> None:
    rng = np.random.default_rng(0)
    hits, valid = rng.normal(0, 4, (3, 500, 2)), rng.random((3, 500)) < 0.7
    hits[~valid] = np.nan
    halves = deposit(hits, valid, 24)
    assert halves.shape == (3, 2, 24, 24)
    counts = np.stack([valid[:, ::2].sum(1), valid[:, 1::2].sum(1)], axis=1)
    np.testing.assert_allclose(halves.sum((-2, -1)), counts, rtol=1e-12)


@pytest.mark.parametrize("kernel_px", [15, 16])
def test_the_splat_is_deeplens_own(kernel_px: int) -> None:
    """`forward_integral` of the same hits; it drops the outer half sample, so they stay inside."""
    from deeplens.imgsim import forward_integral
    from deeplens.light import Ray

    rng = np.random.default_rng(1)
    centre_mm = np.array([[1.25, -0.75]])
    reach = (kernel_px - 1) / 2 * PITCH * 0.99
    hits = np.clip(rng.normal(2, 8, (1, 800, 2)), -reach, reach)
    o = np.concatenate([hits / 1000 + centre_mm, np.zeros((1, 800, 1))], axis=-1)
    d = np.broadcast_to([0.0, 0.0, 1.0], o.shape)
    ray = Ray(torch.tensor(o), torch.tensor(d), 0.55)
    theirs = forward_integral(ray, ps=PITCH / 1000, ks=kernel_px, pointc=torch.tensor(centre_mm))[0]
    ours = deposit(hits, np.ones((1, 800), bool), kernel_px).sum(1)[0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize(("kernel_px", "bins"), [(64, 15), (64, 16), (12, 5), (7, 7), (9, 1)])
def test_binning_conserves_energy_and_is_exact_area_overlap(kernel_px: int, bins: int) -> None:
    """Against the integral of the piecewise constant kernel, from its cumulative sum."""
    kernel = np.random.default_rng(2).random((kernel_px, kernel_px)).astype(np.float32)
    halves = np.stack([kernel, kernel]) / 2
    binned = normalise(halves, bins).psf_binned
    assert binned.shape == (bins, bins)
    assert binned.sum(dtype=np.float64) == pytest.approx(1, abs=SINGLE)
    edges, samples = np.linspace(0, kernel_px, bins + 1), np.arange(kernel_px + 1)
    cumulative = np.pad(kernel.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0))) / kernel.sum(dtype=np.float64)
    along_x = np.stack([np.interp(edges, samples, row) for row in cumulative])
    at_edges = np.stack([np.interp(edges, samples, column) for column in along_x.T]).T
    np.testing.assert_allclose(binned, np.diff(np.diff(at_edges, axis=0), axis=1), rtol=3 * SINGLE)


def overlap_matrix(kernel_px: int, bins: int) -> Array:
    """Share of each sample in each bin [bins, k]."""
    first, share = overlap(kernel_px, bins)
    matrix = np.zeros((bins + 1, kernel_px))
    for part in range(2):
        matrix[first + part, np.arange(kernel_px)] += share[:, part]
    assert not matrix[bins].any()
    return matrix[:bins]


def test_every_sample_is_shared_out_whole() -> None:
    share = overlap_matrix(64, 15)
    np.testing.assert_allclose(share.sum(0), 1, rtol=1e-6)
    np.testing.assert_allclose(share.sum(1), 64 / 15, rtol=1e-6)


def test_kernels_are_normalised_and_dark_ones_are_nan() -> None:
    halves = np.random.default_rng(3).random((2, 3, 2, 6, 6)).astype(np.float32)
    halves[1, 2] = 0
    kernels = normalise(halves, 3)
    dark = np.zeros((2, 3), bool)
    dark[1, 2] = True
    for values in (kernels.psf, kernels.psf_binned):
        assert np.array_equal(np.isnan(values).all((-2, -1)), dark)
        assert np.array_equal(np.isnan(values).any((-2, -1)), dark)
        np.testing.assert_allclose(values[~dark].sum((-2, -1), dtype=np.float64), 1, rtol=SINGLE)
    for noise in (kernels.noise, kernels.noise_binned, kernels.rms_px):
        assert np.array_equal(np.isnan(noise), dark)


def test_a_kernel_that_only_one_half_reaches_is_no_better_than_noise() -> None:
    halves = np.zeros((2, 6, 6), np.float32)
    halves[0, 2, 3] = 1
    assert normalise(halves, 3).noise == MOST_NOISE


def disc_rays(rng: np.random.Generator, count: int, radius_um: float) -> Array:
    r, angle = radius_um * np.sqrt(rng.random(count)), 2 * np.pi * rng.random(count)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1)


@pytest.mark.parametrize("rays", [100, 1000, 30000])
def test_the_noise_of_random_rays_is_their_true_error(rays: int) -> None:
    """Independent rays, where the error is known: against a render of 400 times as many."""
    rng = np.random.default_rng(4)
    hits = disc_rays(rng, 40 * rays, 20.0).reshape(40, rays, 2)
    kernels = normalise(deposit(hits, np.ones((40, rays), bool), 16), 5)
    many = disc_rays(rng, 3_000_000, 20.0)[None]
    truth = normalise(deposit(many, np.ones((1, many.shape[1]), bool), 16), 5)
    for found, exact, noise in (
        (kernels.psf, truth.psf, kernels.noise),
        (kernels.psf_binned, truth.psf_binned, kernels.noise_binned),
    ):
        error = np.linalg.norm(found - exact, axis=(-2, -1)) / np.linalg.norm(exact)
        assert noise.mean() == pytest.approx(error.mean(), rel=0.1)


@pytest.mark.parametrize("margins", [(1.0, 1.0), (1.5, 2.5)])
def test_noise_is_half_the_difference_of_the_halves_times_its_margin(margins: tuple[float, float]) -> None:
    """Written out in float64, for the kernel and for its bins."""
    halves = np.random.default_rng(5).random((3, 2, 12, 12)).astype(np.float32)
    share = overlap_matrix(12, 5)
    found = normalise(halves, 5, margins)
    for parts, noise, margin in (
        (halves.astype(np.float64), found.noise, margins[0]),
        (share @ halves.astype(np.float64) @ share.T, found.noise_binned, margins[1]),
    ):
        even, odd = (parts[:, h] / parts[:, h].sum((-2, -1), keepdims=True) for h in range(2))
        difference, energy = ((even - odd) ** 2).sum((-2, -1)), (even * odd).sum((-2, -1))
        np.testing.assert_allclose(noise, margin / 2 * np.sqrt(difference / energy), rtol=1e-5)


def test_the_width_of_a_kernel_is_that_of_its_hits() -> None:
    """The root mean square about the centroid, in samples; the splat's own width is taken out."""
    rng = np.random.default_rng(6)
    hits = rng.normal([4.0, -2.0], [5.0, 9.0], (1, 200_000, 2))
    rms_px = normalise(deposit(hits, np.ones((1, 200_000), bool), 64).astype(np.float32), 8).rms_px
    assert rms_px == pytest.approx(np.hypot(5.0, 9.0) / PITCH, rel=5e-3)


@pytest.mark.parametrize("per_sample", [0.3, 3.0, 100.0])
def test_rays_on_an_effective_sample_are_so_counted_that_random_rays_err_by_their_root(per_sample: float) -> None:
    rays = int(per_sample * np.pi * (20.0 / PITCH) ** 2)
    hits = disc_rays(np.random.default_rng(7), 60 * rays, 20.0).reshape(60, rays, 2)
    halves = deposit(hits, np.ones((60, rays), bool), 20).astype(np.float32)
    noise, on_sample = sampling(halves, np.arange(60), 1.0)
    np.testing.assert_array_equal(noise, normalise(halves, 5).noise)
    tripled, _ = sampling(halves, np.array([7, 3]), 3.0)
    np.testing.assert_allclose(tripled, 3 * noise[[7, 3]], rtol=1e-6)
    assert np.median(noise) == pytest.approx(np.median(on_sample) ** -0.5, rel=0.25)
