"""What ledger, checksums and atomicity cost on top of plain writing, how workers scale, how fast large stores open.

    python benchmarks/store.py [--rounds 7] [--mib 256]

Every pair is measured in turns in one run; the ratio of the medians is what counts. The kernels are those of the
default lens, tiled to size.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from psfgen.config import RenderConfig
from psfgen.render import attributes, load, render
from psfgen.specimens import Specimens
from psfgen.store import Store, open_store, schema
from psfgen.store.open import FORMATS, store_class

Arrays = dict[str, np.ndarray]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=1024, help="kernels to write, before compression")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        base = Path(folder)
        spec, arrays = kernels(base, given.mib)
        size = sum(values.nbytes for values in arrays.values()) / 2**20
        print(f"{size:.0f} MiB in {len(spec.blocks)} blocks, {os.cpu_count()} cores\n")
        overhead(base, spec, arrays, given.rounds, size)
        scaling(base, spec, arrays, given.rounds, size)
        large(base, given.rounds)


def kernels(base: Path, mib: int) -> tuple[schema.StoreSpec, Arrays]:
    """The spec of a store of so many MiB, and the arrays of one of its blocks."""
    job = {"depth": "2m", "workers": 1, "device": "cpu", "tolerance": 0.1, "out": str(base / "kernels.zarr")}
    store = render(RenderConfig.model_validate(job))
    arrays = {name: store.read(name) for name in store.spec.arrays}
    blocks = 4 * max(1, round(mib * 2**20 / sum(values.nbytes for values in arrays.values()) / 4))
    lens, plan = load(RenderConfig.model_validate({**job, "depth": f"1m:2m:{blocks}"}), "cpu")
    return schema.StoreSpec(plan.coords, attributes(Specimens(lens, plan), "cpu")), arrays


def write_block(store: Store, block: int, arrays: Arrays) -> None:
    """One block, chunk by chunk, as the renderer writes it."""
    for name, values in arrays.items():
        if name == "psf":
            for focus in range(len(values)):
                store.write(block, name, values[focus : focus + 1], focus=slice(focus, focus + 1))
        else:
            store.write(block, name, values)
    store.commit(block, {"rays": 0, "seconds": 0.0, "host": "", "versions": {}})


def ours(kind: str) -> Callable[[Path, schema.StoreSpec, Arrays], None]:
    """A whole store through the ledger."""

    def write(path: Path, spec: schema.StoreSpec, arrays: Arrays) -> None:
        store = store_class(kind).create(path, spec)
        for block in range(len(spec.blocks)):
            write_block(store, block, arrays)
        store.finalise()

    return write


def plain_zarr(path: Path, spec: schema.StoreSpec, arrays: Arrays) -> None:
    """The same arrays, chunk by chunk, by zarr-python alone."""
    group = zarr.create_group(str(path))
    for name, values in spec.coords.items():
        group.create_array(name, data=values)
    codecs: Any = (ZstdCodec(level=1), Crc32cCodec())
    made = {
        name: group.create_array(
            name, shape=spec.shape(name), chunks=spec.chunks(name), dtype=values.dtype, compressors=codecs
        )
        for name, values in arrays.items()
    }
    for block in range(len(spec.blocks)):
        for name, values in arrays.items():
            axis = spec.dims(name).index("depth")
            if name == "psf":
                for focus in range(len(values)):
                    made[name][focus : focus + 1, block : block + 1] = values[focus : focus + 1]
            else:
                made[name][(slice(None),) * axis + (slice(block, block + 1),)] = values


def plain_hdf5(path: Path, spec: schema.StoreSpec, arrays: Arrays) -> None:
    """The same arrays by h5py alone, in one file."""
    with h5py.File(path, "w") as file:
        for name, values in spec.coords.items():
            file.create_dataset(name, data=values)
        for name, values in arrays.items():
            made = file.create_dataset(
                name,
                shape=spec.shape(name),
                chunks=spec.chunks(name),
                dtype=values.dtype,
                compression="gzip",
                compression_opts=1,
                shuffle=True,
                fletcher32=True,
            )
            axis = spec.dims(name).index("depth")
            for block in range(len(spec.blocks)):
                made[(slice(None),) * axis + (slice(block, block + 1),)] = values


def overhead(base: Path, spec: schema.StoreSpec, arrays: Arrays, rounds: int, size: float) -> None:
    """Ours beside the plain writing of the same arrays."""
    pairs = {"zarr": (plain_zarr, ours("zarr")), "hdf5": (plain_hdf5, ours("hdf5"))}
    print(f"{'':<8}{'plain MiB/s':>14}{'ours MiB/s':>14}{'ours / plain, time':>22}")
    for kind, writers in pairs.items():
        path = base / f"new.{kind}"
        seconds = [[timed(base, partial(write, path, spec, arrays)) for write in writers] for _ in range(rounds)]
        plain, mine = (statistics.median(column) for column in zip(*seconds, strict=True))
        total = size * len(spec.blocks)
        print(f"{kind:<8}{total / plain:>14.0f}{total / mine:>14.0f}{mine / plain:>22.3f}")
    print()


def timed(base: Path, work: Callable[[], object]) -> float:
    """Seconds of work, whose results are then deleted."""
    seconds = stopwatch(work)
    clear(base)
    return seconds


def stopwatch(work: Callable[[], object]) -> float:
    """Seconds of work."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def clear(base: Path) -> None:
    """Delete what was written."""
    for path in base.glob("new.*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _share(path: Path, arrays: Arrays, rank: int, count: int) -> None:
    store = open_store(path, allow_incomplete=True)
    for block in range(len(store.blocks))[rank::count]:
        write_block(store, block, arrays)


def scaling(base: Path, spec: schema.StoreSpec, arrays: Arrays, rounds: int, size: float) -> None:
    """Four processes that write one store, beside one."""
    context = mp.get_context("fork")
    print(f"{'':<8}{'1 worker MiB/s':>16}{'4 workers MiB/s':>17}{'speed-up':>10}")
    for kind in FORMATS:
        path = base / f"new.{kind}"

        def write(count: int, path: Path = path) -> None:
            workers = [context.Process(target=_share, args=(path, arrays, rank, count)) for rank in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        seconds = []
        for _ in range(rounds):
            turn = []
            for count in (1, 4):
                store_class(kind).create(path, spec)
                turn.append(timed(base, partial(write, count)))
            seconds.append(turn)
        one, four = (statistics.median(column) for column in zip(*seconds, strict=True))
        total = size * len(spec.blocks)
        print(f"{kind:<8}{total / one:>16.0f}{total / four:>17.0f}{one / four:>10.2f}")
    print()


def large(base: Path, rounds: int) -> None:
    """Opening a store of 64 x 64 (focus, depth), and the status of 4096 blocks; only the ledger is filled."""
    tiny = {"grid": 1, "kernel_px": 4, "bins": 2, "spp": 16, "wavelength": "0.55", "device": "cpu", "depth": "1m:9m:64"}
    jobs = {
        "64 x 64 (focus, depth)": {"focus": "1m:9m:64"},
        "4096 blocks": {"focus": "1m", "copies": 64, "tolerances": {"tilt_deg": 0.1}},
    }
    print(f"{'seconds':<32}{'open':>10}{'status':>10}")
    for kind, (label, job) in product(FORMATS, jobs.items()):
        lens, plan = load(RenderConfig.model_validate({**tiny, **job}), "cpu")
        path = base / f"new.{kind}"
        store = store_class(kind).create(path, schema.StoreSpec(plan.coords, attributes(Specimens(lens, plan), "cpu")))
        for block, name in enumerate(store.blocks):
            chunks = dict.fromkeys(store.chunk_files(block), "00000000")
            store.ledger.commit(name, {**store.spec.identity(block), "chunks": chunks})
        seconds = [
            [stopwatch(look) for look in (partial(open_store, path), partial(_status, path))] for _ in range(rounds)
        ]
        opening, status = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"{f'{kind}, {label}':<32}{opening:>10.2f}{status:>10.2f}")
        clear(base)


def _status(path: Path) -> None:
    store = open_store(path, allow_incomplete=True)
    store.missing(), store.ledger.running(), store.ledger.failed()


if __name__ == "__main__":
    main()
