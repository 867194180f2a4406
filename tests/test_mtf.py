"""Modulation transfer: kernels whose transfer is known, directions over the field, the command."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Disk, Psfgen, doctor, tiny
from numpy.typing import NDArray
from PIL import Image
from scipy.special import j1
from scipy.stats import norm

from psfgen.mtf import CYCLES_PER_PX, Page, first_below, pages, transfer
from psfgen.rechunk import rechunk
from psfgen.render import render
from psfgen.select import Selection
from psfgen.store import open_store

Array = NDArray[np.float64]
RIGHT = np.array([[[1.0, 0.0]]])


def splat(points: Array, k: int) -> Array:
    """A kernel [k, k], rows from top, of points [2, N] (x, y in samples) that share their weight bilinearly."""
    found = np.zeros((k, k))
    column, row = points[0] + (k - 1) / 2, (k - 1) / 2 - points[1]
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    for i, j in np.ndindex(2, 2):
        share = np.abs(1 - i - (row - top)) * np.abs(1 - j - (column - left))
        np.add.at(found, (top + i, left + j), share)
    return found / points.shape[1]


def grid(side: int, reach: float) -> Array:
    """Points [2, N] of a fine square, `reach` samples each way."""
    axis = (2 * np.arange(side) + 1 - side) / side * reach
    return np.array(np.meshgrid(axis, axis)).reshape(2, -1)


def disc(radius: float) -> Array:
    points = grid(1000, radius)
    return points[:, np.hypot(*points) < radius]


def gaussian(side: int, *sigmas: float) -> Array:
    """Points [2, side^2] of a Gaussian: its quantiles, each way."""
    quantiles = norm.ppf((np.arange(side) + 0.5) / side)
    return np.array(np.meshgrid(*(sigma * quantiles for sigma in sigmas))).reshape(2, -1)


def gaussian_mtf(sigma: float) -> Array:
    """exp(-2 (pi sigma f)^2)."""
    return np.exp(-2 * (np.pi * sigma * CYCLES_PER_PX) ** 2)


def curves(kernel: Array, away: Array = RIGHT, captured: float = 1.0) -> Array:
    """Tangential and sagittal [2, S] of one kernel."""
    return transfer(kernel[None, None, None], np.full((1, 1, 1), captured), away)[:, 0, 0, 0]


def test_a_gaussian() -> None:
    found = curves(splat(gaussian(1500, 2.0, 3.0), 64))
    for curve, sigma in zip(found, (2.0, 3.0), strict=True):
        np.testing.assert_allclose(curve, gaussian_mtf(sigma), atol=2e-3)
        half = np.sqrt(np.log(2) / 2) / np.pi / sigma
        assert first_below(curve[None], 0.5)[0] == pytest.approx(half, rel=5e-3)


@pytest.mark.parametrize("degrees", [0, 30, 45])
def test_a_defocus_disc(degrees: float) -> None:
    """2 J1(z) / z with z = 2 pi r f, in any direction."""
    angle = np.radians(degrees)
    found = curves(splat(disc(6.3), 64), np.array([[[np.cos(angle), np.sin(angle)]]]))
    z = np.maximum(2 * np.pi * 6.3 * CYCLES_PER_PX, 1e-9)
    expected = np.tile(np.abs(2 * j1(z) / z), (2, 1))
    np.testing.assert_allclose(found[:, :101], expected[:, :101], atol=2e-3)
    np.testing.assert_allclose(found, expected, atol=0.02)  # what is left beyond the samples folds back


def test_light_beyond_the_window_has_no_modulation() -> None:
    kernel = splat(disc(3.0), 32)
    whole, part = curves(kernel), curves(kernel, captured=0.8)
    assert part[:, 0] == pytest.approx(1)
    np.testing.assert_allclose(part[:, 1:], 0.8 * whole[:, 1:])


def test_where_a_curve_falls_to_a_half() -> None:
    falling = np.clip(1 - 4 * CYCLES_PER_PX, 0, 1)
    found = first_below(np.stack([falling, np.full(201, 0.7), np.full(201, np.nan)]), 0.5)
    np.testing.assert_allclose(found, [0.125, np.inf, np.nan])


# --- over the field ---------------------------------------------------------------------------------------------------


def one_page(store: Path, **options: str) -> Page:
    return next(iter(pages(Selection.of(open_store(store), **{"copy": 0, "depth": "1m", "focus": "2m", **options}))))


def long(along: tuple[float, float]) -> Array:
    """A Gaussian kernel whose sigma is 2.5 samples along a unit vector and 1.2 across it."""
    x, y = along
    a, b = gaussian(300, 2.5, 1.2)
    return splat(np.stack([a * x - b * y, a * y + b * x]), 24)


@pytest.fixture(scope="module")
def radial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose kernels are long away from the centre of a field of 5 x 5, wider than high."""
    path = tmp_path_factory.mktemp("radial") / "psfs.zarr"
    render(tiny(path, grid=5, depth="1m", focus="2m", kernel_px=24, sensor_mm="36,24"))

    def draw(name: str, values: NDArray[np.float32]) -> None:
        if name == "captured":
            values[:] = 1
        if name == "psf":
            for row, column in np.ndindex(5, 5):
                x, y = 36 * (column - 2), 24 * (row - 2)
                far = np.hypot(x, y) or 1.0
                values[..., row, column, :, :, :] = long((x / far, y / far) if x or y else (1, 0))

    doctor(path, 0, draw)
    return path


def test_directions_are_those_of_the_field(radial: Path) -> None:
    """Wherever the point: long kernels blur the tangential lines, and no mirror swaps the two."""
    found = one_page(radial)
    for shown, sigma in zip(found.curves, (2.5, 1.2), strict=True):
        np.testing.assert_allclose(shown, np.broadcast_to(gaussian_mtf(sigma), shown.shape), atol=0.01)
    assert found.places == {"centre": (2, 2), "0.7 field": (3, 3), "corner": (4, 4)}


def test_mirrored_kernels_have_the_same_curves(tmp_path: Path) -> None:
    """Those that a render makes from one another by the symmetry of the lens."""
    render(tiny(tmp_path / "psfs.zarr", grid=5, depth="1m", focus="2m", sensor_mm="24,24", kernel_px=32))
    found = one_page(tmp_path / "psfs.zarr").curves
    for mirrored in (found[:, ::-1], found[:, :, ::-1], found.swapaxes(1, 2)):
        off_axis = np.ones((5, 5), bool)
        off_axis[2, 2] = False
        np.testing.assert_allclose(mirrored[:, off_axis], found[:, off_axis], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_chunks_and_selections_change_nothing(radial: Path, tmp_path: Path) -> None:
    whole = one_page(radial)
    rechunk(str(radial), str(tmp_path / "r.zarr"), "field_y=1,wavelength=1")
    np.testing.assert_allclose(one_page(tmp_path / "r.zarr").curves, whole.curves, atol=1e-12)
    alone = one_page(radial, wavelength="0.64")
    assert (alone.channels, whole.channels) == (["0.64"], ["0.48", "0.64", "all"])
    np.testing.assert_allclose(alone.curves[..., 0, :], whole.curves[..., 1, :], atol=1e-12)


@pytest.mark.parametrize("response", ["bilinear", "area", "point"])
def test_an_ideal_lens_is_limited_by_diffraction(thin_lens: str, tmp_path: Path, response: str) -> None:
    """(2 / pi) (acos v - v sqrt(1 - v^2)), v = f wavelength F/#: Goodman, 6.3.2."""
    store = render(
        tiny(
            tmp_path / "psfs.zarr",
            lens=thin_lens,
            grid=1,
            depth="inf",
            focus="inf",
            fnum=8.0,
            engine="wave",
            response=response,
            wavelength="0.5",
            kernel_px=200,
            pitch_um=1.0,
            spp=2**17,
        )
    )
    (found,) = pages(Selection.of(store, copy=0))
    v = np.clip(found.cycles_per_mm * 0.0005 * 8, 0, 1)
    expected = 2 / np.pi * (np.arccos(v) - v * np.sqrt(1 - v**2))
    np.testing.assert_allclose(found.curves[:, 0, 0, 0], np.tile(expected, (2, 1)), atol=2e-3)
    assert found.places == {"centre": (0, 0)}
    assert found.mtf50[0, 0, 0, 0] == pytest.approx(0.4040 / (0.0005 * 8), rel=0.01)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_answers(psfgen: Psfgen, radial: Path) -> None:
    ran = psfgen("mtf", radial, "--csv", "m.csv", "--json")
    assert ran.code == 0
    document = ran.document
    assert document["paths"] == {"store": str(radial), "pictures": ["psfs-mtf.png"], "csv": "m.csv"}
    np.testing.assert_allclose(document["cycles_per_mm"], np.linspace(0, 0.5, 51) / 0.024)
    (page,) = document["pages"]
    assert np.shape(page["mtf50"]["tangential"]) == (5, 5)
    assert page["mtf50"]["tangential"][0][0] == pytest.approx(np.sqrt(np.log(2) / 2) / np.pi / 2.5 / 0.024, rel=0.02)
    assert [point["place"] for point in page["points"][::3]] == ["centre", "0.7 field", "corner"]
    with Path("m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 5 * 3
    assert {row["wavelength_um"] for row in rows} == {"0.48", "0.64", "all"}
    assert float(rows[0]["mtf50_tangential"]) == page["mtf50"]["tangential"][0][0] or rows[0]["wavelength_um"] != "all"
    assert float(rows[-1]["tangential_10.4167"]) == pytest.approx(page["points"][-1]["tangential"][25])
    with Image.open("psfs-mtf.png") as picture:
        assert picture.size == (1100, 720)
    text = psfgen("mtf", radial, "--out", "other.png").out
    assert re.search(r"^corner +1\.000 +1\.000 +all  tangential +3\.\d+ +0\.07\d* ", text, re.MULTILINE)
    assert text.endswith("other.png\n")


def test_a_page_a_focus_distance(psfgen: Psfgen, finished: Path) -> None:
    document = psfgen("mtf", finished, "--json").document
    assert [(page["depth_mm"], page["focus_mm"]) for page in document["pages"]] == [(3000, 2000), ("inf", "inf")]
    assert document["paths"]["pictures"] == [
        "psfs-mtf-depth-3m-focus-2m.png",
        "psfs-mtf-depth-inf-focus-inf.png",
    ]
    assert all(Path(path).exists() for path in document["paths"]["pictures"])
    chosen = psfgen("mtf", finished, "--depth", "1m,3m", "--focus", "inf", "--json").document
    assert [(page["depth_mm"], page["focus_mm"]) for page in chosen["pages"]] == [(1000, "inf"), (3000, "inf")]


def test_copies(psfgen: Psfgen, copies: Path) -> None:
    args = ("mtf", copies, "--focus", "2m", "--json")
    first, second = (psfgen(*args, "--copy", n).document["pages"] for n in (0, 1))
    assert first[0]["mtf50"] != second[0]["mtf50"]
    assert psfgen(*args).document["pages"] == first


def test_dark_kernels_have_none(psfgen: Psfgen, dark: Path) -> None:
    ran = psfgen("mtf", dark, "--focus", "2m", "--json")
    assert ran.code == 0
    half = ran.document["pages"][0]["mtf50"]["sagittal"]
    store = open_store(dark)
    lit = (store.read("captured")[0, 0] > 0).all(axis=-1)
    assert [[value is not None for value in row] for row in half] == lit.tolist()
    assert re.search(r"^corner .* -  +-  +-  +- ", psfgen("mtf", dark, "--focus", "2m").out, re.MULTILINE)


def test_nothing_but_dark_kernels(psfgen: Psfgen, tmp_path: Path) -> None:
    render(tiny(tmp_path / "psfs.zarr", depth="2m", focus="2m"))

    def darken(name: str, values: NDArray[np.float32]) -> None:
        if not name.startswith("chief"):
            values[:] = 0.0 if name in ("captured", "throughput") else np.nan

    doctor(tmp_path / "psfs.zarr", 0, darken)
    ran = psfgen("mtf", "--json")
    assert (ran.code, ran.document["warnings"]) == (0, [])


def test_kernels_sharper_than_the_samples_are_named(psfgen: Psfgen, store: Path) -> None:
    def sharpen(name: str, values: NDArray[np.float32]) -> None:
        if name == "captured":
            values[:] = 1
        if name == "psf":
            values[:] = 0
            values[..., 5:7, 5:7] = 0.25

    for block in range(3):
        doctor(store, block, sharpen)
    (warning,) = psfgen("mtf", store, "--json").document["warnings"]
    assert "smaller --pitch-um" in warning


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (("--depth", "7m"), 2, r"--depth: .* holds no depth of 7000 mm; it holds 1000, 3000, inf"),
        (("--wavelength", "blue"), 2, r"--wavelength blue: 'blue' is no list of numbers"),
        (("--copy", "3"), 2, r"--copy 3: .* holds copies 0 to 0"),
        (("--csv", "file/m.csv"), 1, r"table file/m\.csv cannot be written: .*"),
        (("--out", "file/m.png"), 1, r"picture file/m\.png cannot be written: .*"),
    ],
)
def test_bad_input_is_one_line(psfgen: Psfgen, finished: Path, args: tuple[str, ...], code: int, line: str) -> None:
    Path("file").write_text("")
    ran = psfgen("mtf", finished, "--focus", "inf", *args)
    assert (ran.code, ran.out) == (code, "")
    assert re.fullmatch(rf"error: {line}", ran.err.splitlines()[-1])


def test_what_cannot_be_written_is_told_before_the_work(psfgen: Psfgen, finished: Path) -> None:
    Path("m.csv").mkdir()
    ran = psfgen("mtf", finished, "--out", "m.png", "--csv", "m.csv")
    assert ran.code == 1
    assert ran.err.endswith("error: table m.csv cannot be written: Is a directory; choose another --csv\n")
    assert "18/18" not in ran.err
    assert not Path("m.png").exists()


def test_a_table_for_which_there_is_no_space_leaves_the_old_one(disk: Disk, finished: Path, psfgen: Psfgen) -> None:
    disk.remount("size=8k")
    (disk.path / "m.csv").write_text("before")
    ran = psfgen("mtf", finished, "--csv", disk.path / "m.csv")
    assert (ran.code, ran.out) == (1, "")
    assert "m.csv cannot be written: No space left on device" in ran.err
    assert [(path.name, path.read_text()) for path in disk.path.iterdir()] == [("m.csv", "before")]


def test_no_store_and_half_a_store_are_refused(psfgen: Psfgen, store: Path) -> None:
    assert psfgen("mtf", "nothing.zarr").code == 1
    (store / "ledger/depth-0001.json").unlink()
    ran = psfgen("mtf", store)
    assert (ran.code, ran.out) == (3, "")
    assert re.fullmatch(r"error: [^\n]* is incomplete: [^\n]*\n", ran.err)


def test_it_needs_no_ray_tracer(finished: Path, tmp_path: Path) -> None:
    code = "import sys; from psfgen.cli import cli; cli(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    args = [sys.executable, "-c", code, "mtf", str(finished), "--out", str(tmp_path / "m.png")]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert not {"torch", "deeplens", "numba"} & set(done.stdout.split())
