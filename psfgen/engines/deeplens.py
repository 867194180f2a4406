"""The reference engine: DeepLens's own `GeoLens.psf()`, one point at a time.

It samples the pupil at random and centres each kernel on a random ray near the chief ray, so its kernels
carry both kinds of scatter; it is here to be compared with, not to be used. What `psf()` does not tell
(throughput, captured, the chief ray) comes from the geometric engine.
"""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import torch

from psfgen.engines import Deposits
from psfgen.engines.geometric import GeometricEngine
from psfgen.errors import ConfigError
from psfgen.optics.lens import Lens
from psfgen.plan import Plan


class DeepLensEngine:
    """Two calls of `psf()` a kernel, with half the rays each."""

    concurrent = False  # it moves the sensor and draws from torch's global generator

    def __init__(self, lens: Lens, plan: Plan) -> None:
        if math.inf in plan.config.depth:
            raise ConfigError("depth inf: engine deeplens images finite distances only; use engine geometric")
        self.geometric = GeometricEngine(lens, plan)
        self.batch = self.geometric.batch
        self.sensor_z_mm = self.geometric.sensor_z_mm
        self.lens, self.config, self.geo = lens, plan.config, lens.geo
        self.geo.pixel_size = self.geometric.pitch_um / 1000

    def deposit(self, field_xy: torch.Tensor, depth_mm: float) -> Deposits:
        """Deposits of the field points [P, 2] at one depth."""
        known = self.geometric.deposit(field_xy, depth_mm)
        halves = np.empty_like(known.halves)
        for p, (x, y) in enumerate(field_xy.tolist()):
            for f, z_mm in enumerate(self.sensor_z_mm):
                self.geo.d_sensor = z_mm
                for w, wavelength_um in enumerate(self.config.wavelength):
                    for half in range(2):
                        seed = [self.config.seed, *np.array([x, y, depth_mm]).view(np.uint64).tolist(), f, w, half]
                        halves[p, f, w, half] = self._psf([x, y, -depth_mm], wavelength_um, seed)
        # Each half sums to 1; in shares of the valid rays they weigh what the window captures.
        halves *= known.captured[..., None, None, None]
        captured = np.where(halves.sum(axis=(-3, -2, -1)) > 0, known.captured, 0.0)
        return Deposits(halves, known.throughput, captured, known.chief_mm, known.rays * (1 + len(self.sensor_z_mm)))

    def _psf(self, point: list[float], wavelength_um: float, seed: list[int]) -> np.ndarray:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            kernel = self.geo.psf(
                points=torch.tensor(point, dtype=torch.float64),
                ks=self.config.kernel_px,
                wvln=wavelength_um,
                spp=self.config.spp // 2,
                model="geometric",
                recenter=True,
            )
        return np.asarray(kernel.detach().cpu(), dtype=np.float64)
