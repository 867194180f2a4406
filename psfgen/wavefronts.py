"""`psfgen wavefront`: the wavefronts of a lens over its field, as numbers, a table and maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from psfgen.block import MOST_AIMED
from psfgen.config import RenderConfig
from psfgen.engines import Aim
from psfgen.errors import ConfigError, LensError
from psfgen.optics.opd import Opd, Strehl
from psfgen.optics.prescription import foreign_surface
from psfgen.optics.wavefront import Pupil
from psfgen.optics.zernike import COUNT, ORDERS
from psfgen.render import load
from psfgen.show import metres, page_name, page_paths, require_writable, save, spread
from psfgen.specimens import Specimens
from psfgen.tables import save_csv

if TYPE_CHECKING:
    from psfgen.engines.wave import WaveEngine

Array = NDArray[np.float64]

DEFAULTS = {"grid": 5, "depth": "inf", "focus": "inf"}  # those of `render` make more than one can look at
DARK = dict.fromkeys(("rms", "rms_no_tilt", "rms_no_defocus", "pv", "strehl", "strehl_chief"), np.nan)
TILE_INCHES = 1.25
TITLE_INCHES = 5.6
DEFOCUS, SPHERICAL = 3, 10  # Noll terms 4 and 11
ASTIGMATISM, COMA = slice(4, 6), slice(6, 8)  # 5 and 6, 7 and 8


@dataclass(frozen=True)
class Page:
    """All field points at one depth, focus distance and wavelength: a row of numbers and a map [N, N] of each."""

    depth_mm: float
    focus_mm: float
    wavelength_um: float
    rows: list[dict[str, Any]]
    maps: list[Array | None]  # in waves, None where no light comes through

    @property
    def title(self) -> str:
        """Its place in words."""
        return f"depth {metres(self.depth_mm)}   focus {metres(self.focus_mm)}   {self.wavelength_um:g} um"


class Survey:
    """A lens to be looked at, at the field points of a job or at others [P, 2].

    Raises LensError and ConfigError for a lens whose wavefronts cannot be found.
    """

    def __init__(self, job: RenderConfig, field_xy: Sequence[tuple[float, float]] = ()) -> None:
        if job.copies is not None:
            raise ConfigError(
                f"copies {job.copies}: wavefronts are those of one lens; leave copies out, or use --perturb"
            )
        self.job = job.model_copy(update={"engine": "wave", "bandwidth_um": 0.0})
        self.lens, self.plan = load(self.job, "cpu")
        if foreign := foreign_surface(self.lens.geo.surfaces):
            raise LensError(f"lens {self.lens.name}: the wavefront behind {foreign} is not known; choose another lens")
        self.engine: WaveEngine = Specimens(self.lens, self.plan).engine(0)  # type: ignore[assignment]
        self.given = np.array(field_xy, dtype=float).reshape(-1, 2)

    @cached_property
    def field_xy(self) -> Array:
        """The field points [P, 2]: of a grid row by row, from the bottom."""
        if len(self.given):
            return self.given
        across, up = np.meshgrid(self.plan.coords["field_x"], self.plan.coords["field_y"])
        return np.stack([across.ravel(), up.ravel()], axis=-1)

    @property
    def names(self) -> list[str]:
        """What tells the pages apart, for the names of their pictures."""
        job = self.job
        return [
            f"{page_name(depth_mm, focus_mm)}-{wavelength_um:.9g}um"
            for depth_mm, focus_mm, wavelength_um in product(job.depth, job.focus, job.wavelength)
        ]

    @property
    def count(self) -> int:
        """How many wavefronts there are."""
        return len(self.field_xy) * len(self.names)

    def pages(self, on_wavefront: Callable[[], object]) -> Iterator[Page]:
        """Look at all of them, page by page."""
        parts = torch.split(torch.from_numpy(self.field_xy), MOST_AIMED)
        for depth_mm in self.job.depth:
            aims = [self.engine.aim(part, depth_mm) for part in parts]
            for f, focus_mm in enumerate(self.job.focus):
                for w, wavelength_um in enumerate(self.job.wavelength):
                    page = Page(depth_mm, focus_mm, wavelength_um, [], [])
                    for aim in aims:
                        for p, (x, y) in enumerate(aim.field_xy.tolist()):
                            numbers, shown = _measured(self.engine, aim, p, f, w)
                            place = {"depth_mm": depth_mm, "focus_mm": focus_mm, "wavelength_um": wavelength_um}
                            page.rows.append({**place, "field_x": x, "field_y": y, **numbers})
                            page.maps.append(shown)
                            on_wavefront()
                    yield page


def _measured(engine: WaveEngine, aim: Aim, p: int, f: int, w: int) -> tuple[dict[str, Any], Array | None]:
    """The numbers of one wavefront, and its map."""
    (line,) = engine.lines(w)
    look, sphere = engine.look(aim, p, line.surfaces), engine.sphere(aim, p, f)
    if not Pupil.of(look, sphere).lit:
        nothing = np.full(COUNT, np.nan)
        return {"open": 0.0, **DARK, **dict.fromkeys(ORDERS, nothing)}, None
    opd, strehl = Opd.of(look, sphere, line.wavelength_mm), Strehl.of(look, sphere, line.wavelength_mm)
    rms = (opd.rms(without) for without in (1, 3, 4))
    numbers = dict(zip(DARK, (*rms, opd.pv, strehl.peak, strehl.chief), strict=True))
    found = {"open": opd.open, **numbers, **{order: opd.coefficients(order) for order in ORDERS}}
    return found, opd.map


def run(
    survey: Survey,
    *,
    picture: str | None = None,
    csv_file: str | None = None,
    on_wavefront: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], str]:
    """Look at all wavefronts; returns them as plain data and as text. Raises StoreError for a file not written."""
    require_writable(picture, csv_file)
    lines, rows = [heading(survey)], []
    paths: dict[str, Any] = {}
    drawn = page_paths(Path(picture), survey.names) if picture else [None] * len(survey.names)
    for page, path in zip(survey.pages(on_wavefront), drawn, strict=True):
        lines += ["", table(page)]
        rows += page.rows
        if path:
            draw(survey, page, path)
    if csv_file:
        save_csv(rows, Path(csv_file))
        paths["csv"] = csv_file
    if picture:
        paths["pictures"] = list(map(str, drawn))
    document = {
        "paths": paths,
        "lens": survey.lens.name,
        "reference_um": survey.lens.reference_um,
        "terms": {name: [order(j) for j in range(1, COUNT + 1)] for name, order in ORDERS.items()},
        "wavefronts": rows,
    }
    written = [*([csv_file] if csv_file else []), *paths.get("pictures", [])]
    return document, "\n".join([*lines, *([""] if written else []), *written])


def heading(survey: Survey) -> str:
    """What the table is about."""
    lens = survey.lens
    return (
        f"lens {lens.name}: EFL {lens.efl_mm:.3f} mm, F/{lens.fnum:.2f}; in waves, from a sphere about the chief ray's "
        f"image at {lens.reference_um:g} um"
    )


def table(page: Page) -> str:
    """A page as text."""
    names = ("rms", "-tilt", "-defocus", "P-V", "Strehl", "at chief", "defocus", "astig.", "coma", "spher.", "open")
    lines = [page.title, f"{'field x':>8}{'y':>7}" + "".join(f"{name:>9}" for name in names)]
    for row in page.rows:
        noll = row["noll"]
        terms = (noll[DEFOCUS], np.hypot(*noll[ASTIGMATISM]), np.hypot(*noll[COMA]), noll[SPHERICAL])
        values = (*(row[name] for name in DARK), *terms, row["open"])
        lines.append(f"{row['field_x']:>8.3f}{row['field_y']:>7.3f}" + "".join(map(_cell, values)))
    return "\n".join(lines)


def _cell(value: float) -> str:
    if np.isnan(value):
        return f"{'-':>9}"
    return f"{value:>9.4f}" if abs(value) < 100 else f"{value:>9.6g}" if abs(value) < 1e5 else f"{value:>9.1e}"


def draw(survey: Survey, page: Page, out: Path) -> None:
    """The maps of a page where they are in the field, each in its own scale. Raises StoreError."""
    columns, rows = len(page.maps), 1
    if not len(survey.given):
        columns, rows = len(survey.plan.coords["field_x"]), len(survey.plan.coords["field_y"])
    across, up = spread(columns), spread(rows)[::-1]
    width = max(TITLE_INCHES, 1.2 + TILE_INCHES * len(across))
    figure = Figure(figsize=(width, 1.3 + (TILE_INCHES + 0.35) * len(up)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (row, column) in zip(
        figure.subplots(len(up), len(across), squeeze=False).flat, ((r, c) for r in up for c in across), strict=True
    ):
        _draw_map(axes, page.rows[row * columns + column], page.maps[row * columns + column])
    title = f"{survey.lens.name}   {page.title}"
    figure.suptitle(
        f"{title}\nred ahead, blue behind, each to its own greatest; RMS in waves, S: Strehl ratio", fontsize=9
    )
    if not len(survey.given):
        figure.supxlabel("field x", fontsize=9)
        figure.supylabel("field y", fontsize=9)
    save(figure, out)


def _draw_map(axes: Axes, row: dict[str, Any], shown: Array | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{row['field_x']:.2f}, {row['field_y']:.2f}", fontsize=7, labelpad=2)
    if shown is None:
        axes.text(0.5, 0.5, "no light", ha="center", va="center", transform=axes.transAxes, fontsize=7)
        return
    most = np.nanmax(np.abs(shown))
    axes.imshow(shown, origin="lower", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    strehl = "" if np.isnan(row["strehl"]) else f"  S {row['strehl']:.2g}"
    axes.set_title(f"{row['rms']:.3g}{strehl}", fontsize=7, pad=2)
