"""What changes in the course of a run, against PyTorch's own schedulers and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler
from training import job

from psftrain.config import FitConfig
from psftrain.schedules import beta, learning_rate

SCHEDULES = ["cosine", "restarts", "constant"]


def run_of(**settings: Any) -> FitConfig:
    return job(Path("s"), Path("r"), **settings)


def torch_rates(kind: type[LRScheduler], steps: int, lr: float, **settings: Any) -> list[float]:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = kind(optimizer, eta_min=0.01 * lr, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 4),  # warm-up, from its first step on
        (1, 2 / 4),
        (3, 4 / 4),
        (4, 1.0),
        (4 + 15, 0.01 + 0.99 / 2),  # half way down
        (4 + 10, 0.01 + 0.99 * 0.75),  # (1 + cos(pi / 3)) / 2
        (34, 0.01),
    ],
)
def test_warm_up_then_half_a_cosine_down_to_one_percent(step: int, expected: float) -> None:
    config = run_of(steps=34, warmup=4, lr=0.5, schedule="cosine")
    assert learning_rate(config, step) == pytest.approx(0.5 * expected)


def test_the_cosine_is_that_of_pytorch() -> None:
    config = run_of(steps=50, warmup=10, lr=0.2, schedule="cosine")
    expected = torch_rates(CosineAnnealingLR, 40, 0.2, T_max=40)
    assert [learning_rate(config, step) for step in range(10, 50)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("restarts", "first", "warmup"), [(0, 20, 0), (1, 10, 5), (2, 7, 0), (3, 4, 3), (5, 1, 2)])
def test_restarts_are_those_of_pytorch_and_fill_the_run(restarts: int, first: int, warmup: int) -> None:
    """T_mult = 2: the parts are first x (1, 2, 4, ...) steps."""
    length = first * (2 ** (restarts + 1) - 1)
    config = run_of(steps=warmup + length, warmup=warmup, lr=0.2, schedule="restarts", restarts=restarts)
    expected = torch_rates(CosineAnnealingWarmRestarts, length, 0.2, T_0=first, T_mult=2)
    found = [learning_rate(config, warmup + step) for step in range(length)]
    assert found == pytest.approx(expected, rel=1e-6)
    assert [step for step in range(length) if found[step] == 0.2] == [first * (2**k - 1) for k in range(restarts + 1)]


@pytest.mark.parametrize(("steps", "restarts"), [(100, 1), (97, 2), (1000, 3), (75, 4)])
def test_a_run_that_the_parts_do_not_divide_ends_low_all_the_same(steps: int, restarts: int) -> None:
    config = run_of(steps=steps, warmup=0, lr=1.0, schedule="restarts", restarts=restarts)
    rates = [learning_rate(config, step) for step in range(steps)]
    rises = [step for step in range(1, steps) if rates[step] > rates[step - 1]]
    first = steps / (2 ** (restarts + 1) - 1)
    assert rises == [math.ceil(first * (2**k - 1) - 1e-9) for k in range(1, restarts + 1)]
    assert learning_rate(config, steps) == pytest.approx(0.01)
    assert rates[-1] < 0.03


def test_a_constant_rate_stays() -> None:
    config = run_of(steps=50, warmup=0, lr=1e-4, schedule="constant")
    assert {learning_rate(config, step) for step in range(60)} == {1e-4}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5, 20, 50])
@pytest.mark.parametrize("restarts", [0, 3, 20])
def test_the_rate_never_leaves_its_range(schedule: str, warmup: int, restarts: int) -> None:
    """Nor where the warm-up is as long as the run or longer, or a part shorter than a step."""
    config = run_of(steps=20, warmup=warmup, lr=1.0, schedule=schedule, restarts=restarts)
    rates = [learning_rate(config, step) for step in range(20)]
    assert 0.01 <= min(rates) <= max(rates) <= 1
    assert rates[:warmup] == sorted(rates[:warmup])
    if schedule != "restarts":
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# --- the weight of the KL ---------------------------------------------------------------------------------------------


def test_without_anneal_beta_stays() -> None:
    assert {beta(run_of(steps=20, loss__beta=0.3), step) for step in range(20)} == {0.3}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.01), (10, 0.01), (20, 0.01), (30, 0.2575), (40, 0.505), (59, 0.97525), (60, 1.0), (61, 1.0), (99, 1.0)],
)
def test_beta_is_held_at_a_hundredth_then_ramps_to_the_whole(step: int, expected: float) -> None:
    config = run_of(steps=100, loss__beta=2e-3, loss__anneal=[0.2, 0.6])
    assert beta(config, step) == pytest.approx(2e-3 * expected)


@pytest.mark.parametrize("anneal", [[0.0, 0.0], [0.0, 1.0], [0.3, 0.3], [0.31, 0.77], [1.0, 1.0]])
def test_beta_never_falls_and_never_leaves_its_range(anneal: list[float]) -> None:
    config = run_of(steps=30, loss__beta=1.0, loss__anneal=anneal)
    found = [beta(config, step) for step in range(31)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(1.0 if anneal[1] == 0 else 0.01)
    assert found[-1] == 1.0
    for step, value in enumerate(found):
        assert step > anneal[0] * 30 or step >= anneal[1] * 30 or value == pytest.approx(0.01)
        assert step < anneal[1] * 30 or value == 1.0
