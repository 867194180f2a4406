"""Whether a store's kernels are those that its plan gives: a sample of them, rendered again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from psfgen.block import Block, versions
from psfgen.errors import PlanMismatch, StoreError
from psfgen.render import load_again
from psfgen.specimens import Specimens
from psfgen.store import Store

WITHIN_NOISE = 2.0  # two renders by other versions may differ by the noise of both


def differences(
    store: Store, *, sample: int = 64, seed: int = 0, on_point: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, str]]:
    """(block, what is wrong) for each of `sample` random field points whose kernels come out otherwise.

    All focus distances and wavelengths of a point are compared: bit by bit where the versions are those of the
    block, else within its noise. `on_point(count)` is called as points are done. Raises StoreError where the store
    cannot be rendered again.
    """
    specimens = _specimens_of(store)
    done = store.ledger.done()
    blocks = [index for index, name in enumerate(store.blocks) if name in done]
    points = len(store.coords["field_y"]) * len(store.coords["field_x"])
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(blocks) * points, min(sample, len(blocks) * points), replace=False))
    for number in np.unique(chosen // points):
        at = chosen[chosen // points == number] % points
        yield from _compare(store, specimens, blocks[number], at)
        on_point(len(at))


def _compare(store: Store, specimens: Specimens, index: int, at: NDArray[np.int64]) -> Iterator[tuple[str, str]]:
    plan, place, name = specimens.plan, store.spec.block_at(index), store.blocks[index]
    block = Block(specimens.engine(place.get("copy", 0)), plan, index)
    focuses, waves = len(store.coords["focus"]), len(store.coords["wavelength"])
    psf, binned = (
        np.empty((focuses, len(at), waves, side, side), np.float32)
        for side in (plan.config.kernel_px, plan.config.bins)
    )
    for _ in block.trace(map, 1, at, slice(0, focuses), psf, binned):
        pass
    same = store.ledger.read(name)["versions"] == versions()
    for i, (row, column) in enumerate(zip(*np.divmod(at, len(store.coords["field_x"])), strict=True)):
        here: dict[str, int | slice] = {**place, "field_y": int(row), "field_x": int(column)}
        for what, noise, found in (("psf", "noise", psf[:, i]), ("psf_binned", "noise_binned", binned[:, i])):
            stored = store.read(what, **here)
            allowed = 0.0 if same else WITHIN_NOISE * store.read(noise, **here)
            error = np.linalg.norm(stored - found, axis=(-2, -1)) / np.linalg.norm(found, axis=(-2, -1))
            dark = np.isnan(stored).all(axis=(-2, -1)) & np.isnan(found).all(axis=(-2, -1))
            if not (dark | (error <= allowed)).all():
                field = f"({store.coords['field_x'][column]:.3f}, {store.coords['field_y'][row]:.3f})"
                worst = f"by up to {np.nanmax(error):.2g}" if np.isfinite(error).any() else "in where light arrives"
                yield name, f"block {name}: {what} at field {field} differs {worst} from what its plan gives"


def _specimens_of(store: Store) -> Specimens:
    """The lens and the plan of a store, from nothing but the store."""
    lens, plan = load_again(store, store.attrs["device"])
    try:
        plan.require_same(store.attrs, store.path)
    except PlanMismatch as error:
        reason = str(error).partition(": ")[2].partition(";")[0] or str(error)
        raise StoreError(f"{store.path} cannot be rendered again by this psfgen: {reason}") from None
    return Specimens(lens, plan)
