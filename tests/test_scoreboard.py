"""The scoreboard of docs/results.md: its cells, what is kept, how seeds are pooled, what the page owns up to."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import solve_quickly

from psfgen.config import RenderConfig, load_config
from psfgen.grid import field_axes, pupil_seed
from psfgen.render import load
from psfgen.specimens import Specimens
from psftrain.baselines import CLASSICAL
from psftrain.config import FitConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import interpolate  # noqa: E402
import results  # noqa: E402
from pooled import pool  # noqa: E402
from scored import CELLS, Scored, Setting, Task, read, stores  # noqa: E402

# lens, field_max, depth = focus in mm, pitch in um; as built: decentre in mm, tilt in mrad
EXPECTED: dict[str, tuple[Any, ...]] = {
    "condenser": ("acl12708u", 0.6, 10_000, 5.0, 0.1, 10),
    "double_gauss": ("double_gauss", 1.0, 20_000, 6.26, 0.1, 2),
    "phone": ("phone", 1.0, 1_000, 0.53, 0.001, 0.15),
}
NAMES = [f"{name}{built}" for name in EXPECTED for built in ("", "_as_built")]


def config_of(cell: str, **more: Any) -> RenderConfig:
    return load_config(RenderConfig, CELLS / f"{cell}.yaml", list(more.items()))


# --- the cells --------------------------------------------------------------------------------------------------------


def test_there_are_six() -> None:
    assert sorted(path.stem for path in CELLS.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("cell", NAMES)
def test_a_cell_is_what_it_is_said_to_be(cell: str) -> None:
    lens, field_max, distance, pitch, decentre, mrad = EXPECTED[cell.removesuffix("_as_built")]
    config = config_of(cell)
    assert (config.lens, config.field_max, config.pitch_um) == (lens, field_max, pitch)
    assert config.depth == config.focus == (distance,)
    assert config.wavelength == (0.45, 0.55, 0.65)
    assert (config.grid, config.layout, config.seed, config.out) == (20, "grid", 0, "psfs.zarr"), "left to the run"
    built = (0.0, 0.0) if config.copies is None else (config.tolerances.decentre_mm, config.tolerances.tilt_deg)
    assert (config.copies, built) == (
        (1, pytest.approx((decentre, math.degrees(mrad / 1000)))) if cell.endswith("_as_built") else (None, (0.0, 0.0))
    )


@pytest.mark.parametrize("cell", NAMES)
def test_a_seed_draws_specimen_points_and_pupil(cell: str) -> None:
    """The specimen is that of both layouts, the pupil points are not; another seed changes all that is drawn."""
    made = {}
    for seed in (0, 1):
        for layout, grid in (("grid", 5), ("random", 32)):
            lens, plan = load(config_of(cell, seed=seed, layout=layout, grid=grid), "cpu")
            made[seed, layout] = Specimens(lens, plan).moves(0)
    assert made[0, "grid"] == made[0, "random"]
    assert bool(made[0, "grid"]) == cell.endswith("_as_built")
    if made[0, "grid"]:
        assert made[1, "random"] == made[1, "grid"] != made[0, "grid"]
    assert len({pupil_seed(seed, layout) for seed in (0, 1) for layout in ("grid", "random")}) == 4
    points = [field_axes(32, "random", 1.0, seed) for seed in (0, 1)]
    assert not np.isclose(points[0][0], points[1][0]).any()


# --- from cells to the page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[argparse.Namespace, Setting]:
    """Two seeds of one small cell, of two models, in interpolate.json."""
    given = argparse.Namespace(
        cells=["condenser_as_built"], grids=[4], seeds=[0, 1], models=["neural_cvae", "seed_cvae"]
    )
    sets = ("steps=2", "model.width=8", "model.layers=1", "model.latent=2")
    setting = Setting(tmp_path_factory.mktemp("board"), 1, sets, held_side=4, mlp_steps=2)
    assert interpolate.single_lenses(given, setting) == []
    return given, setting


def test_the_rows_of_a_cell(made: tuple[argparse.Namespace, Setting]) -> None:
    (cell,) = json.loads((made[1].work / "interpolate.json").read_text())["cells"]
    assert (cell["cell"], cell["grid"], cell["seeds"], cell["n"]) == ("condenser_as_built", 4, 2, 32)
    models = {"prior_mean", "prior_sample", "posterior", "seed_cvae"}
    assert set(cell["rows"]) == {*models, *CLASSICAL, "mlp", "trace", "noise_floor"}
    parts = [read(made[1].folder(Task("condenser_as_built", 4, seed, "neural_cvae"))) for seed in (0, 1)]
    errors = np.concatenate([part.errors["bilinear"] for part in parts if part is not None])
    assert cell["rows"]["bilinear"]["mean"] == pytest.approx(errors.mean())
    assert cell["rows"]["bilinear"]["p95"] == pytest.approx(np.quantile(errors, 0.95))
    assert cell["fit_s"].keys() == {"neural_cvae", "seed_cvae"}


def test_what_is_done_is_not_done_again(
    made: tuple[argparse.Namespace, Setting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless its config is another: then that alone."""
    given, setting = made
    trained: list[str] = []
    monkeypatch.setattr("scored.fit", lambda config: trained.append(config.run) or real(config))
    from psftrain.fit import fit as real

    assert interpolate.single_lenses(given, setting) == []
    assert trained == []
    assert "4 fits, 4 of them kept" in capsys.readouterr().out
    task = Task("condenser_as_built", 4, 0, "neural_cvae")
    interpolate.run([task], Setting(setting.work, 1, ("steps=3", *setting.sets[1:]), held_side=4, mlp_steps=2))
    assert len(trained) == 1
    interpolate.single_lenses(given, setting)
    assert len(trained) == 2


def test_a_cell_that_fails_does_not_keep_the_others_from_it(made: tuple[argparse.Namespace, Setting]) -> None:
    tasks = [Task("condenser_as_built", 4, 0, model) for model in ("no_model", "neural_cvae")]
    done, failures = interpolate.run(tasks, made[1])
    assert list(done) == tasks[1:]
    assert len(failures) == 1
    assert "unknown model 'no_model'" in failures[0]


def test_the_held_out_store_is_of_the_same_specimen(made: tuple[argparse.Namespace, Setting]) -> None:
    train, held = stores(Task("condenser_as_built", 4, 0, "neural_cvae"), made[1])
    assert train.attrs["as_built"] == held.attrs["as_built"]
    assert train.attrs["plan_sha256"] != held.attrs["plan_sha256"]


def test_the_page_has_every_row(made: tuple[argparse.Namespace, Setting]) -> None:
    text = results.page(made[1].work)
    for name in ("Condenser as built", "thin-plate RBF", "tracing the lens itself", "`seed_cvae`, prior mean"):
        assert name in text
    assert "`steps=2 model.width=8" in text, "what was set is told"
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in tables}
    assert widths == {10, 5}, "no broken line"


def test_the_default_model_is_scored_too(
    made: tuple[argparse.Namespace, Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes no steps."""
    solve_quickly(monkeypatch)
    task = Task("condenser_as_built", 4, 0, FitConfig().model.name)
    done, failures = interpolate.run([task], replace(made[1], sets=()))
    assert failures == []
    assert 0 < done[task].report["rows"]["prior_mean"]["rel_l2"]["mean"] < 1


# --- pooling and verdicts ---------------------------------------------------------------------------------------------


def scored(seed: int, ratio: float) -> Scored:
    """A model that errs `ratio` of bicubic at every point, nearest twice as much."""
    bicubic = np.random.default_rng(seed).gamma(2.0, 0.05, 100)
    errors = {"prior_mean": ratio * bicubic, "bicubic": bicubic, "nearest": 2 * bicubic, "trace": bicubic[:10]}
    rows: dict[str, Any] = {name: {"ms_per_psf": 0.1 * (seed + 1)} for name in errors}
    rows["trace"] |= {"spp": 64 << seed, "n": 10, "prior_mean_there": 0.1}
    return Scored({"rows": rows}, errors, 10.0 * (seed + 1), 60.0, "")


def test_seeds_are_pooled() -> None:
    found = pool({"a": [scored(seed, 0.8) for seed in range(3)], "b": [scored(seed, 0.5) for seed in range(3)]})
    assert found["best_classical"] == "bicubic"
    assert found["ratio"]["mean"] == pytest.approx(0.8)
    assert found["ratio"]["p95_bound"] == pytest.approx(0.8), "paired"
    assert found["rows"]["b"]["mean"] == pytest.approx(0.5 * found["rows"]["bicubic"]["mean"])
    assert found["rows"]["prior_mean"]["ms_per_psf"] == pytest.approx(0.2)
    assert found["rows"]["trace"]["spp"] == [64, 128, 256]
    assert found["fit_s"] == {"a": 20.0, "b": 20.0}


def cell(name: str, grid: int, mean: float, mean_bound: float, p95_bound: float = 1.0) -> dict[str, Any]:
    return {
        "cell": name,
        "grid": grid,
        "ratio": {"mean": mean, "mean_bound": mean_bound, "p95": 0.9, "p95_bound": p95_bound},
    }


def test_misses_are_named() -> None:
    told = results.verdict([cell("phone", 5, 0.5, 0.6), cell("double_gauss", 20, 1.0, 1.03, 1.06)])
    assert told == [
        "- Target: the bound of the ratio of the mean at most 1.02 in every cell: MISSED in double_gauss 20 (1.03).",
        "- Target: the bound of the ratio of the p95 at most 1.05 in every cell: MISSED in double_gauss 20 (1.06).",
        "- At most 0.65 of the best classical row in 1 of 1 condenser and phone cells (target 8 of 12: MISSED).",
    ]


def test_targets_that_are_reached_are_named() -> None:
    cells = [cell(name, grid, 0.6, 0.7) for name in ("phone", "phone_as_built", "condenser") for grid in (5, 10, 20)]
    told = results.verdict([*cells, cell("condenser_as_built", 20, 0.9, 1.02)])
    assert all("held in all 10" in line for line in told[:2])
    assert (
        "in 9 of 10 condenser and phone cells (target 8 of 12: reached); not in condenser_as_built 20 (0.90)" in told[2]
    )


def test_a_bound_that_is_no_number_is_a_miss() -> None:
    assert "MISSED" in results.verdict([cell("double_gauss", 5, 1.0, math.nan)])[0]
