"""What is submitted to Slurm, to the letter; shares of hand-written arrays; what `status` says. Without a cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Psfgen, flags, tiny

from psfgen.config import RenderConfig, Slurm, load_config
from psfgen.errors import ConfigError
from psfgen.executors import slurm
from psfgen.plan import array_shard
from psfgen.render import render
from psfgen.store import open_store

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = Path(__file__).parents[1] / "pipelines/slurm"
FULL: dict[str, Any] = {
    "partition": "long",
    "time": "2:00:00",
    "gres": "gpu:1",
    "cpus": 8,
    "memory": "16G",
    "concurrency": 4,
    "setup": ["module load cuda", "export NUMBA_CACHE_DIR=/tmp/numba"],
    "options": ["--account=optics", "--exclusive"],
    "signal_s": 120,
}


def config(**changes: Any) -> RenderConfig:
    return load_config(RenderConfig, None, [*{"out": "/scratch/my psfs.zarr", "executor": "slurm", **changes}.items()])


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "indices"),
    [("plain", {}, range(12)), ("full", FULL, [3, 7, 8, 9, 11]), ("no-requeue", {"requeue": False}, [0])],
)
@pytest.mark.parametrize("script", ["render.sbatch", "finalise.sbatch"])
def test_the_scripts_are_these(name: str, settings: dict[str, Any], indices: list[int], script: str) -> None:
    found = slurm.scripts(config(slurm=settings), 12, indices, python="/opt/venv/bin/python")[script]
    assert found == (GOLDEN / f"{name}.{script}").read_text()


@pytest.mark.parametrize("path", [*GOLDEN.glob("*.sbatch"), *PIPELINES.glob("*.sbatch")], ids=lambda path: path.name)
def test_every_script_is_sound_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


def test_the_hand_written_script_stops_and_goes_on_as_the_generated_one() -> None:
    found = slurm.scripts(config(), 2, [0, 1])["render.sbatch"]
    written = (PIPELINES / "render.sbatch").read_text()
    assert written.partition("child=$!")[2] == found.partition("child=$!")[2]
    assert slurm.TRAP in written


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (140, True)])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_stopped_task_goes_on_later_unless_cancelled(tmp_path: Path, code: int, requeued: bool, state: str) -> None:
    """The script itself, with a psfgen that ends as told once it is warned."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\ntrap 'kill $!; exit {code}' USR2\necho ready\nsleep 60 &\nwait\n")
    for name, does in (("squeue", f"echo {state}"), ("scontrol", f'echo "$@" >{tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
    for name in ("python", "squeue", "scontrol"):
        (tmp_path / name).chmod(0o755)
    text = slurm.scripts(config(out=str(tmp_path / "x.zarr")), 8, [3], python=str(python))["render.sbatch"]
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    task = subprocess.Popen(["bash", "-c", text], env=given, stdout=subprocess.PIPE, text=True)
    assert task.stdout is not None
    assert task.stdout.readline() == "ready\n"
    task.send_signal(signal.SIGUSR2)
    assert task.wait() == code
    task.stdout.close()
    assert (tmp_path / "requeued").exists() == (requeued and state == "RUNNING")
    if requeued and state == "RUNNING":
        assert (tmp_path / "requeued").read_text() == "requeue 12_3\n"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("partition", "a b", r"slurm\.partition: 'a b' cannot stand in an #SBATCH line"),
        ("partition", "", r"slurm\.partition: '' cannot stand"),
        ("memory", "4G\n#SBATCH --x", r"slurm\.memory: '4G\\n#SBATCH --x' cannot stand"),
        ("gres", 'gpu:"1"', r"slurm\.gres: .* cannot stand"),
        ("time", 5400, r"slurm\.time: write the time limit in quotes"),
        ("options", ["-A optics"], r"slurm\.options\.0: '-A optics' is no sbatch option; write --NAME"),
        ("options", ["--comment=a b"], r"slurm\.options\.0: '--comment=a b' cannot stand"),
        ("cpus", 0, r"slurm\.cpus: .*greater than or equal to 1, got 0"),
        ("max_tasks", 0, r"slurm\.max_tasks: .*got 0"),
        ("task_minutes", 0, r"slurm\.task_minutes: .*got 0"),
        ("concurency", 3, r"unknown key 'slurm\.concurency'; did you mean 'concurrency'\?"),
    ],
)
def test_what_cannot_be_submitted_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(slurm={key: value})


@pytest.mark.parametrize("name", ['a"b.zarr', "a'b.zarr", "a\nb.zarr", "a\\b.zarr"])
def test_a_store_whose_name_cannot_be_quoted_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in an sbatch script"):
        slurm.scripts(config(out=f"/scratch/{name}"), 1, [0])


def test_a_store_with_any_other_name_is_quoted() -> None:
    text = slurm.scripts(config(out="/scratch/50% $HOME;x.zarr"), 1, [0])["render.sbatch"]
    assert '#SBATCH --output="/scratch/50%% $HOME;x.zarr.slurm/logs/%A_%a.log"\n' in text
    assert "render '/scratch/50% $HOME;x.zarr.slurm/job.yaml' --shard" in text
    assert "#SBATCH --job-name=psfgen-50---HOME-x\n" in text


def test_the_job_renders_the_same_plan_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = config(**{**TINY, "out": "psfs.zarr", "lens": "lenses/my.zmx", "slurm": FULL})
    (tmp_path / "job.yaml").write_text(slurm.job_yaml(given))
    assert set(yaml.safe_load((tmp_path / "job.yaml").read_text())) == set(RenderConfig.model_fields) - {"slurm"}
    there = {"lens": str(tmp_path / "lenses/my.zmx"), "out": str(tmp_path / "psfs.zarr"), "executor": "local"}
    assert load_config(RenderConfig, tmp_path / "job.yaml") == given.model_copy(update={**there, "slurm": Slurm()})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("cpu", "auto")),
        ({"slurm.gres": "gpu:a100:1"}, ("cuda", "torch")),
        ({"device": "cuda"}, ("cuda", "torch")),
        ({"device": "cpu", "slurm.gres": "gpu:1"}, ("cpu", "auto")),
        ({"device": "cuda", "tracer": "deeplens"}, ("cuda", "deeplens")),
    ],
)
def test_the_device_is_that_of_the_tasks(given: dict[str, Any], found: tuple[str, str]) -> None:
    made = slurm.for_tasks(load_config(RenderConfig, None, [f"{key}={value}" for key, value in given.items()]))
    assert (made.device, made.tracer) == found


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "blocks", "block_s", "tasks"),
    [
        ({}, 100, 60, 10),  # ten blocks of a minute make a task
        ({}, 101, 60, 11),
        ({}, 100, 0.01, 1),
        ({"concurrency": 8}, 100, 0.01, 8),  # what may run at once is used
        ({"concurrency": 8}, 3, 0.01, 3),
        ({}, 100, 3600, 100),  # never part of a block
        ({}, 100_000, 60, 1000),
        ({"max_tasks": 5, "concurrency": 8}, 100, 60, 5),
        ({"task_minutes": 1}, 100, 6, 10),
        ({}, 1, 0, 1),
    ],
)
def test_packing(settings: dict[str, Any], blocks: int, block_s: float, tasks: int) -> None:
    assert slurm.pack(Slurm(**settings), blocks, block_s) == tasks


@pytest.mark.parametrize(("indices", "text"), [([], ""), ([4], "4"), ([3, 7, 8, 9], "3,7-9"), (range(6), "0-5")])
def test_ranges(indices: list[int], text: str) -> None:
    assert slurm.ranges(indices) == text


# --- shares of a hand-written array -----------------------------------------------------------------------------------


def array(spec: str, task: int) -> dict[str, str]:
    """What Slurm tells a task of `--array=FIRST-LAST:STEP`."""
    first, last, step = map(int, re.split("[-:]", spec))
    tasks = range(first, last + 1, step)
    given = {"ID": task, "MIN": tasks[0], "MAX": tasks[-1], "COUNT": len(tasks), "STEP": step}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in given.items()}


@pytest.mark.parametrize(
    ("spec", "task", "shard"),
    [
        ("0-7:1", 0, "0/8"),
        ("0-7:1", 7, "7/8"),
        ("5-12:1", 6, "1/8"),
        ("3-9:2", 9, "3/4"),
        ("3-10:2", 7, "2/4"),
        ("4-4:1", 4, "0/1"),
        ("0-100:50", 50, "1/3"),
    ],
)
def test_the_share_of_an_array_task(spec: str, task: int, shard: str) -> None:
    assert array_shard(array(spec, task)) == shard


def test_no_array_no_share() -> None:
    assert array_shard({"SLURM_JOB_ID": "3"}) is None


@pytest.mark.parametrize(
    "changes",
    [{"COUNT": "7"}, {"COUNT": ""}, {"ID": "4"}, {"ID": "1"}, {"ID": "11"}, {"STEP": "0"}, {"MIN": "x"}, {"MAX": ""}],
)
def test_an_array_that_is_no_plain_range_is_refused(changes: dict[str, str]) -> None:
    given = array("3-9:2", 5) | {f"SLURM_ARRAY_TASK_{key}": value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=r"no plain range \(.*\); give --shard I/N, or --shard 0/1"):
        array_shard(given)


def test_render_takes_its_share_and_says_so(psfgen: Psfgen, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in array("3-5:2", 5).items():
        monkeypatch.setenv(key, value)
    ran = psfgen("render", *flags())
    assert (ran.code, ran.out) == (0, "psfs.zarr: 36 kernels traced; 2 of 3 blocks still missing\n")
    assert ran.err.startswith("array task 2 of 2: renders its share, as --shard 1/2 would\n")
    refused = psfgen("render", *flags(), "--overwrite")
    assert (refused.code, refused.out) == (2, "")
    assert "--overwrite and --shard exclude each other, also in an array task" in refused.err
    assert psfgen("render", *flags(), "--shard", "0/1").out.endswith("72 kernels traced\n"), "--shard wins"


# --- submitting -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch and squeue that note what they are asked; the queue is a file, and `refusal` makes sbatch fail."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "queue").touch()
    sbatch = f'echo "$@" >>{folder}/asked; [ ! -e {folder}/refusal ] || {{ cat {folder}/refusal >&2; exit 1; }}\n'
    (folder / "sbatch").write_text(f"#!/bin/bash\n{sbatch}echo $((40 + $(wc -l <{folder}/asked)))\n")
    (folder / "squeue").write_text(
        f'#!/bin/bash\n[[ "$*" =~ --jobs=([0-9,]+) ]]; grep -E "^(${{BASH_REMATCH[1]/,/|}}) " {folder}/queue || true\n'
    )
    for name in ("sbatch", "squeue"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_submitted_once_then_only_what_is_missing(psfgen: Psfgen, tmp_path: Path, fake_slurm: Path) -> None:
    args = [*flags(depth="1m:inf:6"), "--executor", "slurm", "--set", "slurm.concurrency=3"]
    ran = psfgen("render", *args)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "psfs.zarr: array job 41 (3 tasks) submitted, and finaliser 42 after it\n"
        "follow it: psfgen status psfs.zarr --watch\n"
    )
    folder = tmp_path / "psfs.zarr.slurm"
    assert (fake_slurm / "asked").read_text().splitlines() == [
        f"--parsable {folder}/render.sbatch",
        f"--parsable --dependency=afterok:41 {folder}/finalise.sbatch",
    ]
    assert "#SBATCH --array=0-2%3\n" in (folder / "render.sbatch").read_text()

    (fake_slurm / "queue").write_text("41 RUNNING\n41 RUNNING\n42 PENDING\n")
    ran = psfgen("render", *args, "--json")
    assert (ran.code, ran.document["slurm"]["submitted"], ran.document["slurm"]["array"]) == (0, False, "41")
    refused = psfgen("render", *args, "--overwrite")
    assert refused.code == 2
    assert "array job 41 still renders into psfs.zarr; `scancel 41` first" in refused.err

    (fake_slurm / "queue").write_text("")
    render(tiny(tmp_path / "psfs.zarr", depth="1m:inf:6"), shard="0/3")
    render(tiny(tmp_path / "psfs.zarr", depth="1m:inf:6"), shard="2/3")
    ran = psfgen("render", *args, "--json")
    assert (ran.document["slurm"]["indices"], ran.document["slurm"]["submitted"]) == ([1], True)
    assert "#SBATCH --array=1%3\n" in (folder / "render.sbatch").read_text()
    assert psfgen("render", folder / "job.yaml", "--shard", "1/3").code == 0, "what the task does"
    assert psfgen("render", *args).out == "psfs.zarr: nothing to do\n"
    assert len((fake_slurm / "asked").read_text().splitlines()) == 4


def test_a_refused_job_is_one_line(psfgen: Psfgen, fake_slurm: Path) -> None:
    (fake_slurm / "refusal").write_text("sbatch: error: invalid partition specified: nope\nsbatch: error: failed\n")
    ran = psfgen("render", *flags(executor="slurm"), "--set", "slurm.partition=nope")
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(r"error: sbatch refused \(.*render\.sbatch\): invalid partition specified: nope\n", ran.err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "0/2", "--dry-run"], r"--shard 0/2 and --executor slurm exclude each other"),
        (["--shard", "0/2"], r"--shard 0/2 and --executor slurm exclude each other"),
        ([], r"executor slurm needs sbatch, which is not on the PATH; submit from a login node"),
    ],
)
def test_what_cannot_be_submitted_touches_nothing(
    psfgen: Psfgen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = psfgen("render", *flags(executor="slurm"), *more)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(rf"error: {message}.*\n", ran.err)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_scripts_and_touches_nothing(psfgen: Psfgen, tmp_path: Path) -> None:
    ran = psfgen("render", *flags(executor="slurm"), "--set", "slurm.concurrency=2", "--dry-run")
    assert ran.code == 0
    assert "--- render.sbatch\n#!/bin/bash\n" in ran.out
    assert "#SBATCH --array=0-1%2\n" in ran.out
    assert "--- finalise.sbatch\n#!/bin/bash\n" in ran.out
    document = psfgen("render", *flags(executor="slurm"), "--dry-run", "--json").document
    assert set(document["scripts"]) == {"render.sbatch", "finalise.sbatch"}
    assert list(tmp_path.iterdir()) == []


# --- what became of it ------------------------------------------------------------------------------------------------


def test_finalise_closes_a_complete_store_alone(psfgen: Psfgen, store: Path) -> None:
    ran = psfgen("finalise", store)
    assert (ran.code, ran.out) == (0, f"{store}: complete, 3 blocks\n")
    (store / "ledger/depth-0001.json").unlink()
    ran = psfgen("finalise", store)
    assert (ran.code, ran.out) == (3, "")
    assert "1 of 3 blocks are missing" in ran.err


@pytest.fixture
def half(store: Path) -> Path:
    """A store with one block done, one running and one failed; its array job is 41."""
    for index in (1, 2):
        (store / f"ledger/depth-000{index}.json").unlink()
    ledger = open_store(store, allow_incomplete=True).ledger
    ledger.start("depth-0001")
    ledger.fail("depth-0002", "RenderError: no glass")
    folder = store.with_name("psfs.zarr.slurm")
    folder.mkdir()
    submitted = {"array": "41", "finaliser": "42", "tasks": 3, "indices": [1, 2], "time": 0.0}
    (folder / "submitted.json").write_text(json.dumps(submitted))
    return store


def test_status_tells_blocks_and_jobs(psfgen: Psfgen, half: Path, fake_slurm: Path) -> None:
    (fake_slurm / "queue").write_text("41 RUNNING\n41 PENDING\n42 PENDING\n")
    ran = psfgen("status", half)
    assert ran.code == 3
    counts, missing, running, failed, job = ran.out.splitlines()
    assert counts == f"{half}: 1 of 3 blocks done, 1 running, 1 failed"
    assert missing == "missing blocks, by number: 1-2"
    assert running.startswith("depth-0001 runs")
    assert failed == "depth-0002 failed: RenderError: no glass"
    assert job == "array job 41 (2 tasks): 1 pending, 1 running; finaliser 42: pending"
    document = psfgen("status", half, "--json").document
    assert document["blocks"] == {"total": 3, "done": 1, "running": 1, "failed": 1, "missing": 2}
    assert document["missing"] == [1, 2]
    assert set(document["running"]) == {"depth-0001"}
    queue = {"41": {"RUNNING": 1, "PENDING": 1}, "42": {"PENDING": 1}}
    assert document["slurm"] == {"array": "41", "finaliser": "42", "queue": queue}


def test_status_without_squeue(psfgen: Psfgen, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(half))
    assert psfgen("status", half).out.splitlines()[-1] == "array job 41: state unknown (squeue is not on this machine)"


def test_watch_ends_when_the_store_is_complete(psfgen: Psfgen, finished: Path) -> None:
    assert psfgen("status", finished, "--watch").code == 0


def test_watch_ends_with_3_when_the_array_has_left_the_queue(psfgen: Psfgen, half: Path, fake_slurm: Path) -> None:
    """Not while a block still runs."""
    squeue = f"#!/bin/bash\n[ -e {fake_slurm}/asked ] && rm {half}/ledger/running/*.json\necho >>{fake_slurm}/asked\n"
    (fake_slurm / "squeue").write_text(squeue)
    ran = psfgen("status", half, "--watch", "--every", 0.1)
    assert ran.code == 3
    assert "array job 41 (2 tasks): not in the queue any more" in ran.out
    looks = ran.err.splitlines()
    assert looks
    assert set(looks) == {looks[0]}
    assert re.match(r".*1 of 3 blocks done, 1 running, 1 failed; array job 41 ", looks[0])
