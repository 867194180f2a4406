"""A trained model as a function of a place: what `psftrain.load` gives, and what sampling and exports share.

Legend: N points, W wavelengths, y x the bins of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psfgen.errors import ConfigError
from psfgen.store.schema import centres_um
from psftrain.conditioning import Conditioning
from psftrain.models.base import CVAE
from psftrain.places import words
from psftrain.run import Trained

BATCH_BINS = 2**17  # bins of a batch; larger ones are no faster and take memory


class PriorMean(nn.Module):
    """The path that interpolates, from physical units: decode the mean of p(z | c), or one latent `z` [L]."""

    def __init__(self, model: CVAE, conditioning: Conditioning, z: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.field_max, self.z = model, conditioning.field_max, z
        self.scales = [
            ((low + high) / 2, 2 / (high - low) if high > low else 0.0)
            for low, high in (conditioning.depth_dioptre, conditioning.focus_dioptre)
        ]

    def forward(self, field: Tensor, depth_mm: Tensor, focus_mm: Tensor) -> Tensor:
        """Kernels [N, W, y, x] at `field` [N, 2] (field_x, field_y) and distances [N], which may be inf.

        Distances are scaled in the precision in which they are given, as `Conditioning.encode` does it.
        """
        condition = self.condition(field, depth_mm, focus_mm)
        z = self.model.prior(condition).mean if self.z is None else self.z.expand(condition.shape[0], -1)
        return self.model.decode(z, condition)

    def condition(self, field: Tensor, depth_mm: Tensor, focus_mm: Tensor) -> Tensor:
        """The model's conditions [N, C] of such places."""
        columns = [field / self.field_max]
        for distance_mm, (centre, gain) in zip((depth_mm, focus_mm), self.scales, strict=True):
            columns.append(((1000 / distance_mm - centre) * gain)[:, None])
        return torch.cat(columns, dim=-1).to(self.model.dtype)


class PsfModel:
    """A trained model to ask for kernels, with what its numbers mean.

    `wavelength_um` [W]: its channels, ascending. `pitch_um`: the spacing of a kernel's bins; `y_um` [y] (descending:
    row 0 is scene +y) and `x_um` [x]: their centres, from the chief ray. `field_max`: how far the trained field
    reaches, in half sensor sides. `depth_mm`, `focus_mm`: the nearest and farthest distance trained on.
    """

    def __init__(
        self, trained: Trained, device: str | torch.device = "cpu", wavelength_um: NDArray[np.float64] | None = None
    ) -> None:
        """`wavelength_um`: other channels than those trained on; raises RunMismatch where the model has none."""
        fingerprint, conditioning = trained.fingerprint, trained.conditioning
        self.trained = trained
        self.device = torch.device(device)
        model = trained.model if wavelength_um is None else trained.model.for_wavelengths(wavelength_um)
        self.network = PriorMean(model, conditioning).eval().to(self.device)
        known: NDArray[np.float64] = np.array(fingerprint["wavelength"])
        self.wavelength_um = known if wavelength_um is None else wavelength_um
        window_um = fingerprint["pitch_um"] * fingerprint["kernel_px"]
        side = fingerprint["bins" if trained.config.data.array == "psf_binned" else "kernel_px"]
        self.pitch_um: float = window_um / side
        self.x_um = centres_um(side, self.pitch_um)
        self.y_um = self.x_um[::-1].copy()
        self.field_max = conditioning.field_max
        self.domain = conditioning.domain(f"run {trained.path}")
        self.depth_mm = self.domain.depth_mm
        self.focus_mm = self.domain.focus_mm

    def __repr__(self) -> str:
        waves = ", ".join(f"{w:g}" for w in self.wavelength_um)
        return (
            f"<PsfModel {self.trained.path}: {waves} um, {len(self.y_um)} x {len(self.x_um)} bins of "
            f"{self.pitch_um:.4g} um, field to {self.field_max:g}, depth {words(self.depth_mm)} mm, "
            f"focus {words(self.focus_mm)} mm>"
        )

    def drawn(self, copies: int, seed: int) -> Iterator[PsfModel]:
        """Models of copies drawn from the prior of a model that has seen many. Raises RunMismatch for another."""
        for z in self.network.model.draw(copies, seed):
            one = copy(self)
            one.network = PriorMean(self.network.model, self.trained.conditioning, z).eval().to(self.device)
            yield one

    def expected_error(self, field: Any, depth_mm: Any = None, focus_mm: Any = None) -> NDArray[np.float32] | None:
        """The relative L2 error [...] to be expected of `psf` at the same places; None where the model cannot say.

        NaN outside what was trained on: nothing is known there.
        """
        xy, *distances_mm = self.domain.places(field, depth_mm, focus_mm, outside=True)
        flat = [torch.tensor(xy.reshape(-1, 2)), *(torch.tensor(values.reshape(-1)) for values in distances_mm)]
        with torch.no_grad():
            found = self.network.model.expected_error(self.network.condition(*(part.to(self.device) for part in flat)))
        if found is None:
            return None
        expected: NDArray[np.float32] = found.cpu().numpy().reshape(xy.shape[:-1])
        return np.where(self.domain.is_outside(xy, *distances_mm), np.float32(np.nan), expected)

    def psf(
        self,
        field: Any,
        depth_mm: Any = None,
        focus_mm: Any = None,
        *,
        batch: int | None = None,
        outside: bool = False,
    ) -> NDArray[np.float32]:
        """Kernels float32 [..., W, y, x] at `field` [..., 2] (field_x, field_y) and distances in mm.

        Lists, arrays and tensors; the distances are numbers or broadcast with the leading axes of `field`, may be
        inf, and may be left out where the run was trained on one value. `batch` points are computed at a time.
        Raises RunMismatch outside what was trained on, unless `outside` allows a guess there; ConfigError for what is
        no place.
        """
        xy, *distances_mm = self.domain.places(field, depth_mm, focus_mm, outside=outside)
        shape, count = xy.shape[:-1], xy[..., 0].size
        kernel = (len(self.wavelength_um), len(self.y_um), len(self.x_um))
        size = max(1, BATCH_BINS // (kernel[1] * kernel[2])) if batch is None else batch
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ConfigError(f"batch {batch}: a whole number, at least 1 point at a time")
        flat = [xy.reshape(count, 2), *(values.reshape(count) for values in distances_mm)]
        places = [torch.tensor(values, device=self.device) for values in flat]
        found = np.empty((count, *kernel), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, count, size):
                some = slice(start, start + size)
                found[some] = self.network(*(column[some] for column in places)).cpu().numpy()
        return found.reshape(*shape, *kernel)
