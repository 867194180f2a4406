"""The CPU's way from pupil points to deposits: trace a chunk of blocks, splat it for every target, go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.optics.blocks import DX, DY, DZ, OK, RAYS, ROWS, X, Y, Z, jit, trace_block, trace_rays
from psfgen.optics.lens import Rays
from psfgen.optics.trace import SETTLED_MM, Bundles, PupilPoints, TorchTracer

CHUNK = 1024  # rays whose hits stay in the first-level cache while every target takes them
HIT_X, HIT_Y, SLOPE_X, SLOPE_Y, VALID = range(5)
EDGE, MISSED = -1, -2


@jit
def _launch(b, pupil_xy, start, centre, axes, disc2, inverse, slope, vertex_z):  # type: ignore[no-untyped-def]
    """Fill a block: from pupil points of the unit disc to rays in the plane of the first vertex."""
    one, zero = b.dtype.type(1), b.dtype.type(0)
    cx, cy = centre[0], centre[1]
    xx, xy, yx, yy = axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]
    sx, sy = slope[0], slope[1]
    for i in range(RAYS):
        u, v = pupil_xy[0, start + i], pupil_xy[1, start + i]
        x, y = cx + xx * u + xy * v, cy + yx * u + yy * v
        tx, ty = x * inverse - sx, y * inverse - sy
        scale = one / np.sqrt(one + tx * tx + ty * ty)
        b[X + i], b[Y + i], b[Z + i] = x - tx * vertex_z, y - ty * vertex_z, zero
        b[DX + i], b[DY + i], b[DZ + i] = tx * scale, ty * scale, scale
        b[OK + i] = one if x * x + y * y <= disc2 else zero


@jit
def _splat(hits, filled, geometry, pitch_mm, kernel_px, corner, cell, share, image):  # type: ignore[no-untyped-def]
    """Deposit a chunk of hits on the two images [2, k * k] of a target, by bilinear shares; returns their sum.

    A hit whose four samples are all in the window goes the short way, one at its edge loses what it sheds.
    """
    one = hits.dtype.type(1)
    dz, chief_x, chief_y, cos, sin = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    cos, sin = cos / pitch_mm, sin / pitch_mm
    centre = hits.dtype.type((kernel_px - 1) / 2 + 1)  # counted from one sample outside the window
    most = hits.dtype.type(kernel_px + 1)
    for i in range(filled):
        x = hits[HIT_X, i] + dz * hits[SLOPE_X, i] - chief_x
        y = hits[HIT_Y, i] + dz * hits[SLOPE_Y, i] - chief_y
        column, row = centre + cos * x - sin * y, centre - sin * x - cos * y
        inside = (hits[VALID, i] > 0) & (column > 0) & (column < most) & (row > 0) & (row < most)
        column, row = column if inside else one, row if inside else one
        left, top = np.int32(column), np.int32(row)
        share[0, i], share[1, i] = column - hits.dtype.type(left), row - hits.dtype.type(top)
        corner[0, i], corner[1, i] = left - np.int32(1), top - np.int32(1)
        whole = (left > 0) & (left < kernel_px) & (top > 0) & (top < kernel_px)
        at = (top - np.int32(1)) * np.int32(kernel_px) + left - np.int32(1)
        cell[i] = (at if whole else np.int32(EDGE)) if inside else np.int32(MISSED)
    weight = 0.0
    for i in range(filled):
        at = cell[i]
        if at == MISSED:
            continue
        right, below = share[0, i], share[1, i]
        above, lower_right = one - below, right * below
        upper_right = right - lower_right
        upper_left, lower_left = above - upper_right, below - lower_right
        half = image[i & 1]
        if at >= 0:
            half[at] += upper_left
            half[at + 1] += upper_right
            half[at + kernel_px] += lower_left
            half[at + kernel_px + 1] += lower_right
            weight += 1
            continue
        left, top = corner[0, i], corner[1, i]
        for part in range(4):
            x, y = left + (part & 1), top + (part >> 1)
            if 0 <= x < kernel_px and 0 <= y < kernel_px:
                deposit = (upper_left, upper_right, lower_left, lower_right)[part]
                half[y * kernel_px + x] += deposit
                weight += deposit
    return weight


@jit
def _deposit(  # type: ignore[no-untyped-def]
    kind, flags, shapes, settled,
    pupil_xy, count, vertex_z, disc2, inverse,
    wave, slope, centre, axes,
    first, geometry, slot, pitch_mm, kernel_px,
    halves, passed, weight,
):  # fmt: skip
    """Trace every bundle and splat it for each of its targets.

    Bundle j launches the unit-disc points `pupil_xy` [2, N padded] through its own map, and its targets are
    the rows first[j] to first[j + 1] of `geometry` [T, 5]: sensor behind the last frame, chief x, y, cos, sin.
    Fills the slots of the targets in `halves` [:, 2, k * k], `passed` [B], the rays that came through, and
    `weight` [T], what was deposited.
    """
    b = np.empty(ROWS * RAYS, shapes.dtype)
    hits = np.empty((5, CHUNK), shapes.dtype)
    corner, cell = np.empty((2, CHUNK), np.int32), np.empty(CHUNK, np.int32)
    share = np.empty((2, CHUNK), shapes.dtype)
    weight[:] = 0
    for j in range(len(wave)):
        for t in range(first[j], first[j + 1]):
            halves[slot[t]] = 0
        through = 0
        for start in range(0, count, CHUNK):
            filled = min(CHUNK, count - start)
            for block in range(0, filled, RAYS):
                _launch(b, pupil_xy, start + block, centre[j], axes[j], disc2, inverse, slope[j], vertex_z)
                trace_block(b, kind, flags, shapes[wave[j]], settled)
                for i in range(RAYS):
                    tx, ty = b[DX + i] / b[DZ + i], b[DY + i] / b[DZ + i]
                    hits[HIT_X, block + i] = b[Z + i] * tx - b[X + i]  # upright: the image is turned over
                    hits[HIT_Y, block + i] = b[Z + i] * ty - b[Y + i]
                    hits[SLOPE_X, block + i], hits[SLOPE_Y, block + i] = -tx, -ty
                    hits[VALID, block + i] = b[OK + i]
            for i in range(filled):
                through += hits[VALID, i] > 0
            for t in range(first[j], first[j + 1]):
                weight[t] += _splat(
                    hits, filled, geometry[t], pitch_mm, kernel_px, corner, cell, share, halves[slot[t]]
                )
        passed[j] = through


class NumbaTracer(TorchTracer):
    """The surface table in blocks of 64 rays."""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.dtype == torch.float32 else np.float64)

    def trace(self, o: Tensor, d: Tensor, wavelength_um: float, *, clip: bool = True, to_stop: bool = False) -> Rays:
        surfaces = self.table(wavelength_um, clip, to_stop)
        shape = o.shape
        t = -o[..., 2:] / d[..., 2:]  # to the first vertex
        start = (o + t * d).double().reshape(-1, 3).T.contiguous().numpy()
        course = np.array(d.double().reshape(-1, 3).T.numpy(), order="C")  # traced in place, so never the caller's
        valid = np.empty(start.shape[1], np.bool_)
        trace_rays(start, course, valid, surfaces.kind, surfaces.flags, surfaces.shape, SETTLED_MM[torch.float64])
        start[2] += surfaces.length_mm
        valid &= np.isfinite(start).all(0) & np.isfinite(course).all(0)
        end, leaving = (torch.from_numpy(v.T).reshape(shape) for v in (start, course))
        return Rays(end, leaving, torch.from_numpy(valid).reshape(shape[:-1]))

    def points(self, pupil_xy: Tensor) -> PupilPoints:
        """As x and y [2, N], rounded up to whole blocks."""
        padded = np.zeros((2, -(-len(pupil_xy) // RAYS) * RAYS), self.numpy_dtype)
        padded[:, : len(pupil_xy)] = pupil_xy.numpy().T
        return PupilPoints(len(pupil_xy), padded)

    def deposit(
        self, bundles: Bundles, points: PupilPoints, pitch_mm: float, halves: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        passed, weight = np.empty(len(bundles.wave), np.int64), np.empty(len(bundles.slot))
        surfaces = [self.table(wavelength_um, True, False) for wavelength_um in self.wavelengths_um]
        geometry = np.column_stack([bundles.sensor_z_mm - self.lens.last_vertex_mm, bundles.chief_mm, bundles.turn])
        real = self.numpy_dtype.type
        _deposit(
            surfaces[0].kind,
            surfaces[0].flags,
            np.stack([table.shape for table in surfaces]).astype(real),
            real(SETTLED_MM[self.dtype]),
            points.xy,
            points.count,
            real(self.lens.pupil_z_mm),
            real(self.lens.pupil_r_mm**2 * (1 + 1e-6)),
            real(bundles.inverse_mm),
            bundles.wave,
            bundles.slope.astype(real),
            bundles.centre_mm.astype(real),
            bundles.axes_mm.astype(real),
            bundles.first,
            geometry.astype(real),
            bundles.slot,
            real(pitch_mm),
            halves.shape[-1],
            halves.reshape(-1, 2, halves.shape[-1] ** 2),
            passed,
            weight,
        )
        return passed, weight
