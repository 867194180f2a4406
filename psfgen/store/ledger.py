"""The ledger: which blocks are done. A block is done when its entry stands here, and by nothing else.

ledger/BLOCK.json            {block, index, plan_sha256, chunks: {path: crc32c}, rays, seconds, host, versions, crc32c}
ledger/failed/BLOCK.json     {block, error, host, time}
ledger/running/BLOCK.json    {block, pid, host, time}, its age says whether it still runs
ledger/sealed/metadata.json  every metadata file of the store as it was written (see `Seal`)
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import psutil

from psfgen.errors import StoreCorrupt, StoreError
from psfgen.store.place import Folder, LocalFolder
from psfgen.store.schema import plain

SILENT_S = 600.0  # a block of another host that has not moved for so long no longer runs
CLOCK_S = 2.0  # by which the start of a process may be told too late
SEALED = "ledger/sealed/metadata.json"


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A document in the one form in which it is written, so that any other byte in a file is a fault."""
    return json.dumps(plain(document), indent=1, sort_keys=True, allow_nan=False).encode()


def write_json_atomically(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` so that readers see the old file or the whole new one, even after a power cut."""
    LocalFolder(path.parent).write(path.name, json_bytes(document), durable=True)


def signed(document: Mapping[str, Any]) -> bytes:
    """A document as bytes that hold the CRC32C of the rest of them."""
    held = {key: value for key, value in document.items() if key != "crc32c"}
    return json_bytes({**held, "crc32c": f"{google_crc32c.value(json_bytes(held)):08x}"})


def read_signed(folder: Folder, name: str, way_out: str) -> dict[str, Any]:
    """What `signed` made. Raises StoreCorrupt unless every byte is as it was written."""
    try:
        data = folder.read(name)
        document = json.loads(data)
    except FileNotFoundError:
        raise StoreCorrupt(f"{folder.url}: {name} is missing; {way_out}") from None
    except ValueError as error:
        raise StoreCorrupt(f"{folder.url}: {name} cannot be read ({error}); {way_out}") from None
    if not isinstance(document, dict) or signed(document) != data:
        raise StoreCorrupt(f"{folder.url}: {name} does not have the checksum it was written with; {way_out}")
    return document


class Ledger:
    """The ledger in a folder. `command` mends it, and is told to those who find it broken."""

    def __init__(self, folder: Folder, command: str) -> None:
        self.folder = folder
        self.way_out = f"`{command}` drops what is broken, then render again"

    def done(self) -> set[str]:
        """Names of the blocks that are committed."""
        return self._blocks("ledger")

    def is_done(self, block: str) -> bool:
        """Whether a block is committed."""
        return self.folder.exists(f"ledger/{block}.json")

    def read(self, block: str) -> dict[str, Any]:
        """The entry of a committed block. Raises StoreCorrupt unless it is as it was written."""
        return read_signed(self.folder, f"ledger/{block}.json", self.way_out)

    def commit(self, block: str, entry: Mapping[str, Any]) -> None:
        """Declare a block done; its chunks must already be on disk."""
        self.folder.write(f"ledger/{block}.json", signed(entry))
        self._forget(block)

    def drop(self, block: str) -> None:
        """Declare a block not done."""
        self.folder.remove(f"ledger/{block}.json")
        self._forget(block)

    def fail(self, block: str, error: str) -> None:
        """Record that a block failed, and why."""
        document = {"block": block, "error": error, "host": socket.gethostname(), "time": time.time()}
        try:
            self.folder.write(f"ledger/failed/{block}.json", json_bytes(document))
        finally:  # a full disk must not leave a note that somebody works on it
            self.folder.remove(f"ledger/running/{block}.json")

    def start(self, block: str) -> None:
        """Record that this process works on a block."""
        document = {"block": block, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        self.folder.write(f"ledger/running/{block}.json", json_bytes(document))

    def stop(self, block: str) -> None:
        """Record that nobody works on a block any more."""
        self.folder.remove(f"ledger/running/{block}.json")

    def touch(self, block: str) -> None:
        """Record that the work on a block goes on."""
        with contextlib.suppress(FileNotFoundError):  # another process has finished the same block
            self.folder.touch(f"ledger/running/{block}.json")

    def failed(self) -> dict[str, str]:
        """Name -> error of the blocks whose last try failed."""
        blocks = self._blocks("ledger/failed") - self.done()
        return {block: str(self._note("failed", block).get("error")) for block in blocks}

    def running(self) -> dict[str, dict[str, Any]]:
        """The blocks some process works on now: name -> {pid, host, time} of that process."""
        notes = {block: self._working(block) for block in self._blocks("ledger/running") - self.done()}
        return {block: note for block, note in notes.items() if note is not None}

    def stale(self) -> set[str]:
        """Names of the blocks that some process began and nobody works on any more."""
        return self._blocks("ledger/running") - self.running().keys()

    def is_running(self, block: str) -> bool:
        """Whether some process works on a block now."""
        return self._working(block) is not None

    def _working(self, block: str) -> dict[str, Any] | None:
        name = f"ledger/running/{block}.json"
        if not self.folder.exists(name):
            return None
        note = self._note("running", block)
        try:
            age_s = self.folder.age_s(name)
        except FileNotFoundError:  # finished between the two looks
            return None
        here = note.get("host") == socket.gethostname()
        return note if (_lives(note) if here else age_s < SILENT_S) else None

    def _note(self, kind: str, block: str) -> dict[str, Any]:
        """A note that people read and nothing depends on; empty where it is gone or cannot be read."""
        try:
            note = json.loads(self.folder.read(f"ledger/{kind}/{block}.json"))
        except (FileNotFoundError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _blocks(self, folder: str) -> set[str]:
        return {name.removesuffix(".json") for name in self.folder.names(folder) if name.endswith(".json")}

    def _forget(self, block: str) -> None:
        for kind in ("failed", "running"):
            self.folder.remove(f"ledger/{kind}/{block}.json")


def _lives(note: Mapping[str, Any]) -> bool:
    """Whether the process of a note runs on this host: no zombie, and none that was given its number later."""
    try:
        process = psutil.Process(note["pid"])
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= note["time"] + CLOCK_S)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


class Seal:
    """The metadata files of a store as they were written, with every form they may have.

    Arrays can be rendered again, metadata cannot; and a flipped bit in it has no checksum of its own to fail.
    """

    def __init__(self, folder: Folder, files: Mapping[str, Sequence[bytes]]) -> None:
        self.folder, self.files = folder, files

    @staticmethod
    def document(files: Mapping[str, Sequence[bytes]]) -> bytes:
        """The bytes of a seal: each file's forms, the first one first."""
        return signed({"files": {name: [base64.b64encode(f).decode() for f in forms] for name, forms in files.items()}})

    @classmethod
    def read(cls, ledger: Folder, folder: Folder, command: str) -> Seal:
        """The seal that lies with the ledger, about files in `folder`.

        Raises StoreCorrupt, naming the `command` that mends it, where it is broken.
        """
        document = read_signed(ledger, SEALED, f"`{command}` makes it anew")
        return cls(folder, {name: [base64.b64decode(f) for f in forms] for name, forms in document["files"].items()})

    def broken(self) -> list[str]:
        """Names of the files that are not as they were written."""
        return [name for name, forms in self.files.items() if self._found(name) not in forms]

    def require_ours(self, ledger: Folder, path: str) -> None:
        """Raise StoreError where the store has been moved, deleted or replaced since it was opened."""
        try:
            if ledger.read(SEALED) == self.document(self.files):
                return
        except FileNotFoundError:
            pass
        raise StoreError(f"{path} was moved or replaced while it was written; give this job an --out of its own")

    def restore(self) -> list[str]:
        """Write the broken files anew; returns their names."""
        broken = self.broken()
        for name in broken:
            self.folder.remove(name)  # it may be a folder
            self.folder.write(name, self.files[name][-1])
        return broken

    def check(self, path: str | Path, command: str) -> None:
        """Raise StoreCorrupt unless every file of the store at `path` is as it was written."""
        for name in self.broken():
            raise StoreCorrupt(f"{path}: {name} is not as it was written; `{command}` restores it")

    def _found(self, name: str) -> bytes | None:
        try:
            return self.folder.read(name)
        except (FileNotFoundError, StoreError):
            return None
