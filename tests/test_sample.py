"""Sampling a model: the prior's mean at any points, labelled, and refused beyond what was trained."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from conftest import contents
from numpy.typing import NDArray
from training import fit_quickly, job, make_store, one_line_error, psftrain

from psfgen.errors import ConfigError, RunMismatch
from psftrain import load
from psftrain.fit import fit
from psftrain.predict import PsfModel
from psftrain.run import Trained, load_run
from psftrain.sample import COLUMNS, sample

Array = NDArray[Any]
UNITS = {
    "focus": "mm",
    "depth": "mm",
    "field_y": "1",
    "field_x": "1",
    "wavelength": "um",
    "by": "um",
    "bx": "um",
    "depth_mm": "mm",
    "focus_mm": "mm",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained over 1 m to infinity at one focus, up to field 0.8 of a wide sensor."""
    folder = tmp_path_factory.mktemp("sample")
    store = make_store(folder / "s.zarr", depth=(1000.0, math.inf), field_max=0.8, sensor_mm=(8.0, 6.0))
    fit(job(store, folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at one depth, infinity, and one focus."""
    folder = tmp_path_factory.mktemp("single")
    fit(job(make_store(folder / "s.zarr", grid=3, depth=(math.inf,)), folder / "run", steps=1))
    return folder / "run"


def expected(trained: Trained, x: float, y: float, depth_mm: float, focus_mm: float) -> Array:
    """The decoded mean of the prior at a place, with the condition written out."""
    low, high = trained.conditioning.depth_dioptre
    depth = (2 * (1000 / depth_mm) - low - high) / (high - low) if high > low else 0.0
    assert len(set(trained.conditioning.focus_dioptre)) == 1
    reach = trained.conditioning.field_max
    condition = torch.tensor([[x / reach, y / reach, depth, 0.0]], dtype=torch.float32)
    with torch.no_grad():
        return trained.model.decode(trained.model.prior(condition).mean, condition)[0].numpy()


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_as_npz(run: Path, tmp_path: Path) -> None:
    ran = psftrain("sample", run, "--grid", 3, "--depth", "1m,2m,inf", "--out", tmp_path / "new" / "field.npz")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'new' / 'field.npz'}: 27 points\n")
    with np.load(tmp_path / "new" / "field.npz", allow_pickle=False) as found:
        kernels = found["psf_binned"]
        assert kernels.shape == (1, 3, 3, 3, 3, 5, 5)
        assert kernels.dtype == np.float32
        assert found["field_x"].tolist() == found["field_y"].tolist() == [-0.8, 0, 0.8]
        assert found["depth"].tolist() == [1000, 2000, math.inf]
        assert found["focus"].tolist() == [2000]
        assert found["wavelength"].tolist() == [0.48, 0.55, 0.64]
        assert found["bx"] == pytest.approx((np.arange(5) - 2) * 8.0)
        assert found["by"] == pytest.approx((2 - np.arange(5)) * 8.0)
        trained = load_run(run)
        for d, depth in enumerate(found["depth"]):
            for row, y in enumerate(found["field_y"]):
                for column, x in enumerate(found["field_x"]):
                    assert kernels[0, d, row, column] == pytest.approx(expected(trained, x, y, depth, 2000), abs=1e-6)


def test_a_grid_as_zarr_is_a_labelled_dataset(run: Path, tmp_path: Path) -> None:
    """Opened without a warning, which would be an error here."""
    path = tmp_path / "field.zarr"
    assert psftrain("sample", run, "--grid", 4, "--depth", "1m:inf:3", "--out", path).code == 0
    with xarray.open_zarr(path) as found:
        assert found["psf_binned"].dims == ("focus", "depth", "field_y", "field_x", "wavelength", "by", "bx")
        assert found["psf_binned"].attrs["units"] == "1"
        assert {name: found[name].attrs.get("units") for name in found.coords} == {
            name: UNITS[name] for name in found["psf_binned"].dims
        }
        assert all(found[name].attrs["long_name"] for name in found.coords)
        assert found["depth"].values.tolist() == pytest.approx([1000, 2000, math.inf])
        assert np.all(np.diff(found["by"]) < 0)
        assert np.all(np.diff(found["bx"]) > 0)
        one = found["psf_binned"].sel(depth=2000, focus=2000).isel(field_y=0, field_x=3).values
        assert one == pytest.approx(expected(load_run(run), 0.8, -0.8, 2000, 2000), abs=1e-6)
        assert found["psf_binned"].sum(("by", "bx")).values == pytest.approx(np.ones((1, 3, 4, 4, 3)), abs=1e-5)


def test_both_formats_hold_the_same(run: Path, tmp_path: Path) -> None:
    for name in ("field.npz", "field.zarr"):
        assert psftrain("sample", run, "--grid", 2, "--depth", "3m", "--out", tmp_path / name).code == 0
    with np.load(tmp_path / "field.npz") as npz, xarray.open_zarr(tmp_path / "field.zarr") as zarr:
        assert set(npz.files) == {"psf_binned", "outside", *zarr.coords}
        assert all(np.array_equal(npz[name], zarr[name].values) for name in npz.files)


@pytest.mark.parametrize(("depth", "focus"), [(None, None), ("inf", None), ("inf", "2m"), (None, "2000mm")])
def test_what_did_not_vary_need_not_be_said(single: Path, tmp_path: Path, depth: str | None, focus: str | None) -> None:
    given = [word for flag, text in (("--depth", depth), ("--focus", focus)) if text for word in (flag, text)]
    assert psftrain("sample", single, "--grid", 1, *given, "--out", tmp_path / "a.npz").code == 0
    with np.load(tmp_path / "a.npz") as found:
        assert (found["depth"].tolist(), found["focus"].tolist()) == ([math.inf], [2000])
        assert (found["field_x"].tolist(), found["field_y"].tolist()) == ([0], [0]), "one point is the axis"
        assert found["psf_binned"][0, 0, 0, 0] == pytest.approx(expected(load_run(single), 0, 0, math.inf, 2000))


def test_many_points_are_what_each_is_alone(single: Path) -> None:
    """More than a batch."""
    trained, rng = load_run(single), np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-1, 1, (700, 2)), np.full(700, math.inf), np.full(700, 2000.0)])
    found = sample(PsfModel(trained), points)
    assert found.shape == (700, 3, 5, 5)
    for index in (0, 511, 512, 699):
        assert found[index] == pytest.approx(expected(trained, *points[index]), abs=1e-6)


def test_a_document(run: Path, tmp_path: Path) -> None:
    ran = psftrain("sample", run, "--grid", 2, "--depth", "1m", "--out", tmp_path / "a.npz", "--json")
    paths = {"out": str(tmp_path / "a.npz")}
    assert ran.document == {"schema": 1, "command": "sample", "ok": True, "paths": paths, "kernels": 4}


def test_full_size_kernels(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", grid=3)
    fit(job(store, tmp_path / "run", steps=1, data__array="psf"))
    assert psftrain("sample", tmp_path / "run", "--grid", 2, "--out", tmp_path / "a.zarr").code == 0
    with xarray.open_zarr(tmp_path / "a.zarr") as found:
        array = found["psf"]
        assert array.shape[-2:] == (10, 10)
        places = found[array.dims[-1]].values
        assert places == pytest.approx((np.arange(10) - 4.5) * 4.0)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default model, over field, three wavelengths and one depth."""
    folder = tmp_path_factory.mktemp("solved")
    fit_quickly(make_store(folder / "s.zarr", grid=4, kernel_px=16, bins=8), folder / "run", "field_cvae")
    return folder / "run"


def test_expected_errors_and_flags(solved: Path, tmp_path: Path) -> None:
    """Beside the kernels; outside what was trained on a guess is flagged, and nothing is expected of it."""
    (tmp_path / "points.csv").write_text("field_x,field_y,depth_mm,focus_mm\n0.1,0.2,2m,2m\n1.2,0,2m,2m\n0,0,1m,2m\n")
    given = ["sample", solved, "--at", tmp_path / "points.csv", "--out", tmp_path / "a.npz"]
    assert "is outside the field trained on" in one_line_error(psftrain(*given))
    assert psftrain(*given, "--outside").code == 0
    with np.load(tmp_path / "a.npz") as found:
        assert found["outside"].tolist() == [False, True, True]
        assert np.isnan(found["expected_error"]).tolist() == [False, True, True]
        assert 0 < found["expected_error"][0] < 1
        assert found["psf_binned"].sum(axis=(-2, -1)) == pytest.approx(np.ones((3, 3)), abs=1e-5)


def test_wavelengths_between_those_trained_on(solved: Path, tmp_path: Path) -> None:
    """At the trained ones they are the model's own kernels, and between them they lie between."""
    given = ["sample", solved, "--grid", 3]
    assert psftrain(*given, "--out", tmp_path / "own.npz").code == 0
    assert psftrain(*given, "--wavelength", "0.48,0.515,0.55", "--out", tmp_path / "other.npz").code == 0
    with np.load(tmp_path / "own.npz") as own, np.load(tmp_path / "other.npz") as other:
        assert other["wavelength"].tolist() == [0.48, 0.515, 0.55]
        kernels, known = other["psf_binned"], own["psf_binned"]
        assert np.allclose(kernels[..., [0, 2], :, :], known[..., :2, :, :], atol=1e-4)
        middle = known[..., :2, :, :].mean(axis=-3)
        apart = np.linalg.norm(known[..., 1, :, :] - known[..., 0, :, :])
        assert np.linalg.norm(kernels[..., 1, :, :] - middle) < apart


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.7", "wavelengths 0.7 um are not all within those trained on, 0.48 to 0.64 um"),
        ("blue", "--wavelength blue: 'blue' is no list of numbers"),
    ],
)
def test_wavelengths_beyond_are_refused(solved: Path, tmp_path: Path, text: str, message: str) -> None:
    ran = psftrain("sample", solved, "--grid", 2, "--wavelength", text, "--out", tmp_path / "a.npz")
    assert message in one_line_error(ran)
    assert not (tmp_path / "a.npz").exists()


def test_other_models_know_their_own_wavelengths(run: Path, tmp_path: Path) -> None:
    given = ["--grid", 2, "--depth", "1m", "--wavelength", "0.5", "--out", tmp_path / "a.npz"]
    assert "knows the wavelengths that it was trained on and no others" in one_line_error(
        psftrain("sample", run, *given)
    )


def test_one_lens_has_no_copies(solved: Path, tmp_path: Path) -> None:
    ran = psftrain("sample", solved, "--grid", 2, "--prior", 3, "--out", tmp_path / "a.npz")
    assert "has learned one lens and can draw no others; train model field_cvae on a store" in one_line_error(ran)


# --- points of one's own ----------------------------------------------------------------------------------------------

CSV = "field_x,field_y,depth_mm,focus_mm\n0.1,-0.5,1500,2000\n-0.8,0.8,inf,2000\n0,0,1m,2m\n"
POINTS = [(0.1, -0.5, 1500.0, 2000.0), (-0.8, 0.8, math.inf, 2000.0), (0.0, 0.0, 1000.0, 2000.0)]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "points.csv"
    path.write_text(CSV)
    return path


def test_points_as_npz(run: Path, csv: Path, tmp_path: Path) -> None:
    ran = psftrain("sample", run, "--at", csv, "--out", tmp_path / "a.npz")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'a.npz'}: 3 points\n")
    with np.load(tmp_path / "a.npz") as found:
        assert found["psf_binned"].shape == (3, 3, 5, 5)
        for name, values in zip(COLUMNS, zip(*POINTS, strict=True), strict=True):
            assert found[name].tolist() == list(values)
        for kernels, point in zip(found["psf_binned"], POINTS, strict=True):
            assert kernels == pytest.approx(expected(load_run(run), *point), abs=1e-6)


def test_points_as_zarr(run: Path, csv: Path, tmp_path: Path) -> None:
    """Every coordinate with its unit."""
    assert psftrain("sample", run, "--at", csv, "--out", tmp_path / "a.zarr").code == 0
    with xarray.open_zarr(tmp_path / "a.zarr") as found:
        assert found["psf_binned"].dims == ("point", "wavelength", "by", "bx")
        assert set(found.coords) == {*COLUMNS, "wavelength", "by", "bx"}
        for column, name in enumerate(COLUMNS):
            assert found[name].dims == ("point",)
            assert found[name].values.tolist() == [point[column] for point in POINTS]
        for index, point in enumerate(POINTS):
            kernels = found["psf_binned"].isel(point=index).values
            assert kernels == pytest.approx(expected(load_run(run), *point), abs=1e-6)
        assert {name: found[name].attrs.get("units") for name in found.coords} == {
            name: UNITS[name] for name in found.coords
        }


@pytest.mark.parametrize(
    "text",
    [
        "focus_mm,depth_mm,note,field_y,field_x\n2000,1500,hello,-0.5,0.1\n",
        '"field_x","field_y","depth_mm","focus_mm"\r\n0.1,-0.5,"1500mm",2m\r\n',
        "\ufefffield_x,field_y,depth_mm,focus_mm\n0.1,-0.5,1.5m,2000\n",
    ],
    ids=["columns in any order", "quotes and another system's lines", "a spreadsheet's mark"],
)
def test_columns_are_found_by_name(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "points.csv").write_text(text, encoding="utf-8", newline="")
    ran = psftrain("sample", run, "--at", tmp_path / "points.csv", "--out", tmp_path / "a.npz")
    assert ran.code == 0, ran.err
    with np.load(tmp_path / "a.npz") as found:
        assert found["psf_binned"][0] == pytest.approx(expected(load_run(run), *POINTS[0]), abs=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give either --grid N or --at CSV"),
        (["--grid", 2, "--at", "points.csv", "--depth", "2m"], "give either --grid N or --at CSV"),
        (["--at", "points.csv", "--depth", "2m"], "--at brings its own depth_mm"),
        (["--at", "points.csv", "--focus", "2m"], "--at brings its own depth_mm"),
        (["--at", "none.csv"], "--at none.csv cannot be read: No such file"),
        (["--at", "."], "--at . cannot be read"),
        (["--grid", 0, "--depth", "2m"], "--grid 0: at least 1"),
        (["--grid", 2, "--depth", "2m", "--seed", 5], "--seed 5 draws copies; give --prior M too"),
        (["--grid", 2], "trained on a range of depth; say which with --depth"),
        (["--grid", 2, "--depth", "far"], "--depth far: 'far' is no distance"),
        (["--grid", 2, "--depth", "-1m"], "--depth -1m: .*not positive"),
        (["--grid", 2, "--depth", "1m,1m"], "given twice"),
        (["--grid", 2, "--depth", "999mm"], "depth 999 mm is outside the range trained on, 1000 mm to inf"),
        (["--grid", 2, "--depth", "2m", "--focus", "3m"], "focus 3000 mm is outside the range trained on"),
    ],
)
def test_wrong_points_are_refused(
    run: Path, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[object], message: str
) -> None:
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    ran = psftrain("sample", run, *given, "--out", "a.npz")
    assert ran.code == 2
    assert re.search(message, one_line_error(ran))
    assert set(contents(tmp_path)) == {"points.csv"}


HEADER = "field_x,field_y,depth_mm,focus_mm\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no points"),
        (HEADER, "holds no points; write a header line field_x,field_y,depth_mm,focus_mm"),
        ("x,y,depth_mm,focus_mm\n1,2,3,4\n", "has no column 'field_x'; needed: field_x, field_y, depth_mm, focus_mm"),
        ("field_x,field_y,depth_mm\n0,0,1500\n", "has no column 'focus_mm'"),
        (HEADER + "0,0,1500,2000\n0,left,1500,2000\n", "line 3: .*'left'"),
        (HEADER + "0,0,near,2000\n", "line 2: 'near' is no distance"),
        (HEADER + "0,0,0,2000\n", "line 2: distance 0 is not positive"),
        (HEADER + "0,0,nan,2000\n", "line 2: .*not positive"),
        (HEADER + "0,0\n", "line 2: as many values as the 4 columns are needed"),
        (HEADER + "0,0,1500,2000,7\n", "line 2: as many values as the 4 columns are needed"),
        (HEADER.strip() + ",field_x\n0,0,1500,2000,0.5\n", "more than one column 'field_x'; needed: field_x, field_y"),
        ("field_x,field_y\n0\n", "no column 'depth_mm'; needed: "),
        (HEADER + "0.9,0,1500,2000\n", "field 0.9 is outside the field trained on, up to 0.8"),
        (HEADER + "0,-0.801,1500,2000\n", "field 0.801 is outside the field"),
        (HEADER + "nan,0,1500,2000\n", "line 2: field_x nan is not finite"),
        (HEADER + "0,inf,1500,2000\n", "line 2: field_y inf is not finite"),
        (HEADER + "0,0,900,2000\n", "depth 900 mm is outside the range trained on, 1000 mm to inf"),
        (HEADER + "0,0,1500,inf\n", "focus inf is outside the range trained on, 2000 mm to 2000 mm"),
        ("field_x,field_y,depth_mm,focus_mm\n\xff,0,1,1\n", "not a text file"),
    ],
)
def test_a_wrong_csv_is_refused(run: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.csv").write_bytes(text.encode("latin-1"))
    ran = psftrain("sample", run, "--at", tmp_path / "points.csv", "--out", tmp_path / "a.npz")
    assert ran.code == 2
    assert re.search(message, one_line_error(ran))
    assert set(contents(tmp_path)) == {"points.csv"}


@pytest.mark.parametrize("name", ["a.npy", "a", "a.h5", "a.zarr.zip"])
def test_the_name_says_the_format(single: Path, tmp_path: Path, name: str) -> None:
    ran = psftrain("sample", single, "--grid", 2, "--out", tmp_path / name)
    assert ran.code == 2
    assert "write a name that ends in .npz or .zarr" in one_line_error(ran)
    assert not contents(tmp_path)


def test_a_url_is_no_folder_here(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("sample", single, "--grid", 2),
        ("export", single),
        ("eval", single),
        ("adapt", single, "--store", 1),
    ):
        ran = psftrain(*words, "--out", "memory://a/b.npz")
        assert ran.code == 2
        assert "--out memory://a/b.npz: this is written to a disk" in one_line_error(ran)
    assert not contents(tmp_path)


def test_a_name_that_is_too_long(single: Path, tmp_path: Path) -> None:
    ran = psftrain("sample", single, "--grid", 2, "--out", tmp_path / f"{'x' * 300}.npz")
    assert ran.code == 2
    assert "cannot be written: File name too long; choose another name" in one_line_error(ran)


@pytest.mark.parametrize("name", ["a.npz", "a.zarr"])
def test_nothing_is_overwritten(single: Path, tmp_path: Path, name: str) -> None:
    assert psftrain("sample", single, "--grid", 2, "--out", tmp_path / name).code == 0
    before = contents(tmp_path)
    ran = psftrain("sample", single, "--grid", 3, "--out", tmp_path / name)
    assert ran.code == 2
    assert "exists; choose another name" in one_line_error(ran)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["a.npz", "a.zarr"])
def test_a_place_that_cannot_be_written(single: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    ran = psftrain("sample", single, "--grid", 2, "--out", tmp_path / "file" / name)
    assert ran.code == 1
    assert "cannot be written" in one_line_error(ran)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    ran = psftrain("sample", tmp_path / "none", "--grid", 2, "--out", tmp_path / "a.npz")
    assert ran.code == 2
    assert "does not exist" in one_line_error(ran)


def test_places_too_far_for_a_guess(single: Path, tmp_path: Path) -> None:
    """--outside guesses, but not anything."""
    points, out = tmp_path / "points.csv", tmp_path / "k.npz"
    for place, message in (
        ("1e30,0,inf,2000", "field 1e+30 is too far outside the field trained on"),
        ("nan,0,inf,2000", "line 2: field_x nan is not finite"),
    ):
        points.write_text(f"{','.join(COLUMNS)}\n{place}\n")
        assert message in one_line_error(psftrain("sample", single, "--at", points, "--outside", "--out", out))
    points.write_text(f"{','.join(COLUMNS)}\n2,2,1000,2000\n2,2,0.001,2000\n")
    assert psftrain("sample", single, "--at", points, "--outside", "--out", out).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "--grid", "1000000", "--out", "k.npz"], "--grid 1000000: the kernels take"),
        (["bake", "--grid", "1000000", "--out", "t.zarr"], "a table of 1000000 x 1000000 field points"),
        (["sample", "--grid", "2", "--seed", str(10**23), "--out", "k.npz"], "'--seed'"),
    ],
)
def test_more_than_there_is_room_for(
    single: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = psftrain(command[0], single, *command[1:])
    assert ran.code == 2
    assert message in one_line_error(ran)
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_none(single: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch 1\.5: a whole number, at least 1 point"):
        load(single).psf([0.1, 0.1], batch=1.5)  # type: ignore[arg-type]
    with pytest.raises(RunMismatch, match="depth 0 mm is too near for a guess"):
        load(single).psf([0.1, 0.1], depth_mm=0, outside=True)
    with pytest.raises(ConfigError, match="device foo is unknown"):
        load(single, device="foo")
    error = one_line_error(psftrain("fit", "--store", "", "--run", "none"))
    assert "store '' is empty; name a store" in error


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_a_sample_appears_whole(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Of a full disk and of a signal nothing is left; what exists is refused before anything is computed."""
    given = ["sample", single, "--grid", 2, "--out", tmp_path / f"kernels{suffix}"]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for end, code, line in ((full, 1, "No space left on device; nothing is left"), (stop, 75, "nothing was written")):
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", end)
            patch.setattr(xarray.Dataset, "to_zarr", end)
            ran = psftrain(*given)
        assert ran.code == code
        assert line in ran.err
        assert not list(tmp_path.iterdir())
    assert psftrain(*given).code == 0
    before = contents(tmp_path)
    monkeypatch.setattr(PsfModel, "psf", lambda *_, **__: pytest.fail("computed in vain"))
    assert "exists; choose another name" in one_line_error(psftrain(*given))
    assert contents(tmp_path) == before
