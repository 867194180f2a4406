"""A Slurm cluster: an array job renders the blocks, and one job after it finalises and verifies the store.

What is submitted lies beside the store, in STORE.slurm/:

    job.yaml           the render job, for `psfgen render job.yaml` on any machine that sees the store
    render.sbatch      the array: task I of N renders shard I/N of all blocks of the plan
    finalise.sbatch    runs once every task has ended well
    submitted.json     {array, finaliser, tasks, indices, time}
    logs/              one file a task, and that of the finaliser
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from psfgen.config import RenderConfig, Slurm
from psfgen.errors import ConfigError, RenderError
from psfgen.store.ledger import write_json_atomically
from psfgen.store.place import is_url
from psfgen.store.schema import plain

if TYPE_CHECKING:
    from psfgen.plan import Plan
    from psfgen.specimens import Specimens
    from psfgen.store import Store

KERNEL_S = 100e-6  # a kernel on one core, taken before any block of the store has been timed: rather much
TIMED = 100  # blocks whose times are looked at


@dataclass(frozen=True)
class Submission:
    """What was submitted for a store: the ids of the two jobs, the N of the shards and the tasks that ran."""

    array: str
    finaliser: str | None
    tasks: int
    indices: list[int]
    time: float


def run(
    specimens: Specimens,
    store: Store,
    blocks: Sequence[int],
    *,
    workers: int | None,
    device: str,
    on_kernels: Callable[[int], None],
    stopped: Sequence[str] = (),
) -> None:
    """Submit the array that renders `blocks`, unless the last one is still in the queue. Returns at once.

    Raises RenderError where Slurm refuses.
    """
    plan = specimens.plan
    last = submission(store.path)
    if not blocks or (last is not None and queue(last.array)[last.array]):
        return
    tasks = pack(plan.config.slurm, len(plan.blocks), block_seconds(plan, store))
    indices = sorted({block % tasks for block in blocks})
    folder = folder_of(store.path)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(job_yaml(plan.config), encoding="utf-8")
    for name, text in scripts(plan.config, tasks, indices).items():
        (folder / name).write_text(text, encoding="utf-8")
    array = _submit(folder / "render.sbatch")
    submitted = Submission(array, None, tasks, indices, time.time())
    write_json_atomically(folder / "submitted.json", asdict(submitted))  # known even where the next line fails
    finaliser = _submit(folder / "finalise.sbatch", f"--dependency=afterok:{array}")
    write_json_atomically(folder / "submitted.json", {**asdict(submitted), "finaliser": finaliser})


def preview(plan: Plan, shard: str | None) -> dict[str, str]:
    """Name -> text of what would be submitted for a new store. Raises ConfigError for a shard."""
    _refuse(shard)
    tasks = pack(plan.config.slurm, len(plan.blocks), block_seconds(plan, None))
    return scripts(plan.config, tasks, range(tasks))


def for_tasks(config: RenderConfig) -> RenderConfig:
    """The config with the device of the tasks, which need not be here: cuda where `gres` names a GPU, else cpu."""
    gpu = "gpu" in (config.slurm.gres or "")
    device = ("cuda" if gpu else "cpu") if config.device == "auto" else config.device
    tracer = "torch" if device != "cpu" and config.tracer == "auto" else config.tracer
    return config.model_copy(update={"device": device, "tracer": tracer})


def check(config: RenderConfig, *, shard: str | None, overwrite: bool) -> None:
    """Raise ConfigError where a job cannot be submitted; nothing has been touched by then."""
    _refuse(shard)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "executor slurm needs sbatch, which is not on the PATH; submit from a login node, or use --executor local"
        )
    scripts(config, 1, [0])
    last = submission(config.out)
    if overwrite and last is not None and queue(last.array)[last.array]:
        raise ConfigError(
            f"--overwrite: array job {last.array} still renders into {config.out}; `scancel {last.array}` first"
        )


def _refuse(shard: str | None) -> None:
    if shard is not None:
        raise ConfigError(f"--shard {shard} and --executor slurm exclude each other: the tasks of the array are shards")


# --- how many tasks ---------------------------------------------------------------------------------------------------


def pack(slurm: Slurm, blocks: int, block_s: float) -> int:
    """Number of tasks for `blocks` blocks of `block_s` seconds each.

    A task takes about `task_minutes`, but as many tasks as may run at once are used; never more than
    `max_tasks` or than there are blocks.
    """
    together = max(1, math.floor(60 * slurm.task_minutes / max(block_s, 1e-9)))
    tasks = max(math.ceil(blocks / together), slurm.concurrency or 1)
    return min(tasks, slurm.max_tasks, blocks)


def block_seconds(plan: Plan, store: Store | None) -> float:
    """How long a block takes: the median of those done, else 100 us a kernel."""
    done = islice(sorted(store.ledger.done()), TIMED) if store is not None else ()
    seconds = [float(store.ledger.read(block)["seconds"]) for block in done if store is not None]
    return statistics.median(seconds) if seconds else KERNEL_S * plan.kernels_per_block


def ranges(indices: Iterable[int]) -> str:
    """Ascending numbers in short: 3,7-9."""
    steps = count()
    runs = [list(run) for _, run in groupby(indices, key=lambda index: index - next(steps))]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# --- what is submitted ------------------------------------------------------------------------------------------------


def folder_of(store: str) -> Path:
    """Where the job of a store lies: beside it; for one behind a URL, in the folder it was submitted from."""
    path = Path(Path(store).name if is_url(store) else store).absolute()
    return path.with_name(f"{path.name}.slurm")


def place_of(config: RenderConfig) -> str:
    """The store of a config, named so that it can be found from any folder."""
    return config.out if is_url(config.out) else str(Path(config.out).absolute())


def job_yaml(config: RenderConfig) -> str:
    """The config as a file that renders the same from any folder, on the machine it is run on."""
    lens = str(Path(config.lens).absolute()) if Path(config.lens).suffix else config.lens
    document = config.model_copy(update={"lens": lens, "out": place_of(config), "executor": "local"})
    return yaml.safe_dump(plain(document.model_dump(exclude={"slurm"})), sort_keys=False)


def scripts(config: RenderConfig, tasks: int, indices: Sequence[int], python: str = sys.executable) -> dict[str, str]:
    """Name -> text of the two sbatch scripts: an array of the tasks `indices` of `tasks`, and the finaliser.

    Raises ConfigError where the name of the store cannot stand in them.
    """
    slurm, store = config.slurm, place_of(config)
    folder = folder_of(store)
    if set(f"{store}{folder}") & set("\n\r\"'\\"):
        raise ConfigError(f"out {store!r}: quotes, backslashes and line ends cannot stand in an sbatch script")
    name = "psfgen-" + re.sub(r"[^\w.-]", "-", Path(store).stem)
    logs = str(folder / "logs").replace("%", "%%")
    psfgen, job, path = (
        f"{shlex.quote(python)} -m psfgen",
        shlex.quote(str(folder / "job.yaml")),
        shlex.quote(store),
    )
    most = f"%{slurm.concurrency}" if slurm.concurrency else ""
    array = [
        "--open-mode=append",
        f"--array={ranges(indices)}{most}",
        f"--signal=B:USR2@{slurm.signal_s}",
        "--requeue" if slurm.requeue else "--no-requeue",
        *([f"--gres={slurm.gres}"] if slurm.gres else []),
        f"--cpus-per-task={slurm.cpus}",
    ]
    requeue = REQUEUE if slurm.requeue else ""
    return {
        "render.sbatch": (
            f"#!/bin/bash\n# Renders {store}: task I of {tasks} takes every {tasks}-th block, from the I-th.\n"
            + _sbatch_lines(name, f"{logs}/%A_%a.log", array, slurm)
            + TRAP
            + _setup(slurm)
            + f'{psfgen} render {job} --shard "$SLURM_ARRAY_TASK_ID/{tasks}" &\n'
            + WAIT
            + requeue
            + 'exit "$code"\n'
        ),
        "finalise.sbatch": (
            f"#!/bin/bash\n# Closes {store} once every task of its array has ended well.\n"
            + _sbatch_lines(f"{name}-finalise", f"{logs}/%j.finalise.log", ["--kill-on-invalid-dep=yes"], slurm)
            + _setup(slurm)
            + f"{psfgen} finalise {path} && {psfgen} verify {path}\n"
        ),
    }


TRAP = """\
# Slurm warns this shell alone; psfgen then finishes the block in hand and exits with 75.
trap 'stopped=1; if [ -n "${child-}" ]; then kill -USR2 "$child"; fi' USR2 USR1 TERM
"""
WAIT = """\
child=$!
if [ -n "${stopped-}" ]; then kill -USR2 "$child"; fi  # the signal came before there was a child
while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends `wait` before the child has ended
wait "$child"
code=$?
"""
REQUEUE = """\
# Stopped, with the work saved (75) or before psfgen could listen (above 128): go on later, unless cancelled.
if [ -n "${stopped-}" ] && { [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; }; then
    task="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    if [ "$(squeue -h -j "$task" -o %T)" = RUNNING ]; then scontrol requeue "$task"; fi
fi
"""


def _sbatch_lines(name: str, log: str, own: Sequence[str], slurm: Slurm) -> str:
    given = {"partition": slurm.partition, "time": slurm.time, "mem": slurm.memory}
    shared = [f"--{key}={value}" for key, value in given.items() if value]
    words = [f"--job-name={name}", f'--output="{log}"', *own, *shared, *slurm.options]
    return "".join(f"#SBATCH {word}\n" for word in words)


def _setup(slurm: Slurm) -> str:
    return "".join(f"{line}\n" for line in slurm.setup)


# --- talking to Slurm -------------------------------------------------------------------------------------------------


def submission(store: str) -> Submission | None:
    """What was submitted last for a store. Raises RenderError where the record cannot be read."""
    path = folder_of(store) / "submitted.json"
    try:
        return Submission(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RenderError(f"{path} cannot be read ({error}); look with squeue, then delete it") from None


def queue(*jobs: str) -> dict[str, Counter[str]]:
    """For each job: state -> number of its tasks that are still in the queue; none once it has left.

    Raises RenderError where Slurm does not answer.
    """
    states: dict[str, Counter[str]] = {job: Counter() for job in jobs}
    asked = ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%F %T"]
    try:
        found = _call(asked)
    except RenderError as error:
        if "Invalid job id" in str(error):  # so old that Slurm has forgotten it
            return states
        raise
    for line in found.splitlines():
        job, state = line.split()
        states[job][state] += 1
    return states


def _submit(script: Path, *options: str) -> str:
    """The id of the job that a script became."""
    return _call(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RenderError(f"{command[0]} cannot be run: {error.strerror}; is this a machine of the cluster?") from None
    if done.returncode:
        told: Any = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
        raise RenderError(
            f"{command[0]} refused ({' '.join(command[1:])}): {told.removeprefix(f'{command[0]}: error: ')}"
        )
    return done.stdout
