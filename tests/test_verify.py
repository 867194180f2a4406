"""Verifying: every fault is found and named, and only faults."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Psfgen, tiny

from psfgen.render import render
from psfgen.store import Store, open_store
from psfgen.store.verify import problems

PSF = "psf/c/1/2/0/0/0/0/0"
SMALL = "captured/c/0/1/0/0/0"


def found(store: Path) -> list[str]:
    return list(problems(open_store(store, allow_incomplete=True)))


def edit(relative: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(store: Path) -> None:
        document = json.loads((store / relative).read_text())
        change(document)
        (store / relative).write_text(json.dumps(document))

    return apply


def flip(relative: str) -> Callable[[Path], None]:
    def apply(store: Path) -> None:
        data = bytearray((store / relative).read_bytes())
        data[len(data) // 2] ^= 1
        (store / relative).write_bytes(bytes(data))

    return apply


def rewrite(name: str, change: Callable[[np.ndarray], None], *, sign: bool = True) -> Callable[[Path], None]:
    """Change values of block 1 through the store itself; with `sign` the ledger's checksums follow."""

    def apply(path: Path) -> None:
        store: Store = open_store(path)
        values = store.read(name, depth=slice(1, 2))
        change(values)
        store.write(name, values, depth=slice(1, 2))
        if sign:
            store.commit(1, {})

    return apply


def put(index: Any, value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[index] = value

    return change


def swap_chunks(store: Path) -> None:
    """Two sound chunks in each other's place."""
    one, other = store / PSF, store / PSF.replace("psf/c/1", "psf/c/0")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_a_sound_store_has_no_problems(opened: Store) -> None:
    checked: list[None] = []
    assert list(problems(opened, on_block=lambda: checked.append(None))) == []
    assert len(checked) == 3


def test_dark_kernels_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "dark.zarr"
    render(tiny(path, lens="singlet", field_max=1.3, depth="2m", pitch_um=120))
    assert found(path) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip(PSF), rf"depth-0002.*{PSF}.*CRC32C"),
        (flip(SMALL), rf"depth-0001.*{SMALL}.*CRC32C"),
        (lambda store: (store / PSF).unlink(), rf"depth-0002.*{PSF} is missing"),
        (lambda store: (store / SMALL).unlink(), rf"depth-0001.*{SMALL} is missing"),
        (swap_chunks, rf"depth-0002.*{PSF}.*CRC32C"),
        (rewrite("psf", put((0, 0, 1, 1, 0, 5, 5), 0.1), sign=False), r"depth-0001.*chunk psf/.*CRC32C"),
        (rewrite("psf", put((0, 0, 1, 1, 0, 5, 5), 0.9)), r"depth-0001: psf has kernels that do not sum to 1"),
        (rewrite("psf", put((0, 0, 1, 1, 0, 5, 5), -0.1)), r"depth-0001: psf has negative values"),
        (rewrite("psf", put((0, 0, 1, 1, 0, 5, 5), np.nan)), r"depth-0001: psf is not NaN exactly where"),
        (rewrite("psf_binned", put((1, 0, 2, 2, 1), np.nan)), r"depth-0001: psf_binned is not NaN exactly where"),
        (rewrite("noise", put((1, 0, 2, 2, 1), np.nan)), r"depth-0001: noise is not NaN exactly where"),
        (rewrite("captured", put((1, 0, 2, 2, 1), 0)), r"depth-0001: .* is not NaN exactly where"),
        (rewrite("captured", put((1, 0, 2, 2, 1), 1.2)), r"depth-0001: captured leaves \[0, 1\]"),
        (rewrite("throughput", put((0, 2, 2, 1), np.nan)), r"depth-0001: throughput leaves \[0, 1\]"),
        (rewrite("chief_y_mm", put((0, 0, 1, 1), np.inf)), r"depth-0001: chief_y_mm is not finite"),
        (edit("zarr.json", lambda d: d["attributes"]["plan"].update(seed=5)), "plan_sha256 is not the hash"),
        (edit("zarr.json", lambda d: d["attributes"]["lens"].update(text="{}")), "lens's sha256 is not the hash"),
        (
            edit("ledger/depth-0000.json", lambda d: d.update(plan_sha256="0")),
            "depth-0000: its ledger entry belongs to",
        ),
        (edit("ledger/depth-0000.json", lambda d: d["chunks"].clear()), "depth-0000: chunk .* the ledger says None"),
        (lambda store: (store / "ledger/depth-0000.json").write_text("{"), "depth-0000.json cannot be read"),
        (lambda store: (store / "ledger/depth-0009.json").write_text("{}"), "block depth-0009 is not one of this"),
        (edit("noise/zarr.json", lambda d: d.update(shape=[2, 3, 3, 4, 2])), r"noise has shape|noise is corrupt"),
    ],
)
def test_every_fault_is_found_and_named(
    store: Path, psfgen: Psfgen, damage: Callable[[Path], object], message: str
) -> None:
    """By the function, and by the command, which exits 1."""
    damage(store)
    faults = found(store)
    assert any(re.search(message, fault) for fault in faults), faults
    ran = psfgen("verify", store)
    assert ran.code == 1
    assert all(fault in ran.out for fault in faults)


def test_missing_blocks_are_no_fault(store: Path) -> None:
    (store / "ledger/depth-0001.json").unlink()
    assert found(store) == []


def test_faults_are_found_in_an_incomplete_store_too(store: Path, psfgen: Psfgen) -> None:
    (store / "ledger/depth-0001.json").unlink()
    flip(PSF)(store)
    ran = psfgen("verify", store, "--json")
    assert ran.code == 1
    assert (ran.document["ok"], ran.document["complete"]) == (False, False)
    assert PSF in ran.document["problems"][0]
