"""The rows of an evaluation: what answers for a held-out place, and how long it takes.

Legend: M held-out examples, Q of one slice (store, copy, depth, focus), W wavelengths, y x bins.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psfgen.errors import progress
from psfgen.store import Store
from psftrain.baselines import CLASSICAL, Nodes, Query, brackets, nothing
from psftrain.data import COLUMN, DEPTH, FOCUS, ROW, Examples
from psftrain.run import Trained

Array = NDArray[np.float64]
Distances = dict[str, NDArray[np.int64]]
Predict = Callable[[Examples, NDArray[np.int64]], Array]  # examples, which of a slice [Q] -> kernels [Q, W, y, x]
BATCH = 256
MODEL_ROWS = ("prior_mean", "prior_sample", "posterior")


def predict_all(
    rows: dict[str, Predict], held: Examples, slices: list[NDArray[np.int64]]
) -> tuple[dict[str, Array], dict[str, float]]:
    """Every row's kernels for every held-out example [M, W, y, x], and its time for one in ms."""
    predictions = {name: np.full(tuple(held.kernels.shape), np.nan) for name in rows}
    seconds = dict.fromkeys(rows, 0.0)
    bar = progress(len(rows) * len(held), "eval", "psf")
    for name, predict in rows.items():
        for numbers in slices:
            predict(held, numbers[:1])  # sets interpolators up, which is not part of a kernel's time
            started = time.perf_counter()
            predictions[name][numbers] = predict(held, numbers)
            seconds[name] += time.perf_counter() - started
            bar.update(len(numbers))
    bar.close()
    return predictions, {name: 1000 * total / len(held) for name, total in seconds.items()}


def kept_distances(store: Store, everything: Examples, train: Examples) -> Distances:
    """The depths and focus distances of a store that were not withheld whole, as indices."""
    found = {}
    for name, column in (("focus", FOCUS), ("depth", DEPTH)):
        withheld = np.setdiff1d(everything.index[:, column], train.index[:, column])
        found[name] = np.setdiff1d(np.arange(len(store.coords[name])), withheld)
    return found


def classical_rows(store: Store, train: Examples, kept: Distances, held_stores: list[Store]) -> dict[str, Predict]:
    """Every classical row that the grid of a training store has nodes enough for; `kept`: distances trained on."""
    side = min(len(store.coords["field_y"]), len(store.coords["field_x"]))
    return {
        name: _classical(how, store, train, kept, held_stores)
        for name, (how, needed) in CLASSICAL.items()
        if side >= needed
    }


def _classical(
    how: Callable[[Nodes], Query], store: Store, train: Examples, kept: Distances, held_stores: list[Store]
) -> Predict:
    """A classical row over every depth and focus, interpolating between those that were not withheld."""
    shape = tuple(train.kernels.shape[1:])
    focuses = len(store.coords["focus"])
    dioptres = {name: store.coords[f"{name}_dioptre"][at] for name, at in kept.items()}
    queries: dict[int, Query] = {}

    def query(number: int) -> Query:
        if number not in queries:
            numbers = train.slices[number].numpy()
            values = np.full((*numbers.shape, int(np.prod(shape))), np.nan)
            values[numbers >= 0] = train.kernels[torch.from_numpy(numbers[numbers >= 0])].flatten(1).numpy()
            nodes = Nodes(store.coords["field_y"], store.coords["field_x"], values)
            queries[number] = how(nodes) if nodes.span_the_field else nothing(nodes)
        return queries[number]

    def predict(held: Examples, numbers: NDArray[np.int64]) -> Array:
        which, _, focus, depth = held.index[numbers[0], :4]
        coords = held_stores[which].coords
        yx = np.stack([coords["field_y"][held.index[numbers, ROW]], coords["field_x"][held.index[numbers, COLUMN]]], -1)
        total = np.zeros((len(numbers), int(np.prod(shape))))
        for f, of_focus in brackets(dioptres["focus"], coords["focus_dioptre"][focus]):
            for d, of_depth in brackets(dioptres["depth"], coords["depth_dioptre"][depth]):
                slice_ = int(kept["depth"][d] * focuses + kept["focus"][f])
                total += of_focus * of_depth * query(slice_)(yx)
        return total.reshape(len(numbers), *shape)

    return predict


def model_rows(trained: Trained) -> dict[str, Predict]:
    """The three paths through a model."""
    model = trained.model

    def prior_mean(kernels: Tensor, condition: Tensor) -> Tensor:
        return model.decode(model.prior(condition).mean, condition)

    def prior_sample(kernels: Tensor, condition: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(condition), model.latent, generator=generator)
        return model.decode(model.prior(condition).sample(noise), condition)

    def posterior(kernels: Tensor, condition: Tensor) -> Tensor:
        return model.decode(model.posterior(kernels, condition).mean, condition)

    def row(path: Callable[[Tensor, Tensor], Tensor]) -> Predict:
        def predict(held: Examples, numbers: NDArray[np.int64]) -> Array:
            chosen = torch.from_numpy(numbers)
            with torch.no_grad():
                parts = [path(held.kernels[some], held.condition[some]) for some in torch.split(chosen, BATCH)]
            return torch.cat(parts).double().numpy()

        return predict

    return {name: row(path) for name, path in zip(MODEL_ROWS, (prior_mean, prior_sample, posterior), strict=True)}


def regression_row(network: nn.Module) -> Predict:
    """The row of a network that takes conditions [B, C] alone."""

    def predict(held: Examples, numbers: NDArray[np.int64]) -> Array:
        chosen = torch.from_numpy(numbers)
        with torch.no_grad():
            parts = [network(held.condition[some]) for some in torch.split(chosen, BATCH)]
        return torch.cat(parts).double().numpy()

    return predict
