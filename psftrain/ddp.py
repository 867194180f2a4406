"""Several processes that train one model: who is who, and what all of them agree on. One process is a group of one.

`torchrun` says through the environment how many there are. Tensors are reduced by NCCL on GPUs and by gloo on CPUs.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from psfgen.errors import ConfigError, FitError, PsfError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # one process may decode a large store while the others wait
AGREE_EVERY_S = 1.0


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` as the device that is here, one GPU a process. Raises ConfigError for a GPU that is not."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name} is unknown; known: cpu, cuda, cuda:1, auto") from None
    if device.type == "cuda":
        number = local_rank if device.index is None else device.index
        if number >= count:
            raise ConfigError(f"device cuda:{number} is not here ({count} GPUs found); use device cpu")
        device = torch.device("cuda", number)
    return device


@dataclass
class Ranks:
    """This process among those that train together: number `rank` of `world`, on `device`."""

    rank: int
    world: int
    device: torch.device
    _next_look: int = field(default=0, init=False)
    _last_look: tuple[int, float] = field(default=(0, 0.0), init=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's equal part of `count` things."""
        part = count // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, without a gradient."""
        if self.world == 1:
            return values.detach()
        total = values.detach().clone()
        distributed.all_reduce(total)
        return total / self.world

    def least(self, values: Tensor) -> Tensor:
        """The smallest over all processes."""
        if self.world == 1:
            return values
        found = values.clone()
        distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
        return found

    def from_first(self, do: Callable[[], T]) -> T:
        """What `do` gives in the first process alone, for every process; so is the PsfError that it raises."""
        if self.world == 1:
            return do()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = do()
            except PsfError as error:
                box[1] = error
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            raise cast(PsfError, box[1])
        return cast(T, box[0])

    def agree_to_stop(self, step: int, stopped: list[str]) -> str | None:
        """The name of a signal that any process has caught, in all of them after the same step.

        They ask each other about once a second, so that it costs nothing; a process alone knows at once.
        """
        if self.world == 1:
            return stopped[0] if stopped else None
        if step < self._next_look:
            return None
        now, (last, then) = time.monotonic(), self._last_look
        pace = (now - then) / (step - last) if then and step > last else AGREE_EVERY_S
        mine = (stopped[0] if stopped else None, pace)
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, mine)
        slowest = max(pace for _, pace in found)
        self._last_look, self._next_look = (step, now), step + max(1, int(AGREE_EVERY_S / max(slowest, 1e-6)))
        return next((name for name, _ in found if name), None)

    def require_equal(self, tensors: Iterable[Tensor], step: int) -> None:
        """Raise FitError, naming the process, unless all hold the same bits."""
        if self.world == 1:
            return
        mine = 0
        for tensor in tensors:
            mine = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), mine)
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, mine)
        odd = [rank for rank, sum_ in enumerate(found) if sum_ != found[0]]
        if odd:
            raise FitError(
                f"the processes' parameters have drifted apart at step {step} (process {odd[0]} differs from 0); the "
                "last checkpoint is kept; run the same command again, on like machines with the same versions"
            )

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective whose backward averages the gradients over all processes."""
        if self.world == 1:
            return objective
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(objective, device_ids=ids)


@contextmanager
def join(device_name: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or stand alone.

    Raises ConfigError for a device that is not here and for several processes started without torchrun, FitError
    where another process has died.
    """
    world, rank, local = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise ConfigError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks that know nothing of each other; start one a "
            "node and let torchrun start the processes, as pipelines/slurm/fit.sbatch does"
        )
    if world > 1 and "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {world} but RANK is not set; start several processes with torchrun")
    if world > 1 and not (rank < world and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        raise ConfigError(
            f"WORLD_SIZE is {world} and RANK {rank}, but that is no process of torchrun's; start several with torchrun"
        )
    device = resolve_device(device_name, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if rank:
        logging.getLogger("psftrain").setLevel(logging.ERROR)  # the first process speaks for all
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=_meeting_place(), rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Ranks(rank, world, device)
    except distributed.DistBackendError as error:  # NCCL
        raise FitError(_lost(rank, error)) from error
    except RuntimeError as error:  # gloo
        if "gloo" not in str(error).lower() and "peer" not in str(error).lower():
            raise
        raise FitError(_lost(rank, error)) from error
    finally:
        distributed.destroy_process_group()


def _meeting_place() -> Any:
    """Where the processes find each other's addresses, and none of those that a restart by torchrun has replaced."""
    store: Any = next(rendezvous("env://", timeout=PATIENCE))[0]
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # each node has a count of its own
        return store
    return cast(Any, distributed).PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _number(name: str) -> int:
    text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "0")
    if not text.isdecimal() or (name == "WORLD_SIZE" and not int(text)):
        raise ConfigError(f"the environment has {name}={text}, which torchrun never sets; unset it")
    return int(text)


def _lost(rank: int, error: Exception) -> str:
    return (
        f"process {rank} has lost the others ({' '.join(str(error).split())[:100]}); the last checkpoint is kept, the "
        "same command goes on from there"
    )
