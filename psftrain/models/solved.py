"""Models that are found by least squares at once, not by steps of gradient descent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psfgen.errors import RunMismatch
from psfgen.store import Store
from psftrain.data import COPY, STORE, Places
from psftrain.models.base import CVAE


class SolvedCVAE(CVAE):
    """A model whose numbers come from `solve`; until then it knows nothing and answers with flat kernels.

    Its tensors are buffers whose shapes depend on what was solved, so they are made when they are loaded.
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def require(self, train: Places) -> None:
        """Raise RunMismatch for places that this model cannot learn from."""

    @abstractmethod
    def solve(self, stores: list[Store], train: Places, seed: int, done: Callable[[float], None]) -> dict[str, float]:
        """Learn from the places of some stores; `done` is told what share of the work is. Returns what to log.

        Raises FitError where that cannot be.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Make what follows from the tensors that are held."""

    def hold(self, name: str, value: Tensor) -> None:
        """Keep a tensor with the model."""
        self.register_buffer(name, value)

    @property
    def solved(self) -> bool:
        return bool(self._buffers)

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def flat(self, count: int) -> Tensor:
        """Kernels [count, W, y, x] of a model that knows nothing."""
        return torch.full((count, *self.shape), 1 / (self.shape[1] * self.shape[2]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, value in state_dict.items():
            if key.startswith(prefix) and "." not in (name := key.removeprefix(prefix)):
                self.register_buffer(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.solved:
            self.prepare()


def require_one_store(name: str, train: Places) -> None:
    """Raise RunMismatch where places are of several stores."""
    count = len(np.unique(train.index[:, STORE]))
    if count > 1:
        raise RunMismatch(
            f"model {name} takes one store, of one lens or of copies of it, here are {count}; `psfgen merge` joins "
            "stores of one render, and --set model.name=neural_cvae takes several"
        )


def require_one_specimen(name: str, train: Places) -> None:
    """Raise RunMismatch where places are of several copies or stores."""
    require_one_store(name, train)
    count = len(np.unique(train.index[:, COPY]))
    if count > 1:
        raise RunMismatch(
            f"model {name} takes one specimen of a lens, the store holds {count} copies; model field_cvae takes them"
        )
