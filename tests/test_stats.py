"""Statistics of a store: what numpy finds in the whole of it, from one read of every chunk."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Psfgen, contents, doctor, tiny
from numpy.typing import NDArray
from PIL import Image

from psfgen.errors import StoreIncomplete
from psfgen.outofcore import StoreArray, dask_array
from psfgen.render import render
from psfgen.stats import ERRORS, FINE, QUANTITIES, SHARES, SHOWN, statistics
from psfgen.store import Store, open_store


@pytest.fixture(params=["finished", "copies", "dark"])
def any_store(request: pytest.FixtureRequest) -> Store:
    return open_store(request.getfixturevalue(request.param))


def values_of(store: Store, name: str) -> np.ndarray:
    """What is counted of an array: no NaN, and of `captured` only kernels with light."""
    values = store.read(name).ravel()
    return values[values > 0] if name == "captured" else values[~np.isnan(values)]


def test_numpy_finds_the_same_in_the_whole_store(any_store: Store) -> None:
    found = statistics(any_store)
    psf, lit = any_store.read("psf").astype(np.float64), any_store.read("captured") > 0
    assert (found["kernels"], found["dark"]) == (lit.size, (~lit).sum())
    assert found["dark"] == np.isnan(psf[..., 0, 0]).sum()
    for name in ("psf", "psf_binned"):
        sums = any_store.read(name).astype(np.float64)[lit].sum(axis=(-2, -1))
        expected = {"min": sums.min(), "mean": sums.mean(), "max": sums.max()}
        assert found["energy"][name] == pytest.approx(expected, abs=1e-12)
    for quantity in QUANTITIES:
        values, row = values_of(any_store, quantity.name).astype(np.float64), found[quantity.name]
        assert row["min"] == values.min()
        assert row["max"] == values.max()
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-6)


def test_percentiles_are_right_to_a_bin(any_store: Store) -> None:
    found = statistics(any_store)
    for quantity in QUANTITIES:
        values, row = values_of(any_store, quantity.name), found[quantity.name]
        for percent in (5, 50, 95):
            expected = np.percentile(values, percent, method="inverted_cdf")
            tolerance = 1 / FINE if quantity.edges is SHARES else expected * (ERRORS[1] / ERRORS[0] - 1)
            assert row[f"p{percent}"] == pytest.approx(expected, abs=tolerance)


def test_histograms_count_every_value_once(any_store: Store) -> None:
    found = statistics(any_store)
    for quantity in QUANTITIES:
        values = np.clip(values_of(any_store, quantity.name), quantity.edges[0], quantity.edges[-1])
        histogram = found[quantity.name]["histogram"]
        edges, counts = histogram["edges"], histogram["counts"]
        assert len(edges) == SHOWN + 1
        steps = np.diff(edges) if quantity.edges is SHARES else edges[1:] / edges[:-1]
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
        np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
        assert counts.sum() == len(values)


def test_mean_kernels_are_those_of_the_lit_places(any_store: Store) -> None:
    found = statistics(any_store)
    places = tuple(range(len(any_store.spec.kernel_dims) - 1))
    for name in ("psf", "psf_binned"):
        expected = np.nanmean(any_store.read(name).astype(np.float64), axis=places)
        np.testing.assert_allclose(found[f"mean_{name}"], expected, atol=1e-12)
        np.testing.assert_allclose(found[f"mean_{name}"].sum(axis=(-2, -1)), 1, atol=1e-5)


def test_every_chunk_is_read_once(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, reads = open_store(copies), Counter[str]()
    read = store.read

    def counted(name: str, **index: Any) -> np.ndarray:
        values = read(name, **index)
        if values.size:
            assert values.shape == store.spec.chunks(name)
            reads[f"{name} {sorted(index.items(), key=str)}"] += 1
        return values

    monkeypatch.setattr(store, "read", counted)
    statistics(store)
    names = ("psf", "psf_binned", *(quantity.name for quantity in QUANTITIES))
    chunks = [np.prod(np.array(store.spec.shape(name)) // store.spec.chunks(name)) for name in names]
    assert set(reads.values()) == {1}
    assert len(reads) == sum(chunks)


def test_nothing_but_dark_kernels(tmp_path: Path, psfgen: Psfgen) -> None:
    """Every kernel misses its window: no mean, no median, no picture of a kernel, and no warning."""
    render(tiny(tmp_path / "psfs.zarr", depth="2m", focus="2m"))

    def darken(name: str, values: NDArray[Any]) -> None:
        if not name.startswith("chief"):
            values[:] = 0.0 if name in ("captured", "throughput") else np.nan

    doctor(tmp_path / "psfs.zarr", 0, darken)
    ran = psfgen("stats", "--json", "--out", "stats.png")
    assert (ran.code, ran.document["dark"], ran.document["kernels"]) == (0, 18, 18)
    assert ran.document["noise"]["mean"] is ran.document["noise"]["p50"] is None
    assert psfgen("stats").code == 0


def test_a_dask_array_is_the_array(copies: Path) -> None:
    store = open_store(copies)
    for name in store.spec.arrays:
        array = dask_array(store, name)
        assert (array.shape, array.dtype) == (store.spec.shape(name), store.read(name).dtype)
        assert array.chunksize == store.spec.chunks(name)
        np.testing.assert_array_equal(array.compute(scheduler="threads"), store.read(name))
        assert array.name == dask_array(open_store(copies), name).name
    assert StoreArray(store, "psf").ndim == 8


def test_threads_never_take_a_missing_chunk_for_dark_kernels(store: Path) -> None:
    (store / "psf/c/1/2/0/0/0/0/0").unlink()
    with pytest.raises(StoreIncomplete):
        statistics(open_store(store))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_answers(psfgen: Psfgen, finished: Path) -> None:
    ran, store = psfgen("stats", finished), open_store(finished)
    assert ran.code == 0
    assert "108 kernels, 0 of them dark" in ran.out
    captured = re.search(r"^captured +([\d.]+)% .* ([\d.]+)%$", ran.out, re.MULTILINE)
    assert captured is not None
    assert float(captured[1]) / 100 == pytest.approx(store.read("captured").min(), abs=1e-5)
    assert re.search(r"^noise +[\d.]+% \|[ ▁▂▃▄▅▆▇█]{24}\| [\d.]+% .*\(log\)$", ran.out, re.MULTILINE)
    document = psfgen("stats", finished, "--json").document
    assert np.shape(document["mean_psf_binned"]) == (2, 5, 5)
    assert document["wavelength_um"] == [0.48, 0.64]
    assert "mean_psf" not in document, "64 x 64 numbers a channel are for the picture"


def test_the_picture_shows_the_mean_kernels_in_their_colours(psfgen: Psfgen, store: Path) -> None:
    def redden(name: str, values: NDArray[Any]) -> None:
        if name == "psf":
            values[:] = 0
            values[..., -1, 0, 0] = 1  # the longest wavelength, top left

    for block in range(3):
        doctor(store, block, redden)
    ran = psfgen("stats", store, "--out", "stats.png", "--json")
    assert ran.document["paths"]["picture"] == "stats.png"
    picture = np.asarray(Image.open("stats.png").convert("RGB")).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1:] < 60).all(axis=-1)
    assert red.any()
    assert not ((picture[..., 2] > 200) & (picture[..., :2] < 60).all(axis=-1)).any()


def test_an_incomplete_store_is_refused(psfgen: Psfgen, store: Path, tmp_path: Path) -> None:
    (store / "ledger/depth-0001.json").unlink()
    before = contents(tmp_path)
    ran = psfgen("stats", store, "--out", "stats.png")
    assert (ran.code, ran.out) == (3, "")
    assert re.fullmatch(r"error: [^\n]* is incomplete: [^\n]*\n", ran.err)
    assert contents(tmp_path) == before


def test_a_corrupt_chunk_is_one_line(psfgen: Psfgen, store: Path) -> None:
    chunk = store / "psf/c/1/2/0/0/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    ran = psfgen("stats", store)
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(r"error: [^\n]*psf is corrupt [^\n]*\n", ran.err)


def test_a_picture_that_cannot_be_written_is_one_line(psfgen: Psfgen, finished: Path) -> None:
    Path("file").write_text("")
    ran = psfgen("stats", finished, "--out", "file/stats.png")
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch(r"error: picture file/stats\.png cannot be written: [^\n]*\n", ran.err)


def test_statistics_need_no_ray_tracer(finished: Path) -> None:
    code = "import sys; from psfgen.cli import cli; cli(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    args = [sys.executable, "-c", code, "stats", str(finished)]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert not {"torch", "deeplens", "numba", "matplotlib"} & set(done.stdout.split())
