"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from psfgen.errors import FitError
from psftrain.show import JUDGE, Log

LABELS = {
    "loss/total": "total (weighted)",
    "loss/recon": "reconstruction",
    "loss/prior": "reconstruction, prior mean",
    "loss/smooth": "smoothness",
}
COLOURS = {"loss/total": "0.6", "loss/recon": "C0", "loss/prior": "C1", "loss/smooth": "C2"}


def draw(log: Log, title: str, out: Path) -> Path:
    """Draw what a run has logged as a PNG. Raises FitError where it cannot be written."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    places = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
    errors = sorted(name for name in log.scalars if name.endswith("/rel_l2"))
    above = [figure.add_subplot(places[0, :3] if errors else places[0, :])]
    _losses(above[0], log)
    if errors:
        above.append(figure.add_subplot(places[0, 3:]))
        _errors(above[1], log, errors)
    kl, rate, speed = (figure.add_subplot(places[1, first : first + 2]) for first in (0, 2, 4))
    _kl(kl, log)
    for ax, name, what in ((rate, "train/lr", "Learning rate"), (speed, "train/steps_per_s", "Steps a second")):
        _curve(ax, log, name)
        ax.set_title(what, fontsize=10)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in (*above, kl, rate, speed):
        ax.set_xlim(0, max(log.step, 1))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep="") if log.step >= 20_000 else "{x:,.0f}")
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FitError(f"picture {out} cannot be written: {reason}; choose another --out") from None
    return out


def _curve(
    ax: Axes, log: Log, name: str, label: str | None = None, colour: str | None = None, style: str = "-"
) -> None:
    if name in log.scalars:
        steps, values = log.scalars[name]
        marker = "." if len(steps) == 1 else ""  # a line needs two points to be seen
        ax.plot(steps, values, label=label, color=colour, linestyle=style, marker=marker, linewidth=1.3)


def _positive(log: Log, names: Sequence[str]) -> list[str]:
    """The scalars of which something can be drawn over a logarithmic axis."""
    return [name for name in names if any(0 < value < np.inf for value in log.scalars[name][1])]


def _losses(ax: Axes, log: Log) -> None:
    """The terms of the loss, unweighted, but for the KL, which is another quantity."""
    names = [name for name in log.scalars if name.startswith("loss/") and name != "loss/kl"]
    names = _positive(log, names)  # terms that are off stay zero
    for name in names:
        _curve(ax, log, name, LABELS.get(name, name.removeprefix("loss/")), COLOURS.get(name))
    if names:
        ax.set_yscale("log", nonpositive="mask")
    ax.set_title("Loss terms, unweighted", fontsize=10)
    _legend(ax, names)


def _errors(ax: Axes, log: Log, names: list[str]) -> None:
    """The path from the posterior's mean and that from the prior's, in the colours of their losses."""
    colours = {"posterior": "C0", "prior": "C1"}
    for name in names:
        where, _, path = name.removesuffix("/rel_l2").rpartition("_")
        label = f"{'prior mean' if path == 'prior' else path}, {'validation' if where == 'val' else where}"
        _curve(ax, log, name, label, colours.get(path), "-" if where == "val" else ":")
    steps, values = log.scalars.get(JUDGE, ([], []))
    if np.isfinite(values).any():
        best = int(np.nanargmin(values))
        ax.plot(steps[best], values[best], "ko", markersize=5, label=f"best: {values[best]:.2%}", clip_on=False)
    percent = FuncFormatter(lambda value, position: f"{100 * value:.3g} %")
    if _positive(log, names):
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_minor_formatter(percent)
        ax.tick_params(which="minor", labelsize=8)
    ax.yaxis.set_major_formatter(percent)
    ax.set_title("Relative error of a kernel", fontsize=10)
    _legend(ax, names)


def _kl(ax: Axes, log: Log) -> None:
    """The KL on the left, the number of active latent dimensions on the right, each in its colour."""
    ax.set_title("KL of the posterior from the prior", fontsize=10)
    _curve(ax, log, "loss/kl")
    ax.set_ylabel("nats", color="C0", fontsize=9)
    ax.set_ylim(bottom=0)
    if "kl/active_dims" in log.scalars:
        right = ax.twinx()
        steps, values = log.scalars["kl/active_dims"]
        right.step(steps, values, where="post", color="C3", linewidth=1.3, marker="." if len(steps) == 1 else "")
        right.set_ylabel("active dimensions", color="C3", fontsize=9)
        right.set_ylim(0, 1.1 * np.nanmax([*values, 1]))
        right.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        right.tick_params(labelsize=8)
        right.spines["top"].set_visible(False)


def _legend(ax: Axes, names: Sequence[str]) -> None:
    if names:
        ax.legend(fontsize=8, frameon=False)
