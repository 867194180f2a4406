"""The pictures of docs/diffraction.md: kernels through focus, of engines geometric and wave side by side.

python benchmarks/diffraction_pictures.py [FOLDER]      (default: docs/images)
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffraction import WAVELENGTH_UM, Array, Place, rel_l2  # first: it keeps numeric libraries to one thread

# isort: split
import torch
from matplotlib.figure import Figure

from psfgen.store.colour import stretch

DEPTHS = (-4, -2, -1, 0, 1, 2, 4)
LENSES = {"phone": (None, 0.53), "double_gauss": (8.0, 1.0)}  # stopped down to, um between samples
BAR_UM = 10


def through_focus(place: Place, engine: str) -> list[Array]:
    """Kernels [k, k] at so many depths of focus from the best sensor position of the axis."""
    step_mm = place.shot().depth_of_focus_mm
    return [place.shot(engine, depths * step_mm, tolerance=0.003).kernel() for depths in DEPTHS]


def draw(lens: str) -> Figure:
    """Two rows for the axis and two for 0.7 field."""
    fnum, pitch_um = LENSES[lens]
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    places = [Place(lens, fnum, pitch_um, field) for field in (0.0, 0.7)]
    tiles = figure.subplots(4, len(DEPTHS))
    for i, place in enumerate(places):
        kernels = {engine: through_focus(place, engine) for engine in ("geometric", "wave")}
        for j, pair in enumerate(zip(*kernels.values(), strict=True)):
            for axes, kernel in zip(tiles[2 * i : 2 * i + 2, j], pair, strict=True):
                axes.imshow(stretch(kernel), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            tiles[2 * i, j].set_xlabel(f"rel. L2 {rel_l2(*pair):.0%}", fontsize=9)
        for axes, engine in zip(tiles[2 * i : 2 * i + 2, 0], kernels, strict=True):
            axes.set_ylabel(f"{f'{place.field:g} field' if place.field else 'axis'}\n{engine}", fontsize=10)
    for axes, depths in zip(tiles[0], DEPTHS, strict=True):
        axes.set_title(f"{depths:+d}" if depths else "in focus", fontsize=10)
    bar = tiles[0, 0]
    bar.plot([4, 4 + BAR_UM / pitch_um], [58, 58], color="white", linewidth=2)
    bar.text(4, 55, f"{BAR_UM} um", color="white", fontsize=8)
    shot = places[0].shot()
    figure.suptitle(
        f"{lens}, F/{shot.engine.lens.fnum:.3g}, {WAVELENGTH_UM} um, samples of {pitch_um:g} um; columns: sensor moved "
        f"by depths of focus, {1000 * shot.depth_of_focus_mm:.3g} um each\ntiles scaled to their own peak, gamma 2.2",
        fontsize=10,
    )
    return figure


def main() -> None:
    """Draw both."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    for lens in LENSES:
        path = folder / f"focus_{lens}.png"
        draw(lens).savefig(path, dpi=100)
        print(path)


if __name__ == "__main__":
    main()
