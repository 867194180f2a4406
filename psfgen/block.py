"""One block: points -> rays -> kernels -> chunks -> ledger."""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen import __version__
from psfgen.bands import Cut, cut
from psfgen.blur import Blur
from psfgen.config import DIFFRACTED
from psfgen.engines import Aim, Engine
from psfgen.errors import PsfError, RenderError
from psfgen.mirrors import fold, unfold
from psfgen.optics.splat import normalise
from psfgen.plan import Plan
from psfgen.specimens import Specimens
from psfgen.store import Store, schema

log = logging.getLogger(__name__)
PACKAGES = ("deeplens-core", "torch", "numba", "numpy", "zarr", "h5py")
MOST_AIMED = 128  # field points whose chief rays are solved together: fewer would waste time, more memory
BEAT_S = 30.0  # how often a block that is being rendered says so
PER_FOCUS = ("captured", "noise", "noise_binned", "model")


def render_block(
    specimens: Specimens,
    store: Store,
    index: int,
    *,
    cores: int = 1,
    share: int = 1,
    on_kernels: Callable[[int], None] = lambda count: None,
) -> None:
    """Render one block and commit it, on at most `cores` cores and 1 / `share` of the memory of the config.

    What goes wrong is noted in the ledger and raised.
    """
    name, plan = store.blocks[index], specimens.plan

    started = beat = time.monotonic()

    def on_batch(kernels: int) -> None:
        nonlocal beat
        if time.monotonic() - beat > BEAT_S:
            store.ledger.touch(name)
            beat = time.monotonic()
        on_kernels(kernels)

    try:
        store.ledger.start(name)
        engine = specimens.engine(plan.spec.block_at(index).get("copy", 0))
        cut = cut_block(engine, plan, cores=cores, share=share)
        entry = Block(engine, plan, index).render(store, cut, on_batch)
        seconds = round(time.monotonic() - started, 3)
        store.commit(index, {**entry, "seconds": seconds, "host": socket.gethostname(), "versions": versions()})
    except BaseException as error:
        store.abandon(index)
        with _quietly():  # a full disk must not hide what went wrong
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                store.ledger.stop(name)
            else:
                store.ledger.fail(name, f"{type(error).__name__}: {error}")
        if isinstance(error, (PsfError, KeyboardInterrupt, SystemExit)):
            raise
        raise RenderError(f"block {name} of {store.path} failed: {type(error).__name__}: {error}") from error


def cut_block(engine: Engine, plan: Plan, *, cores: int, share: int = 1) -> Cut:
    """How the blocks of a plan are cut. Raises ConfigError where the memory allowed is too little."""
    cores = cores if engine.concurrent else 1
    return cut(plan.config, plan.spec, batch_bytes=engine.batch_bytes, cores=cores, share=share)


class Block:
    """One block in the making: its small arrays whole, its kernels group by group."""

    def __init__(self, engine: Engine, plan: Plan, index: int) -> None:
        self.engine, self.plan, self.index, self.spec = engine, plan, index, plan.spec
        self.place = self.spec.block_at(index)
        coords = plan.coords
        self.depth_mm = float(coords["depth"][self.place["depth"]])
        focuses, self.rows, self.columns, waves = (len(coords[dim]) for dim in schema.KERNELS if dim != "depth")
        points = self.rows * self.columns
        row, column = np.divmod(np.arange(points), self.columns)
        self.field_xy = np.stack([coords["field_x"][column], coords["field_y"][row]], axis=-1)
        lens = engine.lens
        self.per_focus = [name for name in PER_FOCUS if name in self.spec.arrays]
        self.folding = fold(coords["field_x"], coords["field_y"], lens.sensor_mm, symmetric=engine.symmetric)
        self.small: dict[str, NDArray[Any]] = {
            "throughput": np.empty((points, waves), np.float32),
            **{name: np.empty((focuses, points, waves), np.float32) for name in self.per_focus},
            "chief_x_mm": np.empty((focuses, points)),
            "chief_y_mm": np.empty((focuses, points)),
        }
        self.blur = Blur(lens, plan)

    def render(self, store: Store, cut: Cut, on_batch: Callable[[int], None]) -> dict[str, Any]:
        """Render and write everything; returns what the ledger says of it. `on_batch(kernels)` is called often."""
        config, spec = self.plan.config, self.spec
        focuses, waves, k, bins = len(config.focus), len(config.wavelength), config.kernel_px, config.bins
        rays, tracing_s, writing_s = 0, 0.0, 0.0
        # Threads of our own instead of torch's: those meet after every operation, which crawls on a shared machine.
        with (
            ThreadPoolExecutor(cut.tracing, initializer=torch.set_num_threads, initargs=(1,)) as tracing,
            ThreadPoolExecutor(cut.writing) as writing,
        ):
            for bands in cut.bands:
                at = np.concatenate([self._points_of(band) for band in bands])
                shape = (len(bands), spec.band_rows, self.columns, waves)
                binned = np.empty((focuses, len(at), waves, bins, bins), np.float32)
                for some in cut.focuses:
                    began = time.monotonic()
                    psf = np.empty((some.stop - some.start, len(at), waves, k, k), np.float32)
                    for launched, made in self.trace(tracing.map, cut.tracing, at, some, psf, binned[some]):
                        rays += launched
                        on_batch(made)
                    traced = time.monotonic()
                    chunks = [
                        (slice(f, f + 1), band, kernels)
                        for f, planes in enumerate(psf.reshape(len(psf), *shape, k, k), start=some.start)
                        for band, kernels in zip(bands, planes, strict=True)
                    ]
                    for _ in writing.map(partial(self._write, store, "psf"), *zip(*chunks, strict=True)):
                        pass
                    del psf, chunks
                    tracing_s, writing_s = tracing_s + traced - began, writing_s + time.monotonic() - traced
                for b, band in enumerate(bands):
                    self._write(
                        store, "psf_binned", slice(0, focuses), band, binned.reshape(focuses, *shape, bins, bins)[:, b]
                    )
        for name, values in self.small.items():
            sizes = zip(spec.dims(name), spec.shape(name), strict=True)
            store.write(self.index, name, values.reshape([1 if dim in self.place else size for dim, size in sizes]))
        return {
            "rays": rays,
            "seconds_tracing": round(tracing_s, 3),
            "seconds_writing": round(writing_s, 3),
            "diffraction": self.blur.summary,
        }

    def _points_of(self, band: int) -> NDArray[np.int64]:
        size = self.spec.band_rows * self.columns
        return np.arange(band * size, (band + 1) * size)

    def trace(
        self,
        run: Callable[..., Iterable[Any]],
        threads: int,
        at: NDArray[np.int64],
        focuses: slice,
        psf: NDArray[np.float32],
        binned: NDArray[np.float32],
    ) -> Iterator[tuple[int, int]]:
        """Fill `psf` and `binned` [F, points, W, y, x] for the points `at` and some focus distances, and `small`.

        `run` is `map`, or that of a pool of `threads`. Yields rays and kernels, batch by batch.
        """
        representative = self.folding.representative[at]
        order = np.argsort(representative, kind="stable")
        wanted, starts = np.unique(representative[order], return_index=True)
        bounds = np.append(starts, len(order))
        size = self.engine.batch
        batches = [slice(i, min(i + size, len(wanted))) for i in range(0, len(wanted), size)]
        together = size * max(1, min(MOST_AIMED // size, -(-len(batches) // threads)))
        aims = run(
            lambda start: self.engine.aim(
                torch.from_numpy(self.field_xy[wanted[start : start + together]]), self.depth_mm, focuses
            ),
            range(0, len(wanted), together),
        )
        parts = [aim.part(slice(i, i + size)) for aim in aims for i in range(0, len(aim.of_point), size)]
        slots = [order[bounds[batch.start] : bounds[batch.stop]] for batch in batches]
        fill = partial(self._fill, psf, binned, at, focuses)
        yield from run(fill, parts, [wanted[batch] for batch in batches], slots)

    def _write(self, store: Store, name: str, focuses: slice, band: int, data: NDArray[np.float32]) -> None:
        """Write the kernels [(focus), rows, Nx, W, y, x] of one band."""
        rows = slice(band * self.spec.band_rows, (band + 1) * self.spec.band_rows)
        shape = [1 if dim in self.place else -1 if dim == "focus" else 0 for dim in self.spec.dims(name)]
        shape[shape.index(0) :] = data.shape[-5:]
        store.write(self.index, name, data.reshape(shape), focus=focuses, field_y=rows)

    def _fill(
        self,
        psf: NDArray[np.float32],
        binned: NDArray[np.float32],
        at: NDArray[np.int64],
        focuses: slice,
        aim: Aim,
        representatives: NDArray[np.int64],
        slots: NDArray[np.int64],
    ) -> tuple[int, int]:
        """Render a batch of representatives, for all the places `slots` in `at` that they stand for."""
        config, folding, here = self.plan.config, self.folding, at[slots]
        found = self.engine.deposit(aim)
        kernels = normalise(found.halves, config.bins, found.margins)
        source = np.searchsorted(representatives, folding.representative[here])
        swap, flip_x, flip_y = folding.swap[here], folding.flip_x[here], folding.flip_y[here]
        unfold(kernels.psf, source, swap, flip_x, flip_y, slots, psf)
        unfold(kernels.psf_binned, source, swap, flip_x, flip_y, slots, binned)
        self.small["throughput"][here] = found.throughput[source]
        values: dict[str, Any] = {
            "captured": found.captured,
            "noise": kernels.noise if found.floor is None else np.hypot(kernels.noise, found.floor),
            "noise_binned": kernels.noise_binned
            if found.floor is None
            else np.hypot(kernels.noise_binned, found.floor),
            "model": found.model,
        }
        for name in self.per_focus:
            self.small[name][focuses, here] = values[name][source].swapaxes(0, 1)
        chief = np.where(swap[:, None, None], found.chief_mm[source][..., ::-1], found.chief_mm[source])
        self.small["chief_x_mm"][focuses, here] = np.where(flip_x[:, None], -chief[..., 0], chief[..., 0]).T
        self.small["chief_y_mm"][focuses, here] = np.where(flip_y[:, None], -chief[..., 1], chief[..., 1]).T
        if config.engine not in DIFFRACTED:
            self.blur.count(kernels.rms_px[source], focuses)
        return found.rays, len(here) * kernels.noise[0].size


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    ours = {"psfgen": __version__, "python": platform.python_version()}
    return {**ours, **{name: version(name) for name in PACKAGES}}


@contextmanager
def _quietly() -> Iterator[None]:
    try:
        yield
    except (OSError, PsfError) as error:
        log.debug("could not note a failure: %s", error)
