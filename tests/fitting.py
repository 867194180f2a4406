"""What the tests of training runs share: what they wrote, and a model that disturbs its own training."""

from __future__ import annotations

import json
import math
import os
import pkgutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fork, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import TIMED, Meddling, best, equal_states, logged, make_store

from psfgen.store import open_store
from psftrain import checkpoint, ddp, schedules
from psftrain.conditioning import conditioning_of
from psftrain.config import FitConfig
from psftrain.data import catalogue, open_stores
from psftrain.ddp import Ranks
from psftrain.feed import Feed
from psftrain.losses import Objective
from psftrain.models import model_class
from psftrain.sources import open_source
from psftrain.step import Stepper, Terms


def two_depths(path: Path, **changes: Any) -> Path:
    """A store of 5 x 5 points and two depths with one masked place: 49 examples."""
    return make_store(path, **{"depth": (1000.0, math.inf), "dark": [np.s_[0, 0, 0, 0, 1]], **changes})


# --- what a run wrote -------------------------------------------------------------------------------------------------


def tensorboard(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def steps_of(run: Path, tag: str) -> list[int]:
    return [event.step for event in tensorboard(run).Scalars(tag)]


def run_json(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "run.json").read_text())
    return document


def conditions(trained: Any, path: Path) -> torch.Tensor:
    """Conditions of a store's points as a run encodes them."""
    store = open_store(path)
    y, x = np.meshgrid(store.coords["field_y"], store.coords["field_x"], indexing="ij")
    depth, focus = store.coords["depth_dioptre"][0], store.coords["focus_dioptre"][0]
    return torch.from_numpy(trained.conditioning.encode(x.ravel(), y.ravel(), depth, focus))


def last(run: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return checkpoint.load(checkpoint.path_of(run, checkpoint.steps(run)[-1]))


def same_run(found: Path, expected: Path) -> None:
    """Equal to the last bit: weights, optimizer, and all that was logged, once; what the clock told aside."""
    for states in ([last(found), last(expected)], [best(found), best(expected)]):
        for key in ("model", "optimizer", "ema", "step", "best", "best_step", "ended"):
            assert equal_states(*(state[key] for state in states)), key
    assert logged(found) == logged(expected)
    keys = [(line["step"], *sorted(line)) for line in logged(found)]
    assert len(set(keys)) == len(keys)
    assert shown(found) == shown(expected)
    assert run_json(found)["status"] == run_json(expected)["status"] == "finished"
    assert run_json(found)["metrics"].keys() == run_json(expected)["metrics"].keys()


def shown(run: Path) -> dict[str, list[Any]]:
    """What TensorBoard shows, by tag: step and value of every scalar, step of every picture and text."""
    board = tensorboard(run)
    tags = board.Tags()
    scalars = {
        tag: [(event.step, None if tag in TIMED else event.value) for event in board.Scalars(tag)]
        for tag in tags["scalars"]
    }
    pictures = {tag: [event.step for event in board.Images(tag)] for tag in tags["images"]}
    return {**scalars, **pictures, **{tag: [event.step for event in board.Tensors(tag)] for tag in tags["tensors"]}}


# --- the parts of a run -----------------------------------------------------------------------------------------------


def prepared(config: FitConfig, device: str = "cpu", rank: int = 0, world: int = 1) -> tuple[Stepper, Feed]:
    """The parts of a run that take its steps."""
    ranks, dtype = (
        Ranks(rank, world, torch.device(device)),
        torch.float64 if config.precision == "float64" else torch.float32,
    )
    stores = open_stores(config.store, config.data.array)
    conditioning = conditioning_of(stores)
    places = catalogue(stores, conditioning, config.data.array)
    source = open_source(stores, places, config.data, ranks.device)
    torch.manual_seed(config.seed)
    model = model_class(config.model.name)(config.model, places.shape, conditioning).to(ranks.device, dtype)
    objective = Objective(model, config.loss, mean_over_ranks=ranks.mean)
    if config.compile:
        objective.compile()
    order = source.order(places, config.seed, config.batch)
    return Stepper(objective, model, config, ranks.device), Feed(config, places, source, order, ranks, model.latent)


def take(stepper: Stepper, feed: Feed, steps: range, by: Any = None) -> list[Terms]:
    """Take steps as a run does; `by`: what takes them, if not the stepper itself."""
    found = []
    for step in steps:
        parts = feed(step)
        stepper.set_rate(schedules.learning_rate(stepper.config, step))
        found.append({name: term.clone() for name, term in (by or stepper)(parts).items()})
    return found


# --- a model that disturbs its own training ---------------------------------------------------------------------------


def plan_meddling(what: Callable[[int], float | None]) -> None:
    Meddling.meddle, Meddling.seen = staticmethod(what), 0


def send(number: signal.Signals, at: int) -> Callable[[int], None]:
    def meddle(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    return meddle


def wear(after: int) -> Callable[[int], None]:
    """From a step on, take everything out of the decoder that it has learned."""

    def meddle(step: int) -> None:
        if step >= after:
            with torch.no_grad():
                for parameter in Meddling.model.decoder.parameters():
                    parameter.zero_()

    return meddle


# --- several processes, and signals at chosen moments -----------------------------------------------------------------


def together(world: int, work: Callable[[int], object]) -> list[int]:
    """Exit codes of `world` processes that do `work(rank)` as torchrun would start them."""
    return [wait_for(pid) for pid in begin(world, work)]


def begin(world: int, work: Callable[[int], object]) -> list[int]:
    """Their pids; each keeps to a core of its own, as far as there are any."""
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **where})
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        torch.set_num_threads(1)
        ddp.AGREE_EVERY_S = 0.05
        code = work(rank)
        if isinstance(code, int):
            os._exit(code)

    return [fork(lambda rank=rank: one(rank)) for rank in range(world)]  # type: ignore[misc]


def named(pattern: str) -> Callable[..., bool]:
    """Whether `os.replace` is about to give a file a name like this."""
    return lambda source, target: Path(target).match(pattern)


def strike_at(patch: pytest.MonkeyPatch, name: str, wanted: Callable[..., bool], number: signal.Signals) -> None:
    """Let a process get a signal when it calls a function for the first time with arguments that are `wanted`."""
    call = pkgutil.resolve_name(name)
    struck: list[int] = []

    def strike(*args: Any, **kwargs: Any) -> Any:
        if not struck and wanted(*args):
            struck.append(number)
            os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    patch.setattr(name, strike)
