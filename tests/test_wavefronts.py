"""Wavefronts as numbers: RMS, peak to valley, Zernike coefficients, Strehl ratios; the command."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Psfgen, in_optiland, lens, variant
from deeplens.light import Ray
from PIL import Image

from psfgen import catalogue
from psfgen.config import RenderConfig
from psfgen.engines.wave import WaveEngine
from psfgen.optics import pupil
from psfgen.optics.diffraction import Screen
from psfgen.optics.lens import Lens
from psfgen.optics.opd import CELLS, Opd, Strehl
from psfgen.optics.wavefront import Sphere, Wavefront
from psfgen.optics.zernike import COUNT, noll, terms
from psfgen.plan import Plan

WAVELENGTH_UM = 0.5876


def engine(of: Lens, **changes: Any) -> WaveEngine:
    given = {"wavelength": (WAVELENGTH_UM,), "depth": "inf", "focus": "inf", "engine": "wave", **changes}
    return WaveEngine(of, Plan.of(RenderConfig(**given), of))


def seen(made: WaveEngine, field: tuple[float, float], shift_mm: tuple[float, float, float] = (0, 0, 0)) -> Opd:
    """The wavefront of a field point at infinity, on a sphere about a point that lies beside the chief ray's image."""
    aim = made.aim(torch.tensor([field], dtype=torch.float64), math.inf)
    sphere = made.sphere(aim, 0, 0)
    moved = Sphere(sphere.centre_mm + np.array(shift_mm), sphere.curvature)
    return Opd.of(made.look(aim, 0, made.lines(0)[0].surfaces), moved, made.config.wavelength[0] / 1000)


def only(**wanted: float) -> np.ndarray:
    """Coefficients [COUNT] that are 0 but for some, named as z4=0.1."""
    found = np.zeros(COUNT)
    for name, value in wanted.items():
        found[int(name[1:]) - 1] = value
    return found


@pytest.mark.parametrize("field", [(0.0, 0.0), (0.7, -0.4)])
def test_an_ideal_lens_has_no_aberration(thin_lens: str, field: tuple[float, float]) -> None:
    opd = seen(engine(lens(thin_lens)), field)
    assert opd.rms() < 1e-6
    assert opd.pv < 1e-5
    assert opd.open == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shift_mm", [0.004, -0.03])
def test_a_moved_sensor_is_defocus(thin_lens: str, shift_mm: float) -> None:
    """Paths to the sphere about F + dz, less those to the sphere about F: |Q - F'| - |Q - F|, in closed form."""
    made = engine(lens(thin_lens))
    found = seen(made, (0, 0), (0, 0, shift_mm))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r2 = (nodes + 1) / 2
    f, sin2 = 50.0, 12.5**2 * r2 / (50.0**2 + 12.5**2 * r2)
    # The ray that lands at F crosses the sphere of radius R about F' where it is R away from F'.
    radius = f + shift_mm
    cos = np.sqrt(1 - sin2)
    waves = (np.sqrt(radius**2 - shift_mm**2 * sin2) - shift_mm * cos) / (WAVELENGTH_UM / 1000)
    rms = math.sqrt(np.average(np.square(waves - np.average(waves, weights=weights)), weights=weights))
    z4 = np.average(waves * math.sqrt(3) * (2 * r2 - 1), weights=weights)
    assert found.coefficients("noll")[3] == pytest.approx(z4, rel=1e-4)
    assert found.rms() == pytest.approx(rms, rel=2e-3)
    assert found.rms(3) == pytest.approx(found.rms(), rel=1e-6)
    assert found.rms(4) < 0.02 * found.rms()
    edge = shift_mm * (1 - 50 / math.hypot(50, 12.5)) / (WAVELENGTH_UM / 1000)
    assert found.pv == pytest.approx(abs(edge), rel=1e-3)
    assert found.coefficients("fringe")[3] == pytest.approx(z4 * math.sqrt(3), rel=1e-4)
    assert math.copysign(1, z4) == math.copysign(1, shift_mm)  # the image lies in front of a sensor moved away


def test_a_point_beside_the_image_is_tilt(thin_lens: str) -> None:
    """W = -x sin(angle) at the point x beside it; sin(angle) of the aperture is 1 / sqrt(1 + (2 F/#)^2)."""
    x_mm = 0.002
    found = seen(engine(lens(thin_lens)), (0, 0), (x_mm, 0, 0)).coefficients("fringe")
    edge = -x_mm * 12.5 / math.hypot(12.5, 50) / (WAVELENGTH_UM / 1000)
    assert found[1] == pytest.approx(edge, rel=0.03)  # a sine has some coma in it
    assert np.abs(found[2:6]).max() < 1e-3 * abs(edge)


def test_pupil_and_field_are_turned_alike() -> None:
    """What is vignetted at field +x is not at field -x, and coma points away from the axis."""
    made = engine(lens("double_gauss"))
    right, up = seen(made, (0.9, 0)), seen(made, (0, 0.9))
    np.testing.assert_allclose(up.cover, right.cover.T, atol=1e-6)
    np.testing.assert_allclose(np.nan_to_num(up.map), np.nan_to_num(right.map).T, atol=1e-6)
    np.testing.assert_allclose(right.cover, right.cover[::-1], atol=1e-6)
    assert np.abs(right.cover - right.cover[:, ::-1]).max() > 0.5
    assert right.open < 0.9


@pytest.mark.parametrize("name", ["triplet", "phone"])
def test_the_path_is_that_of_deeplens(name: str) -> None:
    """Its coherent trace to the exit pupil, prolonged to our sphere by the straight line it is."""
    of, made = lens(name), engine(lens(name))
    field = torch.tensor([[0.5, 0.3]], dtype=torch.float64)
    aim = made.aim(field, math.inf)
    sphere, look = made.sphere(aim, 0, 0), made.look(aim, 0, made.lines(0)[0].surfaces)
    points = 0.95 * pupil.spiral(300)
    disc = replace(look.beam, centre_mm=np.zeros(2), axes_mm=of.pupil_r_mm * np.eye(2))
    ours = disc.trace(points.numpy().T)
    open_rays = ours.paths.clear > 0

    o, d = pupil.aim(of, field, math.inf, of.pupil_r_mm * points)
    start = (o * d).sum(-1)  # paths from a plane across the beam
    ray = of.geo.trace2exit_pupil(Ray(o.clone(), d.clone(), WAVELENGTH_UM, is_coherent=True))
    upright = np.array([-1.0, -1.0, 1.0])
    at, course = ray.o.numpy() * upright, ray.d.numpy() * upright
    beside = at - sphere.centre_mm
    along = (beside * course).sum(-1)
    radius = 1 / sphere.curvature
    foot2 = np.square(beside).sum(-1) - along**2
    theirs = start.numpy() + ray.opl.numpy().ravel() - along - np.sqrt(radius**2 - foot2)

    waves = (ours.on(sphere).path - theirs)[open_rays] / (WAVELENGTH_UM / 1000)
    assert open_rays.sum() > 100
    assert waves.std() < 1e-6


@pytest.mark.parametrize("name", ["triplet", "phone"])
def test_coefficients_are_those_of_optiland(name: str) -> None:
    """Sphere, sign and order of terms; optiland launches at the paraxial pupil, so small fields alone are the same."""
    from optiland.wavefront import ZernikeOPD

    of, made = lens(name), engine(lens(name))
    optic = in_optiland(catalogue.shipped()[name], of, WAVELENGTH_UM, made.sensor_z_mm[0])
    optic.set_aperture("EPD", 2 * of.pupil_r_mm)
    optic.fields.set_type("angle")
    field = 0.05
    optic.fields.add(y=0)
    optic.fields.add(y=math.degrees(math.atan(field * of.sensor_mm[1] / 2 / of.efl_mm)))
    optic.wavelengths.add(value=WAVELENGTH_UM, is_primary=True)
    for y, within in ((0, 0.002), (1, 0.02)):
        found = ZernikeOPD(optic, (0, y), WAVELENGTH_UM, num_rings=24, zernike_type="fringe")
        theirs = np.array([float(value) for value in found.coeffs])
        ours = seen(made, (0, -field * y)).coefficients("fringe")  # its rays come from below where a field is above
        assert np.abs(theirs[3:9]).max() > 0.1
        np.testing.assert_allclose(ours[1:16], theirs[1:16], atol=within)


# --- Strehl ratios ----------------------------------------------------------------------------------------------------


def synthetic(rms: float, **shape: float) -> Wavefront:
    """A wavefront of Noll terms whose RMS is `rms` waves of 1 mm, over a disc of 1 of directions."""
    side = 200
    axis = (2 * np.arange(side) + 1 - side) / (side - 4)
    xy = np.array(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    waves = only(**shape) / np.linalg.norm(only(**shape)) * rms @ terms("noll", COUNT, xy)
    r = np.hypot(*xy)
    step = axis[1] - axis[0]
    amplitude = np.clip((1 - r) / step + 0.5, 0, 1)
    flux = float(np.square(amplitude).sum()) * step**2
    path_mm = waves.reshape(side, side)
    hits_mm = -np.array(np.gradient(path_mm, step))
    return Wavefront(step, path_mm, hits_mm, amplitude.reshape(side, side), flux, side**2)


@pytest.mark.parametrize("shape", [{"z4": 1}, {"z8": 1}, {"z7": -1}, {"z6": 1}, {"z5": 1}])
def test_strehl_follows_marechal(shape: dict[str, float]) -> None:
    """exp(-(2 pi sigma)^2) at 1/14 wave RMS: V. N. Mahajan, J. Opt. Soc. Am. 73, 860 (1983)."""
    expected = math.exp(-((2 * math.pi / 14) ** 2))
    found = Strehl.at(synthetic(1 / 14, **shape), 1.0)
    assert found.chief == pytest.approx(expected, rel=0.01)
    assert found.peak == pytest.approx(expected, rel=0.01)
    screen = Screen(3, 0.02, "point")
    light = [screen.light(synthetic(rms, **shape), 1.0)[1, 1] for rms in (1 / 14, 0)]
    assert light[0] / light[1] == pytest.approx(found.chief, rel=1e-6)


def test_tilt_moves_the_peak_and_no_more() -> None:
    found = Strehl.at(synthetic(5.0, z2=1, z3=0.5), 1.0)
    assert found.chief < 0.1
    assert found.peak == pytest.approx(1, abs=2e-3)


def test_an_ideal_lens_has_strehl_1(thin_lens: str) -> None:
    made = engine(lens(thin_lens))
    aim = made.aim(torch.tensor([[0.3, 0.5]], dtype=torch.float64), math.inf)
    found = Strehl.of(made.look(aim, 0, made.lines(0)[0].surfaces), made.sphere(aim, 0, 0), WAVELENGTH_UM / 1000)
    assert found.chief == pytest.approx(1, abs=1e-6)
    assert found.peak == pytest.approx(1, abs=1e-6)


def test_a_part_of_the_pupil_is_fitted_with_the_same_terms() -> None:
    """A wavefront of Zernike terms has the same coefficients however much of it is open."""
    axis = (2 * np.arange(CELLS) + 1 - CELLS) / CELLS
    xy = np.array(np.meshgrid(axis, axis))
    given = only(z4=0.3, z7=-0.2, z11=0.1, z22=0.05)
    waves = np.tensordot(given, terms("noll", COUNT, xy.reshape(2, -1)), 1).reshape(CELLS, CELLS)
    cover = ((np.hypot(*xy) < 1) & (xy[0] < 0.4)).astype(float)
    found = Opd(waves, cover, np.zeros(0))
    np.testing.assert_allclose(found.coefficients("noll")[1:], given[1:], atol=1e-9)
    assert np.nanmean(found.map) == pytest.approx(0, abs=1e-12)


# --- the command ------------------------------------------------------------------------------------------------------

SMALL = ("--lens", "triplet", "--wavelength", "0.55")


def test_the_answers(psfgen: Psfgen) -> None:
    ran = psfgen("wavefront", *SMALL, "--grid", 3, "--out", "w.png", "--csv", "w.csv", "--json")
    assert ran.code == 0
    document = ran.document
    assert document["paths"] == {"csv": "w.csv", "pictures": ["w.png"]}
    assert document["terms"]["noll"][:4] == [list(noll(j)) for j in range(1, 5)]
    rows = document["wavefronts"]
    assert [(row["field_x"], row["field_y"]) for row in rows[:4]] == [(-1, -1), (0, -1), (1, -1), (-1, 0)]
    for row in rows:
        assert row["rms"] >= row["rms_no_tilt"] >= row["rms_no_defocus"] > 0
        assert row["pv"] > row["rms"]
        assert 0 <= row["strehl_chief"] <= row["strehl"] <= 1
        assert len(row["noll"]) == len(row["fringe"]) == COUNT
    axis = rows[4]
    assert np.linalg.norm(axis["noll"]) == pytest.approx(axis["rms"], rel=5e-3)
    with Path("w.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["noll_4"]) for line in table] == [row["noll"][3] for row in rows]
    assert table[0]["depth_mm"] == "inf"
    with Image.open("w.png") as picture:
        assert picture.size[0] > 300
    text = psfgen("wavefront", *SMALL, "--grid", 1).out
    assert re.search(rf"^ +0\.000 +0\.000 +{axis['rms']:.4f} ", text, re.MULTILINE)


def test_points_of_ones_own_and_pages(psfgen: Psfgen) -> None:
    args = (
        "wavefront",
        "--lens",
        "triplet",
        "--field",
        "0,0",
        "--field",
        "0.5,-0.2",
        "--focus",
        "2m,inf",
        "--depth",
        "3m",
    )
    ran = psfgen(*args, "--wavelength", "0.5,0.6", "--out", "w.png", "--json")
    assert ran.document["paths"]["pictures"] == [
        f"w-depth-3m-focus-{focus}-{wavelength}um.png" for focus in ("2m", "inf") for wavelength in ("0.5", "0.6")
    ]
    assert all(Path(path).exists() for path in ran.document["paths"]["pictures"])
    rows = ran.document["wavefronts"]
    assert len(rows) == 8
    assert [(row["focus_mm"], row["wavelength_um"], row["field_x"]) for row in rows[:3]] == [
        (2000, 0.5, 0), (2000, 0.5, 0.5), (2000, 0.6, 0),
    ]  # fmt: skip


def test_lenses_as_built_have_coma_on_the_axis(psfgen: Psfgen) -> None:
    Path("bent.yaml").write_text("- {element: 1, decentre_mm: [0, 0.05]}")
    rows = [
        psfgen("wavefront", *SMALL, "--field", "0,0", *more, "--json").document["wavefronts"][0]
        for more in ((), ("--perturb", "bent.yaml"))
    ]
    assert abs(rows[0]["noll"][6]) < 1e-6
    assert abs(rows[1]["noll"][6]) > 0.05
    assert abs(rows[1]["noll"][7]) < 1e-6


def test_no_light_is_no_number(psfgen: Psfgen) -> None:
    args = (
        "wavefront",
        "--lens",
        "singlet",
        "--field",
        "1.9,1.9",
        "--field",
        "0,0",
        "--wavelength",
        "0.55",
        "--out",
        "w.png",
    )
    rows = psfgen(*args, "--json").document["wavefronts"]
    assert (rows[0]["open"], rows[0]["rms"], rows[0]["strehl"]) == (0, None, None)
    assert rows[0]["noll"] == [None] * COUNT
    assert rows[1]["rms"] > 0
    assert re.search(r"^ +1\.900 +1\.900 +- ", psfgen(*args).out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (("--lens", "tripel"), 2, r"unknown lens 'tripel'; did you mean 'triplet'\?.*"),
        (("--field", "0.5"), 2, r"--field 0\.5: '0\.5' is no pair; write X,Y"),
        (("--field", "nan,0"), 2, r"--field nan,0: 'nan,0' is no pair; write X,Y"),
        (("--wavelength", "550"), 2, r"wavelength: wavelength 550 is not in um.*"),
        (("--wavelength", "9"), 2, r"wavelength 9 um is outside the data of glass .*"),
        (("--depth", "-2m"), 2, r"depth: distance -2m is not positive.*"),
        (("--set", "copies=3", "--set", "tolerances.tilt_deg=0.1"), 2, r"copies 3: wavefronts are those of one lens.*"),
        (("--focus", "1mm"), 2, r"focus 1 mm: .*"),
        (("--csv", "file/w.csv"), 1, r"table file/w\.csv cannot be written: .*"),
        (("--out", "file/w.png"), 1, r"picture file/w\.png cannot be written: .*"),
        (("--out", "w.foo"), 2, r"picture w\.foo: no picture is written as \.foo; use \.png, .*"),
    ],
)
def test_bad_input_is_one_line(psfgen: Psfgen, args: tuple[str, ...], code: int, line: str) -> None:
    Path("file").write_text("")
    ran = psfgen("wavefront", *SMALL, "--grid", 1, *args)
    assert (ran.code, ran.out) == (code, "")
    assert re.fullmatch(rf"error: {line}", ran.err.splitlines()[-1])


def test_what_cannot_be_written_is_told_before_the_work(psfgen: Psfgen) -> None:
    Path("w.csv").mkdir()
    ran = psfgen("wavefront", *SMALL, "--grid", 1, "--out", "w.png", "--csv", "w.csv")
    assert ran.code == 1
    assert ran.err.endswith("error: table w.csv cannot be written: Is a directory; choose another --csv\n")
    assert "1/1" not in ran.err
    assert not Path("w.png").exists()


def test_a_lens_without_a_table_is_refused(psfgen: Psfgen, tmp_path: Path) -> None:
    def strange(document: dict[str, Any]) -> None:
        document["surfaces"][0] |= {"type": "Aspheric", "k": 0.0, "use_ai2": True, "ai": [0.0] * 11}

    ran = psfgen("wavefront", "--lens", variant(tmp_path, "triplet", strange), "--grid", 1)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: lens [^\n]* wavefront behind surface 0 [^\n]* is not known[^\n]*\n", ran.err)
