"""The ledger: which blocks are done. A block is done when its entry stands here, and by nothing else.

ledger/BLOCK.json           {block, index, plan_sha256, chunks: {path: crc32c}, rays, seconds, host, versions}
ledger/failed/BLOCK.json    {block, error, host, time}
ledger/running/BLOCK.json   {block, pid, host}, its age says whether it still runs
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psfgen.errors import StoreCorrupt
from psfgen.store.schema import plain

SILENT_S = 600.0  # a block of another host that has not moved for so long no longer runs


def write_json_atomically(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` so that readers see the old file or the whole new one, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(plain(document), file, indent=1, sort_keys=True, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Ledger:
    """The ledger of the store whose sidecar directory is `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root / "ledger"

    def done(self) -> set[str]:
        """Names of the blocks that are committed."""
        return {entry.stem for entry in self._files(self.root)}

    def read(self, block: str) -> dict[str, Any]:
        """The entry of a committed block. Raises StoreCorrupt if it cannot be read."""
        return _read(self.root / f"{block}.json")

    def commit(self, block: str, entry: Mapping[str, Any]) -> None:
        """Declare a block done; its chunks must already be on disk."""
        write_json_atomically(self.root / f"{block}.json", entry)
        (self.root / "failed" / f"{block}.json").unlink(missing_ok=True)
        (self.root / "running" / f"{block}.json").unlink(missing_ok=True)

    def fail(self, block: str, error: str) -> None:
        """Record that a block failed, and why."""
        document = {"block": block, "error": error, "host": socket.gethostname(), "time": time.time()}
        write_json_atomically(self.root / "failed" / f"{block}.json", document)
        (self.root / "running" / f"{block}.json").unlink(missing_ok=True)

    def start(self, block: str) -> None:
        """Record that this process works on a block."""
        document = {"block": block, "pid": os.getpid(), "host": socket.gethostname()}
        write_json_atomically(self.root / "running" / f"{block}.json", document)

    def touch(self, block: str) -> None:
        """Record that the work on a block goes on."""
        with contextlib.suppress(FileNotFoundError):  # another process has finished the same block
            os.utime(self.root / "running" / f"{block}.json")

    def failed(self) -> dict[str, str]:
        """Name -> error of the blocks whose last try failed."""
        done = self.done()
        entries = [_read(path) for path in self._files(self.root / "failed") if path.stem not in done]
        return {entry["block"]: str(entry["error"]) for entry in entries}

    def running(self) -> set[str]:
        """Names of the blocks some process works on now."""
        done = self.done()
        return {path.stem for path in self._files(self.root / "running") if path.stem not in done and _alive(path)}

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        return [path for path in folder.glob("*.json") if not path.name.startswith(".")]


def _read(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"ledger entry {path} cannot be read ({error}); delete it and render again") from None
    if not isinstance(entry, dict):
        raise StoreCorrupt(f"ledger entry {path} is no JSON object; delete it and render again")
    return entry


def _alive(path: Path) -> bool:
    try:
        entry = _read(path)
        age_s = time.time() - path.stat().st_mtime
    except (StoreCorrupt, FileNotFoundError):  # finished between the listing and the look
        return False
    if entry.get("host") != socket.gethostname():
        return age_s < SILENT_S
    return Path(f"/proc/{entry.get('pid')}").exists() if Path("/proc").exists() else age_s < SILENT_S
