"""Whether a store holds what it says: schema, coordinates, ledger, checksums, values, provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from psfgen.errors import StoreCorrupt, StoreError
from psfgen.store import schema
from psfgen.store.open import Store

SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Problem:
    """One fault: what it is, and the block that is to be rendered again for it, if one is."""

    text: str
    block: str | None = None

    def __str__(self) -> str:
        return self.text


def problems(store: Store, on_block: Callable[[], object] = lambda: None) -> Iterator[Problem]:
    """Every fault found; missing blocks are no fault. Reads the store block by block.

    `on_block()` is called after each committed block.
    """
    faults = [*_structure(store), *_provenance(store)]
    yield from map(Problem, faults)
    if faults:
        return
    done = store.ledger.done()
    for name in sorted(done - set(store.blocks)):
        yield Problem(f"ledger: block {name} is not one of this store's", name)
    for index, name in enumerate(store.blocks):
        if name in done:
            broken = list(_checksums(store, index))
            for text in broken or _values(store, index):
                yield Problem(text, name)
            on_block()


def _structure(store: Store) -> Iterator[str]:
    for name, values in store.coords.items():
        steps = np.diff(-values if name in (*schema.DESCENDING, "focus_dioptre", "depth_dioptre") else values)
        if values.ndim != 1 or np.isnan(values).any() or not (steps > 0).all():
            yield f"coordinate {name} is not strictly monotonic"
    for name in store.spec.arrays:
        try:
            shape = store.read(name, depth=slice(0, 0)).shape
        except StoreCorrupt as error:
            yield _fault(error)
            continue
        expected = list(store.spec.shape(name))
        expected[store.spec.dims(name).index("depth")] = 0
        if list(shape) != expected:
            yield f"{name} has shape {shape}, its coordinates say {tuple(expected)}"


def _fault(error: StoreError) -> str:
    """What is wrong, without the way out, which `psfgen verify` tells once for all."""
    return str(error).partition("; `psfgen ")[0]


def _provenance(store: Store) -> Iterator[str]:
    plan, lens = store.attrs.get("plan"), store.attrs.get("lens")
    if not isinstance(plan, dict) or schema.sha256_of(plan) != store.attrs.get("plan_sha256"):
        yield "plan_sha256 is not the hash of the stored plan"
    if not isinstance(lens, dict) or hashlib.sha256(lens["text"].encode()).hexdigest() != lens["sha256"]:
        yield "the lens's sha256 is not the hash of the stored prescription"


def _checksums(store: Store, index: int) -> Iterator[str]:
    name = store.blocks[index]
    try:
        entry = store.ledger.read(name)
    except StoreError as error:
        yield _fault(error)
        return
    if entry.get("plan_sha256") != store.attrs.get("plan_sha256"):
        yield f"block {name}: its ledger entry belongs to another plan"
    chunks = entry.get("chunks", {})
    for relative in store.chunk_files(index):
        try:
            found = store.chunk_crc32c(relative)
        except StoreError as error:
            yield f"block {name}: {error}"
            continue
        if chunks.get(relative) != found:
            yield f"block {name}: chunk {relative} has CRC32C {found}, the ledger says {chunks.get(relative)}"


def _values(store: Store, index: int) -> Iterator[str]:
    """NaN exactly where no ray arrives; kernels non-negative and summing to 1; shares within [0, 1]."""
    name = store.blocks[index]
    here: dict[str, int | slice] = {**store.spec.block_at(index)}
    try:
        throughput = store.read("throughput", **here)
        captured = store.read("captured", **here)
        dark = (throughput[None] == 0) | (captured == 0)
        for what, values in (("throughput", throughput), ("captured", captured)):
            if not ((values >= 0) & (values <= 1 + 1e-6)).all():
                yield f"block {name}: {what} leaves [0, 1]"
        for what in sorted({"noise", "noise_binned", "model"}.intersection(store.spec.arrays)):
            values = store.read(what, **here)
            if not np.array_equal(np.isnan(values), dark):
                yield f"block {name}: {what} is not NaN exactly where throughput or captured is 0"
            if what == "model" and ((values < 0) | (values > 1)).any():
                yield f"block {name}: {what} leaves [0, 1]"
        for what in ("chief_x_mm", "chief_y_mm"):
            if not np.isfinite(store.read(what, **here)).all():
                yield f"block {name}: {what} is not finite"
        for what in ("psf", "psf_binned"):
            for focus in range(len(store.coords["focus"])):
                kernels = store.read(what, **{**here, "focus": focus})
                yield from _kernels(f"block {name}: {what}", kernels, dark[focus])
    except StoreError as error:
        yield _fault(error)


def _kernels(label: str, kernels: np.ndarray, dark: np.ndarray) -> Iterator[str]:
    missing = np.isnan(kernels)
    if not np.array_equal(missing.all(axis=(-2, -1)), dark) or not np.array_equal(missing.any(axis=(-2, -1)), dark):
        yield f"{label} is not NaN exactly where throughput or captured is 0"
    lit = kernels[~dark]
    if (lit < 0).any():
        yield f"{label} has negative values"
    if lit.size and np.abs(lit.sum(axis=(-2, -1), dtype=np.float64) - 1).max() > SUM_TOLERANCE:
        yield f"{label} has kernels that do not sum to 1"
