"""Training: what a run writes, that it can stop and go on anywhere, and that it learns."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from conftest import contents, fork, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import (
    Meddling,
    best,
    equal_states,
    examples_of,
    job,
    logged,
    make_store,
    one_line_error,
    psftrain,
    words,
)

from psfgen.errors import FitError, Preempted, RunMismatch
from psfgen.store import open_store
from psftrain import checkpoint, metrics
from psftrain.config import FitConfig, load_fit_config
from psftrain.fit import fit, validate
from psftrain.losses import Objective
from psftrain.models import MODELS
from psftrain.run import load_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 x 5 points, two depths, one masked place."""
    path = tmp_path_factory.mktemp("train") / "s.zarr"
    return make_store(path, depth=(1000.0, math.inf), dark=[np.s_[0, 0, 0, 0, 1]])


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 12 steps, not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "fit"
    fit(job(store, path))
    return path


def tensorboard(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def steps_of(run: Path, tag: str) -> list[int]:
    return [event.step for event in tensorboard(run).Scalars(tag)]


def run_json(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "run.json").read_text())
    return document


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_a_run_directory(run: Path, store: Path) -> None:
    files = set(contents(run))
    expected = {"config.yaml", "run.json", "metrics.jsonl", "checkpoints/best.pt"}
    expected |= {f"checkpoints/step-{step:08d}.pt" for step in (5, 10, 12)}
    assert files >= expected
    assert all(name.startswith("tb/events") for name in files - expected)
    document = run_json(run)
    assert (document["status"], document["steps"], document["model"]) == ("finished", 12, "field_cvae")
    assert (document["examples"], document["masked"]) == (49, 1)
    assert document["plan_sha256"] == [open_store(store).attrs["plan_sha256"]]
    model = load_run(run).model
    assert document["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_config_is_written_whole(run: Path, store: Path) -> None:
    assert load_fit_config(run / "config.yaml", []) == job(store, run)
    assert yaml.safe_load((run / "config.yaml").read_text())["loss"]["recon"] == {"rel_l2": 1.0, "nll": 0.1}


def test_a_checkpoint_is_plain_data_and_tensors(run: Path, store: Path) -> None:
    state = torch.load(run / "checkpoints" / "step-00000010.pt", weights_only=True)
    assert {"model", "optimizer", "scheduler", "ema", "step", "config", "fingerprint"} <= set(state)
    assert state["step"] == 10
    assert FitConfig.model_validate(state["config"]) == job(store, run)
    attrs = open_store(store).attrs
    assert state["fingerprint"] == {
        "lens_sha256": attrs["lens"]["sha256"],
        "fnum": None,
        "sensor_mm": [6.0, 6.0],
        "reference_um": 0.5876,
        "pitch_um": 4.0,
        "kernel_px": 10,
        "bins": 5,
        "wavelength": [0.48, 0.55, 0.64],
        "array": "psf_binned",
    }
    assert len(state["optimizer"]["state"]) == len(state["model"])
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {10}


def test_without_validation_the_best_is_the_last(run: Path) -> None:
    assert equal_states(best(run), checkpoint.load(checkpoint.path_of(run, 12)))
    assert not equal_states(best(run)["model"], checkpoint.load(checkpoint.path_of(run, 10))["model"])


SCALARS = {"loss/recon", "loss/prior", "loss/kl", "loss/smooth", "loss/total", "kl/active_dims", "train/lr"}


def test_scalars_and_pictures(run: Path) -> None:
    tags = tensorboard(run).Tags()
    assert set(tags["scalars"]) == {*SCALARS, "train/steps_per_s"}, "and no val_*"
    assert steps_of(run, "loss/recon") == [4, 8, 12]
    assert tags["images"] == ["train/truth_posterior_prior"]
    assert [event.step for event in tensorboard(run).Images("train/truth_posterior_prior")] == [0, 8, 12]
    (text,) = tensorboard(run).Tensors("config/text_summary")
    assert b"steps: 12" in text.tensor_proto.string_val[0]


def test_metrics_jsonl_holds_the_same_scalars(run: Path) -> None:
    lines = logged(run)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(set(line) == {"step", *SCALARS} for line in lines)
    for tag in SCALARS:
        values = [event.value for event in tensorboard(run).Scalars(tag)]
        assert values == pytest.approx([line[tag] for line in lines], rel=1e-6)


def test_terms_are_logged_unweighted(run: Path) -> None:
    """total = recon + 1 prior + 1e-3 kl + 1e-5 smooth."""
    for line in logged(run):
        terms = [line[f"loss/{name}"] for name in ("recon", "prior", "kl", "smooth")]
        assert line["loss/total"] == pytest.approx(np.dot([1, 1, 1e-3, 1e-5], terms), rel=1e-5)


@pytest.mark.parametrize("how", ["store", "share"])
def test_with_a_validation_set(store: Path, tmp_path: Path, how: str) -> None:
    val = make_store(tmp_path / "v.zarr", grid=4, layout="random", field_max=0.9, depth=(3000.0,), seed=2)
    given = {"val": str(val)} if how == "store" else {"data__val": 0.3}
    done = fit(job(store, tmp_path / "run", **given))
    tags = tensorboard(tmp_path / "run").Tags()
    assert {"val_prior/rel_l2", "val_posterior/rel_l2"} <= set(tags["scalars"])
    assert tags["images"] == ["train/truth_posterior_prior", "val/truth_posterior_prior"]
    assert steps_of(tmp_path / "run", "val_prior/rel_l2") == [8, 12]
    scores = {line["step"]: line["val_prior/rel_l2"] for line in logged(tmp_path / "run") if "val_prior/rel_l2" in line}
    assert done.metrics["val_prior/rel_l2"] == scores[12]
    assert best(tmp_path / "run")["step"] == min(scores, key=lambda step: scores[step])


def _conditions(trained: Any, path: Path) -> torch.Tensor:
    """Conditions of a store's points as a run encodes them."""
    store = open_store(path)
    y, x = np.meshgrid(store.coords["field_y"], store.coords["field_x"], indexing="ij")
    depth, focus = store.coords["depth_dioptre"][0], store.coords["focus_dioptre"][0]
    return torch.from_numpy(trained.conditioning.encode(x.ravel(), y.ravel(), depth, focus))


def test_validation_by_hand(store: Path, tmp_path: Path, run: Path) -> None:
    """Mean relative error of the prior's mean and of the posterior's."""
    trained = load_run(run)
    examples, _ = examples_of(store)
    found = validate(Objective(trained.model, trained.config.loss), examples, torch.device("cpu"))
    model, truth, condition = trained.model, examples.kernels, examples.condition
    with torch.no_grad():
        for name, z in (("prior", model.prior(condition).mean), ("posterior", model.posterior(truth, condition).mean)):
            error = metrics.rel_l2(model.decode(z, condition).numpy(), truth.numpy()).mean()
            assert found[f"val_{name}/rel_l2"] == pytest.approx(error, rel=1e-5)


def test_withheld_points_are_never_trained_on(store: Path, tmp_path: Path) -> None:
    """Whatever their kernels are, the weights come out the same."""

    def change(name: str, values: np.ndarray) -> None:
        if name == "psf_binned":
            values[0, 0, 1:4, 1:4] = 1 / 25

    other = make_store(tmp_path / "other.zarr", depth=(1000.0, math.inf), dark=[np.s_[0, 0, 0, 0, 1]], change=change)
    weights = []
    settings: dict[str, Any] = {"data__val": 0.89, "seed": 3, "steps": 4, "val_every": 99, "save_every": 99}
    for number, path in enumerate((store, other)):
        fit(job(path, tmp_path / str(number), **settings))
        weights.append(checkpoint.load(checkpoint.path_of(tmp_path / str(number), 4))["model"])
    assert round(0.89 * 9) == 8
    assert not equal_states(*weights), "one of the nine interior points is left to train on"
    shutil.rmtree(other)
    withheld = _withheld(store)

    def only_withheld(name: str, values: np.ndarray) -> None:
        if name == "psf_binned":
            for row, column in withheld:
                values[0, 0, row, column] = 1 / 25

    make_store(other, depth=(1000.0, math.inf), dark=[np.s_[0, 0, 0, 0, 1]], change=only_withheld)
    fit(job(other, tmp_path / "2", **settings))
    assert equal_states(weights[0], checkpoint.load(checkpoint.path_of(tmp_path / "2", 4))["model"])


def _withheld(store: Path) -> set[tuple[int, int]]:
    from psftrain.data import withhold

    val = withhold(examples_of(store)[0], 0.89, 3)[1]
    assert val is not None
    return {(row, column) for *_, row, column in val.index.tolist()}


def test_a_validation_store_and_a_share_exclude_each_other(store: Path, tmp_path: Path) -> None:
    ran = psftrain("fit", *words(store, tmp_path / "run", data__val=0.3), "--val", store)
    assert ran.code == 2
    assert "val and data.val exclude each other" in one_line_error(ran)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("keep", "left"), [(1, [22]), (2, [20, 22]), (3, [15, 20, 22]), (9, [5, 10, 15, 20, 22])])
def test_only_the_last_checkpoints_are_kept(store: Path, tmp_path: Path, keep: int, left: list[int]) -> None:
    fit(job(store, tmp_path / "run", steps=22, keep=keep))
    assert checkpoint.steps(tmp_path / "run") == left
    assert best(tmp_path / "run")["step"] == 22


@pytest.mark.parametrize("val", [0.0, 0.3])
def test_no_steps_validate_everything_and_draw(store: Path, tmp_path: Path, val: float) -> None:
    """Pictures and a model that can be judged, trained or not."""
    ran = psftrain("fit", *words(store, tmp_path / "run", steps=0, data__val=val))
    assert ran.code == 0
    images = tensorboard(tmp_path / "run").Tags()["images"]
    assert images == ["train/truth_posterior_prior", *(["val/truth_posterior_prior"] if val else [])]
    assert checkpoint.steps(tmp_path / "run") == [0]
    assert best(tmp_path / "run")["step"] == 0
    assert run_json(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_and_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", grid=4)
    fit(job(path, tmp_path / "run", model__name=name))
    trained = load_run(tmp_path / "run")
    assert trained.config.model.name == name
    assert equal_states(trained.model.state_dict(), best(tmp_path / "run")["model"])
    assert not trained.model.training
    assert "loss/smooth" in logged(tmp_path / "run")[-1]


@pytest.mark.parametrize("array", ["psf", "psf_binned"])
def test_full_size_kernels_may_be_trained_on(tmp_path: Path, array: str) -> None:
    path = make_store(tmp_path / "s.zarr", grid=3)
    fit(job(path, tmp_path / "run", data__array=array, steps=2))
    side = {"psf": 10, "psf_binned": 5}[array]
    trained = load_run(tmp_path / "run")
    assert trained.model.decode(torch.zeros(1, 3), torch.zeros(1, 4)).shape == (1, 3, side, side)


# --- determinism ------------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bits(run: Path, store: Path, tmp_path: Path) -> None:
    """Whatever random numbers were drawn before."""
    torch.manual_seed(99)
    fit(job(store, tmp_path / "again"))
    assert equal_states(best(tmp_path / "again")["model"], best(run)["model"])
    assert logged(tmp_path / "again") == logged(run)


def test_the_seed_matters(run: Path, store: Path, tmp_path: Path) -> None:
    fit(job(store, tmp_path / "other", seed=1))
    assert not equal_states(best(tmp_path / "other")["model"], best(run)["model"])


def test_looking_changes_nothing(run: Path, store: Path, tmp_path: Path) -> None:
    """How often a run logs, validates and saves is no part of its numbers."""
    fit(job(store, tmp_path / "quiet", log_every=99, val_every=3, save_every=99))
    assert equal_states(best(tmp_path / "quiet")["model"], best(run)["model"])


# --- stop and go on ---------------------------------------------------------------------------------------------------


@pytest.fixture
def meddling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model in the table that can disturb its own training; it starts as a plain field_cvae."""
    monkeypatch.setitem(MODELS, "meddling", "training:Meddling")
    plan_meddling(lambda step: None)
    yield
    plan_meddling(lambda step: None)


def plan_meddling(what: Callable[[int], float | None]) -> None:
    Meddling.meddle, Meddling.seen = staticmethod(what), 0


def send(number: signal.Signals, at: int) -> Callable[[int], None]:
    def meddle(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    return meddle


WORSE = {"val_every": 1, "lr": 0.05, "warmup": 0, "schedule": "constant"}


def wear(after: int) -> Callable[[int], None]:
    """From a step on, take everything out of the decoder that it has learned."""

    def meddle(step: int) -> None:
        if step >= after:
            with torch.no_grad():
                for parameter in Meddling.model.decoder.parameters():
                    parameter.zero_()

    return meddle


def a_minute_ago(run: Path) -> None:
    """TensorBoard reads files in the order of the second and then the process they are named by, so what a killed
    process wrote must be older than a second.
    """
    for path in (run / "tb").iterdir():
        start, stamp, rest = re.fullmatch(r"(.*tfevents\.)(\d+)(\..*)", path.name).groups()  # type: ignore[union-attr]
        path.rename(path.with_name(f"{start}{int(stamp) - 60:010d}{rest}"))


def same_run(found: Path, expected: Path) -> None:
    """Equal to the last bit: weights, optimizer, and every scalar once."""
    states = [checkpoint.load(checkpoint.path_of(path, checkpoint.steps(path)[-1])) for path in (found, expected)]
    for key in ("model", "optimizer", "step", "best"):
        assert equal_states(*(state[key] for state in states)), key
    assert equal_states(best(found)["model"], best(expected)["model"])
    assert logged(found) == logged(expected)
    keys = [(line["step"], *sorted(line)) for line in logged(found)]
    assert len(set(keys)) == len(keys)
    for tag in ("loss/recon", "kl/active_dims"):
        assert steps_of(found, tag) == steps_of(expected, tag)
    assert run_json(found)["status"] == "finished"


@pytest.mark.usefixtures("meddling")
class TestStopping:
    settings: ClassVar[dict[str, Any]] = {
        "model__name": "meddling",
        "steps": 16,
        "log_every": 2,
        "val_every": 3,
        "data__val": 0.3,
    }

    @pytest.fixture
    def undisturbed(self, store: Path, tmp_path: Path) -> Path:
        path = tmp_path / "undisturbed"
        fit(job(store, path, **self.settings))
        return path

    @pytest.mark.parametrize("at", [2, 7, 14])
    def test_kill_and_go_on(self, store: Path, tmp_path: Path, undisturbed: Path, at: int) -> None:
        """kill -9 in the middle of a step, before the first checkpoint (5) and after."""
        config = job(store, tmp_path / "run", **self.settings)
        plan_meddling(send(signal.SIGKILL, at))
        assert wait_for(fork(lambda: fit(config))) == -signal.SIGKILL
        assert checkpoint.steps(tmp_path / "run") == [step for step in (5, 10) if step <= at]
        assert max(line["step"] for line in logged(tmp_path / "run")) > max([*checkpoint.steps(tmp_path / "run"), 0])
        assert run_json(tmp_path / "run")["status"] == "running"
        a_minute_ago(tmp_path / "run")
        plan_meddling(lambda step: None)
        assert fit(config).step == 16
        same_run(tmp_path / "run", undisturbed)

    def test_killed_from_outside(self, store: Path, tmp_path: Path, undisturbed: Path) -> None:
        """As soon as a checkpoint stands there, wherever the run then is."""

        def wait(step: int) -> None:
            while step == 8:  # so that it cannot finish before it is killed
                signal.pause()

        config = job(store, tmp_path / "run", **self.settings)
        plan_meddling(wait)
        pid = fork(lambda: fit(config))
        while not checkpoint.path_of(tmp_path / "run", 5).exists():
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the run ended by itself"
            os.sched_yield()
        os.kill(pid, signal.SIGKILL)
        assert wait_for(pid) == -signal.SIGKILL
        a_minute_ago(tmp_path / "run")
        plan_meddling(lambda step: None)
        fit(config)
        same_run(tmp_path / "run", undisturbed)

    def test_killed_again_and_again(self, store: Path, tmp_path: Path, undisturbed: Path) -> None:
        """Three steps a life are too few for a checkpoint every five; six are enough."""
        config = job(store, tmp_path / "run", **self.settings)
        plan_meddling(send(signal.SIGKILL, 6))
        lives = 0
        while (code := wait_for(fork(lambda: fit(config)))) != 0:
            assert code == -signal.SIGKILL
            lives += 1
            a_minute_ago(tmp_path / "run")
        assert lives == 2, "at 6 and at 11; the last life has six steps to go"
        same_run(tmp_path / "run", undisturbed)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
    @pytest.mark.parametrize("at", [0, 8])
    def test_a_signal_saves_and_stops(
        self, store: Path, tmp_path: Path, undisturbed: Path, number: signal.Signals, at: int
    ) -> None:
        """The step is finished and saved: exit code 75; the same command goes on."""
        command = ["fit", *words(store, tmp_path / "run", **self.settings)]
        before = signal.getsignal(number)
        plan_meddling(send(number, at))
        ran = psftrain(*command)
        assert ran.code == 75
        last = ran.err.splitlines()[-1]
        assert last.startswith("stopped: ")
        assert f"{number.name} after step {at + 1};" in last
        assert "the same command goes on" in last
        assert ran.out == ""
        assert checkpoint.steps(tmp_path / "run")[-1] == at + 1
        assert signal.getsignal(number) == before
        plan_meddling(lambda step: None)
        assert psftrain(*command).code == 0
        kept = [line for line in logged(tmp_path / "run") if line["step"] % 2 == 0 or "val_prior/rel_l2" in line]
        assert kept == logged(undisturbed)
        same_run(tmp_path / "run", undisturbed)

    def test_the_best_on_the_validation_set_is_kept(self, store: Path, tmp_path: Path) -> None:
        """From before the run got worse; its own weights have that error."""
        val = make_store(tmp_path / "v.zarr", grid=4, layout="random", field_max=0.9, depth=(3000.0,), seed=2)
        plan_meddling(wear(10))
        fit(job(store, tmp_path / "run", **{**self.settings, **WORSE, "data__val": 0.0, "val": str(val)}))
        lines = [line for line in logged(tmp_path / "run") if "val_prior/rel_l2" in line]
        scores = {line["step"]: line["val_prior/rel_l2"] for line in lines}
        assert sorted(scores) == list(range(1, 17))
        trained = load_run(tmp_path / "run")
        assert trained.step == min(scores, key=lambda step: scores[step]) <= 10
        examples = replace(examples_of(val)[0], condition=_conditions(trained, val))
        found = validate(Objective(trained.model, trained.config.loss), examples, torch.device("cpu"))
        assert found["val_prior/rel_l2"] == pytest.approx(min(scores.values()), rel=1e-5)

    def test_the_best_so_far_is_remembered(self, store: Path, tmp_path: Path) -> None:
        """By a run that got worse before it stopped, and goes on getting worse."""
        settings = {**self.settings, **WORSE}
        plan_meddling(wear(10))
        fit(job(store, tmp_path / "undisturbed", **settings))

        def wear_and_stop(step: int) -> None:
            wear(10)(step)
            send(signal.SIGTERM, 12)(step)

        plan_meddling(wear_and_stop)
        with pytest.raises(Preempted, match="after step 13"):
            fit(job(store, tmp_path / "run", **settings))
        plan_meddling(wear(0))
        fit(job(store, tmp_path / "run", **settings))
        assert best(tmp_path / "undisturbed")["step"] <= 10
        same_run(tmp_path / "run", tmp_path / "undisturbed")

    def test_a_second_signal_changes_nothing(self, store: Path, tmp_path: Path, undisturbed: Path) -> None:
        config = job(store, tmp_path / "run", **self.settings)

        def thrice(step: int) -> None:
            for _ in range(3):
                send(signal.SIGTERM, 4)(step)

        plan_meddling(thrice)
        with pytest.raises(Preempted, match="after step 5"):
            fit(config)
        plan_meddling(lambda step: None)
        fit(config)
        same_run(tmp_path / "run", undisturbed)

    @pytest.mark.parametrize("val", [0.0, 0.3])
    def test_a_signal_in_the_last_step_loses_nothing(self, store: Path, tmp_path: Path, val: float) -> None:
        """Whether it counts as finished or as stopped, in the end the run is complete."""
        config = job(store, tmp_path / "run", **{**self.settings, "data__val": val})
        plan_meddling(send(signal.SIGTERM, 15))
        try:
            fit(config)
        except Preempted:
            plan_meddling(lambda step: None)
            fit(config)
        assert checkpoint.steps(tmp_path / "run")[-1] == 16
        assert best(tmp_path / "run")["step"] in range(1, 17)
        assert run_json(tmp_path / "run")["status"] == "finished"

    def test_a_run_cut_off_after_its_last_checkpoint_is_finished_by_the_same_command(
        self, store: Path, tmp_path: Path, undisturbed: Path
    ) -> None:
        """Killed between the final checkpoint and the last line of run.json."""
        document = run_json(undisturbed)
        del document["metrics"]
        (undisturbed / "run.json").write_text(json.dumps({**document, "status": "running"}))
        done = fit(job(store, undisturbed, **self.settings))
        assert done.step == 16
        assert run_json(undisturbed)["status"] == "finished"

    def test_a_run_cut_off_before_run_json_starts_over(self, store: Path, tmp_path: Path, undisturbed: Path) -> None:
        """Killed between its two first files."""
        (tmp_path / "run").mkdir()
        shutil.copy(undisturbed / "config.yaml", tmp_path / "run")
        config = job(store, tmp_path / "run", **self.settings)
        text = (tmp_path / "run" / "config.yaml").read_text().replace(str(undisturbed), str(tmp_path / "run"))
        (tmp_path / "run" / "config.yaml").write_text(text)
        fit(config)
        same_run(tmp_path / "run", undisturbed)

    def test_where_the_run_lies_may_change(self, store: Path, tmp_path: Path, undisturbed: Path) -> None:
        """A run that was moved goes on from where it is."""
        plan_meddling(send(signal.SIGTERM, 8))
        with pytest.raises(Preempted):
            fit(job(store, tmp_path / "run", **self.settings))
        plan_meddling(lambda step: None)
        (tmp_path / "run").rename(tmp_path / "moved")
        fit(job(store, tmp_path / "moved", **self.settings))
        same_run(tmp_path / "moved", undisturbed)
        assert load_run(tmp_path / "moved").step == load_run(undisturbed).step


# --- running it again -------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "fit"))


def test_a_finished_run_is_left_alone(mine: Path, store: Path) -> None:
    before = contents(mine)
    done = fit(job(store, mine))
    assert (done.step, done.seconds) == (12, 0)
    assert done.metrics == run_json(mine)["metrics"]
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 0
    assert "12 steps, nothing to do" in ran.out
    assert contents(mine) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 13}, "steps = 12, this one has 13"),
        ({"lr": 0.5}, "lr = 0.003, this one has 0.5"),
        ({"model__width": 8}, "model.width = 16, this one has 8"),
        ({"loss__beta": 1}, "loss.beta = 0.001, this one has 1"),
        ({"loss__recon": "mse"}, "loss.recon"),
        ({"data__val": 0.3}, "data.val = 0.0, this one has 0.3"),
        ({"seed": 1}, "seed = 0, this one has 1"),
        ({"model__octaves": 1}, "model.octaves = None, this one has 1"),
    ],
)
def test_another_config_is_refused_and_named(mine: Path, store: Path, change: dict[str, Any], message: str) -> None:
    before = contents(mine)
    ran = psftrain("fit", *words(store, mine, **change))
    assert ran.code == 2
    assert message in one_line_error(ran)
    assert "--run" in one_line_error(ran), "the way out"
    assert contents(mine) == before


def test_another_store_is_refused(mine: Path, store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr", depth=(1000.0, math.inf), dark=[np.s_[0, 0, 0, 0, 1]])
    ran = psftrain("fit", *words(other, mine))
    assert ran.code == 2
    assert "store = " in one_line_error(ran)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pitch_um": 5.0}, "pitch_um is 5.0, but 4.0"), ({"grid": 6}, "another render"), ({"seed": 1}, "another render")],
)
def test_a_store_rendered_anew_is_refused(mine: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Under the same name."""
    path = tmp_path / "s.zarr"
    make_store(path, depth=(1000.0, math.inf))
    fit(job(path, tmp_path / "run"))
    shutil.rmtree(path)
    make_store(path, **{"depth": (1000.0, math.inf), **change})
    with pytest.raises(RunMismatch, match=message):
        fit(job(path, tmp_path / "run"))


def test_no_resume_takes_a_new_directory_only(mine: Path, store: Path, tmp_path: Path) -> None:
    before = contents(mine)
    ran = psftrain("fit", *words(store, mine), "--no-resume")
    assert ran.code == 2
    assert "holds a run already" in one_line_error(ran)
    assert contents(mine) == before
    (tmp_path / "empty").mkdir()
    assert psftrain("fit", *words(store, tmp_path / "empty", steps=1), "--no-resume").code == 0
    assert psftrain("fit", *words(store, tmp_path / "new", steps=1), "--no-resume").code == 0


@pytest.mark.parametrize("flag", [[], ["--no-resume"]])
def test_a_directory_with_something_else_is_left_alone(store: Path, tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    ran = psftrain("fit", *words(store, tmp_path / "notes"), *flag)
    assert ran.code == 2
    assert "is not empty and holds no run" in one_line_error(ran)
    assert contents(tmp_path / "notes") == {"todo.txt": b"x"}


@pytest.mark.parametrize("where", ["run", "run/deeper"])
def test_a_place_that_cannot_be_written_is_a_clear_error(store: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "run").write_text("a file")
    ran = psftrain("fit", *words(store, tmp_path / where))
    assert ran.code in (1, 2)
    assert "choose another --run" in one_line_error(ran)


# --- broken checkpoints -----------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_named_and_the_one_before_takes_over(mine: Path, store: Path, run: Path) -> None:
    path = checkpoint.path_of(mine, 12)
    path.write_bytes(path.read_bytes()[:2000])
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 2
    error = one_line_error(ran)
    assert str(path) in error
    assert "delete it to go on from the one before" in error
    path.unlink()
    fit(job(store, mine))
    same_run(mine, run)


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(mine: Path, store: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, ran in (
        ("step-00000012.pt", lambda: psftrain("fit", *words(store, mine))),
        ("best.pt", lambda: psftrain("eval", mine)),
    ):
        (mine / "checkpoints" / name).write_bytes(pickle.dumps({"model": Trap()}))
        found = ran()
        assert found.code == 2
        assert name in one_line_error(found)
        assert not (tmp_path / "ran").exists()


# --- a loss that is no number -----------------------------------------------------------------------------------------


def test_an_absurd_rate_is_answered_with_the_step(store: Path, tmp_path: Path) -> None:
    ran = psftrain("fit", *words(store, tmp_path / "run", lr=1e30, warmup=0, log_every=1))
    assert ran.code == 1
    assert "the loss is no longer finite at step 2;" in one_line_error(ran)
    assert "lower lr" in one_line_error(ran)


@pytest.mark.usefixtures("meddling")
@pytest.mark.parametrize("log_every", [1, 2, 50])
def test_the_checkpoint_before_is_kept(store: Path, tmp_path: Path, log_every: int) -> None:
    """However rarely a run logs: what is saved is never what has gone wrong."""
    plan_meddling(lambda step: math.nan if step == 7 else None)
    config = job(store, tmp_path / "run", model__name="meddling", steps=40, log_every=log_every, keep=1)
    with pytest.raises(FitError, match=r"no longer finite at step \d+") as raised:
        fit(config)
    step = int(str(raised.value).partition("at step ")[2].split(";")[0])
    assert step >= 8
    assert checkpoint.steps(tmp_path / "run") == [5]
    state = checkpoint.load(checkpoint.path_of(tmp_path / "run", 5))
    assert all(value.isfinite().all() for value in state["model"].values())
    assert equal_states(best(tmp_path / "run")["model"], state["model"])
    assert run_json(tmp_path / "run")["status"] != "finished"
    assert log_every == 50 or all(math.isfinite(line["loss/total"]) for line in logged(tmp_path / "run"))


# --- stores that cannot be trained on ---------------------------------------------------------------------------------


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", depth=(500.0, 900.0), blocks=[1])
    ran = psftrain("fit", *words(path, tmp_path / "run"))
    assert ran.code == 3
    assert "1 of 2 blocks are missing" in one_line_error(ran)
    assert not (tmp_path / "run").exists()


def test_a_corrupt_chunk_is_found(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", grid=4)
    (chunk,) = (file for file in (path / "psf_binned" / "c").rglob("*") if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    ran = psftrain("fit", *words(path, tmp_path / "run"))
    assert ran.code == 1
    assert "corrupt" in one_line_error(ran)
    assert not (tmp_path / "run").exists()


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    ran = psftrain("fit", *words(tmp_path / "none.zarr", tmp_path / "run"))
    assert ran.code == 1
    assert "none.zarr does not exist; `psfgen render" in one_line_error(ran)


# --- it learns --------------------------------------------------------------------------------------------------------


def test_training_beats_the_mean_kernel_by_far(tmp_path: Path) -> None:
    """On points of the field it never saw, from the condition alone."""
    path = make_store(tmp_path / "s.zarr", grid=6)
    fit(
        job(
            path,
            tmp_path / "run",
            steps=250,
            log_every=50,
            val_every=999,
            save_every=999,
            lr=1e-2,
            warmup=20,
            model__width=32,
        )
    )
    losses = [line["loss/total"] for line in logged(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]

    train, conditioning = examples_of(path)
    other = make_store(tmp_path / "v.zarr", grid=6, layout="cells")
    held, _ = examples_of(other)
    trained = load_run(tmp_path / "run")
    condition = _conditions(trained, other)
    with torch.no_grad():
        found = trained.model.decode(trained.model.prior(condition).mean, condition)
    error = metrics.rel_l2(found.numpy(), held.kernels.numpy()).mean()
    mean = np.broadcast_to(train.kernels.mean(dim=0).numpy(), held.kernels.shape)
    assert conditioning == trained.conditioning
    assert error < 0.25 * metrics.rel_l2(mean, held.kernels.numpy()).mean()
