"""Depths and focus distances between those trained on: does a model beat interpolation there? Writes distances.json.

A part of benchmarks/interpolate.py (`--parts distances`). A lens is a config of configs/render/distances: 8 depths and
8 focus distances, rendered on 8 x 8 field points. Held out are random field points of the same specimen at every
distance midway between two that were trained on, in dioptres. Every lens is kept in the work folder.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from pooled import calibrated, pool
from scored import ROOT, Scored, Setting, circumstances, default_fit, judged, rendered, save, source

from psfgen.config import RenderConfig, load_config
from psfgen.store import Store
from psftrain import bootstrap
from psftrain.config import FitConfig

CONFIGS = ROOT / "configs" / "render" / "distances"
GRID = 8  # field points a side, of the training store and of the held-out one
SEED = 0
QUICK_GRID = 5
BASELINE = "bilinear"  # in the field; linear in dioptres
Distances = tuple[float, ...]


def measure(setting: Setting, quick: bool) -> None:
    """Every lens that is not yet known; where it shall be quick one lens, at three depths and focus distances."""
    names = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))][: 1 if quick else None]
    done = {name: measured(name, setting, quick) for name in names}
    lenses = [{"cell": name, **distances_of(name, quick)[0], **summary(found)} for name, found in done.items()]
    about = circumstances(setting, list(done.values())) | {"held_points": grid_of(quick) ** 2}
    document = {"model": FitConfig().model.name, "grid": grid_of(quick), **about, "cells": lenses}
    save(setting.work / "distances.json", document)


def grid_of(quick: bool) -> int:
    """Field points a side."""
    return QUICK_GRID if quick else GRID


def measured(name: str, setting: Setting, quick: bool) -> Scored:
    """What came out for a lens, now or before."""
    first, folder = time.perf_counter(), setting.work / "distances" / name
    train, held = both(name, setting.work, quick)
    config = default_fit(setting, train, folder / "run", FitConfig().model.name)
    found, now = judged(folder, config, (train, held), setting, first)
    if found.source != source():
        print(f"{name} was measured by another source than today's; delete {folder} to do it again")
    rows = found.report["rows"]
    ours, theirs = (rows[row]["rel_l2"]["mean"] for row in ("prior_mean", BASELINE))
    how = f"trained {found.fit_s:.0f} s" if now else "kept"
    print(f"{name}: {ours:.2%} against {theirs:.2%} ({BASELINE}), a ratio of {ours / theirs:.3f}, {how}", flush=True)
    return found


def both(name: str, work: Path, quick: bool) -> tuple[Store, Store]:
    """The training store of a lens and the held-out one."""
    found = []
    for layout, distances in zip(("grid", "random"), distances_of(name, quick), strict=True):
        changes = [("grid", grid_of(quick)), ("layout", layout), ("seed", SEED), *distances.items()]
        found.append(rendered(CONFIGS / f"{name}.yaml", work / "stores" / f"distances-{name}-{layout}.zarr", changes))
    train, held = found
    assert train.attrs.get("as_built") == held.attrs.get("as_built"), "the seed makes the specimen"
    return train, held


def distances_of(name: str, quick: bool) -> tuple[dict[str, Distances], dict[str, Distances]]:
    """Depths and focus distances in mm that are trained on, and those held out."""
    config = load_config(RenderConfig, CONFIGS / f"{name}.yaml", [])
    known = {"depth": config.depth, "focus": config.focus}
    if quick:
        known = {key: (found[0], *midway((found[0], found[-1])), found[-1]) for key, found in known.items()}
    return known, {key: midway(found) for key, found in known.items()}


def midway(distances_mm: Distances) -> Distances:
    """Between neighbours, midway in dioptres."""
    dioptre = [1000 / distance for distance in distances_mm]
    return tuple(2000 / (a + b) for a, b in itertools.pairwise(dioptre))


def summary(found: Scored) -> dict[str, Any]:
    """Rows with intervals, the ratios to bilinear and to the best classical row, and whether errors are foretold."""
    pooled, errors = pool({FitConfig().model.name: [found]}), found.errors
    names = ("prior_mean", BASELINE)
    replicas = bootstrap.replicates({name: errors[name] for name in names})
    against = bootstrap.ratio(errors["prior_mean"], errors[BASELINE], (replicas["prior_mean"], replicas[BASELINE]))
    return {**pooled, "against_bilinear": against, "calibration": calibrated([found]), "fit_s": found.fit_s}
