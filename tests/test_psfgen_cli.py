"""The `psfgen` command as a user meets it: answers, exit codes, one-line errors, and nothing touched on bad input."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SINGLET_ZMX, Psfgen, arrays, contents, flags, variant

from psfgen import catalogue
from psfgen.store import open_store

HEAVY = {"torch", "deeplens", "zarr", "dask", "xarray", "numpy", "matplotlib", "scipy"}


COMMANDS = (
    "render",
    "finalise",
    "status",
    "verify",
    "repair",
    "info",
    "show",
    "export",
    "stats",
    "merge",
    "rechunk",
    "lenses",
    "doctor",
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with what is in them, and folders."""
    folders: dict[str, bytes | None] = {str(p.relative_to(folder)): None for p in folder.rglob("*") if p.is_dir()}
    return folders | contents(folder)


# --- starting up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [["-m", "psfgen"], [str(Path(sys.executable).with_name("psfgen"))]])
def test_help_starts_without_the_heavy_libraries(start: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *start, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "psfgen" in imported, "nothing was measured"
    assert not HEAVY & imported
    assert done.stdout.startswith("Usage: ")


def test_help_names_every_command_and_keeps_its_lines(psfgen: Psfgen) -> None:
    ran = psfgen("--help")
    assert (ran.code, ran.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", ran.out, re.MULTILINE)
    assert re.search(r"^ *psfgen render --grid 20 .*psfs\.zarr$", ran.out, re.MULTILINE)
    assert "\\b" not in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(psfgen: Psfgen, command: str) -> None:
    ran = psfgen(command, "-h")
    assert (ran.code, ran.err) == (0, "")
    assert "--json" in ran.out


def test_no_command_shows_the_help_readably(psfgen: Psfgen) -> None:
    ran = psfgen()
    assert re.search(r"^  render ", ran.out + ran.err, re.MULTILINE)


def test_every_flag_is_a_config_key(psfgen: Psfgen) -> None:
    from psfgen.config import RenderConfig

    named = {
        flag.replace("-", "_")
        for flag in re.findall(r"^ +(?:-., )?--([a-z-]+)", psfgen("render", "--help").out, re.MULTILINE)
    }
    ours = {"shard", "set", "dry_run", "overwrite", "verbose", "json", "help", "scheduler"}  # scheduler: dask.scheduler
    assert named - set(RenderConfig.model_fields) == ours
    assert set(RenderConfig.model_fields) - named == {"spp_max", "sampling", "precision", "slurm", "dask"}, (
        "what only --set sets"
    )


# --- rendering and reading --------------------------------------------------------------------------------------------


def test_render_status_verify_info_show(psfgen: Psfgen, finished: Path, tmp_path: Path) -> None:
    """The whole round, with the default store name."""
    ran = psfgen("render", *flags())
    assert (ran.code, ran.out) == (0, "psfs.zarr: 108 kernels traced\n")
    assert "render triplet" in ran.err
    assert arrays(tmp_path / "psfs.zarr") == arrays(finished)

    again = psfgen("render", *flags())
    assert (again.code, again.out) == (0, "psfs.zarr: nothing to do\n")
    assert psfgen("status").out.startswith("psfs.zarr: 3 of 3 blocks done")
    assert psfgen("verify").out == "psfs.zarr: sound, 3 of 3 blocks checked\n"
    assert "triplet" in psfgen("info").out
    shown = psfgen("show", "--depth", "3m,inf", "--out", "sheet.png")
    assert shown.code == 0
    pages = [tmp_path / page for page in shown.out.split()]
    assert len(pages) == 2 * 2
    assert all(page.read_bytes().startswith(b"\x89PNG") for page in pages)


def test_defaults_yaml_set_and_flags_in_that_order(psfgen: Psfgen, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("lens: triplet\ngrid: 7\nspp: 512\nseed: 5\n")
    ran = psfgen("render", "job.yaml", "--set", "spp=1024", "--set", "seed=6", "--seed", 8, "--dry-run", "--json")
    config = ran.document["config"]
    assert [config[key] for key in ("bins", "grid", "spp", "seed")] == [15, 7, 1024, 8]


def test_a_zmx_without_a_sensor_renders_once_it_is_given(psfgen: Psfgen, tmp_path: Path) -> None:
    (tmp_path / "singlet.zmx").write_text(SINGLET_ZMX)
    ran = psfgen("render", *flags(lens="singlet.zmx", sensor_mm="12,9", depth="2m"))
    assert ran.code == 0
    with_sensor = open_store(tmp_path / "psfs.zarr")
    assert with_sensor.attrs["sensor_mm"] == [12, 9]
    assert with_sensor.attrs["lens"]["text"] == SINGLET_ZMX


def test_what_falls_short_is_a_warning_on_stderr(psfgen: Psfgen) -> None:
    ran = psfgen("render", *flags(pitch_um=4, depth="1m"))
    assert ran.code == 0
    assert "warning: " in ran.err
    assert "keep less than 90 % of their energy" in ran.err
    assert "warning" not in ran.out


def test_a_shard_is_done_when_its_own_blocks_are(psfgen: Psfgen) -> None:
    ran = psfgen("render", *flags(), "--shard", "0/2")
    assert (ran.code, ran.out) == (0, "psfs.zarr: 72 kernels traced; 1 of 3 blocks still missing\n")
    assert psfgen("render", *flags(), "--shard", "0/2").out.startswith("psfs.zarr: nothing to do")
    for command in ("status", "verify"):
        assert psfgen(command).code == 3
    refused = psfgen("show")
    assert (refused.code, refused.out) == (3, "")
    assert refused.err == (
        "error: store psfs.zarr is incomplete: 1 of 3 blocks are missing; "
        "run the same `psfgen render` again to finish it\n"
    )
    assert psfgen("render", *flags(), "--shard", "1/2").code == 0
    assert psfgen("status").code == 0


def test_overwrite_starts_anew(psfgen: Psfgen, store: Path) -> None:
    assert psfgen("render", *flags(seed=4), "--overwrite").code == 0
    assert open_store(store).attrs["seed"] == 4


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["render", *flags()],
        ["render", *flags(), "--dry-run"],
        ["status", "psfs.zarr"],
        ["verify", "psfs.zarr"],
        ["info", "psfs.zarr"],
        ["show", "psfs.zarr", "--focus", "inf"],
        ["export", "psfs.zarr", "--to", "csv", "--out", "psfs.csv"],
        ["stats", "psfs.zarr"],
        ["lenses"],
        ["doctor"],
    ],
    ids=lambda args: " ".join(args[:1] + args[-1:]),
)
def test_every_answer_is_one_json_document(psfgen: Psfgen, store: Path, args: list[str]) -> None:
    ran = psfgen(*args, "--json")
    document = ran.document
    assert ran.code == 0
    assert (document["schema"], document["command"], document["ok"]) == (1, args[0], True)
    assert isinstance(document["paths"], dict)


def test_a_dry_run_says_what_would_be_and_touches_nothing(psfgen: Psfgen, tmp_path: Path, finished: Path) -> None:
    ran = psfgen("render", *flags(pitch_um=None), "--dry-run", "--json")
    assert list(tmp_path.iterdir()) == []
    document, store = ran.document, open_store(finished)
    assert (document["kernels"], document["blocks"]) == (108, 3)
    arrays_of = ("psf", "psf_binned", "throughput", "captured", "noise", "noise_binned")
    assert document["bytes"] == pytest.approx(sum(store.read(name).nbytes for name in arrays_of), rel=0.02)
    assert document["memory_bytes"] > 0
    assert document["paths"] == {"store": "psfs.zarr"}
    config = document["config"]
    assert (config["pitch_um"], config["field_max"]) == (6.0, 1.0), "what the lens fills in is resolved"
    assert (config["depth"], config["focus"]) == ([1000, 3000, "inf"], [2000, "inf"])
    assert re.fullmatch("[0-9a-f]{64}", document["plan_sha256"])
    assert re.search(r"108 kernels in 3 blocks", psfgen("render", *flags(), "--dry-run").out)


def test_a_dry_run_tells_what_the_store_holds_already(psfgen: Psfgen, store: Path) -> None:
    (store / "ledger/depth-0001.json").unlink()
    assert psfgen("render", *flags(), "--dry-run").out.endswith("into psfs.zarr, where 2 are done\n")
    assert psfgen("render", *flags(), "--dry-run", "--shard", "1/3", "--json").document["blocks_done"] == 0
    assert "exists and would be replaced" in psfgen("render", *flags(spp=512), "--dry-run", "--overwrite").out
    other = psfgen("render", *flags(spp=512), "--dry-run")
    assert (other.code, other.out) == (2, "")
    assert "another plan: spp is 256" in other.err


def test_status_counts_every_kind_of_block(psfgen: Psfgen, store: Path) -> None:
    for index in (1, 2):
        (store / f"ledger/depth-000{index}.json").unlink()
    ledger = open_store(store, allow_incomplete=True).ledger
    ledger.start("depth-0001")
    ledger.fail("depth-0002", "RenderError: no glass")
    ran = psfgen("status", store, "--json")
    assert ran.code == 3
    assert ran.document["complete"] is False
    assert ran.document["blocks"] == {"total": 3, "done": 1, "running": 1, "failed": 1, "missing": 2}
    assert "depth-0002 failed: RenderError: no glass" in psfgen("status", store).out


def test_render_answers_with_the_store_and_its_config(psfgen: Psfgen, store: Path) -> None:
    document = psfgen("render", *flags(), "--json").document
    assert document["paths"] == {"store": "psfs.zarr"}
    assert document["complete"] is True
    assert document["plan_sha256"] == open_store(store).attrs["plan_sha256"]
    assert document["config"]["depth"] == [1000, 3000, "inf"]


def test_verify_lists_problems(psfgen: Psfgen, store: Path) -> None:
    (store / "noise/c/0/1/0/0/0").unlink()
    ran = psfgen("verify", store, "--json")
    assert ran.code == 1
    assert ran.document["ok"] is False
    assert any("noise/c/0/1/0/0/0 is missing" in problem for problem in ran.document["problems"])


def test_info_tells_light_and_noise(psfgen: Psfgen, finished: Path) -> None:
    document, store = psfgen("info", finished, "--json").document, open_store(finished)
    assert document["axes"]["depth"]["last"] == "inf"
    assert document["throughput"]["min"] == pytest.approx(float(store.read("throughput").min()))
    assert document["captured"]["median"] == pytest.approx(float(np.median(store.read("captured"))))
    assert document["noise"]["max"] == pytest.approx(float(store.read("noise").max()))


def test_lenses_lists_the_shipped_lenses(psfgen: Psfgen) -> None:
    listed = {row["name"]: row for row in psfgen("lenses", "--json").document["lenses"]}
    assert sorted(listed) == catalogue.names()
    assert listed["acl12708u"]["efl_mm"] == 7.977
    assert "7.98" in psfgen("lenses").out


def test_doctor_finds_this_machine_sound(psfgen: Psfgen) -> None:
    findings = {finding["name"]: finding for finding in psfgen("doctor", "--json").document["findings"]}
    assert findings["render"]["ok"]
    measured, theory = map(float, re.findall(r"([\d.]+) um", findings["render"]["found"]))
    image_mm, sensor_mm = 1 / (1 / 50 - 1 / 2000), 1 / (1 / 50 - 1 / 20000)
    assert theory == pytest.approx(12500 * (image_mm - sensor_mm) / image_mm, abs=0.01)
    assert math.isclose(measured, theory, rel_tol=1e-3)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], int, str]] = {
    "unknown lens": (flags(lens="tripplet"), 2, r"unknown lens 'tripplet'; did you mean 'triplet'"),
    "absent lens file": (flags(lens="absent.json"), 2, r"lens file absent\.json cannot be read"),
    "broken lens JSON": (flags(lens="broken.json"), 2, r"lens broken is broken JSON: .*line 1"),
    "unknown glass": (flags(lens="triplet-variant.json"), 2, r"lens triplet-variant .*unknown glass: unobtainium"),
    "lens without a sensor": (flags(lens="singlet.zmx"), 2, r"has no sensor; give --sensor-mm W,H"),
    "negative depth": (flags(depth="-1m"), 2, r"depth: distance -1m is not positive"),
    "negative focus": (flags(focus="-1m"), 2, r"focus: distance -1m is not positive"),
    "focus inside the lens": (flags(focus="20mm"), 2, r"focus 20 mm: lens triplet .* choose a larger --focus"),
    "duplicate depths": (flags(depth="1m,1000mm"), 2, r"depth: distance 1000.* is given twice"),
    "wavelength in nm": (flags(wavelength=550), 2, r"wavelength 550 is not in um; did you mean 0\.55\?"),
    "wavelength too short": (flags(wavelength=0.3), 2, r"wavelength 0\.3 um is outside the data of glass"),
    "wavelength too long": (flags(wavelength=2.6), 2, r"wavelength 2\.6 um is outside the data of glass"),
    "reference too long": (flags(reference_um=4), 2, r"wavelengths? .*4"),
    "grid 0": (flags(grid=0), 2, r"grid: .*greater than or equal to 1, got 0"),
    "grid no number": (flags(grid="many"), 2, r"'--grid': 'many' is not a valid integer"),
    "too fast": (flags(fnum=1), 2, r"fnum 1 is faster than lens triplet"),
    "no rays": (flags(spp=0), 2, r"spp: .*got 0"),
    "more bins than samples": (flags(bins=20), 2, r"bins 20 is more than kernel_px 12"),
    "unknown layout": (flags(layout="ring"), 2, r"layout: .*'grid', 'cells' or 'random', got 'ring'"),
    "unknown engine": (flags(engine="geometrik"), 2, r"unknown engine 'geometrik'; did you mean 'geometric'"),
    "unknown tracer": (flags(tracer="fast"), 2, r"tracer: .*got 'fast'"),
    "unknown format": (flags(format="zar"), 2, r"unknown format 'zar'; did you mean 'zarr'"),
    "unknown executor": (flags(executor="lokal"), 2, r"unknown executor 'lokal'; did you mean 'local'"),
    "unknown device": (flags(device="tpu"), 2, r"device: .*got 'tpu'"),
    "absent device": (flags(device="cuda:99"), 2, r"device cuda:99 is not here .* use --device cpu"),
    "deeplens at infinity": (flags(engine="deeplens"), 2, r"depth inf: engine deeplens .* use engine geometric"),
    "shard out of range": ([*flags(), "--shard", "2/2"], 2, r"--shard 2/2: write I/N"),
    "no shard": ([*flags(), "--shard", "half"], 2, r"--shard half: write I/N"),
    "overwrite and shard": ([*flags(), "--shard", "0/2", "--overwrite"], 2, r"--overwrite and --shard exclude"),
    "unknown key": ([*flags(), "--set", "pitchum=3"], 2, r"unknown key 'pitchum'; did you mean 'pitch_um'\?; known"),
    "unknown key in a file": (["job.yaml"], 2, r"unknown key 'kernelpx' in job\.yaml; did you mean 'kernel_px'"),
    "absent config": (["absent.yaml"], 2, r"config absent\.yaml cannot be read"),
    "no value": ([*flags(), "--set", "grid"], 2, r"--set grid: write KEY=VALUE"),
    "unknown flag": ([*flags(), "--gird", "3"], 2, r"No such option.*--gird.*--grid"),
    "another plan": (flags(spp=512, out="finished.zarr"), 2, r"another plan: spp is 256, this render asks for 512"),
    "below a file": (flags(out="job.yaml/psfs.zarr"), 1, r"store job\.yaml/psfs\.zarr cannot be made: .*--out"),
    "a file": (flags(out="job.yaml"), 1, r"job\.yaml exists and is no zarr store of psfgen; choose another --out"),
    "a folder of other things": (
        flags(out="folder"),
        1,
        r"folder exists and is no zarr store of psfgen",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_touches_nothing(psfgen: Psfgen, tmp_path: Path, finished: Path, name: str) -> None:
    args, code, message = BAD[name]
    (tmp_path / "broken.json").write_text('{"surfaces": ')
    (tmp_path / "job.yaml").write_text("kernelpx: 12\n")
    (tmp_path / "singlet.zmx").write_text(SINGLET_ZMX)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("precious")
    variant(tmp_path, "triplet", lambda document: document["surfaces"][2].update(mat2="unobtainium"))
    shutil.copytree(finished, tmp_path / "finished.zarr")
    before = tree(tmp_path)
    ran = psfgen("render", *args)
    assert (ran.code, ran.out) == (code, "")
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ran.err), ran.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["finalise", "status", "verify", "info", "show"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.zarr", r"store absent\.zarr does not exist; `psfgen render --out absent\.zarr` makes one"),
        ("folder", r"folder is no psfgen store"),
    ],
)
def test_what_is_no_store_is_one_line(psfgen: Psfgen, tmp_path: Path, command: str, path: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    ran = psfgen(command, path)
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(rf"error: {message}[^\n]*\n", ran.err), ran.err


def test_a_corrupt_store_fails_to_show_in_one_line(psfgen: Psfgen, store: Path) -> None:
    for chunk in store.glob("psf/c/*/*/0/0/0/0/0"):
        chunk.write_bytes(chunk.read_bytes()[::-1])
    ran = psfgen("show", store)
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(r"error: [^\n]*psf is corrupt [^\n]*\n", ran.err)


def test_show_refuses_a_distance_the_store_lacks(psfgen: Psfgen, store: Path) -> None:
    ran = psfgen("show", store, "--depth", "5m")
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: --depth: [^\n]* holds no depth of 5000 mm; it holds 1000, 3000, inf\n", ran.err)


def test_verbose_adds_the_traceback(psfgen: Psfgen) -> None:
    ran = psfgen("render", "--lens", "tripplet", "-v")
    assert ran.code == 2
    assert ran.err.startswith("Traceback ")
    assert ran.err.splitlines()[-1].startswith("error: unknown lens 'tripplet'")


def test_an_unknown_command_names_the_nearest(psfgen: Psfgen) -> None:
    ran = psfgen("rendr")
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: No such command 'rendr'.*'render'.*\n", ran.err)


def test_every_json_answer_is_strict(psfgen: Psfgen, tmp_path: Path) -> None:
    """NaN as null, infinity as "inf": a store where nothing is lit but the axis."""
    dark: dict[str, Any] = {"lens": "singlet", "field_max": 1.6, "depth": "inf", "focus": "inf", "pitch_um": 30}
    assert psfgen("render", *flags(**dark), "--json").document["warnings"]
    assert psfgen("info", "--json").document["axes"]["depth"]["first"] == "inf"
