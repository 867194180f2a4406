"""Evaluation: the same points for every row, numbers recomputed by hand, and a first line that does not flatter."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Psfgen, contents, variant
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from training import TRAINED, best, examples_of, job, kernel, make_store, one_line_error, psftrain, rewrite_model

from psfgen.store import open_store
from psftrain import metrics
from psftrain.baselines import CLASSICAL
from psftrain.config import DataConfig
from psftrain.data import withhold
from psftrain.evaluate import evaluate
from psftrain.fit import fit
from psftrain.heldout import heldout_command
from psftrain.report import as_text
from psftrain.run import Trained, load_run

Array = NDArray[Any]
NAMES = {"prior_mean", "prior_sample", "posterior", *CLASSICAL, "mlp", "noise_floor"}  # its lens cannot be traced
KEYS = {
    "schema",
    "run",
    "train_store",
    "heldout_store",
    "n",
    "n_masked",
    "best_classical",
    "beats_best_classical",
    "rows",
}
ROW = {"rel_l2", "centroid_px", "rms_radius", "ee50", "ee80", "mtf", "ms_per_psf"}
STATISTICS = ("mean", "median", "p95")
DEPTHS = (1000.0, 4000.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.zarr: 6 x 6 points, two depths, one node dark at the nearer; heldout.zarr: its cells at three
    depths, one place dark; run: 12 steps.
    """
    folder = tmp_path_factory.mktemp("eval")
    make_store(folder / "train.zarr", grid=6, depth=DEPTHS, dark=[np.s_[0, 0, 0, 0, :]])
    make_store(
        folder / "heldout.zarr", grid=6, layout="cells", depth=(1000.0, 2000.0, 4000.0), dark=[np.s_[0, 1, 2, 2, 1]]
    )
    fit(job(folder / "train.zarr", folder / "run"))
    return folder


@pytest.fixture(scope="module")
def judged(place: Path) -> dict[str, Any]:
    """What `eval --json` says of that run on its held-out store."""
    ran = psftrain("eval", place / "run", "--store", place / "heldout.zarr", "--json")
    assert ran.code == 0
    return ran.document


@pytest.fixture
def mine(place: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("eval")))


def answer(
    run: Path, store: Path | None = None, *, baselines: bool = True, mlp_steps: int | None = None
) -> tuple[dict[str, Any], str]:
    """The document and the text of `psftrain eval`, without its files."""
    trained = load_run(run)
    found = evaluate(trained, str(store) if store else None, baselines=baselines, mlp_steps=mlp_steps).report
    return found, as_text(found, heldout_command(open_store(trained.config.store[0]), trained.path))


def headline(run: Path, store: Path | None = None, *, baselines: bool = True) -> str:
    return answer(run, store, baselines=baselines)[1].splitlines()[0]


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_document(judged: dict[str, Any], place: Path) -> None:
    assert set(judged) >= {*KEYS, "command", "ok", "paths"}
    assert (judged["schema"], judged["command"], judged["ok"]) == (1, "eval", True)
    assert judged["run"] == str(place / "run")
    assert judged["train_store"] == str(place / "train.zarr")
    assert judged["heldout_store"] == str(place / "heldout.zarr")
    assert set(judged["rows"]) == NAMES
    for name, row in judged["rows"].items():
        assert set(row) == ROW
        assert set(row["rel_l2"]) == {"mean", "median", "p95", "mean_interval", "p95_interval"}
        numbers = [*(row["rel_l2"][key] for key in STATISTICS), *(row[key] for key in ROW - {"rel_l2"})]
        if name == "noise_floor":
            assert numbers[3:] == [None] * 6
        else:
            assert all(0 <= number < math.inf for number in numbers)
            assert row["ms_per_psf"] > 0


def test_the_report_is_the_document(judged: dict[str, Any], place: Path) -> None:
    text = (place / "run" / "eval" / "report.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written == {key: value for key, value in judged.items() if key not in ("command", "ok", "paths")}


def test_every_file_is_written(judged: dict[str, Any], place: Path) -> None:
    folder = place / "run" / "eval"
    paths = {name: Path(path) for name, path in judged["paths"].items()}
    assert set(paths.values()) == {folder / n for n in ("report.json", "report.md", "examples.png", "error_map.png")}
    for name in ("examples", "error_map"):
        with Image.open(paths[name]) as picture:
            assert picture.format == "PNG"
            drawn = np.asarray(picture.convert("RGB"))
        assert min(drawn.shape[:2]) > 200
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50, "something is drawn"


def test_the_report_for_people(judged: dict[str, Any], place: Path) -> None:
    """The first line, a table row a row, best first, and the masked points."""
    text = (place / "run" / "eval" / "report.md").read_text()
    ran = psftrain("eval", place / "run", "--store", place / "heldout.zarr", "--out", place / "elsewhere")
    first, *rest = ran.out.splitlines()
    assert first == headline(place / "run", place / "heldout.zarr")
    assert first in text
    assert f"{judged['n']} points, {judged['n_masked']} masked" in text
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    printed = [line for line in rest if "%" in line]
    assert len(table) == len(printed) == len(NAMES)
    means = [float(line.split("|")[2].split()[0].rstrip("%")) for line in table]
    assert means == sorted(means)
    assert means == pytest.approx(sorted(100 * row["rel_l2"]["mean"] for row in judged["rows"].values()), abs=0.006)
    for line in printed:
        assert re.search(r"\d+\.\d\d%", line)
    assert f"{judged['n']} points scored, {judged['n_masked']} masked" in ran.out


def test_the_report_goes_where_it_is_told(place: Path, tmp_path: Path) -> None:
    ran = psftrain("eval", place / "run", "--store", place / "heldout.zarr", "--out", tmp_path / "a" / "b")
    assert ran.code == 0
    assert set(contents(tmp_path)) == {
        f"a/b/{n}" for n in ("report.json", "report.md", "examples.png", "error_map.png")
    }
    assert str(tmp_path / "a" / "b" / "report.md") in ran.out


# --- the numbers ------------------------------------------------------------------------------------------------------


class ByHand:
    """The held-out points that every row can answer, with their truth, conditions and nodes."""

    def __init__(self, place: Path) -> None:
        self.trained: Trained = load_run(place / "run")
        train, held = open_store(place / "train.zarr"), open_store(place / "heldout.zarr")
        nodes, truth = train.read("psf_binned")[0], held.read("psf_binned")[0]
        noise = held.read("noise_binned")[0]
        dioptre = {d: i for i, d in enumerate(train.coords["depth_dioptre"])}
        near, far = (1000 / depth for depth in DEPTHS)
        self.truth: list[Array] = []
        self.bilinear: list[Array] = []
        self.corner: list[Array] = []
        self.noise: list[float] = []
        places = []
        for depth, value in enumerate(held.coords["depth_dioptre"]):
            share = (value - far) / (near - far)
            blend = share * nodes[dioptre[near]] if share else 0 * nodes[dioptre[far]]
            blend = blend + (1 - share) * nodes[dioptre[far]] if share < 1 else blend
            for row in range(5):
                for column in range(5):
                    corners = blend[row : row + 2, column : column + 2]
                    kernels = truth[depth, row, column]
                    if np.isnan(corners).any() or np.isnan(kernels).any():
                        continue
                    self.truth.append(kernels)
                    self.bilinear.append(corners.mean(axis=(0, 1)))
                    self.corner.append(blend[row : row + 2, column : column + 2].reshape(4, *kernels.shape))
                    energy = (kernels.astype(float) ** 2).sum(axis=(-2, -1))
                    relative = noise[depth, row, column].astype(float)
                    self.noise.append(float(np.sqrt((relative**2 * energy).sum() / energy.sum())))
                    places.append((held.coords["field_x"][column], held.coords["field_y"][row], value, 0.5))
        columns = np.array(places).T
        self.condition: Tensor = torch.from_numpy(self.trained.conditioning.encode(*columns))

    def error(self, found: Any) -> Array:
        return metrics.rel_l2(np.asarray(found, dtype=float), np.array(self.truth))


@pytest.fixture(scope="module")
def by_hand(place: Path) -> ByHand:
    return ByHand(place)


def test_points_are_counted(judged: dict[str, Any], by_hand: ByHand) -> None:
    """One is dark, and two lie in a cell that touches a dark node: at its depth and half way to the next."""
    assert judged["n"] == len(by_hand.truth) == 75 - 3
    assert judged["n_masked"] == 3


def statistics(error: Array) -> dict[str, Any]:
    return {"mean": error.mean(), "median": np.median(error), "p95": np.percentile(error, 95)}


def reported(row: dict[str, Any]) -> dict[str, Any]:
    """The same numbers of a row of a report, without their intervals."""
    return {key: row["rel_l2"][key] for key in STATISTICS}


def test_bilinear_by_hand(judged: dict[str, Any], by_hand: ByHand) -> None:
    """A cell's centre is the mean of its corners; between depths linear in dioptres."""
    assert reported(judged["rows"]["bilinear"]) == pytest.approx(statistics(by_hand.error(by_hand.bilinear)), rel=1e-5)


def test_nearest_takes_a_corner(judged: dict[str, Any], by_hand: ByHand) -> None:
    """At a cell's centre all four are equally near."""
    corners = np.array(by_hand.corner)
    errors = np.array([by_hand.error(corners[:, i]) for i in range(4)])
    assert errors.min(axis=0).mean() <= judged["rows"]["nearest"]["rel_l2"]["mean"] <= errors.max(axis=0).mean()


def test_the_model_by_hand(judged: dict[str, Any], by_hand: ByHand) -> None:
    """Asked for a place, and shown the truth."""
    model, condition = by_hand.trained.model, by_hand.condition
    truth = torch.from_numpy(np.array(by_hand.truth))
    with torch.no_grad():
        for name, z in (
            ("prior_mean", model.prior(condition).mean),
            ("posterior", model.posterior(truth, condition).mean),
        ):
            expected = metrics.compare(model.decode(z, condition).numpy(), truth.numpy(), 10 / 5)
            row = judged["rows"][name]
            assert reported(row) == pytest.approx(statistics(expected["rel_l2"]), rel=1e-4)
            for key in ("centroid_px", "mtf"):
                assert row[key] == pytest.approx(expected[key].mean(), rel=1e-3)


def test_a_sample_is_not_the_mean(judged: dict[str, Any], place: Path) -> None:
    """But seeded: the same again."""
    rows = judged["rows"]
    assert rows["prior_sample"]["rel_l2"] != rows["prior_mean"]["rel_l2"]
    again, _ = answer(place / "run", place / "heldout.zarr")
    for name, row in again["rows"].items():
        assert {**row, "ms_per_psf": 0} == {**rows[name], "ms_per_psf": 0}, name


def test_the_noise_floor_by_hand(judged: dict[str, Any], by_hand: ByHand) -> None:
    assert reported(judged["rows"]["noise_floor"]) == pytest.approx(statistics(np.array(by_hand.noise)), rel=1e-4)


def test_the_best_row_is_the_best(judged: dict[str, Any]) -> None:
    means = {name: judged["rows"][name]["rel_l2"]["mean"] for name in CLASSICAL}
    assert judged["best_classical"] == min(means, key=lambda name: means[name])
    ours = judged["rows"]["prior_mean"]["rel_l2"]["mean"]
    assert judged["beats_best_classical"] is (ours < min(means.values()))


def mixture(x: Array, y: Array, depth: float, focus: float, wavelength: Array, side: int, aspect: float = 1) -> Array:
    """Two kernels mixed by a share that is affine in the field and linear in both dioptres."""
    share = (0.5 + 0.2 * x - 0.1 * y) * (0.3 + 0.3 * depth) * (1 - 0.5 * focus)
    one, other = (kernel(place, 0.3, 0.0, 0.0, wavelength, side) for place in (0.1, 0.9))
    share = np.asarray(share)[..., None, None, None]
    return np.asarray((1 - share) * one + share * other)


def test_every_interpolation_is_exact_where_it_can_be(tmp_path: Path) -> None:
    """Kernels affine in the field and linear in dioptres: over both distances at once, only nearest errs."""
    layout: dict[str, Any] = {"grid": 5, "formula": mixture}
    train = make_store(tmp_path / "train.zarr", depth=(500.0, 1000.0, math.inf), focus=(800.0, 5000.0), **layout)
    held = make_store(
        tmp_path / "held.zarr", layout="random", seed=3, depth=(700.0, 1000.0, 9000.0), focus=(1500.0, 3000.0), **layout
    )
    fit(job(train, tmp_path / "run", steps=0))
    rows = evaluate(load_run(tmp_path / "run"), str(held)).report["rows"]
    for name in CLASSICAL:
        error = rows[name]["rel_l2"]["p95"]
        assert error > 0.01 if name == "nearest" else error < 1e-5, name


def test_lengths_are_in_samples_of_the_full_kernel(tmp_path: Path) -> None:
    """Truth one bin to the right of what every node says: one bin is two samples."""

    def point(at: int) -> Callable[..., Array]:
        def drawn(x: Array, y: Array, depth: float, focus: float, wavelength: Array, side: int, aspect: float) -> Array:
            found = np.zeros((*np.shape(x), len(wavelength), side, side))
            found[..., 4:6, at : at + 2] = 0.25
            return found

        return drawn

    train = make_store(tmp_path / "train.zarr", grid=4, formula=point(4))
    held = make_store(tmp_path / "held.zarr", grid=4, layout="cells", formula=point(6))
    fit(job(train, tmp_path / "run", steps=0))
    rows = evaluate(load_run(tmp_path / "run"), str(held)).report["rows"]
    for name in CLASSICAL:
        assert rows[name]["centroid_px"] == pytest.approx(2.0), name
        assert rows[name]["mtf"] == pytest.approx(0, abs=1e-6), name
        assert rows[name]["rel_l2"]["mean"] == pytest.approx(math.sqrt(2)), name


# --- held out or not --------------------------------------------------------------------------------------------------


def test_without_a_store_it_is_not_held_out(place: Path) -> None:
    ran = psftrain("eval", place / "run", "--out", place / "points")
    first = ran.out.splitlines()[0]
    assert first.startswith("NOT HELD-OUT")
    assert "71 training points" in first
    assert "psfgen render " in first
    assert (place / "points" / "report.md").read_text().count("NOT HELD-OUT") == 1
    report = json.loads((place / "points" / "report.json").read_text())
    assert report["heldout_store"] is None
    assert report["rows"]["bilinear"]["rel_l2"]["p95"] < 1e-6, "exact by construction"


DARK = [np.s_[0, 0, 0, 0, :]]


@pytest.mark.parametrize(
    "layout",
    [
        {"grid": 6, "depth": DEPTHS, "dark": DARK},
        {"grid": 6, "depth": DEPTHS[:1], "dark": [*DARK, np.s_[0, 0, 3, 3, 0]], "seed": 1},
        {"grid": 2, "depth": DEPTHS[1:]},
        {"grid": 6, "depth": DEPTHS},
    ],
    ids=["the same", "some", "corners", "one was dark"],
)
def test_a_store_of_training_points_is_not_held_out(place: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    """The same again, or another render of some; what counts are the points that are scored."""
    other = make_store(tmp_path / "other.zarr", **layout)
    assert headline(place / "run", other).startswith("NOT HELD-OUT")


def test_the_training_store_is_not_held_out_because_some_of_it_was_withheld(place: Path, tmp_path: Path) -> None:
    """All points that are scored were trained on: the others lie in cells that a grid skips."""
    fit(job(place / "train.zarr", tmp_path / "run", data__val=0.1))
    assert headline(tmp_path / "run", place / "train.zarr").startswith("NOT HELD-OUT")


@pytest.mark.parametrize("layout", [{"layout": "cells"}, {"layout": "random", "seed": 4}, {"depth": (2000.0,)}])
def test_other_points_are_held_out(place: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    other = make_store(tmp_path / "other.zarr", **{"grid": 6, "depth": DEPTHS, **layout})
    first = headline(place / "run", other)
    assert first.startswith("The model ")
    assert "held-out points" in first


def advice(line: str) -> list[str]:
    """The words of the psfgen command in a first line."""
    command = line[line.index("psfgen render") :].partition("&&")[0]
    words = shlex.split(command)
    assert words[:2] == ["psfgen", "render"]
    return words[1:]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grid": 4, "depth": (691.3580246913580, 1234.5, math.inf), "focus": (700.0, math.inf)},
        {"field_max": 0.6, "wavelength": (0.5,), "kernel_px": 12, "bins": 3, "pitch_um": 5.5},
        {"sensor_mm": (12.0, 9.0)},
        {"settings": {"fnum": 8.0}},
        {"settings": {"reference_um": 0.55}},
    ],
    ids=["plain", "depths", "sampling", "sensor", "stop", "reference"],
)
def test_the_advice_renders_the_same_lens_at_other_points(
    psfgen: Psfgen, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Every key of the render but the layout is that of the training store, as far as the numbers go."""
    path = make_store(tmp_path / "train.zarr", **{"grid": 3, "lens": "triplet", "sensor_mm": (20.0, 20.0), **settings})
    fit(job(path, tmp_path / "run", steps=0, batch=2))
    words = advice(headline(tmp_path / "run"))
    ran = psfgen(*words, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    wanted, found = open_store(path).attrs["config"], ran.document["config"]
    assert found["layout"] != wanted["layout"]
    assert (wanted["tracer"], found["tracer"]) == ("auto", "numba"), "a store made by a render knows its tracer"
    for key in wanted.keys() - {"layout", "tracer", "tolerance"}:
        expected, got = (
            [float(item) for item in values] if isinstance(values, list) else values
            for values in (wanted[key], found[key])
        )
        assert got == (pytest.approx(expected, rel=1e-9) if isinstance(expected, (list, float)) else expected), key


def test_the_advice_takes_a_lens_file_with_a_space(psfgen: Psfgen, tmp_path: Path) -> None:
    (tmp_path / "my lenses").mkdir()
    lens = variant(tmp_path / "my lenses", "triplet", lambda document: None)
    path = make_store(tmp_path / "train.zarr", grid=3, lens=str(lens), sensor_mm=(20.0, 20.0))
    fit(job(path, tmp_path / "run", steps=0, batch=2))
    ran = psfgen(*advice(headline(tmp_path / "run")), "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["config"]["lens"] == str(lens)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_run_that_loses_says_so_first(tmp_path: Path, place: Path) -> None:
    """Untrained."""
    fit(job(place / "train.zarr", tmp_path / "run", steps=0))
    report, text = answer(tmp_path / "run", place / "heldout.zarr")
    assert "does NOT beat the best classical interpolation" in text.splitlines()[0]
    assert report["beats_best_classical"] is False
    ours, theirs = (report["rows"][name]["rel_l2"]["mean"] for name in ("prior_mean", report["best_classical"]))
    assert ours > theirs
    assert f"{ours:.1%} against {theirs:.1%}" in text.splitlines()[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a coarse grid of kernels that turn with the field: what the default model is made for."""
    folder = tmp_path_factory.mktemp("good")
    store = make_store(folder / "train.zarr", grid=4)
    fit(job(store, folder / "run", steps=400, lr=1e-2, warmup=20, model__width=32, val_every=999, save_every=999))
    return folder / "run"


def test_a_run_that_wins_says_by_how_much(good: Path, tmp_path: Path) -> None:
    report, text = answer(good, make_store(tmp_path / "held.zarr", grid=4, layout="cells"))
    first = text.splitlines()[0]
    assert "The model beats the best classical interpolation on 9 held-out points" in first
    assert report["beats_best_classical"] is True
    ours, theirs = (report["rows"][name]["rel_l2"]["mean"] for name in ("prior_mean", report["best_classical"]))
    assert f"{ours:.1%} against {theirs:.1%}" in first
    assert f"a ratio of {ours / theirs:.2f}" in first


def test_the_nearer_the_nodes_the_harder_to_beat(good: Path, tmp_path: Path) -> None:
    """The verdict turns exactly where the two errors meet."""
    ratios = []
    for step in range(8):
        away = 0.005 * 1.7**step
        report, text = answer(good, make_store(tmp_path / f"{step}.zarr", grid=4, field_max=1 - away), mlp_steps=1)
        ours, theirs = (report["rows"][name]["rel_l2"]["mean"] for name in ("prior_mean", report["best_classical"]))
        assert report["beats_best_classical"] == (ours < theirs)
        assert ("does NOT beat" in text) == (ours >= theirs)
        ratios.append(ours / theirs)
    assert ratios[0] > 1 > ratios[-1]
    assert any(1 < ratio < 2 for ratio in ratios), "a close race"


def collapsed(weights: dict[str, Tensor]) -> None:
    """Make the posterior the prior: the same layers, blind to the kernel."""
    for key in [key for key in weights if key.startswith("encoder")]:
        prior = weights[key.replace("encoder", "prior_net")]
        if weights[key].shape == prior.shape:
            weights[key] = prior.clone()
        else:
            weights[key] = torch.zeros_like(weights[key])
            weights[key][:, -prior.shape[1] :] = prior


def telling(weights: dict[str, Tensor]) -> None:
    """Move the posterior's means away from the prior's."""
    key = max(key for key in weights if key.startswith("encoder") and key.endswith("bias"))
    weights[key][: len(weights[key]) // 2] += 3


@pytest.mark.parametrize("name", TRAINED)
def test_a_collapsed_posterior_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    """In the answer and in the report, whatever else came out."""
    train = make_store(tmp_path / "train.zarr", grid=3)
    held = make_store(tmp_path / "held.zarr", grid=3, layout="cells")
    fit(job(train, tmp_path / "run", steps=0, model__name=name))
    rewrite_model(tmp_path / "run", collapsed)
    ran = psftrain("eval", tmp_path / "run", "--store", held)
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())
    assert report["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert report["active_dims"] == 0
    beta = {"neural_cvae": "1e-05", "seed_cvae": "1e-06"}[name]
    for text in (ran.out, (tmp_path / "run" / "eval" / "report.md").read_text()):
        assert "the posterior has collapsed: KL 0.000 nats, 0 of 3 latent dimensions active" in text
        assert f"--set loss.beta={beta}" in text
        assert ("--set loss.recon=rel_l2" in text) is (name == "seed_cvae")
    for setting in re.findall(r"--set (loss\.[a-z]+=[\w.-]+)", ran.out):
        from psftrain.config import load_fit_config

        load_fit_config(None, [f"model.name={name}", setting])


@pytest.mark.parametrize("name", TRAINED)
def test_a_posterior_that_tells_something_is_not_accused(name: str, tmp_path: Path) -> None:
    train = make_store(tmp_path / "train.zarr", grid=3)
    fit(job(train, tmp_path / "run", steps=0, model__name=name))
    rewrite_model(tmp_path / "run", telling)
    report, text = answer(tmp_path / "run")
    assert report["active_dims"] == report["latent_dims"] == 3
    trained, (examples, _) = load_run(tmp_path / "run"), examples_of(train)
    with torch.no_grad():
        q = trained.model.posterior(examples.kernels, examples.condition)
        p = trained.model.prior(examples.condition)
    pairs = [torch.distributions.Normal(g.mean, (g.logvar / 2).exp()) for g in (q, p)]
    expected = torch.distributions.kl_divergence(*pairs).sum(dim=1).mean()
    assert report["kl_nats"] == pytest.approx(float(expected), rel=1e-4)
    assert "collapsed" not in text


# --- which rows -------------------------------------------------------------------------------------------------------


def test_without_baselines(place: Path, tmp_path: Path) -> None:
    ran = psftrain(
        "eval", place / "run", "--store", place / "heldout.zarr", "--no-baselines", "--out", tmp_path, "--json"
    )
    report = ran.document
    assert set(report["rows"]) == NAMES - {*CLASSICAL, "mlp"}
    assert set(report["left_out"]) == {"mlp", "trace"}
    assert report["best_classical"] is report["beats_best_classical"] is None
    assert (report["n"], report["n_masked"]) == (74, 1), "no row skips a cell"
    first = headline(place / "run", place / "heldout.zarr", baselines=False)
    assert "beat" not in first
    assert "74 held-out points" in first


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_small_grids_have_the_rows_they_can_have(tmp_path: Path, grid: int) -> None:
    train = make_store(tmp_path / "train.zarr", grid=grid, depth=DEPTHS)
    held = make_store(tmp_path / "held.zarr", grid=grid, depth=(2000.0,))
    fit(job(train, tmp_path / "run", steps=1, batch=2))
    report = evaluate(load_run(tmp_path / "run"), str(held)).report
    assert set(report["rows"]) & set(CLASSICAL) == {name for name, (_, needed) in CLASSICAL.items() if grid >= needed}
    assert report["n"] == grid**2


def test_full_size_kernels_are_judged_as_such(tmp_path: Path) -> None:
    train = make_store(tmp_path / "train.zarr", grid=4)
    held = make_store(tmp_path / "held.zarr", grid=4, layout="cells")
    fit(job(train, tmp_path / "run", steps=1, data__array="psf"))
    report = evaluate(load_run(tmp_path / "run"), str(held)).report
    nodes, truth = (open_store(path).read("psf")[0, 0] for path in (train, held))
    middle = (nodes[:-1, :-1] + nodes[1:, :-1] + nodes[:-1, 1:] + nodes[1:, 1:]) / 4
    expected = metrics.rel_l2(middle.reshape(9, 3, 10, 10), truth.reshape(9, 3, 10, 10))
    assert report["rows"]["bilinear"]["rel_l2"]["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert report["rows"]["noise_floor"]["rel_l2"]["mean"] > 0.02, "that of psf"


def test_withheld_points_are_withheld_from_the_baselines_too(place: Path, tmp_path: Path) -> None:
    """RBF does without them; grid rows skip their cells, so their neighbourhood is not scored."""
    train = make_store(tmp_path / "train.zarr", grid=6)
    held = make_store(tmp_path / "held.zarr", grid=6, layout="cells")
    fit(job(train, tmp_path / "run", data__val=0.07, steps=1))
    report = evaluate(load_run(tmp_path / "run"), str(held)).report
    assert round(0.07 * 16) == 1
    assert (report["n"], report["n_masked"]) == (25 - 4, 4)


def test_without_a_store_the_points_trained_on_are_scored(tmp_path: Path) -> None:
    """Not those that were withheld."""
    path = make_store(tmp_path / "train.zarr", grid=7)
    fit(job(path, tmp_path / "run", data__val=0.3, seed=3, steps=1))
    found = evaluate(load_run(tmp_path / "run"), None, baselines=False)
    train, val, _ = withhold(examples_of(path)[0].places, DataConfig(val=0.3), 3)
    assert val is not None
    assert found.report["n"] == len(train) == 49 - len(val)
    assert {tuple(place) for place in found.field_xy.round(4)} == {
        tuple(place) for place in train.condition[:, :2].double().numpy().round(4)
    }


def test_points_beyond_the_nodes_are_masked(tmp_path: Path) -> None:
    """Inside the trained field, but outside the rectangle of the nodes, where a grid has no cell."""
    train = make_store(tmp_path / "train.zarr", grid=5, layout="random", seed=1)
    coords = open_store(train).coords
    reach = max(np.abs(coords[name]).max() for name in ("field_x", "field_y"))
    held = make_store(tmp_path / "held.zarr", grid=9, layout="cells", field_max=reach)
    asked = open_store(held).coords["field_x"]
    inside = [((axis[0] <= asked) & (asked <= axis[-1])).sum() for axis in (coords["field_x"], coords["field_y"])]
    assert inside[0] * inside[1] < 64
    fit(job(train, tmp_path / "run", steps=0))
    report, _ = answer(tmp_path / "run", held)
    assert report["n"] == inside[0] * inside[1]
    assert report["n_masked"] == 64 - inside[0] * inside[1]


@pytest.mark.parametrize("left", [0, 2])
def test_a_depth_with_too_few_lit_nodes_masks_what_needs_it(tmp_path: Path, left: int) -> None:
    """A held-out depth between it and the next."""
    dark = [np.s_[0, 0, 0, left:, :], np.s_[0, 0, 1:, :, :]]
    train = make_store(tmp_path / "train.zarr", grid=4, depth=(500.0, 1000.0, 4000.0), dark=dark)
    held = make_store(tmp_path / "held.zarr", grid=4, layout="cells", depth=(700.0, 2000.0))
    fit(job(train, tmp_path / "run", steps=0))
    report, _ = answer(tmp_path / "run", held)
    assert (report["n"], report["n_masked"]) == (9, 9)


def test_a_distance_that_differs_by_rounding_is_the_trained_one(tmp_path: Path) -> None:
    train = make_store(tmp_path / "train.zarr", grid=3, depth=(691.3580246913580,))
    held = make_store(tmp_path / "held.zarr", grid=3, layout="cells", depth=(691.35802,))
    fit(job(train, tmp_path / "run", steps=0))
    report = evaluate(load_run(tmp_path / "run"), str(held)).report
    assert report["n"] == 4


# --- several stores ---------------------------------------------------------------------------------------------------


def test_a_run_on_several_stores(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / f"{i}.zarr", grid=4, depth=(depth,)) for i, depth in enumerate(DEPTHS)]
    held = make_store(tmp_path / "held.zarr", grid=4, layout="cells", depth=(2000.0,))
    fit(job(stores, tmp_path / "run", steps=1))
    report, _ = answer(tmp_path / "run", held)
    assert report["train_store"] == list(map(str, stores))
    assert report["n"] == 9
    assert headline(tmp_path / "run").startswith("NOT HELD-OUT: scored on the 32 training points")


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_held_out_store_is_scored_over_all_its_copies(tmp_path: Path) -> None:
    """Interpolation of the one specimen trained on answers for each of them."""
    train = make_store(tmp_path / "train.zarr", grid=5, depth=DEPTHS, copies=1)
    held = make_store(tmp_path / "held.zarr", grid=5, layout="cells", depth=DEPTHS, copies=3, dark=[np.s_[0, 1, 2, 2]])
    fit(job(train, tmp_path / "run", steps=1))
    report, _ = answer(tmp_path / "run", held)
    assert (report["n"], report["n_masked"]) == (3 * 2 * 16 - 3, 3)
    assert report["best_classical"] is not None
    found = evaluate(load_run(tmp_path / "run"), str(held)).errors["bilinear"]
    of_copy = found.reshape(3, -1).mean(axis=1)
    assert of_copy[0] < of_copy[1] < of_copy[2], "the farther from the one trained on"


def test_a_run_on_copies_has_no_classical_rows(tmp_path: Path) -> None:
    """A kernel of which copy would they give? The first line says so."""
    train = make_store(tmp_path / "train.zarr", grid=5, copies=2)
    held = make_store(tmp_path / "held.zarr", grid=5, layout="cells", copies=2)
    fit(job(train, tmp_path / "run", steps=1))
    report, _ = answer(tmp_path / "run", held)
    assert report["n"] == 2 * 16
    assert report["best_classical"] is None
    assert headline(tmp_path / "run", held).endswith(
        "(no baselines: they take one specimen, the training store holds 2 copies)"
    )


# --- what does not fit ------------------------------------------------------------------------------------------------

MISMATCH: dict[str, tuple[dict[str, Any], str]] = {
    "lens": ({"lens_text": '{"info": "another"}'}, "lens_sha256 is .*, but .* was trained on: another lens"),
    "pitch": ({"pitch_um": 5.0}, r"pitch_um is 5\.0, but 4\.0 was trained on"),
    "kernel_px": ({"kernel_px": 15}, "kernel_px is 15, but 10"),
    "bins": ({"bins": 10}, "bins is 10, but 5"),
    "wavelengths": ({"wavelength": (0.48, 0.55, 0.65)}, "wavelength is "),
    "fewer wavelengths": ({"wavelength": (0.48,)}, "wavelength is "),
    "nearer": ({"depth": (500.0,)}, "depth 500 mm is outside the range trained on, 1000 mm to 4000 mm"),
    "farther": ({"depth": (1000.0, math.inf)}, "depth inf is outside the range trained on, 1000 mm to 4000 mm"),
    "focus": ({"focus": (1000.0,)}, "focus 1000 mm is outside"),
    "field": ({"field_max": 1.5}, r"field reaches 1\.2, the run was trained up to 1; render it with --field-max 1"),
}


@pytest.mark.parametrize("how", MISMATCH)
def test_a_held_out_store_that_does_not_fit_is_refused(mine: Path, tmp_path: Path, how: str) -> None:
    """One line, exit code 2, nothing written."""
    change, message = MISMATCH[how]
    layout = {"grid": 6, "layout": "cells", "depth": DEPTHS}
    other = make_store(tmp_path / "other.zarr", **{**layout, **change})
    before = contents(tmp_path)
    ran = psftrain("eval", mine, "--store", other)
    assert ran.code == 2
    error = one_line_error(ran)
    assert re.search(message, error)
    assert "other.zarr" in error
    assert contents(tmp_path) == before


def spoilt(path: Path, name: str) -> None:
    chunk = next(file for file in sorted((path / name / "c").rglob("*")) if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))


@pytest.mark.parametrize("which", ["train", "held"])
def test_an_incomplete_store_is_refused(tmp_path: Path, which: str) -> None:
    paths = {
        "train": make_store(tmp_path / "train.zarr", grid=3, depth=DEPTHS),
        "held": make_store(tmp_path / "held.zarr", grid=3, layout="cells", depth=DEPTHS),
    }
    fit(job(paths["train"], tmp_path / "run", steps=0))
    (paths[which] / "ledger" / "depth-0001.json").unlink()
    ran = psftrain("eval", tmp_path / "run", "--store", paths["held"])
    assert ran.code == 3
    assert f"{paths[which].name} is incomplete: 1 of 2 blocks are missing" in one_line_error(ran)
    assert not (tmp_path / "run" / "eval").exists()


@pytest.mark.parametrize("which", ["train", "held"])
@pytest.mark.parametrize("array", ["psf_binned", "noise_binned"])
def test_a_corrupt_chunk_is_found(tmp_path: Path, which: str, array: str) -> None:
    paths = {
        "train": make_store(tmp_path / "train.zarr", grid=3),
        "held": make_store(tmp_path / "held.zarr", grid=3, layout="cells"),
    }
    fit(job(paths["train"], tmp_path / "run", steps=0))
    spoilt(paths[which], array)
    ran = psftrain("eval", tmp_path / "run", "--store", paths["held"])
    assert ran.code == 1
    assert re.search(rf"{paths[which].name}: {array} is corrupt", one_line_error(ran))
    assert not (tmp_path / "run" / "eval").exists()


def test_a_training_store_that_is_another_now(tmp_path: Path) -> None:
    train = make_store(tmp_path / "train.zarr", grid=3)
    fit(job(train, tmp_path / "run", steps=0))
    shutil.rmtree(train)
    make_store(train, grid=3, pitch_um=7.0)
    ran = psftrain("eval", tmp_path / "run")
    assert ran.code == 2
    assert re.search(r"training store .*train\.zarr: pitch_um is 7\.0, but 4\.0", one_line_error(ran))


@pytest.mark.parametrize("what", ["training store", "held-out store", "run"])
def test_what_is_not_there_is_named(mine: Path, place: Path, tmp_path: Path, what: str) -> None:
    """Exit code 1 for stores, 2 for runs."""
    if what == "training store":
        train = make_store(tmp_path / "train.zarr", grid=3)
        fit(job(train, tmp_path / "gone", steps=0))
        train.rename(tmp_path / "moved.zarr")
        ran, name, code = psftrain("eval", tmp_path / "gone"), "train.zarr", 1
    elif what == "held-out store":
        ran, name, code = psftrain("eval", mine, "--store", tmp_path / "none.zarr"), "none.zarr", 1
    else:
        ran, name, code = psftrain("eval", tmp_path / "none"), "none", 2
    assert ran.code == code
    assert name in one_line_error(ran)
    assert "does not exist" in one_line_error(ran)


def test_weights_that_do_not_fit_their_config_are_refused(mine: Path) -> None:
    rewrite_model(mine, lambda weights: weights.pop("decoder.1.0.weight"))  # type: ignore[arg-type, return-value]
    ran = psftrain("eval", mine)
    assert ran.code == 2
    assert "does not fit its config" in one_line_error(ran)


def test_a_report_that_cannot_be_written(mine: Path, place: Path) -> None:
    (mine / "eval").write_text("a file")
    ran = psftrain("eval", mine, "--store", place / "heldout.zarr")
    assert ran.code == 1
    assert "choose another --out" in one_line_error(ran)


# --- the newest run ---------------------------------------------------------------------------------------------------


def test_without_a_name_the_newest_run_is_judged(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By when it was trained, not by its name, nor by when it was judged."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("b", "c", "a")):
        shutil.copytree(place / "run", tmp_path / "runs" / name, ignore=shutil.ignore_patterns("eval"))
        for path in (tmp_path / "runs" / name).rglob("*"):
            os.utime(path, (1e9 + number, 1e9 + number))
    (tmp_path / "runs" / "zz-not-a-run").mkdir()
    assert psftrain("eval", "runs/b", "--no-baselines", "--store", place / "heldout.zarr").code == 0
    assert not (tmp_path / "runs" / "a" / "eval").exists()
    assert psftrain("eval", "--no-baselines", "--store", place / "heldout.zarr").code == 0
    assert (tmp_path / "runs" / "a" / "eval" / "report.json").exists()


@pytest.mark.parametrize("there", [False, True])
def test_without_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "runs" / "empty").mkdir(parents=True)
    ran = psftrain("eval")
    assert ran.code == 2
    assert "no run with a checkpoint in runs/; `psftrain fit` makes one" in one_line_error(ran)


def test_the_best_checkpoint_is_judged(mine: Path, place: Path, judged: dict[str, Any]) -> None:
    """Not the last."""
    rewrite_model(mine, lambda weights: [value.mul_(0.5) for value in weights.values()] and None)
    report, _ = answer(mine, place / "heldout.zarr")
    assert report["rows"]["prior_mean"]["rel_l2"] != judged["rows"]["prior_mean"]["rel_l2"]
    assert report["step"] == best(mine)["step"]


# --- what a run has seen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["depth", "focus"])
def test_rows_interpolate_over_distances_that_were_withheld(tmp_path: Path, what: str) -> None:
    """Between those left, as if the withheld had never been rendered; nothing is masked."""
    distances, between = (500.0, 1000.0, 4000.0), (500.0, 700.0, 1000.0, 2000.0)
    whole = make_store(tmp_path / "whole.zarr", grid=4, **{what: distances})
    ends = make_store(tmp_path / "ends.zarr", grid=4, **{what: (distances[0], distances[-1])})
    held = make_store(tmp_path / "held.zarr", grid=4, layout="cells", **{what: between})
    fit(job(whole, tmp_path / "run", steps=0, **{f"data__val_{what}": 1}))
    fit(job(ends, tmp_path / "other", steps=0))
    found, expected = (evaluate(load_run(tmp_path / run), str(held)).report for run in ("run", "other"))
    assert (found["n"], found["n_masked"]) == (expected["n"], 0) == (4 * 9, 0)
    for name in CLASSICAL:
        assert found["rows"][name]["rel_l2"] == expected["rows"][name]["rel_l2"], name


def test_points_that_were_trained_on_do_not_count_among_the_held_out(tmp_path: Path) -> None:
    """Every second row and column of the held-out store, at one of its depths."""
    train = make_store(tmp_path / "train.zarr", grid=4, depth=DEPTHS)
    held = make_store(tmp_path / "held.zarr", grid=7, depth=(DEPTHS[0], 2000.0), seed=1)
    fit(job(train, tmp_path / "run", steps=0))
    found = evaluate(load_run(tmp_path / "run"), str(held))
    assert found.report["held_out"]
    assert (found.report["n"], found.report["n_masked"]) == (2 * 49 - 16, 16)
    assert found.errors["nearest"].min() > 0


def test_the_store_that_chose_the_best_checkpoint_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = make_store(tmp_path / "train.zarr", grid=4)
    held = make_store(tmp_path / "held.zarr", grid=4, layout="cells")
    fit(job(train, tmp_path / "run", val=str(held)))
    other = make_store(tmp_path / "other.zarr", grid=5, layout="cells")
    assert evaluate(load_run(tmp_path / "run"), str(other)).report["held_out"]
    assert "flatters" not in caplog.text
    assert evaluate(load_run(tmp_path / "run"), str(held)).report["held_out"]
    assert f"{held} is the validation store that the best checkpoint was chosen by" in caplog.text
    held.rename(tmp_path / "moved.zarr")
    assert evaluate(load_run(tmp_path / "run"), str(tmp_path / "moved.zarr")).report["held_out"]


def test_a_place_of_another_lens_is_no_place_trained_on(tmp_path: Path) -> None:
    """Lens B was trained on at the places where lens A is judged: for A they are held out."""
    a = make_store(tmp_path / "a.zarr")
    b = make_store(tmp_path / "b.zarr", grid=4, field_max=0.9, lens="b", lens_text='{"info": "another formula"}')
    held = make_store(tmp_path / "held.zarr", grid=4, field_max=0.9)
    fit(job([a, b], tmp_path / "run"))
    found = evaluate(load_run(tmp_path / "run"), str(held)).report
    assert (found["held_out"], found["n"]) == (True, 16)
    assert not evaluate(load_run(tmp_path / "run"), str(b)).report["held_out"]
