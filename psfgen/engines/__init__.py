"""Engines: what turns field points into deposits on the kernels' samples. To add one, add a line to ENGINES."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from psfgen.errors import ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from psfgen.optics.lens import Lens

ENGINES = {
    "geometric": "psfgen.engines.geometric:GeometricEngine",
    "deeplens": "psfgen.engines.deeplens:DeepLensEngine",
}


@dataclass(frozen=True)
class Deposits:
    """What an engine finds for P field points at one depth, F focus distances and W wavelengths."""

    halves: NDArray[np.float64]  # [P, F, W, 2, k, k] weight on each sample, from two halves of the rays
    throughput: NDArray[np.float64]  # [P, W]
    captured: NDArray[np.float64]  # [P, F, W]
    chief_mm: NDArray[np.float64]  # [P, F, 2] x, y, upright
    rays: int


class Engine(Protocol):
    """An engine is built from (lens, plan) and called with batches of at most `batch` field points.

    `batch` follows from the plan alone, so that no number depends on how the work is spread. `concurrent`
    says whether several threads may call `deposit` at once.
    """

    lens: Lens
    batch: int
    concurrent: bool
    sensor_z_mm: tuple[float, ...]

    def deposit(self, field_xy: torch.Tensor, depth_mm: float) -> Deposits: ...


def engine_class(name: str) -> Any:
    """The class of an engine. Raises ConfigError for an unknown name."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, ENGINES)}; known: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(import_module(module), attribute)
