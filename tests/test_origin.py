"""The stores that a run comes from are looked for again, and another in their place is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import contents
from training import fit_quickly, make_store, one_line_error, psftrain

from psftrain.origin import training_stores
from psftrain.run import load_run

LENS: dict[str, Any] = {"wavelength": (0.5, 0.6), "kernel_px": 16, "bins": 8, "focus": (500.0,)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose stores are named relatively, and a copy that it was adapted to."""
    monkeypatch.chdir(tmp_path)
    make_store(Path("train.zarr"), grid=4, copies=4, **LENS)
    make_store(Path("one.zarr"), grid=3, **LENS)
    make_store(Path("held.zarr"), grid=5, **LENS)
    fit_quickly(Path("train.zarr"), Path("run"), "field_cvae")
    assert psftrain("adapt", "run", "--store", "one.zarr", "--out", "adapted").code == 0
    return tmp_path


def another(store: str) -> None:
    shutil.rmtree(store)
    make_store(Path(store), grid=6, copies=4 if store == "train.zarr" else None, **LENS)


BAKE = ("--grid", 2, "--out", "table.zarr")
EVAL = ("--store", "held.zarr", "--out", "told")


@pytest.mark.parametrize(
    ("store", "run", "words"),
    [
        ("train.zarr", "run", ("eval", "run", *EVAL)),
        ("train.zarr", "run", ("bake", "run", *BAKE)),
        ("train.zarr", "adapted", ("bake", "adapted", *BAKE)),
        ("one.zarr", "adapted", ("eval", "adapted", *EVAL)),
    ],
)
def test_another_render_in_its_place(place: Path, store: str, run: str, words: tuple[Any, ...]) -> None:
    """Interpolation, masks and light would be another's: it is refused, and nothing is written."""
    another(store)
    before = contents(place)
    ran = psftrain(*words)
    assert ran.code == 2
    assert f"training store {store} is another render than {run} comes from" in one_line_error(ran)
    assert contents(place) == before


def test_an_export_knows_it_too(place: Path) -> None:
    assert psftrain("export", "adapted", "--format", "safetensors", "--out", "export").code == 0
    assert [store.path for store in training_stores(load_run(Path("export")))] == ["train.zarr"]
    another("train.zarr")
    assert "is another render" in one_line_error(psftrain("bake", "export", *BAKE))


def test_from_another_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, for whom, and where it was looked for; rendering another is no way out."""
    (place / "else").mkdir()
    monkeypatch.chdir(place / "else")
    for words in (("eval", "../run", "--store", "../held.zarr"), ("bake", "../run", *BAKE)):
        ran = psftrain(*words)
        assert ran.code == 1
        told = one_line_error(ran)
        assert (
            f"store train.zarr does not exist in {place / 'else'}, from which ../run comes; go to where that was"
            in told
        )
        assert "psfgen render" not in told


def test_what_was_not_touched_is_taken(place: Path) -> None:
    assert psftrain("eval", "adapted", *EVAL).code == 0
    assert psftrain("bake", "adapted", *BAKE).code == 0
