"""What is trained on: which stores belong together, what and where their examples are, what is withheld.

Legend: M examples, C condition (field x, field y, depth, focus), W wavelengths, y x bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.errors import ConfigError, FitError, RunMismatch
from psfgen.store import Store, open_store
from psfgen.store.schema import plain
from psftrain.conditioning import Conditioning
from psftrain.config import DataConfig
from psftrain.decode import Unit, decode_into, units_of

LENS = ("lens_sha256", "fnum", "sensor_mm")
STORE, COPY, FOCUS, DEPTH, ROW, COLUMN = range(6)  # columns of `Places.index`


@dataclass(frozen=True)
class Places:
    """What and where examples are, without their kernels.

    They are ordered by store, copy, depth, focus, row and column, as the chunks of a store are. `array` is the array
    trained on and `shape` [W, y, x] that of an example. `condition` [M, C]; `index` [M, 6]: store, copy (0 where a
    store has none), focus, depth, row, column; `number` [M]: which example of the whole catalogue each is, before any
    was withheld. `slices`: for each (store, copy, depth, focus) the position here of every field point [Ny, Nx], -1
    where it is masked. `masked` counts the places without light, and those withheld. `units` are the whole chunks that
    hold the catalogue, `coords` the coordinates of each store.
    """

    array: str
    shape: tuple[int, int, int]
    condition: Tensor
    index: NDArray[np.int64]
    number: Tensor
    slices: list[Tensor]
    masked: int
    units: list[Unit]
    coords: list[dict[str, NDArray[np.float64]]]

    def __len__(self) -> int:
        return len(self.number)

    def select(self, keep: NDArray[np.bool_]) -> Places:
        """The examples where `keep` [M] holds; the others are masked in the slices."""
        position = torch.full((len(self) + 1,), -1, dtype=torch.long)
        position[:-1][torch.from_numpy(keep)] = torch.arange(int(keep.sum()))
        chosen = torch.from_numpy(np.flatnonzero(keep))
        return replace(
            self,
            condition=self.condition[chosen],
            index=self.index[keep],
            number=self.number[chosen],
            slices=[position[slice_] for slice_ in self.slices],  # -1 finds the last entry, which is -1
            masked=self.masked + int((~keep).sum()),
        )

    def parts(self) -> list[tuple[Unit, int, int]]:
        """Each unit that has examples here, and their positions, which are `start` to `stop`."""
        bounds = torch.tensor([(unit.start, unit.stop) for unit in self.units])
        found = torch.searchsorted(self.number, bounds).tolist()
        return [(unit, start, stop) for unit, (start, stop) in zip(self.units, found, strict=True) if stop > start]

    def neighbours(self) -> Tensor:
        """Positions [M, 2] of the neighbour to the right and of the one below in the same slice; -1: none."""
        found = torch.full((len(self), 2), -1, dtype=torch.long)
        for slice_ in self.slices:
            for axis, here, there in (
                (0, slice_[:, :-1], slice_[:, 1:]),
                (1, slice_[:-1], slice_[1:]),
            ):
                lit = here >= 0
                found[here[lit], axis] = there[lit]
        return found


@dataclass(frozen=True)
class Examples:
    """Places with their kernels [M, W, y, x] and the estimated relative L2 error of each stack [M], in memory."""

    places: Places
    kernels: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.kernels)

    @property
    def condition(self) -> Tensor:
        return self.places.condition

    @property
    def index(self) -> NDArray[np.int64]:
        return self.places.index

    @property
    def slices(self) -> list[Tensor]:
        return self.places.slices

    @property
    def masked(self) -> int:
        return self.places.masked

    def of(self, places: Places) -> Examples:
        """The examples at some places of this whole catalogue."""
        return Examples(places, self.kernels[places.number], self.noise[places.number])


def fingerprint(stores: Sequence[Store], array: str) -> dict[str, Any]:
    """What kernels must have in common to be compared: sampling, wavelengths, array; and the lenses, as used."""
    lenses: list[dict[str, Any]] = []
    for store in stores:
        sides = [float(side) for side in store.attrs["sensor_mm"]]
        lens = dict(zip(LENS, (store.attrs["lens"]["sha256"], store.attrs["config"].get("fnum"), sides), strict=True))
        if lens not in lenses:
            lenses.append(lens)
    return {"lenses": lenses, **_common(stores[0], array)}


def _common(store: Store, array: str) -> dict[str, Any]:
    width, height = store.attrs["sensor_mm"]
    return {
        "reference_um": float(store.attrs["reference_um"]),
        "pitch_um": float(store.attrs["pitch_um"]),
        "kernel_px": len(store.coords["kx"]),
        "bins": len(store.coords["bx"]),
        "wavelength": [float(w) for w in store.coords["wavelength"]],
        "sensor_aspect": round(height / width, 9),
        "array": array,
    }


def require_same(expected: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Raise RunMismatch, naming the first difference, unless kernels of one fingerprint may be compared with another's.

    Every lens found must be one of those expected.
    """
    for lens in found["lenses"]:
        if lens not in expected["lenses"]:
            nearest = max(expected["lenses"], key=lambda known: [known[key] == lens[key] for key in LENS])
            _require_equal(nearest, lens, what)
    _require_equal({key: value for key, value in expected.items() if key != "lenses"}, found, what)


def _require_equal(expected: dict[str, Any], found: dict[str, Any], what: str) -> None:
    for key, value in expected.items():
        if found.get(key) != value:
            there, here = (str(v)[:12] if key.endswith("sha256") else v for v in (found.get(key), value))
            another = ": another lens" if key == "lens_sha256" else ""
            raise RunMismatch(f"{what}: {key} is {there}, but {here} was trained on{another}")


def open_stores(paths: Sequence[str], array: str) -> list[Store]:
    """Open the stores of a run and see that they belong together; they may be of several lenses.

    Raises ConfigError for a store given twice, RunMismatch for kernels that cannot be compared.
    """
    if "" in paths:
        raise ConfigError("store '' is empty; name a store, such as psfs.zarr")
    stores = [open_store(path) for path in paths]
    expected = _common(stores[0], array)
    plans = [store.attrs["plan_sha256"] for store in stores]
    for number, plan in enumerate(plans):
        if plan in plans[:number]:
            raise ConfigError(
                f"stores {paths[plans.index(plan)]} and {paths[number]} are the same render; give it once"
            )
    for path, store in zip(paths[1:], stores[1:], strict=True):
        for key, value in _common(store, array).items():
            if value != expected[key]:
                raise RunMismatch(
                    f"store {path} beside {paths[0]}: {key} is {value}, but {expected[key]} there; "
                    "stores of one run must agree in it"
                )
    return stores


def catalogue(stores: Sequence[Store], conditioning: Conditioning, array: str) -> Places:
    """Every place of the stores that has light, from their throughput and captured alone.

    Raises FitError where no place has light.
    """
    conditions, index, slices, units, first, dark = [], [], [], list[Unit](), 0, 0
    for number, store in enumerate(stores):
        lit = _lit(store)
        units += units_of(number, store, array, lit, first)
        field_y, field_x = np.meshgrid(store.coords["field_y"], store.coords["field_x"], indexing="ij")
        for at in np.ndindex(*lit.shape[:-2]):
            mask, (*copy, depth, focus) = lit[at], at
            dioptres = store.coords["depth_dioptre"][depth], store.coords["focus_dioptre"][focus]
            rows, columns = np.nonzero(mask)
            place = [np.full_like(rows, v) for v in (number, *(copy or [0]), focus, depth)]
            index.append(np.stack([*place, rows, columns], axis=-1))
            conditions.append(conditioning.encode(field_x[mask], field_y[mask], *dioptres))
            positions = np.full(mask.shape, -1)
            positions[mask] = first + np.arange(len(rows))
            slices.append(torch.from_numpy(positions))
            first, dark = first + len(rows), dark + mask.size - len(rows)
    if not first:
        raise FitError(f"every kernel of {stores[0].path} is without light; render a smaller field (--field-max)")
    side = len(stores[0].coords["bx" if array == "psf_binned" else "kx"])
    return Places(
        array,
        (len(stores[0].coords["wavelength"]), side, side),
        torch.from_numpy(np.concatenate(conditions)),
        np.concatenate(index),
        torch.arange(first),
        slices,
        dark,
        units,
        [store.coords for store in stores],
    )


def _lit(store: Store) -> NDArray[np.bool_]:
    """Which places have light in every channel, with the dims of CATALOGUE that the store has."""
    focus = store.spec.dims("captured").index("focus")
    lit = (store.read("captured") > 0) & np.expand_dims(store.read("throughput") > 0, focus)
    return np.asarray(lit.all(axis=-1).swapaxes(focus, focus + 1))


def read_examples(stores: Sequence[Store], conditioning: Conditioning, array: str) -> Examples:
    """Decode stores into memory. Raises FitError where no place has light, StoreCorrupt for NaN where light is."""
    places = catalogue(stores, conditioning, array)
    kernels, noise = torch.empty(len(places), *places.shape), torch.empty(len(places))
    decode_into(stores, array, places.units, kernels, noise)
    return Examples(places, kernels, noise)


def withhold(places: Places, config: DataConfig, seed: int) -> tuple[Places, Places | None, dict[str, Any]]:
    """(training, validation, record): what `data.val`, `data.val_depth` and `data.val_focus` take away, by the seed.

    The field points are the same at every depth and focus wherever a slice has the same shape, so that no other depth
    gives them away; distances are withheld in every store that has them. The record is plain data. Raises ConfigError
    or FitError where there is too little to withhold from.
    """
    field = _withheld_points(places, config.val, seed)
    depth = _withheld_distances(places, "depth", config.val_depth, seed)
    focus = _withheld_distances(places, "focus", config.val_focus, seed)
    held = field.copy()
    for name, column, distances in (("depth", DEPTH, depth), ("focus", FOCUS, focus)):
        for store, coords in enumerate(places.coords):
            at = [i for i, value in enumerate(coords[name]) if _label(value) in distances]
            held |= (places.index[:, STORE] == store) & np.isin(places.index[:, column], at)
    record = {
        "field": _field_points(places, field),
        "depth_mm": plain(sorted(map(float, depth))),
        "focus_mm": plain(sorted(map(float, focus))),
        "train": int((~held).sum()),
        "val": int(held.sum()),
        "masked": places.masked,
    }
    if not (config.val or depth or focus):
        return places, None, record
    if held.all():
        raise FitError("data.val, data.val_depth and data.val_focus leave nothing to train on; withhold less")
    return places.select(~held), places.select(held), record


def _withheld_points(places: Places, share: float, seed: int) -> NDArray[np.bool_]:
    held = np.zeros(len(places), dtype=bool)
    for slice_ in places.slices if share else ():
        rows, columns = slice_.shape
        interior = np.zeros((rows, columns), dtype=bool)
        interior[1:-1, 1:-1] = True
        points = np.flatnonzero(interior)
        chosen = np.random.default_rng([seed, rows, columns]).permutation(points)[: round(share * len(points))]
        positions = slice_.flatten()[torch.from_numpy(chosen)].numpy()
        held[positions[positions >= 0]] = True
    if share and not held.any():
        raise FitError(f"data.val {share:g} withholds no point of so small a grid; give --val STORE or a larger share")
    return held


def _field_points(places: Places, held: NDArray[np.bool_]) -> list[list[float]]:
    """The distinct (field x, field y) of some places."""
    points = set()
    for store, row, column in np.unique(places.index[held][:, [STORE, ROW, COLUMN]], axis=0):
        coords = places.coords[store]
        points.add((float(coords["field_x"][column]), float(coords["field_y"][row])))
    return [list(point) for point in sorted(points)]


def _withheld_distances(places: Places, name: str, count: int, seed: int) -> set[str]:
    """So many distances, none of which is the nearest or the farthest of a store, so that none is extrapolated to."""
    ends = {_label(axis[at]) for axis in (coords[name] for coords in places.coords) for at in (0, -1)}
    inner = sorted({_label(value) for coords in places.coords for value in coords[name]} - ends, key=float)
    if count > len(inner):
        raise ConfigError(
            f"data.val_{name} {count}: the stores have {len(inner)} interior {name} values to withhold; "
            f"--set data.val_{name}={len(inner)}, or render more"
        )
    stream = 1 + ("depth", "focus").index(name)
    return set(np.random.default_rng([seed, stream]).permutation(inner)[:count].tolist())


def _label(distance_mm: float) -> str:
    """A distance such that those of two stores that differ by rounding alone are the same."""
    return f"{distance_mm:.9g}"
