"""An evaluation for people: its first line, table, Markdown report and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from psfgen.errors import FitError
from psfgen.store.colour import channels_to_rgb, stretch
from psfgen.store.schema import json_text
from psftrain import advice
from psftrain.calibration import reliability
from psftrain.config import LossConfig
from psftrain.evaluate import SCORES, Evaluation

LEAST_ERROR = 1e-6  # in pictures, whose scale is logarithmic

TITLES = {
    "prior_mean": "model, prior mean",
    "prior_sample": "model, prior sample",
    "posterior": "model, posterior (sees the truth)",
    "nearest": "nearest node",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "rbf_tps": "thin-plate RBF",
    "pca_rbf": "PCA + RBF",
    "mlp": "plain network of the same size",
    "trace": "tracing the lens itself",
    "noise_floor": "noise of the truth itself",
}
LEGEND = (
    "rel_l2: |K^ - K| / |K| over the whole stack of wavelengths; centroid_px: shift of the centre of mass, in samples; "
    "rms_radius, ee50, ee80: mean absolute error of the radius / mean true radius (50 % and 80 % of the energy); "
    "mtf: mean absolute difference of the modulation transfer; ms_per_psf: time a kernel on the CPU, in batches. "
    "Behind +-: half the 95 % interval of the mean and of p95, by resampling the points"
)


def headline(report: dict[str, Any], advice: str) -> str:
    """The one line that says what came out; `advice` is the command for a held-out store."""
    if not report["held_out"]:
        return (
            f"NOT HELD-OUT: scored on the {report['n']} training points, where interpolation is exact by construction. "
            f"For an honest answer: {advice}"
        )
    best, ours = report["best_classical"], report["rows"]["prior_mean"]["rel_l2"]["mean"]
    if best is None:
        reason = f"no baselines: {report['no_baselines']}" if report["no_baselines"] else "no baselines"
        return f"The model's prior mean errs {ours:.1%} on {report['n']} held-out points ({reason})"
    theirs = report["rows"][best]["rel_l2"]["mean"]
    verdict = "beats" if report["beats_best_classical"] else "does NOT beat"
    found = report["ratio"]
    ratio = f", a ratio of {ours / theirs:.2f} (95 % bound {found['mean_bound']:.2f})" if found else ""
    return (
        f"The model {verdict} the best classical interpolation on {report['n']} held-out points: "
        f"mean error {ours:.1%} against {theirs:.1%} ({TITLES[best]}){ratio}"
    )


def collapse(report: dict[str, Any]) -> str | None:
    """A warning where the posterior tells nothing that the prior does not, with what to do."""
    if report["active_dims"] or not report["latent_dims"]:
        return None
    return advice.collapse(report["kl_nats"], report["latent_dims"], LossConfig.model_validate(report["loss"]))


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader must know of the row trace, and which rows are left out, why."""
    rows, found = report["rows"], []
    if "trace" in rows:
        traced, ours = rows["trace"], rows["prior_mean"]
        error, faster = traced["rel_l2"]["mean"], traced["ms_per_psf"] <= ours["ms_per_psf"]
        better = error <= traced["prior_mean_there"]
        costs = (
            f"tracing with {traced['spp']} rays a kernel errs {error:.2%} in {traced['ms_per_psf']:.3f} ms, the model "
            f"{traced['prior_mean_there']:.2%} in {ours['ms_per_psf']:.3f} ms on the same {traced['n']} points"
        )
        if report["adapted"]:
            found.append(f"{costs}; but only a simulation knows how this copy is misaligned, the model saw its kernels")
        elif faster and better:
            found.append(f"TRACE IT: {costs}; where the lens is known as well as here, tracing is faster and better")
        elif better:
            found.append(f"{costs}; the model is {traced['ms_per_psf'] / ours['ms_per_psf']:.1f} times as fast")
        else:
            found.append(f"{costs}; more rays were not tried")
    told = report.get("calibration", {})
    if told.get("spearman") is not None:
        found.append(
            f"expected against true error, over the {told['n']} points that stand out of the noise: rank correlation "
            f"{told['spearman']:.2f}, median ratio {told['median_ratio']:.2f}"
        )
    return found + [f"without {TITLES[name]}: {reason}" for name, reason in report["left_out"].items()]


def table(report: dict[str, Any]) -> list[list[str]]:
    """The report's rows as cells, header first, best mean first."""
    header = ["row", "mean", "median", "p95", *SCORES[1:], "ms_per_psf"]
    ordered = sorted(report["rows"].items(), key=lambda item: item[1]["rel_l2"]["mean"])
    return [header] + [
        [
            TITLES[name],
            *(_error(row["rel_l2"], key) for key in ("mean", "median", "p95")),
            *(_number(name, key, row[key]) for key in (*SCORES[1:], "ms_per_psf")),
        ]
        for name, row in ordered
    ]


def _error(errors: dict[str, Any], key: str) -> str:
    if f"{key}_interval" not in errors:
        return f"{errors[key]:.2%}"
    low, high = errors[f"{key}_interval"]
    return f"{errors[key]:.2%} +-{100 * (high - low) / 2:.2f}"


def _number(row: str, key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key in ("centroid_px", "ms_per_psf") else f"{value:.2%}"


def as_text(report: dict[str, Any], advice: str) -> str:
    """What `psftrain eval` prints."""
    cells = table(report)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    reasons = "no light, withheld or trained on, or beyond a row's reach"
    masked = f"{report['n']} points scored, {report['n_masked']} masked ({reasons})"
    warning = collapse(report)
    after = [masked, *remarks(report), *([f"warning: {warning}"] if warning else [])]
    return "\n".join([headline(report, advice), "", *lines, "", *after])


def write(evaluation: Evaluation, folder: Path, advice: str) -> dict[str, Path]:
    """Write report.json, report.md and the pictures; returns their paths by name."""
    report = evaluation.report
    paths = {
        "report_json": folder / "report.json",
        "report_md": folder / "report.md",
        "examples": folder / "examples.png",
        "error_map": folder / "error_map.png",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths["report_json"].write_text(json_text(report) + "\n", encoding="utf-8")
        paths["report_md"].write_text(_markdown(report, advice), encoding="utf-8")
        _examples(evaluation).savefig(paths["examples"], dpi=110)
        _error_map(evaluation).savefig(paths["error_map"], dpi=110)
        if "expected" in evaluation.errors:
            paths["reliability"] = folder / "reliability.png"
            _reliability(evaluation).savefig(paths["reliability"], dpi=110)
    except OSError as error:
        raise FitError(f"report {folder} cannot be written: {error.strerror}; choose another --out") from None
    return paths


def _markdown(report: dict[str, Any], advice: str) -> str:
    header, *rows = table(report)
    warning = collapse(report)
    lines = [
        f"# {report['model']} after {report['step']} step{'' if report['step'] == 1 else 's'}",
        "",
        headline(report, advice),
        *(["", f"**Warning:** {warning}"] if warning else []),
        "",
        f"Trained on `{report['train_store']}`, scored on `{report['heldout_store'] or 'the training points'}`: "
        f"{report['n']} points, {report['n_masked']} masked.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        LEGEND,
        *(line for remark in remarks(report) for line in ("", remark)),
        *_latents(report),
        "",
        "![examples](examples.png)",
        "![error over the field](error_map.png)",
        "",
    ]
    return "\n".join(lines)


def _latents(report: dict[str, Any]) -> list[str]:
    """What the posterior does; nothing of a model of one specimen, which has no latents."""
    if not report["latent_dims"]:
        return []
    return [
        "",
        f"KL of the posterior from the prior: {report['kl_nats']:.3f} nats, "
        f"{report['active_dims']} of {report['latent_dims']} latent dimensions active.",
    ]


def _examples(evaluation: Evaluation) -> Figure:
    """Truth, baselines, model and their errors, a column an example from the best to the worst answered."""
    names = [name for name in ("bilinear", "rbf_tps", "prior_mean") if name in evaluation.kernels]
    truth = evaluation.truth[evaluation.shown]
    count = len(truth)
    figure = Figure(figsize=(1.5 * count + 1.6, 1.5 * (1 + 2 * len(names)) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + 2 * len(names), count, squeeze=False)
    colours = channels_to_rgb(truth)
    several = len(np.unique(evaluation.distances_mm, axis=0)) > 1
    for column in range(count):
        peak = float(colours[column].max())
        axes[0, column].imshow(stretch(colours[column], peak))
        x, y = evaluation.field_xy[evaluation.shown[column]]
        depth, focus = evaluation.distances_mm[evaluation.shown[column]] / 1000
        where = f"\ndepth {depth:.4g} m\nfocus {focus:.4g} m" if several else ""
        axes[0, column].set_title(f"({x:.2f}, {y:.2f}){where}", fontsize=8)
        for i, name in enumerate(names):
            found = evaluation.kernels[name][column]
            axes[1 + i, column].imshow(stretch(np.clip(channels_to_rgb(found[None])[0], 0, None), peak))
            error = (found - truth[column]).mean(axis=0)
            limit = float(truth[column].mean(axis=0).max()) / 10
            below = axes[1 + len(names) + i, column]
            below.imshow(error, cmap="RdBu_r", vmin=-limit, vmax=limit)
            below.set_xlabel(f"{evaluation.errors[name][evaluation.shown[column]]:.1%}", fontsize=8)
    rows = ["truth", *(TITLES[name] for name in names), *(f"error of\n{TITLES[name]}" for name in names)]
    for row, label in enumerate(rows):
        axes[row, 0].set_ylabel(label, fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.suptitle(
        f"{'Held-out' if evaluation.report['held_out'] else 'TRAINING'} kernels by field (x, y); gamma 2.2, a column "
        "shares one scale; errors: mean over wavelengths, white 0, full colour at +-10 % of the peak",
        fontsize=9,
    )
    return figure


def _error_map(evaluation: Evaluation) -> Figure:
    """Relative error over the field, of the model and of the best classical row, on one logarithmic scale."""
    best = evaluation.report["best_classical"]
    names = ["prior_mean", *([best] if best else [])]
    # One colour a field point: the mean over depths and focus distances.
    places, inverse = np.unique(evaluation.field_xy.round(6), axis=0, return_inverse=True)
    count = np.bincount(inverse.ravel())
    means = {name: np.bincount(inverse.ravel(), evaluation.errors[name]) / count for name in names}
    figure = Figure(figsize=(4.6 * len(names) + 0.8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    seen = 100 * np.maximum(np.concatenate(list(means.values())), LEAST_ERROR)
    scale = LogNorm(*np.quantile(seen, (0.02, 0.98))) if np.ptp(seen) else None
    for ax, name in zip(axes, names, strict=True):
        drawn = ax.scatter(*places.T, c=100 * np.maximum(means[name], LEAST_ERROR), s=18, norm=scale, cmap="viridis")
        ax.set_title(f"{TITLES[name]}: mean {evaluation.errors[name].mean():.1%}", fontsize=10)
        ax.set_aspect("equal")
        ax.set_xlabel("field x")
        ax.set_ylabel("field y")
    figure.colorbar(
        drawn, ax=list(axes), label="relative L2 error, %, mean over depths and focus distances", extend="both"
    )
    return figure


def _reliability(evaluation: Evaluation) -> Figure:
    """Expected against true errors: every point, and the means of groups of like expectation."""
    expected, errors = evaluation.errors["expected"], evaluation.errors["prior_mean"]
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(100 * expected, 100 * errors, s=4, color="0.7", label="points")
    means = [100 * mean for mean in reliability(expected, errors)]
    axes.plot(*means, "o-", color="tab:blue", label="means of groups")
    seen = np.concatenate([expected, errors])
    seen = 100 * seen[np.isfinite(seen) & (seen > 0)]
    if seen.size:
        ends = [seen.min(), seen.max()]
        axes.plot(ends, ends, "k--", linewidth=1, label="as expected")
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="expected error (%)", ylabel="true error (%)")
    axes.legend()
    return figure
