"""The contract between psfgen and psftrain: axes, units, arrays, attributes, version.

Legend of the dims: copy (only in stores of several specimens of a lens), focus, depth, field_y, field_x,
wavelength, then ky, kx (samples of `psf`) or by, bx (bins of `psf_binned`). Every coordinate ascends, except ky and
by, which descend: row 0 is scene +y. A block, the unit of work and of commit, is one depth of one copy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import StoreError

SCHEMA_VERSION = "1.0"
SCHEMA_NAME = "psfgen"
PSF_CHUNK_BYTES = 32 * 2**20

FIELD = ("depth", "field_y", "field_x")
KERNELS = ("focus", "depth", "field_y", "field_x", "wavelength")

ARRAY_DIMS: dict[str, tuple[str, ...]] = {
    "psf": (*KERNELS, "ky", "kx"),
    "psf_binned": (*KERNELS, "by", "bx"),
    "throughput": (*FIELD, "wavelength"),
    "captured": KERNELS,
    "noise": KERNELS,
    "noise_binned": KERNELS,
    "chief_x_mm": ("focus", *FIELD),
    "chief_y_mm": ("focus", *FIELD),
    "model": KERNELS,
}
ONLY_OF_ENGINE = {"model": "auto"}  # arrays that stores of other engines do not have
ARRAY_ATTRS: dict[str, dict[str, str]] = {
    "psf": {"units": "1", "long_name": "point-spread function: sums to 1, upright, centred on the chief ray"},
    "psf_binned": {"units": "1", "long_name": "psf over bins of the same window, by exact area overlap"},
    "throughput": {"units": "1", "long_name": "valid rays / rays launched over the full entrance pupil"},
    "captured": {"units": "1", "long_name": "weight deposited in the window / valid rays"},
    "noise": {"units": "1", "long_name": "estimated relative L2 error of psf"},
    "noise_binned": {"units": "1", "long_name": "estimated relative L2 error of psf_binned"},
    "chief_x_mm": {"units": "mm", "long_name": "x of the chief ray on the sensor, upright"},
    "chief_y_mm": {"units": "mm", "long_name": "y of the chief ray on the sensor, upright"},
    "model": {"units": "1", "long_name": "share of engine wave in psf; the rest is of engine geometric"},
}
COORD_DIMS: dict[str, str] = {"focus_dioptre": "focus", "depth_dioptre": "depth"}
COORD_ATTRS: dict[str, dict[str, str]] = {
    "copy": {"units": "1", "long_name": "specimen of the lens design"},
    "focus": {"units": "mm", "long_name": "distance the lens is focused at"},
    "focus_dioptre": {"units": "1/m", "long_name": "inverse focus distance"},
    "depth": {"units": "mm", "long_name": "object distance from the first surface vertex"},
    "depth_dioptre": {"units": "1/m", "long_name": "inverse object distance"},
    "field_y": {"units": "1", "long_name": "pinhole image position / half sensor height"},
    "field_x": {"units": "1", "long_name": "pinhole image position / half sensor width"},
    "wavelength": {"units": "um", "long_name": "wavelength in air"},
    "ky": {"units": "um", "long_name": "kernel sample, upright, from the chief ray"},
    "kx": {"units": "um", "long_name": "kernel sample, upright, from the chief ray"},
    "by": {"units": "um", "long_name": "bin centre, upright, from the chief ray"},
    "bx": {"units": "um", "long_name": "bin centre, upright, from the chief ray"},
}
DESCENDING = ("ky", "by")
BANDED = ("psf", "psf_binned")


def centres_um(count: int, pitch_um: float) -> NDArray[np.float64]:
    """Ascending centres of `count` samples of spacing `pitch_um`, symmetric about 0."""
    return (np.arange(count, dtype=np.float64) - (count - 1) / 2) * np.float64(pitch_um)


def coordinates(
    *,
    focus_mm: NDArray[np.float64],
    depth_mm: NDArray[np.float64],
    field_y: NDArray[np.float64],
    field_x: NDArray[np.float64],
    wavelength_um: NDArray[np.float64],
    kernel_px: int,
    bins: int,
    pitch_um: float,
    copies: int | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Every coordinate of a store, by name; `copy` only where a number of copies is given."""
    k = centres_um(kernel_px, pitch_um)
    b = centres_um(bins, pitch_um * kernel_px / bins)
    return {
        **({} if copies is None else {"copy": np.arange(copies, dtype=np.float64)}),
        "focus": focus_mm,
        "focus_dioptre": 1000 / focus_mm,
        "depth": depth_mm,
        "depth_dioptre": 1000 / depth_mm,
        "field_y": field_y,
        "field_x": field_x,
        "wavelength": wavelength_um,
        "ky": k[::-1].copy(),
        "kx": k,
        "by": b[::-1].copy(),
        "bx": b,
    }


@dataclass(frozen=True)
class StoreSpec:
    """What a store is made of, before a byte of it exists.

    `coords` maps names to 1-D float64 arrays, `attrs` are the root attributes (plain data).
    """

    coords: Mapping[str, NDArray[np.float64]]
    attrs: Mapping[str, Any]

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of its arrays."""
        engine = self.attrs.get("engine")
        return tuple(name for name in ARRAY_DIMS if ONLY_OF_ENGINE.get(name, engine) == engine)

    @property
    def kernel_dims(self) -> tuple[str, ...]:
        """The dims that number the kernels."""
        return (*self._leading, *KERNELS)

    def dims(self, name: str) -> tuple[str, ...]:
        """The dims of an array."""
        return (*self._leading, *ARRAY_DIMS[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(len(self.coords[dim]) for dim in self.dims(name))

    def chunks(self, name: str) -> tuple[int, ...]:
        """Chunk shape: `psf` and `psf_binned` by bands of field rows, every other array one chunk a block.

        The attribute `chunks` {dim: size}, which rechunked stores have, replaces sizes of `psf` and `psf_binned`.
        """
        shape = dict(zip(self.dims(name), self.shape(name), strict=True))
        shape.update(dict.fromkeys(self.block_dims, 1))
        if name in BANDED:
            shape["field_y"] = self.band_rows
        if name == "psf":
            shape["focus"] = 1
        if name in BANDED:
            shape.update(self.attrs.get("chunks", {}))
        return tuple(shape[dim] for dim in self.dims(name))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, in the order of their numbers: copy by copy, depth by depth."""
        places = map(self.block_at, range(math.prod(len(self.coords[dim]) for dim in self.block_dims)))
        return tuple("-".join(f"{dim}-{at:04d}" for dim, at in place.items()) for place in places)

    @property
    def block_dims(self) -> tuple[str, ...]:
        """The dims along which the blocks lie."""
        return (*self._leading, "depth")

    def block_at(self, index: int) -> dict[str, int]:
        """Where block `index` lies: dim -> index."""
        place = np.unravel_index(index, tuple(len(self.coords[dim]) for dim in self.block_dims))
        return {dim: int(at) for dim, at in zip(self.block_dims, place, strict=True)}

    def block_number(self, place: Mapping[str, int]) -> int:
        """The index of the block that lies at `place`: the inverse of `block_at`."""
        sizes = tuple(len(self.coords[dim]) for dim in self.block_dims)
        return int(np.ravel_multi_index(tuple(place[dim] for dim in self.block_dims), sizes))

    def identity(self, block: int) -> dict[str, Any]:
        """What names a block in the ledger."""
        return {"block": self.blocks[block], "index": block, "plan_sha256": self.attrs["plan_sha256"]}

    @property
    def _leading(self) -> tuple[str, ...]:
        return ("copy",) if "copy" in self.coords else ()

    @property
    def band_rows(self) -> int:
        """Field rows of a `psf` chunk: the largest divisor of Ny that keeps it at or below 32 MiB."""
        rows = len(self.coords["field_y"])
        row_bytes = 4 * math.prod(len(self.coords[dim]) for dim in ("field_x", "wavelength", "ky", "kx"))
        return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * row_bytes <= PSF_CHUNK_BYTES))


def beside(dims: tuple[str, ...]) -> list[str]:
    """The coordinates of an array that are not named as a dim of it (CF's `coordinates` attribute)."""
    return [name for name, dim in COORD_DIMS.items() if dim in dims]


def require_known(attrs: Mapping[str, Any], path: object) -> None:
    """Raise StoreError for the attributes of something else, or of a major version that is not known."""
    version = str(attrs.get("schema_version", "none"))
    if attrs.get("schema") != SCHEMA_NAME or version.split(".")[0] != SCHEMA_VERSION[0]:
        raise StoreError(
            f"{path} has schema {attrs.get('schema', 'unknown')} version {version}; "
            f"this psfgen reads {SCHEMA_NAME} version {SCHEMA_VERSION[0]}.x"
        )


def plain(value: Any) -> Any:
    """`value` as JSON-safe data: tuples and arrays as lists, `inf` as the string "inf", NaN as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def sha256_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document's canonical JSON."""
    text = json.dumps(plain(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def json_text(document: Mapping[str, Any]) -> str:
    """A document as JSON for people and programs, NaN as null and inf as "inf"."""
    return json.dumps(plain(document), indent=2, allow_nan=False)
