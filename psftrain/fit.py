"""Training: a straight line from a config to a run directory."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from psfgen.errors import STOP_SIGNALS, ConfigError, FitError, Preempted, RunMismatch, progress, stop_signals
from psfgen.store import Store
from psfgen.store.schema import plain
from psftrain import advice, checkpoint, schedules, solving
from psftrain import run as runs
from psftrain.board import Board, Silent
from psftrain.clock import Clock
from psftrain.conditioning import Conditioning, conditioning_document, conditioning_of
from psftrain.config import FitConfig
from psftrain.data import Places, catalogue, fingerprint, open_stores, require_same, withhold
from psftrain.ddp import Ranks, join
from psftrain.feed import Feed
from psftrain.keeper import Keeper
from psftrain.losses import ACTIVE_NATS, Objective
from psftrain.models import model_class
from psftrain.order import Order
from psftrain.sources import Source, chosen_mode, open_source
from psftrain.step import Graphed, Stepper, Terms
from psftrain.validation import Look

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What a training run came to."""

    run: Path
    step: int
    metrics: dict[str, float]
    seconds: float
    solved: bool = False


def fit(config: FitConfig, *, resume: bool = True) -> Fitted:
    """Train `config` into its run directory, or go on where the run stopped; under torchrun, in every process.

    A model that is solved is so by the first process, while the others wait.
    Raises RunMismatch where the directory holds a run of another config or (without `resume`) any run,
    FitError where the loss is no longer finite, Preempted where a signal stopped it, with the work saved.
    """
    with stop_signals((*STOP_SIGNALS, signal.SIGINT)) as stopped, join(config.device) as ranks:
        run, task, solved = Path(config.run), _task(config, ranks), solving.is_solved(config.model.name)
        with ExitStack() as held:
            # Claimed before it is looked at: another process may be writing another config's run into it.
            ranks.from_first(lambda: held.enter_context(runs.claimed(run)))
            state = ranks.from_first(lambda: runs.last_state(run, config, task.identity, resume=resume))
            if state is not None and (state["step"] >= config.steps or state["ended"]):
                done = ranks.from_first(lambda: _finished(run, state["step"]))
                return Fitted(run, state["step"], done, 0.0, solved)
            if solved:
                with _memory(torch.device("cpu"), "train on a store of fewer kernels"):
                    return Fitted(run, *ranks.from_first(lambda: _solve(config, run, task, stopped)), solved)
            with _memory(ranks.device, "try --set accumulate=2 or a smaller batch or model.width in another --run"):
                return _train(config, run, ranks, task, state, stopped)


@contextmanager
def _memory(device: torch.device, way_out: str) -> Iterator[None]:
    """Raise FitError, which names the way out, where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # of a CPU it has no class of its own
            raise
        raise FitError(
            f"the memory of {device} is too small for this run; what was saved before is kept, {way_out}"
        ) from error


@dataclass(frozen=True)
class _Task:
    """What is to be learned: the stores, which of their places are trained on, what makes the run what it is."""

    stores: list[Store]
    conditioning: Conditioning
    everything: Places
    train: Places
    val: Places | None
    split: dict[str, Any]
    identity: dict[str, Any]


def _task(config: FitConfig, ranks: Ranks) -> _Task:
    withheld = [key for key in ("val", "val_depth", "val_focus") if getattr(config.data, key)]
    if config.val is not None and withheld:
        raise ConfigError(
            f"val and data.{withheld[0]} exclude each other: give a store of other points, or withhold a part of these"
        )
    if config.patience is not None and config.val is None and not withheld:
        raise ConfigError("patience needs points to validate on; give --val STORE or --set data.val=0.05")
    stores = open_stores(config.store, config.data.array)
    conditioning = conditioning_of(stores)
    everything = catalogue(stores, conditioning, config.data.array)
    train, val, split = withhold(everything, config.data, config.seed)
    if solving.is_solved(config.model.name):
        solving.require_solvable(config)
    else:
        _require_batches(config, train, ranks)
    identity = {
        "fingerprint": fingerprint(stores, config.data.array),
        "plan_sha256": [store.attrs["plan_sha256"] for store in stores],
        "conditioning": conditioning_document(conditioning),
    }
    return _Task(stores, conditioning, everything, train, val, split, identity)


def _require_batches(config: FitConfig, train: Places, ranks: Ranks) -> None:
    """Raise ConfigError unless the batch can be filled, and shared among the processes."""
    if config.batch > len(train):
        raise ConfigError(f"batch {config.batch} is larger than the {len(train)} examples; --set batch={len(train)}")
    parts = ranks.world * config.accumulate
    if config.batch % parts:
        raise ConfigError(
            f"batch {config.batch} does not fall into {parts} equal parts ({ranks.world} "
            f"process{'es' * (ranks.world > 1)} x accumulate {config.accumulate}); "
            f"--set batch={max(1, config.batch // parts) * parts}"
        )


def _finished(run: Path, step: int) -> dict[str, float]:
    """What a run that has come to its end has logged last. Raises RunMismatch where its model cannot be read."""
    checkpoint.load_best(run)
    return runs.finish(run, step)


def _solve(config: FitConfig, run: Path, task: _Task, stopped: list[str]) -> tuple[int, dict[str, float], float]:
    source = open_source(task.stores, task.everything, config.data, torch.device("cpu"))
    try:
        held = _validation_set(config, task, source)
        step, _, seconds = solving.solve(config, run, task, source, held, stopped)
    finally:
        source.close()
    return step, runs.finish(run, step), seconds


def _train(
    config: FitConfig, run: Path, ranks: Ranks, task: _Task, state: dict[str, Any] | None, stopped: list[str]
) -> Fitted:
    device, dtype = ranks.device, torch.float64 if config.precision == "float64" else torch.float32
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    source, order = _source(config, ranks, task, state)
    held = _validation_set(config, task, source)
    look = Look((task.train, source), held, device, dtype)

    torch.manual_seed(config.seed)
    model = model_class(config.model.name)(config.model, task.everything.shape, task.conditioning).to(device, dtype)
    if config.init is not None and state is None:
        runs.initial_weights(Path(config.init), model, config.model)
    objective = Objective(model, config.loss, mean_over_ranks=ranks.mean)
    if config.compile:
        objective.compile()
    stepper = Stepper(ranks.wrap(objective), model, config, device)
    take = Graphed(stepper) if device.type == "cuda" and config.graph and ranks.world == 1 else stepper
    feed = Feed(config, task.train, source, order, ranks, model.latent)

    step = first = state["step"] if state else 0
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "processes": ranks.world}
    facts |= {"examples": len(task.train), "masked": task.everything.masked, "split": task.split}
    facts["validation"] = 0 if held is None else len(held[0])
    if ranks.first:
        runs.prepare(run, config, task.identity, {**facts, "data_mode": source.mode})
    board = Board(run, step) if ranks.first else Silent()
    keeper = Keeper(run, config, ranks, stepper, board, {"data_mode": source.mode, **task.identity})
    if state is not None:
        keeper.load(state)
        _say_how_it_goes_on(run, state, ranks)
    else:
        board.text("config", yaml.safe_dump(plain(config.model_dump()), sort_keys=False), 0)
        look.draw(board, stepper.best_guess, 0)

    metrics: dict[str, float] = {}
    warnings = advice.Warnings(config, model.latent)
    clock = Clock(step, config.batch, device)
    ended, caught = False, None
    bar = progress(config.steps, f"fit {config.model.name}", "step", initial=step, silent=not ranks.first)
    try:
        while step < config.steps and not (ended or caught):
            with clock.data():
                parts = feed(step)
            stepper.set_rate(schedules.learning_rate(config, step))
            terms = take(parts)
            step += 1
            bar.update()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                stepper.require_finite(ranks, first, step)
                metrics = {**_scalars(ranks, terms), **_schedule(config, step), **clock.rates(step)}
                board.scalars(metrics, step)
                warnings.of_collapse(metrics, step)
                bar.set_postfix_str(f"recon {metrics['loss/recon']:.3f}, kl {metrics['loss/kl']:.2f}", refresh=False)
            with clock.aside():
                if step % config.val_every == 0 or last:
                    look.draw(board, stepper.best_guess, step)
                    if held is not None:
                        found = look.errors(stepper.best_guess, ranks)
                        board.scalars(found, step)
                        warnings.of_overfit(found)
                        metrics |= found
                        keeper.judge(found["val_prior/rel_l2"], step)
                        ended = keeper.out_of_patience(step)
                caught = ranks.agree_to_stop(step, stopped)
                if step % config.save_every == 0 and not (last or ended or caught):
                    stepper.require_finite(ranks, first, step)
                    keeper.save(step)
        over = ended or step == config.steps
        stepper.require_finite(ranks, first, step)
        keeper.save(step, ended=over)
    finally:
        bar.close()
        board.close()
        source.close()
    if not over:
        raise Preempted(f"{caught} after step {step}; saved, the same command goes on")
    if ranks.first:
        metrics = runs.finish(run, step)
    if ended and step < config.steps:
        told = (step, keeper.best_step, keeper.best)
        log.warning(
            "stopped early at step %d: nothing better since step %d (val_prior/rel_l2 %.4g), which is kept", *told
        )
    return Fitted(run, step, metrics, clock.seconds)


def _source(config: FitConfig, ranks: Ranks, task: _Task, state: dict[str, Any] | None) -> tuple[Source, Order]:
    """Where kernels come from, and the order that it can serve; that of the run's beginning where it goes on."""
    before = state["data_mode"] if state else None
    mode = ranks.from_first(lambda: chosen_mode(task.stores, task.everything, config.data, ranks.device))
    if config.data.mode == "auto" and "stream" in (before, mode):
        mode = before or mode
    source = open_source(task.stores, task.everything, config.data.model_copy(update={"mode": mode}), ranks.device)
    if before and "stream" in (before, source.mode) and source.mode != before:
        raise RunMismatch(
            f"{config.run} began with data.mode {before}, which gives the examples in another order than "
            f"{source.mode}; --set data.mode={before} goes on"
        )
    if config.loss.smooth and config.loss.smooth_on == "posterior_mean" and source.mode == "stream":
        raise ConfigError(
            "loss.smooth_on posterior_mean needs the kernels of neighbours, which data.mode stream does not hold; use "
            "loss.smooth_on prior_mean or data.mode memmap"
        )
    if source.mode != "resident":
        log.warning("kernels: %s", source.why)
    return source, source.order(task.train, config.seed, config.batch)


def _validation_set(config: FitConfig, task: _Task, source: Source) -> tuple[Places, Source] | None:
    """The places validated on, and where their kernels come from."""
    if config.val is None:
        return None if task.val is None else (task.val, source)
    what = f"validation store {config.val}"
    stores = open_stores([config.val], config.data.array)
    require_same(task.identity["fingerprint"], fingerprint(stores, config.data.array), what)
    if stores[0].attrs["plan_sha256"] in task.identity["plan_sha256"]:
        raise ConfigError(f"{what} is trained on; give a store of other points, or --set data.val=0.05")
    coords = stores[0].coords
    task.conditioning.require(coords["depth_dioptre"], coords["focus_dioptre"], what)
    places = catalogue(stores, task.conditioning, config.data.array)
    few = config.data.model_copy(update={"mode": "stream"})  # of a large store a part is looked at, and read once
    return places, open_source(stores, places, few, torch.device("cpu"))


def _scalars(ranks: Ranks, terms: Terms) -> dict[str, float]:
    """The terms as they are logged, of the whole batch. Waits for the device, once."""
    names = [name for name in terms if name != "kl_dims"]
    values = ranks.mean(torch.cat([torch.stack([terms[name] for name in names]), terms["kl_dims"]])).tolist()
    active = sum(nats > ACTIVE_NATS for nats in values[len(names) :])
    return {**{f"loss/{name}": value for name, value in zip(names, values, strict=False)}, "kl/active_dims": active}


def _schedule(config: FitConfig, step: int) -> dict[str, float]:
    """What the step that has just been taken was taken with."""
    return {"train/lr": schedules.learning_rate(config, step - 1), "train/beta": schedules.beta(config, step - 1)}


def _say_how_it_goes_on(run: Path, state: dict[str, Any], ranks: Ranks) -> None:
    if state["processes"] != ranks.world:
        log.warning(
            "%s goes on from step %d with %d processes, before %d: the same batches, sums in another order",
            run,
            state["step"],
            ranks.world,
            state["processes"],
        )
