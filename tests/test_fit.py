"""Training: what a run writes, that it is the same every time, and that it learns."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import contents
from fitting import conditions, run_json, steps_of, tensorboard, two_depths
from training import (
    CLOCKED,
    TRAINED,
    best,
    equal_states,
    examples_of,
    job,
    logged,
    make_store,
    psftrain,
    words,
)

from psfgen.store import open_store
from psftrain import checkpoint, metrics
from psftrain.config import FitConfig, load_fit_config
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


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_a_run_directory(run: Path, store: Path) -> None:
    files = set(contents(run))
    expected = {"config.yaml", "run.json", "metrics.jsonl", "checkpoints/best.pt"}
    expected |= {f"checkpoints/step-{step:08d}.pt" for step in (5, 10, 12)}
    assert files >= expected
    assert all(name.startswith("tb/events") for name in files - expected)
    document = run_json(run)
    assert (document["status"], document["steps"], document["model"]) == ("finished", 12, "neural_cvae")
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
        "lenses": [{"lens_sha256": attrs["lens"]["sha256"], "fnum": None, "sensor_mm": [6.0, 6.0]}],
        "sensor_aspect": 1.0,
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
SCALARS |= {"train/beta"}


def test_scalars_and_pictures(run: Path) -> None:
    tags = tensorboard(run).Tags()
    assert set(tags["scalars"]) == SCALARS | CLOCKED, "and no val_*"
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


def test_validation_by_hand(store: Path, tmp_path: Path, run: Path) -> None:
    """Mean relative error of the prior's mean and of the posterior's."""
    trained = load_run(run)
    examples, _ = examples_of(store)
    found = validate(trained.model, Rows(examples.kernels, examples.condition), ALONE)
    model, truth, condition = trained.model, examples.kernels, examples.condition
    with torch.no_grad():
        for name, z in (("prior", model.prior(condition).mean), ("posterior", model.posterior(truth, condition).mean)):
            error = metrics.rel_l2(model.decode(z, condition).numpy(), truth.numpy()).mean()
            assert found[name] == pytest.approx(error, rel=1e-5)


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
    from psftrain.config import DataConfig
    from psftrain.data import withhold

    val = withhold(examples_of(store)[0].places, DataConfig(val=0.89), 3)[1]
    assert val is not None
    return {(row, column) for *_, row, column in val.index.tolist()}


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


@pytest.mark.parametrize("name", TRAINED)
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
    condition = conditions(trained, other)
    with torch.no_grad():
        found = trained.model.decode(trained.model.prior(condition).mean, condition)
    error = metrics.rel_l2(found.numpy(), held.kernels.numpy()).mean()
    mean = np.broadcast_to(train.kernels.mean(dim=0).numpy(), held.kernels.shape)
    assert conditioning == trained.conditioning
    assert error < 0.25 * metrics.rel_l2(mean, held.kernels.numpy()).mean()
