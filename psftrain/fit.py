"""Training: a straight line from a config to a run directory."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from psfgen.errors import STOP_SIGNALS, ConfigError, FitError, Preempted, progress, stop_signals
from psfgen.store.schema import plain
from psftrain import checkpoint
from psftrain import run as runs
from psftrain.board import Board
from psftrain.config import FitConfig
from psftrain.data import (
    Conditioning,
    Examples,
    conditioning_document,
    conditioning_of,
    fingerprint,
    neighbour_pairs,
    open_stores,
    read_examples,
    require_same,
    withhold,
)
from psftrain.losses import Objective
from psftrain.models import model_class
from psftrain.order import Order, learning_rate

PICTURES = 12


@dataclass(frozen=True)
class Fitted:
    """What a training run came to."""

    run: Path
    step: int
    metrics: dict[str, float]
    seconds: float


def fit(config: FitConfig, *, resume: bool = True) -> Fitted:
    """Train `config` into its run directory, or go on where the run stopped.

    Raises RunMismatch where the directory holds a run of another config or (without `resume`) any run,
    FitError where the loss is no longer finite, Preempted where a signal stopped it, with the work saved.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}: psftrain trains in one process; start one, not several"
        )
    run = Path(config.run)
    device = torch.device(resolve_device(config.device))
    stores = open_stores(config.store, config.data.array)
    conditioning = conditioning_of(stores)
    train, val = withhold(read_examples(stores, conditioning, config.data.array), config.data.val, config.seed)
    expected = fingerprint(stores[0], config.data.array)
    identity = {
        "fingerprint": expected,
        "plan_sha256": [store.attrs["plan_sha256"] for store in stores],
        "conditioning": conditioning_document(conditioning),
    }
    if config.val is not None:
        val = _validation_set(config, conditioning, expected)
    if config.batch > len(train):
        raise ConfigError(f"batch {config.batch} is larger than the {len(train)} examples; --set batch={len(train)}")
    state = runs.last_state(run, config, identity, resume=resume)
    if state is not None and state["step"] >= config.steps:
        return Fitted(run, state["step"], runs.finish(run), 0.0)

    torch.manual_seed(config.seed)
    channels, rows, columns = train.kernels.shape[1:]
    model = model_class(config.model.name)(config.model, (channels, rows, columns), conditioning)
    objective = Objective(model, config.loss).to(device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=config.lr, fused=True)
    step, best = 0, math.inf
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]
    runs.prepare(run, config, identity, train, model)
    board = Board(run, step)
    if not step:
        board.text("config", yaml.safe_dump(plain(config.model_dump()), sort_keys=False), 0)
        _pictures(board, objective, train, val, 0, device)

    order = Order(config.seed, len(train), config.batch)
    kernels, condition = train.kernels.to(device), train.condition.to(device)
    smooth = _smoothness(train, device) if config.loss.smooth else []
    metrics: dict[str, float] = {}
    terms: dict[str, Tensor] = {}
    first, started = step, time.monotonic()

    best_path = run / "checkpoints" / "best.pt"

    def save(path: Path) -> None:
        training = {"optimizer": optimizer.state_dict(), "scheduler": {"name": config.schedule}, "ema": None}
        document = {"step": step, "best": best, "config": plain(config.model_dump()), **identity}
        checkpoint.save(path, {"model": model.state_dict(), **training, **document})

    def save_step() -> None:
        if terms:
            _require_finite(terms["total"], step)
        if val is None or not best_path.exists():  # without validation best = last
            save(best_path)
        save(checkpoint.path_of(run, step))
        checkpoint.prune(run, config.keep)

    bar = progress(config.steps, f"fit {config.model.name}", "step", initial=step)
    with stop_signals((*STOP_SIGNALS, signal.SIGINT)) as stopped:
        try:
            while step < config.steps:
                batch = order.batch(step).to(device)
                noise, slice_number = order.noise(step, model.latent, len(smooth))
                places, pairs = smooth[slice_number] if smooth else (condition[:0], batch[:0, None])
                optimizer.param_groups[0]["lr"] = learning_rate(config, step)
                terms = objective(kernels[batch], condition[batch], noise.to(device), places, pairs)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(terms["total"])
                if config.clip is not None:
                    torch.nn.utils.clip_grad_norm_(objective.parameters(), config.clip)
                optimizer.step()
                step += 1
                bar.update()
                last = step == config.steps
                if step % config.log_every == 0 or last:
                    metrics = _metrics(terms, step)
                    metrics |= {"train/lr": optimizer.param_groups[0]["lr"]}
                    metrics |= {"train/steps_per_s": (step - first) / (time.monotonic() - started)}
                    board.scalars(metrics, step)
                    bar.set_postfix_str(
                        f"recon {metrics['loss/recon']:.3f}, kl {metrics['loss/kl']:.2f}", refresh=False
                    )
                if step % config.val_every == 0 or last:
                    _pictures(board, objective, train, val, step, device)
                    if val is not None:
                        found = validate(objective, val, device)
                        board.scalars(found, step)
                        metrics |= found
                        if found["val_prior/rel_l2"] < best:
                            best = found["val_prior/rel_l2"]
                            save(best_path)
                if not last and (stopped or step % config.save_every == 0):
                    save_step()
                if stopped and not last:
                    raise Preempted(f"{stopped[0]} after step {step}; saved, the same command goes on")
            save_step()
        finally:
            bar.close()
            board.close()
    runs.finish(run, metrics)
    return Fitted(run, step, metrics, time.monotonic() - started)


def validate(objective: Objective, val: Examples, device: torch.device) -> dict[str, float]:
    """Mean relative L2 error of the prior-mean path and of the posterior path on a validation set."""
    errors: dict[str, list[Tensor]] = {"prior": [], "posterior": []}
    model = objective.model
    with torch.no_grad():
        for start in range(0, len(val), 512):
            kernels = val.kernels[start : start + 512].to(device)
            condition = val.condition[start : start + 512].to(device)
            for name, latent in (
                ("prior", model.prior(condition)),
                ("posterior", model.posterior(kernels, condition)),
            ):
                difference = (model.decode(latent.mean, condition) - kernels).flatten(1).norm(dim=-1)
                errors[name].append(difference / kernels.flatten(1).norm(dim=-1))
    return {f"val_{name}/rel_l2": float(torch.cat(parts).mean()) for name, parts in errors.items()}


def resolve_device(name: str) -> str:
    """`auto` as the device that is here. Raises ConfigError for a GPU that is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} is not here ({torch.cuda.device_count()} GPUs found); use device cpu")
    return name


def _validation_set(config: FitConfig, conditioning: Conditioning, expected: dict[str, Any]) -> Examples:
    assert config.val is not None
    if config.data.val:
        raise ConfigError("val and data.val exclude each other: give a validation store or withhold a share")
    stores = open_stores([config.val], config.data.array)
    require_same(expected, fingerprint(stores[0], config.data.array), f"validation store {config.val}")
    coords = stores[0].coords
    conditioning.require(coords["depth_dioptre"], coords["focus_dioptre"], f"validation store {config.val}")
    return read_examples(stores, conditioning, config.data.array)


def _smoothness(train: Examples, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each slice the conditions of its field points and their neighbour pairs, for one prior call a step."""
    found = []
    for slice_ in train.slices:
        pairs = neighbour_pairs(slice_)
        places, compact = torch.unique(pairs, return_inverse=True)
        if len(pairs):
            found.append((train.condition[slice_.flatten()[places]].to(device), compact.to(device)))
    return found


def _metrics(terms: dict[str, Tensor], step: int) -> dict[str, float]:
    _require_finite(terms["total"], step)
    values = {name: float(term.detach()) for name, term in terms.items()}
    active = values.pop("active_dims")
    return {**{f"loss/{name}": value for name, value in values.items()}, "kl/active_dims": active}


def _require_finite(loss: Tensor, step: int) -> None:
    if not math.isfinite(float(loss.detach())):
        raise FitError(f"the loss is no longer finite at step {step}; the last checkpoint is kept, try a lower lr")


def _pictures(
    board: Board, objective: Objective, train: Examples, val: Examples | None, step: int, device: torch.device
) -> None:
    """Truth, posterior reconstruction and prior mean, row by row, of a spread of examples."""
    model = objective.model
    for name, examples in (("train", train), ("val", val)):
        if examples is None:
            continue
        chosen = torch.linspace(0, len(examples) - 1, min(PICTURES, len(examples))).round().long()
        truth, condition = examples.kernels[chosen].to(device), examples.condition[chosen].to(device)
        with torch.no_grad():
            posterior = model.decode(model.posterior(truth, condition).mean, condition)
            prior = model.decode(model.prior(condition).mean, condition)
        board.kernels(f"{name}/truth_posterior_prior", [truth, posterior, prior], step)
