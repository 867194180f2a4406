"""How far a store is: which blocks are done, running, failed and missing, and what became of its array job."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from psfgen.errors import RenderError
from psfgen.executors import slurm
from psfgen.store import Store

MOST_LINES = 20  # of one kind
MOST_CHARACTERS = 100


@dataclass(frozen=True)
class Job:
    """The array that was submitted last for a store, and where it and its finaliser stand in the queue."""

    submitted: slurm.Submission
    queue: dict[str, dict[str, int]] | None  # job id -> state -> tasks; None where Slurm does not tell
    why: str = ""

    @property
    def over(self) -> bool:
        """Whether the array has left the queue."""
        return self.queue is not None and not self.queue[self.submitted.array]

    def __str__(self) -> str:
        array, finaliser = self.submitted.array, self.submitted.finaliser
        if self.queue is None:
            return f"array job {array}: state unknown ({self.why})"
        states = _counts(self.queue[array]) or "not in the queue any more"
        after = (
            f"; finaliser {finaliser}: {' '.join(self.queue[finaliser]).lower() or 'not in the queue any more'}"
            if finaliser
            else ""
        )
        return f"array job {array} ({len(self.submitted.indices)} tasks): {states}{after}"


@dataclass(frozen=True)
class Status:
    """A store as it was found. `missing` are the indices of all blocks that are not done."""

    path: str
    total: int
    missing: list[int]
    running: dict[str, dict[str, Any]]
    failed: dict[str, str]
    job: Job | None

    @classmethod
    def of(cls, store: Store) -> Status:
        """Look at a store and, where one is recorded, at its array job."""
        ledger = store.ledger
        return cls(store.path, len(store.blocks), store.missing(), ledger.running(), ledger.failed(), _job(store))

    @property
    def over(self) -> bool:
        """Whether nothing can be expected to change: all is done, or its array job has ended without that."""
        return not self.missing or (self.job is not None and self.job.over and not self.running)

    @property
    def document(self) -> dict[str, Any]:
        """The answer as plain data."""
        counts = {"total": self.total, "done": self.total - len(self.missing), "missing": len(self.missing)}
        counts |= {"running": len(self.running), "failed": len(self.failed)}
        job = {"array": self.job.submitted.array, "finaliser": self.job.submitted.finaliser} if self.job else None
        return {
            "ok": not self.missing,
            "complete": not self.missing,
            "blocks": counts,
            "missing": self.missing,
            "running": self.running,
            "failed": self.failed,
            "slurm": {**job, "queue": self.job.queue} if job and self.job else None,
            "paths": {"store": self.path},
        }

    @property
    def line(self) -> str:
        """The answer in one line."""
        return self._counts + (f"; {self.job}" if self.job else "")

    @property
    def _counts(self) -> str:
        done = f"{self.total - len(self.missing)} of {self.total} blocks done"
        return f"{self.path}: {done}, {len(self.running)} running, {len(self.failed)} failed"

    @property
    def text(self) -> str:
        """The answer for people."""
        lines = [self._counts]
        if self.missing:
            missing = slurm.ranges(self.missing)
            cut = missing[:MOST_CHARACTERS].rpartition(",")[0] + ",..." if len(missing) > MOST_CHARACTERS else missing
            lines.append(f"missing blocks, by number: {cut}")
        lines += _at_most(f"{block} runs{_where(note)}" for block, note in sorted(self.running.items()))
        lines += _at_most(f"{block} failed: {error}" for block, error in sorted(self.failed.items()))
        return "\n".join([*lines, *([str(self.job)] if self.job else [])])


def _job(store: Store) -> Job | None:
    submitted = slurm.submission(store.path)
    if submitted is None:
        return None
    if shutil.which("squeue") is None:
        return Job(submitted, None, "squeue is not on this machine")
    try:
        jobs = [submitted.array, *([submitted.finaliser] if submitted.finaliser else [])]
        return Job(submitted, {job: dict(states) for job, states in slurm.queue(*jobs).items()})
    except RenderError as error:
        return Job(submitted, None, str(error))


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def _where(note: dict[str, Any]) -> str:
    host = f" on {note['host']}" if "host" in note else ""
    return host + (f" for {_duration(time.time() - float(note['time']))}" if "time" in note else "")


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _at_most(lines: Iterable[str]) -> Iterator[str]:
    every = iter(lines)
    yield from islice(every, MOST_LINES)
    more = sum(1 for _ in every)
    if more:
        yield f"... and {more} more"
