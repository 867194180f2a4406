"""One model on one training grid of one lens, with one seed: rendered, trained, judged, and kept."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.config import RenderConfig, load_config
from psfgen.errors import PlanMismatch
from psfgen.render import render
from psfgen.store import Store
from psfgen.store.schema import json_text, plain
from psftrain.checkpoint import write_whole
from psftrain.config import FitConfig, load_fit_config
from psftrain.evaluate import evaluate
from psftrain.fit import fit
from psftrain.run import load_run

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "configs" / "render" / "cells"
ABOUT = ("fit_s", "all_s", "source")  # what is kept beside a report

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """Which one."""

    cell: str
    grid: int
    seed: int
    model: str

    def __str__(self) -> str:
        return f"{self.cell}, {self.grid} x {self.grid}, seed {self.seed}, {self.model}"


@dataclass(frozen=True)
class Setting:
    """How all of them are done: `held_side` squared held-out points, keys of the fits in `sets`."""

    work: Path
    threads: int = 2
    sets: tuple[str, ...] = ()
    held_side: int = 32
    mlp_steps: int = 3000

    def folder(self, task: Task) -> Path:
        """Where a task keeps what came out."""
        return self.work / "interpolate" / f"{task.cell}-{task.grid}-{task.seed}" / task.model


@dataclass(frozen=True)
class Scored:
    """What came out: the report of eval and every row's errors by point; seconds of training and of all; the source."""

    report: dict[str, Any]
    errors: dict[str, Array]
    fit_s: float
    all_s: float
    source: str


def score(task: Task, setting: Setting) -> tuple[Scored, bool]:
    """Render, train and judge, unless the same has been done before; and whether it was done now."""
    first = time.perf_counter()
    train, held = stores(task, setting)
    return judged(setting.folder(task), fit_config(task, setting, train), (train, held), setting, first)


def judged(
    folder: Path, config: FitConfig, stores: tuple[Store, Store], setting: Setting, first: float
) -> tuple[Scored, bool]:
    """Train on one store and judge by another, unless `folder` has it; and whether it was done now, since `first`."""
    train, held = stores
    identity = identity_of(config, train, held, setting)
    found = read(folder, identity)
    if found is not None:
        return found, False
    shutil.rmtree(folder, ignore_errors=True)  # what was begun is begun anew, or its time would not be known
    began = time.perf_counter()
    fit(config)
    fit_s = time.perf_counter() - began
    torch.set_num_threads(1)  # every row is timed on one core
    try:
        found_now = evaluate(load_run(Path(config.run)), str(held.path), mlp_steps=setting.mlp_steps)
    finally:
        torch.set_num_threads(setting.threads)
    report = json.loads(json_text(found_now.report))
    found = Scored(report, found_now.errors, fit_s, time.perf_counter() - first, source())
    _keep(folder, identity, found)
    return found, True


def identity_of(config: FitConfig, train: Store, held: Store, setting: Setting) -> dict[str, Any]:
    """What decides the numbers that come out of a run, but for the source."""
    found: dict[str, Any] = plain(
        {
            "train": train.attrs["plan_sha256"],
            "held": held.attrs["plan_sha256"],
            "mlp_steps": setting.mlp_steps,
            "fit": {key: value for key, value in config.model_dump().items() if key not in ("store", "run")},
        }
    )
    return found


def stores(task: Task, setting: Setting) -> tuple[Store, Store]:
    """The training store and the held-out one: of one specimen, with other pupil points."""
    train, held = (
        rendered(
            CELLS / f"{task.cell}.yaml",
            setting.work / "stores" / f"{task.cell}-{layout}-{grid}-{task.seed}.zarr",
            [("grid", grid), ("layout", layout), ("seed", task.seed)],
        )
        for layout, grid in (("grid", task.grid), ("random", setting.held_side))
    )
    assert train.attrs.get("as_built") == held.attrs.get("as_built"), "the seed makes the specimen"
    return train, held


def rendered(config: Path, out: Path, changes: list[tuple[str, Any]]) -> Store:
    """What a config renders on the CPU with some keys changed; as it was left by an earlier call, if it was."""
    job = load_config(RenderConfig, config, [*changes, ("out", str(out)), ("device", "cpu")])
    try:
        return render(job)
    except PlanMismatch:  # the config has changed since
        return render(job, overwrite=True)


def fit_config(task: Task, setting: Setting, train: Store) -> FitConfig:
    """What `psftrain fit` does by default, on the CPU, with the keys that are set; a batch fits into the grid."""
    return default_fit(setting, train, setting.folder(task) / "run", task.model)


def default_fit(setting: Setting, train: Store, run: Path, model: str) -> FitConfig:
    """The same of any store and run."""
    places: list[tuple[str, Any]] = [("store", [str(train.path)]), ("run", str(run)), ("model.name", model)]
    points = len(train.coords["field_y"]) * len(train.coords["field_x"])
    batch = min(load_fit_config(None, places).batch, points)
    return load_fit_config(None, [("device", "cpu"), ("batch", batch), *setting.sets, *places])


def _keep(folder: Path, identity: dict[str, Any], found: Scored) -> None:
    """Write down what came out, the report last."""
    np.savez_compressed(folder / "errors.npz", **found.errors)  # type: ignore[arg-type]
    about = {key: getattr(found, key) for key in ABOUT}
    save(folder / "report.json", {"identity": identity, **about, **found.report})


def read(folder: Path, identity: dict[str, Any] | None = None) -> Scored | None:
    """What came out of a task, where it is done, and with this identity where one is given."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        with np.load(folder / "errors.npz") as kept:
            errors = dict(kept)
    except (OSError, ValueError):
        return None
    kept_identity = report.pop("identity", None)
    if identity is not None and identity != kept_identity:
        return None
    about = {key: report.pop(key) for key in ABOUT}
    return Scored(report, errors, **about)


def source() -> str:
    """A hash of the source that makes the numbers."""
    found = hashlib.sha256()
    for folder in ("psfgen", "psftrain"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a document as JSON, whole or not at all."""
    write_whole(path, (json_text(document) + "\n").encode())


def circumstances(setting: Setting, done: Sequence[Scored]) -> dict[str, Any]:
    """How and where numbers came about."""
    return {
        "sets": setting.sets,
        "threads": setting.threads,
        "held_points": setting.held_side**2,
        "mlp_steps": setting.mlp_steps,
        "machine": _processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sources": sorted({found.source for found in done}),
        "fit_s": sum(found.fit_s for found in done),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
