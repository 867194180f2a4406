"""`psftrain show`: the state of a run in words, as a document and as curves, whatever state it is in."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import contents
from PIL import Image
from training import job, make_store, one_line_error, psftrain

from psftrain.fit import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: one with a validation store, one without any."""
    folder = tmp_path_factory.mktemp("show")
    store = make_store(folder / "s.zarr", dark=[(0, 0, 2, 2)])
    val = make_store(folder / "v.zarr", grid=3, layout="cells")
    fit(job(store, folder / "judged", val=str(val)))
    fit(job(store, folder / "plain", model__name="seed_cvae"))
    return folder


@pytest.fixture
def judged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run with validation, to be changed."""
    return _copy(folder / "judged", tmp_path)


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Path:
    return _copy(folder / "plain", tmp_path)


def _copy(run: Path, folder: Path) -> Path:
    for name, data in contents(run).items():
        path = folder / run.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / run.name


def change(run: Path, **facts: Any) -> None:
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, **facts}))


def log(run: Path, *lines: dict[str, Any] | str) -> None:
    """Replace what a run has logged."""
    texts = [line if isinstance(line, str) else json.dumps({"time": 1e9, **line}) + "\n" for line in lines]
    (run / "metrics.jsonl").write_text("".join(texts))


@contextmanager
def training(run: Path) -> Iterator[None]:
    """As long as a process trains into a run, it holds a lock on the folder."""
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def ink(path: Path) -> float:
    """The share of a picture that is not white."""
    return float((np.asarray(Image.open(path).convert("L")) < 250).mean())


def lines_of(text: str) -> dict[str, str]:
    """The lines of an answer by their first word."""
    return {key: rest.strip() for key, _, rest in (line.partition(" ") for line in text.splitlines())}


# --- the state in words and as a document -----------------------------------------------------------------------------


def test_a_finished_run(judged: Path, folder: Path) -> None:
    ran = psftrain("show", judged)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{judged}: finished, step 12 of 12\n")
    lines = lines_of(ran.out)
    assert re.fullmatch(r"neural_cvae, [\d,]+ parameters", lines["model"])
    assert lines["data"] == f"24 examples of {folder / 's.zarr'}, 1 places without light"
    assert lines["validation"] == str(folder / "v.zarr")
    assert re.fullmatch(r"val_prior/rel_l2 0\.\d+ at step (8|12)", lines["best"])
    assert re.search(r"\brecon \d", lines["loss"])
    assert re.search(r"\blr \d", lines["train"])
    assert lines["checkpoints"] == "best, 5, 10, 12"
    assert lines["board"] == f"tensorboard --logdir {judged}/tb"
    assert lines["curves"] == str(judged / "curves.png")
    assert ink(judged / "curves.png") > 0.01


def test_a_document(judged: Path) -> None:
    document = psftrain("show", judged, "--json").document
    assert (document["schema"], document["command"], document["ok"]) == (1, "show", True)
    assert document["paths"] == {"run": str(judged), "curves": str(judged / "curves.png")}
    assert (document["status"], document["step"], document["steps"]) == ("finished", 12, 12)
    assert (document["examples"], document["masked"], document["checkpoints"]) == (24, 1, ["best", 5, 10, 12])
    last = json.loads((judged / "run.json").read_text())["metrics"]
    assert {name: document["metrics"][name] for name in last} == last


def test_the_best_is_that_of_the_best_checkpoint(judged: Path) -> None:
    log(judged, *({"step": step, "val_prior/rel_l2": v} for step, v in ((4, 0.5), (8, 0.2), (12, math.nan), (16, 0.3))))
    assert psftrain("show", judged, "--json").document["best"] == {"step": 8, "val_prior/rel_l2": 0.2}


def test_without_validation_there_is_no_best(plain: Path) -> None:
    ran = psftrain("show", plain)
    assert lines_of(ran.out)["validation"] == "none: the best checkpoint is the last"
    assert "best" not in lines_of(ran.out)
    document = psftrain("show", plain, "--json").document
    assert (document["best"], document["validation"], document["model"]) == (None, None, "seed_cvae")


def test_withheld_points_are_named(folder: Path, tmp_path: Path) -> None:
    fit(job(folder / "s.zarr", tmp_path / "run", steps=1, data__val=0.25))
    assert lines_of(psftrain("show", tmp_path / "run").out)["validation"] == (
        "withheld: 0.25 of the interior field points"
    )


@pytest.mark.parametrize("status", ["finished", "early-stopped", "stopped"])
def test_the_status_is_that_of_the_run(plain: Path, status: str) -> None:
    change(plain, status=status)
    assert psftrain("show", plain).out.startswith(f"{plain}: {status}, step 12 of 12")


def test_a_run_that_trains_is_told_from_one_that_was_killed(plain: Path) -> None:
    """Both say `running` in run.json."""
    change(plain, status="running", steps=100)
    with training(plain):
        ran = psftrain("show", plain)
        assert re.match(rf"{plain}: running, step 12 of 100, last logged \d+ \w+ ago\n", ran.out)
        assert psftrain("show", plain, "--json").document["status"] == "running"
    ran = psftrain("show", plain)
    assert ran.out.startswith(f"{plain}: stopped, step 12 of 100; psftrain fit {plain}/config.yaml --run ")


def test_a_run_that_was_moved_goes_on_where_it_is(folder: Path, tmp_path: Path) -> None:
    """Its config.yaml still names the folder it began in."""
    began = tmp_path / "began here"
    fit(job(folder / "s.zarr", began))
    change(began, status="running")
    command = f"; psftrain fit '{began}/config.yaml'"
    assert f"{command} goes on\n" in psftrain("show", began).out
    moved = began.rename(tmp_path / "moved")
    assert f"; psftrain fit {moved}/config.yaml --run {moved} goes on\n" in psftrain("show", moved).out


def test_the_command_that_goes_on_does(judged: Path, folder: Path, tmp_path: Path) -> None:
    fit(job(folder / "s.zarr", tmp_path / "run"))
    ran = psftrain("fit", tmp_path / "run" / "config.yaml")
    assert ran.out.startswith(f"{tmp_path / 'run'}: 12 steps, nothing to do")


def test_the_newest_run_without_a_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _copy(folder / "plain", tmp_path / "runs")
    assert psftrain("show").out.startswith("runs/plain: finished")


# --- what is not there yet, or broken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [True, False])
def test_nothing_logged_yet(plain: Path, missing: bool) -> None:
    log(plain)
    if missing:
        (plain / "metrics.jsonl").unlink()
    for path in (plain / "checkpoints").iterdir():
        path.unlink()
    change(plain, status="running")
    ran = psftrain("show", plain)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{plain}: stopped, step 0 of 12")
    assert lines_of(ran.out)["curves"] == "nothing logged yet"
    assert lines_of(ran.out)["checkpoints"] == "none yet"
    assert not (plain / "curves.png").exists()
    assert "curves" not in psftrain("show", plain, "--json").document["paths"]


def test_a_line_cut_short_is_left_out(plain: Path) -> None:
    log(plain, {"step": 4, "loss/recon": 0.5}, {"step": 8, "loss/recon": 0.25}, '{"step": 12, "time": 1e9, "loss/re')
    document = psftrain("show", plain, "--json").document
    assert document["metrics"] == {"loss/recon": 0.25}
    assert document["step"] == 12, "there is a checkpoint of it"
    log(plain, {"step": 4, "loss/recon": 0.5}, "17\n", "null\n", '{"time": 3}\n', "\n")
    assert psftrain("show", plain, "--json").document["metrics"] == {"loss/recon": 0.5}


@pytest.mark.parametrize(
    "values",
    [
        {"loss/recon": 0.5},
        {"loss/recon": math.nan, "loss/kl": math.nan, "val_prior/rel_l2": math.nan, "kl/active_dims": math.nan},
        {"loss/recon": 0.0, "loss/smooth": 0.0, "loss/kl": 0.0, "val_prior/rel_l2": 0.0, "kl/active_dims": 0.0},
        {"loss/recon": math.inf, "train/lr": 0.0, "train/steps_per_s": 1e9, "gpu/memory_gib": 3.0, "something": 1.0},
        {"fit_prior/rel_l2": 0.3, "val_prior/rel_l2": 0.4, "val_posterior/rel_l2": 0.2, "train/kernels_per_s": 1e5},
    ],
    ids=["one scalar", "no numbers", "zeros", "extremes", "names to come"],
)
@pytest.mark.parametrize("count", [1, 3])
def test_any_numbers_are_drawn(plain: Path, values: dict[str, float], count: int) -> None:
    """Without a warning, which would be an error here."""
    log(plain, *({"step": 10 * (i + 1), **values} for i in range(count)))
    ran = psftrain("show", plain)
    assert (ran.code, ran.err) == (0, "")
    assert ink(plain / "curves.png") > 0.005


def test_a_single_point_is_seen(plain: Path) -> None:
    log(plain, {"step": 10, "train/lr": 0.001})
    assert psftrain("show", plain).code == 0
    empty = ink(plain / "curves.png")
    log(plain, {"step": 10, "train/lr": math.nan})
    assert psftrain("show", plain).code == 0
    assert ink(plain / "curves.png") != empty


def test_the_picture_goes_where_it_is_told(plain: Path, tmp_path: Path) -> None:
    before = contents(plain)
    ran = psftrain("show", plain, "--out", tmp_path / "new" / "a.png")
    assert ran.code == 0, ran.err
    assert ink(tmp_path / "new" / "a.png") > 0.01
    assert contents(plain) == before, "the run is only read"


@pytest.mark.parametrize("name", ["file/a.png", "a.pngg"])
def test_a_picture_that_cannot_be_written(plain: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    ran = psftrain("show", plain, "--out", tmp_path / name)
    assert ran.code == 1
    assert re.search(r"picture .* cannot be written: .*; choose another --out", one_line_error(ran))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "run .* does not exist; `psftrain fit --run .*` makes one"),
        (lambda path: path.write_text("x"), "run .* does not exist"),
        (lambda path: path.mkdir(), r"run\.json cannot be read; is .* a run of psftrain\?"),
        (lambda path: (path.mkdir(), (path / "run.json").write_text("{")), r"run\.json cannot be read"),
        (lambda path: (path.mkdir(), (path / "run.json").write_text("{}")), r"config\.yaml cannot be read"),
    ],
    ids=["nothing", "a file", "an empty folder", "half a document", "no config"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_that_is_none(tmp_path: Path, make: Any, message: str, as_json: bool) -> None:
    make(tmp_path / "run")
    ran = psftrain("show", tmp_path / "run", *(["--json"] if as_json else []))
    assert ran.code == 2
    assert re.search(message, ran.document["error"] if as_json else one_line_error(ran))
