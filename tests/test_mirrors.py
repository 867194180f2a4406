"""Mirrored field points: which stand for which, and that their kernels are mirrored as the light is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from numpy.typing import NDArray

from psfgen.engines import Engine
from psfgen.engines.geometric import GeometricEngine
from psfgen.grid import field_axes
from psfgen.mirrors import Folding, fold, unfold
from psfgen.optics.lens import Lens
from psfgen.plan import Plan
from psfgen.render import render
from psfgen.store import Store, schema

Array = NDArray[np.float64]
PX = 7
SQUARE, WIDE = (4.0, 4.0), (6.0, 4.0)


def comet(x: float, y: float, focus: int, wave: int) -> Array:
    """A kernel [row, column] of a symmetric lens at the point (x, y) of the sensor, without symmetry of its own.

    A function of what a rotation or a mirror leaves as it is: lengths and the product of point and sample.
    """
    u = schema.centres_um(PX, 0.5)
    across, up = np.meshgrid(u, u[::-1])
    along = x * across + y * up
    r2 = across**2 + up**2
    value: Array = np.exp(-r2 / 3 + 0.4 * along) * (1.5 + np.sin((2 + focus) * along + (1 + wave) * r2))
    return value


def kernels_at(field_x: Array, field_y: Array, sensor_mm: tuple[float, float]) -> NDArray[np.float32]:
    """Kernels [points, F, W, k, k], each from the formula, by brute force."""
    points = [(x * sensor_mm[0] / 2, y * sensor_mm[1] / 2) for y in field_y for x in field_x]
    return np.array([[[comet(x, y, f, w) for w in range(3)] for f in range(2)] for x, y in points], np.float32)


def axes(grid: int, layout: str = "grid") -> tuple[Array, Array]:
    return field_axes(grid, layout, 1.0, 0)


def unfolded(folding: Folding, truth: NDArray[np.float32]) -> NDArray[np.float32]:
    """All kernels from those of the representatives alone, written in a shuffled order to shuffled places."""
    wanted, source = np.unique(folding.representative, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(source))
    out = np.full((2, len(source) + 3, *truth.shape[2:]), np.nan, np.float32)
    parts = (folding.swap[order], folding.flip_x[order], folding.flip_y[order])
    unfold(truth[wanted], source[order], *parts, order + 3, out)
    assert np.isnan(out[:, :3]).all(), "written beyond the points asked for"
    return out[:, 3:].swapaxes(0, 1)


@pytest.mark.parametrize("sensor_mm", [SQUARE, WIDE])
@pytest.mark.parametrize(
    ("layout", "grid"), [("grid", 1), ("grid", 2), ("grid", 4), ("grid", 5), ("cells", 4), ("cells", 5), ("random", 4)]
)
def test_kernels_are_mirrored_as_the_light_is(layout: str, grid: int, sensor_mm: tuple[float, float]) -> None:
    field_x, field_y = axes(grid, layout)
    truth = kernels_at(field_x, field_y, sensor_mm)
    folding = fold(field_x, field_y, sensor_mm, symmetric=True)
    np.testing.assert_allclose(unfolded(folding, truth), truth, rtol=1e-5)


@pytest.mark.parametrize(
    ("grid", "layout", "sensor_mm", "count"),
    [
        (1, "grid", SQUARE, 1),
        (2, "grid", SQUARE, 1),
        (4, "grid", SQUARE, 3),
        (5, "grid", SQUARE, 6),
        (20, "grid", SQUARE, 55),
        (5, "cells", SQUARE, 3),
        (5, "grid", WIDE, 9),
        (4, "grid", WIDE, 4),
        (5, "random", SQUARE, 25),
    ],
)
def test_as_few_points_as_the_symmetry_allows_stand_for_all(
    grid: int, layout: str, sensor_mm: tuple[float, float], count: int
) -> None:
    """And they are those with x >= y >= 0, as far as the axes allow."""
    field_x, field_y = axes(grid, layout)
    folding = fold(field_x, field_y, sensor_mm, symmetric=True)
    representatives = np.unique(folding.representative)
    assert len(representatives) == count
    assert (folding.representative[representatives] == representatives).all()
    row, column = np.divmod(representatives, len(field_x))
    if layout != "random":
        assert (field_x[column] >= 0).all()
        assert (field_y[row] >= 0).all()
        assert sensor_mm == WIDE or (field_x[column] >= field_y[row]).all()
    own = ~(folding.swap | folding.flip_x | folding.flip_y)
    assert np.array_equal(np.flatnonzero(own), representatives)


def test_a_point_has_eight_images() -> None:
    folding = fold(*axes(6), SQUARE, symmetric=True)
    images = folding.representative == 3 * 6 + 4
    found = zip(folding.swap[images], folding.flip_x[images], folding.flip_y[images], strict=True)
    assert len({tuple(map(bool, image)) for image in found}) == images.sum() == 8


def test_an_axis_that_is_not_symmetric_does_not_fold() -> None:
    """Each axis for itself, and the diagonal only where the axes are equal."""
    even, odd = np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 0.0, 0.9])
    for field_x, field_y, count in ((even, odd, 6), (odd, even, 6), (odd, odd, 9), (even, even * 0.9, 4)):
        truth = kernels_at(field_x, field_y, SQUARE)
        folding = fold(field_x, field_y, SQUARE, symmetric=True)
        assert len(np.unique(folding.representative)) == count
        np.testing.assert_allclose(unfolded(folding, truth), truth, rtol=1e-5)
    longer = np.array([-1.0, -0.5, 0.5, 1.0])
    assert len(np.unique(fold(even, longer, SQUARE, symmetric=True).representative)) == 2 * 2


def test_a_lens_that_is_not_symmetric_does_not_fold() -> None:
    folding = fold(*axes(4), SQUARE, symmetric=False)
    assert folding.representative.tolist() == list(range(16))
    assert not (folding.swap | folding.flip_x | folding.flip_y).any()


# --- in a store -------------------------------------------------------------------------------------------------------


@pytest.fixture
def general_path(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every field point is traced for itself."""
    plain = GeometricEngine.__init__

    def general(self: GeometricEngine, lens: Lens, plan: Plan) -> None:
        plain(self, lens, plan)
        self.symmetric = False

    monkeypatch.setattr(GeometricEngine, "__init__", general)
    return monkeypatch


def assert_same_within_noise(one: Store, other: Store) -> None:
    for array, noise in (("psf", "noise"), ("psf_binned", "noise_binned")):
        a, b = one.read(array), other.read(array)
        error = np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))
        bound = np.maximum(one.read(noise), other.read(noise))  # each bounds nearly every kernel
        assert (error <= 1.5 * bound).mean() >= 0.95, array
        assert (error <= 5 * bound).all(), array
        assert (error > 0).any(), "the same rays were traced"
    for name in ("throughput", "captured"):
        np.testing.assert_allclose(one.read(name), other.read(name), atol=0.01)
    for name in ("chief_x_mm", "chief_y_mm"):
        np.testing.assert_allclose(one.read(name), other.read(name), atol=1e-8)


@pytest.mark.parametrize("changes", [{"grid": 4}, {"grid": 5, "sensor_mm": "30,20"}, {"grid": 5, "layout": "cells"}])
def test_mirrors_change_nothing_but_the_noise(
    tmp_path: Path, general_path: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A whole small grid, against the same grid with every point traced."""
    job: dict[str, Any] = {"spp": 4096, "depth": "1m,inf", "field_max": 0.9, **changes}
    traced = render(tiny(tmp_path / "traced.zarr", **job))
    general_path.undo()
    mirrored = render(tiny(tmp_path / "mirrored.zarr", **job))
    rays = [sum(store.ledger.read(block)["rays"] for block in store.blocks) for store in (mirrored, traced)]
    assert rays[0] < rays[1] / 2
    assert_same_within_noise(mirrored, traced)


def test_an_engine_says_whether_its_points_mirror_each_other(tmp_path: Path) -> None:
    from psfgen.specimens import Specimens

    def engine(**changes: Any) -> Engine:
        config = tiny(tmp_path, **changes)
        lens = Lens(config.lens)
        return Specimens(lens, Plan.of(config, lens)).engine(0)

    assert engine().symmetric
    assert not engine(perturb=({"element": 0, "decentre_mm": (0.01, 0)},)).symmetric
    assert engine(perturb=({"element": 0, "thickness_mm": 0.01},)).symmetric, "still round"
    assert not engine(engine="deeplens", depth="1m").symmetric, "its rays are random"
