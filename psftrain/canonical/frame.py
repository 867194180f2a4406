"""The field-aligned frame: where a field point is, and how a kernel is sampled into the frame and back.

Legend: M field points, W wavelengths, k kernel side, G canonical side, b bins a side. Lengths are in samples of the
full-size kernel, from its centre; x to the right, y up (row 0 of a kernel is +y). At a field point of azimuth theta,
u runs along the field radius and v across it: (u, v) is (x, y) turned by -theta.

A canonical image holds a kernel's density over ((u - cu) / su, (v - cv) / sv), on G x G nodes up to REACH deviations
that stand closer near the middle. Samples of both are read as cubic B-splines, since a rotated sample of an
image is as sharp as the image only so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import spline_filter1d

Array = NDArray[np.float64]
# Nothing may be rounded otherwise than it is written, so that a run repeats to the bit.
jit: Any = njit(cache=True, nogil=True, fastmath={"nsz"}, error_model="numpy")

SIDE = 80
REACH = 5.0
STRETCH = 1.5  # nodes stand at REACH sinh(STRETCH t) / sinh(STRETCH), t evenly in (-1, 1)
MARGIN = 4  # empty samples around an image, so that its spline does not mirror it at the edge
LEAST_CAPTURED = 0.3  # a kernel with less in its window is not blown up to unit sum
ROUNDING = 5e-6  # of radii of equal field points
AZIMUTHS = 8  # that a point on the axis stands for


@dataclass(frozen=True)
class Polar:
    """Field points in polar coordinates: `radius` [M] and azimuth `theta` [M] in radians."""

    radius: Array
    theta: Array

    @classmethod
    def of(cls, field: Array) -> Polar:
        """Of (x, y) [M, 2]."""
        return cls(np.hypot(field[:, 0], field[:, 1]), np.arctan2(field[:, 1], field[:, 0]))

    def __len__(self) -> int:
        return len(self.radius)

    def __getitem__(self, chosen: Any) -> Polar:
        return Polar(self.radius[chosen], self.theta[chosen])

    @property
    def ring(self) -> NDArray[np.int64]:
        """Which of the distinct radii, ascending, each point has [M]."""
        return np.asarray(np.unique(np.round(self.radius / ROUNDING), return_inverse=True)[1]).reshape(-1)


def nodes_of(field: Array) -> tuple[Polar, NDArray[np.int64]]:
    """Points (x, y) [M, 2] as nodes in polar coordinates, and the point that each node is of, both [K].

    A point on the axis has no azimuth of its own: its one kernel, turned, is that of AZIMUTHS nodes.
    """
    points = Polar.of(field)
    count = np.where(points.radius < ROUNDING, AZIMUTHS, 1)
    of = np.repeat(np.arange(len(field)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    turn = (np.arange(len(of)) - first) * (2 * np.pi / AZIMUTHS)
    return Polar(points.radius[of], points.theta[of] + turn), of


def over_points(values: Array, of: NDArray[np.int64]) -> Array:
    """Each point's mean [M, ...] of the values of its nodes [K, ...]."""
    first, count = np.unique(of, return_index=True, return_counts=True)[1:]
    total = np.add.reduceat(values, first, axis=0)
    return np.asarray(total / count.reshape(-1, *[1] * (values.ndim - 1)))


def binning(kernel_px: int, bins: int) -> Array:
    """Which share of a sample falls into a bin [b, k]."""
    edges = np.linspace(0, kernel_px, bins + 1)
    sample = np.arange(kernel_px)
    covered = np.minimum(edges[1:, None], sample + 1) - np.maximum(edges[:-1, None], sample)
    return np.asarray(np.clip(covered, 0, None))


def to_canonical(kernels: Array, theta: Array, warp: Array) -> Array:
    """Canonical images [M, W, G, G] of kernels [M, W, k, k]; rows ascend in v, columns in u.

    `warp` [M, W, 4] holds cu, cv, su, sv.
    """
    found = np.empty((*kernels.shape[:2], SIDE, SIDE))
    _sample(_spline(kernels), np.cos(theta), np.sin(theta), warp, _nodes(), found)
    return found


def from_canonical(images: Array, theta: Array, warp: Array, shares: Array) -> Array:
    """Binned kernels [M, W, b, b] of canonical images [M, W, G, G]; `shares` [b, k] are those of `binning`.

    Each channel sums to 1 unless its window holds next to nothing. Negative values remain.
    """
    kernels = np.empty((*images.shape[:2], shares.shape[1], shares.shape[1]))
    _unwarp(_spline(images), np.cos(theta), np.sin(theta), warp, kernels)
    binned = shares @ kernels @ shares.T
    return np.asarray(binned / np.maximum(binned.sum(axis=(-2, -1), keepdims=True), LEAST_CAPTURED))


def on_simplex(kernels: Array) -> Array:
    """The nearest kernels that are non-negative and sum to 1 in each channel; of [..., b, b].

    Held et al., Validation of subgradient optimization (1974).
    """
    flat = kernels.reshape(*kernels.shape[:-2], -1)
    descending = -np.sort(-flat, axis=-1)
    excess = (np.cumsum(descending, axis=-1) - 1) / np.arange(1, flat.shape[-1] + 1)
    last = (descending > excess).sum(axis=-1, keepdims=True) - 1
    return np.asarray(np.maximum(flat - np.take_along_axis(excess, last, axis=-1), 0).reshape(kernels.shape))


def _nodes() -> Array:
    """Where the canonical nodes stand, in deviations [G]."""
    even = (np.arange(SIDE) + 0.5) * (2 / SIDE) - 1
    return np.asarray(REACH * np.sinh(STRETCH * even) / np.sinh(STRETCH))


def _spline(images: Array) -> Array:
    """Coefficients of the cubic B-splines through images [M, W, n, n]."""
    found = np.pad(images, ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    for axis in (2, 3):
        found = spline_filter1d(found, 3, axis=axis, mode="mirror")
    return np.ascontiguousarray(found)


@jit
def _read(image, row, column):  # type: ignore[no-untyped-def]
    """The spline of coefficients [n, n] at a place that is at least two samples from the edge."""
    top, left = int(np.floor(row)), int(np.floor(column))
    y, x = row - top, column - left
    xx, yy = x * x, y * y
    x3, x0 = xx * x / 6, (1 - x) ** 3 / 6
    x1, x2 = 2 / 3 - xx + 3 * x3, 1 / 6 + (x + xx) / 2 - 3 * x3
    y3, y0 = yy * y / 6, (1 - y) ** 3 / 6
    y1, y2 = 2 / 3 - yy + 3 * y3, 1 / 6 + (y + yy) / 2 - 3 * y3
    total = 0.0
    for offset, weight in ((-1, y0), (0, y1), (1, y2), (2, y3)):
        line = image[top + offset]
        total += weight * (x0 * line[left - 1] + x1 * line[left] + x2 * line[left + 1] + x3 * line[left + 2])
    return total


@jit
def _sample(splines, cos, sin, warp, nodes, found):  # type: ignore[no-untyped-def]
    count, channels, side, _ = splines.shape
    centre = (side - 1) / 2
    for m in range(count):
        for w in range(channels):
            cu, cv, su, sv = warp[m, w]
            for i in range(len(nodes)):
                v = cv + sv * nodes[i]
                for j in range(len(nodes)):
                    u = cu + su * nodes[j]
                    column = centre + cos[m] * u - sin[m] * v
                    row = centre - sin[m] * u - cos[m] * v
                    inside = 1 <= column < side - 2 and 1 <= row < side - 2
                    found[m, w, i, j] = su * sv * _read(splines[m, w], row, column) if inside else 0.0


@jit
def _unwarp(splines, cos, sin, warp, found):  # type: ignore[no-untyped-def]
    count, channels, side, _ = splines.shape
    kernel_px = found.shape[-1]
    nodes = side - 2 * MARGIN
    scale = REACH / np.sinh(STRETCH)
    to_node, middle = nodes / (2 * STRETCH), (side - 1) / 2
    for m in range(count):
        for w in range(channels):
            cu, cv, su, sv = warp[m, w]
            for i in range(kernel_px):
                y = (kernel_px - 1) / 2 - i
                for j in range(kernel_px):
                    x = j - (kernel_px - 1) / 2
                    p = (cos[m] * x + sin[m] * y - cu) / su
                    q = (-sin[m] * x + cos[m] * y - cv) / sv
                    found[m, w, i, j] = 0.0
                    if abs(p) < REACH and abs(q) < REACH:
                        column = middle + to_node * np.arcsinh(p / scale)
                        row = middle + to_node * np.arcsinh(q / scale)
                        found[m, w, i, j] = _read(splines[m, w], row, column) / (su * sv)
