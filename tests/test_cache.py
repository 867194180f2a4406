"""Decoded files: made once whoever asks, never half made, never those of another store."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Disk, fork, poll, wait_for
from training import make_store

from psfgen.errors import FitError
from psfgen.store import open_store
from psftrain import cache
from psftrain.conditioning import conditioning_of
from psftrain.data import Places, catalogue, read_examples


def opened(path: Path, array: str = "psf_binned") -> tuple[list[Any], Places]:
    stores = [open_store(path)]
    return stores, catalogue(stores, conditioning_of(stores), array)


def decoded(path: Path, folder: Path, array: str = "psf_binned") -> bool:
    """Whether what the cache gives is what the store holds."""
    stores, places = opened(path, array)
    expected = read_examples(stores, conditioning_of(stores), array)
    kernels, noise = cache.decoded(stores, places, folder)
    return torch.equal(kernels, expected.kernels) and torch.equal(noise, expected.noise)


def entries(folder: Path) -> list[str]:
    """What lies in the cache, locks aside."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dark = [np.s_[0, 1, 2, 2, 0]]
    return make_store(tmp_path_factory.mktemp("cache") / "s.zarr", grid=5, depth=(500.0, 1000.0, 2000.0), dark=dark)


class Slow:
    """Decoding waits after its first unit until `go` exists; then, or before, `made` tells who decodes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._decode = folder, cache.decode_into

    def __call__(self, *args: Any) -> None:
        (self.folder / f"made-{os.getpid()}").touch()
        poll(lambda: (self.folder / "go").exists())
        self._decode(*args)

    def builders(self) -> list[Path]:
        return list(self.folder.glob("made-*"))


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow(tmp_path)
    monkeypatch.setattr(cache, "decode_into", made)
    return made


def test_it_is_decoded_once(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then mapped; a change to what is mapped stays in memory."""
    assert decoded(store, tmp_path)
    before = entries(tmp_path)
    assert len(before) == 1
    monkeypatch.setattr(cache, "decode_into", lambda *args: pytest.fail("decoded again"))
    kernels, _ = cache.decoded(*opened(store), tmp_path)
    kernels.zero_()
    kernels, _ = cache.decoded(*opened(store), tmp_path)
    assert float(kernels.sum()) > 0
    assert entries(tmp_path) == before


def test_each_array_and_each_list_of_stores_has_its_own(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "t.zarr", grid=3)
    one, two = open_store(store), open_store(other)
    keys = {
        cache.entry(stores, array, tmp_path)
        for stores in ([one], [two], [one, two], [two, one])
        for array in ("psf", "psf_binned")
    }
    assert len(keys) == 8
    shutil.copytree(store, tmp_path / "elsewhere.zarr")
    moved = open_store(tmp_path / "elsewhere.zarr")
    assert cache.entry([moved], "psf", tmp_path) == cache.entry([one], "psf", tmp_path), "what it holds counts"


@pytest.mark.parametrize("ending", ["zarr", "h5"])
def test_a_store_that_was_rendered_again_is_another(tmp_path: Path, ending: str) -> None:
    """Though its plan is the same."""
    path, folder = tmp_path / f"s.{ending}", tmp_path / "cache"
    make_store(path, grid=4)
    assert decoded(path, folder)
    plan = open_store(path).attrs["plan_sha256"]
    shutil.rmtree(path if ending == "zarr" else f"{path}.d")
    if ending == "h5":
        path.unlink()

    def other(name: str, values: np.ndarray) -> None:
        if name == "psf_binned":
            values[:] = values[..., ::-1]

    make_store(path, grid=4, change=other)
    assert open_store(path).attrs["plan_sha256"] == plan
    assert decoded(path, folder)
    assert len(entries(folder)) == 2


def test_of_several_processes_one_decodes_and_the_others_wait(store: Path, slow: Slow, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    pids = [fork(lambda: assert_true(decoded_by_cache(store, folder))) for _ in range(4)]
    poll(slow.builders)
    time.sleep(0.3)  # for a second builder to show itself
    assert len(slow.builders()) == 1
    assert entries(folder)[0].startswith("."), "nothing is there before it is whole"
    (tmp_path / "go").touch()
    assert [wait_for(pid) for pid in pids] == [0] * 4
    assert len(slow.builders()) == 1
    assert len(entries(folder)) == 1


def assert_true(value: bool) -> None:
    assert value


def decoded_by_cache(path: Path, folder: Path) -> bool:
    stores, places = opened(path)
    kernels, noise = cache.decoded(stores, places, folder)
    return bool(kernels.isfinite().all() and len(kernels) == len(noise) == len(places) == 74)


@pytest.mark.parametrize("same", [True, False])
def test_what_a_killed_process_left_is_swept_away(store: Path, slow: Slow, tmp_path: Path, same: bool) -> None:
    """By the next that decodes, be it another store."""
    folder = tmp_path / "cache"
    pid = fork(lambda: decoded_by_cache(store, folder) and None)
    poll(slow.builders)
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    (left,) = entries(folder)
    assert left.endswith(".tmp")
    (tmp_path / "go").touch()
    assert decoded(store if same else make_store(tmp_path / "t.zarr", grid=3), folder)
    (made,) = entries(folder)
    assert not made.startswith(".")


def test_what_others_are_making_is_left_alone(store: Path, slow: Slow, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    pid = fork(lambda: assert_true(decoded_by_cache(store, folder)))
    poll(slow.builders)
    other = make_store(tmp_path / "t.zarr", grid=3)
    slow.folder = tmp_path / "other"
    slow.folder.mkdir()
    (slow.folder / "go").touch()
    assert decoded(other, folder)
    (tmp_path / "go").touch()
    assert wait_for(pid) == 0
    assert len(entries(folder)) == 2


# --- where it cannot be kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [40, 60])
def test_a_full_disk_is_told_and_nothing_is_left(store: Path, disk: Disk, kib: int) -> None:
    """74 kernels of 3 x 10 x 10 take 87 KiB."""
    disk.remount(f"size={kib}k")
    folder = disk.path / "cache"
    with pytest.raises(FitError, match=r"cannot be kept in \S*cache: No space left on device; .*data\.mode=stream"):
        cache.decoded(*opened(store, "psf"), folder)
    assert entries(folder) == []


def test_a_folder_that_cannot_be_made_is_told(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FitError, match=r"cannot be kept in \S*file/cache: .*--set data\.cache=FOLDER"):
        cache.decoded(*opened(store), tmp_path / "file" / "cache")


def test_an_entry_that_was_cut_off_is_told(store: Path, tmp_path: Path) -> None:
    assert decoded(store, tmp_path)
    (entry,) = entries(tmp_path)
    kernels = tmp_path / entry / "kernels.npy"
    os.truncate(kernels, kernels.stat().st_size // 2)
    with pytest.raises(FitError, match=rf"{entry} cannot be read .*delete that folder"):
        cache.decoded(*opened(store), tmp_path)


def test_the_folder_is_the_one_given_else_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.folder_of("x/y") == Path("x/y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder_of(None) == tmp_path / "psftrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder_of(None) == tmp_path / "home/.cache/psftrain"
    assert re.fullmatch(r"[0-9a-f]{32}", cache.entry([], "psf", tmp_path).name)


@pytest.mark.parametrize("file", ["kernels.npy", "noise.npy"])
@pytest.mark.parametrize("spoilt", ["empty", "of other examples"])
def test_an_entry_that_is_not_of_these_examples_is_told(store: Path, tmp_path: Path, file: str, spoilt: str) -> None:
    assert decoded(store, tmp_path)
    (entry,) = entries(tmp_path)
    if spoilt == "empty":
        (tmp_path / entry / file).write_bytes(b"")
    else:
        np.save(tmp_path / entry / file, np.zeros(3, np.float32))
    with pytest.raises(FitError, match=rf"{entry} cannot be read .*delete that folder"):
        cache.decoded(*opened(store), tmp_path)
