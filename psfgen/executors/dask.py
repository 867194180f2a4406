"""A dask cluster: one that runs already, on any machines that see the store, or one of our own on this machine."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker, LocalCluster, TimeoutError, WorkerPlugin, get_worker, wait
from distributed.comm.addressing import get_address_host
from distributed.versions import VersionMismatchWarning

from psfgen.block import render_block
from psfgen.config import RenderConfig
from psfgen.errors import STOP_SIGNALS, ConfigError, PsfError, RenderError
from psfgen.executors.local import available_cores, unclaimed
from psfgen.specimens import Specimens
from psfgen.store import Store, open_store
from psfgen.store.place import is_url

log = logging.getLogger(__name__)
CONNECT_S = 5.0  # a scheduler that is silent for so long is not there
LOOK_S = 0.5  # how often we look for new workers and for a signal
LOGGERS = ("distributed", "distributed.client", "distributed.gc", "tornado.application")
_one = threading.Lock()


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
    """Render `blocks` into `store`, a dask task each: by the workers of a scheduler, or by `workers` processes here.

    Workers may come and go, a block that loses its worker goes to another. Once `stopped` holds something, no further
    block is begun. Raises what a block raised, RenderError where blocks kill their workers or the scheduler goes, the
    blocks in hand being finished first; ConfigError where no scheduler answers.
    """
    if not blocks:
        return
    plan, address = specimens.plan, specimens.plan.config.dask.scheduler
    cores = available_cores()
    count = min(workers or (1 if device.startswith("cuda") else cores), len(blocks))
    config = plan.config.model_copy(update={"lens": _absolute(plan.config.lens)})
    path = store.path if is_url(store.path) else str(Path(store.path).absolute())
    job = Job(config, plan.sha256, path, device, 1 if address else count)
    with _silence(), _client(address, count, max(1, cores // count)) as client:
        work_off(client, job, store, unclaimed(store, blocks, stopped), lambda: on_kernels(plan.kernels_per_block))


def _absolute(lens: str) -> str:
    return str(Path(lens).absolute()) if Path(lens).exists() else lens


@contextmanager
def _client(address: str | None, count: int, threads: int) -> Iterator[Client]:
    """A client of the scheduler at `address`, or of a cluster of `count` processes that lasts as long as it."""
    if address:
        with _connect(address) as client:
            yield client
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=count,
            threads_per_worker=threads,
            memory_limit=0,  # a block keeps to memory_mib by itself
            dashboard_address=":0",
            scheduler_kwargs={"dashboard": False},
            local_directory=folder,
        ) as cluster,
        _connect(cluster.scheduler_address) as client,
    ):
        client.register_plugin(Calm())
        yield client


def _connect(address: str) -> Client:
    with warnings.catch_warnings():
        # The ledger notes the versions of every worker, and a task that another version cannot read fails.
        warnings.filterwarnings("ignore", category=VersionMismatchWarning)
        try:
            get_address_host(address)  # a client does not survive what is no address
            return Client(address, timeout=CONNECT_S, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError, TypeError) as error:  # silent, or no address
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"dask.scheduler {address}: no dask scheduler answers there ({reason}); "
                "give --scheduler the tcp://HOST:PORT that it printed at its start"
            ) from None


@contextmanager
def _silence() -> Iterator[None]:
    """No word from dask, which tells of every worker that comes and goes."""
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    _set_levels(dict.fromkeys(LOGGERS, logging.CRITICAL + 1))
    try:
        yield
    finally:
        _set_levels(before)


def _set_levels(levels: dict[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class Calm(WorkerPlugin):
    """Keeps a worker of our own quiet, and lets it finish its block when a signal reaches the whole process group."""

    def setup(self, worker: Any) -> None:
        _set_levels(dict.fromkeys(LOGGERS, logging.CRITICAL + 1))
        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Job:
    """What a worker needs to know. It reads the lens and the store itself, where they lie."""

    config: RenderConfig
    plan_sha256: str
    path: str
    device: str
    share: int


def work_off(client: Client, job: Job, store: Store, todo: Iterator[int], on_block: Callable[[], None]) -> None:
    """Keep every worker busy with one block; returns when all are done, raises the first error when the others are."""
    error: PsfError | None = None
    pending: dict[Any, tuple[int, str]] = {}  # a task -> its block, and the worker it was meant for
    more, waiting = True, False
    while True:
        workers = set(client.scheduler_info(n_workers=-1)["workers"])
        for worker in workers.difference(worker for _, worker in pending.values()):
            index = next(todo, None) if more and error is None else None
            more = more and index is not None
            if index is not None:
                task = client.submit(render_here, job, index, workers=worker, allow_other_workers=True, pure=False)
                pending[task] = index, worker
        if not pending and (error or not more):
            break
        if client.status != "running":
            raise RenderError(
                "the dask scheduler is gone; finished blocks are kept, the same command goes on once one is there"
            )
        if not pending and not waiting:
            log.warning("the dask scheduler has no workers yet; waiting for the first one")
            waiting = True
        for task in _finished(client, list(pending)):
            index, _ = pending.pop(task)
            failure = _outcome(task, store, index)
            if failure is None:
                on_block()
            error = error or failure
    if error is not None:
        raise error


def _finished(client: Client, tasks: list[Any]) -> list[Any]:
    """Those of the tasks that have ended, after at most LOOK_S."""
    if not tasks:
        time.sleep(LOOK_S)
        return []
    try:
        with client.as_current():
            ended = wait(tasks, timeout=LOOK_S, return_when="FIRST_COMPLETED")  # type: ignore[no-untyped-call]
        return list(ended.done)
    except TimeoutError:
        return []


def _outcome(task: Any, store: Store, index: int) -> PsfError | None:
    """What went wrong with the task of a block."""
    name = store.blocks[index]
    try:
        failure: PsfError | None = task.result()
    except KilledWorker as killed:
        failure = RenderError(
            f"block {name} was given up: {killed.allowed_failures + 1} dask workers died of it (out of memory?); "
            "finished blocks are kept, run the same command again, perhaps with a smaller memory_mib"
        )
        store.ledger.fail(name, str(failure))
    except Exception as error:
        failure = RenderError(f"the dask task of block {name} failed: {type(error).__name__}: {error}")
    return failure


def render_here(job: Job, index: int) -> PsfError | None:
    """The task: render one block in this worker with all its threads; returns what went wrong."""
    try:
        with _one:  # a worker of several threads is given several tasks when others die
            specimens, store = _loaded(job)
            render_block(specimens, store, index, cores=get_worker().state.nthreads, share=job.share)
    except PsfError as error:
        return error
    return None


@lru_cache(maxsize=1)
def _loaded(job: Job) -> tuple[Specimens, Store]:
    from psfgen.render import load

    lens, plan = load(job.config, job.device)
    if plan.sha256 != job.plan_sha256:
        raise ConfigError(f"lens {job.config.lens} is another one where the dask workers run, or changed meanwhile")
    return Specimens(lens, plan), open_store(job.path, allow_incomplete=True)
