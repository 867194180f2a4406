"""How many nodes a table gets where nobody says: as few as follow the model, within a size, and what is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from training import job, make_store

import psftrain as api
from psftrain import density
from psftrain.bake import bake
from psftrain.density import Asked, Nodes, between, nodes_for
from psftrain.fit import fit
from psftrain.predict import PsfModel
from psftrain.run import load_run

Array = NDArray[Any]
DEPTH, FOCUS = np.array([1000.0, math.inf]), np.array([1500.0, 4000.0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 1 m and infinity, focused at 1.5 m and 4 m."""
    folder = tmp_path_factory.mktemp("density")
    store = make_store(folder / "s.zarr", grid=3, depth=tuple(DEPTH), focus=tuple(FOCUS))
    fit(job(store, folder / "run", steps=1))
    return folder / "run"


class Known(PsfModel):
    """A model whose light moves between two bins as `share` of field [..., 2], depth and focus in dioptres [...] says;
    it expects to err `expects`.
    """

    expects: float | None = None
    share: Any

    def psf(self, field: Any, depth_mm: Any = None, focus_mm: Any = None, **_: Any) -> NDArray[np.float32]:
        xy, depth, focus = self.domain.places(field, depth_mm, focus_mm)
        found = np.zeros((*depth.shape, 3, 5, 5), dtype=np.float32)
        with np.errstate(divide="ignore"):
            found[..., 2, 2] = self.share(xy, 1000 / depth, 1000 / focus)[..., None]
        found[..., 0, 0] = 1 - found[..., 2, 2]
        return found

    def expected_error(self, field: Any, depth_mm: Any = None, focus_mm: Any = None) -> NDArray[np.float32] | None:
        return None if self.expects is None else np.full(len(field), self.expects, np.float32)


def known(run: Path, share: Any, expects: float | None = None) -> Known:
    model = Known(load_run(run))
    vars(model).update(share=share, expects=expects)
    return model


def size(nodes: Nodes) -> tuple[int, int, int]:
    return nodes.field, len(nodes.depth_mm), len(nodes.focus_mm)


def steep(field: Array, depth: Array, focus: Array) -> Array:
    """Curved in the depth alone."""
    return np.square(2 * depth - 1)


def test_a_model_that_is_linear_takes_the_nodes_that_it_was_trained_on(run: Path) -> None:
    found = nodes_for(known(run, lambda field, depth, focus: depth * 0.5 + focus / 4), Asked(), DEPTH, FOCUS)
    assert size(found) == (density.FEWEST, 2, 2)
    assert found.depth_mm.tolist() == [1000, math.inf]
    assert found.focus_mm.tolist() == [1500, 4000]


def test_the_axis_that_errs_is_refined_until_the_goal_is_met(run: Path) -> None:
    """And not much further; that of depths h apart in dioptres is at most h^2 in a share, sqrt(2) times that in all."""
    model = known(run, steep, expects=0.04)
    found = nodes_for(model, Asked(), DEPTH, FOCUS)
    assert size(found)[::2] == (density.FEWEST, 2)
    apart = np.diff(1000 / found.depth_mm)
    assert np.allclose(apart, apart[0])
    assert 0.005 < apart[0] ** 2 < 0.03, "of 0.01, a quarter of what it expects"
    finer = nodes_for(known(run, steep, expects=0.004), Asked(), DEPTH, FOCUS)
    assert len(finer.depth_mm) > 2.5 * len(found.depth_mm)


def test_what_expects_nothing_is_followed_to_a_hundredth(run: Path) -> None:
    told = [
        size(nodes_for(known(run, steep, expects), Asked(), DEPTH, FOCUS)) for expects in (None, 4 * density.UNTOLD)
    ]
    assert told[0] == told[1]


def test_what_is_asked_for_is_taken_as_it_is(run: Path) -> None:
    model = known(run, steep)
    assert nodes_for(model, Asked(grid=6), DEPTH, FOCUS).field == 6
    assert nodes_for(model, Asked(depth_mm=DEPTH), DEPTH, FOCUS).depth_mm.tolist() == DEPTH.tolist()
    found = nodes_for(model, Asked(7, np.array([2000.0]), np.array([2000.0])), DEPTH, FOCUS)
    assert found == Nodes(7, np.array([2000.0]), np.array([2000.0]))


def test_a_table_of_one_distance_begins_with_a_finer_field(run: Path) -> None:
    asked = Asked(depth_mm=np.array([2000.0]), focus_mm=np.array([2000.0]))
    assert nodes_for(known(run, steep), asked, DEPTH, FOCUS).field == density.DEFAULT == 49
    curved = known(run, lambda field, depth, focus: np.square(field[..., 0]), expects=4e-4)
    assert nodes_for(curved, asked, DEPTH, FOCUS).field > 49


def test_it_keeps_within_its_size(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the model asks for."""
    monkeypatch.setattr(density, "MOST_BYTES", 4 * 75 * 17**2 * 100)
    found = nodes_for(
        known(run, lambda field, depth, focus: np.square(np.sin(9 * (field[..., 0] + depth + focus))), expects=1e-6),
        Asked(),
        DEPTH,
        FOCUS,
    )
    side, depth, focus = size(found)
    assert 17**2 * 40 < side**2 * depth * focus <= 17**2 * 100
    assert depth > 2
    assert focus > 2


def test_distances_between_those_given() -> None:
    assert between(DEPTH, 1).tolist() == [1000, math.inf]
    assert between(DEPTH, 4) == pytest.approx([1000, 4000 / 3, 2000, 4000, math.inf])
    assert between(np.array([500.0, 1000.0, 3000.0]), 2) == pytest.approx([500, 2000 / 3, 1000, 1500, 3000])
    assert between(np.array([700.0]), 3).tolist() == [700]


def test_a_table_follows_its_model_by_itself(run: Path, tmp_path: Path) -> None:
    model = known(run, steep, expects=0.04)
    error = bake(model, None, None, None, tmp_path / "table.zarr").attrs["bake"]["error"]
    assert 0.003 < error["mean"] < 0.015
    assert bake(api.load(run), 5, None, None, tmp_path / "asked.zarr").coords["field_x"].size == 5
