"""A ray map as a torch module: kernels at any place, on any device, for any exporter.

Legend: B places, W wavelengths, P pupil points, Q modes, S features, n cells a side, k samples a side.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psftrain.raymap.images import DARK, Cells, images
from psftrain.raymap.modes import Pupil
from psftrain.raymap.terms import CORNER2, Terms


class RayDecoder(nn.Module):
    """Counts the rays of a map, which fill the pupil evenly, on cells."""

    displacements: Tensor
    share: Tensor

    def __init__(self, terms: Terms, cells: Cells, rays: int) -> None:
        super().__init__()
        self.keys, self.cells = list(terms.features), cells
        self.register_buffer(
            "displacements", torch.tensor(Pupil(rays).displacements(terms.modes)).float(), persistent=False
        )
        self.register_buffer("share", torch.tensor(cells.share).float(), persistent=False)

    def features(self, field: Tensor, depth: Tensor, defocus: Tensor) -> Tensor:
        """As `Terms.at`: field [B, 2], depth and defocus [B] -> [B, S]."""
        x, y = (field / CORNER2**0.5).unbind(-1)
        cos, sin = [torch.ones_like(x)], [torch.zeros_like(x)]
        for _ in range(max(key[0] for key in self.keys)):
            cos, sin = [*cos, cos[-1] * x - sin[-1] * y], [*sin, cos[-1] * y + sin[-1] * x]
        at = 2 * (x * x + y * y) - 1
        legendre = [torch.ones_like(x), at]
        for i in range(2, 1 + max(key[1] for key in self.keys)):
            legendre.append(((2 * i - 1) * at * legendre[-1] - (i - 1) * legendre[-2]) / i)
        columns = []
        for a, i, d, f in self.keys:
            factor = legendre[i]
            for power, value in ((d, depth), (f, defocus)):
                factor = factor if power == 0 else factor * value**power
            columns += [factor * cos[a], factor * sin[a]]
        return torch.stack(columns, dim=-1)

    def forward(self, matrix: Tensor, features: Tensor) -> Tensor:
        """Kernels [B, W, n, n], each with a sum of 1, of maps [B or 1, W, Q, S] and features [B, S].

        On a CPU rays are counted by compiled loops, ten times as fast as what can be exported.
        """
        modes = torch.einsum("bwqs,bs->bwq", matrix.expand(features.shape[0], -1, -1, -1), features)
        if modes.device.type == "cpu" and not torch.compiler.is_compiling():
            image = self._counted(modes)
        else:
            image = self._summed(modes)
        kernels: Tensor = image / image.sum(dim=(-2, -1), keepdim=True).clamp_min(DARK)
        return kernels

    def _counted(self, modes: Tensor) -> Tensor:
        flat = modes.detach().flatten(0, 1).double().numpy()
        found = np.empty((len(flat), self.cells.side, self.cells.side))
        images(flat, *self.displacements.double().numpy(), self.cells.share, self.cells.first, found)
        return torch.from_numpy(found).to(modes.dtype).view(*modes.shape[:2], *found.shape[1:])

    def _summed(self, modes: Tensor) -> Tensor:
        x, y = torch.einsum("dpq,bwq->dbwp", self.displacements, modes)
        samples = self.share.shape[0]  # with a margin of one on either side
        across, in_x = self._shares((samples - 1) / 2 + (samples - 2) / 2 * x)
        down, in_y = self._shares((samples - 1) / 2 - (samples - 2) / 2 * y)
        image: Tensor = (down * (in_x & in_y)[..., None]).transpose(-1, -2) @ across
        return image

    def _shares(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The share of each cell in a ray at a sample number [..., P] -> [..., P, n], and whether the ray is seen."""
        last = self.share.shape[0] - 1
        below = at.floor().clamp(0, last - 1).long()
        beyond = (at - below)[..., None]
        return (1 - beyond) * self.share[below] + beyond * self.share[below + 1], (at >= 0) & (at < last)


def matrix_of(terms: Terms, coefficients: NDArray[np.float64]) -> Tensor:
    """The matrices [..., Q, S] of coefficients [..., T], for `RayDecoder`."""
    return torch.tensor(terms.matrix(coefficients)).float()
