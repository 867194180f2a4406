"""Rendering: a config -> a complete store."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psfgen.block import cut_block, versions
from psfgen.config import RenderConfig
from psfgen.errors import ConfigError, StoreError
from psfgen.executors import executor
from psfgen.optics.lens import Lens
from psfgen.plan import INVOCATION, Plan, share
from psfgen.specimens import Specimens
from psfgen.store import Store, schema
from psfgen.store.open import store_class


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
    specimens = Specimens(lens, plan)
    mine = share(plan.blocks, shard)
    path = Path(config.out)
    store = _open_or_create(kind, path, specimens, device, overwrite=overwrite, shared=shard is not None)
    missing = set(store.missing())
    todo = [index for index in mine if index in missing]
    on_start(plan, len(todo) * plan.kernels_per_block)
    run(specimens, store, todo, workers=config.workers, device=device, on_kernels=on_kernels)
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


def _open_or_create(
    kind: Any, path: Path, specimens: Specimens, device: str, *, overwrite: bool, shared: bool
) -> Store:
    plan = specimens.plan
    cut_block(specimens.engine(0), plan, cores=1)  # what cannot be rendered is not begun
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
    store = kind.create(path, schema.StoreSpec(plan.coords, attributes(specimens, device)))
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


def attributes(specimens: Specimens, device: str) -> dict[str, Any]:
    """The root attributes: where every number comes from, as plain data."""
    plan = specimens.plan
    config = plan.config
    engines = [specimens.engine(copy) for copy in range(specimens.count)]
    sensor_z_mm = np.array([engine.sensor_z_mm for engine in engines]).T.tolist()
    built = {}
    if config.perturb or config.copies:
        moves = [
            [move.model_dump(exclude_defaults=True) for move in specimens.moves(c)] for c in range(specimens.count)
        ]
        built["as_built"] = schema.plain(moves)
    return {
        "schema": schema.SCHEMA_NAME,
        "schema_version": schema.SCHEMA_VERSION,
        "plan": plan.document,
        "plan_sha256": plan.sha256,
        "config": schema.plain(config.model_dump(exclude=set(INVOCATION))),
        "lens": {"name": plan.lens_name, "sha256": plan.lens_sha256, "text": plan.lens_text},
        **built,
        "engine": config.engine,
        "tracer": config.tracer,
        "device": device.partition(":")[0],
        "versions": versions(),
        "seed": config.seed,
        "pitch_um": config.pitch_um,
        "reference_um": config.reference_um,
        "field_max": config.field_max,
        "sensor_mm": specimens.lens.sensor_mm,
        "sensor_z_mm": {
            f"{focus:g}": values if config.copies else values[0]
            for focus, values in zip(config.focus, sensor_z_mm, strict=True)
        },
        "orientation": "kernels are upright: row 0 is scene +y, the last column scene +x",
        "centring": "on the chief ray of reference_um: through the centre of the stop, solved exactly",
        "field": "field = pinhole image position / half sensor side; object x = field_x * depth / EFL * width / 2",
    }
