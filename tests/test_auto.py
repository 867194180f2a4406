"""Engine auto: where diffraction is computed, where geometry is blurred, and the change between."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wave import Array, alone

import numpy as np
import pytest
import torch
from conftest import Psfgen, flags

from psfgen.engines import auto, engine_class
from psfgen.optics.splat import normalise
from psfgen.render import load
from psfgen.store import open_store

GAUSS: dict[str, Any] = {"lens": "double_gauss", "kernel_px": 64, "tolerance": 0.02}
# Rows of neighbours along which engine auto hands over: as fields, and what the job says.
THROUGH_FOCUS = [(0.4, 0.0)], {"pitch_um": 3.45, "depth": 20_000.0, "focus": tuple(1000 / np.linspace(0.02, 0.7, 15))}
OVER_THE_FIELD = (
    [(x, 0.0) for x in np.linspace(0, 1, 16)],
    {"pitch_um": 3.0, "depth": 3000.0, "focus": 5000.0},
)


@dataclass(frozen=True)
class Row:
    """Kernels [N, k, k] of neighbours, and how much of engine wave is in each [N]."""

    kernels: Array
    model: Array

    @classmethod
    def of(cls, engine: str, fields: list[tuple[float, float]], changes: dict[str, Any]) -> Row:
        config = alone(engine=engine, **{**GAUSS, **changes})
        lens, plan = load(config, "cpu")
        built = engine_class(engine)(lens, plan)
        found = built.deposit(built.aim(torch.tensor(fields, dtype=torch.float64), config.depth[0]))
        kernels = normalise(found.halves, 8, found.margins).psf.reshape(-1, config.kernel_px, config.kernel_px)
        return cls(kernels.astype(float), np.ravel([] if found.model is None else found.model))

    @property
    def steps(self) -> Array:
        """Relative L2 from each kernel to the next [N - 1]."""
        return np.asarray(
            np.linalg.norm(np.diff(self.kernels, axis=0), axis=(1, 2)) / np.linalg.norm(self.kernels[1:], axis=(1, 2))
        )


def blurred(fields: list[tuple[float, float]], changes: dict[str, Any]) -> Row:
    """What engine auto does where it is all geometry, everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "WAVE_SIDE", 1)
        patch.setattr(auto, "GEOMETRIC_SIDE", 2)
        return Row.of("auto", fields, changes)


@pytest.mark.parametrize("row", [THROUGH_FOCUS, OVER_THE_FIELD], ids=["focus", "field"])
def test_the_change_is_no_step(row: tuple[list[tuple[float, float]], dict[str, Any]]) -> None:
    """From neighbour to neighbour kernels change no more where the engines change than they do elsewhere, and there no
    more than those of either engine.
    """
    found = Row.of("auto", *row)
    changing = np.diff(found.model) != 0
    assert found.model.max() - found.model.min() > 0.4
    assert changing.sum() > 5
    assert found.steps[changing].max() <= found.steps[~changing].max()
    either = np.maximum(Row.of("wave", *row).steps, blurred(*row).steps)
    assert (found.steps <= 1.02 * either).all()


def test_where_points_are_few_it_is_engine_wave() -> None:
    changes = {"pitch_um": 2.0, "depth": 20_000.0, "focus": tuple(1000 / np.linspace(0.02, 0.3, 5))}
    found = Row.of("auto", [(0.4, 0.0)], changes)
    assert (found.model == 1).all()
    assert found.kernels == pytest.approx(Row.of("wave", [(0.4, 0.0)], changes).kernels, abs=1e-7)


def test_geometry_is_blurred_as_by_a_perfect_lens() -> None:
    """In focus that is most of what diffraction does; far out of focus it does no harm."""
    row = [(0.4, 0.0)], {"fnum": 8.0, "pitch_um": 3.0, "depth": 20_000.0, "focus": (1700.0, 3000.0, 20_000.0)}
    waves = Row.of("wave", *row).kernels
    blurry, counted = (
        np.linalg.norm(some.kernels - waves, axis=(1, 2)) / np.linalg.norm(waves, axis=(1, 2))
        for some in (blurred(*row), Row.of("geometric", *row))
    )
    assert blurry[-1] < 0.6 * counted[-1]
    assert (blurry < counted).all()


def test_what_is_larger_than_its_window_keeps_its_edges() -> None:
    even = np.ones((16, 16), np.float32)
    assert auto.blurred(even, np.array([0.3, 0.2])) == pytest.approx(even, abs=1e-6)


def test_blurring_keeps_the_light_and_the_middle() -> None:
    image = np.zeros((64, 64), np.float32)
    image[20, 40] = 1
    found = auto.blurred(image, np.array([0.8, 0.4]))
    at = np.arange(64)
    assert found.sum() == pytest.approx(1, abs=0.05)  # what no sample resolves rings, and light is not negative
    assert found.argmax() == image.argmax()
    assert np.sqrt((found.sum(0) * (at - 40) ** 2)[30:51].sum()) < np.sqrt((found.sum(1) * (at - 20) ** 2)[10:31].sum())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "geometric", "bandwidth_um": 0.02}, r"bandwidth_um 0\.02 means nothing to engine geometric; .*"),
        ({"engine": "deeplens", "response": "area"}, "response area means nothing to engine deeplens; .*"),
        ({"engine": "auto", "response": "point"}, "response point: engine auto shares .*; use engine wave"),
        ({"engine": "wvae"}, r"unknown engine 'wvae'; did you mean 'wave'\?; known: .*"),
        ({"response": "arae"}, r"response: .*, got 'arae'; did you mean 'area'\?"),
        ({"bandwidth_um": -0.1}, "bandwidth_um: .* greater than or equal to 0, got -0.1"),
        (
            {"bandwidth_um": 0.8, "wavelength": 0.48},
            r"bandwidth_um 0\.8: about 0\.48 um it would reach below 0\.1 um; .*",
        ),
        ({"bandwidth_um": 0.4}, r"wavelength 0\.28 um .* n-sk16 .* 0\.31 to 2\.5 um; .* smaller --bandwidth-um"),
        ({"spp": 15}, "spp: .* greater than or equal to 16, got 15"),
        ({"kernel_px": 1024, "grid": 40}, "memory_mib 512 is too little: .* --set memory_mib=.*"),
        ({"device": "cuda:7"}, r"device cuda:7 is not here .* use --device cpu"),
    ],
)
def test_bad_input_is_one_line(psfgen: Psfgen, changes: dict[str, Any], told: str) -> None:
    ran = psfgen("render", *flags(**{"engine": "wave", **changes}))
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(rf"error: {told}", ran.err.splitlines()[-1]), ran.err
    assert not Path("psfs.zarr").exists()


def test_a_window_that_few_points_cannot_fill_is_told(psfgen: Psfgen) -> None:
    """Light overlaps in it; engine auto counts rays there."""
    wide: dict[str, Any] = {"depth": "2m", "focus": "2m", "wavelength": 0.55, "grid": 1, "spp": None, "kernel_px": 128}
    ran = psfgen("render", *flags(**wide, engine="wave", pitch_um=200, out="wave.zarr"))
    assert ran.code == 0
    assert re.search("estimated error above the tolerance .*--engine auto", ran.err)
    ran = psfgen("render", *flags(**wide, engine="auto", pitch_um=200, out="auto.zarr"))
    assert (ran.code, "estimated error" in ran.err) == (0, False)
    assert (open_store("auto.zarr").read("model") == 0).all()
