"""What a run shows: TensorBoard and metrics.jsonl hold the same scalars, each step once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from psftrain.board import Board, kernel_table


def tensorboard(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_scalars_stand_in_both(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    for step in (1, 2):
        board.scalars({"loss/recon": 0.5 / step, "loss/kl": 3.0}, step)
    board.close()
    assert [{**line, "time": 0} for line in lines(tmp_path)] == [
        {"step": 1, "time": 0, "loss/recon": 0.5, "loss/kl": 3.0},
        {"step": 2, "time": 0, "loss/recon": 0.25, "loss/kl": 3.0},
    ]
    found = tensorboard(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("loss/recon")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("step", [0, 2, 3])
def test_on_resume_what_lies_beyond_the_step_is_dropped(tmp_path: Path, step: int) -> None:
    """Also from TensorBoard, also what was logged before a first checkpoint."""
    board = Board(tmp_path, 0)
    for at in (1, 2, 3, 4):
        board.scalars({"loss": float(at)}, at)
    board.close()
    board = Board(tmp_path, step)
    for at in range(step + 1, 6):
        board.scalars({"loss": 10.0 * at}, at)
    board.close()
    expected = [(at, float(at) if at <= step else 10.0 * at) for at in range(1, 6)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert [(e.step, e.value) for e in tensorboard(tmp_path).Scalars("loss")] == expected


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', "\n", "nonsense\n", '{"loss": 1}\n'])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path, cut: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n' + cut)
    board = Board(tmp_path, 2)
    board.scalars({"loss": 3.0}, 3)
    board.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_text_is_shown_as_it_stands(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.text("config", "steps: 3\nmodel:\n  width: 4", 0)
    board.close()
    (event,) = tensorboard(tmp_path).Tensors("config/text_summary")
    assert event.tensor_proto.string_val == [b"```\nsteps: 3\nmodel:\n  width: 4\n```"]


def test_a_picture_has_a_line_a_row_and_a_column_an_example(tmp_path: Path) -> None:
    rows = [torch.rand(5, 3, 6, 6) for _ in range(3)]
    board = Board(tmp_path, 0)
    board.kernels("train/kernels", rows, 4)
    board.close()
    (event,) = tensorboard(tmp_path).Images("train/kernels")
    assert event.step == 4
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert picture.size == (5 * (6 * 4 + 2), 3 * (6 * 4 + 2))


# --- the picture ------------------------------------------------------------------------------------------------------


def spot(channel: int, row: int, column: int, height: float = 1.0) -> np.ndarray:
    drawn = np.zeros((1, 3, 2, 2))
    drawn[0, channel, row, column] = height
    return drawn


def test_the_longest_wavelength_is_red_and_the_top_row_is_on_top() -> None:
    """Channels ascend in wavelength."""
    for channel, colour in ((0, 2), (1, 1), (2, 0)):
        picture = kernel_table([spot(channel, 0, 1)], zoom=1)
        assert picture.shape == (4, 4, 3)
        assert np.argwhere(picture[1:-1, 1:-1]).tolist() == [[0, 1, colour]], "and nothing else, within the frame"
        assert picture[1, 2, colour] == 1


def test_a_column_shares_the_scale_of_its_first_row() -> None:
    """So that a fainter answer looks fainter, and no column dims another."""
    first = np.concatenate([spot(1, 0, 0), spot(1, 0, 0, 0.1)])
    second = np.concatenate([spot(1, 0, 0, 0.5), spot(1, 0, 0, 0.2)])
    picture = kernel_table([first, second], zoom=1)[..., 1]
    assert picture[1, 1] == picture[1, 5] == 1
    assert picture[5, 1] == pytest.approx(0.5 ** (1 / 2.2))
    assert picture[5, 5] == 1, "brighter than the truth is clipped"


def test_a_picture_lies_in_the_unit_range() -> None:
    rng = np.random.default_rng(0)
    picture = kernel_table([rng.random((3, 4, 5, 5)), 3 * rng.random((3, 4, 5, 5)) - 1])
    assert 0 <= picture.min() <= picture.max() <= 1
