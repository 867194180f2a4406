"""How a block is cut: everything once, mirrors together, memory bounded, and no byte of it depends on the cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arrays, tiny

from psfgen import bands
from psfgen.bands import ARRAYS_SHARE, MIB, SMALL_NUMBERS, Cut, cut
from psfgen.config import RenderConfig
from psfgen.engines import geometric
from psfgen.errors import ConfigError
from psfgen.render import load, render
from psfgen.store import schema
from psfgen.store.schema import StoreSpec

BATCH = 4 * 2**20
BATCH_OF_TWO = 2 * 8 * 12 * 12 * 4 * 2  # bytes of the deposits of two points of the tiny job


def spec_of(config: RenderConfig) -> StoreSpec:
    sizes = {"focus": len(config.focus), "depth": 1, "field_y": config.grid, "field_x": config.grid}
    sizes |= {"wavelength": len(config.wavelength), "ky": config.kernel_px, "kx": config.kernel_px}
    sizes |= {"by": config.bins, "bx": config.bins}
    return StoreSpec({dim: np.arange(size, dtype=float) for dim, size in sizes.items()}, {})


def job(**changes: Any) -> RenderConfig:
    return RenderConfig(**{"focus": "1m:inf:4", **changes})


CUTS = [
    job(grid=grid, kernel_px=kernel_px, bins=min(kernel_px, 15), memory_mib=memory_mib, focus=f"1m:inf:{focuses}")
    for grid, kernel_px, memory_mib, focuses in (
        (1, 2, 64, 1),
        (3, 15, 64, 2),
        (20, 64, 512, 4),
        (20, 64, 240, 4),
        (30, 64, 270, 9),
        (48, 64, 330, 4),
        (48, 64, 4000, 4),
        (17, 128, 96, 5),
        (17, 256, 512, 3),
        (16, 256, 300, 20),
        (7, 512, 512, 4),
    )
]


@pytest.mark.parametrize("config", CUTS, ids=lambda c: f"{c.grid}-{c.kernel_px}-{c.memory_mib}-{len(c.focus)}")
def test_a_cut_covers_everything_once_within_the_memory(config: RenderConfig) -> None:
    spec = spec_of(config)
    for cores in (1, 3, 64):
        found = cut(config, spec, batch_bytes=BATCH, cores=cores)
        count = config.grid // spec.band_rows
        assert sorted(band for group in found.bands for band in group) == list(range(count))
        assert np.concatenate([np.arange(len(config.focus))[part] for part in found.focuses]).tolist() == list(
            range(len(config.focus))
        )
        assert 1 <= found.tracing <= cores
        assert 1 <= found.writing <= cores
        assert bytes_at_once(config, spec, found) <= config.memory_mib * MIB


def bytes_at_once(config: RenderConfig, spec: StoreSpec, found: Cut) -> int:
    """Kernels that wait to be written, small arrays, deposits of each thread; without the chunks being written."""
    points = max(map(len, found.bands)) * spec.band_rows * config.grid
    focuses = max(part.stop - part.start for part in found.focuses)
    kernels = points * len(config.wavelength) * 4
    small = SMALL_NUMBERS * len(config.focus) * config.grid**2 * len(config.wavelength) * 4
    waiting = kernels * (focuses * config.kernel_px**2 + len(config.focus) * config.bins**2) + small
    assert waiting <= config.memory_mib * MIB * ARRAYS_SHARE
    return waiting + found.tracing * BATCH


def test_threads_that_write_are_as_many_as_their_chunks_leave_room_for() -> None:
    config = job(grid=48, memory_mib=512)
    spec = spec_of(config)
    chunk = 4 * spec.band_rows * 48 * 3 * 64**2
    found = cut(config, spec, batch_bytes=BATCH, cores=64)
    assert found.writing == int(512 * MIB * 0.25 // (3 * chunk)) > 0
    assert found.tracing == 512 // 4 // 4


def test_mirrored_bands_are_cut_together() -> None:
    """So that what a mirror gives is traced once where two bands fit at a time."""
    config = job(grid=48, memory_mib=400, focus="1m,2m")
    spec = spec_of(config)
    groups = cut(config, spec, batch_bytes=BATCH, cores=2).bands
    assert 48 // spec.band_rows == 4
    assert [sorted(group) for group in groups] == [[0, 3], [1, 2]]
    whole = cut(job(grid=48, memory_mib=4000, focus="1m,2m"), spec, batch_bytes=BATCH, cores=2)
    assert [sorted(group) for group in whole.bands] == [[0, 1, 2, 3]]
    assert whole.focuses == (slice(0, 2),)


def test_workers_share_the_memory() -> None:
    config = job(grid=48, memory_mib=800)
    spec = spec_of(config)
    alone = cut(config.model_copy(update={"memory_mib": 400}), spec, batch_bytes=BATCH, cores=2)
    assert cut(config, spec, batch_bytes=BATCH, cores=2, share=2) == alone


@pytest.mark.parametrize("kernel_px", [256, 1024])
def test_too_little_memory_is_refused_with_what_is_enough(kernel_px: int) -> None:
    """And what the message gives is indeed enough, and nearly the least."""
    for batch_bytes, share in ((BATCH, 1), (200 * MIB, 1), (BATCH, 3)):
        config = job(grid=40, kernel_px=kernel_px, memory_mib=64)
        spec = spec_of(config)
        with pytest.raises(ConfigError, match=r"memory_mib 64 is too little: .*--set memory_mib=\d+, or") as raised:
            cut(config, spec, batch_bytes=batch_bytes, cores=4, share=share)
        enough = int(str(raised.value).partition("memory_mib=")[2].partition(",")[0])
        more, less = (config.model_copy(update={"memory_mib": enough + change}) for change in (0, -3))
        assert cut(more, spec, batch_bytes=batch_bytes, cores=4, share=share).bands
        with pytest.raises(ConfigError):
            cut(less, spec, batch_bytes=batch_bytes, cores=4, share=share)


# --- in a store -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, batches and the unit of memory so small that a tiny job is cut as a large one is."""
    monkeypatch.setattr(schema, "PSF_CHUNK_BYTES", 5000)
    monkeypatch.setattr(bands, "MIB", 320)
    monkeypatch.setattr(geometric, "BATCH_COPIES", 1)
    monkeypatch.setattr(bands, "TRACING_SHARE", 1.0)
    monkeypatch.setattr(bands, "WRITING_SHARE", 1.0)
    monkeypatch.setattr(geometric, "BATCH_BYTES", BATCH_OF_TWO)


CUT_JOB: dict[str, Any] = {"grid": 4, "depth": "1m,inf", "focus": "1m,2m,4m,inf"}


@pytest.mark.usefixtures("small_world")
@pytest.mark.parametrize(
    "changes",
    [
        {"tracer": "numba"},
        {"tracer": "torch"},
        pytest.param({"tracer": "deeplens"}, marks=pytest.mark.campaign),
        pytest.param({"tracer": "numba", "lens": "phone", "pitch_um": 4.0}, marks=pytest.mark.campaign),
        pytest.param({"tracer": "torch", "lens": "phone", "pitch_um": 4.0}, marks=pytest.mark.campaign),
        {"spp": None, "tolerance": 0.05},
        {"perturb": ({"element": 0, "tilt_deg": (0.2, 0.0)},)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_no_byte_depends_on_the_cut(tmp_path: Path, changes: dict[str, Any]) -> None:
    """One focus and one band at a time; one band; two; all: the same store, with or without shards."""
    whole = tiny(tmp_path / "whole.zarr", **CUT_JOB, **changes, memory_mib=10000)
    expected = render(whole)
    assert expected.spec.band_rows == 1
    assert len(shapes(whole)) == 1
    wanted = arrays(tmp_path / "whole.zarr")
    seen = set()
    for memory_mib in (120, 150, 220, 400):
        config = tiny(tmp_path / f"{memory_mib}.zarr", **CUT_JOB, **changes, memory_mib=memory_mib)
        seen |= shapes(config)
        for shard in ("1/2", "0/2") if memory_mib == 220 else (None,):
            render(config, shard=shard)
        assert arrays(tmp_path / f"{memory_mib}.zarr") == wanted
    assert seen == {(1, 1), (2, 1), (4, 1), (4, 2)}


def shapes(config: RenderConfig) -> set[tuple[int, int]]:
    """How many focus distances and bands at a time."""
    _, plan = load(config, "cpu")
    found = cut(config, plan.spec, batch_bytes=BATCH_OF_TWO, cores=1)
    return {(max(part.stop - part.start for part in found.focuses), len(group)) for group in found.bands}


@pytest.mark.campaign
def test_no_byte_depends_on_the_workers_that_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bands of 19 MB a focus distance, with tight memory and two workers against ample memory and one."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    large: dict[str, Any] = {"grid": 6, "kernel_px": 512, "bins": 15, "pitch_um": 1.0, "spp": 64}
    large |= {"focus": "1m,2m,4m,inf", "depth": "2m,inf", "wavelength": "0.5"}
    render(tiny(tmp_path / "ample.zarr", **large, memory_mib=2000))
    render(tiny(tmp_path / "tight.zarr", **large, memory_mib=500, workers=2))
    assert arrays(tmp_path / "tight.zarr") == arrays(tmp_path / "ample.zarr")


PEAK = r"""
import json, pathlib, re, sys
import deeplens
from psfgen.config import RenderConfig
from psfgen.render import render

def job(out, **changes):
    return RenderConfig(**{"depth": "2m", "device": "cpu", "workers": 1, "out": out, **changes})

def memory_mib(name):  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(name + r":\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

if __name__ == "__main__":
    folder, changes = sys.argv[1], json.loads(sys.argv[2])
    render(job(folder + "/warm.zarr", grid=2, spp=64))
    imports = memory_mib("VmRSS")
    render(job(folder + "/psfs.zarr", **changes))
    print(memory_mib("VmHWM") - imports)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "memory_mib"),
    [
        ({"grid": 48, "spp": 64}, 512),
        pytest.param({"grid": 9, "kernel_px": 256, "spp": 64}, 512, marks=pytest.mark.campaign),
        pytest.param({"grid": 32, "kernel_px": 32, "spp": 64, "focus": "1m,inf"}, 256, marks=pytest.mark.campaign),
    ],
)
def test_a_render_keeps_within_its_memory(tmp_path: Path, changes: dict[str, Any], memory_mib: int) -> None:
    """The peak of a process of its own, above what it holds once everything is imported and compiled."""
    arguments = json.dumps({**changes, "memory_mib": memory_mib})
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), arguments], capture_output=True, text=True, check=True
    )
    assert 5 < float(done.stdout) < memory_mib
