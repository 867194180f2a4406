"""Baking: a store like any other, true to its model and honest about how far, whole or not there."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from conftest import Psfgen, contents, fork, wait_for
from numpy.typing import NDArray
from training import job, make_store, one_line_error, psftrain, rewrite_model

import psftrain as api
from psfgen.errors import FitError
from psfgen.store import open_store, schema
from psfgen.store.zarr_store import ZarrStore
from psftrain.bake import bake
from psftrain.fidelity import LARGE, PLACES, advice, random_places
from psftrain.fit import fit
from psftrain.metrics import rel_l2
from psftrain.predict import PsfModel
from psftrain.run import load_run

Array = NDArray[Any]
ROOT = Path(__file__).parents[1]
UNITS = {"focus": "mm", "depth": "mm", "field_y": "1", "field_x": "1", "wavelength": "um", "ky": "um", "kx": "um"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 1 m and infinity, focused at 1.5 m and 4 m, up to field 0.8 of a wide sensor."""
    folder = tmp_path_factory.mktemp("bake")
    store = make_store(
        folder / "s.zarr", depth=(1000.0, math.inf), focus=(1500.0, 4000.0), field_max=0.8, sensor_mm=(8.0, 6.0)
    )
    fit(job(store, folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at one depth and one focus, well enough for its kernels to differ over the field."""
    folder = tmp_path_factory.mktemp("single")
    fit(job(make_store(folder / "s.zarr"), folder / "run", steps=100))
    return folder / "run"


@pytest.fixture(scope="module")
def table(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run on 6 x 6 points."""
    out = tmp_path_factory.mktemp("table") / "table.zarr"
    bake(api.load(run), 6, None, None, out)
    return out


# --- a store like any other -------------------------------------------------------------------------------------------


def test_psfgen_takes_it(table: Path, psfgen: Psfgen) -> None:
    assert psfgen("verify", table, "--json").document["problems"] == []
    assert psfgen("status", table).code == 0
    told = psfgen("info", table)
    assert told.code == 0
    for line in (
        "complete",
        "engine bake",
        "2 focus x 2 depth x 6 field_y x 6 field_x x 3 wavelength",
        "5 x 5 samples of 8 um",
    ):
        assert line in told.out
    assert psfgen("show", table, "--out", "table.png").code == 0
    assert psfgen("stats", table).code == 0


def test_what_renders_refuse_it(table: Path, psfgen: Psfgen) -> None:
    """In one line, and the table stays as it is."""
    before = contents(table)
    for command in (["verify", table, "--deep"], ["render", "--grid", "6", "--out", table]):
        ran = psfgen(*command)
        assert ran.code in (1, 2)
        assert ran.err.splitlines()[-1].startswith("error: ")
        assert "unexpected" not in ran.err
    assert contents(table) == before


def test_it_holds_the_kernels_of_the_model_once(run: Path, table: Path) -> None:
    model = api.load(run)
    with xarray.open_zarr(table) as found:
        assert found.psf.dims == ("focus", "depth", "field_y", "field_x", "wavelength", "ky", "kx")
        assert {name: found[name].attrs["units"] for name in UNITS} == UNITS
        assert found.field_x.values.tolist() == found.field_y.values.tolist()
        assert found.field_x.values == pytest.approx(np.linspace(-0.8, 0.8, 6))
        assert found.depth.values.tolist() == [1000, math.inf]
        assert found.focus.values.tolist() == [1500, 4000]
        assert found.wavelength.values.tolist() == [0.48, 0.55, 0.64]
        assert found.kx.values.tolist() == model.x_um.tolist()
        assert found.ky.values.tolist() == model.y_um.tolist()
        field = np.stack(np.meshgrid(found.field_x, found.field_y), axis=-1)
        expected = model.psf(field, [[[[1000]], [[math.inf]]]], [[[[1500]]], [[[4000]]]])
        np.testing.assert_allclose(found.psf.values, expected, atol=1e-6)
        assert found.psf_binned.shape == (2, 2, 6, 6, 3, 1, 1)
        assert (found.psf_binned.values == 1).all(), "one bin holds everything"
        assert (found.noise_binned.values == 0).all()


def test_its_attributes_say_where_it_comes_from(run: Path, table: Path) -> None:
    attrs, source = open_store(table).attrs, open_store(run.parent / "s.zarr")
    assert (attrs["engine"], attrs["pitch_um"], attrs["reference_um"]) == ("bake", 8.0, 0.5876)
    for key in ("lens", "sensor_mm", "orientation", "centring", "field"):
        assert attrs[key] == source.attrs[key]
    assert attrs["sensor_z_mm"] == {"1500": 50.0, "4000": 50.0}
    assert attrs["plan_sha256"] == schema.sha256_of(attrs["plan"])
    told = attrs["bake"]
    assert (told["run"], told["model"], told["step"], told["array"]) == (str(run), "neural_cvae", 12, "psf_binned")
    assert [source.attrs["plan"]] == [trained_on["plan"] for trained_on in told["trained_on"]]
    assert told["trained_on"][0]["store"] == source.path
    assert told["error"].keys() == {"n", "mean", "p95", "field"}


def test_a_second_one_is_equal(run: Path, table: Path, tmp_path: Path) -> None:
    """But for times and checksums of them."""
    assert psftrain("bake", run, "--grid", 6, "--out", tmp_path / "table.zarr").code == 0
    found = {name: data for name, data in contents(tmp_path / "table.zarr").items() if "ledger/depth" not in name}
    assert found == {name: data for name, data in contents(table).items() if "ledger/depth" not in name}


def test_full_size_kernels(tmp_path: Path) -> None:
    fit(job(make_store(tmp_path / "s.zarr", grid=3), tmp_path / "run", steps=1, data__array="psf"))
    bake(api.load(tmp_path / "run"), 4, None, None, tmp_path / "table.zarr")
    found = api.open_table(tmp_path / "table.zarr")
    assert found.psf([0, 0]).shape == (3, 10, 10)
    assert found.pitch_um == 4.0
    noise = open_store(tmp_path / "table.zarr").read("noise")[0, 0, 0, 0]
    assert noise == pytest.approx(open_store(tmp_path / "s.zarr").read("noise")[0, 0, 0, 0]), "of the full-size kernels"


def test_an_export_is_baked_as_its_run(single: Path, tmp_path: Path) -> None:
    assert psftrain("export", single, "--format", "safetensors", "--out", tmp_path / "export").code == 0
    ran = psftrain("bake", tmp_path / "export", "--grid", 4)
    assert ran.code == 0, ran.err
    bake(api.load(single), 4, None, None, tmp_path / "run.zarr")
    tables = [api.open_table(path).kernels for path in (tmp_path / "export" / "table.zarr", tmp_path / "run.zarr")]
    assert np.array_equal(*tables)


# --- light, chief rays, noise -----------------------------------------------------------------------------------------


def test_the_small_arrays_are_those_of_the_training_store(table: Path) -> None:
    """Linear between its nodes: the chief ray is that everywhere, the noise on a grid of half the steps."""
    found = open_store(table)
    x, y = np.meshgrid(found.coords["field_x"], found.coords["field_y"])
    for name, expected in (("chief_x_mm", 4 * x), ("chief_y_mm", 3 * y)):
        np.testing.assert_allclose(found.read(name), np.broadcast_to(expected, (2, 2, 6, 6)), atol=1e-9)
    assert found.read("throughput") == pytest.approx(np.full((2, 6, 6, 3), 0.9))
    assert found.read("captured") == pytest.approx(np.full((2, 2, 6, 6, 3), 0.97))


def test_noise_between_nodes(single: Path, tmp_path: Path) -> None:
    bake(api.load(single), 9, None, None, tmp_path / "table.zarr")
    found = open_store(tmp_path / "table.zarr").read("noise")[0, 0]
    known = open_store(single.parent / "s.zarr").read("noise_binned")[0, 0]
    assert found[::2, ::2] == pytest.approx(known)
    assert found[1::2, ::2] == pytest.approx((known[1:] + known[:-1]) / 2)


def test_no_light_no_kernel(psfgen: Psfgen, tmp_path: Path) -> None:
    """Where all the nodes about a place are dark, in the channel that is dark; beside them there is a kernel."""
    dark = [(0, slice(None), 0, slice(None), 2), (1, slice(None), slice(3, 5), slice(3, 5))]
    store = make_store(tmp_path / "s.zarr", depth=(1000.0, 3000.0), focus=(1500.0, 4000.0), dark=dark)
    fit(job(store, tmp_path / "run", steps=1))
    ran = psftrain("bake", tmp_path / "run", "--grid", 9, "--json")
    assert ran.code == 0, ran.err
    assert psfgen("verify", tmp_path / "run" / "table.zarr").code == 0
    found = np.isnan(open_store(tmp_path / "run" / "table.zarr").read("psf")).all(axis=(-2, -1))
    expected = np.zeros((2, 2, 9, 9, 3), dtype=bool)
    expected[0, :, 0, :, 2] = True
    expected[1, :, 6:, 6:] = True
    assert np.array_equal(found, expected)
    assert ran.document["error"]["n"] < PLACES


def test_copies_are_averaged(psfgen: Psfgen, tmp_path: Path) -> None:
    """The prior knows no copy: the table is of none, and says nothing of how they were built."""
    fit(job(make_store(tmp_path / "s.zarr", grid=3, copies=3), tmp_path / "run", steps=1))
    bake(api.load(tmp_path / "run"), 3, None, None, tmp_path / "table.zarr")
    assert psfgen("verify", tmp_path / "table.zarr").code == 0
    found = open_store(tmp_path / "table.zarr")
    assert "copy" not in found.coords
    assert (found.attrs["config"]["copies"], "as_built" in found.attrs) == (None, False)
    assert found.read("noise") == pytest.approx(open_store(tmp_path / "s.zarr").read("noise_binned").mean(axis=0))


def test_several_stores(tmp_path: Path) -> None:
    """The distances are those of the first."""
    stores = [make_store(tmp_path / f"{d}.zarr", grid=3, depth=(d, 2 * d)) for d in (1000.0, 4000.0)]
    fit(job(stores, tmp_path / "run", steps=1))
    found = bake(api.load(tmp_path / "run"), 3, None, None, tmp_path / "table.zarr")
    assert found.coords["depth"].tolist() == [1000, 2000]
    assert [of["store"] for of in found.attrs["bake"]["trained_on"]] == list(map(str, stores))


def test_points_that_do_not_reach_the_edge(tmp_path: Path) -> None:
    """Trained on random points: chief rays go on straight to the edge, light and noise as they are at the last one."""
    fit(job(make_store(tmp_path / "s.zarr", layout="random", grid=6), tmp_path / "run", steps=1))
    found = bake(api.load(tmp_path / "run"), 5, None, None, tmp_path / "table.zarr")
    x, y = np.meshgrid(found.coords["field_x"], found.coords["field_y"])
    np.testing.assert_allclose(found.read("chief_x_mm")[0, 0], 3 * x, atol=1e-9)
    np.testing.assert_allclose(found.read("chief_y_mm")[0, 0], 3 * y, atol=1e-9)
    assert found.read("captured") == pytest.approx(np.full((1, 1, 5, 5, 3), 0.97))


# --- distances --------------------------------------------------------------------------------------------------------


def test_denser_distances(run: Path, tmp_path: Path) -> None:
    found = bake(api.load(run), 3, "1m:inf:3", "2m", tmp_path / "table.zarr")
    assert found.coords["depth"].tolist() == [1000, 2000, math.inf]
    assert found.coords["focus"].tolist() == [2000]
    asked = api.open_table(tmp_path / "table.zarr")
    assert asked.focus_mm == (2000, 2000)
    np.testing.assert_allclose(asked.psf([0, 0], 2000), api.load(run).psf([0, 0], 2000, 2000), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--grid", 1], "--grid 1: at least 2 points a side"),
        (["--depth", "far"], "--depth far: 'far' is no distance"),
        (["--depth", "1m,1m"], "given twice"),
        (["--depth", "0.9m,2m"], "depth 900 mm is outside the range trained on, 1000 mm to inf"),
        (["--focus", "inf"], "focus inf is outside the range trained on, 1500 mm to 4000 mm"),
        (["--out", "table.h5"], "--out table.h5: a table is a Zarr folder on a disk; write a name such as table.zarr"),
        (["--out", "s3://b/table.zarr"], "a table is a Zarr folder on a disk"),
        (["--out", "."], "exists and is no table; choose another --out"),
        (["--out", "file"], "file exists and is no table"),
        (["--store", "none.zarr"], "store none.zarr does not exist"),
    ],
)
def test_wrong_usage(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[object], message: str
) -> None:
    """One line, nothing written."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    before, in_run = contents(tmp_path), contents(run)
    ran = psftrain("bake", run, *given)
    assert ran.code == (1 if "--store" in given else 2)
    assert message in one_line_error(ran)
    assert (contents(tmp_path), contents(run)) == (before, in_run)


def test_a_render_is_not_written_over(run: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", grid=2)
    before = contents(store)
    ran = psftrain("bake", run, "--out", store)
    assert ran.code == 2
    assert "exists and is no table" in one_line_error(ran)
    assert contents(store) == before


def test_a_place_that_cannot_be_written(single: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ran = psftrain("bake", single, "--grid", 3, "--out", tmp_path / "file" / "table.zarr")
    assert ran.code == 1
    error = one_line_error(ran)
    assert f"{tmp_path / 'file' / 'table.zarr'} cannot be written: Not a directory" in error
    assert ".tmp" not in error


def test_a_training_store_that_is_gone(single: Path, tmp_path: Path) -> None:
    """Light, noise and provenance come from it."""
    shutil.copytree(single.parent, tmp_path / "moved")
    fit(job(tmp_path / "moved" / "s.zarr", tmp_path / "run", steps=1))
    shutil.rmtree(tmp_path / "moved")
    ran = psftrain("bake", tmp_path / "run")
    assert ran.code == 1
    assert "moved/s.zarr does not exist" in one_line_error(ran)
    make_store(tmp_path / "moved" / "s.zarr", lens_text="{}")
    ran = psftrain("bake", tmp_path / "run")
    assert ran.code == 2
    assert "training store" in one_line_error(ran)
    assert not (tmp_path / "run" / "table.zarr").exists()


def test_a_model_that_gives_no_numbers(tmp_path: Path) -> None:
    fit(job(make_store(tmp_path / "s.zarr", grid=3), tmp_path / "run", steps=1))

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["from_pixel.bias"][:] = math.nan

    rewrite_model(tmp_path / "run", spoil)
    ran = psftrain("bake", tmp_path / "run")
    assert ran.code == 1
    assert "gives no numbers; nothing was written" in one_line_error(ran)
    assert not [path for path in (tmp_path / "run").iterdir() if "table" in path.name]


# --- again ------------------------------------------------------------------------------------------------------------


def test_the_same_again_does_nothing(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bake", single, "--grid", 3, "--out", tmp_path / "table.zarr", "--json"]
    first = psftrain(*command)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.delattr(ZarrStore, "write")
    again = psftrain(*command)
    assert (again.code, again.document) == (0, first.document)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_another_one_is_refused(run: Path, single: Path, tmp_path: Path) -> None:
    """Naming what differs; of weights too, which may be others after as many steps."""
    out = tmp_path / "table.zarr"
    bake(api.load(run), 3, None, None, out)
    before = contents(out)
    shutil.copytree(run, tmp_path / "changed")
    rewrite_model(tmp_path / "changed", lambda weights: weights["from_pixel.bias"].add_(0.1))
    for given, differs in (
        ([run, "--grid", 4], "grid is 3, this bake asks for 4"),
        ([run, "--grid", 3, "--depth", "2m"], "depth is [1000.0, 'inf'], this bake asks for [2000.0]"),
        ([single, "--grid", 3], "step is 12, this bake asks for 100"),
        ([tmp_path / "changed", "--grid", 3], "weights_sha256 is "),
    ):
        ran = psftrain("bake", *given, "--out", out)
        assert ran.code == 2
        error = one_line_error(ran)
        assert f"{out} exists, another table: {differs}" in error
        assert error.endswith("choose another --out, or delete it")
    assert contents(out) == before


def test_whoever_comes_second_joins(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that appears while another process bakes the same is left as it is."""
    out, model = tmp_path / "table.zarr", api.load(single)
    bake(model, 3, None, None, tmp_path / "first.zarr")
    before, finalise = contents(tmp_path / "first.zarr"), ZarrStore.finalise

    def late(store: ZarrStore) -> None:
        finalise(store)
        (tmp_path / "first.zarr").rename(out)

    monkeypatch.setattr(ZarrStore, "finalise", late)
    assert bake(model, 3, None, None, out).path == str(out)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["table.zarr"]


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, FitError("broken"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("writes", [0, 3, 12])
def test_what_is_broken_off_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | type, writes: int
) -> None:
    write, count = ZarrStore.write, iter(range(1000))

    def broken(self: ZarrStore, *given: Any, **index: slice) -> None:
        if next(count) == writes:
            raise error
        write(self, *given, **index)

    monkeypatch.setattr(ZarrStore, "write", broken)
    ran = psftrain("bake", run, "--grid", 4, "--out", tmp_path / "new" / "table.zarr")
    assert ran.code == 1
    one_line_error(ran)
    assert list((tmp_path / "new").iterdir()) == []


def test_killed_at_any_moment_there_is_a_whole_table_or_none(run: Path, table: Path, tmp_path: Path) -> None:
    """`kill -9` all over the life of a bake; the next one makes the same table."""
    out, rng = tmp_path / "table.zarr", np.random.default_rng(0)
    command = ["bake", run, "--grid", 6, "--out", out]

    def work() -> None:
        os._exit(psftrain(*command).code)

    began = time.monotonic()
    assert wait_for(fork(work)) == 0
    span_s = time.monotonic() - began
    ends = set()
    for share in rng.uniform(0, 1, 12):
        shutil.rmtree(out, ignore_errors=True)
        pid = fork(work)
        time.sleep(share * span_s)
        os.kill(pid, signal.SIGKILL)
        wait_for(pid)
        if out.exists():
            assert np.array_equal(api.open_table(out).kernels, api.open_table(table).kernels)
        ends.add(out.exists())
        assert all(re.fullmatch(r"(\.+table\.zarr\..*\.tmp)|table\.zarr", path.name) for path in tmp_path.iterdir())
    assert False in ends
    assert psftrain(*command).code == 0
    assert np.array_equal(api.open_table(out).kernels, api.open_table(table).kernels)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """It is said, and that the same command begins anew; what a process before had left goes too."""
    left = tmp_path / f".table.zarr.{'0' * 32}.tmp"
    left.mkdir()
    monkeypatch.setattr(ZarrStore, "finalise", lambda store: os.kill(os.getpid(), number))
    ran = psftrain("bake", run, "--grid", 2, "--out", tmp_path / "table.zarr")
    assert ran.code == 75
    assert f"stopped: {number.name}: nothing was written; the same command begins anew" in ran.err
    assert not list(tmp_path.iterdir())


# --- the error of baking ----------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_table(run: Path, table: Path) -> None:
    """What its reader gives at the same places, between the distances and at them."""
    model, found = api.load(run), api.open_table(table)
    field, *distances = random_places(found.domain, PLACES)
    error = rel_l2(found.psf(field, *distances), model.psf(field, *distances))
    told = found.bake["error"]
    assert told["n"] == PLACES >= 1000
    assert (told["mean"], told["p95"]) == pytest.approx((error.mean(), np.quantile(error, 0.95)), rel=1e-3)
    assert 0 < told["field"]["mean"] <= told["mean"]


def test_more_nodes_less_error(single: Path, tmp_path: Path) -> None:
    """By a factor of four for twice the nodes, as linear interpolation has it."""
    model = api.load(single)
    errors = [bake(model, n, None, None, tmp_path / f"{n}.zarr").attrs["bake"]["error"]["mean"] for n in (9, 17, 33)]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]


def test_one_distance_has_one_error(single: Path, tmp_path: Path) -> None:
    error = bake(api.load(single), 5, None, None, tmp_path / "table.zarr").attrs["bake"]["error"]
    assert error["field"] == {"mean": error["mean"], "p95": error["p95"]}


class Curved(PsfModel):
    """All light in the middle at the ends of the range of depths, none of it half way in dioptres."""

    def psf(
        self, field: Any, depth_mm: Any = None, focus_mm: Any = None, *, batch: int | None = None
    ) -> NDArray[np.float32]:
        _, depth, _ = self.domain.places(field, depth_mm, focus_mm)
        found = np.zeros((*depth.shape, 3, 5, 5), dtype=np.float32)
        found[..., 2, 2] = np.square(2000 / depth - 1)[..., None]
        found[..., 0, 0] = 1 - found[..., 2, 2]
        return found


def test_a_large_error_is_told_with_what_would_lessen_it(run: Path, single: Path, tmp_path: Path) -> None:
    ran = psftrain("bake", single, "--grid", 2, "--out", tmp_path / "2.zarr")
    assert api.open_table(tmp_path / "2.zarr").bake["error"]["mean"] > LARGE, "nothing was tested"
    assert "more than 3%: a finer table (--grid 3) would follow the model more closely" in ran.out
    told = advice(bake(Curved(load_run(run)), 3, "1m,inf", "1.5m,4m", tmp_path / "curved.zarr"))
    assert told is not None
    assert "a finer table (--depth 1000:inf:3 --focus 1500:4000:3) would" in told
    assert "finer" not in psftrain("bake", single, "--out", tmp_path / "fine.zarr").out


def test_model_and_table_against_the_truth(single: Path, tmp_path: Path) -> None:
    held = make_store(tmp_path / "held.zarr", layout="cells", grid=7)
    out = tmp_path / "table.zarr"
    ran = psftrain("bake", single, "--grid", 9, "--store", held, "--out", out)
    assert ran.code == 0, ran.err
    judged = psftrain("bake", single, "--grid", 9, "--store", held, "--out", out, "--json").document["heldout"]
    store = open_store(held)
    field = np.stack(np.meshgrid(store.coords["field_x"], store.coords["field_y"]), axis=-1).reshape(-1, 2)
    truth = store.read("psf_binned").reshape(-1, 3, 5, 5)
    for name, psf in (("model", api.load(single).psf), ("table", api.open_table(out).psf)):
        error = rel_l2(psf(field), truth)
        assert judged[name] == pytest.approx({"mean": error.mean(), "p95": np.quantile(error, 0.95)})
        assert f"{name} {error.mean():.2%} (p95 {np.quantile(error, 0.95):.2%})" in ran.out
    for score, ratio in judged["ratio"].items():
        assert ratio == pytest.approx(judged["table"][score] / judged["model"][score])
    assert (judged["n"], judged["store"]) == (36, str(held))
    assert f"error on 36 kernels of {held}: " in ran.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens_text": "{}"}, "lens_sha256 is"),
        ({"pitch_um": 5.0}, "pitch_um is 5.0, but 4.0 was trained on"),
        ({"field_max": 1.2}, "outside the field trained on"),
        ({"depth": (500.0,)}, "depth 500 mm is outside the range trained on"),
    ],
)
def test_a_held_out_store_that_does_not_fit(
    single: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Before anything is baked."""
    held = make_store(tmp_path / "held.zarr", grid=2, **changes)
    ran = psftrain("bake", single, "--store", held, "--out", tmp_path / "table.zarr")
    assert ran.code == 2
    assert message in one_line_error(ran)
    assert not (tmp_path / "table.zarr").exists()


def test_a_document(run: Path) -> None:
    ran = psftrain("bake", run, "--grid", 3, "--json")
    document = ran.document
    assert {key: document[key] for key in ("schema", "command", "ok", "paths", "nodes", "heldout")} == {
        "schema": 1,
        "command": "bake",
        "ok": True,
        "paths": {"table": str(run / "table.zarr")},
        "nodes": {"focus": 2, "depth": 2, "field_y": 3, "field_x": 3},
        "heldout": None,
    }
    assert document["error"] == json.loads(json.dumps(api.open_table(run / "table.zarr").bake["error"]))
    shutil.rmtree(run / "table.zarr")


# --- the documentation ------------------------------------------------------------------------------------------------


def test_the_documented_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each after the table of the one before is gone; on fewer points."""
    monkeypatch.chdir(tmp_path)
    fit(job(make_store(Path("psfs.zarr"), depth=(400.0, 20000.0), focus=(400.0, 20000.0)), Path("runs/fit")))
    make_store(Path("heldout.zarr"), layout="cells", depth=(2000.0,), focus=(1000.0,))
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    commands: list[str] = re.findall(r"^psftrain bake .*", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        few: Callable[[str], str] = lambda word: "3" if word.isdigit() else word  # noqa: E731
        ran = psftrain(*([*map(few, words)] if "--grid" in words else [*words, "--grid", "3"]))
        assert ran.code == 0, (command, ran.err)
        shutil.rmtree("runs/fit/table.zarr", ignore_errors=True)
