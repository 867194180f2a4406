"""How much light goes through a lens and where its chief rays land, between the places of a store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from psfgen.store import Store
from psftrain.places import Array
from psftrain.table import LEAST, axes_of, bracket


def light_between(store: Store, coords: Mapping[str, Array], array: str) -> dict[str, Array]:
    """The small arrays of a store at other coordinates, by name: linear in the field and in dioptres.

    `captured`, `noise` (that of `array`), `chief_x_mm` and `chief_y_mm` have the dims [focus, depth, y, x(, W)],
    `throughput` those without focus; of copies it is the mean. Beyond the ends of the store the chief rays go on
    straight, everything else stays as it is. Where no light arrives at any of the nodes that a place lies between,
    `captured` is 0 and `noise` NaN; the noise of nodes without light does not count.
    """
    pairs = list(zip(axes_of(store.coords), axes_of(coords), strict=True))
    near, straight = ([_hats(*pair, beyond=beyond) for pair in pairs] for beyond in (False, True))
    throughput, captured, noise = (_read(store, name) for name in ("throughput", "captured", _noise_of(array)))
    lit = (captured > 0) & (throughput[:, None] > 0)
    share = _between(lit.astype(np.float64), near)
    dark = share < LEAST
    chief = {name: _between(_read(store, name)[..., None], straight)[..., 0] for name in ("chief_x_mm", "chief_y_mm")}
    return {
        "throughput": _between(throughput[:, None], [np.ones((1, 1)), *near[1:]])[0],
        "captured": np.where(dark, 0, _between(captured, near)),
        "noise": np.where(dark, np.nan, _between(np.where(lit, noise, 0), near) / np.where(dark, 1, share)),
        **chief,
    }


def sensor_between(store: Store, focus_mm: Array) -> dict[str, float]:
    """Where the sensor stands at other focus distances, in mm, linear in dioptres; of copies the mean."""
    known = [np.mean(store.attrs["sensor_z_mm"][f"{focus:g}"]) for focus in store.coords["focus"]]
    found = _hats(-store.coords["focus_dioptre"], -1000 / focus_mm) @ np.array(known)
    return {f"{focus:g}": float(z) for focus, z in zip(focus_mm, found, strict=True)}


def _noise_of(array: str) -> str:
    return "noise_binned" if array == "psf_binned" else "noise"


def _read(store: Store, name: str) -> Array:
    """An array with a leading axis of copies, and what it has beside."""
    values = store.read(name).astype(np.float64)
    return values if "copy" in store.coords else values[None]


def _between(values: Array, hats: list[Array]) -> Array:
    """Values [copies, focus, depth, y, x, W] as the mean of the copies at other places."""
    return np.asarray(np.einsum("nfdyxw,af,bd,cy,ex->abcew", values, *hats, optimize=True)) / len(values)


def _hats(axis: Array, wanted: Array, *, beyond: bool = False) -> Array:
    """The weight of each node of an ascending axis at each place [wanted, axis]; past an end that of the node there.

    With `beyond` the last two nodes go on in a straight line there.
    """
    weights = np.zeros((len(wanted), len(axis)))
    for row, value in zip(weights, wanted if beyond else np.clip(wanted, axis[0], axis[-1]), strict=True):
        lower, share = bracket(axis, value)
        row[lower] = 1 - share
        row[lower + 1 : lower + 2] = share  # a single node has none after it
    return weights
