"""What corrects a ray map, the layers that read it, and whether expected errors are believed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from psftrain import calibration
from psftrain.canonical.thinplate import ThinPlate
from psftrain.models.field import lagrange
from psftrain.models.layers import hats, on_the_simplex
from psftrain.raymap.correction import choose, spans, weights

AXIS = np.linspace(-1, 1, 6)
NODES = np.stack(np.meshgrid(AXIS, AXIS), -1).reshape(-1, 2)


def wild(nodes: np.ndarray) -> np.ndarray:
    """Numbers [N, 4] that change too fast for the nodes."""
    return np.stack([np.sin(9 * nodes @ k) for k in ((1, 0), (0, 1), (1, 1), (1, -1))], -1) + 2


def smooth(nodes: np.ndarray) -> np.ndarray:
    return np.stack([nodes @ k for k in ((1, 0), (0, 1), (1, 1), (1, -1))], -1) + 5


def test_a_map_that_is_right_is_trusted() -> None:
    truth = wild(NODES)[None]
    noise = 1e-6 * np.random.default_rng(0).normal(size=truth.shape)
    found = choose(ThinPlate.of(NODES), truth, truth + noise)
    assert (found.trust, found.share) == (1.0, 0.0)
    assert found.error < 1e-5


def test_a_map_that_is_wrong_is_not() -> None:
    truth = smooth(NODES)[None]
    noise = np.random.default_rng(0).normal(size=truth.shape)
    found = choose(ThinPlate.of(NODES), truth, truth + noise)
    assert (found.trust, found.share) == (0.0, 1.0)
    assert found.error < 1e-9


def test_a_smooth_error_of_the_map_is_interpolated() -> None:
    """The corrected map is exact at the nodes, and between them as good as the spline of its error."""
    truth = (wild(NODES) + smooth(NODES))[None]
    splines, mapped = ThinPlate.of(NODES), wild(NODES)[None]
    found = choose(splines, truth, mapped)
    assert (found.trust, found.share) == (1.0, 1.0)
    assert weights(splines, found, truth, mapped).shape == (1, len(NODES) + 3, 4)
    assert found.expected.max() < 1e-6


def test_dark_points_are_left_out_and_given_the_mean_error() -> None:
    truth = wild(NODES)[None].copy()
    truth[0, 3] = np.nan
    mapped = wild(NODES)[None] * 1.1
    found = choose(ThinPlate.of(NODES), truth, mapped)
    assert np.isnan(found.errors[0, 3])
    assert found.expected[0, 3] > 0
    assert np.isfinite(weights(ThinPlate.of(NODES), found, truth, mapped)).all()


def test_splines_need_points_off_one_line() -> None:
    assert spans(NODES)
    assert not spans(NODES[:6])
    assert not spans(NODES[[0, 5, 35]])


def test_hats_interpolate_linearly() -> None:
    knots = torch.tensor([-1.0, 0.0, 0.25, 1.0])
    at = torch.linspace(-1.2, 1.2, 50)
    values = torch.tensor([1.0, 3.0, -2.0, 0.5])
    assert np.allclose(hats(at, knots) @ values, np.interp(at, knots, values), atol=1e-6)
    assert torch.equal(hats(at, knots[:1]), torch.ones(50, 1))


def test_the_nearest_point_of_the_simplex() -> None:
    kernel = torch.tensor([[0.5, -0.2], [0.6, 0.3]])
    found = on_the_simplex(kernel)
    target = kernel.numpy().ravel()
    bounds = {"bounds": [(0, 1)] * 4, "constraints": {"type": "eq", "fun": lambda v: v.sum() - 1}}
    truth = minimize(lambda v: ((v - target) ** 2).sum(), np.full(4, 0.25), **bounds, options={"ftol": 1e-14}).x
    assert np.allclose(found.numpy().ravel(), truth, atol=1e-5)
    inside = torch.full((3, 2, 5, 5), 1 / 25)
    assert torch.allclose(on_the_simplex(inside), inside)


def test_polynomials_through_wavelengths() -> None:
    known, at = np.array([0.45, 0.55, 0.65]), np.array([0.5, 0.55, 0.62])
    assert np.allclose(lagrange(at, known) @ known**2, at**2)
    assert np.allclose(lagrange(known, known), np.eye(3))


def test_expected_errors_are_judged_where_they_are_seen() -> None:
    rng = np.random.default_rng(0)
    floor, errors = np.full(400, 0.01), np.exp(rng.normal(-3, 1, 400))
    honest = calibration.judge(errors * np.exp(0.1 * rng.normal(size=400)), errors, floor)
    assert honest["spearman"] > 0.9
    assert honest["median_ratio"] == pytest.approx(1, abs=0.05)
    assert honest["n"] == (errors > 0.015).sum()
    boastful = calibration.judge(0.1 * errors, errors, floor)
    assert boastful["median_ratio"] == pytest.approx(0.1)
    assert calibration.judge(errors, np.full(400, 0.01), floor)["spearman"] is None


def test_groups_of_like_expectation() -> None:
    expected = np.linspace(1, 2, 100)
    means, true = calibration.reliability(expected, 2 * expected)
    assert len(means) == 10
    assert np.allclose(true, 2 * means)
