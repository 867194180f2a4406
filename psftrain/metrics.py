"""How wrong a kernel is. All functions compare stacks [N, W, y, x] of kernels; row 0 is +y.

Lengths are in samples of the full-size kernel (`sample_px` samples a bin), so that stores with other bins
compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Stack = NDArray[Any]
Array = NDArray[np.float64]


def rel_l2(found: Stack, truth: Stack) -> Array:
    """|K^ - K| / |K| over the whole stack of each example [N]."""
    flat = (len(truth), -1)
    error = np.linalg.norm((found - truth).reshape(flat).astype(np.float64), axis=1)
    return np.asarray(error / np.linalg.norm(truth.reshape(flat).astype(np.float64), axis=1))


def _axes(kernels: Stack, sample_px: float) -> tuple[Array, Array]:
    rows, columns = kernels.shape[-2:]
    y = ((rows - 1) / 2 - np.arange(rows)) * sample_px
    x = (np.arange(columns) - (columns - 1) / 2) * sample_px
    return x, y


def centroids_px(kernels: Stack, sample_px: float) -> Array:
    """Centre of mass (x, y) of each channel [N, W, 2]."""
    x, y = _axes(kernels, sample_px)
    total = kernels.sum(axis=(-2, -1), dtype=np.float64)
    return np.stack([kernels.sum(axis=-2) @ x / total, kernels.sum(axis=-1) @ y / total], axis=-1)


def radii_px(kernels: Stack, sample_px: float, shares: tuple[float, ...] = (0.5, 0.8)) -> dict[str, Array]:
    """RMS radius and encircled-energy radii of each channel [N, W], about its own centroid.

    "rms", and "ee50" and so on for each share. The energy within a radius is that of the bins whose
    centres lie within it, interpolated linearly between bins.
    """
    x, y = _axes(kernels, sample_px)
    centre = centroids_px(kernels, sample_px)
    dx, dy = x - centre[..., :1], y - centre[..., 1:]
    squared = (dy**2)[..., :, None] + (dx**2)[..., None, :]
    total = kernels.sum(axis=(-2, -1), dtype=np.float64)
    variance = (kernels * squared).sum(axis=(-2, -1)) / total
    found = {"rms": np.sqrt(np.clip(variance, 0, None))}
    flat = squared.reshape(*squared.shape[:-2], -1)
    order = np.argsort(flat, axis=-1)
    radius = np.sqrt(np.take_along_axis(flat, order, axis=-1))
    energy = np.cumsum(np.take_along_axis(kernels.reshape(flat.shape), order, axis=-1), axis=-1) / total[..., None]
    for share in shares:
        after = np.argmax(energy >= share, axis=-1)[..., None]
        before = np.clip(after - 1, 0, None)
        e0, e1 = (np.take_along_axis(energy, at, axis=-1)[..., 0] for at in (before, after))
        r0, r1 = (np.take_along_axis(radius, at, axis=-1)[..., 0] for at in (before, after))
        part = np.divide(share - e0, e1 - e0, out=np.ones_like(e0), where=e1 > e0)
        found[f"ee{share * 100:.0f}"] = r0 + np.clip(part, 0, 1) * (r1 - r0)
    return found


def mtf(kernels: Stack) -> Array:
    """Modulation transfer of each channel up to the bins' Nyquist frequency [N, W, fy, fx]; 1 at zero."""
    spectrum = np.abs(np.fft.rfft2(kernels, axes=(-2, -1)))
    return np.asarray(spectrum / spectrum[..., :1, :1])


def compare(found: Stack, truth: Stack, sample_px: float) -> dict[str, Array]:
    """Every metric of each example [N] that a report averages; `*_truth` are the sizes to relate to."""
    shift = np.linalg.norm(centroids_px(found, sample_px) - centroids_px(truth, sample_px), axis=-1)
    values = {
        "rel_l2": rel_l2(found, truth),
        "centroid_px": shift.mean(axis=-1),
        "mtf": np.abs(mtf(found) - mtf(truth)).mean(axis=(-3, -2, -1)),
    }
    ours, theirs = radii_px(found, sample_px), radii_px(truth, sample_px)
    for key, name in (("rms", "rms_radius"), ("ee50", "ee50"), ("ee80", "ee80")):
        values[name] = np.abs(ours[key] - theirs[key]).mean(axis=-1)
        values[f"{name}_truth"] = theirs[key].mean(axis=-1)
    return values


def summarise_errors(error: Array) -> dict[str, Any]:
    """What a report says of relative errors [N]."""
    return {"mean": error.mean(), "median": np.median(error), "p95": np.quantile(error, 0.95)}


def summarise(values: dict[str, Array]) -> dict[str, Any]:
    """The numbers of one row of a report. Radii: mean absolute error / mean true radius."""
    row: dict[str, Any] = {
        "rel_l2": summarise_errors(values["rel_l2"]),
        "centroid_px": values["centroid_px"].mean(),
        "mtf": values["mtf"].mean(),
    }
    for name in ("rms_radius", "ee50", "ee80"):
        row[name] = values[name].mean() / max(values[f"{name}_truth"].mean(), 1e-12)
    return row
