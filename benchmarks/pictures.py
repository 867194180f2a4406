"""The pictures of docs/rendering.md: which part of the pupil is open, and how the error falls with the rays.

python benchmarks/pictures.py [FOLDER]      (default: docs/images)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from psfgen.config import RenderConfig
from psfgen.engines.geometric import GeometricEngine
from psfgen.optics import pupil
from psfgen.optics.splat import normalise
from psfgen.render import load

LENS, CORNER, DEPTH_MM = "double_gauss", (1.0, 1.0), 2000.0
SAMPLES = {"random": "tab:red", "sobol": "tab:orange", "spiral": "tab:blue"}
RAYS = [2**n for n in range(8, 18)]


def engine_of(**changes: object) -> GeometricEngine:
    config = RenderConfig(lens=LENS, depth=DEPTH_MM, focus="1.5m,2m,3m", wavelength=0.55, device="cpu", **changes)  # type: ignore[arg-type]
    return GeometricEngine(*load(config, "cpu"))


def draw_pupil() -> Figure:
    """Open and blocked rays of a coarse look, and the ellipse that is launched at, over the field."""
    engine = engine_of(spp=256)
    lens, unit = engine.lens, pupil.spiral(1500)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for number, r in enumerate((0.0, 0.6, 0.8, 1.0)):
        field = r * torch.tensor(CORNER, dtype=torch.float64)
        aim = engine.aim(field[None], DEPTH_MM)
        # The bundle stands on the +x side, as the symmetric path launches it.
        along = torch.tensor([r * np.sqrt(2.0), 0.0], dtype=torch.float64)
        rays = engine.tracer.trace(*pupil.aim(lens, along, DEPTH_MM, lens.pupil_r_mm * unit), lens.reference_um)
        axes = figure.add_subplot(1, 4, number + 1)
        x, y = lens.pupil_r_mm * unit.numpy().T
        axes.scatter(x, y, s=2, c=np.where(rays.valid.numpy(), "tab:blue", "0.8"))
        axes.add_patch(Circle((0, 0), lens.pupil_r_mm, fill=False, color="0.5"))
        turn = np.linspace(0, 2 * np.pi, 200)
        edge = aim.centre_mm[0][:, None] + aim.axes_mm[0] @ np.stack([np.cos(turn), np.sin(turn)])
        axes.plot(*edge, color="tab:red", linewidth=1.5)
        axes.set_aspect("equal")
        share = rays.valid.double().mean()
        area = np.abs(np.linalg.det(aim.axes_mm[0])) / lens.pupil_r_mm**2
        axes.set_title(
            f"{r:.0%} to the corner\nopen: {share:.0%} of the disc,\n{share / area:.0%} of the ellipse", fontsize=9
        )
        axes.set_xlabel("mm")
    return figure


def kernels(engine: GeometricEngine, unit_xy: torch.Tensor, field: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    engine.points = lambda count: engine.tracer.points(unit_xy)  # type: ignore[assignment]
    engine.config = engine.config.model_copy(update={"spp": len(unit_xy)})
    found = normalise(engine.deposit(engine.aim(field, DEPTH_MM)).halves, 15, engine.margins)
    return found.psf, found.noise


def draw_error() -> Figure:
    """True and stated error against rays, medians over places and focus distances."""
    field = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.4, 0.4], [0.7, 0.2], [1.0, 1.0]], dtype=torch.float64)
    engine = engine_of(spp=256)
    exact = np.mean([kernels(engine, pupil.spiral(2**20, turn), field)[0] for turn in (0.3, 1.7, 4.1)], axis=0)
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in SAMPLES.items():
        engine = engine_of(spp=256, sampling="sobol" if name == "sobol" else "spiral")
        true, stated = [], []
        for count in RAYS:
            r, angle = np.sqrt(rng.random(count)), 2 * np.pi * rng.random(count)
            unit = {
                "random": torch.from_numpy(np.stack([r * np.cos(angle), r * np.sin(angle)], -1)),
                "sobol": pupil.sobol(count, 5),
                "spiral": pupil.spiral(count, 1.0),
            }[name]
            psf, noise = kernels(engine, unit, field)
            true.append(np.median(np.linalg.norm(psf - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))))
            stated.append(np.median(noise))
        axes.loglog(RAYS, true, color=colour, label=f"{name}: true error")
        if name != "random":
            axes.loglog(RAYS, stated, color=colour, linestyle="--", label=f"{name}: stated noise")
    axes.axhline(0.03, color="0.7", linewidth=1)
    axes.text(RAYS[0], 0.031, "default tolerance", color="0.5", fontsize=8)
    axes.set_xlabel("rays per kernel")
    axes.set_ylabel("relative L2 error of a 64 x 64 kernel (median)")
    axes.legend(fontsize=8)
    axes.set_title(f"{LENS}, 5 places, 3 focus distances", fontsize=10)
    return figure


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    for name, draw in (("pupil", draw_pupil), ("error", draw_error)):
        draw().savefig(folder / f"{name}.png", dpi=110)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
