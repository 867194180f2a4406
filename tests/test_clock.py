"""How fast a run trains: steps alone are counted, not what is done beside them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from psftrain.clock import Clock

CPU = torch.device("cpu")


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that moves when it is told to."""
    now = 100.0

    def moved(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    return moved


def test_rates_are_of_the_steps_since_the_last(wait: Callable[[float], None]) -> None:
    clock = Clock(40, 32, CPU)
    wait(4.0)
    assert clock.rates(50) == {"train/steps_per_s": 2.5, "train/kernels_per_s": 80.0, "train/data_share": 0.0}
    wait(1.0)
    assert clock.rates(60)["train/steps_per_s"] == 10
    assert clock.seconds == 5


def test_time_for_data_is_a_share_and_time_beside_is_none(wait: Callable[[float], None]) -> None:
    clock = Clock(0, 8, CPU)
    with clock.data():
        wait(1.0)
    wait(3.0)
    with clock.aside():
        wait(100.0)
    found = clock.rates(8)
    assert (found["train/steps_per_s"], found["train/data_share"]) == (2.0, 0.25)
    wait(2.0)
    assert clock.rates(9) == {"train/steps_per_s": 0.5, "train/kernels_per_s": 4.0, "train/data_share": 0.0}
    assert clock.seconds == 106, "everything included"


@pytest.mark.gpu
def test_a_gpu_tells_its_memory() -> None:
    clock = Clock(0, 8, torch.device("cuda"))
    held = torch.zeros(2**28, device="cuda")
    assert clock.rates(1)["gpu/memory_gib"] >= held.nbytes / 2**30
