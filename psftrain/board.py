"""What a run shows while it trains: TensorBoard scalars and pictures, and the same scalars in metrics.jsonl."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from psfgen.store.colour import channels_to_rgb, stretch
from psftrain.checkpoint import write_whole, writing

EVENTS = "events.out.tfevents.*"
FRAME = 0.35  # grey about a kernel in a picture: most of a kernel is black


class Board:
    """Writes under a run directory; on resume what lies beyond `step` is dropped."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        with self._writing():
            if not step:  # of a run that starts over TensorBoard drops scalars and pictures, but shows texts twice
                for path in (run / "tb").glob(EVENTS):
                    path.unlink()
            _wait_for_another_second(run / "tb")
            if self.path.exists():
                text = self.path.read_text(encoding="utf-8", errors="replace")
                kept = [line for line in text.splitlines() if _step_of(line) <= step]
                write_whole(self.path, "".join(f"{line}\n" for line in kept).encode())
            self.writer: Any = SummaryWriter(str(run / "tb"), purge_step=step + 1 if step else 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log scalars by name."""
        with self._writing():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text, shown as it stands."""
        with self._writing():
            self.writer.add_text(name, f"```\n{text}\n```", step)

    def kernels(self, name: str, rows: list[Tensor], step: int) -> None:
        """Log a picture: each of `rows` [N, W, y, x] one row of kernels, a column sharing one scale."""
        with self._writing():
            self.writer.add_image(name, kernel_table([row.cpu().numpy() for row in rows]), step, dataformats="HWC")

    def flush(self) -> None:
        """Put what was logged on disk: a checkpoint must never be ahead of it."""
        with self._writing():
            self.writer.flush()

    def close(self) -> None:
        """Flush everything to disk."""
        with self._writing():
            self.writer.close()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"log of {self.path.parent}")


class Silent(Board):
    """The board of a process that writes nothing: one of several, but not the first."""

    def __init__(self) -> None:
        return

    def scalars(self, values: dict[str, float], step: int) -> None:
        return

    def text(self, name: str, text: str, step: int) -> None:
        return

    def kernels(self, name: str, rows: list[Tensor], step: int) -> None:
        return

    def flush(self) -> None:
        return

    def close(self) -> None:
        return


def _wait_for_another_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second they were opened in."""
    stamps = [int(stamp) for path in folder.glob(EVENTS) if (stamp := path.name.split(".")[3]).isdecimal()]
    while stamps and int(time.time()) <= max(stamps):
        time.sleep(0.05)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):  # a line cut short by a kill
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
        tiles = [tile.repeat(zoom, 0).repeat(zoom, 1) for tile in tiles]
        tiles = [np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=FRAME) for tile in tiles]
        lines.append(np.concatenate(tiles, axis=1))
    return np.concatenate(lines, axis=0)
