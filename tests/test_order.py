"""What a step sees is a function of the seed and the step alone."""

from __future__ import annotations

import math

import pytest
import torch

from psftrain.order import Order

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
        assert torch.equal(steady.noise(step, 5), late.noise(step, 5))
        assert steady.slice_of(step, torch.ones(9)) == late.slice_of(step, torch.ones(9))
    assert torch.equal(late.batch(0), Order(3, 10, 4).batch(0)), "backwards too"


def test_the_seed_decides() -> None:
    a, b = Order(0, 100, 50), Order(1, 100, 50)
    assert not torch.equal(a.batch(0), b.batch(0))
    assert not torch.equal(a.noise(0, 4), b.noise(0, 4))


def test_global_random_numbers_are_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    batch, noise = Order(0, 20, 5).batch(3), Order(0, 20, 5).noise(3, 4)
    left = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(left, torch.rand(3))
    assert torch.equal(batch, Order(0, 20, 5).batch(3))
    assert torch.equal(noise, Order(0, 20, 5).noise(3, 4))


def test_noise_is_standard_normal_and_fresh_every_step() -> None:
    order = Order(0, 1000, 1000)
    draws = torch.stack([order.noise(step, 8) for step in range(20)])
    assert draws.shape == (20, 1000, 8)
    count = draws.numel()
    assert float(draws.mean()) == pytest.approx(0, abs=5 / math.sqrt(count))
    assert float(draws.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    correlation = torch.corrcoef(draws.flatten(1)) - torch.eye(20)
    assert float(correlation.abs().max()) < 5 / math.sqrt(8000)


def test_a_whole_slice_is_drawn_by_its_weight() -> None:
    order, draws, weights = Order(0, 4, 2), 3000, torch.tensor([1.0, 0.0, 4.0, 5.0])
    drawn = torch.tensor([order.slice_of(step, weights) for step in range(draws)]).bincount(minlength=4)
    expected = draws * weights / weights.sum()
    assert drawn[1] == 0
    assert ((drawn - expected).abs() <= 5 * expected.sqrt()).all()


# --- a window at a time -----------------------------------------------------------------------------------------------

UNITS = [(0, 4), (4, 5), (5, 12), (12, 20), (20, 23), (23, 30)]


def windowed(seed: int = 0, window: int = 9, batch: int = 4) -> Order:
    """30 examples in 6 units."""
    return Order(seed, 30, batch, UNITS, window)


@pytest.mark.parametrize("window", [0, 1, 5, 12, 29, 30, 99])
@pytest.mark.parametrize("batch", [1, 4, 7, 30])
def test_a_windowed_epoch_shows_every_example_once(window: int, batch: int) -> None:
    order, epochs = windowed(window=window, batch=batch), 4
    batches = [order.batch(step) for step in range(epochs * 30 // batch + 1)]
    assert {len(found) for found in batches} == {batch}
    seen = torch.cat(batches)
    for epoch in range(epochs):
        assert sorted(seen[epoch * 30 : (epoch + 1) * 30].tolist()) == list(range(30))


@pytest.mark.parametrize("window", [1, 9, 30])
def test_a_window_is_whole_units_shuffled(window: int) -> None:
    """At least `window` examples, but for the last of an epoch, and no unit more than that needs."""
    order = windowed(window=window, batch=5)
    for step in range(30):
        for found in order.windows(step):
            members = [i for unit in found.units for i in range(*UNITS[unit])]
            assert sorted(found.order.tolist()) == sorted(members)
            assert len(members) >= window or found.stop % 30 == 0
            last = found.units[-1]
            assert len(members) - (UNITS[last][1] - UNITS[last][0]) < window
            assert torch.equal(
                order.window_at(found.stop).order, windowed(window=window, batch=1).windows(found.stop)[0].order
            )
    assert windowed(window=30).windows(0)[0].order.tolist() != list(range(30))


def test_windows_are_of_other_units_in_every_epoch() -> None:
    order = windowed(batch=30)
    assert len({tuple(w.units for w in order.windows(epoch)) for epoch in range(8)}) > 4


@pytest.mark.parametrize("start", [1, 7, 8, 33])
def test_a_windowed_run_can_go_on_anywhere(start: int) -> None:
    steady, late = windowed(3), windowed(3)
    for step in range(start):
        steady.batch(step)
    for step in (start, start + 1, 0):
        assert torch.equal(steady.batch(step), late.batch(step))
    assert not torch.equal(windowed(4).batch(start), steady.batch(start))
