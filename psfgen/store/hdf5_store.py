"""A store as HDF5: one part file a block, written by one process, and a master file of virtual datasets over them.

    psfs.h5                    the master: coordinates, attributes, virtual datasets with relative links
    psfs.h5.d/parts/BLOCK.h5   the arrays of one block, named as in the master
    psfs.h5.d/ledger/          as in a Zarr store

The master never changes. A part appears whole, by a rename, and its bytes do not depend on the order in which its
chunks were made: they wait, encoded, in a scratch file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import google_crc32c
import h5py
import numpy as np
from numcodecs import Fletcher32, Shuffle, Zlib
from numpy.typing import NDArray

from psfgen.errors import StoreCorrupt, StoreError, StoreIncomplete
from psfgen.store import schema
from psfgen.store.hdf5_file import create_array, label, new_file, write_coords
from psfgen.store.ledger import SEALED, Ledger, Seal
from psfgen.store.place import LocalFolder, is_url

IN_MEMORY = 2**24  # bytes of encoded chunks that wait in memory, before they wait on the disk
PIECE = 2**24  # bytes read at once


class Hdf5Store:
    """One store, open for reading and for writing whole blocks. `path` is the master file.

    Raises StoreError (not a store, not writable), StoreCorrupt, StoreIncomplete.
    """

    format = "hdf5"

    def __init__(self, path: str | Path, seal: Seal | None = None) -> None:
        self.path = str(path)
        self._beside = _sidecar(path)
        self.folder = LocalFolder(self._beside)
        self.ledger = Ledger(self.folder, f"psfgen repair {path}")
        self.seal = seal or self.sealed(path)
        _publish(self.seal)
        self.seal.check(path, f"psfgen repair {path}")
        with _errors_of(self.path), _open(self.path) as master:
            self.attrs = _attributes(master)
            schema.require_known(self.attrs, self.path)
            held = [name for name in schema.COORD_ATTRS if name in master]
            self.coords: dict[str, NDArray[np.float64]] = {name: master[name][()] for name in held}
        self.spec = schema.StoreSpec(self.coords, self.attrs)
        self.blocks = self.spec.blocks
        self._begun: dict[int, Part] = {}
        self._lock = Lock()

    @staticmethod
    def is_store(path: str | Path) -> bool:
        """Whether an HDF5 store stands at `path`."""
        beside = _sidecar(path)
        return not is_url(path) and (
            (beside / SEALED).is_file() or (Path(path).is_file() and (beside / "ledger").is_dir())
        )

    @staticmethod
    def sealed(path: str | Path) -> Seal:
        """The seal of the store at `path`, which need not be sound. Raises StoreError for one that was renamed."""
        seal = Seal.read(LocalFolder(_sidecar(path)), LocalFolder(Path(path).parent), f"psfgen repair {path}")
        renamed = [name for name in seal.files if name != Path(path).name]
        if renamed:
            raise StoreError(f"{path} was made as {renamed[0]}, and finds its parts by that name; rename it back")
        return seal

    @classmethod
    def reseal(cls, path: str | Path) -> None:
        """Make the seal anew, from a master that must be what its own content is laid out as.

        Raises StoreCorrupt where it is not.
        """
        path = Path(path)
        store = cls(path, Seal(LocalFolder(path.parent), {}))
        with tempfile.TemporaryDirectory() as temporary:
            _lay_out(Path(temporary) / path.name, path.name, store.spec)
            seal = Seal(LocalFolder(path.parent), {path.name: [(Path(temporary) / path.name).read_bytes()]})
        seal.check(path, f"psfgen render --out {path} --overwrite")
        store.folder.write(SEALED, Seal.document(seal.files))

    @classmethod
    def create(cls, path: str | Path, spec: schema.StoreSpec) -> Hdf5Store:
        """Lay out an empty store, then let it appear at `path` at once.

        Where another process was first, its store is opened instead: the caller compares the plans.
        """
        if is_url(path):
            raise StoreError(f"{path} is no path on a disk, which HDF5 needs; use --format zarr")
        path, beside = Path(path), _sidecar(path)
        temporary = beside.with_name(f".{beside.name}.{uuid.uuid4().hex}.tmp")
        try:
            (temporary / "parts").mkdir(parents=True)
            with _errors_of(str(path)):
                _lay_out(temporary / "master", path.name, spec)
            master = (temporary / "master").read_bytes()
            (temporary / "master").unlink()
            LocalFolder(temporary).write(SEALED, Seal.document({path.name: [master]}))
            temporary.rename(beside)
        except (OSError, StoreError) as error:
            if not cls.is_store(path):
                reason = getattr(error, "strerror", None) or str(error)
                raise StoreError(f"store {path} cannot be made: {reason}; choose another --out") from None
        finally:
            LocalFolder(beside.parent).remove(temporary.name)
        return cls(path)

    @staticmethod
    def remove(path: str | Path) -> None:
        """Take a store away at once, then delete it."""
        beside = _sidecar(path)
        aside = beside.with_name(f".{beside.name}.{uuid.uuid4().hex}.old")
        try:
            Path(path).unlink(missing_ok=True)  # first: a sidecar alone is still a store, a master alone is none
            beside.rename(aside)
            Path(path).unlink(missing_ok=True)  # if somebody has opened the store in between
        except OSError as error:
            raise StoreError(f"{path} cannot be overwritten: {error.strerror}") from None
        LocalFolder(beside.parent).remove(aside.name)

    def read(self, name: str, **index: int | slice) -> NDArray[Any]:
        """An array, or the part of it that `index` picks by dim name; int and slice as in numpy.

        Raises StoreCorrupt on a checksum mismatch and StoreIncomplete on a block that is not there.
        """
        if name in self.coords:
            return self.coords[name][index.get(schema.COORD_DIMS.get(name, name), slice(None))]
        dims, sizes = self.spec.dims(name), dict(zip(self.spec.dims(name), self.spec.shape(name), strict=True))
        chosen = {dim: np.arange(sizes[dim])[index.get(dim, slice(None))] for dim in dims}
        out = np.empty([np.size(at) for at in chosen.values()], _dtype(name))
        places = [np.ravel(chosen[dim]) for dim in self.spec.block_dims]
        within = tuple(slice(None) if dim in self.spec.block_dims else _span(chosen[dim]) for dim in dims)
        for at in product(*map(enumerate, places)):
            block = self.spec.block_number({dim: int(i) for dim, (_, i) in zip(self.spec.block_dims, at, strict=True)})
            target = dict(zip(self.spec.block_dims, (slice(n, n + 1) for n, _ in at), strict=True))
            out[tuple(target.get(dim, slice(None)) for dim in dims)] = self._read_part(block, name, within)
        steps = tuple(index.get(dim, slice(None)) for dim in dims)
        return out.reshape(
            [np.size(at) for at, step in zip(chosen.values(), steps, strict=True) if isinstance(step, slice)]
        )

    def read_into(self, out: NDArray[Any], name: str, **index: slice) -> None:
        """`read`, into an array of the shape that the slices leave."""
        out[...] = self.read(name, **index)

    def _read_part(self, block: int, name: str, within: tuple[slice, ...]) -> NDArray[Any]:
        path = self._beside / "parts" / f"{self.blocks[block]}.h5"
        with _errors_of(self.path, name):
            try:
                with _open(path) as part:
                    return np.asarray(part[name][within])
            except FileNotFoundError:
                raise StoreIncomplete(
                    f"{self.path}: block {self.blocks[block]} is missing; run the same `psfgen render` again to make it"
                ) from None

    def write(self, block: int, name: str, data: NDArray[Any], **index: slice) -> None:
        """Write `data`, which has every dim of the array, into a block; it must cover whole chunks."""
        with _errors_of(self.path, name):
            with self._lock:
                if block not in self._begun:
                    self._begun[block] = Part(self.spec, self._beside / "parts")
            self._begun[block].write(name, data, index)

    def abandon(self, block: int) -> None:
        """Give up a block that was begun."""
        if part := self._begun.pop(block, None):
            part.close()

    def chunk_files(self, block: int) -> list[str]:
        """Paths, relative to the sidecar folder, of the files that a block owns: its one part."""
        return [f"parts/{self.blocks[block]}.h5"]

    def chunk_crc32c(self, relative: str) -> str:
        """CRC32C of the bytes of a part, in hex. Raises StoreIncomplete if the file is not there."""
        found = 0
        try:
            with _errors_of(self.path), open(self._beside / relative, "rb") as file:
                while piece := file.read(PIECE):
                    found = google_crc32c.extend(found, piece)
        except FileNotFoundError:
            raise StoreIncomplete(f"{self.path}: part {relative} is missing") from None
        return f"{found:08x}"

    def commit(self, block: int, entry: Mapping[str, Any]) -> None:
        """Let the part of a block appear and declare the block done."""
        self.seal.require_ours(self.folder, self.path)
        (relative,) = self.chunk_files(block)
        part = self._begun.get(block)
        if part is None or part.absent:
            what = part.absent[0] if part else "all of it"
            raise StoreIncomplete(f"{self.path}: block {self.blocks[block]} cannot be committed: {what} is missing")
        with _errors_of(self.path):
            part.land(self._beside / relative)
        del self._begun[block]
        chunks = {relative: self.chunk_crc32c(relative)}
        self.ledger.commit(self.blocks[block], {**self.spec.identity(block), "chunks": chunks, **entry})

    def missing(self) -> list[int]:
        """Indices of the blocks that are not committed."""
        done = self.ledger.done()
        return [index for index, name in enumerate(self.blocks) if name not in done]

    def finalise(self) -> None:
        """Nothing: the master was whole from the beginning."""


class Part:
    """The arrays of one block on their way into its part file: chunk by chunk, encoded, in any order."""

    def __init__(self, spec: schema.StoreSpec, folder: Path) -> None:
        self.spec = spec
        # Nameless: it goes with its process.
        self._scratch = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(folder))  # noqa: SIM115  (closed by land)
        self._at: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
        self._lock = Lock()

    def write(self, name: str, data: NDArray[Any], index: Mapping[str, slice]) -> None:
        """Encode the chunks of `data`, which lies where `index` says, and keep them."""
        chunks = self.spec.chunks(name)
        start = [index.get(dim, slice(None)).start or 0 for dim in self.spec.dims(name)]
        for corner in product(*(range(0, n, c) for n, c in zip(data.shape, chunks, strict=True))):
            piece = data[tuple(slice(at, at + c) for at, c in zip(corner, chunks, strict=True))]
            encoded = _encode(piece, chunks, _dtype(name))
            with self._lock:
                self._at[name, tuple(map(sum, zip(start, corner, strict=True)))] = (self._scratch.tell(), len(encoded))
                self._scratch.write(encoded)

    @property
    def absent(self) -> list[str]:
        """Names of the arrays of which chunks are missing."""
        held = Counter(name for name, _ in self._at)
        return [
            name
            for name in self.spec.arrays
            if held[name] != prod(-(-n // c) for n, c in zip(self._shape(name), self.spec.chunks(name), strict=True))
        ]

    def land(self, path: Path) -> None:
        """Write the part file, always in the same order, and let it appear."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with new_file(temporary) as (file, check):
                for name in self.spec.arrays:
                    array = create_array(file, name, self._shape(name), self.spec.chunks(name), _dtype(name))
                    for offset in sorted(at for of, at in self._at if of == name):
                        where, length = self._at[name, offset]
                        self._scratch.seek(where)
                        array.id.write_direct_chunk(offset, self._scratch.read(length))
                        check()
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Let the encoded chunks go."""
        self._scratch.close()

    def _shape(self, name: str) -> tuple[int, ...]:
        sizes = zip(self.spec.dims(name), self.spec.shape(name), strict=True)
        return tuple(1 if dim in self.spec.block_dims else size for dim, size in sizes)


def _encode(piece: NDArray[Any], chunk: tuple[int, ...], dtype: str) -> bytes:
    """A chunk as HDF5's own filters shuffle, deflate and fletcher32 make it, but without HDF5's lock."""
    whole = piece.astype(dtype, order="C", copy=False)
    if piece.shape != chunk:  # at the edge: HDF5 keeps whole chunks
        whole = np.full(chunk, np.nan, dtype)
        whole[tuple(map(slice, piece.shape))] = piece
    shuffled = Shuffle(whole.itemsize).encode(np.ascontiguousarray(whole))
    return bytes(Fletcher32().encode(Zlib(level=1).encode(shuffled)))


def _dtype(name: str) -> str:
    return "<f8" if name.startswith("chief") else "<f4"


def _lay_out(path: Path, name: str, spec: schema.StoreSpec) -> None:
    """Write the master file of the store `name`, whose parts do not exist yet."""
    with new_file(path) as (file, _):
        document = dict(sorted(schema.plain(spec.attrs).items()))  # as they are read, so that a seal can be made anew
        nested = [key for key, value in document.items() if isinstance(value, (dict, list)) or value is None]
        for key, value in document.items():
            file.attrs[key] = json.dumps(value) if key in nested else value
        file.attrs["json_attributes"] = " ".join(nested)
        write_coords(file, {name: np.asarray(values, np.float64) for name, values in spec.coords.items()})
        for array in spec.arrays:
            dims, shape = spec.dims(array), spec.shape(array)
            layout = h5py.VirtualLayout(shape, _dtype(array))
            layout.dcpl.set_obj_track_times(False)
            for block, of in enumerate(spec.blocks):
                here = spec.block_at(block)
                source = f"{name}.d/parts/{of}.h5".replace("%", "%%")  # HDF5 would fill %b in
                part = h5py.VirtualSource(
                    source, array, [1 if d in here else n for d, n in zip(dims, shape, strict=True)]
                )
                layout[tuple(slice(here[dim], here[dim] + 1) if dim in here else slice(None) for dim in dims)] = part
            label(file.create_virtual_dataset(array, layout, fillvalue=np.nan), array, dims)


def _attributes(master: Any) -> dict[str, Any]:
    nested = str(master.attrs.get("json_attributes", "")).split()
    found = {key: value.item() if isinstance(value, np.generic) else value for key, value in master.attrs.items()}
    return {key: json.loads(v) if key in nested else v for key, v in found.items() if key != "json_attributes"}


def _sidecar(path: str | Path) -> Path:
    return Path(f"{Path(path)}.d")


def _publish(seal: Seal) -> None:
    """Write the master where a killed process could not."""
    for name, (master,) in seal.files.items():
        if not seal.folder.exists(name):
            seal.folder.create(name, master)


def _span(chosen: NDArray[np.int64]) -> slice:
    """What np.arange(n)[index] chose, as a slice: h5py takes no negative index or step."""
    flat = np.ravel(chosen)
    if not flat.size:
        return slice(0, 0)
    step = int(flat[1] - flat[0]) if flat.size > 1 else 1
    assert step > 0, "slices run forwards"
    return slice(int(flat[0]), int(flat[-1]) + 1, step)


def _open(path: str | Path) -> Any:
    return h5py.File(path, "r", locking=False)


@contextmanager
def _errors_of(path: str, array: str = "") -> Iterator[None]:
    """HDF5's and the disk's errors as ours."""
    where = f"{path}: {array}" if array else path
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        if told := re.search(r"errno = (\d+)", str(error)):  # HDF5 tells it in words alone
            raise StoreError(f"{where}: {os.strerror(int(told[1]))}") from None
        if isinstance(error, OSError) and error.errno:
            raise StoreError(f"{where}: {error.strerror or error}") from None
        raise StoreCorrupt(f"{where} is corrupt ({error}); `psfgen verify {path}` shows what") from None
    except (KeyError, ValueError, TypeError) as error:
        text = str(error) or type(error).__name__
        raise StoreCorrupt(f"{where} is corrupt ({text}); `psfgen verify {path}` shows what") from None
