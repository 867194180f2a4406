"""A render job made definite: what is computed, and the ordered blocks it is computed in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from psfgen.config import DIFFRACTED, OF_DIFFRACTION, TOLERANCE, RenderConfig
from psfgen.errors import ConfigError, PlanMismatch
from psfgen.grid import field_axes
from psfgen.store import schema

if TYPE_CHECKING:
    from psfgen.optics.lens import Lens

# How and where a job runs; none of it changes a number.
INVOCATION = ("out", "format", "executor", "workers", "memory_mib", "device", "slurm", "dask")


@dataclass(frozen=True)
class Plan:
    """A config with nothing left open, and the prescription it is about."""

    config: RenderConfig
    lens_name: str
    lens_text: str
    lens_sha256: str

    @classmethod
    def of(cls, config: RenderConfig, lens: Lens) -> Plan:
        """Fill in what the config leaves to the lens.

        Raises LensError where its glass does not reach, ConfigError where the tracer cannot trace it.
        """
        from psfgen.optics.trace import choose_tracer

        lens.check_wavelengths((*config.wavelength, config.reference_um))
        filled = {
            "field_max": lens.field_max if config.field_max is None else config.field_max,
            "pitch_um": lens.pitch_um if config.pitch_um is None else config.pitch_um,
            "tolerance": TOLERANCE if config.tolerance is None and config.spp is None else config.tolerance,
            "tracer": choose_tracer(config.tracer, lens),
        }
        return cls(config.model_copy(update=filled), lens.name, lens.text, lens.sha256)

    @cached_property
    def coords(self) -> dict[str, NDArray[np.float64]]:
        """Every coordinate of the store, by name."""
        c = self.config
        assert c.field_max is not None
        assert c.pitch_um is not None
        field_x, field_y = field_axes(c.grid, c.layout, c.field_max, c.seed)
        return schema.coordinates(
            focus_mm=np.array(c.focus),
            depth_mm=np.array(c.depth),
            field_y=field_y,
            field_x=field_x,
            wavelength_um=np.array(c.wavelength),
            kernel_px=c.kernel_px,
            bins=c.bins,
            pitch_um=c.pitch_um,
            copies=c.copies,
        )

    @cached_property
    def document(self) -> dict[str, Any]:
        """Everything that decides the numbers, as plain data; its hash identifies the plan."""
        keys: dict[str, Any] = schema.plain(self.config.model_dump(exclude={*INVOCATION, "lens", *self._idle}))
        return {"schema_version": schema.SCHEMA_VERSION, "lens_sha256": self.lens_sha256, **keys}

    @property
    def _idle(self) -> set[str]:
        """Keys of other engines: stores made before these were there keep their plan."""
        return set() if self.config.engine in DIFFRACTED else set(OF_DIFFRACTION)

    @property
    def sha256(self) -> str:
        return schema.sha256_of(self.document)

    @property
    def blocks(self) -> range:
        """Indices of the blocks: one for each depth of each copy."""
        return range(len(self.spec.blocks))

    @property
    def spec(self) -> schema.StoreSpec:
        """What the store is made of, but for most of its attributes."""
        return schema.StoreSpec(self.coords, {"engine": self.config.engine})

    @property
    def kernels_per_block(self) -> int:
        return math.prod(len(self.coords[dim]) for dim in schema.KERNELS if dim != "depth")

    @property
    def kernels(self) -> int:
        return self.kernels_per_block * len(self.blocks)

    @property
    def nbytes(self) -> int:
        """Size of the arrays before compression."""
        return sum(math.prod(self.spec.shape(name)) * 4 for name in self.spec.arrays)

    def require_same(self, stored: dict[str, Any], path: object) -> None:
        """Raise PlanMismatch, naming the first key that differs, unless the store at `path` has this plan."""
        found = stored.get("plan", {})
        if "merged" in found:
            raise PlanMismatch(
                f"{path} exists, merged along {found['along']} from {len(found['merged'])} stores, which no "
                "render makes; choose another --out, or --overwrite to start anew"
            )
        for key, wanted in self.document.items():
            if found.get(key) != wanted:
                flag = "lens" if key == "lens_sha256" else key
                raise PlanMismatch(
                    f"{path} exists with another plan: {flag} is {found.get(key)}, this render asks for {wanted}; "
                    "choose another --out, or --overwrite to start anew"
                )


def share(blocks: range, shard: str | None) -> range:
    """The blocks of shard "I/N" (0-based), or all of them. Raises ConfigError for anything else."""
    if shard is None:
        return blocks
    rank, slash, count = shard.partition("/")
    if not (slash and rank.isdigit() and count.isdigit() and int(rank) < int(count)):
        raise ConfigError(f"--shard {shard}: write I/N with I from 0 to N - 1, such as 0/4")
    return blocks[int(rank) :: int(count)]


def array_shard(environment: Mapping[str, str]) -> str | None:
    """The shard "I/N" of a Slurm array task, of an array that starts anywhere and has any step; None outside one.

    Raises ConfigError where the array is no plain range, so that the place of a task in it is not known.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    names = ("ID", "MIN", "MAX", "COUNT", "STEP")
    given = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names}
    if all(text.isdigit() for text in given.values()):
        task, first, last, count, step = map(int, given.values())
        rank, off = divmod(task - first, max(step, 1))
        if first <= task <= last and not off and count == (last - first) // max(step, 1) + 1:
            return f"{rank}/{count}"
    told = ", ".join(f"{name} {text or 'unset'}" for name, text in given.items())
    raise ConfigError(
        f"this array task cannot tell its share: its array is no plain range (SLURM_ARRAY_TASK_ {told}); "
        "give --shard I/N, or --shard 0/1 to render every block"
    )
