"""The default engine: deterministic pupil points, one trace for all focus distances, bilinear splats.

A symmetric lens needs one bundle for each radius, launched on the +x side; its hits are turned to each azimuth.

Legend: P field points, U bundles' field points, N rays, F focus distances, W wavelengths, k kernel side.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.engines import ALL, Aim, Deposits
from psfgen.grid import pupil_seed
from psfgen.optics import pupil
from psfgen.optics.lens import Lens
from psfgen.optics.splat import sampling
from psfgen.optics.trace import Bundles, PupilPoints, Tracer, tracer_class
from psfgen.plan import Plan

log = logging.getLogger(__name__)
PRECISIONS = {"single": torch.float32, "double": torch.float64}
PILOT_RAYS = 2048
NOISE_OF_ONE = 1.5  # the noise of a spiral with one ray on each effective sample, for well-sampled kernels
MOST_DOUBLINGS = 4  # at a time: a pilot that hardly hits its kernel knows little
# By how much half the difference of two halves must be widened to bound the error of at least 97 % of kernels
# (psf, psf_binned): tests/test_campaign.py measures it.
MARGINS = {"spiral": (1.0, 1.4), "sobol": (1.5, 2.2)}
BATCH_BYTES = 4 * 2**20  # of deposits
BATCH_COPIES = 4  # of them, in bytes: kernels, hits, images in the making
RADIUS_DIGITS = 12  # radii nearer than that are one

Array = NDArray[np.float64]


class GeometricEngine:
    """Counts rays on the samples of a sensor; focusing moves the sensor only, so all distances share a trace."""

    concurrent = True
    threads_suffice = False
    by_radius = True  # kernels at one radius of a symmetric lens share a bundle

    def __init__(self, lens: Lens, plan: Plan) -> None:
        config = plan.config
        assert config.pitch_um is not None
        self.lens, self.config = lens, config
        self.pitch_mm, self.kernel_px = config.pitch_um / 1000, config.kernel_px
        self.tracer: Tracer = tracer_class(config.tracer)(lens, config.wavelength, PRECISIONS[config.precision])
        self.threads_suffice = config.tracer == "numba" and self.concurrent
        self.sensor_z_mm = tuple(pupil.sensor_z_mm(lens, self.tracer, focus_mm) for focus_mm in config.focus)
        self.margins: tuple[float, float] = MARGINS[config.sampling]
        self.symmetric = lens.asymmetry is None
        self.points = cache(self._points)
        point_bytes = 8 * config.kernel_px**2 * len(config.focus) * len(config.wavelength)
        self.batch = max(1, BATCH_BYTES // point_bytes)
        self.batch_bytes = BATCH_COPIES * max(BATCH_BYTES, point_bytes)

    def deposit(self, aim: Aim) -> Deposits:
        """Trace the bundles of field points and count their rays."""
        points, waves, k = len(aim.of_point), len(self.config.wavelength), self.kernel_px
        shape = (points, len(aim.sensor_z_mm), waves)
        halves = np.empty((*shape, 2, k, k), np.float32)
        passed, weight = np.zeros(shape), np.zeros(shape)  # rays, of those launched for each kernel; their deposits
        throughput = np.full((points, waves), np.nan)
        spp, rays = np.full(shape, self.first_spp), 0
        todo = np.ones(shape, bool)
        while todo.any():
            count = int(spp[todo].min())
            p, f, w = np.nonzero(todo & (spp == count))
            order = np.argsort(aim.of_point[p] * waves + w, kind="stable")
            p, f, w = p[order], f[order], w[order]
            bundles = self._bundles(aim, p, f, w)
            passed_B, weight[p, f, w] = self.tracer.deposit(
                bundles, self.points(count), self.pitch_mm, halves.reshape(-1, 2, k, k)
            )
            rays += count * len(bundles.wave)
            passed[p, f, w] = through_T = np.repeat(passed_B, np.diff(bundles.first))
            share = through_T / count * np.linalg.det(aim.axes_mm[aim.of_point[p]]) / self.lens.pupil_r_mm**2
            throughput[p, w] = np.where(np.isnan(throughput[p, w]), np.abs(share), throughput[p, w])
            spp[p, f, w], todo[p, f, w] = self._next(count, halves.reshape(-1, 2, k, k), bundles.slot)
        captured = np.divide(weight, passed, out=np.zeros_like(weight), where=passed > 0)
        captured = np.minimum(captured, 1.0)  # a million shares in single precision sum up a little over
        return Deposits(halves, throughput, captured, self._chief_mm(aim), rays, self.margins)

    @property
    def first_spp(self) -> int:
        return self.config.spp or min(PILOT_RAYS, self.config.spp_max)

    def _next(
        self, count: int, halves: NDArray[np.float32], slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """How many rays the kernels at some slots, which had `count`, need, and whether they get another trace.

        Doubled as often as the noise is expected to need: it falls as the rays per effective sample q, from
        NOISE_OF_ONE / q on; below one ray a sample as slowly as that of random rays.
        """
        tolerance = self.config.tolerance
        if tolerance is None:
            return np.full(len(slots), count), np.zeros(len(slots), bool)
        noise, q = sampling(halves, slots, self.margins[0])
        falling = np.maximum(noise, NOISE_OF_ONE / np.maximum(q, 1e-6)) / tolerance
        with np.errstate(divide="ignore", invalid="ignore"):
            doublings = np.clip(np.rint(np.log2(np.where(q < 1, falling, noise / tolerance))), 1, MOST_DOUBLINGS)
        most = int(math.log2(self.config.spp_max / count)) if count < self.config.spp_max else 0
        again = (noise > tolerance) & (most > 0)
        return np.where(again, count << np.minimum(np.nan_to_num(doublings, nan=1), most).astype(int), count), again

    def _points(self, count: int) -> PupilPoints:
        seed, turn = pupil_seed(self.config.seed, self.config.layout)
        return self.tracer.points(
            pupil.sobol(count, seed) if self.config.sampling == "sobol" else pupil.spiral(count, turn)
        )

    def aim(self, field_xy: torch.Tensor, depth_mm: float, focuses: slice = ALL) -> Aim:
        """Solve the chief rays of the field points [P, 2], and find what of the pupil is open."""
        sensor_z_mm = np.array(self.sensor_z_mm)[focuses]
        slopes = pupil.field_slopes(self.lens, field_xy)
        if self.symmetric and self.by_radius:
            radius = slopes.norm(dim=-1).numpy()
            unique, of_point = np.unique(np.round(radius, RADIUS_DIGITS), return_inverse=True)
            cos_sin = np.where(radius[:, None] > 0, slopes.numpy() / np.maximum(radius, 1e-300)[:, None], [1.0, 0.0])
            slopes = torch.from_numpy(np.stack([unique, np.zeros_like(unique)], -1))
        else:
            of_point, cos_sin = np.arange(len(slopes)), np.tile([1.0, 0.0], (len(slopes), 1))
        half = torch.tensor(self.lens.sensor_mm, dtype=torch.float64) / 2
        bundle_xy = slopes * self.lens.efl_mm / half
        slope, inverse_mm = pupil.beam(self.lens, slopes, depth_mm)
        centre_mm, axes_mm = pupil.launch_areas(self.lens, self.tracer, bundle_xy, depth_mm)
        return Aim(
            field_xy,
            depth_mm,
            of_point,
            cos_sin,
            slope.numpy(),
            inverse_mm,
            sensor_z_mm,
            self._chief_of(bundle_xy, depth_mm, sensor_z_mm),
            centre_mm,
            axes_mm,
        )

    def _bundles(self, aim: Aim, p: NDArray[np.int64], f: NDArray[np.int64], w: NDArray[np.int64]) -> Bundles:
        """Bundles for the kernels of points `p`, focus distances `f`, wavelengths `w`, sorted by bundle."""
        u, waves = aim.of_point[p], len(self.config.wavelength)
        starts = np.flatnonzero(np.diff(u * waves + w, prepend=-1))
        return Bundles(
            wave=w[starts],
            slope=aim.slope[u[starts]],
            inverse_mm=aim.inverse_mm,
            centre_mm=aim.centre_mm[u[starts]],
            axes_mm=aim.axes_mm[u[starts]],
            first=np.append(starts, len(p)),
            sensor_z_mm=aim.sensor_z_mm[f],
            chief_mm=aim.chief_mm[u, f],
            turn=aim.turn[p],
            slot=(p * len(aim.sensor_z_mm) + f) * waves + w,
        )

    def _chief_of(self, field_xy: torch.Tensor, depth_mm: float, sensor_z_mm: Array) -> Array:
        """Where the chief rays land, upright, at each focus [U, F, 2].

        A field point that no chief ray images (beyond what the glass refracts) gets its pinhole position.
        """
        chief = pupil.chief_rays(self.lens, self.tracer, field_xy, depth_mm)
        landed = torch.stack([-chief.at(z_mm) for z_mm in sensor_z_mm.tolist()], dim=1)
        pinhole = field_xy.to(landed) * torch.tensor(self.lens.sensor_mm).to(landed) / 2
        lost = int((~chief.valid).sum())
        if lost:
            log.warning("%d field points have no chief ray; they are centred on the pinhole image", lost)
        found: Array = torch.where(chief.valid[:, None, None], landed, pinhole[:, None]).cpu().numpy()
        return found

    def _chief_mm(self, aim: Aim) -> Array:
        """The same for the field points themselves [P, F, 2]."""
        x, y = np.moveaxis(aim.chief_mm[aim.of_point], -1, 0)
        cos, sin = aim.turn[:, :1], aim.turn[:, 1:]
        return np.stack([cos * x - sin * y, sin * x + cos * y], -1)
