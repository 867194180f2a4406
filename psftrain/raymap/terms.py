"""How the modes of the pupil change over field, depth and focus.

A mode of angular order m keeps its coefficient when field and pupil turn together, so over the field it goes as
h^|a| e^(i a theta) with a = m. A misaligned part adds terms of a = m + 1 and m - 1 (its `charge`), with a direction
of their own; the design itself has charge 0 and no direction.

Legend: M places, Q modes, T terms, S features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.modes import Mode, modes_to

Array = NDArray[np.float64]

CORNER2 = 2.0  # h^2 at the corner of a square field whose half side is 1


@dataclass(frozen=True)
class Sites:
    """Where kernels are: `field` [M, 2] in half sides of the field (angles as on the sensor); `depth` [M] in [-1, 1];
    `defocus` [M], the radius of the blur of a point that a perfect lens would have there, in half windows (signed).
    """

    field: Array
    depth: Array
    defocus: Array

    def __len__(self) -> int:
        return len(self.field)

    def __getitem__(self, some: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Sites:
        return Sites(self.field[some], self.depth[some], self.defocus[some])


@dataclass(frozen=True)
class Reach:
    """How far the terms go: `pupil` and `curl`, degrees of the modes; `field`, power of h; `charge`, the power of h
    of terms of charge 1 and -1 (-1: none); `depth`, power of depth; `focus`: whether rays move with the defocus.
    """

    pupil: int
    field: int
    curl: int = 0
    charge: int = -1
    depth: int = 0
    focus: bool = False


@dataclass(frozen=True)
class Term:
    """h^|a| e^(i a theta) P_i(h^2) depth^d defocus^f, times i if `quarter`, of the mode (n, m, curl).

    a = m + charge.
    """

    n: int
    m: int
    curl: bool
    charge: int
    i: int
    quarter: bool
    depth: int
    focus: int

    @property
    def turns(self) -> int:
        """a: how often its phase turns with the field."""
        return self.m + self.charge

    @property
    def order(self) -> int:
        """Its power in field and pupil: what physics makes small."""
        return abs(self.turns) + 2 * self.i + self.n + 2 * self.depth + self.focus


MISALIGNED_DEGREE = 8  # of the modes of the pupil that misalignment changes
FOCUS_DEGREE, FOCUS_FIELD = 8, 14  # slopes of rays are smoother over the pupil than where they land
DEPTH_DEGREE, DEPTH_FIELD = 6, 8  # so is their change with depth


def _terms(reach: Reach) -> list[Term]:
    found = []
    for mode in modes_to(reach.pupil, reach.curl):
        if mode.sine:
            continue
        for charge in (0,) if reach.charge < 0 else (0, 1, -1):
            if mode.m == 0 and charge < 0:  # the conjugate of charge 1
                continue
            for depth, focus in product(range(reach.depth + 1), range(1 + reach.focus)):
                top = _top(mode, charge, depth, focus, reach)
                # A mirror across the field direction leaves the design as it is; the curl's sine it turns over.
                quarters = (False, True) if charge else (mode.curl,)
                found += [
                    Term(mode.n, mode.m, mode.curl, charge, i, quarter, depth, focus)
                    for i in range((top - abs(mode.m + charge)) // 2 + 1)
                    for quarter in quarters
                    if not (mode.m == 0 and charge == 0 and quarter)
                ]
    return found


def _top(mode: Mode, charge: int, depth: int, focus: int, reach: Reach) -> int:
    """The highest power of h of such terms; -1: none."""
    top = reach.field
    if charge:
        top = min(top, reach.charge) if mode.n <= MISALIGNED_DEGREE and depth + focus <= 1 else -1
    if depth:
        top = min(top, DEPTH_FIELD // depth) if mode.n <= DEPTH_DEGREE else -1
    if focus:
        top = min(top, FOCUS_FIELD) if mode.n <= FOCUS_DEGREE and depth <= 1 and not mode.curl else -1
    return top


@dataclass(frozen=True)
class Terms:
    """The terms of a ray map and what they make of places."""

    reach: Reach
    modes: tuple[Mode, ...] = field(init=False)
    terms: tuple[Term, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", modes_to(self.reach.pupil, self.reach.curl))
        object.__setattr__(self, "terms", tuple(_terms(self.reach)))

    def __len__(self) -> int:
        return len(self.terms)

    @cached_property
    def order(self) -> Array:
        """The order of each term [T]."""
        return np.array([term.order for term in self.terms], dtype=float)

    @cached_property
    def features(self) -> dict[tuple[int, ...], int]:
        """(|a|, i, depth, focus) -> the number of its cosine; the sine's is the next."""
        keys = dict.fromkeys((abs(t.turns), t.i, t.depth, t.focus) for t in self.terms)
        return {key: 2 * number for number, key in enumerate(keys)}

    @cached_property
    def wiring(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """Which mode [T, 2], by which feature [T, 2] and sign [T, 2] each term drives; sign 0: none."""
        row = {mode: q for q, mode in enumerate(self.modes)}
        rows, features = np.zeros((len(self), 2), np.int64), np.zeros((len(self), 2), np.int64)
        signs = np.zeros((len(self), 2))
        for t, term in enumerate(self.terms):
            cosine = self.features[abs(term.turns), term.i, term.depth, term.focus]
            # (c + i s) or, a quarter turn on, (-s + i c); its real part drives the cosine mode.
            turn = 1.0 if term.turns >= 0 else -1.0
            real, imaginary = ((cosine, 1.0), (cosine + 1, turn))
            if term.quarter:
                real, imaginary = (cosine + 1, -turn), (cosine, 1.0)
            rows[t, 0] = row[Mode(term.n, term.m, term.curl, False)]
            features[t, 0], signs[t, 0] = real
            if term.m:
                rows[t, 1] = row[Mode(term.n, term.m, term.curl, True)]
                features[t, 1], signs[t, 1] = imaginary
        return rows, features, signs

    def at(self, sites: Sites) -> Array:
        """The features [M, S] of places."""
        x, y = sites.field.T / np.sqrt(CORNER2)
        top = max(key[0] for key in self.features)
        cos, sin = [np.ones_like(x)], [np.zeros_like(x)]
        for _ in range(top):
            cos, sin = [*cos, cos[-1] * x - sin[-1] * y], [*sin, cos[-1] * y + sin[-1] * x]
        legendre = np.polynomial.legendre.legvander(2 * (x * x + y * y) - 1, max(key[1] for key in self.features))
        found = np.empty((len(sites), 2 * len(self.features)))
        for (a, i, depth, focus), column in self.features.items():
            factor = legendre[:, i] * sites.depth**depth * sites.defocus**focus
            found[:, column], found[:, column + 1] = factor * cos[a], factor * sin[a]
        return found

    def matrix(self, coefficients: Array) -> Array:
        """[..., T] -> the matrix [..., Q, S] from features to modes."""
        rows, features, signs = self.wiring
        found = np.zeros((*coefficients.shape[:-1], len(self.modes), 2 * len(self.features)))
        for side in range(2):
            at: Any = (..., rows[:, side], features[:, side])
            np.add.at(found, at, signs[:, side] * coefficients)
        return found

    def taken_from(self, other: Terms, coefficients: Array) -> Array:
        """Coefficients [T] of another set of terms, as far as they are of this one; 0 for the rest."""
        known = dict(zip(other.terms, coefficients, strict=True))
        return np.array([known.get(term, 0.0) for term in self.terms])
