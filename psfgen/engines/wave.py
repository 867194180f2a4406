"""Diffraction: the wavefront that leaves the lens, propagated to the sensor.

Every kernel is made twice, from points of the reference sphere on two grids that are half a step apart. Light repeats
beyond a period; where it overlaps, its waves add up in one and cancel in the other, so their mean is the kernel and
their difference its error. What both have in common is how roughly they draw the edge of the pupil.

Legend: P field points, F focus distances, W wavelengths, k kernel side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.engines import Aim, Deposits
from psfgen.engines.geometric import GeometricEngine
from psfgen.errors import ConfigError
from psfgen.optics.diffraction import Screen
from psfgen.optics.lens import Lens
from psfgen.optics.prescription import Prescription, foreign_surface
from psfgen.optics.pupil import exit_pupil_z_mm
from psfgen.optics.splat import normalise
from psfgen.optics.trace import variant
from psfgen.optics.wavefront import Beam, Look, Pupil, Sphere, Wavefront
from psfgen.plan import Plan

Array = NDArray[np.float64]

SHIFTS = (0.0, 0.5)
LEAST_SIDE = 64  # points of the sphere a side: enough to draw the edge of the pupil
TAIL_AIRY = 12.0  # what a period is wider than kernel and light need, in Airy radii
FINER = math.sqrt(2)
TINY = 1e-30
EDGE = 30.0  # error of a kernel by the edge of the pupil, times the square of the points a side: the worst measured
LINES = (3, 5, 9, 17, 33)  # wavelengths of a band, after Gauss and Legendre: as many as it takes


@dataclass(frozen=True)
class Line:
    """A wavelength of a band: its share of the light, and the lens there."""

    wavelength_mm: float
    share: float
    surfaces: Prescription


class WaveEngine(GeometricEngine):
    """Kernels of points whose light is coherent, of bands whose wavelengths are not."""

    by_radius = False

    def __init__(self, lens: Lens, plan: Plan) -> None:
        if foreign := foreign_surface(lens.geo.surfaces):
            raise ConfigError(
                f"engine {plan.config.engine} does not know {foreign} of lens {lens.name}; use engine geometric"
            )
        super().__init__(lens, plan)
        config = plan.config
        self.margins = (1.0, 1.0)
        self.screen = Screen(config.kernel_px, self.pitch_mm, config.response)
        self.exit_pupil_z_mm = exit_pupil_z_mm(lens, self.tracer)
        for wavelength_um in config.wavelength:
            ends_um = tuple(wavelength_um + sign * config.bandwidth_um / 2 for sign in (-1, 1))
            lens.check_wavelengths(ends_um, cure="choose another --wavelength or a smaller --bandwidth-um")
        self.levels = len(LINES) if config.bandwidth_um else 1
        self._lines: dict[tuple[int, int], list[Line]] = {}

    def deposit(self, aim: Aim) -> Deposits:
        """Propagate the beams of field points."""
        points, focuses, waves, k = len(aim.of_point), len(aim.sensor_z_mm), len(self.config.wavelength), self.kernel_px
        halves = np.zeros((points, focuses, waves, 2, k, k), np.float32)
        throughput, floor, rays = np.zeros((points, waves)), np.zeros((points, focuses, waves)), 0
        with one_thread():
            for p, w in np.ndindex(points, waves):
                band = Band(self, aim, p, w)
                for f in range(focuses):
                    halves[p, f, w], floor[p, f, w] = band.kernel(f)
                throughput[p, w] = band.throughput
                rays += band.rays
        captured = np.minimum(halves.sum(axis=(-3, -2, -1), dtype=float), 1.0)
        chief_mm, throughput = self._chief_mm(aim), np.minimum(throughput, 1.0)
        return Deposits(halves, throughput, captured, chief_mm, rays, self.margins, floor=floor)

    def lines(self, w: int, level: int = 0) -> list[Line]:
        """The wavelengths that stand for a band, and their shares of its light."""
        if (w, level) not in self._lines:
            config = self.config
            nodes, shares = np.zeros(1), np.full(1, 2.0)
            if config.bandwidth_um:
                nodes, shares = np.polynomial.legendre.leggauss(LINES[level])
            lines_um = config.wavelength[w] + config.bandwidth_um / 2 * nodes
            self._lines[w, level] = [
                Line(line_um / 1000, share / 2, variant(self.lens, line_um, clip=True, to_stop=False))
                for line_um, share in zip(lines_um.tolist(), shares.tolist(), strict=True)
            ]
        return self._lines[w, level]

    def look(self, aim: Aim, p: int, surfaces: Prescription) -> Look:
        """A first look at the light of field point p."""
        u, lens = aim.of_point[p], self.lens
        beam = (aim.slope[u], aim.inverse_mm, aim.centre_mm[u], aim.axes_mm[u], lens.pupil_z_mm, lens.pupil_r_mm)
        return Look.at(Beam(surfaces, *beam))

    def sphere(self, aim: Aim, p: int, f: int) -> Sphere:
        """The reference sphere of field point p at focus distance f, of all wavelengths."""
        centre_mm = np.array([*aim.chief_mm[aim.of_point[p], f], aim.sensor_z_mm[f]])
        from_pupil = centre_mm - [0.0, 0.0, self.exit_pupil_z_mm]
        return Sphere(centre_mm, math.copysign(1 / float(np.linalg.norm(from_pupil)), from_pupil[2]))


class Band:
    """The light of one field point in a band of wavelengths, which do not interfere."""

    def __init__(self, engine: WaveEngine, aim: Aim, p: int, w: int) -> None:
        self.engine, self.aim, self.p, self.w = engine, aim, p, w
        self._lights: dict[int, list[Light]] = {}

    def lights(self, level: int) -> list[Light]:
        """At more wavelengths, the higher the level."""
        if level not in self._lights:
            lines = self.engine.lines(self.w, level)
            self._lights[level] = [Light(self.engine, self.aim, self.p, line) for line in lines]
        return self._lights[level]

    @property
    def throughput(self) -> float:
        """How much of the light comes through, whatever the focus distance."""
        return sum(light.line.share * light.throughput for light in self.lights(0))

    @property
    def rays(self) -> int:
        """How many have been traced."""
        return sum(light.rays for lights in self._lights.values() for light in lights)

    def kernel(self, f: int) -> tuple[NDArray[np.float32], float]:
        """The two halves [2, k, k] of a kernel, in shares of the light, and the error that they have in common.

        Wavelengths are added until that changes less than the tolerance; what it last changed counts as error.
        """
        tolerance = self.engine.config.tolerance
        found, error = self._sum(f, 0)
        for level in range(1, self.engine.levels):
            before = found.sum(axis=0)
            found, error = self._sum(f, level)
            apart = float(np.linalg.norm(found.sum(axis=0) - before)) / max(float(np.linalg.norm(before)), TINY)
            error += apart
            if tolerance is None or apart <= tolerance:
                break
        return found, error

    def _sum(self, f: int, level: int) -> tuple[NDArray[np.float32], float]:
        k, error = self.engine.kernel_px, 0.0
        halves = np.zeros((2, k, k), np.float32)
        for light in self.lights(level):
            found, its = light.halves(light.pupil(f))
            halves += light.line.share * found
            error += light.line.share * its
        return halves, error


class Light:
    """The light of one field point and wavelength: `rays` of it were traced."""

    def __init__(self, engine: WaveEngine, aim: Aim, p: int, line: Line) -> None:
        self.engine, self.aim, self.p, self.line = engine, aim, p, line
        self.look = engine.look(aim, p, line.surfaces)
        self.rays = len(self.look)

    @property
    def throughput(self) -> float:
        """How much of the light comes through, whatever the focus distance."""
        return self.look.flux / (math.pi * self.engine.lens.pupil_r_mm**2) if self.look.lit else 0.0

    def pupil(self, f: int) -> Pupil:
        """What is lit of the reference sphere at one focus distance."""
        return Pupil.of(self.look, self.engine.sphere(self.aim, self.p, f))

    def halves(self, pupil: Pupil) -> tuple[NDArray[np.float32], float]:
        """The two halves [2, k, k] of a kernel, in shares of the light, and the error that they have in common."""
        if not pupil.lit:
            k = self.engine.kernel_px
            return np.zeros((len(SHIFTS), k, k), np.float32), 0.0
        config, least = self.engine.config, self.side(pupil)
        most = math.isqrt((config.spp or config.spp_max) // len(SHIFTS))
        side = most if config.spp else min(most, least)
        while True:
            found = np.stack([self._half(pupil, side, shift) for shift in SHIFTS]).astype(np.float32)
            error = EDGE / side**2
            if side < min(least, self._without_tail(pupil)):  # the window holds light twice, and both halves do
                found = np.stack([found.sum(axis=0), np.zeros_like(found[0])])
            noise = math.hypot(normalise(found, config.bins).noise, error)
            if config.tolerance is None or side >= most or noise <= config.tolerance:
                return found, error
            side = min(most, math.ceil(FINER * side))

    def side(self, pupil: Pupil) -> int:
        """Points of the sphere a side for which the light does not overlap in the window once it repeats."""
        return max(LEAST_SIDE, math.ceil(self._without_tail(pupil) + TAIL_AIRY * 1.22))

    def _without_tail(self, pupil: Pupil) -> float:
        """The same of the light that geometry knows of."""
        window_mm = (self.engine.kernel_px + 1) * self.engine.pitch_mm
        period_mm = window_mm / 2 + max(pupil.reach_mm, window_mm / 2)
        return period_mm * pupil.width / self.line.wavelength_mm

    def _half(self, pupil: Pupil, side: int, shift: float) -> Array:
        wavefront = Wavefront.of(pupil, pupil.width / side, shift)
        self.rays += wavefront.rays
        light = self.engine.screen.light(wavefront, self.line.wavelength_mm)
        if not wavefront.flux:
            return np.zeros_like(light)
        return np.maximum(light, 0) / (wavefront.flux * len(SHIFTS))  # rounding may leave less than nothing


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that no bit depends on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
