"""Classical interpolation against what each method reproduces exactly, and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from psftrain.baselines import CLASSICAL, COMPONENTS, MANY_NODES, Nodes, best_classical, brackets

Array = NDArray[Any]
Field = Callable[[Array, Array], Array]

EVEN = np.linspace(-1, 1, 6)
UNEVEN = np.array([-1.0, -0.7, -0.1, 0.2, 0.45, 0.9])  # as layout `random` has them
D = 7


def nodes_of(field: Field, y: Array = EVEN, x: Array = UNEVEN, dark: tuple[tuple[int, int], ...] = ()) -> Nodes:
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    values = field(grid_y, grid_x)
    for row, column in dark:
        values[row, column] = np.nan
    return Nodes(y, x, values)


def polynomial(power: int, mixed: bool, seed: int = 0) -> Field:
    """D random polynomials: x^i y^j up to `power` in each variable, or (unmixed) in total."""
    weights = np.random.default_rng(seed).normal(size=(power + 1, power + 1, D))
    if not mixed:
        weights[np.add.outer(range(power + 1), range(power + 1)) > power] = 0

    def field(y: Array, x: Array) -> Array:
        return np.asarray(np.polynomial.polynomial.polyval2d(y, x, weights).transpose(*range(1, y.ndim + 1), 0))

    return field


def inside(nodes: Nodes, count: int = 200, seed: int = 1) -> Array:
    """Random queries (y, x) within the nodes."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.uniform(axis[0], axis[-1], count) for axis in (nodes.y, nodes.x)], axis=-1)


def query(name: str, nodes: Nodes, yx: Array) -> Array:
    how, needed = CLASSICAL[name]
    assert min(len(nodes.y), len(nodes.x)) >= needed
    return how(nodes)(yx)


def cells(nodes: Nodes, yx: Array) -> tuple[Array, Array]:
    """Row and column of the lower corner of the cell of each query."""
    found = (np.searchsorted(axis, yx[:, i], side="right") - 1 for i, axis in enumerate((nodes.y, nodes.x)))
    row, column = found
    return row, column


def touches_dark(nodes: Nodes, yx: Array) -> Array:
    row, column = cells(nodes, yx)
    return np.asarray([not nodes.lit[r : r + 2, c : c + 2].all() for r, c in zip(row, column, strict=True)])


# --- the contract of the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSICAL)
class TestEveryRow:
    @pytest.mark.parametrize("axes", [(EVEN, EVEN), (EVEN, UNEVEN), (UNEVEN, EVEN[:5])])
    def test_is_exact_at_the_nodes(self, name: str, axes: tuple[Array, Array]) -> None:
        nodes = nodes_of(polynomial(5, mixed=True), *axes)
        assert query(name, nodes, nodes.points) == pytest.approx(nodes.values.reshape(-1, D), abs=1e-6)

    def test_reproduces_a_constant(self, name: str) -> None:
        nodes = nodes_of(polynomial(0, mixed=True))
        yx = inside(nodes)
        assert query(name, nodes, yx) == pytest.approx(np.tile(nodes.values[0, 0], (len(yx), 1)))

    def test_answers_with_the_fewest_nodes_it_needs(self, name: str) -> None:
        needed = CLASSICAL[name][1]
        nodes = nodes_of(polynomial(0, mixed=True), EVEN[:needed], UNEVEN[:needed])
        yx = inside(nodes, 5)
        assert query(name, nodes, yx) == pytest.approx(np.tile(nodes.values[0, 0], (5, 1)))

    def test_knows_y_from_x(self, name: str) -> None:
        """A field that changes along y alone, asked along x alone, does not change."""
        nodes = nodes_of(lambda y, x: np.repeat(y[..., None], D, axis=-1))
        yx = np.stack([np.full(20, EVEN[2]), np.linspace(-0.9, 0.8, 20)], axis=-1)
        assert query(name, nodes, yx) == pytest.approx(np.full((20, D), EVEN[2]), abs=1e-6)

    def test_mixes_no_numbers_of_a_kernel(self, name: str) -> None:
        """Number by number: a permutation before is a permutation after."""
        nodes, order = nodes_of(polynomial(3, mixed=True)), np.random.default_rng(0).permutation(D)
        yx = inside(nodes, 20)
        permuted = Nodes(nodes.y, nodes.x, nodes.values[..., order])
        assert query(name, permuted, yx) == pytest.approx(query(name, nodes, yx)[:, order])

    def test_leaves_its_nodes_alone(self, name: str) -> None:
        nodes = nodes_of(polynomial(3, mixed=True), dark=((1, 2),))
        before = nodes.values.copy()
        query(name, nodes, inside(nodes))
        assert np.array_equal(nodes.values, before, equal_nan=True)

    def test_is_finite_away_from_masked_nodes(self, name: str) -> None:
        nodes = nodes_of(polynomial(3, mixed=True), dark=((0, 0), (2, 3), (5, 5)))
        yx = inside(nodes)
        away = ~touches_dark(nodes, yx)
        assert 0 < away.sum() < len(yx)
        assert np.isfinite(query(name, nodes, yx)[away]).all()


# --- what each reproduces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("bilinear", polynomial(1, mixed=True)),
        ("bicubic", polynomial(3, mixed=True)),
        ("rbf_tps", polynomial(1, mixed=False)),
        ("pca_rbf", polynomial(1, mixed=False)),
    ],
)
def test_reproduces_its_polynomials_exactly(name: str, field: Field) -> None:
    nodes = nodes_of(field)
    yx = inside(nodes)
    assert query(name, nodes, yx) == pytest.approx(field(*yx.T), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("nearest", polynomial(1, mixed=False)),
        ("bilinear", polynomial(2, mixed=False)),
        ("bicubic", polynomial(4, mixed=False)),
        ("rbf_tps", polynomial(2, mixed=False)),
    ],
)
def test_and_no_higher_ones(name: str, field: Field) -> None:
    """So that the rows are different methods."""
    nodes = nodes_of(field)
    yx = inside(nodes)
    assert np.abs(query(name, nodes, yx) - field(*yx.T)).max() > 1e-3


def test_nearest_by_brute_force() -> None:
    nodes = nodes_of(polynomial(5, mixed=True))
    yx = inside(nodes)
    closest = np.square(yx[:, None] - nodes.points[None]).sum(axis=-1).argmin(axis=1)
    assert query("nearest", nodes, yx) == pytest.approx(nodes.values.reshape(-1, D)[closest])


def test_pca_equals_rbf_where_its_components_suffice() -> None:
    """Thin-plate splines are linear in the values, so a full basis changes nothing."""
    nodes = nodes_of(polynomial(5, mixed=True))
    yx = inside(nodes)
    assert query("pca_rbf", nodes, yx) == pytest.approx(query("rbf_tps", nodes, yx), abs=1e-8)


def test_pca_keeps_the_leading_components_alone() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(6, 7, 2 * COMPONENTS))
    nodes = Nodes(EVEN, np.linspace(-1, 1, 7), wide)
    found = query("pca_rbf", nodes, nodes.points)
    flat = wide.reshape(42, -1)
    _, sizes, _ = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    assert np.linalg.matrix_rank(found - found.mean(axis=0), tol=1e-6) == COMPONENTS
    lost = np.square(found - flat).sum()
    assert lost == pytest.approx(np.square(sizes[COMPONENTS:]).sum(), rel=1e-6), "the best approximation of its rank"


def test_rbf_is_local_where_nodes_are_many() -> None:
    """Exact at the nodes and for affine fields all the same."""
    side = int(np.sqrt(MANY_NODES)) + 1
    axis, field = np.linspace(-1, 1, side), polynomial(1, mixed=False)
    nodes = nodes_of(field, axis, axis)
    assert len(nodes.points) > MANY_NODES
    yx = inside(nodes, 10)
    assert query("rbf_tps", nodes, yx) == pytest.approx(field(*yx.T), abs=1e-6)


# --- masked nodes -----------------------------------------------------------------------------------------------------

DARK = ((0, 0), (2, 3), (2, 4), (5, 2))


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_cells_that_touch_a_masked_node_are_skipped_and_no_other(name: str) -> None:
    nodes = nodes_of(polynomial(3, mixed=True), dark=DARK)
    yx = inside(nodes, 600)
    found = query(name, nodes, yx)
    expected = touches_dark(nodes, yx)
    assert 50 < expected.sum() < 550
    assert np.array_equal(np.isnan(found), np.tile(expected[:, None], (1, D)))


def test_bilinear_elsewhere_is_as_if_nothing_were_masked() -> None:
    field = polynomial(3, mixed=True)
    nodes, whole = nodes_of(field, dark=DARK), nodes_of(field)
    yx = inside(nodes)
    away = ~touches_dark(nodes, yx)
    assert query("bilinear", nodes, yx[away]) == pytest.approx(query("bilinear", whole, yx[away]))


def test_bicubic_is_exact_at_lit_nodes_beside_masked_ones() -> None:
    nodes = nodes_of(polynomial(3, mixed=True), dark=DARK)
    at = np.argwhere(nodes.lit)
    apart = (np.abs(at[:, None] - np.array(DARK)).max(axis=-1) > 1).all(axis=1)
    assert apart.sum() > 5
    assert query("bicubic", nodes, nodes.points[apart]) == pytest.approx(nodes.values[nodes.lit][apart], abs=1e-9)


def test_bicubic_does_not_ring_around_masked_nodes() -> None:
    """A constant stays one in every cell that is answered."""
    nodes = nodes_of(polynomial(0, mixed=True), dark=DARK)
    yx = inside(nodes)
    yx = yx[~touches_dark(nodes, yx)]
    constant = nodes.values[nodes.lit][0]
    assert query("bicubic", nodes, yx) == pytest.approx(np.tile(constant, (len(yx), 1)))


def test_nearest_is_missing_where_the_nearest_node_is() -> None:
    nodes = nodes_of(polynomial(3, mixed=True), dark=DARK)
    yx = inside(nodes, 600)
    row, column = (np.abs(yx[:, i, None] - axis).argmin(axis=1) for i, axis in enumerate((nodes.y, nodes.x)))
    found = np.isnan(query("nearest", nodes, yx)).any(axis=1)
    assert np.array_equal(found, ~nodes.lit[row, column])
    assert 0 < found.sum() < len(yx)


@pytest.mark.parametrize("name", ["rbf_tps", "pca_rbf"])
def test_rbf_drops_masked_nodes(name: str) -> None:
    nodes = nodes_of(polynomial(3, mixed=True), dark=DARK)
    yx = inside(nodes)
    lit = nodes.lit.ravel()
    assert lit.sum() == 36 - len(DARK)
    points = np.stack(np.meshgrid(EVEN, UNEVEN, indexing="ij"), axis=-1).reshape(-1, 2)
    expected = RBFInterpolator(points[lit], nodes.values.reshape(-1, D)[lit], kernel="thin_plate_spline")(yx)
    assert query(name, nodes, yx) == pytest.approx(expected, abs=1e-8)


# --- between depths and focus distances -------------------------------------------------------------------------------

DIOPTRES = np.array([2.5, 1.0, 0.4, 0.0])  # as depths ascend


@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.2, 0.4, 0.55, 1.0, 1.9, 2.5])
def test_brackets_are_linear_in_dioptres(wanted: float) -> None:
    found = brackets(DIOPTRES, wanted)
    assert sum(weight for _, weight in found) == pytest.approx(1)
    assert sum(weight * DIOPTRES[i] for i, weight in found) == pytest.approx(wanted)
    assert all(0 <= weight <= 1 for _, weight in found)
    used = sorted(i for i, _ in found)
    if len(used) == 2:
        assert used[1] - used[0] == 1, "the two beside it"


@pytest.mark.parametrize("index", range(4))
def test_a_known_distance_is_taken_alone(index: int) -> None:
    assert brackets(DIOPTRES, float(DIOPTRES[index])) == [(index, 1.0)]
    assert brackets(DIOPTRES, float(np.nextafter(DIOPTRES[index], 9))) == [(index, 1.0)], "up to rounding"


def test_half_way_in_dioptres_is_half_of_each() -> None:
    assert dict(brackets(DIOPTRES, 0.7)) == pytest.approx({1: 0.5, 2: 0.5})


@pytest.mark.parametrize("apart", [0, 1e-12, 1e-7])
def test_one_distance_is_all_there_is(apart: float) -> None:
    """A run takes distances for the trained one that differ by rounding to six digits."""
    assert brackets(np.array([0.5]), 0.5 - apart) == [(0, 1.0)]


def test_the_best_row_is_the_plainer_of_two_that_agree() -> None:
    """To rounding; rows that are not classical do not count."""
    means = {"prior_mean": 0.01, "nearest": 0.3, "rbf_tps": 0.2 + 1e-16, "pca_rbf": 0.2 - 1e-14}
    assert best_classical(means) == "rbf_tps"
    assert best_classical({**means, "pca_rbf": 0.19}) == "pca_rbf"
    assert best_classical({"prior_mean": 0.01}) is None
