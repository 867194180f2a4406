"""Several seeds of one cell as one set of numbers: seeds are drawn first, then the points within each."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from scored import Array, Scored

from psftrain import bootstrap, calibration
from psftrain.baselines import best_classical
from psftrain.metrics import summarise_errors


def pool(by_model: dict[str, list[Scored]]) -> dict[str, Any]:
    """Rows with intervals, the ratio of the first model to the best classical row, seconds of training.

    `by_model`: what came out for each model, by seed. Of the models after the first, the row is called as they are.
    """
    parts, *others = by_model.values()
    names = [name for name in parts[0].report["rows"] if all(name in part.errors for part in parts)]
    errors = {name: np.concatenate([part.errors[name] for part in parts]) for name in names if name != "trace"}
    rows = {name: [part.report["rows"][name] for part in parts] for name in names}
    sizes = [len(part.errors["prior_mean"]) for part in parts]
    for model, found in zip(list(by_model)[1:], others, strict=True):
        if [len(part.errors["prior_mean"]) for part in found] == sizes:
            errors[model] = np.concatenate([part.errors["prior_mean"] for part in found])
            rows[model] = [part.report["rows"]["prior_mean"] for part in found]
    replicas = bootstrap.replicates(errors, sizes)
    table = {name: _row(errors[name], replicas[name], rows[name]) for name in errors}
    best = best_classical({name: float(row["mean"]) for name, row in table.items()})
    assert best is not None
    return {
        "seeds": len(parts),
        "n": sum(sizes),
        "rows": {**table, **_trace(parts, names, rows)},
        "best_classical": best,
        "ratio": bootstrap.ratio(errors["prior_mean"], errors[best], (replicas["prior_mean"], replicas[best])),
        "fit_s": {model: statistics.mean(part.fit_s for part in found) for model, found in by_model.items() if found},
    }


def _row(errors: Array, replicas: bootstrap.Replicates, rows: list[dict[str, Any]]) -> dict[str, Any]:
    times = [row["ms_per_psf"] for row in rows]
    ms = None if None in times else statistics.median(times)
    return {**summarise_errors(errors), **replicas.intervals(), "ms_per_psf": ms}


def _trace(parts: list[Scored], names: list[str], rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The row trace, of fewer points than the others."""
    if "trace" not in names:
        return {}
    errors = np.concatenate([part.errors["trace"] for part in parts])
    replicas = bootstrap.replicates({"trace": errors}, [len(part.errors["trace"]) for part in parts])
    there = statistics.mean(row["prior_mean_there"] for row in rows["trace"])
    found = _row(errors, replicas["trace"], rows["trace"])
    asked = {key: [row[key] for row in rows["trace"]] for key in ("spp", "n")}
    return {"trace": {**found, **asked, "prior_mean_there": there}}


def calibrated(parts: list[Scored]) -> dict[str, Any] | None:
    """How expected errors agree with true ones, over all points of some tasks; None where the model does not say."""
    if not all("expected" in part.errors for part in parts):
        return None
    pooled = (
        np.concatenate([part.errors[name] for part in parts]) for name in ("expected", "prior_mean", "noise_floor")
    )
    return calibration.judge(*pooled)
