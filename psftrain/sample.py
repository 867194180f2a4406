"""Kernels of a trained model at any points, written to .npz or .zarr."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.config import parse_distance_mm, parse_distances_mm
from psfgen.errors import ConfigError, FitError
from psfgen.store.schema import COORD_ATTRS
from psftrain.predict import PsfModel
from psftrain.run import Trained

COLUMNS = ("field_x", "field_y", "depth_mm", "focus_mm")


def grid_points(
    trained: Trained, side: int, depth: str | None, focus: str | None
) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Points [P, 4] (columns of COLUMNS) of a side x side grid over the trained field at every depth and
    focus, and the shape (focus, depth, y, x) they unfold to.
    """
    if side < 1:
        raise ConfigError(f"--grid {side}: at least 1 point a side")
    reach = trained.conditioning.field_max
    axis = np.linspace(-reach, reach, side) if side > 1 else np.zeros(1)
    depths = _distances("depth", depth, trained.conditioning.depth_dioptre)
    focuses = _distances("focus", focus, trained.conditioning.focus_dioptre)
    f, d, y, x = np.meshgrid(focuses, depths, axis, axis, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), d.ravel(), f.ravel()], axis=-1), x.shape


def csv_points(path: str) -> NDArray[Any]:
    """Points [P, 4] from a CSV file with the columns field_x, field_y, depth_mm, focus_mm."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--at {path} cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}"
        ) from None
    points = []
    for number, row in enumerate(rows, start=2):
        try:
            field = [float(row[name]) for name in COLUMNS[:2]]
            points.append([*field, *(parse_distance_mm(row[name]) for name in COLUMNS[2:])])
        except KeyError as missing:
            raise ConfigError(f"--at {path} has no column {missing}; needed: {', '.join(COLUMNS)}") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--at {path}, line {number}: {error}") from None
    if not points:
        raise ConfigError(f"--at {path} holds no points; write a header line {','.join(COLUMNS)} and a line a point")
    return np.array(points)


def sample(trained: Trained, points: NDArray[Any]) -> NDArray[np.float32]:
    """Kernels [P, W, y, x] of the prior mean at points [P, 4]. Raises RunMismatch outside what was trained."""
    return PsfModel(trained).psf(points[:, :2], points[:, 2], points[:, 3])


def write(
    path: Path, trained: Trained, kernels: NDArray[Any], points: NDArray[Any], shape: tuple[int, ...] | None
) -> None:
    """Write kernels to .npz or .zarr; with `shape` unfolded over (focus, depth, field_y, field_x)."""
    if path.suffix not in (".npz", ".zarr"):
        raise ConfigError(f"--out {path}: write a name that ends in .npz or .zarr")
    if path.exists():
        raise ConfigError(f"--out {path} exists; choose another name")
    model, array = PsfModel(trained), trained.config.data.array
    down, across = ("by", "bx") if array == "psf_binned" else ("ky", "kx")
    coords: dict[str, Any] = {"wavelength": model.wavelength_um, down: model.y_um, across: model.x_um}
    if shape is None:
        dims: tuple[str, ...] = ("point",)
        columns = {name: ("point", points[:, i]) for i, name in enumerate(COLUMNS)}
    else:
        dims, columns = ("focus", "depth", "field_y", "field_x"), {}
        unfolded = points.reshape(*shape, 4)
        axes = (unfolded[:, 0, 0, 0, 3], unfolded[0, :, 0, 0, 2], unfolded[0, 0, :, 0, 1], unfolded[0, 0, 0, :, 0])
        coords |= dict(zip(dims, axes, strict=True))
        kernels = kernels.reshape(*shape, *kernels.shape[1:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {array: kernels, **coords}
            arrays |= {name: values for name, (_, values) in columns.items()}
            np.savez(path, **arrays)
            return
        import xarray as xr

        data = xr.Dataset({array: ((*dims, "wavelength", down, across), kernels)}, {**coords, **columns})
        for name in data.coords:
            data[name].attrs = dict(COORD_ATTRS[str(name).removesuffix("_mm")])
        data[array].attrs = {"units": "1", "run": str(trained.path), "path": "prior mean"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")  # young in zarr format 3
            data.to_zarr(path, mode="w-", zarr_format=3)
    except OSError as error:
        raise FitError(f"{path} cannot be written: {error.strerror}; choose another --out") from None


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
