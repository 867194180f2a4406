"""Zernike polynomials: the indices of published tables, orthonormality over the disc."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from psfgen.optics.pupil import spiral
from psfgen.optics.zernike import COUNT, fringe, noll, radial, terms

# Noll (1976), table I, by row n; sine terms, odd there, with m < 0.
NOLL = [
    [(0, 0)],
    [(1, 1), (1, -1)],
    [(2, 0), (2, -2), (2, 2)],
    [(3, -1), (3, 1), (3, -3), (3, 3)],
    [(4, 0), (4, 2), (4, -2), (4, 4), (4, -4)],
    [(5, 1), (5, -1), (5, 3), (5, -3), (5, 5), (5, -5)],
    [(6, 0), (6, -2), (6, 2), (6, -4), (6, 4), (6, -6), (6, 6)],
    [(7, -1), (7, 1), (7, -3), (7, 3), (7, -5), (7, 5), (7, -7), (7, 7)],
    [(8, 0)],
]
# Wyant & Creath (1992), table III, and the 37th of Zemax and CODE V.
FRINGE = [
    [(0, 0)],
    [(1, 1), (1, -1), (2, 0)],
    [(2, 2), (2, -2), (3, 1), (3, -1), (4, 0)],
    [(3, 3), (3, -3), (4, 2), (4, -2), (5, 1), (5, -1), (6, 0)],
    [(4, 4), (4, -4), (5, 3), (5, -3), (6, 2), (6, -2), (7, 1), (7, -1), (8, 0)],
    [(5, 5), (5, -5), (6, 4), (6, -4), (7, 3), (7, -3), (8, 2), (8, -2), (9, 1), (9, -1), (10, 0)],
    [(12, 0)],
]


def test_indices_are_those_of_the_tables() -> None:
    assert [noll(j) for j in range(1, COUNT + 1)] == list(chain(*NOLL))
    assert [fringe(j) for j in range(1, COUNT + 1)] == list(chain(*FRINGE))


def disc(rings: int = 16, spokes: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Points [2, N] and weights [N] whose sums are means over the disc, exact for these polynomials."""
    nodes, weights = np.polynomial.legendre.leggauss(rings)
    r = np.sqrt((nodes + 1) / 2)
    angle = 2 * np.pi * np.arange(spokes) / spokes
    xy = np.stack([np.outer(r, np.cos(angle)).ravel(), np.outer(r, np.sin(angle)).ravel()])
    return xy, np.repeat(weights / 2 / spokes, spokes)


@pytest.mark.parametrize("order", ["noll", "fringe"])
def test_they_are_orthogonal(order: str) -> None:
    xy, weights = disc()
    basis = terms(order, COUNT, xy)
    norms = [1.0 if order == "noll" else 1 / (n + 1) / (2 if m else 1) for n, m in map(fringe, range(1, COUNT + 1))]
    np.testing.assert_allclose((basis * weights) @ basis.T, np.diag(norms), atol=1e-12)


def test_fringe_terms_are_1_at_the_rim() -> None:
    for n, m in set(map(fringe, range(1, COUNT + 1))):
        assert radial(n, abs(m), np.ones(1)) == pytest.approx(1, abs=1e-12)
    xy = spiral(500).numpy().T
    assert np.abs(terms("fringe", COUNT, xy)).max() <= 1 + 1e-12


def test_low_terms_are_written_out_in_the_table() -> None:
    x, y = spiral(200).numpy().T
    r2 = x**2 + y**2
    shapes = [
        np.ones_like(x),  # piston
        2 * x,  # tilt
        2 * y,
        np.sqrt(3) * (2 * r2 - 1),  # defocus
        2 * np.sqrt(6) * x * y,  # astigmatism
        np.sqrt(6) * (x**2 - y**2),
        np.sqrt(8) * (3 * r2 - 2) * y,  # coma
        np.sqrt(8) * (3 * r2 - 2) * x,
        np.sqrt(8) * (3 * x**2 * y - y**3),  # trefoil
        np.sqrt(8) * (x**3 - 3 * x * y**2),
        np.sqrt(5) * (6 * r2**2 - 6 * r2 + 1),  # spherical
    ]
    np.testing.assert_allclose(terms("noll", len(shapes), np.stack([x, y])), shapes, atol=1e-12)
