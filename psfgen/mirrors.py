"""Which field points mirror each other, and the kernels of the mirrored ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psfgen.optics.blocks import jit

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Folding:
    """Every field point (flat index, row by row) as a mirror image of a representative.

    From the representative's kernel one gets the point's by exchanging x and y, then turning left to right, then
    top to bottom, where `swap`, `flip_x`, `flip_y` say so.
    """

    representative: NDArray[np.int64]  # [Ny * Nx]
    swap: NDArray[np.bool_]
    flip_x: NDArray[np.bool_]
    flip_y: NDArray[np.bool_]


def fold(field_x: Array, field_y: Array, sensor_mm: tuple[float, float], *, symmetric: bool) -> Folding:
    """Fold a field of a lens that is rotationally `symmetric`, or not at all.

    An axis folds where it is symmetric about 0; the diagonal where axes and sensor sides are equal besides. The
    representative has x >= y >= 0 as far as the axes allow.
    """
    row, column = (v.ravel() for v in np.indices((len(field_y), len(field_x))))
    nothing = np.zeros(len(row), bool)
    fold_x = symmetric and np.array_equal(field_x, -field_x[::-1])
    fold_y = symmetric and np.array_equal(field_y, -field_y[::-1])
    flip_x = (field_x[column] < 0) if fold_x else nothing
    flip_y = (field_y[row] < 0) if fold_y else nothing
    column = np.where(flip_x, len(field_x) - 1 - column, column)
    row = np.where(flip_y, len(field_y) - 1 - row, row)
    swap = nothing
    if fold_x and fold_y and sensor_mm[0] == sensor_mm[1] and np.array_equal(field_x, field_y):
        swap = row > column
        row, column = np.where(swap, column, row), np.where(swap, row, column)
    return Folding(row * len(field_x) + column, swap, flip_x, flip_y)


@jit
def unfold(kernels, source, swap, flip_x, flip_y, at, out):  # type: ignore[no-untyped-def]
    """Write the kernels [U, F, W, k, k] of the representatives `source` [P] to out[:, at[P]] [F, points, W, k, k].

    Rows go from scene +y down, columns from scene -x on: exchanging x and y mirrors a kernel at its other
    diagonal. Points that share a representative should follow each other: it is mirrored once for all of them.
    """
    _, focuses, waves, k, _ = kernels.shape
    swapped = np.empty((focuses, waves, k, k), np.float32)
    last = -1
    for p in range(len(source)):
        if swap[p] and source[p] != last:
            last = source[p]
            for f in range(focuses):
                for w in range(waves):
                    for row in range(k):
                        for column in range(k):
                            swapped[f, w, row, column] = kernels[last, f, w, k - 1 - column, k - 1 - row]
        for f in range(focuses):
            for w in range(waves):
                to = out[f, at[p], w]
                kernel = swapped[f, w] if swap[p] else kernels[source[p], f, w]
                for row in range(k):
                    line = kernel[k - 1 - row] if flip_y[p] else kernel[row]
                    if flip_x[p]:
                        for column in range(k):
                            to[row, column] = line[k - 1 - column]
                    else:
                        for column in range(k):
                            to[row, column] = line[column]
