"""A store for people: its description in words, and contact sheets of its kernels."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from psfgen.errors import ConfigError, StoreError
from psfgen.select import pick
from psfgen.store import Store, schema
from psfgen.store.colour import channels_to_rgb, stretch

MOST_TILES = 11  # a side; more would be too small to read
TILE_PX = 64
SHEET_PX = 700
GAP_PX = 4


def describe(store: Store) -> tuple[dict[str, Any], str]:
    """What `psfgen info` says of a store: (document, text)."""
    attrs, coords = store.attrs, store.coords
    lens, missing = attrs["lens"], len(store.missing())
    axes = {dim: {"size": len(v), "first": v[0], "last": v[-1], **schema.COORD_ATTRS[dim]} for dim, v in coords.items()}
    document: dict[str, Any] = {
        "paths": {"store": store.path},
        "complete": not missing,
        "lens": {"name": lens["name"], "sha256": lens["sha256"]},
        "axes": axes,
        "plan_sha256": attrs["plan_sha256"],
        "config": attrs["config"],
        "versions": attrs["versions"],
        "sensor_z_mm": attrs["sensor_z_mm"],
    }
    size = " x ".join(f"{len(coords[dim])} {dim}" for dim in store.spec.kernel_dims)
    waves = ", ".join(f"{w:g}" for w in coords["wavelength"])
    engine = f"engine {attrs['engine']}{of_diffraction(attrs['config'])}"
    lines = [
        f"{store.path}: {'complete' if not missing else f'{missing} of {len(store.blocks)} blocks missing'}",
        f"lens       {lens['name']} (sha256 {lens['sha256'][:12]}), {engine}, tracer {attrs['tracer']}",
        f"kernels    {size}",
        f"rays       {_effort(attrs['config'])}",
        *_as_built(attrs),
        f"sampling   {len(coords['kx'])} x {len(coords['ky'])} samples of {attrs['pitch_um']:g} um, "
        f"binned to {len(coords['bx'])} x {len(coords['by'])}; wavelengths {waves} um",
        f"depth      {span(coords['depth'])} mm",
        f"focus      {span(coords['focus'])} mm, sensor at "
        + ", ".join(_range(z) for z in attrs["sensor_z_mm"].values())
        + " mm",
        f"field      x {span(coords['field_x'])}, y {span(coords['field_y'])} half sensor sides of "
        + " x ".join(f"{side:g}" for side in attrs["sensor_mm"])
        + " mm",
        f"made by    plan {attrs['plan_sha256'][:12]}, seed {attrs['seed']}, "
        + ", ".join(f"{name} {number}" for name, number in attrs["versions"].items()),
    ]
    if not missing:
        for name, meaning in (("throughput", "light let through"), ("captured", "energy in the window")):
            values = store.read(name)
            document[name] = {"min": values.min(), "median": np.median(values)}
            lines.append(f"{name:<11}{meaning}: median {np.median(values):.1%}, least {values.min():.1%}")
        noise = store.read("noise")
        if not np.isnan(noise).all():
            document["noise"] = {"median": np.nanmedian(noise), "max": np.nanmax(noise)}
            lines.append(f"noise      estimated error: median {np.nanmedian(noise):.1%}, most {np.nanmax(noise):.1%}")
        if "model" in store.spec.arrays:
            model = store.read("model")
            kinds = {"wave": model == 1, "blended": (model > 0) & (model < 1), "geometric": model == 0}
            document["model"] = {name: int(kernels.sum()) for name, kernels in kinds.items()}
            told = ", ".join(f"{count} {name}" for name, count in document["model"].items())
            lines.append(f"model      kernels: {told}")
    return document, "\n".join(lines)


def _range(z_mm: float | list[float]) -> str:
    low, high = np.min(z_mm), np.max(z_mm)
    return f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"


def _effort(config: dict[str, Any]) -> str:
    rays = f"{config['spp']} a kernel" if config.get("spp") else f"noise at most {config.get('tolerance')}"
    return f"{rays}, {config.get('sampling')} points, {config.get('precision')} precision"


def _as_built(attrs: dict[str, Any]) -> list[str]:
    built = attrs.get("as_built")
    if built is None:
        return []
    copies = f"{len(built)} copies of " if attrs["config"].get("copies") else ""
    return [f"as built   {copies}the lens with {len(built[0])} parts moved (attribute as_built)"]


def span(values: NDArray[np.float64]) -> str:
    """A coordinate in words: its value, or its ends and how many there are."""
    return f"{values[0]:.6g}" if len(values) == 1 else f"{values[0]:.6g} to {values[-1]:.6g} ({len(values)})"


def metres(distance_mm: float) -> str:
    """A distance in words."""
    return "inf" if np.isinf(distance_mm) else f"{distance_mm / 1000:.4g} m"


def contact_sheets(
    store: Store, out: Path, *, depth: str | None = None, focus: str | None = None, copy: int | None = None
) -> list[Path]:
    """Draw a page for each chosen depth and focus of one copy (the first); returns the paths written.

    Without `depth`, each focus distance is shown at the depth most in focus. Raises ConfigError for a
    distance or a copy the store does not hold.
    """
    (copy,) = pick(store, "copy", copy or 0)
    focuses = pick(store, "focus", focus) if focus else list(range(len(store.coords["focus"])))
    depths = pick(store, "depth", depth) if depth else None
    pairs = [(f, d) for f in focuses for d in (depths if depths is not None else [sharpest(store, f)])]
    coords = store.coords
    pages = page_paths(out, [page_name(coords["depth"][d], coords["focus"][f]) for f, d in pairs])
    for (f, d), page in zip(pairs, pages, strict=True):
        save(_draw(store, f, d, copy), page)
    return pages


def page_name(depth_mm: float, focus_mm: float) -> str:
    """A depth and a focus distance in the name of a picture."""
    return f"depth-{metres(depth_mm)}-focus-{metres(focus_mm)}".replace(" ", "")


def page_paths(out: Path, names: list[str]) -> list[Path]:
    """Where pages go that these names tell apart: one goes to `out` itself.

    Raises ConfigError for a kind of picture that cannot be written.
    """
    if out.suffix and out.suffix[1:].lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise ConfigError(f"picture {out}: no picture is written as {out.suffix}; use .png, .pdf or .svg")
    return [out] if len(names) == 1 else [out.with_name(f"{out.stem}-{name}{out.suffix or '.png'}") for name in names]


def require_writable(picture: str | None, table: str | None) -> None:
    """Raise StoreError where one of these files cannot be written: better before the work than after it.

    Nothing is left there. A picture without a suffix may be a folder, beside which pages go.
    """
    for what, option, name in (("picture", "--out", picture), ("table", "--csv", table)):
        if name is None:
            continue
        path = Path(name)
        try:
            if path.is_dir() and (what == "table" or path.suffix):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            told = f"{what} {name} cannot be written: {error.strerror}; choose another {option}"
            raise StoreError(told) from None


def sharpest(store: Store, focus: int) -> int:
    """The depth that is most in focus at a focus distance; indices."""
    return int(np.argmin(np.abs(store.coords["depth_dioptre"] - store.coords["focus_dioptre"][focus])))


def save(figure: Figure, path: Path) -> None:
    """Write a picture. Raises StoreError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"picture {path} cannot be written: {reason}; choose another --out") from None


def _draw(store: Store, focus: int, depth: int, copy: int) -> Figure:
    coords = store.coords
    rows = spread(len(coords["field_y"]))[::-1]  # scene +y on top
    columns = spread(len(coords["field_x"]))
    here = {"copy": copy, "focus": focus, "depth": depth}
    psf = store.read("psf", **here)[np.ix_(rows, columns)]
    captured = store.read("captured", **here)[np.ix_(rows, columns)].min(axis=-1)
    kernel_px = psf.shape[-1]
    zoom = max(1, min(SHEET_PX // (kernel_px * max(len(rows), len(columns))), 4 * TILE_PX // kernel_px))
    side = kernel_px * zoom + GAP_PX
    sheet = np.full((side * len(rows) + GAP_PX, side * len(columns) + GAP_PX, 3), 0.25)
    for i in range(len(rows)):
        for j in range(len(columns)):
            rgb = stretch(channels_to_rgb(psf[i, j]))
            tile = np.repeat(np.repeat(rgb, zoom, axis=0), zoom, axis=1)
            sheet[_tile(i, side, tile), _tile(j, side, tile)] = tile
    inches = np.array(sheet.shape[:2]) / 100  # one sample of the sheet = one pixel of the picture
    height, width = inches + 1.2
    figure = Figure(figsize=(max(width, 6.0), height))
    FigureCanvasAgg(figure)
    left = (figure.get_figwidth() - inches[1] + 0.4) / 2 / figure.get_figwidth()
    axes = figure.add_axes((left, 0.6 / height, inches[1] / figure.get_figwidth(), inches[0] / height))
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks([side * (j + 0.5) for j in range(len(columns))], [f"{coords['field_x'][c]:.2f}" for c in columns])
    axes.set_yticks([side * (i + 0.5) for i in range(len(rows))], [f"{coords['field_y'][r]:.2f}" for r in rows])
    axes.set_xlabel("field x (half sensor widths)")
    axes.set_ylabel("field y (half sensor heights)")
    for i in range(len(rows)):
        for j in range(len(columns)):
            label = f"{captured[i, j]:.0%}" if captured[i, j] > 0 else "no light"
            axes.text(side * j + GAP_PX + 3, side * i + GAP_PX + 3, label, color="0.75", fontsize=7, va="top")
    _scale_bar(axes, store, side, zoom)
    waves = ", ".join(f"{w:g}" for w in coords["wavelength"])
    axes.set_title(
        f"{store.attrs['lens']['name']}   {_specimen(store, copy)}{_engine(store)}"
        f"depth {metres(coords['depth'][depth])}   "
        f"focus {metres(coords['focus'][focus])}   {waves} um\n"
        "tiles scaled to their own peak, gamma 2.2; % = energy in the window, worst channel",
        fontsize=9,
    )
    return figure


def of_diffraction(config: Mapping[str, Any]) -> str:
    """What a job asks of engine wave or auto, in words; nothing where it asks for nothing."""
    band, response = config.get("bandwidth_um"), config.get("response", "bilinear")
    return (f", bands {band:g} um wide" if band else "") + (f", {response} samples" if response != "bilinear" else "")


def _specimen(store: Store, copy: int) -> str:
    if "copy" in store.coords:
        return f"copy {copy}   "
    return "as built   " if "as_built" in store.attrs else ""


def _engine(store: Store) -> str:
    """Named where it is not the default."""
    engine = store.attrs.get("engine", "geometric")
    return "" if engine == "geometric" else f"engine {engine}   "


def _tile(index: int, side: int, tile: NDArray[np.float64]) -> slice:
    return slice(index * side + GAP_PX, index * side + GAP_PX + tile.shape[0])


def spread(count: int) -> NDArray[np.int64]:
    """At most MOST_TILES indices, evenly and symmetrically spread, both ends included."""
    tiles = min(count, MOST_TILES)
    tiles -= (count - tiles) % 2 if tiles > 1 else 0
    return np.linspace(0, count - 1, tiles).round().astype(np.int64)


def _scale_bar(axes: Axes, store: Store, side: int, zoom: int) -> None:
    pitch_um = float(store.attrs["pitch_um"])
    window_um = pitch_um * len(store.coords["kx"])
    steps = [m * 10.0**e for e in range(-2, 6) for m in (1, 2, 5)]
    length_um = max(step for step in steps if step <= window_um / 2)
    length = length_um / pitch_um * zoom
    x, y = GAP_PX + 6, side - 8  # in the first tile, top left
    axes.plot([x, x + length], [y, y], color="white", linewidth=2, solid_capstyle="butt")
    axes.text(x + length / 2, y - 3, f"{length_um:g} um", color="white", fontsize=7, ha="center", va="bottom")
