"""The reference engine: DeepLens's own `GeoLens.psf()`, one point at a time.

It samples the pupil at random and centres each kernel on a random ray near the chief ray, so its kernels
carry both kinds of scatter; it is here to be compared with, not to be used. What `psf()` does not tell
(throughput, captured, the chief ray) comes from the geometric engine.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import replace

import numpy as np
import torch

from psfgen.engines import Aim, Deposits
from psfgen.engines.geometric import GeometricEngine
from psfgen.errors import ConfigError
from psfgen.optics.lens import Lens
from psfgen.plan import Plan


class DeepLensEngine(GeometricEngine):
    """Two calls of `psf()` a kernel, with half the rays each."""

    concurrent = False  # it moves the sensor and draws from torch's global generator
    threads_suffice = False

    def __init__(self, lens: Lens, plan: Plan) -> None:
        if math.inf in plan.config.depth:
            raise ConfigError("depth inf: engine deeplens images finite distances only; use engine geometric")
        if plan.config.spp is None:
            raise ConfigError("engine deeplens has no tolerance: give the rays per kernel with --spp")
        super().__init__(lens, plan)
        self.symmetric = False  # every kernel has random rays of its own
        self.margins = (1.0, 1.0)
        self.spp, self.geo = plan.config.spp, lens.geo
        self.geo.pixel_size = self.pitch_mm

    def deposit(self, aim: Aim) -> Deposits:
        """Deposits of field points."""
        known = super().deposit(aim)
        halves = np.empty_like(known.halves)
        for p, (x, y) in enumerate(aim.field_xy.tolist()):
            for f, z_mm in enumerate(aim.sensor_z_mm.tolist()):
                self.geo.d_sensor = z_mm
                for w, wavelength_um in enumerate(self.config.wavelength):
                    for half in range(2):
                        place = np.array([x, y, aim.depth_mm, z_mm]).view(np.uint64).tolist()
                        seed = [self.config.seed, *place, w, half]
                        halves[p, f, w, half] = self._psf([x, y, -aim.depth_mm], wavelength_um, seed)
        # Each half sums to 1; in shares of the valid rays they weigh what the window captures.
        halves *= known.captured[..., None, None, None].astype(np.float32)
        captured = np.where(halves.sum(axis=(-3, -2, -1)) > 0, known.captured, 0.0)
        return replace(known, halves=halves, captured=captured, rays=known.rays * (1 + len(aim.sensor_z_mm)))

    def _psf(self, point: list[float], wavelength_um: float, seed: list[int]) -> np.ndarray:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            kernel = self.geo.psf(
                points=torch.tensor(point, dtype=torch.float64),
                ks=self.config.kernel_px,
                wvln=wavelength_um,
                spp=self.spp // 2,
                model="geometric",
                recenter=True,
            )
        return np.asarray(kernel.detach().cpu(), dtype=np.float64)
