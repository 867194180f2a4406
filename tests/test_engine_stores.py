"""Stores of every engine keep the same promises: bytes that only the plan decides, kills that cost nothing, checks."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import xarray
from conftest import Psfgen, arrays, beside, contents, copy_of, doctor, flags, fork, poll, put, tiny, wait_for

from psfgen import block
from psfgen.bands import Cut
from psfgen.engines import auto
from psfgen.merge import merge
from psfgen.render import render
from psfgen.store import open_store, schema
from psfgen.store.repair import repair
from psfgen.store.verify import problems

JOB: dict[str, Any] = {"wavelength": 0.55, "kernel_px": 16, "pitch_um": 4.0, "spp": None, "tolerance": 0.05}
KINDS = [
    ("wave", "h5"),
    ("auto", "zarr"),
    pytest.param(("geometric", "zarr"), marks=pytest.mark.campaign),  # other files try it at length
    pytest.param(("auto", "h5"), marks=pytest.mark.campaign),
]
CUTS = [
    Cut((slice(0, 1), slice(1, 2)), ((2,), (0,), (1,)), tracing=1, writing=1),
    Cut((slice(0, 2),), ((1, 0, 2),), tracing=3, writing=3),
]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Every row of field points is a band of its own, and engine auto hands over among these few kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "PSF_CHUNK_BYTES", 1)
        patch.setattr(auto, "WAVE_SIDE", 65)
        patch.setattr(auto, "GEOMETRIC_SIDE", 200)
        yield


@pytest.fixture(scope="module", params=KINDS, ids=["wave-h5", "auto-zarr", "geometric-zarr", "auto-h5"])
def kind(request: pytest.FixtureRequest) -> Any:
    """An engine, and what the name of a store ends in."""
    return request.param


@pytest.fixture(scope="module")
def job(kind: tuple[str, str]) -> dict[str, Any]:
    return {**JOB, "engine": kind[0]}


@pytest.fixture(scope="module")
def whole(kind: tuple[str, str], job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store, not to be changed."""
    path = tmp_path_factory.mktemp("whole") / f"psfs.{kind[1]}"
    render(tiny(path, **job))
    return path


def test_what_they_hold(whole: Path, job: dict[str, Any]) -> None:
    store = open_store(whole)
    assert list(problems(store)) == []
    assert store.spec.band_rows == 1
    captured = store.read("captured")
    assert store.read("psf").sum(axis=(-2, -1))[captured > 0] == pytest.approx(1, abs=1e-5)
    assert np.isfinite(store.read("noise")[captured > 0]).all()
    assert ("model" in store.spec.arrays) == (job["engine"] == "auto")
    if job["engine"] == "auto":
        model = store.read("model")
        assert (model == 0).any()
        assert (model == 1).any()
        assert ((model > 0) & (model < 1)).any()


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cut", CUTS, ids=["small pieces, shuffled", "one piece, threads"])
def test_pieces_threads_and_workers_change_nothing(
    whole: Path, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Cut, workers: int
) -> None:
    monkeypatch.setattr(block, "cut_block", lambda *args, **kwargs: cut)
    assert wait_for(fork(lambda: render(tiny(tmp_path / whole.name, **job, workers=workers)))) == 0
    assert arrays(tmp_path / whole.name) == arrays(whole)


def test_shards_of_the_command_in_any_order(whole: Path, job: dict[str, Any], tmp_path: Path, psfgen: Psfgen) -> None:
    for number in (2, 0, 1):
        ran = psfgen("render", *flags(**job, out=whole.name), "--shard", f"{number}/3")
        assert ran.code == 0, ran.err
    assert arrays(tmp_path / whole.name) == arrays(whole)
    again = psfgen("render", *flags(**job, out=whole.name))
    assert (again.code, again.out) == (0, f"{whole.name}: nothing to do\n")


def test_a_kill_before_a_file_takes_its_name(whole: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """Of the middle block: its last array, or its part."""
    path = tmp_path / whole.name
    last = open_store(whole).chunk_files(1)[-1]

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in ("os.rename", "os.link") and str(args[1]) == str(beside(path) / last):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        render(tiny(path, **job))

    assert wait_for(fork(work)) == -signal.SIGKILL
    store = open_store(path, allow_incomplete=True)
    assert store.missing() == [1, 2]
    assert list(problems(store)) == []
    counted: list[int] = []
    render(tiny(path, **job), on_kernels=counted.append)
    assert sum(counted) == 2 * 18, "what was committed is not rendered again"
    assert arrays(path) == arrays(whole)
    repair(path)
    assert contents(path).keys() == contents(whole).keys()


def test_kills_from_outside(whole: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL as soon as a block is being rendered, twice, then as soon as one more is done."""
    path = tmp_path / whole.name
    for look in ("running/*.json", "running/*.json", "depth-*.json"):
        before = {file.name for file in (beside(path) / "ledger").glob(look)}
        pid = fork(lambda: render(tiny(path, **job)))
        poll(lambda seen=before, look=look: {f.name for f in (beside(path) / "ledger").glob(look)} - seen)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        wait_for(pid)
        assert list(problems(open_store(path, allow_incomplete=True))) == []
    render(tiny(path, **job))
    assert arrays(path) == arrays(whole)


def test_depths_merged_are_one_render(whole: Path, job: dict[str, Any], tmp_path: Path) -> None:
    parts = [str(tmp_path / name) for name in ("far.h5", "near.zarr")]
    for part, depth in zip(parts, ("3m,inf", "1m"), strict=True):
        render(tiny(Path(part), **job, depth=depth))
    (tmp_path / "merged").mkdir()
    made = merge(parts, str(tmp_path / "merged" / whole.name))
    assert list(problems(made)) == []
    kernels = re.compile(r"psfs.zarr/|.*/c/|psfs.h5.d/parts/")
    of = [{n: d for n, d in arrays(at).items() if kernels.match(n)} for at in (Path(made.path), whole)]
    assert of[0] == of[1]
    assert made.attrs == open_store(whole).attrs


def test_every_damaged_chunk_is_found_and_made_again(whole: Path, job: dict[str, Any], tmp_path: Path) -> None:
    path, draw = copy_of(whole, tmp_path), random.Random(0)
    files = {name.split("/")[0]: name for name in open_store(path).chunk_files(1)}  # one of each array
    assert set(files) >= ({*open_store(path).spec.arrays} if path.suffix == ".zarr" else {"parts"})
    for name in files.values():
        data = bytearray((beside(path) / name).read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (beside(path) / name).write_bytes(bytes(data))
    told = list(map(str, problems(open_store(path))))
    assert len(told) == len(files)
    for name, problem in zip(files.values(), told, strict=True):
        assert re.fullmatch(rf"block depth-0001: .*chunk {name} .*CRC32C.*", problem)
    assert list(repair(path).dropped) == ["depth-0001"]
    render(tiny(path, **job))
    assert arrays(path) == arrays(whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] == "auto"], indirect=True, ids="-".join)
@pytest.mark.parametrize(
    ("value", "told"),
    [(1.5, "model leaves [0, 1]"), (np.nan, "model is not NaN exactly where throughput or captured is 0")],
)
def test_a_model_that_cannot_be_is_found(whole: Path, tmp_path: Path, value: float, told: str) -> None:
    path = copy_of(whole, tmp_path)
    doctor(path, 1, put("model", (1, 0, 2, 2, 0), value))
    assert [str(problem) for problem in problems(open_store(path))] == [f"block depth-0001: {told}"]


@pytest.fixture
def here(whole: Path, tmp_path: Path) -> Path:
    """A copy of the store in the folder of the commands."""
    return copy_of(whole, tmp_path)


def test_commands_read_them(here: Path, job: dict[str, Any], psfgen: Psfgen) -> None:
    for command in (
        ("status", here),
        ("verify", here),
        ("verify", here, "--deep", "--sample", 2),
        ("info", here),
        ("stats", here),
        ("show", here, "--depth", "3m", "--out", "page.png"),
        ("mtf", here, "--depth", "3m", "--focus", "2m"),
    ):
        ran = psfgen(*command)
        assert ran.code == 0, (command, ran.err)
    assert f", engine {job['engine']}, " in psfgen("info", here).out
    told = psfgen("info", here, "--json").document.get("model", {})
    assert sum(told.values()) == (3 * 9 * 2 if job["engine"] == "auto" else 0)


def test_what_is_made_of_them_keeps_every_array(here: Path, job: dict[str, Any], psfgen: Psfgen) -> None:
    store = open_store(here)
    assert psfgen("rechunk", here, "--chunks", "field_y=3", "--out", "other.zarr").code == 0
    assert psfgen("export", here, "--to", "csv", "--out", "k.csv").code == 0
    assert psfgen("export", here, "--to", "hdf5", "--out", "k.h5").code == 0
    table = pandas.read_csv("k.csv")
    with xarray.open_zarr("other.zarr") as rechunked:
        for name in store.spec.arrays:
            np.testing.assert_array_equal(rechunked[name].values, store.read(name), err_msg=name)
    assert ("model" in table) == (job["engine"] == "auto")
    if job["engine"] == "auto":
        np.testing.assert_array_equal(table["model"].to_numpy(np.float32), store.read("model").ravel())
    shutil.rmtree("other.zarr")
