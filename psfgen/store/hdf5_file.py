"""HDF5 files: how they are written whole, and how dims, coordinates and units are put into one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from psfgen.store import schema

LIBVER = ("v110", "v110")  # the first format that has a checksum in every piece of metadata
FILTERS: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}


class _Disk(io.FileIO):
    """A file that keeps the error of its first failed write instead of raising it.

    HDF5 cannot close a file that it cannot write, and crashes the process at its end for that; with what it
    writes from then on let go, it closes, and the error is raised afterwards.
    """

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        done = 0
        while self.failed is None and done < len(data):  # the system may take a part
            done += self._tried(super().write, data[done:])
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        return self._tried(super().truncate, size)

    def _tried(self, action: Callable[[Any], int], argument: Any) -> int:
        if self.failed is None:
            try:
                return action(argument)
            except OSError as error:
                self.failed = error
        return 0


@contextmanager
def new_file(path: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A new HDF5 file, and what raises OSError if it could not be written so far; so does the end."""
    with _Disk(path, "w+") as disk:

        def check() -> None:
            if disk.failed is not None:
                raise disk.failed

        with h5py.File(disk, "w", libver=LIBVER) as file:
            yield file, check
        check()


def create_array(file: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any) -> Any:
    """An empty array, NaN until it is written."""
    return file.create_dataset(name, shape, dtype, chunks=chunks, fillvalue=np.nan, track_times=False, **FILTERS)


def write_coords(file: Any, coords: Mapping[str, NDArray[np.float64]]) -> None:
    """Coordinates as dimension scales, with their units; those beside a dim hang on that dim's scale."""
    for name, values in coords.items():
        made = file.create_dataset(name, data=values, chunks=values.shape, fletcher32=True, track_times=False)
        made.attrs.update(schema.COORD_ATTRS[name])
        if name not in schema.COORD_DIMS:
            made.make_scale(name)
    for name in (name for name in schema.COORD_DIMS if name in coords):
        file[name].dims[0].attach_scale(file[schema.COORD_DIMS[name]])


def label(array: Any, name: str, dims: tuple[str, ...]) -> None:
    """Give an array its dims, its units and its long name."""
    array.attrs.update({**schema.ARRAY_ATTRS[name], "coordinates": " ".join(schema.beside(dims))})
    for axis, dim in enumerate(dims):
        array.dims[axis].attach_scale(array.file[dim])
