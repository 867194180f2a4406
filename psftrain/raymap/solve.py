"""The least-squares fit of a ray map to kernels: Levenberg's and Marquardt's method.

Legend: M places, T terms, k samples a side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from psftrain.raymap.images import Cells, images, misfit, mode_equations, normal_equations
from psftrain.raymap.modes import Pupil
from psftrain.raymap.terms import Sites, Terms

Array = NDArray[np.float64]

Done = Callable[[float], None]  # is told what share of a piece of work is done; it may raise, to end it

RIDGE = 1e-5  # of a term of order 4, in half windows; it grows as the fourth power of the order
DAMPING, MOST_DAMPING, LEAST_DAMPING = 1e-2, 1e4, 1e-5
PARTS = 8  # in which places are worked on at once
GAIN, SLOW = 3e-3, 2  # so many steps in a row that gain less than this share of the loss end a fit


def unheard(share: float) -> None:
    """Tell nobody."""


def part_of(done: Done, start: float, end: float) -> Done:
    """What tells `done` of a part of its work, between two shares of it."""
    return lambda share: done(start + (end - start) * share)


def parts_of(done: Done, count: int) -> list[Done]:
    """What tells `done` of each of so many parts of its work, which take as long."""
    return [part_of(done, number / count, (number + 1) / count) for number in range(count)]


@dataclass(frozen=True)
class Seen:
    """Kernels [M, k, k], one wavelength at one place each; the share of the light that each caught [M]."""

    sites: Sites
    kernels: NDArray[np.float32]
    captured: Array

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, some: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Seen:
        return Seen(self.sites[some], self.kernels[some], self.captured[some])


@dataclass(frozen=True)
class Prior:
    """Where coefficients are expected: `mean` [T], and how firmly, `precision` [T] or [T, T]."""

    mean: Array
    precision: Array

    @property
    def matrix(self) -> Array:
        return self.precision if self.precision.ndim == 2 else np.diag(self.precision)


def ridge(terms: Terms, strength: float = RIDGE) -> Prior:
    """Terms of high order are small."""
    return Prior(np.zeros(len(terms)), strength * (terms.order / 4) ** 4)


@dataclass(frozen=True)
class Fit:
    """Coefficients [T] of `terms`; `error`, the root of the mean squared relative misfit on the cells fitted."""

    terms: Terms
    coefficients: Array
    error: float


class Problem:
    """Kernels on some cells, to be met by the rays of a pupil through some terms."""

    def __init__(self, terms: Terms, seen: Seen, cells: Cells, pupil: Pupil, threads: Executor) -> None:
        self.terms, self.cells, self.threads = terms, cells, threads
        self.features = terms.at(seen.sites)
        rows, features, signs = terms.wiring
        self.rows = rows
        self.values = np.ascontiguousarray(self.features[:, features] * signs)
        self.targets = cells.image(seen.kernels).reshape(len(seen), -1)
        self.captured = seen.captured
        self.weight = 1 / np.square(self.targets).sum(axis=1) / len(seen)
        self.displacements = pupil.displacements(terms.modes)

    def _modes(self, coefficients: Array) -> Array:
        return self.features @ self.terms.matrix(coefficients).T

    def loss(self, coefficients: Array) -> float:
        """Mean squared relative misfit."""
        return self.loss_of(self._modes(coefficients))

    def loss_of(self, modes: Array) -> float:
        """That of places whose modes are [M, Q]."""

        def part(some: slice) -> float:
            found: float = misfit(modes[some], *self._seen(some))
            return found

        return sum(self._parts(part))

    def normal(self, coefficients: Array) -> tuple[float, Array, Array]:
        """(loss, gradient [T], hessian [T, T]), the derivatives halved and after Gauss and Newton."""
        modes, count = self._modes(coefficients), len(self.terms)

        def part(some: slice) -> tuple[float, Array, Array]:
            hessian, gradient = np.zeros((count, count)), np.zeros(count)
            loss = normal_equations(modes[some], *self._seen(some), self.values[some], self.rows, hessian, gradient)
            return loss, gradient, hessian

        losses, gradients, hessians = zip(*self._parts(part), strict=True)
        return sum(losses), sum(gradients), sum(hessians)

    def normal_of(self, modes: Array) -> tuple[float, Array, Array]:
        """(loss, gradients [M, Q], hessians [M, Q, Q]) by the modes [M, Q] of each place."""
        gradients, hessians = np.empty_like(modes), np.empty((*modes.shape, modes.shape[1]))

        def part(some: slice) -> float:
            found: float = mode_equations(modes[some], *self._seen(some), gradients[some], hessians[some])
            return found

        return sum(self._parts(part)), gradients, hessians

    def _seen(self, some: slice) -> tuple[Array, ...]:
        cells = self.cells
        return *self.displacements, cells.share, cells.first, self.targets[some], self.captured[some], self.weight[some]

    def _parts[T](self, work: Callable[[slice], T]) -> Iterator[T]:
        """The work on each part of the places: always the same parts, so that sums are the same on any machine."""
        edges = np.linspace(0, len(self.targets), PARTS + 1).astype(int).tolist()
        return self.threads.map(work, itertools.starmap(slice, itertools.pairwise(edges)))


class Squares(Protocol):
    """A mean of squares of residuals, and its derivatives, halved and after Gauss and Newton."""

    def loss(self, coefficients: Array, /) -> float: ...

    def normal(self, coefficients: Array, /) -> tuple[float, Array, Array]:
        """(loss, gradient [T], hessian [T, T])."""
        ...


def solve(
    problem: Problem,
    start: Array,
    steps: int,
    prior: Prior | None = None,
    gain: float = GAIN,
    done: Done = unheard,
) -> Fit:
    """Fit from `start` [T], in at most `steps`, until a step gains less than the share `gain` of the loss.

    `done` is told what share of the steps is taken.
    """
    coefficients, best = descend(problem, start, steps, prior or ridge(problem.terms), gain, done)
    return Fit(problem.terms, coefficients, float(np.sqrt(best)))


def descend(
    problem: Squares, start: Array, steps: int, prior: Prior, gain: float = GAIN, done: Done = unheard
) -> tuple[Array, float]:
    """The coefficients [T] that `solve` finds, and loss and prior there."""
    firm = prior.matrix

    def charge(c: Array) -> float:
        return float((c - prior.mean) @ firm @ (c - prior.mean))

    c, damping, slow = start, DAMPING, 0
    best = problem.loss(c) + charge(c)
    for taken in range(steps):
        done(taken / steps)
        _, gradient, hessian = problem.normal(c)
        gradient += firm @ (c - prior.mean)
        hessian += firm
        scale = np.diag(hessian) + 1e-9 * np.trace(hessian) / max(len(c), 1)
        while True:
            step = np.linalg.solve(hessian + np.diag(damping * scale), -gradient)
            tried = problem.loss(c + step) + charge(c + step)
            if tried < best or damping > MOST_DAMPING:
                break
            damping *= 5
        if not tried < best:
            break
        slow = slow + 1 if best - tried < gain * best else 0
        c, best, damping = c + step, tried, max(damping / 5, LEAST_DAMPING)
        if slow == SLOW:
            break
    return c, best


def drawn(terms: Terms, coefficients: Array, sites: Sites, cells: Cells, pupil: Pupil) -> Array:
    """Images [M, n, n] of a ray map at places, as many parts of the light as they catch."""
    modes = terms.at(sites) @ terms.matrix(coefficients).T
    found = np.empty((len(sites), cells.side, cells.side))
    images(modes, *pupil.displacements(terms.modes), cells.share, cells.first, found)
    return found
