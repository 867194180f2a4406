"""How fast kernels reach a training step: from memory, a mapped file, a stream, and the ways not taken.

    python benchmarks/loader.py [--depths 96] [--rounds 7] [--batches 3000]

Batches of 64 random kernels of 15 x 15 x 3 bins, one thread (a stream decodes in threads of its own). Two limits: to
read random rows, drawn beforehand, from a file of decoded kernels in the page cache, one `pread` each, and to gather
them from an array in memory. All are measured in turns in one run; the medians of the ratios within a round are what
counts. The kernels are those of the default lens, repeated for every depth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from psfgen.config import RenderConfig
from psfgen.render import attributes, load, render
from psfgen.specimens import Specimens
from psfgen.store import Store, open_store, schema
from psfgen.store.open import store_class
from psftrain.conditioning import conditioning_of
from psftrain.config import DataConfig
from psftrain.data import Places, catalogue
from psftrain.sources import Source, open_source

BATCH = 64
JOB = {"kernel_px": 15, "bins": 15, "pitch_um": 64 * 5 / 15, "workers": 1, "device": "cpu", "tolerance": 0.1}
LIMITS = ("limit: rows read from the page cache", "limit: rows gathered in memory")
Seconds = Callable[[int], float]  # of a round


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, default=96, help="of 1600 kernels each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=3000, help="a round, of each of the fast ways")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        stores = [synthetic(Path(folder), given.depths)]
        places = catalogue(stores, conditioning_of(stores), "psf_binned")
        size = len(places) * 4 * np.prod(places.shape) / 2**20
        print(f"{len(places)} kernels, {size:.0f} MiB decoded, {os.cpu_count()} cores\n")
        ways = prepare(stores, places, Path(folder), given.batches)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(given.rounds):
            for name, (work, batches) in ways.items():
                rates[name].append(BATCH * batches / work(turn))
    print(f"{'':<40}{'kernels/s':>12}{'/ page cache':>14}{'/ memory':>10}")
    for name, found in rates.items():
        ratios = [
            statistics.median(rate / most for rate, most in zip(found, rates[limit], strict=True)) for limit in LIMITS
        ]
        print(f"{name:<40}{statistics.median(found):>12.0f}{ratios[0]:>14.3f}{ratios[1]:>10.3f}")


def synthetic(base: Path, depths: int) -> Store:
    """A store of so many depths, each with the same kernels: 20 x 20 points, 4 focus distances."""
    rendered = render(RenderConfig.model_validate({**JOB, "depth": "2m", "out": str(base / "kernels.zarr")}))
    arrays = {name: rendered.read(name) for name in rendered.spec.arrays}
    lens, plan = load(RenderConfig.model_validate({**JOB, "depth": f"0.4m:20m:{depths}"}), "cpu")
    spec = schema.StoreSpec(plan.coords, attributes(Specimens(lens, plan), "cpu"))
    store = store_class("zarr").create(base / "many.zarr", spec)
    for block in range(len(store.blocks)):
        for name, values in arrays.items():
            store.write(block, name, values)
        store.commit(block, {"rays": 0, "seconds": 0.0, "host": "", "versions": {}})
    store.finalise()
    return open_store(base / "many.zarr")


def prepare(stores: list[Store], places: Places, base: Path, batches: int) -> dict[str, tuple[Seconds, int]]:
    """Every way by name: what takes a round of batches, and how many."""
    sources = {mode: opened(mode, stores, places, base) for mode in ("resident", "memmap", "stream")}
    kernels, noise = sources["resident"].rows(torch.arange(len(places)))

    def gather(turn: int) -> float:
        began = time.perf_counter()
        for number in drawn[turn % len(drawn)]:
            kernels.index_select(0, number)
        return time.perf_counter() - began

    (base / "rows").write_bytes(kernels.numpy().tobytes())
    file, row = os.open(base / "rows", os.O_RDONLY), kernels[0].nbytes

    def read(turn: int) -> float:
        began = time.perf_counter()
        for number in drawn[turn % len(drawn)]:
            batch = torch.empty(BATCH, *places.shape).numpy().reshape(BATCH, -1)
            for into, at in zip(batch, number.tolist(), strict=True):
                os.preadv(file, [into], at * row)
        return time.perf_counter() - began

    drawn = [[torch.randint(len(places), (BATCH,)) for _ in range(batches)] for _ in range(3)]

    def serve(source: Source) -> Seconds:
        order = source.order(places, 0, BATCH)

        def work(turn: int) -> float:
            start = 10 * turn * batches  # elsewhere, so that what was read ahead while the others ran is of no use
            began = 0.0
            for step in range(start, start + ahead + batches):
                if step == start + ahead:
                    began = time.perf_counter()
                source.rows(places.number.index_select(0, order.batch(step)), step)
            return time.perf_counter() - began

        return work

    def load(data: Dataset[object], count: int) -> Seconds:
        loader = DataLoader(data, BATCH, shuffle=True)

        def work(turn: int) -> float:
            began = time.perf_counter()
            for _, _ in zip(loader, range(count), strict=False):
                pass
            return time.perf_counter() - began

        return work

    ahead = batches // 3  # a stream is in its stride then
    few = max(1, batches // 1000)
    return {
        LIMITS[0]: (read, batches),
        LIMITS[1]: (gather, batches),
        **{name: (serve(source), batches) for name, source in sources.items()},
        "DataLoader of a tensor": (load(TensorDataset(kernels, noise), batches // 20), batches // 20),
        "DataLoader that reads the store": (load(Reading(stores[0], places), few), few),
    }


def opened(mode: str, stores: list[Store], places: Places, base: Path) -> Source:
    """A source; the stream shuffles a quarter of the kernels at a time."""
    buffer_mib = max(1, len(places) * 4 * int(np.prod(places.shape)) // 4 // 2**20)
    config = DataConfig.model_validate({"mode": mode, "cache": str(base / "cache"), "buffer_mib": buffer_mib})
    return open_source(stores, places, config, torch.device("cpu"))


class Reading(Dataset[object]):
    """One example at a time out of its chunk."""

    def __init__(self, store: Store, places: Places) -> None:
        self.store, self.places = store, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> object:
        _, _, focus, depth, row, column = self.places.index[number].tolist()
        kernels = self.store.read("psf_binned", focus=focus, depth=depth, field_y=row, field_x=column)
        return torch.from_numpy(kernels), self.places.condition[number]


if __name__ == "__main__":
    main()
