"""What a training step sees and how large it is: functions of the seed and the step alone, so that a run
can stop and go on anywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A part of an epoch that is shuffled in itself: `order` [n] positions, in the order in which they are served.

    They are those of the `units` (indices), all of them: `order` is their examples, unit by unit, permuted by
    `permutation` [n]. The window is `first` to `stop` of the endless sequence of examples, epoch after epoch.
    """

    units: tuple[int, ...]
    order: Tensor
    permutation: Tensor
    first: int
    stop: int


class Order:
    """Which examples and which noise a step sees: a function of (seed, step) alone.

    An epoch is a permutation of all examples. With `units`, spans (start, stop) of positions that together are all
    examples, it is a permutation of the units, cut into windows of at least `window` examples, each of which is
    shuffled in itself: what a stream can serve that holds a window at a time.
    """

    def __init__(
        self, seed: int, examples: int, batch: int, units: Sequence[Sequence[int]] | None = None, window: int = 0
    ) -> None:
        self.seed, self.examples, self.size = seed, examples, batch
        self.units, self.least = units or [(0, examples)], window
        self._shuffled = units is not None
        self._plans: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        self._windows: dict[tuple[int, int], Window] = {}
        self._last: list[Window] = []

    def batch(self, step: int) -> Tensor:
        """Positions [B] of the examples of a step; epochs, and windows in them, follow seamlessly."""
        at, stop = step * self.size, (step + 1) * self.size
        parts = [w.order[max(at, w.first) - w.first : stop - w.first] for w in self.windows(step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def windows(self, step: int) -> list[Window]:
        """The windows that the batch of a step is of, in their order."""
        at, stop = step * self.size, (step + 1) * self.size
        if len(self._last) == 1 and self._last[0].first <= at and stop <= self._last[0].stop:
            return self._last
        keys = [self._find(at)]
        while self._window(keys[-1]).stop < stop:
            keys.append(self._next(keys[-1]))
        self._last = [self._window(key) for key in keys]
        self._windows = {key: window for key, window in self._windows.items() if key >= keys[0]}
        self._plans = {epoch: plan for epoch, plan in self._plans.items() if epoch >= keys[0][0]}
        return self._last

    def window_at(self, place: int) -> Window:
        """The window that a place of the endless sequence lies in."""
        return self._window(self._find(place))

    def noise(self, step: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard-normal noise [B, L] of a step, drawn on `device`, whose kind it depends on."""
        return torch.randn(self.size, latent, generator=_generator(self.seed, 1, step, device=device), device=device)

    def slice_of(self, step: int, weights: Tensor) -> int:
        """A number drawn with a probability proportional to `weights` [S]: the slice a step looks at as a whole."""
        return int(torch.multinomial(weights.double(), 1, generator=_generator(self.seed, 2, step)))

    def _find(self, at: int) -> tuple[int, int]:
        """(epoch, number in it) of the window that place `at` of the endless sequence lies in."""
        epoch, at = divmod(at, self.examples)
        starts = [start for _, start in self._plan(epoch)]
        return epoch, bisect_right(starts, at) - 1

    def _next(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, number = key
        return (epoch, number + 1) if number + 1 < len(self._plan(epoch)) else (epoch + 1, 0)

    def _plan(self, epoch: int) -> list[tuple[tuple[int, ...], int]]:
        """The units of each window of an epoch, and where in the epoch it starts."""
        if epoch not in self._plans:
            sizes = [stop - start for start, stop in self.units]
            plan: list[tuple[tuple[int, ...], int]] = []
            units: list[int] = []
            start = stop = 0
            for unit in torch.randperm(len(sizes), generator=_generator(self.seed, 3, epoch)).tolist():
                units.append(unit)
                stop += sizes[unit]
                if stop - start >= self.least or stop == self.examples:
                    plan.append((tuple(units), start))
                    units, start = [], stop
            self._plans[epoch] = plan
        return self._plans[epoch]

    def _window(self, key: tuple[int, int]) -> Window:
        if key not in self._windows:
            epoch, number = key
            units, start = self._plan(epoch)[number]
            # Without units the one window of an epoch is drawn by the epoch alone.
            generator = _generator(self.seed, 4, epoch, number) if self._shuffled else _generator(self.seed, 0, epoch)
            of_units = torch.cat([torch.arange(*self.units[unit]) for unit in units])
            permutation = torch.randperm(len(of_units), generator=generator)
            first = epoch * self.examples + start
            stop = first + len(permutation)
            self._windows[key] = Window(units, of_units[permutation], permutation, first, stop)
        return self._windows[key]


def _generator(seed: int, stream: int, *at: int, device: torch.device | str = "cpu") -> torch.Generator:
    key = np.random.SeedSequence([seed, stream, *at]).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator(device).manual_seed(int(key))
