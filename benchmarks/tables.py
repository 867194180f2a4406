"""What the sections of docs/results.md share: tables, names, and what is asked of expected errors."""

from __future__ import annotations

from typing import Any

SPEARMAN, RATIOS = 0.8, (0.7, 1.4)  # of expected and true errors


def title(name: str) -> str:
    """A cell's name for people."""
    return name.replace("_", " ").capitalize()


def percent(row: dict[str, Any], key: str) -> str:
    """A mean or p95 with its interval, in %."""
    low, high = row[f"{key}_interval"]
    return f"{100 * row[key]:.3g} ({100 * low:.3g}-{100 * high:.3g})"


def table_of(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
