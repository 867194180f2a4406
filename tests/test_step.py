"""One step of the optimiser: in parts, averaged, in any precision, stopped and loaded, as a CUDA graph."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import prepared, take, two_depths
from torch import Tensor
from training import equal_states, job

from psfgen.errors import FitError
from psftrain import schedules
from psftrain.ddp import Ranks
from psftrain.step import WARM_UP, Graphed, Stepper

ON, OVER = ("prior_mean", "posterior_mean", "kernels", "kernels_tv"), ("batch", "grid")
SMOOTHNESS = [(on, over) for on in ON for over in OVER]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_depths(tmp_path_factory.mktemp("step") / "s.zarr")


def weights(stepper: Stepper) -> Tensor:
    return torch.cat([parameter.detach().flatten().double().cpu() for parameter in stepper.parameters])


# --- parts of a batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("smooth_on", "smooth_over"), SMOOTHNESS)
def test_a_batch_in_parts_is_the_batch(store: Path, tmp_path: Path, smooth_on: str, smooth_over: str) -> None:
    """To rounding in float64: weights of noise and smoothness included, every term and every weight."""
    changes = {"loss__smooth_on": smooth_on, "loss__smooth_over": smooth_over, "loss__smooth": 0.3}
    common: dict[str, Any] = {"precision": "float64", "loss__noise_half": 0.02, **changes}
    whole, feed = prepared(job(store, tmp_path, **common))
    expected = take(whole, feed, range(12))
    for accumulate in (2, 8):
        parted, feed = prepared(job(store, tmp_path, accumulate=accumulate, **common))
        found = take(parted, feed, range(12))
        assert float((weights(parted) - weights(whole)).abs().max()) < 1e-10
        for name in expected[-1]:
            torch.testing.assert_close(found[-1][name], expected[-1][name], rtol=1e-9, atol=1e-12)


def test_a_batch_in_parts_is_clipped_as_a_whole(store: Path, tmp_path: Path) -> None:
    """Once a step, when all parts have given their gradient."""
    common = {"precision": "float64", "clip": 1e-3, "schedule": "constant", "warmup": 0}
    found = []
    for accumulate in (1, 4):
        stepper, feed = prepared(job(store, tmp_path, accumulate=accumulate, **common))
        take(stepper, feed, range(3))
        found.append([entry["exp_avg"] for entry in stepper.optimizer.state_dict()["state"].values()])
    assert torch.cat([each.flatten() for each in found[0]]).norm() <= 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


# --- averaged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.5, 0.99])
def test_averaged_weights_by_hand(store: Path, tmp_path: Path, ema: float) -> None:
    """They begin as the initial ones, and each step takes 1 - ema of the new ones."""
    stepper, feed = prepared(job(store, tmp_path, precision="float64", ema=ema))
    expected = weights(stepper)
    for step in range(7):
        take(stepper, feed, range(step, step + 1))
        expected = ema * expected + (1 - ema) * weights(stepper)
    assert stepper.averaged is not None
    found = torch.cat([parameter.flatten() for parameter in stepper.averaged.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert float((found - weights(stepper)).abs().max()) > 1e-4
    assert stepper.best_guess is stepper.averaged


def test_an_average_changes_nothing_in_what_is_trained(store: Path, tmp_path: Path) -> None:
    plain, averaged = (prepared(job(store, tmp_path, ema=ema)) for ema in (None, 0.9))
    take(*plain, range(5))
    take(*averaged, range(5))
    assert torch.equal(weights(plain[0]), weights(averaged[0]))
    assert plain[0].best_guess is plain[0].model


# --- precision --------------------------------------------------------------------------------------------------------


def test_bf16_trains_as_float32_does(store: Path, tmp_path: Path) -> None:
    """Its loss is near, its parameters, its optimiser and its terms are float32."""
    losses = {}
    for precision in ("float32", "bf16"):
        stepper, feed = prepared(job(store, tmp_path, precision=precision, steps=150, warmup=10, lr=0.01))
        terms = take(stepper, feed, range(150))
        losses[precision] = [float(each["total"]) for each in terms]
        assert {parameter.dtype for parameter in stepper.parameters} == {torch.float32}
        assert {each["exp_avg"].dtype for each in stepper.optimizer.state.values()} == {torch.float32}
        assert {term.dtype for term in terms[-1].values()} == {torch.float32}
    wide, narrow = (sum(losses[name][-20:]) / 20 for name in ("float32", "bf16"))
    assert wide < 0.6 * losses["float32"][0]
    assert narrow == pytest.approx(wide, rel=0.1)
    assert losses["bf16"] != losses["float32"]


def test_float64_is_float64_throughout(store: Path, tmp_path: Path) -> None:
    stepper, feed = prepared(job(store, tmp_path, precision="float64", ema=0.9))
    (batch,) = feed(0)
    assert {batch.kernels.dtype, batch.condition.dtype, batch.noise.dtype, batch.weight.dtype} == {torch.float64}
    (terms,) = take(stepper, feed, range(1))
    assert {term.dtype for term in terms.values()} == {torch.float64}
    assert stepper.averaged is not None
    assert {parameter.dtype for parameter in stepper.averaged.parameters()} == {torch.float64}


@pytest.mark.campaign  # a minute of the compiler
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile compiles C++, and g++ is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_step_is_the_step(store: Path, tmp_path: Path) -> None:
    plain, compiled = (prepared(job(store, tmp_path, precision="float64", compile=c)) for c in (False, True))
    take(*plain, range(3))
    take(*compiled, range(3))
    assert float((weights(plain[0]) - weights(compiled[0])).abs().max()) < 1e-10


# --- state ------------------------------------------------------------------------------------------------------------


def test_a_loaded_step_goes_on_bit_for_bit(store: Path, tmp_path: Path) -> None:
    config = job(store, tmp_path, ema=0.9, steps=20)
    whole, feed = prepared(config)
    take(whole, feed, range(8))
    state = torch.load(_saved(whole.state(), tmp_path), weights_only=True)
    take(whole, feed, range(8, 14))
    other, feed = prepared(job(store, tmp_path, ema=0.9, steps=20, seed=5))
    assert not torch.equal(weights(other), weights(whole))
    other.load(state)
    _, feed = prepared(config)
    take(other, feed, range(8, 14))
    assert equal_states(other.state(), whole.state())


def test_a_state_from_another_kind_of_device_is_taken_as_this_one_needs_it(store: Path, tmp_path: Path) -> None:
    """On a GPU the rate is a tensor, and the optimiser made for graphs; neither is part of the run."""
    config = job(store, tmp_path)
    whole, feed = prepared(config)
    take(whole, feed, range(4))
    state = torch.load(_saved(whole.state(), tmp_path), weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(0.5), "capturable": True}
    other, _ = prepared(config)
    other.load(state)
    (group,) = other.optimizer.param_groups
    assert (type(group["lr"]), group["capturable"]) == (float, False)
    take(other, feed, range(4, 6))
    take(whole, feed, range(4, 6))
    assert torch.equal(weights(other), weights(whole))


def _saved(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_the_first_bad_step_is_named(store: Path, tmp_path: Path, bad: int) -> None:
    """Whenever it is asked for, and whatever came after."""
    stepper, feed = prepared(job(store, tmp_path))
    alone = Ranks(0, 1, torch.device("cpu"))
    for step in range(8):
        parts = feed(step)
        stepper(parts if step != bad else [parts[0]._replace(kernels=parts[0].kernels * math.nan)])
        if step < bad:
            stepper.require_finite(alone, 100, 101 + step)
    with pytest.raises(FitError, match=rf"the loss is no longer finite at step {101 + bad};"):
        stepper.require_finite(alone, 100, 108)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "loss__noise_half": 0.02},
        {"accumulate": 2, "loss__anneal": [0.2, 0.6], "schedule": "restarts"},
        {"precision": "bf16"},
        {"precision": "float64", "clip": None},
        *({"loss__smooth": 0.3, "loss__smooth_on": on, "loss__smooth_over": over} for on, over in SMOOTHNESS),
    ],
    ids=str,
)
def test_a_graph_is_the_steps_it_was_made_of(store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Weights, average, terms: those of one operation at a time, through warm-up, capture and replay."""
    config = job(store, tmp_path, **{"device": "cuda", "tf32": False, "steps": 30, **changes})
    steps = range(WARM_UP + 12)
    eager, feed = prepared(config, "cuda")
    expected = take(eager, feed, steps)
    stepper, feed = prepared(config, "cuda")
    graphed = Graphed(stepper)
    found = take(stepper, feed, steps, by=graphed)
    assert graphed.graph is not None, "it was captured"
    bound = {"float64": 1e-12, "float32": 1e-6, "bf16": 1e-4}[config.precision]
    assert float((weights(stepper) - weights(eager)).abs().max()) < bound
    for one, other in zip(found, expected, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e3 * bound, atol=bound)
    if stepper.averaged is not None and eager.averaged is not None:
        for a, b in zip(stepper.averaged.parameters(), eager.averaged.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("smooth_on", "smooth_over"), [pair for pair in SMOOTHNESS if pair[0] != "posterior_mean"])
def test_steps_never_wait_for_the_gpu(
    store: Path, tmp_path: Path, graph: bool, smooth_on: str, smooth_over: str
) -> None:
    """Between two logs; drawing the batch is part of a step. (The kernels of neighbours are fetched by the CPU.)"""
    changes = {"loss__smooth_on": smooth_on, "loss__smooth_over": smooth_over, "ema": 0.9, "loss__noise_half": 0.02}
    config = job(store, tmp_path, device="cuda", steps=60, loss__anneal=[0.1, 0.5], **changes)
    stepper, feed = prepared(config, "cuda")
    by = Graphed(stepper) if graph else stepper

    def step(number: int) -> None:
        parts = feed(number)
        stepper.set_rate(schedules.learning_rate(config, number))
        by(parts)

    for number in range(WARM_UP + 3):
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(WARM_UP + 3, WARM_UP + 23):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stepper.require_finite(Ranks(0, 1, torch.device("cuda")), 0, WARM_UP + 23)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_a_rate_that_changes_is_seen_by_a_graph_after_loading(store: Path, tmp_path: Path, graph: bool) -> None:
    """With a rate of nothing nothing changes, also where the state came from a file on the CPU."""
    config = job(store, tmp_path, device="cuda", warmup=0, schedule="constant", steps=100)
    first, feed = prepared(config, "cuda")
    take(first, feed, range(4))
    state = torch.load(_saved(first.state(), tmp_path), map_location="cpu", weights_only=True)
    stepper, feed = prepared(config, "cuda")
    stepper.load(state)
    by = Graphed(stepper) if graph else stepper
    take(stepper, feed, range(4, 4 + WARM_UP + 3), by=by)
    before = weights(stepper)
    parts = feed(20)
    stepper.set_rate(0.0)
    by(parts)
    assert torch.equal(weights(stepper), before)
    stepper.set_rate(config.lr)
    by(parts)
    assert not torch.equal(weights(stepper), before)
