"""Verifying deeply: kernels rendered again tell a plausible wrong one that every checksum fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SINGLET_ZMX, Psfgen, arrays, doctor, tiny, variant
from numpy.typing import NDArray

from psfgen import deep
from psfgen.deep import differences
from psfgen.errors import StoreError
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.verify import problems

ALL = 3 * 9  # field points of the tiny store, over its depths


def shift(name: str, place: tuple[int, ...]) -> Any:
    """A change for `doctor`: one kernel moved by a sample, which keeps its sum and its sign."""

    def change(array: str, values: NDArray[Any]) -> None:
        if array == name:
            values[place] = np.roll(values[place], 1, axis=-1)

    return change


def test_a_sound_store_comes_out_the_same(either: Path) -> None:
    """To the last bit, at every point."""
    done: list[int] = []
    assert list(differences(open_store(either), sample=ALL, on_point=done.append)) == []
    assert sum(done) == ALL


@pytest.mark.parametrize("name", ["psf", "psf_binned"])
def test_a_plausible_wrong_kernel_is_found(broken: Path, psfgen: Psfgen, name: str) -> None:
    """Signed by commit, so that nothing but tracing can tell; and the advice given mends it."""
    whole = arrays(broken)
    doctor(broken, 1, shift(name, (1, 0, 2, 0, 1)))
    assert list(problems(open_store(broken))) == []
    assert psfgen("verify", broken).code == 0
    ((block, text),) = differences(open_store(broken), sample=ALL)
    assert block == "depth-0001"
    assert text.startswith(f"block depth-0001: {name} at field (-1.000, 1.000) differs by up to ")
    ran = psfgen("verify", broken, "--deep", "--sample", ALL)
    assert ran.code == 1
    assert text in ran.out
    advice = f"psfgen repair {broken} --drop depth-0001"
    assert f"to mend it: {advice}, then run the same render again" in ran.out
    assert psfgen(*advice.split()[1:]).code == 0
    render(tiny(broken))
    assert arrays(broken) == whole
    assert list(differences(open_store(broken), sample=ALL)) == []


def test_a_dark_kernel_in_the_place_of_a_lit_one_is_found(broken: Path) -> None:
    def darken(array: str, values: NDArray[Any]) -> None:
        if array in ("psf", "psf_binned", "noise", "noise_binned"):
            values[0, 0, 1, 1, 0] = np.nan
        if array == "captured":
            values[0, 0, 1, 1, 0] = 0

    doctor(broken, 2, darken)
    assert list(problems(open_store(broken))) == []
    assert {block for block, _ in differences(open_store(broken), sample=ALL)} == {"depth-0002"}


def test_a_seed_chooses_the_points(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed its own, always the same; a wrong kernel is found by those that hit it."""
    doctor(broken, 1, shift("psf", (1, 0, 2, 0, 1)))
    store = open_store(broken)
    hits = [bool(list(differences(store, sample=9, seed=seed))) for seed in range(8)]
    assert hits == [bool(list(differences(store, sample=9, seed=seed))) for seed in range(8)]
    assert True in hits
    assert False in hits
    counted: list[int] = []
    list(differences(store, sample=10**6, on_point=counted.append))
    assert sum(counted) == ALL, "no point twice"


def test_other_versions_may_differ_by_their_noise(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference far below the noise passes then, and a shifted kernel does not."""

    def jitter(array: str, values: NDArray[Any]) -> None:
        if array == "psf":
            values[1, 0, 2, 0, 1] *= 1 + 1e-5

    doctor(broken, 1, jitter)
    assert list(differences(open_store(broken), sample=ALL)) != []
    monkeypatch.setattr(deep, "versions", lambda: {"psfgen": "another"})
    assert list(differences(open_store(broken), sample=ALL)) == []
    doctor(broken, 1, shift("psf", (1, 0, 2, 0, 1)))
    assert [block for block, _ in differences(open_store(broken), sample=ALL)] == ["depth-0001"]


def test_an_incomplete_store_is_compared_where_it_is_done(tmp_path: Path, psfgen: Psfgen) -> None:
    render(tiny(tmp_path / "psfs.zarr"), shard="1/3")
    counted: list[int] = []
    store = open_store(tmp_path / "psfs.zarr", allow_incomplete=True)
    assert list(differences(store, on_point=counted.append)) == []
    assert sum(counted) == 9
    assert psfgen("verify", "psfs.zarr", "--deep").code == 3


def test_an_empty_store_is_no_fault(tmp_path: Path, psfgen: Psfgen) -> None:
    from psfgen.errors import Preempted

    with pytest.raises(Preempted):
        render(tiny(tmp_path / "psfs.zarr"), stopped=["SIGTERM"])
    assert psfgen("verify", "psfs.zarr", "--deep").code == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"copies": 2, "tolerances": {"decentre_mm": 0.02, "tilt_deg": 0.05}},
        {"perturb": [{"element": 1, "tilt_deg": [0.4, 0.1]}]},
        {"layout": "random", "depth": "2m"},
        {"spp": None, "tolerance": 0.05, "depth": "2m"},
        {"lens": "singlet", "field_max": 1.3, "depth": "2m", "pitch_um": 120},
        {"fnum": 8.0, "depth": "2m"},
        {"tracer": "torch", "depth": "2m"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_was_rendered_comes_out_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Copies, moves, other layouts, tolerances, dark kernels, a smaller stop, another tracer."""
    store = render(tiny(tmp_path / "psfs.h5", **changes))
    assert list(differences(open_store(store.path), sample=20)) == []


@pytest.mark.parametrize("kind", ["json", "zmx"])
def test_the_file_of_the_lens_is_not_needed(tmp_path: Path, psfgen: Psfgen, kind: str) -> None:
    """The store holds its text."""
    if kind == "json":
        lens = variant(tmp_path, "triplet", lambda document: document["surfaces"][0].update(c=0.0381))
        changes: dict[str, Any] = {}
    else:
        lens = tmp_path / "singlet.zmx"
        lens.write_text(SINGLET_ZMX)
        changes = {"sensor_mm": (6.0, 6.0), "field_max": 0.5, "pitch_um": 40.0}
    render(tiny(tmp_path / "psfs.zarr", lens=str(lens), depth="2m", **changes))
    lens.unlink()
    assert list(differences(open_store(tmp_path / "psfs.zarr"))) == []
    assert psfgen("verify", "psfs.zarr", "--deep").code == 0


def test_a_plan_that_this_psfgen_would_not_make_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(finished)
    store.attrs["plan"] = {**store.attrs["plan"], "spp": 999}
    store.attrs["plan_sha256"] = "0" * 64
    with pytest.raises(StoreError, match=r"cannot be rendered again by this psfgen: .*spp is 999"):
        list(differences(store))
