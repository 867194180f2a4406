"""The real Slurm of the tests: one node, started without systemd by tests/slurm-local.sh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def poll[T](look: Callable[[], T], every_s: float = 0.1) -> T:
    """Look again and again until there is something; the test's timeout ends it."""
    while not (seen := look()):
        time.sleep(every_s)
    return seen


def free_ports() -> int:
    """The first of three ports that nobody uses."""
    for first in range(21000 + os.getpid() % 9000, 65000, 3):
        try:
            for port in range(first, first + 3):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


class Cluster:
    """The cluster of these tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = {
            "SLURM_LOCAL_DIR": str(folder),
            "SLURM_LOCAL_CPUS": "4",
            "SLURM_LOCAL_PORT": str(free_ports()),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def do(self, what: str) -> None:
        subprocess.run([HERE / "slurm-local.sh", what], env={**os.environ, **self.settings}, check=True, timeout=60)

    def restart_controller(self) -> None:
        pid = int((self.folder / "run/slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        poll(lambda: not Path(f"/proc/{pid}").exists())
        self.do("start")
