"""Lenses: what DeepLens makes of a prescription, against optiland, thick-lens formulas and the part's own numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SINGLET_ZMX, in_optiland, lens, tracer, variant
from numpy.typing import NDArray

from psfgen import catalogue
from psfgen.errors import LensError
from psfgen.optics import pupil
from psfgen.optics.lens import Lens

AXIS = torch.zeros(2, dtype=torch.float64)


def digits(value: float) -> int:
    """Decimals a number is written with."""
    return len(repr(value).partition(".")[2]) if isinstance(value, float) else 0


@pytest.mark.parametrize("name", catalogue.names())
def test_the_numbers_beside_a_shipped_prescription_are_its_own(name: str) -> None:
    notes = catalogue.shipped()[name]["psfgen"]
    for key in ("efl_mm", "fnum", "fov_diag_deg"):
        assert round(getattr(lens(name), key), digits(notes[key])) == notes[key], key
    assert (lens(name).pitch_um, lens(name).field_max) == (notes["pitch_um"], notes["field_max"])
    assert notes["source"]
    assert notes["licence"]


def test_the_default_lens_is_the_real_condenser() -> None:
    """Thorlabs ACL12708U: EFL 7.98 mm, near 2.3 um rms where its axis is in focus; read wrongly it has 17 um."""
    condenser = lens("acl12708u")
    assert condenser.efl_mm == pytest.approx(7.977, abs=5e-4)
    rays = condenser.trace(*pupil.aim(condenser, AXIS, math.inf, 2.0 * pupil.spiral(4096)), condenser.reference_um)
    spot_um = 1000 * rays.at(pupil.sensor_z_mm(condenser, tracer(condenser), math.inf))
    assert float(spot_um.square().sum(-1).mean().sqrt()) == pytest.approx(2.28, abs=0.01)


def optiland_hits_mm(
    document: dict[str, Any], of: Lens, o: NDArray[Any], d: NDArray[Any], wavelength_um: float
) -> NDArray[Any]:
    """Where optiland, given the prescription's own numbers, lets rays land at its sensor distance."""
    from optiland.rays import RealRays

    optic = in_optiland(document, of, wavelength_um)
    start = o + d * ((-5.0 - o[:, 2:]) / d[:, 2:])  # optiland starts in front of the lens
    rays = RealRays(*start.T, *d.T, np.ones(len(o)), np.full(len(o), wavelength_um))
    optic.surfaces.trace(rays)
    return np.stack([rays.x, rays.y], axis=-1)


@pytest.mark.parametrize("depth_mm", [800.0, math.inf])
@pytest.mark.parametrize("wavelength_um", [0.45, 0.65])
@pytest.mark.parametrize("name", catalogue.names())
def test_rays_land_where_optiland_says(name: str, wavelength_um: float, depth_mm: float) -> None:
    document, ours = catalogue.shipped()[name], lens(name)
    field = ours.field_max * torch.tensor([0.3, -0.7], dtype=torch.float64)
    o, d = pupil.aim(ours, field, depth_mm, ours.pupil_r_mm * pupil.spiral(300))
    rays = ours.trace(o, d, wavelength_um)
    sensor_mm = math.fsum(surface["d_next"] for surface in document["surfaces"])
    theirs_mm = optiland_hits_mm(document, ours, o.numpy(), d.numpy(), wavelength_um)
    valid = rays.valid.numpy()
    assert valid.sum() > 100
    assert 1000 * np.abs(rays.at(sensor_mm).numpy() - theirs_mm)[valid].max() < 1e-2


def test_stopping_down_sets_the_f_number() -> None:
    stopped = Lens("triplet", fnum=8.0)
    assert stopped.fnum == pytest.approx(8.0, rel=1e-9)
    assert stopped.efl_mm == pytest.approx(lens("triplet").efl_mm, rel=1e-9)
    assert stopped.pupil_r_mm == pytest.approx(stopped.efl_mm / 16, rel=1e-9)


@pytest.mark.parametrize("size", [(10.0, 10.0), (10.0, 8.0), (36.0, 24.0), (5.1, 3.3)])
def test_a_sensor_of_any_shape_can_be_given(size: tuple[float, float]) -> None:
    given = Lens("triplet", sensor_mm=size)
    assert given.sensor_mm == pytest.approx(size, rel=1e-6)
    assert given.efl_mm == pytest.approx(lens("triplet").efl_mm, rel=1e-9)
    assert given.fov_diag_deg == pytest.approx(2 * math.degrees(math.atan(math.hypot(*size) / 2 / given.efl_mm)))


ASPHERE_SEQ = """RDM;LEN
YAN 0.0 10.0
SO 0.0 0.1e14
S 0.0 1.0 AIR
STO
CIR 2.0
S 12.0 4.0 N-BK7
CIR 5.0
ASP
K -0.7
A -1.5e-4; B 2.0e-6
S -30.0 15.0 AIR
CIR 5.0
SI 0.0 0.0
CIR 5.0
GO
"""
ASPHERE_JSON = {
    "r_sensor": 5.0,
    "surfaces": [
        {"type": "Stop", "r": 2.0, "is_aperture": True, "d_next": 1.0, "mat2": "air"},
        {
            "type": "Aspheric",
            "r": 5.0,
            "roc": 12.0,
            "k": -0.7,
            "use_ai2": False,
            "ai": [-1.5e-4, 2.0e-6],
            "d_next": 4.0,
            "mat2": "n-bk7",
        },
        {"type": "Spheric", "r": 5.0, "roc": -30.0, "d_next": 15.0, "mat2": "air"},
    ],
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_zmx_file_has_the_focal_length_of_its_thick_lens(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "singlet.zmx"
    path.write_text(SINGLET_ZMX, encoding=encoding)
    found = Lens(str(path), sensor_mm=(12.0, 9.0))
    n = 1.51680  # N-BK7 at the d line
    power = (n - 1) * (0.02 + 0.04 - (n - 1) * 5.0 * 0.02 * 0.04 / n)
    assert found.efl_mm == pytest.approx(1 / power, rel=1e-4)
    assert found.sensor_mm == (12.0, 9.0)
    assert (found.pupil_z_mm, found.pupil_r_mm) == pytest.approx((0.0, 4.0), abs=1e-9)


def test_a_zmx_file_without_a_sensor_asks_for_one(tmp_path: Path) -> None:
    path = tmp_path / "singlet.zmx"
    path.write_text(SINGLET_ZMX)
    with pytest.raises(LensError, match="has no sensor; give --sensor-mm W,H"):
        Lens(str(path))


def test_a_seq_file_is_the_lens_its_json_twin_is(tmp_path: Path) -> None:
    """Code V's coefficient A belongs to r^4."""
    (tmp_path / "twin.json").write_text(json.dumps(ASPHERE_JSON))
    (tmp_path / "lens.seq").write_text(ASPHERE_SEQ)
    twins = [Lens(str(tmp_path / name)) for name in ("twin.json", "lens.seq")]
    assert twins[0].efl_mm == pytest.approx(twins[1].efl_mm, rel=1e-6)
    hits = [t.trace(*pupil.aim(t, AXIS, math.inf, 2.0 * pupil.spiral(50)), 0.55).at(22.0) for t in twins]
    assert 1000 * float((hits[0] - hits[1]).abs().max()) < 1e-3


def surface(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["surfaces"][index].update(changes)


def no_stop(document: dict[str, Any]) -> None:
    document["surfaces"][4] = {"type": "Plane", "r": 5.0, "d_next": 2.75, "mat2": "air"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("triplet", surface(0, mat2="unobtainium"), "unknown glass: unobtainium"),
        ("triplet", surface(0, r=-1.0), "radius"),
        ("triplet", surface(0, r="wide"), "wide"),
        ("triplet", surface(1, d_next=-6.0), "surface 1 has thickness d_next = -6 mm; it must not be negative"),
        ("triplet", surface(1, type="Freeform"), "Freeform"),
        ("triplet", lambda d: d["surfaces"][2].pop("d_next"), "surface 2 has no 'd_next'"),
        ("triplet", lambda d: d.pop("surfaces"), "no list of surfaces"),
        ("triplet", lambda d: d.update(surfaces=[]), "no list of surfaces"),
        ("triplet", lambda d: d.update(surfaces=d["surfaces"][4:5]), "afocal"),
        ("triplet", lambda d: d.pop("sensor_size"), "has no sensor; give --sensor-mm W,H"),
        ("triplet", lambda d: d.update(psfgen="notes"), "psfgen"),
        ("triplet", lambda d: d.update(psfgen={"pitch_um": "fine"}), "pitch_um"),
        ("triplet", no_stop, "stop"),
        ("acl12708u", lambda d: d["surfaces"][1].pop("use_ai2"), "use_ai2"),
    ],
)
def test_a_prescription_that_cannot_be_trusted_is_refused(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(LensError, match=message):
        Lens(str(variant(tmp_path, name, change)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tripplet", "unknown lens 'tripplet'; did you mean 'triplet'.*shipped: acl12708u, double_gauss"),
        ("nowhere.json", "lens file nowhere.json cannot be read: No such file"),
    ],
)
def test_an_unknown_lens_is_refused(name: str, message: str) -> None:
    with pytest.raises(LensError, match=message):
        Lens(name)


def test_a_faster_stop_than_the_lens_has_is_refused() -> None:
    with pytest.raises(LensError, match=r"fnum 2 is faster than lens triplet at full aperture, F/4\.02"):
        Lens("triplet", fnum=2.0)


@pytest.mark.parametrize("wavelength_um", [0.3, 2.5])
def test_a_wavelength_outside_the_glass_data_is_refused(wavelength_um: float) -> None:
    with pytest.raises(LensError, match=rf"wavelength {wavelength_um} um is outside the data of glass"):
        lens("acl12708u").check_wavelengths((0.55, wavelength_um))


def test_a_reference_wavelength_outside_the_glass_data_is_not_blamed_on_the_glass() -> None:
    with pytest.raises(LensError) as raised:
        Lens("acl12708u", reference_um=3.0)
    assert "unknown glass" not in str(raised.value)


def test_deeplens_keeps_off_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "lens.seq").write_text(ASPHERE_SEQ)
    Lens(str(tmp_path / "lens.seq"))
    assert capsys.readouterr() == ("", "")
