"""The terms of a misalignment as complex numbers, which turn with the part that is out of line.

A decentre (x, y) is the number x + iy, a tilt that about its axes by (a, b) the number b - ia. The terms of charge -1
and the conjugates of those of charge 1 are to first order such numbers times real ones, the same for all directions:
a lens that is misaligned in another direction, or seen in a mirror, has the same loadings.

Legend: T terms, D terms of the design, C pairs of terms of a misalignment.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.terms import Terms

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Turns:
    """Which of `terms` belong together: `design` [D], `real` [C] and `imaginary` [C], with their signs [C]."""

    terms: Terms
    design: Index = field(init=False)
    real: Index = field(init=False)
    imaginary: Index = field(init=False)
    signs: tuple[Array, Array] = field(init=False)

    def __post_init__(self) -> None:
        number = {term: t for t, term in enumerate(self.terms.terms)}
        real, imaginary, signs = [], [], []
        for term, t in number.items():
            if not term.charge or term.quarter:
                continue
            beside, charge = number[replace(term, quarter=True)], float(term.charge)
            # A mirror turns the curl's sign over, so that it is i times the curl's number that it conjugates.
            real.append(beside if term.curl else t)
            imaginary.append(t if term.curl else beside)
            signs.append((-1.0 if term.curl else 1.0, -charge))
        design = [t for term, t in number.items() if not term.charge]
        for name, found in (("design", design), ("real", real), ("imaginary", imaginary)):
            object.__setattr__(self, name, np.array(found, dtype=np.int64))
        object.__setattr__(self, "signs", tuple(np.array(signs).reshape(-1, 2).T))

    def split(self, coefficients: Array) -> tuple[Array, Complex]:
        """Coefficients [..., T] of the design [..., D] and of the misalignment [..., C]."""
        parts = [coefficients[..., at] * sign for at, sign in zip((self.real, self.imaginary), self.signs, strict=True)]
        return coefficients[..., self.design], parts[0] + 1j * parts[1]

    def joined(self, design: Array, errors: Array | Complex) -> Array:
        """What `split` splits."""
        found = np.zeros((*np.broadcast_shapes(design.shape[:-1], errors.shape[:-1]), len(self.terms)))
        found[..., self.design] = design
        found[..., self.real] = self.signs[0] * errors.real
        found[..., self.imaginary] = self.signs[1] * errors.imag
        return found

    def turned(self, coefficients: Array, angle_rad: float, mirrored: bool = False) -> Array:
        """Coefficients [..., T] of the lens mirrored in the x axis (if `mirrored`) and then turned by an angle."""
        design, errors = self.split(coefficients)
        return self.joined(design, (errors.conj() if mirrored else errors) * np.exp(1j * angle_rad))

    def averaged(self, hessian: Array) -> tuple[Array, Array]:
        """The mean of a hessian [T, T] over all turns and mirrors: of the design [D, D], of the misalignment [C, C]."""
        parts = [
            hessian[np.ix_(at, at)] * np.outer(sign, sign)
            for at, sign in zip((self.real, self.imaginary), self.signs, strict=True)
        ]
        return hessian[np.ix_(self.design, self.design)], (parts[0] + parts[1]) / 2
