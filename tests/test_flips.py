"""Flipped bits: whatever byte of a store changes, it is found, nobody trains on it, and it is mended."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from conftest import beside, contents, tiny

from psfgen.errors import PsfError, StoreError
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.repair import repair
from psfgen.store.verify import problems
from psftrain.conditioning import conditioning_of
from psftrain.data import Examples, open_stores, read_examples

SMALL = {"grid": 2, "depth": "1m,3m", "focus": "2m", "kernel_px": 8, "bins": 4, "pitch_um": 36.0, "spp": 64}


def examples(store: Path) -> Examples:
    """What psftrain would train on."""
    stores = open_stores([str(store)], "psf_binned")
    return read_examples(stores, conditioning_of(stores), "psf_binned")


def same(one: Examples, other: Examples) -> bool:
    """Whether two sets of examples are equal to the last bit."""
    return (
        torch.equal(one.kernels, other.kernels)
        and torch.equal(one.condition, other.condition)
        and torch.equal(one.noise, other.noise)
        and (one.index == other.index).all()
    )


def is_found(store: Path) -> bool:
    """Whether opening or verifying a store finds a fault."""
    try:
        return bool(list(problems(open_store(store, allow_incomplete=True))))
    except StoreError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("flips", [20, pytest.param(100, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", ["psfs.zarr", "psfs.h5"])
def test_every_flipped_byte_is_found_and_mended(tmp_path: Path, name: str, flips: int) -> None:
    """Random bytes of random files, coordinates, metadata, ledger, seal, master and parts alike."""
    path, draw = tmp_path / name, random.Random(f"{name} {flips}")
    render(tiny(path, **SMALL))
    sound, expected = contents(path), examples(path)
    files = {file: tmp_path / file if name == "psfs.h5" else path / file for file in sorted(sound)}
    kinds = {"ledger/sealed/metadata.json", "ledger/depth-0001.json"}
    assert kinds <= set(contents(beside(path)))
    hit = set()
    for _ in range(flips):
        file = draw.choice(list(files))
        at, delta = draw.randrange(len(sound[file])), draw.randrange(1, 256)
        what = f"{file}, byte {at} of {len(sound[file])}, ^ {delta:#x}"
        damaged = bytearray(sound[file])
        damaged[at] ^= delta
        files[file].write_bytes(damaged)
        hit.add(file)
        with contextlib.suppress(PsfError):
            assert same(examples(path), expected), f"trained on wrong values: {what}"
        assert is_found(path), f"not found: {what}"
        repair(path)
        render(tiny(path, **SMALL))
        mended = contents(path)
        assert not is_found(path), what
        assert mended.keys() == sound.keys(), what
        wrong = [key for key in sound if mended[key] != sound[key]]
        assert not [key for key in wrong if "ledger/depth" not in key], what  # its times are new
    assert len(hit) > min(flips, len(files)) / 2
