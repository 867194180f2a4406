"""Checkpoints: whole or not there, plain data, in the order of their steps."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from training import equal_states

from psfgen.errors import FitError, RunMismatch
from psftrain import checkpoint

STATE: dict[str, Any] = {
    "model": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(2)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "ema": None,
    "step": 7,
    "config": {"store": ["a", "b"], "clip": None},
    "fingerprint": {"wavelength": [0.5]},
    "ended": False,
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path / "run", 7)
    checkpoint.save(path, STATE)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000007.pt"
    assert equal_states(checkpoint.load(path), STATE)
    assert equal_states(torch.load(path, weights_only=True), STATE)
    assert list(contents(tmp_path)) == ["run/checkpoints/step-00000007.pt"], "and nothing beside it"


def test_saving_again_replaces(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.save(path, STATE)
    checkpoint.save(path, {**STATE, "step": 8})
    assert checkpoint.load(path)["step"] == 8


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The temporary file is a device on which every write fails."""
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")
    with pytest.raises(FitError, match="cannot be written: No space left on device") as raised:
        checkpoint.save(path, {**STATE, "model": {"large": torch.zeros(10**6)}})
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FitError, match="cannot be written"):
        checkpoint.save(checkpoint.path_of(tmp_path, 1), STATE)


# --- what is no checkpoint --------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def code(path: Path) -> None:
    """A pickle that would leave a trace if it ran."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.with_name("ran")),)

    path.write_bytes(pickle.dumps({**STATE, "model": Trap()}))


def torch_code(path: Path) -> None:
    """The same in the format of torch.save."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.with_name("ran")),)

    torch.save({**STATE, "model": Trap()}, path)


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint\n" * 9),
    "a pickle with code": code,
    "a checkpoint with code": torch_code,
    "numpy": lambda path: path.write_bytes(pickle.dumps(np.arange(3))),
    "another program's": lambda path: torch.save({"model": {}}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.save(path, STATE)
    BROKEN[how](path)
    with pytest.raises(RunMismatch, match=path.name) as raised:
        checkpoint.load(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(path))
    assert not path.with_name("ran").exists(), "its code ran"


@pytest.mark.parametrize("trap", [code, torch_code])
def test_the_traps_would_have_worked(tmp_path: Path, trap: Callable[[Path], None]) -> None:
    trap(tmp_path / "trap.pt")
    with open(tmp_path / "trap.pt", "rb") as file:
        if trap is code:
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert (tmp_path / "ran").is_dir()


def damaged(path: Path, data: bytes) -> dict[str, Any] | None:
    """What is loaded of a checkpoint that holds `data` now; None where it is refused."""
    path.write_bytes(data)
    try:
        return checkpoint.load(path)
    except RunMismatch:
        return None


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    for length in {
        0,
        1,
        2,
        4,
        21,
        22,
        len(whole) // 2,
        *range(len(whole) - 120, len(whole)),
        *range(5, len(whole), 61),
    }:
        assert damaged(path, whole[:length]) is None, length
    assert equal_states(damaged(path, whole), STATE)


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """In a weight it is always found; some bytes of the archive, such as dates and padding, mean nothing."""
    path, weights = checkpoint.path_of(tmp_path, 7), torch.arange(1, 301.0)
    state = {**STATE, "model": {"weight": weights}}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    first = whole.index(weights.numpy().tobytes())
    for place in {*range(0, len(whole), 13), *range(first, first + 1200, 31), first, first + 1199}:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        found = damaged(path, bytes(data))
        assert found is None or equal_states(found, state), place
        assert found is None or not first <= place < first + 1200


# --- which there are --------------------------------------------------------------------------------------------------


def test_steps_ascend_whatever_lies_beside_them(tmp_path: Path) -> None:
    for step in (200, 5, 10000000):
        checkpoint.save(checkpoint.path_of(tmp_path, step), STATE)
    for name in ("best.pt", ".step-00000300.pt.tmp", "step-12.pt", "step-00000400.pt.bak", "notes.txt"):
        (tmp_path / "checkpoints" / name).write_text("")
    assert checkpoint.steps(tmp_path) == [5, 200, 10000000]
    assert checkpoint.steps(tmp_path / "nothing") == []


def test_prune_takes_what_a_killed_process_had_begun_to_write(tmp_path: Path) -> None:
    checkpoint.save(checkpoint.path_of(tmp_path, 10), STATE)
    for name in (".step-00000010.pt.tmp", ".best.pt.tmp"):
        (tmp_path / "checkpoints" / name).write_text("PK")
    checkpoint.prune(tmp_path, 3)
    assert list(contents(tmp_path)) == ["checkpoints/step-00000010.pt"]


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_prune_keeps_the_last(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (20, 10, 30):
        checkpoint.save(checkpoint.path_of(tmp_path, step), STATE)
    checkpoint.save(tmp_path / "checkpoints" / "best.pt", STATE)
    checkpoint.prune(tmp_path, keep)
    assert checkpoint.steps(tmp_path) == left
    assert (tmp_path / "checkpoints" / "best.pt").exists()
