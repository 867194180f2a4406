"""The canonical field model on fields of Gaussian blurs that are known everywhere."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import erf

from psfgen.errors import FitError
from psftrain.baselines import Nodes, rbf_tps
from psftrain.canonical import Canonical, fit_canonical
from psftrain.canonical.blend import fit_blend
from psftrain.canonical.covariance import Parity, Setting, covariance, left_out, of_training
from psftrain.canonical.crossval import Folds
from psftrain.canonical.frame import Polar, binning, from_canonical, on_simplex, to_canonical
from psftrain.canonical.shape import fit_shape, split
from psftrain.canonical.thinplate import ThinPlate, at_field
from psftrain.canonical.warp import moments
from psftrain.metrics import rel_l2

Array = NDArray[Any]
SIDE, BINS, CHANNELS = 32, 8, 2
FINE = 3  # samples of a sample that a blur is integrated over


def grid(count: int) -> Array:
    """(x, y) of a square grid over the field."""
    axis = np.linspace(-1, 1, count)
    x, y = np.meshgrid(axis, axis)
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def scattered(count: int, seed: int = 7) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2))


def blurs(field: Array, *, crooked: tuple[float, float] = (0, 0)) -> Array:
    """Two blobs along the field radius, growing with it, turned by its azimuth; [M, CHANNELS, SIDE, SIDE].

    A `crooked` lens shifts all of them and tilts them, as a decentred one does.
    """
    radius, theta = np.hypot(*field.T), np.arctan2(field[:, 1], field[:, 0])
    edge = (np.arange(SIDE * FINE) + 0.5) / FINE - SIDE / 2
    x, y = np.meshgrid(edge, -edge)
    found = np.zeros((len(field), CHANNELS, SIDE * FINE, SIDE * FINE))
    for m, (r, t) in enumerate(zip(radius, theta, strict=True)):
        u = math.cos(t) * (x - crooked[0]) + math.sin(t) * (y - crooked[1])
        v = -math.sin(t) * (x - crooked[0]) + math.cos(t) * (y - crooked[1])
        for w in range(CHANNELS):
            for weight, at in ((0.7, 0.0), (0.3, 1.0)):
                su, sv, middle = 1.5 + (1 + 0.2 * w) * r**2, 1.5 + 0.4 * r**2, at * 5 * r**3 - r
                found[m, w] += weight / (su * sv) * np.exp(-(((u - middle) / su) ** 2) / 2 - (v / sv) ** 2 / 2)
    found = found.reshape(len(field), CHANNELS, SIDE, FINE, SIDE, FINE).mean(axis=(3, 5))
    return np.asarray(found / found.sum(axis=(-2, -1), keepdims=True))


def binned(kernels: Array) -> Array:
    shares = binning(kernels.shape[-1], BINS)
    return np.asarray(shares @ kernels @ shares.T)


def fitted(field: Array, **lens: Any) -> Canonical:
    kernels = blurs(field, **lens)
    return fit_canonical(field, kernels, binned(kernels), seed=0)


@cache
def of_the_grid() -> Canonical:
    return fitted(grid(5))


def rbf(field: Array, values: Array, query: Array) -> Array:
    """The thin-plate row that a model is measured against, on a square grid."""
    count = math.isqrt(len(field))
    axis = np.linspace(-1, 1, count)
    nodes = Nodes(axis, axis, values.reshape(count, count, -1))
    return rbf_tps(nodes)(query[:, ::-1]).reshape(len(query), *values.shape[1:])


def test_it_beats_a_spline_on_a_lens_whose_blur_turns_and_grows() -> None:
    query = scattered(60)
    truth = binned(blurs(query))
    ours = rel_l2(of_the_grid().predict(query), truth).mean()
    theirs = rel_l2(rbf(grid(5), binned(blurs(grid(5))), query), truth).mean()
    assert ours < 0.03
    assert ours < 0.25 * theirs


def test_it_follows_a_crooked_lens() -> None:
    query, crooked = scattered(60), (1.2, -0.7)
    truth = binned(blurs(query, crooked=crooked))
    model = fitted(grid(7), crooked=crooked)
    ours = rel_l2(model.predict(query), truth).mean()
    theirs = rel_l2(rbf(grid(7), binned(blurs(grid(7), crooked=crooked)), query), truth).mean()
    assert model.settings["warp"]["harmonics"] > 0
    assert ours < 0.5 * theirs


def test_points_may_lie_anywhere() -> None:
    query = 0.9 * scattered(60)
    model = fitted(scattered(40, seed=3))
    assert rel_l2(model.predict(query), binned(blurs(query))).mean() < 0.08


def test_kernels_are_kernels() -> None:
    found = of_the_grid().predict(np.concatenate([scattered(40), [[0, 0], [1, 1], [-1, 1]]]))
    assert found.shape == (43, CHANNELS, BINS, BINS)
    assert found.dtype == np.float32
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=(-2, -1)), 1, atol=1e-5)


def test_no_point_is_an_answer_too() -> None:
    assert of_the_grid().predict(np.empty((0, 2))).shape == (0, CHANNELS, BINS, BINS)


@pytest.mark.parametrize("crooked", [(0, 0), (1.2, -0.7)])
def test_a_turned_lens_gives_turned_kernels(crooked: tuple[float, float]) -> None:
    """By 90 degrees anticlockwise: (x, y) -> (-y, x), and the kernels' rows and columns likewise."""
    field, query = grid(5), scattered(20)
    kernels = blurs(field, crooked=crooked)
    turned = np.rot90(kernels, axes=(-2, -1))
    here = fit_canonical(field, kernels, binned(kernels), seed=0)
    there = fit_canonical(field @ [[0, 1], [-1, 0]], turned, binned(turned), seed=0)
    found, expected = there.predict(query @ [[0, 1], [-1, 0]]), np.rot90(here.predict(query), axes=(-2, -1))
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.max())


def test_the_same_again_is_the_same_to_the_bit() -> None:
    field = scattered(30)
    one, other = fitted(field), fitted(field)
    assert one.settings == other.settings
    np.testing.assert_array_equal(one.predict(grid(4)), other.predict(grid(4)))


def test_the_order_of_the_points_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(25)
    np.testing.assert_allclose(fitted(grid(5)[order]).predict(grid(4)), of_the_grid().predict(grid(4)), atol=1e-6)


def test_points_without_light_are_left_aside() -> None:
    field = grid(5)
    kernels = blurs(field)
    kernels[[3, 12], 1] = np.nan
    dark = fit_canonical(field, kernels, binned(kernels), seed=0)
    lit = np.setdiff1d(np.arange(25), [3, 12])
    some = fit_canonical(field[lit], kernels[lit], binned(kernels[lit]), seed=0)
    assert len(dark.points) == 23
    np.testing.assert_array_equal(dark.predict(grid(4)), some.predict(grid(4)))


def test_it_survives_its_arrays() -> None:
    model = of_the_grid()
    again = Canonical.from_arrays(model.arrays(), model.settings)
    np.testing.assert_array_equal(again.predict(grid(4)), model.predict(grid(4)))
    np.testing.assert_array_equal(again.expected_error(grid(4)), model.expected_error(grid(4)))
    assert again.settings == model.settings
    assert again.cv_error == model.cv_error


def test_the_expected_error_knows_where_the_gaps_are() -> None:
    """Points within a radius of 0.5 and beyond one of 1.1 only: what lies between is guessed."""
    field = grid(9)
    radius = np.hypot(*field.T)
    model = fitted(field[(radius < 0.5) | (radius > 1.1)])
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    expected = {r: model.expected_error(r * ring).mean() for r in (0.3, 0.8, 1.2)}
    assert expected[0.8] > 3 * max(expected[0.3], expected[1.2])


@pytest.mark.parametrize("count", [4, 9])
def test_few_points_are_enough(count: int) -> None:
    field = grid(math.isqrt(count))
    found = fitted(field).predict(scattered(10))
    np.testing.assert_allclose(found.sum(axis=(-2, -1)), 1, atol=1e-5)


def test_points_that_span_no_field_are_refused() -> None:
    line = np.stack([np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)], axis=-1)
    with pytest.raises(FitError, match="do not span a field"):
        fitted(line)
    with pytest.raises(FitError, match="two training kernels at one field point"):
        fitted(np.concatenate([grid(3), grid(3)[:1]]))
    with pytest.raises(FitError, match="no training point has light"):
        fit_canonical(grid(3), np.full((9, 1, 8, 8), np.nan), np.full((9, 1, 4, 4), np.nan), seed=0)


def test_there_and_back() -> None:
    """A blur that is turned, shifted and scaled into the frame comes back as it was."""
    field = scattered(10)
    kernels, theta = blurs(field), Polar.of(field).theta
    warp = moments(kernels, theta)
    found = from_canonical(to_canonical(kernels, theta, warp), theta, warp, binning(SIDE, BINS))
    assert rel_l2(found, binned(kernels)).max() < 2e-3


def test_moments_of_a_known_blob() -> None:
    """At azimuth 90 degrees u points up and v to the left."""
    edge = np.arange(SIDE + 1) - SIDE / 2
    x = np.diff(erf((edge - 2) / (3 * math.sqrt(2))))
    y = np.diff(erf((edge - 1) / (1.5 * math.sqrt(2))))[::-1]
    cu, cv, su, sv = moments(np.outer(y, x)[None, None], np.array([np.pi / 2]))[0, 0]
    assert (cu, cv) == pytest.approx((1, -2), abs=1e-3)
    assert (su, sv) == pytest.approx((math.sqrt(1.5**2 + 1 / 6), math.sqrt(9 + 1 / 6)), abs=1e-3)


def test_the_parts_of_images_make_up_the_images() -> None:
    images = np.random.default_rng(0).random((6, 1, 80, 80))
    points = Polar.of(scattered(6))
    exact = Setting(length=0.4, harmonics=2, noise=1e-9)
    shape, _ = fit_shape(exact, split(images), points)
    assert np.abs(shape(points, points) - images).max() < 0.05


def test_left_out_is_what_a_fit_without_it_predicts() -> None:
    points, setting, parity = Polar.of(grid(4)), Setting(0.7, 2, 1e-3), Parity(-1, 1)
    values = np.random.default_rng(0).random((16, 3))
    precision = np.linalg.inv(of_training(setting, parity, points))
    folds = Folds.of(points)
    for judged in folds.judged:
        others = np.flatnonzero(folds.groups != folds.groups[judged])
        weights = np.linalg.solve(of_training(setting, parity, points[others]), values[others])
        expected = covariance(setting, parity, points[[judged]], points[others]) @ weights
        found = left_out(precision, folds.groups, np.array([judged])) @ values
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_field_through_the_axis_is_smooth() -> None:
    """What is even under a half turn is even in the radius, and alike on both sides of the axis."""
    near, far = Polar.of(np.array([[0.01, 0.0]])), Polar.of(np.array([[-0.01, 0.0]]))
    for harmonics in range(4):
        for parity in (Parity(1, 1), Parity(-1, 1)):
            setting = Setting(0.4, harmonics, 0)
            own, across = (covariance(setting, parity, near, at)[0, 0] for at in (near, far))
            assert across == pytest.approx(parity.u * own, rel=1e-2, abs=1e-2)


def test_a_thin_plate_left_out_is_a_thin_plate_without() -> None:
    field, values = scattered(12), np.random.default_rng(0).random((12, 2))
    plate = ThinPlate.of(field)
    np.testing.assert_allclose(at_field(field, field, plate.weights(values)), values, atol=1e-9)
    without = ThinPlate.of(field[1:])
    expected = at_field(field[:1], field[1:], without.weights(values[1:]))
    np.testing.assert_allclose(plate.left_out(values)[:1], expected, atol=1e-9)


def test_the_simplex_takes_the_nearest_kernel() -> None:
    found = on_simplex(np.array([[[0.5, 0.9], [-0.2, 0.1]]]))
    np.testing.assert_allclose(found, np.array([[[0.3, 0.7], [0, 0]]]), atol=1e-12)


def test_the_blend_takes_the_model_that_is_right_there() -> None:
    draw = np.random.default_rng(0)
    radius, truth = np.linspace(0, 1, 60), draw.random((60, 20))
    near_axis = radius < 0.5
    wrong = truth + 0.3 * draw.standard_normal(truth.shape)
    canonical, plain = np.where(near_axis[:, None], wrong, truth), np.where(near_axis[:, None], truth, wrong)
    blend = fit_blend(radius, 0.05, truth, canonical, np.zeros_like(truth), plain)
    assert np.interp(0.2, blend.radius, blend.plain) > 0.9
    assert np.interp(0.8, blend.radius, blend.plain) < 0.1
