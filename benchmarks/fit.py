"""How fast a training step is, beside a plainly written loop, and where its time goes.

    python benchmarks/fit.py [--rounds 5] [--steps 40] [--threads 1] [--batch 64] [--device cpu]

The plain loop is what a script usually has: a DataLoader, the default Adam, `.item()` every step, and the smoothness
over the whole grid. Both train on the default lens; loops are measured in turns in one run, as ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from psfgen.config import RenderConfig
from psfgen.render import render
from psfgen.store import open_store
from psftrain.conditioning import conditioning_of
from psftrain.config import FitConfig, load_fit_config
from psftrain.data import Examples, read_examples
from psftrain.ddp import Ranks
from psftrain.feed import Feed
from psftrain.fit import fit
from psftrain.losses import Objective, kl_per_dim, nll, rel_l2
from psftrain.models import model_class
from psftrain.order import Order
from psftrain.sources import open_source

SEED = ["model.name=seed_cvae"]
NEURAL = ["model.name=neural_cvae", "lr=1e-4"]  # slow enough that rounding is not amplified within 100 steps
NEAR = ["loss.smooth_over=batch"]
NEVER = 10**9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps a loop takes in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "psfs.zarr"
        job = {"grid": 20, "depth": "10m", "focus": "10m", "tolerance": 0.1, "workers": 1, "out": str(path)}
        render(RenderConfig.model_validate(job))
        print(f"400 kernels of 15 x 15 x 3, {given.threads} threads, device {given.device}; steps/s, medians\n")
        for title, model in (("seed_cvae", SEED), ("neural_cvae", NEURAL)):
            Comparison(Path(folder), path, title, model, given).print()


class Comparison:
    """The loops of one network."""

    def __init__(self, folder: Path, path: Path, title: str, model: list[str], given: argparse.Namespace) -> None:
        self.folder, self.path, self.title, self.given = folder, path, title, given
        self.sets = [*model, f"batch={given.batch}", "warmup=0", "schedule=constant", f"device={given.device}"]
        self.runs = 0
        store = open_store(str(path))
        self.conditioning = conditioning_of([store])
        self.examples = read_examples([store], self.conditioning, "psf_binned")

    def print(self) -> None:
        """One table."""
        loops: dict[str, Callable[[], list[float]]] = {
            "plain loop, DataLoader over RAM": lambda: self.plain(in_ram(self.examples)),
            "plain loop, DataLoader over the store": lambda: self.plain(PerExample(self.path, self.examples)),
            "psftrain fit, the same loss": lambda: self.ours(["loss.smooth_over=grid"]),
            "psftrain fit, two neighbours": lambda: self.ours(NEAR),
            "psftrain fit, two neighbours, bf16": lambda: self.ours([*NEAR, "precision=bf16"]),
        }
        pace: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(self.given.rounds):
            for name, loop in loops.items():
                pace[name].append(statistics.median(loop()))
        loss = {name: self.losses(name) for name in loops}
        base = statistics.median(pace["plain loop, DataLoader over RAM"])
        print(f"{self.title:40}{'steps/s':>10}{'ratio':>8}{'loss at 100':>14}")
        for name, found in pace.items():
            median = statistics.median(found)
            print(f"  {name:38}{median:10.2f}{median / base:8.2f}{loss[name][-1]:14.6f}")
        same = zip(loss["plain loop, DataLoader over RAM"], loss["psftrain fit, the same loss"], strict=True)
        print(f"  largest difference of the losses of 100 steps: {max(abs(a - b) / abs(a) for a, b in same):.1e}")
        self.parts()
        print()

    def config(self, sets: list[str], **more: Any) -> FitConfig:
        """A run of its own."""
        self.runs += 1
        where = [("store", str(self.path)), ("run", str(self.folder / f"{self.title}-{self.runs}"))]
        never = {"val_every": NEVER, "save_every": NEVER, "steps": self.given.steps, "log_every": self.given.steps // 4}
        return load_fit_config(None, [*self.sets, "loss.smooth=1e-3", *sets, *where, *{**never, **more}.items()])

    def ours(self, sets: list[str], **more: Any) -> list[float]:
        """steps/s of `psftrain fit`, by quarters of the steps; the first has start-up costs in it."""
        lines = self.logged(self.config(sets, **more))
        return [line["train/steps_per_s"] for line in lines[1:]]

    def logged(self, config: FitConfig) -> list[dict[str, Any]]:
        """What a run wrote into metrics.jsonl."""
        fit(config)
        lines = (Path(config.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def plain(self, data: Dataset[Any], steps: int | None = None) -> list[float]:
        """steps/s of the plain loop, by quarters."""
        ends = [time.perf_counter()]
        for _ in self.plain_losses(data, steps or self.given.steps):
            ends.append(time.perf_counter())
        quarter = self.given.steps // 4
        marks = ends[::quarter]
        return [quarter / (b - a) for a, b in pairwise(marks[1:])]

    def losses(self, name: str) -> list[float]:
        """The loss of each of 100 steps."""
        if name.startswith("plain"):
            return list(self.plain_losses(in_ram(self.examples), 100))
        sets = {"same loss": ["loss.smooth_over=grid"], "bf16": [*NEAR, "precision=bf16"]}
        chosen = next((value for key, value in sets.items() if key in name), NEAR)
        return [line["loss/total"] for line in self.logged(self.config(chosen, steps=100, log_every=1))]

    def plain_losses(self, data: Dataset[Any], steps: int) -> Iterator[float]:
        """The plain loop: one after the other as textbooks have it, with the batches and the noise of ours."""
        config, device = self.config([]), self.given.device
        order = Order(config.seed, len(self.examples), config.batch)
        loader = DataLoader(data, batch_sampler=[order.batch(step).tolist() for step in range(steps)])
        grid = self.examples.condition.to(device)
        pairs = grid_pairs(self.examples)
        torch.manual_seed(config.seed)
        model = model_class(config.model.name)(config.model, self.examples.places.shape, self.conditioning).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        for step, (kernels, condition) in enumerate(loader):
            kernels, condition = kernels.to(device), condition.to(device)
            noise = order.noise(step, model.latent).to(device)
            optimizer.zero_grad()
            posterior, prior = model.posterior(kernels, condition), model.prior(condition)
            z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
            loss = reconstruction(config, model.decode(z, condition), kernels)
            loss = loss + config.loss.beta * kl_per_dim(posterior, prior).sum(dim=-1).mean()
            if config.loss.prior:
                loss = loss + config.loss.prior * reconstruction(config, model.decode(prior.mean, condition), kernels)
            mean = model.prior(grid).mean
            smooth = (mean[pairs[:, 0]] - mean[pairs[:, 1]]).square().sum(dim=-1).mean()
            loss = loss + config.loss.smooth * smooth
            loss.backward()
            if config.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            yield loss.item()

    def parts(self) -> None:
        """Where the time of a step of ours goes."""
        config, device = self.config(NEAR), torch.device(self.given.device)
        stores = [open_store(str(self.path))]
        source = open_source(stores, self.examples.places, config.data, device)
        order = Order(config.seed, len(self.examples), config.batch)
        model = model_class(config.model.name)(config.model, self.examples.places.shape, self.conditioning).to(device)
        objective = Objective(model, config.loss)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        feed = Feed(config, self.examples.places, source, order, Ranks(0, 1, device), model.latent)
        spent: dict[str, list[float]] = {"data": [], "forward": [], "backward": [], "clip": [], "update": []}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            found = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - started)
            return found

        for step in range(self.given.steps):
            (batch,) = timed("data", lambda step=step: feed(step))
            total = timed("forward", lambda batch=batch: objective(batch)["total"])
            timed("backward", total.backward)
            if config.clip is not None:
                timed("clip", lambda: nn.utils.clip_grad_norm_(model.parameters(), config.clip or 1.0))
            timed("update", optimizer.step)
            optimizer.zero_grad(set_to_none=True)
        medians = {name: 1000 * statistics.median(found) for name, found in spent.items() if found}
        print("  one step, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in medians.items()))


def in_ram(examples: Examples) -> Dataset[Any]:
    """Everything decoded into memory."""
    return TensorDataset(examples.kernels, examples.condition)


class PerExample(Dataset[Any]):
    """One read of the store for every example."""

    def __init__(self, path: Path, examples: Examples) -> None:
        self.store, self.examples = open_store(str(path)), examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        row, column = (int(i) for i in self.examples.index[number, -2:])
        kernel = self.store.read("psf_binned", focus=0, depth=0, field_y=row, field_x=column)
        return torch.from_numpy(kernel), self.examples.condition[number]


def grid_pairs(examples: Examples) -> Tensor:
    """Positions [P, 2] of all 4-connected neighbours."""
    grid = examples.slices[0]
    right = torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()], dim=-1)
    down = torch.stack([grid[:-1].flatten(), grid[1:].flatten()], dim=-1)
    return torch.cat([right, down])


def reconstruction(config: FitConfig, found: Tensor, truth: Tensor) -> Tensor:
    """The weighted sum of the losses that a config names."""
    known = {"mse": lambda a, b: (a - b).square(), "rel_l2": rel_l2, "nll": nll}
    return torch.stack([weight * known[name](found, truth).mean() for name, weight in config.loss.recon.items()]).sum()


if __name__ == "__main__":
    main()
