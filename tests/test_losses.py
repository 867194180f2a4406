"""Every loss term against a computation by hand, scipy or torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import BARE, TRAINED, Fixed

from psftrain import losses
from psftrain.batch import Batch, Neighbours
from psftrain.config import LossConfig, ModelConfig
from psftrain.losses import (
    DIFFERENCES,
    HUBER_DELTA,
    RECONSTRUCTIONS,
    SMOOTH_L1_BETA,
    Objective,
    huber,
    kl_per_dim,
    mae,
    mse,
    nll,
    rel_l2,
    smooth_l1,
)
from psftrain.models import model_class
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


def test_mse_and_mae_by_hand() -> None:
    found, truth = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]], [[[0.5, 0.25]]]])
    assert mse(found, truth).tolist() == pytest.approx([(1 + 0) / 2, (0.25 + 0.0625) / 2])
    assert mae(found, truth).tolist() == pytest.approx([(1 + 0) / 2, (0.5 + 0.25) / 2])


def test_rel_l2_by_hand() -> None:
    """The norm runs over the whole stack of wavelengths of an example."""
    truth = torch.tensor([[[[3.0]], [[4.0]]], [[[1.0]], [[0.0]]]])
    found = torch.tensor([[[[0.0]], [[4.0]]], [[[1.0]], [[2.0]]]])
    assert rel_l2(found, truth).tolist() == pytest.approx([3 / 5, 2 / 1])


def test_nll_is_the_divergence_from_the_truth() -> None:
    found, truth = kernels(1), kernels(2)
    expected = scipy.stats.entropy(*(k.double().view(B * W, -1).numpy() for k in (truth, found)), axis=1)
    assert nll(found, truth).tolist() == pytest.approx(expected.reshape(B, W).mean(axis=1), rel=1e-4)


def test_nll_differs_from_the_cross_entropy_by_the_entropy_of_the_truth() -> None:
    """So its gradient is that of the multinomial likelihood of the rays."""
    truth = kernels(2)
    found = kernels(1).requires_grad_()
    nll(found, truth).sum().backward()
    assert found.grad is not None
    expected = -truth / found.detach() / W
    assert torch.allclose(found.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_nll_is_never_negative_and_zero_only_where_equal(seed: int) -> None:
    found, truth = kernels(seed), kernels(seed + 100)
    assert nll(truth, truth).tolist() == [0] * B
    assert (nll(found, truth) > 0.01).all()
    nearby = nll(truth + 0.01 * (found - truth), truth)
    assert ((nearby > -1e-7) & (nearby < nll(found, truth))).all()


def test_nll_takes_kernels_with_empty_bins() -> None:
    """A bin no ray fell into costs nothing, a bin that is empty in the answer costs much but not infinity."""
    truth, other = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    truth[..., 0], other[..., 1] = 1, 1
    assert float(nll(truth, truth)) == 0
    assert 10 < float(nll(other, truth)) < math.inf
    half = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    assert float(nll(half, truth)) == pytest.approx(math.log(2), rel=1e-5)


def test_huber_and_smooth_l1_against_scipy() -> None:
    """Of errors in units of the RMS of each stack; scipy's Huber is d (e - d / 2) beyond d, as is PyTorch's."""
    found, truth = kernels(1), kernels(2)
    rms = truth.double().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    error = ((found.double() - truth.double()) / rms).flatten(1).numpy()
    assert (np.abs(error) > HUBER_DELTA).any(), "both branches"
    assert (np.abs(error) < SMOOTH_L1_BETA).any(), "both branches"
    expected = scipy.special.huber(HUBER_DELTA, error).mean(axis=1)
    assert huber(found, truth).tolist() == pytest.approx(expected, rel=1e-5)
    expected = scipy.special.huber(SMOOTH_L1_BETA, error).mean(axis=1) / SMOOTH_L1_BETA
    assert smooth_l1(found, truth).tolist() == pytest.approx(expected, rel=1e-5)


def test_small_errors_count_squared() -> None:
    """Then both are half the squared relative error, but for a factor."""
    truth = kernels(2)
    found = truth + 0.01 * truth.flatten(1).norm(dim=-1)[:, None, None, None] * (kernels(1) - truth)
    expected = rel_l2(found, truth).square() / 2
    assert torch.allclose(huber(found, truth), expected, rtol=1e-4)
    assert torch.allclose(smooth_l1(found, truth), expected / SMOOTH_L1_BETA, rtol=1e-4)


def test_large_errors_count_linearly() -> None:
    truth = kernels(2)
    rms = truth.square().mean(dim=(1, 2, 3)).sqrt()
    found = truth + 50 * rms[:, None, None, None] * torch.where(kernels(1) > 0.1, 1.0, -1.0)
    assert torch.allclose(huber(found, truth), torch.full((B,), HUBER_DELTA * (50 - HUBER_DELTA / 2)), rtol=1e-4)
    assert torch.allclose(smooth_l1(found, truth), torch.full((B,), 50 - SMOOTH_L1_BETA / 2), rtol=1e-4)
    assert torch.allclose(smooth_l1(found, truth), mae(found, truth) / rms - SMOOTH_L1_BETA / 2, rtol=1e-4)


@pytest.mark.parametrize("width", [0.03, 0.5, 1.0, 4.0])
def test_huber_is_its_width_times_smooth_l1(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "SMOOTH_L1_BETA", width)
    monkeypatch.setattr(losses, "HUBER_DELTA", width)
    found, truth = kernels(1), kernels(2)
    assert torch.allclose(huber(found, truth), width * smooth_l1(found, truth), rtol=1e-5)


@pytest.mark.parametrize("name", ["rel_l2", "smooth_l1", "huber"])
def test_dimensionless_losses_do_not_see_the_scale_of_a_kernel(name: str) -> None:
    """A kernel over four times the bins has values of a quarter."""
    found, truth = kernels(1), kernels(2)
    assert torch.allclose(RECONSTRUCTIONS[name](found / 4, truth / 4), RECONSTRUCTIONS[name](found, truth), rtol=1e-5)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
class TestEveryReconstruction:
    """The contract of the table."""

    def test_least_where_equal(self, name: str) -> None:
        loss, truth, other = RECONSTRUCTIONS[name], kernels(3), kernels(4)
        values = torch.stack([loss(truth + share * (other - truth), truth) for share in (0, 0.1, 0.3, 1)])
        assert torch.allclose(values[0], torch.zeros(B), atol=1e-6)
        assert (values.diff(dim=0) > 0).all()
        assert (values[1] > 1e-4).all()

    def test_an_example_does_not_see_its_batch(self, name: str) -> None:
        loss, truth, found = RECONSTRUCTIONS[name], kernels(3), kernels(4)
        each = torch.cat([loss(found[i : i + 1], truth[i : i + 1]) for i in range(B)])
        assert loss(found, truth).shape == (B,)
        assert torch.allclose(loss(found, truth), each)

    @pytest.mark.parametrize("start", ["equal", "other", "empty bins"])
    def test_gradient_is_finite(self, name: str, start: str) -> None:
        truth = kernels(3)
        found = {"equal": truth.clone(), "other": kernels(4), "empty bins": torch.eye(S).div(S).expand_as(truth)}[start]
        found = found.clone().requires_grad_()
        RECONSTRUCTIONS[name](found, truth).sum().backward()
        assert found.grad is not None
        assert found.grad.isfinite().all()

    def test_gradient_is_that_of_the_value(self, name: str) -> None:
        """By differences, in float64."""
        found, truth = kernels(4).double().requires_grad_(), kernels(3).double()
        assert RECONSTRUCTIONS[name](found, truth).dtype == torch.float64
        assert torch.autograd.gradcheck(lambda k: RECONSTRUCTIONS[name](k, truth), found, eps=1e-8, atol=1e-4)


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


# --- the whole --------------------------------------------------------------------------------------------------------


def linear_prior(seed: int) -> Callable[[Tensor], Gaussian]:
    """A prior whose mean and log variance are linear in the condition."""
    generator = torch.Generator().manual_seed(seed)
    to_mean, to_logvar = torch.randn(2, 4, LATENT, generator=generator)
    return lambda condition: Gaussian(condition @ to_mean, 0.5 * condition @ to_logvar)


PAIRS = [[0, 1], [1, 2], [0, 3], [4, 5]]
WEIGHTS = [0.1, 0.4, 0.0, 0.7]


class Case:
    """A batch, a model that is known in every number, and neighbours: among the places, and of batch and places."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.truth = kernels(11)
        self.condition = torch.rand(B, 4, generator=generator)
        self.noise = torch.randn(B, LATENT, generator=generator)
        self.places = torch.rand(3, 4, generator=generator)
        self.weight = torch.ones(B)
        self.q, self.prior = gaussian(5), linear_prior(6)
        self.matrix = 0.5 * torch.randn(LATENT, W, S, S, generator=generator)
        self.model: CVAE = Fixed(self.q, self.prior, self.matrix)

    def batch(self, beta: float = 1e-3, smooth: bool = False) -> Batch:
        near = Neighbours(self.places, torch.tensor(PAIRS), torch.tensor(WEIGHTS), None) if smooth else None
        return Batch(self.truth, self.condition, self.noise, self.weight, near, torch.tensor(beta))

    def terms(self, config: LossConfig, beta: float = 1e-3, smooth: bool = False) -> dict[str, float]:
        found = Objective(self.model, config)(self.batch(beta, smooth))
        assert found.pop("kl_dims").tolist() == pytest.approx(self.kl, rel=1e-4)
        return {name: float(value) for name, value in found.items()}

    def decoded(self, z: Tensor) -> np.ndarray:
        logits = np.einsum("bl,lwyx->bwyx", z.double().numpy(), self.matrix.double().numpy())
        drawn = np.exp(logits)
        return np.asarray(drawn / drawn.sum(axis=(-2, -1), keepdims=True))

    def reconstruction(self, z: Tensor, weights: dict[str, float]) -> float:
        found, truth = self.decoded(z), self.truth.double().numpy()
        error = (found - truth).reshape(B, -1)
        size = np.linalg.norm(truth.reshape(B, -1), axis=1)
        in_rms = error / (size / math.sqrt(error.shape[1]))[:, None]
        values = {
            "mse": np.mean(error**2, axis=1),
            "mae": np.mean(np.abs(error), axis=1),
            "rel_l2": np.linalg.norm(error, axis=1) / size,
            "nll": scipy.stats.entropy(truth.reshape(B, W, -1), found.reshape(B, W, -1), axis=2).mean(axis=1),
            "huber": scipy.special.huber(1.0, in_rms).mean(axis=1),
            "smooth_l1": 10 * scipy.special.huber(0.1, in_rms).mean(axis=1),
        }
        return float(np.mean(self.weight.numpy() * sum(weight * values[name] for name, weight in weights.items())))

    @property
    def drawn(self) -> Tensor:
        return self.q.mean + (self.q.logvar / 2).exp() * self.noise

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
        mean = self.prior(torch.cat([self.condition, self.places])).mean.double().numpy()
        return sum(w * float(((mean[i] - mean[j]) ** 2).sum()) for w, (i, j) in zip(WEIGHTS, PAIRS, strict=True))


RECON: list[dict[str, float]] = [
    {"mse": 1.0},
    {"rel_l2": 1.0, "nll": 0.1},
    {"nll": 2.0, "mse": 3.0, "rel_l2": 0.5},
    {"mae": 2.0, "smooth_l1": 0.3, "huber": 0.7},
]


@pytest.mark.parametrize("recon", RECON)
@pytest.mark.parametrize(("prior", "beta", "smooth"), [(0.0, 1e-4, 1e-3), (1.0, 1e-3, 1e-5), (0.3, 2.0, 5.0)])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0, 1.0], [0.2, 1.0, 0.0, 3.0]])
def test_terms_are_logged_unweighted_and_summed_weighted(
    recon: dict[str, float], prior: float, beta: float, smooth: float, weight: list[float]
) -> None:
    """But for the weights of the examples, which are of the reconstructions alone."""
    case = Case()
    case.weight = torch.tensor(weight)
    config = LossConfig(recon=recon, prior=prior, smooth=smooth)  # type: ignore[arg-type]
    expected = {
        "recon": case.reconstruction(case.drawn, recon),
        "kl": float(case.kl.sum()),
        "smooth": case.smooth,
    }
    total = expected["recon"] + beta * expected["kl"] + smooth * expected["smooth"]
    if prior:
        expected["prior"] = case.reconstruction(case.prior(case.condition).mean, recon)
        total += prior * expected["prior"]
    expected |= {"total": total}
    assert case.terms(config, beta, smooth=True) == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_the_kl_is_that_of_the_step() -> None:
    """Not that of the config, which the step's is annealed to."""
    case, config = Case(), LossConfig(recon={"mse": 1.0}, prior=0, beta=5.0)
    totals = [case.terms(config, beta)["total"] for beta in (0.0, 1.0)]
    assert totals[1] - totals[0] == pytest.approx(case.kl.sum(), rel=1e-4)


def test_no_neighbours_no_smoothness() -> None:
    terms = Case().terms(LossConfig(smooth=1.0))
    assert "smooth" not in terms
    assert all(map(math.isfinite, terms.values()))


# --- free bits --------------------------------------------------------------------------------------------------------


def test_free_bits_charge_no_dimension_less_than_its_share() -> None:
    """The KL that is logged stays the true one."""
    case = Case()
    free = case.between
    charged = case.terms(LossConfig(recon={"mse": 1.0}, prior=0, kl=free), beta=2.0)
    assert charged["kl"] == pytest.approx(case.kl.sum(), rel=1e-4)
    assert charged["total"] == pytest.approx(charged["recon"] + 2 * np.maximum(case.kl, free).sum(), rel=1e-4)


def kl_gradient(case: Case, free: float, parts: list[slice]) -> tuple[Tensor, float]:
    """The gradient to the posterior's means, and the loss, as the mean over processes that see a part each."""
    mean = case.q.mean.clone().requires_grad_()
    each = kl_per_dim(case.q, case.prior(case.condition))
    config = LossConfig(recon={"mse": 1.0}, prior=0, kl=free)
    totals = []
    for part in parts:
        posterior = Gaussian(mean[part], case.q.logvar[part])
        model = Fixed(posterior, case.prior, torch.zeros_like(case.matrix))

        def mean_over_ranks(value: Tensor, part: slice = part) -> Tensor:
            assert torch.allclose(value, each[part].mean(dim=0))
            assert not value.requires_grad
            return each.mean(dim=0)

        batch = Batch(*(values[part] for values in case.batch()[:4]), None, torch.tensor(1.0))
        totals.append(Objective(model, config, mean_over_ranks)(batch)["total"])
    loss = torch.stack(totals).mean()
    loss.backward()
    assert mean.grad is not None
    return mean.grad, float(loss.detach())


def test_free_bits_give_the_gradient_of_the_clamp() -> None:
    case = Case()
    mean = case.q.mean.clone().requires_grad_()
    kl = kl_per_dim(Gaussian(mean, case.q.logvar), case.prior(case.condition)).mean(dim=0)
    kl.clamp_min(case.between).sum().backward()
    found, _ = kl_gradient(case, case.between, [slice(B)])
    assert mean.grad is not None
    assert torch.allclose(found, mean.grad)
    pulled = found.abs().sum(dim=0) > 0
    assert pulled.tolist() == (case.kl > case.between).tolist()
    assert sorted(pulled.tolist()) == [False, True, True]


def test_free_bits_are_of_the_whole_batch_however_many_processes_share_it() -> None:
    """A dimension may have less than its share in one process and more in another."""
    case = Case()
    halves = [slice(0, B // 2), slice(B // 2, B)]
    each = kl_per_dim(case.q, case.prior(case.condition)).view(2, B // 2, LATENT).mean(dim=1)
    low, high = each.min(dim=0).values, each.max(dim=0).values
    split = (high - low).argmax()
    for free in (float(low[split] + 0.1 * (high - low)[split]), float(high[split] - 0.1 * (high - low)[split])):
        alone, together = kl_gradient(case, free, [slice(B)]), kl_gradient(case, free, halves)
        assert torch.allclose(together[0], alone[0], atol=1e-7)
        assert together[1] == pytest.approx(alone[1], rel=1e-5)


# --- precision and the device -----------------------------------------------------------------------------------------


SMOOTH_ON = list(DIFFERENCES)


def trained_on(name: str, smooth_on: Any, dtype: torch.dtype = torch.float32) -> tuple[Objective, Batch]:
    """A real model, every reconstruction, free bits and smoothness; one place lies on the axis, one is no pair."""
    torch.manual_seed(0)
    model = model_class(name)(ModelConfig(name=name, latent=LATENT, width=16, layers=2), (W, S, S), BARE)
    config = LossConfig(recon=dict.fromkeys(RECONSTRUCTIONS, 1.0), kl=0.01, smooth=0.1, smooth_on=smooth_on)  # type: ignore[arg-type]
    condition = (2 * torch.rand(B, 4) - 1).to(dtype)
    condition[0, :2] = 0
    pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 3]])
    near = Neighbours(condition[[1, 2, 3]], pairs, torch.full((4,), 0.25, dtype=dtype), kernels(2, 3).to(dtype))
    near = near if smooth_on == "posterior_mean" else near._replace(kernels=None)
    noise, weight = torch.randn(B, LATENT, dtype=dtype), torch.rand(B, dtype=dtype)
    batch = Batch(kernels(1).to(dtype), condition, noise, weight, near, torch.tensor(0.1, dtype=dtype))
    return Objective(model.to(dtype), config), batch


def gradient(objective: Objective, terms: dict[str, Tensor]) -> Tensor:
    objective.zero_grad()
    terms["total"].backward()
    found = [parameter.grad for parameter in objective.parameters()]
    return torch.cat([each.flatten().double() for each in found if each is not None])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("smooth_on", SMOOTH_ON)
class TestPrecision:
    """Of real models, with every term."""

    def test_float64_stays_float64_and_agrees(self, name: str, smooth_on: str) -> None:
        found, gradients = {}, {}
        for dtype in (torch.float32, torch.float64):
            objective, batch = trained_on(name, smooth_on)
            objective.to(dtype)
            near = batch.neighbours
            assert near is not None
            near = Neighbours(near.places.to(dtype), near.pairs, near.weight.to(dtype), _to(near.kernels, dtype))
            terms = objective(Batch(*(each.to(dtype) for each in batch[:4]), near, batch.beta.to(dtype)))
            assert {value.dtype for value in terms.values()} == {dtype}
            gradients[dtype] = gradient(objective, terms)
            found[dtype] = [float(value.detach()) for key, value in terms.items() if key != "kl_dims"]
        assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-4, abs=1e-6)
        assert gradients[torch.float64].isfinite().all()
        assert torch.allclose(*gradients.values(), rtol=1e-2, atol=1e-4)

    def test_autocast_leaves_the_losses_in_float32(self, name: str, smooth_on: str) -> None:
        objective, batch = trained_on(name, smooth_on)
        expected = objective(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = objective(batch)
            decoded = objective.model.decode(batch.noise, batch.condition)
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert torch.allclose(decoded.sum(dim=(-2, -1)), torch.ones(B, W), atol=1e-5), "kernels sum to 1"
        assert not torch.equal(found["total"], expected["total"]), "bf16 was used"
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=0.05, atol=2e-3), key
        exact, rounded = gradient(objective, objective(batch)), gradient(objective, found)
        assert rounded.isfinite().all()
        assert float((rounded - exact).norm() / exact.norm()) < 0.1

    def test_a_step_neither_waits_for_the_device_nor_copies_to_it(self, name: str, smooth_on: str) -> None:
        """So that it can be a CUDA graph. The device here is `meta`, which has shapes and no values to wait for."""
        objective, batch = trained_on(name, smooth_on)
        near = batch.neighbours
        assert near is not None
        near = Neighbours(*(_to(each, "meta") for each in near))  # type: ignore[arg-type]
        batch = Batch(*(each.to("meta") for each in batch[:4]), near, batch.beta.to("meta"))
        objective.to("meta")
        with only_on("meta"):
            terms = objective(batch)
            terms["total"].backward()
        assert terms["total"].shape == ()
        with pytest.raises(AssertionError), only_on("meta"):
            torch.ones(2).to("meta")


def _to(values: Tensor | None, where: Any) -> Tensor | None:
    return None if values is None else values.to(where)


@contextmanager
def only_on(device: str) -> Iterator[None]:
    """Fail where an operation takes or gives a tensor of another device."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor)]
            assert {each.device.type for each in tensors} <= {device}, f"{func} leaves the device"
            return found

    with Watch():
        yield
