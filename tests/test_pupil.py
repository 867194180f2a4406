"""Where rays start: pupil points, aiming, the chief ray, the sensor position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, tracer, variant

from psfgen import catalogue
from psfgen.config import Move
from psfgen.errors import LensError
from psfgen.grid import pupil_seed
from psfgen.optics import pupil
from psfgen.optics.lens import LAUNCH_Z_MM, Lens, Rays
from psfgen.optics.trace import TRACERS

FIELD = torch.tensor([[0.0, 0.0], [0.3, -0.7], [1.0, 1.0], [-0.9, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize("turn", [0.0, pupil_seed(0, "grid")[1], pupil_seed(3, "random")[1]])
def test_the_spiral_covers_the_disc_uniformly(turn: float) -> None:
    """Against the disc's moments and its area within rings and sectors."""
    x, y = pupil.spiral(4096, turn).numpy().T
    r2, angle = x**2 + y**2, np.arctan2(y, x)
    assert r2.max() < 1
    assert np.abs([x.mean(), y.mean(), (x * y).mean()]).max() < 1e-3
    assert [(x**2).mean(), (y**2).mean(), (r2**2).mean()] == pytest.approx([1 / 4, 1 / 4, 1 / 3], abs=1e-3)
    assert np.histogram(r2, 8, (0, 1))[0] == pytest.approx([512] * 8, abs=2)
    assert np.histogram(angle, 12, (-math.pi, math.pi))[0] == pytest.approx([4096 / 12] * 12, abs=12)


@pytest.mark.parametrize("depth_mm", [300.0, 20000.0])
def test_rays_leave_the_object_point_and_aim_at_the_pupil(depth_mm: float) -> None:
    """The object point is the pinhole's: image side / EFL times distance, upright."""
    triplet, points = lens("triplet"), 5.0 * pupil.spiral(20)
    o, d = pupil.aim(triplet, FIELD[:, None], depth_mm, points)
    assert o.shape == d.shape == (4, 20, 3)
    width, height = triplet.sensor_mm
    expected = FIELD * torch.tensor([width, height], dtype=torch.float64) / 2 / triplet.efl_mm * depth_mm
    left = o + d * ((-depth_mm - o[..., 2:]) / d[..., 2:])
    torch.testing.assert_close(left[..., :2], expected[:, None].expand(4, 20, 2), rtol=1e-9, atol=1e-8)
    assert (o[..., 2] == LAUNCH_Z_MM).all(), "in front of every surface, whatever the depth"
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(4, 20, dtype=torch.float64))
    t = (triplet.pupil_z_mm - LAUNCH_Z_MM) / d[..., 2:]
    torch.testing.assert_close((o + d * t)[..., :2], points.expand(4, 20, 2))


def test_an_infinite_object_is_a_parallel_beam() -> None:
    triplet, points = lens("triplet"), 5.0 * pupil.spiral(20)
    o, d = pupil.aim(triplet, FIELD[:, None], math.inf, points)
    width, height = triplet.sensor_mm
    slopes = -FIELD * torch.tensor([width, height]) / 2 / triplet.efl_mm
    torch.testing.assert_close(d[..., :2] / d[..., 2:], slopes[:, None].expand(4, 20, 2))
    torch.testing.assert_close(
        (o + d * ((triplet.pupil_z_mm - o[..., 2:]) / d[..., 2:]))[..., :2], points.expand(4, 20, 2)
    )


def test_a_far_object_tends_to_infinity() -> None:
    triplet = lens("triplet")
    near, far = (pupil.chief_rays(triplet, tracer(triplet), FIELD, depth).at(50.0) for depth in (1e9, math.inf))
    assert 1000 * float((near - far).abs().max()) < 1e-2


def backward_to_stop_mm(of: Lens, exits: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Where rays that left the last surface came through the stop, by DeepLens's own backward trace."""
    from deeplens.light import Ray

    ray = Ray(exits + directions, -directions, of.reference_um)
    behind = range(of.stop_index, len(of.geo.surfaces))
    with torch.no_grad():
        ray, _ = of.unclipped.trace(ray, surf_range=behind)
    return ray.o


@pytest.mark.parametrize("by", TRACERS)
@pytest.mark.parametrize("depth_mm", [500.0, math.inf])
@pytest.mark.parametrize("name", catalogue.names())
def test_the_chief_ray_passes_the_centre_of_the_stop(name: str, depth_mm: float, by: str) -> None:
    of = lens(name)
    chief = pupil.chief_rays(of, tracer(of, by), of.field_max * FIELD, depth_mm)
    assert chief.valid.all(), "rims must not stop a chief ray"
    at_stop = backward_to_stop_mm(of, chief.o, chief.d)
    stop_z = sum(float(surface.d_next) for surface in of.geo.surfaces[: of.stop_index])
    assert float((at_stop[:, 2] - stop_z).abs().max()) < 1e-9
    assert float(at_stop[:, :2].norm(dim=-1).max()) < 1e-6


@pytest.mark.parametrize("by", TRACERS)
def test_the_chief_ray_follows_a_decentred_stop(tmp_path: Path, by: str) -> None:
    """Solved in both directions: the stop is moved sideways, and a lens behind it too."""

    def push(document: dict[str, Any]) -> None:
        document["surfaces"][4]["pos_xy"] = [0.5, -0.3]
        document["surfaces"][1]["pos_xy"] = [-0.2, 0.4]

    pushed = Lens(str(variant(tmp_path, "triplet", push)))
    chief = pupil.chief_rays(pushed, tracer(pushed, by), 0.7 * FIELD, 1000.0)
    at_stop = backward_to_stop_mm(pushed, chief.o, chief.d)[:, :2]
    torch.testing.assert_close(at_stop, torch.tensor([0.5, -0.3]).to(at_stop).expand(4, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("by", TRACERS)
def test_the_chief_ray_is_finite_where_the_rims_cut_it(by: str) -> None:
    """Beyond the singlet's edge no ray passes, yet the chief ray lands where the stop sends it."""
    singlet = lens("singlet")
    corner = torch.tensor([[1.3, 1.3]], dtype=torch.float64)
    o, d = pupil.aim(singlet, corner[:, None], 3000.0, singlet.pupil_r_mm * pupil.spiral(1000))
    assert not tracer(singlet, by).trace(o, d, singlet.reference_um).valid.any()
    chief = pupil.chief_rays(singlet, tracer(singlet, by), corner, 3000.0)
    assert chief.valid.all()
    assert torch.isfinite(chief.at(52.0)).all()


@pytest.mark.parametrize("by", TRACERS)
@pytest.mark.parametrize("focus_mm", [200.0, 1000.0, 20000.0, math.inf])
def test_the_sensor_of_an_ideal_lens_is_where_the_lens_equation_says(thin_lens: str, focus_mm: float, by: str) -> None:
    of = lens(thin_lens)
    assert pupil.sensor_z_mm(of, tracer(of, by), focus_mm) == pytest.approx(1 / (1 / 50 - 1 / focus_mm), rel=1e-12)


@pytest.mark.parametrize("by", TRACERS)
@pytest.mark.parametrize("name", catalogue.names())
def test_every_tracer_puts_the_sensor_where_deeplens_rays_cross_the_axis(name: str, by: str) -> None:
    of = lens(name)
    expected = pupil.sensor_z_mm(of, tracer(of, "deeplens"), 2000.0)
    assert pupil.sensor_z_mm(of, tracer(of, by), 2000.0) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", ["triplet", "acl12708u"])
def test_the_sensor_is_where_deeplens_refocuses_to_on_average(name: str) -> None:
    """DeepLens averages over 1024 random rays; many draws of it scatter about our position."""
    of = Lens(name)
    torch.manual_seed(0)
    draws = np.array([float(of.geo.calc_sensor_plane(depth=-2000.0)) for _ in range(60)])
    error = draws.mean() - pupil.sensor_z_mm(of, tracer(of), 2000.0)
    assert draws.std() > 1e-4, "nothing to average"
    assert abs(error) < 4 * draws.std() / math.sqrt(len(draws))


@pytest.mark.parametrize(
    ("name", "focus_mm"), [("triplet", 20.0), ("phone", 3.0), ("acl12708u", 6.0), ("acl12708u", 5.0)]
)
@pytest.mark.parametrize("by", TRACERS)
def test_a_focus_without_a_real_image_is_refused(name: str, focus_mm: float, by: str) -> None:
    with pytest.raises(LensError, match=f"focus {focus_mm:g} mm: .*forms no real image.*larger --focus"):
        pupil.sensor_z_mm(lens(name), tracer(lens(name), by), focus_mm)


@pytest.mark.parametrize("count", [2, 64, 4096])
def test_sobol_points_are_two_uniform_sets_taken_in_turn(count: int) -> None:
    """Each half alone has one point in each of equally large cells, which two halves of one set need not have."""
    points = pupil.sobol(count, 5).numpy()
    assert points.shape == (count, 2)
    assert np.hypot(*points.T).max() <= 1
    for half in (points[::2], points[1::2]):
        area, turn = (half**2).sum(-1), np.arctan2(half[:, 1], half[:, 0]) / (2 * math.pi) % 1
        for rings, sectors in ((count // 2, 1), (1, count // 2)):
            cells = np.histogram2d(area, turn, (rings, sectors), ((0, 1), (0, 1)))[0]
            assert (cells == 1).all()
    assert not np.isclose(points[::2], points[1::2]).any(), "the halves are sets of their own"


def test_sobol_points_are_seeded() -> None:
    assert torch.equal(pupil.sobol(256, 3), pupil.sobol(256, 3))
    for other in (pupil.sobol(256, 4), pupil.sobol(256, 3).flip(0)):
        assert not torch.isclose(pupil.sobol(256, 3), other).any()
    both = torch.cat([pupil.sobol(256, seed) for seed in range(6)])
    assert len(torch.unique(both, dim=0)) == len(both), "no seed shares a set with another"


def open_part(of: Lens, field: torch.Tensor, depth_mm: float, points: torch.Tensor) -> torch.Tensor:
    """Which of the points [N, 2] of the pupil plane, in mm, pass at `reference_um`."""
    return tracer(of).trace(*pupil.aim(of, field, depth_mm, points), of.reference_um).valid


CORNERS = torch.tensor([[1.0, 1.0], [-0.8, 0.9], [0.0, 1.0], [0.7, -0.2], [0.1, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("depth_mm", [1000.0, math.inf])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", ["double_gauss", "singlet", "triplet"])
def test_rays_are_launched_at_the_open_part_of_the_pupil(name: str, depth_mm: float, moved: bool) -> None:
    """Against a fine look at the whole pupil: at most 0.05 % of the open rays lie beyond the ellipse.

    Of a sliver, which the coarse look knows by some tens of rays, it may miss the tips.
    """
    of = lens(name).as_built((Move(element=0, decentre_mm=(0.3, -0.2)),) if moved else ())
    field = of.field_max * CORNERS
    centres, axes = pupil.launch_areas(of, tracer(of), field, depth_mm)
    disc = of.pupil_r_mm * pupil.spiral(2**15)
    for xy, centre, shape in zip(field, centres, axes, strict=True):
        passes = open_part(of, xy, depth_mm, disc)
        inside = torch.linalg.solve(torch.from_numpy(shape), (disc - torch.from_numpy(centre)).T).norm(dim=0) <= 1
        is_disc = np.array_equal(shape, of.pupil_r_mm * np.eye(2))
        share = float(passes.double().mean())
        assert int((passes & ~inside).sum()) <= (0.01 if share < 0.06 else 5e-4) * int(passes.sum())
        assert is_disc == (share >= pupil.OPEN_ENOUGH)
        assert is_disc or float(passes[inside].double().mean()) > min(1.2 * share, 0.75)


def test_an_ellipse_lifts_the_open_share_of_a_vignetted_corner() -> None:
    """The double Gauss opens 0.40 of the disc there, and more than 0.8 of the ellipse."""
    of, corner = lens("double_gauss"), CORNERS[:1]
    centre, axes = (torch.from_numpy(v[0]) for v in pupil.launch_areas(of, tracer(of), corner, math.inf))
    unit = pupil.spiral(2**14)
    assert float(open_part(of, corner, math.inf, of.pupil_r_mm * unit).double().mean()) < 0.45
    assert float(open_part(of, corner, math.inf, unit @ axes.T + centre).double().mean()) > 0.8


def test_where_nothing_passes_the_disc_stays() -> None:
    of = lens("singlet")
    centres, axes = pupil.launch_areas(of, tracer(of), torch.tensor([[1.3, 1.3]], dtype=torch.float64), 3000.0)
    assert np.array_equal(centres, np.zeros((1, 2)))
    assert np.array_equal(axes[0], of.pupil_r_mm * np.eye(2))


def test_an_ellipse_no_smaller_than_the_disc_is_not_worth_it() -> None:
    """A pupil with its middle stopped is open all the way round."""

    class Stopped:
        def trace(self, o: torch.Tensor, d: torch.Tensor, wavelength_um: float) -> Rays:
            at = o[..., :2] + d[..., :2] / d[..., 2:] * (of.pupil_z_mm - o[..., 2:])
            return Rays(o, d, at.norm(dim=-1) > 0.5 * of.pupil_r_mm)

    of, stopped = lens("triplet"), Stopped()
    _, axes = pupil.launch_areas(of, stopped, CORNERS, math.inf)  # type: ignore[arg-type]
    assert np.array_equal(axes, np.tile(of.pupil_r_mm * np.eye(2), (len(CORNERS), 1, 1)))
