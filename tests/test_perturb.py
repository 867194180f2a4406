"""Lenses as built: moved surfaces against moved rays, against files edited by hand, and the draw of copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, tracer, variant
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from psfgen import catalogue
from psfgen.config import Move, Tolerances
from psfgen.errors import ConfigError
from psfgen.optics import pupil
from psfgen.optics.lens import Lens, Rays
from psfgen.optics.perturb import ShiftedGlass, draw, elements, rotation
from psfgen.optics.prescription import SHIFT, Prescription, prescribe
from psfgen.optics.trace import TRACERS, trace_table

ELEMENTS = {
    "acl12708u": [(1, 2)],
    "double_gauss": [(0, 1), (2, 3), (4, 5), (7, 9), (10, 11)],
    "phone": [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)],
    "singlet": [(1, 2)],
    "triplet": [(0, 1), (2, 3), (5, 6)],
}
FIELD = torch.tensor([[0.0, 0.0], [0.4, -0.5], [-0.8, 0.3]], dtype=torch.float64)
UM = 1000


def beams(of: Lens, depth_mm: float = 2000.0) -> tuple[torch.Tensor, torch.Tensor]:
    return pupil.aim(of, of.field_max * FIELD[:, None], depth_mm, 1.05 * of.pupil_r_mm * pupil.spiral(200))


def assert_same(ours: Rays, theirs: Rays, within_mm: float = 1e-9) -> None:
    assert torch.equal(ours.valid, theirs.valid)
    valid = ours.valid
    assert valid.double().mean() > 0.2
    assert float((ours.d - theirs.d)[valid].abs().max()) < within_mm
    assert float((ours.o - theirs.o)[valid].abs().max()) < within_mm


@pytest.mark.parametrize("name", catalogue.names())
def test_elements_are_surfaces_joined_by_glass(name: str) -> None:
    assert elements(lens(name).geo.surfaces) == ELEMENTS[name]


def test_a_thin_lens_is_an_element(thin_lens: str) -> None:
    assert elements(lens(thin_lens).geo.surfaces) == [(1, 1)]


@pytest.mark.parametrize("tilt", [(0.3, 0.0), (0.0, -0.2), (0.1, 0.25), (0.0, 0.0)])
def test_a_tilt_is_a_rotation_vector(tilt: tuple[float, float]) -> None:
    expected = Rotation.from_rotvec([*tilt, 0.0]).as_matrix()
    np.testing.assert_allclose(rotation(np.array(tilt)), expected, atol=1e-15)


def along(z_mm: float) -> torch.Tensor:
    return torch.tensor([0.0, 0.0, z_mm], dtype=torch.float64)


def through_moved_part(of: Lens, part: tuple[int, int], move: Move, wavelength_um: float) -> Rays:
    """What moving a part does, found by moving the rays: into the part's frame and, behind it, out again."""
    whole = prescribe(of.geo.surfaces, wavelength_um)
    first, last = part
    turn = torch.from_numpy(Rotation.from_rotvec([*np.radians(move.tilt_deg), 0.0]).as_matrix())
    shift = torch.tensor([*move.decentre_mm, 0.0], dtype=torch.float64)

    def piece(rows: slice) -> tuple[Prescription, float]:
        shape = whole.shape[rows].copy()
        shape[:1, SHIFT + 2] = 0.0
        gap = float(whole.shape[rows.stop, SHIFT + 2]) if 0 < rows.stop < len(whole.shape) else 0.0
        return Prescription(whole.kind[rows], whole.flags[rows], shape, shape[:, SHIFT + 2].sum()), gap

    def cross(o: torch.Tensor, d: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Rays from the frame of the piece's first vertex, to the same frame."""
        table, gap = piece(rows)
        if not len(table.kind):
            return o, d, torch.ones_like(o[..., 0], dtype=torch.bool), 0.0
        end, course, valid = trace_table(table, list(o.unbind(-1)), list(d.unbind(-1)))
        end[2] = end[2] + table.length_mm
        return torch.stack(end, -1), torch.stack(course, -1), valid, table.length_mm + gap

    o, d = beams(of)
    o, d, ahead, length = cross(o, d, slice(0, first))
    o = o - along(length)
    o, d = (o - shift) @ turn, d @ turn
    o, d, inside, part_length = cross(o, d, slice(first, last + 1))
    o, d = o @ turn.T + shift, d @ turn.T
    o = o - along(part_length)
    o, d, behind, _ = cross(o, d, slice(last + 1, len(whole.kind)))
    total = length + part_length
    return Rays(o + along(total), d, ahead & inside & behind)


@pytest.mark.parametrize("by", TRACERS)
@pytest.mark.parametrize(
    ("name", "part", "move"),
    [
        ("triplet", (0, 1), Move(element=0, decentre_mm=(0.1, -0.2), tilt_deg=(1.0, 2.0))),
        ("triplet", (2, 3), Move(element=1, decentre_mm=(0.3, 0.1), tilt_deg=(-2.0, 0.5))),
        ("triplet", (5, 6), Move(element=2, tilt_deg=(0.0, 3.0))),
        ("triplet", (4, 4), Move(surfaces=(4, 4), decentre_mm=(-0.4, 0.2))),
        ("triplet", (2, 6), Move(surfaces=(2, 6), decentre_mm=(0.1, 0.2), tilt_deg=(1.0, -1.5))),
        ("double_gauss", (7, 9), Move(element=3, decentre_mm=(0.05, 0.1), tilt_deg=(0.5, 0.7))),
        ("acl12708u", (1, 2), Move(element=0, decentre_mm=(0.05, 0.02), tilt_deg=(1.0, -1.0))),
        ("phone", (5, 6), Move(element=2, decentre_mm=(0.01, -0.02), tilt_deg=(0.6, 0.3))),
        ("phone", (11, 12), Move(element=5, decentre_mm=(0.02, 0.02), tilt_deg=(-0.4, 0.3))),
    ],
)
def test_moving_a_part_is_moving_the_rays_the_other_way(name: str, part: tuple[int, int], move: Move, by: str) -> None:
    of = lens(name)
    built = of.as_built((move,))
    if part[1] == len(of.geo.surfaces) - 1:  # the frame of a moved last vertex is not that of the design
        assert built.last_vertex_mm != of.last_vertex_mm or not any(move.tilt_deg)
    assert_same(tracer(built, by).trace(*beams(of), 0.55), through_moved_part(of, part, move, 0.55))


def test_moves_add_up() -> None:
    """One move after another on one element, and two elements whose moves do not touch each other."""
    of = lens("triplet")
    first = Move(element=0, decentre_mm=(0.1, 0.0))
    more = Move(element=0, decentre_mm=(0.05, -0.1))
    together = Move(element=0, decentre_mm=(0.15, -0.1))
    other = Move(element=2, tilt_deg=(0.5, 0.0), thickness_mm=0.02)
    rays = [
        tracer(of.as_built(moves)).trace(*beams(of), 0.55)
        for moves in ((first, more, other), (other, together), (together, other))
    ]
    for found in rays[1:]:
        assert_same(found, rays[0])


@pytest.mark.parametrize("name", ["triplet", "acl12708u"])
def test_moving_the_whole_lens_moves_the_image_of_infinity_with_it(name: str) -> None:
    of = lens(name)
    built = of.as_built((Move(surfaces=(0, len(of.geo.surfaces) - 1), decentre_mm=(0.3, -0.2)),))
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64)
    o, d = beams(of, math.inf)
    moved = tracer(built).trace(o + torch.cat([shift, torch.zeros(1)]), d, 0.55)
    still = tracer(of).trace(o, d, 0.55)
    z = float(of.geo.d_sensor)
    assert torch.equal(moved.valid, still.valid)
    torch.testing.assert_close(moved.at(z)[moved.valid], (still.at(z) + shift)[still.valid], rtol=0, atol=1e-10)
    chief = [pupil.chief_rays(which, tracer(which), FIELD, math.inf).at(z) for which in (built, of)]
    torch.testing.assert_close(chief[0] - chief[1], shift.expand(3, 2), rtol=0, atol=1e-8)


def edited(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], object]) -> Lens:
    return Lens(str(variant(folder, name, lambda document: change(document["surfaces"]))))


@pytest.mark.parametrize("by", TRACERS)
def test_a_thickness_is_that_of_a_file_with_another_d_next(tmp_path: Path, by: str) -> None:
    """It grows behind the first surface of the part; what stands behind keeps its distances."""
    built = lens("triplet").as_built((Move(element=1, thickness_mm=0.2), Move(surfaces=(4, 4), thickness_mm=-0.1)))

    def thicken(surfaces: list[dict[str, Any]]) -> None:
        surfaces[2]["d_next"] += 0.2
        surfaces[4]["d_next"] -= 0.1

    same = edited(tmp_path, "triplet", thicken)
    assert built.last_vertex_mm == pytest.approx(same.last_vertex_mm, abs=1e-12)
    rays = beams(lens("triplet"))
    assert_same(tracer(built, by).trace(*rays, 0.55), tracer(same, by).trace(*rays, 0.55))


@pytest.mark.parametrize("by", TRACERS)
def test_a_curvature_is_that_of_a_file_with_other_radii(tmp_path: Path, by: str) -> None:
    """The r^2 term of an asphere is curvature, the rest of its polynomial is not."""
    built = lens("phone").as_built((Move(element=1, curvature_rel=0.02),))

    def bend(surfaces: list[dict[str, Any]]) -> None:
        for surface in surfaces[3:5]:
            surface["roc"] /= 1.02
            surface["ai"][0] *= 1.02

    same = edited(tmp_path, "phone", bend)
    rays = beams(lens("phone"))
    assert_same(tracer(built, by).trace(*rays, 0.55), tracer(same, by).trace(*rays, 0.55))


@pytest.mark.parametrize("by", TRACERS)
def test_an_index_is_added_to_every_glass_of_the_part(tmp_path: Path, by: str) -> None:
    """At the d line against a file of other glasses (n/V); the same at every wavelength."""
    of = lens("double_gauss")
    built = of.as_built((Move(element=3, index=2e-3),))

    def other_glass(surfaces: list[dict[str, Any]]) -> None:
        surfaces[7]["mat2"] = "1.7010/30.1"
        surfaces[8]["mat2"] = "1.8015/42.2"

    same = edited(tmp_path, "double_gauss", other_glass)
    rays = beams(of)
    assert_same(tracer(built, by).trace(*rays, 0.5876), tracer(same, by).trace(*rays, 0.5876), within_mm=1e-5)
    for wavelength_um in (0.45, 0.65):
        um = torch.tensor(wavelength_um, dtype=torch.float64)
        shifts = [
            float(new.mat2.ior(um) - old.mat2.ior(um))
            for new, old in zip(built.geo.surfaces, of.geo.surfaces, strict=True)
        ]
        assert shifts == pytest.approx([0.0] * 7 + [2e-3] * 2 + [0.0] * 3, abs=1e-12), "air behind the part stays air"


def test_a_shifted_glass_is_still_that_glass() -> None:
    """It can be copied, as lenses are, and answers for what it wraps."""
    glass = lens("triplet").geo.surfaces[0].mat2
    shifted = copy.deepcopy(ShiftedGlass(ShiftedGlass(glass, 1e-3), 2e-3))
    um = torch.tensor(0.55, dtype=torch.float64)
    assert float(shifted.ior(um) - glass.ior(um)) == pytest.approx(3e-3, abs=1e-12)
    assert shifted.get_name() == glass.get_name()
    assert shifted.wvln_range == glass.wvln_range
    with pytest.raises(AttributeError):
        shifted.nothing_of_the_kind  # noqa: B018


def test_the_design_stays_as_it_is() -> None:
    of = lens("triplet")
    rays = beams(of)
    before = of.trace(*rays, 0.55)
    wrong = Tolerances(decentre_mm=0.1, tilt_deg=0.5, thickness_mm=0.01, curvature_rel=0.02, index=1e-3)
    built = of.as_built(draw(of.geo.surfaces, wrong, 0, 0))
    assert_same(of.trace(*rays, 0.55), before, within_mm=1e-15)
    assert of.asymmetry is None
    assert built.asymmetry is not None
    assert (built.efl_mm, built.pupil_r_mm, built.pupil_z_mm) == (of.efl_mm, of.pupil_r_mm, of.pupil_z_mm)
    assert of.as_built(()) is of
    twice = built.as_built((Move(element=0, index=1e-3),))
    assert float((twice.trace(*rays, 0.55).o - built.trace(*rays, 0.55).o).abs().max()) > 1e-4


def test_a_lens_as_built_knows_its_own_surfaces_without_rims() -> None:
    """The design's copy without rims, made before, must not serve for it."""
    of = Lens("triplet")
    rays = beams(of)
    of.trace(*rays, 0.55, clip=False)
    built = of.as_built((Move(element=0, decentre_mm=(0.1, 0.0)), Move(surfaces=(4, 4), decentre_mm=(0.2, -0.3))))
    expected = tracer(built).trace(*rays, 0.55, clip=False)
    assert_same(built.trace(*rays, 0.55, clip=False), expected)
    assert built.stop_xy == pytest.approx((0.2, -0.3))


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (
            [Move(element=3)],
            r"perturb 0: element 3 does not exist; the lens has 0: surfaces 0 to 1, 1: .*, 2: .*5 to 6",
        ),
        ([Move(element=0), Move(surfaces=(2, 7))], r"perturb 1: surface 7 does not exist; the lens has 0 to 6"),
        ([Move(element=1, thickness_mm=-1.5)], r"perturb 0: surface 3 would stand 0\.5 mm in front of surface 2"),
        ([Move(surfaces=(4, 4), thickness_mm=-3)], r"surface 5 would stand 0\.25 mm in front of surface 4"),
        ([Move(surfaces=(0, 5), tilt_deg=(175, 0))], r"would stand .* in front of .*smaller thickness_mm or tilt_deg"),
    ],
)
def test_a_move_the_lens_cannot_make_is_refused(moves: list[Move], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lens("triplet").as_built(tuple(moves))


def drawn(copies: int, seed: int, wrong: Tolerances) -> NDArray[np.float64]:
    """The numbers of many copies of the double Gauss [copies, elements, 7]."""
    surfaces = lens("double_gauss").geo.surfaces
    return np.array(
        [
            [
                [*m.decentre_mm, *m.tilt_deg, m.thickness_mm, m.curvature_rel, m.index]
                for m in draw(surfaces, wrong, seed, copy)
            ]
            for copy in range(copies)
        ]
    )


def test_copies_are_drawn_with_the_standard_deviations_asked_for() -> None:
    wrong = Tolerances(decentre_mm=0.02, tilt_deg=0.1, thickness_mm=0.05, curvature_rel=3e-3, index=5e-4)
    found = drawn(400, 0, wrong)
    assert found.shape == (400, 5, 7)
    unit = found.reshape(-1, 7) / [0.02, 0.02, 0.1, 0.1, 0.05, 3e-3, 5e-4]
    np.testing.assert_allclose(unit.std(0), 1, atol=0.08)
    np.testing.assert_allclose(unit.mean(0), 0, atol=0.08)
    correlated = np.corrcoef(found.reshape(400, -1).T) - np.eye(35)
    assert np.abs(correlated).max() < 0.25, "every element and every axis has errors of its own"
    assert [m.element for m in draw(lens("double_gauss").geo.surfaces, wrong, 0, 0)] == [0, 1, 2, 3, 4]


def test_copies_are_seeded_and_differ() -> None:
    wrong = Tolerances(decentre_mm=0.02)
    assert np.array_equal(drawn(3, 1, wrong), drawn(3, 1, wrong))
    assert np.array_equal(drawn(3, 1, wrong)[2], drawn(5, 1, wrong)[2]), "however many there are"
    for other in (drawn(3, 2, wrong), drawn(3, 1, wrong)[[1, 2, 0]]):
        assert not np.isclose(drawn(3, 1, wrong)[..., 0], other[..., 0]).any()
    assert not drawn(3, 1, wrong)[..., 2:].any()
    only = Tolerances(tilt_deg=0.1)
    np.testing.assert_allclose(drawn(3, 1, only)[..., 2:4], drawn(3, 1, Tolerances(tilt_deg=0.2))[..., 2:4] / 2)


@pytest.mark.parametrize("name", ["acl12708u", "triplet", "phone"])
def test_a_decentred_element_does_not_put_the_lens_out_of_focus(name: str) -> None:
    """To first order it moves the image sideways only; the least-squares focus moves by less than 0.2 um here."""
    of, shift = lens(name), 0.01 * lens(name).pupil_r_mm
    built = of.as_built((Move(element=0, decentre_mm=(shift, 0.0)),))
    focus = [pupil.sensor_z_mm(which, tracer(which), 2000.0) for which in (of, built)]
    assert UM * abs(focus[1] - focus[0]) < 1
