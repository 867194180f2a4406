"""psftrain: learns from a PSF store a conditional VAE that gives the PSF anywhere, at once.

import psftrain

kernels = psftrain.load("runs/fit").psf(field=[0.3, -0.2], depth_mm=2000, focus_mm=2000)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psftrain.predict import PsfModel
    from psftrain.table import Table


def load(run: str | Path, device: str = "cpu") -> PsfModel:
    """The best model of a run, or of a folder that `psftrain export` wrote, to be asked for kernels on `device`.

    `device` is as in a config: cpu, cuda, cuda:1 or auto. Raises RunMismatch where there is no model, ConfigError for
    a device that is not here.
    """
    from psftrain.ddp import resolve_device  # these bring torch, which takes seconds
    from psftrain.predict import PsfModel
    from psftrain.run import load_run

    return PsfModel(load_run(Path(run)), resolve_device(device))


def open_table(path: str | Path) -> Table:
    """A table that `psftrain bake` wrote, decoded into memory, to be asked for kernels as a model is.

    Raises StoreError where there is no store, ConfigError where it is no table, StoreCorrupt on a checksum mismatch.
    """
    from psfgen.store import open_store  # this brings zarr
    from psftrain.table import Table  # and this numba

    return Table(open_store(path))
