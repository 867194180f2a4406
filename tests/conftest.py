"""What several test modules share: tiny jobs, an ideal lens, a finished store, the command line in-process."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from psfgen import catalogue
from psfgen.config import RenderConfig
from psfgen.errors import report
from psfgen.optics.lens import Lens
from psfgen.optics.trace import Tracer, tracer_class
from psfgen.render import render
from psfgen.store import Store

TINY: dict[str, Any] = {
    "lens": "triplet",
    "grid": 3,
    "depth": "1m,3m,inf",
    "focus": "2m,inf",
    "wavelength": "0.48,0.64",
    "kernel_px": 12,
    "bins": 5,
    "pitch_um": 24.0,
    "spp": 256,
    "workers": 1,
    "device": "cpu",
}

# A biconvex singlet as Zemax writes it, without a sensor.
SINGLET_ZMX = """VERS 190513 80 123457 L123457
MODE SEQ
UNIT MM X W X CM MR CPMM
FLOA
SURF 0
  TYPE STANDARD
  CURV 0.0
  DISZ INFINITY
SURF 1
  STOP
  TYPE STANDARD
  CURV 0.0
  DISZ 3.0
  DIAM 4.0 1 0 0 1 ""
SURF 2
  TYPE STANDARD
  CURV 0.02
  DISZ 5.0
  GLAS N-BK7 0 0 1.5168 64.17
  DIAM 8.0 1 0 0 1 ""
SURF 3
  TYPE STANDARD
  CURV -0.04
  DISZ 30.0
  DIAM 8.0 1 0 0 1 ""
SURF 4
  TYPE STANDARD
  CURV 0.0
  DISZ 0.0
"""

torch.set_num_threads(1)  # torch's threads meet after every operation, which crawls on a shared machine
lens = functools.cache(Lens)


@functools.cache
def tracer(
    of: Lens,
    name: str = "numba",
    wavelengths_um: tuple[float, ...] = (0.5876,),
    dtype: torch.dtype = torch.float32,
) -> Tracer:
    """A tracer of `trace.TRACERS`; its surface tables last as long as the tests."""
    made: Tracer = tracer_class(name)(of, wavelengths_um, dtype)
    return made


def tiny(out: Path, **changes: Any) -> RenderConfig:
    """A job that renders in a fraction of a second."""
    return RenderConfig(**{**TINY, "out": str(out), **changes})


def flags(**changes: Any) -> list[str]:
    """The same job as words of a command line; None leaves a flag out."""
    given = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def variant(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A shipped lens with `change` applied to its document, as a file of its own."""
    document = json.loads(catalogue.text(name))
    change(document)
    path = folder / f"{name}-variant.json"
    path.write_text(json.dumps(document))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrays(store: Path) -> dict[str, bytes]:
    """Every file of a store but its ledger, and but what a killed writer had not yet given its name."""
    return {name: data for name, data in contents(store).items() if not re.search(r"^ledger/|\.partial$", name)}


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child of this process, whose imports are done; returns its pid.

    The child keeps to one core, so it also shows that nothing depends on their number.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use of fork.. may lead to deadlocks", category=DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait_for(pid: int) -> int:
    """Exit code of a forked child; minus the signal's number where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout, which must be one strict JSON document."""

        def refuse(name: str) -> None:
            raise ValueError(f"{name} is no JSON")

        parsed: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return parsed


Psfgen = Callable[..., Ran]


@pytest.fixture
def psfgen(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Psfgen:
    """The `psfgen` command in this process, in an empty folder."""
    from psfgen.cli import cli

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Ran:
        argv = list(map(str, args))
        capsys.readouterr()
        code = report(lambda: cli(argv, standalone_mode=False, prog_name="psfgen"), argv=argv)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def thin_lens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ideal lens, f = 50 mm, F/2, as a file."""
    document = {
        "info": "ideal thin lens",
        "sensor_size": [20.0, 20.0],
        "sensor_res": [2000, 2000],
        "surfaces": [
            {"type": "Stop", "r": 12.5, "is_aperture": True, "d_next": 0.0, "mat2": "air"},
            {"type": "ThinLens", "r": 12.6, "f": 50.0, "d_next": 50.0, "mat2": "air"},
        ],
    }
    path = tmp_path_factory.mktemp("lens") / "thin.json"
    path.write_text(json.dumps(document))
    return str(path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny store, not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "psfs.zarr"
    render(tiny(path))
    return path


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy of the complete tiny store, to be broken."""
    return Path(shutil.copytree(finished, tmp_path / "psfs.zarr"))


@pytest.fixture(scope="session")
def opened(finished: Path) -> Store:
    """The complete tiny store, open."""
    from psfgen.store import open_store

    return open_store(finished)
