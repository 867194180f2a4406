"""How sure the mean and the 95th percentile of errors are: resamples of the points, the same for every row.

The paired bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.

Legend: D draws, n points, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 1000
SURE = 0.95
BLOCK = 2**21  # points of as many draws as are resampled at a time


@dataclass(frozen=True)
class Replicates:
    """The mean and the 95th percentile of one row's errors in each draw [D]."""

    mean: Array
    p95: Array

    def intervals(self) -> dict[str, list[float]]:
        """The 95 % interval of both, [low, high], as a report has them."""
        ends = [(1 - SURE) / 2, (1 + SURE) / 2]
        return {f"{name}_interval": np.quantile(getattr(self, name), ends).tolist() for name in ("mean", "p95")}


def replicates(
    errors: Mapping[str, Array], groups: Sequence[int] | None = None, seed: int = 0
) -> dict[str, Replicates]:
    """Replicates of every row of `errors` [n], all from the same draws, so that rows may be compared.

    `groups`: how many points each of G groups has, one after the other; groups are drawn first (as often as there
    are), then points within each. Without it the points are one group.
    """
    count = len(next(iter(errors.values())))
    sizes = np.array([count] if groups is None else groups)
    assert sizes.sum() == count
    orders = {name: np.argsort(values, kind="stable") for name, values in errors.items()}
    found: dict[str, list[tuple[Array, Array]]] = {name: [] for name in errors}
    for drawn in _draws(sizes, np.random.default_rng(seed)):
        for name, values in errors.items():
            found[name].append((drawn @ values / drawn.sum(axis=1), _p95(drawn[:, orders[name]], values[orders[name]])))
    return {name: Replicates(*map(np.concatenate, zip(*parts, strict=True))) for name, parts in found.items()}


def _draws(sizes: NDArray[np.int64], rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """How often each point occurs [draws, n], in blocks of draws."""
    starts, count, most = np.cumsum(sizes) - sizes, sizes.sum(), sizes.max()
    at_once = max(1, BLOCK // int(most))
    for first in range(0, DRAWS, at_once):
        draws = min(at_once, DRAWS - first)
        drawn = np.zeros((draws, count), dtype=np.int64)
        for group in rng.integers(len(sizes), size=(len(sizes), draws)):
            size = sizes[group][:, None]
            points = starts[group][:, None] + (rng.random((draws, most)) * size).astype(np.int64)
            flat = (points + count * np.arange(draws)[:, None])[np.arange(most) < size]
            drawn += np.bincount(flat, minlength=draws * count).reshape(draws, count)
        yield drawn


def _p95(drawn: NDArray[np.int64], ascending: Array) -> Array:
    """The 95th percentile, as np.quantile has it, of values that occur `drawn` [D, n] times [D]."""
    below = drawn.cumsum(axis=1)
    rank = 0.95 * (below[:, -1] - 1)
    low = np.floor(rank).astype(np.int64)
    lower, upper = (
        ascending[np.minimum((below <= at[:, None]).sum(axis=1), len(ascending) - 1)] for at in (low, low + 1)
    )
    return np.asarray(lower + (rank - low) * (upper - lower))


def ratio(ours: Array, theirs: Array, replicas: tuple[Replicates, Replicates]) -> dict[str, Any]:
    """Ratios of the mean and of the 95th percentile of two rows, each with its one-sided 95 % upper bound."""
    a, b = replicas
    return {
        "mean": ours.mean() / theirs.mean(),
        "mean_bound": np.quantile(a.mean / b.mean, SURE),
        "p95": np.quantile(ours, 0.95) / np.quantile(theirs, 0.95),
        "p95_bound": np.quantile(a.p95 / b.p95, SURE),
    }
