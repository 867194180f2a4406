"""Mending: `repair` restores metadata, drops broken blocks, sweeps up, and touches nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Psfgen, arrays, beside, contents, copy_of, fork, poll, tiny, wait_for

from psfgen.block import Block
from psfgen.errors import ConfigError, StoreCorrupt, StoreError
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.repair import Repair, repair
from psfgen.store.verify import problems

SEAL = "ledger/sealed/metadata.json"


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(bytes(data))


def a_chunk(store: Path) -> str:
    """A file of block 1, relative to where the ledger lies."""
    return "parts/depth-0001.h5" if store.suffix == ".h5" else "psf/c/0/1/0/0/0/0/0"


def metadata(store: Path) -> Path:
    """The file without which nothing can be read."""
    return store if store.suffix == ".h5" else store / "zarr.json"


def test_a_sound_store_is_left_alone(broken: Path) -> None:
    before = contents(broken)
    assert repair(broken) == Repair([], {}, [])
    assert contents(broken) == before


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped chunk": lambda store: flip(beside(store) / a_chunk(store)),
    "a missing chunk": lambda store: (beside(store) / a_chunk(store)).unlink(),
    "a flipped entry": lambda store: flip(beside(store) / "ledger/depth-0001.json"),
    "an empty entry": lambda store: (beside(store) / "ledger/depth-0001.json").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_block_is_dropped_and_only_that(either: Path, broken: Path, damage: str) -> None:
    """The next render makes it again, and the store is as it was."""
    DAMAGES[damage](broken)
    done = repair(broken)
    assert (done.restored, list(done.dropped), done.swept) == ([], ["depth-0001"], [])
    store = open_store(broken, allow_incomplete=True)
    assert store.missing() == [1]
    assert list(problems(store)) == []
    assert not [name for name in store.chunk_files(1) if (beside(broken) / name).exists()]
    counted: list[int] = []
    render(tiny(broken), on_kernels=counted.append)
    assert sum(counted) == 36
    assert arrays(broken) == arrays(either)


@pytest.mark.parametrize("gone", [True, False])
def test_metadata_are_restored_from_their_seal(either: Path, broken: Path, gone: bool) -> None:
    file = metadata(broken)
    if gone:
        file.unlink()
    else:
        flip(file, 0.3)
    if not (gone and file.suffix == ".h5"):  # a missing master is written by whoever opens the store
        with pytest.raises(StoreError):
            open_store(broken)
    assert repair(broken).restored == [file.name]
    assert contents(broken) == contents(either)


def test_every_metadata_file_of_a_zarr_store_is_restored(finished: Path, store: Path) -> None:
    files = [path for path in store.rglob("*") if path.name == "zarr.json" or "/depth/c/" in str(path)]
    for file in files:
        file.write_bytes(b"")
    assert sorted(repair(store).restored) == sorted(str(file.relative_to(store)) for file in files)
    assert contents(store) == contents(finished)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"files": {}}', None])
def test_a_broken_seal_is_made_anew(either: Path, broken: Path, data: bytes | None) -> None:
    """From the metadata, which must be what their own content is laid out as."""
    seal = beside(broken) / SEAL
    if data is None:
        flip(seal)
    else:
        seal.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="psfgen repair"):
        open_store(broken)
    assert repair(broken).restored == ["the seal of the metadata"]
    assert contents(broken) == contents(either)


def test_a_seal_cannot_be_made_for_metadata_that_are_broken_too(broken: Path) -> None:
    """Else wrong numbers would be sealed as right; nothing is changed."""
    flip(beside(broken) / SEAL)
    flip(metadata(broken), 0.3)
    before = contents(broken)
    with pytest.raises(StoreError) as told:
        repair(broken)
    assert re.search(r"--overwrite|psfgen", str(told.value)), told.value
    assert contents(broken) == before


ID = "0123456789abcdef" * 2  # as uuid4 gives them


def test_leftovers_of_killed_writers_are_swept(either: Path, broken: Path, psfgen: Psfgen) -> None:
    """In the store and beside it; what belongs to others stays."""
    inside, around = beside(broken), broken.parent
    (inside / f"{a_chunk(broken)}.{ID}.partial").touch()
    (inside / f"ledger/.depth-0001.json.{ID}.tmp").touch()
    (around / f".{inside.name}.{ID}.tmp").mkdir()
    (around / f".{inside.name}.{ID}.tmp/zarr.json").touch()
    (around / f".{inside.name}.{ID}.old").mkdir()
    (around / f".other.zarr.{ID}.tmp").mkdir()
    (around / "mine.tmp").touch()
    (inside / "ledger/running").mkdir(exist_ok=True)
    note = {"block": "depth-0001", "pid": 2**22 + 1, "host": os.uname().nodename, "time": 0.0}
    (inside / "ledger/running/depth-0001.json").write_text(json.dumps(note))
    ran = psfgen("repair", broken, "--json")
    assert ran.code == 0
    assert len(ran.document["swept"]) == 4
    assert (ran.document["complete"], ran.document["dropped"]) == (True, {})
    names = {path.name for path in around.iterdir()} - {"job.yaml"}
    assert names == {broken.name, inside.name, f".other.zarr.{ID}.tmp", "mine.tmp"}
    assert contents(broken) == contents(either)


def test_a_note_that_cannot_be_read_is_stale(broken: Path) -> None:
    (beside(broken) / "ledger/running").mkdir(exist_ok=True)
    (beside(broken) / "ledger/running/depth-0001.json").write_text("{")
    assert repair(broken) == Repair([], {}, [])
    assert not list((beside(broken) / "ledger/running").iterdir())


def test_a_store_that_is_being_rendered_is_not_repaired(
    either: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until that render ends, or is killed."""
    path, true = tmp_path / either.name, Block.render

    def slow(block: Block, *args: Any) -> dict[str, Any]:
        poll(lambda: block.index != 1 or (tmp_path / "go").exists())
        return true(block, *args)

    monkeypatch.setattr(Block, "render", slow)
    pid = fork(lambda: render(tiny(path)))
    poll((beside(path) / "ledger/running/depth-0001.json").exists)
    before = contents(path)
    with pytest.raises(StoreError, match=r"block depth-0001 is being rendered \(1 in all\); wait for that render"):
        repair(path)
    assert contents(path) == before
    os.kill(pid, signal.SIGKILL)
    poll(lambda: not open_store(path, allow_incomplete=True).ledger.running())  # though nobody has waited for it
    assert repair(path).dropped == {}
    wait_for(pid)
    monkeypatch.undo()
    render(tiny(path))
    assert arrays(path) == arrays(either)


def test_a_sound_block_is_dropped_if_asked(either: Path, broken: Path, psfgen: Psfgen) -> None:
    ran = psfgen("repair", broken, "--drop", "depth-0000", "--drop", "depth-0002")
    assert ran.code == 0
    assert "dropped block depth-0000, as asked" in ran.out
    assert "2 of 3 blocks are missing, run the same `psfgen render` again" in ran.out
    render(tiny(broken))
    assert arrays(broken) == arrays(either)


def test_a_block_that_the_store_does_not_have_cannot_be_dropped(broken: Path) -> None:
    before = contents(broken)
    with pytest.raises(ConfigError, match=r"--drop depth-0007: .* has no such block; did you mean 'depth-000"):
        repair(broken, ["depth-0007"])
    assert contents(broken) == before


def test_an_entry_of_a_foreign_block_is_dropped(either: Path, broken: Path) -> None:
    shutil.copy(beside(broken) / "ledger/depth-0001.json", beside(broken) / "ledger/depth-0009.json")
    assert list(repair(broken).dropped) == ["depth-0009"]
    assert contents(broken) == contents(either)


def test_no_store_cannot_be_repaired(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        repair(tmp_path / "nothing.zarr")


def test_a_kill_between_entry_and_chunks_leaves_a_missing_block(either: Path, tmp_path: Path) -> None:
    """Of the two, the entry goes first."""
    path = copy_of(either, tmp_path)

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.remove" and str(args[0]).endswith(open_store(either).chunk_files(1)[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        repair(path, ["depth-0001"])

    assert wait_for(fork(work)) == -signal.SIGKILL
    store = open_store(path, allow_incomplete=True)
    assert store.missing() == [1]
    assert list(problems(store)) == []
    render(tiny(path))
    assert arrays(path) == arrays(either)
