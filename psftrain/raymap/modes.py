"""What rays do over the pupil: gradients of Zernike polynomials, and the same turned by a right angle.

Legend: P pupil points, Q modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import factorial

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GOLDEN_RAD = np.pi * (3 - np.sqrt(5))


@dataclass(frozen=True)
class Mode:
    """The displacement grad(R_n^m(rho) cos(m phi)), or of sin(m phi) (`sine`); turned by 90 degrees (`curl`)."""

    n: int
    m: int
    curl: bool
    sine: bool


def modes_to(degree: int, curl_degree: int = 0) -> tuple[Mode, ...]:
    """All gradient modes of a degree up to `degree`, and the curl modes up to `curl_degree`.

    The gradient of a harmonic polynomial (n = m) turned by 90 degrees is such a gradient again, so it is left out.
    """
    found = [
        Mode(n, m, curl, sine)
        for curl, top in ((False, degree), (True, curl_degree))
        for n in range(1, top + 1)
        for m in range(n % 2, n + 1, 2)
        for sine in ((False, True) if m else (False,))
        if not (curl and n == m)
    ]
    return tuple(found)


@dataclass(frozen=True)
class Pupil:
    """`count` points of a Fibonacci spiral over the unit disc, each of which stands for the same area."""

    count: int

    @cached_property
    def polar(self) -> tuple[Array, Array]:
        """Radius and angle [P]."""
        i = np.arange(self.count) + 0.5
        return np.sqrt(i / self.count), i * GOLDEN_RAD

    def displacements(self, modes: tuple[Mode, ...]) -> Array:
        """The displacements [2, P, Q] (x, y) of the modes, each of about unit RMS over the disc."""
        rho, phi = self.polar
        found = np.empty((2, self.count, len(modes)))
        for q, mode in enumerate(modes):
            radial, slope = _radial(mode.n, mode.m, rho)
            angular, turn = np.cos(mode.m * phi), -mode.m * np.sin(mode.m * phi)
            if mode.sine:
                angular, turn = np.sin(mode.m * phi), mode.m * np.cos(mode.m * phi)
            outward, around = slope * angular, radial / rho * turn
            if mode.curl:
                outward, around = -around, outward
            size = np.sqrt(mode.n * (mode.n + 1) / 2) * np.sqrt(mode.n + 1)
            found[0, :, q] = (outward * np.cos(phi) - around * np.sin(phi)) / size
            found[1, :, q] = (outward * np.sin(phi) + around * np.cos(phi)) / size
        return found


def _radial(n: int, m: int, rho: Array) -> tuple[Array, Array]:
    """The radial Zernike polynomial R_n^m and its derivative (Born and Wolf, "Principles of Optics", 9.2.1)."""
    value, slope = np.zeros_like(rho), np.zeros_like(rho)
    for k in range((n - m) // 2 + 1):
        power = n - 2 * k
        factor = (-1) ** k * factorial(n - k)
        factor //= factorial(k) * factorial((n + m) // 2 - k) * factorial((n - m) // 2 - k)
        value += factor * rho**power
        if power:
            slope += factor * power * rho ** (power - 1)
    return value, slope
