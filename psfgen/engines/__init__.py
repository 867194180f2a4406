"""Engines: what turns field points into deposits on the kernels' samples. To add one, add a line to ENGINES."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from psfgen.errors import ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from psfgen.optics.lens import Lens

    Array = NDArray[np.float64]

ALL = slice(None)
ENGINES = {
    "geometric": "psfgen.engines.geometric:GeometricEngine",
    "auto": "psfgen.engines.auto:AutoEngine",
    "wave": "psfgen.engines.wave:WaveEngine",
    "deeplens": "psfgen.engines.deeplens:DeepLensEngine",
}


@dataclass(frozen=True)
class Deposits:
    """What an engine finds for P field points at one depth, F focus distances and W wavelengths."""

    halves: NDArray[np.float32]  # [P, F, W, 2, k, k] weight on each sample, from two halves of the rays
    throughput: NDArray[np.float64]  # [P, W]
    captured: NDArray[np.float64]  # [P, F, W]
    chief_mm: NDArray[np.float64]  # [P, F, 2] x, y, upright
    rays: int
    margins: tuple[float, float]  # what turns half the halves' difference into `noise`, into `noise_binned`
    model: NDArray[np.float64] | None = None  # [P, F, W] how much of engine wave is in each; of engine auto
    floor: NDArray[np.float64] | None = None  # [P, F, W] relative error that the halves do not show


@dataclass(frozen=True)
class Aim:
    """Where the rays of P field points at one depth go: they share U bundle positions."""

    field_xy: torch.Tensor  # [P, 2]
    depth_mm: float
    of_point: NDArray[np.int64]  # [P] which bundle position
    turn: Array  # [P, 2] cos, sin of what the hits are turned by
    slope: Array  # [U, 2]
    inverse_mm: float
    sensor_z_mm: Array  # [F]
    chief_mm: Array  # [U, F, 2]
    centre_mm: Array  # [U, 2] of the ellipse launched at, in the entrance pupil
    axes_mm: Array  # [U, 2, 2]

    def part(self, points: slice) -> Aim:
        """Some of the field points."""
        return replace(self, field_xy=self.field_xy[points], of_point=self.of_point[points], turn=self.turn[points])


class Engine(Protocol):
    """An engine is built from (lens, plan). It aims at field points, then deposits at most `batch` of them at a time.

    `batch` follows from the plan alone, so that no number depends on how the work is spread; a batch takes about
    `batch_bytes` of memory. `concurrent`
    says whether several threads may call `deposit` at once, `threads_suffice` that processes would gain nothing.
    `symmetric`: field points that mirror each other have mirrored kernels.
    """

    lens: Lens
    batch: int
    batch_bytes: int
    concurrent: bool
    threads_suffice: bool
    symmetric: bool
    sensor_z_mm: tuple[float, ...]

    def aim(self, field_xy: torch.Tensor, depth_mm: float, focuses: slice = ALL) -> Aim:
        """Make ready for the field points [P, 2] at one depth, for all focus distances or some."""
        ...

    def deposit(self, aim: Aim) -> Deposits:
        """Deposits of field points."""
        ...


def engine_class(name: str) -> Any:
    """The class of an engine. Raises ConfigError for an unknown name."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, ENGINES)}; known: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(import_module(module), attribute)
