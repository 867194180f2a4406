"""The surface table that the fused tracers read: a lens at one wavelength as plain numbers. mm, float64.

It is made from DeepLens's own surfaces and glass, so DeepLens stays the authority on what a lens is. A lens
with a surface that has no row here (`foreign_surface`) is traced by DeepLens itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

STOP, PLANE, SPHERE, ASPHERE, CUBIC, THIN, END = range(7)
KINDS = {
    "Aperture": STOP,
    "Plane": PLANE,
    "Spheric": SPHERE,
    "Aspheric": ASPHERE,
    "Cubic": CUBIC,
    "ThinLens": THIN,
}

# Columns of `shape`; a surface of kind ASPHERE has the sag of the standard even asphere,
# c r^2 / (1 + sqrt(1 - (1 + conic) c^2 r^2)) + a_2 r^2 + a_4 r^4 + ..., of kind CUBIC
# b_3 (x^3 + y^3) + b_5 (x^5 + y^5) + b_7 (x^7 + y^7).
CURVATURE = 0  # 1/mm; the focal length, in mm, of a thin lens
CONIC1 = 1  # 1 + conic constant
INDEX_RATIO = 2  # index before / index behind
RIM2 = 3  # square of the rim's radius, or of half the side of a square rim
SHIFT = 4  # x, y, z of the vertex in the frame of the surface before
TURN = 7  # 3 x 3 matrix, row by row, from that frame's axes to the surface's own
COEFFICIENTS = 16
MOST_COEFFICIENTS = 10
COLUMNS = COEFFICIENTS + MOST_COEFFICIENTS

NEWTON_STEPS = 8  # at most, as many as DeepLens takes
CONVERGED_MM = 5e-5  # DeepLens's bound on what is left of an intersection's error
TURNED = 1e-14  # axes nearer than that are the same

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Prescription:
    """A lens at one wavelength.

    `kind` [S]: what a surface is. `flags` [S, 2]: whether its rim is square, whether its axes are turned against
    those of the surface before. `shape` [S, COLUMNS]: its numbers. Surfaces are met in order; each has its vertex
    at the origin of its own frame. Rays end in the plane z = `length_mm` of the last vertex, upright, x and y
    counted from the axis of the lens.
    """

    kind: NDArray[np.int32]
    flags: NDArray[np.int32]
    shape: Table
    length_mm: float

    def unclipped(self) -> Prescription:
        """The same surfaces without rims."""
        shape = self.shape.copy()
        shape[:, RIM2] = np.inf
        return replace(self, shape=shape)


def foreign_surface(surfaces: list[Any]) -> str | None:
    """The first of DeepLens's surfaces that the table cannot hold, as "surface 3 (QTypeFreeform)"."""
    for index, surface in enumerate(surfaces):
        name = type(surface).__name__
        if name not in KINDS or getattr(surface, "rotate_angle", 0.0) != 0:
            return f"surface {index} ({name})"
        if len(_even(surface)) > MOST_COEFFICIENTS:
            return f"surface {index} ({name} of more than {MOST_COEFFICIENTS} coefficients)"
    return None


def asymmetry(surfaces: list[Any]) -> str | None:
    """What keeps a lens from being rotationally symmetric, or None where its surfaces prove that it is."""
    for index, surface in enumerate(surfaces):
        if KINDS.get(type(surface).__name__, CUBIC) == CUBIC:
            return f"surface {index} is a {type(surface).__name__}"
        if surface.is_square:
            return f"surface {index} has a square rim"
        if float(surface.pos_x) or float(surface.pos_y):
            return f"surface {index} is decentred"
        if _turn(surface) is not None:
            return f"surface {index} is tilted"
    return None


def prescribe(surfaces: list[Any], wavelength_um: float) -> Prescription:
    """DeepLens's surfaces at a wavelength. `foreign_surface` must have found none."""
    shape = np.zeros((len(surfaces) + 1, COLUMNS))
    flags = np.zeros((len(surfaces) + 1, 2), np.int32)
    kind = np.array([*(KINDS[type(surface).__name__] for surface in surfaces), END], np.int32)
    index_before, vertex_z = 1.0, 0.0
    frame = np.zeros(3), np.eye(3)  # origin and axes of the surface before
    for row, surface in enumerate(surfaces):
        index_behind = float(surface.mat2.ior(torch.tensor(wavelength_um, dtype=torch.float64)))
        shape[row, CURVATURE] = float(surface.f) if kind[row] == THIN else float(getattr(surface, "c", 0.0))
        shape[row, CONIC1] = 1 + float(getattr(surface, "k", 0.0))
        shape[row, INDEX_RATIO] = index_before / index_behind
        shape[row, RIM2] = (surface.w / 2 if surface.is_square else surface.r) ** 2
        flags[row, 0] = surface.is_square
        terms = _even(surface) if kind[row] == ASPHERE else _odd(surface) if kind[row] == CUBIC else []
        shape[row, COEFFICIENTS : COEFFICIENTS + len(terms)] = terms
        turn = _turn(surface)
        own = np.array([float(surface.pos_x), float(surface.pos_y), vertex_z]), np.eye(3) if turn is None else turn
        flags[row, 1] = _enter(shape[row], frame, own)
        index_before, frame = index_behind, own
        vertex_z += float(surface.d_next) if row < len(surfaces) - 1 else 0.0
    flags[-1, 1] = _enter(shape[-1], frame, (np.array([0.0, 0.0, vertex_z]), np.eye(3)))
    if not flags[-1, 1] and not shape[-1, SHIFT : SHIFT + 3].any():  # the last surface stands upright on the axis
        kind, flags, shape = kind[:-1], flags[:-1], shape[:-1]
    return Prescription(kind, flags, shape, vertex_z)


def _enter(row: Table, before: tuple[Table, Table], own: tuple[Table, Table]) -> bool:
    """Note how one gets from one frame (origin, axes) into another; returns whether its axes are turned."""
    row[SHIFT : SHIFT + 3] = before[1] @ (own[0] - before[0])
    turn = own[1] @ before[1].T
    row[TURN : TURN + 9] = turn.ravel()
    return bool(np.abs(turn - np.eye(3)).max() > TURNED)


def _even(surface: Any) -> list[float]:
    """a_2, a_4, ... of an asphere."""
    if KINDS.get(type(surface).__name__) != ASPHERE:
        return []
    second = 0.0 if surface.ai2 is None else float(surface.ai2)
    # The attributes ai4, ai6, ... are what DeepLens traces with.
    return [second, *(float(getattr(surface, f"ai{2 * (i + 2)}")) for i in range(surface.ai_degree))]


def _odd(surface: Any) -> list[float]:
    """b_3, b_5, b_7 of a cubic plate, as far as it has them."""
    return [float(getattr(surface, name)) for name in ("b3", "b5", "b7")[: surface.b_degree]]


def _turn(surface: Any) -> NDArray[np.float64] | None:
    """The least rotation that takes a surface's normal to +z (Rodrigues), or None for an upright surface."""
    x, y, z = (float(v) for v in surface.vec_local)
    if abs(z - 1) <= 1e-12:  # as DeepLens decides it
        return None
    cross = np.array([[0.0, 0.0, -x], [0.0, 0.0, -y], [x, y, 0.0]])  # of the axis (y, -x, 0)
    turn: NDArray[np.float64] = np.eye(3) + cross + cross @ cross / (1 + z)
    return turn
