"""From a wavefront to the light on the samples of a sensor, by way of its optical transfer function.

The field on the sensor is the Fourier transform of the wavefront over the sphere, so the light there has the
wavefront's autocorrelation as its spectrum (Goodman, "Introduction to Fourier Optics", 3rd ed., 6.3). Multiplied by the
spectrum of a sample's response and transformed back at the samples alone, it gives what these receive, exactly and at
any pitch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft as scipy_fft
from torch import Tensor

from psfgen.optics.wavefront import Wavefront

Array = NDArray[np.float64]

# The spectrum of what a sample answers to light at a distance from it, by cycles per sample.
RESPONSES: dict[str, Callable[[Array], Array]] = {
    "bilinear": lambda f: np.sinc(f) ** 2,  # as rays are shared out
    "area": np.sinc,  # a square as wide as the samples are apart
    "point": np.ones_like,
}


@dataclass(frozen=True)
class Screen:
    """k x k samples of a sensor, `pitch_mm` apart, about a point of it."""

    kernel_px: int
    pitch_mm: float
    response: str

    def light(self, wavefront: Wavefront, wavelength_mm: float) -> Array:
        """The light [k, k] of a wavefront that samples about the centre of its sphere receive, rows from top.

        In parts of 1 mm^2 of the pupil, of which it has `wavefront.flux`. Light repeats every wavelength / step.
        """
        field = torch.from_numpy(wavefront.field(wavelength_mm))
        size = [fast(2 * side) for side in field.shape]
        spectrum = torch.fft.fft2(field, s=size)
        otf = torch.fft.rfft2(spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag), norm="forward")
        del spectrum
        per_sample = wavefront.step * self.pitch_mm / wavelength_mm  # cycles of the lowest frequency
        across, down = (self._back(side, per_sample) for side in size)
        # Light is real: frequencies of one sign tell those of the other, which rfft2 leaves out.
        half = 2 * down[:, : otf.shape[1]]
        half[:, 0] /= 2
        found = (across @ (otf @ half.T)).real * (per_sample * wavefront.step) ** 2
        # Means over cells are a field that was multiplied by the transform of a cell.
        faded = torch.from_numpy(np.sinc(self._samples * per_sample) ** 2)
        upright: Array = (found.T.flip(0) / (faded * faded[:, None])).numpy()
        return upright

    @property
    def _samples(self) -> Array:
        """Where samples are, counted from the middle [k]."""
        return np.asarray(np.arange(self.kernel_px) - (self.kernel_px - 1) / 2, dtype=np.float64)

    def _back(self, size: int, per_sample: float) -> Tensor:
        """The transform [k, size] of a conjugate spectrum to the samples, with their response."""
        frequency = np.fft.fftfreq(size, 1 / size) * per_sample
        waves = np.exp(-2j * np.pi * np.outer(self._samples, frequency))
        return torch.from_numpy(waves * RESPONSES[self.response](frequency))


def fast(count: int) -> int:
    """The next number whose Fourier transform is fast: a product of 2, 3 and 5."""
    found: Any = scipy_fft.next_fast_len(count)
    return int(found)
