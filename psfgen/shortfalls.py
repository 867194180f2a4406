"""What a user should know of a finished store: truncation, noise, diffraction, vignetting; with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from psfgen.config import MOST_RAYS
from psfgen.store import Store

NOISY = 0.3  # what is worth a warning where no tolerance was asked for


def shortfalls(store: Store) -> Iterator[str]:
    """One line for each kind of shortfall."""
    captured, noise = store.read("captured"), store.read("noise")
    dark = captured == 0
    throughput = store.read("throughput")
    focus = store.spec.kernel_dims.index("focus")
    vignetted = np.broadcast_to(np.expand_dims(throughput == 0, focus), dark.shape)
    cut = (captured < 0.9) & ~dark
    if cut.any():
        yield (
            f"{cut.sum()} of {cut.size} kernels keep less than 90 % of their energy in the window "
            f"(least {captured[~dark].min():.1%} at {_where(store, np.where(dark, np.inf, captured).argmin())}); "
            "a larger --pitch-um or --kernel-px keeps more"
        )
    tolerance, spp_max = (store.attrs["config"].get(key) for key in ("tolerance", "spp_max"))
    noisy = noise > (tolerance or NOISY)
    if noisy.any():
        aim = f"the tolerance of {_percent(tolerance)}" if tolerance else _percent(NOISY)
        more = f"a larger spp_max (now {spp_max}) or " if spp_max < MOST_RAYS else ""
        other = "--engine auto or " if store.attrs["engine"] == "wave" else ""
        cure = other + (f"{more}a larger --tolerance" if tolerance else "more rays (--spp) or a --tolerance")
        yield (
            f"{noisy.sum()} of {noisy.size} kernels have an estimated error above {aim} "
            f"(worst {_percent(np.nanmax(noise))} at {_where(store, np.nanargmax(noise))}, "
            f"median {_percent(np.nanmedian(noise))}, binned {_percent(np.nanmedian(store.read('noise_binned')))}); "
            f"{cure} would help"
        )
    yield from _diffraction(store, noise.size)
    if vignetted.any():
        yield f"{vignetted.sum()} of {dark.size} kernels get no light and are NaN; a smaller --field-max avoids them"
    missed = dark & ~vignetted
    if missed.any():
        yield (
            f"{missed.sum()} of {dark.size} kernels miss their window altogether and are NaN (first at "
            f"{_where(store, missed.argmax())}): a larger --pitch-um or --kernel-px, or a --focus nearer to --depth"
        )


def _diffraction(store: Store, total: int) -> Iterator[str]:
    found = [store.ledger.read(block).get("diffraction", {}) for block in store.blocks]
    kernels = sum(entry.get("kernels", 0) for entry in found)
    if kernels:
        worst = max(found, key=lambda entry: entry["airy_um"] / max(entry["rms_um"], 1e-9) if entry["kernels"] else 0)
        yield (
            f"{kernels} of {total} kernels are so sharp that diffraction, which geometry leaves out, would widen them: "
            f"Airy radius {worst['airy_um']:.2g} um beside an RMS radius of {worst['rms_um']:.2g} um and samples of "
            f"{store.attrs['pitch_um']:g} um; --engine wave computes it, a larger --pitch-um hides it"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _where(store: Store, flat: Any) -> str:
    dims = store.spec.kernel_dims
    at = np.unravel_index(int(flat), tuple(len(store.coords[dim]) for dim in dims))
    named = {dim: store.coords[dim][i] for dim, i in zip(dims, at, strict=True)}
    return (f"copy {named['copy']:g}, " if "copy" in named else "") + (
        f"field ({named['field_x']:.2f}, {named['field_y']:.2f}), depth {named['depth']:g} mm, "
        f"focus {named['focus']:g} mm, {named['wavelength']:g} um"
    )
