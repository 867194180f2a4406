"""Tracers: rays through a lens, and bundles of rays into deposits. One interface, three implementations.

- `numba` (optics/cpu.py): blocks of 64 rays; the default on a CPU
- `torch` (here): the same surfaces in plain tensors; the default on a GPU, and what to read
- `deeplens` (here): DeepLens's own trace, in float64; for lenses with a surface that the table cannot hold

Legend: B bundles, T targets, N rays, W wavelengths, k kernel side.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.errors import ConfigError
from psfgen.optics import prescription as table
from psfgen.optics import splat
from psfgen.optics.lens import LAUNCH_Z_MM, Lens, Rays
from psfgen.optics.prescription import CONVERGED_MM, NEWTON_STEPS, Prescription, foreign_surface, prescribe

log = logging.getLogger(__name__)
Array = NDArray[np.float64]
SETTLED_MM = {torch.float32: 4e-6, torch.float64: 1e-13}
CHUNK_RAYS = {"cpu": 2**14, "cuda": 2**22}  # near the best of a second-level cache, of a GPU
CHUNK_HITS = {"cpu": 2**15, "cuda": 2**23}


@dataclass(frozen=True)
class Bundles:
    """B bundles of rays from one depth, each with the kernels (targets) that it fills.

    A bundle goes through the points `centre_mm` + `axes_mm` @ u of the entrance pupil plane, u in the unit disc;
    its rays have the tangents p * inverse_mm - slope at p. Bundle j has the targets first[j] to first[j + 1].
    A target turns the hits by the angle of (cos, sin) about the axis, after taking away the chief ray, and is
    kept as deposit number `slot`.
    """

    wave: NDArray[np.int64]  # [B]
    slope: Array  # [B, 2]
    inverse_mm: float
    centre_mm: Array  # [B, 2]
    axes_mm: Array  # [B, 2, 2]
    first: NDArray[np.int64]  # [B + 1]
    sensor_z_mm: Array  # [T]
    chief_mm: Array  # [T, 2] upright, in the frame of the bundle
    turn: Array  # [T, 2] cos, sin
    slot: NDArray[np.int64]  # [T]


@dataclass(frozen=True)
class PupilPoints:
    """`count` points of the unit disc, in the form that a tracer reads."""

    count: int
    xy: Any


class Tracer(Protocol):
    """Traces rays through one lens, and fills kernels.

    Built from the lens, the wavelengths in um, and the dtype of the kernels' rays.
    """

    def trace(self, o: Tensor, d: Tensor, wavelength_um: float, *, clip: bool = True, to_stop: bool = False) -> Rays:
        """Rays o, d [..., 3] from object space through all surfaces (or up to and with the stop), in float64.

        With `clip=False` rims are ignored. The result is where and how they leave the last surface.
        """
        ...

    def points(self, pupil_xy: Tensor) -> PupilPoints:
        """Points [N, 2] of the unit disc, ready for `deposit`."""
        ...

    def deposit(
        self, bundles: Bundles, points: PupilPoints, pitch_mm: float, halves: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], Array]:
        """Send each bundle through all points; fills the targets' slots of `halves` [:, 2, k, k].

        Returns how many rays passed [B], and what was deposited on each target [T].
        """
        ...


TRACERS = {
    "numba": "psfgen.optics.cpu:NumbaTracer",
    "torch": "psfgen.optics.trace:TorchTracer",
    "deeplens": "psfgen.optics.trace:DeepLensTracer",
}


def tracer_class(name: str) -> Any:
    """The class of a tracer."""
    module, _, attribute = TRACERS[name].partition(":")
    return getattr(import_module(module), attribute)


def choose_tracer(name: str, lens: Lens) -> str:
    """The tracer that `name` means for a lens. Raises ConfigError where that one cannot trace it there."""
    foreign, cuda = foreign_surface(lens.geo.surfaces), lens.device.type == "cuda"
    if name == "auto":
        if foreign:
            log.warning("%s of lens %s is traced by DeepLens itself, which is many times slower", foreign, lens.name)
        return "deeplens" if foreign else "torch" if cuda else "numba"
    if foreign and name != "deeplens":
        raise ConfigError(f"tracer {name} does not know {foreign} of lens {lens.name}; use tracer auto or deeplens")
    if name == "numba" and cuda:
        raise ConfigError("tracer numba runs on a CPU only; use --device cpu, or tracer torch")
    return name


class TensorTracer(ABC):
    """What the two tracers over plain tensors share: from bundles to deposits, on the device of the lens."""

    def __init__(self, lens: Lens, wavelengths_um: tuple[float, ...], dtype: torch.dtype) -> None:
        self.lens, self.wavelengths_um, self.dtype = lens, wavelengths_um, dtype

    def points(self, pupil_xy: Tensor) -> PupilPoints:
        return PupilPoints(len(pupil_xy), pupil_xy.to(self.lens.device, self.dtype))

    def deposit(
        self, bundles: Bundles, points: PupilPoints, pitch_mm: float, halves: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], Array]:
        passed = np.empty(len(bundles.wave), np.int64)
        most = max(1, CHUNK_RAYS[self.lens.device.type] // points.count)
        for wave in np.unique(bundles.wave):
            of_wave = np.flatnonzero(bundles.wave == wave)
            for at in _chunks(len(of_wave), most):
                these = of_wave[at]
                x, y, tangent_x, tangent_y, inside = _launch(self.lens, bundles, these, points.xy)
                hit, tangents, valid = self._leave(self.wavelengths_um[wave], x, y, tangent_x, tangent_y)
                valid &= inside
                passed[these] = valid.sum(-1).cpu().numpy()
                _splat(self.lens, bundles, these, hit, tangents, valid, pitch_mm, halves)
        return passed, splat.weights(halves[bundles.slot])

    @abstractmethod
    def _leave(
        self, wavelength_um: float, x: Tensor, y: Tensor, tangent_x: Tensor, tangent_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rays [B, N] from the plane of the first vertex -> x, y in that of the last, tangents [B, N, 2], validity."""


class DeepLensTracer(TensorTracer):
    """DeepLens's own trace, in float64 whatever the dtype."""

    def __init__(self, lens: Lens, wavelengths_um: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__(lens, wavelengths_um, torch.float64)

    def trace(self, o: Tensor, d: Tensor, wavelength_um: float, *, clip: bool = True, to_stop: bool = False) -> Rays:
        return self.lens.trace(o, d, wavelength_um, clip=clip, to_stop=to_stop)

    def _leave(
        self, wavelength_um: float, x: Tensor, y: Tensor, tangent_x: Tensor, tangent_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        d = torch.stack([tangent_x, tangent_y, torch.ones_like(x)], -1)
        o = torch.stack([x, y, torch.zeros_like(x)], -1) + LAUNCH_Z_MM * d
        rays = self.trace(o, d / d.norm(dim=-1, keepdim=True), wavelength_um)
        return rays.at(self.lens.last_vertex_mm), rays.d[..., :2] / rays.d[..., 2:], rays.valid


class TorchTracer(TensorTracer):
    """The surface table in plain tensors: separate x, y, z, no branch on a value but the end of Newton's steps."""

    def __init__(self, lens: Lens, wavelengths_um: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__(lens, wavelengths_um, dtype)
        self.table = cache(self._table)

    def _table(self, wavelength_um: float, clip: bool, to_stop: bool) -> Prescription:
        return variant(self.lens, wavelength_um, clip=clip, to_stop=to_stop)

    def trace(self, o: Tensor, d: Tensor, wavelength_um: float, *, clip: bool = True, to_stop: bool = False) -> Rays:
        surfaces = self.table(wavelength_um, clip, to_stop)
        o, d = o.double(), d.double()
        t = -o[..., 2] / d[..., 2]  # to the first vertex
        start = [o[..., 0] + t * d[..., 0], o[..., 1] + t * d[..., 1], torch.zeros_like(t)]
        end, course, valid = trace_table(surfaces, start, list(d.unbind(-1)))
        end[2] = end[2] + surfaces.length_mm
        o, d = torch.stack(end, -1), torch.stack(course, -1)
        return Rays(o, d, valid & torch.isfinite(o).all(-1) & torch.isfinite(d).all(-1))

    def _leave(
        self, wavelength_um: float, x: Tensor, y: Tensor, tangent_x: Tensor, tangent_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.rsqrt(1 + tangent_x**2 + tangent_y**2)
        course = [tangent_x * scale, tangent_y * scale, scale]
        o, d, valid = trace_table(self.table(wavelength_um, True, False), [x, y, torch.zeros_like(x)], course)
        tangents = torch.stack([d[0] / d[2], d[1] / d[2]], -1)
        return torch.stack(o[:2], -1) - tangents * o[2][..., None], tangents, valid


def variant(lens: Lens, wavelength_um: float, *, clip: bool, to_stop: bool) -> Prescription:
    """The surface table of a lens, whole or up to the stop, with its rims or without."""
    surfaces = prescribe(lens.geo.surfaces[: lens.stop_index + 1 if to_stop else None], wavelength_um)
    return surfaces if clip else surfaces.unclipped()


def _chunks(count: int, most: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, most):
        yield np.arange(start, min(start + most, count))


def _launch(lens: Lens, bundles: Bundles, rows: NDArray[np.int64], unit_xy: Tensor) -> tuple[Tensor, ...]:
    """x, y in the plane of the first vertex, tangents, and whether a ray is within the launch disc; [B, N] each."""
    axes, centre, slope = (
        torch.tensor(v[rows]).to(unit_xy) for v in (bundles.axes_mm, bundles.centre_mm, bundles.slope)
    )
    # Term by term: what a matrix product rounds to depends on how many bundles there are.
    at = axes[..., :1] * unit_xy[:, 0] + axes[..., 1:] * unit_xy[:, 1] + centre[..., None]
    x, y = at[:, 0], at[:, 1]
    inside = x**2 + y**2 <= lens.pupil_r_mm**2 * (1 + 1e-6)
    tangent_x = x * bundles.inverse_mm - slope[:, :1]
    tangent_y = y * bundles.inverse_mm - slope[:, 1:]
    return x - tangent_x * lens.pupil_z_mm, y - tangent_y * lens.pupil_z_mm, tangent_x, tangent_y, inside


def _splat(
    lens: Lens,
    bundles: Bundles,
    rows: NDArray[np.int64],
    hit: Tensor,
    tangents: Tensor,
    valid: Tensor,
    pitch_mm: float,
    halves: NDArray[np.float32],
) -> None:
    """Fill `halves` for all targets of the bundles `rows`, whose rays cross the last frame at `hit` [B, N, 2]."""
    counts = np.diff(bundles.first)[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    target = np.concatenate([np.arange(bundles.first[row], bundles.first[row + 1]) for row in rows])
    behind, chief, turn = (
        torch.tensor(v).to(hit) for v in (bundles.sensor_z_mm - lens.last_vertex_mm, bundles.chief_mm, bundles.turn)
    )
    for at in _chunks(len(target), max(1, CHUNK_HITS[hit.device.type] // hit.shape[1])):
        t, j = torch.as_tensor(target[at], device=hit.device), torch.as_tensor(owner[at], device=hit.device)
        xy = -(hit[j] + tangents[j] * behind[t, None, None]) - chief[t, None]
        cos, sin = turn[t, None, 0], turn[t, None, 1]
        turned = torch.stack([cos * xy[..., 0] - sin * xy[..., 1], sin * xy[..., 0] + cos * xy[..., 1]], -1)
        halves[bundles.slot[target[at]]] = splat.deposit(turned, valid[j], halves.shape[-1], pitch_mm).cpu().numpy()


def trace_table(surfaces: Prescription, o: list[Tensor], d: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Trace rays from the plane of the first vertex to the last surface; z counts from the last vertex.

    `o`, `d`: x, y, z and unit directions, any shape, float32 or float64. Also returns which rays came through.
    """
    valid = torch.ones_like(o[0], dtype=torch.bool)
    for kind, (square, turned), row in zip(surfaces.kind, surfaces.flags, surfaces.shape.tolist(), strict=True):
        o = [v - shift if shift else v for v, shift in zip(o, row[table.SHIFT : table.SHIFT + 3], strict=True)]
        if turned:
            axes = np.reshape(row[table.TURN : table.TURN + 9], (3, 3)).tolist()
            o, d = _turned(o, axes), _turned(d, axes)
        if kind in (table.STOP, table.PLANE, table.THIN):
            o, d, good = _plane(o, d, row, bool(square), int(kind))
        elif kind == table.SPHERE:
            o, d, good = _sphere(o, d, row, bool(square))
        elif kind in (table.ASPHERE, table.CUBIC):
            sag = _even_asphere if kind == table.ASPHERE else _cubic
            o, d, good = _newton(o, d, valid, row, bool(square), sag)
        else:
            break
        valid &= good
    return o, d, valid


def _plane(o: list[Tensor], d: list[Tensor], row: list[float], square: bool, kind: int) -> Any:
    t = -o[2] / d[2]
    x, y = o[0] + t * d[0], o[1] + t * d[1]
    good = _within(x, y, row, square)
    if kind == table.PLANE:
        mu = row[table.INDEX_RATIO]
        cos2 = 1 - mu**2 * (1 - d[2] ** 2)
        good, d = good & (cos2 >= 0), [mu * d[0], mu * d[1], cos2.clamp(min=0).sqrt()]
    if kind == table.THIN:  # rays of one direction meet in one point of the focal plane
        focal = row[table.CURVATURE]
        bent = [d[0] * (focal / d[2]) - x, d[1] * (focal / d[2]) - y]
        scale = math.copysign(1, focal) * torch.rsqrt(bent[0] ** 2 + bent[1] ** 2 + focal**2)
        d = [bent[0] * scale, bent[1] * scale, focal * scale]
    return [x, y, torch.zeros_like(x)], d, good


def _sphere(o: list[Tensor], d: list[Tensor], row: list[float], square: bool) -> Any:
    """Welford, "Aberrations of Optical Systems" (1986), 4.3: from the vertex plane, without cancellation."""
    c, mu = row[table.CURVATURE], row[table.INDEX_RATIO]
    x, y, t, root2 = _to_sphere(o, d, c)
    x, y, z = x + t * d[0], y + t * d[1], t * d[2]
    cos2 = 1 - mu**2 * (1 - root2)
    good = (root2 >= 0) & (cos2 >= 0) & _within(x, y, row, square)
    bend = cos2.clamp(min=0).sqrt() - mu * root2.clamp(min=0).sqrt()
    return [x, y, z], [mu * d[0] - bend * c * x, mu * d[1] - bend * c * y, mu * d[2] + bend * (1 - c * z)], good


def _to_sphere(o: list[Tensor], d: list[Tensor], c: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y in the vertex plane, the way from there to the sphere, and the squared cosine of incidence."""
    t = -o[2] / d[2]
    x, y = o[0] + t * d[0], o[1] + t * d[1]
    f, g = c * (x**2 + y**2), d[2] - c * (x * d[0] + y * d[1])
    root2 = g**2 - c * f
    return x, y, f / (g + root2.clamp(min=0).sqrt()), root2


def _newton(o: list[Tensor], d: list[Tensor], valid: Tensor, row: list[float], square: bool, sag: Any) -> Any:
    """From the sphere of the base curvature, as DeepLens, by Newton steps until every ray that can has settled."""
    mu = row[table.INDEX_RATIO]
    x0, y0, t, _ = _to_sphere(o, d, row[table.CURVATURE])
    for _ in range(NEWTON_STEPS):
        x, y = x0 + t * d[0], y0 + t * d[1]
        z, slope_x, slope_y, real = sag(x, y, row)
        miss = t * d[2] - z
        moving = miss.abs() > SETTLED_MM[t.dtype]
        # A ray that has settled stays, so that it does not depend on what is traced beside it.
        t = torch.where(moving, t - miss / (d[2] - slope_x * d[0] - slope_y * d[1]), t)
        if not (moving & valid & real & _within(x, y, row, square, reach=1.1)).any():
            break
    x, y, z = x0 + t * d[0], y0 + t * d[1], t * d[2]
    scale = torch.rsqrt(1 + slope_x**2 + slope_y**2)
    cosine = scale * (d[2] - slope_x * d[0] - slope_y * d[1])
    cos2 = 1 - mu**2 * (1 - cosine**2)
    good = real & (miss.abs() < CONVERGED_MM) & (cos2 >= 0) & _within(x, y, row, square)
    bend = scale * (cos2.clamp(min=0).sqrt() - mu * cosine)
    return [x, y, z], [mu * d[0] - bend * slope_x, mu * d[1] - bend * slope_y, mu * d[2] + bend], good


def _even_asphere(x: Tensor, y: Tensor, row: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sag, its slopes, and where the conic is real."""
    c, r2 = row[table.CURVATURE], x**2 + y**2
    root2 = 1 - row[table.CONIC1] * c**2 * r2
    root = root2.clamp(min=1e-12).sqrt()
    terms = row[table.COEFFICIENTS :]
    while terms and terms[-1] == 0:
        terms = terms[:-1]
    value, change = torch.zeros_like(r2), torch.zeros_like(r2)
    for coefficient in reversed(terms):
        value, change = value * r2 + coefficient, change * r2 + value
    slope = c / root + 2 * (value + r2 * change)
    return r2 * (c / (1 + root) + value), slope * x, slope * y, root2 > 0


def _cubic(x: Tensor, y: Tensor, row: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b3, b5, b7 = row[table.COEFFICIENTS : table.COEFFICIENTS + 3]
    x2, y2 = x**2, y**2
    sag = x * x2 * (b3 + x2 * (b5 + x2 * b7)) + y * y2 * (b3 + y2 * (b5 + y2 * b7))
    slopes = [v2 * (3 * b3 + v2 * (5 * b5 + v2 * (7 * b7))) for v2 in (x2, y2)]
    return sag, slopes[0], slopes[1], torch.ones_like(x, dtype=torch.bool)


def _within(x: Tensor, y: Tensor, row: list[float], square: bool, reach: float = 1.0) -> Tensor:
    rim2 = row[table.RIM2] * reach
    return (x**2 <= rim2) & (y**2 <= rim2) if square else x**2 + y**2 <= rim2


def _turned(v: list[Tensor], turn: list[list[float]]) -> list[Tensor]:
    return [a * v[0] + b * v[1] + c * v[2] for a, b, c in turn]
