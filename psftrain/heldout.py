"""The held-out store: whether it fits a run, which of its places are held out, and the command that renders one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from psfgen.config import RenderConfig
from psfgen.errors import PsfError, RunMismatch
from psfgen.store import Store, open_store
from psfgen.store.schema import plain
from psftrain.data import (
    COLUMN,
    DEPTH,
    FOCUS,
    ROW,
    STORE,
    Examples,
    fingerprint,
    open_stores,
    read_examples,
    require_same,
)
from psftrain.run import Trained


def read_heldout(trained: Trained, path: str) -> tuple[Examples, list[Store]]:
    """The examples of a store, as a run conditions them. Raises RunMismatch where it does not fit the run."""
    array = trained.config.data.array
    stores = open_stores([path], array)
    what = f"held-out store {path}"
    require_same(trained.fingerprint, fingerprint(stores, array), what)
    coords = stores[0].coords
    trained.conditioning.require(coords["depth_dioptre"], coords["focus_dioptre"], what)
    reach = max(np.abs(coords["field_x"]).max(), np.abs(coords["field_y"]).max())
    if reach > trained.conditioning.field_max * (1 + 1e-9):
        raise RunMismatch(
            f"{what}: its field reaches {reach:.4g}, the run was trained up to {trained.conditioning.field_max:.4g}; "
            f"render it with --field-max {trained.conditioning.field_max:.4g}"
        )
    return read_examples(stores, trained.conditioning, array), stores


def all_trained_on(train_stores: list[Store], held_stores: list[Store]) -> bool:
    """Whether every held-out place, lit or not, is a place of one of the training stores."""
    axes = ("field_x", "field_y", "depth", "focus")
    return all(
        any(
            all(np.isin(held.coords[axis], train.coords[axis]).all() for axis in axes)
            for train in _of_the_same_specimens(train_stores, held)
        )
        for held in held_stores
    )


def _of_the_same_specimens(train_stores: list[Store], held: Store) -> list[Store]:
    """The training stores of the lens, and of the very copies of it, that a held-out store is of."""

    def specimens(store: Store) -> tuple[Any, ...]:
        return fingerprint([store], "psf")["lenses"], store.attrs.get("as_built")

    return [train for train in train_stores if specimens(train) == specimens(held)]


def of_another_specimen(train_stores: list[Store], held: Store) -> bool:
    """Whether a run on single specimens has not seen the one that a held-out store is of."""
    single = all(len(store.coords.get("copy", [0])) == 1 for store in train_stores)
    return single and not _of_the_same_specimens(train_stores, held)


def chose_the_best(trained: Trained, held: Store) -> bool:
    """Whether a held-out store is the one that the best checkpoint of a run was chosen by."""
    if trained.config.val is None:
        return False
    try:
        return bool(open_store(trained.config.val).attrs["plan_sha256"] == held.attrs["plan_sha256"])
    except PsfError:  # it is not there any more
        return False


def trained_on(train_stores: list[Store], held_stores: list[Store], held: Examples) -> NDArray[np.bool_]:
    """Which held-out examples [M] are of a place of a training store."""
    columns = (("field_x", COLUMN), ("field_y", ROW), ("depth", DEPTH), ("focus", FOCUS))
    found = np.zeros(len(held), dtype=bool)
    for number, store in enumerate(held_stores):
        for train in _of_the_same_specimens(train_stores, store):
            shared = held.index[:, STORE] == number
            for axis, column in columns:
                at = np.flatnonzero(np.isin(store.coords[axis], train.coords[axis]))
                shared &= np.isin(held.index[:, column], at)
            found |= shared
    return found


def heldout_command(store: Store, run: Path) -> str:
    """The command that renders a held-out store for a training store, and judges a run on it."""
    config = store.attrs["config"]
    defaults = plain(RenderConfig().model_dump())
    keys = (
        "engine",
        "reference_um",
        "lens",
        "grid",
        "depth",
        "focus",
        "wavelength",
        "sensor_mm",
        "fnum",
        "pitch_um",
        "field_max",
        "kernel_px",
        "bins",
    )
    words = [f"--{key.replace('_', '-')} {_word(config[key])}" for key in keys if config.get(key) != defaults[key]]
    words += _specimen(config)
    options = " ".join(["--layout cells", *words])
    return f"psfgen render {options} --out heldout.zarr && psftrain eval {shlex.quote(str(run))} --store heldout.zarr"


def _word(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    return shlex.quote(",".join(f"{item:.10g}" if isinstance(item, float) else str(item) for item in items))


def _specimen(config: dict[str, Any]) -> list[str]:
    """The options that make the specimens of a render: what is wrong with them, and the seed that draws copies."""
    words = [f"--copies {config['copies']} --seed {config['seed']}"] if config.get("copies") else []
    drawn = {name: value for name, value in config.get("tolerances", {}).items() if value}
    for key, value in (("tolerances", drawn), ("perturb", config.get("perturb"))):
        if value:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
            words.append(f"--set {shlex.quote(f'{key}={text}')}")
    return words
