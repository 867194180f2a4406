"""The plain network that a model is measured against: fair, of the same size, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import examples_of, make_store

from psftrain import losses
from psftrain.regression import Regression, octaves_for, regress


@pytest.mark.parametrize("parameters", [60_000, 126_560, 400_000])
def test_it_is_of_the_size_of_the_model(parameters: int) -> None:
    network = Regression((3, 15, 15), 1, parameters)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize(("parameters", "width"), [(0, 64), (10**9, 512)])
def test_its_width_stays_within_what_trains_well(parameters: int, width: int) -> None:
    """A model without weights, and one of any size."""
    assert Regression((3, 15, 15), 0, parameters).net[0].out_features == width


def test_octaves_follow_the_grid() -> None:
    """2^(octaves - 1) stays well under half the points a side."""
    assert [octaves_for(grid) for grid in (1, 5, 10, 20, 40)] == [0, 0, 1, 2, 2]


def test_it_gives_kernels(tmp_path: Path) -> None:
    """None negative, every channel with the sum 1."""
    examples, conditioning = examples_of(make_store(tmp_path / "train.zarr", grid=4))
    network = regress(examples, conditioning.grid, parameters=1000, steps=3, seed=0)
    found = network(examples.condition)
    assert found.shape == examples.kernels.shape
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=(-2, -1)), torch.ones(len(found), 3))


def test_it_learns_what_it_is_shown(tmp_path: Path) -> None:
    """The training kernels to some percent, and those between them far better than the mean kernel."""
    train, conditioning = examples_of(make_store(tmp_path / "train.zarr", grid=6))
    held, _ = examples_of(make_store(tmp_path / "held.zarr", grid=6, layout="cells", field_max=1.0))
    held.condition[:, :2] *= 5 / 6  # examples_of scales by the reach of the cells' own field
    network = regress(train, conditioning.grid, parameters=10_000, steps=1000, seed=0)
    assert losses.rel_l2(network(train.condition), train.kernels).mean() < 0.03
    mean = train.kernels.mean(dim=0).expand_as(held.kernels)
    assert losses.rel_l2(network(held.condition), held.kernels).mean() < losses.rel_l2(mean, held.kernels).mean() / 3


def test_a_seed_makes_the_network_and_nothing_else_is_disturbed(tmp_path: Path) -> None:
    examples, conditioning = examples_of(make_store(tmp_path / "train.zarr", grid=4))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        regress(examples, conditioning.grid, parameters=1000, steps=5, seed=seed)(examples.condition)
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)
