"""The default engine: deterministic pupil points, one trace for all focus distances, bilinear splats.

Legend: P field points, N rays, F focus distances, W wavelengths, k kernel side.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from psfgen.engines import Deposits
from psfgen.grid import pupil_shift
from psfgen.optics import pupil
from psfgen.optics.lens import Lens
from psfgen.optics.splat import deposit
from psfgen.plan import Plan

log = logging.getLogger(__name__)
BATCH_RAYS = 2**17  # near DeepLens's best, 200 MB in flight
BATCH_BYTES = 64 * 2**20  # of deposits


class GeometricEngine:
    """Counts rays on the samples of a sensor; focusing moves the sensor only, so all distances share a trace."""

    concurrent = True

    def __init__(self, lens: Lens, plan: Plan) -> None:
        config = plan.config
        assert config.pitch_um is not None
        self.lens, self.pitch_um, self.kernel_px = lens, config.pitch_um, config.kernel_px
        self.wavelengths_um = config.wavelength
        self.sensor_z_mm = tuple(pupil.sensor_z_mm(lens, focus_mm) for focus_mm in config.focus)
        spp = config.spp - config.spp % 2  # two halves of equal size
        self.pupil_xy = lens.pupil_r_mm * pupil.spiral(spp, *pupil_shift(config.seed, config.layout))
        point_bytes = 16 * config.kernel_px**2 * len(config.focus) * len(config.wavelength)
        self.batch = max(1, min(BATCH_RAYS // spp, BATCH_BYTES // point_bytes))

    def deposit(self, field_xy: torch.Tensor, depth_mm: float) -> Deposits:
        """Deposits of the field points [P, 2] at one depth."""
        points, spp, k = len(field_xy), len(self.pupil_xy), self.kernel_px
        chief_mm = self.chief_mm(field_xy, depth_mm)  # [P, F, 2]
        halves = np.empty((points, len(self.sensor_z_mm), len(self.wavelengths_um), 2, k, k))
        valid_count = np.empty((points, len(self.wavelengths_um)))
        o, d = pupil.aim(self.lens, field_xy[:, None], depth_mm, self.pupil_xy)
        for w, wavelength_um in enumerate(self.wavelengths_um):
            rays = self.lens.trace(o, d, wavelength_um)
            valid = rays.valid.cpu().numpy()
            valid_count[:, w] = valid.sum(axis=-1)
            for f, z_mm in enumerate(self.sensor_z_mm):
                xy_mm = -rays.at(z_mm).cpu().numpy()  # upright
                halves[:, f, w] = deposit(1000 * (xy_mm - chief_mm[:, f, None]), valid, k, self.pitch_um)
        weight = halves.sum(axis=(-3, -2, -1))
        count = valid_count[:, None, :]
        captured = np.divide(weight, count, out=np.zeros_like(weight), where=count > 0)
        rays_launched = points * spp * len(self.wavelengths_um)
        return Deposits(halves, valid_count / spp, captured, chief_mm, rays_launched)

    def chief_mm(self, field_xy: torch.Tensor, depth_mm: float) -> np.ndarray:
        """Where the chief rays land, upright, at each focus [P, F, 2].

        A field point that no chief ray images (beyond what the glass refracts) gets its pinhole position.
        """
        chief = pupil.chief_rays(self.lens, field_xy, depth_mm)
        landed = torch.stack([-chief.at(z_mm) for z_mm in self.sensor_z_mm], dim=1)
        pinhole = field_xy.to(landed) * torch.tensor(self.lens.sensor_mm).to(landed) / 2
        lost = int((~chief.valid).sum())
        if lost:
            log.warning("%d field points have no chief ray; they are centred on the pinhole image", lost)
        return torch.where(chief.valid[:, None, None], landed, pinhole[:, None]).cpu().numpy()
