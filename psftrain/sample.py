"""Kernels of a trained model at any points, written to .npz or .zarr."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.config import parse_distance_mm, parse_distances_mm, parse_wavelengths_um
from psfgen.errors import ConfigError
from psfgen.store.schema import COORD_ATTRS
from psftrain.landing import landing
from psftrain.predict import PsfModel
from psftrain.room import memory_bytes, text
from psftrain.run import Trained

COLUMNS = ("field_x", "field_y", "depth_mm", "focus_mm")


def grid_points(
    trained: Trained, side: int, depth: str | None, focus: str | None, copies: int = 1
) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Points [P, 4] (columns of COLUMNS) of a side x side grid over the trained field at every depth and
    focus, and the shape (focus, depth, y, x) they unfold to.

    Raises ConfigError where the memory is too small for the kernels of so many `copies` at them.
    """
    if side < 1:
        raise ConfigError(f"--grid {side}: at least 1 point a side")
    reach = trained.conditioning.field_max
    depths = _distances("depth", depth, trained.conditioning.depth_dioptre)
    focuses = _distances("focus", focus, trained.conditioning.focus_dioptre)
    size = copies * side**2 * len(depths) * len(focuses) * _kernel_bytes(trained)
    if size > (free := memory_bytes()):
        raise ConfigError(
            f"--grid {side}: the kernels take {text(size)}, free are {text(free)} of memory; ask for fewer"
        )
    axis = np.linspace(-reach, reach, side) if side > 1 else np.zeros(1)
    f, d, y, x = np.meshgrid(focuses, depths, axis, axis, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), d.ravel(), f.ravel()], axis=-1), x.shape


def csv_points(path: str) -> NDArray[Any]:
    """Points [P, 4] from a CSV file with the columns field_x, field_y, depth_mm, focus_mm."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--at {path} cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}"
        ) from None
    if not rows:
        raise ConfigError(f"--at {path} holds no points; write a header line {','.join(COLUMNS)} and a line a point")
    for name in COLUMNS:
        if names.count(name) != 1:
            has = "no column" if name not in names else "more than one column"
            raise ConfigError(f"--at {path} has {has} '{name}'; needed: {', '.join(COLUMNS)}")
    points = []
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():  # what is beyond the header, or missing
            raise ConfigError(f"--at {path}, line {number}: as many values as the {len(names)} columns are needed")
        try:
            field = [_finite(name, row[name]) for name in COLUMNS[:2]]
            points.append([*field, *(parse_distance_mm(row[name]) for name in COLUMNS[2:])])
        except ValueError as error:
            raise ConfigError(f"--at {path}, line {number}: {error}") from None
    return np.array(points)


def _finite(name: str, text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{name} {text} is not finite")
    return value


def model_for(trained: Trained, wavelength: str | None) -> PsfModel:
    """The model with the channels that `--wavelength` names, or its own. Raises ConfigError or RunMismatch."""
    if wavelength is None:
        return PsfModel(trained)
    try:
        return PsfModel(trained, wavelength_um=np.array(parse_wavelengths_um(wavelength)))
    except ValueError as error:
        raise ConfigError(f"--wavelength {wavelength}: {error}") from None


def sample(model: PsfModel, points: NDArray[Any], *, outside: bool = False) -> NDArray[np.float32]:
    """Kernels [P, W, y, x] of the prior mean at points [P, 4].

    Raises RunMismatch outside what was trained on, unless `outside` allows a guess there.
    """
    return model.psf(points[:, :2], points[:, 2], points[:, 3], outside=outside)


def draw(
    model: PsfModel, points: NDArray[Any], copies: int, seed: int, *, outside: bool = False
) -> NDArray[np.float32]:
    """Kernels [copies, P, W, y, x] of lenses drawn from the prior, at points [P, 4].

    Raises ConfigError for no copies, RunMismatch for a model of one lens and, unless `outside` allows a guess there,
    outside what was trained on.
    """
    if copies < 1:
        raise ConfigError(f"--prior {copies}: at least 1 copy")
    return np.stack([sample(one, points, outside=outside) for one in model.drawn(copies, seed)])


def require_new(path: Path) -> None:
    """Raise ConfigError unless `write` can write there."""
    if path.suffix not in (".npz", ".zarr"):
        raise ConfigError(f"--out {path}: write a name that ends in .npz or .zarr")
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}; choose another name") from None
    if exists:
        raise ConfigError(f"--out {path} exists; choose another name")


def write(
    path: Path,
    model: PsfModel,
    kernels: NDArray[Any],
    points: NDArray[Any],
    shape: tuple[int, ...] | None,
) -> None:
    """Write kernels to .npz or .zarr, whole or not at all; with `shape` unfolded over (focus, depth, field_y, field_x).

    Beside them `outside`, which points lie outside what was trained on, and `expected_error`, where the model can say;
    not of drawn copies, which are no guess at any one lens.
    """
    require_new(path)
    trained = model.trained
    array = trained.config.data.array
    down, across = ("by", "bx") if array == "psf_binned" else ("ky", "kx")
    about: dict[str, NDArray[Any]] = {"outside": model.domain.is_outside(points[:, :2], points[:, 2], points[:, 3])}
    drawn = kernels.ndim == 5
    expected = None if drawn else model.expected_error(points[:, :2], points[:, 2], points[:, 3])
    if expected is not None:
        about["expected_error"] = np.where(np.isnan(kernels).any(axis=(1, 2, 3)), np.float32(np.nan), expected)
    coords: dict[str, Any] = {"wavelength": model.wavelength_um, down: model.y_um, across: model.x_um}
    if shape is None:
        dims: tuple[str, ...] = ("point",)
        columns = {name: ("point", points[:, i]) for i, name in enumerate(COLUMNS)}
    else:
        dims, columns = ("focus", "depth", "field_y", "field_x"), {}
        unfolded = points.reshape(*shape, 4)
        axes = (unfolded[:, 0, 0, 0, 3], unfolded[0, :, 0, 0, 2], unfolded[0, 0, :, 0, 1], unfolded[0, 0, 0, :, 0])
        coords |= dict(zip(dims, axes, strict=True))
        kernels = kernels.reshape(*kernels.shape[:-4], *shape, *kernels.shape[-3:])
        about = {name: values.reshape(shape) for name, values in about.items()}
    of_points = dims
    if drawn:
        dims = ("copy", *dims)
        coords["copy"] = np.arange(len(kernels))
    with landing(path) as temporary:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {array: kernels, **coords}
            arrays |= {name: values for name, (_, values) in columns.items()} | about
            np.savez(temporary, **arrays)
            return
        import xarray as xr

        told = {name: (of_points, values, {"units": "1"}) for name, values in about.items()}
        kernel_dims = (*dims, "wavelength", down, across)
        data = xr.Dataset({array: (kernel_dims, kernels), **told}, {**coords, **columns})
        for name in data.coords:
            data[name].attrs = dict(COORD_ATTRS[str(name).removesuffix("_mm")])
        data[array].attrs = {"units": "1", "run": str(trained.path), "path": "prior mean"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")  # young in zarr format 3
            data.to_zarr(temporary, mode="w-", zarr_format=3)


def _kernel_bytes(trained: Trained) -> int:
    side: int = trained.fingerprint["bins" if trained.config.data.array == "psf_binned" else "kernel_px"]
    return 4 * len(trained.fingerprint["wavelength"]) * side**2


def _distances(name: str, text: str | None, trained: tuple[float, float]) -> tuple[float, ...]:
    low, high = trained
    if text is None:
        if high > low:
            raise ConfigError(f"the run was trained on a range of {name}; say which with --{name}")
        return (1000 / low if low else math.inf,)
    try:
        return parse_distances_mm(text)
    except ValueError as error:
        raise ConfigError(f"--{name} {text}: {error}") from None
