"""From hits to kernels: the bilinear splat, binning by area, normalisation, the noise estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from psfgen.optics.splat import deposit, normalise, overlap_matrix
from psfgen.store.schema import centres_um

Array = NDArray[np.float64]
PITCH = 3.0


def one(x_um: float, y_um: float, kernel_px: int = 8) -> Array:
    """The deposit of a single hit."""
    hit = np.array([[[x_um, y_um]]])
    halves = deposit(hit, np.ones((1, 1), bool), kernel_px, PITCH)
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
    halves = deposit(hits, valid, 24, PITCH)
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
    ours = deposit(hits, np.ones((1, 800), bool), kernel_px, PITCH).sum(1)[0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize(("kernel_px", "bins"), [(64, 15), (64, 16), (12, 5), (7, 7), (9, 1)])
def test_binning_conserves_energy_and_is_exact_area_overlap(kernel_px: int, bins: int) -> None:
    """Against the integral of the piecewise constant kernel, from its cumulative sum."""
    kernel = np.random.default_rng(2).random((kernel_px, kernel_px))
    halves = np.stack([kernel, kernel]) / 2
    binned = normalise(halves, bins).psf_binned
    assert binned.shape == (bins, bins)
    assert binned.sum() == pytest.approx(1, abs=1e-12)
    edges, samples = np.linspace(0, kernel_px, bins + 1), np.arange(kernel_px + 1)
    cumulative = np.pad(kernel.cumsum(0).cumsum(1), ((1, 0), (1, 0))) / kernel.sum()
    along_x = np.stack([np.interp(edges, samples, row) for row in cumulative])
    at_edges = np.stack([np.interp(edges, samples, column) for column in along_x.T]).T
    np.testing.assert_allclose(binned, np.diff(np.diff(at_edges, axis=0), axis=1), atol=1e-12)


def test_every_sample_is_shared_out_whole() -> None:
    np.testing.assert_allclose(overlap_matrix(64, 15).sum(0), 1, rtol=1e-12)
    np.testing.assert_allclose(overlap_matrix(64, 15).sum(1), 64 / 15, rtol=1e-12)


def test_kernels_are_normalised_and_dark_ones_are_nan() -> None:
    halves = np.random.default_rng(3).random((2, 3, 2, 6, 6))
    halves[1, 2] = 0
    kernels = normalise(halves, 3)
    dark = np.zeros((2, 3), bool)
    dark[1, 2] = True
    for values in (kernels.psf, kernels.psf_binned):
        assert np.array_equal(np.isnan(values).all((-2, -1)), dark)
        assert np.array_equal(np.isnan(values).any((-2, -1)), dark)
        np.testing.assert_allclose(values[~dark].sum((-2, -1)), 1, rtol=1e-12)
    for noise in (kernels.noise, kernels.noise_binned):
        assert np.array_equal(np.isnan(noise), dark)


def test_a_kernel_that_only_one_half_reaches_is_no_better_than_noise() -> None:
    halves = np.zeros((2, 6, 6))
    halves[0, 2, 3] = 1
    assert normalise(halves, 3).noise >= 1


def disc_rays(rng: np.random.Generator, count: int, radius_um: float) -> Array:
    r, angle = radius_um * np.sqrt(rng.random(count)), 2 * np.pi * rng.random(count)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1)


@pytest.mark.parametrize("rays", [100, 1000, 30000])
def test_the_noise_of_random_rays_is_their_true_error(rays: int) -> None:
    """Independent rays, where the error is known: against a render of 400 times as many."""
    rng = np.random.default_rng(4)
    hits = disc_rays(rng, 40 * rays, 20.0).reshape(40, rays, 2)
    kernels = normalise(deposit(hits, np.ones((40, rays), bool), 16, PITCH), 5)
    many = disc_rays(rng, 3_000_000, 20.0)[None]
    truth = normalise(deposit(many, np.ones((1, many.shape[1]), bool), 16, PITCH), 5)
    for found, exact, noise in (
        (kernels.psf, truth.psf, kernels.noise),
        (kernels.psf_binned, truth.psf_binned, kernels.noise_binned),
    ):
        error = np.linalg.norm(found - exact, axis=(-2, -1)) / np.linalg.norm(exact)
        assert noise.mean() == pytest.approx(error.mean(), rel=0.1)
