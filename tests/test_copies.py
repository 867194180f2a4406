"""Lenses as built: a store of one perturbed lens, and of several copies, from the file to the picture."""

from __future__ import annotations

import json
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
import yaml
from conftest import Psfgen, arrays, contents, doctor, flags, fork, put, tiny, wait_for

from psfgen.errors import PlanMismatch
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.verify import problems

TOLERANCES: dict[str, Any] = {"decentre_mm": 0.02, "tilt_deg": 0.05, "thickness_mm": 0.01, "index": 1e-4}
COPIES: dict[str, Any] = {"copies": 2, "tolerances": TOLERANCES}
TILTED = [{"element": 1, "tilt_deg": [0.4, 0.1], "decentre_mm": [0.0, 0.02]}]
BLOCKS = tuple(f"copy-000{copy}-depth-000{depth}" for copy in range(2) for depth in range(3))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of two copies, not to be changed."""
    path = tmp_path_factory.mktemp("built") / "psfs.zarr"
    render(tiny(path, **COPIES))
    return path


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(built, tmp_path / "psfs.zarr"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of perturbations and of tolerances, right and wrong."""
    (tmp_path / "moves.yaml").write_text(yaml.safe_dump(TILTED))
    (tmp_path / "far.yaml").write_text("[{element: 7, tilt_deg: [1, 0]}]")
    (tmp_path / "surface.yaml").write_text("[{surfaces: [2, 19], tilt_deg: [1, 0]}]")
    (tmp_path / "typo.yaml").write_text("[{element: 0, tilt: [1, 0]}]")
    (tmp_path / "nowhere.yaml").write_text("[{tilt_deg: [1, 0]}]")
    (tmp_path / "both.yaml").write_text("[{element: 0, surfaces: [0, 1], tilt_deg: [1, 0]}]")
    (tmp_path / "mapping.yaml").write_text("{element: 0, tilt_deg: [1, 0]}")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "broken.yaml").write_text("[{element: 0")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "crash.yaml").write_text("[{element: 0, thickness_mm: 30}, {element: 1, thickness_mm: -30}]")
    (tmp_path / "tolerances.yaml").write_text(yaml.safe_dump(TOLERANCES))
    (tmp_path / "list.yaml").write_text("[0.1]")
    (tmp_path / "wrong.yaml").write_text("{decenter_mm: 0.1}")
    (tmp_path / "negative.yaml").write_text("{decentre_mm: -0.1}")
    return tmp_path


# --- what stands in the store -----------------------------------------------------------------------------------------


def test_xarray_sees_the_copies(built: Path) -> None:
    with xarray.open_zarr(built) as dataset:
        for name, array in dataset.data_vars.items():
            assert array.dims[0] == "copy", name
        assert dataset["psf"].shape == (2, 2, 3, 3, 3, 2, 12, 12)
        assert dataset["throughput"].dims == ("copy", "depth", "field_y", "field_x", "wavelength")
        assert dataset["copy"].values.tolist() == [0, 1]
        assert dataset["copy"].attrs == {"units": "1", "long_name": "specimen of the lens design"}
        one, other = (dataset["psf"].sel(copy=copy, depth=1000, focus=2000) for copy in (0, 1))
        assert float(np.abs(one - other).max()) > 1e-3


def test_hdf5_holds_the_same_copies(built: Path, tmp_path: Path) -> None:
    """As psfgen reads them, by copy and depth, and as xarray does."""
    zarr, hdf5 = open_store(built), render(tiny(tmp_path / "psfs.h5", **COPIES))
    assert hdf5.blocks == BLOCKS
    assert list(problems(hdf5)) == []
    for name in ("psf", "throughput", "chief_x_mm"):
        for index in ({}, {"copy": 1}, {"copy": slice(0, 1), "depth": -1}, {"copy": 0, "depth": slice(0, 3, 2)}):
            assert np.array_equal(zarr.read(name, **index), hdf5.read(name, **index)), (name, index)
    with xarray.open_zarr(built) as one, xarray.open_dataset(tmp_path / "psfs.h5", engine="h5netcdf") as other:
        xarray.testing.assert_equal(one, other)
        assert {name: one[name].attrs for name in one.variables} == {name: other[name].attrs for name in one.variables}


def test_a_block_is_a_depth_of_a_copy(built: Path) -> None:
    store = open_store(built)
    assert store.blocks == BLOCKS
    assert store.spec.kernel_dims == ("copy", "focus", "depth", "field_y", "field_x", "wavelength")
    owned: list[str] = []
    for index, name in enumerate(BLOCKS):
        entry = store.ledger.read(name)
        assert (entry["block"], entry["index"]) == (name, index)
        owned += entry["chunks"]
    assert "psf/c/1/0/2/0/0/0/0/0" in store.ledger.read(BLOCKS[5])["chunks"]
    assert "chief_x_mm/c/1/0/2/0/0" in store.ledger.read(BLOCKS[5])["chunks"]
    small = {name for name in contents(built) if "/c/" in name and name.count("/") > 2}
    assert sorted(owned) == sorted(small)
    assert list(problems(store)) == []


def test_the_attributes_say_how_each_copy_is_built(built: Path) -> None:
    attrs = open_store(built).attrs
    assert len(attrs["as_built"]) == 2
    for moves in attrs["as_built"]:
        assert [move["element"] for move in moves] == [0, 1, 2]
        assert {*moves[0]} == {"element", *TOLERANCES}
    assert attrs["as_built"][0] != attrs["as_built"][1]
    assert [len(z) for z in attrs["sensor_z_mm"].values()] == [2, 2]
    assert attrs["config"]["copies"] == attrs["plan"]["copies"] == 2


def test_a_copy_is_the_lens_that_its_moves_say(built: Path, tmp_path: Path) -> None:
    """Byte by byte the store of that one perturbed lens; so moves, focus, seeds and places are right."""
    copies = open_store(built)
    for copy in range(2):
        moves = copies.attrs["as_built"][copy]
        alone = render(tiny(tmp_path / f"{copy}.zarr", perturb=moves))
        assert alone.attrs["as_built"] == [moves]
        for name in ("psf", "psf_binned", "noise", "noise_binned", "captured", "throughput", "chief_x_mm"):
            assert np.array_equal(alone.read(name), copies.read(name, copy=copy)), name
        for focus, z in alone.attrs["sensor_z_mm"].items():
            assert copies.attrs["sensor_z_mm"][focus][copy] == z


def test_copies_are_drawn_one_by_one(built: Path, tmp_path: Path) -> None:
    """A larger number begins with the smaller one; another seed gives others."""
    two, one = open_store(built), render(tiny(tmp_path / "one.zarr", **{**COPIES, "copies": 1}))
    assert one.coords["copy"].tolist() == [0]
    assert np.array_equal(one.read("psf"), two.read("psf", copy=slice(0, 1)))
    assert one.attrs["as_built"] == two.attrs["as_built"][:1]
    other = render(tiny(tmp_path / "other.zarr", **{**COPIES, "copies": 1}, seed=1, depth="2m"))
    assert other.attrs["as_built"] != one.attrs["as_built"]


def test_copies_vary_about_the_perturbed_lens(tmp_path: Path) -> None:
    bent = [{"element": 1, "curvature_rel": 0.002}]
    job: dict[str, Any] = {"perturb": bent, "depth": "2m", "focus": "2m"}
    store = render(tiny(tmp_path / "both.zarr", **COPIES, **job))
    for moves in store.attrs["as_built"]:
        assert moves[0] == bent[0]
        assert [move["element"] for move in moves[1:]] == [0, 1, 2]


def test_a_tilted_lens_has_no_symmetry_left(tmp_path: Path) -> None:
    """Tilted about x: left and right still mirror each other within the noise, up and down do not."""
    tilted = [{"element": 1, "tilt_deg": [0.5, 0.0]}]
    store = render(tiny(tmp_path / "tilted.zarr", perturb=tilted, depth="3m", focus="2m", spp=8192, wavelength="0.55"))
    psf, noise = store.read("psf")[0, 0, :, :, 0], store.read("noise").max()
    assert sum(store.ledger.read(block)["rays"] for block in store.blocks) == 9 * 8192

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))).max())

    assert apart(psf[:, ::-1, :, ::-1], psf) < 3 * noise < 0.1
    assert apart(psf[::-1, :, ::-1, :], psf) > 0.2


def test_light_is_counted_against_the_pupil_of_the_design(built: Path, finished: Path) -> None:
    """Rays are launched at a larger disc, which the share of those that pass must not show."""
    as_built, design = (open_store(path).read("throughput") for path in (built, finished))
    assert as_built.max() <= 1
    np.testing.assert_allclose(as_built, np.broadcast_to(design, as_built.shape), atol=0.02)


def test_a_decentred_element_hardly_moves_the_focus(tmp_path: Path) -> None:
    """The change is of second order: where rays cross, not where they cross the axis of the design."""
    design = render(tiny(tmp_path / "design.zarr", depth="2m")).attrs["sensor_z_mm"]["2000"]
    for decentre_mm in (0.05, 0.2):
        moved = [{"element": 1, "decentre_mm": [decentre_mm, 0.0]}]
        z = render(tiny(tmp_path / f"{decentre_mm}.zarr", depth="2m", perturb=moved)).attrs["sensor_z_mm"]["2000"]
        assert z == pytest.approx(design, abs=0.002 * (decentre_mm / 0.05) ** 2)


# --- interrupted and shared out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("psf/c/1/0/0/0/0/0/0/0", [3, 4, 5]),
        ("ledger/copy-0001-depth-0001.json", [4, 5]),
        ("chief_y_mm/c/0/0/2/0/0", [2, 3, 4, 5]),
    ],
)
def test_killed_and_resumed(built: Path, tmp_path: Path, file: str, missing: list[int]) -> None:
    path = tmp_path / "psfs.zarr"

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.rename" and str(args[1]) == str(path / file):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        render(tiny(path, **COPIES))

    assert wait_for(fork(work)) == -signal.SIGKILL
    assert open_store(path, allow_incomplete=True).missing() == missing
    assert render(tiny(path, **COPIES)).missing() == []
    assert arrays(path) == arrays(built)


def test_shards_share_the_copies(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "psfs.zarr"
    assert render(tiny(path, **COPIES), shard="3/4").missing() == [0, 1, 2, 4, 5]
    for rank in (2, 0, 1):
        store = render(tiny(path, **COPIES), shard=f"{rank}/4")
    assert store.missing() == []
    assert arrays(path) == arrays(built)


def test_another_number_of_copies_is_another_plan(copied: Path) -> None:
    before = contents(copied)
    with pytest.raises(PlanMismatch, match="copies is 2, this render asks for 3"):
        render(tiny(copied, **{**COPIES, "copies": 3}))
    with pytest.raises(PlanMismatch, match=r"tolerances is .* this render asks for"):
        render(tiny(copied, copies=2, tolerances={"tilt_deg": 1.0}))
    with pytest.raises(PlanMismatch, match="copies is 2, this render asks for None"):
        render(tiny(copied))
    assert contents(copied) == before


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_broken_chunk_of_a_copy_is_found(copied: Path, psfgen: Psfgen) -> None:
    chunk = copied / "psf/c/1/1/2/0/0/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    ran = psfgen("verify", copied)
    assert ran.code == 1
    assert re.search(r"block copy-0001-depth-0002: .*psf/c/1/1/2/0/0/0/0/0 .*CRC32C", ran.out)
    assert "copy-0000" not in ran.out


def test_values_of_every_copy_are_checked(copied: Path) -> None:
    doctor(copied, 4, put("captured", (0, 1, 0, 2, 2, 1), 1.5))
    assert list(map(str, problems(open_store(copied)))) == ["block copy-0001-depth-0001: captured leaves [0, 1]"]


def test_render_status_verify_info_show(files: Path, built: Path, psfgen: Psfgen) -> None:
    ran = psfgen("render", *flags(copies=2, tolerances="tolerances.yaml"))
    assert (ran.code, ran.out) == (0, "psfs.zarr: 216 kernels traced\n")
    assert arrays(files / "psfs.zarr") == arrays(built)
    assert psfgen("status").out.startswith("psfs.zarr: 6 of 6 blocks done")
    assert psfgen("verify").out == "psfs.zarr: sound, 6 of 6 blocks checked\n"
    assert "2 copy x 2 focus x 3 depth x 3 field_y x 3 field_x" in psfgen("info").out
    assert psfgen("info", "--json").document["axes"]["copy"]["size"] == 2
    dry = psfgen(
        "render", *flags(copies=5, tolerances="tolerances.yaml", out="five.zarr"), "--dry-run", "--json"
    ).document
    assert (dry["blocks"], dry["kernels"]) == (15, 5 * 108)


def test_show_draws_the_copy_asked_for(built: Path, tmp_path: Path, psfgen: Psfgen) -> None:
    page = ["--depth", "1m", "--focus", "2m"]
    pictures = []
    for copy in (None, 0, 1):
        chosen = [] if copy is None else ["--copy", copy]
        assert psfgen("show", built, *page, *chosen, "--out", "page.png").code == 0
        pictures.append((tmp_path / "page.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("copy", [2, -1])
def test_show_refuses_a_copy_that_is_not_there(built: Path, psfgen: Psfgen, copy: int) -> None:
    ran = psfgen("show", built, "--copy", copy)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(rf"error: --copy {copy}: \S+ holds copies 0 to 1\n", ran.err)


def test_show_of_a_store_without_copies(finished: Path, psfgen: Psfgen) -> None:
    page = ["--depth", "1m", "--focus", "2m", "--out", "page.png"]
    assert psfgen("show", finished, *page, "--copy", 0).code == 0
    refused = psfgen("show", finished, *page, "--copy", 1)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("\n") == 1


def test_copies_are_trained_on(built: Path, tmp_path: Path) -> None:
    """Every place of every copy is an example."""
    from psftrain.config import load_fit_config
    from psftrain.fit import fit

    sets = ["model.name=neural_cvae", "steps=1", "batch=2"]
    fit(load_fit_config(None, [("store", str(built)), ("run", str(tmp_path / "run")), *sets]))
    lit = (open_store(built).read("captured") > 0).all(axis=-1)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["examples"] == lit.sum() > lit[0].sum()


def test_a_perturbed_lens_from_a_file_or_a_config(files: Path, psfgen: Psfgen) -> None:
    assert psfgen("render", *flags(depth="2m", perturb="moves.yaml")).code == 0
    attrs = open_store(files / "psfs.zarr").attrs
    assert attrs["as_built"] == [[{"element": 1, "tilt_deg": [0.4, 0.1], "decentre_mm": [0.0, 0.02]}]]
    assert attrs["plan"]["perturb"][0]["about"] == "first vertex"
    assert len(open_store(files / "psfs.zarr").blocks) == 1
    (files / "job.yaml").write_text(yaml.safe_dump({"perturb": TILTED}))
    again = psfgen("render", "job.yaml", *flags(depth="2m"))
    assert (again.code, again.out) == (0, "psfs.zarr: nothing to do\n"), again.err
    refused = psfgen("render", *flags(depth="2m"))
    assert refused.code == 2
    assert "another plan: perturb is" in refused.err


BAD = {
    "an element too far": (["--perturb", "far.yaml"], r"perturb 0: element 7 does not exist; the lens has 0: surf"),
    "a surface too far": (["--perturb", "surface.yaml"], r"perturb 0: surface 19 does not exist; the lens has 0 to"),
    "an unknown key": (["--perturb", "typo.yaml"], r"unknown key 'perturb\.0\.tilt'.*tilt_deg"),
    "no part": (["--perturb", "nowhere.yaml"], r"perturb\.0: name one part: element: K, or surfaces: \[I, J\]"),
    "two parts": (["--perturb", "both.yaml"], r"perturb\.0: name one part"),
    "a mapping": (["--perturb", "mapping.yaml"], r"--perturb mapping\.yaml holds no list"),
    "an empty file": (["--perturb", "empty.yaml"], r"--perturb empty\.yaml holds no list"),
    "no YAML": (["--perturb", "broken.yaml"], r"broken\.yaml is no YAML at line"),
    "no text": (["--perturb", "binary.yaml"], r"binary\.yaml cannot be read: not a text file"),
    "no file": (["--perturb", "absent.yaml"], r"absent\.yaml cannot be read: No such file"),
    "a folder": (["--perturb", "."], r"cannot be read: Is a directory"),
    "elements that collide": (["--perturb", "crash.yaml"], r"perturb 1: surface \d+ would stand .* in front"),
    "copies without tolerances": (["--copies", "3"], r"copies need tolerances"),
    "tolerances without copies": (["--tolerances", "tolerances.yaml"], r"tolerances need copies"),
    "no copies": (["--copies", "0", "--tolerances", "tolerances.yaml"], r"copies: .*got 0"),
    "a wrong tolerance": (["--copies", "2", "--tolerances", "wrong.yaml"], r"unknown key 'tolerances\.decenter_mm'"),
    "a negative tolerance": (["--copies", "2", "--tolerances", "negative.yaml"], r"tolerances\.decentre_mm: .*-0\.1"),
    "a list": (["--copies", "2", "--tolerances", "list.yaml"], r"--tolerances list\.yaml holds no KEY: VALUE lines"),
    "no tolerances": (
        ["--copies", "2", "--tolerances", "empty.yaml"],
        r"--tolerances empty\.yaml holds no KEY: VALUE lines",
    ),
    "no file of tolerances": (["--copies", "2", "--tolerances", "absent.yaml"], r"absent\.yaml cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_touches_nothing(files: Path, psfgen: Psfgen, name: str) -> None:
    args, message = BAD[name]
    before = contents(files)
    ran = psfgen("render", *flags(), *args)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ran.err), ran.err
    assert contents(files) == before


def test_the_ledger_is_strict_json(built: Path) -> None:
    for entry in built.glob("ledger/*.json"):
        assert json.loads(entry.read_text(), parse_constant=pytest.fail)["diffraction"]["kernels"] == 0
