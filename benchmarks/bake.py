"""How fast a baked table is beside its model, and what baking costs in error.

    python benchmarks/bake.py [--rounds 15]
    python benchmarks/bake.py --run RUN --store HELDOUT [--rounds 15]

Without --run two default models of the default lens are made and judged on held-out points: one of a single
depth and focus distance, one of 8 depths and 4 focus distances, which is also baked at more of them on fewer points.
Every kernel is asked for at a place of its own, at random in the field and in dioptres. One thread; model and table in
turns, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import psftrain
from psfgen.config import RenderConfig
from psfgen.render import render
from psftrain.bake import bake
from psftrain.config import load_fit_config
from psftrain.fidelity import heldout, judge, random_places
from psftrain.fit import fit
from psftrain.places import Domain

BATCHES = (1, 64, 1024)
LEAST_S = 0.05  # a measurement goes on for so long
Baking = tuple[int, str | None, str | None]  # --grid, --depth, --focus


@dataclass(frozen=True)
class Case:
    """What is trained on, what is held out beside it, and the tables made of it."""

    title: str
    trained: dict[str, Any]
    heldout: dict[str, Any]
    tables: list[Baking]


CASES = [
    Case("one depth, one focus distance", {"depth": "10m", "focus": "10m"}, {}, [(49, None, None)]),
    Case(
        "8 depths, 4 focus distances, judged midway between them",
        {"depth": "0.4m:20m:8", "focus": "0.4m:20m:4"},
        {"depth": "430.11mm:4444.4mm:7", "focus": "478.1mm:2181.8mm:3"},
        [(49, None, None), (25, "0.4m:20m:15", "0.4m:20m:7")],
    ),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="a run of your own")
    parser.add_argument("--store", help="its held-out store")
    parser.add_argument("--grid", type=int, default=49, help="field points a side of its table")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if (given.run is None) != (given.store is None):
        parser.error("--run and --store go together")
    torch.set_num_threads(1)
    head = "".join(f"{f'batch {batch}':>12}" for batch in BATCHES)
    print(f"{'ms a kernel, one thread':32}{head}{'error':>10}{'p95':>10}")
    with tempfile.TemporaryDirectory() as folder:
        if given.run:
            compare(given.run, given.run, given.store, [(given.grid, None, None)], given.rounds)
        else:
            for number, case in enumerate(CASES):
                run, store = trained(Path(folder) / str(number), case)
                compare(case.title, run, store, case.tables, given.rounds)


def trained(base: Path, case: Case) -> tuple[str, str]:
    """A run, and its held-out store: the centres of the cells of its grid."""
    common = {**case.trained, "grid": 10, "tolerance": 0.03, "workers": 1}
    for name, other in (("psfs", {}), ("heldout", {"layout": "cells", **case.heldout})):
        render(RenderConfig.model_validate({**common, **other, "out": str(base / f"{name}.zarr")}))
    sets = {"store": [str(base / "psfs.zarr")], "run": str(base / "run"), "device": "cpu"}
    fit(load_fit_config(None, list(sets.items())))
    return str(base / "run"), str(base / "heldout.zarr")


def compare(title: str, run: str, store: str, tables: list[Baking], rounds: int) -> None:
    """Bake a run, and print the rows of its model and of each of its tables."""
    model = psftrain.load(run)
    held = heldout(model, store)
    print(title)
    for baking in tables:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            path = Path(bake(model, *baking, Path(folder) / "table.zarr").path)
            baked = time.perf_counter()
            table = psftrain.open_table(path)
            opened = time.perf_counter()
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        judged = judge(model, table, held)
        ms = timed({"model": model.psf, "table": table.psf}, table.domain, rounds)
        nodes, error = " x ".join(map(str, table.lattice.shape)), table.bake["error"]
        print(f"  table of {nodes} nodes (focus, depth, y, x), {size / 2**20:.1f} MiB:")
        for name, found in ms.items():
            row = "".join(f"{found[batch]:12.4f}" for batch in BATCHES)
            print(f"    {name:28}{row}{judged[name]['mean']:10.2%}{judged[name]['p95']:10.2%}")
        row = "".join(f"{ms['model'][batch] / ms['table'][batch]:12.0f}" for batch in BATCHES)
        print(f"    {'model/table, table/model':28}{row}{judged['ratio']['mean']:10.3f}{judged['ratio']['p95']:10.3f}")
        print(
            f"    table against model: mean {error['mean']:.2%}, p95 {error['p95']:.2%}; "
            f"baked in {baked - started:.0f} s, opened in {opened - baked:.2f} s"
        )


def timed(ways: dict[str, Callable[..., Any]], domain: Domain, rounds: int) -> dict[str, dict[int, float]]:
    """Median ms a kernel of each way by batch."""
    places = {batch: random_places(domain, batch) for batch in BATCHES}
    spent: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in ways}
    for psf in ways.values():
        for place in places.values():
            psf(*place)  # compiles
    for _ in range(rounds):
        for batch, place in places.items():
            for name, psf in ways.items():
                spent[name][batch].append(1000 * seconds(lambda psf=psf, place=place: psf(*place)) / batch)
    return {name: {batch: statistics.median(ms) for batch, ms in found.items()} for name, found in spent.items()}


def seconds(work: Callable[[], Any]) -> float:
    """Of one call, over as many as take a while."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < LEAST_S:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls


if __name__ == "__main__":
    main()
