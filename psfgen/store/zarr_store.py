"""A store as a Zarr v3 group: every block owns whole chunk files, so writers need no locks."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import decompress
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import BaseZarrError, ChunkNotFoundError, ZarrUserWarning

from psfgen.errors import StoreCorrupt, StoreError, StoreIncomplete
from psfgen.store import schema
from psfgen.store.ledger import SEALED, Ledger, Seal
from psfgen.store.place import LocalFolder, RemoteFolder, folder_of, is_url

# An absent chunk must never read as data, and a chunk full of NaN must still be written.
STRICT: Any = {"read_missing_chunks": False, "write_empty_chunks": True}
RESIDUE = 0x48674BC7  # the CRC32C of whatever ends with its own CRC32C


class ZarrStore:
    """One store, open for reading and for writing whole blocks. `path` is a folder on a disk or an fsspec URL.

    Raises StoreError (not a store, not writable), StoreCorrupt, StoreIncomplete.
    """

    format = "zarr"

    def __init__(self, path: str | Path, seal: Seal | None = None) -> None:
        self.path = str(path)
        self.folder = folder_of(path)
        self.ledger = Ledger(self.folder, f"psfgen repair {path}")
        self.seal = seal or self.sealed(path)
        self.seal.check(path, f"psfgen repair {path}")
        with _errors_of(self.path):
            self.group = zarr.open_group(store=self._place(), mode="r+", use_consolidated=False)
            self.attrs: dict[str, Any] = dict(self.group.attrs)
        schema.require_known(self.attrs, self.path)
        self._arrays: dict[str, Any] = {}
        held = [name for name in schema.COORD_ATTRS if name != "copy" or "copy" in self.group]
        self.coords: dict[str, NDArray[np.float64]] = {name: self.read(name) for name in held}
        self.spec = schema.StoreSpec(self.coords, self.attrs)
        self.blocks = self.spec.blocks

    @staticmethod
    def is_store(path: str | Path) -> bool:
        """Whether a store stands at `path`; behind a URL its root is the last to arrive."""
        folder = folder_of(path)
        if is_url(path):
            return folder.exists(SEALED) and folder.exists("zarr.json")
        return folder.exists(SEALED) or (folder.exists("zarr.json") and folder.exists("ledger"))

    @staticmethod
    def sealed(path: str | Path) -> Seal:
        """The seal of the store at `path`, which need not be sound."""
        return Seal.read(folder_of(path), folder_of(path), f"psfgen repair {path}")

    @classmethod
    def reseal(cls, path: str | Path) -> None:
        """Make the seal anew, from metadata that must be what their own content is laid out as.

        Raises StoreCorrupt where they are not.
        """
        folder = folder_of(path)
        store = cls(path, Seal(folder, {}))
        seal = Seal(folder, _laid_out(store.spec))
        seal.check(path, f"psfgen render --out {path} --overwrite")
        folder.write(SEALED, Seal.document(seal.files))

    @classmethod
    def create(cls, path: str | Path, spec: schema.StoreSpec) -> ZarrStore:
        """Lay out an empty store, then let it appear at `path` at once.

        Where another process was first, its store is opened instead: the caller compares the plans.
        """
        (cls._create_remote if is_url(path) else cls._create_local)(path, spec)
        return cls(path)

    @classmethod
    def _create_local(cls, path: str | Path, spec: schema.StoreSpec) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        files = _laid_out(spec)
        first = {name: forms[0] for name, forms in files.items()} | {SEALED: Seal.document(files)}
        try:
            for name, data in first.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(data)
            temporary.rename(path)
        except OSError as error:
            if not cls.is_store(path):
                reason = error.strerror or str(error)
                raise StoreError(f"store {path} cannot be made: {reason}; choose another --out") from None
        finally:
            with suppress(StoreError):
                LocalFolder(path.parent).remove(temporary.name)

    @classmethod
    def _create_remote(cls, path: str | Path, spec: schema.StoreSpec) -> None:
        """The first seal to arrive wins; its files follow, from whoever comes by, the root last of all."""
        folder = folder_of(path)
        folder.create(SEALED, Seal.document(_laid_out(spec)))
        seal = cls.sealed(path)
        for name in sorted(seal.files, key=lambda name: name == "zarr.json"):
            folder.write(name, seal.files[name][0])

    @staticmethod
    def remove(path: str | Path) -> None:
        """Take a store away at once, then delete it."""
        if is_url(path):
            folder = folder_of(path)
            folder.remove("zarr.json")
            for entry in folder.names("ledger"):  # before the chunks, so that a kill leaves no block done that is not
                folder.remove(f"ledger/{entry}")
            folder.remove("")
            return
        path = Path(path)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
        try:
            path.rename(aside)
        except OSError as error:
            raise StoreError(f"{path} cannot be overwritten: {error.strerror}") from None
        LocalFolder(path.parent).remove(aside.name)

    def read(self, name: str, **index: int | slice) -> NDArray[Any]:
        """An array, or the part of it that `index` picks by dim name; int and slice as in numpy.

        Raises StoreCorrupt on a checksum mismatch and StoreIncomplete on a chunk that is not there.
        """
        array = self._array(name)
        key = tuple(index.get(dim, slice(None)) for dim in array.metadata.dimension_names)
        with _errors_of(self.path, name):
            return np.asarray(array[key])

    def read_into(self, out: NDArray[Any], name: str, **index: slice) -> None:
        """`read`, into an array of the shape that the slices leave; one whole chunk is decoded in place.

        zarr decodes into memory that is new each time, which for large chunks takes as long as the decoding.
        """
        relative = self._whole_chunk(name, index) if out.flags.c_contiguous else None
        encoded = self._sound_chunk(relative) if relative and out.dtype == self._array(name).dtype else None
        if encoded is None:
            out[...] = self.read(name, **index)  # and that says what is wrong with a chunk
        else:
            with _errors_of(self.path, name):
                decompress(encoded, out)

    def _whole_chunk(self, name: str, index: Mapping[str, slice]) -> str | None:
        """The path of the chunk that slices by dim pick, whole and alone."""
        corner = []
        for dim, size, chunk in zip(self.spec.dims(name), self.spec.shape(name), self.spec.chunks(name), strict=True):
            start, stop, step = index.get(dim, slice(None)).indices(size)
            if start % chunk or stop - start != chunk or step != 1:
                return None
            corner.append(str(start // chunk))
        return "/".join([name, "c", *corner])

    def _sound_chunk(self, relative: str) -> memoryview | None:
        """What a chunk file holds before the CRC32C that it ends with; None where that is another, or no file is."""
        try:
            data = self.folder.read(relative)
        except FileNotFoundError:
            return None
        return memoryview(data)[:-4] if google_crc32c.value(data) == RESIDUE else None

    def write(self, block: int, name: str, data: NDArray[Any], **index: slice) -> None:
        """Write `data`, which has every dim of the array, into a block; it must cover whole chunks."""
        array = self._array(name)
        index = {**index, **{dim: slice(at, at + 1) for dim, at in self.spec.block_at(block).items()}}
        key = tuple(index.get(dim, slice(None)) for dim in array.metadata.dimension_names)
        with _errors_of(self.path, name):
            array[key] = data

    def abandon(self, block: int) -> None:
        """Give up a block that was begun: its chunks stay, and count for nothing."""

    def chunk_files(self, block: int) -> list[str]:
        """Paths, relative to the store, of the chunk files that a block owns."""
        paths = []
        for name in self.spec.arrays:
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
            data = self.folder.read(relative)
        except FileNotFoundError:
            raise StoreIncomplete(f"{self.path}: chunk {relative} is missing") from None
        found = google_crc32c.value(data[:-4])
        if found.to_bytes(4, "little") != data[-4:]:
            raise StoreCorrupt(f"{self.path}: chunk {relative} does not have the CRC32C it ends with")
        return f"{found:08x}"

    def commit(self, block: int, entry: Mapping[str, Any]) -> None:
        """Declare a block done, with the checksums of what it wrote."""
        self.seal.require_ours(self.folder, self.path)
        chunks = {relative: self.chunk_crc32c(relative) for relative in self.chunk_files(block)}
        self.ledger.commit(self.blocks[block], {**self.spec.identity(block), "chunks": chunks, **entry})

    def missing(self) -> list[int]:
        """Indices of the blocks that are not committed."""
        done = self.ledger.done()
        return [index for index, name in enumerate(self.blocks) if name not in done]

    def finalise(self) -> None:
        """Consolidate the metadata, once the last block has landed. Doing it again changes nothing."""
        consolidated = self.seal.files["zarr.json"][-1]
        if self.folder.read("zarr.json") != consolidated:
            self.folder.write("zarr.json", consolidated)

    def _place(self) -> Any:
        if isinstance(self.folder, RemoteFolder):
            return zarr.storage.FsspecStore.from_url(self.folder.url)
        return self.path

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            with _errors_of(self.path, name):
                self._arrays[name] = self.group[name].with_config(STRICT)  # type: ignore[union-attr]
        return self._arrays[name]


def _laid_out(spec: schema.StoreSpec) -> dict[str, list[bytes]]:
    """The metadata and the coordinates of an empty store, file by file; then what consolidation will write.

    In memory: zarr writes files side by side, and where one fails the others still come.
    """
    codecs: Any = (ZstdCodec(level=1), Crc32cCodec())
    held: dict[str, Any] = {}
    place = zarr.storage.MemoryStore(held)
    group = zarr.create_group(store=place, attributes=schema.plain(spec.attrs))
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
    for name in spec.arrays:
        dims = spec.dims(name)
        group.create_array(
            name,
            shape=spec.shape(name),
            chunks=spec.chunks(name),
            dtype="float64" if name.startswith("chief") else "float32",
            compressors=codecs,
            fill_value=float("nan"),
            dimension_names=dims,
            attributes={**schema.ARRAY_ATTRS[name], "coordinates": " ".join(schema.beside(dims))},
        )
    files = {name: [data.to_bytes()] for name, data in held.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Consolidated metadata", category=ZarrUserWarning
        )  # young in format 3
        zarr.consolidate_metadata(place)
    files["zarr.json"].append(held["zarr.json"].to_bytes())
    return files


@contextmanager
def _errors_of(path: str, array: str = "") -> Iterator[None]:
    """zarr's and the disk's errors as ours."""
    where = f"{path}: {array}" if array else str(path)
    try:
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
