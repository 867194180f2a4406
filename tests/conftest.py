"""What several test modules share: tiny jobs, an ideal lens, a finished store, the command line in-process."""

from __future__ import annotations

import faulthandler
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from onenode import Cluster

from psfgen import catalogue
from psfgen.config import RenderConfig
from psfgen.errors import report
from psfgen.executors import local
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

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is told to ignore Ctrl-C
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


def in_optiland(document: dict[str, Any], of: Lens, wavelength_um: float, sensor_z_mm: float | None = None) -> Any:
    """The same prescription in optiland, with DeepLens's glass, and its own sensor distance unless one is given."""
    from optiland.materials import IdealMaterial
    from optiland.optic import Optic

    optic = Optic()
    optic.surfaces.add(index=0, thickness=math.inf)
    last = len(document["surfaces"]) - 1
    for index, surface in enumerate(document["surfaces"]):
        glass = of.geo.surfaces[index].mat2.refractive_index(wavelength_um)
        shape: dict[str, Any] = {"radius": surface.get("roc", math.inf), "conic": surface.get("k", 0.0)}
        if surface["type"] == "Aspheric":
            coefficients = surface["ai"] if surface["use_ai2"] else [0.0, *surface["ai"]]
            shape |= {"surface_type": "even_asphere", "coefficients": coefficients}
        behind = surface["d_next"] if index < last or sensor_z_mm is None else sensor_z_mm - of.last_vertex_mm
        stop, material = index == of.stop_index, IdealMaterial(float(glass))
        optic.surfaces.add(index=index + 1, thickness=behind, material=material, is_stop=stop, **shape)
    optic.surfaces.add(index=last + 2)
    return optic


def contents(store: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path; of an HDF5 store the master and all that lies beside it."""
    if store.suffix == ".h5":
        beside = {f"psfs.h5.d/{name}": data for name, data in contents(Path(f"{store}.d")).items()}
        return {**({"psfs.h5": store.read_bytes()} if store.exists() else {}), **beside}
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def arrays(store: Path) -> dict[str, bytes]:
    """Every file of a store but its ledger, and but what a killed writer had not yet given its name."""
    left = re.compile(r"(^|/)ledger/|\.partial$|\.tmp$")
    return {name: data for name, data in contents(store).items() if not left.search(name)}


def beside(store: Path) -> Path:
    """The folder that holds the ledger of a store: its own, or that of an HDF5 file."""
    return Path(f"{store}.d") if store.suffix == ".h5" else store


def copy_of(store: Path, folder: Path) -> Path:
    """A copy of a store, under the same name."""
    copy = folder / store.name
    for source in {store, beside(store)}:
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / source.name)
    return copy


def doctor(path: Path, block: int, change: Callable[[str, NDArray[Any]], object]) -> None:
    """Change arrays of a block through the store itself, so that every checksum fits what is wrong now.

    `change(name, values)` is called for each array [with every dim], whose values it may alter.
    """
    from psfgen.store import open_store

    store = open_store(path)
    entry = store.ledger.read(store.blocks[block])
    here = {dim: slice(at, at + 1) for dim, at in store.spec.block_at(block).items()}
    for name in store.spec.arrays:
        values = store.read(name, **here)
        change(name, values)
        store.write(block, name, values)
    store.commit(block, {key: value for key, value in entry.items() if key not in ("chunks", "crc32c")})


def put(name: str, index: Any, value: float) -> Callable[[str, NDArray[Any]], None]:
    """A change for `doctor`: one value of one array."""

    def change(array: str, values: NDArray[Any]) -> None:
        if array == name:
            values[index] = value

    return change


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """A parallel loop of numba (optiland has some) gives OpenMP more; a forked child would wait for them forever."""
    yield
    torch.set_num_threads(1)


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
            faulthandler.dump_traceback_later(100, file=sys.__stderr__)  # before the test's timeout: where it hangs
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


class Forking:
    """multiprocessing's "fork", so that workers need not import everything first; else as its "spawn"."""

    def __init__(self) -> None:
        self._context = ForkContext()
        self._ours: list[Connection] = []

    def Pipe(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        self._ours.append(ours)
        return ours, theirs

    def Process(self, target: Callable[..., object], args: tuple[Any, ...], daemon: bool) -> Any:
        def work(*args: Any) -> None:
            for pipe in self._ours:  # a spawned process would not have them
                pipe.close()
            target(*args)

        warnings.filterwarnings("ignore", message=".*use of fork.. may lead to deadlocks", category=DeprecationWarning)
        return self._context.Process(target=work, args=args, daemon=daemon)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's workers are forks, to be used in a child made by `fork`."""
    monkeypatch.setattr(local.mp, "get_context", lambda method: Forking())


def poll[T](look: Callable[[], T | None]) -> T:
    """Look again and again until there is something; the test's timeout ends it."""
    while not (seen := look()):
        time.sleep(0.002)
    return seen


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


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of two copies of a lens, not to be changed."""
    path = tmp_path_factory.mktemp("copies") / "psfs.zarr"
    render(tiny(path, copies=2, tolerances={"decentre_mm": 0.02, "tilt_deg": 0.05}))
    return path


@pytest.fixture(scope="session")
def dark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store where only some kernels get light, not to be changed."""
    path = tmp_path_factory.mktemp("dark") / "psfs.zarr"
    store = render(tiny(path, lens="singlet", field_max=1.3, depth="2m", pitch_um=120))
    assert 0 < (store.read("captured") == 0).mean() < 1
    return path


@pytest.fixture(scope="session")
def finished_h5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store as HDF5, not to be changed."""
    path = tmp_path_factory.mktemp("finished_h5") / "psfs.h5"
    render(tiny(path))
    return path


@pytest.fixture(params=["zarr", "hdf5"])
def either(request: pytest.FixtureRequest) -> Path:
    """The complete tiny store in each format, not to be changed."""
    return Path(request.getfixturevalue("finished" if request.param == "zarr" else "finished_h5"))


@pytest.fixture
def broken(either: Path, tmp_path: Path) -> Path:
    """A copy of the complete tiny store in each format, to be broken."""
    return copy_of(either, tmp_path)


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy of the complete tiny store, to be broken."""
    return Path(shutil.copytree(finished, tmp_path / "psfs.zarr"))


@pytest.fixture(scope="session")
def opened(finished: Path) -> Store:
    """The complete tiny store, open."""
    from psfgen.store import open_store

    return open_store(finished)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Slurm for all tests that are marked `slurm`; its commands find it through the environment."""
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    before = {name: os.environ.get(name) for name in started.settings}
    os.environ.update(started.settings)
    try:
        started.do("start")
        yield started
    finally:
        started.do("stop")
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def meddling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model in the table that can disturb its own training; it starts as a plain neural_cvae."""
    from fitting import plan_meddling

    from psftrain.models import MODELS

    monkeypatch.setitem(MODELS, "meddling", "training:Meddling")
    plan_meddling(lambda step: None)
    yield
    plan_meddling(lambda step: None)


class Disk:
    """A small disk of its own, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, *options: str) -> bool:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", self.path], capture_output=True)
        return done.returncode == 0

    def remount(self, *options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(["remount", *options]), self.path], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Needs a root who may mount."""
    (tmp_path / "disk").mkdir()
    made = Disk(tmp_path / "disk")
    try:
        if not made.mount("size=64m"):
            pytest.skip("a full or read-only disk takes a mount, which needs root and the right to mount (CI has both)")
    except FileNotFoundError:
        pytest.skip("a full or read-only disk takes a mount, and this system has no mount command")
    yield made
    subprocess.run(["umount", "-l", made.path], check=True, capture_output=True)
