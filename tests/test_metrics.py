"""Metrics of kernels whose sizes are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psftrain import metrics

Array = NDArray[Any]


def stack(*channels: Array) -> Array:
    """One example [1, W, y, x], each channel with sum 1."""
    return np.stack([channel / channel.sum() for channel in channels])[None].astype(np.float64)


def places(side: int) -> tuple[Array, Array]:
    """x and y of the bins of a kernel, from its centre, y up."""
    axis = np.arange(side) - (side - 1) / 2
    return np.meshgrid(axis, -axis)  # type: ignore[return-value]


def gaussian(side: int, sigma: float, x0: float = 0, y0: float = 0) -> Array:
    x, y = places(side)
    return np.asarray(np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2)))


def disc(side: int, radius: float) -> Array:
    return np.asarray(np.hypot(*places(side)) <= radius, dtype=float)


def delta(side: int, row: int, column: int) -> Array:
    drawn = np.zeros((side, side))
    drawn[row, column] = 1
    return drawn


# --- relative error ---------------------------------------------------------------------------------------------------


def test_rel_l2_by_hand() -> None:
    truth = np.array([[[[3.0]], [[4.0]]], [[[1.0]], [[0.0]]]])
    found = np.array([[[[0.0]], [[4.0]]], [[[1.0]], [[2.0]]]])
    assert metrics.rel_l2(found, truth) == pytest.approx([3 / 5, 2 / 1])


def test_rel_l2_of_zero_is_one_and_of_the_truth_zero() -> None:
    truth = stack(gaussian(9, 2), disc(9, 3))
    assert metrics.rel_l2(truth, truth) == [0]
    assert metrics.rel_l2(0 * truth, truth) == pytest.approx([1])


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_px", [1.0, 64 / 15])
@pytest.mark.parametrize(("row", "column", "x", "y"), [(3, 3, 0, 0), (0, 3, 0, 3), (6, 3, 0, -3), (3, 5, 2, 0)])
def test_the_centroid_of_a_point(row: int, column: int, x: float, y: float, sample_px: float) -> None:
    """Row 0 is +y; lengths are in samples of the full-size kernel."""
    found = metrics.centroids_px(stack(delta(7, row, column)), sample_px)
    assert found[0, 0] == pytest.approx([x * sample_px, y * sample_px])


@pytest.mark.parametrize("sample_px", [1.0, 2.5])
def test_a_shift_is_measured_exactly_whatever_the_shape(sample_px: float) -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros((1, 2, 12, 12))
    truth[..., 3:8, 3:8] = rng.random((1, 2, 5, 5))
    moved = np.roll(truth, (-3, 4), axis=(-2, -1))
    shift = metrics.centroids_px(moved, sample_px) - metrics.centroids_px(truth, sample_px)
    assert shift.reshape(2, 2) == pytest.approx(np.array([[4, 3], [4, 3]]) * sample_px)
    assert metrics.compare(moved, truth, sample_px)["centroid_px"] == pytest.approx([5 * sample_px])


def test_a_shift_of_one_channel_is_averaged_over_channels() -> None:
    truth = stack(gaussian(9, 1), gaussian(9, 1))
    found = stack(gaussian(9, 1), gaussian(9, 1))
    found[:, 1] = np.roll(delta(9, 4, 4), 2, axis=1)
    truth[:, 1] = delta(9, 4, 4)
    assert metrics.compare(found, truth, 1.0)["centroid_px"] == pytest.approx([(0 + 2) / 2])


# --- how large --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_px", [1.0, 3.0])
@pytest.mark.parametrize("sigma", [2.0, 4.0])
@pytest.mark.parametrize("centre", [(0, 0), (3.0, -2.0)])
def test_radii_of_a_gaussian(sigma: float, sample_px: float, centre: tuple[float, float]) -> None:
    """rms = sigma sqrt 2, a share e lies within sigma sqrt(-2 ln(1 - e)); about the centroid, wherever it is."""
    found = metrics.radii_px(stack(gaussian(61, sigma, *centre)), sample_px)
    assert found["rms"][0, 0] == pytest.approx(sigma * math.sqrt(2) * sample_px, rel=1e-3)
    for share, name in ((0.5, "ee50"), (0.8, "ee80")):
        expected = sigma * math.sqrt(-2 * math.log(1 - share)) * sample_px
        assert found[name][0, 0] == pytest.approx(expected, abs=0.3 * sample_px)


@pytest.mark.parametrize("radius", [20.0, 40.0])
def test_radii_of_a_uniform_disc(radius: float) -> None:
    found = metrics.radii_px(stack(disc(2 * int(radius) + 11, radius)), 1.0)
    assert found["rms"][0, 0] == pytest.approx(radius / math.sqrt(2), rel=0.01)
    assert found["ee50"][0, 0] == pytest.approx(radius / math.sqrt(2), rel=0.02)
    assert found["ee80"][0, 0] == pytest.approx(radius * math.sqrt(0.8), rel=0.02)


def test_radii_of_a_point_are_zero() -> None:
    for name, values in metrics.radii_px(stack(delta(7, 1, 5)), 1.0).items():
        assert values == pytest.approx(np.zeros((1, 1)), abs=1e-9), name


def test_radii_of_a_ring() -> None:
    """All energy at one distance: every radius is that distance."""
    drawn = np.zeros((11, 11))
    drawn[5, 1] = drawn[5, 9] = drawn[1, 5] = drawn[9, 5] = 1
    for name, values in metrics.radii_px(stack(drawn), 2.0).items():
        assert values == pytest.approx(np.full((1, 1), 8.0)), name


def test_other_shares_are_named_by_their_percent() -> None:
    found = metrics.radii_px(stack(gaussian(41, 4)), 1.0, shares=(0.2, 0.95))
    assert set(found) == {"rms", "ee20", "ee95"}
    assert found["ee20"] < found["ee95"]


# --- modulation -------------------------------------------------------------------------------------------------------


def test_the_mtf_of_a_point_is_one_everywhere() -> None:
    assert metrics.mtf(stack(delta(8, 2, 6), delta(8, 0, 0))) == pytest.approx(np.ones((1, 2, 8, 5)))


def test_the_mtf_is_one_at_zero_whatever_the_sum() -> None:
    """An interpolated kernel need not sum to 1."""
    kernels = stack(np.random.default_rng(0).random((7, 7)))
    assert metrics.mtf(3 * kernels) == pytest.approx(metrics.mtf(kernels))
    assert metrics.mtf(3 * kernels)[0, 0, 0, 0] == pytest.approx(1)
    assert metrics.centroids_px(3 * kernels, 1.0) == pytest.approx(metrics.centroids_px(kernels, 1.0))
    for name, values in metrics.radii_px(3 * kernels, 1.0).items():
        assert values == pytest.approx(metrics.radii_px(kernels, 1.0)[name]), name


def test_the_mtf_of_a_gaussian_is_a_gaussian() -> None:
    side, sigma = 40, 2.5
    found = metrics.mtf(stack(gaussian(side, sigma)))[0, 0]
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    assert found == pytest.approx(np.exp(-2 * (math.pi * sigma) ** 2 * (fx**2 + fy**2)), abs=1e-4)


def test_the_mtf_of_two_points_is_a_cosine() -> None:
    side, apart = 16, 4
    found = metrics.mtf(stack(delta(side, 8, 8) + delta(side, 8, 8 + apart)))[0, 0, 0]
    assert found == pytest.approx(np.abs(np.cos(math.pi * apart * np.fft.rfftfreq(side))))


def test_the_mtf_does_not_see_where_a_kernel_lies() -> None:
    kernels = stack(np.random.default_rng(0).random((9, 9)))
    assert metrics.mtf(np.roll(kernels, (2, 3), axis=(-2, -1))) == pytest.approx(metrics.mtf(kernels))


def test_the_mtf_difference_is_a_mean_over_frequencies_and_channels() -> None:
    side = 8
    truth = stack(delta(side, 4, 4), delta(side, 4, 4))
    found = stack(delta(side, 4, 4), np.ones((side, side)))
    lost = 1 - 1 / (side * (side // 2 + 1))  # a flat kernel passes the zero frequency alone
    assert metrics.compare(found, truth, 1.0)["mtf"] == pytest.approx([lost / 2])


# --- rows of a report -------------------------------------------------------------------------------------------------


def test_the_truth_errs_in_nothing() -> None:
    truth = np.concatenate([stack(gaussian(9, 1.5), disc(9, 3)), stack(delta(9, 4, 4), gaussian(9, 2, 1, 1))])
    row = metrics.summarise(metrics.compare(truth, truth, 2.0))
    assert row.pop("rel_l2") == {"mean": 0, "median": 0, "p95": 0}
    assert row == dict.fromkeys(("centroid_px", "mtf", "rms_radius", "ee50", "ee80"), 0)


def test_radii_are_related_to_the_mean_true_radius() -> None:
    """Mean absolute error / mean true radius, so that a tiny kernel cannot blow the number up."""
    sizes = [1.0, 2.0, 4.0]
    truth = np.concatenate([stack(gaussian(81, sigma)) for sigma in sizes])
    found = np.concatenate([stack(gaussian(81, sigma + 0.5)) for sigma in sizes])
    row = metrics.summarise(metrics.compare(found, truth, 3.0))
    assert row["rms_radius"] == pytest.approx(0.5 * 3 / sum(sizes), rel=0.01)
    smaller = metrics.summarise(metrics.compare(truth, found, 3.0))
    assert smaller["rms_radius"] == pytest.approx(0.5 * 3 / (sum(sizes) + 1.5), rel=0.01), "absolute"


def test_errors_of_opposite_sign_do_not_cancel() -> None:
    truth = np.concatenate([stack(gaussian(41, 3))] * 2)
    found = np.concatenate([stack(gaussian(41, 2.5)), stack(gaussian(41, 3.5))])
    assert metrics.summarise(metrics.compare(found, truth, 1.0))["rms_radius"] == pytest.approx(0.5 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("key", "how"), [("mean", np.mean), ("median", np.median), ("p95", lambda error: np.percentile(error, 95))]
)
def test_the_statistics_of_the_error(key: str, how: Callable[[Array], float]) -> None:
    truth = np.concatenate([stack(np.random.default_rng(i).random((5, 5))) for i in range(40)])
    found = np.roll(truth, 1, axis=0)
    error = np.linalg.norm((found - truth).reshape(40, -1), axis=1) / np.linalg.norm(truth.reshape(40, -1), axis=1)
    assert metrics.summarise(metrics.compare(found, truth, 1.0))["rel_l2"][key] == pytest.approx(how(error))


def test_stores_with_other_bins_compare() -> None:
    """The same spot in finer bins: the same centroid and radii in samples."""
    fine = stack(gaussian(60, 5.0, 4.0, -3.0))
    coarse = fine.reshape(1, 1, 20, 3, 20, 3).sum(axis=(-3, -1))
    assert metrics.centroids_px(coarse, 3.0) == pytest.approx(metrics.centroids_px(fine, 1.0), rel=1e-4)
    assert metrics.radii_px(coarse, 3.0)["rms"] == pytest.approx(metrics.radii_px(fine, 1.0)["rms"], rel=0.02)
