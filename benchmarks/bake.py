"""How fast a baked table is beside its model, and what baking costs in error. Writes bake.json.

    python benchmarks/interpolate.py --parts bake
    python benchmarks/bake.py --run RUN --store HELDOUT [--grid N] [--depth D] [--focus D] [--rounds 7]

As a part of benchmarks/interpolate.py it takes the stores of the other parts, which are rendered where they are
missing: lenses at one depth and focus distance, and at 8 of each, judged midway between them. With --run, a run of your
own. Tables have the nodes that `psftrain bake` chooses. Every kernel is asked for at a place of its own, at random in
the field and in dioptres. One thread; model and table in turns, medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distances
import torch
from scored import Setting, Task, circumstances, default_fit, identity_of, save, source, stores

import psftrain
from psftrain.bake import bake
from psftrain.config import FitConfig
from psftrain.fidelity import heldout, judge, random_places
from psftrain.fit import fit
from psftrain.places import Domain
from psftrain.predict import PsfModel

BATCHES = (1, 64, 1024)
LEAST_S = 0.05  # a measurement goes on for so long
ROUNDS = 7
GRID, QUICK_GRID = 10, 5  # field points a side that lenses at one distance are trained on
LENSES = ("condenser", "double_gauss", "phone")
Baking = tuple[int | None, str | None, str | None]  # --grid, --depth, --focus


def main() -> None:
    """Measure a run, and print what comes out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--store", required=True, help="a held-out store")
    parser.add_argument("--grid", type=int)
    parser.add_argument("--depth")
    parser.add_argument("--focus")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = compared(psftrain.load(given.run), given.store, (given.grid, given.depth, given.focus), given.rounds)
    print(json.dumps(found, indent=2))


def measure(setting: Setting, quick: bool) -> None:
    """Every lens at one distance and at several, unless its table is known already."""
    names = LENSES[:1] if quick else LENSES
    tables = [measured(name, several, setting, quick) for several in (False, True) for name in names]
    about = circumstances(setting, []) | {"sources": sorted({table["source"] for table in tables})}
    save(setting.work / "bake.json", {**about, "rounds": ROUNDS, "tables": tables})


def measured(name: str, several: bool, setting: Setting, quick: bool) -> dict[str, Any]:
    """What came out for a table, now or before."""
    folder = setting.work / "bake" / f"{name}-{'several' if several else 'one'}"
    model = FitConfig().model.name
    task = Task(name, QUICK_GRID if quick else GRID, 0, model)
    train, held = distances.both(name, setting.work, quick) if several else stores(task, setting)
    config = default_fit(setting, train, folder / "run", model)
    identity = identity_of(config, train, held, setting)
    found: dict[str, Any] = _kept(folder / "table.json", identity)
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
        fit(config)
        torch.set_num_threads(1)
        try:
            found = compared(psftrain.load(config.run), str(held.path), (None, None, None), ROUNDS)
        finally:
            torch.set_num_threads(setting.threads)
        found = {"cell": name, "several": several, "source": source(), **found}
        save(folder / "table.json", {"identity": identity, **found})
    ms, ratio = found["ms"]["table"]["1024"], found["judged"]["ratio"]["mean"]
    print(f"{folder.name}: {found['nodes']} nodes, {ms:.4f} ms a kernel, errors times {ratio:.3f}", flush=True)
    if found["source"] != source():
        print(f"{folder.name} was measured by another source than today's; delete {folder} to do it again")
    return found


def _kept(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a table with this identity, or nothing."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found.pop("identity") == identity else {}


def compared(model: PsfModel, store: str, baking: Baking, rounds: int) -> dict[str, Any]:
    """A table of a model: its size, ms a kernel by batch and errors on held-out kernels, beside those of the model."""
    held = heldout(model, store)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = Path(bake(model, *baking, Path(folder) / "table.zarr").path)
        baked = time.perf_counter()
        table = psftrain.open_table(path)
        opened = time.perf_counter()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "nodes": list(table.lattice.shape),
        "kernel": [len(table.wavelength_um), len(table.y_um), len(table.x_um)],
        "file_bytes": size,
        "memory_bytes": table.kernels.nbytes,
        "bake_s": baked - started,
        "open_s": opened - baked,
        "error": table.bake["error"],
        "judged": judge(model, table, held),
        "ms": timed({"model": model.psf, "table": table.psf}, table.domain, rounds),
    }


def timed(ways: dict[str, Callable[..., Any]], domain: Domain, rounds: int) -> dict[str, dict[str, float]]:
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
    return {name: {str(batch): statistics.median(ms) for batch, ms in found.items()} for name, found in spent.items()}


def seconds(work: Callable[[], Any]) -> float:
    """Of one call, over as many as take a while."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < LEAST_S:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls


if __name__ == "__main__":
    main()
