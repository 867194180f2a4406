"""Where kernels may be asked for: what `psf(field, depth_mm, focus_mm)` of a model and of a table take.

It imports no torch, so that a table is read without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import ConfigError, RunMismatch

Array = NDArray[np.float64]

FAR = 10  # times the field: beyond, nobody guesses
NEAREST_MM = 1e-3


@dataclass(frozen=True)
class Domain:
    """The field and the distances that `what` was made for, in the words of its errors.

    `made`: how it came by them, such as "trained on"; `way_out`: how it would get others. `field_max` in half sensor
    sides; the spans are (least, most) in dioptres.
    """

    what: str
    made: str
    way_out: str
    field_max: float
    depth_dioptre: tuple[float, float]
    focus_dioptre: tuple[float, float]

    @property
    def depth_mm(self) -> tuple[float, float]:
        """The nearest and the farthest depth."""
        return _range_mm(self.depth_dioptre)

    @property
    def focus_mm(self) -> tuple[float, float]:
        """The nearest and the farthest focus distance."""
        return _range_mm(self.focus_dioptre)

    def places(self, field: Any, depth_mm: Any = None, focus_mm: Any = None, *, outside: bool = False) -> list[Array]:
        """`field` [..., 2], depth and focus [...] in mm, of one leading shape, all within the domain.

        Lists, arrays and tensors broadcast; a distance of which there is one may be left out. Raises RunMismatch
        outside the domain (unless `outside` allows it), ConfigError for what is no place.
        """
        xy = _numbers("field", field)
        if xy.ndim < 1 or xy.shape[-1] != 2:
            raise ConfigError(f"field has the shape {list(xy.shape)}; give [..., 2]: field_x, field_y")
        distances_mm = [
            _numbers(name, self._only(name, known_mm) if given is None else given)
            for name, given, known_mm in (("depth_mm", depth_mm, self.depth_mm), ("focus_mm", focus_mm, self.focus_mm))
        ]
        try:
            shape = np.broadcast_shapes(xy.shape[:-1], *(values.shape for values in distances_mm))
        except ValueError:
            given = ", ".join(str(list(values.shape)) for values in (xy, *distances_mm))
            raise ConfigError(f"field, depth_mm and focus_mm of the shapes {given} do not go together") from None
        found = [np.broadcast_to(xy, (*shape, 2)), *(np.broadcast_to(values, shape) for values in distances_mm)]
        reach = np.abs(xy).max(initial=0.0)
        if outside:
            self._require_guessable(reach, distances_mm)
            return found
        if not reach <= self.field_max * (1 + 1e-6):
            raise RunMismatch(f"field {reach:g} is outside the field {self.made}, up to {self.field_max:g}")
        with np.errstate(divide="ignore"):
            depth, focus = (1000 / values for values in distances_mm)
        self.require(depth, focus)
        return found

    def is_outside(self, field: Array, depth_mm: Array, focus_mm: Array) -> NDArray[np.bool_]:
        """Which of the places (`field` [..., 2], distances [...]) lie outside the domain."""
        found = np.abs(field).max(axis=-1) > self.field_max * (1 + 1e-6)
        for values_mm, (low, high) in ((depth_mm, self.depth_dioptre), (focus_mm, self.focus_dioptre)):
            with np.errstate(divide="ignore"):
                dioptre = 1000 / values_mm
            found |= (dioptre < low - _slack(high)) | (dioptre > high + _slack(high))
        return np.asarray(found)

    def require(self, depth_dioptre: Array, focus_dioptre: Array) -> None:
        """Raise RunMismatch where a depth or a focus distance lies outside the domain."""
        for name, values, (low, high) in (
            ("depth", depth_dioptre, self.depth_dioptre),
            ("focus", focus_dioptre, self.focus_dioptre),
        ):
            slack = _slack(high)
            outside = values[(values < low - slack) | (values > high + slack)]
            if outside.size:
                raise RunMismatch(
                    f"{self.what}: {name} {_mm(outside[0])} is outside the range {self.made}, "
                    f"{_mm(high)} to {_mm(low)}; {self.way_out}"
                )

    def _require_guessable(self, reach: float, distances_mm: list[Array]) -> None:
        """Raise RunMismatch where a place is so far outside that nothing can be computed."""
        if not reach <= FAR * self.field_max:
            raise RunMismatch(
                f"field {reach:g} is too far outside the field {self.made}, up to {self.field_max:g}, for a guess; "
                f"give at most {FAR * self.field_max:g}"
            )
        for name, values in zip(("depth", "focus"), distances_mm, strict=True):
            if not (values >= NEAREST_MM).all():
                raise RunMismatch(f"{name} {values.min():g} mm is too near for a guess; give at least {NEAREST_MM} mm")

    def _only(self, name: str, known_mm: tuple[float, float]) -> float:
        near, far = known_mm
        if near < far:
            raise ConfigError(f"{self.what} was {self.made} a range of {name}, {words(known_mm)}; say which")
        return near


def _slack(high: float) -> float:
    """By how many dioptres rounding may be off, of a range up to `high`."""
    return 1e-6 * max(high, 1e-3)


def words(distances_mm: tuple[float, float]) -> str:
    """A range of distances for people."""
    near, far = (f"{distance:.6g}" for distance in distances_mm)
    return near if near == far else f"{near} to {far}"


def _numbers(name: str, given: Any) -> Array:
    values = given.detach().cpu().numpy() if hasattr(given, "detach") else given  # a tensor, on whatever device
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is no array of numbers") from None
    if name != "field" and np.isnan(numbers).any():
        raise ConfigError(f"{name} holds NaN, which is no distance; inf is one")
    return numbers


def _range_mm(dioptre: tuple[float, float]) -> tuple[float, float]:
    far, near = (1000 / value if value else math.inf for value in dioptre)
    return near, far


def _mm(dioptre: float) -> str:
    return f"{1000 / dioptre:.6g} mm" if dioptre else "inf"
