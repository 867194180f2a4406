"""Tracers: bundles of rays into deposits, the same by every tracer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, tracer
from numpy.typing import NDArray

from psfgen.config import Move
from psfgen.grid import pupil_seed
from psfgen.optics import pupil
from psfgen.optics.lens import Lens
from psfgen.optics.trace import TRACERS, Bundles

WAVES = (0.48, 0.5876, 0.65)
FIELD = torch.tensor([[0.0, 0.0], [0.4, -0.5], [0.9, 0.8]], dtype=torch.float64)
KERNEL_PX = 24


@dataclass(frozen=True)
class Deposited:
    halves: NDArray[np.float32]
    passed: NDArray[np.int64]


def bundles(of: Lens, depth_mm: float) -> Bundles:
    """Every field point in every colour, at one, two or three focus distances; slots out of order."""
    slopes, inverse_mm = pupil.beam(of, pupil.field_slopes(of, of.field_max * FIELD), depth_mm)
    centre, axes = pupil.launch_areas(of, tracer(of), of.field_max * FIELD, depth_mm)
    chief = pupil.chief_rays(of, tracer(of), of.field_max * FIELD, depth_mm)
    points, waves = (v.ravel() for v in np.indices((len(FIELD), len(WAVES))))
    targets = 1 + waves
    design = lens(of.name)
    z_mm = np.array([pupil.sensor_z_mm(design, tracer(design), focus) for focus in (1500.0, 3000.0, math.inf)])
    owner = np.repeat(points, targets)
    which = np.concatenate([np.arange(n) for n in targets])
    landed = torch.stack([-chief.at(float(z)) for z in z_mm], 1).numpy()
    angle = 0.7 * np.arange(len(owner))
    return Bundles(
        wave=waves,
        slope=slopes.numpy()[points],
        inverse_mm=inverse_mm,
        centre_mm=centre[points],
        axes_mm=axes[points],
        first=np.concatenate([[0], np.cumsum(targets)]),
        sensor_z_mm=z_mm[which],
        chief_mm=landed[owner, which],
        turn=np.stack([np.cos(angle), np.sin(angle)], -1),
        slot=np.random.default_rng(0).permutation(len(owner)),
    )


def shoot(of: Lens, by: str, count: int) -> Deposited:
    made = bundles(of, 2000.0)
    at = tracer(of, by, WAVES)
    halves = np.full((len(made.slot), 2, KERNEL_PX, KERNEL_PX), np.nan, np.float32)
    points = at.points(pupil.spiral(count, pupil_seed(0, "grid")[1]))
    pitch_mm = 3 * of.pitch_um / 1000
    passed, weight = at.deposit(made, points, pitch_mm, halves)
    np.testing.assert_allclose(weight, halves[made.slot].sum((-3, -2, -1), dtype=float), rtol=1e-5, atol=1e-5)
    return Deposited(halves, passed)


def rel_l2(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))
    return found


AS_BUILT = (Move(element=0, decentre_mm=(0.03, -0.02), tilt_deg=(0.2, 0.1)),)


@pytest.mark.parametrize("moves", [(), AS_BUILT], ids=["design", "as built"])
@pytest.mark.parametrize("name", ["acl12708u", "double_gauss", "phone", "singlet", "triplet"])
def test_tracers_make_the_same_kernels(name: str, moves: tuple[Move, ...]) -> None:
    """Half by half, to what single precision leaves; the float64 rays of DeepLens among them."""
    of = lens(name).as_built(moves)
    made = {by: shoot(of, by, 2**13) for by in TRACERS}
    for by in ("torch", "deeplens"):
        # A ray within single precision of a rim passes for one tracer and not for another.
        assert np.abs(made[by].passed - made["numba"].passed).max() <= 2
        sums, theirs = (made[b].halves.sum((-2, -1), dtype=np.float64) for b in ("numba", by))
        assert np.abs(sums - theirs).max() <= 2 + 1e-5 * 2**12
        assert rel_l2(made["numba"].halves, made[by].halves).max() < 2e-3


@pytest.mark.parametrize("name", ["acl12708u", "double_gauss"])
def test_more_rays_bring_the_tracers_together(name: str) -> None:
    of = lens(name)
    numba, torch_ = (shoot(of, by, 2**16) for by in ("numba", "torch"))
    assert np.abs(numba.passed - torch_.passed).max() <= 2
    both = [made.halves.sum(1, dtype=np.float64) for made in (numba, torch_)]
    assert rel_l2(*both).max() < 1e-4


@pytest.mark.parametrize("count", [1, 2, 63, 65, 777, 1024, 1025, 2111])
def test_any_number_of_rays_will_do(count: int) -> None:
    """Odd counts, blocks and chunks filled in part: every ray is deposited once, on its own half."""
    of = lens("triplet")
    numba, torch_ = (shoot(of, by, count) for by in ("numba", "torch"))
    assert np.array_equal(numba.passed, torch_.passed)
    assert (numba.passed[:2] == count).all(), "nothing stops a ray on the axis"
    np.testing.assert_allclose(numba.halves, torch_.halves, atol=2e-3 * max(1, count / 100))
    on_axis = bundles(of, 2000.0).slot[:1]
    assert numba.halves[on_axis].sum((-2, -1)) == pytest.approx(np.array([[-(-count // 2), count // 2]]), rel=1e-5)


@pytest.mark.parametrize("by", TRACERS)
def test_a_bundle_does_not_see_its_neighbours(by: str) -> None:
    """Slots no target names stay as they are, and a bundle alone gives what it gives among others."""
    of = lens("double_gauss")
    made, whole, at = bundles(of, 2000.0), shoot(of, by, 500), tracer(of, by, WAVES)
    j = 4
    mine = slice(made.first[j], made.first[j + 1])
    alone = Bundles(
        wave=made.wave[j : j + 1],
        slope=made.slope[j : j + 1],
        inverse_mm=made.inverse_mm,
        centre_mm=made.centre_mm[j : j + 1],
        axes_mm=made.axes_mm[j : j + 1],
        first=np.array([0, mine.stop - mine.start]),
        sensor_z_mm=made.sensor_z_mm[mine],
        chief_mm=made.chief_mm[mine],
        turn=made.turn[mine],
        slot=made.slot[mine],
    )
    halves = np.full_like(whole.halves, -1)
    points = at.points(pupil.spiral(500, pupil_seed(0, "grid")[1]))
    passed, _ = at.deposit(alone, points, 3 * of.pitch_um / 1000, halves)
    assert passed.tolist() == [whole.passed[j]]
    others = np.setdiff1d(made.slot, alone.slot)
    assert (halves[others] == -1).all()
    np.testing.assert_allclose(halves[alone.slot], whole.halves[alone.slot], atol=5e-3)
    if by == "numba":
        assert np.array_equal(halves[alone.slot], whole.halves[alone.slot])


def test_the_same_rays_make_the_same_bits() -> None:
    """Wherever the arrays happen to lie in memory."""
    of, rng = lens("triplet"), np.random.default_rng(1)
    first = shoot(of, "numba", 1000)
    for _ in range(40):
        junk = [np.empty(rng.integers(1, 30000), np.uint8) for _ in range(20)]
        del junk[::2]
        assert np.array_equal(shoot(of, "numba", 1000).halves, first.halves)


def test_points_beyond_the_pupil_are_not_launched() -> None:
    """A bundle of twice the pupil's size counts the quarter of its rays that the pupil holds."""
    of = lens("singlet")
    slopes, inverse_mm = pupil.beam(of, torch.zeros(1, 2, dtype=torch.float64), 2000.0)
    made = Bundles(
        wave=np.array([1]),
        slope=slopes.numpy(),
        inverse_mm=inverse_mm,
        centre_mm=np.zeros((1, 2)),
        axes_mm=2 * of.pupil_r_mm * np.eye(2)[None],
        first=np.array([0, 1]),
        sensor_z_mm=np.array([100.0]),
        chief_mm=np.zeros((1, 2)),
        turn=np.array([[1.0, 0.0]]),
        slot=np.array([0]),
    )
    for by in TRACERS:
        at, halves = tracer(of, by, WAVES), np.empty((1, 2, 16, 16), np.float32)
        passed, _ = at.deposit(made, at.points(pupil.spiral(4096)), 0.5, halves)
        assert passed[0] == pytest.approx(1024, abs=2)
