"""Engines: kernels against theory, against DeepLens's own rays and its own psf(), and against themselves turned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, tracer
from numpy.typing import NDArray
from scipy.ndimage import shift
from scipy.signal import fftconvolve

from psfgen.config import RenderConfig
from psfgen.engines import ENGINES, Deposits, engine_class
from psfgen.errors import ConfigError
from psfgen.optics import pupil
from psfgen.optics.splat import Kernels, normalise
from psfgen.plan import Plan
from psfgen.store.schema import centres_um

Array = NDArray[np.float64]
BASE: dict[str, Any] = {"focus": 2000, "wavelength": 0.55, "kernel_px": 32, "bins": 8, "spp": 4096}


def shoot(name: str, field: Any, depth_mm: float, *, engine: str = "geometric", **changes: Any) -> Deposits:
    """The deposits of field points [(x, y), ...] at one depth."""
    config = RenderConfig(**{"lens": name, "depth": depth_mm, **BASE, **changes})
    built = engine_class(engine)(lens(name), Plan.of(config, lens(name)))
    found: Deposits = built.deposit(built.aim(torch.tensor(field, dtype=torch.float64), depth_mm))
    return found


def kernels(found: Deposits, bins: int = 8) -> Kernels:
    return normalise(found.halves, bins, found.margins)


def rel_l2(a: Array, b: Array) -> Array:
    difference: Array = np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))
    return difference


def centroid_px(kernel: Array) -> Array:
    """(down, right) from the middle, in samples."""
    at = centres_um(kernel.shape[-1], 1.0)
    return np.array([(kernel * at[:, None]).sum(), (kernel * at).sum()])


def hits_mm(name: str, field: tuple[float, float], depth_mm: float, sensor_z_mm: float, rays: int) -> Array:
    """Upright image points of DeepLens's own random rays from a field point; NaN where a rim stops them."""
    geo, (width, height) = lens(name).geo, lens(name).sensor_mm
    scale = depth_mm / lens(name).efl_mm
    point = [[field[0] * width / 2 * scale, field[1] * height / 2 * scale, -depth_mm]]
    torch.manual_seed(11)
    with torch.no_grad():
        ray, _ = geo.trace(geo.sample_from_points(points=point, num_rays=rays, wvln=0.55))
        ray = ray.prop_to(sensor_z_mm)
    return np.where(ray.is_valid[0, :, None].numpy() > 0, -ray.o[0, :, :2].numpy(), np.nan)


# --- an ideal lens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [(0.0, 0.0), (0.4, -0.3)])
@pytest.mark.parametrize(("depth_mm", "radius_um"), [(2000.0, 281.955), (1000.0, 595.238), (math.inf, 31.328)])
def test_defocus_of_an_ideal_lens_is_the_disc_of_geometry(
    thin_lens: str, depth_mm: float, radius_um: float, field: tuple[float, float]
) -> None:
    """f = 50 mm, r = 12.5 mm, focused at 20 m: a uniform disc of radius r |z - z'| / z'; its rms is radius / sqrt 2.

    The bilinear splat adds the variance pitch^2 / 6 an axis.
    """
    pitch_um = 2.3 * radius_um / 64
    found = shoot(thin_lens, [field], depth_mm, focus=20000, kernel_px=64, pitch_um=pitch_um, spp=8192)
    image_mm, sensor_mm = 1 / (1 / 50 - 1 / depth_mm), 1 / (1 / 50 - 1 / 20000)
    assert 12500 * abs(sensor_mm - image_mm) / image_mm == pytest.approx(radius_um, rel=1e-4)
    kernel, at = kernels(found).psf[0, 0, 0], centres_um(64, pitch_um)
    second_moment = (kernel * (at**2 + at[:, None] ** 2)).sum() - pitch_um**2 / 3
    assert math.sqrt(2 * second_moment) == pytest.approx(radius_um, rel=1e-3)
    assert centroid_px(kernel) == pytest.approx([0, 0], abs=0.02)
    assert found.throughput.item() == pytest.approx(1, rel=1e-12)
    assert found.captured.item() == pytest.approx(1, rel=1e-6)
    assert kernel[28:36, 28:36].mean() == pytest.approx(pitch_um**2 / (math.pi * radius_um**2), rel=0.05)


@pytest.mark.parametrize("depth_mm", [2000.0, math.inf])
def test_an_ideal_lens_images_where_the_pinhole_does(tmp_path: Path, thin_lens: str, depth_mm: float) -> None:
    """chief = field x half side x sensor distance / EFL, upright, whatever the depth; on a sensor wider than high."""
    document = json.loads(Path(thin_lens).read_text()) | {"sensor_size": [24.0, 16.0], "sensor_res": [3000, 2000]}
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(document))
    field = [(0.0, 0.0), (0.5, -0.25), (-1.0, 1.0)]
    found = shoot(str(wide), field, depth_mm, focus="1m,20m")
    for f, focus_mm in enumerate((1000, 20000)):
        sensor_mm = 1 / (1 / 50 - 1 / focus_mm)
        np.testing.assert_allclose(found.chief_mm[:, f], np.array(field) * [12, 8] * sensor_mm / 50, atol=1e-9)


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["triplet", "acl12708u", "double_gauss"])
def test_a_turned_field_turns_the_kernel(name: str) -> None:
    """Kernels of (0, -f), (f, 0), (-f, 0) are that of (0, f) flipped and turned; each carries its own noise."""
    f, pitch_um = 0.8 * lens(name).field_max, 2 * lens(name).pitch_um
    found = kernels(shoot(name, [(0, f), (0, -f), (f, 0), (-f, 0)], 2500.0, pitch_um=pitch_um))
    up, down, right, left = found.psf[:, 0, 0]
    noise = found.noise[:, 0, 0].max()
    assert rel_l2(up[::-1], up) > 10 * noise, "a symmetric kernel shows no orientation"
    for turned in (up[:, ::-1], down[::-1], np.rot90(right), np.rot90(left, -1)):
        assert rel_l2(turned, up) < 1.5 * noise


@pytest.mark.parametrize(("name", "depth_mm"), [("acl12708u", 1000.0), ("triplet", 1200.0)])
@pytest.mark.parametrize("direction", [(0.7, 0.4), (-0.5, 0.6), (0.1, -0.8)])
def test_an_image_of_a_point_has_its_tail_where_the_rays_go(
    name: str, depth_mm: float, direction: tuple[float, float]
) -> None:
    """A point at the chief ray, convolved with its kernel, is the picture that -hits of a direct trace make."""
    field = (direction[0] * lens(name).field_max, direction[1] * lens(name).field_max)
    pitch_um, sensor_z = 2 * lens(name).pitch_um, pupil.sensor_z_mm(lens(name), tracer(lens(name)), 2000.0)
    found = shoot(name, [field], depth_mm, spp=16384, pitch_um=pitch_um, kernel_px=33)
    chief_mm = found.chief_mm[0, 0]
    upright = (hits_mm(name, field, depth_mm, sensor_z, 40000) - chief_mm) * 1000 / pitch_um
    side = 49
    edges = centres_um(side + 1, 1.0)
    direct = np.histogram2d(-upright[:, 1], upright[:, 0], bins=[edges, edges])[0]  # row 0 is +y
    point = np.zeros((side, side))
    point[side // 2, side // 2] = 1
    image = fftconvolve(point, kernels(found).psf[0, 0, 0], mode="same")

    def likeness(picture: Array) -> float:
        return float(np.corrcoef(picture.ravel(), direct.ravel())[0, 1])

    assert likeness(image) > 0.98
    for wrong in (image[::-1], image[:, ::-1], image[::-1, ::-1], image.T):
        assert likeness(wrong) < likeness(image) - 0.01
    tail = centroid_px(direct / direct.sum())
    assert np.linalg.norm(tail) > 0.3, "no tail, no test"
    assert centroid_px(image) == pytest.approx(tail, abs=0.05)


def test_lateral_colour_stays_in_the_kernel() -> None:
    """Every wavelength is centred on the reference chief ray, so the colours part as their chief rays do."""
    colours = (0.45, 0.5876, 0.65)
    found = kernels(shoot("acl12708u", [(0.5, 0)], 2000.0, wavelength=colours, pitch_um=10, spp=16384)).psf[0, 0]
    parts = [centroid_px(kernel)[1] * 10 for kernel in found]
    o, d = pupil.aim(lens("acl12708u"), torch.tensor([0.5, 0.0], dtype=torch.float64), 2000.0, 2 * pupil.spiral(16384))
    sensor_z = pupil.sensor_z_mm(lens("acl12708u"), tracer(lens("acl12708u")), 2000.0)
    means = [-1000 * float(lens("acl12708u").trace(o, d, um).at(sensor_z)[:, 0].mean()) for um in colours]
    assert means[2] - means[0] > 2.0, "no lateral colour, no test"
    assert np.diff(parts) == pytest.approx(np.diff(means), abs=0.1)


# --- light ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"), [("double_gauss", (1.0, 1.0)), ("singlet", (0.9, 0.6)), ("triplet", (-1.0, 0.8))]
)
def test_throughput_is_the_share_of_rays_deeplens_lets_pass(name: str, field: tuple[float, float]) -> None:
    rays = 60000
    passed = np.isfinite(hits_mm(name, field, 2500.0, 60.0, rays)[:, 0]).mean()
    found = shoot(name, [field], 2500.0, spp=16384).throughput.item()
    assert 0.05 < passed < 0.95
    assert found == pytest.approx(passed, abs=4 * math.sqrt(passed * (1 - passed) / rays) + 1e-3)


@pytest.mark.parametrize("engine", ["geometric", "wave", "auto"])
def test_throughput_does_not_depend_on_focus(engine: str) -> None:
    field = [(0.9, -0.9), (0.3, 0.1)]
    near, far = (shoot("double_gauss", field, 2000.0, focus=focus, engine=engine) for focus in ("1m", "1500,inf"))
    assert np.array_equal(near.throughput, far.throughput)
    assert near.throughput[0] < 0.5 < near.throughput[1]


@pytest.mark.parametrize(
    ("name", "field", "depth_mm"), [("acl12708u", (0.6, 0.6), 400.0), ("singlet", (0.4, 0.5), 900.0)]
)
def test_captured_is_the_share_of_rays_inside_the_window(
    name: str, field: tuple[float, float], depth_mm: float
) -> None:
    """The splat's edges are ramps one sample wide about +-kernel_px / 2 samples."""
    pitch_um = min(lens(name).pitch_um, 20.0)
    found = shoot(name, [field], depth_mm, kernel_px=24, pitch_um=pitch_um)
    hits = hits_mm(name, field, depth_mm, pupil.sensor_z_mm(lens(name), tracer(lens(name)), 2000.0), 60000)
    off_px = np.abs(hits[np.isfinite(hits[:, 0])] - found.chief_mm[0, 0]) * 1000 / pitch_um
    inside = (off_px <= 12).all(axis=1).mean()
    assert 0.1 < inside < 0.95
    assert found.captured.item() == pytest.approx(inside, abs=0.01)


def test_no_light_no_kernel() -> None:
    """Beyond the singlet's rim: throughput 0, NaN, and a chief ray all the same."""
    found = shoot("singlet", [(1.3, 1.3), (0.2, 0.1)], 3000.0)
    assert (found.throughput[0].item(), found.captured[0].item()) == (0, 0)
    assert np.isnan(kernels(found).psf[0]).all()
    assert not np.isnan(kernels(found).psf[1]).any()
    assert np.isfinite(found.chief_mm).all()


def test_light_beside_the_window_is_captured_by_nothing() -> None:
    """Rays pass, but spherical aberration carries all of them beyond a small window about the chief ray."""
    found = shoot("singlet", [(1.0, 1.0)], 2000.0, kernel_px=8)
    assert found.throughput.item() > 0.01
    assert found.captured.item() == 0
    assert np.isnan(kernels(found).psf).all()
    assert np.isnan(kernels(found).noise).all()


# --- sampling error ---------------------------------------------------------------------------------------------------

SAMPLE = [(0.1, -0.2), (0.5, 0.4), (-0.7, 0.7), (0.0, 0.65), (-0.35, -0.1), (0.8, -0.3)]


@pytest.mark.parametrize("name", ["acl12708u", "triplet", "singlet", "double_gauss"])
def test_noise_bounds_the_true_error(name: str) -> None:
    """Against many rays of another seed: the true error lies below the estimate nearly always, and not far below."""
    field = (np.array(SAMPLE) * lens(name).field_max).tolist()
    shared = {"focus": "1500,3000", "kernel_px": 48, "pitch_um": min(lens(name).pitch_um, 20.0)}
    truth = kernels(shoot(name, field, 2500.0, spp=65536, seed=9, **shared))
    for spp in (256, 1024, 4096):
        found = kernels(shoot(name, field, 2500.0, spp=spp, **shared))
        for ours, exact, noise in (
            (found.psf, truth.psf, found.noise),
            (found.psf_binned, truth.psf_binned, found.noise_binned),
        ):
            ratio = (rel_l2(ours, exact) / noise).ravel()
            assert (ratio < 1).mean() >= 0.9
            assert ratio.max() < 1.8
            assert np.median(ratio) > 0.15


def test_more_rays_make_less_noise() -> None:
    noise = [kernels(shoot("triplet", [(0.4, 0.3)], 1500.0, spp=spp)).noise.item() for spp in (256, 1024, 4096, 16384)]
    assert noise == sorted(noise, reverse=True)
    assert noise[-1] < 0.1 * noise[0]


def test_points_do_not_depend_on_their_batch() -> None:
    field = [(0.1, 0.2), (-0.6, 0.9), (0.4, -0.4)]
    together = shoot("double_gauss", field, 1500.0, wavelength="0.48,0.6", focus="1m,inf")
    for p, point in enumerate(field):
        alone = shoot("double_gauss", [point], 1500.0, wavelength="0.48,0.6", focus="1m,inf")
        assert np.array_equal(alone.halves[0], together.halves[p])
        np.testing.assert_allclose(alone.chief_mm[0], together.chief_mm[p], atol=1e-10)
        assert np.array_equal(alone.throughput[0], together.throughput[p])


def test_one_trace_serves_every_focus() -> None:
    together = shoot("triplet", [(0.3, 0.5)], 1500.0, focus="800,2500,inf").halves[0]
    alone = [shoot("triplet", [(0.3, 0.5)], 1500.0, focus=focus).halves[0, 0] for focus in (800, 2500, "inf")]
    assert np.array_equal(together, np.stack(alone))


# --- DeepLens's own kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "depth_mm"), [("triplet", 1600.0), ("double_gauss", 2600.0), ("acl12708u", 1500.0)])
def test_kernels_are_those_of_deeplens_but_for_its_own_scatter(name: str, depth_mm: float) -> None:
    """psf() draws rays and centre at random: moved onto ours, its kernels differ from ours as from each other."""
    points = [(0.2, 0.3), (0.0, -0.45)]
    field = (np.array(points) * lens(name).field_max).tolist()
    pitch_um = 1.5 * lens(name).pitch_um
    ours = kernels(shoot(name, field, depth_mm, spp=65536, pitch_um=pitch_um)).psf[:, 0, 0]
    draws = [
        kernels(shoot(name, field, depth_mm, engine="deeplens", spp=32768, seed=seed, pitch_um=pitch_um)).psf[:, 0, 0]
        for seed in (1, 2)
    ]
    for p, kernel in enumerate(ours):
        moves = [centroid_px(draw[p]) - centroid_px(kernel) for draw in draws]
        assert np.abs(moves).max() < 0.6
        moved = [shift(draw[p], -move, order=3) for draw, move in zip(draws, moves, strict=True)]
        own_scatter = rel_l2(moved[0], moved[1])
        assert own_scatter < 0.15
        assert np.mean([rel_l2(draw, kernel) for draw in moved]) < 0.9 * own_scatter


def test_the_deeplens_engine_tells_what_psf_does_not() -> None:
    """Throughput, captured and chief ray are those of the general path; a seed gives the same kernels again."""
    field = [(0.5, 0.5)]
    small: dict[str, Any] = {"spp": 1024, "kernel_px": 8}
    theirs, ours = (shoot("triplet", field, 1500.0, engine=name, **small) for name in ("deeplens", "geometric"))
    assert 0.1 < ours.captured.item() < 0.9
    assert theirs.throughput == pytest.approx(ours.throughput, abs=2e-3)
    assert theirs.chief_mm == pytest.approx(ours.chief_mm, abs=1e-9)
    assert theirs.captured == pytest.approx(ours.captured, abs=2e-3)
    assert theirs.halves.sum((-3, -2, -1)) == pytest.approx(2 * theirs.captured)
    again = shoot("triplet", field, 1500.0, engine="deeplens", **small)
    assert np.array_equal(theirs.halves, again.halves)
    other = shoot("triplet", field, 1500.0, engine="deeplens", seed=1, **small)
    assert not np.array_equal(theirs.halves, other.halves)


def test_the_deeplens_engine_refuses_infinity() -> None:
    with pytest.raises(ConfigError, match=r"depth inf: engine deeplens .* use engine geometric"):
        shoot("triplet", [(0, 0)], math.inf, engine="deeplens")


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_keeps_the_contract(name: str) -> None:
    """Shapes, shares within [0, 1], deposits never negative, dark exactly where nothing was captured."""
    found = shoot("singlet", [(0, 0), (0.8, 0.5), (1.3, 1.3)], 2000.0, engine=name, focus="1m,3m", wavelength="0.5,0.6")
    points, focuses, waves, side = 3, 2, 2, 32
    assert found.halves.shape == (points, focuses, waves, 2, side, side)
    assert found.throughput.shape == (points, waves)
    assert found.captured.shape == (points, focuses, waves)
    assert found.chief_mm.shape == (points, focuses, 2)
    assert found.rays >= points * waves * 4096
    assert (found.halves >= 0).all()
    assert ((found.throughput >= 0) & (found.throughput <= 1 + 1e-12)).all()
    assert ((found.captured >= 0) & (found.captured <= 1 + 1e-6)).all(), "weights are single sums"
    assert np.array_equal(found.captured == 0, found.halves.sum((-3, -2, -1)) == 0)


def test_an_unknown_engine_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown engine 'geometrik'; did you mean 'geometric'.*geometric, auto, wave, deeplens"
    ):
        engine_class("geometrik")
