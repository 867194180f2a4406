"""Signals: a render that is told to stop finishes the block in hand, keeps it, and goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import arrays, beside, flags, fork, poll, tiny, wait_for

from psfgen.block import Block
from psfgen.errors import Preempted, report, stop_signals
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.verify import problems

pytestmark = pytest.mark.usefixtures("forked_workers")
DEPTH = "1m:inf:6"
ENDINGS = ["psfs.zarr", "psfs.h5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The arrays of a store that nobody disturbed, by format."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ENDINGS:
        render(tiny(folder / name, depth=DEPTH))
    return {name: arrays(folder / name) for name in ENDINGS}


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(tmp_path, monkeypatch)


class Gate:
    """Renders wait within every block but the first, until they are let go."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        true = Block.render

        def gated(block: Block, *args: Any) -> dict[str, Any]:
            if block.index:
                (folder / f"at-{block.index}").touch()
                poll((folder / "go").exists)
            return true(block, *args)

        monkeypatch.setattr(Block, "render", gated)

    def waiting(self) -> set[int]:
        """Numbers of the blocks that have come to the gate."""
        return {int(path.name[3:]) for path in self.folder.glob("at-*")}

    def open(self) -> None:
        (self.folder / "go").touch()


def command(path: Path, **changes: Any) -> Callable[[], None]:
    """`psfgen render` as a process of its own runs it: the exit code is its own, stdout and stderr are files."""

    def work() -> None:
        from psfgen.cli import cli

        argv = ["render", *flags(**{"out": path, "depth": DEPTH, **changes}), "--json"]
        with (
            open(f"{path}.out", "w") as out,
            open(f"{path}.err", "w") as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = report(lambda: cli(argv, standalone_mode=False, prog_name="psfgen"), argv=argv)
        os._exit(code)

    return work


def told(path: Path) -> str:
    """The last line that a command wrote to stderr."""
    return Path(f"{path}.err").read_text().splitlines()[-1]


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_signal_keeps_the_blocks_in_hand(
    whole: dict[str, dict[str, bytes]], tmp_path: Path, gate: Gate, name: str, workers: int, number: signal.Signals
) -> None:
    """Exit 75; those are committed, no other is begun, and the same command ends with the same bytes."""
    path = tmp_path / name
    pid = fork(command(path, workers=workers))
    poll(lambda: len(gate.waiting()) == workers)
    os.kill(pid, number)
    gate.open()
    assert wait_for(pid) == 75
    done = {0, *range(1, 1 + workers)}
    assert gate.waiting() == done - {0}, "no block is begun after the signal"
    assert re.fullmatch(
        rf"stopped: {number.name}; {len(done)} of 6 blocks are done and kept, the same command goes on", told(path)
    )
    document = json.loads(Path(f"{path}.out").read_text())
    assert (document["ok"], document["exit_code"]) == (False, 75)
    store = open_store(path, allow_incomplete=True)
    assert set(store.missing()) == set(range(6)) - done
    assert store.ledger.running() == {}
    assert store.ledger.failed() == {}
    assert list(problems(store)) == []
    render(tiny(path, depth=DEPTH))
    assert arrays(path) == whole[name]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_signal_to_the_whole_group(
    whole: dict[str, dict[str, bytes]], tmp_path: Path, gate: Gate, workers: int
) -> None:
    """As a queue sends it: to the workers too, and more than once."""
    path = tmp_path / "psfs.zarr"
    run = command(path, workers=workers)

    def work() -> None:
        os.setpgid(0, 0)
        run()

    pid = fork(work)
    poll(lambda: len(gate.waiting()) == workers)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
        os.killpg(pid, number)
    gate.open()
    assert wait_for(pid) == 75
    store = open_store(path, allow_incomplete=True)
    assert len(store.missing()) == 5 - workers
    assert store.ledger.failed() == {}
    render(tiny(path, depth=DEPTH))
    assert arrays(path) == whole["psfs.zarr"]


def test_a_signal_in_the_last_block_is_no_preemption(tmp_path: Path, gate: Gate) -> None:
    """Nothing is left to do: exit 0."""
    path = tmp_path / "psfs.zarr"
    pid = fork(command(path, workers=1, depth="1m,2m"))
    poll(gate.waiting)
    os.kill(pid, signal.SIGTERM)
    gate.open()
    assert wait_for(pid) == 0
    assert open_store(path).missing() == []


def test_a_signal_before_the_first_block(tmp_path: Path) -> None:
    with pytest.raises(Preempted, match="SIGTERM; 0 of 3 blocks are done and kept"):
        render(tiny(tmp_path / "psfs.zarr"), stopped=["SIGTERM"], on_kernels=pytest.fail)
    assert open_store(tmp_path / "psfs.zarr", allow_incomplete=True).missing() == [0, 1, 2]


def test_signals_are_heard_by_name_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        poll(lambda: len(stopped) == 2)
    assert stopped == ["SIGTERM", "SIGUSR1"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_at_once(
    whole: dict[str, dict[str, bytes]], tmp_path: Path, gate: Gate, name: str, workers: int
) -> None:
    """Exit 1, one line; nobody claims a block any more, and what was finished is kept."""
    path = tmp_path / name
    pid = fork(command(path, workers=workers))
    poll(lambda: len(gate.waiting()) == workers)
    os.kill(pid, signal.SIGINT)
    assert wait_for(pid) == 1
    line = "error: interrupted; what is finished is kept, the same command goes on from there"
    assert told(path) == line, Path(f"{path}.err").read_text()
    store = open_store(path, allow_incomplete=True)
    assert store.missing() == [1, 2, 3, 4, 5]
    poll(lambda: store.ledger.running() == {})
    gate.open()
    render(tiny(path, depth=DEPTH))
    assert arrays(path) == whole[name]
    assert [left.name for left in beside(path).rglob("*.tmp")] == []


@pytest.mark.parametrize("name", ENDINGS)
def test_a_killed_worker_is_one_clear_error(
    whole: dict[str, dict[str, bytes]], tmp_path: Path, gate: Gate, name: str
) -> None:
    """The other worker finishes its block; the blocks of both before are kept."""
    path = tmp_path / name
    pid = fork(command(path, workers=2))
    poll(lambda: len(gate.waiting()) == 2)
    worker = open_store(path, allow_incomplete=True).ledger.running()["depth-0001"]["pid"]
    os.kill(worker, signal.SIGKILL)
    poll(lambda: not Path(f"/proc/{worker}").exists())  # its parent has noticed, and reaped it
    assert "depth-0001" not in open_store(path, allow_incomplete=True).ledger.running()
    gate.open()
    assert wait_for(pid) == 1
    assert re.fullmatch(r"error: a worker was killed \(out of memory\?\); .*run the same command again.*", told(path))
    store = open_store(path, allow_incomplete=True)
    assert store.missing() == [1, 3, 4, 5], "no block is begun after the death was noticed"
    render(tiny(path, depth=DEPTH))
    assert arrays(path) == whole[name]


def test_what_a_worker_raises_is_told_and_the_others_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, dict[str, bytes]]
) -> None:
    path, true = tmp_path / "psfs.zarr", Block.render

    def failing(block: Block, *args: Any) -> dict[str, Any]:
        if block.index == 1:
            raise ZeroDivisionError("the lens is round")
        return true(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "render", failing)
        assert wait_for(fork(command(path, workers=2))) == 1
    assert re.fullmatch(r"error: block depth-0001 of .* failed: ZeroDivisionError: the lens is round", told(path))
    store = open_store(path, allow_incomplete=True)
    assert store.ledger.failed() == {"depth-0001": "ZeroDivisionError: the lens is round"}
    assert 0 not in store.missing()
    render(tiny(path, depth=DEPTH))
    assert arrays(path) == whole["psfs.zarr"]


@contextlib.contextmanager
def both(*pids: int) -> Iterator[None]:
    yield
    assert [wait_for(pid) for pid in pids] == [0] * len(pids)


@pytest.mark.parametrize("name", ENDINGS)
def test_two_renders_at_once_share_the_blocks_and_then_help_each_other(
    whole: dict[str, dict[str, bytes]], tmp_path: Path, gate: Gate, name: str
) -> None:
    """Each takes what the other has not begun; what the other has in hand it renders last, and twice is no harm."""
    path = tmp_path / name
    first = fork(command(path, workers=1))
    poll(lambda: gate.waiting() == {1})
    second = fork(command(path, workers=2))
    poll(lambda: len(gate.waiting()) == 3)
    assert gate.waiting() == {1, 2, 3}
    with both(first, second):
        gate.open()
    store = open_store(path)
    assert list(problems(store)) == []
    assert store.ledger.running() == {}
    assert arrays(path) == whole[name]
