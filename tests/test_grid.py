"""Where the kernels stand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from psfgen.grid import LAYOUTS, field_axes, pupil_seed


def test_the_grid_spans_the_field_symmetrically() -> None:
    x, y = field_axes(20, "grid", 0.6, seed=0)
    np.testing.assert_allclose(x, np.linspace(-0.6, 0.6, 20), rtol=1e-15)
    assert np.array_equal(x, -x[::-1]), "mirrored points must be mirrored to the last bit"
    assert np.array_equal(x, y)


def test_a_grid_of_one_is_the_axis_alone() -> None:
    assert [axis.tolist() for axis in field_axes(1, "grid", 0.6, seed=0)] == [[0.0], [0.0]]


@pytest.mark.parametrize("count", [2, 5, 20])
def test_cells_are_the_centres_between_grid_points(count: int) -> None:
    nodes, _ = field_axes(count, "grid", 1.0, seed=0)
    cells, _ = field_axes(count, "cells", 1.0, seed=0)
    np.testing.assert_allclose(cells, (nodes[1:] + nodes[:-1]) / 2, atol=1e-15)


def test_random_is_seeded_sorted_and_inside_the_field() -> None:
    x, y = field_axes(200, "random", 0.6, seed=3)
    for axis in (x, y):
        assert (np.diff(axis) > 0).all()
        assert np.abs(axis).max() <= 0.6
        assert np.abs(np.quantile(axis, [0.25, 0.5, 0.75]) - [-0.3, 0, 0.3]).max() < 0.12  # uniform
    assert not np.array_equal(x, y)
    assert np.array_equal(x, field_axes(200, "random", 0.6, seed=3)[0])
    assert not np.array_equal(x, field_axes(200, "random", 0.6, seed=4)[0])


def test_every_layout_and_seed_turns_the_pupil_differently() -> None:
    """Else a held-out store would share its sampling error with the training grid."""
    seeds = [pupil_seed(seed, layout) for seed in (0, 1) for layout in LAYOUTS]
    assert all(isinstance(seed, int) and 0 <= seed < 2**31 for seed, _ in seeds)
    assert all(0 <= turn < 2 * math.pi for _, turn in seeds)
    assert max(turn for _, turn in seeds) > math.pi, "turns are radians"
    assert all(a[0] != b[0] and abs(a[1] - b[1]) > 1e-3 for a, b in combinations(seeds, 2))
    assert pupil_seed(0, "cells") == seeds[1]
