"""What a step compares is, on average, every pair of neighbours of the training set."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import Fixed

from psftrain.batch import Batch, Neighbours
from psftrain.config import LossConfig
from psftrain.losses import DIFFERENCES, Objective
from psftrain.models.base import Gaussian
from psftrain.order import Order
from psftrain.smoothness import BatchNeighbours, GridNeighbours, neighbours_of

W, S, LATENT = 2, 3, 3
SHAPES = [(5, 7), (1, 6), (6, 1), (3, 3), (1, 1), (8, 5), (2, 2), (4, 4)]
MASKED = [0.3, 0.0, 0.2, 0.5, 0.0, 0.1, 1.0, 0.0]


class Field(Fixed):
    """Prior means that bend over the field, posterior means linear in the kernels; everything has a gradient."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(LATENT, W, S, S, generator=generator, dtype=torch.float64)
        super().__init__(Gaussian(matrix[:0, 0, 0], matrix[:0, 0, 0]), self.bent, matrix)
        self.to_mean = torch.nn.Parameter(torch.randn(4, LATENT, generator=generator, dtype=torch.float64))
        self.to_posterior = torch.nn.Parameter(torch.randn(W * S * S, LATENT, generator=generator, dtype=torch.float64))

    def bent(self, condition: Tensor) -> Gaussian:
        mean = (condition @ self.to_mean).sin()
        return Gaussian(mean, torch.zeros_like(mean))

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        mean = kernels.flatten(1) @ self.to_posterior * (1 + condition[:, :1])
        return Gaussian(mean, torch.zeros_like(mean))


class Places:
    """Slices of uneven sizes with holes, in an order that is no order."""

    def __init__(self, shapes: list[tuple[int, int]] = SHAPES, masked: list[float] = MASKED) -> None:
        rng = np.random.default_rng(0)
        lit = [rng.random(shape) >= share for shape, share in zip(shapes, masked, strict=True)]
        numbers = rng.permutation(sum(int(each.sum()) for each in lit))
        self.slices, self.pairs = [], []
        for each in lit:
            slice_ = np.full(each.shape, -1)
            slice_[each], numbers = numbers[: each.sum()], numbers[each.sum() :]
            self.slices.append(torch.from_numpy(slice_))
            self.pairs.append(list(brute_force(slice_)))
        self.count = sum(int(each.sum()) for each in lit)
        self.table = torch.full((self.count, 2), -1)
        for slice_ in map(Tensor.numpy, self.slices):
            for (r, c), (k, (i, j)) in product(np.ndindex(slice_.shape), enumerate([(0, 1), (1, 0)])):
                if slice_[r, c] >= 0 and r + i < slice_.shape[0] and c + j < slice_.shape[1]:
                    self.table[slice_[r, c], k] = slice_[r + i, c + j]
        generator = torch.Generator().manual_seed(1)
        self.condition = torch.randn(self.count, 4, generator=generator, dtype=torch.float64)
        drawn = torch.rand(self.count, W, S, S, generator=generator, dtype=torch.float64)
        self.kernels = drawn / drawn.sum(dim=(-2, -1), keepdim=True)

    @property
    def every_pair(self) -> list[tuple[int, int]]:
        return [pair for pairs in self.pairs for pair in pairs]

    def batch(self, positions: Tensor, near: Neighbours | None) -> Batch:
        noise, weight = torch.zeros(len(positions), LATENT).double(), torch.ones(len(positions)).double()
        return Batch(self.kernels[positions], self.condition[positions], noise, weight, near, torch.tensor(0.0))


def brute_force(slice_: np.ndarray) -> Iterator[tuple[int, int]]:
    """Every pair of lit 4-connected neighbours once."""
    for (r, c), (i, j) in product(np.ndindex(slice_.shape), repeat=2):
        if (r, c) < (i, j) and abs(r - i) + abs(c - j) == 1 and min(slice_[r, c], slice_[i, j]) >= 0:
            yield int(slice_[r, c]), int(slice_[i, j])


PLACES = Places()


def config_of(smooth_on: str, smooth_over: str = "batch") -> LossConfig:
    return LossConfig(recon={"mse": 1.0}, prior=0, smooth=1, smooth_on=smooth_on, smooth_over=smooth_over)  # type: ignore[arg-type]


def by_hand(smooth_on: str, i: int, j: int, places: Places = PLACES) -> float:
    """The difference of two examples, in numpy."""
    model = Field()
    condition, kernels = places.condition.numpy(), places.kernels.numpy()
    mean = np.sin(condition @ model.to_mean.detach().numpy())
    if smooth_on == "prior_mean":
        return float(np.sum((mean[i] - mean[j]) ** 2))
    if smooth_on == "posterior_mean":
        a, b = (kernels[n].reshape(-1) @ model.to_posterior.detach().numpy() * (1 + condition[n, 0]) for n in (i, j))
        return float(np.sum((a - b) ** 2))
    drawn = np.exp(np.einsum("bl,lwyx->bwyx", mean[[i, j]], model.matrix.numpy()))
    a, b = drawn / drawn.sum(axis=(-2, -1), keepdims=True)
    if smooth_on == "kernels":
        return float(np.sum((a - b) ** 2) / (0.5 * np.sum(a**2) + 0.5 * np.sum(b**2)))
    return float(np.abs(a - b).sum() / W)


def full_grid(smooth_on: str, places: Places = PLACES) -> float:
    return float(np.mean([by_hand(smooth_on, i, j, places) for i, j in places.every_pair]))


def build(smooth_on: str, smooth_over: str, places: Places = PLACES) -> BatchNeighbours | GridNeighbours:
    near = neighbours_of(
        config_of(smooth_on, smooth_over), places.condition, places.table, places.slices, lambda at: places.kernels[at]
    )
    assert near is not None
    return near


def term(objective: Objective, batch: Batch) -> Tensor:
    return objective(batch)["smooth"]


# --- the estimates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth_over", ["batch", pytest.param("grid", marks=pytest.mark.campaign)])
def test_ten_thousand_draws_find_the_mean_over_all_pairs(smooth_over: str) -> None:
    """Within 1 %, on masked grids of uneven sizes, from batches of 32 drawn with replacement."""
    rng = torch.Generator().manual_seed(5)
    objective, near = Objective(Field(), config_of("prior_mean", smooth_over)), build("prior_mean", smooth_over)
    slices = [0] * 10_000
    if isinstance(near, GridNeighbours):
        slices = torch.multinomial(near.shares, 10_000, replacement=True, generator=rng).tolist()
    found = []
    with torch.no_grad():
        for slice_number in slices:
            positions = torch.randint(PLACES.count, (32,), generator=rng)
            found.append(float(term(objective, PLACES.batch(positions, near(positions, slice_number)))))
    assert len(PLACES.every_pair) > 100
    assert np.std(found) > 0.1 * np.mean(found), "draws differ, and their mean does not"
    assert np.mean(found) == pytest.approx(full_grid("prior_mean"), rel=0.01)


@pytest.mark.parametrize("smooth_on", DIFFERENCES)
@pytest.mark.parametrize("size", [1, 7, PLACES.count])
def test_an_epoch_sees_every_pair_alike(smooth_on: str, size: int) -> None:
    """The mean over the steps of whole epochs is the full grid's, and so is the gradient."""
    objective, near = Objective(Field(), config_of(smooth_on)), build(smooth_on, "batch")
    order = Order(0, PLACES.count, size)
    total = torch.zeros((), dtype=torch.float64)
    steps = PLACES.count // np.gcd(PLACES.count, size)
    for step in range(steps):
        positions = order.batch(step)
        total = total + term(objective, PLACES.batch(positions, near(positions))) / steps
    assert float(total.detach()) == pytest.approx(full_grid(smooth_on), rel=1e-9)

    everyone, pairs = torch.arange(PLACES.count), torch.tensor(PLACES.every_pair)
    weight = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
    exact = term(objective, PLACES.batch(everyone, Neighbours(PLACES.condition[:0], pairs, weight, None)))
    for a, b in zip(
        torch.autograd.grad(total, list(objective.parameters()), allow_unused=True),
        torch.autograd.grad(exact, list(objective.parameters()), allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smooth_on", DIFFERENCES)
def test_a_slice_is_all_its_pairs(smooth_on: str) -> None:
    """Weighted with their number, the slices come to the full grid."""
    objective, near = Objective(Field(), config_of(smooth_on, "grid")), build(smooth_on, "grid")
    assert isinstance(near, GridNeighbours)
    assert near.shares.tolist() == [len(pairs) for pairs in PLACES.pairs]
    positions, found = torch.arange(4), []
    for number, pairs in enumerate(PLACES.pairs):
        with torch.no_grad():
            found.append(float(term(objective, PLACES.batch(positions, near(positions, number)))))
        expected = np.mean([by_hand(smooth_on, i, j) for i, j in pairs]) if pairs else 0
        assert found[-1] == pytest.approx(expected, rel=1e-9)
    assert np.average(found, weights=near.shares) == pytest.approx(full_grid(smooth_on), rel=1e-9)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(processes: int) -> None:
    """Their mean is what one alone would find."""
    objective, near = Objective(Field(), config_of("prior_mean")), build("prior_mean", "batch")
    positions = Order(0, PLACES.count, 16).batch(3)
    parts = positions.chunk(processes)
    found = [float(term(objective, PLACES.batch(part, near(part))).detach()) for part in parts]
    assert np.mean(found) == pytest.approx(float(term(objective, PLACES.batch(positions, near(positions))).detach()))


# --- what it is made of -----------------------------------------------------------------------------------------------


def batch_neighbours(*, fixed_shapes: bool) -> BatchNeighbours:
    near = build("posterior_mean", "batch")
    assert isinstance(near, BatchNeighbours)
    if fixed_shapes:  # as on a GPU
        near._row = None
    return near


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_each_example_meets_its_right_and_lower_neighbour(fixed_shapes: bool) -> None:
    near = batch_neighbours(fixed_shapes=fixed_shapes)
    for _ in range(5):
        positions = torch.randperm(PLACES.count)[:12]
        found = near(positions)
        everyone = torch.cat([PLACES.condition[positions], found.places])
        kernels = torch.cat([PLACES.kernels[positions], found.kernels])
        assert found.pairs[:, 0].tolist() == [i for i in range(12) for _ in (0, 1)]
        for (i, j), weight, (position, k) in zip(
            found.pairs.tolist(), found.weight.tolist(), product(positions.tolist(), (0, 1)), strict=True
        ):
            other = int(PLACES.table[position, k])
            assert weight == pytest.approx(PLACES.count / (len(PLACES.every_pair) * 12) if other >= 0 else 0)
            other = other if other >= 0 else position
            assert torch.equal(everyone[i], PLACES.condition[position])
            assert torch.equal(everyone[j], PLACES.condition[other])
            assert torch.equal(kernels[j], PLACES.kernels[other])


def test_on_a_cpu_no_place_is_asked_twice() -> None:
    """Nor one that the batch has; also where an epoch ends within a batch and an example is there twice."""
    near = batch_neighbours(fixed_shapes=False)
    for positions in (torch.arange(12), torch.tensor([3, 3, 4, 0, 1])):
        found = near(positions)
        everyone = [tuple(place) for place in torch.cat([PLACES.condition[positions.unique()], found.places]).tolist()]
        assert len(set(everyone)) == len(everyone)
        assert len(found.places) < 2 * len(positions)
        fixed = batch_neighbours(fixed_shapes=True)(positions)
        of = torch.cat([PLACES.condition[positions], found.places])[found.pairs]
        assert torch.equal(of, torch.cat([PLACES.condition[positions], fixed.places])[fixed.pairs])
        assert torch.equal(found.weight, fixed.weight)


def test_every_step_of_a_graph_has_one_shape() -> None:
    """Whatever the batch and the slice, so that a captured step can take them."""
    positions = torch.arange(8)
    for near in (batch_neighbours(fixed_shapes=True), build("posterior_mean", "grid")):
        steps = [near(positions + number, number) for number in range(len(SHAPES))]
        assert len({tuple(tuple(each.shape) for each in step if each is not None) for step in steps}) == 1
        for step in steps:
            assert int(step.pairs.max()) < len(positions) + len(step.places)


@pytest.mark.parametrize("smooth_on", DIFFERENCES)
@pytest.mark.parametrize("smooth_over", ["batch", "grid"])
def test_a_point_without_neighbours_costs_nothing(smooth_on: str, smooth_over: str) -> None:
    """A batch of such points alone, or a slice of one: nor is its gradient anything but 0."""
    objective, near = Objective(Field(), config_of(smooth_on, smooth_over)), build(smooth_on, smooth_over)
    lonely = (PLACES.table < 0).all(dim=1).nonzero()[:, 0]
    assert len(lonely) > 2
    found = term(objective, PLACES.batch(lonely, near(lonely, SHAPES.index((1, 1)))))
    assert float(found.detach()) == 0
    for gradient in torch.autograd.grad(found, list(objective.parameters()), allow_unused=True):
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("smooth_over", ["batch", "grid"])
def test_kernels_are_read_for_the_posterior_alone(smooth_over: str) -> None:
    for smooth_on in DIFFERENCES:
        found = build(smooth_on, smooth_over)(torch.arange(5), 0)
        assert (found.kernels is not None) == (smooth_on == "posterior_mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smooth_over", ["batch", "grid"])
def test_weights_are_of_the_conditions_precision(smooth_over: str, dtype: torch.dtype) -> None:
    near = neighbours_of(
        config_of("prior_mean", smooth_over), PLACES.condition.to(dtype), PLACES.table, PLACES.slices, lambda at: at
    )
    assert near is not None
    found = near(torch.arange(5), 0)
    assert (found.places.dtype, found.weight.dtype) == (dtype, dtype)


@pytest.mark.parametrize("smooth_over", ["batch", "grid"])
def test_nothing_to_compare(smooth_over: str) -> None:
    """No weight, or no two points beside each other."""
    config = config_of("prior_mean", smooth_over)
    points = Places([(1, 1), (1, 1)], [0.0, 0.0])
    given: Any = (points.condition, points.table, points.slices, lambda at: at)
    assert neighbours_of(config, *given) is None
    given = (PLACES.condition, PLACES.table, PLACES.slices, lambda at: at)
    assert neighbours_of(config.model_copy(update={"smooth": 0.0}), *given) is None
    assert neighbours_of(config, *given) is not None


# --- the differences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth_on", ["kernels", "kernels_tv"])
def test_kernels_differ_by_0_to_2(smooth_on: str) -> None:
    difference = DIFFERENCES[smooth_on]
    left, right = torch.zeros(2, 1, W, S, S)
    left[..., 0], right[..., 2] = 1 / S, 1 / S
    assert difference(left, left).tolist() == [0]
    assert difference(left, right).tolist() == pytest.approx([2])
    a, b = PLACES.kernels[:20], PLACES.kernels[20:40]
    assert torch.allclose(difference(a, b), difference(b, a))
    assert ((difference(a, b) > 0) & (difference(a, b) < 2)).all()


def test_the_energy_of_a_difference_does_not_see_the_bins() -> None:
    """The same kernels over twice the bins a side, a quarter of the value each."""
    a, b = PLACES.kernels[:20], PLACES.kernels[20:40]
    finer = [each.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4 for each in (a, b)]
    for name in ("kernels", "kernels_tv"):
        assert torch.allclose(DIFFERENCES[name](*finer), DIFFERENCES[name](a, b))
