"""Which part of a store a command is about: picked by value, read chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import ConfigError
from psfgen.quantities import parse_distances_mm, parse_wavelengths_um
from psfgen.store import Store, schema

UNITS = {"depth": "mm", "focus": "mm", "wavelength": "um"}
SELECTABLE = ("copy", "focus", "depth", "wavelength")
SAME = 1e-3  # relative; what is typed is rounded


def pick(store: Store, dim: str, wanted: str | int) -> list[int]:
    """Ascending indices along `dim` of the values that an option names, as typed; a copy by its number.

    A store without copies holds copy 0. Raises ConfigError for what cannot be read and what the store lacks.
    """
    if dim == "copy":
        copies = len(store.coords.get("copy", [0]))
        if not 0 <= int(wanted) < copies:
            raise ConfigError(f"--copy {wanted}: {store.path} holds copies 0 to {copies - 1}")
        return [int(wanted)]
    parse = parse_wavelengths_um if dim == "wavelength" else parse_distances_mm
    try:
        values = parse(wanted)
    except ValueError as error:
        raise ConfigError(f"--{dim} {wanted}: {error}") from None
    have = store.coords[dim]
    indices = []
    for value in values:
        index = int(np.argmin(np.abs(1 / have - 1 / value)))  # inf is a distance too
        if not np.isclose(have[index], value, rtol=SAME):
            held = ", ".join(f"{v:.6g}" for v in have)
            raise ConfigError(f"--{dim}: {store.path} holds no {dim} of {value:g} {UNITS[dim]}; it holds {held}")
        if index not in indices:
            indices.append(index)
    return indices


@dataclass(frozen=True)
class Selection:
    """A store, and for the dims that are narrowed the indices that are kept, ascending."""

    store: Store
    kept: dict[str, list[int]]

    @classmethod
    def of(cls, store: Store, **options: str | int | None) -> Selection:
        """The selection that the options of a command make; None keeps a whole dim. Raises ConfigError."""
        picked = {dim: pick(store, dim, value) for dim, value in options.items() if value is not None}
        return cls(store, {dim: indices for dim, indices in picked.items() if dim in store.coords})

    @property
    def coords(self) -> dict[str, NDArray[np.float64]]:
        """Every coordinate, narrowed."""
        dims = {name: schema.COORD_DIMS.get(name, name) for name in self.store.coords}
        return {
            name: values[self.kept[dims[name]]] if dims[name] in self.kept else values
            for name, values in self.store.coords.items()
        }

    def indices(self, dim: str) -> list[int]:
        """The indices kept along a dim; those of a store without copies are [0]."""
        return self.kept.get(dim, list(range(len(self.store.coords.get(dim, [0])))))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, narrowed."""
        return tuple(len(self.indices(dim)) for dim in self.store.spec.dims(name))

    @property
    def kernels(self) -> int:
        """How many kernels are selected."""
        return int(np.prod([len(self.indices(dim)) for dim in self.store.spec.kernel_dims]))

    def parts(self, name: str) -> Iterator[tuple[dict[str, slice], NDArray[Any]]]:
        """An array a chunk at a time: (where the part lies within the selection, by dim; its values).

        Chunks come in C order, and only those that hold something selected are read.
        """
        spec = self.store.spec
        dims = spec.dims(name)
        axes = [
            list(_cut(self.indices(dim), size, chunk))
            for dim, size, chunk in zip(dims, spec.shape(name), spec.chunks(name), strict=True)
        ]
        for cuts in product(*axes):
            values = self.store.read(name, **{dim: cut.stored for dim, cut in zip(dims, cuts, strict=True)})
            for axis, cut in enumerate(cuts):
                if len(cut.inside) < values.shape[axis]:
                    values = values.take(cut.inside, axis)
            yield {dim: cut.placed for dim, cut in zip(dims, cuts, strict=True)}, values


@dataclass(frozen=True)
class _Cut:
    """One chunk's share of a dim: where it is stored, what of it is kept, where that goes."""

    stored: slice
    inside: list[int]
    placed: slice


def _cut(indices: list[int], size: int, chunk: int) -> Iterator[_Cut]:
    for start in range(0, size, chunk):
        first, last = np.searchsorted(indices, [start, start + chunk]).tolist()
        if first < last:
            stored = slice(start, min(start + chunk, size))
            yield _Cut(stored, [index - start for index in indices[first:last]], slice(first, last))
