"""psfgen rechunk: the same numbers in other chunks, in bounded memory, and what is refused in one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from conftest import Psfgen, arrays, contents, fork, tiny, wait_for

from psfgen import copying
from psfgen.errors import ConfigError
from psfgen.rechunk import rechunk
from psfgen.render import render
from psfgen.store import open_store, schema
from psfgen.store.open import store_class
from psfgen.store.verify import problems

CHUNKS = {
    "field_y=2,field_x=2": {"field_x": 2, "field_y": 2},  # the last chunk of three points is half empty
    "focus=2,field_y=1,wavelength=1": {"field_y": 1, "focus": 2, "wavelength": 1},
    "field_x = 99": {"field_x": 3},
}
MIB = 2**20


@pytest.mark.parametrize("ending", ["zarr", "h5"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_the_same_numbers_in_other_chunks(
    finished: Path, tmp_path: Path, chunks: str, ending: str, psfgen: Psfgen
) -> None:
    out = tmp_path / f"other.{ending}"
    ran = psfgen("rechunk", finished, "--out", out, "--chunks", chunks)
    assert (ran.code, ran.out) == (0, f"{out}: 3 of 3 blocks written\n"), ran.err
    one, other = open_store(finished), open_store(out)
    assert other.attrs == {**one.attrs, "chunks": CHUNKS[chunks]}
    for name in (*one.spec.arrays, *one.coords):
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)
    for name in schema.BANDED:
        sizes = dict(zip(other.spec.dims(name), other.spec.chunks(name), strict=True))
        assert sizes.items() >= {**CHUNKS[chunks], "depth": 1}.items()
        if ending == "zarr":
            assert zarr.open_group(out, mode="r")[name].chunks == other.spec.chunks(name)  # type: ignore[union-attr]
    assert list(problems(other)) == []
    for block in one.blocks:
        source, entry = one.ledger.read(block), other.ledger.read(block)
        assert {**source, "chunks": entry["chunks"], "crc32c": entry["crc32c"]} == entry
    if ending == "zarr":
        with xarray.open_zarr(out) as dataset:
            np.testing.assert_array_equal(dataset["psf"].values, one.read("psf"))
    again = psfgen("rechunk", finished, "--out", out, "--chunks", chunks)
    assert (again.code, again.out) == (0, f"{out}: nothing to do\n")
    assert psfgen("show", out, "--out", tmp_path / "page.png").code == 0


def test_back_again_is_the_store_itself(finished: Path, tmp_path: Path) -> None:
    """Bands of all three rows, an own chunk for each focus of `psf`: as they were rendered."""
    there = rechunk(str(finished), str(tmp_path / "there.h5"), "field_y=2,wavelength=1")
    back = rechunk(there.path, str(tmp_path / "back.zarr"), "field_y=3,wavelength=2")
    kept = {name: data for name, data in arrays(finished).items() if "zarr.json" not in name}
    assert {name: data for name, data in arrays(Path(back.path)).items() if "zarr.json" not in name} == kept


def test_a_chunk_of_the_source_is_read_once(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = store_class("zarr").read
    monkeypatch.setattr(store_class("zarr"), "read", lambda s, name, **at: reads.append(name) or read(s, name, **at))
    rechunk(str(finished), str(tmp_path / "other.zarr"), "focus=2,field_y=1,field_x=1")
    assert reads.count("psf") == 3 * 2 + 3  # an empty read of the target tells the type of each block


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a process that rechunks 208 MiB of kernels with 64 MiB."""
    monkeypatch.setattr(copying, "MEMORY", 64 * MIB)
    monkeypatch.setattr(copying, "TILE", 8 * MIB)
    job = tiny(tmp_path / "large.zarr", grid=17, depth="2m", kernel_px=64, focus="1m:10m:15", wavelength="0.5,0.6,0.7")
    from conftest import lens

    from psfgen.plan import Plan
    from psfgen.render import attributes
    from psfgen.specimens import Specimens

    specimens = Specimens(lens("triplet"), Plan.of(job, lens("triplet")))
    spec = schema.StoreSpec(specimens.plan.coords, attributes(specimens, "cpu"))
    large = store_class("zarr").create(tmp_path / "large.zarr", spec)
    rng = np.random.default_rng(0)
    for name in spec.arrays:
        shape = spec.shape(name)
        for focus in range(15) if name == "psf" else [slice(0, 15)]:
            at = slice(focus, focus + 1) if isinstance(focus, int) else focus
            some = rng.integers(0, 4, shape[-1] * 2).astype(np.float32)  # cheap to compress
            size = [1 if name == "psf" and dim == "focus" else n for dim, n in zip(spec.dims(name), shape, strict=True)]
            large.write(0, name, np.resize(some, size), focus=at)
    large.commit(0, {"rays": 1, "seconds": 1.0})
    large.finalise()
    assert large.spec.shape("psf")[0] * 4 * np.prod(large.spec.chunks("psf")) > 200 * MIB

    def peak_mib() -> int:
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) // 1024

    def work() -> None:
        rechunk(str(tmp_path / "large.zarr"), str(tmp_path / "warm.zarr"), "field_y=17")  # imports and pools
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_mib()
        rechunk(str(tmp_path / "large.zarr"), str(tmp_path / "other.zarr"), "focus=15,field_y=1,field_x=2")
        (tmp_path / "peak").write_text(str(peak_mib() - before))

    assert wait_for(fork(work)) == 0
    assert int((tmp_path / "peak").read_text()) < 64
    one, other = open_store(tmp_path / "large.zarr"), open_store(tmp_path / "other.zarr")
    for focus in (0, 14):
        np.testing.assert_array_equal(one.read("psf", focus=focus), other.read("psf", focus=focus))


@pytest.mark.parametrize("file", ["psf/c/0/1/1/0/0/0/0", "ledger/depth-0001.json", "noise/c/0/2/0/0/0"])
def test_killed_and_resumed(finished: Path, tmp_path: Path, file: str, psfgen: Psfgen) -> None:
    out, chunks = tmp_path / "other.zarr", "field_y=2,focus=2"

    def work() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.rename" and str(args[1]) == str(out / file):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        rechunk(str(finished), str(out), chunks)

    assert wait_for(fork(work)) == -signal.SIGKILL
    assert open_store(out, allow_incomplete=True).missing() in ([1, 2], [2])
    with pytest.raises(ConfigError, match=r"other.zarr was rechunked and misses [12] blocks, which a render.*rechunk"):
        render(tiny(out))
    assert psfgen("rechunk", finished, "--out", out, "--chunks", chunks).code == 0
    assert arrays(out) == arrays(Path(rechunk(str(finished), str(tmp_path / "again.zarr"), chunks).path))
    assert render(tiny(out)).missing() == []


def test_a_corrupt_source_commits_nothing(store: Path, psfgen: Psfgen) -> None:
    chunk = store / "psf/c/1/1/0/0/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    ran = psfgen("rechunk", store, "--out", "other.h5", "--chunks", "field_y=1")
    assert (ran.code, ran.out) == (1, "")
    assert re.search(r"error: \S+: psf is corrupt [^\n]*psfgen verify [^\n]*\n$", ran.err), ran.err
    assert open_store("other.h5", allow_incomplete=True).missing() == [1, 2]


BAD = {
    "no size": ("field_y", r"--chunks field_y: write DIM=N\[,DIM=N\.\.\.\]"),
    "nothing": ("", "--chunks : write DIM=N"),
    "no number": ("field_y=x", "--chunks field_y=x: write DIM=N"),
    "zero": ("field_y=0", "--chunks field_y=0: write DIM=N"),
    "twice": ("field_y=1,field_y=2", "--chunks field_y=1,field_y=2: write DIM=N"),
    "a typo": ("fieldy=1", "--chunks fieldy=1: unknown dim 'fieldy'; did you mean 'field_y'"),
    "samples": ("kx=3", "--chunks kx=3: unknown dim 'kx'; .*known: focus, field_y, field_x, wavelength"),
    "a block": ("depth=2", "--chunks depth=2: depth keeps chunks of 1"),
    "a copy": ("copy=2", "--chunks copy=2: copy keeps chunks of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_chunks_are_one_line_and_touch_nothing(store: Path, tmp_path: Path, psfgen: Psfgen, name: str) -> None:
    chunks, message = BAD[name]
    before = contents(tmp_path)
    ran = psfgen("rechunk", store, "--out", "other.zarr", "--chunks", chunks)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ran.err), ran.err
    assert contents(tmp_path) == before


def test_chunks_that_memory_does_not_hold(store: Path, psfgen: Psfgen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "LARGEST_CHUNK", 2**13)
    ran = psfgen("rechunk", store, "--out", "other.zarr", "--chunks", "focus=2")
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: chunks of psf would hold 0 MiB[^\n]*smaller --chunks\n", ran.err)


def test_what_stands_at_the_target(store: Path, tmp_path: Path, psfgen: Psfgen) -> None:
    chunks = ("--chunks", "field_y=1")
    before = contents(store)
    onto = psfgen("rechunk", "psfs.zarr", "--out", store, *chunks, "--overwrite")
    assert (onto.code, contents(store) == before) == (2, True)
    shutil.copytree(store, tmp_path / "other.zarr")
    other = psfgen("rechunk", store, "--out", "other.zarr", *chunks)
    assert other.code == 2
    assert re.fullmatch(r"error: other\.zarr exists, but its chunks is None, [^\n]*--overwrite[^\n]*\n", other.err)
    assert psfgen("rechunk", store, "--out", "other.zarr", *chunks, "--overwrite").code == 0
    assert open_store("other.zarr").attrs["chunks"] == {"field_y": 1}
    (store / "ledger" / "depth-0001.json").unlink()
    assert psfgen("rechunk", store, "--out", "third.zarr", *chunks).code == 3
    assert psfgen("rechunk", "absent.zarr", "--out", "third.zarr", *chunks).code == 1
    assert not (tmp_path / "third.zarr").exists()
