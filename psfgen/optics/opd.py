"""How good a wavefront is: its differences in path over the entrance pupil, and the light they leave at the peak.

A point of the pupil is p / its radius, x and y as those of the scene. W is by how much the path of the ray through it
to the reference sphere is shorter than the mean: positive where the wavefront is ahead of the sphere (W. T. Welford,
"Aberrations of Optical Systems", 1986), opposite to the path in `wavefront`. The sphere is about the chief ray's image
at the reference wavelength, so tilt and lateral colour stay in W, and distortion, which moves that image, does not.
All open parts of the pupil weigh the same.

Legend: N cells of the pupil a side, M points of its edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from psfgen.optics import zernike
from psfgen.optics.wavefront import Look, Pupil, Sphere, Wavefront, coverage

Array = NDArray[np.float64]

CELLS = 96
LEAST_SIDE = 128  # directions a side for the peak
MOST_SIDE = 512
TAIL_AIRY = 12.0  # dark space about the light before it repeats
WHOLE = 1e-6  # a cell is, or is not at all, but for that
AT_EDGE = 1e-3  # how much a ray may stay within a rim, or beyond, to count as on it
ZOOM = 17  # points a side about the brightest sample


@dataclass(frozen=True)
class Opd:
    """W of one field point and wavelength, in waves; NaN where no ray is. Its reference is any."""

    waves: Array  # [N, N], x along the second axis and y up the first, from the bottom
    cover: Array  # [N, N] how much of a cell is open
    edge_waves: Array  # [M]

    @classmethod
    def of(cls, look: Look, sphere: Sphere, wavelength_mm: float) -> Opd:
        """As rays through a grid of the entrance pupil find it."""
        disc = replace(look.beam, centre_mm=np.zeros(2), axes_mm=look.beam.pupil_r_mm * np.eye(2))
        axis = (2 * np.arange(CELLS) + 1 - CELLS) / CELLS
        xy = np.array(np.meshgrid(axis, axis))
        with np.errstate(invalid="ignore"):  # rays that do not come through
            leaving = disc.trace(xy.reshape(2, -1))
            clear = leaving.paths.clear.reshape(CELLS, CELLS)
            cover, _ = coverage(clear)
            edge = disc.trace(_on_edge(xy, clear, cover))
            edge_waves = -edge.on(sphere).path / wavelength_mm
            waves = -leaving.on(sphere).path.reshape(CELLS, CELLS) / wavelength_mm
        cover[~np.isfinite(waves)] = 0
        return cls(waves, cover, edge_waves[np.isfinite(edge_waves) & (np.abs(edge.paths.clear) < AT_EDGE)])

    @property
    def open(self) -> float:
        """The share of the pupil's area that is."""
        return min(1.0, float(self.cover.sum()) / (math.pi / 4 * CELLS**2))

    @property
    def pv(self) -> float:
        """From the least to the greatest, up to the very edge."""
        found = np.concatenate([self.waves[self.cover > 0.5], self.edge_waves])
        return float(np.ptp(found))

    @property
    def map(self) -> Array:
        """W [N, N], mean 0; NaN where it is dark."""
        shown: Array = np.where(self.cover > 0.5, self.waves - np.average(self._lit, weights=self._weights), np.nan)
        return shown

    def rms(self, without: int = 1) -> float:
        """After the best fit of the first `without` of piston, two tilts and defocus has been taken away."""
        left = self._lit - self._fit(basis := zernike.terms("noll", without, self._xy)) @ basis
        return math.sqrt(float(np.average(np.square(left), weights=self._weights)))

    def coefficients(self, order: str, count: int = zernike.COUNT) -> Array:
        """Of the first Zernike polynomials of an order, fitted together over what is open. Piston is 0."""
        found = self._fit(zernike.terms(order, count, self._xy))
        found[0] = 0
        return found

    def _fit(self, basis: Array) -> Array:
        """Least squares [T] for the functions [T, points]."""
        root = np.sqrt(self._weights)
        solved: Array = np.linalg.lstsq((basis * root).T, (self._lit - self._lit.mean()) * root, rcond=None)[0]
        solved[0] += self._lit.mean()
        return solved

    @property
    def _lit(self) -> Array:
        return self.waves[self.cover > 0]

    @property
    def _weights(self) -> Array:
        return self.cover[self.cover > 0]

    @property
    def _xy(self) -> Array:
        row, column = np.nonzero(self.cover > 0)
        return (2 * np.stack([column, row]) + 1 - CELLS) / CELLS


def _on_edge(xy: Array, clear: Array, cover: Array) -> Array:
    """The points [2, M] of the edge that are nearest to the cells across it."""
    across = (cover > WHOLE) & (cover < 1 - WHOLE)
    slope_y, slope_x = np.gradient(clear)
    steep = slope_x**2 + slope_y**2
    moves = [-(clear * slope / steep)[across] * 2 / CELLS for slope in (slope_x, slope_y)]
    found: Array = xy[:, across] + np.stack(moves)
    return found


@dataclass(frozen=True)
class Strehl:
    """The light at a point of the sensor beside that of the same pupil without aberration."""

    chief: float  # at the image of the chief ray
    peak: float  # where it is brightest

    @classmethod
    def of(cls, look: Look, sphere: Sphere, wavelength_mm: float) -> Strehl:
        """|sum A exp(i k W)|^2 / (sum A)^2 of a beam. NaN where it would take too many rays: it is all but 0 there."""
        pupil = Pupil.of(look, sphere)
        tail_mm = TAIL_AIRY * 1.22 * wavelength_mm / pupil.width
        side = max(LEAST_SIDE, math.ceil(2 * (pupil.reach_mm + tail_mm) * pupil.width / wavelength_mm))
        if side > MOST_SIDE:
            return cls(math.nan, math.nan)
        return cls.at(Wavefront.of(pupil, pupil.width / side, 0.0), wavelength_mm)

    @classmethod
    def at(cls, wavefront: Wavefront, wavelength_mm: float) -> Strehl:
        """That of a wavefront."""
        field = wavefront.field(wavelength_mm)
        ideal = float(wavefront.amplitude.sum()) ** 2
        chief = abs(complex(field.sum())) ** 2
        return cls(chief / ideal, max(chief, _brightest(field)) / ideal)


def _brightest(field: NDArray[np.complex128]) -> float:
    """The greatest |transform|^2: of the samples half an Airy radius apart, then about the greatest of them.

    Means over cells are a field that was multiplied by the transform of a cell.
    """
    size = 2 * max(field.shape)
    faded = np.sinc(np.fft.fftfreq(size))
    found = np.abs(np.fft.fft2(field, s=(size, size)) / (faded[:, None] * faded)) ** 2
    row, column = np.unravel_index(int(found.argmax()), found.shape)
    near = np.linspace(-1, 1, ZOOM)
    at = [(np.array(start) + near)[:, None] for start in (row, column)]
    along, across = (
        np.exp(-2j * np.pi * place * np.arange(side) / size) / np.sinc((place / size + 0.5) % 1 - 0.5)
        for place, side in zip(at, field.shape, strict=True)
    )
    return float((np.abs(along @ field @ across.T) ** 2).max())
