"""What the numbers of a whole store are like: light, energy, truncation, noise, mean kernels. Out of core, one pass."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.base import compute
from dask.core import flatten
from numpy.typing import NDArray

from psfgen.outofcore import dask_array
from psfgen.store import Store
from psfgen.store.colour import channels_to_rgb, stretch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tally = dict[str, Any]  # what is known of some chunks; two of them merge into one

FINE = 4800  # bins that are counted; percentiles are exact to one of them
SHOWN = 24  # bins that are shown, about from the least to the greatest value
PERCENTILES = (5, 50, 95)
MOST_CHANNELS = 6  # mean kernels drawn, beside the one in colour
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Quantity:
    """An array whose values are counted, and the edges of the bins: fixed, so that one pass is enough."""

    name: str
    meaning: str
    edges: NDArray[np.float64]


SHARES = np.linspace(0, 1, FINE + 1)
ERRORS = np.geomspace(1e-6, 1e2, FINE + 1)
QUANTITIES = (
    Quantity("throughput", "light let through, everywhere", SHARES),
    Quantity("captured", "energy in the window, of kernels with light", SHARES),
    Quantity("noise", "estimated error of psf", ERRORS),
    Quantity("noise_binned", "estimated error of psf_binned", ERRORS),
)


def statistics(store: Store) -> dict[str, Any]:
    """Every statistic of a store, as `psfgen stats --json` shows it; `mean_psf` besides, as an array.

    Each chunk is read once, by as many threads as there are cores; memory is bounded by a few chunks a
    thread. Dark kernels, which are NaN, count in `kernels` and `dark` alone. Raises StoreCorrupt and
    StoreIncomplete as reading does.
    """
    wanted = {name: _reduced(dask_array(store, name), _kernels) for name in ("psf", "psf_binned")}
    for quantity in QUANTITIES:
        wanted[quantity.name] = _reduced(dask_array(store, quantity.name), partial(_values, quantity=quantity))
    (found,) = compute(wanted, scheduler="threads")  # type: ignore[no-untyped-call]

    total = int(np.prod(store.spec.shape("captured")))
    lit = found["psf"]["lit"]
    document: dict[str, Any] = {
        "paths": {"store": store.path},
        "kernels": total,
        "dark": total - int(lit.sum()),
        "energy": {name: _summary(found[name]) for name in ("psf", "psf_binned")},
    }
    for quantity in QUANTITIES:
        counts = found[quantity.name]["counts"]
        summary = _summary(found[quantity.name])
        for percent in PERCENTILES:
            value = _percentile(quantity.edges, counts, percent)
            summary[f"p{percent}"] = float(np.clip(value, summary["min"], summary["max"]))
        document[quantity.name] = {**summary, "histogram": _shown(quantity.edges, counts)}
    share = np.where(lit > 0, lit, np.nan)[:, None, None]
    document["wavelength_um"] = store.coords["wavelength"]
    document["mean_psf_binned"] = found["psf_binned"]["kernels"] / share
    document["mean_psf"] = found["psf"]["kernels"] / share
    return document


def _reduced(array: Any, tally: Callable[[NDArray[Any]], Tally]) -> Any:
    """The tallies of an array's chunks, merged: one task a chunk, for a graph of tasks takes memory too."""

    def tallied(chunk: NDArray[Any], axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:
        return chunk if computing_meta else tally(chunk)  # dask tries what comes out on an empty chunk

    def merged(tallies: Any, axis: Any, keepdims: bool) -> Tally:
        return reduce(_merged, flatten([tallies]))  # type: ignore[no-untyped-call]

    return da.reduction(  # type: ignore[no-untyped-call]
        array, tallied, merged, combine=merged, concatenate=False, dtype=object, meta=np.empty((), object)
    )


def _merged(one: Tally, other: Tally) -> Tally:
    how: dict[str, Any] = {"min": min, "max": max}
    return {key: how.get(key, operator.add)(one[key], other[key]) for key in one}


def _extremes(values: NDArray[Any]) -> Tally:
    """Least, greatest, sum and number of what is not NaN."""
    there = values[~np.isnan(values)]
    return {
        "min": there.min(initial=np.inf),
        "max": there.max(initial=-np.inf),
        "sum": there.sum(dtype=np.float64),
        "count": there.size,
    }


def _kernels(chunk: NDArray[Any]) -> Tally:
    """Of kernels [..., W, y, x]: extremes of their energy; lit ones [W], and their sum [W, y, x]."""
    energy = chunk.sum(axis=(-2, -1), dtype=np.float64)
    dark = np.isnan(energy)
    places = tuple(range(energy.ndim - 1))  # every axis before wavelength
    total = np.nansum if dark.any() else np.sum
    return {
        **_extremes(energy),
        "lit": (~dark).sum(axis=places),
        "kernels": total(chunk, axis=places, dtype=np.float64),
    }


def _values(chunk: NDArray[Any], quantity: Quantity) -> Tally:
    """Of a quantity: extremes, and how many values each bin holds."""
    values = chunk[chunk > 0] if quantity.name == "captured" else chunk[~np.isnan(chunk)]
    within = np.clip(values, quantity.edges[0], quantity.edges[-1])
    return {**_extremes(values), "counts": np.histogram(within, bins=quantity.edges)[0]}


def _summary(extremes: Tally) -> dict[str, float]:
    """min, mean, max; NaN where there is no value at all."""
    count = int(extremes["count"])
    if not count:
        return dict.fromkeys(("min", "mean", "max"), np.nan)
    return {"min": float(extremes["min"]), "mean": float(extremes["sum"]) / count, "max": float(extremes["max"])}


def _percentile(edges: NDArray[np.float64], counts: NDArray[np.int64], percent: float) -> float:
    """The centre of the bin that holds the value below which `percent` of the values lie."""
    reached = np.cumsum(counts)
    if not reached[-1]:
        return np.nan
    index = int(np.searchsorted(reached, max(percent / 100 * reached[-1], 1)))
    return float((edges[index] + edges[index + 1]) / 2)


def _shown(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, Any]:
    """The same histogram in `SHOWN` bins of one width, which span the values there are."""
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 1)
    width = -(-(last - first) // SHOWN)
    first = min(first, len(counts) - SHOWN * width)
    kept = slice(first, first + SHOWN * width)
    return {
        "edges": edges[first : first + SHOWN * width + 1 : width],
        "counts": counts[kept].reshape(SHOWN, width).sum(axis=1),
    }


def text(document: dict[str, Any]) -> str:
    """The statistics as a table with small histograms."""
    kernels, dark = document["kernels"], document["dark"]
    head = f"{'':<14}{'min':>10}{'p5':>10}{'median':>10}{'mean':>10}{'p95':>10}{'max':>10}"
    lines = [f"{document['paths']['store']}: {kernels} kernels, {dark} of them dark (no light, NaN)", "", head]
    for quantity in QUANTITIES:
        row = document[quantity.name]
        numbers = (row[key] for key in ("min", "p5", "p50", "mean", "p95", "max"))
        lines.append(f"{quantity.name:<14}" + "".join(f"{number:>10.3%}" for number in numbers))
    for name, row in document["energy"].items():
        lines.append(f"sum {name:<10}{row['min']:>10.6f}{'':>20}{row['mean']:>10.6f}{'':>10}{row['max']:>10.6f}")
    lines.append("")
    for quantity in QUANTITIES:
        edges, counts = document[quantity.name]["histogram"].values()
        scale = "log" if quantity.edges is ERRORS else "linear"
        lines.append(
            f"{quantity.name:<14}{edges[0]:>10.3%} |{_bars(counts):<{SHOWN}}| {edges[-1]:.3%}"
            f"  {quantity.meaning} ({scale})"
        )
    return "\n".join(lines)


def _bars(counts: NDArray[np.int64]) -> str:
    """A bar a bin; whatever is not empty can be seen."""
    heights = np.ceil(counts / max(int(counts.max()), 1) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def draw(document: dict[str, Any], title: str, out: Path) -> None:
    """The histograms, and the mean kernels: together in colour, and apart. Raises StoreError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from psfgen.show import save

    mean, waves = np.nan_to_num(document["mean_psf"]), document["wavelength_um"]
    chosen = np.unique(np.linspace(0, len(waves) - 1, min(len(waves), MOST_CHANNELS)).round().astype(int))
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for axes, quantity in zip(above.subplots(1, len(QUANTITIES)), QUANTITIES, strict=True):
        _draw_histogram(axes, quantity, document[quantity.name])
    panels = below.subplots(1, 1 + len(chosen), squeeze=False)[0]
    pictures = [(channels_to_rgb(mean), "mean kernel, all channels")]
    for channel in chosen:
        alone = np.zeros_like(mean)
        alone[channel] = mean[channel]
        pictures.append((channels_to_rgb(alone), f"{waves[channel]:g} um"))
    for axes, (rgb, name) in zip(panels, pictures, strict=True):
        axes.imshow(stretch(rgb), interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title, fontsize=11)
    save(figure, out)


def _draw_histogram(axes: Axes, quantity: Quantity, row: dict[str, Any]) -> None:
    edges, counts = row["histogram"].values()
    axes.stairs(counts, edges, fill=True, color="0.55")
    axes.axvline(row["p50"], color="black", linewidth=1, label=f"median {row['p50']:.3g}")
    if quantity.edges is ERRORS:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(quantity.name)
    axes.set_ylabel("kernels" if quantity.name != "throughput" else "places")
    axes.set_title(quantity.meaning, fontsize=8)
    axes.legend(fontsize=8, frameon=False)
