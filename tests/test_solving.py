"""The default model, which is solved at once: what a run of it writes, refuses and survives, and that it learns."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents, fork, wait_for
from fitting import named, run_json, same_run, steps_of, strike_at, tensorboard, together
from training import (
    best,
    equal_states,
    examples_of,
    fit_quickly,
    logged,
    make_store,
    one_line_error,
    psftrain,
    rewrite_model,
    solve_quickly,
    task,
)

from psfgen.errors import ConfigError, FitError, Preempted, RunMismatch
from psfgen.store import open_store
from psftrain import board, checkpoint, load, metrics
from psftrain.config import DataConfig
from psftrain.data import COLUMN, ROW, withhold
from psftrain.fit import fit
from psftrain.models import model_class
from psftrain.models.base import CVAE
from psftrain.models.solved import SolvedCVAE
from psftrain.raymap import search
from psftrain.run import load_run

TERM, USR2, INT, KILL = signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGKILL
WAVELENGTHS = (0.5, 0.6)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    solve_quickly(monkeypatch)
    monkeypatch.setattr(board, "_wait_for_another_second", lambda folder: None)


def small(path: Path, **changes: Any) -> Path:
    """A store of 4 x 4 points and two wavelengths with one place in the dark: 15 examples."""
    given: dict[str, Any] = {"grid": 4, "wavelength": WAVELENGTHS, "kernel_px": 16, "bins": 8, "dark": [(0, 0, 0, 1)]}
    return make_store(path, **{**given, **changes})


def words(store: Path, run: Path, *sets: str) -> list[str]:
    """`psftrain fit` of the default model."""
    given = [word for text in ("device=cpu", *sets) for word in ("--set", text)]
    return ["fit", "--store", str(store), "--run", str(run), *given]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("solving") / "s.zarr")


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "fit"
    fit_quickly(store, path, "field_cvae")
    return path


# --- what a run writes ------------------------------------------------------------------------------------------------

PICTURES = ["train/truth_posterior_prior", "val/truth_posterior_prior"]
SCALARS = {"misfit/0.5um", "misfit/0.6um", "left_out/rel_l2", "train/seconds"}


def test_a_run_directory(run: Path) -> None:
    """As that of a model that is trained by steps, from one step."""
    files = set(contents(run))
    expected = {"config.yaml", "run.json", "metrics.jsonl", "checkpoints/best.pt", "checkpoints/step-00000001.pt"}
    assert files >= expected
    assert all(name.startswith("tb/events") for name in files - expected)
    document = run_json(run)
    assert (document["status"], document["model"], document["step"]) == ("finished", "field_cvae", 1)
    assert (document["solved"], document["examples"], document["masked"], document["processes"]) == (True, 15, 1, 1)
    assert document["parameters"] == sum(tensor.numel() for tensor in best(run)["model"].values()) > 100
    assert set(document["metrics"]) == SCALARS


def test_a_checkpoint_is_plain_data_and_tensors(run: Path) -> None:
    state = torch.load(run / "checkpoints" / "step-00000001.pt", weights_only=True)
    assert equal_states(state, best(run))
    assert (state["step"], state["ended"], state["config"]["model"]["name"]) == (1, True, "field_cvae")
    assert equal_states(load_run(run).model.state_dict(), state["model"])


def test_scalars_and_pictures(run: Path) -> None:
    tags = tensorboard(run).Tags()
    assert set(tags["scalars"]) == SCALARS
    assert steps_of(run, "left_out/rel_l2") == [1]
    assert tags["images"] == ["train/truth_posterior_prior"]
    (line,) = logged(run)
    assert set(line) == {"step", *SCALARS} - {"train/seconds"}
    assert all(0 < line[name] < 1 for name in line if name != "step")


@pytest.mark.parametrize("how", ["store", "share"])
def test_with_a_validation_set(store: Path, tmp_path: Path, how: str) -> None:
    val = small(tmp_path / "v.zarr", layout="cells", dark=())
    done = fit(task(store, tmp_path / "run", **({"val": str(val)} if how == "store" else {"data__val": 0.5})))
    known = {f"{name}_{path}/rel_l2" for name in ("val", "train") for path in ("prior", "posterior")}
    assert set(done.metrics) == SCALARS | known
    assert done.metrics["val_prior/rel_l2"] == done.metrics["val_posterior/rel_l2"], "kernels tell nothing new"
    assert best(tmp_path / "run")["best"] == done.metrics["val_prior/rel_l2"]
    assert tensorboard(tmp_path / "run").Tags()["images"] == [
        f"{name}/truth_posterior_prior" for name in ("train", "val")
    ]
    withheld = run_json(tmp_path / "run")["validation"]
    assert run_json(tmp_path / "run")["examples"] == 15 - (withheld if how == "share" else 0)


def test_withheld_points_are_never_looked_at(store: Path, run: Path, tmp_path: Path) -> None:
    """Whatever their kernels are, the model comes out the same."""
    held = withhold(examples_of(store)[0].places, DataConfig(val=0.25), 0)[1]
    assert held is not None
    ((row, column),) = held.index[:, [ROW, COLUMN]]

    def change(name: str, values: np.ndarray) -> None:
        if name in ("psf", "psf_binned"):
            values[0, 0, row, column] = values[0, 0, 0, 0]

    for number, path in enumerate((store, small(tmp_path / "other.zarr", change=change))):
        fit(task(path, tmp_path / str(number), data__val=0.25))
    found = [best(path)["model"] for path in (tmp_path / "0", tmp_path / "1", run)]
    assert equal_states(found[0], found[1])
    assert not equal_states(found[0], found[2]), "the point counts where it is not withheld"


# --- what it answers --------------------------------------------------------------------------------------------------


def test_the_command_line_speaks_of_solving(store: Path, run: Path, tmp_path: Path) -> None:
    first = psftrain(*words(store, tmp_path / "run"))
    assert first.code == 0, first.err
    assert re.match(rf"{tmp_path}/run: solved in \d+ s; left_out/rel_l2 0\.\d+\n", first.out)
    assert "fit field_cvae: 100/100 %" in first.err
    before = contents(tmp_path / "run")
    again = psftrain(*words(store, tmp_path / "run"))
    assert again.out.startswith(f"{tmp_path}/run: solved, nothing to do; left_out/rel_l2 0.")
    assert contents(tmp_path / "run") == before, "left alone"
    same_run(tmp_path / "run", run)
    documents = [psftrain(*words(store, path), "--json").document for path in (tmp_path / "run", tmp_path / "new")]
    assert [document["step"] for document in documents] == [1, 1]
    assert documents[0]["metrics"].keys() == documents[1]["metrics"].keys() == SCALARS


def test_a_solved_run_is_shown(run: Path) -> None:
    ran = psftrain("show", run)
    assert (ran.code, ran.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert lines.pop(f"{run}:") == "finished"
    assert re.fullmatch(r"field_cvae, solved, [\d,]+ numbers", lines["model"])
    assert lines["validation"] == "none"
    assert re.fullmatch(r"0\.5um 0\.\d+, 0\.6um 0\.\d+", lines["misfit"])
    assert re.fullmatch(r"rel_l2 0\.\d+", lines["left_out"])
    assert "curves" not in lines
    assert not re.search(r"step|parameters", ran.out)
    document = psftrain("show", run, "--json").document
    assert (document["solved"], document["status"], document["step"], document["steps"]) == (True, "finished", 1, 1)
    assert document["paths"] == {"run": str(run)}


def test_no_steps_check_everything_and_solve_nothing(store: Path, tmp_path: Path) -> None:
    ran = psftrain(*words(store, tmp_path / "run", "steps=0", "data.val=0.5"))
    assert ran.code == 0, ran.err
    assert re.match(rf"{tmp_path}/run: checked, not solved in \d+ s; val_prior/rel_l2 0\.\d+\n", ran.out)
    assert run_json(tmp_path / "run")["status"] == "finished"
    assert checkpoint.steps(tmp_path / "run") == [0]
    assert tensorboard(tmp_path / "run").Tags()["images"] == [
        f"{name}/truth_posterior_prior" for name in ("train", "val")
    ]
    kernels = load(tmp_path / "run").psf(field=[0.3, -0.2], depth_mm=2000, focus_mm=2000)
    assert kernels == pytest.approx(np.full((2, 8, 8), 1 / 64)), "it knows nothing"
    shown = psftrain("show", tmp_path / "run").out
    assert "model           field_cvae, not solved: steps is 0\n" in shown
    assert psftrain(*words(store, tmp_path / "run", "steps=0", "data.val=0.5")).out.startswith(
        f"{tmp_path}/run: checked, not solved, nothing to do"
    )


def test_the_commands_chain_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name for anything: psfs.zarr, runs/fit."""
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "psfs.zarr", depth=(1000.0, math.inf), focus=(1500.0, 4000.0), dark=[(0, 0, 0, 1)])
    for command in (
        ("fit",),
        ("eval",),
        ("show",),
        ("sample", "runs/fit", "--grid", 3, "--depth", "2m", "--focus", "2m", "--out", "field.npz"),
        ("bake", "runs/fit", "--grid", 4),
    ):
        ran = psftrain(*command)
        assert ran.code == 0, (command, ran.err)
        assert "unexpected" not in ran.err


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["steps=5"], "steps 5: model field_cvae is solved in one step; leave steps out, or train by steps with"),
        (["init=elsewhere"], "init elsewhere: model field_cvae is solved anew from the kernels; leave --init out"),
        (["patience=3"], "patience needs points to validate on"),
        (["data.val=0.01"], "data.val 0.01 withholds no point of so small a grid"),
    ],
    ids=str,
)
def test_is_refused_in_one_line_and_nothing_is_written(
    store: Path, tmp_path: Path, sets: list[str], message: str
) -> None:
    ran = psftrain(*words(store, tmp_path / "run", *sets))
    assert message in one_line_error(ran)
    assert len(ran.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, 1])
def test_several_stores_are_refused(store: Path, tmp_path: Path, steps: int) -> None:
    """Before anything is written."""
    other = small(tmp_path / "other.zarr", dark=(), lens_text="{}")
    ran = psftrain(*words(other, tmp_path / "run", f"steps={steps}"), "--store", str(store))
    assert ran.code == 2
    assert "error: model field_cvae takes one store, of one lens or of copies of it, here are 2;" in one_line_error(ran)
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_canonical_model_takes_one_specimen(tmp_path: Path) -> None:
    other = small(tmp_path / "other.zarr", dark=(), copies=2)
    ran = psftrain(*words(other, tmp_path / "run", "model.name=canonical"))
    assert "takes one specimen of a lens, the store holds 2 copies; model field_cvae takes them" in one_line_error(ran)
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused(store: Path, run: Path) -> None:
    before = contents(run)
    with pytest.raises(RunMismatch, match=r"holds a run with seed = 0, this one has 1; choose another --run, or"):
        fit(task(store, run, seed=1))
    with pytest.raises(RunMismatch, match=r"steps = 1, this one has 0; choose another --run, or delete"):
        fit(task(store, run, steps=0))
    with pytest.raises(ConfigError, match="holds a run already; choose another --run"):
        fit(task(store, run), resume=False)
    with pytest.raises(RunMismatch, match=r"holds a run with model\.name = field_cvae, this one has neural_cvae"):
        fit(task(store, run, model__name="neural_cvae", batch=8))
    assert contents(run) == before


def test_memory_that_does_not_suffice_is_told(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(search, "search", fail)
    with pytest.raises(FitError, match=r"the memory of cpu is too small .* train on a store of fewer kernels"):
        fit(task(store, tmp_path / "run"))


# --- the same model, whatever happens ---------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bits(
    store: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever random numbers were drawn before, and on however many cores."""
    torch.manual_seed(99)
    for cores in (1, 5):
        monkeypatch.setattr("psftrain.models.field.os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        fit(task(store, tmp_path / str(cores)))
        same_run(tmp_path / str(cores), run)


@pytest.mark.parametrize("which", ["several", "canonical", "copies"])
def test_so_does_every_run(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several distances, of copies, and of the canonical model."""
    found = request.getfixturevalue(which)
    monkeypatch.setattr("psftrain.models.field.os.sched_getaffinity", lambda pid: {0})
    config = load_run(found).config
    fit(config.model_copy(update={"run": str(tmp_path / "run")}))
    same_run(tmp_path / "run", found)


def test_the_seed_matters(store: Path, run: Path, tmp_path: Path) -> None:
    fit(task(store, tmp_path / "other", seed=1))
    assert not equal_states(best(tmp_path / "other")["model"], best(run)["model"])


def test_several_processes_make_the_run_of_one(store: Path, run: Path, tmp_path: Path) -> None:
    """The first solves, the others wait; as torchrun starts them."""
    command = words(store, tmp_path / "run")
    assert together(2, lambda rank: _told(tmp_path, rank, command)) == [0, 0]
    same_run(tmp_path / "run", run)
    assert together(2, lambda rank: _told(tmp_path, rank, command)) == [0, 0]
    assert [(tmp_path / f"out-{rank}").read_text().count("nothing to do") for rank in (0, 1)] == [1, 0]
    assert together(2, lambda rank: _told(tmp_path, rank, [*command, "--set", "seed=1"])) == [2, 2]


def _told(folder: Path, rank: int, command: list[str]) -> int:
    ran = psftrain(*command)
    (folder / f"out-{rank}").write_text(ran.out)
    return ran.code


def _nth(count: int) -> Callable[..., bool]:
    """Whether it is called for the `count`-th time."""
    calls = []

    def wanted(*_: Any) -> bool:
        calls.append(1)
        return len(calls) == count

    return wanted


@pytest.mark.parametrize("number", [TERM, USR2, INT])
def test_a_signal_stops_it_and_the_same_command_begins_anew(
    store: Path, run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, "psftrain.raymap.search.refined", _nth(2), number)
        ran = psftrain(*words(store, tmp_path / "run"))
    assert (ran.code, ran.out) == (75, "")
    assert ran.err.splitlines()[-1] == (
        f"stopped: {number.name} while the model was being solved; the same command begins anew"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    shown = psftrain("show", tmp_path / "run").out
    assert shown.startswith(f"{tmp_path}/run: stopped; psftrain fit {tmp_path}/run/config.yaml solves it\n")
    assert "model           field_cvae, not solved yet\n" in shown
    assert psftrain("fit", tmp_path / "run" / "config.yaml").code == 0
    same_run(tmp_path / "run", run)


@pytest.mark.parametrize("distances", [1, 2])
def test_a_signal_ends_a_solve_before_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distances: int
) -> None:
    """Of which the longest takes a second or two."""
    focus = (500.0, 700.0)[:distances]
    path, took = small(tmp_path / "s.zarr", depth=(500.0, 2000.0)[:distances], focus=focus), list[int]()

    def struck(*_: Any) -> bool:
        took.append(1)
        return len(took) == 7

    strike_at(monkeypatch, "psftrain.raymap.solve.Problem.normal", struck, TERM)
    with pytest.raises(Preempted, match="SIGTERM while the model was being solved"):
        fit(task(path, tmp_path / "run"))
    assert len(took) == 7


def test_all_processes_stop_together(store: Path, run: Path, tmp_path: Path) -> None:
    """As torchrun hands a signal on to each."""

    def work(rank: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            name = "psftrain.raymap.search.refined" if rank == 0 else "psftrain.fit.open_stores"
            strike_at(patch, name, lambda *_: True, TERM)
            return psftrain(*words(store, tmp_path / "run")).code

    assert together(2, work) == [75, 75]
    assert psftrain(*words(store, tmp_path / "run")).code == 0
    same_run(tmp_path / "run", run)


# What the process is about to call; of `os.replace` the file that would get its name. Whether its work is done.
MOMENTS: dict[str, tuple[str, Callable[..., bool], bool]] = {
    "it has written config.yaml": ("os.replace", named("config.yaml"), False),
    "it has written run.json": ("os.replace", named("run.json"), False),
    "it gathers kernels": ("psftrain.models.field.gather", lambda *_: True, False),
    "it solves": ("psftrain.raymap.search.refined", _nth(4), False),
    "it corrects": ("psftrain.raymap.correction.weights", lambda *_: True, False),
    "it has written the best": ("os.replace", named("best.pt"), False),
    "it has written the last checkpoint": ("os.replace", named("step-*.pt"), False),
    "it has finished": ("psftrain.run.finish", lambda *_: True, True),
}


@pytest.mark.parametrize("when", MOMENTS)
def test_killed_when(store: Path, run: Path, tmp_path: Path, when: str) -> None:
    """No half model is left, and the same command ends with the undisturbed one, bit for bit."""
    name, wanted, done = MOMENTS[when]
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, name, wanted, KILL)
        pid = fork(lambda: os._exit(psftrain(*words(store, tmp_path / "run")).code))
        assert wait_for(pid) == -KILL
    if (tmp_path / "run" / "checkpoints" / "best.pt").exists():
        assert equal_states(load_run(tmp_path / "run").model.state_dict(), best(run)["model"])
    else:
        with pytest.raises(RunMismatch):
            load_run(tmp_path / "run")
    ran = psftrain(*words(store, tmp_path / "run"))
    assert ran.code == 0, ran.err
    assert ("nothing to do" in ran.out) is done
    same_run(tmp_path / "run", run)
    assert list((tmp_path / "run").rglob(".*")) == []


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three depths and two focus distances of a wide sensor, one place in the dark: 293 examples."""
    folder = tmp_path_factory.mktemp("several")
    layout = {"grid": 7, "depth": (1000.0, 2500.0, math.inf), "focus": (1500.0, 4000.0), "sensor_mm": (8.0, 6.0)}
    fit_quickly(small(folder / "s.zarr", dark=[(1, 2, 0, 1)], **layout), folder / "run", "field_cvae")
    return folder / "run"


@pytest.fixture(scope="module")
def canonical(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("canonical") / "run"
    fit_quickly(store, path, "canonical")
    return path


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on six copies of a lens, which are focused differently."""
    folder = tmp_path_factory.mktemp("copies")
    fit_quickly(small(folder / "s.zarr", dark=(), copies=6, focus=(500.0,)), folder / "run", "field_cvae")
    return folder / "run"


RUNS = ("run", "several", "canonical", "copies")


@pytest.fixture(params=RUNS)
def model(request: pytest.FixtureRequest) -> CVAE:
    return load_run(request.getfixturevalue(request.param)).model


def conditions(count: int = 9) -> torch.Tensor:
    """Random places of the field; the first lies on the axis."""
    drawn = 2 * torch.rand(count, 4, generator=torch.Generator().manual_seed(0)) - 1
    drawn[0] = 0
    return drawn


def test_kernels_are_kernels(model: CVAE) -> None:
    """Non-negative, every channel summing to 1."""
    found = model.decode(torch.zeros(9, model.latent), conditions())
    assert found.shape == (9, 2, 8, 8)
    assert bool((found >= 0).all())
    assert torch.allclose(found.sum(dim=(-2, -1)), torch.ones(9, 2), atol=1e-5)


def test_gaussians_are_finite(model: CVAE) -> None:
    kernels = model.decode(torch.zeros(9, model.latent), conditions())
    for found in (model.prior(conditions()), model.posterior(kernels, conditions())):
        assert found.mean.shape == found.logvar.shape == (9, model.latent)
        assert found.mean.isfinite().all()
        assert found.logvar.isfinite().all()


def test_a_latent_is_for_copies(request: pytest.FixtureRequest) -> None:
    """Of one specimen there is nothing to tell."""
    latents = [load_run(request.getfixturevalue(name)).model.latent for name in RUNS]
    assert latents[:3] == [0, 0, 0]
    assert 0 < latents[3] < 6


def test_an_example_does_not_see_its_batch(model: CVAE) -> None:
    condition = conditions()
    z = torch.randn(9, model.latent, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(model.decode(z, condition)[4:5], model.decode(z[4:5], condition[4:5]), atol=1e-6)


@pytest.mark.parametrize("which", RUNS)
def test_it_travels_as_its_tensors(which: str, request: pytest.FixtureRequest) -> None:
    trained = load_run(request.getfixturevalue(which))
    other = model_class(trained.config.model.name)(trained.config.model, (2, 8, 8), trained.conditioning)
    assert isinstance(trained.model, SolvedCVAE)
    assert isinstance(other, SolvedCVAE)
    assert not other.solved
    other.load_state_dict(trained.model.state_dict())
    assert other.solved
    assert other.numbers == trained.model.numbers
    z = torch.ones(9, other.latent)
    assert torch.equal(*(model.decode(z, conditions()) for model in (other, trained.model)))


def test_copies_that_do_not_differ_have_no_latent(tmp_path: Path) -> None:
    def change(name: str, values: np.ndarray) -> None:
        if name in ("psf", "psf_binned"):
            values[:] = one[name]

    one = {name: open_store(small(tmp_path / "one.zarr", dark=())).read(name) for name in ("psf", "psf_binned")}
    fit(task(small(tmp_path / "s.zarr", dark=(), copies=3, change=change), tmp_path / "run"))
    assert load_run(tmp_path / "run").model.latent == 0


@pytest.mark.parametrize("array", ["psf", "psf_binned"])
def test_full_size_kernels_may_be_asked_for(store: Path, tmp_path: Path, array: str) -> None:
    fit(task(store, tmp_path / "run", data__array=array))
    side = {"psf": 16, "psf_binned": 8}[array]
    kernels = load(tmp_path / "run").psf(field=[0.3, -0.2], depth_mm=2000, focus_mm=2000)
    assert kernels.shape == (2, side, side)


def test_it_knows_its_training_points(several: Path) -> None:
    """Of every depth and focus: kernels and places have not been mixed up on the way."""
    trained = load_run(several)
    examples, _ = examples_of(Path(trained.config.store[0]))
    assert len(examples) == 293
    with torch.no_grad():
        found = trained.model.decode(torch.zeros(293, 0), examples.condition)
    assert metrics.rel_l2(found.numpy(), examples.kernels.numpy()).max() < 0.1


@pytest.mark.parametrize("where", ["other points", "other distances"])
def test_it_beats_the_mean_kernel_by_far(several: Path, tmp_path: Path, where: str) -> None:
    """At places it never saw."""
    trained = load_run(several)
    layout: dict[str, Any] = {"grid": 5, "layout": "cells", "sensor_mm": (8.0, 6.0), "dark": ()}
    if where == "other points":
        layout |= {"depth": (1000.0, 2500.0, math.inf), "focus": (1500.0, 4000.0)}
    else:
        layout |= {"depth": (1600.0, 6000.0), "focus": (2200.0,)}
    held, encoded = examples_of(small(tmp_path / "held.zarr", **layout))
    train, _ = examples_of(Path(trained.config.store[0]))
    model = load(several)
    index = held.index
    distances = [np.array(layout[name])[index[:, column]] for name, column in (("depth", 3), ("focus", 2))]
    found = model.psf(encoded.field_max * held.condition[:, :2].numpy(), *distances)
    error = metrics.rel_l2(found, held.kernels.numpy()).mean()
    mean = np.broadcast_to(train.kernels.mean(dim=0).numpy(), held.kernels.shape)
    assert error < 0.25 * metrics.rel_l2(mean, held.kernels.numpy()).mean()


# --- runs that hold no model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:999]), Path.unlink])
def test_a_damaged_model(run: Path, store: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """Every command names the way out; fit does not say that all is done."""
    broken = tmp_path / "fit"
    shutil.copytree(run, broken)
    damage(broken / "checkpoints" / "best.pt")
    for command in (["sample", broken, "--grid", 2, "--out", tmp_path / "k.npz"], words(store, broken)):
        error = one_line_error(psftrain(*command))
        assert "best.pt" in error
        assert f"delete {broken} and fit it anew" in error


@pytest.mark.parametrize("name", ["coefficients", "weights", "left_out"])
def test_weights_that_do_not_fit(run: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "fit"
    shutil.copytree(run, broken)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        if name == "coefficients":
            del weights[name]
        else:
            weights[name] = torch.zeros(7, 2, 3)

    rewrite_model(broken, spoil)
    error = one_line_error(psftrain("sample", broken, "--grid", 2, "--out", tmp_path / "k.npz"))
    assert f"checkpoint of {broken} does not fit its config" in error


def test_a_run_that_was_only_checked(store: Path, tmp_path: Path) -> None:
    """It holds no model to export, and knows no wavelengths."""
    checked = tmp_path / "checked"
    assert psftrain(*words(store, checked, "steps=0")).code == 0
    assert "was checked, not solved (steps 0)" in one_line_error(psftrain("export", checked))
    given = ["sample", checked, "--grid", 2, "--wavelength", "0.55", "--out", tmp_path / "k.npz"]
    assert "was checked, not solved (steps 0)" in one_line_error(psftrain(*given))
    assert not (checked / "export").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_points_on_one_ring(tmp_path: Path) -> None:
    """Of 2 x 2 none can be left out: nothing is corrected or expected, and that is no fault."""
    few, path = small(tmp_path / "few.zarr", grid=2, dark=[]), tmp_path / "fit"
    for _ in range(2):
        ran = psftrain(*words(few, path))
        assert ran.code == 0
        assert "left_out" not in ran.out
    assert load_run(path).model.expected_error(torch.zeros(1, 4)) is None
    assert psftrain("eval", path, "--no-baselines").code == 0
