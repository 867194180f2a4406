"""Rays as many as a tolerance asks for, on the command line and in the store, and what a user is told of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Psfgen, contents, doctor, flags, lens, tiny, variant

from psfgen.block import cut_block
from psfgen.blur import Blur
from psfgen.config import RenderConfig
from psfgen.errors import ConfigError, PlanMismatch
from psfgen.plan import Plan
from psfgen.render import load, render
from psfgen.shortfalls import shortfalls
from psfgen.specimens import Specimens
from psfgen.store import Store, open_store

ADAPTIVE: dict[str, Any] = {"spp": None, "tolerance": 0.02, "depth": "1m,3m", "kernel_px": 16, "pitch_um": 12.0}


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store made to a tolerance, not to be changed."""
    path = tmp_path_factory.mktemp("adaptive") / "psfs.zarr"
    render(tiny(path, **ADAPTIVE))
    return path


def rays_of(store: Store) -> int:
    return sum(int(store.ledger.read(block)["rays"]) for block in store.blocks)


# --- in the store -----------------------------------------------------------------------------------------------------


def test_a_tolerance_is_kept_with_fewer_rays(adaptive: Path, tmp_path: Path) -> None:
    """Every kernel's noise is below it, and its true error too, against a store of many more rays."""
    store = open_store(adaptive)
    noise = store.read("noise")
    assert noise.max() <= 0.02
    truth = render(tiny(tmp_path / "truth.zarr", **{**ADAPTIVE, "tolerance": None, "spp": 2**17, "seed": 5}))
    a, b = store.read("psf"), truth.read("psf")
    error = np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))
    assert (error <= 1.5 * noise).mean() > 0.9
    assert error.max() < 2 * 0.02
    finer = render(tiny(tmp_path / "finer.zarr", **{**ADAPTIVE, "tolerance": 0.01}))
    assert rays_of(store) < rays_of(finer) < rays_of(truth)
    assert not any("error above" in warning for warning in shortfalls(store))


def test_a_tolerance_that_needs_no_more_than_the_pilot_gets_the_pilot(tmp_path: Path) -> None:
    store = render(tiny(tmp_path / "psfs.zarr", **{**ADAPTIVE, "tolerance": 0.9, "depth": "1m"}))
    fixed = render(tiny(tmp_path / "fixed.zarr", **{**ADAPTIVE, "tolerance": None, "spp": 2048, "depth": "1m"}))
    assert rays_of(store) == rays_of(fixed) == 3 * 2 * 2048
    assert np.array_equal(store.read("psf"), fixed.read("psf"))


def test_spp_max_ends_it_and_the_user_is_told(tmp_path: Path) -> None:
    job = {**ADAPTIVE, "tolerance": 1e-4, "depth": "1m", "spp_max": 4096}
    store = render(tiny(tmp_path / "psfs.zarr", **job))
    noise = store.read("noise")
    assert rays_of(store) == 3 * 2 * (2048 + 4096)
    told = [warning for warning in shortfalls(store) if "estimated error" in warning]
    assert len(told) == 1
    assert re.match(
        r"36 of 36 kernels have an estimated error above the tolerance of 0\.01 % "
        rf"\(worst {100 * noise.max():.3g} % at field .*"
        rf"median {100 * np.median(noise):.3g} %, binned .*\); a larger spp_max \(now 4096\) or a larger --toler",
        told[0],
    )


@pytest.mark.parametrize(("sampling", "spp_max"), [("spiral", 16), ("sobol", 16), ("spiral", 1000), ("sobol", 4096)])
def test_the_pilot_is_no_larger_than_spp_max(tmp_path: Path, sampling: str, spp_max: int) -> None:
    job = {**ADAPTIVE, "depth": "1m", "spp_max": spp_max, "sampling": sampling, "tolerance": 1e-3}
    store = render(tiny(tmp_path / "psfs.zarr", **job))
    assert rays_of(store) <= 3 * 2 * (spp_max + 2048 * (spp_max > 2048))
    assert store.missing() == []


def test_another_tolerance_is_another_plan(adaptive: Path) -> None:
    before = contents(adaptive)
    for change, message in (
        ({"tolerance": 0.05}, "tolerance is 0.02, this render asks for 0.05"),
        ({"tolerance": None}, "tolerance is 0.02, this render asks for 0.03"),
        ({"tolerance": None, "spp": 256}, "tolerance is 0.02, this render asks for None"),
        ({"spp_max": 2**12}, "spp_max is 1048576, this render asks for 4096"),
    ):
        with pytest.raises(PlanMismatch, match=re.escape(message)):
            render(tiny(adaptive, **{**ADAPTIVE, **change}))
    assert contents(adaptive) == before


def test_resumed_with_the_same_tolerance_nothing_is_done(adaptive: Path) -> None:
    assert render(tiny(adaptive, **ADAPTIVE, memory_mib=300), on_kernels=pytest.fail).missing() == []


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "args", "spp", "tolerance"),
    [
        ("tolerance: 0.1", ["--spp", "64"], 64, None),
        ("spp: 64", ["--tolerance", "0.1"], None, 0.1),
        ("spp: 64", [], 64, None),
        ("tolerance: 0.1", [], None, 0.1),
        ("", [], None, 0.03),
        ("spp: 64", ["--set", "spp=null"], None, 0.03),
        ("tolerance: 0.1", ["--set", "tolerance=0.2", "--spp", "32"], 32, None),
    ],
)
def test_a_flag_takes_the_place_of_the_other_one_in_a_file(
    psfgen: Psfgen, tmp_path: Path, text: str, args: list[str], spp: int | None, tolerance: float | None
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    config = psfgen("render", "job.yaml", *flags(spp=None), *args, "--dry-run", "--json").document["config"]
    assert (config["spp"], config["tolerance"]) == (spp, tolerance)


def test_a_dry_run_tells_the_effort_and_the_memory(psfgen: Psfgen, tmp_path: Path) -> None:
    dry = psfgen("render", *flags(spp=None, memory_mib=300), "--dry-run").out
    assert "noise at most 0.03\nengine geometric, tracer numba" in dry
    assert "at most 300 MiB of memory above the imports" in dry
    given = psfgen("render", *flags(tracer="torch"), "--dry-run").out
    assert "256 rays a kernel\nengine geometric, tracer torch" in given
    wave = flags(spp=None, engine="wave", bandwidth_um=0.02, response="area")
    assert "engine wave, bands 0.02 um wide, area samples, tracer numba" in psfgen("render", *wave, "--dry-run").out
    document = psfgen("render", *flags(spp=None, memory_mib=300), "--dry-run", "--json").document
    assert document["memory_bytes"] == 300 * 2**20
    assert document["config"]["tracer"] == "numba"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_large_grid_is_quick(psfgen: Psfgen) -> None:
    ran = psfgen("render", "--grid", 300, "--dry-run", "--json")
    assert ran.code == 0
    assert ran.document["kernels"] == 300 * 300 * 8 * 4 * 3


def test_verbose_tells_where_the_time_went(psfgen: Psfgen) -> None:
    ran = psfgen("render", *flags(), "-v")
    assert ran.code == 0
    told = re.search(
        r"time: start-up [\d.]+ s .*, then ([\d.]+) s; .* ([\d.]+) s tracing (\d+) million rays, ([\d.]+) s writing",
        ran.err,
    )
    assert told, ran.err
    whole, tracing, rays, writing = map(float, told.groups())
    assert tracing + writing <= whole + 0.2
    assert rays == round(3 * 3 * 2 * 256 / 1e6)
    assert "time:" not in psfgen("render", *flags(), "--overwrite").err


BAD: dict[str, tuple[list[str], str]] = {
    "both": ([*flags(spp=64), "--tolerance", "0.1"], r"spp 64 and tolerance 0\.1 exclude each other; give one"),
    "both in a file": (["job.yaml"], r"spp 64 and tolerance 0\.1 exclude each other"),
    "no error": (flags(spp=None, tolerance=0), r"tolerance: .*greater than 0, got 0"),
    "any error": (flags(spp=None, tolerance=1), r"tolerance: .*less than 1, got 1"),
    "less than none": (flags(spp=None, tolerance=-0.1), r"tolerance: .*got -0\.1"),
    "nan": (flags(spp=None, tolerance="nan"), r"tolerance: .*"),
    "too few rays": (flags(spp=8), r"spp: .*greater than or equal to 16, got 8"),
    "too many rays": (flags(spp=2**21), r"spp: .*less than or equal to 1048576"),
    "no power of two": ([*flags(spp=100), "--set", "sampling=sobol"], r"spp 100 is no power of two"),
    "little memory": (flags(memory_mib=10), r"memory_mib: .*greater than or equal to 64, got 10"),
    "too little memory": (
        flags(memory_mib=64, kernel_px=512),
        r"memory_mib 64 is too little: 3 x 3 kernels of 512 x 512 samples need \d+; --set memory_mib=\d+, or fewer",
    ),
    "numba and a foreign surface": (
        flags(lens="triplet-variant.json", tracer="numba"),
        r"tracer numba does not know surface 2 \(Spheric.* of lens triplet-variant; use tracer auto or deeplens",
    ),
    "deeplens without rays": (
        flags(engine="deeplens", spp=None, depth="1m"),
        r"engine deeplens has no tolerance: .*--spp",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dry", [False, True])
def test_bad_input_is_one_line_and_touches_nothing(
    psfgen: Psfgen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dry: bool
) -> None:
    args, message = BAD[name]
    (tmp_path / "job.yaml").write_text("spp: 64\ntolerance: 0.1\n")
    if "foreign" in name:
        from psfgen.optics import trace

        variant(tmp_path, "triplet", lambda document: None)
        monkeypatch.setattr(trace, "foreign_surface", lambda surfaces: "surface 2 (Spheric)")
    before = contents(tmp_path)
    ran = psfgen("render", *args, *(["--dry-run"] if dry else []))
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ran.err), ran.err
    assert contents(tmp_path) == before


def test_memory_that_is_too_little_for_one_worker_of_many_is_refused(tmp_path: Path) -> None:
    found, plan = load(tiny(tmp_path / "psfs.zarr", kernel_px=256, memory_mib=256), "cpu")
    engine = Specimens(found, plan).engine(0)
    assert cut_block(engine, plan, cores=1).bands
    with pytest.raises(ConfigError, match=r"or fewer workers"):
        cut_block(engine, plan, cores=1, share=16)


# --- diffraction ------------------------------------------------------------------------------------------------------

SHARP: dict[str, Any] = {"lens": "phone", "depth": "2m", "focus": "2m", "spp": 1024, "kernel_px": 32, "bins": 8}


def test_sharp_kernels_are_told_with_their_airy_radius(tmp_path: Path) -> None:
    store = render(tiny(tmp_path / "psfs.zarr", **{**SHARP, "pitch_um": 1.0}))
    told = [warning for warning in shortfalls(store) if "diffraction" in warning]
    assert len(told) == 1
    found = re.match(
        r"(\d+) of 18 kernels are so sharp that diffraction.*: Airy radius ([\d.]+) um beside an RMS radius of "
        r"([\d.]+) um and samples of 1 um; --engine wave computes it, a larger --pitch-um hides it",
        told[0],
    )
    assert found, told
    phone = lens("phone")
    working = phone.fnum * 2000 / (2000 - phone.efl_mm)
    count, airy_um, rms_um = int(found[1]), float(found[2]), float(found[3])
    assert 0 < count <= 18
    assert any(airy_um == pytest.approx(1.22 * w * working, rel=0.05) for w in (0.48, 0.64))
    assert airy_um > 0.5 * rms_um
    entries = [store.ledger.read(block)["diffraction"] for block in store.blocks]
    assert sum(entry["kernels"] for entry in entries) == count


def test_the_worst_of_all_blocks_is_told(store: Path) -> None:
    """By the ratio of the radii, not by how many kernels a block has."""
    opened = open_store(store)
    found = [(5, 2.0, 1.0), (1, 3.0, 0.5), (9, 4.0, 3.0)]
    for block, (kernels, airy_um, rms_um) in zip(opened.blocks, found, strict=True):
        entry = opened.ledger.read(block)
        entry["diffraction"] = {"kernels": kernels, "airy_um": airy_um, "rms_um": rms_um}
        opened.ledger.commit(block, entry)
    told = next(warning for warning in shortfalls(opened) if "diffraction" in warning)
    assert told.startswith("15 of 108 kernels")
    assert "Airy radius 3 um beside an RMS radius of 0.5 um and samples of 24 um" in told


def test_coarse_samples_hide_diffraction(tmp_path: Path) -> None:
    store = render(tiny(tmp_path / "psfs.zarr", **{**SHARP, "pitch_um": 8.0}))
    assert not any("diffraction" in warning for warning in shortfalls(store))
    assert store.ledger.read("depth-0000")["diffraction"]["kernels"] == 0


def blur(**changes: Any) -> Blur:
    thin: dict[str, Any] = {"focus": "1m,inf", "wavelength": "0.4,0.8", "pitch_um": 2.0, "kernel_px": 8, "bins": 4}
    config = RenderConfig(lens="triplet", spp=64, **{**thin, **changes})
    return Blur(lens("triplet"), Plan.of(config, lens("triplet")))


def test_the_airy_radius_is_that_of_the_working_f_number() -> None:
    triplet = lens("triplet")
    near = 1000 / (1000 - triplet.efl_mm)
    wanted = 1.22 * triplet.fnum * np.outer([near, 1.0], [0.4, 0.8])
    np.testing.assert_allclose(blur().airy_um, wanted, rtol=1e-12)


def test_a_kernel_counts_where_the_airy_disc_is_not_hidden() -> None:
    """By its own spot or by the samples, each at twice the Airy radius; the worst is kept over all calls."""
    found = blur()
    airy_px = found.airy_um / found.pitch_um
    assert found.summary == {"kernels": 0, "airy_um": 0.0, "rms_um": 0.0}
    found.count((2.01 * airy_px)[None].astype(np.float32), slice(0, 2))
    assert found.summary["kernels"] == 0
    rms = np.stack([1.9 * airy_px, 2.1 * airy_px]).astype(np.float32)
    rms[0, 1, 0] *= 0.5
    found.count(rms, slice(0, 2))
    assert found.summary["kernels"] == 4
    assert found.summary["airy_um"] == pytest.approx(found.airy_um[1, 0])
    assert found.summary["rms_um"] == pytest.approx(0.95 * found.airy_um[1, 0], rel=1e-5)
    found.count((1.5 * airy_px)[None, 1:].astype(np.float32), slice(1, 2))
    assert found.summary["kernels"] == 6, "of the focus distances that a call is about"
    assert found.summary["rms_um"] == pytest.approx(0.95 * found.airy_um[1, 0], rel=1e-5), "the worst stays"
    coarse = blur(pitch_um=float(2.01 * found.airy_um.max()))
    coarse.count(np.zeros((1, 2, 2), np.float32), slice(0, 2))
    assert coarse.summary["kernels"] == 0
    nothing = blur()
    nothing.count(np.full((1, 2, 2), np.nan, np.float32), slice(0, 2))
    assert nothing.summary["kernels"] == 0, "no light, no spot"


# --- what falls short, to the number ----------------------------------------------------------------------------------


def test_shortfalls_count_and_place_what_they_tell(store: Path) -> None:
    """A store doctored in known places: two kernels truncated, one dark, one vignetted point, one noisy."""
    opened = open_store(store)
    captured, throughput, noise = (opened.read(name) for name in ("captured", "throughput", "noise"))
    captured[:], throughput[:], noise[:] = 0.99, 0.5, 0.01
    captured[1, 2, 0, 1, 0], captured[0, 1, 2, 2, 1] = 0.25, 0.85
    captured[0, 0, 1, 2, 1] = 0.0
    throughput[2, 1, 1, 0] = 0.0
    captured[:, 2, 1, 1, 0] = 0.0
    noise[1, 0, 2, 1, 1], noise[0, 0, 1, 2, 1] = 0.5, math.nan
    doctored = {"captured": captured, "throughput": throughput, "noise": noise}

    for block in range(3):

        def change(name: str, values: np.ndarray, depth: int = block) -> None:
            if name in doctored:
                values[:] = doctored[name].take([depth], axis=opened.spec.dims(name).index("depth"))

        doctor(store, block, change)
    cut, noisy, vignetted, missed = shortfalls(open_store(store))
    assert cut.startswith("2 of 108 kernels keep less than 90 % of their energy")
    assert "least 25.0% at field (0.00, -1.00), depth inf mm, focus inf mm, 0.48 um" in cut
    assert noisy.startswith("1 of 108 kernels have an estimated error above 30")
    assert "worst 50 % at field (0.00, 1.00), depth 1000 mm, focus inf mm, 0.64 um, median 1 %" in noisy
    assert vignetted.startswith("2 of 108 kernels get no light")
    assert missed.startswith("1 of 108 kernels miss their window")
    assert "(first at field (1.00, 0.00), depth 1000 mm, focus 2000 mm, 0.64 um)" in missed
