"""The CPU's tracer: rays in blocks of 64 that stay in the first-level cache, compiled by numba.

The inner loops run over the rays of a block and hold no branch, so the compiler vectorises them. A block is
one flat array of ROWS x 64 numbers, so that the compiler sees that its rows do not overlap. Everything
works in the dtype of the block: float32 for kernels, float64 where a position is solved for.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numba import njit

from psfgen.optics.prescription import (
    ASPHERE,
    CONIC1,
    CONVERGED_MM,
    CUBIC,
    CURVATURE,
    END,
    INDEX_RATIO,
    NEWTON_STEPS,
    PLANE,
    RIM2,
    SHIFT,
    SPHERE,
    THIN,
    TURN,
)
from psfgen.optics.prescription import COEFFICIENTS as COEF

RAYS = 64
X, Y, Z, DX, DY, DZ, OK, T, SLOPE, MISS = (row * RAYS for row in range(10))
ROWS = 10

# Nothing may be rounded otherwise than it is written, so neither `contract` nor `reassoc`: what the compiler makes of
# them differs between the process that compiles and those that find the result in numba's cache, and, in loops over
# several arrays, with where these lie in memory. No `nnan` either: rays that miss a surface become NaN.
jit: Any = njit(cache=True, nogil=True, fastmath={"nsz"}, error_model="numpy")


@jit
def _plane(b, table, square, refracts):  # type: ignore[no-untyped-def]
    one, zero = b.dtype.type(1), b.dtype.type(0)
    mu, rim2 = table[INDEX_RATIO], table[RIM2]
    mu2 = mu * mu
    for i in range(RAYS):
        dx, dy, dz = b[DX + i], b[DY + i], b[DZ + i]
        t = -b[Z + i] / dz
        x, y = b[X + i] + t * dx, b[Y + i] + t * dy
        b[X + i], b[Y + i], b[Z + i] = x, y, zero
        inside = (x * x < rim2) & (y * y < rim2) if square else x * x + y * y < rim2
        b[OK + i] = b[OK + i] if inside else zero
    if refracts:
        for i in range(RAYS):
            dz = b[DZ + i]
            cos2 = one - mu2 * (one - dz * dz)
            b[OK + i] = b[OK + i] if cos2 >= zero else zero
            b[DX + i] *= mu
            b[DY + i] *= mu
            b[DZ + i] = sqrt(cos2 if cos2 > zero else zero)


@jit
def _sphere(b, table, square):  # type: ignore[no-untyped-def]
    """Welford, "Aberrations of Optical Systems" (1986), 4.3: from the vertex plane, without cancellation."""
    one, zero = b.dtype.type(1), b.dtype.type(0)
    c, mu, rim2 = table[CURVATURE], table[INDEX_RATIO], table[RIM2]
    mu2 = mu * mu
    for i in range(RAYS):
        dx, dy, dz = b[DX + i], b[DY + i], b[DZ + i]
        t = -b[Z + i] / dz
        x, y = b[X + i] + t * dx, b[Y + i] + t * dy
        f, g = c * (x * x + y * y), dz - c * (x * dx + y * dy)
        root2 = g * g - c * f
        root = sqrt(root2 if root2 > zero else zero)  # the cosine of incidence
        t = f / (g + root)
        x, y, z = x + t * dx, y + t * dy, t * dz
        inside = (x * x <= rim2) & (y * y <= rim2) if square else x * x + y * y <= rim2
        cos2 = one - mu2 * (one - root2)
        b[OK + i] = b[OK + i] if (root2 >= zero) & (cos2 >= zero) & inside else zero
        bend = sqrt(cos2 if cos2 > zero else zero) - mu * root
        b[X + i], b[Y + i], b[Z + i] = x, y, z
        b[DX + i] = mu * dx - bend * c * x
        b[DY + i] = mu * dy - bend * c * y
        b[DZ + i] = mu * dz + bend * (one - c * z)


@jit
def _asphere(b, table, square, settled):  # type: ignore[no-untyped-def]
    """From the sphere of the base curvature, as DeepLens, by Newton steps until every ray of the block has settled.

    A ray that has settled stays where it is while the others go on: its bits must not depend on who is beside it.
    """
    one, two, zero = b.dtype.type(1), b.dtype.type(2), b.dtype.type(0)
    half, tiny, reach = b.dtype.type(0.5), b.dtype.type(1e-12), b.dtype.type(2.2 if square else 1.1)
    unsettled = b.dtype.type(np.inf)
    c, k1, mu, rim2 = table[CURVATURE], table[CONIC1], table[INDEX_RATIO], table[RIM2]
    mu2, k1c2 = mu * mu, k1 * c * c
    a0, a1, a2, a3, a4 = table[COEF], table[COEF + 1], table[COEF + 2], table[COEF + 3], table[COEF + 4]
    a5, a6, a7, a8, a9 = table[COEF + 5], table[COEF + 6], table[COEF + 7], table[COEF + 8], table[COEF + 9]
    for i in range(RAYS):
        dx, dy, dz = b[DX + i], b[DY + i], b[DZ + i]
        t = -b[Z + i] / dz
        x, y = b[X + i] + t * dx, b[Y + i] + t * dy
        f, g = c * (x * x + y * y), dz - c * (x * dx + y * dy)
        root2 = g * g - c * f
        b[X + i], b[Y + i] = x, y
        b[T + i] = f / (g + sqrt(root2 if root2 > zero else zero))
        b[SLOPE + i], b[MISS + i] = zero, unsettled
    for _ in range(NEWTON_STEPS):
        moving = 0
        for i in range(RAYS):
            dx, dy, dz, t = b[DX + i], b[DY + i], b[DZ + i], b[T + i]
            x, y = b[X + i] + t * dx, b[Y + i] + t * dy
            r2 = x * x + y * y
            p = a9
            q = p
            p = p * r2 + a8
            q = q * r2 + p
            p = p * r2 + a7
            q = q * r2 + p
            p = p * r2 + a6
            q = q * r2 + p
            p = p * r2 + a5
            q = q * r2 + p
            p = p * r2 + a4
            q = q * r2 + p
            p = p * r2 + a3
            q = q * r2 + p
            p = p * r2 + a2
            q = q * r2 + p
            p = p * r2 + a1
            q = q * r2 + p
            p = p * r2 + a0
            root2 = one - k1c2 * r2
            root = sqrt(root2 if root2 > tiny else tiny)
            slope = half * c / root + p + r2 * q  # of the sag, by r^2
            miss = t * dz - r2 * (c / (one + root) + p)
            step = miss / (dz - two * slope * (x * dx + y * dy))
            done = abs(b[MISS + i]) <= settled
            b[T + i] = t if done else t - step
            b[SLOPE + i] = b[SLOPE + i] if done else slope
            b[MISS + i] = miss = b[MISS + i] if done else miss
            moving += (abs(miss) > settled) & (b[OK + i] > zero) & (r2 < reach * rim2)
        if moving == 0:
            break
    converged = b.dtype.type(CONVERGED_MM)
    for i in range(RAYS):
        dx, dy, dz, t, slope = b[DX + i], b[DY + i], b[DZ + i], b[T + i], two * b[SLOPE + i]
        x, y = b[X + i] + t * dx, b[Y + i] + t * dy
        r2 = x * x + y * y
        inside = (x * x <= rim2) & (y * y <= rim2) if square else r2 <= rim2
        inside = inside & (k1c2 * r2 < one) & (abs(b[MISS + i]) < converged)
        scale = one / sqrt(one + slope * slope * r2)
        cosine = scale * (dz - slope * (x * dx + y * dy))
        cos2 = one - mu2 * (one - cosine * cosine)
        b[OK + i] = b[OK + i] if inside & (cos2 >= zero) else zero
        bend = scale * (sqrt(cos2 if cos2 > zero else zero) - mu * cosine)
        b[X + i], b[Y + i], b[Z + i] = x, y, t * dz
        b[DX + i] = mu * dx - bend * slope * x
        b[DY + i] = mu * dy - bend * slope * y
        b[DZ + i] = mu * dz + bend


@jit
def _cubic(b, table, square, settled):  # type: ignore[no-untyped-def]
    one, zero, unsettled = b.dtype.type(1), b.dtype.type(0), b.dtype.type(np.inf)
    three, five, seven = b.dtype.type(3), b.dtype.type(5), b.dtype.type(7)
    mu, rim2 = table[INDEX_RATIO], table[RIM2]
    mu2 = mu * mu
    b3, b5, b7 = table[COEF], table[COEF + 1], table[COEF + 2]
    for i in range(RAYS):
        b[T + i], b[MISS + i] = -b[Z + i] / b[DZ + i], unsettled
    for _ in range(NEWTON_STEPS):
        moving = 0
        for i in range(RAYS):
            dx, dy, dz, t = b[DX + i], b[DY + i], b[DZ + i], b[T + i]
            x, y = b[X + i] + t * dx, b[Y + i] + t * dy
            x2, y2 = x * x, y * y
            miss = b[Z + i] + t * dz - x * x2 * (b3 + x2 * (b5 + x2 * b7)) - y * y2 * (b3 + y2 * (b5 + y2 * b7))
            sx, sy = (
                x2 * (three * b3 + x2 * (five * b5 + x2 * seven * b7)),
                y2 * (three * b3 + y2 * (five * b5 + y2 * seven * b7)),
            )
            done = abs(b[MISS + i]) <= settled
            b[T + i] = t if done else t - miss / (dz - sx * dx - sy * dy)
            b[MISS + i] = miss = b[MISS + i] if done else miss
            moving += (abs(miss) > settled) & (b[OK + i] > zero)
        if moving == 0:
            break
    converged = b.dtype.type(CONVERGED_MM)
    for i in range(RAYS):
        dx, dy, dz, t = b[DX + i], b[DY + i], b[DZ + i], b[T + i]
        x, y, z = b[X + i] + t * dx, b[Y + i] + t * dy, b[Z + i] + t * dz
        x2, y2 = x * x, y * y
        sx = x2 * (three * b3 + x2 * (five * b5 + x2 * seven * b7))
        sy = y2 * (three * b3 + y2 * (five * b5 + y2 * seven * b7))
        inside = (x2 <= rim2) & (y2 <= rim2) if square else x2 + y2 <= rim2
        scale = one / sqrt(one + sx * sx + sy * sy)
        cosine = scale * (dz - sx * dx - sy * dy)
        cos2 = one - mu2 * (one - cosine * cosine)
        b[OK + i] = b[OK + i] if inside & (abs(b[MISS + i]) < converged) & (cos2 >= zero) else zero
        bend = scale * (sqrt(cos2 if cos2 > zero else zero) - mu * cosine)
        b[X + i], b[Y + i], b[Z + i] = x, y, z
        b[DX + i] = mu * dx - bend * sx
        b[DY + i] = mu * dy - bend * sy
        b[DZ + i] = mu * dz + bend


@jit
def _thin_lens(b, table):  # type: ignore[no-untyped-def]
    """Rays of one direction meet in one point of the focal plane."""
    one = b.dtype.type(1)
    focal = table[CURVATURE]
    for i in range(RAYS):
        along = focal / b[DZ + i]
        x, y = b[DX + i] * along - b[X + i], b[DY + i] * along - b[Y + i]
        scale = one / sqrt(x * x + y * y + focal * focal)
        scale = scale if focal > 0 else -scale
        b[DX + i], b[DY + i], b[DZ + i] = x * scale, y * scale, focal * scale


@jit
def enter(b, table, turned):  # type: ignore[no-untyped-def]
    """Into the frame of the next surface."""
    sx, sy, sz = table[SHIFT], table[SHIFT + 1], table[SHIFT + 2]
    if turned:
        xx, xy, xz = table[TURN], table[TURN + 1], table[TURN + 2]
        yx, yy, yz = table[TURN + 3], table[TURN + 4], table[TURN + 5]
        zx, zy, zz = table[TURN + 6], table[TURN + 7], table[TURN + 8]
        for i in range(RAYS):
            x, y, z = b[X + i] - sx, b[Y + i] - sy, b[Z + i] - sz
            b[X + i] = xx * x + xy * y + xz * z
            b[Y + i] = yx * x + yy * y + yz * z
            b[Z + i] = zx * x + zy * y + zz * z
            x, y, z = b[DX + i], b[DY + i], b[DZ + i]
            b[DX + i] = xx * x + xy * y + xz * z
            b[DY + i] = yx * x + yy * y + yz * z
            b[DZ + i] = zx * x + zy * y + zz * z
        return
    if sx != 0 or sy != 0:
        for i in range(RAYS):
            b[X + i] -= sx
            b[Y + i] -= sy
    for i in range(RAYS):
        b[Z + i] -= sz


@jit
def meet(b, kind, square, table, settled):  # type: ignore[no-untyped-def]
    """Carry a block to a surface, in whose frame it is, and through it."""
    if kind == SPHERE:
        _sphere(b, table, square)
    elif kind == ASPHERE:
        _asphere(b, table, square, settled)
    elif kind == CUBIC:
        _cubic(b, table, square, settled)
    elif kind != END:
        _plane(b, table, square, kind == PLANE)
        if kind == THIN:
            _thin_lens(b, table)


@jit
def trace_block(b, kind, flags, shape, settled):  # type: ignore[no-untyped-def]
    """Carry a block from the plane of the first vertex through all surfaces; z then counts from the last vertex."""
    for s in range(len(kind)):
        enter(b, shape[s], flags[s, 1] != 0)
        meet(b, kind[s], flags[s, 0] != 0, shape[s], settled)


@jit
def trace_rays(o, d, valid, kind, flags, shape, settled):  # type: ignore[no-untyped-def]
    """Trace rays o, d [3, N] in place, from the plane of the first vertex on; z then counts from the last vertex."""
    b = np.empty(ROWS * RAYS, o.dtype)
    count = o.shape[1]
    for start in range(0, count, RAYS):
        filled = min(RAYS, count - start)
        for i in range(RAYS):
            at = start + min(i, filled - 1)
            b[X + i], b[Y + i], b[Z + i] = o[0, at], o[1, at], o[2, at]
            b[DX + i], b[DY + i], b[DZ + i], b[OK + i] = d[0, at], d[1, at], d[2, at], 1
        trace_block(b, kind, flags, shape, settled)
        for i in range(filled):
            at = start + i
            o[0, at], o[1, at], o[2, at] = b[X + i], b[Y + i], b[Z + i]
            d[0, at], d[1, at], d[2, at] = b[DX + i], b[DY + i], b[DZ + i]
            valid[at] = b[OK + i] > 0
