"""The blur that depth and focus make in a perfect lens.

What lies at a distance d is in focus f^2 / (d - s0) behind the rear focal point (Newton's equation; s0: where the front
focal point lies), and there stands the sensor that is focused at it. So the blur between a depth and a focus is known
wherever it is asked for, trained on or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.store import Store

Array = NDArray[np.float64]

FNUM = 2.0  # assumed of a lens that is not stopped down; a map's own coefficient corrects it
ROUNDS = 5  # until the focal length of a thin lens agrees with where its front focal point lies
CLOSEST = 0.9  # of the way to the lens lies the front focal point, at most, of what is as close as can be


@dataclass(frozen=True)
class Newton:
    """Newton's equation; `gain` turns mm along the axis into a radius of blur in half windows.

    It is written for numbers, NumPy arrays and tensors alike.
    """

    gain: float
    f2_mm2: float
    s0_mm: float

    def defocus(self, depth_dioptre: Any, focus_dioptre: Any) -> Any:
        """The radius of the blur of a point, in half windows; negative where its rays meet behind the sensor.

        Dioptres are 1000 / mm, 0 of what is infinitely far. Arguments broadcast.
        """
        return self.gain * (self._behind_mm(focus_dioptre) - self._behind_mm(depth_dioptre))

    def _behind_mm(self, dioptre: Any) -> Any:
        return self.f2_mm2 * dioptre / (1000 - self.s0_mm * dioptre)


def newton_of(stores: Sequence[Store]) -> Newton:
    """The equation of the lens of some stores: from where their sensor stood, which obeys it.

    Three focus distances tell all of it. Of two, the lens is taken to be thin; of one, to have the focal length of a
    normal lens too, the diagonal of the sensor. What that leaves is for the terms of a ray map.
    """
    sensors = [
        (1000 / float(focus_mm), float(np.mean(z_mm)))
        for store in stores
        for focus_mm, z_mm in store.attrs["sensor_z_mm"].items()
    ]
    dioptre, z_mm = np.array(sensors).T
    nearest = max(float(store.coords[f"{name}_dioptre"].max()) for store in stores for name in ("depth", "focus"))
    attrs, kernel_px = stores[0].attrs, len(stores[0].coords["kx"])
    f2_mm2, s0_mm = _lens(dioptre, z_mm - z_mm.mean(), float(np.hypot(*attrs["sensor_mm"])), nearest)
    half_window_mm = kernel_px * attrs["pitch_um"] / 2000
    return Newton(1 / (2 * (attrs["config"]["fnum"] or FNUM) * half_window_mm), f2_mm2, s0_mm)


def _lens(dioptre: Array, z_mm: Array, normal_mm: float, nearest: float) -> tuple[float, float]:
    """(f^2, s0) of sensors at `z_mm`, which are 0 in the mean, focused at some dioptres.

    (z - z0) (1000 - s0 D) = f^2 D is linear in z0, s0 and f^2 - z0 s0.
    """
    known, most_mm = len(np.unique(dioptre)), CLOSEST * 1000 / max(nearest, 1e-9)
    ones = np.full_like(dioptre, 1000.0)
    if known > 2:
        z0, rest, s0_mm = _least_squares([ones, dioptre, z_mm * dioptre], 1000 * z_mm)
        if rest + z0 * s0_mm > 0 and s0_mm < most_mm:
            return rest + z0 * s0_mm, s0_mm
    f_mm = normal_mm
    for _ in range(ROUNDS if known > 1 else 0):
        _, f2_mm2 = _least_squares([ones, 1000 * dioptre / (1000 - min(f_mm, most_mm) * dioptre)], 1000 * z_mm)
        f_mm = float(np.sqrt(max(f2_mm2, 0.0)))
    return f_mm**2, min(f_mm, most_mm)


def _least_squares(columns: list[Array], wanted: Array) -> list[float]:
    found: list[float] = np.linalg.lstsq(np.stack(columns, axis=1), wanted)[0].tolist()
    return found
