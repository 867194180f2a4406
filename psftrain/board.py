"""What a run shows while it trains: TensorBoard scalars and pictures, and the same scalars in metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from psfgen.store.colour import channels_to_rgb, stretch


class Board:
    """Writes under a run directory; on resume what lies beyond `step` is dropped."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.writer: Any = SummaryWriter(str(run / "tb"), purge_step=step + 1 if step else 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log scalars by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text, shown as it stands."""
        self.writer.add_text(name, f"```\n{text}\n```", step)

    def kernels(self, name: str, rows: list[Tensor], step: int) -> None:
        """Log a picture: each of `rows` [N, W, y, x] one row of kernels, a column sharing one scale."""
        self.writer.add_image(name, kernel_table([row.cpu().numpy() for row in rows]), step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything to disk."""
        self.writer.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut short by a kill
        return 2**62


def kernel_table(rows: list[np.ndarray], zoom: int = 4) -> np.ndarray:
    """Rows of kernels [N, W, y, x] as one RGB picture [H, W, 3] in [0, 1].

    Columns belong together: each is scaled to the peak of its first row.
    """
    pictures = [channels_to_rgb(row) for row in rows]
    peaks = pictures[0].max(axis=(1, 2, 3))
    lines = []
    for picture in pictures:
        tiles = [stretch(tile, peak) for tile, peak in zip(picture, peaks, strict=True)]
        tiles = [np.pad(tile.repeat(zoom, 0).repeat(zoom, 1), ((1, 1), (1, 1), (0, 0))) for tile in tiles]
        lines.append(np.concatenate(tiles, axis=1))
    return np.concatenate(lines, axis=0)
