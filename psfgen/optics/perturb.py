"""Lenses as built: elements decentred, tilted, too thick, of another curvature or glass. Lengths in mm.

Everything is done to DeepLens's own surfaces (`pos_x`, `pos_y`, `vec_local`, `d_next`, `c`, `mat2`), so every tracer
sees the same lens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.config import Move, Tolerances
from psfgen.errors import ConfigError

Vector = NDArray[np.float64]


def elements(surfaces: list[Any]) -> list[tuple[int, int]]:
    """First and last surface of every element: surfaces joined by glass, and thin lenses."""
    found, first = [], None
    for index, surface in enumerate(surfaces):
        in_air = surface.mat2.get_name() in ("air", "vacuum")
        if first is None and (not in_air or type(surface).__name__ == "ThinLens"):
            first = index
        if first is not None and in_air:
            found.append((first, index))
            first = None
    return found


def draw(surfaces: list[Any], tolerances: Tolerances, seed: int, copy: int) -> tuple[Move, ...]:
    """What is wrong with copy number `copy`: every element on its own, every axis normally distributed."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2000, copy]))
    moves = []
    for element in range(len(elements(surfaces))):
        x, y, about_x, about_y, thickness, curvature, index = map(float, rng.normal(size=7))
        t = tolerances
        moves.append(
            Move(
                element=element,
                decentre_mm=(x * t.decentre_mm, y * t.decentre_mm),
                tilt_deg=(about_x * t.tilt_deg, about_y * t.tilt_deg),
                thickness_mm=thickness * t.thickness_mm,
                curvature_rel=curvature * t.curvature_rel,
                index=index * t.index,
            )
        )
    return tuple(moves)


def apply(surfaces: list[Any], moves: tuple[Move, ...]) -> None:
    """Move DeepLens's surfaces, in place. Raises ConfigError for a part the lens does not have."""
    for number, move in enumerate(moves):
        first, last = _part(surfaces, move, number)
        for surface in surfaces[first : last + 1]:
            _bend(surface, 1 + move.curvature_rel)
        if move.index:
            for surface in surfaces[first:last]:
                surface.mat2 = ShiftedGlass(surface.mat2, move.index)
        surfaces[first].d_next = surfaces[first].d_next + move.thickness_mm
        _move(surfaces, first, last, np.array(move.decentre_mm), np.radians(move.tilt_deg))
        for index in range(max(first - 1, 0), min(last + 1, len(surfaces) - 1)):
            if float(surfaces[index].d_next) < 0:
                raise ConfigError(
                    f"perturb {number}: surface {index + 1} would stand {-float(surfaces[index].d_next):g} mm in front "
                    f"of surface {index}; a smaller thickness_mm or tilt_deg keeps them apart"
                )


def _part(surfaces: list[Any], move: Move, number: int) -> tuple[int, int]:
    if move.surfaces is not None:
        if move.surfaces[1] >= len(surfaces):
            raise ConfigError(
                f"perturb {number}: surface {move.surfaces[1]} does not exist; the lens has 0 to {len(surfaces) - 1}"
            )
        return move.surfaces
    known = elements(surfaces)
    assert move.element is not None
    if move.element >= len(known):
        listed = ", ".join(f"{k}: surfaces {i} to {j}" for k, (i, j) in enumerate(known))
        raise ConfigError(f"perturb {number}: element {move.element} does not exist; the lens has {listed}")
    return known[move.element]


def _bend(surface: Any, factor: float) -> None:
    """Scale the curvature at the vertex, to which an r^2 term adds."""
    for name in ("c", "ai2"):
        if getattr(surface, name, None) is not None:
            setattr(surface, name, getattr(surface, name) * factor)


def _move(surfaces: list[Any], first: int, last: int, decentre: Vector, tilt: Vector) -> None:
    """Turn the surfaces about the first one's vertex by the rotation vector (tilt, 0), then shift them."""
    turn = rotation(tilt)
    part = surfaces[first : last + 1]
    depths = np.cumsum([0.0, *(float(surface.d_next) for surface in part[:-1])])
    start = np.array([float(part[0].pos_x), float(part[0].pos_y), 0.0])
    ahead = 0.0  # by how much the surface before this one has moved along the axis
    for index, (surface, depth) in enumerate(zip(part, depths, strict=True), start=first):
        vertex = np.array([float(surface.pos_x), float(surface.pos_y), depth])
        x, y, z = start + turn @ (vertex - start)
        surface.pos_x = torch.full_like(surface.pos_x, x + decentre[0])
        surface.pos_y = torch.full_like(surface.pos_y, y + decentre[1])
        if tilt.any():
            normal = turn @ surface.vec_local.double().cpu().numpy()
            surface.vec_local = torch.as_tensor(normal / np.linalg.norm(normal)).to(surface.vec_local)
            surface._cache_rotation_matrices()  # DeepLens keeps matrices of the normal it was built with
        if index > first:
            surfaces[index - 1].d_next = surfaces[index - 1].d_next + (z - depth - ahead)
        ahead = z - depth
    surfaces[last].d_next = surfaces[last].d_next - ahead


def rotation(tilt: Vector) -> NDArray[np.float64]:
    """The rotation matrix of the vector (tilt_x, tilt_y, 0), in radians (Rodrigues)."""
    angle = math.hypot(*tilt)
    if angle == 0:
        return np.eye(3)
    x, y = tilt / angle
    cross = np.array([[0.0, 0.0, y], [0.0, 0.0, -x], [-y, x, 0.0]])
    turn: NDArray[np.float64] = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return turn


class ShiftedGlass:
    """A DeepLens material whose refractive index is off by `shift` at every wavelength."""

    def __init__(self, glass: Any, shift: float) -> None:
        self.glass, self.shift = glass, shift

    def ior(self, wavelength_um: Any) -> Any:
        """The refractive index."""
        return self.glass.ior(wavelength_um) + self.shift

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "glass" not in self.__dict__:  # asked of a copy that is still empty
            raise AttributeError(name)
        return getattr(self.glass, name)
