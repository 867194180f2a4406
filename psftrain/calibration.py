"""Whether a model knows how much it errs: expected against true errors.

Legend: n scored points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

Array = NDArray[np.float64]

ABOVE_FLOOR = 1.5  # times the noise of the truth: where less is seen, it is the truth that errs
FEWEST = 8
GROUPS = 10


def judge(expected: Array, errors: Array, floor: Array) -> dict[str, Any]:
    """How `expected` errors [n] agree with the true ones, over the points whose error stands out of the noise.

    `spearman`, the rank correlation; `median_ratio` of expected to true errors; `n` such points. None where there are
    too few.
    """
    seen = (errors > ABOVE_FLOOR * floor) & np.isfinite(expected)
    if seen.sum() < FEWEST:
        return {"n": int(seen.sum()), "spearman": None, "median_ratio": None}
    return {
        "n": int(seen.sum()),
        "spearman": float(spearmanr(expected[seen], errors[seen]).statistic),
        "median_ratio": float(np.median(expected[seen] / errors[seen])),
    }


def reliability(expected: Array, errors: Array) -> tuple[Array, Array]:
    """Points in groups of like expectation: the mean expected and the mean true error [groups] of each.

    Points of which nothing is expected (NaN) are left out.
    """
    told = np.isfinite(expected)
    expected, errors = expected[told], errors[told]
    groups = [group for group in np.array_split(np.argsort(expected), GROUPS) if len(group)]
    return np.array([expected[g].mean() for g in groups]), np.array([errors[g].mean() for g in groups])
