"""The contract between the two programs: names, dims, units, chunks, the ledger; what a reader refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from conftest import arrays, contents, fork, tiny, wait_for

from psfgen.errors import ConfigError, StoreCorrupt, StoreError, StoreIncomplete
from psfgen.plan import Plan
from psfgen.render import load, render
from psfgen.store import Store, open_store, schema
from psfgen.store.open import FORMATS, store_class
from psfgen.store.schema import StoreSpec
from psfgen.store.zarr_store import ZarrStore

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


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def flip(path: Path, at: float) -> None:
    """Turn one bit over, `at` of the way into a file."""
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 0x10
    path.write_bytes(bytes(data))


# --- what stands in a store -------------------------------------------------------------------------------------------


def test_xarray_sees_a_labelled_dataset(finished: Path) -> None:
    """Seven named dims and the binned two, coordinates and units; no warning, which would be an error here."""
    with xarray.open_zarr(finished) as dataset:
        assert set(dataset.data_vars) == set(DIMS)
        for name, dims in DIMS.items():
            assert dataset[name].dims == dims
            assert dataset[name].attrs["units"] == ("mm" if name.startswith("chief") else "1")
            assert dataset[name].attrs["long_name"]
            assert set(dims) <= set(dataset[name].coords)
        assert set(dataset.coords) == set(UNITS)
        assert {name: dataset[name].attrs["units"] for name in UNITS} == UNITS
        assert {dataset[name].ndim for name in UNITS} == {1}
        assert dataset["depth_dioptre"].dims == ("depth",)
        assert dataset["focus_dioptre"].dims == ("focus",)
        assert dataset["psf"].dtype == np.float32
        near = dataset["psf"].sel(focus=2000, depth=1000, wavelength=0.64).isel(field_x=1, field_y=1)
        assert float(near.sum()) == pytest.approx(1, abs=1e-5)


def test_metadata_is_consolidated(finished: Path) -> None:
    with xarray.open_zarr(finished, consolidated=True) as dataset:
        assert dataset.sizes["kx"] == 12


def test_coordinates(opened: Store) -> None:
    """Strictly ascending but for ky and by, row 0 being scene +y; infinity is a number and 0 dioptres."""
    c = opened.coords
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


def test_infinity_is_the_string_inf_in_attributes(finished: Path, opened: Store) -> None:
    assert opened.attrs["plan"]["depth"] == [1000, 3000, "inf"]
    assert opened.attrs["config"]["focus"] == [2000, "inf"]
    assert set(opened.attrs["sensor_z_mm"]) == {"2000", "inf"}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for path in [*finished.rglob("zarr.json"), *finished.rglob("ledger/*.json")]:
        json.loads(path.read_text(), parse_constant=refuse if "ledger" in str(path) else None)


def test_root_attributes_say_where_every_number_comes_from(opened: Store) -> None:
    attrs = opened.attrs
    assert (attrs["schema"], attrs["schema_version"], attrs["seed"]) == ("psfgen", "1.0", 0)
    assert (attrs["engine"], attrs["tracer"], attrs["device"]) == ("geometric", "numba", "cpu")
    assert (attrs["reference_um"], attrs["pitch_um"], attrs["field_max"]) == (0.5876, 24.0, 1.0)
    assert attrs["plan_sha256"] == schema.sha256_of(attrs["plan"])
    assert json.loads(attrs["lens"]["text"])["info"].startswith("Cooke triplet")
    assert attrs["sensor_z_mm"]["2000"] > attrs["sensor_z_mm"]["inf"] > 50
    assert {"psfgen", "python", "deeplens-core", "torch", "numpy", "zarr"} <= set(attrs["versions"])
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


def test_the_ledger_holds_every_block_with_its_checksums(finished: Path, opened: Store) -> None:
    owned: list[str] = []
    for index in range(3):
        entry = json.loads((finished / f"ledger/depth-000{index}.json").read_text())
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
    on_disk = [name for name in contents(finished) if "/c/" in name and name.split("/")[0] in DIMS]
    assert sorted(owned) == sorted(on_disk), "every chunk belongs to exactly one block"
    assert not list(finished.glob("ledger/running/*"))
    assert not list(finished.glob("ledger/failed/*"))
    assert not [name for name in contents(finished) if "tmp" in name]


def test_missing_light_is_nan_and_nothing_else_is(tmp_path: Path) -> None:
    """Beyond the singlet's rim."""
    store = render(tiny(tmp_path / "dark.zarr", lens="singlet", field_max=1.3, depth="2m", pitch_um=120))
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


def test_reading_addresses_axes_by_name(opened: Store) -> None:
    whole = opened.read("psf")
    assert whole.shape == (2, 3, 3, 3, 2, 12, 12)
    assert np.array_equal(opened.read("psf", kx=3, focus=1, depth=slice(1, 3)), whole[1, 1:3, ..., 3])
    assert np.array_equal(opened.read("chief_x_mm", field_y=2), opened.read("chief_x_mm")[:, :, 2])


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


def test_an_incomplete_store_is_refused_unless_asked(store: Path) -> None:
    (store / "ledger/depth-0001.json").unlink()
    with pytest.raises(StoreIncomplete, match="1 of 3 blocks are missing; run the same `psfgen render` again"):
        open_store(store)
    assert open_store(store, allow_incomplete=True).missing() == [1]


@pytest.mark.parametrize(
    ("version", "readable"), [("1.0", True), ("1.7", True), ("2.0", False), ("10.0", False), ("", False)]
)
def test_an_unknown_major_version_is_refused(store: Path, version: str, readable: bool) -> None:
    edit_json(store / "zarr.json", lambda document: document["attributes"].update(schema_version=version))
    if readable:
        open_store(store)
        return
    with pytest.raises(
        StoreError, match=rf"has schema psfgen version {version}; this psfgen reads psfgen version 1\.x"
    ):
        open_store(store)


def test_a_foreign_zarr_group_is_refused(store: Path) -> None:
    edit_json(store / "zarr.json", lambda document: document["attributes"].clear())
    with pytest.raises(StoreError, match="has schema unknown version none"):
        open_store(store)


def test_no_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"does not exist; `psfgen render --out .*` makes one"):
        open_store(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="is no psfgen store"):
        open_store(tmp_path)


def test_a_store_can_be_moved(store: Path, tmp_path: Path) -> None:
    moved = shutil.move(store, tmp_path / "elsewhere.zarr")
    np.testing.assert_array_equal(open_store(moved).read("noise").shape, (2, 3, 3, 3, 2))


# --- creation ---------------------------------------------------------------------------------------------------------


def plan_and_spec(**changes: Any) -> tuple[Plan, StoreSpec]:
    _, plan = load(tiny(Path("unused"), **changes), "cpu")
    attrs = {"schema": "psfgen", "schema_version": "1.0", "plan": plan.document, "plan_sha256": plan.sha256}
    return plan, StoreSpec(plan.coords, attrs)


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
        created.write(array, written[array], depth=slice(1, 2))
    created.commit(1, {"rays": 5, "seconds": 1.0})
    again = open_store(path, allow_incomplete=True)
    assert again.missing() == [0, 2]
    for array, values in written.items():
        np.testing.assert_array_equal(again.read(array, depth=slice(1, 2)), values)
        with pytest.raises(StoreIncomplete):
            again.read(array, depth=slice(0, 1))
    assert {key: again.coords[key].tolist() for key in UNITS} == {key: spec.coords[key].tolist() for key in UNITS}
    entry = again.ledger.read("depth-0001")
    assert sorted(entry["chunks"]) == sorted(again.chunk_files(1))
    assert (entry["rays"], entry["plan_sha256"]) == (5, spec.attrs["plan_sha256"])


def test_a_chunk_full_of_nan_is_written(tmp_path: Path) -> None:
    """Else a dark block could not be told from a missing one."""
    _, spec = plan_and_spec()
    created = ZarrStore.create(tmp_path / "store", spec)
    created.write("noise", np.full((2, 1, 3, 3, 2), np.nan, np.float32), depth=slice(0, 1))
    assert np.isnan(created.read("noise", depth=slice(0, 1))).all()


def test_a_block_without_its_chunks_cannot_be_committed(tmp_path: Path) -> None:
    _, spec = plan_and_spec()
    created = ZarrStore.create(tmp_path / "store", spec)
    with pytest.raises(StoreIncomplete, match=r"chunk psf/c/.* is missing"):
        created.commit(0, {})
    assert created.missing() == [0, 1, 2]


def test_who_loses_the_race_joins_the_winner(tmp_path: Path) -> None:
    _, spec = plan_and_spec()
    first, second = (ZarrStore.create(tmp_path / "store", spec) for _ in range(2))
    assert first.attrs == second.attrs
    assert [path.name for path in tmp_path.iterdir()] == ["store"], "no temporary folder is left"


@pytest.mark.parametrize("shards", [("0/2", "1/2"), (None, None)])
def test_two_processes_render_into_one_store(
    finished: Path, tmp_path: Path, shards: tuple[str | None, str | None]
) -> None:
    """At once, from the first moment: both end well and the store is the one a single process makes."""
    path = tmp_path / "psfs.zarr"
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
    assert arrays(path) == arrays(finished)
    assert [entry.name for entry in tmp_path.iterdir()] == ["psfs.zarr"]
    os.close(gate_read)
    os.close(gate_write)


def test_a_block_that_another_process_finished_first_is_no_failure(store: Path) -> None:
    """Two processes on the same block: the slower one goes on and commits the same again."""
    ledger = open_store(store).ledger
    entry = ledger.read("depth-0001")
    ledger.start("depth-0001")
    ledger.commit("depth-0001", entry)
    ledger.touch("depth-0001")
    ledger.commit("depth-0001", entry)
    assert ledger.running() == set()
    assert ledger.read("depth-0001") == entry


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'zar'; did you mean 'zarr'.*known: .*zarr"):
        store_class("zar")
