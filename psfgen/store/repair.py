"""Mending a store: metadata restored from its seal, broken blocks dropped so that a render makes them again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psfgen.errors import ConfigError, StoreCorrupt, StoreError, nearest
from psfgen.store.open import Store, class_at
from psfgen.store.place import UNFINISHED, is_url
from psfgen.store.verify import problems


@dataclass(frozen=True)
class Repair:
    """What was done: metadata files written anew, block -> why it was dropped, leftovers of killed writers removed."""

    restored: list[str]
    dropped: dict[str, str]
    swept: list[str]


def repair(
    path: str | Path,
    drop: Sequence[str] = (),
    on_open: Callable[[Store], Callable[[], object]] = lambda store: lambda: None,
) -> Repair:
    """Mend the store at `path`, and drop the blocks `drop`; `on_open(store)` gives what is called after each block.

    Raises ConfigError for a block that the store does not have, StoreError where there is no store or blocks of it
    are being rendered, StoreCorrupt where the metadata and their seal are both damaged.
    """
    kind = class_at(path)
    restored = []
    try:
        restored = kind.sealed(path).restore()
    except StoreCorrupt:
        kind.reseal(path)
        restored = ["the seal of the metadata"]
    store: Store = kind(path)
    _require_quiet(store)
    dropped = {block: f"block {block}, as asked" for block in (_named(store, word) for word in drop)}
    for problem in problems(store, on_block=on_open(store)):
        if problem.block is None:
            raise StoreCorrupt(f"{problem}; that cannot be mended, render anew with --overwrite")
        dropped.setdefault(problem.block, problem.text)
    _require_quiet(store)  # that took its time
    for block in dropped:
        _drop(store, block)
    return Repair(restored, dropped, _sweep(store))


def _require_quiet(store: Store) -> None:
    if running := store.ledger.running():
        raise StoreError(
            f"{store.path}: block {min(running)} is being rendered ({len(running)} in all); "
            "wait for that render, or stop it"
        )


def _named(store: Store, word: str) -> str:
    """The block that a name or a number means."""
    if word.isdigit() and int(word) < len(store.blocks):
        return store.blocks[int(word)]
    if word not in store.blocks:
        known = f"they are {store.blocks[0]} to {store.blocks[-1]}, or 0 to {len(store.blocks) - 1}"
        raise ConfigError(f"--drop {word}: {store.path} has no such block{nearest(word, store.blocks)}; {known}")
    return word


def _drop(store: Store, block: str) -> None:
    store.ledger.drop(block)  # first, so that a kill in between leaves no entry without chunks
    if block in store.blocks:
        for relative in store.chunk_files(store.blocks.index(block)):
            store.folder.remove(relative)


def _sweep(store: Store) -> list[str]:
    """Remove what killed writers left, in the store and beside it."""
    for block in store.ledger.stale():
        store.ledger.stop(block)
    swept = store.folder.unfinished()
    for name in swept:
        store.folder.remove(name)
    if not is_url(store.path):
        path = Path(store.path)
        ours = re.compile(rf"\.{re.escape(path.name)}(\.d)?\.[0-9a-f]{{32}}({'|'.join(map(re.escape, UNFINISHED))})")
        beside = [left for left in path.absolute().parent.iterdir() if ours.fullmatch(left.name)]
        for left in beside:
            store.folder.remove(str(left.absolute()))
        swept += [left.name for left in beside]
    return swept
