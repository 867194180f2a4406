"""Loading a lens through DeepLens and tracing rays through it. Lengths in mm, wavelengths in um, float64.

Coordinates are DeepLens's: z along the axis from the first surface vertex, object space at z < 0, x and y
of the object upright, so that an image point has the opposite sign.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psfgen import catalogue
from psfgen.config import Move
from psfgen.errors import LensError, nearest
from psfgen.optics import perturb
from psfgen.optics.prescription import asymmetry

FORMATS = (".json", ".zmx", ".seq")
REQUIRED = ("type", "r", "d_next")
LAUNCH_Z_MM = -20.0


@dataclass(frozen=True)
class Rays:
    """A bundle of rays: `o` and `d` [..., 3] with unit directions, `valid` [...] bool."""

    o: Tensor
    d: Tensor
    valid: Tensor

    def at(self, z_mm: float | Tensor) -> Tensor:
        """x, y [..., 2] where the rays (prolonged) cross the plane z."""
        t = (z_mm - self.o[..., 2]) / self.d[..., 2]
        return self.o[..., :2] + self.d[..., :2] * t[..., None]


class Lens:
    """A lens as DeepLens reads it, with its first-order numbers at `reference_um`.

    Attributes: `name`, `text` and `sha256` of the prescription, `efl_mm`, `fnum`, `sensor_mm` (W, H),
    `pixel_um`, the entrance pupil `pupil_z_mm` and `pupil_r_mm`, what its file recommends as `pitch_um` and
    `field_max`, and `asymmetry`: what keeps it from being rotationally symmetric, or None.

    Raises LensError where the lens cannot be found, read or used, naming the way out.
    """

    def __init__(
        self,
        name: str,
        *,
        reference_um: float = 0.5876,
        sensor_mm: tuple[float, float] | None = None,
        fnum: float | None = None,
        device: str = "cpu",
    ) -> None:
        self.name, suffix, self.text = _find(name)
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self.reference_um = reference_um
        self.device = torch.device(device)
        document = _parse_json(self.name, self.text) if suffix == ".json" else {}
        text = _with_sensor(self.name, suffix, self.text, sensor_mm)
        with _deeplens_errors(self.name):
            self.geo = _read(text, suffix, reference_um, self.device)
            if sensor_mm is not None:
                self.geo.sensor_size = sensor_mm
                self.geo.r_sensor = math.hypot(*sensor_mm) / 2
                self.geo.post_computation()
            if fnum is not None:
                self._stop_down(fnum)
        self._check_surfaces()
        notes = _notes(self.name, document)
        self.sensor_mm = (float(self.geo.sensor_size[0]), float(self.geo.sensor_size[1]))
        self.pixel_um = 1000 * self.sensor_mm[0] / self.geo.sensor_res[0]
        self.pitch_um = notes.get("pitch_um", self.pixel_um)
        self.field_max = notes.get("field_max", 1.0)
        self.efl_mm = float(self.geo.foclen)
        self.fnum = float(self.geo.fnum)
        self.pupil_z_mm, self.pupil_r_mm = (float(v) for v in self.geo.get_entrance_pupil())
        self.stop_index = int(self.geo.aper_idx)
        self._look_at_surfaces()

    def _look_at_surfaces(self) -> None:
        self.last_vertex_mm = float(self.geo.surf_d(len(self.geo.surfaces) - 1))
        self.asymmetry = asymmetry(self.geo.surfaces)
        self.stop_xy = (float(self.stop.pos_x), float(self.stop.pos_y))

    def as_built(self, moves: tuple[Move, ...]) -> Lens:
        """This lens with its parts moved. EFL, entrance pupil and axis stay those of the design.

        Raises ConfigError for a part that the lens does not have.
        """
        if not moves:
            return self
        built = copy.copy(self)
        built.__dict__.pop("unclipped", None)
        built.geo = copy.deepcopy(self.geo)
        perturb.apply(built.geo.surfaces, moves)
        built._look_at_surfaces()
        return built

    @property
    def stop(self) -> Any:
        """DeepLens's surface object of the aperture stop."""
        return self.geo.surfaces[self.geo.aper_idx]

    @property
    def fov_diag_deg(self) -> float:
        """Full diagonal field of view of the pinhole with this EFL."""
        return math.degrees(2 * math.atan(math.hypot(*self.sensor_mm) / 2 / self.efl_mm))

    @cached_property
    def unclipped(self) -> Any:
        """The same lens with every rim removed, for rays that only mark a position."""
        geo = copy.deepcopy(self.geo)
        for surface in geo.surfaces:
            surface.r, surface.is_square = 1e6, False
        return geo

    def trace(self, o: Tensor, d: Tensor, wavelength_um: float, *, clip: bool = True, to_stop: bool = False) -> Rays:
        """Trace rays from object space through all surfaces (or up to and with the stop).

        `o`, `d` [..., 3]. With `clip=False` rims are ignored. The result is where and how the rays leave
        the last surface.
        """
        from deeplens.light import Ray

        geo = self.geo if clip else self.unclipped
        surfaces = range(self.stop_index + 1) if to_stop else None
        with torch.no_grad():
            # DeepLens works in place on the origins.
            ray, _ = geo.trace(Ray(o.clone(), d, wavelength_um, device=self.device), surf_range=surfaces)
        valid = (ray.is_valid > 0) & torch.isfinite(ray.o).all(-1) & torch.isfinite(ray.d).all(-1)
        return Rays(ray.o, ray.d, valid)

    def check_wavelengths(
        self, wavelengths_um: tuple[float, ...], *, cure: str = "choose another --wavelength"
    ) -> None:
        """Raise LensError if the data of one of the glasses does not reach a wavelength."""
        for surface in self.geo.surfaces:
            reach = surface.mat2.wvln_range
            for wavelength_um in wavelengths_um if reach is not None else ():
                if not reach[0] <= wavelength_um <= reach[1]:
                    raise LensError(
                        f"wavelength {wavelength_um:g} um is outside the data of glass {surface.mat2.name} in lens "
                        f"{self.name}: {reach[0]:g} to {reach[1]:g} um; {cure}"
                    )

    def _stop_down(self, fnum: float) -> None:
        if fnum < self.geo.fnum * (1 - 1e-3):
            raise LensError(f"fnum {fnum:g} is faster than lens {self.name} at full aperture, F/{self.geo.fnum:.3g}")
        # DeepLens's own set_fnum stops within 1e-3; the pupil is proportional to the stop to far better.
        for _ in range(8):
            self.stop.update_r(self.stop.r * self.geo.fnum / fnum)
            self.geo.calc_pupil()

    def _check_surfaces(self) -> None:
        if not self.geo.surfaces:
            raise LensError(f"lens {self.name} has no surfaces")
        for index, surface in enumerate(self.geo.surfaces):
            if not surface.r > 0:
                raise LensError(
                    f"lens {self.name}: surface {index} has radius r = {surface.r:g} mm; it must be positive"
                )
            if float(surface.d_next) < 0 and index < len(self.geo.surfaces) - 1:
                raise LensError(
                    f"lens {self.name}: surface {index} has thickness d_next = {float(surface.d_next):g} mm; "
                    "it must not be negative"
                )


def _find(name: str) -> tuple[str, str, str]:
    """(name, suffix, text) of a shipped lens or a file."""
    path = Path(name)
    if path.suffix.lower() not in FORMATS:
        known = catalogue.names()
        if name not in known:
            raise LensError(
                f"unknown lens '{name}'{nearest(name, known)}; shipped: {', '.join(known)}; "
                "a .json, .zmx or .seq file works too"
            )
        return name, ".json", catalogue.text(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LensError(f"lens file {name} cannot be read: {error.strerror}") from None
    for encoding in ("utf-8-sig", "utf-16"):
        with contextlib.suppress(UnicodeDecodeError):
            return path.stem, path.suffix.lower(), data.decode(encoding)
    raise LensError(f"lens file {name} is no text file")


def _parse_json(name: str, text: str) -> dict[str, Any]:
    try:
        document: Any = json.loads(text)
    except ValueError as error:
        raise LensError(f"lens {name} is broken JSON: {error}") from None
    surfaces = document.get("surfaces") if isinstance(document, dict) else None
    if not isinstance(surfaces, list) or not surfaces:
        raise LensError(f"lens {name} has no list of surfaces")
    for index, surface in enumerate(surfaces):
        for key in REQUIRED:
            if not isinstance(surface, dict) or key not in surface:
                raise LensError(f"lens {name}: surface {index} has no '{key}'")
        if surface["type"] == "Aspheric" and surface.get("ai") and "use_ai2" not in surface:
            raise LensError(
                f"lens {name}: surface {index} does not say where its polynomial 'ai' starts; "
                'add "use_ai2": true for r^2 or false for r^4'
            )
    if not any(surface["type"] in ("Stop", "Aperture") or surface.get("is_aperture") for surface in surfaces):
        raise LensError(f'lens {name} has no stop; add "is_aperture": true to one surface')
    return dict(document)


def _with_sensor(name: str, suffix: str, text: str, sensor_mm: tuple[float, float] | None) -> str:
    """The prescription with a sensor, which a file may lack; DeepLens cannot read it without."""
    if suffix == ".json":
        document = json.loads(text)
        if "r_sensor" in document or "sensor_size" in document or "(sensor_size)" in document:
            if sensor_mm is None:
                return text
            for key in ("sensor_size", "(sensor_size)"):
                document.pop(key, None)
    elif suffix == ".zmx":
        image = text[text.rfind("SURF ") :]
        fields = [line.split() for line in image.splitlines()]
        has_sensor = any(f[0] == "DIAM" and len(f) > 1 and float(f[1]) > 0 for f in fields if f)
        if has_sensor or sensor_mm is not None:
            half = f"\n  DIAM {math.hypot(*sensor_mm) / 2 if sensor_mm else 0:.12g}"
            return text if has_sensor else text.rstrip() + half + "\n"
    else:
        return text
    if sensor_mm is None:
        raise LensError(f"lens {name} has no sensor; give --sensor-mm W,H")
    if suffix == ".json":
        document["r_sensor"] = math.hypot(*sensor_mm) / 2  # the sides are set once the lens is read
    return json.dumps(document)


def _read(text: str, suffix: str, reference_um: float, device: torch.device) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepLens's own imports warn of is not ours to mend
        from deeplens import GeoLens

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / f"lens{suffix}"
        path.write_text(text, encoding="utf-8")
        geo = GeoLens(filename=str(path), device=device, dtype=torch.float64, primary_wvln=reference_um)
        if suffix == ".seq":
            _shift_aspheres(geo)
        if geo.primary_wvln != reference_um:  # a file may name its own
            geo.primary_wvln = reference_um
            geo.post_computation()
    return geo


def _shift_aspheres(geo: Any) -> None:
    """Move CODE V's coefficients to their orders: DeepLens 2.5 files A, that of r^4, under r^6."""
    for surface in geo.surfaces:
        if getattr(surface, "ai", None) is not None:
            surface.ai, surface.ai_degree = surface.ai[1:], surface.ai_degree - 1
            for i, coefficient in enumerate(surface.ai):
                setattr(surface, f"ai{2 * (i + 2)}", coefficient)
    geo.post_computation()


def _notes(name: str, document: dict[str, Any]) -> dict[str, float]:
    """The numbers a lens file holds for psfgen."""
    notes = document.get("psfgen", {})
    if not isinstance(notes, dict):
        raise LensError(f"lens {name}: its 'psfgen' entry must hold KEY: VALUE notes")
    found = {key: notes[key] for key in ("pitch_um", "field_max") if key in notes}
    for key, value in found.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise LensError(f"lens {name}: {key} is {value!r}; it must be a positive number")
    return {key: float(value) for key, value in found.items()}


@contextlib.contextmanager
def _deeplens_errors(name: str) -> Iterator[None]:
    """Whatever DeepLens raises while it reads a lens, as one LensError."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except LensError:
        raise
    except (Exception, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        if reason.startswith("Material ") and reason.endswith(" not implemented."):
            reason = f"unknown glass: {reason.removeprefix('Material ').removesuffix(' not implemented.')}"
        raise LensError(f"lens {name} cannot be read: {reason}") from None
