"""What a user is told on stderr, and how a user's signals are heard: exceptions, exit codes, progress, stops.

    PsfError                 exit 1   failed
    +-- ConfigError          exit 2   wrong usage, option or config value
    |   +-- LensError        exit 2   a lens that cannot be found, read or used
    |   +-- PlanMismatch     exit 2   the store exists and was made by another plan
    |   `-- RunMismatch      exit 2   the run exists with another config, or does not fit the store
    +-- StoreError           exit 1   a store that cannot be read or written
    |   +-- StoreCorrupt     exit 1   a checksum, a value or the structure is wrong
    |   `-- StoreIncomplete  exit 3   blocks are missing
    +-- RenderError          exit 1   tracing failed
    +-- FitError             exit 1   training failed
    `-- Preempted            exit 75  stopped by a signal with the work saved

A message names what is wrong, the value that was given and the way out, in one line.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

INTERRUPTED = "interrupted; what is finished is kept, the same command goes on from there"
# SLURM's notices before a time limit or a preemption (NCCL may use SIGUSR1 itself, so SIGUSR2 is the one to send).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class PsfError(Exception):
    """Base of every error that is meant for a user."""

    exit_code = 1


class ConfigError(PsfError):
    """Wrong usage: an option or a config value that cannot be used."""

    exit_code = 2


class LensError(ConfigError):
    """A lens that cannot be found, read or used."""


class PlanMismatch(ConfigError):
    """A store exists where one was to be written, and another plan made it."""


class RunMismatch(ConfigError):
    """A training run that does not fit the config or the store it was asked for."""


class StoreError(PsfError):
    """A store that cannot be read or written."""


class StoreCorrupt(StoreError):
    """A checksum, a value or the structure of a store is wrong."""


class StoreIncomplete(StoreError):
    """A store with blocks still missing."""

    exit_code = 3


class RenderError(PsfError):
    """Tracing failed."""


class FitError(PsfError):
    """Training failed."""


class Preempted(PsfError):
    """Stopped by a signal; the work is saved and the same command goes on from there."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is near."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def report(command: Callable[[], Any], argv: list[str] | None = None) -> int:
    """Run a command line; turn whatever it raises into one line on stderr and an exit code.

    The traceback is shown only where `-v` stands in the arguments; `--json` gets a document on stdout too.
    """
    arguments = sys.argv[1:] if argv is None else argv
    verbose = not {"-v", "--verbose"}.isdisjoint(arguments)
    caught: BaseException
    try:
        result = command()
    except PsfError as error:
        caught, code, line = error, error.exit_code, str(error)
    except KeyboardInterrupt as error:
        caught, code, line = error, 1, INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        caught = error
        if type(error).__name__ == "Abort":  # what click makes of a KeyboardInterrupt
            code, line = 1, INTERRUPTED
        elif hasattr(error, "format_message"):  # click's own usage errors; this module stays free of click
            code, line = 2, str(error.format_message())
        else:
            code, line = 1, f"{type(error).__name__}: {error}"
            if not verbose:
                line += " (unexpected; -v shows where)"
    else:
        return result if isinstance(result, int) else 0
    line = " ".join(line.split())
    if verbose:
        traceback.print_exception(caught)
    print(f"{'stopped' if isinstance(caught, Preempted) else 'error'}: {line}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"schema": 1, "ok": False, "error": line, "exit_code": code}, indent=2))
    return code


@contextmanager
def stop_signals(numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> Iterator[list[str]]:
    """Collect the names of the signals that ask for a stop, instead of dying of them.

    Only a main thread hears signals; in any other nothing is collected.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    handler: Callable[..., None] = lambda number, frame: caught.append(signal.Signals(number).name)  # noqa: E731
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Signalled(BaseException):
    """A signal that is to end the work where it is."""


@contextmanager
def ended_by_signals(outcome: str) -> Iterator[None]:
    """Let a signal end the work by an exception, which clears away what was begun; raises Preempted with `outcome`.

    For work that goes on from nothing. Only a main thread hears signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[str] = []

    def end(number: int, frame: object) -> None:
        caught.append(signal.Signals(number).name)
        if len(caught) == 1:  # the next would disturb the clearing away
            raise _Signalled

    before = {number: signal.signal(number, end) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    except _Signalled:
        raise Preempted(f"{caught[0]}: {outcome}") from None
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def progress(total: int, description: str, unit: str, initial: int = 0, silent: bool = False) -> Any:
    """A tqdm bar on stderr: redrawn on a terminal, else one line every 30 s; `silent`: neither."""
    from tqdm import tqdm

    if silent:
        return tqdm(total=total, initial=initial, disable=True)
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=True)
    line = "{desc}: {n_fmt}/{total_fmt} " + unit + " [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, mininterval=30, maxinterval=30, bar_format=line
    )
