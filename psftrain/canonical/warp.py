"""Where the kernels lie in the field-aligned frame and how large they are, as smooth functions of the field.

Legend: M training points, Q query points, W wavelengths. A warp is (cu, cv, su, sv): a kernel's centroid and its
standard deviations along and across the field radius, in samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.covariance import Parity, Setting, covariance, left_out, of_training
from psftrain.canonical.crossval import Folds, search
from psftrain.canonical.frame import Polar

Array = NDArray[np.float64]

LENGTHS = (0.25, 0.4, 0.7, 1.2, 2.0, 3.5)
NOISES = (1e-7, 1e-5, 1e-3, 1e-1)
START = Setting(length=1.2, harmonics=0, noise=1e-5)
# A turn by 180 degrees changes the sign of the centroid, not of the sizes; cv alone is odd in v.
PARTS = (Parity(-1, 1), Parity(-1, -1), Parity(1, 1), Parity(1, 1))
SAMPLE_VARIANCE = 1 / 12  # of one sample's own width; a kernel within one sample has some size too
FAR_OFF = 1.0  # squared relative error above which a prediction is simply wrong


@dataclass(frozen=True)
class Warp:
    """The warp of a field: weights [4, M, W] of the covariances with the training points."""

    setting: Setting
    weights: Array
    size: Array  # [W] that centroids are measured in

    def __call__(self, at: Polar, points: Polar) -> Array:
        """(cu, cv, su, sv) [Q, W, 4] in samples, from the training `points` [M]."""
        found = np.zeros((len(at), len(self.size), len(PARTS)))
        for i, parity in enumerate(PARTS):
            if self.setting.has(parity):
                found[..., i] = covariance(self.setting, parity, at, points) @ self.weights[i]
        return _from_features(found, self.size)


def moments(kernels: Array, theta: Array) -> Array:
    """(cu, cv, su, sv) [M, W, 4] of kernels [M, W, k, k] at field azimuths [M]."""
    side = kernels.shape[-1]
    x = np.arange(side) - (side - 1) / 2
    total = kernels.sum(axis=(-2, -1))
    columns, rows = kernels.sum(axis=-2) / total[..., None], kernels.sum(axis=-1) / total[..., None]
    mean_x, mean_y = columns @ x, -(rows @ x)
    xx, yy = columns @ x**2 - mean_x**2, rows @ x**2 - mean_y**2
    xy = -np.einsum("mwij,i,j->mw", kernels, x, x, optimize=True) / total - mean_x * mean_y
    cos, sin = np.cos(theta)[:, None], np.sin(theta)[:, None]
    uu = cos**2 * xx + 2 * cos * sin * xy + sin**2 * yy
    vv = sin**2 * xx - 2 * cos * sin * xy + cos**2 * yy
    sizes = (np.sqrt(np.maximum(variance, 0) + SAMPLE_VARIANCE) for variance in (uu, vv))
    return np.stack([cos * mean_x + sin * mean_y, cos * mean_y - sin * mean_x, *sizes], axis=-1)


def fit_warp(measured: Array, points: Polar, folds: Folds, searched: NDArray[np.int64]) -> Warp:
    """The warp of measured moments [M, W, 4]; its setting is judged on the points `searched` alone."""
    size = np.sqrt(np.mean(measured[..., 2] * measured[..., 3], axis=0))
    features = _to_features(measured, size)
    some, values = points[searched], features[searched]

    def score(setting: Setting) -> float:
        predicted = np.zeros((len(folds.judged), *values.shape[1:]))
        for i, parity in enumerate(PARTS):
            if setting.has(parity):
                precision = np.linalg.inv(of_training(setting, parity, some))
                predicted[..., i] = left_out(precision, folds.groups, folds.judged) @ values[..., i]
        return _wrongness(_from_features(predicted, size), measured[searched][folds.judged])

    setting, _ = search(START, score, LENGTHS, NOISES)
    weights = np.zeros((len(PARTS), *measured.shape[:2]))
    for i, parity in enumerate(PARTS):
        if setting.has(parity):
            weights[i] = np.linalg.solve(of_training(setting, parity, points), features[..., i])
    return Warp(setting, weights, size)


def _to_features(warp: Array, size: Array) -> Array:
    """What is smooth in the field: centroids in units of the size, logarithms of the sizes."""
    return np.concatenate([warp[..., :2] / size[:, None], np.log(warp[..., 2:] / size[:, None])], axis=-1)


def _from_features(features: Array, size: Array) -> Array:
    return np.concatenate([features[..., :2], np.exp(features[..., 2:])], axis=-1) * size[:, None]


def _wrongness(found: Array, true: Array) -> float:
    """Mean squared error of centroids and sizes, relative to the sizes."""
    centroid = np.square(found[..., :2] - true[..., :2]).sum(axis=-1) / (true[..., 2] * true[..., 3])
    sizes = np.square(found[..., 2:] / true[..., 2:] - 1).sum(axis=-1)
    return float(np.minimum((centroid + sizes).mean(axis=-1), FAR_OFF).mean())
