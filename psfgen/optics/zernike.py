"""Zernike circle polynomials over the unit disc, in the two orders in use.

- Noll: each has RMS 1 over the disc, so that a coefficient is the RMS of its term. R. J. Noll, "Zernike polynomials and
  atmospheric turbulence", J. Opt. Soc. Am. 66, 207 (1976).
- Fringe (University of Arizona): each is 1 at the rim where it is greatest. J. C. Wyant and K. Creath, "Basic wavefront
  aberration theory for optical metrology", Applied Optics and Optical Engineering XI (1992).

Angles are counted from +x to +y; m > 0 stands for cos(m angle), m < 0 for sin(|m| angle). Terms are counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COUNT = 37  # of the terms that are fitted


def noll(j: int) -> tuple[int, int]:
    """(n, m) of Noll's term j."""
    n = (math.isqrt(8 * j - 7) - 1) // 2
    place = j - n * (n + 1) // 2 - 1  # within the terms of degree n, of ascending |m|
    size = 2 * ((place + 1 - n % 2) // 2) + n % 2
    return n, size if j % 2 == 0 else -size


def fringe(j: int) -> tuple[int, int]:
    """(n, m) of Fringe term j, 1 to 37: the set that programs have, which ends with (12, 0) out of turn."""
    if j == COUNT:
        return 12, 0
    half = math.isqrt(j - 1)  # (n + |m|) / 2
    left = (half + 1) ** 2 - j  # 2 |m|, less 1 for a sine
    size = (left + 1) // 2
    return 2 * half - size, -size if left % 2 else size


ORDERS: dict[str, Callable[[int], tuple[int, int]]] = {"noll": noll, "fringe": fringe}


def terms(order: str, count: int, xy: Array) -> Array:
    """The first `count` polynomials [count, N] of an order at the points `xy` [2, N] of the unit disc."""
    r, angle = np.hypot(*xy), np.arctan2(xy[1], xy[0])
    found = []
    for n, m in map(ORDERS[order], range(1, count + 1)):
        size = abs(m)
        wave = np.cos(size * angle) if m >= 0 else np.sin(size * angle)
        scale = math.sqrt((n + 1) * (2 if m else 1)) if order == "noll" else 1.0
        found.append(scale * radial(n, size, r) * wave)
    return np.stack(found)


def radial(n: int, m: int, r: Array) -> Array:
    """R_n^m(r), Born & Wolf, "Principles of Optics", 7th ed., 9.2 (5)."""
    found = np.zeros_like(r)
    for k in range((n - m) // 2 + 1):
        below = math.factorial(k) * math.factorial((n + m) // 2 - k) * math.factorial((n - m) // 2 - k)
        found += (-1) ** k * math.factorial(n - k) / below * r ** (n - 2 * k)
    return found
