"""Tracers: ray by ray against DeepLens's own trace and against optiland, for lenses as designed and as built."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, tracer
from numpy.typing import NDArray

from psfgen import catalogue
from psfgen.config import Move, Tolerances
from psfgen.optics import perturb, pupil
from psfgen.optics.blocks import trace_rays
from psfgen.optics.lens import Lens, Rays
from psfgen.optics.prescription import RIM2, Prescription
from psfgen.optics.trace import SETTLED_MM, TRACERS, variant

Array = NDArray[np.float64]
FIELD = torch.tensor([[0.0, 0.0], [0.35, -0.6], [1.0, 1.0], [-0.9, 0.2]], dtype=torch.float64)
DEPTHS_MM = (300.0, 5000.0, math.inf)
UM = 1000


@functools.cache
def specimen(name: str, copy: int | None) -> Lens:
    """A shipped lens as designed (None), or a copy with everything wrong with it, in proportion to its size."""
    size = lens(name).pupil_r_mm
    wrong = Tolerances(decentre_mm=0.01 * size, tilt_deg=0.3, thickness_mm=0.003 * size, curvature_rel=0.01, index=1e-3)
    moves = () if copy is None else perturb.draw(lens(name).geo.surfaces, wrong, 7, copy)
    return lens(name).as_built(moves)


@functools.cache
def launched(of: Lens) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays [fields and depths, N, 3] that overfill the pupil, so that some meet every rim."""
    points = 1.15 * of.pupil_r_mm * pupil.spiral(250)
    aimed = [pupil.aim(of, of.field_max * FIELD[:, None], depth, points) for depth in DEPTHS_MM]
    return torch.cat([o for o, _ in aimed]), torch.cat([d for _, d in aimed])


@functools.cache
def expected(of: Lens, wavelength_um: float, clip: bool, to_stop: bool) -> Rays:
    """DeepLens's own trace of `launched`."""
    return of.trace(*launched(of), wavelength_um, clip=clip, to_stop=to_stop)


def at_an_edge(of: Lens, wavelength_um: float, within_mm: float, *, to_stop: bool = False) -> NDArray[np.bool_]:
    """Rays of `launched` that a little more or less of every rim would turn on or off."""
    table = variant(of, wavelength_um, clip=True, to_stop=to_stop)

    def passes(change_mm: float) -> NDArray[np.bool_]:
        shape = table.shape.copy()
        shape[:, RIM2] = (np.sqrt(shape[:, RIM2]) + change_mm) ** 2
        return blocks(of, replace(table, shape=shape), np.float64)[2]

    return passes(within_mm) & ~passes(-within_mm)


def blocks(of: Lens, table: Prescription, dtype: Any) -> tuple[Array, Array, NDArray[np.bool_]]:
    """The block trace of `launched` in a precision, from the plane of the first vertex, as kernels are traced."""
    o, d = launched(of)
    start = o - d * (o[..., 2:] / d[..., 2:])
    at, course = (v.reshape(-1, 3).T.numpy().astype(dtype).copy() for v in (start, d))
    valid = np.empty(at.shape[1], bool)
    settled = dtype(SETTLED_MM[torch.float32 if dtype == np.float32 else torch.float64])
    trace_rays(at, course, valid, table.kind, table.flags, table.shape.astype(dtype), settled)
    at[2] += dtype(table.length_mm)
    return at.T.astype(np.float64), course.T.astype(np.float64), valid


def sensor_mm(of: Lens) -> float:
    return float(of.geo.d_sensor)


# --- DeepLens's own trace ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [None, 0, 1])
@pytest.mark.parametrize("name", catalogue.names())
@pytest.mark.parametrize("by", TRACERS)
def test_every_tracer_sends_rays_where_deeplens_does(by: str, name: str, copy: int | None) -> None:
    """In float64: position within 1e-6 um at the sensor, direction, and whether a rim stops them."""
    of = specimen(name, copy)
    for wavelength_um in (0.48, 0.65):
        theirs = expected(of, wavelength_um, True, False)
        ours = tracer(of, by).trace(*launched(of), wavelength_um)
        assert 0.1 < float(theirs.valid.double().mean()) < 0.95, "nothing to stop, or nothing left"
        same = (ours.valid == theirs.valid).ravel().numpy() | at_an_edge(of, wavelength_um, 1e-6)
        assert same.all()
        both = ours.valid & theirs.valid
        assert UM * float((ours.at(sensor_mm(of)) - theirs.at(sensor_mm(of)))[both].abs().max()) < 1e-6
        assert UM * float((ours.o - theirs.o)[both].abs().max()) < 1e-6
        assert float((ours.d - theirs.d)[both].abs().max()) < 1e-10


@pytest.mark.parametrize("copy", [None, 0])
@pytest.mark.parametrize("name", catalogue.names())
@pytest.mark.parametrize("by", TRACERS)
def test_every_tracer_stops_at_the_stop_and_goes_past_rims_if_told(by: str, name: str, copy: int | None) -> None:
    """The unclipped trace up to the stop, which aims chief rays."""
    of = specimen(name, copy)
    for clip, to_stop in ((True, True), (False, True), (False, False)):
        theirs = expected(of, 0.5876, clip, to_stop)
        ours = tracer(of, by).trace(*launched(of), 0.5876, clip=clip, to_stop=to_stop)
        both = ours.valid & theirs.valid
        assert both.double().mean() > 0.3
        assert UM * float((ours.o - theirs.o)[both].abs().max()) < 1e-6
        if clip:
            same = (ours.valid == theirs.valid).ravel().numpy() | at_an_edge(of, 0.5876, 1e-6, to_stop=True)
            assert same.all()
        else:
            assert (ours.valid | ~theirs.valid).all(), "a rim was not removed"


@pytest.mark.parametrize("copy", [None, 0, 1])
@pytest.mark.parametrize("name", catalogue.names())
def test_single_precision_costs_hundredths_of_a_micrometre(name: str, copy: int | None) -> None:
    of = specimen(name, copy)
    theirs = expected(of, 0.48, True, False)
    o, d, valid = blocks(of, variant(of, 0.48, clip=True, to_stop=False), np.float32)
    same = (valid == theirs.valid.ravel().numpy()) | at_an_edge(of, 0.48, 5e-5)
    assert same.all()
    both = valid & theirs.valid.ravel().numpy()
    hits = o[:, :2] + d[:, :2] * ((sensor_mm(of) - o[:, 2]) / d[:, 2])[:, None]
    off_um = UM * np.abs(hits - theirs.at(sensor_mm(of)).reshape(-1, 2).numpy())[both]
    assert off_um.max() < 0.05


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_blocks_may_be_filled_in_part(count: int) -> None:
    """The rays of a block do not see each other, nor what pads it."""
    of = specimen("phone", 0)
    o, d = (v[0] for v in launched(of))
    whole, part = tracer(of).trace(o, d, 0.55), tracer(of).trace(o[:count], d[:count], 0.55)
    assert torch.equal(whole.valid[:count], part.valid)
    seen = part.valid
    assert float((whole.o[:count] - part.o)[seen].abs().max()) < 1e-11


@pytest.mark.parametrize("count", [1, 250])
def test_tracing_leaves_its_rays_as_they_were(count: int) -> None:
    """One ray lies in memory as its own transpose does."""
    of = specimen("triplet", 0)
    for by in TRACERS:
        o, d = (v[2, :count].clone() for v in launched(of))
        tracer(of, by).trace(o, d, 0.55)
        assert torch.equal(o, launched(of)[0][2, :count])
        assert torch.equal(d, launched(of)[1][2, :count])


def test_the_shape_of_a_bundle_is_kept() -> None:
    for by in TRACERS:
        of = specimen("triplet", None)
        o, d = (v.reshape(3, 4, 250, 3)[:, :2, :7] for v in launched(of))
        rays = tracer(of, by).trace(o, d, 0.55)
        assert rays.o.shape == rays.d.shape == (3, 2, 7, 3)
        assert rays.valid.shape == (3, 2, 7)


# --- optiland ---------------------------------------------------------------------------------------------------------


def optiland_hits_mm(of: Lens, o: Array, d: Array, wavelength_um: float) -> Array:
    """Where optiland, given the surfaces' own numbers, lets rays cross the sensor of the design.

    optiland turns a surface by Rz Ry Rx (rx, ry, 0); DeepLens's normal fixes rx and ry but for the turn about
    itself, which a rotationally symmetric surface does not see.
    """
    from optiland.materials import IdealMaterial
    from optiland.optic import Optic
    from optiland.rays import RealRays

    optic, z = Optic(), 0.0
    optic.surfaces.add(index=0, thickness=math.inf)
    for index, surface in enumerate(of.geo.surfaces):
        n = float(surface.mat2.ior(torch.tensor(wavelength_um, dtype=torch.float64)))
        curvature = float(getattr(surface, "c", 0.0))
        shape: dict[str, Any] = {"radius": 1 / curvature if curvature else math.inf}
        if type(surface).__name__ == "Aspheric":
            second = 0.0 if surface.ai2 is None else float(surface.ai2)
            rest = [float(a) for a in (surface.ai if surface.ai is not None else [])]
            shape |= {"surface_type": "even_asphere", "conic": float(surface.k), "coefficients": [second, *rest]}
        x, y, towards = *map(float, surface.vec_local[:2]), float(surface.vec_local[2])
        optic.surfaces.add(
            index=index + 1,
            x=float(surface.pos_x),
            y=float(surface.pos_y),
            z=z,
            rx=math.atan2(-y, math.hypot(x, towards)),
            ry=math.atan2(x, towards),
            material=IdealMaterial(n),
            is_stop=index == of.stop_index,
            **shape,
        )
        z += float(surface.d_next)
    optic.surfaces.add(index=len(of.geo.surfaces) + 1, z=sensor_mm(of))
    rays = RealRays(*(o + d * ((-5.0 - o[:, 2:]) / d[:, 2:])).T, *d.T, np.ones(len(o)), np.full(len(o), wavelength_um))
    optic.surfaces.trace(rays)
    return np.stack([rays.x, rays.y], axis=-1)


ASPHERES: dict[str, dict[str, Any]] = {
    "with r^2": {"use_ai2": True, "ai": [4e-3, -1.5e-4, 2.0e-6], "k": -0.7},
    "from r^4": {"use_ai2": False, "ai": [-1.5e-4, 2.0e-6, 1e-8, -1e-10], "k": 1.3},
    "conic": {"use_ai2": False, "ai": [], "k": -1.0},
}


def aspheric_lens(folder: Path, **shape: Any) -> Lens:
    """A fast singlet with one asphere."""
    air: dict[str, Any] = {"mat2": "air"}
    document = {
        "r_sensor": 5.0,
        "surfaces": [
            {"type": "Stop", "r": 3.0, "is_aperture": True, "d_next": 1.0, **air},
            {"type": "Aspheric", "r": 5.0, "roc": 12.0, "d_next": 4.0, "mat2": "n-bk7", **shape},
            {"type": "Spheric", "r": 5.0, "roc": -30.0, "d_next": 15.0, **air},
        ],
    }
    path = folder / "asphere.json"
    path.write_text(json.dumps(document))
    return Lens(str(path))


def compare_with_optiland(of: Lens, by: str) -> None:
    o, d = (v.reshape(-1, 3) for v in launched(of))
    rays = tracer(of, by).trace(o, d, 0.55)
    theirs_mm = optiland_hits_mm(of, o.numpy(), d.numpy(), 0.55)
    valid = rays.valid.numpy()
    assert valid.sum() > 100
    assert UM * np.abs(rays.at(sensor_mm(of)).numpy() - theirs_mm)[valid].max() < 1e-2


@pytest.mark.parametrize("name", catalogue.names())
def test_optiland_agrees_on_lenses_as_built(name: str) -> None:
    compare_with_optiland(specimen(name, 0), "numba")


@pytest.mark.parametrize("shape", ASPHERES.values(), ids=ASPHERES)
@pytest.mark.parametrize("by", TRACERS)
def test_optiland_agrees_on_tilted_and_decentred_aspheres(tmp_path: Path, shape: dict[str, Any], by: str) -> None:
    of = aspheric_lens(tmp_path, **shape)
    compare_with_optiland(of, by)
    moves = (
        Move(surfaces=(1, 1), decentre_mm=(0.2, -0.1), tilt_deg=(2.0, -3.0)),
        Move(surfaces=(2, 2), decentre_mm=(-0.1, 0.3), tilt_deg=(-1.0, 4.0), curvature_rel=0.1),
    )
    compare_with_optiland(of.as_built(moves), by)
