"""What a step sees is a function of the seed and the step alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training import job

from psftrain.order import Order, learning_rate

# --- examples and noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch"), [(10, 3), (10, 10), (7, 5), (64, 64), (9, 1)])
def test_every_epoch_shows_every_example_once(examples: int, batch: int) -> None:
    """Epochs follow seamlessly: no batch is cut short."""
    order = Order(0, examples, batch)
    epochs = 6
    seen = torch.cat([order.batch(step) for step in range(epochs * examples // batch + 1)])
    assert {len(order.batch(step)) for step in range(5)} == {batch}
    for epoch in range(epochs):
        assert sorted(seen[epoch * examples : (epoch + 1) * examples].tolist()) == list(range(examples))


def test_epochs_are_in_different_orders() -> None:
    order = Order(0, 50, 50)
    assert len({tuple(order.batch(step).tolist()) for step in range(8)}) == 8


@pytest.mark.parametrize("start", [1, 2, 5, 17, 100])
def test_a_run_can_go_on_anywhere(start: int) -> None:
    """The same batches and noise, whatever was asked before, in whatever order."""
    steady, late = Order(3, 10, 4), Order(3, 10, 4)
    for step in range(start):
        steady.batch(step)
    for step in (start, start + 1):
        assert torch.equal(steady.batch(step), late.batch(step))
        assert torch.equal(steady.noise(step, 5, 3)[0], late.noise(step, 5, 3)[0])
        assert steady.noise(step, 5, 3)[1] == late.noise(step, 5, 3)[1]
    assert torch.equal(late.batch(0), Order(3, 10, 4).batch(0)), "backwards too"


def test_the_seed_decides() -> None:
    a, b = Order(0, 100, 50), Order(1, 100, 50)
    assert not torch.equal(a.batch(0), b.batch(0))
    assert not torch.equal(a.noise(0, 4, 1)[0], b.noise(0, 4, 1)[0])


def test_global_random_numbers_are_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    batch, noise = Order(0, 20, 5).batch(3), Order(0, 20, 5).noise(3, 4, 2)[0]
    left = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(left, torch.rand(3))
    assert torch.equal(batch, Order(0, 20, 5).batch(3))
    assert torch.equal(noise, Order(0, 20, 5).noise(3, 4, 2)[0])


def test_noise_is_standard_normal_and_fresh_every_step() -> None:
    order = Order(0, 1000, 1000)
    draws = torch.stack([order.noise(step, 8, 1)[0] for step in range(20)])
    assert draws.shape == (20, 1000, 8)
    count = draws.numel()
    assert float(draws.mean()) == pytest.approx(0, abs=5 / math.sqrt(count))
    assert float(draws.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    correlation = torch.corrcoef(draws.flatten(1)) - torch.eye(20)
    assert float(correlation.abs().max()) < 5 / math.sqrt(8000)


@pytest.mark.parametrize("slices", [0, 1, 3])
def test_smoothness_looks_at_every_slice_in_turn(slices: int) -> None:
    order = Order(0, 4, 2)
    seen = {order.noise(step, 2, slices)[1] for step in range(60)}
    assert seen == set(range(max(slices, 1)))


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
    config = job(Path("s"), Path("r"), steps=34, warmup=4, lr=0.5, schedule="cosine")
    assert learning_rate(config, step) == pytest.approx(0.5 * expected)


def test_a_constant_rate_stays() -> None:
    config = job(Path("s"), Path("r"), steps=50, warmup=0, lr=1e-4, schedule="constant")
    assert {learning_rate(config, step) for step in range(60)} == {1e-4}


def test_the_rate_never_leaves_its_range() -> None:
    """Nor where the warm-up is as long as the run or longer."""
    for warmup in (0, 5, 20, 50):
        config = job(Path("s"), Path("r"), steps=20, warmup=warmup, lr=1.0, schedule="cosine")
        rates = [learning_rate(config, step) for step in range(20)]
        assert 0 < min(rates) <= max(rates) <= 1
        assert rates[:warmup] == sorted(rates[:warmup])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
