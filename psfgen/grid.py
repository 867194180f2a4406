"""Where the kernels stand: field points and pupil seeds. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LAYOUTS = ("grid", "cells", "random")


def field_axes(count: int, layout: str, field_max: float, seed: int) -> tuple[Array, Array]:
    """Ascending `field_x`, `field_y` of a layout, in half sensor sides.

    - "grid": `count` values a side over [-field_max, field_max]; 1 is the axis alone
    - "cells": the centres of that grid's cells, `count - 1` a side
    - "random": `count` a side, one seeded draw in each of `count` equal strips of the same span, so that
      rows and columns are random and yet reach everywhere
    """
    if layout == "random":
        rng = np.random.default_rng(np.random.SeedSequence([seed, LAYOUTS.index(layout)]))
        strips = (2 * (np.arange(count) + rng.uniform(size=(2, count))) / count - 1) * field_max
        return strips[0], strips[1]
    nodes = np.linspace(-field_max, field_max, count) if count > 1 else np.zeros(1)
    axis = (nodes[1:] + nodes[:-1]) / 2 if layout == "cells" else nodes
    axis = (axis - axis[::-1]) / 2  # exactly symmetric, so that mirrored points are mirrored to the last bit
    return axis, axis.copy()


def pupil_seed(seed: int, layout: str) -> tuple[int, float]:
    """What places the pupil points: a seed (Sobol sets), and an angle in radians (spirals).

    They differ between layouts, so that a held-out store does not share its sampling error with the
    training grid.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1000 + LAYOUTS.index(layout)]))
    return int(rng.integers(2**31)), float(rng.uniform(0, 2 * np.pi))
