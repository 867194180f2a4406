"""Rendering: a config -> a complete store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psfgen.block import cut_block, versions
from psfgen.config import RenderConfig
from psfgen.errors import ConfigError, Preempted
from psfgen.executors import executor, slurm
from psfgen.optics.lens import FORMATS, Lens
from psfgen.plan import INVOCATION, Plan, share
from psfgen.specimens import Specimens
from psfgen.store import Store, schema
from psfgen.store.open import format_of, open_or_create, store_class


def render(
    config: RenderConfig,
    *,
    shard: str | None = None,
    overwrite: bool = False,
    on_kernels: Callable[[int], None] = lambda count: None,
    on_start: Callable[[Plan, int], None] = lambda plan, kernels: None,
    stopped: Sequence[str] = (),
) -> Store:
    """Render a config into its store, or finish what is missing of it.

    `shard` "I/N" limits the work to every N-th block. `on_start(plan, kernels_to_do)` is called once,
    `on_kernels(count)` as kernels are finished. As soon as `stopped` holds the name of a signal, the blocks in hand
    are finished and no other is begun. Returns the open store, which is complete unless other shards are at work.

    Raises ConfigError, LensError, PlanMismatch before anything is written; StoreError, RenderError, Preempted later.
    """
    run = executor(config.executor)
    store_class(format_of(config.out, config.format))  # known before the lens is looked at
    if config.executor == "slurm":
        slurm.check(config, shard=shard, overwrite=overwrite)
    lens, plan, device = prepare(config)
    specimens = Specimens(lens, plan)
    mine = share(plan.blocks, shard)
    store = _open_or_create(config, specimens, device, overwrite=overwrite, shared=shard is not None)
    missing = set(store.missing())
    todo = [index for index in mine if index in missing]
    on_start(plan, len(todo) * plan.kernels_per_block)
    run(specimens, store, todo, workers=config.workers, device=device, on_kernels=on_kernels, stopped=stopped)
    missing = set(store.missing())
    if not missing:
        store.finalise()
    left = sum(index in missing for index in mine)
    if stopped and left:
        raise Preempted(
            f"{stopped[0]}; {len(mine) - left} of {len(mine)} blocks are done and kept, the same command goes on"
        )
    return store


def prepare(config: RenderConfig) -> tuple[Lens, Plan, str]:
    """The lens and the plan of a config, and the device its blocks are rendered on."""
    if config.executor == "slurm":  # not here: the lens is only looked at
        config = slurm.for_tasks(config)
        return *load(config, "cpu"), config.device
    device = resolve_device(config.device)
    return *load(config, device), device


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


def load_again(store: Store, device: str, **changes: Any) -> tuple[Lens, Plan]:
    """The lens and the plan of a store, from nothing but the store, with some keys of its config changed."""
    lens, config = store.attrs["lens"], store.attrs["config"]
    suffix = Path(str(config["lens"])).suffix
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"lens{suffix if suffix in FORMATS else '.json'}"
        path.write_text(lens["text"], encoding="utf-8")
        return load(RenderConfig.model_validate({**config, **changes, "lens": str(path)}), device)


def resolve_device(name: str) -> str:
    """`auto` as the device that is here. Raises ConfigError for a GPU that is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ConfigError(f"device {name} is not here ({torch.cuda.device_count()} GPUs found); use --device cpu")
    return name


def _open_or_create(config: RenderConfig, specimens: Specimens, device: str, *, overwrite: bool, shared: bool) -> Store:
    plan = specimens.plan
    cut_block(specimens.engine(0), plan, cores=1)  # what cannot be rendered is not begun
    if overwrite and shared:
        raise ConfigError(
            "--overwrite and --shard exclude each other, also in an array task: shards would delete each other's work"
        )
    store = open_or_create(
        config.out,
        config.format,
        lambda: schema.StoreSpec(plan.coords, attributes(specimens, device)),
        lambda stored: plan.require_same(stored, config.out),
        overwrite=overwrite,
    )
    if "chunks" in store.attrs and store.missing():
        raise ConfigError(
            f"{config.out} was rechunked and misses {len(store.missing())} blocks, which a render, that writes whole "
            "bands, cannot make; finish it by the same `psfgen rechunk`"
        )
    return store


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
