"""Where geometry is not enough: kernels that diffraction would widen noticeably."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.optics.lens import Lens
from psfgen.plan import Plan

AIRY = 1.22  # radius of the first dark ring, in wavelengths x F-number
ENOUGH = 0.5  # of the RMS radius, and of the sample spacing


class Blur:
    """Compares the Airy disc with the geometric kernels of a block.

    Airy radius = 1.22 x wavelength x working F-number, which is F x focus / (focus - EFL) of a lens that is thin.
    """

    def __init__(self, lens: Lens, plan: Plan) -> None:
        config = plan.config
        assert config.pitch_um is not None
        focus_mm = np.array(config.focus)
        with np.errstate(invalid="ignore"):
            working = lens.fnum * np.where(np.isinf(focus_mm), 1.0, focus_mm / np.maximum(focus_mm - lens.efl_mm, 1e-9))
        self.airy_um = AIRY * np.outer(working, config.wavelength)  # [F, W]
        self.pitch_um = config.pitch_um
        self.kernels, self.worst, self._lock = 0, (0.0, 0.0, 0.0), threading.Lock()

    def count(self, rms_px: NDArray[np.float32], focuses: slice) -> None:
        """Take in the RMS radii [P, F, W] of some kernels."""
        airy_um, rms_um = self.airy_um[focuses], self.pitch_um * rms_px
        diffracted = (airy_um > ENOUGH * rms_um) & (airy_um > ENOUGH * self.pitch_um)
        if diffracted.any():
            ratio = np.where(diffracted, airy_um / np.maximum(rms_um, 1e-3 * self.pitch_um), 0)
            at = np.unravel_index(ratio.argmax(), ratio.shape)
            with self._lock:
                self.kernels += int(diffracted.sum())
                self.worst = max(self.worst, (float(ratio[at]), float(airy_um[at[1:]]), float(rms_um[at])))

    @property
    def summary(self) -> dict[str, Any]:
        """For the ledger: how many kernels, and the Airy and RMS radius of the worst."""
        return {"kernels": self.kernels, "airy_um": self.worst[1], "rms_um": self.worst[2]}
