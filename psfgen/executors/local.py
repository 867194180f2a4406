"""This machine: in this process, or in several, each rendering whole blocks."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from psfgen.errors import ConfigError, RenderError
from psfgen.plan import Plan
from psfgen.specimens import Specimens
from psfgen.store import Store, open_store

_worker: dict[str, Any] = {}


def run(
    specimens: Specimens,
    store: Store,
    blocks: Sequence[int],
    *,
    workers: int | None,
    device: str,
    on_kernels: Callable[[int], None],
) -> None:
    """Render `blocks` into `store`: in this process where its threads suffice, else in a process a core.

    Raises RenderError where a worker dies; what it had not committed is rendered again next time.
    """
    from psfgen.block import render_block

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not blocks:
        return
    alone = device.startswith("cuda") or specimens.engine(0).threads_suffice
    count = min(workers or (1 if alone else cores), len(blocks))
    if count == 1:
        for index in blocks:
            render_block(specimens, store, index, cores=cores, on_kernels=on_kernels)
        return
    context = mp.get_context("spawn")
    done = context.Queue()
    listener = threading.Thread(target=_listen, args=(done, on_kernels), daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(
            count, context, _start_worker, (specimens.plan, store.path, device, max(1, cores // count), count, done)
        ) as pool:
            futures = [pool.submit(_render_in_worker, index) for index in blocks]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise RenderError(
            "a worker was killed (out of memory?); finished blocks are kept, run the same command again, "
            "perhaps with fewer --workers"
        ) from None
    finally:
        done.put(None)
        listener.join(timeout=5)


def _listen(queue: Any, on_kernels: Callable[[int], None]) -> None:
    while (count := queue.get()) is not None:
        on_kernels(count)


def _start_worker(plan: Plan, path: Path, device: str, cores: int, share: int, done: Any) -> None:
    from psfgen.render import load

    threading.Thread(target=_die_with_parent, daemon=True).start()
    lens, found = load(plan.config, device)
    if found.sha256 != plan.sha256:
        raise ConfigError(f"lens {plan.config.lens} changed while it was rendered")
    _worker.update(specimens=Specimens(lens, plan), store=open_store(path, allow_incomplete=True))
    _worker.update(options={"cores": cores, "share": share, "on_kernels": done.put})


def _render_in_worker(index: int) -> None:
    from psfgen.block import render_block

    render_block(_worker["specimens"], _worker["store"], index, **_worker["options"])


def _die_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
