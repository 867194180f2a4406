"""Canonical images as functions of the field: principal components, each a Gaussian process.

Legend: M training points, Q query points, W wavelengths, G canonical side, R components. An image is the sum of four
parts, even or odd in u and in v; each is kept as its quarter of positive u and v [W, G/2, G/2].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psftrain.canonical.covariance import PARITIES, Parity, Setting, covariance, left_out, of_training
from psftrain.canonical.crossval import Folds
from psftrain.canonical.frame import Polar

Array = NDArray[np.float64]

LENGTHS = (0.1, 0.16, 0.25, 0.4, 0.7, 1.2, 2.0)
NOISES = (1e-5, 1e-3, 1e-2, 1e-1)
START = Setting(length=0.4, harmonics=0, noise=1e-2)
LOST_ENERGY = 2e-5  # share of the images' squares that the components left out may hold


@dataclass(frozen=True)
class Part:
    """What has one parity: `components` [R, W, G/2, G/2], and for each point their scores or weights [M, R]."""

    parity: Parity
    scores: Array
    components: NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """Canonical images over the field; the parts' scores are the weights of covariances with the training points."""

    setting: Setting
    parts: tuple[Part, ...]

    def __call__(self, at: Polar, points: Polar) -> Array:
        """Images [Q, W, G, G], from the training `points` [M]."""
        return _join(
            self.parts, [covariance(self.setting, part.parity, at, points) @ part.scores for part in self.parts]
        )


def split(images: Array) -> tuple[Part, ...]:
    """The parts of the training images [M, W, G, G] that hold energy."""
    allowed = LOST_ENERGY / len(PARITIES) * float(np.square(images).sum())
    parts = (_components(parity, _quarter(images, parity), allowed) for parity in PARITIES)
    return tuple(part for part in parts if part.scores.shape[1])


def fit_shape(setting: Setting, parts: Sequence[Part], points: Polar) -> tuple[Shape, tuple[Array, ...]]:
    """The images' Gaussian process under a setting, and the inverse covariances [M, M] of its parts."""
    known = [part for part in parts if setting.has(part.parity)]
    precisions = tuple(np.linalg.inv(of_training(setting, part.parity, points)) for part in known)
    weighted = (
        Part(part.parity, precision @ part.scores, part.components)
        for part, precision in zip(known, precisions, strict=True)
    )
    return Shape(setting, tuple(weighted)), precisions


def left_out_images(setting: Setting, parts: Sequence[Part], precisions: Sequence[Array], folds: Folds) -> Array:
    """Images [C, W, G, G] at the judged points, each from the points of other groups."""
    known = [part for part in parts if setting.has(part.parity)]
    scores = [
        left_out(precision, folds.groups, folds.judged) @ part.scores
        for part, precision in zip(known, precisions, strict=True)
    ]
    return _join(known, scores)


def _quarter(images: Array, parity: Parity) -> Array:
    """The part of a parity [M, W, G/2, G/2]."""
    half = images.shape[-1] // 2
    along = images[..., half:] + parity.u * images[..., half - 1 :: -1]
    return np.asarray((along[..., half:, :] + parity.v * along[..., half - 1 :: -1, :]) / 4)


def _components(parity: Parity, quarters: Array, allowed: float) -> Part:
    """Principal components that leave no more than the `allowed` squares of all four quarters out."""
    flat = quarters.reshape(len(quarters), -1)
    energy, vectors = np.linalg.eigh(4 * flat @ flat.T)
    count = int((np.cumsum(np.maximum(energy, 0)) > allowed).sum())
    vectors = vectors[:, len(flat) - count :]
    components = (vectors.T @ flat).astype(np.float32)
    return Part(parity, vectors, components.reshape(count, *quarters.shape[1:]))


def _join(parts: Sequence[Part], scores: Sequence[Array]) -> Array:
    """Images [Q, W, G, G] of the parts' scores [Q, R]."""
    total: Array | float = 0.0
    for part, score in zip(parts, scores, strict=True):
        count, *shape = part.components.shape
        quarter = (score @ part.components.reshape(count, -1)).reshape(len(score), *shape)
        right = np.concatenate([part.parity.v * quarter[..., ::-1, :], quarter], axis=-2)
        total = total + np.concatenate([part.parity.u * right[..., ::-1], right], axis=-1)
    return np.asarray(total)
