"""Rendering: the same plan gives the same bytes, whoever renders it, in whatever pieces, however often killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import arrays, beside, contents, fork, lens, poll, tiny, wait_for

from psfgen import block
from psfgen.bands import Cut
from psfgen.engines import engine_class
from psfgen.errors import ConfigError, PlanMismatch, RenderError, StoreError
from psfgen.optics.splat import normalise
from psfgen.plan import Plan
from psfgen.render import render
from psfgen.shortfalls import shortfalls
from psfgen.store import open_store, schema
from psfgen.store.ledger import Ledger
from psfgen.store.repair import repair
from psfgen.store.verify import problems

KERNELS_A_BLOCK = 2 * 9 * 2
TRACED_A_BLOCK = 3 * 2 * 256  # a bundle for each field radius and wavelength


def rendered(path: Path, **options: Any) -> dict[str, bytes]:
    render(tiny(path), **options)
    return arrays(path)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def running_pid(store: Path) -> int | None:
    """The process that some unfinished block of a store names as its renderer."""
    for path in store.glob("ledger/running/depth-*.json"):
        try:
            return int(json.loads(path.read_text())["pid"])
        except (OSError, ValueError):
            continue
    return None


@pytest.fixture
def workers_may_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing's tracker process says at its end what killed processes did not clean up; that is known."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_the_same_plan_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    assert rendered(tmp_path / "again.zarr") == arrays(finished)


def test_the_number_of_cores_changes_nothing(finished: Path, tmp_path: Path) -> None:
    assert wait_for(fork(lambda: render(tiny(tmp_path / "psfs.zarr")))) == 0
    assert arrays(tmp_path / "psfs.zarr") == arrays(finished)


@pytest.mark.campaign
@pytest.mark.usefixtures("workers_may_be_killed")
def test_the_number_of_workers_changes_nothing(finished: Path, tmp_path: Path) -> None:
    path, counted = tmp_path / "psfs.zarr", []
    render(tiny(path, workers=2), on_kernels=counted.append)
    assert arrays(path) == arrays(finished)
    assert sum(counted) == 3 * KERNELS_A_BLOCK
    assert {json.loads(entry.read_text())["rays"] for entry in path.glob("ledger/*.json")} == {TRACED_A_BLOCK}


CUTS = [
    Cut((slice(0, 1), slice(1, 2)), ((0,), (1,), (2,), (3,), (4,), (5,)), tracing=1, writing=1),
    Cut((slice(0, 2),), ((0, 5), (1, 4), (2, 3)), tracing=3, writing=4),
    Cut((slice(0, 1), slice(1, 2)), ((0, 5, 1, 4), (2, 3)), tracing=2, writing=2),
]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("name", ["psfs.zarr", "psfs.h5"])
def test_memory_threads_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not a byte of a store of many bands, however it is cut to fit."""
    monkeypatch.setattr(schema, "PSF_CHUNK_BYTES", 1)
    job = {"grid": 6, "kernel_px": 24, "pitch_um": 12.0}
    (tmp_path / "whole").mkdir()
    assert render(tiny(tmp_path / "whole" / name, **job)).spec.band_rows == 1
    expected = arrays(tmp_path / "whole" / name)
    for number, (cut, workers) in enumerate(product(CUTS, (1, 2))):
        monkeypatch.setattr(block, "cut_block", lambda *args, cut=cut, **kwargs: cut)
        folder = tmp_path / str(number)
        folder.mkdir()
        config = tiny(folder / name, **job, workers=workers)
        assert wait_for(fork(lambda config=config: render(config))) == 0  # type: ignore[misc]
        assert arrays(folder / name) == expected, (cut, workers)


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("psfs.h5.d", None),
        ("psfs.h5", [0, 1, 2]),
        ("psfs.h5.d/parts/depth-0000.h5", [0, 1, 2]),
        ("psfs.h5.d/parts/depth-0001.h5", [1, 2]),
        ("psfs.h5.d/ledger/depth-0001.json", [1, 2]),
        ("psfs.h5.d/ledger/depth-0002.json", [2]),
    ],
)
def test_killed_while_writing_hdf5_and_resumed(
    finished_h5: Path, tmp_path: Path, file: str, missing: list[int] | None
) -> None:
    """SIGKILL before a file takes its name: the sidecar, the master, parts, the ledger."""
    path = tmp_path / "psfs.h5"

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in ("os.rename", "os.link") and str(args[1]) == str(tmp_path / file):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        render(tiny(path))

    assert wait_for(fork(work)) == -signal.SIGKILL
    if missing is None:
        assert not path.exists()
        missing = [0, 1, 2]
    else:
        assert open_store(path, allow_incomplete=True).missing() == missing
    counted: list[int] = []
    store = render(tiny(path), on_kernels=counted.append)
    assert sum(counted) == len(missing) * KERNELS_A_BLOCK
    assert list(problems(store)) == []
    assert arrays(path) == arrays(finished_h5)
    repair(path)
    assert {left.name for left in tmp_path.iterdir()} == {"psfs.h5", "psfs.h5.d"}


def test_shards_make_the_undivided_store(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "psfs.zarr"
    store = render(tiny(path), shard="1/2")
    assert store.missing() == [0, 2]
    store = render(tiny(path), shard="0/2")
    assert store.missing() == []
    assert arrays(path) == arrays(finished)


def test_a_seed_changes_the_kernels_within_their_noise(finished: Path, tmp_path: Path) -> None:
    one, other = open_store(finished), render(tiny(tmp_path / "seed.zarr", seed=1))
    a, b, noise = one.read("psf"), other.read("psf"), one.read("noise")
    difference = np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(a, axis=(-2, -1))
    assert (difference > 0).all()
    assert np.median(difference / noise) < 2
    assert np.array_equal(one.read("chief_x_mm"), other.read("chief_x_mm"))


@pytest.mark.parametrize("layout", ["cells", "random"])
def test_a_held_out_layout_has_its_own_points_and_its_own_pupil(tmp_path: Path, layout: str) -> None:
    """So that it shares no sampling error with the training grid."""
    store = render(tiny(tmp_path / "held.zarr", layout=layout))
    assert store.attrs["plan"]["layout"] == layout
    assert not {*store.coords["field_x"]} & {-1.0, 0.0, 1.0}
    engines = [
        engine_class("geometric")(lens("triplet"), Plan.of(tiny(tmp_path, layout=name), lens("triplet")))
        for name in ("grid", layout)
    ]
    grid, held = (torch.from_numpy(engine.points(256).xy.T) for engine in engines)
    nearest = torch.cdist(held, grid).min(dim=1).values
    assert float(nearest.min()) > 1e-3, "no ray in common"


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("psfs.zarr", None),
        ("psfs.zarr/psf/c/0/0/0/0/0/0/0", [0, 1, 2]),
        ("psfs.zarr/psf/c/1/1/0/0/0/0/0", [1, 2]),
        ("psfs.zarr/noise_binned/c/0/1/0/0/0", [1, 2]),
        ("psfs.zarr/ledger/depth-0001.json", [1, 2]),
        ("psfs.zarr/ledger/depth-0002.json", [2]),
        ("psfs.zarr/zarr.json", []),
    ],
)
def test_killed_while_writing_and_resumed(finished: Path, tmp_path: Path, file: str, missing: list[int] | None) -> None:
    """SIGKILL before a file takes its name: the store itself, chunks, the ledger, the consolidated metadata."""
    path = tmp_path / "psfs.zarr"

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.rename" and str(args[1]) == str(tmp_path / file):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        render(tiny(path))

    assert wait_for(fork(work)) == -signal.SIGKILL
    if missing is None:
        assert not path.exists()
        missing = [0, 1, 2]
    else:
        assert open_store(path, allow_incomplete=True).missing() == missing
    counted: list[int] = []
    store = render(tiny(path), on_kernels=counted.append)
    assert sum(counted) == len(missing) * KERNELS_A_BLOCK, "what was committed is not rendered again"
    assert store.missing() == []
    assert list(problems(store)) == []
    assert arrays(path) == arrays(finished)


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """SIGKILL from outside, once the first block is done."""
    path, whole, depth = tmp_path / "psfs.zarr", tmp_path / "whole.zarr", "1m:inf:10"
    render(tiny(whole, depth=depth))
    pid = fork(lambda: render(tiny(path, depth=depth)))
    poll(lambda: (path / "ledger/depth-0000.json").exists())
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid) == -signal.SIGKILL
    store = open_store(path, allow_incomplete=True)
    assert store.missing()
    assert store.ledger.running() == {}, "a dead process runs nothing"
    store = render(tiny(path, depth=depth))
    assert list(problems(store)) == []
    assert arrays(path) == arrays(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("workers_may_be_killed")
def test_a_killed_worker_is_told_and_costs_its_block_alone(tmp_path: Path) -> None:
    path, job = tmp_path / "psfs.zarr", {"spp": 2048, "depth": "1m:inf:6"}

    def work() -> None:
        try:
            render(tiny(path, workers=2, **job))
        except RenderError as error:
            (tmp_path / "told").write_text(str(error))

    pid = fork(work)
    os.kill(poll(lambda: running_pid(path)), signal.SIGKILL)
    assert wait_for(pid) == 0
    assert "a worker was killed" in (tmp_path / "told").read_text()
    assert open_store(path, allow_incomplete=True).missing()
    store = render(tiny(path, **job))
    assert list(problems(store)) == []


def test_a_block_shows_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ledger entry is touched as batches are made, which is what other hosts go by."""
    start = Ledger.start

    def start_long_ago(self: Ledger, name: str) -> None:
        start(self, name)
        os.utime(tmp_path / f"psfs.zarr/ledger/running/{name}.json", (0, 0))

    monkeypatch.setattr(Ledger, "start", start_long_ago)
    monkeypatch.setattr(block, "BEAT_S", 0.0)
    seen: list[float] = []

    def look(count: int) -> None:
        seen.extend(path.stat().st_mtime for path in tmp_path.glob("psfs.zarr/ledger/running/depth-*.json"))

    render(tiny(tmp_path / "psfs.zarr"), on_kernels=look)
    assert len(seen) == 3
    assert min(seen) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("workers_may_be_killed")
def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    path = tmp_path / "psfs.zarr"
    pid = fork(lambda: render(tiny(path, workers=2, spp=2048, depth="1m:inf:6")))
    worker = poll(lambda: running_pid(path))
    assert worker != pid
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    poll(lambda: not alive(worker))


# --- run again --------------------------------------------------------------------------------------------------------


def test_a_finished_store_is_left_alone(store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    started: list[int] = []
    again = render(tiny(store), on_kernels=pytest.fail, on_start=lambda plan, kernels: started.append(kernels))
    assert started == [0]
    assert again.missing() == []
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_finished_shard_is_left_alone(tmp_path: Path) -> None:
    render(tiny(tmp_path / "psfs.zarr"), shard="1/3")
    assert render(tiny(tmp_path / "psfs.zarr"), shard="1/3", on_kernels=pytest.fail).missing() == [0, 2]


def test_another_plan_is_refused_and_nothing_changes(broken: Path) -> None:
    before = contents(broken)
    with pytest.raises(PlanMismatch, match=r"another plan: spp is 256, this render asks for 512; .*--overwrite"):
        render(tiny(broken, spp=512))
    assert contents(broken) == before


def test_overwrite_starts_anew(broken: Path) -> None:
    render(tiny(broken, spp=64), overwrite=True)
    assert open_store(broken).attrs["plan"]["spp"] == 64
    assert {path.name for path in broken.parent.iterdir()} == {broken.name, beside(broken).name}


@pytest.mark.parametrize("turn", range(3))
def test_overwriting_may_be_killed_at_any_step(broken: Path, tmp_path: Path, turn: int) -> None:
    """The same command again does what it was asked to."""
    steps = iter(range(turn, -1, -1))

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            on = str(args[0]) if event in ("os.rename", "os.remove") else ""
            if on in (str(broken), str(beside(broken))) and next(steps) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        render(tiny(broken, spp=64), overwrite=True)

    assert wait_for(fork(work)) in (-signal.SIGKILL, 0)
    render(tiny(broken, spp=64), overwrite=True)
    assert open_store(broken).attrs["plan"]["spp"] == 64
    assert list(problems(open_store(broken))) == []
    repair(broken)
    assert {path.name for path in broken.parent.iterdir()} == {broken.name, beside(broken).name}


def test_overwrite_and_a_shard_exclude_each_other(broken: Path) -> None:
    before = contents(broken)
    with pytest.raises(ConfigError, match="--overwrite and --shard"):
        render(tiny(broken), overwrite=True, shard="0/2")
    assert contents(broken) == before


def test_an_empty_folder_is_rendered_into(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "psfs.zarr").mkdir()
    assert rendered(tmp_path / "psfs.zarr") == arrays(finished)


def test_a_failed_block_is_noted_and_rendered_again(finished: Path, store: Path) -> None:
    """A file stands where block 1 wants its chunks."""
    (store / "ledger/depth-0001.json").unlink()
    shutil.rmtree(store / "noise/c/0/1")
    (store / "noise/c/0/1").write_text("in the way")
    with pytest.raises(StoreError, match="noise"):
        render(tiny(store))
    ledger = open_store(store, allow_incomplete=True).ledger
    assert set(ledger.failed()) == {"depth-0001"}
    assert "noise" in ledger.failed()["depth-0001"]
    assert ledger.running() == {}
    (store / "noise/c/0/1").unlink()
    assert render(tiny(store)).missing() == []
    assert ledger.failed() == {}
    assert arrays(store) == arrays(finished)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_bands_put_every_kernel_in_its_place(tmp_path: Path) -> None:
    """A store of several chunks a block, against the engine asked point by point; random points have no mirror."""
    window = {"kernel_px": 640, "pitch_um": 2.0, "wavelength": "0.5"}
    config = tiny(tmp_path / "psfs.zarr", grid=5, layout="random", depth="2m", focus="2m", **window)
    store = render(config)
    assert store.spec.chunks("psf")[2] == 1
    engine = engine_class("geometric")(lens("triplet"), Plan.of(config, lens("triplet")))
    for row, column in ((0, 0), (1, 3), (4, 2)):
        field = [store.coords["field_x"][column], store.coords["field_y"][row]]
        found = engine.deposit(engine.aim(torch.tensor([field], dtype=torch.float64), 2000.0))
        here = {"field_y": row, "field_x": column}
        kernels = normalise(found.halves, 5)
        np.testing.assert_allclose(store.read("psf", **here)[0, 0, 0], kernels.psf[0, 0, 0], atol=1e-7)
        np.testing.assert_allclose(store.read("psf_binned", **here)[0, 0, 0], kernels.psf_binned[0, 0, 0], atol=1e-7)
        assert store.read("throughput", **here).item() == pytest.approx(found.throughput.item())
        assert store.read("captured", **here).item() == pytest.approx(found.captured.item())
        assert store.read("chief_x_mm", **here).item() == pytest.approx(found.chief_mm[0, 0, 0], abs=1e-9)
        assert store.read("chief_y_mm", **here).item() == pytest.approx(found.chief_mm[0, 0, 1], abs=1e-9)


def test_a_grid_of_one_is_the_axis(tmp_path: Path) -> None:
    store = render(tiny(tmp_path / "axis.zarr", grid=1, depth="2m", spp=2048))
    assert store.read("chief_x_mm").ravel() == pytest.approx([0, 0], abs=1e-9)
    kernel = store.read("psf")[0, 0, 0, 0, 0]
    noise = store.read("noise")[0, 0, 0, 0, 0]
    for turned in (kernel[::-1], kernel[:, ::-1], kernel.T):
        assert np.linalg.norm(turned - kernel) / np.linalg.norm(kernel) < 2 * noise


def test_distortion_stands_in_the_chief_rays(tmp_path: Path) -> None:
    """Upright: the chief ray lands on the side of the field point; odd in the field, as a symmetric lens must be."""
    store = render(tiny(tmp_path / "store.zarr", grid=5, depth="inf", focus="inf"))
    x, y = store.read("chief_x_mm")[0, 0], store.read("chief_y_mm")[0, 0]
    assert (np.sign(x) == np.sign(store.coords["field_x"])).all()
    np.testing.assert_allclose(x, -x[:, ::-1], atol=1e-9)
    np.testing.assert_allclose(x, y.T, atol=1e-9)
    pinhole = store.coords["field_x"] * lens("triplet").sensor_mm[0] / 2
    assert 0 < np.abs(x - pinhole).max() < 0.02 * lens("triplet").sensor_mm[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pitch_um": 4.0}, r"of 108 kernels keep less than 90 % .*--pitch-um or --kernel-px"),
        (
            {"lens": "singlet", "kernel_px": 8, "pitch_um": 10},
            r"miss their window altogether .*--pitch-um or --kernel-px",
        ),
        ({"spp": 16}, r"kernels have an estimated error above 30 ?% .*--spp"),
        ({"lens": "singlet", "field_max": 1.3, "pitch_um": 300}, r"of 108 kernels get no light .*--field-max"),
    ],
)
def test_a_user_is_told_what_falls_short(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    warnings = list(shortfalls(render(tiny(tmp_path / "store.zarr", **changes))))
    assert any(re.search(message, warning) for warning in warnings), warnings


def test_a_sound_store_falls_short_in_nothing(tmp_path: Path) -> None:
    generous = tiny(tmp_path / "store.zarr", spp=2048, depth="2m:inf:2", focus="5m", pitch_um=40)
    assert list(shortfalls(render(generous))) == []
