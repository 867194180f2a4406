"""Rays with their optical path: what a wavefront is made of. float64, mm, compiled by numba.

Rims block nothing here: how near each ray comes to one is noted instead, so that an edge can be drawn between rays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.optics.blocks import (
    DX,
    DY,
    DZ,
    OK,
    RAYS,
    ROWS,
    X,
    Y,
    Z,
    enter,
    jit,
    meet,
)
from psfgen.optics.prescription import CURVATURE, END, INDEX_RATIO, RIM2, STOP, THIN, Prescription
from psfgen.optics.trace import SETTLED_MM

Array = NDArray[np.float64]

SETTLED = SETTLED_MM[torch.float64]


@dataclass(frozen=True)
class Paths:
    """N rays where they leave the last surface.

    `xyz` [3, N] with z counted from the last vertex, `course` [3, N] unit directions, `path` [N] the optical path
    from where they started, `clear` [N] how far they stay within the rims: 1 - (r / rim)^2 at the surface where that
    is least, negative beyond a rim, NaN where a ray does not come through.
    """

    xyz: Array
    course: Array
    path: Array
    clear: Array


def trace_paths(surfaces: Prescription, xy: Array, course: Array) -> Paths:
    """Rays that start at `xy` [2, N] in the plane of the first vertex in the unit directions `course` [3, N]."""
    count = xy.shape[1]
    xyz = np.zeros((3, count))
    xyz[:2] = xy
    course = np.array(course, order="C")
    path, clear = np.zeros(count), np.ones(count)
    rims = surfaces.shape[:, RIM2].copy()
    free = surfaces.unclipped()
    _paths(xyz, course, path, clear, free.kind, free.flags, free.shape, rims, SETTLED)
    return Paths(xyz, course, path, clear)


@jit
def _paths(xyz, course, path, clear, kind, flags, shape, rims, settled):  # type: ignore[no-untyped-def]
    b = np.empty(ROWS * RAYS, xyz.dtype)
    before = np.empty((6, RAYS), xyz.dtype)
    length, least = np.empty(RAYS, xyz.dtype), np.empty(RAYS, xyz.dtype)
    for start in range(0, xyz.shape[1], RAYS):
        filled = min(RAYS, xyz.shape[1] - start)
        for i in range(RAYS):
            at = start + min(i, filled - 1)
            b[X + i], b[Y + i], b[Z + i] = xyz[0, at], xyz[1, at], xyz[2, at]
            b[DX + i], b[DY + i], b[DZ + i], b[OK + i] = course[0, at], course[1, at], course[2, at], 1
            length[i], least[i] = 0, 1
        index = 1.0
        for s in range(len(kind)):
            enter(b, shape[s], flags[s, 1] != 0)
            for i in range(RAYS):
                before[0, i], before[1, i], before[2, i] = b[X + i], b[Y + i], b[Z + i]
                before[3, i], before[4, i], before[5, i] = b[DX + i], b[DY + i], b[DZ + i]
            meet(b, kind[s], flags[s, 0] != 0, shape[s], settled)
            if kind[s] == END:
                continue
            for i in range(RAYS):
                x, y, z = b[X + i], b[Y + i], b[Z + i]
                along = (x - before[0, i]) * before[3, i] + (y - before[1, i]) * before[4, i]
                length[i] += index * (along + (z - before[2, i]) * before[5, i])
                far2 = max(x * x, y * y) if flags[s, 0] != 0 else x * x + y * y
                least[i] = min(least[i], 1 - far2 / rims[s])
            if kind[s] == THIN:
                for i in range(RAYS):
                    length[i] += _bent(b[X + i], b[Y + i], before[:, i], shape[s, CURVATURE])
            if kind[s] != STOP and kind[s] != THIN:
                index /= shape[s, INDEX_RATIO]
        for i in range(filled):
            at = start + i
            xyz[0, at], xyz[1, at], xyz[2, at] = b[X + i], b[Y + i], b[Z + i]
            course[0, at], course[1, at], course[2, at] = b[DX + i], b[DY + i], b[DZ + i]
            path[at], clear[at] = length[i], least[i] if b[OK + i] > 0 else np.nan


@jit
def _bent(x, y, before, focal):  # type: ignore[no-untyped-def]
    """What a thin lens adds to the path of a ray at (x, y), that rays of one direction reach their focus in phase."""
    dx, dy, dz = before[3], before[4], before[5]
    along = x * dx + y * dy
    side = math.copysign(1.0, focal)
    far = abs(focal) / dz
    short = (2 * side * far * along - x * x - y * y) / (
        far + math.sqrt(far * far - 2 * side * far * along + x * x + y * y)
    )
    return side * short - along
