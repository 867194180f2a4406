"""Executor dask with workers that dask-jobqueue starts as Slurm jobs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from conftest import Psfgen, arrays, flags
from onenode import Cluster

from psfgen.store import open_store

pytestmark = pytest.mark.slurm


def test_workers_are_slurm_jobs(cluster: Cluster, tmp_path: Path, psfgen: Psfgen, finished: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    import dask_jobqueue  # which takes Ctrl-C for itself when it is imported

    signal.signal(signal.SIGINT, before)
    with dask_jobqueue.SLURMCluster(
        interface="lo",
        cores=1,
        memory="2GB",
        walltime="00:05:00",
        local_directory=str(tmp_path / "dask"),
        log_directory=str(tmp_path / "logs"),
        scheduler_options={"dashboard_address": ":0"},
        silence_logs="critical",
    ) as workers:
        workers.scale(jobs=2)
        ran = psfgen("render", *flags(), "--scheduler", workers.scheduler_address)
    assert (ran.code, ran.out) == (0, "psfs.zarr: 108 kernels traced\n"), ran.err
    assert open_store("psfs.zarr").missing() == []
    assert arrays(tmp_path / "psfs.zarr") == arrays(finished)
