"""Executor dask: workers that die, blocks that fail, signals, and schedulers that are not there."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from conftest import Psfgen, arrays, flags, lens, tiny
from distributed.utils import get_mp_context

from psfgen import catalogue
from psfgen.errors import ConfigError, Preempted, RenderError, StoreError
from psfgen.executors import dask as executor
from psfgen.plan import Plan
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.verify import problems

JOB: dict[str, Any] = {"depth": "1m:10m:8", "focus": "2m", "spp": 2**20}  # eight blocks of a good part of a second


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """Workers are forked from a process whose imports are done."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(["distributed", "psfgen.render", "psfgen.executors.dask"])
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the store of JOB holds."""
    path = tmp_path_factory.mktemp("local") / "psfs.zarr"
    render(tiny(path, **JOB))
    return arrays(path)


@pytest.fixture(scope="module")
def scheduler(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running cluster of two workers."""
    folder = str(tmp_path_factory.mktemp("dask"))
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=":0",
        scheduler_kwargs={"allowed_failures": 1, "dashboard": False},
        silence_logs=100,
        local_directory=folder,
    ) as cluster:
        yield cluster.scheduler_address


@contextmanager
def killing(store: Path, block: str, times: int) -> Iterator[list[int]]:
    """SIGKILL so many of the processes that render a block whose name matches; yields their pids."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while not over.is_set() and len(killed) < times:
            for note in (store / "ledger" / "running").glob(f"{block}.json"):
                try:
                    pid = json.loads(note.read_text())["pid"]
                except FileNotFoundError:  # finished meanwhile
                    continue
                if pid not in killed and len(killed) < times:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.005)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield killed
    finally:
        over.set()
        hunter.join()


@pytest.mark.campaign
def test_two_of_four_workers_die(tmp_path: Path, local: dict[str, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    path, made = tmp_path / "psfs.zarr", []
    with killing(path, "*", 2) as killed:
        store = render(tiny(path, **JOB, executor="dask", workers=4), on_kernels=made.append)
    assert len(set(killed)) == 2
    assert os.getpid() not in killed
    assert made == [18] * 8
    assert store.missing() == []
    assert list(problems(store)) == []
    assert arrays(path) == local
    assert capfd.readouterr() == ("", "")


def test_a_block_that_kills_its_workers(tmp_path: Path, scheduler: str, local: dict[str, bytes]) -> None:
    path = tmp_path / "psfs.zarr"
    job = tiny(path, **JOB, executor="dask", dask={"scheduler": scheduler})
    gone = r"block depth-0005 was given up: 2 dask workers died of it .*finished blocks are kept"
    with killing(path, "depth-0005", 2) as killed, pytest.raises(RenderError, match=gone):
        render(job)
    assert len(killed) == 2
    found = open_store(path, allow_incomplete=True)
    assert 5 in found.missing()
    assert len(found.missing()) < 8
    assert list(found.ledger.failed()) == ["depth-0005"]
    assert render(job).missing() == []
    assert arrays(path) == local


@pytest.mark.parametrize("engine", [pytest.param("wave", marks=pytest.mark.campaign), "auto"])
def test_engines_that_diffract(tmp_path: Path, scheduler: str, engine: str) -> None:
    """They too give the bytes of a local render."""
    job = {"engine": engine, "spp": None, "tolerance": 0.05}
    stores = [tmp_path / name / "psfs.zarr" for name in ("dask", "local")]
    for path, where in zip(stores, ({"executor": "dask", "dask": {"scheduler": scheduler}}, {}), strict=True):
        path.parent.mkdir()
        render(tiny(path, **job, **where))
    assert arrays(stores[0]) == arrays(stores[1])


def test_a_block_that_fails(tmp_path: Path, scheduler: str) -> None:
    path = tmp_path / "psfs.zarr"
    job = tiny(path, executor="dask", dask={"scheduler": scheduler})
    render(tiny(path), shard="0/3")
    obstacle = path / "chief_x_mm/c/0/1"
    obstacle.write_text("in the way")
    with pytest.raises(StoreError, match=r"chief_x_mm: (Not a directory|File exists)"):
        render(job)
    store = open_store(path, allow_incomplete=True)
    assert store.missing() == [1]
    assert list(store.ledger.failed()) == ["depth-0001"]
    obstacle.unlink()
    assert render(job).missing() == []


def test_a_signal_ends_it_with_the_work_saved(tmp_path: Path, scheduler: str, local: dict[str, bytes]) -> None:
    path = tmp_path / "psfs.zarr"
    job = tiny(path, **JOB, executor="dask", dask={"scheduler": scheduler})
    stopped: list[str] = []
    with pytest.raises(Preempted, match=r"SIGTERM; [1-5] of 8 blocks are done and kept"):
        render(job, on_kernels=lambda count: stopped.append("SIGTERM"), stopped=stopped)
    store = open_store(path, allow_incomplete=True)
    assert 1 <= len(store.blocks) - len(store.missing()) <= 5
    assert not store.ledger.running()
    render(job)
    assert arrays(path) == local


def test_the_command_with_paths_of_its_own_folder(tmp_path: Path, scheduler: str, psfgen: Psfgen) -> None:
    (tmp_path / "mine.json").write_text(catalogue.text("triplet"))
    ran = psfgen("render", *flags(lens="mine.json", depth="2m"), "--scheduler", scheduler)
    assert (ran.code, ran.out) == (0, "psfs.zarr: 36 kernels traced\n"), ran.err
    assert psfgen("verify").code == 0
    again = psfgen("render", *flags(lens="mine.json", depth="2m"), "--executor", "dask")
    assert (again.code, again.out) == (0, "psfs.zarr: nothing to do\n")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "foo://bar", "tcp://127.0.0.1"])
def test_no_scheduler_answers(psfgen: Psfgen, address: str) -> None:
    began = time.monotonic()
    ran = psfgen("render", *flags(depth="2m"), "--scheduler", address)
    assert (ran.code, ran.out) == (2, "")
    assert re.search(rf"\nerror: dask\.scheduler {address}: no dask scheduler answers there [^\n]*\n$", ran.err), (
        ran.err
    )
    assert time.monotonic() - began < 20


def test_a_lens_that_is_another_one_elsewhere(tmp_path: Path, scheduler: str) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        plan = Plan.of(tiny(tmp_path / "psfs.zarr"), lens("triplet"))
        job = executor.Job(plan.config, "0" * 64, str(tmp_path), "cpu", 1)
        failure = client.submit(executor.render_here, job, 0).result()
    assert isinstance(failure, ConfigError)
    assert "lens triplet is another one where the dask workers run" in str(failure)
