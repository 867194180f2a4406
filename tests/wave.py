"""What tests of diffraction share: an engine of one field point, as designed or out of focus."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.config import RenderConfig
from psfgen.engines import Aim, Deposits, engine_class
from psfgen.engines.geometric import GeometricEngine
from psfgen.render import load

Array = NDArray[np.float64]
FOCAL_MM = 50.0


def perfect(folder: Path, fnum: float) -> str:
    """An ideal lens, f = 50 mm, as a file."""
    radius = FOCAL_MM / 2 / fnum
    document = {
        "sensor_size": [20.0, 20.0],
        "surfaces": [
            {"type": "Stop", "r": radius, "is_aperture": True, "d_next": 0.0},
            {"type": "ThinLens", "r": 1.01 * radius, "f": FOCAL_MM, "d_next": FOCAL_MM, "mat2": "air"},
        ],
    }
    path = folder / f"perfect-{fnum:g}.json"
    path.write_text(json.dumps(document))
    return str(path)


@dataclass(frozen=True)
class Shot:
    """An engine aimed at one field point, whose sensor may have been moved."""

    engine: GeometricEngine
    at: Aim

    @classmethod
    def of(cls, job: RenderConfig, field: tuple[float, float], moved_mm: float = 0.0) -> Shot:
        """`job` is of one depth and one focus distance."""
        lens, plan = load(job, "cpu")
        engine: GeometricEngine = engine_class(job.engine)(lens, plan)
        aim = engine.aim(torch.tensor([field], dtype=torch.float64), job.depth[0])
        aim.sensor_z_mm[:] += moved_mm
        if moved_mm:
            aim.chief_mm[...] = engine._chief_of(aim.field_xy, job.depth[0], aim.sensor_z_mm)
        return cls(engine, aim)

    @property
    def deposits(self) -> Deposits:
        found: Deposits = self.engine.deposit(self.at)
        return found

    @property
    def shares(self) -> Array:
        """The light on the samples [k, k], as a share of all of it."""
        found = self.deposits
        total = found.halves[0, 0, 0].sum(axis=0, dtype=float)
        return np.asarray(total * (found.captured[0, 0, 0] / total.sum()))


def alone(lens: str, pitch_um: float, wavelength_um: float = 0.55, **changes: Any) -> RenderConfig:
    """A job of one wavelength, far away and in focus there."""
    given = {"engine": "wave", "kernel_px": 64, "bins": 8, "tolerance": 0.003, "depth": math.inf, "focus": math.inf}
    return RenderConfig(
        **{
            "lens": lens,
            "pitch_um": pitch_um,
            "wavelength": wavelength_um,
            "reference_um": wavelength_um,
            **given,
            **changes,
        }
    )


def offsets(kernel_px: int, pitch: float) -> Array:
    """How far samples are from the middle [k, k]."""
    at = (np.arange(kernel_px) - (kernel_px - 1) / 2) * pitch
    return np.asarray(np.hypot(at, at[:, None]))
