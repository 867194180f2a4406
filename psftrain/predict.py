"""A trained model as a function of a place: what `psftrain.load` gives, and what sampling and exports share.

Legend: N points, W wavelengths, y x the bins of a kernel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psfgen.errors import ConfigError, RunMismatch
from psfgen.store.schema import centres_um
from psftrain.conditioning import Conditioning
from psftrain.models.base import CVAE
from psftrain.run import Trained

BATCH_BINS = 2**17  # bins of a batch; larger ones are no faster and take memory


class PriorMean(nn.Module):
    """The path that interpolates, from physical units: decode the mean of p(z | c)."""

    def __init__(self, model: CVAE, conditioning: Conditioning) -> None:
        super().__init__()
        self.model, self.field_max = model, conditioning.field_max
        self.scales = [
            ((low + high) / 2, 2 / (high - low) if high > low else 0.0)
            for low, high in (conditioning.depth_dioptre, conditioning.focus_dioptre)
        ]

    def forward(self, field: Tensor, depth_mm: Tensor, focus_mm: Tensor) -> Tensor:
        """Kernels [N, W, y, x] at `field` [N, 2] (field_x, field_y) and distances [N], which may be inf.

        Distances are scaled in the precision in which they are given, as `Conditioning.encode` does it.
        """
        columns = [field / self.field_max]
        for distance_mm, (centre, gain) in zip((depth_mm, focus_mm), self.scales, strict=True):
            columns.append(((1000 / distance_mm - centre) * gain)[:, None])
        condition = torch.cat(columns, dim=-1).to(next(self.model.parameters()).dtype)
        return self.model.decode(self.model.prior(condition).mean, condition)


class PsfModel:
    """A trained model to ask for kernels, with what its numbers mean.

    `wavelength_um` [W]: its channels, ascending. `pitch_um`: the spacing of a kernel's bins; `y_um` [y] (descending:
    row 0 is scene +y) and `x_um` [x]: their centres, from the chief ray. `field_max`: how far the trained field
    reaches, in half sensor sides. `depth_mm`, `focus_mm`: the nearest and farthest distance trained on.
    """

    def __init__(self, trained: Trained, device: str | torch.device = "cpu") -> None:
        fingerprint, conditioning = trained.fingerprint, trained.conditioning
        self.trained = trained
        self.device = torch.device(device)
        self.network = PriorMean(trained.model, conditioning).eval().to(self.device)
        self.wavelength_um: NDArray[np.float64] = np.array(fingerprint["wavelength"])
        window_um = fingerprint["pitch_um"] * fingerprint["kernel_px"]
        side = fingerprint["bins" if trained.config.data.array == "psf_binned" else "kernel_px"]
        self.pitch_um: float = window_um / side
        self.x_um = centres_um(side, self.pitch_um)
        self.y_um = self.x_um[::-1].copy()
        self.field_max = conditioning.field_max
        self.depth_mm = _range_mm(conditioning.depth_dioptre)
        self.focus_mm = _range_mm(conditioning.focus_dioptre)

    def __repr__(self) -> str:
        waves = ", ".join(f"{w:g}" for w in self.wavelength_um)
        return (
            f"<PsfModel {self.trained.path}: {waves} um, {len(self.y_um)} x {len(self.x_um)} bins of "
            f"{self.pitch_um:.4g} um, field to {self.field_max:g}, depth {_words(self.depth_mm)} mm, "
            f"focus {_words(self.focus_mm)} mm>"
        )

    def psf(
        self, field: Any, depth_mm: Any = None, focus_mm: Any = None, *, batch: int | None = None
    ) -> NDArray[np.float32]:
        """Kernels float32 [..., W, y, x] at `field` [..., 2] (field_x, field_y) and distances in mm.

        Lists, arrays and tensors; the distances are numbers or broadcast with the leading axes of `field`, may be
        inf, and may be left out where the run was trained on one value. `batch` points are computed at a time.
        Raises RunMismatch outside what was trained on, ConfigError for what is no place.
        """
        xy, *distances_mm = self._places(field, depth_mm, focus_mm)
        shape, count = xy.shape[:-1], xy[..., 0].size
        kernel = (len(self.wavelength_um), len(self.y_um), len(self.x_um))
        size = max(1, BATCH_BINS // (kernel[1] * kernel[2])) if batch is None else batch
        if size < 1:
            raise ConfigError(f"batch {batch}: at least 1 point at a time")
        flat = [xy.reshape(count, 2), *(values.reshape(count) for values in distances_mm)]
        places = [torch.tensor(values, device=self.device) for values in flat]
        found = np.empty((count, *kernel), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, count, size):
                some = slice(start, start + size)
                found[some] = self.network(*(column[some] for column in places)).cpu().numpy()
        return found.reshape(*shape, *kernel)

    def _places(self, field: Any, depth_mm: Any, focus_mm: Any) -> list[NDArray[np.float64]]:
        """`field` [..., 2], depth and focus [...], of one leading shape, all within what was trained on."""
        xy = _numbers("field", field)
        if xy.ndim < 1 or xy.shape[-1] != 2:
            raise ConfigError(f"field has the shape {list(xy.shape)}; give [..., 2]: field_x, field_y")
        distances_mm = [
            _numbers(name, _only(name, trained_mm) if given is None else given)
            for name, given, trained_mm in (
                ("depth_mm", depth_mm, self.depth_mm),
                ("focus_mm", focus_mm, self.focus_mm),
            )
        ]
        try:
            shape = np.broadcast_shapes(xy.shape[:-1], *(values.shape for values in distances_mm))
        except ValueError:
            given = ", ".join(str(list(values.shape)) for values in (xy, *distances_mm))
            raise ConfigError(f"field, depth_mm and focus_mm of the shapes {given} do not go together") from None
        reach = np.abs(xy).max(initial=0.0)
        if not reach <= self.field_max * (1 + 1e-6):
            raise RunMismatch(f"field {reach:g} is outside the field trained on, up to {self.field_max:g}")
        with np.errstate(divide="ignore"):
            depth, focus = (1000 / values for values in distances_mm)
        self.trained.conditioning.require(depth, focus, f"run {self.trained.path}")
        return [np.broadcast_to(xy, (*shape, 2)), *(np.broadcast_to(values, shape) for values in distances_mm)]


def _numbers(name: str, given: Any) -> NDArray[np.float64]:
    values = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is no array of numbers") from None
    if name != "field" and np.isnan(numbers).any():
        raise ConfigError(f"{name} holds NaN, which is no distance; inf is one")
    return numbers


def _only(name: str, trained_mm: tuple[float, float]) -> float:
    near, far = trained_mm
    if near < far:
        raise ConfigError(f"the run was trained on a range of {name}, {_words(trained_mm)}; say which")
    return near


def _range_mm(dioptre: tuple[float, float]) -> tuple[float, float]:
    far, near = (1000 / value if value else math.inf for value in dioptre)
    return near, far


def _words(distances_mm: tuple[float, float]) -> str:
    near, far = (f"{distance:.6g}" for distance in distances_mm)
    return near if near == far else f"{near} to {far}"
