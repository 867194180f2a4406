"""The state of a run in words and as a document. Everything is read; a run that trains is not disturbed."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psfgen.errors import RunMismatch
from psftrain import checkpoint
from psftrain.run import read_config, read_json

JUDGE = "val_prior/rel_l2"  # what the best checkpoint is chosen by


@dataclass(frozen=True)
class Log:
    """What a run has logged: for each scalar its steps and values; when it last logged (seconds since 1970)."""

    scalars: dict[str, tuple[list[int], list[float]]]
    step: int
    time: float | None


def read_log(run: Path) -> Log:
    """The scalars of metrics.jsonl; lines that a kill cut short are left out."""
    scalars: dict[str, tuple[list[int], list[float]]] = {}
    last, moment = 0, None
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            values = json.loads(line)
            step, moment = int(values.pop("step")), float(values.pop("time"))
            found = {name: float(value) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
        last = max(last, step)
        for name, value in found.items():
            steps, series = scalars.setdefault(name, ([], []))
            steps.append(step)
            series.append(value)
    return Log(scalars, last, moment)


def state(run: Path, log: Log) -> dict[str, Any]:
    """The state of a run as plain data. Raises RunMismatch for a folder that is none."""
    if not run.is_dir():
        raise RunMismatch(f"run {run} does not exist; `psftrain fit --run {run}` makes one")
    facts = read_json(run / "run.json")
    config = read_config(run)
    steps, best = checkpoint.steps(run), run / "checkpoints" / "best.pt"
    judged = [pair for pair in zip(*log.scalars.get(JUDGE, ([], [])), strict=True) if pair[1] == pair[1]]
    chosen = min(judged, key=lambda pair: pair[1], default=None)
    status = facts.get("status", "unknown")
    return {
        "run": str(run),
        "status": "stopped" if status == "running" and not _held(run) else status,
        "step": max([log.step, *steps]),
        "steps": facts.get("steps"),
        "logged": log.time,
        "model": facts.get("model"),
        "solved": facts.get("solved", False),
        "parameters": facts.get("parameters"),
        "examples": facts.get("examples"),
        "masked": facts.get("masked"),
        "stores": config.get("store", []),
        "adapted_from": facts.get("adapted_from"),
        "adapted_to": facts.get("adapted_to"),
        "kernels": facts.get("kernels"),
        "goes_on_with": _command(run, config),
        "validation": _validation(config),
        "best": None if chosen is None else {"step": chosen[0], JUDGE: chosen[1]},
        "metrics": {name: values[-1] for name, (_, values) in log.scalars.items()},
        "checkpoints": [*(["best"] if best.exists() else []), *steps],
    }


def title(state: dict[str, Any]) -> str:
    """A line over a picture of the run."""
    return f"{state['run']}: {state['model']}, {state['status']}, step {state['step']:,} of {_count(state['steps'])}"


def as_text(state: dict[str, Any], curves: Path | None) -> str:
    """What `psftrain show` prints."""
    if state["adapted_to"]:
        kernels = f"{state['kernels']} kernels of {state['adapted_to']}"
        return f"{state['run']}: one copy, adapted from {state['adapted_from']} to {kernels}"
    run, best, solved = state["run"], state["best"], state["solved"]
    none = "none" if solved else "none: the best checkpoint is the last"
    masked = f", {state['masked']:,} places without light" if state["masked"] else ""
    lines = [
        f"{run}: {_status(state)}",
        f"model           {state['model']}, {_size(state)}",
        f"data            {_count(state['examples'])} examples of {', '.join(state['stores'])}{masked}",
        f"validation      {state['validation'] or none}",
    ]
    if best and not solved:
        lines.append(f"best            {JUDGE} {best[JUDGE]:.4g} at step {best['step']:,}")
    groups: dict[str, list[str]] = {}
    for name, value in sorted(state["metrics"].items()):
        group, _, what = name.rpartition("/")
        groups.setdefault(group, []).append(f"{what} {value:.4g}")
    lines += [f"{group or 'other':<15} {', '.join(values)}" for group, values in groups.items()]
    saved = ", ".join(map(str, state["checkpoints"]))
    lines.append(f"checkpoints     {saved or 'none yet'}")
    lines.append(f"board           tensorboard --logdir {run}/tb")
    if not solved:  # at once, so that there is no curve
        lines.append(f"curves          {curves or 'nothing logged yet'}")
    return "\n".join(lines)


def _size(state: dict[str, Any]) -> str:
    """How large a model is, in words."""
    if not state["solved"]:
        return f"{_count(state['parameters'])} parameters"
    if state["parameters"]:
        return f"solved, {state['parameters']:,} numbers"
    return "not solved yet" if state["steps"] else "not solved: steps is 0"


def _status(state: dict[str, Any]) -> str:
    if state["solved"]:
        return f"stopped; {state['goes_on_with']} solves it" if state["status"] == "stopped" else str(state["status"])
    words = f"{state['status']}, step {state['step']:,} of {_count(state['steps'])}"
    if state["logged"] is not None and state["status"] == "running":
        words += f", last logged {_ago(time.time() - state['logged'])} ago"
    if state["status"] == "finished" and state["step"] < (state["steps"] or 0):
        words += ", stopped early"
    if state["status"] == "stopped":
        words += f"; {state['goes_on_with']} goes on"
    return words


def _command(run: Path, config: dict[str, Any]) -> str:
    """The command that goes on with a run, which may have been moved since it wrote its config."""
    moved = Path(str(config.get("run"))).resolve() != run.resolve()
    return shlex.join(["psftrain", "fit", f"{run}/config.yaml", *(["--run", str(run)] if moved else [])])


def _held(run: Path) -> bool:
    """Whether a process trains into the run now: it holds a lock on the folder."""
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks, where run.json is believed
        return True
    finally:
        os.close(handle)
    return False


def _validation(config: dict[str, Any]) -> str | None:
    if config.get("val"):
        return str(config["val"])
    data = config.get("data", {})
    parts = [f"{data['val']:.3g} of the interior field points"] if data.get("val") else []
    parts += [f"{data[f'val_{name}']} {name} distances" for name in ("depth", "focus") if data.get(f"val_{name}")]
    return f"withheld: {', '.join(parts)}" if parts else None


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
