"""Classical interpolation of kernels over the field, for the model to be measured against.

Legend: Q query points, D numbers of a kernel stack. Kernels are interpolated number by number; between
training depths and focus distances, linearly in dioptres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator, RegularGridInterpolator, make_interp_spline

Array = NDArray[np.float64]
Query = Callable[[Array], Array]

COMPONENTS = 30
MANY_NODES = 2000  # above, RBF uses the nearest nodes only
NEAREST_NODES = 200


@dataclass(frozen=True)
class Nodes:
    """Training kernels of one depth and focus on their grid: `y` [Ny], `x` [Nx], `values` [Ny, Nx, D].

    Masked nodes are NaN.
    """

    y: Array
    x: Array
    values: Array

    @property
    def points(self) -> Array:
        """(y, x) of the nodes that are not masked [n, 2]."""
        y, x = np.meshgrid(self.y, self.x, indexing="ij")
        return np.stack([y[self.lit], x[self.lit]], axis=-1)

    @property
    def lit(self) -> NDArray[np.bool_]:
        """Nodes that are not masked [Ny, Nx]."""
        return np.asarray(~np.isnan(self.values[..., 0]))

    @property
    def span_the_field(self) -> bool:
        """Whether three nodes that are not masked lie off one line."""
        points = self.points
        return bool(np.linalg.matrix_rank(np.column_stack([points, np.ones(len(points))])) == 3)


def nothing(nodes: Nodes) -> Query:
    """No answer anywhere, for nodes that are too few."""
    return lambda yx: np.full((len(yx), nodes.values.shape[-1]), np.nan)


def nearest(nodes: Nodes) -> Query:
    """The kernel of the nearest node."""
    return _grid(nodes, nodes.values, "nearest")


def bilinear(nodes: Nodes) -> Query:
    """Bilinear; NaN in cells that touch a masked node."""
    return _grid(nodes, nodes.values, "linear")


def bicubic(nodes: Nodes) -> Query:
    """Tensor-product cubic spline; NaN where `bilinear` is."""
    filled = nodes.values
    if not nodes.lit.all():  # a spline reaches far: masked nodes get a neighbour's kernel, their cells are skipped
        y, x = np.meshgrid(nodes.y, nodes.x, indexing="ij")
        at = np.stack([y, x], axis=-1)[~nodes.lit]
        closest = np.square(at[:, None] - nodes.points[None]).sum(axis=-1).argmin(axis=1)
        filled = nodes.values.copy()
        filled[~nodes.lit] = nodes.values[nodes.lit][closest]
    mask = _grid(nodes, nodes.values[..., :1], "linear")
    # A spline is linear in its nodes, so splines through unit vectors give each node's weight at a query.
    in_y, in_x = (make_interp_spline(axis, np.eye(len(axis)), k=3) for axis in (nodes.y, nodes.x))

    def query(yx: Array) -> Array:
        along_x = np.einsum("qi,ijd->qjd", in_y(yx[:, 0]), filled, optimize=True)
        return np.where(np.isnan(mask(yx)), np.nan, np.einsum("qj,qjd->qd", in_x(yx[:, 1]), along_x))

    return query


def rbf_tps(nodes: Nodes) -> Query:
    """Thin-plate spline through the nodes that are not masked."""
    return _rbf(nodes.points, nodes.values[nodes.lit])


def pca_rbf(nodes: Nodes) -> Query:
    """Thin-plate spline of the leading principal components."""
    kernels = nodes.values[nodes.lit]
    mean = kernels.mean(axis=0)
    _, _, components = np.linalg.svd(kernels - mean, full_matrices=False)
    components = components[:COMPONENTS]
    score = _rbf(nodes.points, (kernels - mean) @ components.T)
    return lambda yx: score(yx) @ components + mean


def _grid(nodes: Nodes, values: Array, method: Any) -> Query:
    """On the grid, NaN beyond it."""
    found: Query = RegularGridInterpolator((nodes.y, nodes.x), values, method=method, bounds_error=False)
    return found


def _rbf(points: Array, values: Array) -> Query:
    neighbors = NEAREST_NODES if len(points) > MANY_NODES else None
    found: Query = RBFInterpolator(points, values, kernel="thin_plate_spline", neighbors=neighbors)
    return found


# Name -> (how, nodes a side it needs).
CLASSICAL: dict[str, tuple[Callable[[Nodes], Query], int]] = {
    "nearest": (nearest, 2),
    "bilinear": (bilinear, 2),
    "bicubic": (bicubic, 4),
    "rbf_tps": (rbf_tps, 3),
    "pca_rbf": (pca_rbf, 3),
}


def best_classical(means: Mapping[str, float]) -> str | None:
    """The classical row with the lowest mean, of those that there are; of rows that agree, the plainer.

    PCA + RBF is thin-plate RBF to rounding where there are fewer nodes than components.
    """
    return min((name for name in CLASSICAL if name in means), key=lambda name: round(means[name], 9), default=None)


def brackets(known: Array, wanted: float) -> list[tuple[int, float]]:
    """(index, weight) of the one or two of `known` dioptres between which `wanted` lies linearly."""
    closest = int(np.abs(known - wanted).argmin())
    if len(known) == 1 or np.isclose(known[closest], wanted, rtol=1e-9, atol=1e-12):
        return [(closest, 1.0)]
    order = np.argsort(known)
    upper = int(np.clip(np.searchsorted(known[order], wanted), 1, len(known) - 1))
    low, high = order[upper - 1], order[upper]
    share = float((wanted - known[low]) / (known[high] - known[low]))
    return [(int(low), 1 - share), (int(high), share)]
