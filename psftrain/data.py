"""From a store to training examples: kernels, conditions, neighbours; decoded once, kept resident.

Legend: M examples, C condition (field x, field y, depth, focus), W wavelengths, y x bins, S slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.errors import FitError, RunMismatch, StoreCorrupt
from psfgen.store import Store, open_store

CONDITION = ("field_x", "field_y", "depth", "focus")


@dataclass(frozen=True)
class Conditioning:
    """How a place in a store becomes the model's input, fixed by the training store.

    field / field_max; depth and focus in dioptres, scaled to [-1, 1] over the training range, 0 where
    there is one value. `aspect` = sensor height / width, for angles on the sensor; `grid` = field points a
    side of the coarsest training store.
    """

    field_max: float
    depth_dioptre: tuple[float, float]
    focus_dioptre: tuple[float, float]
    aspect: float
    grid: int

    @property
    def varies(self) -> list[str]:
        """Which of depth and focus take several values."""
        spans = {"depth": self.depth_dioptre, "focus": self.focus_dioptre}
        return [name for name, (low, high) in spans.items() if high > low]

    def encode(self, field_x: Any, field_y: Any, depth_dioptre: Any, focus_dioptre: Any) -> NDArray[np.float32]:
        """Conditions [..., C] of places; the arguments broadcast."""
        columns = [np.asarray(field_x) / self.field_max, np.asarray(field_y) / self.field_max]
        for values, (low, high) in ((depth_dioptre, self.depth_dioptre), (focus_dioptre, self.focus_dioptre)):
            half = (high - low) / 2
            columns.append((np.asarray(values) - low - half) / half if half else np.zeros_like(values, dtype=float))
        return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float32)

    def require(self, depth_dioptre: NDArray[np.float64], focus_dioptre: NDArray[np.float64], what: str) -> None:
        """Raise RunMismatch where a depth or focus lies outside what was trained on."""
        for name, values, (low, high) in (
            ("depth", depth_dioptre, self.depth_dioptre),
            ("focus", focus_dioptre, self.focus_dioptre),
        ):
            slack = 1e-6 * max(high, 1e-3)
            outside = values[(values < low - slack) | (values > high + slack)]
            if outside.size:
                raise RunMismatch(
                    f"{what}: {name} {_mm(outside[0])} is outside the range trained on, "
                    f"{_mm(high)} to {_mm(low)}; render other points or train on a wider range"
                )


def _mm(dioptre: float) -> str:
    return f"{1000 / dioptre:.6g} mm" if dioptre else "inf"


@dataclass(frozen=True)
class Examples:
    """The kernels of one or several stores that have light, with their conditions.

    `kernels` [M, W, y, x]; `condition` [M, C]; `noise` [M]: estimated relative L2 error of the stack;
    `index` [M, 5]: store, focus, depth, row, column; `slices`: for each (store, focus, depth) the example
    of every field point [Ny, Nx], -1 where it is masked. `masked` counts the places left out.
    """

    kernels: Tensor
    condition: Tensor
    noise: Tensor
    index: NDArray[np.int64]
    slices: list[Tensor]
    masked: int

    def __len__(self) -> int:
        return len(self.kernels)

    def select(self, keep: NDArray[np.bool_]) -> Examples:
        """The examples where `keep` [M] holds; the others are masked in the slices."""
        number = torch.full((len(self) + 1,), -1, dtype=torch.long)
        number[:-1][torch.from_numpy(keep)] = torch.arange(int(keep.sum()))
        chosen = torch.from_numpy(np.flatnonzero(keep))
        return Examples(
            self.kernels[chosen],
            self.condition[chosen],
            self.noise[chosen],
            self.index[keep],
            [number[slice_] for slice_ in self.slices],  # -1 finds the last entry, which is -1
            self.masked + int((~keep).sum()),
        )


def fingerprint(store: Store, array: str) -> dict[str, Any]:
    """What kernels must have in common to be compared: lens as used, sampling, wavelengths, array."""
    return {
        "lens_sha256": store.attrs["lens"]["sha256"],
        "fnum": store.attrs["config"].get("fnum"),
        "sensor_mm": [float(side) for side in store.attrs["sensor_mm"]],
        "reference_um": float(store.attrs["reference_um"]),
        "pitch_um": float(store.attrs["pitch_um"]),
        "kernel_px": len(store.coords["kx"]),
        "bins": len(store.coords["bx"]),
        "wavelength": [float(w) for w in store.coords["wavelength"]],
        "array": array,
    }


def require_same(expected: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Raise RunMismatch, naming the first difference, unless two fingerprints are equal."""
    for key, value in expected.items():
        if found.get(key) != value:
            there, here = (str(v)[:12] if key.endswith("sha256") else v for v in (found.get(key), value))
            raise RunMismatch(f"{what}: {key} is {there}, but {here} was trained on")


def open_stores(paths: Sequence[str], array: str) -> list[Store]:
    """Open the stores of a run and see that they belong together."""
    stores = [open_store(path) for path in paths]
    for path, store in zip(paths, stores, strict=True):
        if "copy" in store.coords:
            copies = len(store.coords["copy"])
            raise FitError(
                f"{path} holds {copies} copies of a lens; psftrain models one specimen: render without --copies"
            )
    expected = fingerprint(stores[0], array)
    for path, store in zip(paths[1:], stores[1:], strict=True):
        require_same(expected, fingerprint(store, array), f"store {path} beside {paths[0]}")
    return stores


def conditioning_of(stores: Sequence[Store]) -> Conditioning:
    """The conditioning that a set of training stores fixes."""

    def span(name: str) -> tuple[float, float]:
        values = np.concatenate([store.coords[name] for store in stores])
        return float(values.min()), float(values.max())

    width, height = stores[0].attrs["sensor_mm"]
    field = np.concatenate([np.abs(store.coords[name]) for store in stores for name in ("field_x", "field_y")])
    return Conditioning(
        field_max=float(field.max()) or 1.0,
        depth_dioptre=span("depth_dioptre"),
        focus_dioptre=span("focus_dioptre"),
        aspect=height / width,
        grid=min(min(len(store.coords["field_x"]), len(store.coords["field_y"])) for store in stores),
    )


def read_examples(stores: Sequence[Store], conditioning: Conditioning, array: str) -> Examples:
    """Decode stores into one resident set. Raises FitError where no place has light."""
    parts = [part for number, store in enumerate(stores) for part in _slices(store, number, conditioning, array)]
    kernels, condition, noise, index, lit = (list(column) for column in zip(*parts, strict=True))
    slices, first = [], 0
    for mask in lit:
        numbers = np.full(mask.shape, -1)
        numbers[mask] = first + np.arange(mask.sum())
        first += int(mask.sum())
        slices.append(torch.from_numpy(numbers))
    if not first:
        raise FitError(f"every kernel of {stores[0].path} is without light; render a smaller field (--field-max)")
    return Examples(
        torch.from_numpy(np.concatenate(kernels)),
        torch.from_numpy(np.concatenate(condition)),
        torch.from_numpy(np.concatenate(noise)),
        np.concatenate(index),
        slices,
        sum(int((~mask).sum()) for mask in lit),
    )


def _slices(store: Store, number: int, conditioning: Conditioning, array: str) -> Iterator[tuple[Any, ...]]:
    noise_name = "noise_binned" if array == "psf_binned" else "noise"
    field_y, field_x = np.meshgrid(store.coords["field_y"], store.coords["field_x"], indexing="ij")
    for focus, focus_dioptre in enumerate(store.coords["focus_dioptre"]):
        for depth, depth_dioptre in enumerate(store.coords["depth_dioptre"]):
            kernels = store.read(array, focus=focus, depth=depth)  # [y, x, W, by, bx]
            relative = store.read(noise_name, focus=focus, depth=depth)
            captured = store.read("captured", focus=focus, depth=depth)
            lit = ((captured > 0) & (store.read("throughput", depth=depth) > 0)).all(axis=-1)
            if np.isnan(kernels[lit]).any() or np.isnan(relative[lit]).any():
                raise StoreCorrupt(f"{store.path} has NaN where light arrives; `psfgen verify {store.path}` shows what")
            energy = np.square(kernels).sum(axis=(-2, -1))
            with np.errstate(invalid="ignore"):
                noise = np.sqrt((relative**2 * energy).sum(axis=-1) / energy.sum(axis=-1))
            condition = conditioning.encode(field_x, field_y, depth_dioptre, focus_dioptre)
            rows, columns = np.nonzero(lit)
            place = np.stack([np.full_like(rows, v) for v in (number, focus, depth)] + [rows, columns], axis=-1)
            yield kernels[lit], condition[lit], noise[lit].astype(np.float32), place, lit


def neighbour_pairs(slice_: Tensor) -> Tensor:
    """Pairs of places [P, 2] (flat, right and down neighbours) of a slice [Ny, Nx], masked places left out."""
    place = torch.arange(slice_.numel()).view(slice_.shape)
    right = torch.stack([place[:, :-1].flatten(), place[:, 1:].flatten()], dim=-1)
    down = torch.stack([place[:-1].flatten(), place[1:].flatten()], dim=-1)
    pairs = torch.cat([right, down])
    return pairs[(slice_.flatten()[pairs] >= 0).all(dim=-1)]


def withhold(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples | None]:
    """(training, validation): a seeded share of the interior field points, at every depth and focus.

    The same points are withheld wherever a slice has the same shape, so that no other depth gives them away.
    """
    if not share:
        return examples, None
    held = np.zeros(len(examples), dtype=bool)
    for slice_ in examples.slices:
        rows, columns = slice_.shape
        interior = np.zeros((rows, columns), dtype=bool)
        interior[1:-1, 1:-1] = True
        places = np.flatnonzero(interior)
        chosen = np.random.default_rng([seed, rows, columns]).permutation(places)[: round(share * len(places))]
        numbers = slice_.flatten()[torch.from_numpy(chosen)].numpy()
        held[numbers[numbers >= 0]] = True
    if not held.any():
        raise FitError(f"data.val {share:g} withholds no point of so small a grid; give --val STORE or a larger share")
    return examples.select(~held), examples.select(held)


def conditioning_document(conditioning: Conditioning) -> dict[str, Any]:
    """A conditioning as plain data."""
    return asdict(conditioning)


def conditioning_from(document: dict[str, Any]) -> Conditioning:
    """A conditioning from plain data."""
    spans = {key: tuple(document[key]) for key in ("depth_dioptre", "focus_dioptre")}
    return Conditioning(**{**document, **spans})
