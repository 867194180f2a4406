"""How quantities are written: distances, wavelengths, sizes; each parser raises ValueError, saying how to write one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

SHORTEST_UM, LONGEST_UM = 0.1, 10.0  # wavelengths


def parse_distance_mm(value: object) -> float:
    """One distance in mm: `400mm`, `0.4m`, `inf`; a bare number is mm.

    Raises ValueError unless the distance is positive.
    """
    text = str(value).strip().lower()
    scale, digits = 1.0, text
    if text.endswith("mm"):
        digits = text[:-2]
    elif text.endswith("m"):
        scale, digits = 1000.0, text[:-1]
    try:
        distance_mm = float(digits) * scale
    except ValueError:
        raise ValueError(f"'{value}' is no distance; write 400mm, 0.4m, inf or a number of mm") from None
    if distance_mm > 0 and not (1e-3 <= distance_mm <= 1e9 or math.isinf(distance_mm)):
        raise ValueError(f"distance {value} is out of reach: 0.001 mm to 1000 km, or inf")
    if not distance_mm > 0:
        raise ValueError(f"distance {value} is not positive; distances are counted from the first surface, in front")
    return distance_mm


def parse_distances_mm(value: object) -> tuple[float, ...]:
    """Distances in mm, ascending: a list `1m,2m,inf`, a range `0.4m:20m:16` evenly spaced in
    dioptres, `0.4m:20m:16@mm` evenly in mm, or a YAML list of distances.

    Raises ValueError on anything else, and on duplicates.
    """
    if isinstance(value, (list, tuple)):
        return _ascending([parse_distance_mm(item) for item in value], "distance", "mm")
    text = str(value)
    if ":" not in text:
        return _ascending([parse_distance_mm(item) for item in text.split(",")], "distance", "mm")
    body, _, spacing = text.partition("@")
    parts = body.split(":")
    if len(parts) != 3 or spacing not in ("", "mm") or not parts[2].strip().isdigit() or int(parts[2]) < 1:
        raise ValueError(f"'{text}' is no range; write NEAR:FAR:COUNT, such as 0.4m:20m:8 or 0.4m:20m:8@mm")
    first, last, count = parse_distance_mm(parts[0]), parse_distance_mm(parts[1]), int(parts[2])
    if spacing and math.isinf(max(first, last)):
        raise ValueError(f"'{text}' cannot be spaced evenly in mm up to inf; leave out @mm")
    if count == 1:
        return (first,) if first == last else _ascending([first, last][:1], "distance", "mm")
    steps = [i / (count - 1) for i in range(count)]
    if spacing:
        inner = [first + (last - first) * s for s in steps]
    else:
        near, far = 1 / first, 1 / last
        inner = [math.inf if (d := near + (far - near) * s) == 0 else 1 / d for s in steps]
    inner = [float(f"{distance_mm:.15g}") for distance_mm in inner]  # 1500, not 1499.9999999999998
    inner[0], inner[-1] = first, last  # exactly as typed
    return _ascending(inner, "distance", "mm")


def _ascending(values: Sequence[float], what: str, unit: str) -> tuple[float, ...]:
    ordered = tuple(sorted(values))
    if not ordered:
        raise ValueError(f"no {what} is given")
    for a, b in pairwise(ordered):
        if a == b:
            raise ValueError(f"{what} {a:g} {unit} is given twice")
    return ordered


def _numbers(value: object) -> list[float]:
    items = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        return [float(item) for item in items]
    except (TypeError, ValueError):
        raise ValueError(f"'{value}' is no list of numbers") from None


def parse_wavelengths_um(value: object) -> tuple[float, ...]:
    """Wavelengths in um, ascending: `0.45,0.55` or a list, none given twice."""
    values = _numbers(value)
    for wavelength_um in values:
        if 100 <= wavelength_um <= 20000:
            raise ValueError(f"wavelength {wavelength_um:g} is not in um; did you mean {wavelength_um / 1000:g}?")
        if not SHORTEST_UM < wavelength_um < LONGEST_UM:
            raise ValueError(f"wavelength {wavelength_um:g} um is outside {SHORTEST_UM:g} to {LONGEST_UM:g} um")
    return _ascending(values, "wavelength", "um")


def parse_wavelength_um(value: object) -> float:
    """One wavelength in um."""
    return parse_wavelengths_um([value])[0]


def parse_size_mm(value: object) -> tuple[float, float]:
    """A width and a height in mm, both positive: `W,H`."""
    values = _numbers(value)
    if len(values) != 2 or not all(0 < v < math.inf for v in values):
        raise ValueError(f"'{value}' is no size; write W,H in mm, such as 5.04,5.04")
    return values[0], values[1]


def parse_pair(value: object) -> tuple[float, float]:
    """Two finite numbers: `X,Y`."""
    values = _numbers(value)
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"'{value}' is no pair; write X,Y")
    return values[0], values[1]
