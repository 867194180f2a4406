"""What a run may be told to do: averages, early stopping, other weights to start from, parts, schedules, warnings."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from fitting import last, plan_meddling, prepared, run_json, same_run, send, steps_of, take, two_depths, wear
from training import best, equal_states, job, kernel, logged, make_store, one_line_error, psftrain, words

from psfgen.errors import Preempted, RunMismatch
from psftrain import checkpoint, schedules
from psftrain.config import DataConfig, load_fit_config
from psftrain.data import catalogue, open_stores
from psftrain.ddp import Ranks
from psftrain.fit import fit
from psftrain.losses import RECONSTRUCTIONS
from psftrain.run import Trained, load_run
from psftrain.show import read_log, state
from psftrain.sources import open_source
from psftrain.step import Stepper
from psftrain.validation import MOST, Rows, validate

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_depths(tmp_path_factory.mktemp("features") / "s.zarr")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 depths x 3 focus distances, 5 x 5 points."""
    path = tmp_path_factory.mktemp("features") / "deep.zarr"
    return make_store(path, depth=(500.0, 1000.0, 2000.0, math.inf), focus=(800.0, 2000.0, 9000.0))


@pytest.fixture(scope="module")
def plain(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any of this."""
    path = tmp_path_factory.mktemp("features") / "plain"
    fit(job(store, path))
    return path


def column(run: Path, name: str) -> dict[int, float]:
    """A scalar of a run by step."""
    return {line["step"]: line[name] for line in logged(run) if name in line}


def rows_of(trained: Trained, path: Path) -> Rows:
    """Every example of a store as a run sees it."""
    stores = open_stores([str(path)], "psf_binned")
    places = catalogue(stores, trained.conditioning, "psf_binned")
    source = open_source(stores, places, DataConfig(), torch.device("cpu"))
    return Rows.spread(places, source, MOST, torch.device("cpu"), torch.float32)


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_kept_judged_and_loaded(store: Path, tmp_path: Path) -> None:
    """By validation, by best.pt, by what evaluates a run; the others stand beside them to go on with."""
    val = make_store(tmp_path / "v.zarr", grid=4, layout="cells", depth=(1000.0, math.inf))
    fit(job(store, tmp_path / "run", ema=0.8, val=str(val), val_every=4))
    stepper, feed = prepared(job(store, tmp_path / "by hand", ema=0.8))
    take(stepper, feed, range(12))
    assert stepper.averaged is not None
    state = last(tmp_path / "run")
    assert equal_states(state["ema"], dict(stepper.averaged.state_dict()))
    assert equal_states(state["model"], dict(stepper.model.state_dict()))
    assert not equal_states(state["ema"], state["model"])
    trained = load_run(tmp_path / "run")
    assert equal_states(dict(trained.model.state_dict()), best(tmp_path / "run")["ema"])
    scores = column(tmp_path / "run", "val_prior/rel_l2")
    assert trained.step == min(scores, key=lambda step: scores[step])
    found = validate(trained.model, rows_of(trained, val), ALONE)
    assert found["prior"] == pytest.approx(scores[trained.step], rel=1e-6)


def test_an_average_changes_nothing_in_what_is_trained(plain: Path, store: Path, tmp_path: Path) -> None:
    fit(job(store, tmp_path / "run", ema=0.9))
    assert equal_states(best(tmp_path / "run")["model"], best(plain)["model"])
    assert best(plain)["ema"] is None


# --- stopping early ---------------------------------------------------------------------------------------------------

WORSE = {"val_every": 1, "lr": 0.05, "warmup": 0, "schedule": "constant", "data__val": 0.3, "model__name": "meddling"}
EARLY = {**WORSE, "steps": 40, "patience": 4, "save_every": 7}


@pytest.mark.usefixtures("meddling")
class TestPatience:
    def test_a_run_that_gets_no_better_stops(
        self, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """So many validations after its best, which is kept; it says so, and is finished."""
        plan_meddling(wear(10))
        done = fit(job(store, tmp_path / "run", **EARLY))
        scores = column(tmp_path / "run", "val_prior/rel_l2")
        chosen = min(scores, key=lambda step: scores[step])
        assert done.step == chosen + 4 == max(scores) < 40
        assert best(tmp_path / "run")["step"] == chosen <= 10
        assert f"stopped early at step {done.step}: nothing better since step {chosen}" in caplog.text
        assert (last(tmp_path / "run")["ended"], last(tmp_path / "run")["step"]) == (True, done.step)
        document = run_json(tmp_path / "run")
        assert (document["status"], document["step"], document["steps"]) == ("finished", done.step, 40)
        assert document["metrics"] == done.metrics
        assert done.metrics["val_prior/rel_l2"] == scores[done.step]
        assert done.metrics["loss/recon"] == list(column(tmp_path / "run", "loss/recon").values())[-1], "logged before"

    def test_it_is_finished(self, store: Path, tmp_path: Path) -> None:
        """The same command has nothing to do, and `show` says what happened."""
        plan_meddling(wear(10))
        done = fit(job(store, tmp_path / "run", **EARLY))
        plan_meddling(lambda step: None)
        before = contents(tmp_path / "run")
        again = fit(job(store, tmp_path / "run", **EARLY))
        assert (again.step, again.seconds, again.metrics) == (done.step, 0.0, done.metrics)
        ran = psftrain("fit", *words(store, tmp_path / "run", **EARLY))
        assert f"{done.step} steps, nothing to do" in ran.out
        assert contents(tmp_path / "run") == before
        found = state(tmp_path / "run", read_log(tmp_path / "run"))
        assert (found["status"], found["step"]) == ("finished", done.step)
        assert f"finished, step {done.step} of 40, stopped early" in psftrain("show", tmp_path / "run").out

    def test_the_count_goes_on_over_a_stop(self, store: Path, tmp_path: Path) -> None:
        plan_meddling(wear(10))
        fit(job(store, tmp_path / "undisturbed", **EARLY))
        assert best(tmp_path / "undisturbed")["step"] < 9 < last(tmp_path / "undisturbed")["step"]

        def wear_and_stop(step: int) -> None:
            wear(10)(step)
            send(signal.SIGTERM, 8)(step)

        plan_meddling(wear_and_stop)
        with pytest.raises(Preempted, match="after step 9"):
            fit(job(store, tmp_path / "run", **EARLY))
        plan_meddling(wear(1))  # the second of this process is the eleventh
        fit(job(store, tmp_path / "run", **EARLY))
        same_run(tmp_path / "run", tmp_path / "undisturbed")

    def test_a_run_that_gets_better_is_left_alone(self, store: Path, tmp_path: Path) -> None:
        plan_meddling(lambda step: None)
        settings = {**EARLY, "steps": 12, "lr": 3e-3, "patience": 30}
        assert fit(job(store, tmp_path / "run", **settings)).step == 12
        assert "stopped early" not in psftrain("show", tmp_path / "run").out


@pytest.mark.usefixtures("meddling")
@pytest.mark.parametrize(
    "changes", [{"ema": 0.8}, {"accumulate": 4}, {"loss__anneal": [0.1, 0.9], "schedule": "restarts"}], ids=str
)
@pytest.mark.parametrize("at", [3, 7])
def test_stopped_anywhere_it_ends_with_the_same_bits(
    store: Path, tmp_path: Path, changes: dict[str, Any], at: int
) -> None:
    config = {"steps": 16, "data__val": 0.3, "val_every": 4, "log_every": 1, "model__name": "meddling", **changes}
    fit(job(store, tmp_path / "undisturbed", **config))
    plan_meddling(send(signal.SIGTERM, at * config.get("accumulate", 1)))
    with pytest.raises(Preempted, match=f"after step {at + 1}"):
        fit(job(store, tmp_path / "run", **config))
    plan_meddling(lambda step: None)
    fit(job(store, tmp_path / "run", **config))
    same_run(tmp_path / "run", tmp_path / "undisturbed")


# --- starting from other weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_may_start_from_anothers_weights(store: Path, tmp_path: Path, ema: float | None) -> None:
    """From its best model as it is judged, averaged where there is an average; with an optimiser of its own."""
    fit(job(store, tmp_path / "first", ema=ema))
    ran = psftrain("fit", *words(store, tmp_path / "second", steps=0), "--init", tmp_path / "first")
    assert ran.code == 0, ran.err
    state = last(tmp_path / "second")
    assert equal_states(state["model"], dict(load_run(tmp_path / "first").model.state_dict()))
    assert state["optimizer"]["state"] == {}
    assert state["config"]["init"] == str(tmp_path / "first")


def test_an_export_may_be_started_from(plain: Path, store: Path, tmp_path: Path) -> None:
    assert psftrain("export", plain, "--format", "safetensors", "--out", tmp_path / "export").code == 0
    fit(job(store, tmp_path / "run", steps=0, init=str(tmp_path / "export")))
    assert equal_states(last(tmp_path / "run")["model"], best(plain)["model"])


def test_another_store_of_the_same_shape_may_be_started_on(plain: Path, tmp_path: Path) -> None:
    """As for another specimen, or another lens."""
    other = make_store(tmp_path / "other.zarr", depth=(300.0, 900.0), lens_text='{"info": "another lens"}')
    fit(job(other, tmp_path / "run", steps=0, init=str(plain)))
    assert equal_states(last(tmp_path / "run")["model"], best(plain)["model"])


@pytest.mark.usefixtures("meddling")
def test_going_on_does_not_start_again(store: Path, plain: Path, tmp_path: Path) -> None:
    """Nor does it need the other run any more."""
    first = Path(shutil.copytree(plain, tmp_path / "first"))
    document = best(first)
    document["config"]["model"]["name"] = "meddling"
    checkpoint.save(first / "checkpoints" / "best.pt", document)
    config = {"model__name": "meddling", "init": str(first)}
    fit(job(store, tmp_path / "undisturbed", **config))
    plan_meddling(send(signal.SIGTERM, 6))
    with pytest.raises(Preempted):
        fit(job(store, tmp_path / "run", **config))
    plan_meddling(lambda step: None)
    shutil.rmtree(first)
    fit(job(store, tmp_path / "run", **config))
    assert equal_states(last(tmp_path / "run")["model"], last(tmp_path / "undisturbed")["model"])


# --- what the loss is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_every_reconstruction_trains(store: Path, plain: Path, tmp_path: Path, name: str) -> None:
    fit(job(store, tmp_path / "run", loss__recon=name))
    assert all(math.isfinite(value) for line in logged(tmp_path / "run") for value in line.values())
    assert not equal_states(best(tmp_path / "run")["model"], best(plain)["model"])


@pytest.mark.parametrize("smooth_over", ["batch", "grid"])
@pytest.mark.parametrize("smooth_on", ["prior_mean", "posterior_mean", "kernels", "kernels_tv"])
def test_every_smoothness_trains(store: Path, tmp_path: Path, smooth_on: str, smooth_over: str) -> None:
    """And smooths: with a weight that is felt, neighbours end up more alike."""
    found = []
    for weight in (1e-9, 30.0):
        run = tmp_path / str(weight)
        changes = {"loss__smooth_on": smooth_on, "loss__smooth_over": smooth_over, "loss__smooth": weight}
        fit(job(store, run, steps=40, log_every=1, lr=0.01, schedule="constant", **changes))
        values = list(column(run, "loss/smooth").values())
        assert all(math.isfinite(value) and value >= 0 for line in logged(run) for value in (line["loss/smooth"],))
        found.append(sum(values[-10:]))
    assert found[1] < 0.8 * found[0]


def test_noise_weighs_examples(store: Path, plain: Path, tmp_path: Path) -> None:
    fit(job(store, tmp_path / "run", loss__noise_half=0.02))
    assert not equal_states(best(tmp_path / "run")["model"], best(plain)["model"])
    assert column(tmp_path / "run", "loss/recon")[4] < column(plain, "loss/recon")[4], "each counts at most once"


# --- what changes in the course of a run ------------------------------------------------------------------------------


def test_the_rate_and_beta_of_every_step_stand_on_the_board(store: Path, tmp_path: Path) -> None:
    config = job(
        store,
        tmp_path / "run",
        steps=32,
        log_every=1,
        schedule="restarts",
        restarts=2,
        loss__anneal=[0.25, 0.75],
        loss__beta=2e-3,
    )
    fit(config)
    rates, betas = column(tmp_path / "run", "train/lr"), column(tmp_path / "run", "train/beta")
    assert rates == {step: schedules.learning_rate(config, step - 1) for step in range(1, 33)}
    assert betas == {step: schedules.beta(config, step - 1) for step in range(1, 33)}
    assert betas[1] == pytest.approx(2e-5)
    assert betas[32] == 2e-3
    assert sum(rates[step] < rates[step + 1] for step in range(4, 32)) == 2, "it begins anew twice"
    totals = column(tmp_path / "run", "loss/total")
    for line in logged(tmp_path / "run"):
        terms = [line[f"loss/{name}"] for name in ("recon", "prior", "kl", "smooth")]
        assert totals[line["step"]] == pytest.approx(np.dot([1, 1, betas[line["step"]], 1e-5], terms), rel=1e-5)


@pytest.mark.parametrize("changes", [{"schedule": "restarts"}, {"schedule": "constant"}, {"loss__anneal": [0.2, 0.8]}])
def test_every_schedule_trains_otherwise(store: Path, plain: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    fit(job(store, tmp_path / "run", **changes))
    assert not equal_states(best(tmp_path / "run")["model"], best(plain)["model"])


def test_the_clock_stands_on_the_board(plain: Path) -> None:
    for line in map(json.loads, (plain / "metrics.jsonl").read_text().splitlines()):
        assert line["train/steps_per_s"] > 0
        assert line["train/kernels_per_s"] == pytest.approx(8 * line["train/steps_per_s"])
        assert 0 <= line["train/data_share"] <= 1
    assert steps_of(plain, "train/data_share") == [4, 8, 12]


@pytest.mark.gpu
def test_the_memory_of_a_gpu_stands_on_the_board(store: Path, tmp_path: Path) -> None:
    fit(job(store, tmp_path / "run", device="cuda"))
    assert all(line["gpu/memory_gib"] > 0 for line in logged(tmp_path / "run"))


# --- warnings ---------------------------------------------------------------------------------------------------------


def warned(caplog: pytest.LogCaptureFixture, about: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith("warning: ") and about in line]


def test_a_posterior_that_tells_nothing_is_told_once(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With what to change, as long as there is time to; each remedy can be typed."""
    fit(job(store, tmp_path / "run", steps=60, log_every=2, lr=0.01, loss__beta=30.0))
    (line,) = warned(caplog, "the posterior has collapsed")
    assert column(tmp_path / "run", "kl/active_dims")[60] == 0
    assert "0 of 3 latent dimensions active" in line
    assert "--set loss.beta=0.3" in line
    assert "--set 'loss.anneal=[0.1,0.5]'" in line
    assert "--set loss.kl=0.05" in line


def test_the_published_model_collapses_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_store(tmp_path / "s.zarr")
    fit(job(path, tmp_path / "run", steps=60, log_every=2, model__name="seed_cvae", lr=1e-3, loss__beta=1.0))
    (line,) = warned(caplog, "the posterior has collapsed")
    assert "--set loss.recon=rel_l2" in line


def test_nothing_is_said_before_beta_has_its_weight(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A posterior under a ramp is not yet what it will be."""
    fit(job(store, tmp_path / "run", steps=20, log_every=1, loss__beta=30.0, loss__anneal=[0.9, 1.0]))
    assert not warned(caplog, "collapsed")


def test_a_latent_that_is_used_is_no_collapse(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(job(store, tmp_path / "run", steps=200, log_every=20, lr=0.01, loss__beta=1e-6))
    assert column(tmp_path / "run", "kl/active_dims")[200] > 0
    assert not warned(caplog, "")


def test_a_model_that_fits_its_points_alone_is_told_once(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A validation store of other kernels altogether: those of a lens upside down."""

    def turned(x: Any, y: Any, depth: float, focus: float, wavelength: Any, side: int, aspect: float) -> Any:
        return kernel(-y, x, depth, focus, wavelength, side, aspect) ** 3

    val = make_store(tmp_path / "v.zarr", grid=4, depth=(1000.0, math.inf), formula=turned)
    settings = {"steps": 300, "val_every": 20, "lr": 0.01, "model__width": 32, "loss__beta": 1e-6}
    fit(job(store, tmp_path / "run", val=str(val), **settings))
    (line,) = warned(caplog, "validation points")
    train, held = (column(tmp_path / "run", f"{name}_prior/rel_l2") for name in ("train", "val"))
    told = next(step for step in train if held[step] > 3 * train[step])
    assert f"errs {held[told]:.1%} on the validation points and {train[told]:.1%} on the training points" in line
    assert "--set model.width=16" in line


# --- what is withheld -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depths", "focuses", "share"), [(1, 0, 0.0), (2, 0, 0.0), (0, 1, 0.0), (1, 1, 0.3)])
def test_whole_distances_are_withheld_and_recorded(
    deep: Path, tmp_path: Path, depths: int, focuses: int, share: float
) -> None:
    """Interior ones, and never seen: run.json says which they were."""
    fit(job(deep, tmp_path / "run", data__val_depth=depths, data__val_focus=focuses, data__val=share))
    document = run_json(tmp_path / "run")
    split = document["split"]
    assert len(split["depth_mm"]) == depths
    assert set(split["depth_mm"]) <= {1000.0, 2000.0}
    assert split["focus_mm"] == [2000.0] * focuses
    assert len(split["field"]) == round(share * 9)
    left = (4 - depths) * (3 - focuses) * (25 - len(split["field"]))
    assert (split["train"], split["val"]) == (left, 300 - left)
    assert document["examples"] == left
    assert column(tmp_path / "run", "val_prior/rel_l2").keys() == {8, 12}
    lines = psftrain("show", tmp_path / "run").out
    assert "withheld: " in lines


def test_withheld_distances_leave_no_trace_in_the_weights(deep: Path, tmp_path: Path) -> None:
    settings = {"data__val_depth": 1, "data__val_focus": 1, "seed": 2, "save_every": 99, "val_every": 99}
    fit(job(deep, tmp_path / "0", **settings))
    split = run_json(tmp_path / "0")["split"]
    depths, focuses = (500.0, 1000.0, 2000.0, math.inf), (800.0, 2000.0, 9000.0)
    gone = {1000 / distance for distance in split["depth_mm"]}, {1000 / distance for distance in split["focus_mm"]}

    def changed(x: Any, y: Any, depth: float, focus: float, *more: Any) -> Any:
        held = any(math.isclose(depth, d) for d in gone[0]) or any(math.isclose(focus, f) for f in gone[1])
        found = kernel(x, y, depth, focus, *more)
        return found[..., ::-1, :] if held else found

    other = make_store(tmp_path / "other.zarr", depth=depths, focus=focuses, formula=changed)
    fit(job(other, tmp_path / "1", **settings))
    assert equal_states(last(tmp_path / "0")["model"], last(tmp_path / "1")["model"])
    scores = [column(tmp_path / str(number), "val_prior/rel_l2")[12] for number in (0, 1)]
    assert scores[0] != scores[1], "there the kernels are other ones"


# --- where and how a run is computed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "auto", "graph": False},
        {"data__mode": "resident"},
        {"data__mode": "memmap", "data__cache": "cache"},
        {"data__cache": "elsewhere"},
    ],
    ids=str,
)
def test_where_a_run_is_computed_may_change(
    store: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Device, graph, mode and cache are no part of what is learned."""
    monkeypatch.chdir(tmp_path)
    stop_at(job(store, tmp_path / "run"), 6)
    config = job(store, tmp_path / "run", **changes)
    fit(config)
    assert equal_states(last(tmp_path / "run")["model"], last(plain)["model"])
    assert load_fit_config(tmp_path / "run" / "config.yaml", []) == config, "that of the last command"


@pytest.mark.campaign  # a minute of the compiler
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile compiles C++, and g++ is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_may_go_on_compiled(store: Path, plain: Path, tmp_path: Path) -> None:
    stop_at(job(store, tmp_path / "run"), 6)
    fit(job(store, tmp_path / "run", compile=True))
    for name, value in last(tmp_path / "run")["model"].items():
        torch.testing.assert_close(value, last(plain)["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [("stream", "resident"), ("memmap", "stream")])
def test_a_mode_that_gives_another_order_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """And named, with the way out; `auto` goes on with the order of the beginning."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stop_at(job(store, tmp_path / "run", data__mode=before), 6)
    found = contents(tmp_path / "run")
    ran = psftrain("fit", *words(store, tmp_path / "run", data__mode=after))
    assert ran.code == 2
    assert f"began with data.mode {before}, which gives the examples in another order than {after}" in one_line_error(
        ran
    )
    assert f"--set data.mode={before} goes on" in one_line_error(ran)
    assert contents(tmp_path / "run") == found
    fit(job(store, tmp_path / "whole", data__mode=before))
    fit(job(store, tmp_path / "run", data__mode="auto"))
    assert equal_states(last(tmp_path / "run")["model"], last(tmp_path / "whole")["model"])


def stop_at(config: Any, step: int) -> None:
    """Train, and be stopped by a signal after a step."""
    call, taken = Stepper.__call__, 0

    def counting(self: Stepper, parts: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            signal.raise_signal(signal.SIGTERM)
        return call(self, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "__call__", counting)
        with pytest.raises(Preempted, match=f"after step {step}"):
            fit(config)


HOW: list[tuple[str, Any, str]] = [
    ("precision", "bf16", "precision = float32, this one has bf16"),
    ("tf32", False, "tf32 = True, this one has False"),
    ("accumulate", 2, "accumulate = 1, this one has 2"),
    ("ema", 0.9, "ema = null, this one has 0.9"),
    ("patience", 3, "patience = null, this one has 3"),
    ("restarts", 1, "restarts = 3, this one has 1"),
    ("clip", None, "clip = 1.0, this one has null"),
    ("loss__anneal", [0.1, 0.5], r"loss.anneal = null, this one has \[0.1, 0.5\]"),
    ("loss__noise_half", 0.1, "loss.noise_half = null, this one has 0.1"),
    ("loss__smooth_on", "kernels", "loss.smooth_on = prior_mean, this one has kernels"),
    ("loss__smooth_over", "grid", "loss.smooth_over = batch, this one has grid"),
    ("data__array", "psf", "data.array = psf_binned, this one has psf"),
    ("data__buffer_mib", 3, "data.buffer_mib = 512, this one has 3"),
    ("data__val_depth", 1, "data.val_depth = 0, this one has 1"),
    ("init", "elsewhere", "init = null, this one has elsewhere"),
]


@pytest.mark.parametrize(("key", "value", "message"), HOW)
def test_what_is_learned_may_not_change(
    deep: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    run = tmp_path / "run"
    fit(job(deep, run, steps=0, data__val=0.3) if key == "patience" else job(deep, run, steps=0))
    before = contents(run)
    with pytest.raises(RunMismatch, match=message):
        fit(job(deep, run, steps=0, **({"data__val": 0.3} if key == "patience" else {}), **{key: value}))
    assert contents(run) == before
