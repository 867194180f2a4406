"""Where rays start: pupil points, aiming, the chief ray, the sensor position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, variant

from psfgen import catalogue
from psfgen.errors import LensError
from psfgen.grid import pupil_shift
from psfgen.optics import pupil
from psfgen.optics.lens import Lens

FIELD = torch.tensor([[0.0, 0.0], [0.3, -0.7], [1.0, 1.0], [-0.9, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize("shift", [(0.0, 0.5), pupil_shift(0, "grid"), pupil_shift(3, "random")])
def test_the_spiral_covers_the_disc_uniformly(shift: tuple[float, float]) -> None:
    """Against the disc's moments and its area within rings and sectors."""
    x, y = pupil.spiral(4096, *shift).numpy().T
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
    expected = FIELD * torch.tensor([width, height]) / 2 / triplet.efl_mm * depth_mm
    torch.testing.assert_close(o[:, 0, :2], expected)
    assert (o[..., 2] == -depth_mm).all()
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(4, 20, dtype=torch.float64))
    t = (triplet.pupil_z_mm + depth_mm) / d[..., 2:]
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
    near, far = (pupil.chief_rays(triplet, FIELD, depth).at(50.0) for depth in (1e9, math.inf))
    assert 1000 * float((near - far).abs().max()) < 1e-2


def backward_to_stop_mm(of: Lens, exits: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Where rays that left the last surface came through the stop, by DeepLens's own backward trace."""
    from deeplens.light import Ray

    ray = Ray(exits + directions, -directions, of.reference_um)
    behind = range(of.stop_index, len(of.geo.surfaces))
    with torch.no_grad():
        ray, _ = of.unclipped.trace(ray, surf_range=behind)
    return ray.o


@pytest.mark.parametrize("depth_mm", [500.0, math.inf])
@pytest.mark.parametrize("name", catalogue.names())
def test_the_chief_ray_passes_the_centre_of_the_stop(name: str, depth_mm: float) -> None:
    of = lens(name)
    chief = pupil.chief_rays(of, of.field_max * FIELD, depth_mm)
    assert chief.valid.all(), "rims must not stop a chief ray"
    at_stop = backward_to_stop_mm(of, chief.o, chief.d)
    stop_z = sum(float(surface.d_next) for surface in of.geo.surfaces[: of.stop_index])
    assert float((at_stop[:, 2] - stop_z).abs().max()) < 1e-9
    assert float(at_stop[:, :2].norm(dim=-1).max()) < 1e-6


def test_the_chief_ray_follows_a_decentred_stop(tmp_path: Path) -> None:
    """Solved in both directions: the stop is moved sideways, and a lens behind it too."""

    def push(document: dict[str, Any]) -> None:
        document["surfaces"][4]["pos_xy"] = [0.5, -0.3]
        document["surfaces"][1]["pos_xy"] = [-0.2, 0.4]

    pushed = Lens(str(variant(tmp_path, "triplet", push)))
    chief = pupil.chief_rays(pushed, 0.7 * FIELD, 1000.0)
    at_stop = backward_to_stop_mm(pushed, chief.o, chief.d)[:, :2]
    torch.testing.assert_close(at_stop, torch.tensor([0.5, -0.3]).to(at_stop).expand(4, 2), atol=1e-6, rtol=0)


def test_the_chief_ray_is_finite_where_the_rims_cut_it() -> None:
    """Beyond the singlet's edge no ray passes, yet the chief ray lands where the stop sends it."""
    singlet = lens("singlet")
    corner = torch.tensor([[1.3, 1.3]], dtype=torch.float64)
    o, d = pupil.aim(singlet, corner[:, None], 3000.0, singlet.pupil_r_mm * pupil.spiral(1000))
    assert not singlet.trace(o, d, singlet.reference_um).valid.any()
    chief = pupil.chief_rays(singlet, corner, 3000.0)
    assert chief.valid.all()
    assert torch.isfinite(chief.at(52.0)).all()


@pytest.mark.parametrize("focus_mm", [200.0, 1000.0, 20000.0, math.inf])
def test_the_sensor_of_an_ideal_lens_is_where_the_lens_equation_says(thin_lens: str, focus_mm: float) -> None:
    assert pupil.sensor_z_mm(lens(thin_lens), focus_mm) == pytest.approx(1 / (1 / 50 - 1 / focus_mm), rel=1e-12)


@pytest.mark.parametrize("name", ["triplet", "acl12708u"])
def test_the_sensor_is_where_deeplens_refocuses_to_on_average(name: str) -> None:
    """DeepLens averages over 1024 random rays; many draws of it scatter about our position."""
    of = Lens(name)
    torch.manual_seed(0)
    draws = np.array([float(of.geo.calc_sensor_plane(depth=-2000.0)) for _ in range(60)])
    error = draws.mean() - pupil.sensor_z_mm(of, 2000.0)
    assert draws.std() > 1e-4, "nothing to average"
    assert abs(error) < 4 * draws.std() / math.sqrt(len(draws))


@pytest.mark.parametrize(
    ("name", "focus_mm"), [("triplet", 20.0), ("phone", 3.0), ("acl12708u", 6.0), ("acl12708u", 5.0)]
)
def test_a_focus_without_a_real_image_is_refused(name: str, focus_mm: float) -> None:
    with pytest.raises(LensError, match=f"focus {focus_mm:g} mm: .*forms no real image.*larger --focus"):
        pupil.sensor_z_mm(lens(name), focus_mm)
