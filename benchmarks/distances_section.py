"""The section of docs/results.md on depths and focus distances between those trained on, from distances.json."""

from __future__ import annotations

from typing import Any

from tables import RATIOS, SPEARMAN, percent, table_of, title

from psftrain.baselines import CLASSICAL
from psftrain.report import TITLES

MUST = 0.5  # of bilinear in the field and linear in dioptres
TRAINING_MIN = 5  # of any single lens, on two cores
ROWS = ("prior_mean", *CLASSICAL, "mlp", "trace", "noise_floor")
Lens = dict[str, Any]


def distances(found: dict[str, Any]) -> list[str]:
    """What came out, and what was missed."""
    lenses = found["cells"]
    return [
        "## Other depths and focus distances",
        "",
        *_about(found),
        "",
        *_summary(lenses),
        "",
        *verdict(lenses),
        "",
        *where_tracing_wins(lenses),
        "Every row: mean and p95 in %, and ms a kernel on one core.",
        "",
        *_every_row(lenses),
        "",
    ]


def _about(found: dict[str, Any]) -> list[str]:
    counts = sorted({(len(lens["depth"]), len(lens["focus"])) for lens in found["cells"]})
    at = ", ".join(f"{depths} depths x {focuses} focus distances" for depths, focuses in counts)
    sets = f", `{' '.join(found['sets'])}`" if found["sets"] else ""
    return [
        f"Model `{found['model']}`{sets}, trained by default settings at {at} on {found['grid']} x {found['grid']} "
        f"field points (`configs/render/distances`); scored on {found['held_points']} random field points at every "
        "depth and focus distance midway, in dioptres, between two that were trained on. Classical rows interpolate "
        "over the field as they are called and linearly in dioptres between distances. One seed; errors, intervals and "
        "bounds as above, by resampling points.",
        "",
        f"{found['machine']}, {found['threads']} threads for training, one for the times a kernel. Python "
        f"{found['versions']['python']}, PyTorch {found['versions']['torch']}, source {', '.join(found['sources'])}.",
    ]


def _summary(lenses: list[Lens]) -> list[str]:
    header = ["lens", "distances, m", "bilinear x linear in dioptres", "model", "ratio (95 % bound)", "of p95 (bound)"]
    header += ["ratio to the best classical row", "noise", "training, s", "rank correlation", "median ratio"]
    rows = []
    for lens in lenses:
        table, ratio, told = lens["rows"], lens["against_bilinear"], lens["calibration"]
        unknown = told is None or told["spearman"] is None
        rows.append(
            [
                title(lens["cell"]),
                f"{lens['depth'][0] / 1000:g} to {lens['depth'][-1] / 1000:g}",
                percent(table["bilinear"], "mean"),
                percent(table["prior_mean"], "mean"),
                f"**{ratio['mean']:.3f}** ({ratio['mean_bound']:.3f})",
                f"{ratio['p95']:.3f} ({ratio['p95_bound']:.3f})",
                f"{lens['ratio']['mean']:.3f} ({TITLES[lens['best_classical']]})",
                f"{100 * table['noise_floor']['mean']:.2f}",
                f"{lens['fit_s']:.0f}",
                *(["-", "-"] if unknown else [f"{told['spearman']:.2f}", f"{told['median_ratio']:.2f}"]),
            ]
        )
    return table_of(header, rows)


def verdict(lenses: list[Lens]) -> list[str]:
    """What was aimed at, and where it was missed."""
    over = [lens for lens in lenses if not lens["against_bilinear"]["mean_bound"] <= MUST]
    slow = [lens for lens in lenses if not lens["fit_s"] <= 60 * TRAINING_MIN]
    wrong = [lens for lens in lenses if not _believed(lens["calibration"])]
    return [
        f"- Target: the bound of the ratio of the mean to bilinear x linear in dioptres at most {MUST}: "
        f"{_state(over, len(lenses))}.",
        f"- Target: training at most {TRAINING_MIN} min: {_state(slow, len(lenses))}.",
        f"- Target: expected errors, over the points whose error exceeds 1.5 times the noise, with a rank correlation "
        f"of at least {SPEARMAN} and a median ratio of {RATIOS[0]} to {RATIOS[1]}: {_state(wrong, len(lenses))}.",
    ]


def _believed(told: dict[str, Any] | None) -> bool:
    if told is None or told["spearman"] is None:
        return False
    return bool(told["spearman"] >= SPEARMAN and RATIOS[0] <= told["median_ratio"] <= RATIOS[1])


def _state(missed: list[Lens], count: int) -> str:
    return f"MISSED by {', '.join(lens['cell'] for lens in missed)}" if missed else f"held by all {count}"


def where_tracing_wins(lenses: list[Lens]) -> list[str]:
    """The lenses that are better traced, if they are known as well as here."""
    rows = {lens["cell"]: lens["rows"] for lens in lenses if "trace" in lens["rows"]}
    wins = [
        name
        for name, row in rows.items()
        if row["trace"]["ms_per_psf"] <= row["prior_mean"]["ms_per_psf"]
        and row["trace"]["mean"] <= row["trace"]["prior_mean_there"]
    ]
    if not wins:
        return []
    return [
        f"Tracing the lens itself is faster than the model and better for {len(wins)} of {len(rows)} "
        f"({', '.join(wins)}): where the lens is known as well as here, trace it.",
        "",
    ]


def _every_row(lenses: list[Lens]) -> list[str]:
    header = ["row", *(title(lens["cell"]) for lens in lenses)]
    names = [name for name in ROWS if any(name in lens["rows"] for lens in lenses)]
    return table_of(header, [[TITLES[name], *(_cell(lens["rows"].get(name)) for lens in lenses)] for name in names])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    ms = "" if row["ms_per_psf"] is None else f", {row['ms_per_psf']:.3f} ms"
    return f"{100 * row['mean']:.3g}, {100 * row['p95']:.3g}{ms}"
