"""Joining stores that differ along one axis into one store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.copying import carried, fill
from psfgen.errors import ConfigError, PlanMismatch, nearest
from psfgen.store import Store, open_store, schema
from psfgen.store.open import open_or_create, require_apart

# The axes, and the keys of a plan that may differ where stores are joined along them.
FIELD_KEYS = ("grid", "layout", "field_max", "seed")
AXES: dict[str, tuple[str, ...]] = {
    "copy": ("copies", "tolerances", "seed", "perturb"),
    "focus": ("focus",),
    "depth": ("depth",),
    "field_y": FIELD_KEYS,
    "field_x": FIELD_KEYS,
    "wavelength": ("wavelength",),
}


def merge(
    paths: Sequence[str],
    out: str,
    *,
    along: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    on_start: Callable[[int], object] = lambda blocks: None,
    on_block: Callable[[], object] = lambda: None,
) -> Store:
    """Join complete stores along the one axis they differ along, or along `along`, into a store at `out`.

    Run again, it finishes what is missing. `on_start(blocks_to_do)` is called once, `on_block()` after each block.

    Raises ConfigError for stores that cannot be joined, PlanMismatch naming what differs between them or where `out`
    is another store, StoreIncomplete and StoreCorrupt for what is wrong with a source.
    """
    if len(paths) < 2:
        raise ConfigError("merge joins two stores or more; give their paths")
    if along is not None and along not in AXES:
        raise ConfigError(f"--along {along}: unknown axis{nearest(along, AXES)}; known: {', '.join(AXES)}")
    require_apart(out, paths)
    sources = [open_store(path) for path in paths]
    dim = axis_of(sources, along)
    if dim != "copy":  # whatever the order they are named in
        sources.sort(key=lambda store: float(store.coords[dim][0]))
    joined = Joined(sources, dim)
    attrs = attributes(joined)

    def check(stored: dict[str, Any]) -> None:
        if stored.get("plan_sha256") != attrs["plan_sha256"]:
            key, found, wanted = difference(stored.get("plan", {}), attrs["plan"], ()) or ("plan", None, None)
            raise PlanMismatch(
                f"{out} exists with another plan: {key} is {found}, this merge makes {wanted}; "
                "choose another --out, or --overwrite to start anew"
            )

    spec = schema.StoreSpec(joined.coords, attrs)
    target = open_or_create(out, format, lambda: spec, check, overwrite=overwrite)
    on_start(len(target.missing()))
    fill(target, joined, on_block)
    return target


def axis_of(sources: Sequence[Store], along: str | None) -> str:
    """The axis along which the stores are to be joined; everything else is then known to be equal."""
    first = sources[0]
    differing = [dim for dim in AXES if any(not _same(dim, first, other) for other in sources[1:])]
    dim = along or (differing[0] if differing else "copy")
    beside = [name for name in differing if name != dim]
    if beside:
        raise PlanMismatch(
            f"{_paths(sources)} differ along {' and '.join(sorted({dim, *beside}))}; "
            "merge joins stores that differ along one axis: merge twice"
        )
    for other in sources[1:]:
        _require_alike(first, other, dim)
    if not differing and along is None:
        raise ConfigError(f"{_paths(sources)} have the same coordinates; --along copy joins them as copies of a lens")
    return dim


def _paths(sources: Sequence[Store]) -> str:
    return " and ".join(store.path for store in sources)


def _same(name: str, one: Store, other: Store) -> bool:
    none = np.empty(0)
    return np.array_equal(one.coords.get(name, none), other.coords.get(name, none))


def _require_alike(one: Store, other: Store, dim: str) -> None:
    """Raise PlanMismatch, naming the first difference, unless two stores are alike but for the axis."""
    lenses = [store.attrs["lens"]["sha256"] for store in (one, other)]
    found = ("lens", *lenses) if lenses[0] != lenses[1] else None
    # An axis may stand in several keys, and a second axis that differs is told of by its name.
    found = found or difference(_leaf(one.attrs["plan"], dim), _leaf(other.attrs["plan"], dim), AXES[dim])
    if found is None:
        axes = [name for name in one.coords if schema.COORD_DIMS.get(name, name) not in AXES]
        found = next((("coordinate", name, name) for name in axes if not _same(name, one, other)), None)
    if found is not None:
        key, here, there = found
        raise PlanMismatch(
            f"{other.path} does not go with {one.path}: {key} is {there}, there it is {here}; "
            f"stores joined along {dim} must be alike in everything else"
        )


def _leaf(plan: dict[str, Any], dim: str) -> dict[str, Any]:
    """A plan, or one of those that were merged along the same axis before: they are alike."""
    return _leaf(plan["merged"][0], dim) if plan.get("along") == dim else plan


def difference(one: Any, other: Any, free: Sequence[str]) -> tuple[str, Any, Any] | None:
    """The first key at which two plans differ, not counting those that are free, and both values."""
    for key in {**one, **other}:
        here, there = one.get(key), other.get(key)
        if key == "merged" and here and there and len(here) == len(there):
            found = next(filter(None, map(difference, here, there, [free] * len(here))), None)
            if found is not None:
                return found
        elif key not in free and here != there:
            return key, here, there
    return None


class Joined:
    """Stores joined along an axis, as the source of a copy. `owner` and `place` say whose each coordinate is."""

    def __init__(self, sources: Sequence[Store], dim: str) -> None:
        self.sources, self.dim = sources, dim
        lengths = [len(store.coords.get(dim, [0])) for store in sources]
        owner = np.repeat(np.arange(len(sources)), lengths)
        place = np.concatenate([np.arange(length) for length in lengths])
        if dim == "copy":  # copies are counted
            order, coords = np.arange(len(owner)), {"copy": np.arange(len(owner), dtype=np.float64)}
        else:
            values = np.concatenate([store.coords[dim] for store in sources])
            order = np.argsort(values, kind="stable")
            _require_distinct(sources, dim, values[order], owner[order])
            names = [name for name in schema.COORD_ATTRS if schema.COORD_DIMS.get(name, name) == dim]
            coords = {name: np.concatenate([store.coords[name] for store in sources])[order] for name in names}
        self.owner, self.place = owner[order], place[order]
        united = {**sources[0].coords, **coords}
        self.coords = {name: united[name] for name in schema.COORD_ATTRS if name in united}  # as they are laid out

    def read(self, name: str, **index: slice) -> NDArray[Any]:
        """Part of an array. Where it lacks the axis the sources agree, but for the rays behind `throughput`:

        the largest is taken, so that no kernel has light where none passes.
        """
        dims = schema.StoreSpec(self.coords, {}).dims(name)
        if self.dim not in dims:
            return reduce(np.maximum, (store.read(name, **index) for store in self.sources))
        axis, span = dims.index(self.dim), index[self.dim]
        parts, places = [], []
        for number in np.unique(self.owner[span]):
            at = np.flatnonzero(self.owner[span] == number)
            first, last = self.place[span][at[[0, -1]]]  # between them is nobody else's: both sides ascend
            parts.append(self._read(self.sources[number], name, {**index, self.dim: slice(first, last + 1)}))
            places.append(at)
        return np.concatenate(parts, axis).take(np.argsort(np.concatenate(places)), axis)

    def _read(self, store: Store, name: str, index: dict[str, slice]) -> NDArray[Any]:
        if "copy" in index and "copy" not in store.coords:
            return store.read(name, **{dim: at for dim, at in index.items() if dim != "copy"})[None]
        return store.read(name, **index)

    def chunks(self, name: str) -> tuple[int, ...]:
        """Those of the first source."""
        chunks = self.sources[0].spec.chunks(name)
        return (1,) * (len(schema.StoreSpec(self.coords, {}).dims(name)) - len(chunks)) + chunks

    def entry(self, block: int) -> dict[str, Any]:
        """The ledger entry of a block: that of the one it comes from, or the sum of several."""
        here = schema.StoreSpec(self.coords, {}).block_at(block)
        if self.dim in here:
            number = self.owner[here[self.dim]]
            return self._entry(self.sources[number], {**here, self.dim: int(self.place[here[self.dim]])})
        return together([self._entry(store, here) for store in self.sources])

    def _entry(self, store: Store, here: dict[str, int]) -> dict[str, Any]:
        return carried(store.ledger.read(store.blocks[store.spec.block_number(here)]))


def _require_distinct(
    sources: Sequence[Store], dim: str, values: NDArray[np.float64], owner: NDArray[np.int64]
) -> None:
    for at in np.flatnonzero(values[1:] == values[:-1]):
        one, other = (sources[owner[i]].path for i in (at, at + 1))
        raise ConfigError(f"{dim} {values[at]:g} is in {one} and in {other}; merge needs distinct values")


def together(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ledger entries as one: numbers are added, words are listed, of diffraction the worst is kept."""
    made: dict[str, Any] = {}
    for key, value in entries[0].items():
        values = [entry.get(key, value) for entry in entries]
        if key == "diffraction":
            worst = max(values, key=lambda found: found["airy_um"] / max(found["rms_um"], 1e-9))
            made[key] = {**worst, "kernels": sum(found["kernels"] for found in values)}
        elif isinstance(value, dict):
            made[key] = together(values)
        elif isinstance(value, str):
            made[key] = ", ".join(dict.fromkeys(values))
        else:
            made[key] = sum(values)
    return made


def attributes(joined: Joined) -> dict[str, Any]:
    """The root attributes of stores that are joined: the first one's, with the axis united."""
    first, dim, coords = joined.sources[0], joined.dim, joined.coords
    attrs = {key: value for key, value in first.attrs.items() if key != "chunks"}
    united = {dim: schema.plain(coords[dim])} if dim in attrs["config"] else {}
    attrs["config"] = {**attrs["config"], **united}
    plans = [store.attrs["plan"] for store in joined.sources]
    if dim == "depth" and not any("merged" in plan for plan in plans):
        attrs["plan"] = {**plans[0], **united}  # what a render of all these depths has, to the last byte
    else:
        merged = [leaf for plan in plans for leaf in (plan["merged"] if plan.get("along") == dim else [plan])]
        attrs["plan"] = {"schema_version": schema.SCHEMA_VERSION, "merged": merged, "along": dim}
    attrs["plan_sha256"] = schema.sha256_of(attrs["plan"])
    places = [store.attrs["sensor_z_mm"] for store in joined.sources]
    if dim == "focus":
        every = {focus: z for place in places for focus, z in place.items()}
        attrs["sensor_z_mm"] = {f"{focus:g}": every[f"{focus:g}"] for focus in coords["focus"]}
    if dim == "copy":
        attrs["sensor_z_mm"] = {
            focus: [z for place in places for z in np.atleast_1d(place[focus]).tolist()] for focus in places[0]
        }
        attrs["as_built"] = [moves for store in joined.sources for moves in store.attrs.get("as_built", [[]])]
        attrs["config"]["copies"] = len(coords["copy"])
    return attrs
