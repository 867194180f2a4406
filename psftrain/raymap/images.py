"""From rays to images, and how images change with the modes of the rays.

Legend: M places, P pupil points, Q modes, T terms, n cells a side, k samples a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]

# As in the tracer: rounding must not depend on where the compiler ran.
jit: Any = njit(cache=True, nogil=True, fastmath={"nsz"}, error_model="numpy")

SPAN = 3  # cells that a ray between two samples can reach, along one side
DARK = 1e-9


@dataclass(frozen=True)
class Cells:
    """How samples share their light among cells: `share` [k + 2, n], and the first cell of each sample [k + 2].

    A sample of margin on either side, which shares nothing out, takes what rays at the edge leave beyond it.
    """

    share: Array
    first: NDArray[np.int64]

    @staticmethod
    def of(share: Array) -> Cells:
        share = np.pad(share, ((1, 1), (0, 0)))
        return Cells(share, (share > 0).argmax(axis=1).astype(np.int64))

    @property
    def side(self) -> int:
        return int(self.share.shape[1])

    def image(self, kernels: NDArray[Any]) -> Array:
        """Kernels [..., k, k] on the cells, with a sum of 1 [..., n, n]."""
        share = self.share[1:-1]
        found: Array = share.T @ kernels.astype(float) @ share
        return found / np.maximum(found.sum(axis=(-2, -1), keepdims=True), DARK)


def hats(kernel_px: int, cells: int) -> Cells:
    """Cells that overlap by half, `cells` to a window (no finer than samples): a smooth picture, on which distant rays
    still pull.
    """
    cells = min(cells, kernel_px)
    width = kernel_px / cells
    centre = (np.arange(cells + 2) - (cells + 1) / 2) * width
    sample = np.arange(kernel_px) - (kernel_px - 1) / 2
    return Cells.of(np.clip(1 - np.abs(sample[:, None] - centre) / width, 0, None))


def bins(kernel_px: int, count: int) -> Cells:
    """The bins of a store: exact overlap of samples, which are squares."""
    edge = np.arange(count + 1) * kernel_px / count
    sample = np.arange(kernel_px)[:, None]
    return Cells.of(np.clip(np.minimum(sample + 1, edge[1:]) - np.maximum(sample, edge[:-1]), 0, None))


@jit
def _splat(ex, ey, share, first, image):  # type: ignore[no-untyped-def]
    """Count rays at (ex, ey), in half windows from the centre and upright, on cells; each is 1 / P."""
    k, n = len(share) - 2, share.shape[1]
    image[:] = 0
    for p in range(len(ex)):
        x, y = 0.5 * (k + 1) + 0.5 * k * ex[p], 0.5 * (k + 1) - 0.5 * k * ey[p]
        if not (x >= 0 and x < k + 1 and y >= 0 and y < k + 1):
            continue
        i, j = int(x), int(y)
        fx, fy = x - i, y - j
        for a in range(first[j], min(first[j] + SPAN, n)):
            wy = ((1 - fy) * share[j, a] + fy * share[j + 1, a]) / len(ex)
            for b in range(first[i], min(first[i] + SPAN, n)):
                image[a, b] += wy * ((1 - fx) * share[i, b] + fx * share[i + 1, b])


@jit
def _slopes(ex, ey, along, across, share, first, image, slopes):  # type: ignore[no-untyped-def]
    """As `_splat`, with the derivatives [n n, Q] of the image by the modes."""
    k, n = len(share) - 2, share.shape[1]
    image[:] = 0
    slopes[:] = 0
    gain = 0.5 * k
    for p in range(len(ex)):
        x, y = 0.5 * (k + 1) + gain * ex[p], 0.5 * (k + 1) - gain * ey[p]
        if not (x >= 0 and x < k + 1 and y >= 0 and y < k + 1):
            continue
        i, j = int(x), int(y)
        fx, fy = x - i, y - j
        for a in range(first[j], min(first[j] + SPAN, n)):
            wy = ((1 - fy) * share[j, a] + fy * share[j + 1, a]) / len(ex)
            dy = -(share[j + 1, a] - share[j, a]) * gain / len(ex)
            for b in range(first[i], min(first[i] + SPAN, n)):
                wx = (1 - fx) * share[i, b] + fx * share[i + 1, b]
                dx = (share[i + 1, b] - share[i, b]) * gain
                image[a, b] += wy * wx
                gx, gy = wy * dx, wx * dy
                if gx != 0 or gy != 0:
                    row = slopes[a * n + b]
                    for q in range(len(row)):
                        row[q] += gx * along[p, q] + gy * across[p, q]


@jit
def images(modes, along, across, share, first, found):  # type: ignore[no-untyped-def]
    """Images [M, n, n] of places whose modes are [M, Q]; their sums are the shares of light that they caught."""
    for m in range(len(modes)):
        _splat(np.dot(along, modes[m]), np.dot(across, modes[m]), share, first, found[m])


@jit
def misfit(modes, along, across, share, first, targets, captured, weight):  # type: ignore[no-untyped-def]
    """Sum over places of weight x (|K^ - K|^2 + |K|^2 (captured^ - captured)^2); `targets` [M, n n]."""
    n = share.shape[1]
    image = np.empty((n, n))
    total = 0.0
    for m in range(len(modes)):
        _splat(np.dot(along, modes[m]), np.dot(across, modes[m]), share, first, image)
        caught = image.sum() + DARK
        energy = error = 0.0
        for q in range(n * n):
            energy += targets[m, q] ** 2
            error += (image[q // n, q % n] / caught - targets[m, q]) ** 2
        total += weight[m] * (error + energy * (caught - captured[m]) ** 2)
    return total


@jit
def _of_place(  # type: ignore[no-untyped-def]
    modes, along, across, share, first, target, captured, weight, image, slopes, lines, left
):
    """One place's part of `misfit` with its derivatives by the modes, halved and after Gauss and Newton:
    (misfit, gradient [Q], hessian [Q, Q]). The last four arguments are room to work in.
    """
    n, count = share.shape[1], len(modes)
    _slopes(np.dot(along, modes), np.dot(across, modes), along, across, share, first, image, slopes)
    caught = image.sum() + DARK
    gain = np.zeros(count)
    for q in range(n * n):
        for c in range(count):
            gain[c] += slopes[q, c]
    used, energy = 0, 0.0
    for q in range(n * n):
        light = image[q // n, q % n]
        energy += target[q] * target[q]
        if light == 0 and target[q] == 0:
            continue
        for c in range(count):
            lines[used, c] = (slopes[q, c] - light / caught * gain[c]) / caught
        left[used] = light / caught - target[q]
        used += 1
    scale = np.sqrt(energy)
    for c in range(count):
        lines[used, c] = scale * gain[c]
    left[used] = scale * (caught - captured)
    used += 1
    some, rest = lines[:used], left[:used]
    return weight * np.dot(rest, rest), weight * np.dot(some.T, rest), weight * np.dot(some.T, some)


@jit
def _room(n, count):  # type: ignore[no-untyped-def]
    return np.empty((n, n)), np.empty((n * n, count)), np.empty((n * n + 1, count)), np.empty(n * n + 1)


@jit
def mode_equations(  # type: ignore[no-untyped-def]
    modes, along, across, share, first, targets, captured, weight, gradients, hessians
):
    """Write the Gauss-Newton `gradients` [M, Q] and `hessians` [M, Q, Q] of `misfit` by the modes, and return it."""
    image, slopes, lines, left = _room(share.shape[1], modes.shape[1])
    total = 0.0
    for m in range(len(modes)):
        part, gradients[m], hessians[m] = _of_place(
            modes[m], along, across, share, first, targets[m], captured[m], weight[m], image, slopes, lines, left
        )
        total += part
    return total


@jit
def normal_equations(  # type: ignore[no-untyped-def]
    modes, along, across, share, first, targets, captured, weight, values, rows, hessian, gradient
):
    """Add the Gauss-Newton `hessian` [T, T] and `gradient` [T] of `misfit`, and return it.

    A term t drives the modes rows[t, 0] and rows[t, 1] by `values` [M, T, 2].
    """
    count, terms = modes.shape[1], len(rows)
    image, slopes, lines, left = _room(share.shape[1], count)
    half = np.empty((count, terms))
    total = 0.0
    for m in range(len(modes)):
        part, slope, of_modes = _of_place(
            modes[m], along, across, share, first, targets[m], captured[m], weight[m], image, slopes, lines, left
        )
        total += part
        v = values[m]
        for t in range(terms):
            a, b, va, vb = rows[t, 0], rows[t, 1], v[t, 0], v[t, 1]
            gradient[t] += va * slope[a] + vb * slope[b]
            for c in range(count):
                half[c, t] = va * of_modes[c, a] + vb * of_modes[c, b]
        for t in range(terms):
            a, b, va, vb = rows[t, 0], rows[t, 1], v[t, 0], v[t, 1]
            for u in range(terms):
                hessian[t, u] += va * half[a, u] + vb * half[b, u]
    return total
