"""What interpolation makes of a few kernels of one copy of a lens, and of the kernels of other copies.

Legend: K copies, M places of the training grid [Ny, Nx], N measured places, Q queries, D numbers of a kernel stack
[W, y, x], R components.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from psftrain.metrics import rel_l2

Array = NDArray[np.float64]

COMPONENTS = (16, 32, 64, 128, 256, 384)
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of a number of a kernel, in parts of the root mean square of kernels
FOLDS = 4


def through(places: Array, queries: Array) -> Array:
    """The weights [Q, N] of a thin-plate spline through places [N, 2]."""
    found: Array = RBFInterpolator(places, np.eye(len(places)), kernel="thin_plate_spline")(queries)
    return found


def rbf(places: Array, stacks: Array, queries: Array) -> Array:
    """Thin-plate RBF through measured stacks [N, W, y, x], at queries [Q, 2]."""
    return np.tensordot(through(places, queries), stacks, axes=1)


def alike(fields: Array) -> Array:
    """Fields [K, Ny, Nx, W, y, x], Ny = Nx, and what 3 turns and 4 mirrors make of them: 8 K copies as likely."""

    def all_of(fields: Array) -> Iterator[Array]:
        for swap, flip_x, flip_y in product((False, True), repeat=3):
            found = fields
            if swap:  # row 0 of a kernel is +y, that of a field is -y
                found = found.swapaxes(1, 2)[..., ::-1, ::-1].swapaxes(-1, -2)
            if flip_x:
                found = found[:, :, ::-1, ..., ::-1]
            if flip_y:
                found = found[:, ::-1, ..., ::-1, :]
            yield found

    return np.concatenate(list(all_of(fields)))


@dataclass(frozen=True)
class Fields:
    """The principal components of whole fields: `mean` [M, D] and `parts` [R, M, D], each as large as it varies."""

    places: Array
    mean: Array
    parts: Array

    @staticmethod
    def of(places: Array, fields: Array) -> Fields:
        """Those of fields [K, Ny, Nx, W, y, x] and all that are alike; places are [M, 2]."""
        flat = alike(fields).reshape(8 * len(fields), len(places), -1)
        mean = flat.mean(axis=0)
        off = (flat - mean).reshape(len(flat), -1)
        sizes, turns = np.linalg.eigh(off @ off.T / len(off))
        parts = turns[:, np.argsort(sizes)[::-1][: max(COMPONENTS)]].T @ off / np.sqrt(len(off))
        return Fields(places, mean, parts.reshape(-1, *mean.shape))

    def through(self, queries: Array) -> tuple[Array, Array]:
        """The mean [Q, D] and the components [R, Q, D] elsewhere, by thin-plate splines."""
        weights = through(self.places, queries)
        return weights @ self.mean, weights @ self.parts


@dataclass(frozen=True)
class Choice:
    """How fields are fitted to a few kernels: `components`, the `noise` of kernels, and whether what is left of them
    is interpolated on top.
    """

    components: int
    noise: float
    residual: bool


CHOICES = tuple(Choice(*each) for each in product(COMPONENTS, NOISES, (False, True)))


@dataclass(frozen=True)
class Between:
    """From where one copy is measured, `places` [N, 2], to where it is asked for, `queries` [Q, 2]: the mean and the
    components of fields at both, `known` and `asked`.
    """

    places: Array
    queries: Array
    known: tuple[Array, Array]
    asked: tuple[Array, Array]

    @staticmethod
    def of(fields: Fields, places: Array, queries: Array) -> Between:
        return Between(places, queries, fields.through(places), fields.through(queries))

    def mean_and_rbf(self, stacks: Array) -> Array:
        """The mean of copies, and a thin-plate spline through how measured stacks [N, W, y, x] differ from it."""
        off = stacks.reshape(len(stacks), -1) - self.known[0]
        found: Array = self.asked[0] + through(self.places, self.queries) @ off
        return found.reshape(-1, *stacks.shape[1:])

    def fitted(self, stacks: Array, choice: Choice) -> Array:
        """The most likely field for measured stacks [N, W, y, x], at the queries."""
        flat = stacks.reshape(len(stacks), -1)
        count = choice.components
        off = (flat - self.known[0]).ravel()
        parts = self.known[1][:count].reshape(-1, off.size)
        noise2 = choice.noise**2 * np.square(flat).mean()
        scores = np.linalg.solve(parts @ parts.T + noise2 * np.eye(len(parts)), parts @ off)
        found: Array = self.asked[0] + np.tensordot(scores, self.asked[1][:count], axes=1)
        if choice.residual:
            left = (off - scores @ parts).reshape(flat.shape)
            found = found + through(self.places, self.queries) @ left
        return found.reshape(-1, *stacks.shape[1:])


def choose(places: Array, fields: Array, measured: NDArray[np.int64]) -> Choice:
    """What errs least on copies [K, Ny, Nx, W, y, x] left out of the components, `measured` being known of them."""
    flat = fields.reshape(len(fields), len(places), *fields.shape[3:])
    rest = np.setdiff1d(np.arange(len(places)), measured)
    errors = np.zeros(len(CHOICES))
    for fold in range(FOLDS):
        out = np.arange(len(fields)) % FOLDS == fold
        here = Between.of(Fields.of(places, fields[~out]), places[measured], places[rest])
        for own in flat[out]:
            errors += [rel_l2(here.fitted(own[measured], choice), own[rest]).mean() for choice in CHOICES]
    return CHOICES[int(errors.argmin())]
