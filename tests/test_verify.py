"""Verifying: every fault is found and named, and only faults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Psfgen, beside, contents, copy_of, doctor, put, tiny

from psfgen.errors import StoreCorrupt
from psfgen.render import render
from psfgen.store import open_store, schema
from psfgen.store.open import class_at
from psfgen.store.schema import StoreSpec
from psfgen.store.verify import Problem, problems

PSF = "psf/c/1/2/0/0/0/0/0"
SMALL = "captured/c/0/1/0/0/0"
PART = "parts/depth-0001.h5"
Damage = Callable[[Path], object]


def found(store: Path) -> list[str]:
    return list(map(str, problems(open_store(store, allow_incomplete=True))))


def edit_entry(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the ledger entry of block 0, and sign it."""

    def apply(path: Path) -> None:
        ledger = open_store(path).ledger
        entry = ledger.read("depth-0000")
        change(entry)
        ledger.commit("depth-0000", entry)

    return apply


def write_entry(text: str, name: str = "depth-0000") -> Damage:
    """Put a text where a ledger entry stands."""
    return lambda store: (beside(store) / f"ledger/{name}.json").write_text(text)


def flip(relative: str) -> Damage:
    def apply(store: Path) -> None:
        data = bytearray((beside(store) / relative).read_bytes())
        data[len(data) // 2] ^= 1
        (beside(store) / relative).write_bytes(bytes(data))

    return apply


def unlink(relative: str) -> Damage:
    return lambda store: (beside(store) / relative).unlink()


def spoil(name: str, index: Any, value: float) -> Damage:
    """Change a value of block 1 through the store itself; the ledger's checksums follow."""
    return lambda store: doctor(store, 1, put(name, index, value))


def keep_entry(damage: Damage) -> Damage:
    """Damage after which the ledger says what it said before."""

    def apply(store: Path) -> None:
        entries = {path: path.read_bytes() for path in (beside(store) / "ledger").glob("*.json")}
        damage(store)
        for path, entry in entries.items():
            path.write_bytes(entry)

    return apply


def swap(one: str, other: str) -> Damage:
    """Two sound files in each other's place."""

    def apply(store: Path) -> None:
        first, second = beside(store) / one, beside(store) / other
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)

    return apply


def forge(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Make the store anew, empty, with other attributes and a seal that fits them."""

    def apply(path: Path) -> None:
        store = open_store(path)
        attrs = json.loads(json.dumps(schema.plain(store.attrs)))
        change(attrs)
        kind = class_at(path)
        kind.remove(path)
        kind.create(path, StoreSpec(store.coords, attrs))

    return apply


def test_a_sound_store_has_no_problems(either: Path) -> None:
    checked: list[None] = []
    assert list(problems(open_store(either), on_block=lambda: checked.append(None))) == []
    assert len(checked) == 3


def test_dark_kernels_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "dark.zarr"
    render(tiny(path, lens="singlet", field_max=1.3, depth="2m", pitch_um=120))
    assert found(path) == []


BOTH: list[tuple[Damage, str]] = [
    (spoil("psf", (0, 0, 1, 1, 0, 5, 5), 0.9), r"depth-0001: psf has kernels that do not sum to 1"),
    (spoil("psf", (0, 0, 1, 1, 0, 5, 5), -0.1), r"depth-0001: psf has negative values"),
    (spoil("psf", (0, 0, 1, 1, 0, 5, 5), np.nan), r"depth-0001: psf is not NaN exactly where"),
    (spoil("psf_binned", (1, 0, 2, 2, 1), np.nan), r"depth-0001: psf_binned is not NaN exactly where"),
    (spoil("noise", (1, 0, 2, 2, 1), np.nan), r"depth-0001: noise is not NaN exactly where"),
    (spoil("captured", (1, 0, 2, 2, 1), 0), r"depth-0001: .* is not NaN exactly where"),
    (spoil("captured", (1, 0, 2, 2, 1), 1.2), r"depth-0001: captured leaves \[0, 1\]"),
    (spoil("throughput", (0, 2, 2, 1), np.nan), r"depth-0001: throughput leaves \[0, 1\]"),
    (spoil("chief_y_mm", (0, 0, 1, 1), np.inf), r"depth-0001: chief_y_mm is not finite"),
    (forge(lambda attrs: attrs["plan"].update(seed=5)), "plan_sha256 is not the hash"),
    (forge(lambda attrs: attrs["lens"].update(text="{}")), "lens's sha256 is not the hash"),
    (edit_entry(lambda entry: entry.update(plan_sha256="0")), "depth-0000: its ledger entry belongs to"),
    (edit_entry(lambda entry: entry["chunks"].clear()), "depth-0000: chunk .* the ledger says None"),
    (write_entry("{"), "depth-0000.json cannot be read"),
    (write_entry("[]"), "depth-0000.json does not have the checksum"),
    (flip("ledger/depth-0000.json"), "depth-0000.json (does not have the checksum|cannot be read)"),
    (write_entry("{}", "depth-0009"), "block depth-0009 is not one of this"),
]
ZARR: list[tuple[Damage, str]] = [
    (flip(PSF), rf"depth-0002.*{PSF}.*CRC32C"),
    (flip(SMALL), rf"depth-0001.*{SMALL}.*CRC32C"),
    (unlink(PSF), rf"depth-0002.*{PSF} is missing"),
    (unlink(SMALL), rf"depth-0001.*{SMALL} is missing"),
    (swap(PSF, PSF.replace("psf/c/1", "psf/c/0")), rf"depth-0002.*{PSF}.*CRC32C"),
    (keep_entry(spoil("psf", (0, 0, 1, 1, 0, 5, 5), 0.1)), r"depth-0001.*chunk psf/.*CRC32C"),
]
HDF5: list[tuple[Damage, str]] = [
    (flip(PART), rf"depth-0001.*{PART}.*CRC32C"),
    (unlink(PART), rf"depth-0001.*{PART} is missing"),
    (swap(PART, "parts/depth-0002.h5"), rf"depth-0001.*{PART}.*CRC32C"),
    (keep_entry(spoil("psf", (0, 0, 1, 1, 0, 5, 5), 0.1)), rf"depth-0001.*{PART}.*CRC32C"),
]


def is_found_and_named(store: Path, psfgen: Psfgen, damage: Damage, message: str) -> None:
    damage(store)
    faults = found(store)
    assert any(re.search(message, fault) for fault in faults), faults
    ran = psfgen("verify", store)
    assert ran.code == 1
    assert all(fault in ran.out for fault in faults)
    assert f"to mend it: psfgen repair {store}" in ran.out


@pytest.mark.parametrize(("damage", "message"), BOTH)
def test_every_fault_is_found_and_named(broken: Path, psfgen: Psfgen, damage: Damage, message: str) -> None:
    """By the function, and by the command, which exits 1."""
    is_found_and_named(broken, psfgen, damage, message)


@pytest.mark.parametrize(("damage", "message"), ZARR)
def test_every_damaged_chunk_is_found_and_named(store: Path, psfgen: Psfgen, damage: Damage, message: str) -> None:
    is_found_and_named(store, psfgen, damage, message)


@pytest.mark.parametrize(("damage", "message"), HDF5)
def test_every_damaged_part_is_found_and_named(
    finished_h5: Path, tmp_path: Path, psfgen: Psfgen, damage: Damage, message: str
) -> None:
    is_found_and_named(copy_of(finished_h5, tmp_path), psfgen, damage, message)


def test_metadata_that_are_not_as_they_were_written_are_refused(broken: Path, psfgen: Psfgen) -> None:
    """Each metadata file, changed into something just as valid: by opening, by the command, in one line."""
    files = [broken] if broken.is_file() else sorted(broken.rglob("zarr.json"))
    assert len(files) in (1, 20)
    for file in files:
        sound = file.read_bytes()
        file.write_bytes(sound + (b"\n" if file.suffix == ".json" else b"\0"))
        with pytest.raises(
            StoreCorrupt, match=rf"{file.name} is not as it was written; `psfgen repair .*` restores it"
        ):
            open_store(broken, allow_incomplete=True)
        file.write_bytes(sound)
    file.write_bytes(sound[:-1])
    ran = psfgen("verify", broken)
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(r"error: [^\n]* is not as it was written; `psfgen repair [^\n]*` restores it\n", ran.err)


def test_a_problem_says_which_block_to_render_again(broken: Path) -> None:
    """And none where that would not help."""
    doctor(broken, 1, put("captured", (1, 0, 2, 2, 1), 1.2))
    assert list(problems(open_store(broken))) == [
        Problem("block depth-0001: captured leaves [0, 1]", "depth-0001"),
    ]
    forge(lambda attrs: attrs.update(plan_sha256=hashlib.sha256().hexdigest()))(broken)
    (problem,) = problems(open_store(broken, allow_incomplete=True))
    assert problem.block is None


def test_verifying_writes_nothing(broken: Path, psfgen: Psfgen) -> None:
    before = contents(broken)
    assert psfgen("verify", broken).code == 0
    assert contents(broken) == before


def test_missing_blocks_are_no_fault(broken: Path) -> None:
    unlink("ledger/depth-0001.json")(broken)
    assert found(broken) == []


def test_faults_are_found_in_an_incomplete_store_too(store: Path, psfgen: Psfgen) -> None:
    (store / "ledger/depth-0001.json").unlink()
    flip(PSF)(store)
    ran = psfgen("verify", store, "--json")
    assert ran.code == 1
    assert (ran.document["ok"], ran.document["complete"]) == (False, False)
    assert PSF in ran.document["problems"][0]
