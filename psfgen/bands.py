"""How a block is cut, so that it fits into memory and yet nothing is traced twice that a mirror gives.

A block is rendered in groups of bands: a band is the field rows of one chunk of `psf`. Bands that mirror each other
are taken together. No number depends on the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from psfgen.config import RenderConfig
from psfgen.errors import ConfigError
from psfgen.store.schema import StoreSpec

MIB = 2**20
ARRAYS_SHARE = 0.45  # of the memory goes to kernels that wait to be written,
WRITING_SHARE = 0.25  # to the chunks that are being compressed,
TRACING_SHARE = 0.25  # and to the threads that trace
CHUNK_COPIES = 3  # of a chunk while it is written
SMALL_NUMBERS = 10  # kept of every kernel of a block until its end


@dataclass(frozen=True)
class Cut:
    """The groups of a block, each of some focus distances and some bands, and how many threads may run."""

    focuses: tuple[slice, ...]
    bands: tuple[tuple[int, ...], ...]
    tracing: int
    writing: int


def cut(config: RenderConfig, spec: StoreSpec, *, batch_bytes: int, cores: int, share: int = 1) -> Cut:
    """Cut a block for `cores` cores and 1 / `share` of the memory that the config allows.

    `batch_bytes` is what one thread needs. Raises ConfigError where not even one chunk fits.
    """
    memory = config.memory_mib * MIB / share
    sizes = {dim: len(values) for dim, values in spec.coords.items()}
    row = 4 * sizes["field_x"] * sizes["wavelength"]  # bytes of one number for each kernel of a field row
    small = SMALL_NUMBERS * sizes["focus"] * sizes["field_y"] * row
    chunk = spec.band_rows * row * config.kernel_px**2
    binned = spec.band_rows * row * config.bins**2 * sizes["focus"]
    arrays = int(memory * ARRAYS_SHARE - small)
    needs = (
        (chunk + binned + small) / ARRAYS_SHARE,
        CHUNK_COPIES * chunk / WRITING_SHARE,
        batch_bytes / TRACING_SHARE,
    )
    if max(needs) > memory:
        least = max(needs) * share / MIB
        raise ConfigError(
            f"memory_mib {config.memory_mib} is too little: {sizes['field_x']} x {sizes['field_y']} kernels of "
            f"{config.kernel_px} x {config.kernel_px} samples need {least:.0f}; "
            f"--set memory_mib={least + 1:.0f}, or fewer workers"
        )
    focuses = min(sizes["focus"], (arrays - binned) // chunk)
    together = max(1, arrays // (focuses * chunk + binned))
    together -= together % 2 if together > 1 else 0  # else a group would part two bands that mirror each other
    count = sizes["field_y"] // spec.band_rows
    order = sorted(range(count), key=lambda band: (min(band, count - 1 - band), band))
    return Cut(
        tuple(slice(at, min(at + focuses, sizes["focus"])) for at in range(0, sizes["focus"], focuses)),
        tuple(tuple(order[at : at + together]) for at in range(0, count, together)),
        min(cores, int(memory * TRACING_SHARE // batch_bytes)),
        min(cores, int(memory * WRITING_SHARE // (CHUNK_COPIES * chunk))),
    )
