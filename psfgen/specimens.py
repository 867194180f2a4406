"""The specimens of a plan's lens: one, or a number of copies that differ within tolerances."""

from __future__ import annotations

from functools import lru_cache

from psfgen.config import Move
from psfgen.engines import Engine, engine_class
from psfgen.optics import perturb
from psfgen.optics.lens import Lens
from psfgen.plan import Plan


class Specimens:
    """Makes the engine of each copy, and keeps the last ones."""

    def __init__(self, lens: Lens, plan: Plan) -> None:
        self.lens, self.plan = lens, plan
        self.count = plan.config.copies or 1
        self.engine = lru_cache(maxsize=2)(self._engine)

    def moves(self, copy: int) -> tuple[Move, ...]:
        """How a copy departs from the design."""
        config = self.plan.config
        drawn = perturb.draw(self.lens.geo.surfaces, config.tolerances, config.seed, copy) if config.copies else ()
        return (*config.perturb, *drawn)

    def _engine(self, copy: int) -> Engine:
        engine: Engine = engine_class(self.plan.config.engine)(self.lens.as_built(self.moves(copy)), self.plan)
        return engine
