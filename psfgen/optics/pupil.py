"""Where rays start: deterministic pupil points, aiming, the chief ray, the sensor position. float64, mm.

Legend: P field points, N pupil points.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.errors import LensError
from psfgen.optics.blocks import jit
from psfgen.optics.lens import LAUNCH_Z_MM, Lens, Rays
from psfgen.optics.trace import Tracer

GOLDEN_TURN = (math.sqrt(5) - 1) / 2
FOCUS_RAYS = 4096
CHIEF_STEPS = 20
CHIEF_TOLERANCE_MM = 1e-10
COARSE_RAYS = 500  # of a look at which part of the pupil is open
OPEN_ENOUGH = 0.9  # share of the disc that must be open for the disc to be used as it is
PARAXIAL = 1e-3  # of the field
FEWEST_OPEN = 8  # open rays of that look that tell a shape
COARSE_STEP = math.sqrt(math.pi / COARSE_RAYS)  # spacing of those rays, in radii of the disc


def spiral(count: int, turn: float = 0.0) -> Tensor:
    """`count` points [N, 2] of a Fibonacci spiral over the unit disc, uniform in area.

    Point i lies at radius sqrt((i + 1/2) / count) and at angle i golden turns + `turn` (radians). Vogel, "A better way
    to construct the sunflower head", Mathematical Biosciences 44 (1979).
    """
    i = torch.arange(count, dtype=torch.float64)
    r = torch.sqrt((i + 0.5) / count)
    angle = 2 * math.pi * ((i * GOLDEN_TURN) % 1) + turn
    return torch.stack([r * torch.cos(angle), r * torch.sin(angle)], dim=-1)


def sobol(count: int, seed: int) -> Tensor:
    """`count` points [N, 2], a power of two, of two scrambled Sobol sets over the unit disc, taken in turn.

    The even and the odd points are sets of their own, so that their difference tells the error.
    """
    sets = []
    for half in range(2):
        engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=2 * seed + half)  # type: ignore[no-untyped-call]
        sets.append(engine.draw(count // 2, dtype=torch.float64))
    area, turn = torch.stack(sets, 1).reshape(count, 2).unbind(-1)
    r, angle = torch.sqrt(area), 2 * math.pi * turn
    return torch.stack([r * torch.cos(angle), r * torch.sin(angle)], dim=-1)


def field_slopes(lens: Lens, field_xy: Tensor) -> Tensor:
    """Tangents [P, 2] of the field angles of `field_xy` [P, 2]: field x half side / EFL."""
    half = torch.tensor(lens.sensor_mm, dtype=torch.float64) / 2
    return field_xy * half / lens.efl_mm


def beam(lens: Lens, slopes: Tensor, depth_mm: float) -> tuple[Tensor, float]:
    """(slope, inverse_mm): the ray through the point p of the pupil plane has the tangents p * inverse_mm - slope.

    `slopes` [..., 2] are those of `field_slopes`; `depth_mm` may be inf.
    """
    if math.isinf(depth_mm):
        return slopes, 0.0
    inverse_mm = 1 / (lens.pupil_z_mm + depth_mm)
    return slopes * depth_mm * inverse_mm, inverse_mm


def aim(lens: Lens, field_xy: Tensor, depth_mm: float, pupil_xy: Tensor) -> tuple[Tensor, Tensor]:
    """Rays (o, d) from field points [..., 2] through points [..., 2] of the entrance pupil plane, in mm.

    `depth_mm` may be inf; the beam is then collimated. The shapes broadcast.
    """
    slope, inverse_mm = beam(lens, field_slopes(lens, field_xy), depth_mm)
    tangents = pupil_xy * inverse_mm - slope
    xy = pupil_xy + tangents * (LAUNCH_Z_MM - lens.pupil_z_mm)
    o = torch.cat([xy, torch.full_like(xy[..., :1], LAUNCH_Z_MM)], dim=-1)
    d = torch.cat([tangents, torch.ones_like(xy[..., :1])], dim=-1)
    return o.to(lens.device), (d / d.norm(dim=-1, keepdim=True)).to(lens.device)


def chief_rays(lens: Lens, tracer: Tracer, field_xy: Tensor, depth_mm: float) -> Rays:
    """The rays [P] at `reference_um` from the field points [P, 2] through the centre of the stop as placed.

    Solved by Newton steps in both directions, so that tilted and decentred lenses are covered; rims are
    ignored. `valid` is False where no ray reaches the stop's centre.
    """
    target = torch.tensor(lens.stop_xy, dtype=torch.float64, device=lens.device)
    step_mm = 1e-4 * lens.pupil_r_mm
    probes = step_mm * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    pupil_xy = torch.zeros_like(field_xy)

    def miss(pupil_xy: Tensor) -> Tensor:
        o, d = aim(lens, field_xy[:, None], depth_mm, pupil_xy[:, None] + probes)
        rays = tracer.trace(o, d, lens.reference_um, clip=False, to_stop=True)
        xy = rays.o[..., :2] - target
        return torch.where(rays.valid[..., None], xy, math.nan).cpu()

    for _ in range(CHIEF_STEPS):
        found = miss(pupil_xy)
        error = found[:, 0]
        moving = error.norm(dim=-1) > CHIEF_TOLERANCE_MM  # nan counts as settled: it cannot be mended
        if not moving.any():
            break
        jacobian = (found[:, 1:] - found[:, :1]).transpose(1, 2) / step_mm
        step = torch.linalg.solve_ex(jacobian, error[..., None]).result[..., 0]
        # A point that has settled stays, whatever others are solved beside it.
        pupil_xy = torch.where(torch.isfinite(step) & moving[:, None], pupil_xy - step, pupil_xy)
    rays = tracer.trace(*aim(lens, field_xy, depth_mm, pupil_xy), lens.reference_um, clip=False)
    settled = miss(pupil_xy)[:, 0].norm(dim=-1) < 1e-6
    return Rays(rays.o, rays.d, rays.valid & settled.to(lens.device))


def exit_pupil_z_mm(lens: Lens, tracer: Tracer) -> float:
    """Where the exit pupil is: where chief rays that are nearly the axis, behind the lens, cross each other.

    It may be far away, on either side.
    """
    field_xy = PARAXIAL * torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    rays = chief_rays(lens, tracer, field_xy, math.inf)
    apart, closing = rays.at(lens.last_vertex_mm).diff(dim=0)[0], (rays.d[:, :2] / rays.d[:, 2:]).diff(dim=0)[0]
    return lens.last_vertex_mm - float((apart * closing).sum() / (closing**2).sum().clamp(min=1e-18))


def launch_areas(
    lens: Lens, tracer: Tracer, field_xy: Tensor, depth_mm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What of the entrance pupil is worth launching at: centres [P, 2] and axes [P, 2, 2] of ellipses, in mm.

    The whole disc where most of it is open at `reference_um`; else an ellipse about its open part. A coarse look
    finds that part, a second one at an ellipse about it draws the edge. Points of the ellipse outside the disc are
    not launched at.
    """
    disc, unit = lens.pupil_r_mm, spiral(COARSE_RAYS)

    def look(field_xy: Tensor, pupil_xy: Tensor) -> NDArray[np.bool_]:
        rays = tracer.trace(*aim(lens, field_xy[:, None], depth_mm, pupil_xy), lens.reference_um)
        return rays.valid.cpu().numpy()

    centres, axes = np.zeros((len(field_xy), 2)), np.tile(np.eye(2), (len(field_xy), 1, 1))
    _ellipses(look(field_xy, disc * unit), unit.numpy(), OPEN_ENOUGH, COARSE_STEP, centres, axes)
    part = np.flatnonzero((axes != np.eye(2)).any((1, 2)))
    if len(part):
        # Term by term: what a matrix product rounds to depends on how many points there are.
        x, y = (
            centres[part, i, None] + axes[part, i, :1] * unit.numpy()[:, 0] + axes[part, i, 1:] * unit.numpy()[:, 1]
            for i in range(2)
        )
        inner = np.zeros((len(part), 2)), np.tile(np.eye(2), (len(part), 1, 1))
        open_PN = look(field_xy[part], disc * torch.from_numpy(np.stack([x, y], -1))) & (x**2 + y**2 <= 1)
        _ellipses(open_PN, unit.numpy(), math.inf, COARSE_STEP / 2, *inner)
        centres[part] += (axes[part] * inner[0][:, None]).sum(-1)
        axes[part] = (axes[part][:, :, None] * inner[1].swapaxes(1, 2)[:, None]).sum(-1)
        wide = np.abs(axes[:, 0, 0] * axes[:, 1, 1] - axes[:, 0, 1] * axes[:, 1, 0]) >= 1
        centres[wide], axes[wide] = 0, np.eye(2)
    return disc * centres, disc * axes


@jit
def _ellipses(open_PN, unit, enough, margin, centres, axes):  # type: ignore[no-untyped-def]
    """Put an ellipse about the open ones of the points `unit` [N, 2], where few enough are open.

    It has the shape of the covariance and reaches to the farthest open point, and a margin more.
    """
    for p in range(len(open_PN)):
        count, x, y, xx, xy, yy = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        for n in range(len(unit)):
            if open_PN[p, n]:
                u, v = unit[n, 0], unit[n, 1]
                count, x, y = count + 1, x + u, y + v
                xx, xy, yy = xx + u * u, xy + u * v, yy + v * v
        if count < FEWEST_OPEN or count >= enough * len(unit):
            continue
        x, y = x / count, y / count
        xx, xy, yy = xx / count - x * x, xy / count - x * y, yy / count - y * y
        # The axes of the covariance: turned by `angle`, of variances `major` and `minor`.
        angle = 0.5 * np.arctan2(2 * xy, xx - yy)
        half, least = np.hypot(0.5 * (xx - yy), xy), COARSE_STEP**2 / 12
        major, minor = max(0.5 * (xx + yy) + half, least), max(0.5 * (xx + yy) - half, least)
        cos, sin = np.cos(angle), np.sin(angle)
        reach2 = 0.0
        for n in range(len(unit)):
            if open_PN[p, n]:
                u, v = unit[n, 0] - x, unit[n, 1] - y
                reach2 = max(reach2, (cos * u + sin * v) ** 2 / major + (cos * v - sin * u) ** 2 / minor)
        long, short = np.sqrt(major * reach2) + margin, np.sqrt(minor * reach2) + margin
        centres[p, 0], centres[p, 1] = x, y
        axes[p, 0, 0], axes[p, 0, 1] = cos * long, -sin * short
        axes[p, 1, 0], axes[p, 1, 1] = sin * long, cos * short


def sensor_z_mm(lens: Lens, tracer: Tracer, focus_mm: float) -> float:
    """Sensor position in focus for an axial point at `focus_mm`.

    The mean of where opposite rays, uniform over the pupil's area and at `reference_um`, meet. In a symmetric lens
    that is where they cross the axis: what DeepLens's `refocus` estimates from random rays; in a lens as built, whose
    image lies beside the axis, coma cancels in each pair. Raises LensError where they do not meet behind the lens.
    """
    pupil_xy = lens.pupil_r_mm * torch.stack([spiral(FOCUS_RAYS), -spiral(FOCUS_RAYS)])
    rays = tracer.trace(*aim(lens, torch.zeros(2, dtype=torch.float64), focus_mm, pupil_xy), lens.reference_um)
    both = rays.valid.all(0)
    if not both.any():
        raise LensError(f"focus {focus_mm:g} mm: no rays from the axis at that distance pass lens {lens.name}")
    slopes = (rays.d[..., :2] / rays.d[..., 2:])[:, both]
    xy = rays.at(lens.last_vertex_mm)[:, both]
    apart, closing = xy[0] - xy[1], slopes[0] - slopes[1]
    behind_mm = -(apart * closing).sum(-1) / (closing**2).sum(-1)
    z = lens.last_vertex_mm + float(behind_mm.mean())
    if not math.isfinite(z) or z <= lens.last_vertex_mm or bool((behind_mm <= 0).any()):
        raise LensError(
            f"focus {focus_mm:g} mm: lens {lens.name} (EFL {lens.efl_mm:.3g} mm) forms no real image of it; "
            "choose a larger --focus"
        )
    return z
