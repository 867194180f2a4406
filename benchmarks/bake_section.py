"""The section of docs/results.md on baked tables, from bake.json."""

from __future__ import annotations

from typing import Any

from tables import table_of, title

MOST_MS, MOST_RATIO = 0.01, 1.03  # a kernel, 1024 at once; of the errors of table and model on held-out kernels
BATCH = "1024"
Table = dict[str, Any]


def bake(found: dict[str, Any]) -> list[str]:
    """What came out, and what was missed."""
    tables = found["tables"]
    return [
        "## Baked tables",
        "",
        "`psftrain bake RUN` with no option, of runs as in the sections above (lenses at one distance: 10 x 10 field "
        "points, seed 0; at several: 8 depths and 8 focus distances, judged midway between them). Errors are those on "
        "held-out kernels; nodes are focus distances x depths x field points. ms a kernel of "
        f"{' x '.join(map(str, tables[0]['kernel']))} numbers on one core, each at a random place, by how many are "
        f"asked for at once: medians of {found['rounds']} rounds.",
        "",
        f"{found['machine']}. Python {found['versions']['python']}, PyTorch {found['versions']['torch']}, source "
        f"{', '.join(found['sources'])}.",
        "",
        *_summary(tables),
        "",
        *verdict(tables),
        "",
        *_in_words(tables),
    ]


def _name(table: Table) -> str:
    return title(table["cell"]) + (", several distances" if table["several"] else ", one distance")


def _summary(tables: list[Table]) -> list[str]:
    header = ["run", "nodes", "MiB in memory (on disk)", "model, ms at 1", "64", BATCH, "table, ms at 1", "64", BATCH]
    header += ["model, %", "table, %", "ratio of the mean", "of p95", "table against model, %", "baked in, s"]
    rows = []
    for table in tables:
        judged, ms = table["judged"], table["ms"]
        rows.append(
            [
                _name(table),
                " x ".join(map(str, table["nodes"])),
                f"{table['memory_bytes'] / 2**20:.0f} ({table['file_bytes'] / 2**20:.0f})",
                *(f"{ms[name][batch]:.2g}" for name in ("model", "table") for batch in ("1", "64", BATCH)),
                *(f"{100 * judged[name]['mean']:.3g}" for name in ("model", "table")),
                f"**{judged['ratio']['mean']:.3f}**",
                f"{judged['ratio']['p95']:.3f}",
                f"{100 * table['error']['mean']:.2g}",
                f"{table['bake_s']:.0f}",
            ]
        )
    return table_of(header, rows)


def verdict(tables: list[Table]) -> list[str]:
    """What was aimed at, and where it was missed."""
    slow = [table for table in tables if not table["ms"]["table"][BATCH] <= MOST_MS]
    lines = [f"- Target: at most {MOST_MS} ms a kernel at {BATCH}: {_state(slow, 'ms')}."]
    for several, which in ((False, "one distance"), (True, "several distances")):
        own = [table for table in tables if table["several"] == several]
        over = [table for table in own if not table["judged"]["ratio"]["mean"] <= MOST_RATIO]
        if own:
            lines.append(f"- Target: mean error at most {MOST_RATIO} of the model's, {which}: {_state(over, 'ratio')}.")
    return lines


def _state(missed: list[Table], what: str) -> str:
    if not missed:
        return "held by all"
    told = {"ms": lambda table: table["ms"]["table"][BATCH], "ratio": lambda table: table["judged"]["ratio"]["mean"]}
    return "MISSED by " + ", ".join(f"{table['cell']} ({told[what](table):.3g})" for table in missed)


def _in_words(tables: list[Table]) -> list[str]:
    if not any(table["several"] and table["judged"]["ratio"]["mean"] > MOST_RATIO for table in tables):
        return []
    return [
        "Over a range of depths and focus distances the model errs less than a table of 256 MiB that is linear between "
        "its nodes. Where that matters, bake the distances that are needed one by one (`--depth 2m --focus 2m`): such "
        "a table is dense enough in the field.",
        "",
    ]
