"""Where kernels come from while a model trains: memory, a mapped file, or the chunks of the stores.

Legend: M examples of the catalogue, n of them, W wavelengths, y x bins.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import local

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.errors import FitError
from psfgen.store import Store
from psftrain import cache, room
from psftrain.config import DataConfig
from psftrain.data import Places
from psftrain.decode import Unit, decode, decode_into, workers
from psftrain.order import Order, Window

AHEAD = 2  # windows that a stream reads ahead: with one, its threads wait for the batches, then these for them
SPARE = 1.1  # times their size is needed on the disk
OTHERS = "--set data.mode=memmap or data.mode=stream"


class Source(ABC):
    """The kernels of a whole catalogue, by number. `why` says in words which mode was chosen, and by which size."""

    mode: str
    why: str
    device: torch.device

    @abstractmethod
    def rows(self, number: Tensor, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Kernels [n, W, y, x] and noise [n], on `device`, of examples by number [n], which lies on the CPU.

        `step`: they are the batch of this training step, or a part of it, in the order that `order` has given.
        """

    def order(self, train: Places, seed: int, batch: int) -> Order:
        """The order in which batches of `train` are to be asked for."""
        return Order(seed, len(train), batch)

    def close(self) -> None:
        """Let go of what is held, and stop reading ahead."""
        return None


class _Gathered(Source):
    """Kernels [M, W, y, x] and noise [M] as tensors."""

    kernels: Tensor
    noise: Tensor

    def rows(self, number: Tensor, step: int | None = None) -> tuple[Tensor, Tensor]:
        number = number.to(self.device, non_blocking=True)
        return self.kernels.index_select(0, number), self.noise.index_select(0, number)

    def close(self) -> None:
        del self.kernels, self.noise


class Resident(_Gathered):
    """Kernels decoded once into memory."""

    mode = "resident"

    def __init__(self, stores: Sequence[Store], places: Places, device: torch.device) -> None:
        self.device = device
        shape = (len(places), *places.shape)
        self.kernels = _memory(shape) if device.type == "cpu" else torch.empty(shape, device=device)
        self.noise = torch.empty(len(places), device=device)
        decode_into(stores, places.array, places.units, self.kernels, self.noise)


class Memmap(_Gathered):
    """Kernels decoded once into a file, which processes share."""

    mode = "memmap"

    def __init__(self, stores: Sequence[Store], places: Places, folder: Path) -> None:
        self.device = torch.device("cpu")
        self.kernels, self.noise = cache.decoded(stores, places, folder)


@dataclass
class _Held:
    """A window in memory: the kernels of its units, one unit after the other, on the device they are served on.

    Example i of the order in which they are served has the number `number[i]` and lies in row `row[i]`. `buffer` is the
    memory that was decoded into.
    """

    first: int
    stop: int
    number: Tensor
    row: Tensor
    kernels: Tensor
    noise: Tensor
    buffer: Tensor


class Stream(Source):
    """Kernels decoded window by window, in threads that stay two windows ahead.

    A window is as many whole chunks as fill `buffer_bytes`; three are in memory. Chunks are decoded in place, batches
    gathered from them: one copy less than to shuffle a window. Every process of a run decodes every window:
    where they have a disk with room, a mapped file is decoded once for all.
    """

    mode = "stream"

    def __init__(self, stores: Sequence[Store], places: Places, device: torch.device, buffer_bytes: int) -> None:
        self.stores, self.places, self.device = stores, places, device
        self.window = max(1, buffer_bytes // (size_bytes(places) // len(places)))
        self._starts = np.array([unit.start for unit in places.units])
        self._largest = max(len(unit.lit) for unit in places.units)
        self._pool = ThreadPoolExecutor(max(1, workers() - 1))  # one core is for the batches
        self._of_thread = local()
        self._buffers: list[Tensor] = []
        self._held: list[_Held] = []
        self._ahead: deque[tuple[_Held, list[Future[None]]]] = deque()
        self._at = torch.full((len(places),), -1)  # where in the endless sequence an example was last put
        self._share = 0  # where in a batch the part begins that this process asks for
        self._last: tuple[int, Tensor, Tensor] | None = None

    def order(self, train: Places, seed: int, batch: int) -> Order:
        self._abandon()
        self._held, self._buffers = [], []
        self._train, parts = train, train.parts()
        self._units = [unit for unit, _, _ in parts]
        self._order = Order(seed, len(train), batch, [span for _, *span in parts], max(batch, self.window))
        return self._order

    def rows(self, number: Tensor, step: int | None = None) -> tuple[Tensor, Tensor]:
        if step is None:
            return self._decoded_now(number)
        self._hold(self._order.windows(step))
        held, length = self._held[0], len(number)
        at = step * self._order.size + self._share
        if not torch.equal(held.number[at - held.first : at - held.first + length], number):
            at = int(self._at[number[0]])
            self._share = at - step * self._order.size
        part = slice(at - held.first, at - held.first + length)
        if held.first <= at and torch.equal(held.number[part], number):
            row = held.row[part]
            return held.kernels.index_select(0, row), held.noise.index_select(0, row)
        return self._from_windows(number)

    def close(self) -> None:
        self._abandon()
        self._pool.shutdown()
        self._held, self._buffers, self._last = [], [], None

    def _from_windows(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """A batch that lies in several windows."""
        kernels = torch.empty(len(number), *self.places.shape, device=self.device)
        noise, at = torch.empty(len(number), device=self.device), self._at[number]
        for held in self._held:
            here = ((at >= held.first) & (at < held.stop)).nonzero().flatten()
            into, row = here.to(self.device), held.row[(at[here] - held.first).to(self.device)]
            kernels[into], noise[into] = held.kernels[row], held.noise[row]
        return kernels, noise

    def _decoded_now(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Any examples, unit by unit; the last unit is kept, since the next ones asked for are often of it."""
        kernels, noise = torch.empty(len(number), *self.places.shape), torch.empty(len(number))
        of_unit = np.searchsorted(self._starts, number.numpy(), side="right") - 1
        for unit in np.unique(of_unit).tolist():
            if self._last is None or self._last[0] != unit:
                found = decode(self.stores, self.places.array, self.places.units[unit])
                self._last = (unit, *map(torch.from_numpy, found))
            here = torch.from_numpy(np.flatnonzero(of_unit == unit))
            rows = number[here] - self.places.units[unit].start
            kernels[here], noise[here] = self._last[1][rows], self._last[2][rows]
        return kernels.to(self.device), noise.to(self.device)

    def _hold(self, windows: list[Window]) -> None:
        """Hold exactly these windows, and begin with those after them."""
        wanted = [window.first for window in windows]
        if [held.first for held in self._held] == wanted:
            return
        kept = {held.first: held for held in self._held if held.first in wanted}
        self._buffers += [held.buffer for held in self._held if held.first not in kept]
        self._held = []
        for window in windows:
            self._held.append(kept.get(window.first) or self._landed(window))
        while len(self._held) + len(self._ahead) <= AHEAD:
            last = self._ahead[-1][0] if self._ahead else self._held[-1]
            self._ahead.append(self._begun(self._order.window_at(last.stop)))

    def _begun(self, window: Window) -> tuple[_Held, list[Future[None]]]:
        """A window that the threads fill."""
        length = len(window.order)
        if not self._buffers:
            shape = (min(len(self._train), self._order.least + self._largest), *self.places.shape)
            pinned = self.device.type == "cuda"
            self._buffers.append(torch.empty(shape, pin_memory=True) if pinned else _memory(shape))
        buffer = self._buffers.pop()
        number, kernels, noise = self._train.number[window.order], buffer[:length], torch.empty(length)
        futures, at = [], 0
        for unit in window.units:
            start, stop = self._order.units[unit]
            into = slice(at, at := at + stop - start)
            futures.append(
                self._pool.submit(self._fill, self._units[unit], start, stop, kernels[into].numpy(), noise[into])
            )
        return _Held(window.first, window.stop, number, window.permutation, kernels, noise, buffer), futures

    def _fill(self, unit: Unit, start: int, stop: int, kernels: NDArray[np.float32], noise: Tensor) -> None:
        """Decode the training examples `start` to `stop`, which are those of a unit."""
        if stop - start == len(unit.lit):
            noise[:] = torch.from_numpy(decode(self.stores, self.places.array, unit, kernels)[1])
            return
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = np.empty((self._largest, *self.places.shape), np.float32)
        found, relative = decode(self.stores, self.places.array, unit, self._of_thread.scratch)
        rows = (self._train.number[start:stop] - unit.start).numpy()
        np.take(found, rows, axis=0, out=kernels, mode="clip")
        noise[:] = torch.from_numpy(relative[rows])

    def _landed(self, window: Window) -> _Held:
        """A window once it is full."""
        if not self._ahead or self._ahead[0][0].first != window.first:
            self._abandon()
            self._ahead.append(self._begun(window))
        held, futures = self._ahead[0]
        for future in futures:
            future.result()
        self._ahead.popleft()
        self._at[held.number] = torch.arange(held.first, held.stop)
        held.kernels, held.noise, held.row = (x.to(self.device) for x in (held.kernels, held.noise, held.row))
        return held

    def _abandon(self) -> None:
        """Give up the windows that were begun."""
        for _, futures in self._ahead:
            for future in futures:
                future.cancel()
        for held, futures in self._ahead:
            wait(futures)
            self._buffers.append(held.buffer)
        self._ahead.clear()


def _memory(shape: tuple[int, ...]) -> Tensor:
    """Memory by way of numpy, which asks for huge pages: random rows are found a third faster in them."""
    return torch.from_numpy(np.empty(shape, np.float32))


def size_bytes(places: Places) -> int:
    """Bytes that a catalogue takes in memory, decoded."""
    return 4 * len(places) * (1 + math.prod(places.shape))


def chosen_mode(stores: Sequence[Store], places: Places, config: DataConfig, device: torch.device) -> str:
    """`data.mode`, and for `auto` what the size asks for.

    On the GPU or in memory if that leaves half of what is free there, else in a file if the disk has the room, else a
    stream. What is free may change: processes that must agree let one of them choose.
    """
    if config.mode != "auto":
        return config.mode
    if _fits_gpu(places, device) or 2 * size_bytes(places) <= room.memory_bytes():
        return "resident"
    return "memmap" if _fits_disk(stores, places, cache.folder_of(config.cache)) else "stream"


def open_source(stores: Sequence[Store], places: Places, config: DataConfig, device: torch.device) -> Source:
    """The source of a whole catalogue in its `chosen_mode`. Raises FitError where there is no room for that."""
    mode, folder = chosen_mode(stores, places, config, device), cache.folder_of(config.cache)
    memory, told = room.memory_bytes(), f"{room.text(size_bytes(places))} of kernels"
    source: Source
    if mode == "resident":
        where = device if _fits_gpu(places, device) else torch.device("cpu")
        if where.type == "cpu" and size_bytes(places) > memory:
            raise FitError(f"data.mode resident: {told} do not fit in {room.text(memory)} of memory; {OTHERS}")
        source = Resident(stores, places, where)
        source.why = f"resident on {where}: {told}"
    elif mode == "memmap":
        if not _fits_disk(stores, places, folder):
            left = room.text(room.disk_bytes(folder))
            raise FitError(f"data.mode memmap: {told} do not fit on the disk of {folder} ({left} free); {cache.ADVICE}")
        source = Memmap(stores, places, folder)
        source.why = f"memmap in {folder}: {told}, {room.text(memory)} of memory free"
    else:
        source = Stream(stores, places, device, config.buffer_mib * 2**20)
        source.why = f"stream, windows of {source.window:,} examples: {told}, {room.text(memory)} of memory free"
    return source


def _fits_gpu(places: Places, device: torch.device) -> bool:
    return device.type == "cuda" and 2 * size_bytes(places) <= room.gpu_bytes(device)


def _fits_disk(stores: Sequence[Store], places: Places, folder: Path) -> bool:
    if cache.entry(stores, places.array, folder).exists():
        return True
    return SPARE * size_bytes(places) <= room.disk_bytes(folder)
