"""Every model's contract; the published one by independent computation; the symmetry of neural_cvae."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from training import BARE, TRAINED, examples_of, job, logged, make_store, psftrain, words

from psfgen.errors import ConfigError, RunMismatch
from psftrain import checkpoint
from psftrain.batch import Batch, Neighbours
from psftrain.conditioning import Conditioning
from psftrain.config import ModelConfig, load_fit_config
from psftrain.fit import fit
from psftrain.losses import Objective
from psftrain.models import MODELS, defaults, model_class
from psftrain.models.base import CVAE
from psftrain.models.layers import fourier
from psftrain.models.neural import NeuralCVAE, octaves_for
from psftrain.models.seed import SeedCVAE
from psftrain.order import Order

Array = NDArray[Any]
SMALL = {"model.width": 16, "model.latent": 3, "model.layers": 2}


def build(
    name: str, shape: tuple[int, int, int] = (2, 5, 5), conditioning: Conditioning = BARE, **settings: Any
) -> CVAE:
    given = {"model.name": name, **SMALL, **{f"model.{key}": value for key, value in settings.items()}}
    torch.manual_seed(0)
    return model_class(name)(load_fit_config(None, list(given.items())).model, shape, conditioning)


def conditions(count: int = 9, seed: int = 0) -> Tensor:
    """Random places of the field; the first lies on the axis."""
    drawn = 2 * torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) - 1
    drawn[:, 2:] = 0
    drawn[0] = 0
    return drawn


def kernels(count: int = 9, shape: tuple[int, int, int] = (2, 5, 5)) -> Tensor:
    drawn = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    return drawn / drawn.sum(dim=(-2, -1), keepdim=True)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 4, 4), (3, 7, 7)])
class TestEveryTrainedModel:
    """The contract of the table; tests/test_solving.py has that of models that are solved."""

    def test_kernels_are_kernels(self, name: str, shape: tuple[int, int, int]) -> None:
        """Non-negative, every channel summing to 1, whatever the latent."""
        model, condition = build(name, shape), conditions()
        for size in (0, 1, 30):
            z = size * torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
            found = model.decode(z, condition)
            assert found.shape == (9, *shape)
            assert bool((found >= 0).all())
            assert torch.allclose(found.sum(dim=(-2, -1)), torch.ones(9, shape[0]), atol=1e-5)

    def test_gaussians_are_finite(self, name: str, shape: tuple[int, int, int]) -> None:
        model, condition = build(name, shape), conditions()
        point = torch.zeros(9, *shape)
        point[..., 0, 0] = 1
        for found in (
            model.prior(condition),
            model.posterior(kernels(9, shape), condition),
            model.posterior(point, condition),
        ):
            assert found.mean.shape == found.logvar.shape == (9, model.latent)
            assert found.mean.isfinite().all()
            assert found.logvar.isfinite().all()

    def test_gradients_reach_every_parameter(self, name: str, shape: tuple[int, int, int]) -> None:
        """On the axis too, and of a loss with all terms."""
        model = build(name, shape)
        config = load_fit_config(None, ["loss.smooth=1", "loss.beta=1", "loss.prior=1"]).loss
        noise = torch.randn(9, model.latent, generator=torch.Generator().manual_seed(3))
        near = Neighbours(conditions(3, 5), torch.tensor([[9, 10], [10, 11]]), torch.tensor([0.5, 0.5]), None)
        batch = Batch(kernels(9, shape), conditions(), noise, torch.ones(9), near, torch.tensor(1.0))
        terms = Objective(model, config)(batch)
        terms["total"].backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert float(parameter.grad.abs().max()) > 1e-6, f"{key}: nothing but rounding"

    def test_an_example_does_not_see_its_batch(self, name: str, shape: tuple[int, int, int]) -> None:
        model, condition = build(name, shape), conditions()
        z = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(model.decode(z, condition)[4:5], model.decode(z[4:5], condition[4:5]), atol=1e-6)
        assert torch.allclose(model.prior(condition).mean[4:5], model.prior(condition[4:5]).mean, atol=1e-6)

    def test_weights_travel_without_buffers(self, name: str, shape: tuple[int, int, int]) -> None:
        """A checkpoint holds parameters; what follows from the config does not have to fit."""
        a, b = build(name, shape), build(name, shape)
        with torch.no_grad():
            for parameter in b.parameters():
                parameter.mul_(0.5)
        b.load_state_dict(a.state_dict())
        assert a.state_dict().keys() == dict(a.named_parameters()).keys()
        z = torch.ones(9, 3)
        assert torch.equal(a.decode(z, conditions()), b.decode(z, conditions()))


@pytest.mark.parametrize("name", TRAINED)
def test_latent_posterior_and_prior_matter(name: str) -> None:
    """The decoder listens to the latent, the posterior to the kernel, the prior to the place."""
    model, condition = build(name), conditions()
    assert not torch.allclose(model.decode(torch.zeros(9, 3), condition), model.decode(torch.ones(9, 3), condition))
    assert not torch.allclose(
        model.posterior(kernels(), condition).mean, model.posterior(kernels().flip(0), condition).mean
    )
    assert not torch.allclose(model.prior(condition).mean[1:], model.prior(condition).mean[:-1])


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_config_keys(name: str) -> None:
    config = load_fit_config(None, [f"model.name={name}"])
    plain = config.model_dump()
    for key, value in defaults(name).items():
        found = {inner: plain[key][inner] for inner in value} if isinstance(value, dict) else plain[key]
        assert found == value


@pytest.mark.parametrize("ask", [model_class, defaults])
def test_an_unknown_model_lists_the_known(ask: Any) -> None:
    with pytest.raises(ConfigError, match="unknown model 'seed_cvea'; did you mean 'seed_cvae'") as raised:
        ask("seed_cvea")
    assert all(name in str(raised.value) for name in MODELS)


# --- Fourier features -------------------------------------------------------------------------------------------------


def test_fourier_features_by_hand() -> None:
    xy = torch.tensor([[0.3, -0.7]])
    expected = sorted(f(2**k * math.pi * c) for c in (0.3, -0.7) for k in range(4) for f in (math.sin, math.cos))
    assert sorted(fourier(xy, 4)[0].tolist()) == pytest.approx(expected, abs=1e-5)
    assert fourier(xy, 0).shape == (1, 0)


# --- the published model ----------------------------------------------------------------------------------------------

SEED_SHAPE = (3, 15, 15)


@pytest.fixture(scope="module")
def published() -> SeedCVAE:
    torch.manual_seed(0)
    model = SeedCVAE(load_fit_config(None, ["model.name=seed_cvae"]).model, SEED_SHAPE, BARE)
    with torch.no_grad():  # larger than at initialisation, so that every term is far from 0
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def linears(net: nn.Module) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


def by_hand(net: nn.Module, inputs: Array) -> Array:
    """A stack of linear layers with ReLU between, in float64."""
    layers = linears(net)
    for i, layer in enumerate(layers):
        inputs = inputs @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        inputs = np.maximum(inputs, 0) if i < len(layers) - 1 else inputs
    return inputs


def features(net: nn.Module, model: SeedCVAE, condition: Tensor) -> Array:
    """The last 40 inputs of a network, seen at its first layer, checked to be sines and cosines alone."""
    seen: list[Tensor] = []
    handle = linears(net)[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model.posterior(torch.zeros(len(condition), *SEED_SHAPE), condition)
        model.prior(condition)
        model.decode(torch.zeros(len(condition), 128), condition)
    handle.remove()
    found = seen[0][:, -40:].double().numpy()
    turns = condition[:, :2].double().numpy()[..., None] * math.pi * 2.0 ** np.arange(10)
    expected = np.concatenate([np.sin(turns), np.cos(turns)], axis=-1).reshape(len(condition), 40)
    assert np.sort(found) == pytest.approx(np.sort(expected), abs=2e-4)
    return found


def test_the_published_size(published: SeedCVAE) -> None:
    assert sum(p.numel() for p in published.parameters()) == 4_234_915
    sizes = {
        "encoder": [675 + 40, 512, 512, 512, 512, 512, 2 * 128],
        "prior_net": [40, 512, 512, 512, 512, 512, 2 * 128],
        "decoder": [128 + 40, 512, 512, 512, 512, 512, 675],
    }
    for name, expected in sizes.items():
        layers = linears(getattr(published, name))
        assert [layers[0].in_features, *(layer.out_features for layer in layers)] == expected


def test_the_published_activation(published: SeedCVAE) -> None:
    kinds = {type(module) for module in published.modules() if not list(module.children())}
    assert kinds == {nn.Linear, nn.ReLU}


def test_the_published_configuration() -> None:
    config = load_fit_config(None, ["model.name=seed_cvae"])
    assert (config.batch, config.lr, config.schedule, config.warmup, config.clip) == (64, 1e-4, "constant", 0, None)
    assert config.loss.recon == {"mse": 1.0}
    assert (config.loss.prior, config.loss.kl, config.loss.beta, config.loss.smooth) == (0, 0, 1e-4, 1e-3)
    assert (config.loss.smooth_on, config.loss.smooth_over) == ("prior_mean", "grid")
    assert (config.model.latent, config.model.octaves) == (128, 10)


def test_field_depth_and_raw_coordinates_stay_outside(published: SeedCVAE) -> None:
    """Sine and cosine of whole turns of pi: places 2 apart are the same to it."""
    condition = conditions()
    moved = condition.clone()
    moved[:, 0] += 2
    moved[:, 3] += 5
    assert torch.allclose(published.prior(condition).mean, published.prior(moved).mean, atol=1e-3)


def test_the_published_loss_by_hand(published: SeedCVAE, tmp_path: Path) -> None:
    """Networks, reconstruction, divergence and smoothness recomputed in float64 from the weights alone."""
    path = make_store(tmp_path / "s.zarr", grid=4, kernel_px=15, bins=15)
    examples, _ = examples_of(path)
    truth, condition = examples.kernels, examples.condition
    assert truth.shape == (16, *SEED_SHAPE)
    noise = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    right = [(4 * r + c, 4 * r + c + 1) for r in range(4) for c in range(3)]
    down = [(4 * r + c, 4 * r + c + 4) for r in range(3) for c in range(4)]
    config = load_fit_config(None, ["model.name=seed_cvae"]).loss
    with torch.no_grad():
        near = Neighbours(condition[:0], torch.tensor(right + down), torch.full((24,), 1 / 24), None)
        batch = Batch(truth, condition, noise, torch.ones(16), near, torch.tensor(config.beta))
        terms = Objective(published, config)(batch)

    encoded = features(published.encoder, published, condition)
    flat = truth.double().numpy().reshape(16, 675)
    mq, log_vq = np.split(by_hand(published.encoder, np.concatenate([flat, encoded], axis=1)), 2, axis=1)
    mp, log_vp = np.split(by_hand(published.prior_net, features(published.prior_net, published, condition)), 2, axis=1)
    z = mq + np.exp(log_vq / 2) * noise.double().numpy()
    out = by_hand(published.decoder, np.concatenate([z, features(published.decoder, published, condition)], axis=1))
    found = np.log1p(np.exp(out)).reshape(16, *SEED_SHAPE)
    found /= found.sum(axis=(-2, -1), keepdims=True)

    recon = ((found.reshape(16, 675) - flat) ** 2).mean()
    vq, vp = np.exp(log_vq), np.exp(log_vp)
    kl = (0.5 * (log_vp - log_vq + (vq + (mq - mp) ** 2) / vp - 1)).sum(axis=1).mean()
    smooth = np.mean([((mp[i] - mp[j]) ** 2).sum() for i, j in right + down])
    assert len(right + down) == 2 * 4 * 3
    expected = {"recon": recon, "kl": kl, "smooth": smooth, "total": 1.0 * recon + 1e-4 * kl + 1e-3 * smooth}
    assert {name: float(terms[name]) for name in expected} == pytest.approx(expected, rel=1e-3)
    assert set(terms) == {*expected, "kl_dims"}

    q, p = (Normal(torch.tensor(m), torch.tensor(v**0.5)) for m, v in ((mq, vq), (mp, vp)))
    assert float(kl_divergence(q, p).sum(dim=1).mean()) == pytest.approx(kl, rel=1e-9)


def test_the_published_training_by_hand(tmp_path: Path) -> None:
    """Adam at 1e-4 without clipping, on the whole grid's smoothness: three steps by a loop of our own."""
    path = make_store(tmp_path / "s.zarr", grid=8)
    config = job(path, tmp_path / "run", model__name="seed_cvae", steps=3, batch=64, warmup=0, log_every=1)
    config = config.model_copy(
        update={"lr": 1e-4, "model": ModelConfig(name="seed_cvae", latent=8, width=32, layers=4)}
    )
    assert (config.clip, config.schedule) == (None, "constant")
    fit(config)
    assert [line["train/lr"] for line in logged(tmp_path / "run")] == [1e-4] * 3

    examples, conditioning = examples_of(path)
    torch.manual_seed(config.seed)
    model = SeedCVAE(config.model, (3, 5, 5), conditioning)
    started = {key: value.clone() for key, value in model.state_dict().items()}
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    order = Order(config.seed, 64, 64)
    row, column = np.divmod(np.arange(64), 8)
    pairs = [(i, j) for i in range(64) for j in range(i) if abs(row[i] - row[j]) + abs(column[i] - column[j]) == 1]
    a, b = torch.tensor(pairs).T
    for step in range(3):
        chosen, noise = order.batch(step), order.noise(step, 8)
        truth, condition = examples.kernels[chosen], examples.condition[chosen]
        q, p = model.posterior(truth, condition), model.prior(condition)
        found = model.decode(q.mean + (q.logvar / 2).exp() * noise, condition)
        kl = 0.5 * (p.logvar - q.logvar + (q.logvar.exp() + (q.mean - p.mean) ** 2) / p.logvar.exp() - 1)
        mean = model.prior(examples.condition).mean
        smooth = ((mean[a] - mean[b]) ** 2).sum(dim=1).mean()
        loss = ((found - truth) ** 2).mean() + 1e-4 * kl.sum(dim=1).mean() + 1e-3 * smooth
        adam.zero_grad()
        loss.backward()
        adam.step()
    trained = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")["model"]
    for key, value in model.state_dict().items():
        assert torch.allclose(trained[key], value, atol=3e-6), key
        assert float((value - started[key]).abs().max()) > 2e-5, "and they moved"


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"depth": (1000.0, 2000.0)}, "depth"),
        ({"focus": (1000.0, math.inf)}, "focus"),
        ({"depth": (1000.0, 2000.0), "focus": (1000.0, 2000.0)}, "depth and focus"),
    ],
)
def test_the_published_model_takes_one_depth_and_one_focus(tmp_path: Path, layout: dict[str, Any], named: str) -> None:
    path = make_store(tmp_path / "s.zarr", grid=3, **layout)
    ran = psftrain("fit", *words(path, tmp_path / "run", model__name="seed_cvae", batch=4))
    assert ran.code == 2
    assert f"the store varies {named};" in ran.err
    assert "field_cvae" in ran.err, "the way out"
    assert not (tmp_path / "run").exists()


def test_the_published_model_takes_one_depth_that_is_infinite() -> None:
    one = replace(BARE, depth_dioptre=(0.0, 0.0), focus_dioptre=(0.0, 0.0))
    build("seed_cvae", conditioning=one)
    with pytest.raises(RunMismatch, match="depth"):
        build("seed_cvae", conditioning=replace(one, depth_dioptre=(0.0, 1e-6)))


# --- neural_cvae: the symmetry of a lens with an axis -----------------------------------------------------------------


def at(model: CVAE, x: float, y: float) -> Tensor:
    z = torch.randn(1, 3, generator=torch.Generator().manual_seed(4))
    return model.decode(z, torch.tensor([[x, y, 0.4, -0.2]]))[0]


@pytest.fixture(params=[(2, 5, 5), (2, 6, 6)], ids=["odd", "even"])
def symmetric(request: pytest.FixtureRequest) -> CVAE:
    """A model with weights large enough that its kernels have structure."""
    model = build("neural_cvae", request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


@pytest.mark.parametrize(("x", "y"), [(0.7, 0.0), (0.3, 0.5), (-0.6, 0.2), (0.9, -0.9)])
class TestSymmetry:
    def test_a_quarter_turn_of_the_field_turns_the_kernel(self, symmetric: CVAE, x: float, y: float) -> None:
        """Counter-clockwise, rows running down from +y."""
        kernel = at(symmetric, x, y)
        assert torch.allclose(at(symmetric, -y, x), torch.rot90(kernel, 1, (-2, -1)), atol=1e-5)
        assert not torch.allclose(kernel, torch.rot90(kernel, 1, (-2, -1)), atol=1e-3), "which is not round"

    def test_mirrored_fields_have_mirrored_kernels(self, symmetric: CVAE, x: float, y: float) -> None:
        kernel = at(symmetric, x, y)
        assert torch.allclose(at(symmetric, x, -y), kernel.flip(-2), atol=1e-5)
        assert torch.allclose(at(symmetric, -x, y), kernel.flip(-1), atol=1e-5)
        assert torch.allclose(at(symmetric, y, x), kernel.transpose(-2, -1).flip(-2, -1), atol=1e-5)

    def test_outwards_is_not_inwards(self, symmetric: CVAE, x: float, y: float) -> None:
        """Coma may point along the field direction."""
        kernel = at(symmetric, x, y)
        assert not torch.allclose(kernel, kernel.flip(-2, -1), atol=1e-3)


def test_a_kernel_is_mirror_symmetric_about_its_field_direction(symmetric: CVAE) -> None:
    along_x, diagonal = at(symmetric, 0.8, 0.0), at(symmetric, 0.5, -0.5)
    assert torch.allclose(along_x, along_x.flip(-2), atol=1e-5)
    assert torch.allclose(diagonal, diagonal.transpose(-2, -1), atol=1e-5)


def test_any_turn_of_the_field_turns_the_kernel() -> None:
    """By the angle of the triangle 3, 4, 5, which takes some bins to bins: their logits keep their differences."""
    model = build("neural_cvae", (2, 11, 11))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)

    def bins(kernel: Tensor, places: list[tuple[int, int]]) -> Tensor:
        found = torch.stack([kernel[:, 5 - y, 5 + x] for x, y in places], dim=-1).log()
        return found - found[:, :1]

    straight = [(0, 0), (5, 0), (0, 5), (-5, 0), (0, -5)]
    turned = [((3 * x - 4 * y) // 5, (4 * x + 3 * y) // 5) for x, y in straight]
    assert turned[1:] == [(3, 4), (-4, 3), (-3, -4), (4, -3)]
    expected = bins(at(model, 0.5, 0.0), straight)
    assert torch.allclose(bins(at(model, 0.3, 0.4), turned), expected, atol=1e-4)
    assert not torch.allclose(bins(at(model, 0.3, 0.4), straight), expected, atol=1e-2)


def test_angles_are_those_on_the_sensor() -> None:
    """On a wide sensor the corner's direction is that in mm, so its kernel is not the square one's."""
    wide = build("neural_cvae", conditioning=replace(BARE, aspect=0.5))
    square = build("neural_cvae")
    assert torch.allclose(at(wide, 0.4, 0.8), at(square, 0.4, 0.4), atol=1e-6)
    corner = at(wide, 0.4, 0.8)
    assert torch.allclose(corner, corner.transpose(-2, -1).flip(-2, -1), atol=1e-5), "symmetric about the diagonal"
    turned = at(wide, -0.4, 0.8)  # in mm the quarter turn of the same place
    assert torch.allclose(turned, torch.rot90(corner, 1, (-2, -1)), atol=1e-5)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-30, 1e-12])
def test_the_axis_is_a_place_like_any_other(symmetric: CVAE, x: float) -> None:
    kernel = at(symmetric, x, 0.0)
    assert kernel.isfinite().all()
    assert torch.allclose(kernel.sum(dim=(-2, -1)), torch.ones(2), atol=1e-5)


def test_depth_and_focus_matter() -> None:
    model = build("neural_cvae")
    z, place = torch.zeros(1, 3), torch.tensor([[0.5, 0.1, 0.0, 0.0]])
    for column in (2, 3):
        moved = place.clone()
        moved[0, column] = 0.9
        assert not torch.allclose(model.decode(z, place), model.decode(z, moved))
        assert not torch.allclose(model.prior(place).mean, model.prior(moved).mean)


@pytest.mark.parametrize("grid", [1, 2, 5, 15, 16, 20, 31, 32, 64, 1000])
def test_octaves_ring_less_than_once_in_sixteen_nodes(grid: int) -> None:
    """The highest octave turns 2^(octaves - 1) times over the field; at most 2 octaves."""
    octaves = octaves_for(grid)
    assert octaves == max(n for n in range(3) if n == 0 or grid >= 16 * 2 ** (n - 1))


@pytest.mark.parametrize(("grid", "octaves", "expected"), [(10, None, 0), (20, None, 1), (40, None, 2), (10, 3, 3)])
def test_octaves_come_from_the_grid_unless_they_are_given(grid: int, octaves: int | None, expected: int) -> None:
    model = build("neural_cvae", conditioning=replace(BARE, grid=grid), octaves=octaves)
    assert isinstance(model, NeuralCVAE)
    assert model.octaves == expected
    assert linears(model.prior_net)[0].in_features == 4 + 4 * expected
