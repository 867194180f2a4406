"""Opening a store, whatever its format."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import ConfigError, StoreError, StoreIncomplete, nearest
from psfgen.store.ledger import Ledger
from psfgen.store.schema import StoreSpec

FORMATS = {"zarr": "psfgen.store.zarr_store:ZarrStore"}


class Store(Protocol):
    """What every format offers; see `psfgen.store.zarr_store.ZarrStore` for the meaning of each."""

    path: Path
    attrs: dict[str, Any]
    coords: dict[str, NDArray[np.float64]]
    spec: StoreSpec
    blocks: tuple[str, ...]
    ledger: Ledger

    def read(self, name: str, **index: int | slice) -> NDArray[Any]: ...
    def write(self, name: str, data: NDArray[Any], **index: slice) -> None: ...
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


def open_store(path: str | Path, *, allow_incomplete: bool = False) -> Store:
    """Open a store for reading.

    Raises StoreError where there is none or its schema is unknown, StoreIncomplete unless every block is
    in the ledger (or `allow_incomplete`), StoreCorrupt where its metadata cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"store {path} does not exist; `psfgen render --out {path}` makes one")
    kind = next((cls for cls in map(store_class, FORMATS) if cls.is_store(path)), None)
    if kind is None:
        raise StoreError(f"{path} is no psfgen store (formats: {', '.join(FORMATS)})")
    store: Store = kind(path)
    missing = store.missing()
    if missing and not allow_incomplete:
        raise StoreIncomplete(
            f"store {path} is incomplete: {len(missing)} of {len(store.blocks)} blocks are missing; "
            "run the same `psfgen render` again to finish it"
        )
    return store
