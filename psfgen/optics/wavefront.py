"""The wavefront that leaves a lens: path and amplitude on the reference sphere, on a regular grid.

The sphere is centred on the point R of the sensor where the kernel is, and passes through the exit pupil. A ray meets
it at the point R - q / c, c its curvature and q a unit vector; W is the path of the ray to there, but for a constant.
At (x, y) from R the field is the sum over the sphere of

    A(q) exp(i k (W(q) + q_x x + q_y y)),

where kernels are much smaller than the sphere (Born & Wolf, "Principles of Optics", 7th ed., 8.8 and 9.1). Where the
phase stands still the ray lands. Each ray carries the light of its part of the entrance pupil, so that A^2 dq = du;
that is the light that crosses the sensor, whatever its slant. All of it holds for c = 0, a pupil at infinity, where q
is the direction of the ray (Debye's integral), and for c < 0, a pupil behind the sensor.

x, y, q are upright: turned over against the coordinates of the lens. Lengths in mm.

Legend: N rays, J and K values of q_x and q_y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from torch import Tensor

from psfgen.optics.paths import Paths, trace_paths
from psfgen.optics.prescription import Prescription

Array = NDArray[np.float64]

LOOK = 40  # rays a side of a first look
REACH = 1.12  # radii of the launch area that it looks at
DEGREE = 9  # of the polynomial from directions to the pupil
LEAST_OPEN = 12
AT_ONCE = 2**15  # rays, for the memory they take
ASTRAY = 0.01  # of the width of a pupil: rays that miss their points by more are none of its light
DERIVED = np.array([chebyshev.chebder(row) for row in np.eye(DEGREE + 1)]).T  # [D - 1, D]


@dataclass(frozen=True)
class Beam:
    """The light of one field point and wavelength: rays through the points `centre_mm` + `axes_mm` @ u of the entrance
    pupil have the tangents p * inverse_mm - slope at p, as in `psfgen.optics.trace.Bundles`.
    """

    surfaces: Prescription
    slope: Array  # [2]
    inverse_mm: float
    centre_mm: Array  # [2]
    axes_mm: Array  # [2, 2]
    pupil_z_mm: float
    pupil_r_mm: float

    def trace(self, u: Array) -> Leaving:
        """Rays through the points u [2, N]."""
        p = self.centre_mm[:, None] + self.axes_mm[:, :1] * u[0] + self.axes_mm[:, 1:] * u[1]
        tangents = p * self.inverse_mm - self.slope[:, None]
        steep = np.sqrt(1 + np.square(tangents).sum(axis=0))
        chief = math.sqrt(1 + float(self.slope @ self.slope))
        # The path from the object to the pupil, less that through its centre: without cancellation, however far.
        path = (np.square(p).sum(axis=0) * self.inverse_mm - 2 * (self.slope[0] * p[0] + self.slope[1] * p[1])) / (
            steep + chief
        )
        path -= self.pupil_z_mm * steep
        course = np.concatenate([tangents, np.ones_like(steep)[None]]) / steep
        found = trace_paths(self.surfaces, p - tangents * self.pupil_z_mm, course)
        inside = 1 - np.square(p).sum(axis=0) / self.pupil_r_mm**2
        clear = np.minimum(found.clear, inside)
        upright = np.array([[-1.0], [-1.0], [1.0]])
        return Leaving(
            Paths(upright * found.xyz, upright * found.course, found.path + path, clear), self.surfaces.length_mm
        )


@dataclass(frozen=True)
class Leaving:
    """Rays behind the lens, upright."""

    paths: Paths
    last_vertex_mm: float

    def on(self, sphere: Sphere) -> OnSphere:
        """Where they meet a sphere."""
        course = self.paths.course
        towards = sphere.centre_mm[:, None] - [[0.0], [0.0], [self.last_vertex_mm]] - self.paths.xyz
        along = (course * towards).sum(axis=0)
        beside = along * course - towards  # from the centre to the foot of the perpendicular
        bent = sphere.curvature * beside
        with np.errstate(invalid="ignore"):  # rays that miss it
            root = np.sqrt(1 - np.square(bent).sum(axis=0))
        q = root * course - bent
        path = self.paths.path + along + (bent * beside).sum(axis=0) / (1 + root)
        return OnSphere(q[:2], path, (beside[:2] - beside[2] * q[:2] / q[2]) / root)


@dataclass(frozen=True)
class Sphere:
    """A reference sphere: the point R of the sensor [3] that it is about, and its curvature in 1/mm."""

    centre_mm: Array
    curvature: float


@dataclass(frozen=True)
class OnSphere:
    """Rays on a sphere: `q` [2, N], `path` W [N], and -dW/dq [2, N], where they land as seen from R; NaN where they
    miss the sphere.
    """

    q: Array
    path: Array
    hits_mm: Array


@dataclass(frozen=True)
class Look:
    """Some rays of a beam: the points u [2, N] of its launch area, and which of these send open ones."""

    beam: Beam
    u: Array
    rays: Leaving
    real: NDArray[np.bool_]
    open: NDArray[np.bool_]

    @classmethod
    def at(cls, beam: Beam) -> Look:
        """A first look at a beam."""
        side = np.linspace(-REACH, REACH, LOOK)
        u = np.array(np.meshgrid(side, side)).reshape(2, -1)
        u = u[:, np.square(u).sum(axis=0) < REACH**2]
        rays = beam.trace(u)
        real = np.isfinite(rays.paths.clear)
        return cls(beam, u, rays, real, real & (np.nan_to_num(rays.paths.clear) > 0))

    def __len__(self) -> int:
        return len(self.real)

    @property
    def lit(self) -> bool:
        """Whether enough rays come through to tell where the others go."""
        return int(self.open.sum()) >= LEAST_OPEN

    @property
    def flux(self) -> float:
        """The light that comes through, in mm^2 of the entrance pupil."""
        step = 2 * REACH / (LOOK - 1)
        clear = np.full((LOOK, LOOK), np.nan)
        # Of a round rim this is straight across it, which `clear` is not.
        clear[tuple(np.rint((self.u + REACH) / step).astype(int))] = 1 - np.sqrt(1 - self.rays.paths.clear)
        return float(coverage(clear)[0].sum() * step**2 * abs(np.linalg.det(self.beam.axes_mm)))


@dataclass(frozen=True)
class Pupil:
    """The lit part of a reference sphere: `low` and `high` [2] of q, as the rays of a look draw it that are `open`."""

    look: Look
    sphere: Sphere
    seen: OnSphere
    open: NDArray[np.bool_]
    low: Array
    high: Array

    @classmethod
    def of(cls, look: Look, sphere: Sphere) -> Pupil:
        """That of a beam."""
        seen = look.rays.on(sphere)
        lit = look.open & np.isfinite(seen.path)
        q = seen.q[:, lit] if lit.any() else np.zeros((2, 1))
        low, high = q.min(axis=1), q.max(axis=1)
        margin = 1.5 * (high - low) * REACH / (LOOK - 1)
        return cls(look, sphere, seen, lit, low - margin, high + margin)

    @property
    def lit(self) -> bool:
        """Whether enough rays meet it to tell where the others do."""
        return int(self.open.sum()) >= LEAST_OPEN

    @property
    def width(self) -> float:
        """Of the wider side."""
        return float((self.high - self.low).max())

    @property
    def opening(self) -> Array:
        """How wide it is [2]: the outermost rays that come through are half a step within its edge, on the average."""
        return np.asarray(np.ptp(self.seen.q[:, self.open], axis=1) * (1 + REACH / (LOOK - 1)))

    @property
    def reach_mm(self) -> float:
        """How far from the centre of the sphere rays land, along an axis."""
        return float(np.abs(self.seen.hits_mm[:, self.open]).max())

    @cached_property
    def _polynomial(self) -> Tensor:
        """Chebyshev coefficients [2, D, D] of u by q, scaled to -1 to 1."""
        near = self.look.real & (self.seen.q > self.low[:, None]).all(axis=0)
        near &= (self.seen.q < self.high[:, None]).all(axis=0)
        x, y = (chebyshev.chebvander(self._scaled(self.seen.q[i, near], i), DEGREE) for i in range(2))
        i, j = np.mgrid[: DEGREE + 1, : DEGREE + 1].reshape(2, -1)
        low_order = i + j <= DEGREE
        i, j = i[low_order], j[low_order]
        # Torch keeps to the threads it is given, numpy's solver takes all there are.
        basis, u = torch.from_numpy(x[:, i] * y[:, j]), torch.from_numpy(self.look.u[:, near].T)
        found = torch.zeros(2, DEGREE + 1, DEGREE + 1, dtype=torch.float64)
        found[:, i, j] = torch.linalg.lstsq(basis, u, driver="gelsy").solution.T
        return found

    def _scaled(self, q: Array, axis: int) -> Array:
        low, high = self.low[axis], self.high[axis]
        found: Array = (2 * q - (low + high)) / (high - low)
        return found

    def aimed(self, q_x: Array, q_y: Array) -> tuple[Array, Array]:
        """The points u [2, J, K] that send rays to the grid of q_x [J] and q_y [K], and the area du / dq [J, K], in
        mm^2 of the entrance pupil.
        """
        rows = [chebyshev.chebvander(self._scaled(q, i), DEGREE) for i, q in enumerate((q_x, q_y))]
        slopes = [
            chebyshev.chebvander(self._scaled(q, i), DEGREE - 1) @ DERIVED * 2 / (self.high[i] - self.low[i])
            for i, q in enumerate((q_x, q_y))
        ]  # [J or K, D]

        def summed(across: NDArray[Any], down: NDArray[Any]) -> Array:
            found: Array = (torch.from_numpy(across) @ self._polynomial @ torch.from_numpy(down).T).numpy()
            return found

        along_x, along_y = summed(slopes[0], rows[1]), summed(rows[0], slopes[1])
        area = np.abs(along_x[0] * along_y[1] - along_x[1] * along_y[0])
        return summed(*rows), area * abs(np.linalg.det(self.look.beam.axes_mm))


@dataclass(frozen=True)
class Wavefront:
    """W in mm and A on a grid [J, K] of q that is `step` apart; A is 0 where no light comes through.

    `hits_mm` [2, J, K] is where the rays land. `flux` is the light of all of it, in mm^2 of the entrance pupil, found
    from `rays` rays.
    """

    step: float
    path_mm: Array
    hits_mm: Array
    amplitude: Array
    flux: float
    rays: int

    @classmethod
    def of(cls, pupil: Pupil, step: float, shift: float) -> Wavefront:
        """That of a beam, on the grid whose lines are at (integer + shift) x step."""
        low, high = pupil.low / step - shift, pupil.high / step - shift
        sides = [step * (np.arange(math.floor(a), math.ceil(b) + 1) + shift) for a, b in zip(low, high, strict=True)]
        u, area = pupil.aimed(*sides)
        near = np.square(u).sum(axis=0) < REACH**2
        clear, path, hits_mm = np.full(near.shape, np.nan), np.zeros(near.shape), np.zeros((2, *near.shape))
        every = np.flatnonzero(near)
        for at in (every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)):
            across, down = np.divmod(at, near.shape[1])
            leaving = pupil.look.beam.trace(u.reshape(2, -1)[:, at])
            found = leaving.on(pupil.sphere)
            missed = np.stack([sides[0][across], sides[1][down]]) - found.q
            hits_mm.reshape(2, -1)[:, at] = np.nan_to_num(found.hits_mm)
            # Beyond the pupil the polynomial may send rays anywhere.
            aright = np.abs(missed).max(axis=0) < max(step, ASTRAY * pupil.width)
            clear.flat[at] = np.where(aright, leaving.paths.clear, np.nan)
            # Others miss their points of the grid by little, and W changes there as they land.
            path.flat[at] = np.nan_to_num(found.path - (found.hits_mm * missed).sum(axis=0))
        cover, inwards = coverage(clear)
        path -= step * (hits_mm * inwards).sum(axis=0)
        return cls(step, path, hits_mm, np.sqrt(area) * cover, float((area * cover).sum()) * step**2, int(near.sum()))

    def field(self, wavelength_mm: float) -> NDArray[np.complex128]:
        """A exp(i k W) [J, K], its mean over each cell of the grid: W slopes as rays land."""
        turns, (x, y) = self.path_mm / wavelength_mm, self.hits_mm * self.step / wavelength_mm
        amplitude = self.amplitude * np.sinc(x) * np.sinc(y)
        found: NDArray[np.complex128] = amplitude * np.exp(2j * np.pi * (turns - np.rint(turns)))
        return found


def coverage(clear: Array) -> tuple[Array, Array]:
    """How much of each cell of a grid lies where `clear` [J, K] is positive, from its value and slope there; and how
    far from the cell's middle [2, J, K] the middle of that part is, in cells.

    Nothing of those that are unknown (NaN) themselves or beside.
    """
    slopes = np.nan_to_num(np.gradient(clear))
    size = np.maximum(np.hypot(*slopes), 1e-300)
    far = np.nan_to_num(np.clip(clear / size, -2, 2), nan=-2)  # in cells
    c, s = np.maximum(np.abs(slopes) / size, 1e-3)

    def ramp(x: Array) -> Array:
        found: Array = np.square(np.maximum(x, 0)) / 2
        return found

    half, skew = (c + s) / 2, (c - s) / 2
    share = (ramp(far + half) - ramp(far + skew) - ramp(far - skew) + ramp(far - half)) / (c * s)
    share = np.where(np.isnan(clear), 0.0, np.clip(share, 0, 1))
    return share, (1 - share) / 2 * slopes / size
