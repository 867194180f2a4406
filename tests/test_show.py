"""Pictures: which channel becomes which colour, and that up is up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import doctor
from numpy.typing import NDArray
from PIL import Image

from psfgen.show import contact_sheets
from psfgen.store import open_store
from psfgen.store.colour import channels_to_rgb, stretch


def test_the_longest_wavelength_is_red() -> None:
    for count in (2, 3, 4, 7):
        shortest, longest = (np.eye(count)[channel].reshape(count, 1, 1) for channel in (0, -1))
        (red, green, blue), (other_red, _, other_blue) = (channels_to_rgb(k)[0, 0] for k in (longest, shortest))
        assert red > max(green, blue)
        assert other_blue > other_red
        assert blue == other_red == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_equal_channels_are_neutral(count: int) -> None:
    np.testing.assert_allclose(channels_to_rgb(np.full((count, 4, 4), 0.25)), 0.25)


def test_missing_kernels_are_black() -> None:
    assert (channels_to_rgb(np.full((3, 4, 4), np.nan)) == 0).all()
    assert (stretch(np.zeros((4, 4, 3))) == 0).all()


def red_spot(store: Path, field_y: int, field_x: int, row: int, column: int) -> NDArray[np.float64]:
    """Where a sheet (down, right) shows a store's only lit sample, in its longest wavelength."""

    def light(name: str, values: NDArray[np.float32]) -> None:
        if name == "psf":
            values[:] = 0
            values[0, 0, field_y, field_x, -1, row, column] = 1

    doctor(store, 0, light)
    (page,) = contact_sheets(open_store(store), store.with_suffix(".png"), depth="1m", focus="2m")
    picture = np.asarray(Image.open(page).convert("RGB")).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1:] < 60).all(axis=-1)
    assert red.any()
    return np.argwhere(red).mean(axis=0)


def test_up_is_up_and_right_is_right(store: Path) -> None:
    """Field +y at the top of the sheet, row 0 of a kernel at the top of its tile."""
    top_left = red_spot(store, field_y=2, field_x=0, row=0, column=0)
    in_tile = red_spot(store, field_y=2, field_x=0, row=11, column=11) - top_left
    next_tile = red_spot(store, field_y=0, field_x=2, row=0, column=0) - top_left
    assert (in_tile > 10).all()
    assert (next_tile > 2 * in_tile).all()
