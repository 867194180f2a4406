"""What one training step sees.

Legend: B examples of the batch, C condition, L latent, W wavelengths, y x bins, Q further places, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as tree


class Neighbours(NamedTuple):
    """Pairs of field neighbours whose difference is the smoothness term.

    `places` [Q, C]: conditions of field points beside those of the batch; `pairs` [P, 2]: which of
    cat([condition of the batch, places]) are neighbours; `weight` [P], such that the sum of weight x difference has
    the mean difference over all pairs of the training set as its expectation. `kernels` [Q, W, y, x]: those of the
    places, None unless the term needs them.
    """

    places: Tensor
    pairs: Tensor
    weight: Tensor
    kernels: Tensor | None


class Batch(NamedTuple):
    """`kernels` [B, W, y, x], `condition` [B, C], `noise` [B, L] standard normal, `weight` [B] of each example in
    the reconstruction, `neighbours` or None where there is no smoothness term, and `beta`, the weight of the KL at
    this step (0-d).
    """

    kernels: Tensor
    condition: Tensor
    noise: Tensor
    weight: Tensor
    neighbours: Neighbours | None
    beta: Tensor


def tensors_of(parts: Sequence[Batch]) -> list[Tensor]:
    """Every tensor of some batches, in a fixed order."""
    return [leaf for leaf in tree.tree_leaves(list(parts)) if leaf is not None]


def with_tensors(parts: Sequence[Batch], tensors: Sequence[Tensor]) -> list[Batch]:
    """Batches like `parts`, made of other tensors, which stand in the order of `tensors_of`."""
    fresh = iter(tensors)
    found: list[Batch] = tree.tree_map(lambda leaf: None if leaf is None else next(fresh), list(parts))
    return found
