"""From deposits to kernels: unit sum, error estimate, binning, size.

Legend: P field points, N rays, k kernel side, b bins a side. Two interleaved halves of the rays are kept
apart, because their difference tells the sampling error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.optics.blocks import jit

Array = NDArray[np.float64]
Single = NDArray[np.float32]
MOST_NOISE = 10.0  # of kernels so noisy that their halves share no sample
SPLAT_VARIANCE_PX2 = 1 / 3  # what the bilinear splat adds to a kernel's second moment, both axes


def deposit(xy_mm: Tensor, valid: Tensor, kernel_px: int, pitch_mm: float) -> Tensor:
    """Bilinear splat of hits [P, N, 2] (mm, upright, from the kernel's centre) onto samples -> [P, 2, k, k].

    Row 0 is +y. The second axis holds the even and the odd rays. A hit spreads unit weight over the four
    samples around it; what falls on no sample is lost, so that a sum below the count of rays is truncation.
    """
    points, rays = valid.shape
    side = kernel_px + 2  # one sample of margin takes the shares that miss the window
    centre = (kernel_px - 1) / 2 + 1
    column, row = centre + xy_mm[..., 0] / pitch_mm, centre - xy_mm[..., 1] / pitch_mm
    inside = valid & (column > 0) & (column < side - 1) & (row > 0) & (row < side - 1)
    half = torch.arange(rays, device=valid.device) % 2
    image = 2 * torch.arange(points, device=valid.device)[:, None] + half
    column, row, image = column[inside], row[inside], image[inside]
    left, top = column.long(), row.long()
    right_share, below_share = column - left, row - top
    corner = (image * side + top) * side + left
    total = column.new_zeros(points * 2 * side * side)
    for offset, share in (
        (0, (1 - below_share) * (1 - right_share)),
        (1, (1 - below_share) * right_share),
        (side, below_share * (1 - right_share)),
        (side + 1, below_share * right_share),
    ):
        total.index_add_(0, corner + offset, share)
    return total.reshape(points, 2, side, side)[..., 1:-1, 1:-1]


def overlap(kernel_px: int, bins: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The bin in which each sample begins [k], and the shares of it in that bin and the next [k, 2].

    Samples are 1 wide, bins kernel_px / bins: no narrower, so that a sample reaches two at most.
    """
    edges = np.arange(1, bins + 1) * (kernel_px / bins)
    sample = np.arange(kernel_px)
    first = np.minimum(np.searchsorted(edges, sample, side="right"), bins - 1)
    inside = np.clip(edges[first] - sample, 0, 1)
    inside[first == bins - 1] = 1.0
    return first, np.stack([inside, 1 - inside], -1).astype(np.float32)


@dataclass(frozen=True)
class Kernels:
    """Normalised kernels with what is known of them; NaN where nothing was deposited."""

    psf: Single  # [..., k, k]
    psf_binned: Single  # [..., b, b]
    noise: Single  # [...]
    noise_binned: Single  # [...]
    rms_px: Single  # [...] root mean square distance from the centroid, the splat's own width taken out


def normalise(halves: NDArray[np.float32], bins: int, margins: tuple[float, float] = (1.0, 1.0)) -> Kernels:
    """Deposits [..., 2, k, k] -> kernels that sum to 1, with `noise` and `noise_binned`.

    Noise = margin x |A - B| / (2 |K|), A and B the kernels of the even and the odd rays and K the true kernel,
    for which <A, B> stands, since the product of two halves holds no noise energy. Without margin it is the
    expected relative L2 error of independent rays, and a safe bound of a spiral's. It ends at MOST_NOISE.
    """
    shape, k = halves.shape[:-3], halves.shape[-1]
    flat = np.ascontiguousarray(halves, np.float32).reshape(-1, 2, k, k)
    first, share = overlap(k, bins)
    psf, binned = np.empty((len(flat), k, k), np.float32), np.empty((len(flat), bins, bins), np.float32)
    found = np.empty((len(flat), 3), np.float32)
    _normalise(flat, first, share, margins, psf, binned, found)
    return Kernels(
        psf.reshape(*shape, k, k),
        binned.reshape(*shape, bins, bins),
        *(found[:, i].reshape(shape) for i in range(3)),
    )


def sampling(halves: NDArray[np.float32], slots: NDArray[np.int64], margin: float) -> tuple[Single, Single]:
    """`noise` [n] of the deposits [:, 2, k, k] at `slots` [n], and how many rays stand on an effective sample [n].

    Effective samples are 1 / sum K^2; the figure is scaled so that random rays would err by its -1/2 power
    (a bilinear splat keeps 4/9 of the variance of a count).
    """
    found = np.empty((len(slots), 2), np.float32)
    _sampling(halves, slots, margin, found)
    return found[:, 0], found[:, 1]


def weights(halves: NDArray[np.float32]) -> Array:
    """What was deposited in all, of deposits [..., 2, k, k]."""
    found = np.empty(halves.shape[:-3])
    _weights(halves.reshape(-1, halves.shape[-1]), found.reshape(-1))
    return found


@jit
def _weights(lines, found):  # type: ignore[no-untyped-def]
    per = len(lines) // len(found)
    for n in range(len(found)):
        total = 0.0
        for line in range(n * per, (n + 1) * per):
            total += _sum(lines[line])
        found[n] = total


@jit
def _sum(line):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for x in range(len(line)):
        total += line[x]
    return float(total)


@jit
def _noise(even, odd, margin):  # type: ignore[no-untyped-def]
    """(noise, <A, B>, weight) of the deposits of two halves. Rows are summed in single, their sums in double."""
    sum_even = sum_odd = 0.0
    for y in range(even.shape[0]):
        line_even = line_odd = np.float32(0)
        for x in range(even.shape[1]):
            line_even += even[y, x]
            line_odd += odd[y, x]
        sum_even += float(line_even)
        sum_odd += float(line_odd)
    weight = sum_even + sum_odd
    if sum_even == 0 or sum_odd == 0:
        return (np.nan if weight == 0 else MOST_NOISE), 0.0, weight
    scale_even, scale_odd = np.float32(1 / sum_even), np.float32(1 / sum_odd)
    energy = difference = 0.0
    for y in range(even.shape[0]):
        line_energy = line_difference = np.float32(0)
        for x in range(even.shape[1]):
            a, b = even[y, x] * scale_even, odd[y, x] * scale_odd
            line_energy += a * b
            line_difference += (a - b) * (a - b)
        energy += float(line_energy)
        difference += float(line_difference)
    if energy <= 0:
        return MOST_NOISE, 0.0, weight
    return min(margin * np.sqrt(difference / energy) / 2, MOST_NOISE), energy, weight


@jit
def _sampling(halves, slots, margin, found):  # type: ignore[no-untyped-def]
    for n in range(len(slots)):
        noise, energy, weight = _noise(halves[slots[n], 0], halves[slots[n], 1], margin)
        found[n, 0] = noise
        found[n, 1] = 9 / 4 * weight * energy


@jit
def _moments(even, odd):  # type: ignore[no-untyped-def]
    """Sums of weight x (x, y, x^2 + y^2) of both halves together, from the middle sample."""
    k = even.shape[0]
    middle = (k - 1) / 2
    across = down = moment = 0.0
    for y in range(k):
        line = offset = square = np.float32(0)
        for x in range(k):
            both = even[y, x] + odd[y, x]
            at = np.float32(x) - np.float32(middle)
            line += both
            offset += both * at
            square += both * at * at
        across += float(offset)
        down += (y - middle) * float(line)
        moment += float(square) + (y - middle) ** 2 * float(line)
    return across, down, moment


@jit
def _binned(image, first, share, lines, turned, out):  # type: ignore[no-untyped-def]
    """The image in bins, as out[bx, by]: rows first, then the rows of what that gives, turned over."""
    _bin_rows(image, first, share, lines)
    for x in range(len(turned)):
        for by in range(len(lines)):
            turned[x, by] = lines[by, x]
    _bin_rows(turned, first, share, out)


@jit
def _bin_rows(image, first, share, out):  # type: ignore[no-untyped-def]
    """Add up rows: row i gives the shares share[i] to the bins first[i] and the next."""
    out[:] = 0
    for row in range(len(first)):
        for part in range(2):
            into, weight = first[row] + part, share[row, part]
            if weight > 0:
                for i in range(image.shape[1]):
                    out[into, i] += weight * image[row, i]


@jit
def _normalise(halves, first, share, margins, psf, binned, found):  # type: ignore[no-untyped-def]
    k, bins = psf.shape[-1], binned.shape[-1]
    parts = np.empty((2, bins, bins), np.float32)
    lines, turned = np.empty((bins, k), np.float32), np.empty((k, bins), np.float32)
    for n in range(len(halves)):
        even, odd = halves[n, 0], halves[n, 1]
        noise, _, total = _noise(even, odd, margins[0])
        if total == 0:
            psf[n], binned[n], found[n] = np.nan, np.nan, np.nan
            continue
        scale = np.float32(1 / total)
        for y in range(k):
            for x in range(k):
                psf[n, y, x] = (even[y, x] + odd[y, x]) * scale
        for half in range(2):
            _binned(halves[n, half], first, share, lines, turned, parts[half])
        for y in range(bins):
            for x in range(bins):
                binned[n, y, x] = (parts[0, x, y] + parts[1, x, y]) * scale
        across, down, moment = _moments(even, odd)
        spread = moment / total - (across / total) ** 2 - (down / total) ** 2 - SPLAT_VARIANCE_PX2
        found[n, 0] = noise
        found[n, 1], _, _ = _noise(parts[0], parts[1], margins[1])
        found[n, 2] = np.sqrt(max(spread, 0.0))
