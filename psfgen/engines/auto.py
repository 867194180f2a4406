"""Diffraction where it can be seen and afforded, geometry elsewhere, and a gradual change between.

The points of the reference sphere that a kernel needs grow with its aberrations and with the samples beside the Airy
disc. Where they are few, the kernel is that of engine wave. Where they are many, diffraction does little more than blur
the geometric kernel by the Airy disc, and that is done. Between, the two are blended.

Legend: P field points, F focus distances, W wavelengths, k kernel side.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from psfgen.engines import Aim, Deposits
from psfgen.engines.geometric import GeometricEngine
from psfgen.engines.wave import Band, WaveEngine, one_thread
from psfgen.optics.lens import Lens
from psfgen.optics.splat import weights
from psfgen.plan import Plan

Array = NDArray[np.float64]

# Points of the sphere a side: up to the first all is of engine wave, from the second on all is geometric.
WAVE_SIDE, GEOMETRIC_SIDE = 256, 512


class AutoEngine(WaveEngine):
    """Chooses for every kernel; `model` of its deposits says what."""

    def __init__(self, lens: Lens, plan: Plan) -> None:
        super().__init__(lens, plan)
        self.geometric = GeometricEngine(lens, plan)
        self.geometric.by_radius = False
        self.margins = self.geometric.margins

    def deposit(self, aim: Aim) -> Deposits:
        """Propagate or count, as it fits."""
        found = self.geometric.deposit(aim)
        shares = np.divide(
            found.captured, weights(found.halves), out=np.zeros_like(found.captured), where=found.captured > 0
        )
        counted = found.halves * shares[..., None, None, None].astype(np.float32)
        halves, model, floor = np.empty_like(counted), np.zeros(shares.shape), np.zeros(shares.shape)
        rays = found.rays
        with one_thread():
            for p, w in np.ndindex(*found.throughput.shape):
                band = Band(self, aim, p, w)
                for f in range(model.shape[1]):
                    halves[p, f, w], model[p, f, w], floor[p, f, w] = self._blended(band, f, counted[p, f, w])
                rays += band.rays
        captured = np.minimum(halves.sum(axis=(-3, -2, -1), dtype=float), 1.0)
        return replace(
            found,
            halves=halves,
            captured=captured,
            rays=rays,
            margins=self.margins,
            model=np.where(captured > 0, model, np.nan),
            floor=floor,
        )

    def _blended(self, band: Band, f: int, counted: NDArray[np.float32]) -> tuple[Array, float, float]:
        """The two halves [2, k, k] of a kernel, how much of engine wave is in them, and the error that both have."""
        lights = band.lights(0)
        pupils = [light.pupil(f) for light in lights]
        if not all(pupil.lit for pupil in pupils):
            return counted.astype(float), 0.0, 0.0
        side = max(light.side(pupil) for light, pupil in zip(lights, pupils, strict=True))
        share = _gradual(math.log(GEOMETRIC_SIDE / side) / math.log(GEOMETRIC_SIDE / WAVE_SIDE))
        halves, error = np.zeros(counted.shape), 0.0
        if share > 0:
            found, floor = band.kernel(f)
            halves, error = share * found.astype(float), share * floor
        if share < 1:
            middle = len(lights) // 2
            cycles = self.pitch_mm * pupils[middle].opening / lights[middle].line.wavelength_mm
            halves += (1 - share) * blurred(counted, cycles)
        return halves, share, error


def _gradual(x: float) -> float:
    """From 0 at 0 to 1 at 1, without a corner."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


def blurred(images: NDArray[np.float32], cycles: Array) -> Array:
    """Images [..., k, k] as a perfect lens blurs them, whose pupil is an ellipse: it passes no more than `cycles` [2]
    along x and y, per sample (Goodman, "Introduction to Fourier Optics", 3rd ed., 6.3).

    Beyond their edges images go on as mirrored there: what is larger than its window loses no light to the outside
    that it would not get back.
    """
    k = images.shape[-1]
    at = np.arange(k) / (2 * k)
    v = np.minimum(np.hypot(at / cycles[0], at[:, None] / cycles[1]), 1.0)
    passed = 2 / np.pi * (np.arccos(v) - v * np.sqrt(1 - v * v))
    found: Array = fft.idctn(fft.dctn(images, axes=(-2, -1)) * passed, axes=(-2, -1))
    return np.maximum(found, 0)
