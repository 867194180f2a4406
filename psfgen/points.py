"""Kernels at field points of one's own, straight into memory: for whom a store is too much.

Legend: P field points, W wavelengths.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.block import MOST_AIMED
from psfgen.config import Move
from psfgen.engines import Engine, engine_class
from psfgen.optics.splat import Kernels, normalise
from psfgen.plan import Plan
from psfgen.render import load_again
from psfgen.store import Store


class PointTracer:
    """One specimen of a store's lens, to be traced by the geometric engine at any place with any number of rays.

    The pupil points are turned otherwise than the store's, so that the two share no sampling error. It works on one
    core, in this thread. Raises LensError and ConfigError where the store's lens cannot be traced.
    """

    def __init__(self, store: Store, copy: int = 0) -> None:
        built = store.attrs.get("as_built")
        moves = tuple(Move.model_validate(move) for move in built[copy]) if built else ()
        self.lens, self.plan = load_again(
            store,
            "cpu",
            engine="geometric",
            tracer="auto",
            seed=store.attrs["config"]["seed"] + 1,
            perturb=(),
            copies=None,
            tolerances={},
            tolerance=None,
        )
        self.specimen = self.lens.as_built(moves)
        self.engine = lru_cache(maxsize=2)(self._engine)

    def _engine(self, spp: int) -> Engine:
        plan = Plan.of(self.plan.config.model_copy(update={"spp": spp, "tolerance": None}), self.lens)
        engine: Engine = engine_class(plan.config.engine)(self.specimen, plan)
        return engine

    def kernels(self, field_xy: NDArray[np.float64], depth_mm: float, focus: int, spp: int) -> Kernels:
        """Kernels [P, W, ...] of `spp` rays each at `field_xy` [P, 2], a depth and the store's focus number `focus`.

        They are NaN where no light arrives.
        """
        engine, bins, parts = self.engine(spp), self.plan.config.bins, []
        for start in range(0, len(field_xy), MOST_AIMED):
            some = torch.from_numpy(field_xy[start : start + MOST_AIMED])
            aim = engine.aim(some, depth_mm, slice(focus, focus + 1))
            for first in range(0, len(some), engine.batch):
                found = engine.deposit(aim.part(slice(first, first + engine.batch)))
                parts.append(normalise(found.halves[:, 0], bins, found.margins))
        return Kernels(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Kernels)))
