"""Engine wave: a perfect lens against theory, real ones against DeepLens and optiland, and against geometry."""

from __future__ import annotations

import math
import types
import warnings
from pathlib import Path
from typing import Any
from wave import FOCAL_MM, Array, Shot, alone, offsets, perfect

import numpy as np
import pytest
import torch
from scipy.interpolate import griddata
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar
from scipy.special import j0, j1

from psfgen import catalogue
from psfgen.config import RenderConfig
from psfgen.engines.wave import Light, WaveEngine
from psfgen.optics import pupil
from psfgen.optics.lens import Lens
from psfgen.optics.splat import normalise
from psfgen.optics.wavefront import Wavefront, coverage

FNUMS, WAVELENGTHS, FIELDS = (8.0, 16.0), (0.45, 0.65), ((0.0, 0.0), (0.4, 0.0))


def rel_l2(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def airy_um(fnum: float, wavelength_um: float, field: tuple[float, float]) -> float:
    """Radius of the first dark ring of the perfect lens, across the direction of the field."""
    far_mm = math.hypot(FOCAL_MM, 10 * math.hypot(*field))  # the image is that far from the pupil
    radius_mm = FOCAL_MM / 2 / fnum
    return 1.2196698913 / 2 * wavelength_um * math.hypot(far_mm, radius_mm) / radius_mm


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("wavelength_um", WAVELENGTHS)
@pytest.mark.parametrize("fnum", FNUMS)
class TestPerfectLens:
    def test_the_first_dark_ring_is_airys(
        self, tmp_path: Path, fnum: float, wavelength_um: float, field: tuple[float, float]
    ) -> None:
        airy = airy_um(fnum, wavelength_um, field)
        # 61 points from 0.7 to 1.3 radii, across the direction of the field
        job = alone(perfect(tmp_path, fnum), airy / 50, wavelength_um, kernel_px=131, response="point")
        down = Shot.of(job, field).shares[:, 65]
        at = (np.arange(131) - 65) / 50
        ring = (at > 0.7) & (at < 1.3)
        darkest = np.polynomial.Polynomial.fit(at[ring], down[ring], 4)
        zero = minimize_scalar(darkest, bounds=(0.7, 1.3), method="bounded").x
        assert zero == pytest.approx(1, abs=0.005)

    def test_encircled_energy_is_rayleighs(
        self, tmp_path: Path, fnum: float, wavelength_um: float, field: tuple[float, float]
    ) -> None:
        """1 - J0^2 - J1^2 (Born & Wolf, 8.5.2); off the axis the disc is an ellipse."""
        airy = airy_um(fnum, wavelength_um, field)
        across = airy_um(fnum, wavelength_um, (0, 0)) ** -1 * airy  # how much longer along the field, nearly
        job = alone(perfect(tmp_path, fnum), airy / 8, wavelength_um, kernel_px=200, response="area")
        shares = Shot.of(job, field).shares
        at = (np.arange(200) - 99.5) / 8
        far = np.hypot(at[None] / across**2, at[:, None])
        for radius in (1.5, 3.0, 6.0):
            v = 3.8317059702 * radius
            assert shares[far <= radius].sum() == pytest.approx(1 - j0(v) ** 2 - j1(v) ** 2, rel=3e-3)


@pytest.mark.parametrize("waves", [0.25, 0.5, 0.75, 1.3])
def test_out_of_focus_the_axis_is_as_bright_as_lommel_says(tmp_path: Path, waves: float) -> None:
    """Lommel's sinc^2 of the defocus at the edge in waves (Born & Wolf, 8.8.2), at the distance where the sensor is
    (Li and Wolf, Optics Communications 39, 211, 1981).
    """
    aperture = FOCAL_MM / 32 / math.hypot(FOCAL_MM, FOCAL_MM / 32)
    job = alone(perfect(tmp_path, 16.0), 0.5, kernel_px=3, bins=1, response="point", spp=2**15, tolerance=None)
    moved_mm = waves * 0.55e-3 / (1 - math.sqrt(1 - aperture**2))
    sharp, blurred = (
        float(Shot.of(job, (0, 0), by_mm).deposits.halves.sum(axis=3)[0, 0, 0, 1, 1]) for by_mm in (0.0, moved_mm)
    )
    nearer = FOCAL_MM / (FOCAL_MM + moved_mm)
    assert blurred / sharp == pytest.approx((nearer * np.sinc(nearer * waves)) ** 2, abs=5e-3 * np.sinc(waves) ** 2)


def test_energy_is_conserved(tmp_path: Path) -> None:
    """What a large window catches is what theory says, and all kernels are light."""
    job = alone(perfect(tmp_path, 8.0), 3.0, kernel_px=128, spp=2**18, tolerance=None)
    found = Shot.of(job, (0, 0)).deposits
    shares = found.halves[0, 0, 0].sum(axis=0)
    # Far out the light per area is wavelength x F-number / (pi r)^3; this is what lies outside a square.
    beyond = 8 / math.pi**3 / math.sqrt(2) * 0.55 * 8.0 / (64 * 3.0)
    assert found.captured[0, 0, 0] == pytest.approx(1 - beyond, abs=1e-3)
    assert (shares >= 0).all()
    assert shares.sum() == pytest.approx(found.captured[0, 0, 0], rel=1e-6)
    assert found.throughput[0, 0] == pytest.approx(1, abs=1e-3)


LENSES = [("phone", None, 0.53), ("double_gauss", 8.0, 1.0), ("acl12708u", 8.0, 0.4)]
PLACES = [
    pytest.param(
        field,
        depths,
        id=f"{'0.7 field' if field else 'axis'}, {depths} depths of focus away",
        marks=[] if field and depths else pytest.mark.campaign,
    )
    for field in (0.0, 0.7)
    for depths in (0, 1)
]


def half_field(name: str) -> float:
    return 0.6 if name == "acl12708u" else 1.0


def two_wavelength_fnum2(lens: Lens) -> float:
    """One depth of focus, in mm."""
    return 2 * 0.55e-3 * lens.fnum**2


@pytest.mark.parametrize(("field", "depths"), PLACES)
@pytest.mark.parametrize(("name", "fnum", "pitch_um"), LENSES)
def test_real_lenses_are_as_optiland_says(
    name: str, fnum: float | None, pitch_um: float, field: float, depths: int
) -> None:
    from optiland.psf import HuygensPSF

    k, y = 48, field * half_field(name)
    job = alone(name, 0.75 * pitch_um, kernel_px=k, bins=1, response="point", fnum=fnum)
    lens = WaveEngine(*_loaded(job)).lens
    shot = Shot.of(job, (0.0, y), depths * two_wavelength_fnum2(lens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optic = _optic(name, lens, float(shot.at.sensor_z_mm[0]), y)
        pitch_mm = job.pitch_um / 1000 * (k - 1) / k  # between the outermost of their samples are k - 1 spaces
        there = HuygensPSF(optic, (0, 1 if field else 0), 0.55, num_rays=128, image_size=k, pixel_pitch=pitch_mm)
    shot.at.chief_mm[0, 0] = [
        float(there.cx),
        float(there.cy),
    ]  # where they centre it; their field points the other way
    theirs = np.asarray(there.psf)[::-1]
    ours = shot.shares
    assert rel_l2(ours / ours.sum(), theirs / theirs.sum()) < 0.03


def _loaded(job: RenderConfig) -> Any:
    from psfgen.render import load

    return load(job, "cpu")


def _optic(name: str, of: Lens, sensor_z_mm: float, y: float) -> Any:
    from optiland.materials import IdealMaterial
    from optiland.optic import Optic

    optic, document = Optic(), catalogue.shipped()[name]
    optic.surfaces.add(index=0, thickness=math.inf)
    last = len(document["surfaces"]) - 1
    for index, surface in enumerate(document["surfaces"]):
        glass = float(of.geo.surfaces[index].mat2.refractive_index(0.55))
        shape: dict[str, Any] = {"radius": surface.get("roc", math.inf), "conic": surface.get("k", 0.0)}
        if surface["type"] == "Aspheric":
            coefficients = surface["ai"] if surface["use_ai2"] else [0.0, *surface["ai"]]
            shape |= {"surface_type": "even_asphere", "coefficients": coefficients}
        thickness = sensor_z_mm - of.last_vertex_mm if index == last else surface["d_next"]
        shape |= {"aperture": 2 * float(of.geo.surfaces[index].r), "is_stop": of.stop_index == index}
        optic.surfaces.add(index=index + 1, thickness=thickness, material=IdealMaterial(glass), **shape)
    optic.surfaces.add(index=last + 2)
    optic.set_aperture(aperture_type="EPD", value=2 * of.pupil_r_mm)
    optic.set_field_type(field_type="angle")
    slope = float(pupil.field_slopes(of, torch.tensor([0.0, y], dtype=torch.float64))[1])
    for angle in (0.0, math.degrees(math.atan(slope)) or 1.0):
        optic.add_field(y=angle)
    optic.add_wavelength(value=0.55, is_primary=True)
    return optic


@pytest.mark.parametrize(("field", "depths"), PLACES)
@pytest.mark.parametrize(("name", "fnum", "pitch_um"), LENSES)
def test_real_lenses_are_as_deeplens_says(
    name: str, fnum: float | None, pitch_um: float, field: float, depths: int
) -> None:
    """Its psf_huygens in float64. Each of its rays adds the same amplitude, where light would have it add the same
    power: so it is given rays as dense as amplitude is.
    """
    k, y = 20, field * half_field(name)
    job = alone(name, 1.5 * pitch_um, kernel_px=k, bins=1, response="point", fnum=fnum, depth=10_000.0, focus=10_000.0)
    lens = WaveEngine(*_loaded(job)).lens
    shot = Shot.of(job, (0.0, y), depths * two_wavelength_fnum2(lens))
    theirs, ours = _huygens(shot, k, 5000), shot.shares
    assert rel_l2(ours / ours.sum(), theirs / theirs.sum()) < 0.03


def _huygens(shot: Shot, k: int, rays: int) -> Array:
    """Kernel [k, k] of DeepLens, from rays of our choice and about our chief ray."""
    from deeplens.light import Ray

    lens, aim = shot.engine.lens, shot.at
    geo = lens.geo
    pupil_xy = lens.pupil_r_mm * torch.from_numpy(_as_dense_as_amplitude(shot, rays))
    slope, inverse_mm = pupil.beam(lens, pupil.field_slopes(lens, aim.field_xy[0]), aim.depth_mm)
    source = torch.cat([slope / inverse_mm, torch.tensor([lens.pupil_z_mm - 1 / inverse_mm], dtype=torch.float64)])
    towards = torch.cat([pupil_xy, torch.full_like(pupil_xy[:, :1], lens.pupil_z_mm)], dim=1) - source

    def sample_from_points(self: Any, points: Any, num_rays: int, wvln: float) -> Any:
        return Ray(
            source.expand(towards.shape).clone()[None], (towards / towards.norm(dim=1, keepdim=True))[None], wvln
        )

    geo.pixel_size, geo.d_sensor, geo.dtype = shot.engine.pitch_mm, torch.tensor(aim.sensor_z_mm[0]), torch.float64
    geo.sample_from_points = types.MethodType(sample_from_points, geo)
    chief = torch.from_numpy(aim.chief_mm[aim.of_point[0]])
    geo.psf_center = types.MethodType(lambda self, points, method: chief, geo)
    found = geo.psf_huygens([0.0, 0.0, -aim.depth_mm], ks=k, wvln=0.55, spp=rays)
    return np.asarray(found.numpy(), dtype=float)


def _as_dense_as_amplitude(shot: Shot, rays: int) -> Array:
    """Points [N, 2] of the unit disc, as dense as amplitude is there: of a spiral, some.

    What DeepLens gives to a ray by its slant is taken out.
    """
    engine = shot.engine
    assert isinstance(engine, WaveEngine)
    lit = Light(engine, shot.at, 0, engine.lines(0)[0]).pupil(0)
    sides = [np.linspace(low, high, 40) for low, high in zip(lit.low, lit.high, strict=True)]
    u, area = lit.aimed(*sides)
    slant2 = sum(np.square(q) for q in np.meshgrid(*sides, indexing="ij"))
    upright = np.sqrt(1 - slant2)
    dense = 1 / (np.sqrt(area) * upright * (1 + upright))
    near = np.hypot(*u) < 1.1
    points = pupil.spiral(2 * rays).numpy()
    wanted = griddata(u[:, near].T, dense[near], points, method="linear", fill_value=0.0)
    kept = (np.arange(len(points)) * (math.sqrt(2) - 1)) % 1 < wanted / wanted.max()
    return points[kept]


def test_far_out_of_focus_it_is_as_geometry_says() -> None:
    """At 10 waves, both blurred by 0.15 radii of the disc: at its edge diffraction makes fringes."""
    fnum, wavelength_um = 8.0, 0.55
    job = {"kernel_px": 96, "fnum": fnum, "tolerance": 0.01}
    # W = r^2 / (8 N^2) x defocus, the disc's radius defocus / (2 N)
    moved_mm = 10 * 8 * wavelength_um * 1e-3 * fnum**2
    disc_um = 1000 * moved_mm / 2 / fnum
    kernels = {}
    for engine in ("wave", "geometric"):
        shares = Shot.of(alone("double_gauss", disc_um / 32, engine=engine, **job), (0.2, 0.0), moved_mm).shares
        kernels[engine] = gaussian_filter(shares, 0.15 * 32, truncate=6)
    assert rel_l2(kernels["wave"], kernels["geometric"]) < 0.05
    at = offsets(96, 1.0)
    for share in (0.5, 0.8):
        radii = {name: _encircling(kernel / kernel.sum(), at, share) for name, kernel in kernels.items()}
        assert radii["wave"] == pytest.approx(radii["geometric"], rel=0.02)


def _encircling(kernel: Array, far: Array, share: float) -> float:
    """Radius about the middle that holds a share of the light."""
    order = far.ravel().argsort()
    return float(np.interp(share, kernel.ravel()[order].cumsum(), far.ravel()[order]))


@pytest.mark.parametrize("wavelength_um", [0.45, 0.65])
def test_lateral_colour_stays(wavelength_um: float) -> None:
    """Other wavelengths are centred where the reference is, as those of geometry are."""
    jobs = {
        engine: alone("double_gauss", 1.0, wavelength_um, engine=engine, fnum=4.0, reference_um=0.55, kernel_px=96)
        for engine in ("wave", "geometric")
    }
    shares = {name: Shot.of(job, (0.0, 0.9)).shares for name, job in jobs.items()}
    middle = {name: float((np.arange(96) - 47.5) @ light.sum(axis=1)) / light.sum() for name, light in shares.items()}
    assert abs(middle["geometric"]) > 0.3
    assert middle["wave"] == pytest.approx(middle["geometric"], abs=0.15)


def test_kernels_follow_their_centre() -> None:
    """About another point of the sensor the same light lies elsewhere in the window."""
    job = alone("phone", 0.4, kernel_px=48, tolerance=0.001, response="point")
    shot = Shot.of(job, (0.0, 0.5))
    before = shot.shares
    shot.at.chief_mm[0, 0] += [-2 * 0.4e-3, 3 * 0.4e-3]
    assert rel_l2(shot.shares[8:-8, 8:-8], np.roll(before, (3, 2), (0, 1))[8:-8, 8:-8]) < 3e-3


def test_a_band_is_the_sum_of_its_wavelengths(tmp_path: Path) -> None:
    """The light of a band of one width is that of 5 wavelengths after Gauss and Legendre, and wide bands wash out."""
    lens, nodes, weights = perfect(tmp_path, 8.0), *np.polynomial.legendre.leggauss(5)
    band = Shot.of(alone(lens, 1.0, bandwidth_um=0.1), (0, 0)).shares
    one_by_one = [Shot.of(alone(lens, 1.0, 0.55 + 0.05 * node), (0, 0)).shares for node in nodes]
    assert band == pytest.approx(np.tensordot(weights / 2, one_by_one, axes=1), abs=1e-6)


def test_a_wide_band_gets_the_wavelengths_that_it_takes() -> None:
    """Out of focus at its ends, against the mean of 65 wavelengths: as wrong as its noise says, or less."""
    band = alone("double_gauss", 6.26, kernel_px=32, fnum=8.0, depth=2000.0, focus=2000.0, bandwidth_um=0.3)
    shot = Shot.of(band, (0.0, 0.4))
    nodes, weights = np.polynomial.legendre.leggauss(65)
    lines = tuple((0.55 + 0.15 * nodes).tolist())
    many = band.model_copy(update={"bandwidth_um": 0.0, "wavelength": lines})
    truth = np.tensordot(weights / 2, Shot.of(many, (0.0, 0.4)).deposits.halves[0, 0].sum(axis=1), axes=1)
    assert rel_l2(shot.shares, truth) < shot.deposits.floor[0, 0, 0] < 0.03
    assert rel_l2(shot.shares, truth) < 5e-3


@pytest.mark.parametrize("engine", ["wave", "auto"])
def test_rays_may_miss_the_sphere(engine: str) -> None:
    """Those of an object so near that its light goes elsewhere."""
    for field in ((0.0, 0.0), (1.0, 1.0)):
        found = Shot.of(alone("phone", 0.53, engine=engine, depth=0.01, focus=30.0), field).deposits
        assert np.isfinite(found.halves).all()
        assert 0 <= found.captured.min() <= found.captured.max() < 1e-3


@pytest.mark.parametrize("response", ["point", "area", "bilinear"])
def test_samples_respond_as_they_are_told(tmp_path: Path, response: str) -> None:
    """Fine points of the same light, summed up with the response."""
    lens, fine = perfect(tmp_path, 8.0), 21
    coarse = Shot.of(alone(lens, 2.1, kernel_px=9, response=response), (0, 0)).shares
    points = Shot.of(alone(lens, 2.1 / fine, kernel_px=9 * fine + 4 * fine, response="point"), (0, 0)).shares
    at = (np.arange(13 * fine) - (13 * fine - 1) / 2) / fine
    far = np.abs(at[None] - (np.arange(9) - 4)[:, None])
    taken = {
        "point": (far < 1e-9) * fine,
        "area": far < 0.5,
        "bilinear": np.clip(1 - far, 0, None),
    }[response].astype(float)
    assert coarse == pytest.approx(taken @ points @ taken.T, abs=5e-4 * coarse.max())


@pytest.mark.parametrize("pitch_um", [2.0, pytest.param(4.0, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", ["phone", "double_gauss", "acl12708u"])
def test_the_noise_bounds_the_error(name: str, pitch_um: float) -> None:
    """Kernels with so few points of the sphere that their light may overlap, against ones with many."""
    field = (0.3, 0.2)
    many = Shot.of(alone(name, pitch_um, kernel_px=32, spp=2**18, tolerance=None), field).deposits
    for spp in (2**13, 2**14, 2**15):
        few = Shot.of(alone(name, pitch_um, kernel_px=32, spp=spp, tolerance=None), field).deposits
        found, best = (normalise(of.halves, 8, of.margins) for of in (few, many))
        assert few.floor is not None
        noise = np.hypot(float(found.noise[0, 0, 0]), few.floor[0, 0, 0])
        assert rel_l2(found.psf[0, 0, 0], best.psf[0, 0, 0]) < noise


@pytest.mark.parametrize("field", [(0.0, 0.0), (0.5, 0.0), (0.9, 0.4), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["phone", "triplet", "double_gauss"])
def test_all_light_that_comes_through_is_found(name: str, field: tuple[float, float]) -> None:
    """At a glance and however fine the grid of the sphere: as much as geometry says."""
    rays: dict[str, Any] = {"spp": 2**17, "tolerance": None}
    shots = {engine: Shot.of(alone(name, 2.0, engine=engine, **rays), field) for engine in ("wave", "geometric")}
    throughput = {engine: float(shot.deposits.throughput[0, 0]) for engine, shot in shots.items()}
    assert throughput["wave"] == pytest.approx(throughput["geometric"], rel=1e-3)
    engine = shots["wave"].engine
    assert isinstance(engine, WaveEngine)
    lit = Light(engine, shots["wave"].at, 0, engine.lines(0)[0]).pupil(0)
    for side in (100, 400):
        flux = Wavefront.of(lit, lit.width / side, 0.0).flux
        assert flux / (math.pi * engine.lens.pupil_r_mm**2) == pytest.approx(throughput["geometric"], rel=1e-3)


@pytest.mark.parametrize("side", [24, 48, 96])
def test_the_edge_of_a_disc_is_drawn_between_points(side: int) -> None:
    """Its area, and its second moment: the middles of cells that it cuts lie where their open parts have them."""
    at = (np.arange(1.3 * side) - 0.65 * side + 0.31) * 2 / side
    share, inwards = coverage(1 - np.square(at) - np.square(at)[:, None])
    assert share.sum() * (2 / side) ** 2 == pytest.approx(math.pi, rel=1 / side**2)
    x, y = at + inwards[1] * 2 / side, at[:, None] + inwards[0] * 2 / side
    assert (share * (x**2 + y**2)).sum() * (2 / side) ** 2 == pytest.approx(math.pi / 2, rel=1 / side**2)
