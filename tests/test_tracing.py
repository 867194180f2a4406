"""The rows mlp and trace of an evaluation, and what the report says of them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from training import examples_of, job, make_store, psftrain

from psfgen.points import PointTracer
from psfgen.render import render
from psfgen.store import Store, open_store
from psftrain import metrics, report
from psftrain.evaluate import Evaluation, evaluate
from psftrain.fit import fit
from psftrain.heldout import heldout_command
from psftrain.run import load_run
from psftrain.tracing import Traced, trace

ONE: dict[str, Any] = {"depth": "2m", "focus": "2m", "spp": 2**14, "grid": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.zarr and held.zarr of a lens as built, and a run of 100 steps."""
    folder = tmp_path_factory.mktemp("tracing")
    built = {"copies": 1, "tolerances": {"decentre_mm": 0.05}, "seed": 3}
    render(tiny(folder / "train.zarr", **ONE, **built))
    render(tiny(folder / "held.zarr", layout="random", **ONE, **built))
    fit(job(folder / "train.zarr", folder / "run", steps=100, lr=1e-2))
    return folder


@pytest.fixture(scope="module")
def judged(place: Path) -> Evaluation:
    return evaluate(load_run(place / "run"), str(place / "held.zarr"))


def errors_of(store: Store, spp: int) -> Any:
    """The error of each of the 16 kernels that are traced here with so many rays."""
    field_xy = np.stack(np.meshgrid(store.coords["field_x"], store.coords["field_y"]), axis=-1).reshape(-1, 2)
    truth = store.read("psf_binned").reshape(16, 2, 5, 5)
    return metrics.rel_l2(PointTracer(store).kernels(field_xy, 2000.0, 0, spp).psf_binned, truth)


@pytest.mark.parametrize("allowed", [0.02, 0.005])
def test_the_rays_are_the_fewest_doublings_that_suffice(place: Path, allowed: float) -> None:
    held, _ = examples_of(place / "held.zarr")
    store = open_store(place / "held.zarr")
    found = trace(store, held, np.ones(16, dtype=bool), np.full(16, allowed))
    assert isinstance(found, Traced)
    assert found.spp > 16
    assert errors_of(store, found.spp).mean() <= allowed < errors_of(store, found.spp // 2).mean()
    np.testing.assert_allclose(metrics.rel_l2(found.kernels, held.kernels.numpy()), errors_of(store, found.spp))


def test_the_row_is_as_good_as_the_model(place: Path, judged: Evaluation) -> None:
    """On the same points, all 16 of them."""
    row = judged.report["rows"]["trace"]
    assert (row["n"], len(judged.errors["trace"])) == (16, 16)
    assert row["prior_mean_there"] == pytest.approx(judged.errors["prior_mean"].mean())
    assert row["rel_l2"]["mean"] == pytest.approx(errors_of(open_store(place / "held.zarr"), row["spp"]).mean())
    assert row["rel_l2"]["mean"] <= row["prior_mean_there"]
    assert row["ms_per_psf"] > 0


def test_a_model_better_than_any_trace_gets_the_most_rays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That are tried."""
    monkeypatch.setattr("psftrain.tracing.MOST_RAYS", 64)
    held, _ = examples_of(place / "held.zarr")
    found = trace(open_store(place / "held.zarr"), held, np.ones(16, dtype=bool), np.zeros(16))
    assert isinstance(found, Traced)
    assert found.spp == 64
    assert metrics.rel_l2(found.kernels, held.kernels.numpy()[found.at]).mean() > 0


def test_only_what_is_scored_is_traced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of that no more than are wanted, each with the kernel of its place."""
    monkeypatch.setattr("psftrain.tracing.MOST_PLACES", 5)
    held, _ = examples_of(place / "held.zarr")
    scored = np.arange(16) % 3 > 0
    found = trace(open_store(place / "held.zarr"), held, scored, np.full(10, 0.02))
    assert isinstance(found, Traced)
    assert len(found.at) == 5
    assert scored[found.at].all()
    assert metrics.rel_l2(found.kernels, held.kernels.numpy()[found.at]).mean() <= 0.02


def test_a_lens_that_cannot_be_traced_has_no_such_row(tmp_path: Path) -> None:
    train, held = (make_store(tmp_path / f"{layout}.zarr", grid=4, layout=layout) for layout in ("grid", "cells"))
    fit(job(train, tmp_path / "run"))
    found = evaluate(load_run(tmp_path / "run"), str(held)).report
    assert "trace" not in found["rows"]
    assert "cannot be traced: lens lens has no list of surfaces" in found["left_out"]["trace"]
    assert "without tracing the lens itself: the lens of" in report.as_text(found, "")


def test_rows_that_would_tell_nothing_are_left_out(tmp_path: Path) -> None:
    """On the training points; of a run that was not trained; where they are not asked for."""
    train, held = (make_store(tmp_path / f"{layout}.zarr", grid=4, layout=layout) for layout in ("grid", "cells"))
    fit(job(train, tmp_path / "run"))
    fit(job(train, tmp_path / "untrained", steps=0))
    run, untrained = load_run(tmp_path / "run"), load_run(tmp_path / "untrained")
    on_training = evaluate(run, None).report
    assert on_training["left_out"] == dict.fromkeys(("mlp", "trace"), "the points scored are those trained on")
    assert evaluate(untrained, str(held)).report["left_out"]["mlp"] == "the run took no steps"
    assert "mlp" in evaluate(untrained, str(held), mlp_steps=2).report["rows"], "unless so many are asked for"
    alone = evaluate(run, str(held), baselines=False).report
    assert alone["left_out"] == dict.fromkeys(("mlp", "trace"), "no baselines are asked for")


def test_every_row_has_its_intervals(judged: Evaluation) -> None:
    """Around its numbers, and the ratio its bound."""
    for name, row in judged.report["rows"].items():
        for key in ("mean", "p95"):
            low, high = row["rel_l2"][f"{key}_interval"]
            assert low <= row["rel_l2"][key] <= high * (1 + 1e-9), name
    found, best = judged.report["ratio"], judged.report["best_classical"]
    assert found["mean"] == pytest.approx(judged.errors["prior_mean"].mean() / judged.errors[best].mean())
    assert found["mean_bound"] > found["mean"]
    assert set(found) == {"mean", "mean_bound", "p95", "p95_bound"}
    assert f"(95 % bound {found['mean_bound']:.2f})" in report.headline(judged.report, "")


@pytest.mark.parametrize(
    ("error", "ms", "expected"),
    [
        (0.09, 0.1, "TRACE IT: tracing with 64 rays a kernel errs 9.00% in 0.100 ms, the model 10.00% in 0.200 ms"),
        (0.09, 0.8, "the model is 4.0 times as fast"),
        (0.11, 0.1, "more rays were not tried"),
    ],
)
def test_what_tracing_is_worth_is_told(error: float, ms: float, expected: str) -> None:
    rows = {
        "prior_mean": {"ms_per_psf": 0.2},
        "trace": {"rel_l2": {"mean": error}, "ms_per_psf": ms, "spp": 64, "n": 256, "prior_mean_there": 0.1},
    }
    (told,) = report.remarks({"adapted": False, "rows": rows, "left_out": {}})
    assert expected in told
    assert ("TRACE IT" in told) == (error <= 0.1 and ms <= 0.2)
    (told,) = report.remarks({"adapted": True, "rows": rows, "left_out": {}})
    assert "TRACE IT" not in told
    assert "only a simulation knows" in told


def test_another_specimen_is_named(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other.zarr"
    render(tiny(other, layout="random", **ONE, copies=1, tolerances={"decentre_mm": 0.05}, seed=4))
    evaluate(load_run(place / "run"), str(place / "held.zarr"), baselines=False)
    assert "another specimen" not in caplog.text
    evaluate(load_run(place / "run"), str(other), baselines=False)
    assert f"{other} is of another specimen of the lens than was trained on" in caplog.text


def test_the_advice_renders_the_same_specimen(place: Path, tmp_path: Path, psfgen: Any) -> None:
    """That of copies drawn by a seed, and of a lens perturbed by hand."""
    moves = [{"element": 1, "decentre_mm": [0.0, 0.2]}]
    by_hand = render(tiny(tmp_path / "by_hand.zarr", **ONE, perturb=moves))
    for store in (open_store(place / "train.zarr"), by_hand):
        words = shlex.split(heldout_command(store, place / "run").partition("&&")[0])
        ran = psfgen(*words[1:], "--dry-run", "--json")
        assert ran.code == 0, ran.err
        for key in ("copies", "tolerances", "perturb"):
            assert ran.document["config"][key] == store.attrs["config"][key], key
        assert ran.document["config"]["seed"] == store.attrs["seed"]


def test_the_command_line_prints_it(place: Path, tmp_path: Path) -> None:
    ran = psftrain("eval", place / "run", "--store", place / "held.zarr", "--out", tmp_path)
    assert ran.code == 0
    assert "tracing the lens itself" in ran.out
    assert "plain network of the same size" in ran.out
    assert "tracing with" in (tmp_path / "report.md").read_text()
