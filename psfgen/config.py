"""The render job as a config, and the loader that psftrain shares: defaults < YAML < `--set a.b=c`."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from psfgen.errors import ConfigError, nearest
from psfgen.quantities import SHORTEST_UM, parse_pair, parse_size_mm, parse_wavelength_um
from psfgen.quantities import parse_distance_mm as parse_distance_mm  # psftrain takes these three from here
from psfgen.quantities import parse_distances_mm as parse_distances_mm
from psfgen.quantities import parse_wavelengths_um as parse_wavelengths_um


class Config(BaseModel):
    """Base of every config: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Distance = Annotated[float, Field(allow_inf_nan=True)]
Distances = Annotated[tuple[Distance, ...], BeforeValidator(parse_distances_mm)]
Wavelengths = Annotated[tuple[float, ...], BeforeValidator(parse_wavelengths_um)]
Wavelength = Annotated[float, BeforeValidator(parse_wavelength_um)]
Size = Annotated[tuple[float, float], BeforeValidator(parse_size_mm)]
Pair = Annotated[tuple[float, float], BeforeValidator(parse_pair)]

TOLERANCE = 0.03
DIFFRACTED = ("wave", "auto")  # engines that know of diffraction
OF_DIFFRACTION = ("bandwidth_um", "response")  # their keys
MOST_RAYS = 2**20  # per kernel


class Move(Config):
    """What is wrong with one part of a lens as built: an element, or surfaces i to j; all counted from 0.

    The part is moved as a whole: tilted about its first vertex (a turn about the axis (x, y, 0) by the length of
    `tilt_deg`), then decentred.
    """

    element: int | None = Field(None, ge=0, description="surfaces joined by glass")
    surfaces: tuple[int, int] | None = Field(None, description="first and last surface")
    decentre_mm: Pair = Field((0.0, 0.0), description="x, y")
    tilt_deg: Pair = Field((0.0, 0.0), description="about x, about y")
    about: Literal["first vertex"] = Field("first vertex", description="what a tilt turns about")
    thickness_mm: float = Field(0.0, description="added behind the first surface")
    curvature_rel: float = Field(0.0, gt=-1, description="relative change of every curvature")
    index: float = Field(0.0, description="added to the refractive index of every glass")

    @model_validator(mode="after")
    def _one_part(self) -> Move:
        if (self.element is None) == (self.surfaces is None):
            raise ValueError("name one part: element: K, or surfaces: [I, J]")
        if self.surfaces is not None and not 0 <= self.surfaces[0] <= self.surfaces[1]:
            raise ValueError(f"surfaces {list(self.surfaces)} is no range; write [first, last], counted from 0")
        return self


class Tolerances(Config):
    """Standard deviations, per axis, of what is wrong with every element of a lens as built."""

    decentre_mm: float = Field(0.0, ge=0)
    tilt_deg: float = Field(0.0, ge=0)
    thickness_mm: float = Field(0.0, ge=0)
    curvature_rel: float = Field(0.0, ge=0, lt=0.2)
    index: float = Field(0.0, ge=0)


def _sbatch_word(value: object) -> object:
    if isinstance(value, str) and (not value or set(value) & set(" \t\r\n\"'\\#")):
        raise ValueError(f"{value!r} cannot stand in an #SBATCH line; leave out spaces, quotes, backslashes and #")
    return value


def _sbatch_option(value: object) -> object:
    if isinstance(value, str) and not (value.startswith("--") and value[2:3].isalpha()):
        raise ValueError(f"'{value}' is no sbatch option; write --NAME or --NAME=VALUE, such as --account=optics")
    return _sbatch_word(value)


def _time_limit(value: object) -> object:
    if isinstance(value, (int, float)):  # YAML reads 1:30:00 as the number 5400
        raise ValueError("write the time limit in quotes, such as '1:30:00', '0:30:00' or '2-00:00:00'")
    return _sbatch_word(value)


SbatchWord = Annotated[str, BeforeValidator(_sbatch_word)]


class Slurm(Config):
    """How `executor: slurm` submits a render: one array job and one that finalises the store."""

    partition: SbatchWord | None = Field(None, description="default: the cluster's")
    time: Annotated[str, BeforeValidator(_time_limit)] = Field("01:00:00", description="limit of a task")
    gres: SbatchWord | None = Field(None, description="such as gpu:1; device auto then means cuda")
    cpus: int = Field(1, ge=1, description="cores of a task")
    memory: SbatchWord | None = Field(None, description="such as 4G; default: the cluster's")
    concurrency: int | None = Field(None, ge=1, description="most tasks that run at once")
    max_tasks: int = Field(1000, ge=1, description="most tasks of the array")
    task_minutes: float = Field(10.0, gt=0, description="how long a task should take")
    setup: tuple[str, ...] = Field((), description="shell lines that each job begins with, taken as they are")
    options: tuple[Annotated[str, BeforeValidator(_sbatch_option)], ...] = Field((), description="more sbatch options")
    requeue: bool = Field(True, description="a task that is stopped goes on later")
    signal_s: int = Field(60, ge=1, le=65535, description="seconds before the time limit at which a task is stopped")


class Dask(Config):
    """Where `executor: dask` finds its workers."""

    scheduler: str | None = Field(
        None, min_length=1, description="tcp://HOST:PORT; default: a cluster of its own on this machine"
    )


class RenderConfig(Config):
    """One render job. Lengths carry their unit in the key; None is filled in from the lens."""

    lens: str = Field("acl12708u", description="a name from `psfgen lenses`, or a .json, .zmx or .seq file")
    grid: int = Field(20, ge=1, le=4096, description="field points a side")
    layout: Literal["grid", "cells", "random"] = Field("grid", description="where the field points lie")
    field_max: float | None = Field(None, gt=0, le=2, description="half side of the field, in half sensor sides")
    sensor_mm: Size | None = Field(None, description="sensor width and height")
    fnum: float | None = Field(None, gt=0, le=128, description="stop down to this F-number")
    depth: Distances = Field(parse_distances_mm("0.4m:20m:8"), description="object distances, mm")
    focus: Distances = Field(parse_distances_mm("0.4m:20m:4"), description="focus distances, mm")
    wavelength: Wavelengths = Field((0.45, 0.55, 0.65), description="um")
    reference_um: Wavelength = Field(0.5876, description="EFL, focus and chief ray are computed at it")
    tolerance: float | None = Field(
        None, gt=0, lt=1, description=f"relative L2 error that `noise` may reach; {TOLERANCE} unless spp is given"
    )
    spp: int | None = Field(None, ge=16, le=MOST_RAYS, description="rays per kernel, the same for all")
    spp_max: int = Field(MOST_RAYS, ge=16, le=MOST_RAYS, description="most rays that a tolerance may ask for")
    sampling: Literal["spiral", "sobol"] = Field("spiral", description="pupil points")
    kernel_px: int = Field(64, ge=2, le=1024, description="samples a side of a kernel")
    bins: int = Field(15, ge=1, description="bins a side of the binned kernel")
    pitch_um: float | None = Field(None, gt=0, description="sample spacing at the sensor")
    engine: str = Field("geometric", description="what computes the kernels")
    bandwidth_um: float = Field(0.0, ge=0, lt=1, description="width of the band about each wavelength; wave, auto")
    response: Literal["bilinear", "area", "point"] = Field(
        "bilinear", description="what a sample takes of the light about it; wave, auto"
    )
    tracer: Literal["auto", "numba", "torch", "deeplens"] = Field("auto", description="what traces the rays")
    perturb: tuple[Move, ...] = Field((), description="how the lens as built departs from its design")
    copies: int | None = Field(None, ge=1, le=1000, description="specimens of the lens, drawn from `tolerances`")
    tolerances: Tolerances = Field(Tolerances(), description="how much the copies differ")
    precision: Literal["single", "double"] = Field("single", description="of the kernels' rays; positions are double")
    seed: int = Field(0, ge=0, description="rotates the pupil points; draws layout random")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:i")
    workers: int | None = Field(None, ge=1, description="processes; default: one, or what the tracer needs")
    memory_mib: int = Field(512, ge=64, description="most memory a render may take above its imports")
    out: str = Field("psfs.zarr", min_length=1, description="the store")
    format: str | None = Field(None, description="zarr or hdf5; default: what `out` ends in, zarr unless .h5")
    executor: str = Field("local", description="where the blocks run")
    slurm: Slurm = Field(Slurm(), description="of executor slurm")
    dask: Dask = Field(Dask(), description="of executor dask")

    @model_validator(mode="after")
    def _fits(self) -> RenderConfig:
        if (self.copies is None) != (self.tolerances == Tolerances()):
            given, lacking = (
                ("copies", "tolerances: how they differ") if self.copies else ("tolerances", "copies: how many")
            )
            raise ValueError(f"{given} need {lacking}")
        if self.spp is not None and self.tolerance is not None:
            raise ValueError(f"spp {self.spp} and tolerance {self.tolerance:g} exclude each other; give one")
        for key, rays in (("spp", self.spp), ("spp_max", self.spp_max)):
            if self.sampling == "sobol" and rays is not None and rays & (rays - 1):
                raise ValueError(f"{key} {rays} is no power of two, which sampling sobol needs")
        if self.engine not in DIFFRACTED:
            for key in OF_DIFFRACTION:
                if getattr(self, key) != type(self).model_fields[key].default:
                    others = "wave" if key == "response" else "wave or auto"
                    raise ValueError(
                        f"{key} {getattr(self, key)} means nothing to engine {self.engine}; use engine {others}"
                    )
        if min(self.wavelength) - self.bandwidth_um / 2 <= SHORTEST_UM:
            raise ValueError(
                f"bandwidth_um {self.bandwidth_um:g}: about {min(self.wavelength):g} um it would reach below "
                f"{SHORTEST_UM:g} um; give a smaller --bandwidth-um"
            )
        if self.engine == "auto" and self.response != "bilinear":
            raise ValueError(f"response {self.response}: engine auto shares light out as rays are; use engine wave")
        if self.bins > self.kernel_px:
            raise ValueError(f"bins {self.bins} is more than kernel_px {self.kernel_px}; give --bins or --kernel-px")
        if self.layout == "cells" and self.grid < 2:
            raise ValueError("layout cells of grid 1 has no cell; give --grid 2 or more")
        return self


def load_config[C: Config](
    model: type[C],
    path: str | Path | None = None,
    overrides: Sequence[str | tuple[str, Any]] = (),
    *,
    base: Mapping[str, Any] | None = None,
) -> C:
    """Build `model` from its defaults, then `base`, then a YAML file, then overrides, the later winning.

    An override is a `--set` text "a.b=c" (the value is YAML) or a (key, value) pair from a flag.
    Raises ConfigError naming the key's full path, the value, the nearest known key or what is allowed.
    """
    data = _laid_over(model, _laid_over(model, model().model_dump(), base or {}), _read_config(path) if path else {})
    for override in overrides:
        if isinstance(override, tuple):
            key, value = override
        else:
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigError(f"--set {override}: write KEY=VALUE")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                raise ConfigError(f"--set {override}: '{text}' is no YAML value") from None
        data = _set(model, data, key.strip().split("."), value)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, path)) from None


def _laid_over(model: type[Config] | None, base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    data = dict(base)
    for key, value in above.items():
        data = _set(model, data, [key], value)
    return data


def _set(model: type[Config] | None, base: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """`base` with the value at a path. Sections (nested configs) are merged, any other value is replaced whole."""
    key, *deeper = keys
    section, below = _section(model, key), base.get(key)
    below = below if isinstance(below, Mapping) else {}
    if deeper:
        value = _set(section, below, deeper, value)
    elif section is not None and isinstance(value, Mapping):
        value = _laid_over(section, below, value)
    return {**base, key: value}


def _section(model: type[Config] | None, key: str) -> type[Config] | None:
    """The nested config that stands at `key`, if one does."""
    field = model.model_fields.get(key) if model is not None else None
    annotation = field.annotation if field is not None else None
    options = typing.get_args(annotation) or (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, Config)), None)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises ConfigError where it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"config {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"config {path} is no YAML{where}") from None


def _read_config(path: str | Path) -> dict[str, Any]:
    loaded = read_yaml(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"config {path} holds a {type(loaded).__name__}; write KEY: VALUE lines")
    return {str(key): value for key, value in loaded.items()}


def _explain(model: type[Config], error: ValidationError, path: str | Path | None) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "[key]")))
    where = f" in {path}" if path is not None else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_keys_beside(model, first["loc"]))
        return f"unknown key '{key}'{where}{nearest(str(first['loc'][-1]), known)}; known here: {', '.join(known)}"
    reason = first["msg"].removeprefix("Value error, ")
    if not key:
        return reason
    if first["type"] == "value_error":
        return f"{key}: {reason}"
    if first["type"] == "string_pattern_mismatch" and (described := _description(model, first["loc"])):
        reason = f"give {described}"
    hint = nearest(str(first["input"]), _choices(first["ctx"]["expected"])) if first["type"] == "literal_error" else ""
    return f"{key}: {reason[0].lower() + reason[1:]}, got {first['input']!r}{hint}"


def _choices(expected: str) -> list[str]:
    """The names in pydantic's list "'a', 'b' or 'c'"."""
    return expected.split("'")[1::2]


def _description(model: type[Config] | None, loc: tuple[int | str, ...]) -> str | None:
    """What the key at the path `loc` is described as."""
    for part in loc[:-1]:
        model = _section(model, str(part))
    field = model.model_fields.get(str(loc[-1])) if model is not None else None
    return field.description if field is not None else None


def _keys_beside(model: type[Config], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand where the path `loc` ends."""
    here: type[Config] | None = model
    for part in loc[:-1]:
        here = here if isinstance(part, int) else _section(here, str(part))  # an int is a place in a list
    return list(here.model_fields) if here is not None else []
