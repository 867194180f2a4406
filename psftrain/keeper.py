"""Which weights of a run are kept: the last few, and the best on the validation set. The first process writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from psfgen.store.schema import plain
from psftrain import checkpoint
from psftrain.board import Board
from psftrain.config import FitConfig
from psftrain.ddp import Ranks
from psftrain.step import Stepper


class Keeper:
    """Saves what `stepper` has come to; `about` is what else a checkpoint tells. `best` is the smallest error."""

    def __init__(
        self, run: Path, config: FitConfig, ranks: Ranks, stepper: Stepper, board: Board, about: dict[str, Any]
    ) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.stepper, self.board, self.about = stepper, board, about
        self.best, self.best_step = math.inf, 0

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.stepper.load(state)
        self.best, self.best_step = state["best"], state["best_step"]

    def judge(self, error: float, step: int) -> None:
        """Keep the weights of this step if they err less on the validation set than any before."""
        if error < self.best:
            self.best, self.best_step = error, step
            self._write(self._best_path, step)

    def out_of_patience(self, step: int) -> bool:
        """Whether `patience` validations have brought nothing better."""
        patience = self.config.patience
        return patience is not None and step - self.best_step >= patience * self.config.val_every

    def save(self, step: int, *, ended: bool = False) -> None:
        """Keep the weights of this step, from which a run goes on unless it has `ended`.

        What was logged is on disk before that. Raises FitError where the processes do not hold the same weights.
        """
        self.ranks.require_equal(self.stepper.parameters, step)
        self.board.flush()
        if math.isinf(self.best) or not self._best_path.exists():  # without validation best = last
            self._write(self._best_path, step, ended=ended)
        self._write(checkpoint.path_of(self.run, step), step, ended=ended)
        if self.ranks.first:
            checkpoint.prune(self.run, self.config.keep)

    @property
    def _best_path(self) -> Path:
        return self.run / "checkpoints" / "best.pt"

    def _write(self, path: Path, step: int, *, ended: bool = False) -> None:
        if not self.ranks.first:
            return
        at = {"step": step, "best": self.best, "best_step": self.best_step, "ended": ended}
        about = {"processes": self.ranks.world, "scheduler": {"name": self.config.schedule}, **self.about}
        checkpoint.save(path, {**self.stepper.state(), **at, **about, "config": plain(self.config.model_dump())})
