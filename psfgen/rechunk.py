"""The same store in other chunks: for readers that want a few points, or a whole axis, at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from psfgen.copying import carried, check_chunks, fill
from psfgen.errors import ConfigError, PlanMismatch, nearest
from psfgen.store import Store, open_store, schema
from psfgen.store.open import open_or_create, require_apart

CHUNKED = ("focus", "field_y", "field_x", "wavelength")


def rechunk(
    path: str,
    out: str,
    chunks: str,
    *,
    format: str | None = None,
    overwrite: bool = False,
    on_start: Callable[[int], object] = lambda blocks: None,
    on_block: Callable[[], object] = lambda: None,
) -> Store:
    """Write the store at `path` into `out` with the chunk sizes "DIM=N,..." of `psf` and `psf_binned`.

    Run again, it finishes what is missing. `on_start(blocks_to_do)` is called once, `on_block()` after each block.

    Raises ConfigError for chunks that cannot be, PlanMismatch where `out` is another store, StoreIncomplete and
    StoreCorrupt for what is wrong with the source.
    """
    source = open_store(path)
    require_apart(out, [path])
    spec = schema.StoreSpec(source.coords, {**source.attrs, "chunks": parse_chunks(chunks, source)})
    check_chunks(spec)

    def check(stored: dict[str, Any]) -> None:
        for key in ("plan_sha256", "chunks"):
            if stored.get(key) != spec.attrs[key]:
                raise PlanMismatch(
                    f"{out} exists, but its {key} is {stored.get(key)}, this rechunk asks for {spec.attrs[key]}; "
                    "choose another --out, or --overwrite to start anew"
                )

    target = open_or_create(out, format, lambda: spec, check, overwrite=overwrite)
    on_start(len(target.missing()))
    fill(target, Same(source), on_block)
    return target


def parse_chunks(text: str, store: Store) -> dict[str, int]:
    """The chunk sizes that "DIM=N,..." names, none larger than its axis. Raises ConfigError for anything else."""
    chunks: dict[str, int] = {}
    for word in text.split(","):
        dim, equals, size = (part.strip() for part in word.partition("="))
        if dim in store.spec.block_dims or dim == "copy":
            raise ConfigError(f"--chunks {word}: {dim} keeps chunks of 1, for a block owns whole chunk files")
        if equals and dim not in CHUNKED:
            raise ConfigError(
                f"--chunks {word}: unknown dim '{dim}'{nearest(dim, CHUNKED)}; known: {', '.join(CHUNKED)}"
            )
        if not (equals and size.isdigit() and int(size)) or dim in chunks:
            raise ConfigError(f"--chunks {text}: write DIM=N[,DIM=N...], each dim once, such as field_y=4,field_x=4")
        chunks[dim] = min(int(size), len(store.coords[dim]))
    return dict(sorted(chunks.items()))


class Same:
    """A store as the source of a copy."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, name: str, **index: slice) -> NDArray[Any]:
        return self.store.read(name, **index)

    def chunks(self, name: str) -> tuple[int, ...]:
        return self.store.spec.chunks(name)

    def entry(self, block: int) -> dict[str, Any]:
        return carried(self.store.ledger.read(self.store.blocks[block]))
