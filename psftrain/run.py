"""A run directory: what stands in it, whether it can go on, and the model it came to.

RUN/config.yaml, run.json, metrics.jsonl, tb/, checkpoints/step-00000300.pt, checkpoints/best.pt, eval/
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from psfgen.errors import FitError, RunMismatch
from psfgen.store.ledger import write_json_atomically
from psfgen.store.schema import plain
from psftrain import checkpoint
from psftrain.config import FitConfig
from psftrain.data import Conditioning, Examples, conditioning_from, require_same
from psftrain.models import model_class
from psftrain.models.base import CVAE

WHERE = ("run", "device")  # keys that may change between a run and its continuation


def last_state(run: Path, config: FitConfig, identity: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The last checkpoint of a run that `config` may continue; None for a run without one.

    Raises RunMismatch where the directory holds another run, or (without `resume`) any.
    """
    if run.exists() and not run.is_dir():
        raise RunMismatch(f"{run} is no folder; choose another --run")
    if not run.exists() or not any(run.iterdir()):
        return None
    if not (run / "config.yaml").exists():
        raise RunMismatch(f"{run} is not empty and holds no run; choose another --run")
    if not resume:
        raise RunMismatch(f"{run} holds a run already; choose another --run, or leave out --no-resume to go on")
    wanted = _flat(plain(config.model_dump()))
    found = _flat(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    for key in wanted | found:
        if key not in WHERE and found.get(key) != wanted.get(key):
            raise RunMismatch(
                f"{run} holds a run with {key} = {found.get(key)}, this one has {wanted.get(key)}; "
                f"choose another --run, or delete {run}"
            )
    steps = checkpoint.steps(run)
    if not steps and not (run / "run.json").exists():  # cut off before it began
        return None
    state = checkpoint.load(checkpoint.path_of(run, steps[-1])) if steps else read_json(run / "run.json")
    require_same(state["fingerprint"], identity["fingerprint"], f"store {config.store[0]} for the run {run}")
    if state["plan_sha256"] != identity["plan_sha256"]:
        raise RunMismatch(f"{run} was trained on another render of {', '.join(config.store)}; choose another --run")
    return state if steps else None


def prepare(run: Path, config: FitConfig, identity: dict[str, Any], train: Examples, model: CVAE) -> None:
    """Write config.yaml and run.json of a run that starts or goes on."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(plain(config.model_dump()), sort_keys=False), encoding="utf-8")
        document = {
            "status": "running",
            "steps": config.steps,
            "model": config.model.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "examples": len(train),
            "masked": train.masked,
            "torch": torch.__version__,
            **identity,
        }
        write_json_atomically(run / "run.json", document)
    except OSError as error:
        raise FitError(f"run {run} cannot be written: {error.strerror}; choose another --run") from None


def finish(run: Path, metrics: dict[str, float] | None = None) -> dict[str, float]:
    """Mark a run as finished, unless it is; returns its last metrics."""
    document = read_json(run / "run.json")
    last: dict[str, float] = document.get("metrics", {}) if metrics is None else metrics
    if document["status"] != "finished" or last != document.get("metrics"):
        write_json_atomically(run / "run.json", {**document, "status": "finished", "metrics": last})
    return last


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises RunMismatch where it cannot be read."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunMismatch(f"{path} cannot be read; is {path.parent} a run of psftrain?") from None
    return document


def newest(folder: Path = Path("runs")) -> Path:
    """The run trained last. Raises RunMismatch where there is none."""
    runs = [path.parent for path in folder.glob("*/config.yaml") if (path.parent / "checkpoints").is_dir()]
    if not runs:
        raise RunMismatch(f"no run with a checkpoint in {folder}/; `psftrain fit` makes one, or name RUN")
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)


@dataclass(frozen=True)
class Trained:
    """A trained model with everything it must be asked with."""

    path: Path
    model: CVAE
    config: FitConfig
    conditioning: Conditioning
    fingerprint: dict[str, Any]
    step: int


def load_run(run: Path) -> Trained:
    """The best model of a run, ready to evaluate on the CPU. Raises RunMismatch where there is none."""
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    config = FitConfig.model_validate(state["config"])
    conditioning = conditioning_from(state["conditioning"])
    side = state["fingerprint"]["bins" if config.data.array == "psf_binned" else "kernel_px"]
    shape = (len(state["fingerprint"]["wavelength"]), side, side)
    model = model_class(config.model.name)(config.model, shape, conditioning)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise RunMismatch(
            f"checkpoint of {run} does not fit its config ({' '.join(str(error).split())[:120]})"
        ) from None
    return Trained(run, model.eval(), config, conditioning, state["fingerprint"], int(state["step"]))


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
