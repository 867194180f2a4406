"""Baking: a model's kernels on a grid as a store, which `psftrain.open_table` reads faster than a model decodes.

The store holds the kernels once, as `psf`: bins a side are its `kernel_px`, their spacing its `pitch_um`. Its
`psf_binned` is one bin of the whole window, which holds everything; as many bins as samples would double the table.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psfgen import __version__
from psfgen.config import RenderConfig, parse_distances_mm
from psfgen.errors import ConfigError, FitError, PlanMismatch, StoreError, progress
from psfgen.store import Store, open_store, schema
from psfgen.store.open import format_of, is_store, store_class
from psfgen.store.place import is_url
from psftrain.density import Asked, nodes_for
from psftrain.fidelity import Coords, Nodes, baking_error, compared, parts
from psftrain.landing import landing
from psftrain.light import light_between, sensor_between
from psftrain.origin import training_stores
from psftrain.places import Array
from psftrain.predict import PsfModel
from psftrain.room import memory_bytes, text
from psftrain.table import ENGINE, Lattice

MEANING = {
    "psf": "the kernels that the run was trained on, so their bins where these are psf_binned; psf_binned is one bin",
    "noise": "of the renders that the run was trained on; the error of the model is not in it",
}


def bake(model: PsfModel, grid: int | None, depth: str | None, focus: str | None, to: str | Path) -> Store:
    """Write a model's kernels on a grid x grid field at every depth and focus as a table; returns its store.

    What is None is chosen so that the table adds little to the error of the model, as far as a table of 256 MiB can;
    distances then are those of the first training store and others between them. The table appears whole, by a
    rename; where the same one stands already nothing is done. Raises ConfigError, RunMismatch or PlanMismatch before
    anything is written, FitError where the model gives no kernels, StoreError where a store cannot be read or `to`
    not be written.
    """
    if grid is not None and grid < 2:
        raise ConfigError(f"--grid {grid}: at least 2 points a side")
    if is_url(to) or format_of(to) != "zarr":
        raise ConfigError(f"--out {to}: a table is a Zarr folder on a disk; write a name such as table.zarr")
    trained, out = model.trained, Path(to)
    stores = training_stores(trained)
    coords = _coordinates(model, stores[0], grid, depth, focus)
    plan = _plan(model, stores, coords)
    table = _existing(out, plan)
    if table is None:
        _write(model, stores, coords, plan, out)
        table = _existing(out, plan)
        assert table is not None
    return table


def _coordinates(model: PsfModel, store: Store, grid: int | None, depth: str | None, focus: str | None) -> Coords:
    """The coordinates of a table. Raises ConfigError for what is no distance, RunMismatch for one not trained on."""
    asked = Asked(grid, _distances("depth", depth), _distances("focus", focus))
    nearest = [
        np.array([mm[0]]) if given is None else given
        for mm, given in zip((model.depth_mm, model.focus_mm), (asked.depth_mm, asked.focus_mm), strict=True)
    ]
    model.domain.places([0.0, 0.0], nearest[0][:, None], nearest[1])
    _require_room(model, grid or 2, 1)
    side, depth_mm, focus_mm = nodes_for(model, asked, store.coords["depth"], store.coords["focus"])
    _require_room(model, side, len(depth_mm) * len(focus_mm))
    axis = np.linspace(-model.field_max, model.field_max, side)
    axis = (axis - axis[::-1]) / 2  # exactly symmetric, as psfgen has it
    return schema.coordinates(
        focus_mm=focus_mm,
        depth_mm=depth_mm,
        field_y=axis,
        field_x=axis.copy(),
        wavelength_um=model.wavelength_um,
        kernel_px=len(model.x_um),
        bins=1,
        pitch_um=model.pitch_um,
    )


def _require_room(model: PsfModel, side: int, slices: int) -> None:
    """Raise ConfigError for a table that the memory, into which it is read, is too small for."""
    size = 4 * len(model.wavelength_um) * len(model.x_um) ** 2 * side**2 * slices
    if size > (free := memory_bytes()):
        raise ConfigError(
            f"a table of {side} x {side} field points at {slices} depths and focus distances takes {text(size)}, free "
            f"are {text(free)} of memory; give a smaller --grid, or fewer --depth or --focus"
        )


def _distances(name: str, text: str | None) -> Array | None:
    try:
        return None if text is None else np.array(parse_distances_mm(text))
    except ValueError as error:
        raise ConfigError(f"--{name} {text}: {error}") from None


def _plan(model: PsfModel, stores: list[Store], coords: Coords) -> dict[str, Any]:
    """Everything that decides the numbers of a table, as plain data."""
    trained = model.trained
    axes = {name: coords[name] for name in ("depth", "focus", "wavelength")}
    plan = {
        "schema_version": schema.SCHEMA_VERSION,
        "engine": ENGINE,
        "lens_sha256": stores[0].attrs["lens"]["sha256"],
        "model": trained.config.model.name,
        "step": trained.step,
        "weights_sha256": _weights_sha256(model),
        "trained_on": [store.attrs["plan_sha256"] for store in stores],
        "grid": len(coords["field_x"]),
        "field_max": model.field_max,
        **axes,
        "kernel_px": len(coords["kx"]),
        "pitch_um": model.pitch_um,
    }
    found: dict[str, Any] = schema.plain(plan)
    return found


def _weights_sha256(model: PsfModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.trained.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _existing(out: Path, plan: dict[str, Any]) -> Store | None:
    """The table that stands at `out`, or None. Raises ConfigError or PlanMismatch where it is another thing."""
    if not out.exists():
        return None
    store = open_store(out) if is_store(out) else None
    if store is None or store.attrs["engine"] != ENGINE:
        raise ConfigError(f"{out} exists and is no table; choose another --out")
    found = store.attrs["plan"]
    for key, wanted in plan.items():
        if found.get(key) != wanted:
            raise PlanMismatch(
                f"{out} exists, another table: {key} is {found.get(key)}, this bake asks for {wanted}; "
                "choose another --out, or delete it"
            )
    return store


def _write(model: PsfModel, stores: list[Store], coords: Coords, plan: dict[str, Any], out: Path) -> None:
    """Write a table, with the error of baking, which is measured first: attributes never change."""
    light = light_between(stores[0], coords, model.trained.config.data.array)
    nodes = Nodes(model, coords, (light["throughput"] == 0) | (light["captured"] == 0))
    lattice = Lattice(coords)
    bar = progress(compared(lattice) + int(np.prod(lattice.shape)), "bake", "psf")
    try:
        error = baking_error(nodes, bar)
        attrs = _attributes(model, stores, coords, plan, error)
        with _appearing(out), landing(out) as temporary:
            store: Store = store_class("zarr").create(temporary, schema.StoreSpec(coords, attrs))
            for block in range(len(store.blocks)):
                _write_block(store, block, nodes, light, bar)
            store.finalise()
    finally:
        bar.close()


def _write_block(store: Store, block: int, nodes: Nodes, light: dict[str, Array], bar: Any) -> None:
    started, depth = time.monotonic(), store.spec.block_at(block)["depth"]
    for focus in range(len(nodes.coords["focus"])):
        for band in parts(len(nodes.coords["field_y"]), store.spec.band_rows):
            rows, columns = np.arange(band.start, band.stop), np.arange(len(nodes.coords["field_x"]))
            kernels = nodes.kernels(focus, depth, rows[:, None], columns)
            store.write(block, "psf", kernels[None, None], focus=slice(focus, focus + 1), field_y=band)
            nodes.dark[focus, depth, band] |= np.isnan(kernels).any(axis=(-2, -1))
            bar.update(kernels[..., 0, 0, 0].size)
    dark = nodes.dark
    binned = {"psf_binned": np.where(dark, np.nan, 1)[..., None, None], "noise_binned": np.where(dark, np.nan, 0)}
    unlit = {"captured": np.where(dark, 0, light["captured"]), "noise": np.where(dark, np.nan, light["noise"])}
    for name, values in {**light, **unlit, **binned}.items():
        store.write(block, name, values.take([depth], axis=store.spec.dims(name).index("depth")))
    spent = {"rays": 0, "seconds": time.monotonic() - started, "host": socket.gethostname()}
    store.commit(block, {**spent, "versions": store.attrs["versions"]})


def _attributes(
    model: PsfModel, stores: list[Store], coords: Coords, plan: dict[str, Any], error: dict[str, Any]
) -> dict[str, Any]:
    """The root attributes: those of the first training store, but for what a table is otherwise."""
    trained, first = model.trained, stores[0]
    several = len(stores) > 1 or "copy" in first.coords
    gone = {"chunks", *(["as_built"] if several else [])}
    same = {key: value for key, value in first.attrs.items() if key not in gone}
    keys = ("engine", "grid", "field_max", "depth", "focus", "wavelength", "kernel_px", "pitch_um")
    design = {"perturb": (), "copies": None, "tolerances": RenderConfig().tolerances.model_dump()}
    config = {**first.attrs["config"], **{key: plan[key] for key in keys}, "layout": "grid", "bins": 1}
    sources = [{"store": s.path, **{key: s.attrs[key] for key in ("plan_sha256", "plan")}} for s in stores]
    found: dict[str, Any] = schema.plain(
        {
            **same,
            "plan": plan,
            "plan_sha256": schema.sha256_of(plan),
            "config": {**config, **(design if several else {})},
            "engine": ENGINE,
            "tracer": "none",
            "device": model.device.type,
            "versions": {"psfgen": __version__, "torch": torch.__version__, "numpy": np.__version__},
            "pitch_um": model.pitch_um,
            "field_max": model.field_max,
            "sensor_z_mm": sensor_between(first, coords["focus"]),
            "bake": {
                "run": str(trained.path),
                "model": trained.config.model.name,
                "step": trained.step,
                "array": trained.config.data.array,
                "trained_on": sources,
                "error": error,
                "meaning": MEANING,
            },
        }
    )
    return found


@contextmanager
def _appearing(out: Path) -> Iterator[None]:
    """Another process may be first: its table is looked at then. Raises StoreError where there is none."""
    try:
        yield
    except FitError as error:
        if not out.exists():
            raise StoreError(str(error)) from None
