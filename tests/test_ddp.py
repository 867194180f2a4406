"""Several processes train what one would: the same batches, the same weights, stopped and gone on together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import poll, wait_for
from fitting import begin, last, same_run, together
from training import best, job, logged, make_store, one_line_error, psftrain, words

from psfgen.errors import FitError
from psftrain import checkpoint
from psftrain.config import FitConfig
from psftrain.ddp import Ranks, join
from psftrain.fit import fit
from psftrain.step import Stepper


def fit_together(config: FitConfig, world: int = 2) -> None:
    assert together(world, lambda rank: bool(fit(config)) - 1) == [0] * world


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_store(tmp_path_factory.mktemp("one") / "s.zarr", depth=(1000.0, np.inf))]


@pytest.fixture(scope="module", autouse=True)
def _imported(one_store: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a training imports late is imported once, and not in every child."""
    fit(job(one_store, tmp_path_factory.mktemp("imported") / "run", steps=1))


LONG: dict[str, Any] = {"steps": 400, "save_every": 20, "log_every": 20, "val_every": 200}  # some seconds


@pytest.fixture(scope="module")
def undisturbed(one_store: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of LONG that two processes make."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    fit_together(job(one_store, path, **LONG))
    return path


@pytest.fixture(scope="module")
def three_stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 25, 18 and 9 lit places, not one of them a multiple of the batch."""
    folder = tmp_path_factory.mktemp("three")
    return [
        make_store(folder / "a.zarr", dark=[np.s_[0, 0, 0, 0, 1], np.s_[0, 0, 2, 3, :]]),
        make_store(folder / "b.zarr", grid=3, depth=(1000.0, 4000.0)),
        make_store(folder / "c.zarr", grid=3, depth=(500.0,)),
    ]


# --- the same weights -------------------------------------------------------------------------------------------------


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


ROUGH = {"loss__smooth": 0.1}  # a smoothness that weighs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "settings"),
    [
        pytest.param("one_store", {"steps": 200}, id="one store"),
        pytest.param("three_stores", {"steps": 200}, id="three stores", marks=pytest.mark.campaign),
        pytest.param(
            "three_stores",
            {"loss__kl": 0.3, "loss__noise_half": 0.02, "loss__smooth": 0.1},
            id="free bits, noise weights",
        ),
        pytest.param(
            "three_stores", {"loss__smooth_over": "grid", "loss__smooth": 0.1, "accumulate": 2}, id="grid, accumulated"
        ),
        pytest.param(
            "three_stores",
            {"loss__smooth_on": "posterior_mean", "loss__smooth": 0.1, "ema": 0.9},
            id="posterior, averaged",
        ),
    ],
)
def test_two_processes_train_what_one_trains(
    which: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In float64 within 1e-8 after 200 steps; in float32 within what rounding makes of it."""
    stores, common = request.getfixturevalue(which), {"steps": 50, "val_every": 100, "save_every": 100, **settings}
    for precision in ("float64", "float32") if common["steps"] == 200 else ("float64",):
        alone, shared = (job(stores, tmp_path / f"{precision}-{n}", precision=precision, **common) for n in (1, 2))
        fit(alone)
        fit_together(shared)
        states = [last(Path(config.run)) for config in (alone, shared)]
        parts = [part for part in ("model", "ema") if states[0][part] is not None]
        difference = max(largest_difference(states[0][part], states[1][part]) for part in parts)
        print(f"{precision}: parameters differ by {difference:.1e} after {states[0]['step']} steps")
        assert difference < {"float64": 1e-8, "float32": 1e-4}[precision]
        if precision == "float64":
            for line, other in zip(logged(Path(alone.run)), logged(Path(shared.run)), strict=True):
                assert line == pytest.approx(other, rel=1e-8)


def test_only_the_first_process_writes_and_each_loses_nothing(three_stores: list[Path], tmp_path: Path) -> None:
    """One line a step in the log, one answer, the whole run on disk."""
    fit_together(job(three_stores, tmp_path / "run", data__val=0.4))
    steps = [line["step"] for line in logged(tmp_path / "run") if "loss/recon" in line]
    assert steps == [4, 8, 12]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert best(tmp_path / "run")["step"] in (8, 12)


def test_validation_does_not_depend_on_the_number_of_processes(three_stores: list[Path], tmp_path: Path) -> None:
    """At step 0 of training nothing has been summed in another order yet."""
    for world in (1, 2, 3):
        config = job(three_stores, tmp_path / str(world), steps=1, batch=6, lr=1e-12, warmup=0, data__val=0.4)
        fit_together(config, world)
    scores = [[x for x in logged(tmp_path / str(w)) if "val_prior/rel_l2" in x][-1] for w in (1, 2, 3)]
    for other in scores[1:]:
        assert other["val_prior/rel_l2"] == pytest.approx(scores[0]["val_prior/rel_l2"], rel=1e-5)
        assert other["val_posterior/rel_l2"] == pytest.approx(scores[0]["val_posterior/rel_l2"], rel=1e-5)


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.campaign)])
def test_a_signal_to_one_stops_all_after_the_same_step(
    one_store: list[Path], undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Both end with 75 and the run goes on to the weights of an undisturbed one, bit for bit."""
    command = ["fit", *words(one_store[0], tmp_path / "run", **LONG)]
    pids = begin(2, lambda rank: psftrain(*command).code)
    poll(lambda: checkpoint.steps(tmp_path / "run"))
    os.kill(pids[1], number)
    codes = [wait_for(pid) for pid in pids]
    assert codes in ([75, 75], [0, 0]), "a run that was just done may have finished"
    fit_together(job(one_store, tmp_path / "run", **LONG))
    same_run(tmp_path / "run", undisturbed)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    one_store: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    command = ["fit", *words(one_store[0], tmp_path / "run", **LONG)]
    pids = begin(2, lambda rank: _told(tmp_path, rank, command))
    poll(lambda: checkpoint.steps(tmp_path / "run"))
    os.kill(pids[1], signal.SIGKILL)
    assert wait_for(pids[1]) == -signal.SIGKILL
    assert wait_for(pids[0]) == 1
    line = (tmp_path / "err-0").read_text().splitlines()[-1]
    assert line.startswith("error: process 0 has lost the others")
    assert "goes on from there" in line
    fit_together(job(one_store, tmp_path / "run", **LONG))
    same_run(tmp_path / "run", undisturbed)


def _told(folder: Path, rank: int, command: list[str]) -> int:
    ran = psftrain(*command)
    (folder / f"err-{rank}").write_text(ran.err)
    return ran.code


def test_another_number_of_processes_goes_on_and_says_so(
    one_store: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = job(one_store, tmp_path / "run", steps=200)
    command = ["fit", *words(one_store[0], tmp_path / "run", steps=200)]
    pids = begin(2, lambda rank: _stop_at(6, command))
    assert [wait_for(pid) for pid in pids] == [75, 75]
    assert fit(config).step == 200
    assert "goes on from step" in caplog.text
    assert "1 processes, before 2" in caplog.text


def _stop_at(step: int, command: list[str]) -> int:
    """A signal in the midst of a step."""
    take = Stepper.__call__

    def counting(self: Any, parts: Any) -> Any:
        counting.taken += 1  # type: ignore[attr-defined]
        if counting.taken == step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, parts)

    counting.taken = 0  # type: ignore[attr-defined]
    Stepper.__call__ = counting  # type: ignore[method-assign]
    return psftrain(*command).code


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_shared_equally_is_refused(one_store: list[Path], tmp_path: Path) -> None:
    command = ["fit", *words(one_store[0], tmp_path / "run", batch=9)]
    assert together(2, lambda rank: _told(tmp_path, rank, command)) == [2, 2]
    line = (tmp_path / "err-0").read_text().splitlines()[-1]
    assert line == ("error: batch 9 does not fall into 2 equal parts (2 processes x accumulate 1); --set batch=8")
    assert not (tmp_path / "run").exists()


def test_what_the_first_process_refuses_all_refuse(one_store: list[Path], tmp_path: Path) -> None:
    fit_together(job(one_store, tmp_path / "run"))
    command = ["fit", *words(one_store[0], tmp_path / "run", seed=5)]
    assert together(2, lambda rank: psftrain(*command).code) == [2, 2]


def test_processes_that_drift_apart_are_found(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with join("cpu") as ranks:
            ranks.require_equal([torch.arange(3.0)], 10)
            with pytest.raises(FitError, match=r"drifted apart at step 20 \(process 1 differs from 0\)"):
                ranks.require_equal([torch.arange(3.0) + 1e-7 * rank], 20)
        return 0

    assert together(2, work) == [0, 0]


def test_tasks_that_know_nothing_of_each_other_are_refused(
    one_store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun -n 4 psftrain fit` would write one run four times."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    line = one_line_error(psftrain("fit", *words(one_store[0], tmp_path / "run")))
    assert "srun started 4 tasks" in line
    assert "torchrun" in line


def test_a_run_is_trained_by_one_command_at_a_time(one_store: list[Path], tmp_path: Path) -> None:
    from psftrain import run as runs

    (tmp_path / "run").mkdir()
    with runs.claimed(tmp_path / "run"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CLAIM_S", 0.0)
        line = one_line_error(psftrain("fit", *words(one_store[0], tmp_path / "run")))
    assert "is being trained by another process" in line


# --- under torchrun ---------------------------------------------------------------------------------------------------


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "--", "psftrain", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.campaign
def test_torchrun_restarts_what_was_killed(one_store: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 to one of its processes: all start again from the last checkpoint and finish, bit for bit."""
    run = tmp_path / "run"
    agent = torchrun("fit", *words(one_store[0], run, **LONG), restarts=1)
    poll(lambda: checkpoint.steps(run))
    victims = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(victims[-1]), signal.SIGKILL)
    out, err = agent.communicate()
    assert agent.returncode == 0, err
    assert out.count("400 steps in") == 1, "the first process alone answers"
    same_run(run, undisturbed)


def test_one_process_is_a_group_of_one() -> None:
    with join("cpu") as ranks:
        assert isinstance(ranks, Ranks)
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
        assert ranks.share(12) == slice(0, 12)
        assert ranks.agree_to_stop(3, ["SIGTERM"]) == "SIGTERM"
