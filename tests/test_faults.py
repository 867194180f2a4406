"""Kills, full disks, disks that cannot be written: nothing is lost, nothing is said to be done that is not."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Disk, Psfgen, arrays, beside, contents, copy_of, flags, fork, tiny, wait_for
from training import job

from psfgen.errors import StoreError
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.open import class_at
from psfgen.store.repair import repair
from psfgen.store.verify import problems
from psftrain.fit import fit

ENDINGS = ["psfs.zarr", "psfs.h5"]


def killed_and_resumed(
    whole: Path, folder: Path, kills: int, workers: int, seed: int, **changes: Any
) -> tuple[int, int]:
    """SIGKILL `kills` renders at random moments; returns in how many a store, and a block, had been made.

    After each kill every block that the ledger names must be sound, and what remains is rendered by the next
    process, which may be killed in turn; a complete store must be `whole`, byte by byte.
    """
    draw, path, expected = random.Random(seed), folder / whole.name, arrays(whole)
    began = time.monotonic()
    wait_for(fork(lambda: render(tiny(folder / f"timed-{whole.name}", **changes, workers=workers))))
    span_s = time.monotonic() - began
    stores = blocks = 0
    for _ in range(kills):
        pid = fork(lambda: render(tiny(path, **changes, workers=workers)))
        time.sleep(draw.uniform(0, 1.1 * span_s))  # the moment of the kill is the point here
        os.kill(pid, signal.SIGKILL)
        wait_for(pid)
        with contextlib.suppress(StoreError):
            class_at(path)
            store = open_store(path, allow_incomplete=True)
            stores += 1
            blocks += bool(store.ledger.done())
            assert list(problems(store)) == []
            if not store.missing() or draw.random() < 0.5:
                render(tiny(path, **changes))
                assert arrays(path) == expected
                assert list(problems(open_store(path))) == []
                repair(path)
                assert contents(path).keys() == contents(whole).keys(), "nothing is left lying about"
                class_at(path).remove(path)
    return stores, blocks


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_random_kills_cost_nothing(either: Path, tmp_path: Path, workers: int) -> None:
    """A tenth of what `make campaign` does."""
    stores, _ = killed_and_resumed(either, tmp_path, 5, workers, seed=0)
    assert stores > 0


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_fifty_random_kills_cost_nothing(either: Path, tmp_path: Path, workers: int) -> None:
    """In each format, alone and with workers: two hundred in all."""
    stores, blocks = killed_and_resumed(either, tmp_path, 50, workers, seed=1)
    assert stores > 25
    assert blocks > 10


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("engine", ["wave", "auto"])
@pytest.mark.parametrize("name", ENDINGS)
def test_fifty_random_kills_of_engines_that_diffract(tmp_path: Path, engine: str, name: str) -> None:
    changes: dict[str, Any] = {"engine": engine, "spp": None, "tolerance": 0.05}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = Path(render(tiny(tmp_path / "whole" / name, **changes)).path)
    stores, blocks = killed_and_resumed(whole, tmp_path / "killed", 50, 1, seed=2, **changes)
    assert stores > 25
    assert blocks > 10


# --- a disk that is full ----------------------------------------------------------------------------------------------


FULL: dict[str, Any] = {"grid": 5, "kernel_px": 32, "pitch_um": 9.0, "depth": "1m:inf:6"}


def failed_for_want_of_space(psfgen: Psfgen, path: Path) -> str:
    """Run a render whose disk is too small; its one line of error."""
    ran = psfgen("render", *flags(out=path, **FULL))
    assert (ran.code, ran.out) == (1, ""), ran
    lines = [line for line in ran.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in ran.err
    assert "unexpected" not in ran.err
    return lines[0]


@pytest.mark.parametrize("name", ENDINGS)
def test_a_full_disk_is_told_and_the_store_stays_sound(tmp_path: Path, disk: Disk, name: str, psfgen: Psfgen) -> None:
    """And once there is space again, the same command ends with the same bytes."""
    whole, path = render(tiny(tmp_path / name, **FULL)).path, disk.path / name
    size_kib = sum(4 * (1 + len(data) // 4096) for data in contents(Path(whole)).values())
    for share in (0.5, 0.7, 0.9):
        disk.remount(f"size={int(share * size_kib)}k")
        assert re.search(r"[Nn]o space left on device", failed_for_want_of_space(psfgen, path))
        store = open_store(path, allow_incomplete=True)
        assert store.missing()
        assert store.ledger.running() == {}
        assert list(problems(store)) == []
        assert psfgen("status", path).code == 3
    disk.remount("size=64m")
    render(tiny(path, **FULL))
    assert arrays(path) == arrays(Path(whole))
    assert list(problems(open_store(path))) == []


@pytest.mark.parametrize("name", ENDINGS)
def test_a_disk_that_is_full_from_the_start(disk: Disk, name: str, psfgen: Psfgen) -> None:
    """Not even an empty store fits: nothing appears."""
    (disk.path / "ballast").write_bytes(bytes(2**15 + 2**14))
    for size_kib in (52, 56, 60, 64):  # pages that are left, one to four
        disk.remount(f"size={size_kib}k")
        line = failed_for_want_of_space(psfgen, disk.path / name)
        assert re.search(r"[Nn]o space left on device", line)
        assert [path.name for path in disk.path.iterdir()] == ["ballast"]


# --- a disk that cannot be written ------------------------------------------------------------------------------------


def test_a_store_on_a_read_only_disk(either: Path, disk: Disk, psfgen: Psfgen) -> None:
    """Whatever reads works on it; what must write says so in one line."""
    path = copy_of(either, disk.path)
    disk.remount("ro")
    for command in ("status", "verify", "info"):
        ran = psfgen(command, path)
        assert ran.code == 0, ran.err
    assert psfgen("verify", path, "--deep", "--sample", 1).code == 0
    assert psfgen("render", *flags(out=path)).out == f"{path}: nothing to do\n"
    fit(job(path, disk.path.parent / "run", steps=2))
    for command in (
        ["render", *flags(out=path, spp=64), "--overwrite"],
        ["repair", path, "--drop", "depth-0001"],
        ["render", *flags(out=disk.path / "new.zarr")],
        ["render", *flags(out=disk.path / "new.h5")],
    ):
        ran = psfgen(*command)
        assert (ran.code, ran.out) == (1, ""), (command, ran)
        assert re.fullmatch(r"error: .*[Rr]ead-only file system.*", ran.err.splitlines()[-1]), ran.err
    assert contents(path) == contents(either)


def test_an_incomplete_store_on_a_read_only_disk(either: Path, disk: Disk, psfgen: Psfgen) -> None:
    path = copy_of(either, disk.path)
    (beside(path) / "ledger/depth-0001.json").unlink()
    disk.remount("ro")
    assert psfgen("status", path).code == 3
    assert psfgen("verify", path).code == 3
    ran = psfgen("render", *flags(out=path))
    assert ran.code == 1
    assert re.search(r"^error: [^\n]*[Rr]ead-only file system[^\n]*$", ran.err, re.MULTILINE), ran.err
    assert "Traceback" not in ran.err
