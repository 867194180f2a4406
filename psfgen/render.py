"""Rendering: a plan -> a complete store. One block: points -> rays -> kernels -> chunks -> ledger."""

from __future__ import annotations

import logging
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen import __version__
from psfgen.config import RenderConfig
from psfgen.engines import Engine, engine_class
from psfgen.errors import ConfigError, PsfError, RenderError, StoreError
from psfgen.executors import executor
from psfgen.optics.lens import Lens
from psfgen.optics.splat import normalise
from psfgen.plan import INVOCATION, Plan, share
from psfgen.store import Store, schema
from psfgen.store.open import store_class

log = logging.getLogger(__name__)
PACKAGES = ("deeplens-core", "torch", "numpy", "zarr")
PER_FOCUS = ("captured", "noise", "noise_binned")


def render(
    config: RenderConfig,
    *,
    shard: str | None = None,
    overwrite: bool = False,
    on_kernels: Callable[[int], None] = lambda count: None,
    on_start: Callable[[Plan, int], None] = lambda plan, kernels: None,
) -> Store:
    """Render a config into its store, or finish what is missing of it.

    `shard` "I/N" limits the work to every N-th block. `on_start(plan, kernels_to_do)` is called once,
    `on_kernels(count)` as kernels are finished. Returns the open store, which is complete unless other
    shards are at work.

    Raises ConfigError, LensError, PlanMismatch before anything is written; StoreError, RenderError later.
    """
    device = resolve_device(config.device)
    kind, run = store_class(config.format), executor(config.executor)
    lens, plan = load(config, device)
    engine = engine_class(config.engine)(lens, plan)
    mine = share(plan.blocks, shard)
    path = Path(config.out)
    store = _open_or_create(kind, path, plan, engine, device, overwrite=overwrite, shared=shard is not None)
    missing = set(store.missing())
    todo = [index for index in mine if index in missing]
    on_start(plan, len(todo) * plan.kernels_per_block)
    run(plan, store, engine, todo, workers=config.workers, device=device, on_kernels=on_kernels)
    if not store.missing():
        store.finalise()
    return store


def load(config: RenderConfig, device: str) -> tuple[Lens, Plan]:
    """The lens of a config, and the plan they make."""
    lens = Lens(
        config.lens,
        reference_um=config.reference_um,
        sensor_mm=config.sensor_mm,
        fnum=config.fnum,
        device=device,
    )
    return lens, Plan.of(config, lens)


def resolve_device(name: str) -> str:
    """`auto` as the device that is here. Raises ConfigError for a GPU that is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ConfigError(f"device {name} is not here ({torch.cuda.device_count()} GPUs found); use --device cpu")
    return name


def render_block(
    engine: Engine,
    plan: Plan,
    store: Store,
    index: int,
    *,
    threads: int = 1,
    on_kernels: Callable[[int], None] = lambda count: None,
) -> None:
    """Render one block on `threads` threads and commit it. What goes wrong is noted in the ledger and raised."""
    name = store.blocks[index]
    store.ledger.start(name)
    started = time.monotonic()
    try:
        rays = _write_block(engine, plan, store, index, threads if engine.concurrent else 1, on_kernels)
        seconds = round(time.monotonic() - started, 3)
        host = {"host": socket.gethostname(), "versions": versions()}
        store.commit(index, {"rays": rays, "seconds": seconds, **host})
    except BaseException as error:
        with _quietly():  # a full disk must not hide what went wrong
            store.ledger.fail(name, f"{type(error).__name__}: {error}")
        if isinstance(error, (PsfError, KeyboardInterrupt, SystemExit)):
            raise
        raise RenderError(f"block {name} of {store.path} failed: {type(error).__name__}: {error}") from error


def _write_block(
    engine: Engine, plan: Plan, store: Store, index: int, threads: int, on_kernels: Callable[[int], None]
) -> int:
    """Render and write the arrays of a block, band by band; returns the rays launched."""
    coords, config = plan.coords, plan.config
    depth_mm = float(coords["depth"][index])
    focuses, rows, columns, waves = (len(coords[dim]) for dim in ("focus", "field_y", "field_x", "wavelength"))
    small: dict[str, NDArray[Any]] = {
        "throughput": np.empty((rows, columns, waves)),
        **{name: np.empty((focuses, rows, columns, waves)) for name in PER_FOCUS},
        "psf_binned": np.empty((focuses, rows, columns, waves, config.bins, config.bins), np.float32),
        "chief_x_mm": np.empty((focuses, rows, columns)),
        "chief_y_mm": np.empty((focuses, rows, columns)),
    }

    def fill(psf: NDArray[Any], at: NDArray[np.int64], first: int) -> tuple[int, int]:
        """Render the field points `at` (flat indices) into `psf`, whose first point is `first`, and `small`."""
        r, c = np.divmod(at, columns)
        field_xy = np.stack([coords["field_x"][c], coords["field_y"][r]], axis=-1)
        found = engine.deposit(torch.from_numpy(field_xy), depth_mm)
        kernels = normalise(found.halves, config.bins)
        psf[:, at - first] = kernels.psf.swapaxes(0, 1)
        small["psf_binned"][:, r, c] = kernels.psf_binned.swapaxes(0, 1)
        small["throughput"][r, c] = found.throughput
        small["captured"][:, r, c] = found.captured.swapaxes(0, 1)
        small["noise"][:, r, c] = kernels.noise.swapaxes(0, 1)
        small["noise_binned"][:, r, c] = kernels.noise_binned.swapaxes(0, 1)
        small["chief_x_mm"][:, r, c] = found.chief_mm[..., 0].T
        small["chief_y_mm"][:, r, c] = found.chief_mm[..., 1].T
        return found.rays, kernels.noise.size

    # Threads of our own instead of torch's: those meet after every operation, which crawls on a shared machine.
    rays = 0
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in range(0, rows, store.spec.band_rows):
            band = np.arange(row * columns, (row + store.spec.band_rows) * columns)
            psf = np.empty((focuses, len(band), waves, config.kernel_px, config.kernel_px), np.float32)
            batches = [band[start : start + engine.batch] for start in range(0, len(band), engine.batch)]
            for launched, count in pool.map(partial(fill, psf, first=band[0]), batches):
                rays += launched
                store.ledger.touch(store.blocks[index])
                on_kernels(count)
            psf = psf.reshape(focuses, 1, -1, columns, *psf.shape[2:])
            where = slice(row, row + store.spec.band_rows)
            store.write("psf", psf, depth=slice(index, index + 1), field_y=where)
    for name, values in small.items():
        axis = schema.ARRAY_DIMS[name].index("depth")
        store.write(name, np.expand_dims(values, axis), depth=slice(index, index + 1))
    return rays


def _open_or_create(
    kind: Any, path: Path, plan: Plan, engine: Engine, device: str, *, overwrite: bool, shared: bool
) -> Store:
    if overwrite and shared:
        raise ConfigError("--overwrite and --shard exclude each other: shards would delete each other's work")
    if path.exists():
        if not kind.is_store(path) and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(f"{path} exists and is no psfgen store; choose another --out")
        if kind.is_store(path):
            if overwrite:
                _remove_store(kind(path).path)
            else:
                store: Store = kind(path)
                plan.require_same(store.attrs, path)
                return store
    store = kind.create(path, schema.StoreSpec(plan.coords, attributes(plan, engine, device)))
    plan.require_same(store.attrs, path)  # another process may have been first
    return store


def _remove_store(path: Path) -> None:
    """Take a store away at once, then delete it."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    try:
        path.rename(aside)
    except OSError as error:
        raise StoreError(f"{path} cannot be overwritten: {error.strerror}") from None
    shutil.rmtree(aside, ignore_errors=True)


def attributes(plan: Plan, engine: Engine, device: str) -> dict[str, Any]:
    """The root attributes: where every number comes from, as plain data."""
    config = plan.config
    sensor = dict(zip(config.focus, engine.sensor_z_mm, strict=True))
    return {
        "schema": schema.SCHEMA_NAME,
        "schema_version": schema.SCHEMA_VERSION,
        "plan": plan.document,
        "plan_sha256": plan.sha256,
        "config": schema.plain(config.model_dump(exclude=set(INVOCATION))),
        "lens": {"name": plan.lens_name, "sha256": plan.lens_sha256, "text": plan.lens_text},
        "engine": config.engine,
        "tracer": config.tracer,
        "device": device.partition(":")[0],
        "versions": versions(),
        "seed": config.seed,
        "pitch_um": config.pitch_um,
        "reference_um": config.reference_um,
        "field_max": config.field_max,
        "sensor_mm": engine.lens.sensor_mm,
        "sensor_z_mm": {f"{focus:g}": z for focus, z in sensor.items()},
        "orientation": "kernels are upright: row 0 is scene +y, the last column scene +x",
        "centring": "on the chief ray of reference_um: through the centre of the stop, solved exactly",
        "field": "field = pinhole image position / half sensor side; object x = field_x * depth / EFL * width / 2",
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    ours = {"psfgen": __version__, "python": platform.python_version()}
    return {**ours, **{name: version(name) for name in PACKAGES}}


def shortfalls(store: Store) -> Iterator[str]:
    """What a user should know of a finished store: truncation, noise, vignetting; with the way out."""
    captured, noise = store.read("captured"), store.read("noise")
    dark = captured == 0
    vignetted = np.broadcast_to(store.read("throughput") == 0, dark.shape)
    cut = (captured < 0.9) & ~dark
    if cut.any():
        yield (
            f"{cut.sum()} of {cut.size} kernels keep less than 90 % of their energy in the window "
            f"(least {captured[~dark].min():.1%} at {_where(store, np.where(dark, np.inf, captured).argmin())}); "
            "a larger --pitch-um or --kernel-px keeps more"
        )
    noisy = noise > 0.3
    if noisy.any():
        yield (
            f"{noisy.sum()} of {noisy.size} kernels have an estimated error above 30 % "
            f"(worst {np.nanmax(noise):.0%} at {_where(store, np.nanargmax(noise))}, "
            f"median {np.nanmedian(noise):.1%}, binned {np.nanmedian(store.read('noise_binned')):.1%}); "
            "more rays (--spp) lower it"
        )
    if vignetted.any():
        yield f"{vignetted.sum()} of {dark.size} kernels get no light and are NaN; a smaller --field-max avoids them"
    missed = dark & ~vignetted
    if missed.any():
        yield (
            f"{missed.sum()} of {dark.size} kernels miss their window altogether and are NaN (first at "
            f"{_where(store, missed.argmax())}): a larger --pitch-um or --kernel-px, or a --focus nearer to --depth"
        )


def _where(store: Store, flat: Any) -> str:
    at = np.unravel_index(int(flat), tuple(len(store.coords[dim]) for dim in schema.KERNELS))
    named = dict(
        zip(schema.KERNELS, (store.coords[dim][i] for dim, i in zip(schema.KERNELS, at, strict=True)), strict=True)
    )
    return (
        f"field ({named['field_x']:.2f}, {named['field_y']:.2f}), depth {named['depth']:g} mm, "
        f"focus {named['focus']:g} mm, {named['wavelength']:g} um"
    )


@contextmanager
def _quietly() -> Iterator[None]:
    try:
        yield
    except (OSError, PsfError) as error:
        log.debug("could not note a failure: %s", error)
