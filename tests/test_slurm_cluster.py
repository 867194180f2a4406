"""A real Slurm: whatever befalls the tasks of an array, submitting the same again ends in the same store.

One cluster of one node serves all tests; it is started without systemd by tests/slurm-local.sh.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import TINY, Psfgen, arrays, tiny
from onenode import Cluster, poll
from training import equal_states

from psfgen.executors import slurm
from psfgen.render import render
from psfgen.store import open_store
from psftrain import checkpoint
from psftrain import run as runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(480)]

PIPELINES = Path(__file__).parent.parent / "pipelines/slurm"
SLOW: dict[str, Any] = {"grid": 9, "spp": 2**20}  # a block takes a second or two where four tasks share two cores
GONE = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"}


def call(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout.strip()


def job(which: str) -> dict[str, str]:
    """What Slurm says of a job: JobState, ExitCode, Restarts ..."""
    return dict(re.findall(r"(\w+)=(\S*)", call("scontrol", "show", "job", which)))


def over_time(which: str) -> str:
    """Let the time limit of a job be now."""
    return call("scontrol", "update", f"JobId={which}", "EndTime=now")


def ended(*which: str) -> list[dict[str, str]]:
    """What Slurm says of jobs, once they have ended."""
    return [poll(lambda one=one: (found := job(one))["JobState"] in GONE and found, 0.3) or {} for one in which]


def strike(store: Path, fates: dict[int, Callable[[int], object]], tasks: int) -> None:
    """Call `fates[task](pid)` once for each task, in the moment it is seen to render a block."""
    fates = dict(fates)
    while fates:
        for note in store.glob("ledger/running/depth-*.json"):
            task = int(note.stem[-4:]) % tasks
            try:
                pid = int(json.loads(note.read_text())["pid"])
            except (OSError, ValueError):  # done, or not yet written
                continue
            if task in fates:
                fates.pop(task)(pid)
        time.sleep(0.02)


def write_job(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def test_whatever_befalls_its_tasks_the_store_becomes_the_one_that_a_local_render_makes(
    cluster: Cluster, psfgen: Psfgen, tmp_path: Path
) -> None:
    """Of eight tasks seven are hit: killed, over their time, cancelled, requeued, and warned by each of three signals.

    The controller is restarted meanwhile.
    """
    store = tmp_path / "the psfs.zarr"
    settings = {
        "concurrency": 8,
        "time": "0:10:00",
        "setup": ["export GREETING='hello from the setup'", "echo $GREETING"],
    }
    work = {**SLOW, "depth": "1m:inf:16"}
    write_job(tmp_path / "job.yaml", **work, out=store.name, executor="slurm", slurm=settings)
    first = psfgen("render", "job.yaml", "--json")
    assert (first.code, first.document["complete"]) == (0, False), first.err
    array, tasks = first.document["slurm"]["array"], first.document["slurm"]["indices"]
    assert (tasks, first.document["slurm"]["submitted"]) == ([*range(8)], True)

    strike(
        store,
        {
            0: lambda pid: os.kill(pid, signal.SIGKILL),
            1: lambda pid: (os.kill(pid, signal.SIGSTOP), over_time(f"{array}_1")),  # it cannot end in time
            2: lambda pid: call("scancel", f"{array}_2"),
            3: lambda pid: call("scontrol", "requeue", f"{array}_3"),
        },
        tasks=8,
    )
    cluster.restart_controller()
    warn = {task: f"--signal={name}" for task, name in ((4, "USR2"), (5, "USR1"), (6, "TERM"))}
    warnings = {task: lambda pid, task=task: call("scancel", "--batch", warn[task], f"{array}_{task}") for task in warn}
    strike(store, warnings, tasks=8)
    again = psfgen("render", "job.yaml", "--json")
    assert (again.code, again.document["slurm"]["submitted"]) == (0, False), "it is still in the queue"
    refused = psfgen("render", "job.yaml", "--overwrite")
    assert refused.code == 2
    assert f"`scancel {array}` first" in refused.err

    watched = psfgen("status", store, "--watch", "--every", 0.5, "--json")
    assert watched.code == 3, "its array has ended without some blocks"
    states = [found["JobState"] for found in ended(*(f"{array}_{task}" for task in tasks))]
    assert states == ["FAILED", "TIMEOUT", "CANCELLED", *["COMPLETED"] * 5]
    assert [job(f"{array}_{task}")["Restarts"] for task in tasks] == ["0"] * 3 + ["1"] * 4 + ["0"]
    logs = {task: (tmp_path / f"the psfs.zarr.slurm/logs/{array}_{task}.log").read_text() for task in tasks}
    assert all("hello from the setup" in log for log in logs.values())
    assert [("stopped: " in logs[task]) for task in (4, 5, 6)] == [True] * 3
    left = open_store(store, allow_incomplete=True).missing()
    assert set(watched.document["missing"]) == set(left)
    assert {block % 8 for block in left} <= {0, 1, 2}
    finaliser = first.document["slurm"]["finaliser"]
    assert ended(finaliser)[0]["JobState"] == "CANCELLED", "it cannot run any more, and does not wait for ever"

    for _ in range(3):
        more = psfgen("render", "job.yaml", "--json")
        assert more.code == 0
        if more.document["complete"]:
            break
        submitted = more.document["slurm"]
        assert {block % submitted["tasks"] for block in left} == set(submitted["indices"])
        psfgen("status", store, "--watch", "--every", 0.5)
    (closed,) = ended(submitted["finaliser"])
    assert (closed["JobState"], closed["ExitCode"]) == ("COMPLETED", "0:0")
    assert psfgen("verify", store).code == 0
    render(tiny(tmp_path / "local.zarr", **work))
    assert arrays(store) == arrays(tmp_path / "local.zarr")


def test_a_hand_written_array_takes_its_share_with_an_offset_and_a_step(
    cluster: Cluster, psfgen: Psfgen, tmp_path: Path
) -> None:
    """With an engine that diffracts: its store is that of a local render too."""
    work = {"depth": "1m:inf:5", "engine": "auto"}
    write_job(tmp_path / "job.yaml", **work)
    array = call(
        "sbatch", "--parsable", "--array=5-8:2", "--cpus-per-task=1", "--mem=0", PIPELINES / "render.sbatch", "job.yaml"
    )
    assert [found["ExitCode"] for found in ended(*(f"{array}_{task}" for task in (5, 7)))] == ["0:0"] * 2
    logs = [(tmp_path / f"psfgen-{array}_{task}.log").read_text() for task in (5, 7)]
    for rank, log in enumerate(logs):
        assert f"array task {rank + 1} of 2: renders its share, as --shard {rank}/2 would" in log
    assert [int(count) for log in logs for count in re.findall(r"(\d+) kernels traced", log)] == [108, 72]
    assert psfgen("verify").code == 0
    render(tiny(tmp_path / "local" / "psfs.zarr", **work))
    assert arrays(tmp_path / "psfs.zarr") == arrays(tmp_path / "local" / "psfs.zarr")


def test_the_finaliser_answers_3_for_an_incomplete_store(cluster: Cluster, psfgen: Psfgen, tmp_path: Path) -> None:
    config = tiny(tmp_path / "psfs.zarr")
    render(config, shard="0/2")
    (tmp_path / "psfs.zarr.slurm/logs").mkdir(parents=True)
    script = tmp_path / "finalise.sbatch"
    script.write_text(slurm.scripts(config, 2, [0, 1])["finalise.sbatch"])
    number = call("sbatch", "--parsable", script)
    assert ended(number)[0]["ExitCode"] == "3:0"
    log = (tmp_path / f"psfs.zarr.slurm/logs/{number}.finalise.log").read_text()
    assert re.fullmatch(r"error: store .* is incomplete: 1 of 3 blocks are missing; .*\n", log)


def of_rank(number: str, rank: int) -> psutil.Process:
    """A process of the training that a job runs."""

    def look() -> psutil.Process | None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its = process.environ()
                if its.get("SLURM_JOB_ID") == number and its.get("RANK") == str(rank):
                    return process
        return None

    return poll(look) or psutil.Process()


def test_a_training_in_two_processes_that_runs_out_of_time_goes_on_later_and_is_judged(
    cluster: Cluster, psfgen: Psfgen, tmp_path: Path
) -> None:
    """Through torchrun, which knows no SIGUSR2 and no exit code 75; the weights are those of an undisturbed run.

    Meanwhile another training is cancelled, and stays so.
    """
    render(tiny(tmp_path / "psfs.zarr", grid=4, depth="2m", focus="2m"))
    sets = {
        "model.name": "neural_cvae",
        "steps": 400,
        "batch": 8,
        "log_every": 10,
        "save_every": 10**6,
        "device": "cpu",
    }
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    script = ["sbatch", "--parsable", "--mem=0", "--time=20", PIPELINES / "fit.sbatch"]
    fit = call("env", "PROCESSES=2", *script[:2], "--cpus-per-task=2", *script[2:], "--run", "runs/fit", *words)
    other = call(*script[:2], "--cpus-per-task=1", *script[2:], "--run", "runs/other", *words, "--set", "steps=100000")
    judge = call(
        *("sbatch", "--parsable", "--mem=0", "--cpus-per-task=1", f"--dependency=afterok:{fit}"),
        *(PIPELINES / "eval.sbatch", "runs/fit", "--no-baselines"),
    )
    log, metrics = tmp_path / f"psftrain-fit-{fit}.log", tmp_path / "runs/fit/metrics.jsonl"
    poll(lambda: metrics.exists() and metrics.stat().st_size)
    halted = of_rank(fit, 1)
    halted.suspend()  # it cannot end in time
    call("scontrol", "update", f"JobId={fit}", "TimeLimit=2")  # Slurm warns 120 s before
    undisturbed = subprocess.Popen(
        [
            "torchrun",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "--",
            "psftrain",
            "fit",
            "--run",
            "runs/alone",
            *words,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    poll(lambda: (tmp_path / "runs/other/metrics.jsonl").exists())
    call("scancel", other)
    poll(lambda: "SIGTERM" in log.read_text())
    call("scontrol", "update", f"JobId={fit}", "TimeLimit=20")  # its next life has time enough
    halted.resume()
    assert undisturbed.wait() == 0

    found = ended(fit, judge, other)
    assert [(one["JobState"], one["ExitCode"], one["Restarts"]) for one in found[:2]] == [
        ("COMPLETED", "0:0", "1"),
        ("COMPLETED", "0:0", "0"),
    ], log.read_text()
    assert re.search(r"stopped: SIGTERM after step \d+", log.read_text())
    assert log.read_text().count("400 steps in") == 1, "the first process alone answers"
    weights = [runs.load_run(tmp_path / "runs" / name).model.state_dict() for name in ("fit", "alone")]
    assert equal_states(*weights)
    document = json.loads((tmp_path / "runs/fit/run.json").read_text())
    assert (document["status"], document["processes"]) == ("finished", 2)
    assert (tmp_path / "runs/fit/eval/report.json").exists()

    assert (found[2]["JobState"], found[2]["Restarts"]) == ("CANCELLED", "0")
    assert checkpoint.steps(tmp_path / "runs/other") != [], "and has saved what it had"
