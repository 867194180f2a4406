"""How fast kernels with diffraction are, and where they are needed; four tables, printed one after another.

    python benchmarks/diffraction.py [--part huygens|grid|cost|matters]... [--repeats 3] [--out FILE]

`huygens`: engine wave beside DeepLens's psf_huygens at equal error. `grid`: whole `psfgen render` commands. `cost`:
milliseconds a kernel, and errors, as a lens goes out of focus. `matters`: how far geometric kernels are from those with
diffraction. Times of single kernels are process CPU seconds of one thread, medians over repeats in which the
alternatives take turns; those of commands are wall seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from render import in_turn, spent  # first: it keeps numeric libraries to one thread

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import griddata
from tables import table_of

from psfgen.config import RenderConfig
from psfgen.engines import Aim, engine_class
from psfgen.engines.geometric import GeometricEngine
from psfgen.engines.wave import Light, WaveEngine
from psfgen.optics import pupil
from psfgen.optics.wavefront import Wavefront
from psfgen.render import load

Array = NDArray[np.float64]

WAVELENGTH_UM, FAR_MM, KERNEL_PX = 0.55, 10_000.0, 64
FINEST = 2**20  # points of the sphere of a reference
FIRST_RAYS, MOST_RAYS, RANDOM_RAYS = 1024, 3 * 2**13, 2**15  # of psf_huygens
NEARLY = 0.9  # its error falls about as rays^-NEARLY
RADII, ANGLES = 64, 128  # of a table of densities


@dataclass(frozen=True)
class Place:
    """One field point of a lens, at 10 m and in focus there, and samples `pitch_um` apart (None: the lens's own)."""

    lens: str
    fnum: float | None
    pitch_um: float | None
    field: float  # share of the field that the lens is made for, along x: so geometric bundles need no turn

    @property
    def title(self) -> str:
        stopped = f" F/{self.fnum:g}" if self.fnum else ""
        return f"{self.lens}{stopped}, {f'{self.field:g} field' if self.field else 'axis'}"

    def shot(self, engine: str = "wave", moved_mm: float = 0.0, **changes: Any) -> Shot:
        """An engine aimed there, whose sensor may have been moved."""
        given = {"kernel_px": KERNEL_PX, "depth": FAR_MM, "focus": FAR_MM, "wavelength": WAVELENGTH_UM}
        given |= {"reference_um": WAVELENGTH_UM, "fnum": self.fnum, "pitch_um": self.pitch_um, **changes}
        lens, plan = load(RenderConfig(lens=self.lens, engine=engine, device="cpu", **given), "cpu")
        found: GeometricEngine = engine_class(engine)(lens, plan)
        aim = found.aim(torch.tensor([[self.field * lens.field_max, 0.0]], dtype=torch.float64), FAR_MM)
        if moved_mm:
            z_mm = aim.sensor_z_mm + moved_mm
            aim = replace(aim, sensor_z_mm=z_mm, chief_mm=found._chief_of(aim.field_xy, FAR_MM, z_mm))
        return Shot(found, aim)


@dataclass(frozen=True)
class Shot:
    """An engine aimed at one field point."""

    engine: GeometricEngine
    aim: Aim

    def kernel(self) -> Array:
        """The kernel [k, k], of sum 1."""
        return unit_sum(self.engine.deposit(self.aim).halves[0, 0, 0].sum(axis=0, dtype=float))

    @property
    def light(self) -> Light:
        """What is known of its light before any kernel is made; of engine wave."""
        assert isinstance(self.engine, WaveEngine)
        return Light(self.engine, self.aim, 0, self.engine.lines(0)[0])

    @property
    def depth_of_focus_mm(self) -> float:
        return 2e-3 * WAVELENGTH_UM * self.engine.lens.fnum**2


def unit_sum(values: Any) -> Array:
    return np.asarray(values / values.sum(), dtype=np.float64)


def rel_l2(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- beside DeepLens's Huygens integral -------------------------------------------------------------------------------

# Samples such that the kernel with diffraction fills the window; point samples are all that psf_huygens knows.
AT_EQUAL_ERROR = [
    Place(lens, fnum, pitch_um, field)
    for lens, fnum, pitch_um in (("phone", None, 0.53), ("double_gauss", 8.0, 1.0), ("acl12708u", 8.0, 0.4))
    for field in (0.0, 0.7)
]


class Huygens:
    """DeepLens's psf_huygens in float64 at the place of a shot, by rays through given points of the entrance pupil.

    The point that a kernel is centred on is given too: by itself DeepLens would estimate it from random rays.
    """

    def __init__(self, place: Place) -> None:
        shot = place.shot(response="point")
        self.lens, self.aim = shot.engine.lens, shot.aim
        slope, inverse_mm = pupil.beam(self.lens, pupil.field_slopes(self.lens, self.aim.field_xy[0]), FAR_MM)
        z_mm = torch.tensor([self.lens.pupil_z_mm - 1 / inverse_mm], dtype=torch.float64)
        self.source = torch.cat([slope / inverse_mm, z_mm])
        chief, geo = torch.from_numpy(self.aim.chief_mm[0]), self.lens.geo
        geo.pixel_size, geo.dtype = shot.engine.pitch_mm, torch.float64
        geo.d_sensor = torch.tensor(self.aim.sensor_z_mm[0])
        geo.psf_center = types.MethodType(lambda geo, points, method: chief, geo)

    def kernel(self, unit_xy: Array) -> Array:
        """The kernel [k, k] of the points [N, 2] of the unit disc."""
        from deeplens.light import Ray

        at = self.lens.pupil_r_mm * torch.from_numpy(unit_xy)
        towards = torch.cat([at, torch.full_like(at[:, :1], self.lens.pupil_z_mm)], dim=1) - self.source
        towards = towards / towards.norm(dim=1, keepdim=True)
        source = self.source.expand(towards.shape)

        def rays(geo: Any, points: Any, num_rays: int, wvln: float) -> Any:
            return Ray(source.clone()[None], towards[None], wvln)

        geo = self.lens.geo
        geo.sample_from_points = types.MethodType(rays, geo)
        found = geo.psf_huygens([0.0, 0.0, -FAR_MM], ks=KERNEL_PX, wvln=WAVELENGTH_UM, spp=len(unit_xy))
        return unit_sum(found.numpy())


def random_points(count: int) -> Array:
    """As DeepLens draws them: at random, uniform over the entrance pupil [N, 2]."""
    rng = np.random.default_rng(0)
    r, angle = np.sqrt(rng.random(count)), 2 * np.pi * rng.random(count)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1)


class BestPoints:
    """Points of the entrance pupil that suit psf_huygens best: a spiral, drawn out until it is as dense as amplitude.

    Each of its rays adds the same amplitude (but for a factor by its slant, taken out here), where light would have it
    add the same power; uniform points would converge to another kernel.
    """

    def __init__(self, shot: Shot) -> None:
        lit = shot.light.pupil(0)
        sides = [np.linspace(low, high, 40) for low, high in zip(lit.low, lit.high, strict=True)]
        u, area = lit.aimed(*sides)
        upright = np.sqrt(1 - sum(np.square(q) for q in np.meshgrid(*sides, indexing="ij")))
        dense = 1 / (np.sqrt(area) * upright * (1 + upright))
        near = np.hypot(*u) < 1.1
        self.area, self.angle = np.linspace(0, 1, RADII + 1), np.linspace(0, 2 * np.pi, ANGLES + 1)
        r, angle = np.sqrt((self.area[1:] + self.area[:-1]) / 2), self.angle[:, None]
        at = np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1)
        found = griddata(u[:, near].T, dense[near], at, method="linear", fill_value=0.0)
        self.within = np.pad(found.cumsum(axis=1), ((0, 0), (1, 0)))  # [angles, areas]

    def __call__(self, count: int) -> Array:
        """So many [N, 2]."""
        n = np.arange(count)
        along = self.within[:, -1]
        up_to = np.append(0, ((along[1:] + along[:-1]) / 2).cumsum())
        angle = np.interp(n * (math.sqrt(5) - 1) / 2 % 1 * up_to[-1], up_to, self.angle)
        row, part = np.divmod(angle / self.angle[1], 1)
        row = np.minimum(row.astype(int), ANGLES - 1)
        within = (1 - part[:, None]) * self.within[row] + part[:, None] * self.within[row + 1]
        wanted = (n + 0.5) / count * within[:, -1]
        r = np.sqrt([np.interp(*of) for of in zip(wanted, within, np.tile(self.area, (count, 1)), strict=True)])
        return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1)


def fewest_rays(error_of: Callable[[int], float], wanted: float) -> tuple[int, float]:
    """The fewest rays, nearly, with which the error is as wanted, and that error; or else the most that are tried."""
    count = FIRST_RAYS
    while (error := error_of(count)) > wanted and count < MOST_RAYS:
        count = min(MOST_RAYS, math.ceil(count * min(max((error / wanted) ** (1 / NEARLY), 1.15), 8.0)))
    return count, error


def beside_huygens(repeats: int) -> Iterator[str]:
    """Errors and times of both, and their ratio."""
    rows, ratios = [], []
    for place in AT_EQUAL_ERROR:
        row, found = compared(place, repeats)
        print(*row, sep="  ", file=sys.stderr, flush=True)
        rows.append(row)
        ratios.append(found)
    head = ["", "error of wave", "ms a kernel", f"error of {RANDOM_RAYS} random rays", "s a kernel", "ratio"]
    yield from table_of([*head, "rays laid out for it", "error", "s a kernel", "ratio"], rows)
    yield ""
    for name, of in zip(("random rays", "rays laid out"), zip(*ratios, strict=True), strict=True):
        yield f"Ratio with {name}: geometric mean {statistics.geometric_mean(of):,.0f}x, least {min(of):,.0f}x."


def compared(place: Place, repeats: int) -> tuple[list[str], tuple[float, float]]:
    """A row of the table, and the ratios of the times with random rays and with those laid out: lower bounds where
    Huygens errs more than we do.
    """
    ours, theirs = place.shot(response="point"), Huygens(place)
    exact = place.shot(response="point", spp=FINEST).kernel()
    error, points = rel_l2(ours.kernel(), exact), BestPoints(ours)
    count, _ = fewest_rays(lambda some: rel_l2(theirs.kernel(points(some)), exact), error)
    best, chance = points(count), random_points(RANDOM_RAYS)
    works = {
        "random": lambda: theirs.kernel(chance),
        "laid out": lambda: theirs.kernel(best),
        "wave": ours.kernel,
    }
    seconds = alternately(works, repeats)
    row, ratios = [place.title, f"{100 * error:.3g} %", f"{1000 * seconds['wave']:.1f}"], []
    for name, rays in (("random", chance), ("laid out", best)):
        reached, ratio = rel_l2(theirs.kernel(rays), exact), seconds[name] / seconds["wave"]
        bound = "> " if reached > error else ""
        row += [f"{len(rays)}"] if name == "laid out" else []
        row += [f"{100 * reached:.3g} %", f"{seconds[name]:.1f}", f"{bound}{ratio:,.0f}x"]
        ratios.append(ratio)
    return row, (ratios[0], ratios[1])


def alternately(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each; all have been run before, and in each turn the quick get more runs."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(spent(work))
            while len(times[name]) % 7 and times[name][-1] < 1:
                times[name].append(spent(work))
    return {name: statistics.median(values) for name, values in times.items()}


# --- whole commands ---------------------------------------------------------------------------------------------------

GRID = "--lens phone --grid 20 --depth 1.5m --focus 0.5m:20m:4 --wavelength 0.45,0.55,0.65 --workers 2"
KERNELS = 20 * 20 * 4 * 3
BENT = "- {element: 0, decentre_mm: [0.002, -0.001]}\n"


def whole_grids(repeats: int) -> Iterator[str]:
    """Seconds of `psfgen render` for 4800 kernels, by each engine, of the design and of a lens without symmetry."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bent.yaml").write_text(BENT)
        for lens, options in (("as designed", []), ("as built", ["--perturb", f"{folder}/bent.yaml"])):
            for engine in ("geometric", "wave", "auto"):
                command = [*GRID.split(), "--engine", engine, *options]
                seconds = [rendering(folder, command) for _ in range(max(1, repeats // 2))]
                median = statistics.median(seconds)
                rows.append([engine, lens, f"{median:.1f}", f"{1000 * median / KERNELS:.1f}"])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
        start = rendering(folder, [*GRID.split(), "--engine", "wave", "--grid", "1"])
    yield from table_of(["engine", "phone lens", "s", "ms a kernel"], rows)
    yield ""
    yield f"`psfgen render {GRID} --engine NAME`: {KERNELS} kernels; some {start:.0f} s of each are its start."


def rendering(folder: str, options: list[str]) -> float:
    """Wall seconds of a render."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "psfgen", "render", *options, "--out", f"{folder}/psfs.zarr", "--overwrite"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


# --- what it costs out of focus ---------------------------------------------------------------------------------------


def cost(repeats: int) -> Iterator[str]:
    """Milliseconds a kernel as the sensor moves, in windows that hold the light, and how far they are from wave."""
    rows = []
    for waves in (0, 2, 5, 10, 20, 40, 80):
        fnum = 4.0
        moved_mm = waves * 8e-3 * WAVELENGTH_UM * fnum**2
        window_mm = max(KERNEL_PX * 1e-3, 2.2 * moved_mm / 2 / fnum)
        place = Place("double_gauss", fnum, 1000 * window_mm / KERNEL_PX, 0.0)
        shots = {name: place.shot(name, moved_mm) for name in ("wave", "auto", "geometric")}
        seconds = in_turn({name: shot.kernel for name, shot in shots.items()}, 3 * repeats)
        light, model = shots["wave"].light, shots["auto"].engine.deposit(shots["auto"].aim).model
        assert model is not None
        exact = shots["wave"].kernel()
        rows.append(
            [
                *(f"{waves}", f"{1000 * window_mm:.0f}", f"{light.side(light.pupil(0))}", f"{float(model.item()):.2f}"),
                *(f"{1000 * seconds[name]:.1f}" for name in shots),
                *(f"{100 * rel_l2(shots[name].kernel(), exact):.1f}" for name in ("auto", "geometric")),
            ]
        )
    head = ["waves of defocus", "window, um", "points a side", "`model` of auto"]
    yield from table_of([*head, *(f"{name}, ms" for name in shots), "auto: rel. L2, %", "geometric: rel. L2, %"], rows)


# --- where it matters -------------------------------------------------------------------------------------------------

DEPTHS = (0, 1, 2, 4, 8)
LENSES = [("phone", None), ("double_gauss", None), ("double_gauss", 8.0), ("acl12708u", None)]


def matters(repeats: int) -> Iterator[str]:
    """Relative L2 of geometric kernels against those with diffraction, at the lens's own samples; and obliquity."""
    rows, slanted = [], []
    for lens, fnum in LENSES:
        for field in (0.0, 0.7):
            place = Place(lens, fnum, None, field)
            sharp, away = place.shot(tolerance=0.003), []
            for depths in DEPTHS:
                moved_mm = depths * sharp.depth_of_focus_mm
                kernels = [place.shot(name, moved_mm, tolerance=0.003).kernel() for name in ("geometric", "wave")]
                away.append(f"{100 * rel_l2(*kernels):.1f}")
            lit = sharp.light.pupil(0)
            hits_mm = lit.seen.hits_mm[:, lit.look.open]
            airy_um = 1.22 * WAVELENGTH_UM / float(lit.opening.min())
            rms_um = 1000 * math.sqrt(hits_mm.var(axis=1).sum())
            sizes = [f"{airy_um:.1f}", f"{rms_um:.1f}", f"{1000 * sharp.engine.pitch_mm:.2f}"]
            rows.append([place.title, *sizes, *away])
            slanted.append(f"{place.title}: {100 * obliquity(sharp):.2f} %")
            print(*rows[-1], slanted[-1], sep="  ", file=sys.stderr, flush=True)
    head = ["", "Airy radius, um", "RMS radius, um", "sample, um", *(f"{depths}" for depths in DEPTHS)]
    yield from table_of(head, rows)
    yield ""
    yield f"By a factor (1 + cos) / 2 of the amplitude kernels would change by: {'; '.join(slanted)}."


def obliquity(shot: Shot) -> float:
    """By how much a kernel changes when amplitudes have the factor (1 + cos) / 2 of their slant."""
    assert isinstance(shot.engine, WaveEngine)
    lit, side = shot.light.pupil(0), 256
    step = lit.width / side
    wavefront = Wavefront.of(lit, step, 0.0)
    q = [
        step * (math.floor(low / step) + np.arange(n)) for low, n in zip(lit.low, wavefront.path_mm.shape, strict=True)
    ]
    upright = np.sqrt(1 - sum(np.square(some) for some in np.meshgrid(*q, indexing="ij")))
    plain, slanted = (
        unit_sum(shot.engine.screen.light(some, 1e-3 * WAVELENGTH_UM))
        for some in (wavefront, replace(wavefront, amplitude=wavefront.amplitude * (1 + upright) / 2))
    )
    return rel_l2(slanted, plain)


PARTS: dict[str, tuple[str, Callable[[int], Iterator[str]]]] = {
    "huygens": ("Engine wave beside DeepLens's psf_huygens, one core, kernels of 64 x 64", beside_huygens),
    "grid": ("Whole commands, two workers", whole_grids),
    "cost": ("Out of focus: double Gauss, F/4, axis, one core", cost),
    "matters": (
        "Relative L2 of geometric kernels against wave, in %, by depths of focus (2 x wavelength x F^2)",
        matters,
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="one of the tables")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the tables there too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    for part in given.part or PARTS:
        title, measure = PARTS[part]
        found = [f"### {title}", "", *measure(given.repeats), ""]
        print("\n".join(found), flush=True)
        lines += found
    if given.out:
        given.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
