"""This machine: in this process, or in several, each rendering whole blocks."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from psfgen.block import render_block
from psfgen.errors import STOP_SIGNALS, ConfigError, PsfError, RenderError
from psfgen.plan import Plan
from psfgen.specimens import Specimens
from psfgen.store import Store, open_store


def run(
    specimens: Specimens,
    store: Store,
    blocks: Sequence[int],
    *,
    workers: int | None,
    device: str,
    on_kernels: Callable[[int], None],
    stopped: Sequence[str] = (),
) -> None:
    """Render `blocks` into `store`: in this process where its threads suffice, else in a process a core.

    Once `stopped` holds something, no further block is begun. Raises what a block raised, and RenderError where a
    worker dies; the blocks in hand are finished first, the others wait for the next time.
    """
    if not blocks:
        return
    cores = available_cores()
    alone = device.startswith("cuda") or specimens.engine(0).threads_suffice
    count = min(workers or (1 if alone else cores), len(blocks))
    todo = unclaimed(store, blocks, stopped)
    if count == 1:
        for index in todo:
            render_block(specimens, store, index, cores=cores, on_kernels=on_kernels)
        return
    job = Job(specimens.plan, store.path, device, max(1, cores // count), count)
    pool = Pool(job, count)
    try:
        pool.work_off(todo, on_kernels)
    finally:
        pool.end()


def available_cores() -> int:
    """The cores this process may use; a Slurm task keeps to what it was given, bound to them or not."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(given)) if given.isdigit() and int(given) else cores


def unclaimed(store: Store, blocks: Sequence[int], stopped: Sequence[str] = ()) -> Iterator[int]:
    """The blocks that are still missing when their turn comes, those that others work on last.

    These may be rendered twice at once, which costs time and changes nothing: both write the same bytes.
    """
    claimed = []
    for index in blocks:
        if stopped:
            return
        name = store.blocks[index]
        if store.ledger.is_done(name):
            continue
        if store.ledger.is_running(name):
            claimed.append(index)
        else:
            yield index
    for index in claimed:
        if stopped:
            return
        if not store.ledger.is_done(store.blocks[index]):
            yield index


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: what to render, where, and its part of the machine."""

    plan: Plan
    path: str
    device: str
    cores: int
    share: int


class Pool:
    """Processes that each render one block at a time, with a pipe of their own, so that none can block the others.

    A worker sends the number of kernels it has made, "ready" when it wants a block, or the error it ended with.
    """

    def __init__(self, job: Job, count: int) -> None:
        context = mp.get_context("spawn")
        self.workers: dict[Connection, BaseProcess] = {}
        # A worker starts with these signals held back: they also reach the parent, who lets the block be finished.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGINT))
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(job, theirs), daemon=True)
                worker.start()
                theirs.close()
                self.workers[ours] = worker
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def work_off(self, todo: Iterator[int], on_kernels: Callable[[int], None]) -> None:
        """Hand out the blocks; returns when all are done, raises the first error when the others are done."""
        error: Exception | None = None
        while self.workers:
            for pipe in wait(list(self.workers)):
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except (EOFError, ConnectionError):
                    said = RenderError(
                        "a worker was killed (out of memory?); finished blocks are kept, run the same command again, "
                        "perhaps with fewer --workers"
                    )
                if isinstance(said, int):
                    on_kernels(said)
                    continue
                error = error or (said if isinstance(said, Exception) else None)
                index = next(todo, None) if error is None else None
                if index is not None:
                    with suppress(ConnectionError):  # it has died just now: its pipe ends, which is told next
                        pipe.send(index)
                else:
                    pipe.close()
                    self.workers.pop(pipe).join()
        if error is not None:
            raise error

    def end(self) -> None:
        """Kill what still runs: after an interrupt."""
        for worker in self.workers.values():
            worker.kill()


def _work(job: Job, pipe: Connection) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        from psfgen.render import load

        lens, plan = load(job.plan.config, job.device)
        if plan.sha256 != job.plan.sha256:
            raise ConfigError(f"lens {plan.config.lens} changed while it was rendered")
        specimens, store = Specimens(lens, plan), open_store(job.path, allow_incomplete=True)
        while True:
            pipe.send("ready")
            render_block(specimens, store, pipe.recv(), cores=job.cores, share=job.share, on_kernels=pipe.send)
    except EOFError:  # no block is left
        return
    except PsfError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RenderError(f"a worker failed: {type(error).__name__}: {error}"))


def _die_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
