"""Kernels from memory, from a file and from a stream are the same, to the last bit."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training import best, equal_states, job, logged, make_store, one_line_error, psftrain, words

from psfgen.errors import FitError, StoreCorrupt, StoreIncomplete
from psfgen.store import open_store
from psftrain import room
from psftrain.conditioning import conditioning_of
from psftrain.config import DataConfig
from psftrain.data import catalogue, open_stores, read_examples, withhold
from psftrain.fit import fit
from psftrain.sources import Source, Stream, chosen_mode, open_source, size_bytes

Array = NDArray[Any]
CPU = torch.device("cpu")
MODES = ("resident", "memmap", "stream")
FORMATS = ("zarr", "h5")
DARK = (np.s_[1, 0, 0, 3, 1], np.s_[0, 2, 2, 2, :], np.s_[:, 1, ...])  # of the second depth nothing is left
RICH: dict[str, Any] = {"grid": 5, "depth": (500.0, 1000.0, 2000.0, math.inf), "focus": (800.0, 2000.0), "dark": DARK}
STORES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one": ([RICH], "psf_binned"),
    "full size": ([RICH], "psf"),
    "several": ([RICH, {"grid": 3, "depth": (700.0,)}, {"grid": 4, "lens_text": "{}"}], "psf_binned"),
    "copies": ([{**RICH, "copies": 3}, {"grid": 3}], "psf_binned"),
    "chunks over focus": ([{**RICH, "chunks": {"focus": 2, "field_y": 2}}], "psf"),
    "chunks within a row": ([{**RICH, "chunks": {"focus": 1, "field_x": 3}}], "psf_binned"),
    "chunks of one": ([{"grid": 3, "chunks": {"field_y": 1, "field_x": 1}}], "psf"),
}


def made(folder: Path, settings: list[dict[str, Any]], ending: str) -> list[str]:
    paths = [folder / f"{number}.{ending}" for number in range(len(settings))]
    return [str(path if path.exists() else make_store(path, **one)) for path, one in zip(paths, settings, strict=True)]


class Opened:
    """Stores opened in one mode; a stream holds a few units at a time."""

    def __init__(self, paths: list[str], array: str, mode: str, cache: Path, window: int = 30) -> None:
        self.stores = open_stores(paths, array)
        conditioning = conditioning_of(self.stores)
        self.places = catalogue(self.stores, conditioning, array)
        self.expected = read_examples(self.stores, conditioning, array)
        config = DataConfig.model_validate({"mode": mode, "cache": str(cache), "array": array})
        self.source: Source = open_source(self.stores, self.places, config, CPU)
        assert self.source.mode == mode
        if isinstance(self.source, Stream):
            self.source.window = window

    def same(self, number: torch.Tensor, step: int | None = None) -> bool:
        kernels, noise = self.source.rows(number, step)
        return torch.equal(kernels, self.expected.kernels[number]) and torch.equal(noise, self.expected.noise[number])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMATS)
def ending(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=STORES)
def opened(request: pytest.FixtureRequest, folder: Path, mode: str, ending: str) -> Iterator[Opened]:
    settings, array = STORES[request.param]
    (folder / request.param).mkdir(exist_ok=True)
    found = Opened(made(folder / request.param, settings, ending), array, mode, folder / f"cache-{ending}")
    yield found
    found.source.close()


# --- the same in every mode -------------------------------------------------------------------------------------------


def test_any_examples_in_any_order(opened: Opened) -> None:
    """Numbers may come twice; kernels are those of their place in the store."""
    total = len(opened.places)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 7, total):
        assert opened.same(torch.randint(total, (count,), generator=generator))
    assert opened.same(torch.arange(total))
    kernels, _ = opened.source.rows(torch.arange(total))
    for kernel, (store, copy, focus, depth, row, column) in zip(kernels, opened.places.index, strict=True):
        of_copy = {"copy": copy} if "copy" in opened.stores[store].coords else {}
        at = {"focus": focus, "depth": depth, "field_y": row, "field_x": column}
        assert np.array_equal(kernel, opened.stores[store].read(opened.places.array, **of_copy, **at))


def test_batches_of_epochs(opened: Opened) -> None:
    """Every example once an epoch, in batches that run over from window to window and from epoch to epoch."""
    order = opened.source.order(opened.places, 3, 7)
    total = len(opened.places)
    seen = []
    for step in range(3 * total // 7 + 2):
        seen.append(opened.places.number[order.batch(step)])
        assert opened.same(seen[-1], step)
        if step % 10 == 3:
            assert opened.same(torch.arange(0, total, 5)), "pictures in between"
    for epoch in range(3):
        assert sorted(torch.cat(seen)[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))


def test_a_run_goes_on_anywhere_with_its_share(opened: Opened) -> None:
    """Backwards too; a process asks for its part of the batch alone."""
    order = opened.source.order(opened.places, 0, 8)
    for step in (40, 41, 5, 6, 7, 300, 0):
        for part in (slice(0, 4), slice(4, 8)):
            assert opened.same(opened.places.number[order.batch(step)[part]], step)


def test_another_order_may_be_asked_for(folder: Path, mode: str) -> None:
    """Of other examples, in batches of another size."""
    (folder / "one").mkdir(exist_ok=True)
    opened = Opened(made(folder / "one", [RICH], "zarr"), "psf", mode, folder / "cache-zarr")
    half = opened.places.select(np.arange(len(opened.places)) % 2 == 0)
    for places, batch in ((half, 5), (opened.places, 60), (half, 3)):
        order = opened.source.order(places, 0, batch)
        for step in range(30):
            assert opened.same(places.number[order.batch(step)], step)
    opened.source.close()


def test_what_is_withheld_is_never_served_in_training(folder: Path, mode: str, ending: str) -> None:
    """But can be asked for."""
    (folder / "withheld").mkdir(exist_ok=True)
    opened = Opened(made(folder / "withheld", [{**RICH, "grid": 6}], ending), "psf_binned", mode, folder / "cache")
    train, val, _ = withhold(opened.places, DataConfig(val=0.2, val_depth=1), 0)
    assert val is not None
    order = opened.source.order(train, 0, 9)
    for step in range(40):
        number = train.number[order.batch(step)]
        assert not set(number.tolist()) & set(val.number.tolist())
        assert opened.same(number, step)
    assert opened.same(val.number)
    opened.source.close()


def test_a_batch_may_be_larger_than_a_window(folder: Path) -> None:
    (folder / "one").mkdir(exist_ok=True)
    opened = Opened(made(folder / "one", [RICH], "zarr"), "psf", "stream", folder / "cache", window=1)
    order = opened.source.order(opened.places, 0, 100)
    for step in range(6):
        assert opened.same(opened.places.number[order.batch(step)], step)
    opened.source.close()


# --- what is wrong is told --------------------------------------------------------------------------------------------


def spoilt(array: str, values: Array, name: str) -> None:
    if name == array:
        values[0, 0, 2, 2, 0] = np.nan


@pytest.mark.parametrize("array", ["psf_binned", "psf", "noise", "noise_binned"])
def test_nan_where_light_arrives_is_found_when_it_is_decoded(
    tmp_path: Path, mode: str, ending: str, array: str
) -> None:
    """Before the first step, or within the first epoch."""
    paths = made(tmp_path, [{"grid": 5, "change": lambda name, values: spoilt(array, values, name)}], ending)
    stores = open_stores(paths, "psf" if array in ("psf", "noise") else "psf_binned")
    of = "psf" if array in ("psf", "noise") else "psf_binned"
    places = catalogue(stores, conditioning_of(stores), of)

    def epoch() -> None:
        source = open_source(stores, places, DataConfig.model_validate({"mode": mode, "cache": str(tmp_path)}), CPU)
        order = source.order(places, 0, 5)
        for step in range(5):
            source.rows(places.number[order.batch(step)], step)

    with pytest.raises(StoreCorrupt, match=rf"0\.{ending} has NaN where light arrives"):
        epoch()
    assert not list(tmp_path.glob("*/kernels.npy")), "nothing is kept"


@pytest.mark.parametrize("fault", ["corrupt", "missing"])
def test_a_faulty_chunk_is_found(tmp_path: Path, mode: str, fault: str) -> None:
    (path,) = made(tmp_path, [{"grid": 5}], "zarr")
    chunk = next(file for file in sorted((Path(path) / "psf_binned/c").rglob("*")) if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    if fault == "missing":
        chunk.unlink()
    stores = open_stores([path], "psf_binned")
    places = catalogue(stores, conditioning_of(stores), "psf_binned")
    config = DataConfig.model_validate({"mode": mode, "cache": str(tmp_path)})
    expected, message = {
        "corrupt": (StoreCorrupt, r"0\.zarr: psf_binned is corrupt"),
        "missing": (StoreIncomplete, r"0\.zarr: psf_binned has missing chunks"),
    }[fault]
    with pytest.raises(expected, match=message):
        open_source(stores, places, config, CPU).rows(places.number)


# --- which mode -------------------------------------------------------------------------------------------------------


def chosen(path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, disk: float, **config: Any) -> Source:
    """The source where memory and disk hold so many times the kernels."""
    stores = [open_store(path)]
    places = catalogue(stores, conditioning_of(stores), "psf_binned")
    monkeypatch.setattr(room, "memory_bytes", lambda: int(memory * size_bytes(places)))
    monkeypatch.setattr(room, "disk_bytes", lambda folder: int(disk * size_bytes(places)))
    source = open_source(stores, places, DataConfig.model_validate(config), CPU)
    source.close()
    assert source.mode == chosen_mode(stores, places, DataConfig.model_validate(config), CPU)
    return source


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [(2.01, 0, "resident"), (1.9, 1.11, "memmap"), (1.9, 1.09, "stream"), (0.1, 9, "memmap"), (0.1, 0.5, "stream")],
)
def test_the_size_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, disk: float, expected: str
) -> None:
    """Half of the memory, else a file, else a stream; and the choice is told with the sizes."""
    path = make_store(tmp_path / "s.zarr", grid=5)
    source = chosen(path, monkeypatch, memory, disk, cache=str(tmp_path / "cache"))
    assert source.mode == expected
    assert source.why.startswith(expected)
    assert "iB of kernels" in source.why


def test_a_file_that_is_there_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path / "s.zarr", grid=5)
    for disk in (2, 0):
        assert chosen(path, monkeypatch, 0.1, disk, cache=str(tmp_path / "cache")).mode == "memmap"


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_is_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    path = make_store(tmp_path / "s.zarr", grid=5)
    assert chosen(path, monkeypatch, 1.1, 1.2, cache=str(tmp_path / "cache"), mode=mode).mode == mode


def test_a_mode_that_has_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path / "s.zarr", grid=5)
    with pytest.raises(FitError, match=r"data.mode resident: .* do not fit in .* of memory; .*data.mode=stream"):
        chosen(path, monkeypatch, 0.9, 9, mode="resident")
    with pytest.raises(FitError, match=r"data.mode memmap: .* do not fit on the disk of \S*nowhere .*data.mode=stream"):
        chosen(path, monkeypatch, 9, 1.05, mode="memmap", cache=str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    """The tightest of the groups above counts, less what they use, files that could be dropped aside."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    groups = {"job/step": ("max", 50), "job": ("1000", 700), "": ("5000", 900)}
    for name, (limit, usage) in groups.items():
        group = tmp_path / "sys/fs/cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{usage}\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 30\n")
    assert list(room._cgroup_bytes(tmp_path)) == [330, 4130]
    (tmp_path / "proc/self/cgroup").write_text("9:cpu:/x\n4:memory:/slurm\n")
    group = tmp_path / "sys/fs/cgroup/memory/slurm"
    group.mkdir(parents=True)
    for name, value in {"memory.limit_in_bytes": 400, "memory.usage_in_bytes": 100}.items():
        (group / name).write_text(str(value))
    (group / "memory.stat").write_text("total_inactive_file 7\n")
    assert list(room._cgroup_bytes(tmp_path)) == [307]
    assert list(room._cgroup_bytes(tmp_path / "elsewhere")) == []


def test_processes_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = room.memory_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert room.memory_bytes() < alone / 4


def test_a_stream_holds_no_more_than_its_buffers(folder: Path) -> None:
    """Three windows, in memory that is used again and again."""
    (folder / "one").mkdir(exist_ok=True)
    opened = Opened(made(folder / "one", [RICH], "zarr"), "psf", "stream", folder / "cache", window=20)
    order = opened.source.order(opened.places, 0, 4)
    held = set()
    for step in range(150):
        opened.same(opened.places.number[order.batch(step)], step)
        assert isinstance(opened.source, Stream)
        held |= {window.buffer.data_ptr() for window in opened.source._held}
    opened.source.close()
    assert len(held) == 3


def test_a_batch_that_is_kept_does_not_change(folder: Path) -> None:
    (folder / "one").mkdir(exist_ok=True)
    opened = Opened(made(folder / "one", [RICH], "zarr"), "psf", "stream", folder / "cache", window=20)
    order = opened.source.order(opened.places, 0, 4)
    number = opened.places.number[order.batch(0)]
    kept, _ = opened.source.rows(number, 0)
    for step in range(1, 100):
        opened.source.rows(opened.places.number[order.batch(step)], step)
    assert torch.equal(kept, opened.expected.kernels[number])
    opened.source.close()


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["psf_binned", "psf"])
def test_a_run_is_the_same_from_memory_and_from_a_file(folder: Path, tmp_path: Path, array: str) -> None:
    """To the last bit: weights and every logged number."""
    (folder / "several").mkdir(exist_ok=True)
    paths = list(map(Path, made(folder / "several", STORES["several"][0], "zarr")))
    settings: dict[str, Any] = {"data__array": array, "data__cache": str(tmp_path / "cache"), "data__val": 0.2}
    for mode in ("resident", "memmap"):
        fit(job(paths, tmp_path / mode, data__mode=mode, **settings))
    assert logged(tmp_path / "resident") == logged(tmp_path / "memmap")
    assert equal_states(*(best(tmp_path / mode)["model"] for mode in ("resident", "memmap")))


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(folder: Path, tmp_path: Path, mode: str) -> None:
    """Whatever was read ahead."""
    (folder / "copies").mkdir(exist_ok=True)
    paths = list(map(Path, made(folder / "copies", STORES["copies"][0], "zarr")))
    settings: dict[str, Any] = {"data__mode": mode, "data__cache": str(tmp_path / "cache"), "data__buffer_mib": 1}
    fit(job(paths, tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("step-00000010.pt", "step-00000012.pt", "best.pt"):
        (tmp_path / "cut/checkpoints" / name).unlink()
    fit(job(paths, tmp_path / "cut", **settings))
    assert equal_states(*(best(tmp_path / run)["model"] for run in ("whole", "cut")))


@pytest.mark.parametrize("mode", MODES)
def test_bad_kernels_end_a_run_with_one_line(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "s.zarr", grid=4, change=lambda name, values: spoilt("psf_binned", values, name))
    ran = psftrain("fit", *words(path, tmp_path / "run", data__mode=mode, data__cache=str(tmp_path / "cache")))
    assert ran.code == 1
    assert re.search(r"s\.zarr has NaN where light arrives; `psfgen verify \S+` shows what", one_line_error(ran))
