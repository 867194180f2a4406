"""Rows of numbers as a CSV file."""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from psfgen.errors import StoreError


def save_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows of the same keys; an array fills a column KEY_1, KEY_2 ... for each of its values.

    Numbers read back exactly. The file appears whole; raises StoreError, and leaves what was there, where it cannot.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = None
            for row in rows:
                flat = _flat(row)
                if writer is None:
                    writer = csv.DictWriter(file, list(flat), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(flat)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"table {path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flat(row: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in row.items():
        values = {f"{key}_{i}": v for i, v in enumerate(value, 1)} if isinstance(value, np.ndarray) else {key: value}
        found |= {name: v if isinstance(v, str) else repr(float(v)) for name, v in values.items()}
    return found
