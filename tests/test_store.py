"""The contract between the two programs: names, dims, units, chunks, the ledger; what a reader refuses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
import zarr
from conftest import Psfgen, arrays, beside, contents, copy_of, flags, fork, tiny, wait_for

from psfgen.errors import ConfigError, StoreCorrupt, StoreError, StoreIncomplete
from psfgen.plan import Plan
from psfgen.render import load, render
from psfgen.store import open_store, schema
from psfgen.store.open import FORMATS, format_of, store_class
from psfgen.store.place import LocalFolder
from psfgen.store.schema import StoreSpec
from psfgen.store.verify import problems

KERNEL = ("focus", "depth", "field_y", "field_x", "wavelength")
DIMS = {
    "psf": (*KERNEL, "ky", "kx"),
    "psf_binned": (*KERNEL, "by", "bx"),
    "throughput": KERNEL[1:],
    "captured": KERNEL,
    "noise": KERNEL,
    "noise_binned": KERNEL,
    "chief_x_mm": KERNEL[:-1],
    "chief_y_mm": KERNEL[:-1],
}
UNITS = {
    "focus": "mm",
    "focus_dioptre": "1/m",
    "depth": "mm",
    "depth_dioptre": "1/m",
    "field_y": "1",
    "field_x": "1",
    "wavelength": "um",
    "ky": "um",
    "kx": "um",
    "by": "um",
    "bx": "um",
}
PSF_CHUNK = "psf/c/1/2/0/0/0/0/0"
SMALL_CHUNK = "captured/c/0/1/0/0/0"


@contextmanager
def dataset(path: Path) -> Iterator[xarray.Dataset]:
    """A store as xarray alone sees it."""
    with xarray.open_dataset(path, engine="h5netcdf") if path.suffix == ".h5" else xarray.open_zarr(path) as opened:
        yield opened


def entries(store: Path) -> list[Path]:
    """The files of the blocks' ledger entries."""
    return sorted((beside(store) / "ledger").glob("*.json"))


def flip(path: Path, at: float) -> None:
    """Turn one bit over, `at` of the way into a file."""
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 0x10
    path.write_bytes(bytes(data))


# --- what stands in a store -------------------------------------------------------------------------------------------


def test_xarray_sees_a_labelled_dataset(either: Path) -> None:
    """Seven named dims and the binned two, coordinates and units; no warning, which would be an error here."""
    with dataset(either) as seen:
        assert set(seen.data_vars) == set(DIMS)
        for name, dims in DIMS.items():
            assert seen[name].dims == dims
            assert seen[name].attrs["units"] == ("mm" if name.startswith("chief") else "1")
            assert seen[name].attrs["long_name"]
            assert set(dims) <= set(seen[name].coords)
        assert set(seen.coords) == set(UNITS)
        assert {name: seen[name].attrs["units"] for name in UNITS} == UNITS
        assert {seen[name].ndim for name in UNITS} == {1}
        assert seen["depth_dioptre"].dims == ("depth",)
        assert seen["focus_dioptre"].dims == ("focus",)
        assert seen["psf"].dtype == np.float32
        near = seen["psf"].sel(focus=2000, depth=1000, wavelength=0.64).isel(field_x=1, field_y=1)
        assert float(near.sum()) == pytest.approx(1, abs=1e-5)


def test_xarray_sees_the_same_in_every_format(finished: Path, finished_h5: Path) -> None:
    """To the last bit and the last attribute; only nested root attributes are JSON texts in HDF5, which has no such."""
    with dataset(finished) as zarr, dataset(finished_h5) as hdf5:
        xarray.testing.assert_equal(zarr, hdf5)
        assert zarr.sizes == hdf5.sizes
        assert list(zarr.variables) == sorted(zarr.variables) or set(zarr.variables) == set(hdf5.variables)
        for name in zarr.variables:
            assert zarr[name].dims == hdf5[name].dims, name
            assert zarr[name].dtype == hdf5[name].dtype, name
            assert zarr[name].attrs == hdf5[name].attrs, name
            assert set(zarr[name].coords) == set(hdf5[name].coords), name
            assert zarr[name].values.tobytes() == hdf5[name].values.tobytes(), name
        nested = hdf5.attrs["json_attributes"].split()
        found = {key: json.loads(value) if key in nested else value for key, value in hdf5.attrs.items()}
        assert {key: value for key, value in found.items() if key != "json_attributes"} == zarr.attrs


def test_metadata_is_consolidated(finished: Path) -> None:
    with xarray.open_zarr(finished, consolidated=True) as dataset:
        assert dataset.sizes["kx"] == 12


def test_coordinates(either: Path) -> None:
    """Strictly ascending but for ky and by, row 0 being scene +y; infinity is a number and 0 dioptres."""
    c = open_store(either).coords
    assert c["depth"].tolist() == [1000, 3000, math.inf]
    assert c["depth_dioptre"].tolist() == pytest.approx([1, 1 / 3, 0])
    assert c["focus"].tolist() == [2000, math.inf]
    assert c["focus_dioptre"].tolist() == [0.5, 0]
    assert c["field_x"].tolist() == c["field_y"].tolist() == [-1, 0, 1]
    assert c["wavelength"].tolist() == [0.48, 0.64]
    assert c["kx"] == pytest.approx((np.arange(12) - 5.5) * 24)
    assert c["ky"] == pytest.approx((5.5 - np.arange(12)) * 24)
    width = 24 * 12 / 5
    assert c["bx"] == pytest.approx((np.arange(5) - 2) * width)
    assert c["by"] == pytest.approx((2 - np.arange(5)) * width)


def test_infinity_is_the_string_inf_in_attributes(either: Path) -> None:
    opened = open_store(either)
    assert opened.attrs["plan"]["depth"] == [1000, 3000, "inf"]
    assert opened.attrs["config"]["focus"] == [2000, "inf"]
    assert set(opened.attrs["sensor_z_mm"]) == {"2000", "inf"}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for path in entries(either):
        json.loads(path.read_text(), parse_constant=refuse)


def test_root_attributes_say_where_every_number_comes_from(either: Path) -> None:
    attrs = open_store(either).attrs
    assert (attrs["schema"], attrs["schema_version"], attrs["seed"]) == ("psfgen", "1.0", 0)
    assert (attrs["engine"], attrs["tracer"], attrs["device"]) == ("geometric", "numba", "cpu")
    assert (attrs["reference_um"], attrs["pitch_um"], attrs["field_max"]) == (0.5876, 24.0, 1.0)
    assert attrs["plan_sha256"] == schema.sha256_of(attrs["plan"])
    assert json.loads(attrs["lens"]["text"])["info"].startswith("Cooke triplet")
    assert attrs["sensor_z_mm"]["2000"] > attrs["sensor_z_mm"]["inf"] > 50
    assert {"psfgen", "python", "deeplens-core", "torch", "numpy", "zarr", "h5py"} <= set(attrs["versions"])
    assert "row 0 is scene +y" in attrs["orientation"]
    assert "chief ray" in attrs["centring"]


def test_chunks_and_codecs(finished: Path) -> None:
    """Whole chunks a block, zstd level 1 and crc32c, NaN where nothing was written, no sharding."""
    for name, dims in DIMS.items():
        document = json.loads((finished / name / "zarr.json").read_text())
        sizes = dict(zip(dims, document["shape"], strict=True))
        chunk = {**sizes, "depth": 1, **({"focus": 1} if name == "psf" else {})}
        assert document["chunk_grid"]["configuration"]["chunk_shape"] == [chunk[dim] for dim in dims]
        codecs = [(codec["name"], codec.get("configuration", {})) for codec in document["codecs"]]
        assert [codec for codec, _ in codecs] == ["bytes", "zstd", "crc32c"]
        assert codecs[1][1]["level"] == 1
        assert document["fill_value"] == "NaN"
        assert document["dimension_names"] == list(dims)


@pytest.mark.parametrize(
    ("rows", "columns", "kernel_px", "waves", "band"),
    [
        (20, 20, 64, 3, 20),
        (3, 3, 12, 2, 3),
        (16, 16, 256, 3, 2),
        (7, 40, 128, 3, 1),
        (13, 13, 64, 3, 13),
        (2, 64, 512, 3, 1),
    ],
)
def test_a_psf_chunk_is_the_largest_even_band_up_to_32_mib(
    rows: int, columns: int, kernel_px: int, waves: int, band: int
) -> None:
    sizes = {"focus": 4, "depth": 8, "field_y": rows, "field_x": columns, "wavelength": waves}
    sizes |= {"ky": kernel_px, "kx": kernel_px, "by": 15, "bx": 15}
    spec = StoreSpec({dim: np.arange(size, dtype=float) for dim, size in sizes.items()}, {})
    assert spec.chunks("psf") == (1, 1, band, columns, waves, kernel_px, kernel_px)
    assert spec.chunks("psf_binned") == (4, 1, band, columns, waves, 15, 15)
    assert spec.chunks("throughput") == (1, rows, columns, waves)
    row_bytes = 4 * columns * waves * kernel_px**2
    assert band == 1 or band * row_bytes <= 32 * 2**20
    assert not any(rows % n == 0 and n * row_bytes <= 32 * 2**20 for n in range(band + 1, rows + 1))


def test_the_ledger_holds_every_block_with_its_checksums(either: Path) -> None:
    owned: list[str] = []
    opened, folder = open_store(either), beside(either)
    for index in range(3):
        entry = json.loads((folder / f"ledger/depth-000{index}.json").read_text())
        assert (entry["block"], entry["index"]) == (f"depth-000{index}", index)
        assert entry["plan_sha256"] == opened.attrs["plan_sha256"]
        assert entry["rays"] == 3 * 2 * 256, "a bundle for each field radius and wavelength"
        assert entry["seconds"] >= entry["seconds_tracing"] + entry["seconds_writing"] > 0
        assert min(entry["seconds_tracing"], entry["seconds_writing"]) > 0
        assert entry["diffraction"] == {"kernels": 0, "airy_um": 0.0, "rms_um": 0.0}
        assert entry["host"] == os.uname().nodename
        assert entry["versions"] == opened.attrs["versions"]
        owned += entry["chunks"]
        assert all(re.fullmatch("[0-9a-f]{8}", checksum) for checksum in entry["chunks"].values())
        kernels = [checksum for chunk, checksum in entry["chunks"].items() if chunk.startswith("psf")]
        assert len(set(kernels)) == len(kernels), "chunks that differ have checksums that differ"
    on_disk = [name for name in contents(folder) if name.split("/")[0] in (*DIMS, "parts") and name[-5:] != ".json"]
    assert sorted(owned) == sorted(on_disk), "every chunk belongs to exactly one block"
    assert not list(folder.glob("ledger/running/*"))
    assert not list(folder.glob("ledger/failed/*"))
    assert not [name for name in contents(folder) if "tmp" in name]


@pytest.mark.parametrize("name", ["dark.zarr", "dark.h5"])
def test_missing_light_is_nan_and_nothing_else_is(tmp_path: Path, name: str) -> None:
    """Beyond the singlet's rim."""
    store = render(tiny(tmp_path / name, lens="singlet", field_max=1.3, depth="2m", pitch_um=120))
    dark = (store.read("throughput") == 0) | (store.read("captured") == 0)
    assert 0 < dark.sum() < dark.size
    for name in ("psf", "psf_binned"):
        values = store.read(name)
        assert np.array_equal(np.isnan(values).any((-2, -1)), dark)
        assert np.array_equal(np.isnan(values).all((-2, -1)), dark)
        np.testing.assert_allclose(values[~dark].sum((-2, -1)), 1, atol=1e-5)
        assert values[~dark].min() >= 0
    for name in ("noise", "noise_binned"):
        assert np.array_equal(np.isnan(store.read(name)), dark)
    for name in ("chief_x_mm", "chief_y_mm", "captured", "throughput"):
        assert np.isfinite(store.read(name)).all()


INDICES: list[dict[str, Any]] = [
    {},
    {"kx": 3, "focus": 1, "depth": slice(1, 3)},
    {"depth": 1},
    {"depth": -1, "focus": -2, "ky": -3},
    {"depth": slice(None, None, 2), "field_x": slice(1, None)},
    {"focus": slice(0, 1), "depth": slice(2, 3), "wavelength": slice(0, 2), "kx": slice(2, 11, 3)},
    {"depth": np.int64(2), "field_y": np.int32(1), "ky": np.uint8(4)},
    {"depth": slice(1, 1)},
    {"field_x": slice(-2, None), "kx": slice(-4, -1), "depth": slice(-2, None)},
    {"depth": slice(0, 99), "ky": slice(5, 99, 4)},
    dict.fromkeys(DIMS["psf"], 0),
]


@pytest.mark.parametrize("name", ["psf", "throughput", "chief_x_mm"])
@pytest.mark.parametrize("index", INDICES)
def test_reading_addresses_axes_by_name(either: Path, name: str, index: dict[str, Any]) -> None:
    """As numpy would index the whole array."""
    store = open_store(either)
    index = {dim: at for dim, at in index.items() if dim in DIMS[name]}
    expected = store.read(name)[tuple(index.get(dim, slice(None)) for dim in DIMS[name])]
    found = store.read(name, **index)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("name", ["psf", "throughput"])
@pytest.mark.parametrize("index", [{"depth": 3}, {"depth": -4}, {"field_x": 3}, {"wavelength": np.int64(-3)}])
def test_an_index_beyond_the_end_is_an_error(either: Path, name: str, index: dict[str, Any]) -> None:
    with pytest.raises((IndexError, StoreError)):
        open_store(either).read(name, **index)


@pytest.mark.parametrize("name", list(UNITS))
def test_coordinates_are_read_like_arrays(either: Path, name: str) -> None:
    store = open_store(either)
    (dim,) = [schema.COORD_DIMS.get(name, name)]
    assert np.array_equal(store.read(name), store.coords[name])
    assert np.array_equal(store.read(name, **{dim: slice(1, None)}), store.coords[name][1:])
    assert store.read(name, **{dim: 1}) == store.coords[name][1]


WITHIN: list[dict[str, slice]] = [{}, {"depth": slice(1, 2)}, {"depth": slice(1, 2), "focus": slice(1, 2)}]
WITHIN += [{"depth": slice(0, 2), "field_y": slice(1, 3)}, {"field_x": slice(0, 3, 2)}]


@pytest.mark.parametrize("index", WITHIN)
@pytest.mark.parametrize("name", ["psf", "psf_binned", "captured"])
def test_reading_into_memory_is_reading(either: Path, name: str, index: dict[str, slice]) -> None:
    """Whole chunks or not, whatever the memory."""
    store = open_store(either)
    expected = store.read(name, **index)
    for out in (np.zeros_like(expected), np.zeros(expected.shape), np.zeros(expected.T.shape, np.float32).T):
        store.read_into(out, name, **index)
        assert np.array_equal(out, expected, equal_nan=True)


@pytest.mark.parametrize("fault", ["flipped", "torn", "empty", "missing"])
def test_reading_into_memory_refuses_what_reading_does(store: Path, fault: str) -> None:
    opened, out = open_store(store), open_store(store).read("psf", depth=slice(2, 3), focus=slice(1, 2))
    data = (store / PSF_CHUNK).read_bytes()
    if fault == "missing":
        (store / PSF_CHUNK).unlink()
    elif fault == "flipped":
        flip(store / PSF_CHUNK, 0.5)
    else:
        (store / PSF_CHUNK).write_bytes(data[:-7] if fault == "torn" else b"")
    error, message = (StoreIncomplete, "missing chunks") if fault == "missing" else (StoreCorrupt, "psf is corrupt")
    with pytest.raises(error, match=message):
        opened.read_into(out, "psf", depth=slice(2, 3), focus=slice(1, 2))


# --- what a reader refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "chunk"), [("psf", PSF_CHUNK), ("captured", SMALL_CHUNK)])
def test_a_flipped_bit_is_refused(store: Path, name: str, chunk: str, at: float) -> None:
    flip(store / chunk, at)
    with pytest.raises(StoreCorrupt, match=f"{name} is corrupt .*psfgen verify"):
        open_store(store).read(name)


@pytest.mark.parametrize(("name", "chunk"), [("psf", PSF_CHUNK), ("captured", SMALL_CHUNK)])
def test_a_torn_chunk_is_refused(store: Path, name: str, chunk: str) -> None:
    (store / chunk).write_bytes((store / chunk).read_bytes()[:-7])
    with pytest.raises(StoreCorrupt):
        open_store(store).read(name)


@pytest.mark.parametrize(("name", "chunk"), [("psf", PSF_CHUNK), ("captured", SMALL_CHUNK)])
def test_an_absent_chunk_never_reads_as_data(store: Path, name: str, chunk: str) -> None:
    (store / chunk).unlink()
    with pytest.raises(StoreIncomplete, match=f"{name} has missing chunks"):
        open_store(store).read(name)


@pytest.mark.parametrize("chunk", ["depth/c/0", "ky/c/0"])
def test_a_broken_coordinate_is_refused_on_opening(store: Path, chunk: str) -> None:
    flip(store / chunk, 0.5)
    with pytest.raises(StoreCorrupt):
        open_store(store)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 3, "node_type": "group"', "\0\0\0"])
def test_broken_metadata_is_refused(store: Path, text: str) -> None:
    (store / "zarr.json").write_text(text)
    with pytest.raises(StoreError):
        open_store(store)


def test_an_incomplete_store_is_refused_unless_asked(broken: Path) -> None:
    entries(broken)[1].unlink()
    with pytest.raises(StoreIncomplete, match="1 of 3 blocks are missing; run the same `psfgen render` again"):
        open_store(broken)
    assert open_store(broken, allow_incomplete=True).missing() == [1]


def test_a_complete_store_whose_ledger_is_damaged_is_refused(broken: Path) -> None:
    data = entries(broken)[1].read_bytes()
    entries(broken)[1].write_bytes(data.replace(b'"rays": 1', b'"rays": 2'))
    with pytest.raises(StoreCorrupt, match=r"depth-0001\.json does not have the checksum.*psfgen repair"):
        open_store(broken)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("version", "readable"), [("1.0", True), ("1.7", True), ("2.0", False), ("10.0", False), ("", False)]
)
def test_an_unknown_major_version_is_refused(tmp_path: Path, name: str, version: str, readable: bool) -> None:
    """A store of the future, sound in itself."""
    _, spec = plan_and_spec()
    path = tmp_path / ENDINGS[name]
    with contextlib.nullcontext() if readable else pytest.raises(StoreError):
        store_class(name).create(path, StoreSpec(spec.coords, {**spec.attrs, "schema_version": version}))
    if readable:
        assert open_store(path, allow_incomplete=True).attrs["schema_version"] == version
        return
    with pytest.raises(
        StoreError, match=rf"has schema psfgen version {version}; this psfgen reads psfgen version 1\.x"
    ):
        open_store(path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_foreign_store_is_refused(tmp_path: Path, name: str) -> None:
    _, spec = plan_and_spec()
    with pytest.raises(StoreError, match="has schema unknown version none"):
        store_class(name).create(tmp_path / ENDINGS[name], StoreSpec(spec.coords, {}))
    with pytest.raises(StoreError, match="has schema unknown version none"):
        open_store(tmp_path / ENDINGS[name])


def test_a_group_that_psfgen_did_not_make_is_no_store(tmp_path: Path) -> None:
    zarr.create_group(store=str(tmp_path / "group.zarr"), attributes={"title": "mine"})
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["psf"] = np.zeros(3)
    for name in ("group.zarr", "group.h5"):
        with pytest.raises(StoreError, match=r"is no psfgen store \(formats: zarr, hdf5\)"):
            open_store(tmp_path / name)


def test_no_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"does not exist; `psfgen render --out .*` makes one"):
        open_store(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="is no psfgen store"):
        open_store(tmp_path)


def test_a_store_can_be_moved(store: Path, tmp_path: Path) -> None:
    moved = shutil.move(store, tmp_path / "elsewhere.zarr")
    np.testing.assert_array_equal(open_store(moved).read("noise").shape, (2, 3, 3, 3, 2))


# --- HDF5 as anyone reads it ------------------------------------------------------------------------------------------


def test_plain_h5py_reads_a_moved_store(finished: Path, finished_h5: Path, tmp_path: Path) -> None:
    """Master and sidecar together, from any folder: the links are relative."""
    (tmp_path / "far/away").mkdir(parents=True)
    moved = copy_of(finished_h5, tmp_path / "far/away")
    shutil.rmtree(tmp_path / "old", ignore_errors=True)
    store = open_store(finished)
    with h5py.File(moved, "r") as file:
        for name, dims in DIMS.items():
            assert np.array_equal(file[name][()], store.read(name), equal_nan=True), name
            assert [scale[0].name for scale in file[name].dims] == [f"/{dim}" for dim in dims]
            assert file[name].is_virtual
            links = {source.file_name for source in file[name].virtual_sources()}
            assert links == {f"psfs.h5.d/parts/depth-000{depth}.h5" for depth in range(3)}
        for name in UNITS:
            assert np.array_equal(file[name][()], store.coords[name])
            assert file[name].is_scale == (name not in schema.COORD_DIMS)


def test_the_name_of_an_hdf5_store_may_hold_anything(tmp_path: Path) -> None:
    """HDF5 itself would read %b in a link as a number."""
    path = tmp_path / "50%b ü.h5"
    store = render(tiny(path, depth="2m"))
    with h5py.File(path, "r") as file:
        assert np.array_equal(file["psf"][()], store.read("psf"))


def test_an_hdf5_file_has_a_checksum_on_everything_and_no_clock_in_it(finished_h5: Path) -> None:
    """fletcher32 on the chunks, a version of the format whose metadata carry checksums, no times."""
    for path in [finished_h5, *beside(finished_h5).glob("parts/*.h5")]:
        with h5py.File(path, "r") as file:
            assert file.id.get_create_plist().get_version()[0] >= 2
            for name, array in file.items():
                assert not array.id.get_create_plist().get_obj_track_times(), name
                if path != finished_h5:
                    assert (array.compression, array.compression_opts) == ("gzip", 1)
                    assert array.shuffle
                    assert array.fletcher32
                    assert array.chunks == tuple(open_store(finished_h5).spec.chunks(name))
                    assert np.isnan(array.fillvalue)


def test_a_block_that_is_not_there_is_nan_to_others_and_refused_by_us(finished_h5: Path, tmp_path: Path) -> None:
    """A plain reader must not take it for data, and ours says so."""
    path = copy_of(finished_h5, tmp_path)
    (beside(path) / "parts/depth-0001.h5").unlink()
    with h5py.File(path, "r") as file:
        for name, dims in DIMS.items():
            gone = np.isnan(file[name][()]).all(axis=tuple(i for i, dim in enumerate(dims) if dim != "depth"))
            assert gone.tolist() == [False, True, False]
    store = open_store(path)
    for name in DIMS:
        assert np.isfinite(store.read(name, depth=0)).any()
        for index in ({}, {"depth": 1}, {"depth": slice(0, 2)}, {"depth": -2}):
            with pytest.raises(StoreIncomplete, match="block depth-0001 is missing; run the same `psfgen render`"):
                store.read(name, **index)


@pytest.mark.parametrize("at", [0.0, 0.05, 0.5, 1.0])
def test_a_flipped_bit_of_a_part_is_refused(finished_h5: Path, tmp_path: Path, at: float) -> None:
    """By HDF5's own checksums where the bytes count, and by verifying everywhere."""
    path = copy_of(finished_h5, tmp_path)
    flip(beside(path) / "parts/depth-0001.h5", at)
    assert [problem.block for problem in problems(open_store(path))] == ["depth-0001"]
    store = open_store(path)
    for name in DIMS:
        with contextlib.suppress(StoreCorrupt):
            assert np.array_equal(store.read(name), open_store(finished_h5).read(name), equal_nan=True)


# --- creation ---------------------------------------------------------------------------------------------------------


def plan_and_spec(**changes: Any) -> tuple[Plan, StoreSpec]:
    _, plan = load(tiny(Path("unused"), **changes), "cpu")
    attrs = {"schema": "psfgen", "schema_version": "1.0", "plan": plan.document, "plan_sha256": plan.sha256}
    return plan, StoreSpec(plan.coords, attrs)


ENDINGS = {"zarr": "store.zarr", "hdf5": "store.h5"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_keeps_the_contract(name: str, tmp_path: Path) -> None:
    """Create, write whole blocks, commit, read back; a block is done when the ledger says so."""
    _, spec = plan_and_spec()
    kind, path = store_class(name), tmp_path / "store"
    assert not kind.is_store(path)
    created = kind.create(path, spec)
    assert kind.is_store(path)
    assert (created.missing(), created.blocks) == ([0, 1, 2], ("depth-0000", "depth-0001", "depth-0002"))
    rng, written = np.random.default_rng(0), {}
    for array in DIMS:
        shape = list(spec.shape(array))
        shape[DIMS[array].index("depth")] = 1
        written[array] = rng.random(shape, dtype=np.float32)
        created.write(1, array, written[array])
    created.commit(1, {"rays": 5, "seconds": 1.0})
    again = open_store(path, allow_incomplete=True)
    assert again.missing() == [0, 2]
    for array, values in written.items():
        np.testing.assert_array_equal(again.read(array, depth=slice(1, 2)), values)
        for incomplete in ({"depth": 0}, {"depth": slice(0, 1)}, {"depth": slice(0, 2)}, {}):
            with pytest.raises(StoreIncomplete):
                again.read(array, **incomplete)
    assert {key: again.coords[key].tolist() for key in UNITS} == {key: spec.coords[key].tolist() for key in UNITS}
    entry = again.ledger.read("depth-0001")
    assert sorted(entry["chunks"]) == sorted(again.chunk_files(1))
    assert (entry["rays"], entry["plan_sha256"]) == (5, spec.attrs["plan_sha256"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_is_put_together_from_bands_in_any_order(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """And its files do not show the order."""
    monkeypatch.setattr(schema, "PSF_CHUNK_BYTES", 1)
    _, spec = plan_and_spec()
    assert spec.band_rows == 1
    rng = np.random.default_rng(0)
    whole = {array: rng.random(spec.shape(array), dtype=np.float32) for array in DIMS}
    made = []
    for folder, turn in (("a", 1), ("b", -1)):
        (tmp_path / folder).mkdir()
        store = store_class(name).create(tmp_path / folder / ENDINGS[name], spec)
        pieces: list[tuple[str, dict[str, slice]]] = [(array, {}) for array in DIMS if not array.startswith("psf")]
        pieces += [("psf_binned", {"field_y": slice(row, row + 1)}) for row in range(3)]
        pieces += [
            ("psf", {"focus": slice(f, f + 1), "field_y": slice(row, row + 1)}) for f in range(2) for row in range(3)
        ]
        for array, place in pieces[::turn]:
            index = {**place, "depth": slice(2, 3)}
            store.write(2, array, whole[array][tuple(index.get(dim, slice(None)) for dim in DIMS[array])], **place)
        store.commit(2, {})
        for array in DIMS:
            found = store.read(array, depth=2)
            assert np.array_equal(found, whole[array].take(2, axis=DIMS[array].index("depth"))), array
        made.append({key: data for key, data in contents(beside(Path(store.path))).items() if "ledger" not in key})
    assert made[0] == made[1]


@pytest.mark.parametrize("name", FORMATS)
def test_an_abandoned_block_is_begun_anew(name: str, tmp_path: Path) -> None:
    _, spec = plan_and_spec()
    store = store_class(name).create(tmp_path / ENDINGS[name], spec)
    store.write(0, "noise", np.full((2, 1, 3, 3, 2), 0.5, np.float32))
    store.abandon(0)
    store.abandon(0)
    with pytest.raises(StoreIncomplete):
        store.read("psf", depth=0)
    assert store.missing() == [0, 1, 2]
    for array in DIMS:
        store.write(0, array, np.ones([1 if d == "depth" else len(spec.coords[d]) for d in DIMS[array]], np.float32))
    store.commit(0, {})
    assert (store.read("noise", depth=0) == 1).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_full_of_nan_is_written(name: str, tmp_path: Path) -> None:
    """Else a dark block could not be told from a missing one."""
    _, spec = plan_and_spec()
    created = store_class(name).create(tmp_path / ENDINGS[name], spec)
    for array in DIMS:
        shape = [1 if d == "depth" else len(spec.coords[d]) for d in DIMS[array]]
        created.write(0, array, np.full(shape, np.nan, np.float32))
    created.commit(0, {})
    assert np.isnan(created.read("noise", depth=slice(0, 1))).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_without_its_chunks_cannot_be_committed(name: str, tmp_path: Path) -> None:
    """Nor with some of them only."""
    _, spec = plan_and_spec()
    created = store_class(name).create(tmp_path / ENDINGS[name], spec)
    created.write(0, "noise", np.full((2, 1, 3, 3, 2), 0.5, np.float32))
    with pytest.raises(StoreIncomplete, match=r"is missing|are missing"):
        created.commit(0, {})
    assert created.missing() == [0, 1, 2]
    created.abandon(0)


@pytest.mark.parametrize("name", FORMATS)
def test_who_loses_the_race_joins_the_winner(name: str, tmp_path: Path) -> None:
    _, spec = plan_and_spec()
    first, second = (store_class(name).create(tmp_path / ENDINGS[name], spec) for _ in range(2))
    assert first.attrs == second.attrs
    left = {ENDINGS[name], *(["store.h5.d"] if name == "hdf5" else [])}
    assert {path.name for path in tmp_path.iterdir()} == left, "no temporary folder is left"


def test_a_master_that_a_killed_creator_did_not_write_is_written_by_the_next(finished_h5: Path, tmp_path: Path) -> None:
    """Killed between the appearance of the sidecar and that of the master, by whoever opens the store."""
    path = tmp_path / "psfs.h5"

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.link" and str(args[1]) == str(path):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        render(tiny(path))

    assert wait_for(fork(work)) == -signal.SIGKILL
    assert not path.exists()
    assert store_class("hdf5").is_store(path)
    assert open_store(path, allow_incomplete=True).missing() == [0, 1, 2]
    assert path.read_bytes() == finished_h5.read_bytes()
    render(tiny(path))
    assert arrays(path) == arrays(finished_h5)


@pytest.mark.parametrize("shards", [("0/2", "1/2"), (None, None)])
def test_two_processes_render_into_one_store(
    either: Path, tmp_path: Path, shards: tuple[str | None, str | None]
) -> None:
    """At once, from the first moment: both end well and the store is the one a single process makes."""
    path = tmp_path / either.name
    gate_read, gate_write = os.pipe()

    def start(shard: str | None) -> int:
        def work() -> None:
            os.read(gate_read, 1)
            render(tiny(path), shard=shard)

        return fork(work)

    pids = [start(shard) for shard in shards]
    os.write(gate_write, b"gg")
    assert [wait_for(pid) for pid in pids] == [0, 0]
    assert open_store(path).missing() == []
    assert arrays(path) == arrays(either)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, beside(path).name}
    os.close(gate_read)
    os.close(gate_write)


def test_a_block_that_another_process_finished_first_is_no_failure(broken: Path) -> None:
    """Two processes on the same block: the slower one goes on and commits the same again."""
    ledger = open_store(broken).ledger
    entry = ledger.read("depth-0001")
    ledger.start("depth-0001")
    ledger.commit("depth-0001", entry)
    ledger.touch("depth-0001")
    ledger.commit("depth-0001", entry)
    assert ledger.running() == {}
    assert ledger.read("depth-0001") == entry


# --- which format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("psfs.zarr", None, "zarr"),
        ("psfs", None, "zarr"),
        ("psfs.h5", None, "hdf5"),
        ("psfs.hdf5", None, "hdf5"),
        ("psfs.h5", "zarr", "zarr"),
        ("psfs.zarr", "hdf5", "hdf5"),
        ("memory://psfs.zarr", None, "zarr"),
    ],
)
def test_a_path_says_its_format_unless_one_is_named(path: str, name: str | None, expected: str) -> None:
    assert format_of(path, name) == expected


@pytest.mark.parametrize(("file", "name"), [("psfs.zarr", "hdf5"), ("odd.h5", "zarr")])
def test_any_path_may_have_any_format(
    finished: Path, finished_h5: Path, tmp_path: Path, file: str, name: str, psfgen: Psfgen
) -> None:
    """It is found again by what lies there, not by its ending."""
    assert psfgen("render", *flags(out=file, format=name, depth="2m")).code == 0
    assert open_store(tmp_path / file).format == name
    assert psfgen("verify", file).code == 0
    assert psfgen("render", *flags(out=file, format=name, depth="2m")).out == f"{file}: nothing to do\n"


def test_another_format_than_the_one_that_stands_there_is_refused(broken: Path, psfgen: Psfgen) -> None:
    other = "zarr" if broken.suffix == ".h5" else "hdf5"
    before = contents(broken)
    for more in ([], ["--overwrite"]):
        ran = psfgen("render", *flags(out=broken, format=other), *more)
        assert (ran.code, ran.out) == (1, "")
        assert f"exists and is no {other} store of psfgen; choose another --out" in ran.err
    assert contents(broken) == before


# --- large stores -----------------------------------------------------------------------------------------------------


def counted(method: str, counts: dict[str, int]) -> Any:
    """A method of LocalFolder that counts its calls."""
    true = getattr(LocalFolder, method)

    def call(self: LocalFolder, at: str) -> Any:
        counts[method] += 1
        return true(self, at)

    return call


@pytest.mark.parametrize("name", FORMATS)
def test_the_state_of_many_blocks_takes_few_looks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, psfgen: Psfgen
) -> None:
    """Opening and `status` list the ledger some times, whatever the number of blocks, and open no entry."""
    _, small = plan_and_spec(grid=1, kernel_px=4, bins=2)
    looks: list[dict[str, int]] = []
    for copies in (2, 40):
        coords = {"copy": np.arange(float(copies)), **small.coords}
        path = tmp_path / f"{copies}-{ENDINGS[name]}"
        store = store_class(name).create(path, StoreSpec(coords, small.attrs))
        for block, of in enumerate(store.blocks[: 3 * copies - 1]):
            store.ledger.commit(of, {**store.spec.identity(block), "chunks": {}})
        counts = {"names": 0, "read": 0}
        with monkeypatch.context() as patch:
            for method in counts:
                patch.setattr(LocalFolder, method, counted(method, counts))
            assert psfgen("status", path).code == 3
        looks.append(dict(counts))
    assert looks[0] == looks[1]
    assert looks[0]["names"] < 10


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'zar'; did you mean 'zarr'.*known: .*zarr"):
        store_class("zar")
