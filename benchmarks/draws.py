"""Do copies drawn from the prior of a family look like traced ones?

Legend: K copies, M places, W wavelengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psftrain.metrics import centroids_px, radii_px

Array = NDArray[np.float64]

RESAMPLES = 400
SURE = (0.025, 0.975)
MOMENTS = ("centroid_mean", "centroid_sd", "size_mean", "size_sd")


def measures(binned: Array, sample_px: float) -> tuple[Array, Array]:
    """Centroids [K, M, W, 2] and RMS radii [K, M, W] of stacks [K, M, W, y, x], in samples."""
    flat = binned.reshape(-1, *binned.shape[2:])
    size = radii_px(flat, sample_px, ())["rms"]
    return centroids_px(flat, sample_px).reshape(*binned.shape[:3], 2), size.reshape(binned.shape[:3])


def moments(centroids: Array, sizes: Array) -> dict[str, Array]:
    """Mean and standard deviation over copies, at each place and wavelength."""
    return {
        "centroid_mean": centroids.mean(axis=0),
        "centroid_sd": centroids.std(axis=0),
        "size_mean": sizes.mean(axis=0),
        "size_sd": sizes.std(axis=0),
    }


def statistics_of(traced: Array, drawn: Array, sample_px: float) -> dict[str, Any]:
    """How far moments of drawn copies [K, M, W, y, x] are from those of traced ones, over the whole field.

    Each moment's `off` is |drawn - traced| / |traced| over all places, wavelengths and axes; `ratio` is |drawn| /
    |traced|. Their 95 % intervals come from resampling copies of both.
    """
    theirs, ours = measures(traced, sample_px), measures(drawn, sample_px)
    rng = np.random.default_rng(0)
    here = _compared(moments(*theirs), moments(*ours))
    again = [_compared(moments(*_resampled(theirs, rng)), moments(*_resampled(ours, rng))) for _ in range(RESAMPLES)]
    return {
        name: {
            key: value
            for which, number in here[name].items()
            for key, value in (
                (which, number),
                (f"{which}_interval", np.quantile([each[name][which] for each in again], SURE).tolist()),
            )
        }
        for name in MOMENTS
    }


def _compared(traced: dict[str, Array], drawn: dict[str, Array]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "off": float(np.linalg.norm(drawn[name] - traced[name]) / np.linalg.norm(traced[name])),
            "ratio": float(np.linalg.norm(drawn[name]) / np.linalg.norm(traced[name])),
        }
        for name in MOMENTS
    }


def _resampled(measured: tuple[Array, Array], rng: np.random.Generator) -> tuple[Array, Array]:
    some = rng.integers(len(measured[0]), size=len(measured[0]))
    return measured[0][some], measured[1][some]
