"""From kernels to a Canonical: warp, images, what they leave, blend, expected error.

Legend: M training points, K nodes, C judged ones, W wavelengths, k kernel side, b bins a side, D = W b b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import FitError
from psftrain.canonical.blend import Blend, fit_blend
from psftrain.canonical.covariance import Setting
from psftrain.canonical.crossval import Folds, search
from psftrain.canonical.expectation import Expectation, disagreement, ignorance_left_out
from psftrain.canonical.frame import Polar, binning, from_canonical, nodes_of, on_simplex, over_points, to_canonical
from psftrain.canonical.model import Canonical
from psftrain.canonical.shape import LENGTHS, NOISES, START, Part, fit_shape, left_out_images, split
from psftrain.canonical.thinplate import ThinPlate
from psftrain.canonical.warp import fit_warp, moments
from psftrain.metrics import rel_l2

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Numbers = NDArray[Any]

MOST_POINTS = 1600  # more add time and memory, not quality
SEARCHED = 400  # points that settings are chosen on
JUDGED = 64  # of them, points that a setting of the images is judged by


def fit_canonical(field: Numbers, kernels: Numbers, binned: Numbers, *, seed: int) -> Canonical:
    """Fit kernels [M, W, k, k] and their bins [M, W, b, b] at field points [M, 2], in any order or arrangement.

    `field` is (x, y), y up, in units in which angles are those on the sensor and the field reaches to about 1; row 0
    of a kernel is +y. Points with a NaN are left aside. The seed draws the points that settings are chosen by
    where there are many. Raises FitError where the points do not span a field.
    """
    draw = np.random.default_rng(seed)
    chosen = _lit(kernels, binned, draw)
    field, kernels, binned = (np.asarray(array[chosen], dtype=np.float64) for array in (field, kernels, binned))
    plate, (nodes, of) = ThinPlate.of(field), nodes_of(field)
    shares, groups = binning(kernels.shape[-1], binned.shape[-1]), Folds.of(nodes).groups
    searched = np.sort(draw.permutation(len(nodes))[:SEARCHED])
    folds = Folds.of(nodes[searched])

    warp = fit_warp(moments(kernels[of], nodes.theta), nodes, folds, searched)
    placed = warp(nodes, nodes)
    parts = split(to_canonical(kernels[of], nodes.theta, placed))
    setting = _choose(parts, nodes, placed, binned[of], shares, searched, folds.judging(JUDGED, draw))
    shape, precisions = fit_shape(setting, parts, nodes)

    everywhere = Folds(groups, np.arange(len(nodes)))
    own = from_canonical(shape(nodes, nodes), nodes.theta, placed, shares)
    alone = from_canonical(left_out_images(setting, parts, precisions, everywhere), nodes.theta, placed, shares)
    own, alone = over_points(own, of), over_points(alone, of)
    truth, own, alone = (stack.reshape(len(field), -1) for stack in (binned, own, alone))
    plain = plate.left_out(truth)
    blend, mixed = _blend(Polar.of(field), truth, alone, plate.left_out(truth - own), plain)
    errors = rel_l2(on_simplex(mixed.reshape(binned.shape)), binned)
    unsure = over_points(ignorance_left_out(precisions[0], groups), of)
    return Canonical(
        field,
        warp,
        shape,
        np.concatenate([plate.weights(truth - own), plate.weights(truth)], axis=1),
        blend,
        errors,
        Expectation.of(field, errors, unsure, disagreement(alone, plain)),
        kernels.shape[-1],
        binned.shape[-1],
    )


def _lit(kernels: Numbers, binned: Numbers, draw: np.random.Generator) -> Indices:
    """The points without a NaN, at most MOST_POINTS of them."""
    lit = np.isfinite(kernels).all(axis=(1, 2, 3)) & np.isfinite(binned).all(axis=(1, 2, 3))
    if not lit.any():
        raise FitError("canonical: no training point has light in every channel; render others")
    return np.sort(draw.permutation(np.flatnonzero(lit))[:MOST_POINTS])


def _choose(
    parts: Sequence[Part],
    nodes: Polar,
    placed: Array,
    binned: Array,
    shares: Array,
    searched: Indices,
    folds: Folds,
) -> Setting:
    """The covariance of the images whose kernels at left-out points are nearest to the true ones."""
    some, judged = nodes[searched], searched[folds.judged]
    seen = [Part(part.parity, part.scores[searched], part.components) for part in parts]

    def score(setting: Setting) -> float:
        _, precisions = fit_shape(setting, seen, some)
        images = left_out_images(setting, seen, precisions, folds)
        return float(rel_l2(from_canonical(images, nodes.theta[judged], placed[judged], shares), binned[judged]).mean())

    return search(START, score, LENGTHS, NOISES)[0]


def _blend(points: Polar, truth: Array, alone: Array, residual: Array, plain: Array) -> tuple[Blend, Array]:
    """The blend of the models' predictions at left-out points, and what it makes of them [M, D]."""
    judged = Folds.of(points).judged
    spacing = points.radius.max() * np.sqrt(np.pi / len(points))
    blend = fit_blend(points.radius[judged], spacing, truth[judged], alone[judged], residual[judged], plain[judged])
    return blend, blend.mix(points.radius, alone, residual, plain)
