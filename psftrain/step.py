"""One step of the optimiser: forward, backward, clip, update, average; on a GPU all of it as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from psfgen.errors import FitError
from psftrain.batch import Batch, tensors_of, with_tensors
from psftrain.config import FitConfig
from psftrain.ddp import Ranks
from psftrain.models.base import CVAE

WARM_UP = 3  # eager steps before a capture, on the stream that captures (PyTorch's documentation of CUDA graphs)
Terms = dict[str, Tensor]


class Stepper:
    """The optimiser and everything that it changes; calling it takes one step.

    `learner` is the objective, wrapped as it may be; `model` its model. `averaged` is the exponential moving average
    of the model, or None.
    """

    def __init__(self, learner: nn.Module, model: CVAE, config: FitConfig, device: torch.device) -> None:
        self.learner, self.model, self.config, self.device = learner, model, config, device
        # On a GPU the rate is a tensor: a graph reads it anew at every replay.
        rate: Any = torch.tensor(config.lr, device=device) if device.type == "cuda" else config.lr
        self.parameters: list[Tensor] = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=rate, fused=True, capturable=device.type == "cuda")
        self.averaged = deepcopy(model).requires_grad_(False) if config.ema is not None else None
        self._averages: list[Tensor] = [] if self.averaged is None else list(self.averaged.parameters())
        # Steps before the first whose loss was not finite: told without waiting for the device.
        self._good = torch.zeros((), dtype=torch.int64, device=device)
        self._alive = torch.ones((), dtype=torch.bool, device=device)

    @property
    def best_guess(self) -> CVAE:
        """The model that is validated and shown: the averaged one where there is an average."""
        return self.model if self.averaged is None else self.averaged

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, the model included."""
        averaged = None if self.averaged is None else self.averaged.state_dict()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": averaged}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"])
        # How it updates is this device's business, and not that of the one that wrote the checkpoint.
        own = [{key: group[key] for key in ("lr", "capturable", "fused")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, kept in zip(self.optimizer.param_groups, own, strict=True):
            group.update(kept)
        if self.averaged is not None:
            self.averaged.load_state_dict(state["ema"])

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, parts: Sequence[Batch]) -> Terms:
        """One step over the parts of this process's share of the batch; the mean of their terms, without a gradient."""
        sums: Terms = {}
        for number, part in enumerate(parts):
            with self._shared_only(last=number == len(parts) - 1), self._autocast():
                terms: Terms = self.learner(part)
                torch.autograd.backward(terms["total"] / len(parts))
            for name, term in terms.items():
                mean = term.detach() / len(parts)
                sums[name] = sums[name] + mean if name in sums else mean
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None and self.config.ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self._averages, self.parameters, 1 - self.config.ema)
        self._alive &= sums["total"].isfinite()
        self._good += self._alive
        return sums

    def require_finite(self, ranks: Ranks, first: int, step: int) -> None:
        """Raise FitError, naming it, where the loss of a step from `first` to `step` was not finite in any process.

        After a step with a finite loss the weights may be broken all the same, by its gradient.
        """
        norms: Tensor = torch.stack(torch._foreach_norm(self.parameters, ord=torch.inf))
        good, sound = ranks.least(torch.stack([self._good, norms.isfinite().all().long()])).tolist()
        if good < step - first or not sound:
            what, at = ("loss is", first + good + 1) if good < step - first else ("weights are", step)
            raise FitError(
                f"the {what} no longer finite at step {at}; what was saved before is kept, try a lower lr in another "
                "--run"
            )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        # Without the cache of cast weights, which would outlive the step in a graph.
        with torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bf16", cache_enabled=False):
            yield

    @contextmanager
    def _shared_only(self, *, last: bool) -> Iterator[None]:
        """Gradients are averaged over the processes once a step, with its last part."""
        if last or not isinstance(self.learner, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self.learner.no_sync():
                yield


class Graphed:
    """A Stepper whose whole step is one CUDA graph: one launch in place of some hundred.

    The first steps are taken one operation at a time, since a capture needs everything to be warm.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.left = stepper, WARM_UP
        self.stream: Any = torch.cuda.Stream(stepper.device)  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.terms: Terms = {}

    def __call__(self, parts: Sequence[Batch]) -> Terms:
        """One step; its terms stay valid until the next."""
        if self.left:
            self.left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                terms = self.stepper(parts)
            torch.cuda.current_stream().wait_stream(self.stream)
            return terms
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in tensors_of(parts)]
            held = with_tensors(parts, self.inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.terms = self.stepper(held)
        torch._foreach_copy_(self.inputs, tensors_of(parts))
        self.graph.replay()
        return self.terms
