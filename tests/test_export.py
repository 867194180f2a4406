"""Exports: read back by the programs they are for, they hold what the store holds; or nothing is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
import xarray
from astropy.io import fits
from conftest import Psfgen, contents, tiny
from numpy.typing import NDArray
from photutils.psf import GriddedPSFModel

from psfgen.errors import ConfigError
from psfgen.export import EXPORTS, export
from psfgen.render import render
from psfgen.select import Selection
from psfgen.store import Store, open_store, schema

ONE_PAGE = ["--depth", "3m", "--focus", "2m", "--wavelength", "0.64"]


@pytest.fixture(params=["finished", "copies", "dark"])
def any_store(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def exported(psfgen: Psfgen, store: Path, to: str, *args: object, name: str = "out") -> Path:
    ran = psfgen("export", store, "--to", to, "--out", name, *args)
    assert ran.code == 0, ran.err
    return Path(name)


# --- hdf5 -------------------------------------------------------------------------------------------------------------


def test_xarray_finds_the_store_again(psfgen: Psfgen, any_store: Path) -> None:
    """Values, dims, coordinates, units; and of the attributes the plain ones, the others as JSON."""
    out = exported(psfgen, any_store, "hdf5", name="psfs.h5")
    with xarray.open_zarr(any_store) as ours, xarray.open_dataset(out, engine="h5netcdf") as theirs:
        assert dict(theirs.sizes) == dict(ours.sizes)
        xarray.testing.assert_identical(theirs.drop_attrs(deep=False), ours.drop_attrs(deep=False))
        for name in (*ours.data_vars, *ours.coords):
            assert (theirs[name].dtype, theirs[name].dims) == (ours[name].dtype, ours[name].dims)
        assert set(theirs.attrs) == set(ours.attrs)
        for name, value in open_store(any_store).attrs.items():
            if isinstance(value, (dict, type(None))):
                assert json.loads(theirs.attrs[name]) == schema.plain(value)
            elif not isinstance(value, list) or name == "sensor_mm":
                assert np.all(theirs.attrs[name] == value)


def test_hdf5_is_chunked_checked_and_the_same_each_time(psfgen: Psfgen, finished: Path) -> None:
    out = exported(psfgen, finished, "hdf5", name="psfs.h5")
    assert out.read_bytes() == exported(psfgen, finished, "hdf5", name="again.h5").read_bytes()
    with h5py.File(out) as file:
        for name in open_store(finished).spec.arrays:
            array = file[name]
            assert (array.compression, array.compression_opts, array.shuffle, array.fletcher32) == (
                "gzip",
                1,
                True,
                True,
            )
            assert [dim[0].name for dim in array.dims] == [f"/{dim}" for dim in schema.ARRAY_DIMS[name]]
        assert file["psf"].chunks == (1, 1, 1, 3, 2, 12, 12)


def test_a_long_attribute_fits(finished: Path, tmp_path: Path) -> None:
    """Hundreds of copies say how they are built in more than the 64 KiB of an HDF5 object header."""
    store = open_store(finished)
    store.attrs["as_built"] = [[{"element": 1, "tilt_deg": [0.1, 0.2]}]] * 10000
    export(Selection(store, {}), "hdf5", tmp_path / "psfs.h5")
    with h5py.File(tmp_path / "psfs.h5") as file:
        assert json.loads(file.attrs["as_built"]) == store.attrs["as_built"]


def test_a_selection_is_what_xarray_selects(psfgen: Psfgen, copies: Path) -> None:
    chosen = ["--depth", "1m,inf", "--focus", "inf", "--wavelength", "0.64", "--copy", "1"]
    out = exported(psfgen, copies, "hdf5", *chosen, name="psfs.h5")
    with xarray.open_zarr(copies) as ours, xarray.open_dataset(out, engine="h5netcdf") as theirs:
        part = ours.sel(copy=[1], depth=[1000, np.inf], focus=[np.inf], wavelength=[0.64])
        xarray.testing.assert_identical(theirs.drop_attrs(deep=False), part.drop_attrs(deep=False))


# --- psf-densify ------------------------------------------------------------------------------------------------------


def places(store: Store) -> dict[str, NDArray[np.float64]]:
    dims = store.spec.kernel_dims[:-1]
    at = np.meshgrid(*(store.coords[dim] for dim in dims), indexing="ij")
    return {dim: values.ravel() for dim, values in zip(dims, at, strict=True)}


def test_psf_densify_numbers_the_places_in_c_order(psfgen: Psfgen, any_store: Path) -> None:
    store, out = open_store(any_store), exported(psfgen, any_store, "psf-densify")
    psf = store.read("psf").reshape(-1, 2, 12, 12)
    with h5py.File(out) as file:
        psfs, metadata = file["psfs"], file["metadata"]
        assert (psfs.dtype, metadata.dtype) == (np.float32, np.float32)
        assert psfs.shape == (2, 1, len(psf), 12, 12)
        np.testing.assert_array_equal(psfs[:, 0].swapaxes(0, 1), psf)
        assert psfs.attrs["wavelength_um"].tolist() == [0.48, 0.64]
        table = dict(zip(metadata.attrs["columns"], metadata[:].T, strict=True))
    at = places(store)
    assert ("copy" in table) == ("copy" in at)
    for column, dim in {"field_y": "field_y", "depth_mm": "depth", "focus_mm": "focus", "copy": "copy"}.items():
        if dim in at:
            np.testing.assert_array_equal(table[column], at[dim].astype(np.float32))
    width, height = store.attrs["sensor_mm"]
    pitch_mm = store.attrs["pitch_um"] / 1000
    np.testing.assert_allclose((table["x_px"] + 0.5) * pitch_mm - width / 2, at["field_x"] * width / 2, atol=1e-4)
    np.testing.assert_allclose(height / 2 - (table["y_px"] + 0.5) * pitch_mm, at["field_y"] * height / 2, atol=1e-4)


def test_psf_densify_of_a_selection(psfgen: Psfgen, copies: Path) -> None:
    out = exported(psfgen, copies, "psf-densify", "--copy", 1, "--depth", "3m,inf", "--wavelength", "0.48")
    with h5py.File(out) as file:
        expected = open_store(copies).read("psf", copy=1, depth=slice(1, 3), wavelength=0)
        np.testing.assert_array_equal(file["psfs"][0, 0], expected.reshape(-1, 12, 12))
        assert set(file["metadata"][:, -1]) == {1}


# --- gridded ----------------------------------------------------------------------------------------------------------


def model_at(model: GriddedPSFModel, x_px: float, y_px: float) -> NDArray[np.float64]:
    """The model's kernel at a position, [y, x] with row 0 at the top, as the store has it."""
    offsets = np.arange(12) - 5.5
    x, y = np.meshgrid(x_px + offsets, y_px + offsets[::-1])
    kernel: NDArray[np.float64] = model.evaluate(x, y, 1.0, x_px, y_px)
    return kernel


@pytest.mark.parametrize("layout", ["grid", "cells", "random"])
def test_photutils_sees_the_kernels_where_they_stand(psfgen: Psfgen, tmp_path: Path, layout: str) -> None:
    """At a node the kernel as stored, upright; in the middle of a cell the mean of its corners."""
    job: dict[str, Any] = {"grid": 4, "depth": "3m", "focus": "2m", "wavelength": 0.55, "sensor_mm": "36,24"}
    store = render(tiny(tmp_path / "psfs.zarr", **job, layout=layout))
    model = GriddedPSFModel.read(exported(psfgen, store.path, "gridded", name="psfs.fits"))
    assert model.oversampling.tolist() == [1, 1]
    psf, axes = store.read("psf", depth=0, focus=0, wavelength=0), {}
    for dim, side_mm in zip(("field_x", "field_y"), store.attrs["sensor_mm"], strict=True):
        axes[dim] = (store.coords[dim] + 1) * side_mm / 2 / 0.024 - 0.5
    for row, y_px in enumerate(axes["field_y"]):
        for column, x_px in enumerate(axes["field_x"]):
            np.testing.assert_allclose(model_at(model, x_px, y_px), psf[row, column], atol=1e-7)
    middle = [(axes[dim][1] + axes[dim][2]) / 2 for dim in ("field_x", "field_y")]
    np.testing.assert_allclose(model_at(model, *middle), psf[1:3, 1:3].mean(axis=(0, 1)), atol=1e-7)


def test_gridded_takes_the_page_that_the_options_name(psfgen: Psfgen, copies: Path) -> None:
    model = GriddedPSFModel.read(exported(psfgen, copies, "gridded", *ONE_PAGE, "--copy", 1, name="psfs.fits"))
    expected = open_store(copies).read("psf", copy=1, depth=1, focus=0, wavelength=1)
    np.testing.assert_array_equal(model.data.reshape(3, 3, 12, 12)[:, :, ::-1], expected)
    assert (model.meta["depthmm"], model.meta["focusmm"], model.meta["wavelen"]) == (3000, 2000, 0.64)


def test_more_places_than_a_short_keyword_counts(psfgen: Psfgen, tmp_path: Path) -> None:
    job: dict[str, Any] = {"grid": 11, "depth": "inf", "focus": "inf", "wavelength": 0.55, "spp": 16}
    store = render(tiny(tmp_path / "psfs.zarr", **job))
    model = GriddedPSFModel.read(exported(psfgen, store.path, "gridded", name="psfs.fits"))
    assert model.grid_shape == (11, 11)
    with fits.open("psfs.fits") as file:
        file.verify("exception")
    np.testing.assert_array_equal(model.data.reshape(11, 11, 12, 12)[:, :, ::-1], store.read("psf")[0, 0, :, :, 0])
    assert model.meta["depthmm"] == "inf"


def test_gridded_without_astropy_says_what_to_install(
    psfgen: Psfgen, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "astropy.io.fits", None)
    ran = psfgen("export", finished, "--to", "gridded", "--out", "psfs.fits", *ONE_PAGE)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]*pip install astropy\n", ran.err)


# --- csv --------------------------------------------------------------------------------------------------------------


def test_csv_holds_every_number_of_every_kernel(psfgen: Psfgen, any_store: Path) -> None:
    store = open_store(any_store)
    table = pandas.read_csv(exported(psfgen, any_store, "csv"))
    dims, shape = store.spec.kernel_dims, store.read("captured").shape
    assert len(table) == np.prod(shape)
    units = {"focus": "focus_mm", "depth": "depth_mm", "wavelength": "wavelength_um"}
    for dim, values in zip(dims, np.meshgrid(*(store.coords[d] for d in dims), indexing="ij"), strict=True):
        np.testing.assert_array_equal(table[units.get(dim, dim)], values.ravel())
    with xarray.open_zarr(any_store) as dataset:
        for name in ("throughput", "captured", "noise", "chief_x_mm", "chief_y_mm"):
            stored = dataset[name].broadcast_like(dataset["captured"]).transpose(*dims).values
            np.testing.assert_array_equal(table[name].to_numpy(stored.dtype).reshape(shape), stored)


def test_distortion_is_the_chief_ray_against_the_pinhole(psfgen: Psfgen, thin_lens: str, tmp_path: Path) -> None:
    """An ideal lens has none but the change of scale by focusing: image distance / focal length."""
    job: dict[str, Any] = {"lens": thin_lens, "depth": "inf", "focus": "1m,inf", "sensor_mm": "20,12", "field_max": 0.3}
    render(tiny(tmp_path / "psfs.zarr", **job))
    table = pandas.read_csv(exported(psfgen, tmp_path / "psfs.zarr", "csv"))
    on_axis = (table["field_x"] == 0) & (table["field_y"] == 0)
    assert table["distortion"].isna().equals(on_axis)
    for focus_mm, scale in ((1000, 1 / (1 - 50 / 1000)), (np.inf, 1)):
        found = table["distortion"][(table["focus_mm"] == focus_mm) & ~on_axis]
        np.testing.assert_allclose(found, scale - 1, atol=1e-6)


def test_csv_of_a_selection_is_those_rows(psfgen: Psfgen, copies: Path) -> None:
    whole = pandas.read_csv(exported(psfgen, copies, "csv"))
    part = pandas.read_csv(exported(psfgen, copies, "csv", "--copy", 1, *ONE_PAGE, name="part"))
    kept = (whole["copy"] == 1) & (whole["depth_mm"] == 3000) & (whole["focus_mm"] == 2000)
    rows = whole[kept & (whole["wavelength_um"] == 0.64)].reset_index(drop=True)
    pandas.testing.assert_frame_equal(part, rows)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_the_answer_as_json(psfgen: Psfgen, finished: Path) -> None:
    document = psfgen("export", finished, "--to", "csv", "--out", "psfs.csv", "--json").document
    assert document["kernels"] == 108
    assert document["bytes"] == Path("psfs.csv").stat().st_size
    assert document["paths"]["out"] == "psfs.csv"


def test_overwrite_replaces_the_file(psfgen: Psfgen, finished: Path) -> None:
    Path("out").write_text("old")
    assert exported(psfgen, finished, "csv", "--overwrite").read_text().startswith("focus_mm,")


BAD: dict[str, tuple[list[str], int, str]] = {
    "unknown format": (
        ["--to", "hdf"],
        2,
        r"--to hdf: unknown format; did you mean 'hdf5'\?; known: hdf5, psf-densify",
    ),
    "no format": (["--out", "new"], 2, r"Missing option '--to'"),
    "depth": (["--depth", "5m"], 2, r"--depth: \S+ holds no depth of 5000 mm; it holds 1000, 3000, inf"),
    "focus": (["--focus", "near"], 2, r"--focus near: 'near' is no distance"),
    "wavelength": (["--wavelength", "0.5"], 2, r"holds no wavelength of 0\.5 um; it holds 0\.48, 0\.64"),
    "nanometres": (["--wavelength", "480"], 2, r"--wavelength 480: wavelength 480 is not in um; did you mean 0\.48\?"),
    "copy": (["--copy", "1"], 2, r"--copy 1: \S+ holds copies 0 to 0"),
    "out exists": (["--out", "precious"], 2, r"--out precious exists; --overwrite replaces it"),
    "out is a folder": (["--out", "folder", "--overwrite"], 2, r"--out folder is a folder; name a file"),
    "no folder": (["--out", "absent/new"], 2, r"--out absent/new: there is no folder absent; make it first"),
    "below a file": (["--out", "precious/new"], 2, r"--out precious/new: there is no folder precious"),
    "several pages": (
        ["--to", "gridded", "--focus", "inf"],
        2,
        r"choose one each with --depth \(3\), --wavelength \(2\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_touches_nothing(psfgen: Psfgen, finished: Path, tmp_path: Path, name: str) -> None:
    given, code, message = BAD[name]
    Path("precious").write_text("thesis")
    Path("folder").mkdir()
    before = contents(tmp_path)
    rest = [] if name == "no format" or "--to" in given else ["--to", "csv"]
    rest += [] if "--out" in given else ["--out", "new"]
    ran = psfgen("export", finished, *given, *rest)
    assert (ran.code, ran.out) == (code, "")
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ran.err), ran.err
    assert contents(tmp_path) == before


def test_gridded_refuses_what_photutils_refuses(psfgen: Psfgen, dark: Path, tmp_path: Path) -> None:
    page = ["--to", "gridded", "--out", "new", "--focus", "2m", "--wavelength", "0.48"]
    ran = psfgen("export", dark, *page)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: --to gridded: 8 of 9 kernels get no light [^\n]* smaller --field-max\n", ran.err), (
        ran.err
    )
    small = render(tiny(tmp_path / "small.zarr", kernel_px=3, bins=3, depth="2m", focus="2m", wavelength=0.55))
    with pytest.raises(ConfigError, match="kernels of 3 samples a side; photutils needs 4"):
        export(Selection(small, {}), "gridded", tmp_path / "psfs.fits")


@pytest.mark.parametrize("to", EXPORTS)
def test_an_incomplete_store_is_refused(psfgen: Psfgen, store: Path, tmp_path: Path, to: str) -> None:
    (store / "ledger/depth-0001.json").unlink()
    before = contents(tmp_path)
    ran = psfgen("export", store, "--to", to, "--out", "new", *ONE_PAGE)
    assert (ran.code, ran.out) == (3, "")
    assert re.fullmatch(r"error: [^\n]* is incomplete: 1 of 3 blocks are missing[^\n]*\n", ran.err)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", EXPORTS)
def test_a_corrupt_chunk_leaves_nothing_half_written(psfgen: Psfgen, store: Path, tmp_path: Path, to: str) -> None:
    """The old file stays, also where it was to be replaced."""
    for chunk in [*store.glob("psf/c/*/1/0/0/0/0/0"), *store.glob("chief_y_mm/c/*/1/*/*")]:
        chunk.write_bytes(chunk.read_bytes()[::-1])
    Path("precious").write_text("thesis")
    before = contents(tmp_path)
    ran = psfgen("export", store, "--to", to, "--out", "precious", "--overwrite", *ONE_PAGE)
    assert (ran.code, ran.out) == (1, "")
    assert re.search(r"error: [^\n]* is corrupt [^\n]*\n$", ran.err), ran.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", EXPORTS)
def test_a_full_disk_is_one_line(finished: Path, tmp_path: Path, to: str) -> None:
    """In a process of its own, whose files may not grow beyond 5 kB."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "from psfgen.cli import main; main()"
    )
    args = ["export", str(finished), "--to", to, "--out", str(tmp_path / "new"), *(ONE_PAGE if to == "gridded" else [])]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert re.search(r"error: --out \S+/new cannot be written: File too large\n$", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_exporting_needs_no_ray_tracer(finished: Path, tmp_path: Path) -> None:
    code = "import sys; from psfgen.cli import cli; cli(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    args = ["export", str(finished), "--to", "hdf5", "--out", str(tmp_path / "psfs.h5")]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert not {"torch", "deeplens", "numba"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ["psfs.zarr", "psfs.h5"])
def test_a_store_is_never_replaced_by_an_export(psfgen: Psfgen, tmp_path: Path, name: str) -> None:
    render(tiny(tmp_path / name))
    before = contents(tmp_path / name)
    ran = psfgen("export", name, "--to", "csv", "--out", name, "--overwrite")
    assert (ran.code, ran.err) == (
        2,
        f"error: --out {name} is a store of psfgen, which an export does not replace; choose another --out\n",
    )
    assert contents(tmp_path / name) == before
