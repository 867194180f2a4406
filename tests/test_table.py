"""Reading a table: what a model takes it takes, between its nodes it is linear, and it is fast."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training import job, make_store

import psftrain
from psfgen.errors import ConfigError, RunMismatch, StoreCorrupt, StoreError
from psfgen.rechunk import rechunk
from psfgen.store import schema
from psftrain.bake import bake
from psftrain.fidelity import random_places
from psftrain.fit import fit
from psftrain.predict import PsfModel
from psftrain.run import Trained, load_run
from psftrain.table import Lattice, Table, blend

Array = NDArray[Any]
CORNERS = [[-0.8, -0.8], [0.8, -0.8], [0.0, 0.0], [0.3, 0.8]]


class Linear(PsfModel):
    """Kernels that are linear in the field and in the dioptres of depth and focus, their products too."""

    def __init__(self, trained: Trained) -> None:
        super().__init__(trained)
        rng = np.random.default_rng(0)
        patterns = rng.normal(size=(16, 3, 5, 5)) / 2000
        self.patterns = patterns - patterns.mean(axis=(-2, -1), keepdims=True)

    def psf(
        self, field: Any, depth_mm: Any = None, focus_mm: Any = None, *, batch: int | None = None
    ) -> NDArray[np.float32]:
        xy, depth, focus = self.domain.places(field, depth_mm, focus_mm)
        factors = [xy[..., 0], xy[..., 1], 1000 / depth, 1000 / focus]
        products = [np.prod([f for i, f in enumerate(factors) if which >> i & 1], axis=0) for which in range(16)]
        products[0] = np.ones(depth.shape)
        return (1 / 25 + np.einsum("m...,mwyx->...wyx", np.array(products), self.patterns)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 1 m, 2 m and infinity, at focus distances of 1.5 m and 4 m, up to field 0.8."""
    folder = tmp_path_factory.mktemp("table")
    store = make_store(folder / "s.zarr", depth=(1000.0, 2000.0, math.inf), focus=(1500.0, 4000.0), field_max=0.8)
    fit(job(store, folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def linear(run: Path) -> Linear:
    return Linear(load_run(run))


@pytest.fixture(scope="module")
def baked(linear: Linear, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The linear model on 4 x 4 points."""
    out = tmp_path_factory.mktemp("baked") / "table.zarr"
    bake(linear, 4, None, None, out)
    return out


@pytest.fixture(scope="module")
def table(baked: Path) -> Table:
    return psftrain.open_table(baked)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Of a model trained at one depth, infinity, and one focus."""
    folder = tmp_path_factory.mktemp("single")
    fit(job(make_store(folder / "s.zarr", depth=(math.inf,), field_max=0.8), folder / "run"))
    bake(psftrain.load(folder / "run"), 5, None, None, folder / "table.zarr")
    return psftrain.open_table(folder / "table.zarr")


# --- between the nodes ------------------------------------------------------------------------------------------------


def test_what_is_linear_is_reproduced(linear: Linear, table: Table) -> None:
    """Everywhere, in the field and in dioptres, to the rounding of float32."""
    places = random_places(table.domain, 2000)
    np.testing.assert_allclose(table.psf(*places), linear.psf(*places), atol=2e-7, rtol=0)
    assert np.ptp(linear.psf(*places), axis=0).max() > 1e-3, "nothing was tested"
    assert table.bake["error"]["p95"] < 2e-6


def test_at_a_node_it_is_the_node(linear: Linear, table: Table) -> None:
    """To the last bit, at the corners and edges of field and distances too."""
    axis = np.linspace(-0.8, 0.8, 4)
    axis = (axis - axis[::-1]) / 2
    field = np.stack(np.meshgrid(axis, axis), axis=-1)
    for depth in (1000, 2000, math.inf):
        for focus in (1500, 4000):
            assert np.array_equal(table.psf(field, depth, focus), linear.psf(field, depth, focus))


def test_along_the_edges_two_nodes_count(table: Table) -> None:
    for at in np.linspace(-0.8, 0.8, 7):
        for place in ([at, 0.8], [at, -0.8], [0.8, at], [-0.8, at]):
            inside = np.array(place) * (1 - 1e-9)
            for distances in ((1000, 1500), (math.inf, 4000)):
                np.testing.assert_allclose(table.psf(place, *distances), table.psf(inside, *distances), atol=1e-7)


def test_what_rounding_puts_outside_is_the_edge(table: Table) -> None:
    beyond = 0.8 * (1 + 5e-7)
    assert np.array_equal(table.psf([beyond, -beyond], 1000, 1500), table.psf([0.8, -0.8], 1000, 1500))
    assert np.array_equal(table.psf([0, 0], 1000 * (1 - 5e-7), 1500), table.psf([0, 0], 1000, 1500))


def test_missing_nodes_spread_no_further_than_their_cells(run: Path, tmp_path: Path) -> None:
    """Without light at the corner node of 5 x 5, a neighbour's kernels and what lies beyond it are numbers."""
    nodes = [(slice(None), slice(None), row, column) for row in (3, 4) for column in (3, 4)]
    store = make_store(tmp_path / "s.zarr", grid=5, field_max=0.8, dark=nodes)
    fit(job(store, tmp_path / "run", steps=1))
    bake(psftrain.load(tmp_path / "run"), 9, None, None, tmp_path / "table.zarr")
    found = psftrain.open_table(tmp_path / "table.zarr")
    assert np.isnan(found.psf([0.8, 0.8])).all()
    assert np.isnan(found.psf([0.3, 0.7])).all(), "a corner of its cell is dark"
    assert np.isfinite(found.psf([[0.2, 0.2], [0.2, 0.7], [0.2, 0.8], [-0.8, -0.8], [0.1, 0.79]])).all()


def test_sixteen_corners(table: Table) -> None:
    """Against the sum written out."""
    places = random_places(table.domain, 50)
    index, weight = table.lattice.corners(*places)
    assert index.shape == weight.shape == (50, 16)
    assert weight.sum(axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    expected = np.einsum("qc,qck->qk", weight.astype(np.float64), table.kernels[index])
    np.testing.assert_allclose(blend(table.kernels, index, weight), expected, atol=1e-7)
    assert np.array_equal(blend(table.kernels, index, weight).reshape(50, 3, 5, 5), table.psf(*places))


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_what_a_user_needs_to_know(linear: Linear, table: Table, baked: Path) -> None:
    assert table.wavelength_um.tolist() == [0.48, 0.55, 0.64]
    assert table.pitch_um == linear.pitch_um == 8.0
    assert table.x_um.tolist() == linear.x_um.tolist()
    assert table.y_um.tolist() == linear.y_um.tolist() == [16, 8, 0, -8, -16], "row 0 is scene +y"
    assert table.field_max == pytest.approx(0.8)
    assert table.depth_mm == (1000, math.inf)
    assert table.focus_mm == pytest.approx((1500, 4000))
    for word in (
        str(baked),
        "0.48, 0.55, 0.64 um",
        "5 x 5 bins of 8 um",
        "depth 1000 to inf mm",
        "focus 1500 to 4000 mm",
        "2 x 3 x 4 x 4 nodes",
    ):
        assert word in repr(table)


def test_the_axes_of_the_field_and_of_the_distances_lead(table: Table) -> None:
    field = np.stack(np.meshgrid(np.linspace(-0.8, 0.8, 4), np.linspace(-0.8, 0.8, 3)), axis=-1)  # [3, 4, 2]
    depth, focus = np.array([1000.0, 3000.0, math.inf])[:, None], 2000.0
    found = table.psf(field, depth, focus)
    assert found.shape == (3, 4, 3, 5, 5)
    assert found.dtype == np.float32
    assert np.array_equal(found[2, 1], table.psf(field[2, 1], math.inf, 2000))
    stack = table.psf(field[0, 0], [1000, 2000, "inf"], [[1500], [4000]])
    assert stack.shape == (2, 3, 3, 5, 5)
    assert np.array_equal(stack[1, 2], table.psf(field[0, 0], math.inf, 4000))


@pytest.mark.parametrize(
    "form",
    [list, np.asarray, lambda v: np.asfortranarray(v), lambda v: torch.tensor(v, dtype=torch.float64)],
    ids=["list", "numpy", "columns first", "torch"],
)
def test_lists_arrays_and_tensors(table: Table, form: Callable[[Any], Any]) -> None:
    depth, focus = [1000.0, 2000.0, 4000.0, math.inf], [1500.0, 2000.0, 3000.0, 4000.0]
    found = table.psf(form(CORNERS), form(depth), form(focus))
    expected = np.stack([table.psf(*place) for place in zip(CORNERS, depth, focus, strict=True)])
    assert np.array_equal(found, expected)


def test_no_points_give_no_kernels(table: Table) -> None:
    assert table.psf(np.zeros((0, 2)), 2000, 2000).shape == (0, 3, 5, 5)
    assert table.psf(np.zeros((4, 0, 2)), 2000, 2000).shape == (4, 0, 3, 5, 5)


def test_what_did_not_vary_need_not_be_said(single: Table) -> None:
    found = single.psf(CORNERS)
    assert found.shape == (4, 3, 5, 5)
    assert found.sum(axis=(-2, -1)) == pytest.approx(np.ones((4, 3)), abs=1e-5)
    for given in ({"depth_mm": math.inf}, {"focus_mm": 2000}, {"depth_mm": math.inf, "focus_mm": [2000] * 4}):
        assert np.array_equal(single.psf(CORNERS, **given), found)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([0.81, 0], 2000, 2000), RunMismatch, "field 0.81 is outside the field baked for, up to 0.8"),
        (([math.nan, 0], 2000, 2000), RunMismatch, "field nan is outside"),
        (([0, 0], 900, 2000), RunMismatch, "depth 900 mm is outside the range baked for, 1000 mm to inf; bake "),
        (([0, 0], [2000, 0], 2000), RunMismatch, "depth 0 mm is outside"),
        (([0, 0], 2000, math.inf), RunMismatch, "focus inf is outside the range baked for, 1500 mm to 4000 mm"),
        (([0, 0], math.nan, 2000), ConfigError, "depth_mm holds NaN"),
        (([0, 0],), ConfigError, r"table .* was baked for a range of depth_mm, 1000 to inf; say which"),
        (([0, 0], 2000), ConfigError, "baked for a range of focus_mm, 1500 to 4000; say which"),
        (([0, 0, 0], 2000, 2000), ConfigError, r"field has the shape \[3\]; give \[..., 2\]"),
        (([[0, 0]] * 3, [2000] * 2, 2000), ConfigError, r"shapes \[3, 2\], \[2\], \[\] do not go together"),
        (([0, 0], "2m", 2000), ConfigError, "depth_mm is no array of numbers"),
    ],
)
def test_wrong_places_are_refused(table: Table, given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        table.psf(*given)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_it_is_read_without_torch(baked: Path) -> None:
    code = (
        "import sys, psftrain; table = psftrain.open_table(sys.argv[1]); table.psf([0, 0], 2000, 2000); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, baked], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["table.h5", "other.zarr"])
def test_it_is_read_from_every_kind_of_store(table: Table, baked: Path, tmp_path: Path, name: str) -> None:
    """HDF5 and other chunks: what `psfgen rechunk` makes of it."""
    rechunk(str(baked), str(tmp_path / name), "field_y=2,field_x=3")
    assert np.array_equal(psftrain.open_table(tmp_path / name).kernels, table.kernels)


def test_large_kernels_are_read_in_bands(
    linear: Linear, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "PSF_CHUNK_BYTES", 2 * 4 * 4 * 3 * 25)
    bake(linear, 4, None, None, tmp_path / "table.zarr")
    assert len(list((tmp_path / "table.zarr" / "psf").rglob("c/0/0/*"))) >= 2
    assert np.array_equal(psftrain.open_table(tmp_path / "table.zarr").kernels, table.kernels)


def test_a_render_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no table but a render; `psftrain bake RUN` makes a table"):
        psftrain.open_table(make_store(tmp_path / "s.zarr", grid=2))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        psftrain.open_table(tmp_path / "none.zarr")


def test_a_flipped_bit_is_found(linear: Linear, tmp_path: Path) -> None:
    bake(linear, 4, None, None, tmp_path / "table.zarr")
    chunk = next(path for path in (tmp_path / "table.zarr" / "psf" / "c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(StoreCorrupt):
        psftrain.open_table(tmp_path / "table.zarr")


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("focuses", "depths"), [(1, 1), (2, 3)])
def test_a_kernel_takes_microseconds(focuses: int, depths: int) -> None:
    """15 x 15 x 3 bins on 49 x 49 points, 1024 at once: the best of ten, which is some ten times below the limit."""
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, 49)
    distances = {"focus_dioptre": focuses, "depth_dioptre": depths}
    coords = {name: np.linspace(2, 1, count) for name, count in distances.items()}
    lattice = Lattice({**coords, "field_y": axis, "field_x": axis})
    kernels = rng.random((math.prod(lattice.shape), 675), dtype=np.float32)
    places = random_places(lattice.domain("table"), 1024)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        blend(kernels, *lattice.corners(*places))
        seconds.append(time.perf_counter() - started)
    assert 1000 * min(seconds) / 1024 < 0.01
