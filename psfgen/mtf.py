"""`psfgen mtf`: the modulation transfer of a store's kernels, as curves, a table and maps over the field.

The transfer at the frequency f along the unit vector e is |sum K(x) exp(-2 pi i f e.x)|, the Fourier transform of the
kernel's projection on e, the line spread (Goodman, "Introduction to Fourier Optics", 3rd ed., 6.3). Tangential: e
points away from the centre of the field, so lines along circles about it are what is blurred; sagittal: e is square to
that, and the lines are spokes. On the axis, x counts as away from it.

A sample of a kernel answers to light as a triangle two samples wide, each way, so the transform contains
sinc^2(f_x) sinc^2(f_y), which is divided out: at least 0.4 up to half a cycle per sample, where curves end; likewise
where a store names another response. Light that is sharp beside the samples has frequencies F beyond that, which count
as 1 - F: a tenth of them from F = 0.75, all of them at the very end.

Light that a window does not hold adds no modulation but at f = 0 and near, so the transform of the kernel, whose sum is
1, counts as much as `captured`.

Legend: Ny, Nx field points, W wavelengths, C channels: each of them, and last all together where there are several, S
frequencies, k kernel side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from psfgen.select import Selection
from psfgen.show import metres, page_name, page_paths, require_writable, save, sharpest
from psfgen.store import Store
from psfgen.tables import save_csv

Array = NDArray[np.float64]

STEPS = 200
CYCLES_PER_PX = np.linspace(0, 0.5, STEPS + 1)  # up to what the samples can hold; fine beside what a window can
LISTED = slice(None, None, 4)  # of them, in files
PLACES = {"centre": 0.0, "corner": 1.0, "0.7 field": 0.7}  # of the way from the centre to the corner, by importance
SHOWN = (0.1, 0.25, 0.5)  # cycles per sample, in the table
RESPONSES = {"bilinear": 2, "area": 1, "point": 0}  # powers of sinc
DIRECTIONS = ("tangential", "sagittal")
ALIASED, NEAR_END = 0.2, 0.4  # modulation left at so many cycles a sample: there is likely to be some beyond
COLOURS = ("tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


@dataclass(frozen=True)
class Page:
    """The transfer of one depth and focus distance: curves [2, Ny, Nx, C, S], tangential and sagittal.

    NaN where there is no light. `field_x` [Nx] and `field_y` [Ny] are in half sensor sides.
    """

    depth_mm: float
    focus_mm: float
    field_x: Array
    field_y: Array
    wavelength_um: Array
    pitch_mm: float
    curves: Array

    @property
    def cycles_per_mm(self) -> Array:
        """The frequencies [S]."""
        found: Array = CYCLES_PER_PX / self.pitch_mm
        return found

    @property
    def channels(self) -> list[str]:
        """What the C curves are of."""
        names = [f"{wavelength_um:g}" for wavelength_um in self.wavelength_um]
        return [*names, *(["all"] if len(names) > 1 else [])]

    @property
    def mtf50(self) -> Array:
        """Where the curves fall to a half [2, Ny, Nx, C], cycles/mm; inf where they do not, up to their end."""
        return first_below(self.curves, 0.5) / self.pitch_mm

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Row and column of the field points that are nearest to each of PLACES; once where they are the same."""
        found: dict[str, tuple[int, int]] = {}
        for name, share in PLACES.items():
            up, across = self.field_y - share * self.field_y[-1], self.field_x - share * self.field_x[-1]
            place = int(np.abs(up).argmin()), int(np.abs(across).argmin())
            if place not in found.values():
                found[name] = place
        return dict(sorted(found.items(), key=lambda place: PLACES[place[0]]))


def chosen(selection: Selection) -> list[tuple[int, int]]:
    """The focus distance and depth of each page, as indices.

    Without a chosen depth each focus distance is taken at the depth most in focus.
    """
    store = selection.store
    return [
        (focus, depth)
        for focus in selection.indices("focus")
        for depth in selection.kept.get("depth", [sharpest(store, focus)])
    ]


def pages(selection: Selection, on_points: Callable[[int], object] = lambda count: None) -> Iterator[Page]:
    """The transfer of every kernel of a selection of one copy, page by page."""
    store, coords = selection.store, selection.coords
    for focus, depth in chosen(selection):
        here = {"copy": selection.indices("copy")[0], "focus": focus, "depth": depth}
        here = {dim: index for dim, index in here.items() if dim in store.spec.kernel_dims}
        yield Page(
            float(store.coords["depth"][depth]),
            float(store.coords["focus"][focus]),
            coords["field_x"],
            coords["field_y"],
            coords["wavelength"],
            store.attrs["pitch_um"] / 1000,
            _curves(store, here, selection.indices("wavelength"), on_points),
        )


def _curves(store: Store, here: dict[str, int], waves: list[int], on_points: Callable[[int], object]) -> Array:
    """The curves of one page, from as many rows of the field at a time as a chunk holds."""
    away = _away(store, store.coords["field_y"], store.coords["field_x"])
    power = RESPONSES[store.attrs["config"].get("response", "bilinear")]
    together = dict(zip(store.spec.dims("psf"), store.spec.chunks("psf"), strict=True))["field_y"]
    found = []
    for start in range(0, len(away), together):
        rows = slice(start, min(start + together, len(away)))
        kernels = store.read("psf", **here, field_y=rows)[:, :, waves]
        captured = store.read("captured", **here, field_y=rows)[:, :, waves]
        for row in range(len(kernels)):
            at = slice(row, row + 1)
            found.append(transfer(kernels[at], captured[at], away[rows][at], power))
            on_points(kernels.shape[1])
    return np.concatenate(found, axis=1)


def _away(store: Store, field_y: Array, field_x: Array) -> Array:
    """Unit vectors [Ny, Nx, 2] (x, y) from the centre of the field to each of its points."""
    width, height = store.attrs["sensor_mm"]
    across, up = np.meshgrid(field_x * width, field_y * height)
    far = np.hypot(across, up)
    centre = far < 1e-9 * math.hypot(width, height)
    safe = np.where(centre, 1, far)
    return np.stack([np.where(centre, 1, across / safe), np.where(centre, 0, up / safe)], axis=-1)


def transfer(kernels: NDArray[np.floating], captured: Array, away: Array, power: int = 2) -> Array:
    """The curves [2, Ny, Nx, C, S] of kernels [Ny, Nx, W, k, k], rows from top, of which so much is captured.

    `away` [Ny, Nx, 2] are the tangential directions. All wavelengths together are equal parts of each. The
    samples' own transfer, sinc to this power each way, is taken out.
    """
    rows, columns, waves, k, _ = kernels.shape
    found = np.empty((2, rows, columns, waves + (waves > 1), STEPS + 1))
    at = np.arange(k) - (k - 1) / 2
    for row in range(rows):
        for column in range(columns):
            x, y = away[row, column]
            for d, (along_x, along_y) in enumerate(((x, y), (-y, x))):
                f_x, f_y = CYCLES_PER_PX * along_x, CYCLES_PER_PX * along_y
                across, up = (2 * np.pi * np.outer(place, f) for place, f in ((at, f_x), (-at, f_y)))
                even, odd = (kernels[row, column].astype(float) @ wave for wave in (np.cos(across), np.sin(across)))
                spectrum = ((even - 1j * odd) * np.exp(-1j * up)).sum(axis=-2)
                spectrum *= captured[row, column, :, None] / (np.sinc(f_x) * np.sinc(f_y)) ** power
                spectrum[:, 0] += 1 - captured[row, column]
                found[d, row, column, :waves] = np.abs(spectrum)
                found[d, row, column, -1] = np.abs(spectrum.mean(axis=0))
    return found


def first_below(curves: Array, level: float) -> Array:
    """Where curves [..., S] first fall to a level, in cycles per sample; inf where they do not, NaN where they are."""
    below = curves <= level
    after = below.argmax(axis=-1)[..., None]
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(curves, at, axis=-1)[..., 0] for at in (before, after))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, (high - level) / (high - low), 0)
    found = (before[..., 0] + share) * (CYCLES_PER_PX[1] - CYCLES_PER_PX[0])
    return np.where(np.isnan(curves).any(axis=-1), np.nan, np.where(below.any(axis=-1), found, np.inf))


def run(
    selection: Selection,
    *,
    picture: str,
    csv_file: str | None = None,
    on_points: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, Any], str]:
    """Look at a selection; draws a page a depth and focus. Returns plain data and text.

    Raises StoreError for a file not written, and what reading the store does.
    """
    require_writable(picture, csv_file)
    store = selection.store
    found = list(pages(selection, on_points))
    title = f"{store.attrs['lens']['name']}   engine {store.attrs['engine']}"
    names = [page_name(page.depth_mm, page.focus_mm) for page in found]
    paths: dict[str, Any] = {"store": store.path, "pictures": []}
    lines = [
        f"{store.path}: modulation transfer; MTF50 in cycles/mm, * cycles per sample of {store.attrs['pitch_um']:g} um"
    ]
    for page, path in zip(found, page_paths(Path(picture), names), strict=True):
        draw(page, title, path)
        paths["pictures"].append(str(path))
        lines += ["", table(page)]
    if csv_file:
        save_csv((row for page in found for row in _rows(page)), Path(csv_file))
        paths["csv"] = csv_file
    lines += ["", *_warnings(found), *([csv_file] if csv_file else []), *paths["pictures"]]
    document = {
        "paths": paths,
        "cycles_per_px": CYCLES_PER_PX[LISTED],
        "cycles_per_mm": found[0].cycles_per_mm[LISTED],
        "warnings": list(_warnings(found)),
        "pages": [_document(page) for page in found],
    }
    return document, "\n".join(lines)


def _warnings(found: list[Page]) -> Iterator[str]:
    near = int(np.argmin(np.abs(CYCLES_PER_PX - NEAR_END)))
    left = np.concatenate([page.curves[..., near].ravel() for page in found])
    left = left[~np.isnan(left)]
    if len(left) and np.median(left) > ALIASED:
        yield (
            f"half of the curves keep {np.median(left):.2f} at {NEAR_END} cycles a sample, so there is finer detail, "
            "which such samples mistake for coarser: the curves' ends are wrong; render at a smaller --pitch-um"
        )


def _rows(page: Page) -> Iterator[dict[str, Any]]:
    """A row of the CSV for each kernel, and for all wavelengths of a place together."""
    mtf50, frequencies = page.mtf50, [f"{f:.6g}" for f in page.cycles_per_mm[LISTED]]
    for row, column, channel in np.ndindex(mtf50.shape[1:]):
        found: dict[str, Any] = {
            "depth_mm": page.depth_mm,
            "focus_mm": page.focus_mm,
            "field_x": page.field_x[column],
            "field_y": page.field_y[row],
            "wavelength_um": page.channels[channel],
        }
        for d, name in enumerate(DIRECTIONS):
            found[f"mtf50_{name}"] = mtf50[d, row, column, channel]
        for d, name in enumerate(DIRECTIONS):
            curve = page.curves[d, row, column, channel, LISTED]
            found |= {f"{name}_{f}": value for f, value in zip(frequencies, curve, strict=True)}
        yield found


def _document(page: Page) -> dict[str, Any]:
    mtf50 = page.mtf50[..., -1]
    points = []
    for name, (row, column) in page.places.items():
        for c, channel in enumerate(page.channels):
            curves = dict(zip(DIRECTIONS, page.curves[:, row, column, c, LISTED], strict=True))
            place = {"place": name, "field_x": page.field_x[column], "field_y": page.field_y[row]}
            points.append({**place, "wavelength_um": channel, **curves})
    return {
        "depth_mm": page.depth_mm,
        "focus_mm": page.focus_mm,
        "field_x": page.field_x,
        "field_y": page.field_y,
        "mtf50": dict(zip(DIRECTIONS, mtf50, strict=True)),
        "points": points,
    }


def table(page: Page) -> str:
    """The transfer at three places of a page, as text."""
    mtf50, steps = page.mtf50, [int(np.argmin(np.abs(CYCLES_PER_PX - f))) for f in SHOWN]
    columns = ["MTF50", "*", *(f"{page.cycles_per_mm[s]:.4g}/mm" for s in steps)]
    lines = [
        f"depth {metres(page.depth_mm)}   focus {metres(page.focus_mm)}",
        f"{'':<10}{'field x':>8}{'y':>7}{'um':>8}  {'':<11}" + "".join(f"{name:>10}" for name in columns),
    ]
    for name, (row, column) in page.places.items():
        for c, channel in enumerate(page.channels):
            for d, direction in enumerate(DIRECTIONS):
                half = mtf50[d, row, column, c]
                values = [_frequency(page, half), _frequency(page, half * page.pitch_mm, CYCLES_PER_PX[-1])]
                values += [_modulation(page.curves[d, row, column, c, s]) for s in steps]
                where = f"{name:<10}{page.field_x[column]:>8.3f}{page.field_y[row]:>7.3f}{channel:>8}  {direction:<11}"
                lines.append(where + "".join(f"{value:>10}" for value in values))
    return "\n".join(lines)


def _frequency(page: Page, value: float, most: float | None = None) -> str:
    if np.isnan(value):
        return "-"
    return f"> {page.cycles_per_mm[-1] if most is None else most:.4g}" if np.isinf(value) else f"{value:.4g}"


def _modulation(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def draw(page: Page, title: str, out: Path) -> None:
    """The curves at three places, and MTF50 over the field. Raises StoreError."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.1])[:, 0]
    panels = above.subplots(1, len(page.places), sharey=True, squeeze=False)[0]
    for axes, (name, place) in zip(panels, page.places.items(), strict=True):
        _draw_curves(axes, page, name, *place)
    maps = below.subplots(1, len(DIRECTIONS))
    mtf50 = np.minimum(page.mtf50[..., -1], page.cycles_per_mm[-1])
    of = "all wavelengths" if page.channels[-1] == "all" else f"{page.channels[-1]} um"
    most = np.nanmax(mtf50, initial=0) or 1.0
    beyond = "max" if most == page.cycles_per_mm[-1] else "neither"
    for axes, direction, values in zip(maps, DIRECTIONS, mtf50, strict=True):
        shown = axes.pcolormesh(_edges(page.field_x), _edges(page.field_y), values, vmin=0, vmax=most, cmap="viridis")
        axes.set_facecolor("0.8")
        axes.set_aspect("equal")
        axes.set_title(f"{direction} MTF50, {of}", fontsize=9)
        axes.set_xlabel("field x", fontsize=8)
        axes.set_ylabel("field y", fontsize=8)
        below.colorbar(shown, ax=axes, label="cycles/mm", extend=beyond)
    figure.suptitle(f"{title}   depth {metres(page.depth_mm)}   focus {metres(page.focus_mm)}", fontsize=10)
    save(figure, out)


def _draw_curves(axes: Axes, page: Page, name: str, row: int, column: int) -> None:
    for c, channel in enumerate(page.channels):
        together = channel == "all"
        colour = "black" if together else COLOURS[c % len(COLOURS)]
        for curve, style in zip(page.curves[:, row, column, c], ("-", "--"), strict=True):
            label = (channel if together else f"{channel} um") if style == "-" else None
            axes.plot(page.cycles_per_mm, curve, style, color=colour, linewidth=1.8 if together else 1, label=label)
    axes.set_xlim(0, page.cycles_per_mm[-1])
    axes.set_ylim(0, 1.02)
    axes.grid(color="0.9")
    axes.set_title(f"{name} ({page.field_x[column]:.2f}, {page.field_y[row]:.2f}), dashed: sagittal", fontsize=9)
    axes.set_xlabel("cycles/mm", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    scales = (partial(np.multiply, page.pitch_mm), partial(np.multiply, 1 / page.pitch_mm))
    upper = axes.secondary_xaxis("top", functions=scales)
    upper.tick_params(labelsize=7)
    upper.set_xlabel("cycles/sample", fontsize=7)


def _edges(centres: Array) -> Array:
    """Where the cells about ascending points end."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - between[0]], between, [2 * centres[-1] - between[-1]]])
