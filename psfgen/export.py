"""A store, or a part of it, in the formats of other programs. `docs/tools.md` describes each."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import ConfigError, StoreError, nearest
from psfgen.select import SELECTABLE, Selection
from psfgen.store import schema
from psfgen.store.hdf5_file import create_array, label, new_file, write_coords
from psfgen.store.open import is_store

OnKernels = Callable[[int], object]
FITS_BLOCK = 2880  # a FITS file is a whole number of such blocks
FEWEST_SAMPLES = 4  # photutils puts a bicubic spline through a kernel


def export(
    selection: Selection, to: str, out: Path, *, overwrite: bool = False, on_kernels: OnKernels = lambda n: None
) -> None:
    """Write a selection to `out` in a format of `EXPORTS`; `on_kernels(n)` is called as n more kernels are through.

    The file appears at once and whole. Memory stays bounded by a few chunks of the store. Raises ConfigError
    for an unknown format, a selection that it cannot hold, and an `out` that exists or has no folder;
    StoreError where `out` cannot be written; what reading the store raises.
    """
    if to not in EXPORTS:
        raise ConfigError(f"--to {to}: unknown format{nearest(to, EXPORTS)}; known: {', '.join(EXPORTS)}")
    with _appearing(out, overwrite) as temporary:
        EXPORTS[to](selection, temporary, on_kernels)


@contextmanager
def _appearing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside `out` that takes its name at the end, or is gone if anything fails."""
    if is_store(out):
        raise ConfigError(f"--out {out} is a store of psfgen, which an export does not replace; choose another --out")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists; --overwrite replaces it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise StoreError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


# --- hdf5: the store in one file --------------------------------------------------------------------------------------


def _hdf5(selection: Selection, path: Path, on_kernels: OnKernels) -> None:
    spec = selection.store.spec
    with new_file(path) as (file, check):
        for name, value in selection.store.attrs.items():
            file.attrs[name] = _attribute(value)
        write_coords(file, selection.coords)
        for name in spec.arrays:
            dims, shape = spec.dims(name), selection.shape(name)
            chunks = dict(zip(dims, map(min, spec.chunks(name), shape), strict=True))
            if name in schema.BANDED:
                chunks["field_y"] = 1  # a reader of one kernel decompresses a row of the field, not a band of rows
            dtype = selection.store.read(name, depth=slice(0, 0)).dtype
            array = create_array(file, name, shape, tuple(chunks.values()), dtype)
            label(array, name, dims)
            for place, values in selection.parts(name):
                array[tuple(place.values())] = values
                check()
                if name == "psf":
                    on_kernels(values[..., 0, 0].size)


def _attribute(value: Any) -> Any:
    """Numbers, texts and lists of numbers as they are; everything else as JSON text."""
    value = schema.plain(value)
    numbers = value if isinstance(value, list) and value else [value]
    if isinstance(value, str) or all(isinstance(number, (bool, int, float)) for number in numbers):
        return value
    return json.dumps(value, allow_nan=False)


# --- psf-densify: kernels in one row, with where each stands ----------------------------------------------------------

DENSIFY_COLUMNS = ("y_px", "x_px", "field_y", "field_x", "depth_mm", "focus_mm")


def _psf_densify(selection: Selection, path: Path, on_kernels: OnKernels) -> None:
    store, coords = selection.store, selection.coords
    *_, field_x, channels, ky, kx = selection.shape("psf")
    dims = store.spec.kernel_dims[:-1]  # what numbers the places: all but wavelength
    shape = tuple(len(coords[dim]) for dim in dims)
    with new_file(path) as (file, check):
        file.attrs.update({"pitch_um": store.attrs["pitch_um"], "sensor_mm": store.attrs["sensor_mm"]})
        file.attrs.update({"lens": store.attrs["lens"]["name"], "plan_sha256": store.attrs["plan_sha256"]})
        places = file.create_dataset("metadata", data=_densify_places(selection, dims))
        places.attrs["columns"] = [*DENSIFY_COLUMNS, *(["copy"] if "copy" in dims else [])]
        shape_of = (channels, 1, int(np.prod(shape)), ky, kx)
        psfs = create_array(file, "psfs", shape_of, (1, 1, field_x, ky, kx), np.float32)
        psfs.attrs["dims"] = "wavelength, 1, place, ky, kx"
        psfs.attrs["wavelength_um"] = coords["wavelength"]
        for place, values in selection.parts("psf"):  # a band of whole rows of one copy, focus and depth
            first = int(np.ravel_multi_index([place[dim].start for dim in dims], shape))
            kernels = values.reshape(-1, channels, ky, kx)
            psfs[:, 0, first : first + len(kernels)] = kernels.swapaxes(0, 1)
            check()
            on_kernels(len(kernels) * channels)


def _densify_places(selection: Selection, dims: tuple[str, ...]) -> NDArray[np.float32]:
    """A row of `DENSIFY_COLUMNS` (and copy) for each place, in C order of `dims`. [n, columns]"""
    coords = selection.coords
    at = dict(zip(dims, np.meshgrid(*(coords[dim] for dim in dims), indexing="ij"), strict=True))
    x_px, y_px = _samples(selection, at["field_x"], -at["field_y"])  # rows of a picture count downwards
    columns = [y_px, x_px, at["field_y"], at["field_x"], at["depth"], at["focus"]]
    columns += [at["copy"]] if "copy" in at else []
    return np.stack([column.ravel() for column in columns], axis=1).astype(np.float32)


def _samples(selection: Selection, field_x: Any, field_y: Any) -> tuple[Any, Any]:
    """Pinhole image positions in samples of `pitch_um`, x to the right and y up.

    Sample 0 begins at the left, at the lower edge of the sensor; its centre is 0.
    """
    attrs = selection.store.attrs
    width, height = (side * 1000 / attrs["pitch_um"] for side in attrs["sensor_mm"])
    return (field_x + 1) * width / 2 - 0.5, (field_y + 1) * height / 2 - 0.5


# --- gridded: photutils -----------------------------------------------------------------------------------------------


def _gridded(selection: Selection, path: Path, on_kernels: OnKernels) -> None:
    several = [f"--{dim} ({len(selection.indices(dim))})" for dim in SELECTABLE if len(selection.indices(dim)) > 1]
    if several:
        raise ConfigError(f"--to gridded holds one page of kernels: choose one each with {', '.join(several)}")
    store, coords = selection.store, selection.coords
    (*_, rows, columns), attrs = selection.shape("psf"), store.attrs
    if rows < FEWEST_SAMPLES:
        raise ConfigError(f"--to gridded: kernels of {rows} samples a side; photutils needs {FEWEST_SAMPLES}")
    dark = sum(int((values == 0).sum()) for _, values in selection.parts("captured"))
    if dark:
        raise ConfigError(
            f"--to gridded: {dark} of {selection.kernels} kernels get no light and are NaN, which photutils refuses; "
            "choose another --depth or --focus, or render a smaller --field-max"
        )
    x_px, y_px = _samples(selection, coords["field_x"], coords["field_y"])
    header = _fits_header()
    header["SIMPLE"], header["BITPIX"], header["NAXIS"] = True, -32, 3
    header["NAXIS1"], header["NAXIS2"], header["NAXIS3"] = columns, rows, len(x_px) * len(y_px)
    header["OVERSAMP"] = (1, "the model counts in samples of PITCHUM")
    header["PITCHUM"] = (attrs["pitch_um"], "sample spacing at the sensor, um")
    header["WAVELEN"] = (float(coords["wavelength"][0]), "wavelength, um")
    header["DEPTHMM"] = (schema.plain(coords["depth"][0]), "object distance, mm")  # inf, which FITS lacks, as text
    header["FOCUSMM"] = (schema.plain(coords["focus"][0]), "distance the lens is focused at, mm")
    header["LENS"] = attrs["lens"]["name"]
    header["PLAN"] = (attrs["plan_sha256"][:16], "start of the SHA-256 of the plan")
    for index, (y, x) in enumerate(product(y_px, x_px)):
        key = f"DET_YX{index}"
        header[key if len(key) <= 8 else f"HIERARCH {key}"] = f"({float(y)!r}, {float(x)!r})"
    with open(path, "wb") as file:
        file.write(header.tostring().encode("ascii"))
        for _, values in selection.parts("psf"):
            kernels = values.reshape(-1, rows, columns)[:, ::-1]  # FITS has y ascending
            file.write(kernels.astype(">f4").tobytes())
            on_kernels(len(kernels))
        file.write(bytes(-file.tell() % FITS_BLOCK))


def _fits_header() -> Any:
    try:
        from astropy.io.fits import Header
    except ImportError:
        raise ConfigError("--to gridded needs astropy, which is not installed: pip install astropy") from None
    return Header()


# --- csv: what is known of each kernel, but for the kernel ------------------------------------------------------------

CSV_COORDS = {
    "copy": "copy",
    "focus": "focus_mm",
    "depth": "depth_mm",
    "field_y": "field_y",
    "field_x": "field_x",
    "wavelength": "wavelength_um",
}
CSV_ARRAYS = ("throughput", "captured", "noise", "model", "chief_x_mm", "chief_y_mm")


def _csv(selection: Selection, path: Path, on_kernels: OnKernels) -> None:
    store, coords = selection.store, selection.coords
    dims = store.spec.kernel_dims
    outer, inner = dims[:-3], dims[-3:]
    names = [name for name in CSV_ARRAYS if name in store.spec.arrays]
    with open(path, "w", encoding="ascii", newline="") as file:
        file.write(",".join([*(CSV_COORDS[dim] for dim in dims), *names, "distortion"]) + "\n")
        for at in product(*(selection.indices(dim) for dim in outer)):
            here = dict(zip(outer, at, strict=True))
            columns = [np.array(store.coords[dim][index]) for dim, index in here.items()]
            columns += np.meshgrid(*(coords[dim] for dim in inner), indexing="ij")
            for name in names:
                values = store.read(name, **{dim: i for dim, i in here.items() if dim in store.spec.dims(name)})
                if "wavelength" in store.spec.dims(name):
                    columns.append(values[..., selection.indices("wavelength")])
                else:
                    columns.append(values[..., None])
            texts = [_texts(column) for column in columns]
            texts.append(_texts(_distortion(selection, columns[-2], columns[-1]), nothing=""))
            shape = tuple(len(coords[dim]) for dim in inner)
            rows = zip(*(np.broadcast_to(text, shape).ravel() for text in texts), strict=True)
            file.writelines(",".join(row) + "\n" for row in rows)
            on_kernels(int(np.prod(shape)))


def _texts(values: NDArray[Any], nothing: str = "nan") -> NDArray[np.str_]:
    """Numbers as the shortest text that reads back as the same number of the same precision."""
    return np.where(np.isnan(values), nothing, values.astype(np.str_))


def _distortion(selection: Selection, chief_x_mm: NDArray[Any], chief_y_mm: NDArray[Any]) -> NDArray[np.float64]:
    """|chief ray| / |pinhole image| - 1, NaN on the axis. [field_y, field_x, 1]"""
    width, height = selection.store.attrs["sensor_mm"]
    field_y, field_x = np.meshgrid(selection.coords["field_y"], selection.coords["field_x"], indexing="ij")
    pinhole_mm = np.hypot(field_x * width / 2, field_y * height / 2)[..., None]
    on_axis = pinhole_mm == 0
    share: NDArray[np.float64] = np.hypot(chief_x_mm, chief_y_mm) / np.where(on_axis, 1, pinhole_mm) - 1
    return np.where(on_axis, np.nan, share)


EXPORTS: dict[str, Callable[[Selection, Path, OnKernels], None]] = {
    "hdf5": _hdf5,
    "psf-densify": _psf_densify,
    "gridded": _gridded,
    "csv": _csv,
}
