"""Where rays start: deterministic pupil points, aiming, the chief ray, the sensor position. float64, mm.

Legend: P field points, N pupil points.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from psfgen.errors import LensError, RenderError
from psfgen.optics.lens import LAUNCH_Z_MM, Lens, Rays

GOLDEN_TURN = (math.sqrt(5) - 1) / 2
FOCUS_RAYS = 4096
CHIEF_STEPS = 20
CHIEF_TOLERANCE_MM = 1e-10


def spiral(count: int, turn: float = 0.0, radius: float = 0.5) -> Tensor:
    """`count` points [N, 2] of a Fibonacci spiral over the unit disc, uniform in area.

    Point i lies at radius sqrt((i + radius) / count) and at angle i golden turns + `turn`; `turn` and
    `radius` in [0, 1) move the whole set. Vogel, "A better way to construct the sunflower head",
    Mathematical Biosciences 44 (1979).
    """
    i = torch.arange(count, dtype=torch.float64)
    r = torch.sqrt((i + radius) / count)
    angle = 2 * math.pi * ((i * GOLDEN_TURN + turn) % 1)
    return torch.stack([r * torch.cos(angle), r * torch.sin(angle)], dim=-1)


def field_slopes(lens: Lens, field_xy: Tensor) -> Tensor:
    """Tangents [P, 2] of the field angles of `field_xy` [P, 2]: field x half side / EFL."""
    half = torch.tensor(lens.sensor_mm, dtype=torch.float64) / 2
    return field_xy * half / lens.efl_mm


def aim(lens: Lens, field_xy: Tensor, depth_mm: float, pupil_xy: Tensor) -> tuple[Tensor, Tensor]:
    """Rays (o, d) from field points [..., 2] through points [..., 2] of the entrance pupil plane, in mm.

    `depth_mm` may be inf; the beam is then collimated. The shapes broadcast.
    """
    slopes = field_slopes(lens, field_xy)
    shape = np.broadcast_shapes(pupil_xy.shape, slopes.shape)
    pupil_xy, slopes = pupil_xy.expand(shape), slopes.expand(shape)
    pupil = torch.cat([pupil_xy, torch.full_like(pupil_xy[..., :1], lens.pupil_z_mm)], dim=-1)
    if math.isinf(depth_mm):
        d = torch.cat([-slopes, torch.ones_like(slopes[..., :1])], dim=-1)
        o = pupil + d * (LAUNCH_Z_MM - lens.pupil_z_mm)
    else:
        o = torch.cat([slopes * depth_mm, torch.full_like(slopes[..., :1], -depth_mm)], dim=-1)
        d = pupil - o
    d = d / d.norm(dim=-1, keepdim=True)
    return o.to(lens.device), d.to(lens.device)


def chief_rays(lens: Lens, field_xy: Tensor, depth_mm: float) -> Rays:
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
        rays = lens.trace(o, d, lens.reference_um, clip=False, to_stop=True)
        xy = rays.o[..., :2] - target
        return torch.where(rays.valid[..., None], xy, math.nan).cpu()

    for _ in range(CHIEF_STEPS):
        found = miss(pupil_xy)
        error = found[:, 0]
        if not (error.norm(dim=-1) > CHIEF_TOLERANCE_MM).any():  # nan counts as settled: it cannot be mended
            break
        jacobian = (found[:, 1:] - found[:, :1]).transpose(1, 2) / step_mm
        step = torch.linalg.solve_ex(jacobian, error[..., None]).result[..., 0]
        pupil_xy = torch.where(torch.isfinite(step), pupil_xy - step, pupil_xy)
    rays = lens.trace(*aim(lens, field_xy, depth_mm, pupil_xy), lens.reference_um, clip=False)
    settled = miss(pupil_xy)[:, 0].norm(dim=-1) < 1e-6
    return Rays(rays.o, rays.d, rays.valid & settled.to(lens.device))


def sensor_z_mm(lens: Lens, focus_mm: float) -> float:
    """Sensor position in focus for an axial point at `focus_mm`.

    The mean of where rays, uniform over the pupil's area and at `reference_um`, cross the axis: what
    DeepLens's `refocus` estimates from random rays. Raises LensError where they do not converge behind the
    lens.
    """
    pupil_xy = lens.pupil_r_mm * spiral(FOCUS_RAYS)
    rays = lens.trace(*aim(lens, torch.zeros(2, dtype=torch.float64), focus_mm, pupil_xy), lens.reference_um)
    o, d = rays.o[rays.valid], rays.d[rays.valid]
    if len(o) == 0:
        raise RenderError(f"lens {lens.name}: no ray from the axis at {focus_mm:g} mm passes")
    t = -(o[:, :2] * d[:, :2]).sum(-1) / (d[:, :2] ** 2).sum(-1)
    z = float((o[:, 2] + d[:, 2] * t).mean())
    last_vertex = float(lens.geo.surf_d(len(lens.geo.surfaces) - 1))
    if not math.isfinite(z) or z <= last_vertex or bool((t <= 0).any()):
        raise LensError(
            f"focus {focus_mm:g} mm: lens {lens.name} (EFL {lens.efl_mm:.3g} mm) forms no real image of it; "
            "choose a larger --focus"
        )
    return z
