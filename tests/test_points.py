"""Kernels at places of one's own: those of the store's lens and specimen, by other pupil points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny
from numpy.typing import NDArray
from training import make_store

from psfgen.errors import LensError
from psfgen.points import PointTracer
from psfgen.render import render
from psfgen.store import Store, open_store

PLACES = [(0, 0), (1, 2), (2, 1)]  # row and column of the 3 x 3 field points
RAYS = 4096


def ask(tracer: PointTracer, store: Store, depth: int, focus: int, spp: int = RAYS) -> NDArray[np.float32]:
    """What is traced at PLACES."""
    field = [(store.coords["field_x"][column], store.coords["field_y"][row]) for row, column in PLACES]
    return tracer.kernels(np.array(field), float(store.coords["depth"][depth]), focus, spp).psf_binned


def stored(store: Store, depth: int, focus: int, **more: int) -> NDArray[np.float32]:
    kernels = store.read("psf_binned", depth=depth, focus=focus, **more)
    return np.stack([kernels.reshape(3, 3, *kernels.shape[-3:])[place] for place in PLACES])


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("depth", "focus"), [(0, 0), (1, 1), (2, 0)])
def test_they_are_those_of_the_store(tmp_path: Path, depth: int, focus: int) -> None:
    """At every depth, infinity too, and every focus distance; but not by the same rays."""
    store = render(tiny(tmp_path / "psfs.zarr", spp=RAYS))
    found, expected = ask(PointTracer(store), store, depth, focus), stored(store, depth, focus)
    assert 0 < difference(found, expected) < 0.01
    assert difference(ask(PointTracer(store), store, depth, 1 - focus), expected) > 0.05


def test_more_rays_err_less(tmp_path: Path) -> None:
    store = render(tiny(tmp_path / "psfs.zarr", spp=2**16))
    tracer = PointTracer(store)
    wrong = [difference(ask(tracer, store, 0, 0, spp), stored(store, 0, 0)) for spp in (64, 512, 4096)]
    assert wrong[0] > 2 * wrong[1] > 4 * wrong[2]


def test_each_specimen_is_its_own(tmp_path: Path) -> None:
    """Of copies, and of a lens perturbed by hand."""
    tolerances = {"decentre_mm": 0.1, "tilt_deg": 0.3}
    copies = render(tiny(tmp_path / "copies.zarr", spp=RAYS, copies=2, tolerances=tolerances))
    moves = [{"element": 1, "decentre_mm": [0.0, 0.2]}]
    moved = render(tiny(tmp_path / "moved.zarr", spp=RAYS, perturb=moves))
    for copy in range(2):
        found = ask(PointTracer(copies, copy), copies, 0, 0)
        assert difference(found, stored(copies, 0, 0, copy=copy)) < 0.01
        assert difference(found, stored(copies, 0, 0, copy=1 - copy)) > 0.05
    assert difference(ask(PointTracer(moved), moved, 1, 0), stored(moved, 1, 0)) < 0.01


def test_the_lens_comes_from_the_store(tmp_path: Path) -> None:
    """Which holds its text: here that of no lens at all."""
    with pytest.raises(LensError, match="no list of surfaces"):
        PointTracer(open_store(make_store(tmp_path / "psfs.zarr")))
