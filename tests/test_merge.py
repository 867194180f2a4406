"""psfgen merge: what is joined equals what it was made from, and what cannot be joined is refused in one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from conftest import Psfgen, Ran, arrays, contents, fork, tiny, wait_for
from numpy.typing import NDArray

from psfgen.copying import carried, fill
from psfgen.errors import PlanMismatch
from psfgen.merge import merge
from psfgen.render import render
from psfgen.store import Store, open_store, schema
from psfgen.store.open import store_class
from psfgen.store.verify import problems

DIMS = ("focus", "depth", "field_y", "field_x", "wavelength")
BENT = ({"element": 1, "tilt_deg": (0.4, 0.1)},)


class Part:
    """Some places of a store along one axis, as the source of a copy."""

    def __init__(self, store: Store, dim: str, at: list[int]) -> None:
        self.store, self.dim, self.at = store, dim, np.array(at)

    def read(self, name: str, **index: slice) -> NDArray[Any]:
        dims, span = self.store.spec.dims(name), index.pop(self.dim, slice(None))
        values = self.store.read(name, **index)
        return values.take(self.at[span], dims.index(self.dim)) if self.dim in dims else values

    def chunks(self, name: str) -> tuple[int, ...]:
        return self.store.spec.chunks(name)

    def entry(self, block: int) -> dict[str, Any]:
        return carried(self.store.ledger.read(self.store.blocks[self.at[block] if self.dim == "depth" else block]))


def part(store: Store, path: Path, dim: str, at: list[int]) -> str:
    """A store at `path` of the places `at` along `dim`, as if it had been rendered so."""
    names = [name for name in store.coords if schema.COORD_DIMS.get(name, name) == dim]
    coords = {**store.coords, **{name: store.coords[name][at] for name in names}}
    attrs = dict(store.attrs)
    if dim in attrs["plan"]:
        some = {dim: schema.plain(coords[dim])}
        attrs |= {"plan": {**attrs["plan"], **some}, "config": {**attrs["config"], **some}}
        attrs["plan_sha256"] = schema.sha256_of(attrs["plan"])
    if dim == "focus":
        attrs["sensor_z_mm"] = {f"{z:g}": attrs["sensor_z_mm"][f"{z:g}"] for z in coords["focus"]}
    made = store_class("hdf5" if path.suffix == ".h5" else "zarr").create(path, schema.StoreSpec(coords, attrs))
    fill(made, Part(store, dim, at), lambda: None)
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with three values along every axis, not to be changed."""
    job = {"depth": "1m,3m,inf", "focus": "2m,5m,inf", "wavelength": "0.48,0.55,0.64"}
    return render(tiny(tmp_path_factory.mktemp("whole") / "psfs.zarr", **job))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stores to join and not to join, not to be changed."""
    folder = tmp_path_factory.mktemp("rendered")
    jobs: dict[str, dict[str, Any]] = {
        "two": {"depth": "1m,inf"},
        "one": {"depth": "3m"},
        "near": {"depth": "1m", "focus": "2m"},
        "sharp": {"depth": "3m", "kernel_px": 14},
        "gauss": {"depth": "3m", "lens": "double_gauss"},
        "bent": {"depth": "1m,inf", "perturb": BENT},
        "copies": {"depth": "1m,inf", "copies": 2, "tolerances": {"tilt_deg": 0.2}},
    }
    return {name: render(tiny(folder / f"{name}.zarr", **job)).path for name, job in jobs.items()}


def same_arrays(one: Store, other: Store) -> None:
    for name in (*one.spec.arrays, *one.coords):
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["zarr", "h5"])
def test_depths_joined_are_the_direct_render_to_the_last_byte(tmp_path: Path, ending: str) -> None:
    """Also where the number of rays follows from a tolerance, and where depths and formats alternate."""
    job: dict[str, Any] = {"spp": None, "tolerance": 0.05, "spp_max": 2**14}
    every, folder = "1m,2m,5m,inf", tmp_path / "joined"
    render(tiny(tmp_path / "direct" / f"psfs.{ending}", depth=every, **job))
    render(tiny(tmp_path / "a.zarr", depth="1m,5m", **job))
    render(tiny(tmp_path / "b.h5", depth="2m", **job))
    render(tiny(tmp_path / "c.zarr", depth="inf", **job))
    folder.mkdir()
    made = merge([str(tmp_path / name) for name in ("c.zarr", "a.zarr", "b.h5")], str(folder / f"psfs.{ending}"))

    direct, array_files = tmp_path / "direct", re.compile(r"psfs.zarr/(?!ledger/depth)|psfs.h5.d/parts/")
    expected, found = ({n: d for n, d in contents(at).items() if array_files.match(n)} for at in (direct, folder))
    assert found == expected
    assert made.attrs == open_store(direct / f"psfs.{ending}").attrs
    assert render(tiny(folder / f"psfs.{ending}", depth=every, **job)).missing() == []
    source = open_store(tmp_path / "b.h5").ledger.read("depth-0000")
    entry = made.ledger.read("depth-0001")
    assert {**source, **{key: entry[key] for key in ("block", "index", "plan_sha256", "chunks", "crc32c")}} == entry


@pytest.mark.parametrize("ending", ["zarr", "h5"])
@pytest.mark.parametrize("dim", DIMS)
def test_the_parts_joined_are_the_whole(whole: Store, tmp_path: Path, dim: str, ending: str, psfgen: Psfgen) -> None:
    parts = [part(whole, tmp_path / "a.h5", dim, [0, 2]), part(whole, tmp_path / "b.zarr", dim, [1])]
    out = tmp_path / f"all.{ending}"
    ran = psfgen("merge", *parts[::-1], "--out", out)
    assert (ran.code, ran.out) == (0, f"{out}: 3 of 3 blocks written\n"), ran.err
    made = open_store(out)
    same_arrays(whole, made)
    assert list(problems(made)) == []
    assert made.attrs["sensor_z_mm"] == whole.attrs["sensor_z_mm"]
    assert list(made.attrs["sensor_z_mm"]) == list(whole.attrs["sensor_z_mm"])
    assert made.attrs["config"] == whole.attrs["config"]
    if ending == "zarr":
        with xarray.open_zarr(out) as dataset:
            assert dataset["psf"].dims == whole.spec.dims("psf")
            np.testing.assert_array_equal(dataset[dim].values, whole.coords[dim])
    assert f"3 {dim}" in psfgen("info", out).out
    assert psfgen("show", out, "--out", tmp_path / "page.png").code == 0
    again = psfgen("merge", *parts, "--out", out)
    assert (again.code, again.out) == (0, f"{out}: nothing to do\n")


def test_a_render_does_not_take_it_for_its_own(whole: Store, tmp_path: Path, psfgen: Psfgen) -> None:
    parts = [part(whole, tmp_path / f"{at}.zarr", "focus", [at]) for at in range(3)]
    out = tmp_path / "all.zarr"
    made = merge(parts, str(out))
    assert made.attrs["plan"]["along"] == "focus"
    assert [plan["focus"] for plan in made.attrs["plan"]["merged"]] == [[2000], [5000], ["inf"]]
    with pytest.raises(
        PlanMismatch, match=r"all\.zarr exists, merged along focus from 3 stores, which no render makes"
    ):
        render(tiny(out, depth="1m,3m,inf", focus="2m,5m,inf", wavelength="0.48,0.55,0.64"))


def test_the_ledger_adds_up(whole: Store, tmp_path: Path) -> None:
    parts = [part(whole, tmp_path / f"{at}.zarr", "wavelength", [at]) for at in range(3)]
    made = merge(parts, str(tmp_path / "all.zarr"))
    for block in made.blocks:
        one, all_ = whole.ledger.read(block), made.ledger.read(block)
        assert all_["rays"] == 3 * one["rays"]
        assert all_["seconds"] == pytest.approx(3 * one["seconds"])
        assert (all_["host"], all_["versions"]) == (one["host"], one["versions"])
        assert all_["plan_sha256"] == made.attrs["plan_sha256"]


def test_merged_stores_merge_again(whole: Store, tmp_path: Path) -> None:
    """Along the same axis, which gives one list of plans, and along another one."""
    cells = {(f, d): tmp_path / f"{f}{d}.zarr" for f in range(3) for d in (0, 1)}
    for d, depths in enumerate(([0, 2], [1])):
        some = open_store(part(whole, tmp_path / f"d{d}.zarr", "depth", depths))
        for f in range(3):
            part(some, cells[f, d], "focus", [f])
    rows = []
    for d in (0, 1):
        pair = merge([str(cells[f, d]) for f in (0, 2)], str(tmp_path / f"pair{d}.zarr")).path
        rows.append(merge([pair, str(cells[1, d])], str(tmp_path / f"row{d}.zarr")))
        assert len(rows[d].attrs["plan"]["merged"]) == 3
    made = merge([row.path for row in rows], str(tmp_path / "all.zarr"))
    same_arrays(whole, made)
    assert list(problems(made)) == []
    assert made.attrs["plan"]["along"] == "depth"


def test_copies(rendered: dict[str, str], tmp_path: Path, psfgen: Psfgen) -> None:
    names = ("two", "copies", "bent")
    ran = psfgen("merge", *map(rendered.get, names), "--along", "copy", "--out", "copies.zarr")
    assert (ran.code, ran.out) == (0, "copies.zarr: 8 of 8 blocks written\n"), ran.err
    made = open_store(tmp_path / "copies.zarr")
    assert made.coords["copy"].tolist() == [0, 1, 2, 3]
    assert list(problems(made)) == []
    design, copies, bent = (open_store(rendered[name]) for name in names)
    for name in made.spec.arrays:
        parts = [design.read(name)[None], copies.read(name), bent.read(name)[None]]
        np.testing.assert_array_equal(made.read(name), np.concatenate(parts))
    assert made.attrs["as_built"] == [[], *copies.attrs["as_built"], *bent.attrs["as_built"]]
    for focus, z in made.attrs["sensor_z_mm"].items():
        one, several, other = (store.attrs["sensor_z_mm"][focus] for store in (design, copies, bent))
        assert z == [one, *several, other]
    assert "4 copy x 2 focus" in psfgen("info", "copies.zarr").out
    assert psfgen("show", "copies.zarr", "--copy", 3, "--out", "page.png").code == 0


def test_psftrain_reads_it(whole: Store, tmp_path: Path) -> None:
    from psftrain.conditioning import conditioning_of
    from psftrain.data import open_stores, read_examples

    parts = [part(whole, tmp_path / "a.zarr", "focus", [0]), part(whole, tmp_path / "b.zarr", "focus", [1, 2])]
    stores = open_stores([merge(parts, str(tmp_path / "all.zarr")).path], "psf_binned")
    examples = read_examples(stores, conditioning_of(stores), "psf_binned")
    direct = read_examples([whole], conditioning_of([whole]), "psf_binned")
    assert examples.kernels.equal(direct.kernels)
    assert examples.condition.equal(direct.condition)


# --- interrupted, and what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["psf/c/1/1/0/0/0/0/0", "ledger/depth-0001.json", "noise/c/0/2/0/0/0"])
def test_killed_and_resumed(whole: Store, tmp_path: Path, file: str) -> None:
    parts = [part(whole, tmp_path / "a.zarr", "focus", [0, 1]), part(whole, tmp_path / "b.zarr", "focus", [2])]
    out = tmp_path / "all.zarr"

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.rename" and str(args[1]) == str(out / file):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        merge(parts, str(out))

    assert wait_for(fork(work)) == -signal.SIGKILL
    assert open_store(out, allow_incomplete=True).missing() in ([1, 2], [2])
    same_arrays(whole, merge(parts, str(out)))
    assert arrays(out) == arrays(Path(merge(parts, str(tmp_path / "again.zarr")).path))


def test_a_corrupt_source_commits_nothing(rendered: dict[str, str], tmp_path: Path, psfgen: Psfgen) -> None:
    broken = Path(shutil.copytree(rendered["two"], tmp_path / "broken.zarr"))
    chunk = broken / "psf/c/1/1/0/0/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    ran = psfgen("merge", broken, rendered["one"], "--out", "all.zarr")
    assert (ran.code, ran.out) == (1, "")
    assert re.search(r"error: \S+broken\.zarr: psf is corrupt [^\n]*psfgen verify [^\n]*\n$", ran.err), ran.err
    assert open_store("all.zarr", allow_incomplete=True).missing() == [2]
    chunk.write_bytes(bytes(Path(rendered["two"], "psf/c/1/1/0/0/0/0/0").read_bytes()))
    assert psfgen("merge", broken, rendered["one"], "--out", "all.zarr").code == 0


BAD: dict[str, tuple[list[str], int, str]] = {
    "one store": (["two"], 2, "merge joins two stores or more"),
    "no store": (["two", "absent.zarr"], 1, "store absent.zarr does not exist"),
    "the same store twice": (["two", "two"], 2, r"have the same coordinates; --along copy joins them"),
    "the same depth": (["two", "two", "--along", "depth"], 2, r"depth 1000 is in \S+two.zarr and in \S+two.zarr"),
    "two axes": (["one", "near"], 2, r"one\.zarr and \S+near\.zarr differ along depth and focus; merge joins"),
    "another sampling": (["two", "sharp"], 2, r"kernel_px is 14, there it is 12; stores joined along depth must"),
    "another lens": (["two", "gauss"], 2, r"lens is \w+, there it is \w+;"),
    "another specimen": (["two", "bent"], 2, r"have the same coordinates; --along copy joins them as copies"),
    "copies beside none": (["one", "copies"], 2, r"differ along copy and depth; merge joins"),
    "an unknown axis": (["two", "one", "--along", "dept"], 2, r"--along dept: unknown axis; did you mean 'depth'\?"),
    "a wrong axis": (["two", "one", "--along", "focus"], 2, r"differ along depth and focus; merge joins"),
    "an unknown format": (["two", "one", "--format", "tiff"], 2, "unknown format 'tiff'"),
    "a target that is no store": (["two", "one", "--out", "full"], 1, "full exists and is no zarr store of psfgen"),
}


def words(psfgen: Psfgen, rendered: dict[str, str], *args: str) -> Ran:
    out = [] if "--out" in args else ["--out", "all.zarr"]
    return psfgen("merge", *(rendered.get(word, word) for word in args), *out)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_touches_nothing(
    rendered: dict[str, str], tmp_path: Path, psfgen: Psfgen, name: str
) -> None:
    args, code, message = BAD[name]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = contents(tmp_path)
    ran = words(psfgen, rendered, *args)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ran.err), ran.err
    assert contents(tmp_path) == before


def test_an_incomplete_source_is_refused(rendered: dict[str, str], tmp_path: Path, psfgen: Psfgen) -> None:
    render(tiny(tmp_path / "half.zarr", depth="2m,5m"), shard="0/2")
    ran = words(psfgen, rendered, "two", "half.zarr")
    assert (ran.code, ran.out) == (3, "")
    assert re.fullmatch(r"error: store half.zarr is incomplete: 1 of 2 blocks are missing[^\n]*\n", ran.err)
    assert not (tmp_path / "all.zarr").exists()


def test_the_target_may_be_no_source_and_no_other_store(rendered: dict[str, str], store: Path, psfgen: Psfgen) -> None:
    before = contents(store)
    onto = words(psfgen, rendered, "two", "psfs.zarr", "--out", str(store), "--overwrite")
    assert (onto.code, contents(store) == before) == (2, True)
    assert re.fullmatch(r"error: --out \S+ is the store that is read[^\n]*\n", onto.err)
    refused = words(psfgen, rendered, "two", "bent", "--along", "copy", "--out", "psfs.zarr")
    assert (refused.code, contents(store) == before) == (2, True)
    assert re.fullmatch(r"error: psfs\.zarr exists with another plan: [^\n]*--overwrite[^\n]*\n", refused.err)
    anew = words(psfgen, rendered, "two", "bent", "--along", "copy", "--out", "psfs.zarr", "--overwrite")
    assert anew.code == 0, anew.err
    assert open_store(store).coords["copy"].tolist() == [0, 1]
