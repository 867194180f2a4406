"""Every loss term against a computation by hand, scipy or torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from training import Fixed

from psftrain.config import LossConfig
from psftrain.data import neighbour_pairs
from psftrain.losses import ACTIVE_NATS, RECONSTRUCTIONS, Objective, kl_per_dim, mse, nll, rel_l2
from psftrain.models.base import CVAE, Gaussian

B, W, S, LATENT = 4, 2, 3, 3


def kernels(seed: int, count: int = B, side: int = S, waves: int = W) -> Tensor:
    """Random kernels [count, waves, side, side], each channel summing to 1."""
    draw = np.random.default_rng(seed).dirichlet(np.full(side * side, 0.7), (count, waves))
    return torch.tensor(draw, dtype=torch.float32).view(count, waves, side, side)


def gaussian(seed: int, count: int = B) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(torch.randn(count, LATENT, generator=generator), torch.randn(count, LATENT, generator=generator))


# --- reconstructions --------------------------------------------------------------------------------------------------


def test_mse_by_hand() -> None:
    found, truth = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]], [[[0.5, 0.5]]]])
    assert float(mse(found, truth)) == pytest.approx((1 + 0 + 0.25 + 0.25) / 4)


def test_rel_l2_by_hand() -> None:
    """The norm runs over the whole stack of wavelengths of an example, the mean over examples."""
    truth = torch.tensor([[[[3.0]], [[4.0]]], [[[1.0]], [[0.0]]]])
    found = torch.tensor([[[[0.0]], [[4.0]]], [[[1.0]], [[2.0]]]])
    assert float(rel_l2(found, truth)) == pytest.approx((3 / 5 + 2 / 1) / 2)


def test_nll_is_the_divergence_from_the_truth() -> None:
    found, truth = kernels(1), kernels(2)
    expected = scipy.stats.entropy(*(k.double().view(B * W, -1).numpy() for k in (truth, found)), axis=1).mean()
    assert float(nll(found, truth)) == pytest.approx(expected, rel=1e-4)


def test_nll_differs_from_the_cross_entropy_by_the_entropy_of_the_truth() -> None:
    """So its gradient is that of the multinomial likelihood of the rays."""
    truth = kernels(2)
    found = kernels(1).requires_grad_()
    nll(found, truth).backward()
    assert found.grad is not None
    expected = -truth / found.detach() / (B * W)
    assert torch.allclose(found.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_nll_is_never_negative_and_zero_only_where_equal(seed: int) -> None:
    found, truth = kernels(seed), kernels(seed + 100)
    assert float(nll(truth, truth)) == 0
    assert float(nll(found, truth)) > 0.01
    nearby = truth + 0.01 * (found - truth)
    assert -1e-7 < float(nll(nearby, truth)) < float(nll(found, truth))


def test_nll_takes_kernels_with_empty_bins() -> None:
    """A bin no ray fell into costs nothing, a bin that is empty in the answer costs much but not infinity."""
    truth, other = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    truth[..., 0], other[..., 1] = 1, 1
    assert float(nll(truth, truth)) == 0
    assert 10 < float(nll(other, truth)) < math.inf
    half = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    assert float(nll(half, truth)) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
class TestEveryReconstruction:
    """The contract of the table."""

    def test_least_where_equal(self, name: str) -> None:
        loss, truth, other = RECONSTRUCTIONS[name], kernels(3), kernels(4)
        values = [float(loss(truth + share * (other - truth), truth)) for share in (0, 0.1, 0.3, 1)]
        assert values[0] == pytest.approx(0, abs=1e-6)
        assert values == sorted(values)
        assert values[1] > 1e-4

    def test_is_a_mean_over_the_batch(self, name: str) -> None:
        loss, truth, found = RECONSTRUCTIONS[name], kernels(3), kernels(4)
        each = [float(loss(found[i : i + 1], truth[i : i + 1])) for i in range(B)]
        assert loss(found, truth).shape == ()
        assert float(loss(found, truth)) == pytest.approx(np.mean(each), rel=1e-5)

    @pytest.mark.parametrize("start", ["equal", "other", "empty bins"])
    def test_gradient_is_finite(self, name: str, start: str) -> None:
        truth = kernels(3)
        found = {"equal": truth.clone(), "other": kernels(4), "empty bins": torch.eye(S).div(S).expand_as(truth)}[start]
        found = found.clone().requires_grad_()
        RECONSTRUCTIONS[name](found, truth).backward()
        assert found.grad is not None
        assert found.grad.isfinite().all()


# --- the divergence of posterior from prior ---------------------------------------------------------------------------


def test_kl_against_torch_distributions() -> None:
    q, p = gaussian(1, 50), gaussian(2, 50)
    expected = kl_divergence(Normal(q.mean, (q.logvar / 2).exp()), Normal(p.mean, (p.logvar / 2).exp()))
    assert torch.allclose(kl_per_dim(q, p), expected, rtol=1e-4, atol=1e-5)


def test_kl_by_hand() -> None:
    """1/2 [log vp - log vq + (vq + (mq - mp)^2) / vp - 1]."""
    q = Gaussian(torch.tensor([[1.0]]), torch.tensor([[math.log(4.0)]]))
    p = Gaussian(torch.tensor([[3.0]]), torch.tensor([[math.log(2.0)]]))
    assert float(kl_per_dim(q, p)) == pytest.approx(0.5 * (math.log(2) - math.log(4) + (4 + 4) / 2 - 1))
    assert float(kl_per_dim(q, q)) == 0


def test_a_draw_is_mean_plus_standard_deviation_times_noise() -> None:
    found = Gaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[math.log(9.0), 0.0]]))
    assert found.sample(torch.tensor([[2.0, 0.5]])).tolist() == [pytest.approx([1 + 3 * 2, -2 + 0.5])]


# --- neighbours -------------------------------------------------------------------------------------------------------


def brute_force_pairs(slice_: np.ndarray) -> set[frozenset[int]]:
    rows, columns = slice_.shape
    found = set()
    for (r, c), (i, j) in product(product(range(rows), range(columns)), repeat=2):
        if abs(r - i) + abs(c - j) == 1 and slice_[r, c] >= 0 and slice_[i, j] >= 0:
            found.add(frozenset({r * columns + c, i * columns + j}))
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 2), (3, 5), (6, 6)])
@pytest.mark.parametrize("masked", [0, 0.3, 1])
def test_neighbours_are_four_connected_and_lit(shape: tuple[int, int], masked: float) -> None:
    rng = np.random.default_rng(shape)
    slice_ = np.where(rng.random(shape) < masked, -1, np.arange(shape[0] * shape[1]).reshape(shape))
    pairs = neighbour_pairs(torch.from_numpy(slice_))
    assert pairs.shape == (len(pairs), 2)
    found = [frozenset(pair) for pair in pairs.tolist()]
    assert len(set(found)) == len(found), "every pair once"
    assert set(found) == brute_force_pairs(slice_)


def test_a_full_grid_has_right_and_down_pairs() -> None:
    assert len(neighbour_pairs(torch.arange(64).view(8, 8))) == 2 * 8 * 7


# --- the whole --------------------------------------------------------------------------------------------------------


def linear_prior(seed: int) -> Callable[[Tensor], Gaussian]:
    """A prior whose mean and log variance are linear in the condition."""
    generator = torch.Generator().manual_seed(seed)
    to_mean, to_logvar = torch.randn(2, 4, LATENT, generator=generator)
    return lambda condition: Gaussian(condition @ to_mean, 0.5 * condition @ to_logvar)


class Case:
    """A batch, a model that is known in every number, and neighbours."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.truth = kernels(11)
        self.condition = torch.rand(B, 4, generator=generator)
        self.noise = torch.randn(B, LATENT, generator=generator)
        self.places = torch.rand(6, 4, generator=generator)
        self.pairs = torch.tensor([[0, 1], [1, 2], [0, 3], [4, 5]])
        self.q, self.prior = gaussian(5), linear_prior(6)
        self.matrix = torch.randn(LATENT, W, S, S, generator=generator)
        self.model: CVAE = Fixed(self.q, self.prior, self.matrix)

    def terms(self, config: LossConfig, pairs: Tensor | None = None) -> dict[str, float]:
        pairs = self.pairs if pairs is None else pairs
        found = Objective(self.model, config)(self.truth, self.condition, self.noise, self.places, pairs)
        return {name: float(value) for name, value in found.items()}

    def decoded(self, z: Tensor) -> np.ndarray:
        logits = np.einsum("bl,lwyx->bwyx", z.double().numpy(), self.matrix.double().numpy())
        drawn = np.exp(logits)
        return np.asarray(drawn / drawn.sum(axis=(-2, -1), keepdims=True))

    def reconstruction(self, z: Tensor, weights: dict[str, float]) -> float:
        found, truth = self.decoded(z), self.truth.double().numpy()
        values = {
            "mse": np.mean((found - truth) ** 2),
            "rel_l2": np.mean([np.linalg.norm(f - t) / np.linalg.norm(t) for f, t in zip(found, truth, strict=True)]),
            "nll": scipy.stats.entropy(truth.reshape(B * W, -1), found.reshape(B * W, -1), axis=1).mean(),
        }
        return float(sum(weight * values[name] for name, weight in weights.items()))

    @property
    def kl(self) -> np.ndarray:
        """By latent dimension, mean over the batch."""
        p = self.prior(self.condition)
        vq, vp = np.exp(self.q.logvar.double().numpy()), np.exp(p.logvar.double().numpy())
        gap = (self.q.mean - p.mean).double().numpy()
        return np.asarray((0.5 * (np.log(vp) - np.log(vq) + (vq + gap**2) / vp - 1)).mean(axis=0))

    @property
    def between(self) -> float:
        """A share of free bits above the least KL of a dimension and below the others."""
        return float(np.sort(self.kl)[:2].mean())

    @property
    def smooth(self) -> float:
        mean = self.prior(self.places).mean.double().numpy()
        return float(np.mean([((mean[i] - mean[j]) ** 2).sum() for i, j in self.pairs.tolist()]))


RECON: list[dict[str, float]] = [{"mse": 1.0}, {"rel_l2": 1.0, "nll": 0.1}, {"nll": 2.0, "mse": 3.0, "rel_l2": 0.5}]


@pytest.mark.parametrize("recon", RECON)
@pytest.mark.parametrize(("prior", "beta", "smooth"), [(0.0, 1e-4, 1e-3), (1.0, 1e-3, 1e-5), (0.3, 2.0, 5.0)])
def test_terms_are_logged_unweighted_and_summed_weighted(
    recon: dict[str, float], prior: float, beta: float, smooth: float
) -> None:
    case = Case()
    config = LossConfig(recon=recon, prior=prior, beta=beta, smooth=smooth)  # type: ignore[arg-type]
    expected = {
        "recon": case.reconstruction(case.q.mean + (case.q.logvar / 2).exp() * case.noise, recon),
        "kl": float(case.kl.sum()),
        "smooth": case.smooth,
    }
    total = expected["recon"] + beta * expected["kl"] + smooth * expected["smooth"]
    if prior:
        expected["prior"] = case.reconstruction(case.prior(case.condition).mean, recon)
        total += prior * expected["prior"]
    expected |= {"total": total, "active_dims": float((case.kl > ACTIVE_NATS).sum())}
    assert case.terms(config) == pytest.approx(expected, rel=1e-4)


def test_free_bits_charge_no_dimension_less_than_its_share() -> None:
    """The KL that is logged stays the true one."""
    case = Case()
    free = case.between
    charged = case.terms(LossConfig(recon={"mse": 1.0}, prior=0, smooth=0, beta=2.0, kl=free))
    assert charged["kl"] == pytest.approx(case.kl.sum(), rel=1e-4)
    assert charged["total"] == pytest.approx(charged["recon"] + 2 * np.maximum(case.kl, free).sum(), rel=1e-4)


def test_free_bits_give_no_gradient_below_their_share() -> None:
    case = Case()
    mean = case.q.mean.clone().requires_grad_()
    model = Fixed(Gaussian(mean, case.q.logvar), case.prior, torch.zeros_like(case.matrix))
    config = LossConfig(recon={"mse": 1.0}, prior=0, smooth=0, beta=1.0, kl=case.between)
    terms = Objective(model, config)(case.truth, case.condition, case.noise, case.places[:0], case.pairs[:0])
    terms["total"].backward()
    assert mean.grad is not None
    pulled = mean.grad.abs().sum(dim=0) > 0
    assert pulled.tolist() == (case.kl > case.between).tolist()
    assert sorted(pulled.tolist()) == [False, True, True]


def test_no_pairs_no_smoothness() -> None:
    case = Case()
    terms = case.terms(LossConfig(smooth=1.0), case.pairs[:0])
    assert "smooth" not in terms
    assert all(map(math.isfinite, terms.values()))


def test_smoothness_of_a_masked_grid_by_brute_force() -> None:
    """From the slice with its holes to the term."""
    rng = np.random.default_rng(0)
    slice_ = np.where(rng.random((4, 5)) < 0.25, -1, np.arange(20).reshape(4, 5))
    case = Case()
    case.places = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    case.pairs = neighbour_pairs(torch.from_numpy(slice_))
    mean = case.prior(case.places).mean.double().numpy()
    expected = [((mean[i] - mean[j]) ** 2).sum() for i, j in map(sorted, brute_force_pairs(slice_))]
    assert 0 < len(expected) < 31
    assert case.terms(LossConfig())["smooth"] == pytest.approx(np.mean(expected), rel=1e-4)
