"""Does a handful of kernels tell a copy of a lens? Do drawn copies look like traced ones? Writes copies.json.

A part of benchmarks/interpolate.py (`--parts copies`). A set is a config of configs/render/copies: a lens and how much
its copies differ. The default model is trained on some copies on 8 x 8 field points. Other copies are then measured at
9 field points each, and judged at random ones; yet others are compared with what the prior draws. Every set is kept in
the work folder.

Legend: K copies, M field points, W wavelengths, n scored points.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draws import statistics_of
from fields import Between, Fields, choose, rbf
from numpy.typing import NDArray
from scored import ROOT, Array, Setting, circumstances, default_fit, rendered, save, source

from psfgen.store import Store
from psfgen.store.schema import plain
from psftrain import bootstrap, calibration
from psftrain.config import FitConfig
from psftrain.data import COPY, Examples
from psftrain.fit import fit
from psftrain.heldout import read_heldout
from psftrain.metrics import rel_l2, summarise_errors
from psftrain.models.field import FieldCVAE
from psftrain.run import load_run

SETS = ROOT / "configs" / "render" / "copies"
SIDE, MEASURED_SIDE, HELD_SIDE, MANY_SIDE = 8, 3, 16, 5  # field points a side
TRAIN_SEED, MANY_SEED = 0, 2  # no copy is seen twice
TEST_SEED = 4  # while the model was made, the copies of the seeds 1 and 3 were in view
ROUGH = 0.03  # tolerance of the many copies, of which only centroids and sizes are asked
AS_DESIGNED = [("tolerances.decentre_mm", 0), ("tolerances.tilt_deg", 0)]
FEWER = (4, 1, 0)  # kernels measured of a copy, beside all 9


@dataclass(frozen=True)
class Counts:
    """How many copies are trained on, tested, and compared with as many drawn ones."""

    train: int = 48
    test: int = 20
    many: int = 500


@dataclass(frozen=True)
class Seen:
    """Kernels [K, M, W, y, x] of copies at `field` [M, 2], all lit, and their noise [K, M]."""

    examples: Examples
    store: Store

    @property
    def count(self) -> int:
        return len(np.unique(self.examples.index[:, COPY]))

    @property
    def kernels(self) -> Array:
        found = self.examples.kernels.double().numpy()
        return found.reshape(self.count, -1, *found.shape[1:])

    @property
    def noise(self) -> Array:
        return self.examples.noise.double().numpy().reshape(self.count, -1)

    @property
    def condition(self) -> torch.Tensor:
        """Conditions [M, C], the same of every copy."""
        return self.examples.condition[: len(self.examples) // self.count]

    @property
    def field(self) -> Array:
        return self.condition[:, :2].double().numpy()


def measure(setting: Setting, quick: bool) -> None:
    """Every set that is not yet known; where it shall be quick one set of few copies."""
    counts = Counts(8, 4, 20) if quick else Counts()
    names = [path.stem for path in sorted(SETS.glob("*.yaml"))][: 1 if quick else None]
    done = [measured(name, counts, setting) for name in names]
    about = circumstances(setting, []) | {"sources": sorted({one["source"] for one in done})}
    counted = {key: getattr(counts, key) for key in ("train", "test", "many")}
    save(setting.work / "copies.json", {**about, "copies": counted, "grid": SIDE, "sets": done})


def measured(name: str, counts: Counts, setting: Setting) -> dict[str, Any]:
    """What came out for a set, now or before."""
    stores, folder = rendered_of(name, counts, setting.work), setting.work / "copies" / name
    config = default_fit(setting, stores["train"], folder / "run", FitConfig().model.name)
    plans = {what: store.attrs["plan_sha256"] for what, store in stores.items()}
    asked = {key: value for key, value in config.model_dump().items() if key not in ("store", "run")}
    identity, path = plain({"plans": plans, "fit": asked}), folder / "report.json"
    found = read(path)
    if found is None or found["identity"] != identity:
        shutil.rmtree(folder, ignore_errors=True)
        about = {"set": name, "identity": identity, "source": source()}
        save(path, {**about, **judged(config, stores)})
        found = read(path)
        assert found is not None
    elif found["source"] != source():
        print(f"{name} was measured by another source than today's; delete {folder} to do it again")
    ours, theirs, linear = (found["rows"][row]["mean"] for row in ("ours", "rbf", "pca"))
    told = f"{ours:.2%} against {theirs:.2%} (RBF through the measured) and {linear:.2%} (PCA of fields)"
    print(f"{name}: {told}, trained {found['fit_s']:.0f} s", flush=True)
    return found


def read(path: Path) -> dict[str, Any] | None:
    """What is kept, if anything is."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def rendered_of(name: str, counts: Counts, work: Path) -> dict[str, Store]:
    """The stores of a set: trained on, measured, held out, as designed, and the many."""
    asked: dict[str, list[tuple[str, Any]]] = {
        "train": [("grid", SIDE), ("copies", counts.train), ("seed", TRAIN_SEED)],
        "nine": [("grid", MEASURED_SIDE + 1), ("layout", "cells"), ("copies", counts.test), ("seed", TEST_SEED)],
        "held": [("grid", HELD_SIDE), ("layout", "random"), ("copies", counts.test), ("seed", TEST_SEED)],
        "design": [("grid", HELD_SIDE), ("layout", "random"), *AS_DESIGNED, ("seed", TEST_SEED)],
        "many": [("grid", MANY_SIDE), ("copies", counts.many), ("seed", MANY_SEED), ("tolerance", ROUGH)],
    }
    return {
        what: rendered(SETS / f"{name}.yaml", work / "stores" / f"copies-{name}-{what}.zarr", changes)
        for what, changes in asked.items()
    }


def judged(config: FitConfig, stores: dict[str, Store]) -> dict[str, Any]:
    """Train, take copies, and compare."""
    began = time.perf_counter()
    fit(config)
    fit_s = time.perf_counter() - began
    trained = load_run(Path(config.run))
    model = trained.model
    assert isinstance(model, FieldCVAE)
    seen = {what: Seen(*_read(trained, store)) for what, store in stores.items()}
    nine, held = seen["nine"], seen["held"]
    assert len(nine.field) == MEASURED_SIDE**2, "a kernel is dark"
    began = time.perf_counter()
    taken = {count: of_copies(model, nine, held, count) for count in (MEASURED_SIDE**2, *FEWER)}
    adapt_s = (time.perf_counter() - began) / (len(taken) * held.count)
    classical, choice = interpolated(seen["train"], nine, held)
    errors = {"design": far(held, np.broadcast_to(seen["design"].kernels, held.kernels.shape)), **classical}
    errors |= {name_of(count): error for count, (error, _) in taken.items()} | {"noise_floor": held.noise.ravel()}
    replicas = bootstrap.replicates(errors, [len(held.field)] * held.count)
    return {
        "fit_s": fit_s,
        "adapt_s": adapt_s,
        "latents": model.latent,
        "points": len(held.field),
        "pca": choice,
        "rows": {row: {**summarise_errors(errors[row]), **replicas[row].intervals()} for row in errors},
        "ratios": {
            row: bootstrap.ratio(errors["ours"], errors[row], (replicas["ours"], replicas[row]))
            for row in ("rbf", "mean_rbf", "pca")
        },
        "calibration": [
            {"measured": counts, **_believed([taken[count] for count in counts], held.noise)}
            for counts in (list(taken), *([count] for count in taken))
        ],
        "draws": drawn(model, seen["many"]),
    }


def _believed(parts: list[tuple[Array, Array]], noise: Array) -> dict[str, Any]:
    """How expected errors agree with true ones, over all points of some (true, expected); `noise` [K, M].

    `spearman_of_means`: the rank correlation of the true mean error of each place times that of each copy.
    """
    floor = np.tile(noise.ravel(), len(parts))
    errors, hoped = (np.concatenate(part) for part in zip(*parts, strict=True))
    means = np.concatenate([_means(true.reshape(noise.shape)).ravel() for true, _ in parts])
    told = calibration.judge(np.hypot(hoped, floor), errors, floor)
    return {**told, "spearman_of_means": calibration.judge(means, errors, floor)["spearman"]}


def _means(errors: Array) -> Array:
    """What errors [K, M] would be if only copy and place mattered: the geometric mean of each, multiplied."""
    logs = np.log(errors)
    found: Array = np.exp(logs.mean(axis=0) + logs.mean(axis=1, keepdims=True) - logs.mean())
    return found


def _read(trained: Any, store: Store) -> tuple[Examples, Store]:
    examples, (opened,) = read_heldout(trained, str(store.path))
    return examples, opened


def name_of(count: int) -> str:
    """The row of a model that was shown so many kernels."""
    return "ours" if count == MEASURED_SIDE**2 else f"ours_{count}"


def far(held: Seen, found: NDArray[Any]) -> Array:
    """Relative L2 errors [n] of kernels [K, M, W, y, x], copy by copy."""
    truth = held.kernels
    return rel_l2(found.reshape(-1, *truth.shape[2:]), truth.reshape(-1, *truth.shape[2:]))


def of_copies(model: FieldCVAE, nine: Seen, held: Seen, count: int) -> tuple[Array, Array]:
    """True and expected errors [n] of the model that has seen `count` kernels of each copy, drawn by its number."""
    kernels, hoped = [], []
    places = nine.examples.places
    for copy in range(held.count):
        model.forget()
        if count:
            (own,) = np.nonzero(places.index[:, COPY] == copy)
            some = np.isin(np.arange(len(places)), np.random.default_rng(copy).permutation(own)[:count])
            model.adapt([nine.store], places.select(some))
        with torch.no_grad():
            kernels.append(model.decode(model.prior(held.condition).mean, held.condition).numpy())
            expected = model.expected_error(held.condition)
        assert expected is not None
        hoped.append(expected.double().numpy())
    return far(held, np.array(kernels)), np.concatenate(hoped)


def interpolated(train: Seen, nine: Seen, held: Seen) -> tuple[dict[str, Array], dict[str, Any]]:
    """The errors [n] of each way to interpolate, and how fields are fitted; that is chosen on the training copies."""
    fields = train.kernels.reshape(train.count, SIDE, SIDE, *train.kernels.shape[2:])
    nearest = np.linalg.norm(train.field - nine.field[:, None], axis=-1).argmin(axis=1)
    choice = choose(train.field, fields, nearest)
    here = Between.of(Fields.of(train.field, fields), nine.field, held.field)
    ways = {
        "rbf": lambda stacks: rbf(nine.field, stacks, held.field),
        "mean_rbf": here.mean_and_rbf,
        "pca": lambda stacks: here.fitted(stacks, choice),
    }
    found = {row: far(held, np.array([way(own) for own in nine.kernels])) for row, way in ways.items()}
    return found, {"components": choice.components, "noise": choice.noise, "residual": choice.residual}


def drawn(model: FieldCVAE, many: Seen) -> dict[str, Any]:
    """How copies out of the prior, as many as were traced, agree with these."""
    model.forget()
    condition = many.condition
    with torch.no_grad():
        copies = [model.decode(z.expand(len(condition), -1), condition) for z in model.draw(many.count, MANY_SEED)]
    sample_px = int(model.kernel_px) / many.kernels.shape[-1]
    return statistics_of(many.kernels, torch.stack(copies).double().numpy(), sample_px)
