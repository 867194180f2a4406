"""How fast a run trains, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Times the steps since it last told; what is done beside them (`aside`) does not count."""

    def __init__(self, step: int, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.begun = time.monotonic()
        self._restart(step)

    @property
    def seconds(self) -> float:
        """Since the start, everything included."""
        return time.monotonic() - self.begun

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time spent on getting batches."""
        started = time.perf_counter()
        yield
        self._data += time.perf_counter() - started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent on something else than steps."""
        started = time.perf_counter()
        yield
        self._aside += time.perf_counter() - started

    def rates(self, step: int) -> dict[str, float]:
        """Scalars of the steps since the last call; the device must have finished them."""
        worked = time.perf_counter() - self._started - self._aside
        pace = (step - self._step) / worked
        found = {
            "train/steps_per_s": pace,
            "train/kernels_per_s": pace * self.batch,
            "train/data_share": self._data / worked,
        }
        if self.device.type == "cuda":
            found["gpu/memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._restart(step)
        return found

    def _restart(self, step: int) -> None:
        self._step, self._started, self._data, self._aside = step, time.perf_counter(), 0.0, 0.0
