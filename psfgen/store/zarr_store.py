"""A store as a Zarr v3 group on a local disk: every block owns whole chunk files, so writers need no locks."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import BaseZarrError, ChunkNotFoundError, ZarrUserWarning

from psfgen.errors import StoreCorrupt, StoreError, StoreIncomplete
from psfgen.store import schema
from psfgen.store.ledger import Ledger

# An absent chunk must never read as data, and a chunk full of NaN must still be written.
STRICT = {"array.read_missing_chunks": False, "array.write_empty_chunks": True}


class ZarrStore:
    """One store, open for reading and for writing whole blocks.

    Raises StoreError (not a store, not writable), StoreCorrupt, StoreIncomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path)
        with _errors_of(path):
            self.group = zarr.open_group(store=str(path), mode="r+", use_consolidated=False)
            self.attrs: dict[str, Any] = dict(self.group.attrs)
        version = str(self.attrs.get("schema_version", "none"))
        if self.attrs.get("schema") != schema.SCHEMA_NAME or version.split(".")[0] != schema.SCHEMA_VERSION[0]:
            raise StoreError(
                f"{path} has schema {self.attrs.get('schema', 'unknown')} version {version}; "
                f"this psfgen reads {schema.SCHEMA_NAME} version {schema.SCHEMA_VERSION[0]}.x"
            )
        self._arrays: dict[str, Any] = {}
        held = [name for name in schema.COORD_ATTRS if name != "copy" or "copy" in self.group]
        self.coords: dict[str, NDArray[np.float64]] = {name: self.read(name) for name in held}
        self.spec = schema.StoreSpec(self.coords, self.attrs)
        self.blocks = self.spec.blocks

    @staticmethod
    def is_store(path: Path) -> bool:
        """Whether a Zarr group stands at `path`."""
        return (path / "zarr.json").is_file()

    @classmethod
    def create(cls, path: Path, spec: schema.StoreSpec) -> ZarrStore:
        """Lay out an empty store, then let it appear at `path` at once.

        Where another process was first, its store is opened instead: the caller compares the plans.
        """
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with _errors_of(path):
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                _lay_out(temporary, spec)
                temporary.rename(path)
            except OSError as error:
                if not cls.is_store(path):
                    reason = error.strerror or str(error)
                    raise StoreError(f"store {path} cannot be made: {reason}; choose another --out") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls(path)

    def read(self, name: str, **index: int | slice) -> NDArray[Any]:
        """An array, or the part of it that `index` picks by dim name; int and slice as in numpy.

        Raises StoreCorrupt on a checksum mismatch and StoreIncomplete on a chunk that is not there.
        """
        array = self._array(name)
        key = tuple(index.get(dim, slice(None)) for dim in array.metadata.dimension_names)
        with _errors_of(self.path, name):
            return np.asarray(array[key])

    def write(self, name: str, data: NDArray[Any], **index: slice) -> None:
        """Write `data` where `index` says; it must cover whole chunks."""
        array = self._array(name)
        key = tuple(index.get(dim, slice(None)) for dim in array.metadata.dimension_names)
        with _errors_of(self.path, name):
            array[key] = data

    def chunk_files(self, block: int) -> list[str]:
        """Paths, relative to the store, of the chunk files that a block owns."""
        paths = []
        for name in schema.ARRAY_DIMS:
            counts = [range(-(-n // c)) for n, c in zip(self.spec.shape(name), self.spec.chunks(name), strict=True)]
            for dim, at in self.spec.block_at(block).items():
                counts[self.spec.dims(name).index(dim)] = range(at, at + 1)
            paths += ["/".join([name, "c", *map(str, at)]) for at in product(*counts)]
        return paths

    def chunk_crc32c(self, relative: str) -> str:
        """CRC32C of the encoded bytes of a chunk file, in hex, as they lie on disk.

        The last four bytes are that very checksum, put there by the codec; with them the CRC32C of every
        file would be the same. Raises StoreIncomplete if the file is not there, StoreCorrupt if the two differ.
        """
        try:
            data = (self.path / relative).read_bytes()
        except FileNotFoundError:
            raise StoreIncomplete(f"{self.path}: chunk {relative} is missing; render again to make it") from None
        found = google_crc32c.value(data[:-4])
        if found.to_bytes(4, "little") != data[-4:]:
            raise StoreCorrupt(f"{self.path}: chunk {relative} does not have the CRC32C it ends with")
        return f"{found:08x}"

    def commit(self, block: int, entry: Mapping[str, Any]) -> None:
        """Declare a block done, with the checksums of what it wrote."""
        chunks = {relative: self.chunk_crc32c(relative) for relative in self.chunk_files(block)}
        identity = {"block": self.blocks[block], "index": block, "plan_sha256": self.attrs["plan_sha256"]}
        self.ledger.commit(self.blocks[block], {**identity, "chunks": chunks, **entry})

    def missing(self) -> list[int]:
        """Indices of the blocks that are not committed."""
        done = self.ledger.done()
        return [index for index, name in enumerate(self.blocks) if name not in done]

    def finalise(self) -> None:
        """Consolidate the metadata, once the last block has landed. Doing it again changes nothing."""
        with _errors_of(self.path):
            if "consolidated_metadata" in json.loads((self.path / "zarr.json").read_text(encoding="utf-8")):
                return
        with warnings.catch_warnings():
            # zarr warns that consolidation is young in format 3, and that `ledger/` or the
            # rest of a killed write is none of its own.
            warnings.filterwarnings("ignore", message="Consolidated metadata", category=ZarrUserWarning)
            warnings.filterwarnings("ignore", message="Object at", category=ZarrUserWarning)
            with _errors_of(self.path):
                zarr.consolidate_metadata(str(self.path))

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            with _errors_of(self.path, name):
                self._arrays[name] = self.group[name]
        return self._arrays[name]


def _lay_out(path: Path, spec: schema.StoreSpec) -> None:
    codecs: Any = (ZstdCodec(level=1), Crc32cCodec())
    group = zarr.create_group(store=str(path), attributes=schema.plain(spec.attrs))
    for name, coordinate in spec.coords.items():
        values = np.asarray(coordinate, dtype=np.float64)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=values.shape,
            dtype="float64",
            compressors=codecs,
            fill_value=float("nan"),
            dimension_names=(schema.COORD_DIMS.get(name, name),),
            attributes=dict(schema.COORD_ATTRS[name]),
        )
        array[:] = values
    for name in schema.ARRAY_DIMS:
        dims = spec.dims(name)
        group.create_array(
            name,
            shape=spec.shape(name),
            chunks=spec.chunks(name),
            dtype="float64" if name.startswith("chief") else "float32",
            compressors=codecs,
            fill_value=float("nan"),
            dimension_names=dims,
            attributes={**schema.ARRAY_ATTRS[name], "coordinates": " ".join(_beside(dims))},
        )


def _beside(dims: tuple[str, ...]) -> list[str]:
    """The coordinates of an array that are not named as a dim of it (CF's `coordinates` attribute)."""
    return [name for name, dim in schema.COORD_DIMS.items() if dim in dims]


@contextmanager
def _errors_of(path: Path, array: str = "") -> Iterator[None]:
    """Strict zarr settings, and zarr's and the disk's errors as ours."""
    where = f"{path}: {array}" if array else str(path)
    try:
        with zarr.config.set(STRICT):
            yield
    except ChunkNotFoundError:
        raise StoreIncomplete(f"{where} has missing chunks; `psfgen status {path}` shows which blocks") from None
    except PermissionError:
        raise StoreError(f"{path} cannot be written: permission denied; choose another --out") from None
    except OSError as error:
        raise StoreError(f"{where}: {error.strerror or error}") from None
    except (BaseZarrError, KeyError, ValueError, RuntimeError, TypeError) as error:
        text = str(error) or type(error).__name__
        raise StoreCorrupt(f"{where} is corrupt ({text}); `psfgen verify {path}` shows what") from None
