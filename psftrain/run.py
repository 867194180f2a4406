"""A run directory: what stands in it, whether it can go on, and the model it came to.

RUN/config.yaml, run.json, metrics.jsonl, tb/, checkpoints/step-00000300.pt, checkpoints/best.pt, eval/
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from psfgen.errors import FitError, RunMismatch
from psfgen.store.ledger import json_bytes
from psfgen.store.schema import plain
from psftrain import checkpoint
from psftrain.conditioning import Conditioning, conditioning_from
from psftrain.config import FitConfig, ModelConfig
from psftrain.data import require_same
from psftrain.models import model_class
from psftrain.models.base import CVAE
from psftrain.models.solved import SolvedCVAE

# Keys that may change between a run and its continuation. data.mode may as far as it leaves the order of the examples
# alone, which `fit` sees to.
WHERE = ("run", "device", "graph", "compile", "data.mode", "data.cache")
# What a run goes on from: its run.json until it has saved, then its last checkpoint.
BEGUN: dict[str, type] = {"fingerprint": dict, "plan_sha256": list}
SAVED: dict[str, type] = {
    **BEGUN,
    "config": dict,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "best": float,
    "best_step": int,
    "ended": bool,
    "processes": int,
    "data_mode": str,
}
CLAIM_S = 10.0  # a process that torchrun starts anew may meet the one before, which is dying
WEIGHTS, DOCUMENT = "model.safetensors", "config.json"  # of an exported model


def last_state(run: Path, config: FitConfig, identity: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The last checkpoint of a run that `config` may continue; None for a run without one.

    Raises RunMismatch where the directory holds another run, or (without `resume`) any.
    """
    if not run.exists() or all(path.name.startswith(".") for path in run.iterdir()):  # a kill leaves hidden files
        return None
    if not (run / "config.yaml").exists():
        raise RunMismatch(f"{run} is not empty and holds no run; choose another --run")
    with suppress(OSError, ValueError, TypeError):  # it is read again below
        if "adapted_from" in json.loads((run / "run.json").read_text(encoding="utf-8")):
            raise RunMismatch(f"{run} is what `psftrain adapt` wrote, not a run to go on with; choose another --run")
    if not resume:
        raise RunMismatch(f"{run} holds a run already; choose another --run, or leave out --no-resume to go on")
    wanted = _flat(plain(config.model_dump()))
    found = _flat(read_config(run))
    for key in ("model.name", *(wanted | found)):  # of another model much else is different
        if key not in WHERE and found.get(key) != wanted.get(key):
            solved = issubclass(model_class(config.model.name), SolvedCVAE)
            longer = f" (--init {run} starts it from these weights)" if key == "steps" and not solved else ""
            raise RunMismatch(
                f"{run} holds a run with {key} = {_as_yaml(found.get(key))}, this one has "
                f"{_as_yaml(wanted.get(key))}; choose another --run{longer}, or delete {run}"
            )
    state = checkpoint.newest(run)
    if state is None and not (run / "run.json").exists():  # cut off before it began
        return None
    known = read_json(run / "run.json") if state is None else state
    _require_whole(known, BEGUN if state is None else SAVED, run)
    if state is not None and any(
        key not in WHERE and value != wanted.get(key) for key, value in _flat(state["config"]).items()
    ):
        raise RunMismatch(f"the checkpoint of step {state['step']} in {run} is of another run; delete it")
    require_same(known["fingerprint"], identity["fingerprint"], f"store {config.store[0]} for the run {run}")
    if known["plan_sha256"] != identity["plan_sha256"]:
        raise RunMismatch(f"{run} was trained on another render of {', '.join(config.store)}; choose another --run")
    return state


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run as plain data. Raises RunMismatch where it cannot be read."""
    try:
        document = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        document = None
    if not isinstance(document, dict):
        raise RunMismatch(f"{run / 'config.yaml'} cannot be read; is {run} a run of psftrain?")
    return document


def _require_whole(known: dict[str, Any], keys: dict[str, type], run: Path) -> None:
    for key, kind in keys.items():
        if not isinstance(known.get(key), kind):
            raise RunMismatch(f"{run} cannot go on: what it has saved has no {key}; choose another --run")


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keep every other process from training into the same run directory. Raises RunMismatch where one does."""
    if run.exists() and not run.is_dir():
        raise RunMismatch(f"{run} is no folder; choose another --run")
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise FitError(f"run {run} cannot be written: {error.strerror}; choose another --run") from None
    try:
        deadline = time.monotonic() + CLAIM_S
        while not _lock(handle):
            if time.monotonic() > deadline:
                raise RunMismatch(f"{run} is being trained by another process; wait for it, or choose another --run")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # unless something stands in it
            run.rmdir()


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def prepare(run: Path, config: FitConfig, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.yaml and run.json of a run that starts or goes on; `facts` is what else run.json tells."""
    document = {
        "status": "running",
        "steps": config.steps,
        "model": config.model.name,
        "torch": torch.__version__,
        **facts,
        **identity,
    }
    text = yaml.safe_dump(plain(config.model_dump()), sort_keys=False)
    try:
        checkpoint.write_whole(run / "config.yaml", text.encode())
        checkpoint.write_whole(run / "run.json", json_bytes(document))
    except OSError as error:
        raise FitError(f"run {run} cannot be written: {error.strerror}; choose another --run") from None


def finish(run: Path, step: int) -> dict[str, float]:
    """Mark a run as finished at a step, unless it is; returns the last value of each scalar that it has logged."""
    document = read_json(run / "run.json")
    metrics = document.get("metrics") or _last_logged(run)
    finished = {**document, "status": "finished", "step": step, "metrics": metrics}
    if finished != document:
        with checkpoint.writing(f"run {run}"):
            checkpoint.write_whole(run / "run.json", json_bytes(finished))
    return metrics


def _last_logged(run: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):  # a line cut short
                last |= json.loads(line)
    return {name: value for name, value in last.items() if name not in ("step", "time")}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises RunMismatch where it cannot be read."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict):
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
    plans: Sequence[str] | None  # plan_sha256 of config.store, where that is known


def initial_weights(run: Path, model: CVAE, config: ModelConfig) -> None:
    """Give `model`, which is that of `config`, the weights of another run's best model.

    Raises RunMismatch where there are none or they do not fit.
    """
    if not (run / "checkpoints").is_dir() and not (run / WEIGHTS).exists():
        raise RunMismatch(f"init {run} is no run; name one that `psftrain fit` has trained, or its export")
    found = load_run(run)
    for key, value in found.config.model:
        if value != (wanted := getattr(config, key)):
            raise RunMismatch(f"init {run}: its network has model.{key} {value}, this one {wanted}; give both the same")
    try:
        model.load_state_dict(found.model.state_dict())
    except RuntimeError:
        raise RunMismatch(
            f"init {run}: its network is for other kernels or another grid of field points than this store has; name a "
            "run on a store like this one"
        ) from None


def load_run(run: Path) -> Trained:
    """The best model of a run, or of a folder that `psftrain export` wrote, ready to evaluate on the CPU.

    Raises RunMismatch where there is none.
    """
    best = run / "checkpoints" / "best.pt"
    if not best.exists() and (run / WEIGHTS).exists():
        try:
            return trained_from(run, read_json(run / DOCUMENT), safetensors.torch.load_file(run / WEIGHTS))
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise RunMismatch(f"{run} is no export of psftrain that can be read ({reason}); export it anew") from None
    if not run.is_dir():
        raise RunMismatch(f"run {run} does not exist; `psftrain fit --run {run}` makes one")
    if not best.exists() and not (run / "config.yaml").exists():
        raise RunMismatch(f"{run} is no run of psftrain and no export of one")
    state = checkpoint.load_best(run)
    try:
        return trained_from(run, state, state.get("ema") or state["model"])
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RunMismatch(f"checkpoint {best} is not as this psftrain writes it ({reason})") from None


def trained_from(path: Path, document: dict[str, Any], weights: dict[str, Tensor]) -> Trained:
    """A model of `weights` as a checkpoint or an export describes it. Raises RunMismatch where they do not fit."""
    config = FitConfig.model_validate(document["config"])
    fingerprint, conditioning = document["fingerprint"], conditioning_from(document["conditioning"])
    side = fingerprint["bins" if config.data.array == "psf_binned" else "kernel_px"]
    shape = (len(fingerprint["wavelength"]), side, side)
    model = model_class(config.model.name)(config.model, shape, conditioning)
    try:
        model.load_state_dict(weights)
        if isinstance(model, SolvedCVAE):  # whose tensors are of any shape until they are used
            one = torch.zeros(1, 4)
            with torch.no_grad():
                model.decode(model.prior(one).mean, one)
                model.expected_error(one)
    except (RuntimeError, AttributeError, IndexError) as error:
        raise RunMismatch(
            f"checkpoint of {path} does not fit its config ({' '.join(str(error).split())[:120]})"
        ) from None
    plans = document.get("trained_on" if "adapted_from" in document else "plan_sha256")
    return Trained(path, model.eval(), config, conditioning, fingerprint, int(document["step"]), plans)


def _as_yaml(value: Any) -> Any:
    return "null" if value is None else value


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
