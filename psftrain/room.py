"""How much memory and disk there is for kernels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from psftrain.decode import local_processes

GIB = 2**30


def memory_bytes() -> int:
    """Memory that this process may still take: what is available, or what its cgroup has left, shared with the other
    processes of the run on this machine.
    """
    return min([int(psutil.virtual_memory().available), *_cgroup_bytes(Path("/"))]) // local_processes()


def gpu_bytes(device: torch.device) -> int:
    """Free memory of a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def disk_bytes(folder: Path) -> int:
    """Free space where a folder lies, or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def text(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"


def _cgroup_bytes(root: Path) -> Iterator[int]:
    """What each cgroup of this process has left, its own and those above it; files it could drop count as left."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, usage, droppable = names if controllers else ("memory.max", "memory.current", "inactive_file")
        inner = mount / path.lstrip("/")
        for group in (inner, *inner.parents):
            try:
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = int((group / limit).read_text()) - int((group / usage).read_text())
            except (OSError, ValueError):  # no limit here ("max"), or no such group
                left = -1
            if left >= 0:
                yield left + int(statistics.get(droppable, 0))
            if group == mount:
                break
