"""Signals and kills at any moment: in the end the run is the one that nobody disturbed, to the last bit."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import fork, wait_for
from fitting import named, run_json, same_run, strike_at, two_depths
from training import psftrain, words

from psftrain import board, checkpoint, sources

TERM, USR2, KILL = signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL
MODES = ["resident", "memmap", "stream"]
# Something happens in nearly every step: a log, a validation, a checkpoint, the best so far.
BUSY: dict[str, Any] = {
    "steps": 40,
    "log_every": 3,
    "val_every": 4,
    "save_every": 3,
    "keep": 2,
    "data__val": 0.2,
    "ema": 0.9,
    "accumulate": 2,
    "data__buffer_mib": 1,
}


class Fits:
    """Runs of one config, one after another, and what an undisturbed one came to in `span_s` seconds."""

    def __init__(self, store: Path, folder: Path, mode: str) -> None:
        self.store, self.folder, self.mode, self.count = store, folder, mode, 0
        self.undisturbed, self.span_s = folder / "undisturbed", 0.0
        assert self.life(self.undisturbed) == 0  # imports what is imported late
        assert self.life(folder / "timed", forked=True) == 0

    def fresh(self) -> Path:
        """Where the next run goes; it has no decoded kernels yet."""
        self.count += 1
        return self.folder / str(self.count) / "run"

    def life(
        self,
        run: Path,
        forked: bool = False,
        begin: Callable[[], object] = lambda: None,
        strike: Callable[[int], object] = lambda pid: None,
    ) -> int:
        """Exit code of one `psftrain fit` into `run`, in this process or `forked`.

        The child calls `begin()` before it; `strike(pid)` is called while it runs.
        """
        settings = {**BUSY, "data__mode": self.mode, "data__cache": str(run.parent / "cache")}
        command = ["fit", *words(self.store, run, **settings)]
        if not forked:
            return psftrain(*command).code
        run.parent.mkdir(exist_ok=True)
        if (run / "tb").exists():  # else it would spend most of its life on this
            board._wait_for_another_second(run / "tb")
        pid = fork(lambda: (begin(), _exit_told(command, run)))
        began = time.monotonic()
        strike(pid)
        code = wait_for(pid)
        self.span_s = self.span_s or time.monotonic() - began
        return code

    def end(self, run: Path) -> None:
        """Let a run go on to its end, and see that it is the undisturbed one with nothing lying about."""
        assert self.life(run) == 0
        same_run(run, self.undisturbed)
        assert list(run.rglob(".*")) == []


def _exit_told(command: Sequence[object], run: Path) -> None:
    ran = psftrain(*command)
    (run.parent / "told").write_text(ran.err)
    os._exit(ran.code)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_depths(tmp_path_factory.mktemp("kills") / "s.zarr", depth=(500.0, 1000.0, 3000.0, math.inf))


@pytest.fixture(scope="module", params=MODES)
def fits(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fits]:
    """In each mode of the data; a stream has several windows an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "size_bytes", lambda places: len(places) * 2**20 // 30)
        yield Fits(store, tmp_path_factory.mktemp(request.param), request.param)


# --- at random moments ------------------------------------------------------------------------------------------------


def struck_at_random(fits: Fits, numbers: Sequence[signal.Signals]) -> list[int]:
    """Send each of `numbers` to a run, at a random moment of its life; returns the lives' exit codes.

    A life goes on where the last one ended, and is a new run's first where that one was done. After each all
    checkpoints are whole, and a process that had begun to train and could answer has answered 75.
    """
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"KILL_SEED={seed} gives the same moments, as far as a clock can")  # shown where the test fails
    draw, run, codes = random.Random(seed), fits.fresh(), []
    for number in numbers:
        begun, moment = _lives(run), draw.uniform(0, 1.1) * fits.span_s

        def strike(pid: int, moment: float = moment, number: signal.Signals = number) -> None:
            time.sleep(moment)  # the moment is the point here
            os.kill(pid, number)

        codes.append(code := fits.life(run, forked=True, strike=strike))
        told = (number.name, moment, (run.parent / "told").read_text() if (run.parent / "told").exists() else "")
        assert code in (0, 75, -number), told
        finished = (run / "run.json").exists() and run_json(run)["status"] == "finished"
        if code == -number != -KILL:
            assert finished or _lives(run) == begun, told
        if (run / "config.yaml").exists():
            assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == BUSY["steps"]
        for path in (run / "checkpoints").glob("[!.]*.pt"):
            checkpoint.load(path)
        if code == 0 or finished:
            fits.end(run)
            run = fits.fresh()
    fits.end(run)
    return codes


def _lives(run: Path) -> int:
    """How many processes have begun to train: each opens a file of events."""
    return len(list((run / "tb").glob("events*")))


@pytest.mark.slow
def test_whenever_a_run_is_stopped_it_becomes_the_undisturbed_one(fits: Fits) -> None:
    """Two of each signal; `make campaign` sends twenty."""
    struck_at_random(fits, random.sample([TERM, USR2, KILL], 3) + random.sample([TERM, USR2, KILL], 3))


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [TERM, USR2, KILL])
def test_twenty_times_whenever_a_run_is_stopped(fits: Fits, number: signal.Signals) -> None:
    codes = struck_at_random(fits, [number] * 20)
    print(fits.mode, number.name, {code: codes.count(code) for code in codes})
    assert codes.count(-KILL if number == KILL else 75) >= 5


# --- at chosen moments ------------------------------------------------------------------------------------------------


# What the process is about to call; of `os.replace` the file that would get its name.
MOMENTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "it opens its stores": ("psftrain.fit.open_stores", lambda *args: True),
    "it has written config.yaml": ("os.replace", named("config.yaml")),
    "it has written run.json": ("os.replace", named("run.json")),
    "it has written a checkpoint": ("os.replace", named("step-*.pt")),
    "it deletes old ones": ("psftrain.checkpoint.prune", lambda *args: True),
    "it validates": ("psftrain.validation.validate", lambda *args: True),
    "it has written the best": ("os.replace", named("best.pt")),
    "it has written the last checkpoint": ("os.replace", named(f"step-{BUSY['steps']:08d}.pt")),
    "it has finished": ("psftrain.run.finish", lambda *args: True),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(TERM, marks=pytest.mark.campaign), KILL])
@pytest.mark.parametrize("fits", ["resident"], indirect=True)
def test_stopped_when(fits: Fits, number: signal.Signals) -> None:
    """One run, stopped at one moment after another; a run that is about to finish does."""
    run = fits.fresh()
    for when, (name, wanted) in MOMENTS.items():
        with pytest.MonkeyPatch.context() as patch:
            strike_at(patch, name, wanted, number)
            code = fits.life(run, forked=True)
        done = when in ("it has written the last checkpoint", "it has finished")
        assert code == (-KILL if number == KILL else 0 if done else 75), when
    fits.end(run)


# --- before every change on the disk ----------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def _killed_before(change: int, run: Path) -> None:
    """Let this process die of SIGKILL before it changes the disk below `run` for the n-th time (0: the first).

    What already stands under its name is never opened to be written anew.
    """
    count = [-1]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opened or event in CHANGES) or not str(args[0]).startswith(str(run)):
            return
        if opened and args[2] & os.O_TRUNC and not Path(args[0]).name.startswith("."):
            assert not Path(args[0]).exists(), args
        count[0] += 1
        if count[0] == change:
            os.kill(os.getpid(), KILL)

    sys.addaudithook(hook)


def killed_before_changes(fits: Fits, first: int, every: int) -> int:
    """Kill runs before their changes number first, first + every ...; returns how many changes a run makes."""
    change = first
    while True:
        run = fits.fresh()
        code = fits.life(run, forked=True, begin=lambda change=change, run=run: _killed_before(change, run))
        assert code in (0, -KILL), (change, (run.parent / "told").read_text())
        fits.end(run)
        if code == 0:
            return change
        change += every


@pytest.mark.slow
@pytest.mark.parametrize("fits", ["resident"], indirect=True)
def test_killed_before_some_changes_on_the_disk(fits: Fits) -> None:
    assert killed_before_changes(fits, random.randrange(25), 25) > 25


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fits", ["resident"], indirect=True)
def test_killed_before_every_change_on_the_disk(fits: Fits) -> None:
    print(killed_before_changes(fits, 0, 1), "changes")
