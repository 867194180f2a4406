"""The blur that depth and focus make, against lenses whose every number is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from psftrain.raymap.defocus import Newton, newton_of

F_MM, FNUM, PITCH_UM, KERNEL_PX = 50.0, 1.8, 6.25, 64
HALF_WINDOW_MM = KERNEL_PX * PITCH_UM / 2000


@dataclass
class Rendered:
    """What is asked of a store."""

    attrs: dict[str, Any]
    coords: dict[str, np.ndarray]


def store(
    depth_mm: list[float],
    focus_mm: list[float],
    *,
    front_mm: float = F_MM,
    fnum: float | None = FNUM,
    copies: int | None = None,
) -> Rendered:
    """A lens of 50 mm whose front focal point lies `front_mm` before where distances count from."""
    z_mm = {f"{d:g}": 70 + (0 if math.isinf(d) else F_MM**2 / (d - front_mm)) for d in focus_mm}
    return Rendered(
        {
            "sensor_z_mm": z_mm if copies is None else {key: [z] * copies for key, z in z_mm.items()},
            "sensor_mm": (36.0, 24.0),
            "pitch_um": PITCH_UM,
            "config": {"fnum": fnum},
        },
        {
            "kx": np.zeros(KERNEL_PX),
            "depth_dioptre": 1000 / np.array(depth_mm),
            "focus_dioptre": 1000 / np.array(focus_mm),
        },
    )


def newton(*stores: Any) -> Newton:
    return newton_of(stores)


def blur_mm(depth_mm: float, focus_mm: float) -> float:
    """Of a thin lens: the rays of its rim, which meet at v, on a sensor at v', both from the lens."""
    v, sensor = (1 / (1 / F_MM - 1 / d) for d in (depth_mm, focus_mm))
    return F_MM / FNUM / 2 * (sensor - v) / v


@pytest.mark.parametrize("focus_mm", [[800, 2000], [800, 2000, 10000], [800, 1000, 2000, math.inf]])
def test_a_thin_lens_blurs_as_it_must(focus_mm: list[float]) -> None:
    lens = newton(store([700, 20000], focus_mm))
    assert (lens.f2_mm2, lens.s0_mm) == pytest.approx((F_MM**2, F_MM), rel=1e-4)
    for depth_mm, asked_mm in ((750.0, 3000.0), (9000.0, 900.0)):
        v = F_MM * depth_mm / (depth_mm - F_MM)  # of this F-number is the cone of rays from infinitely far
        expected = blur_mm(depth_mm, asked_mm) * v / F_MM / HALF_WINDOW_MM
        assert lens.defocus(1000 / depth_mm, 1000 / asked_mm) == pytest.approx(expected, rel=1e-4)


def test_a_thick_lens_is_known_from_three_focus_distances() -> None:
    lens = newton(store([700, 20000], [800, 2000, math.inf], front_mm=-10, copies=4))
    assert (lens.f2_mm2, lens.s0_mm) == pytest.approx((F_MM**2, -10), rel=1e-4)


def test_what_is_in_focus_is_sharp_and_what_is_nearer_meets_behind() -> None:
    lens = newton(store([700, 20000], [800, 2000, math.inf]))
    assert lens.defocus(0.3, 0.3) == 0
    assert lens.defocus(0.0, 0.0) == 0
    assert lens.defocus(1.0, 0.0) < 0 < lens.defocus(0.0, 1.0)
    assert lens.defocus(1.0, 0.0) == pytest.approx(-lens.gain * F_MM**2 / (1000 - F_MM))


def test_arrays_and_tensors_are_taken_alike() -> None:
    lens = newton(store([700, 20000], [800, 2000, math.inf]))
    depth, focus = np.linspace(0, 1, 5), np.linspace(1, 0.1, 5)
    found = lens.defocus(torch.tensor(depth), torch.tensor(focus))
    np.testing.assert_allclose(found.numpy(), lens.defocus(depth, focus), rtol=1e-12)
    np.testing.assert_allclose(lens.defocus(depth[:, None], focus)[2, 3], lens.defocus(depth[2], focus[3]))


def test_stores_of_one_focus_each_tell_together() -> None:
    lens = newton(*(store([1000.0], [focus_mm], front_mm=20) for focus_mm in (800, 2000, 5000)))
    assert (lens.f2_mm2, lens.s0_mm) == pytest.approx((F_MM**2, 20), rel=1e-4)


@pytest.mark.parametrize("focus_mm", [2000, math.inf])
def test_one_focus_makes_a_normal_lens_of_it(focus_mm: float) -> None:
    lens = newton(store([700, 20000], [focus_mm], fnum=None))
    assert lens.f2_mm2 == pytest.approx(36**2 + 24**2)
    assert lens.gain == pytest.approx(1 / (4 * HALF_WINDOW_MM))
    assert lens.defocus(1000 / 700, 1000 / focus_mm) < 0


def test_focus_distances_that_hardly_differ_make_no_pole() -> None:
    noisy = store([100, 20000], [1000, 1000.001, 1000.002, 1000.003])
    noisy.attrs["sensor_z_mm"] = {"1000": 70.0, "1000.001": 70.01, "1000.002": 69.99, "1000.003": 70.02}
    blur = newton(noisy).defocus(np.linspace(0.05, 10, 200), 1.0)
    assert np.isfinite(blur).all()
    assert (np.diff(blur) <= 0).all()
