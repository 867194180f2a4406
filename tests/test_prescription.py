"""Every kind of surface that DeepLens reads: in the surface table and traced as DeepLens does, or left to DeepLens."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lens, tiny, tracer

from psfgen import catalogue
from psfgen.engines import engine_class
from psfgen.errors import ConfigError
from psfgen.optics import pupil
from psfgen.optics.lens import Lens, Rays
from psfgen.optics.prescription import PLANE, SHIFT, foreign_surface, prescribe
from psfgen.optics.trace import TRACERS, choose_tracer
from psfgen.plan import Plan
from psfgen.render import render
from psfgen.store import open_store

FUSED = [name for name in TRACERS if name != "deeplens"]
AIR: dict[str, Any] = {"mat2": "air"}
TILT: dict[str, Any] = {"vec_local": [0.1, -0.2, 1.0], "pos_xy": [0.3, -0.4]}
SQUARE: dict[str, Any] = {"is_square": True}
SPHERE: dict[str, Any] = {"type": "Spheric", "roc": 9.0, "r": 3.0, "d_next": 2.0, "mat2": "n-bk7"}
ASPHERE: dict[str, Any] = {**SPHERE, "type": "Aspheric", "k": 0.0}
CUBIC: dict[str, Any] = {"type": "Cubic", "r": 3.0, "d_next": 2.0, "mat2": "n-bk7"}
BACK: dict[str, Any] = {"type": "Plane", "r": 4.0, "d_next": 1.0, **AIR}
THIN: dict[str, Any] = {"type": "ThinLens", "r": 3.0, "d_next": 1.0, **AIR}
PLATE = [{"type": "Plane", "r": 3.0, "d_next": 3.0, "mat2": "n-bk7", **TILT}, {**BACK, **TILT}]

KINDS: dict[str, list[dict[str, Any]]] = {
    "sphere": [SPHERE, BACK],
    "sphere, hollow": [{**SPHERE, "roc": -9.0}, BACK],
    "sphere, tilted": [{**SPHERE, **TILT}, BACK],
    "sphere, square": [{**SPHERE, **SQUARE}, BACK],
    "sphere, square and tilted": [{**SPHERE, **SQUARE, **TILT}, BACK],
    "sphere without curvature": [{**SPHERE, "roc": 0}, BACK],
    "sphere, missed": [{**SPHERE, "roc": 2.05, "r": 3.0}, {**BACK, "r": 9.0}],
    "asphere from r^4": [{**ASPHERE, "use_ai2": False, "ai": [1e-3, -2e-5]}, BACK],
    "asphere with r^2": [{**ASPHERE, "use_ai2": True, "ai": [2e-2, 1e-3, -2e-5]}, BACK],
    "asphere, conic": [{**ASPHERE, "k": -1.7, "use_ai2": False, "ai": []}, BACK],
    "asphere, paraboloid": [{**ASPHERE, "k": -1.0, "use_ai2": False, "ai": []}, BACK],
    "asphere, oblate": [{**ASPHERE, "k": 8.0, "use_ai2": False, "ai": [1e-3]}, BACK],
    "asphere beyond its conic": [{**ASPHERE, "k": 15.0, "use_ai2": False, "ai": []}, BACK],
    "asphere, flat": [{**ASPHERE, "roc": 0, "use_ai2": False, "ai": [3e-3]}, BACK],
    "asphere, square": [{**ASPHERE, **SQUARE, "use_ai2": False, "ai": [1e-3]}, BACK],
    "asphere, tilted": [{**ASPHERE, **TILT, "k": -0.6, "use_ai2": True, "ai": [1e-2, 1e-3]}, BACK],
    "asphere of ten terms": [{**ASPHERE, "use_ai2": True, "ai": [1e-3 / 12**i for i in range(10)]}, BACK],
    "plate, tilted": PLATE,
    "plate, square": [{**PLATE[0], **SQUARE}, {**PLATE[1], **SQUARE}],
    "stop, tilted": [{"type": "Aperture", "r": 1.7, "d_next": 1.0, **TILT, **AIR}],
    "stop, square": [{"type": "Stop", "r": 1.7, "d_next": 1.0, **SQUARE, **AIR}],
    "thin lens": [{**THIN, "f": 12.0}],
    "thin lens, negative": [{**THIN, "f": -12.0}],
    "thin lens, negative, before glass": [{**THIN, "f": -12.0}, SPHERE, BACK],
    "thin lens, tilted": [{**THIN, "f": -12.0, **TILT}],
    "thin lens, square": [{**THIN, "f": 12.0, **SQUARE}],
    "cubic 3": [{**CUBIC, "b": [2e-3]}, BACK],
    "cubic 5": [{**CUBIC, "b": [2e-3, -2e-4]}, BACK],
    "cubic 7": [{**CUBIC, "b": [2e-3, -2e-4, 3e-5]}, BACK],
    "cubic, square and tilted": [{**CUBIC, "b": [2e-3, 1e-4], **TILT, **SQUARE}, BACK],
    "cubic behind": [{"type": "Plane", "r": 4.0, "d_next": 2.0, "mat2": "n-bk7"}, {**CUBIC, "b": [-3e-3], **AIR}],
    "total reflection": [{**SPHERE, "roc": 30.0, "mat2": "n-lasf9"}, {**SPHERE, "roc": -3.2, **AIR}],
    "total reflection at a plane": [{**PLATE[0], "vec_local": [1.0, 0.0, 1.0], "d_next": 4.0}, {**BACK, "r": 20.0}],
    "total reflection at an asphere": [
        {**SPHERE, "roc": 30.0, "mat2": "n-lasf9"},
        {**ASPHERE, "roc": -3.2, "k": 0.3, "use_ai2": False, "ai": [1e-5], **AIR},
    ],
    "total reflection at a cubic": [{**SPHERE, "roc": 30.0, "mat2": "n-lasf9"}, {**CUBIC, "b": [8e-2], **AIR}],
}
# Some of a ray's 300 neighbours must meet the edge that a kind is there for.
CUT = ("missed", "beyond", "total", "square", "stop")


def lens_of(folder: Path, surfaces: list[dict[str, Any]], **document: Any) -> Lens:
    """A stop, the surfaces, and a lens that gives them all an image."""
    whole = {
        "sensor_size": [8.0, 8.0],
        "sensor_res": [800, 800],
        "surfaces": [
            {"type": "Stop", "r": 2.0, "is_aperture": True, "d_next": 1.0, **AIR},
            *surfaces,
            {"type": "ThinLens", "r": 40.0, "f": 30.0, "d_next": 30.0, **AIR},
        ],
        **document,
    }
    path = folder / "kind.json"
    path.write_text(json.dumps(whole))
    return Lens(str(path))


def fan(of: Lens) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays of several fields and depths over the whole stop."""
    field = torch.tensor([[0.0, 0.0], [0.9, -0.4], [-0.5, 0.8]], dtype=torch.float64)
    aimed = [pupil.aim(of, field[:, None], depth, 2.0 * pupil.spiral(300)) for depth in (60.0, math.inf)]
    return torch.cat([o for o, _ in aimed]), torch.cat([d for _, d in aimed])


@pytest.mark.parametrize("kind", KINDS)
def test_a_surface_in_the_table_bends_rays_as_deeplens_says(tmp_path: Path, kind: str) -> None:
    of = lens_of(tmp_path, KINDS[kind])
    assert foreign_surface(of.geo.surfaces) is None
    o, d = fan(of)
    theirs = of.trace(o, d, 0.55)
    passed = float(theirs.valid.double().mean())
    assert 0.03 < passed < 1 if any(word in kind for word in CUT) else passed > 0.5
    for by in FUSED:
        ours = tracer(of, by).trace(o, d, 0.55)
        assert torch.equal(ours.valid, theirs.valid), by
        assert_same(ours, theirs)


def assert_same(ours: Rays, theirs: Rays) -> None:
    valid = theirs.valid
    assert float((ours.o - theirs.o)[valid].abs().max()) < 1e-8
    assert float((ours.d - theirs.d)[valid].abs().max()) < 1e-9
    torch.testing.assert_close(ours.d[valid].norm(dim=-1), torch.ones_like(ours.d[valid][:, 0]), rtol=1e-12, atol=0)


def test_a_tilted_plate_shifts_a_beam_as_the_formula_says(tmp_path: Path) -> None:
    """d = t sin i (1 - cos i / sqrt(n^2 - sin^2 i)), and the beam keeps its direction."""
    i, n, along = math.radians(20.0), 1.5, 4.0
    tilted = {"vec_local": [math.sin(i), 0.0, math.cos(i)], "r": 5.0}
    plate = [
        {"type": "Plane", "d_next": along, "mat2": "1.5/1000000000", **tilted},
        {"type": "Plane", "d_next": 1.0, **tilted, **AIR},
    ]
    of = lens_of(tmp_path, plate)
    o = torch.tensor([[0.0, 0.0, -20.0]], dtype=torch.float64)
    d = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    thickness = along * math.cos(i)  # between the planes; `along` is between the vertices
    shift = thickness * math.sin(i) * (1 - math.cos(i) / math.sqrt(n**2 - math.sin(i) ** 2))
    for by in FUSED:
        rays = tracer(of, by).trace(o, d, 0.5876)
        assert rays.o[0, :2].tolist() == pytest.approx([shift, 0.0], abs=1e-5)


def test_the_table_holds_the_numbers_of_the_prescription() -> None:
    of, document = lens("double_gauss"), catalogue.shipped()["double_gauss"]
    table = prescribe(of.geo.surfaces, 0.5876)
    assert table.length_mm == pytest.approx(math.fsum(s["d_next"] for s in document["surfaces"][:-1]), rel=1e-12)
    assert table.shape[1:, SHIFT + 2] == pytest.approx([s["d_next"] for s in document["surfaces"][:-1]], rel=1e-12)
    part = prescribe(of.geo.surfaces[: of.stop_index + 1], 0.5876)
    assert len(part.kind) == len(part.flags) == len(part.shape) == of.stop_index + 1
    assert part.length_mm == pytest.approx(math.fsum(s["d_next"] for s in document["surfaces"][: of.stop_index]))
    assert PLANE not in table.kind


# --- what the table cannot hold ---------------------------------------------------------------------------------------

FOREIGN: dict[str, tuple[list[dict[str, Any]], str]] = {
    "many terms": (
        [{**ASPHERE, "use_ai2": False, "ai": [1e-3 / 12**i for i in range(11)]}, BACK],
        r"surface 1 \(Aspheric of more than 10 coefficients\)",
    ),
    "many terms with r^2": (
        [{**ASPHERE, "use_ai2": True, "ai": [1e-3 / 12**i for i in range(11)]}, BACK],
        r"surface 1 \(Aspheric of more than 10 coefficients\)",
    ),
}


@pytest.mark.parametrize(("surfaces", "named"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_surface_is_left_to_deeplens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, surfaces: list[dict[str, Any]], named: str
) -> None:
    of = lens_of(tmp_path, surfaces)
    for by in FUSED:
        with pytest.raises(ConfigError, match=rf"tracer {by} does not know {named} of lens kind; .*auto or deeplens"):
            choose_tracer(by, of)
    assert choose_tracer("deeplens", of) == "deeplens"
    with caplog.at_level(logging.WARNING):
        assert choose_tracer("auto", of) == "deeplens"
    assert "of lens kind is traced by DeepLens itself" in caplog.text


@pytest.mark.parametrize("engine", ["wave", "auto"])
def test_a_lens_with_a_foreign_surface_has_no_wavefront(tmp_path: Path, engine: str) -> None:
    lens_of(tmp_path, FOREIGN["many terms"][0])
    job = tiny(tmp_path / "psfs.zarr", lens=str(tmp_path / "kind.json"), engine=engine)
    with pytest.raises(ConfigError, match=rf"engine {engine} does not know surface 1 .* use engine geometric"):
        render(job)


def test_a_lens_with_a_foreign_surface_is_rendered(tmp_path: Path) -> None:
    lens_of(tmp_path, FOREIGN["many terms"][0])
    job = tiny(tmp_path / "psfs.zarr", lens=str(tmp_path / "kind.json"), depth="1m", focus="2m", pitch_um=40.0)
    render(job)
    store = open_store(tmp_path / "psfs.zarr")
    assert store.attrs["tracer"] == "deeplens"
    assert np.isfinite(store.read("psf")).all()


def by_hand(name: str) -> Any:
    """A surface that DeepLens's readers do not bring, in the place of the triplet's first or before it."""
    from deeplens.geometric_surface.qtype import QTypeFreeform
    from deeplens.phase_surface import Binary2Phase

    if name == "Binary2Phase":
        return Binary2Phase(r=7.5, d_next=0.5, order2=-20.0, mat2="air", is_square=False)
    old = lens("triplet").geo.surfaces[0]
    numbers = {"r": 7.5, "d_next": float(old.d_next), "c": float(old.c), "k": 0.0, "qm": [1e-5]}
    return QTypeFreeform(**numbers, mat2="n-sk16")


@pytest.mark.parametrize(("name", "replaces"), [("QTypeFreeform", 1), ("Binary2Phase", 0)])
def test_a_surface_put_in_by_hand_is_foreign_too(
    name: str, replaces: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = Lens("triplet")
    of.geo.surfaces[:replaces] = [by_hand(name)]
    of.geo.aper_idx = of.stop_index = of.stop_index + 1 - replaces
    of.geo.astype(torch.float64)
    of._look_at_surfaces()
    assert of.asymmetry == f"surface 0 is a {name}", "nothing is known of its symmetry"
    with pytest.raises(ConfigError, match=rf"tracer numba does not know surface 0 \({name}\)"):
        choose_tracer("numba", of)
    plan = Plan.of(tiny(tmp_path, depth="1m", focus="2m", pitch_um=40.0), of)
    assert plan.config.tracer == "deeplens"
    assert name in caplog.text
    engine = engine_class("geometric")(of, plan)
    found = engine.deposit(engine.aim(torch.zeros(1, 2, dtype=torch.float64), 1000.0))
    assert found.captured.min() > 0.5


def test_a_turned_cubic_plate_is_foreign(tmp_path: Path) -> None:
    of = lens_of(tmp_path, KINDS["cubic 5"])
    of.geo.surfaces[1].rotate_angle = 0.1
    assert foreign_surface(of.geo.surfaces) == "surface 1 (Cubic)"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "total" not in kind])
def test_a_lens_is_symmetric_only_where_its_surfaces_prove_it(tmp_path: Path, kind: str) -> None:
    found = lens_of(tmp_path, KINDS[kind]).asymmetry
    if any(word in kind for word in ("tilted", "square", "cubic", "plate")):
        assert found is not None
        assert found.startswith("surface 1 ") or kind == "cubic behind"
    else:
        assert found is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pos_xy": [0.0, 1e-3]}, "surface 1 is decentred"),
        ({"vec_local": [1e-4, 0.0, 1.0]}, "surface 1 is tilted"),
        (SQUARE, "surface 1 has a square rim"),
    ],
)
def test_what_breaks_the_symmetry_is_named(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    assert lens_of(tmp_path, [{**SPHERE, **change}, BACK]).asymmetry == why
