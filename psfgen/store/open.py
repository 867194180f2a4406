"""Opening a store, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import ConfigError, StoreCorrupt, StoreError, StoreIncomplete, nearest
from psfgen.store.ledger import Ledger
from psfgen.store.place import Folder, is_url
from psfgen.store.schema import StoreSpec

FORMATS = {"zarr": "psfgen.store.zarr_store:ZarrStore", "hdf5": "psfgen.store.hdf5_store:Hdf5Store"}
HDF5_ENDINGS = (".h5", ".hdf5")


class Store(Protocol):
    """What every format offers; see `psfgen.store.zarr_store.ZarrStore` for the meaning of each."""

    path: str
    format: str
    folder: Folder
    attrs: dict[str, Any]
    coords: dict[str, NDArray[np.float64]]
    spec: StoreSpec
    blocks: tuple[str, ...]
    ledger: Ledger

    def read(self, name: str, **index: int | slice) -> NDArray[Any]: ...
    def read_into(self, out: NDArray[Any], name: str, **index: slice) -> None: ...
    def write(self, block: int, name: str, data: NDArray[Any], **index: slice) -> None: ...
    def abandon(self, block: int) -> None: ...
    def chunk_files(self, block: int) -> list[str]: ...
    def chunk_crc32c(self, relative: str) -> str: ...
    def commit(self, block: int, entry: dict[str, Any]) -> None: ...
    def missing(self) -> list[int]: ...
    def finalise(self) -> None: ...


def store_class(name: str) -> Any:
    """The class of a format. Raises ConfigError for an unknown name."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'{nearest(name, FORMATS)}; known: {', '.join(FORMATS)}")
    module, _, attribute = FORMATS[name].partition(":")
    return getattr(import_module(module), attribute)


def format_of(path: str | Path, name: str | None = None) -> str:
    """The format of a store that is to be made: the one named, else what its path ends in."""
    return name or ("hdf5" if str(path).rstrip("/").endswith(HDF5_ENDINGS) else "zarr")


def is_store(path: str | Path) -> bool:
    """Whether a store of any format stands at `path`."""
    return any(store_class(name).is_store(path) for name in FORMATS)


def class_at(path: str | Path) -> Any:
    """The class of the store that stands at `path`. Raises StoreError where there is none."""
    kind = next((cls for cls in map(store_class, FORMATS) if cls.is_store(path)), None)
    if kind is None and not is_url(path) and Path(path).exists():
        raise StoreError(f"{path} is no psfgen store (formats: {', '.join(FORMATS)})")
    if kind is None:
        raise StoreError(f"store {path} does not exist; `psfgen render --out {path}` makes one")
    return kind


def open_or_create(
    path: str,
    format: str | None,
    make_spec: Callable[[], StoreSpec],
    check: Callable[[dict[str, Any]], None],
    *,
    overwrite: bool,
) -> Store:
    """The store at `path`, which is made where it is not there, or where `overwrite` takes the old one away.

    `check(attrs)` raises where it is another one than asked for. Raises StoreError where something else stands there.
    """
    kind = store_class(format_of(path, format))
    if kind.is_store(path):
        if not overwrite:
            store: Store = kind(path)
            check(store.attrs)
            return store
        _require_free(kind, path)
        kind.remove(path)
    elif not is_url(path) and Path(path).exists() and not _empty_folder(Path(path)):
        raise StoreError(f"{path} exists and is no {kind.format} store of psfgen; choose another --out")
    store = kind.create(path, make_spec())
    check(store.attrs)  # another process may have been first
    return store


def _require_free(kind: Any, path: str) -> None:
    """Raise StoreError where a store cannot be taken away: others write it, or it is only a link."""
    if not is_url(path) and Path(path).is_symlink():
        raise StoreError(f"--overwrite: {path} is a link to {Path(path).resolve()}; name that, or delete the link")
    try:
        running = kind(path).ledger.running()
    except StoreError:  # broken, or of another version: it may go
        return
    if running:
        raise StoreError(
            f"--overwrite: block {min(running)} of {path} is being rendered ({len(running)} in all); stop that first"
        )


def _empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _whole(path: str) -> str:
    """A path or URL in the one form that stands for the place."""
    path = path.removeprefix("file://").removeprefix("local://")
    return path.rstrip("/") if is_url(path) else str(Path(path).resolve())


def require_apart(out: str, paths: Iterable[str]) -> None:
    """Raise ConfigError where a store would be written over one that it is made from."""
    for path in paths:
        if _whole(out) == _whole(path):
            raise ConfigError(f"--out {out} is the store that is read; choose another --out")


def open_store(path: str | Path, *, allow_incomplete: bool = False) -> Store:
    """Open a store for reading.

    Raises StoreError where there is none or its schema is unknown, StoreIncomplete unless every block is
    in the ledger (or `allow_incomplete`), StoreCorrupt where its metadata or its ledger is not as it was written.
    """
    store: Store = class_at(path)(path)
    missing = store.missing()
    if allow_incomplete:
        return store
    if missing:
        raise StoreIncomplete(
            f"store {path} is incomplete: {len(missing)} of {len(store.blocks)} blocks are missing; "
            "run the same `psfgen render` again to finish it"
        )
    for block in store.blocks:
        if store.ledger.read(block).get("plan_sha256") != store.attrs["plan_sha256"]:
            raise StoreCorrupt(f"{path}: block {block} belongs to another plan; `psfgen repair {path}` drops it")
    return store
