"""Which field neighbours a step compares, so that on average it is every pair of the training set.

Neighbours are the 4-connected points of one (store, copy, depth, focus). A table [M, 2] gives, for each of M examples,
the position of the one to the right and of the one below, -1 where there is none; so it holds every pair once.

Legend: M examples, C condition, B batch, Q further places, S slices, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from psftrain.batch import Neighbours
from psftrain.config import LossConfig

Kernels = Callable[[Tensor], Tensor]  # of the examples at the positions [Q]


class BatchNeighbours:
    """Each example of the batch with its neighbours to the right and below.

    Where examples are drawn evenly, M / B x the pairs of the batch is all pairs on average, and divided by their
    number it is their mean; over one epoch the steps' mean is exactly that. On a GPU shapes depend on B alone; on a
    CPU a place is there once, and not at all where the batch has it, since the prior of each has its cost.
    """

    def __init__(self, condition: Tensor, table: Tensor, kernels: Kernels | None = None) -> None:
        self.condition, self.table, self.kernels = condition, table.to(condition.device), kernels
        self.share = len(table) / int((table >= 0).sum())  # M / P
        self._row = torch.full((len(table),), -1) if condition.device.type == "cpu" else None

    def __call__(self, positions: Tensor, slice_number: int = 0) -> Neighbours:
        """The neighbours of the examples at `positions` [B], whatever the slice."""
        count, found = len(positions), self.table[positions]
        there = (found >= 0).flatten()
        found = torch.where(found >= 0, found, positions[:, None]).flatten()  # a point without one stands in itself
        pair = torch.arange(2 * count, device=positions.device)
        places, second = (found, count + pair) if self._row is None else self._once(self._row, positions, found)
        return Neighbours(
            self.condition[places],
            torch.stack([pair // 2, second], dim=-1),
            there.to(self.condition.dtype) * (self.share / count),
            None if self.kernels is None else self.kernels(places),
        )

    @staticmethod
    def _once(row: Tensor, positions: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """The places [Q] that the batch lacks, and which of batch and places each of `found` [2 B] is.

        `row` [M] is -1 throughout, before and after.
        """
        row[positions] = torch.arange(len(positions))
        places = torch.unique(found[row[found] < 0])
        row[places] = len(positions) + torch.arange(len(places))
        second = row[found]
        row[positions], row[places] = -1, -1
        return places, second


class GridNeighbours:
    """Every pair of one slice; to be drawn in proportion to `shares` [S], the pairs of each.

    The shapes are those of the largest slice; what a smaller one lacks is filled with pairs of weight 0.
    """

    def __init__(
        self, condition: Tensor, table: Tensor, slices: Sequence[Tensor], kernels: Kernels | None = None
    ) -> None:
        found = [torch.unique(pairs, return_inverse=True) for pairs in (_pairs(s, table.cpu()) for s in slices)]
        self.shares = torch.tensor([len(pairs) for _, pairs in found], dtype=torch.float64)
        most = max(len(places) for places, _ in found), int(self.shares.max())
        device, self.condition, self.kernels = condition.device, condition, kernels
        self._places = torch.zeros(len(slices), most[0], dtype=torch.long)
        self._pairs = torch.zeros(len(slices), most[1], 2, dtype=torch.long)
        self._weight = torch.zeros(len(slices), most[1], dtype=condition.dtype)
        for number, (places, pairs) in enumerate(found):
            self._places[number, : len(places)] = places
            self._pairs[number, : len(pairs)] = pairs
            self._weight[number, : len(pairs)] = 1 / max(1, len(pairs))
        self._places, self._pairs, self._weight = (
            each.to(device) for each in (self._places, self._pairs, self._weight)
        )

    def places(self, positions: Tensor, slice_number: int) -> Tensor:
        """Positions [Q] of the points of a slice that have neighbours, whatever the batch."""
        return self._places[slice_number]

    def __call__(self, positions: Tensor, slice_number: int) -> Neighbours:
        """The pairs of a slice beside a batch at `positions` [B]."""
        places = self.places(positions, slice_number)
        return Neighbours(
            self.condition[places],
            len(positions) + self._pairs[slice_number],
            self._weight[slice_number],
            None if self.kernels is None else self.kernels(places),
        )


def neighbours_of(
    config: LossConfig, condition: Tensor, table: Tensor, slices: Sequence[Tensor], kernels: Kernels
) -> BatchNeighbours | GridNeighbours | None:
    """What the smoothness term of `config` compares; None where it has no weight or no point has a neighbour.

    `condition` [M, C] and the table [M, 2] as above; `slices` [Ny, Nx] hold positions, -1 where masked; `kernels`
    gives those of positions, and is kept only where the term needs them.
    """
    if not config.smooth or not (table >= 0).any():
        return None
    needed = kernels if config.smooth_on == "posterior_mean" else None
    if config.smooth_over == "grid":
        return GridNeighbours(condition, table, slices, needed)
    return BatchNeighbours(condition, table, needed)


def _pairs(slice_: Tensor, table: Tensor) -> Tensor:
    """Positions [P, 2] of the neighbours in a slice."""
    members = slice_.flatten().cpu()
    members = members[members >= 0]
    pairs = torch.stack([members[:, None].expand(-1, 2), table[members]], dim=-1).reshape(-1, 2)
    return pairs[pairs[:, 1] >= 0]
