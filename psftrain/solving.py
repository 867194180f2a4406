"""A run of a model that is solved at once: the same files as those of one that is trained, from one step."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from psfgen.errors import ConfigError, Preempted, progress
from psfgen.store import Store
from psfgen.store.schema import plain
from psftrain import checkpoint
from psftrain import run as runs
from psftrain.board import Board
from psftrain.conditioning import Conditioning
from psftrain.config import FitConfig
from psftrain.data import Places
from psftrain.ddp import Ranks
from psftrain.models import model_class
from psftrain.models.solved import SolvedCVAE
from psftrain.sources import Source
from psftrain.validation import Look

PARTS = 100  # of the progress bar


class Task(Protocol):
    """What is to be learned, as `psftrain.fit` finds it out."""

    @property
    def stores(self) -> list[Store]: ...
    @property
    def conditioning(self) -> Conditioning: ...
    @property
    def everything(self) -> Places: ...
    @property
    def train(self) -> Places: ...
    @property
    def split(self) -> dict[str, Any]: ...
    @property
    def identity(self) -> dict[str, Any]: ...


def is_solved(name: str) -> bool:
    """Whether a model is solved at once. Raises ConfigError for an unknown name."""
    return issubclass(model_class(name), SolvedCVAE)


def require_solvable(config: FitConfig) -> None:
    """Raise ConfigError for what only steps of gradient descent can do."""
    name = config.model.name
    if config.steps > 1:
        raise ConfigError(
            f"steps {config.steps}: model {name} is solved in one step; leave steps out, or train by steps with "
            "--set model.name=neural_cvae"
        )
    if config.init is not None:
        raise ConfigError(f"init {config.init}: model {name} is solved anew from the kernels; leave --init out")


def solve(
    config: FitConfig, run: Path, task: Task, source: Source, held: tuple[Places, Source] | None, stopped: list[str]
) -> tuple[int, dict[str, float], float]:
    """Solve `config` into its run directory: (step, what was logged, seconds).

    Raises Preempted where a signal stops it: nothing is saved then, and the same command begins anew.
    """
    look = Look((task.train, source), held, torch.device("cpu"), torch.float32)
    model = model_class(config.model.name)(config.model, task.everything.shape, task.conditioning)
    assert isinstance(model, SolvedCVAE)
    model.require(task.train)
    facts: dict[str, Any] = {"solved": True, "processes": 1, "examples": len(task.train)}
    facts |= {"masked": task.everything.masked}
    facts |= {"split": task.split, "validation": 0 if held is None else len(held[0]), "data_mode": source.mode}
    runs.prepare(run, config, task.identity, facts)
    board, started = Board(run, 0), time.perf_counter()
    board.text("config", yaml.safe_dump(plain(config.model_dump()), sort_keys=False), 0)
    metrics: dict[str, float] = {}
    bar = progress(PARTS, f"fit {config.model.name}", "%")

    def done(share: float) -> None:
        bar.update(round(PARTS * share) - bar.n)
        if stopped:
            raise Preempted(f"{stopped[0]} while the model was being solved; the same command begins anew")

    try:
        if config.steps:
            metrics = model.solve(task.stores, task.train, config.seed, done)
            metrics["train/seconds"] = time.perf_counter() - started
        if held is not None:
            metrics |= look.errors(model, Ranks(0, 1, torch.device("cpu")))
        board.scalars(metrics, config.steps)
        look.draw(board, model, config.steps)
    finally:
        bar.close()
        board.close()
    runs.prepare(run, config, task.identity, {**facts, "parameters": model.numbers})
    _save(run, config, model, {**task.identity, "data_mode": source.mode}, metrics.get("val_prior/rel_l2", math.inf))
    return config.steps, metrics, time.perf_counter() - started


def _save(run: Path, config: FitConfig, model: SolvedCVAE, about: dict[str, Any], best: float) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": {},
        "ema": None,
        "step": config.steps,
        "best": best,
        "best_step": config.steps,
        "ended": True,
        "processes": 1,
        "scheduler": {"name": config.schedule},
        "config": plain(config.model_dump()),
        **about,
    }
    checkpoint.save(run / "checkpoints" / "best.pt", state)
    checkpoint.save(checkpoint.path_of(run, config.steps), state)
