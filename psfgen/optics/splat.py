"""From sensor hits to kernels.

Legend: P field points, N rays, k kernel side, b bins a side. Two interleaved halves of the rays are kept
apart, because their difference tells the sampling error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_NOISE = 10.0  # of kernels so noisy that their halves share no sample


def deposit(xy_um: Array, valid: NDArray[np.bool_], kernel_px: int, pitch_um: float) -> Array:
    """Bilinear splat of hits [P, N, 2] (um, upright, from the kernel's centre) onto samples -> [P, 2, k, k].

    Row 0 is +y. The second axis holds the even and the odd rays. A hit spreads unit weight over the four
    samples around it; what falls on no sample is lost, so that a sum below the count of rays is truncation.
    """
    points, rays = valid.shape
    side = kernel_px + 2  # one sample of margin takes the shares that miss the window
    centre = (kernel_px - 1) / 2
    column = xy_um[..., 0] / pitch_um + centre
    row = centre - xy_um[..., 1] / pitch_um
    inside = valid & (column > -1) & (column < kernel_px) & (row > -1) & (row < kernel_px)
    image = 2 * np.arange(points)[:, None] + np.arange(rays) % 2
    column, row, image = column[inside], row[inside], image[inside]
    left, top = np.floor(column), np.floor(row)
    right_share, bottom_share = column - left, row - top
    corner = (image * side + top.astype(np.int64) + 1) * side + left.astype(np.int64) + 1
    total = np.zeros(points * 2 * side * side)
    for offset, share in (
        (0, (1 - bottom_share) * (1 - right_share)),
        (1, (1 - bottom_share) * right_share),
        (side, bottom_share * (1 - right_share)),
        (side + 1, bottom_share * right_share),
    ):
        total += np.bincount(corner + offset, weights=share, minlength=total.size)
    return total.reshape(points, 2, side, side)[..., 1:-1, 1:-1]


def overlap_matrix(kernel_px: int, bins: int) -> Array:
    """Share of each sample that falls into each bin [bins, k]: samples are `1` wide, bins k / bins."""
    edges = np.linspace(0, kernel_px, bins + 1)
    sample = np.arange(kernel_px)
    upper = np.minimum(edges[1:, None], sample + 1)
    lower = np.maximum(edges[:-1, None], sample)
    share: Array = np.clip(upper - lower, 0, None)
    return share


@dataclass(frozen=True)
class Kernels:
    """Normalised kernels with their error estimates; NaN where nothing was deposited."""

    psf: Array  # [..., k, k]
    psf_binned: Array  # [..., b, b]
    noise: Array  # [...]
    noise_binned: Array  # [...]


def normalise(halves: Array, bins: int) -> Kernels:
    """Deposits [..., 2, k, k] -> kernels that sum to 1, with `noise` and `noise_binned`.

    Noise = |A - B| / (2 |K|), A and B the kernels of the even and the odd rays and K the true kernel, for
    which <A, B> stands, since the product of two halves holds no noise energy. For independent rays it is
    the expected relative L2 error, for a spiral a safe bound of it. It ends at MOST_NOISE.
    """
    total = halves.sum(axis=-3)
    share = overlap_matrix(halves.shape[-1], bins)
    psf, psf_binned = _unit_sum(total), _unit_sum(share @ total @ share.T)
    even, odd = halves[..., 0, :, :], halves[..., 1, :, :]
    noise = _half_difference(even, odd, psf)
    noise_binned = _half_difference(share @ even @ share.T, share @ odd @ share.T, psf_binned)
    return Kernels(psf, psf_binned, noise, noise_binned)


def _unit_sum(kernel: Array) -> Array:
    total = kernel.sum(axis=(-2, -1), keepdims=True)
    return np.divide(kernel, total, out=np.full_like(kernel, np.nan), where=total > 0)


def _half_difference(even: Array, odd: Array, kernel: Array) -> Array:
    a, b = np.nan_to_num(_unit_sum(even)), np.nan_to_num(_unit_sum(odd))
    energy = np.einsum("...yx,...yx->...", a, b)
    difference = np.linalg.norm(a - b, axis=(-2, -1))
    noise = np.divide(difference, 2 * np.sqrt(energy), out=np.full_like(energy, MOST_NOISE), where=energy > 0)
    dark = np.isnan(kernel).any(axis=(-2, -1))
    return np.where(dark, np.nan, np.minimum(noise, MOST_NOISE))
