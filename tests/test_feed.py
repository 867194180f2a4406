"""What a step sees: its share of the batch, in parts, with weights, noise and beta, whatever the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import prepared, two_depths
from training import examples_of, job

from psftrain.batch import Batch, tensors_of, with_tensors
from psftrain.order import Order


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_depths(tmp_path_factory.mktemp("feed") / "s.zarr")


def test_a_batch_is_what_the_order_says(store: Path, tmp_path: Path) -> None:
    _, feed = prepared(job(store, tmp_path, seed=3))
    examples, _ = examples_of(store)
    order = Order(3, len(examples), 8)
    for step in (0, 5, 40):
        (batch,) = feed(step)
        at = order.batch(step)
        assert torch.equal(batch.kernels, examples.kernels[at])
        assert torch.equal(batch.condition, examples.condition[at])
        assert torch.equal(batch.noise, order.noise(step, 3))
        assert torch.equal(batch.weight, torch.ones(8))


def test_processes_and_parts_share_the_batch_without_a_rest(store: Path, tmp_path: Path) -> None:
    config = job(store, tmp_path, loss__noise_half=0.02)
    (whole,) = prepared(config)[1](7)
    parts: list[Batch] = []
    for rank in (0, 1):
        feed = prepared(job(store, tmp_path, loss__noise_half=0.02, accumulate=2), rank=rank, world=2)[1]
        parts += feed(7)
    assert [len(part.kernels) for part in parts] == [2, 2, 2, 2]
    for name in ("kernels", "condition", "noise", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_noisy_example_counts_less(store: Path, tmp_path: Path) -> None:
    """Half where its noise is noise_half; all where it has none."""
    (batch,) = prepared(job(store, tmp_path, loss__noise_half=0.02))[1](0)
    examples, _ = examples_of(store)
    noise = examples.noise[Order(0, len(examples), 8).batch(0)]
    torch.testing.assert_close(batch.weight, 1 / (1 + (noise / 0.02) ** 2))
    half = float(noise[0])
    (batch,) = prepared(job(store, tmp_path, loss__noise_half=half))[1](0)
    assert float(batch.weight[0]) == pytest.approx(0.5)


def test_beta_is_that_of_the_step(store: Path, tmp_path: Path) -> None:
    feed = prepared(job(store, tmp_path, steps=100, loss__beta=0.5, loss__anneal=[0.2, 0.6]))[1]
    found = [float(feed(step)[0].beta) for step in (0, 40, 60)]
    assert found == pytest.approx([0.005, 0.5 * 0.505, 0.5])


@pytest.mark.parametrize("changes", [{}, {"loss__smooth": 0}, {"loss__smooth_on": "posterior_mean", "accumulate": 2}])
def test_a_batch_is_its_tensors(store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Taken apart and put together again, as a graph does, whatever it lacks."""
    parts = prepared(job(store, tmp_path, **changes))[1](0)
    again = with_tensors(parts, [tensor.clone() for tensor in tensors_of(parts)])
    assert [part.neighbours is None for part in again] == [part.neighbours is None for part in parts]
    for one, other in zip(tensors_of(again), tensors_of(parts), strict=True):
        assert torch.equal(one, other)
