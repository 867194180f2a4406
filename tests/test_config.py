"""The grammar of distances, what overrides what, and what a user is told."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from psfgen.config import Config, RenderConfig, load_config, parse_distance_mm, parse_distances_mm
from psfgen.errors import ConfigError

INF = math.inf


@pytest.mark.parametrize(
    ("text", "mm"),
    [
        ("400mm", 400),
        ("0.4m", 400),
        ("inf", INF),
        ("250", 250),
        (250, 250),
        (INF, INF),
        (" 2 M ", 2000),
        ("2e3mm", 2000),
    ],
)
def test_one_distance(text: object, mm: float) -> None:
    assert parse_distance_mm(text) == pytest.approx(mm, rel=1e-15)


@pytest.mark.parametrize("text", ["-1m", "0", "-inf", "nan", "4km", "", "m", "1 2", None])
def test_no_distance(text: object) -> None:
    with pytest.raises(ValueError, match=r"is no distance|is not positive"):
        parse_distance_mm(text)


@pytest.mark.parametrize(
    ("text", "mm"),
    [
        ("1m,2m,inf", [1000, 2000, INF]),
        ("inf,2m,1000", [1000, 2000, INF]),
        ([2000, "1m", ".5m"], [500, 1000, 2000]),
        (750, [750]),
        ("0.4m:inf:3", [400, 800, INF]),
        ("inf:0.4m:3", [400, 800, INF]),
        ("1m:4m:4@mm", [1000, 2000, 3000, 4000]),
        ("1m:2m:2", [1000, 2000]),
    ],
)
def test_lists_and_ranges(text: object, mm: list[float]) -> None:
    assert parse_distances_mm(text) == pytest.approx(mm, rel=1e-14)


def test_a_range_is_even_in_dioptres_and_ends_exactly_as_typed() -> None:
    values = parse_distances_mm("0.4m:20m:16")
    assert (len(values), values[0], values[-1]) == (16, 400.0, 20000.0)
    dioptres = [1000 / v for v in values]
    steps = [a - b for a, b in pairwise(dioptres)]
    assert steps == pytest.approx([(2.5 - 0.05) / 15] * 15, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1m,1000", "given twice"),
        ("1m:1m:3", "given twice"),
        ("1m:2m", "is no range"),
        ("1m:2m:0", "is no range"),
        ("1m:2m:2.5", "is no range"),
        ("1m:2m:4@dioptre", "is no range"),
        ("1m:inf:4@mm", "up to inf"),
        ("0:2m:4", "not positive"),
        ("1m,,2m", "is no distance"),
        ([], "empty|no distance|at least"),
    ],
)
def test_no_distances(text: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_distances_mm(text)


def test_later_sources_win(tmp_path: Path) -> None:
    """Defaults < YAML < --set < flags."""
    path = tmp_path / "job.yaml"
    path.write_text("grid: 7\nspp: 512\nseed: 5\n")
    config = load_config(RenderConfig, path, ["spp=1024", "seed=6", ("seed", 8)])
    assert (config.bins, config.grid, config.spp, config.seed) == (15, 7, 1024, 8)


def test_set_values_are_yaml(tmp_path: Path) -> None:
    config = load_config(RenderConfig, None, ["depth=[1m, inf]", "pitch_um=null", "wavelength=0.5", "sensor_mm=[4, 3]"])
    assert config.depth == (1000, INF)
    assert config.pitch_um is None
    assert config.wavelength == (0.5,)
    assert config.sensor_mm == (4, 3)


def test_wavelengths_are_sorted() -> None:
    assert load_config(RenderConfig, None, [("wavelength", "0.65,0.45")]).wavelength == (0.45, 0.65)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(RenderConfig, path) == RenderConfig()


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RenderConfig().grid = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grd=3", r"unknown key 'grd'; did you mean 'grid'\?; known here: bandwidth_um, bins, copies, dask, depth,"),
        ("zzz=3", r"unknown key 'zzz'; known here: bandwidth_um, bins,"),
        ("grid=0", r"grid: .*greater than or equal to 1, got 0"),
        ("grid=many", r"grid: .*integer.*, got 'many'"),
        ("layout=cell", r"layout: .*'grid', 'cells' or 'random', got 'cell'"),
        ("wavelength=550", r"wavelength: wavelength 550 is not in um; did you mean 0\.55\?"),
        ("wavelength=0.05", r"wavelength: wavelength 0\.05 um is outside"),
        ("wavelength=[0.5, 0.5]", r"wavelength: wavelength 0\.5.* is given twice"),
        ("wavelength=blue", r"wavelength: 'blue' is no list of numbers"),
        ("wavelength=[]", r"wavelength: "),
        ("depth=[]", r"depth: "),
        ("depth=-1m", r"depth: distance -1m is not positive"),
        ("focus=[1m, 1000]", r"focus: distance 1000.* is given twice"),
        ("sensor_mm=3", r"sensor_mm: '3' is no size"),
        ("sensor_mm=[3, -3]", r"sensor_mm: .* is no size"),
        ("bins=99", r"bins 99 is more than kernel_px 64"),
        ("pitch_um=0", r"pitch_um: .*greater than 0, got 0"),
        ("pitch_um=.inf", r"pitch_um: .*finite"),
        ("pitch_um=.nan", r"pitch_um: "),
        ("device=tpu", r"device: .*got 'tpu'"),
        ("grid", r"--set grid: write KEY=VALUE"),
        ("grid=[1", r"--set grid=\[1: '\[1' is no YAML value"),
    ],
)
def test_a_wrong_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(RenderConfig, None, [override])
    assert "\n" not in str(raised.value)


def test_cells_need_two_points() -> None:
    with pytest.raises(ConfigError, match="grid 1 has no cell"):
        load_config(RenderConfig, None, ["grid=1", "layout=cells"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is no YAML at line"),
        ("- 1\n- 2", "holds a list"),
        ("pitchum: 3", "unknown key 'pitchum' in .*job.yaml; did you mean 'pitch_um'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(RenderConfig, path)


class Inner(Config):
    width: int = 3
    name: str = "a"


class Outer(Config):
    model: Inner = Inner()
    extra: Inner | None = None
    steps: int = 1


def test_nested_keys() -> None:
    config = load_config(Outer, None, ["model.width=5", "extra.name=b"])
    assert config.model == Inner(width=5)
    assert config.extra == Inner(name="b")


@pytest.mark.parametrize("where", ["model", "extra"])
def test_a_wrong_nested_key_is_named_with_its_path(where: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key '{where}\.widht'; did you mean 'width'\?.*name, width"):
        load_config(Outer, None, [f"{where}.widht=5"])
