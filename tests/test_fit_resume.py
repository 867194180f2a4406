"""Stopping a run anywhere and going on; running it again; checkpoints that are broken."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import contents, fork, wait_for
from fitting import conditions, plan_meddling, run_json, same_run, send, two_depths, wear
from training import (
    best,
    examples_of,
    job,
    logged,
    make_store,
    one_line_error,
    psftrain,
    words,
)

from psfgen.errors import Preempted, RunMismatch
from psftrain import checkpoint
from psftrain import run as runs
from psftrain.ddp import Ranks
from psftrain.fit import fit
from psftrain.run import load_run
from psftrain.validation import Rows, validate

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_depths(tmp_path_factory.mktemp("train") / "s.zarr")


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 12 steps, not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "fit"
    fit(job(store, path))
    return path


# --- stop and go on ---------------------------------------------------------------------------------------------------


WORSE = {"val_every": 1, "lr": 0.05, "warmup": 0, "schedule": "constant"}


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
        examples, _ = examples_of(val)
        found = validate(trained.model, Rows(examples.kernels, conditions(trained, val)), ALONE)
        assert found["prior"] == pytest.approx(min(scores.values()), rel=1e-5)

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
        ({"model__octaves": 1}, "model.octaves = null, this one has 1"),
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


# --- broken checkpoints -----------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_named_and_the_one_before_takes_over(
    mine: Path, store: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint.path_of(mine, 12)
    path.write_bytes(path.read_bytes()[:2000])
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 0
    (line,) = [line for line in caplog.messages if str(path) in line]
    assert "cannot be read" in line
    assert "the one before is used" in line
    same_run(mine, run)


def test_no_readable_checkpoint_is_an_error(mine: Path, store: Path) -> None:
    for step in checkpoint.steps(mine):
        checkpoint.path_of(mine, step).write_bytes(b"PK")
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 2
    assert "step-00000005.pt cannot be read" in one_line_error(ran)


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(
    mine: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, ran, code in (
        ("best.pt", lambda: psftrain("eval", mine), 2),
        ("step-00000012.pt", lambda: psftrain("fit", *words(store, mine)), 0),
    ):
        (mine / "checkpoints" / name).write_bytes(pickle.dumps({"model": Trap()}))
        found = ran()
        assert found.code == code
        assert name in found.err + caplog.text
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", [b"", b"[1]", b"a: [", b"\xff\xfe"], ids=["empty", "a list", "cut short", "no text"])
def test_a_config_that_cannot_be_read_is_named(mine: Path, store: Path, text: bytes) -> None:
    (mine / "config.yaml").write_bytes(text)
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 2
    assert f"{mine}/config.yaml cannot be read" in one_line_error(ran)


@pytest.mark.parametrize("text", ["", "[1]", "null"])
def test_a_run_json_that_cannot_be_read_is_named(mine: Path, store: Path, text: str) -> None:
    (mine / "run.json").write_text(text)
    for ran in (psftrain("fit", *words(store, mine)), psftrain("show", mine)):
        assert ran.code == 2
        assert f"{mine}/run.json cannot be read" in one_line_error(ran)


@pytest.mark.parametrize(
    "line", ["[1]", "5", "null", '{"step": []}', '{"step": 1e999}', "\xff\xfe"], ids=lambda line: f"<{line}>"
)
def test_a_log_that_was_spoilt_loses_the_spoilt_lines_alone(mine: Path, store: Path, line: str) -> None:
    before = logged(mine)
    checkpoint.path_of(mine, checkpoint.steps(mine)[-1]).unlink()
    text = (mine / "metrics.jsonl").read_bytes()
    (mine / "metrics.jsonl").write_bytes(line.encode("latin-1") + b"\n" + text)
    (mine / "tb" / "events.out.tfevents.copy").write_bytes(b"")
    assert psftrain("show", mine).code == 0
    assert psftrain("fit", *words(store, mine)).code == 0
    assert logged(mine) == before


@pytest.mark.parametrize("key", ["optimizer", "best", "ended", "data_mode", "plan_sha256", "config", "fingerprint"])
def test_a_checkpoint_without_something_is_told(mine: Path, store: Path, key: str) -> None:
    step = checkpoint.steps(mine)[-1]
    state = checkpoint.load(checkpoint.path_of(mine, step))
    state[key] = None
    checkpoint.save(checkpoint.path_of(mine, step), state)
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 2
    assert f"{mine} cannot go on: what it has saved has no {key}" in one_line_error(ran)


def test_a_checkpoint_of_another_run_is_told(mine: Path, store: Path, tmp_path: Path) -> None:
    fit(job(store, tmp_path / "other", model__width=8))
    shutil.copy(checkpoint.path_of(tmp_path / "other", 12), checkpoint.path_of(mine, 12))
    ran = psftrain("fit", *words(store, mine))
    assert ran.code == 2
    assert f"the checkpoint of step 12 in {mine} is of another run; delete it" in one_line_error(ran)


def test_a_run_that_another_command_finished_meanwhile_is_not_overwritten(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands are given one new folder: the second may not go by what it looked like before its turn."""
    run, claimed, begun = tmp_path / "run", runs.claimed, False

    def late(folder: Path) -> Any:
        nonlocal begun
        if not begun:
            begun = True
            fit(job(store, run))
        return claimed(folder)

    monkeypatch.setattr(runs, "claimed", late)
    with pytest.raises(RunMismatch, match=r"holds a run with model\.width = 16, this one has 8"):
        fit(job(store, run, model__width=8))
    assert run_json(run)["status"] == "finished"
    assert best(run)["config"]["model"]["width"] == 16
