"""How far a table is from its model, and from the truth.

Legend: W wavelengths, y x the bins of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psfgen.errors import FitError
from psfgen.store import Store
from psftrain.data import COLUMN, DEPTH, FOCUS, ROW, fingerprint, open_stores, read_examples, require_same
from psftrain.metrics import rel_l2
from psftrain.places import Array, Domain
from psftrain.predict import PsfModel
from psftrain.table import Lattice, Table, blend

PLACES = 1024  # random ones, at which table and model are compared
AT_ONCE = 64 * 2**20  # bytes of kernels that this takes at a time
LARGE = 0.03  # mean error of baking, above which a finer table is advised
TRUTHS = 512  # held-out kernels compared at a time
Coords = dict[str, Array]


@dataclass(frozen=True)
class Nodes:
    """A model at the nodes of a table; no kernels where it is `dark` [focus, depth, y, x, W]."""

    model: PsfModel
    coords: Coords
    dark: NDArray[np.bool_]

    def kernels(self, focus: Any, depth: Any, row: Any, column: Any) -> NDArray[np.float32]:
        """Kernels [..., W, y, x] of the nodes of these numbers, which broadcast."""
        focus, depth, row, column = np.broadcast_arrays(focus, depth, row, column)
        field = np.stack([self.coords["field_x"][column], self.coords["field_y"][row]], axis=-1)
        found = kernels_of(self.model, field, self.coords["depth"][depth], self.coords["focus"][focus])
        found[self.dark[focus, depth, row, column]] = np.nan
        return found


def kernels_of(model: PsfModel, field: Array, depth_mm: Array, focus_mm: Array) -> NDArray[np.float32]:
    """A model's kernels, NaN where they are dark. Raises FitError where it gives no numbers."""
    found = model.psf(field, depth_mm, focus_mm)
    if not np.isfinite(found[~np.isnan(found).all(axis=(-2, -1))]).all():
        raise _no_numbers(model)
    return found


def _no_numbers(model: PsfModel) -> FitError:
    return FitError(f"the model of {model.trained.path} gives no numbers; nothing was written")


def baking_error(nodes: Nodes, bar: Any) -> dict[str, Any]:
    """Relative L2 between table and model at random places all over the table: how many, mean and p95.

    "field" is that at the table's own distances, where the field alone is interpolated. Places between nodes without
    light are left out. Raises FitError where these are all.
    """
    lattice, coords = Lattice(nodes.coords), nodes.coords
    field, depth_mm, focus_mm = random_places(lattice.domain("table"), PLACES)
    errors = at_nodes = _errors(nodes, field, depth_mm, focus_mm, bar)
    if compared(lattice) > PLACES:
        rng = np.random.default_rng(PLACES)
        depth_mm, focus_mm = (rng.choice(coords[name], PLACES) for name in ("depth", "focus"))
        at_nodes = _errors(nodes, field, depth_mm, focus_mm, bar)
    return {"n": len(errors), **_summary(errors), "field": _summary(at_nodes)}


def compared(lattice: Lattice) -> int:
    """At how many places `baking_error` compares: twice as many where there are several distances."""
    focus, depth, *_ = lattice.shape
    return PLACES if focus * depth == 1 else 2 * PLACES


def _errors(nodes: Nodes, field: Array, depth_mm: Array, focus_mm: Array, bar: Any) -> Array:
    """Relative L2 between table and model at the places that have light."""
    lattice, model = Lattice(nodes.coords), nodes.model
    errors, answered = np.empty(len(field)), False
    stack_bytes = 4 * len(model.wavelength_um) * len(model.x_um) ** 2
    for some in parts(len(field), max(1, AT_ONCE // (16 * stack_bytes))):
        truth = kernels_of(model, field[some], depth_mm[some], focus_mm[some])
        answered |= not np.isnan(truth).all()
        index, weight = lattice.corners(field[some], depth_mm[some], focus_mm[some])
        needed, where = np.unique(index, return_inverse=True)
        known = nodes.kernels(*np.unravel_index(needed, lattice.shape))
        found = blend(known.reshape(len(needed), -1), where.reshape(index.shape), weight)
        errors[some] = rel_l2(found.reshape(truth.shape), truth)
        bar.update(len(truth))
    if not answered:
        raise _no_numbers(model)
    errors = errors[np.isfinite(errors)]
    if not errors.size:
        raise FitError("no cell of the table has light at all its corners; give a larger --grid")
    return errors


@dataclass(frozen=True)
class Heldout:
    """The kernels of a held-out store [M, W, y, x], and where they are: field [M, 2], depth and focus [M] in mm."""

    path: str
    kernels: NDArray[np.float32]
    field: Array
    depth_mm: Array
    focus_mm: Array


def heldout(model: PsfModel, path: str) -> Heldout:
    """What a held-out store holds. Raises RunMismatch where it does not fit the run."""
    trained, what = model.trained, f"held-out store {path}"
    array = trained.config.data.array
    stores = open_stores([path], array)
    require_same(trained.fingerprint, fingerprint(stores, array), what)
    held, coords = read_examples(stores, trained.conditioning, array), stores[0].coords
    field = np.stack([coords["field_x"][held.index[:, COLUMN]], coords["field_y"][held.index[:, ROW]]], axis=-1)
    depth_mm, focus_mm = coords["depth"][held.index[:, DEPTH]], coords["focus"][held.index[:, FOCUS]]
    model.domain.places(field, depth_mm, focus_mm)
    return Heldout(path, held.kernels.numpy(), field, depth_mm, focus_mm)


def random_places(domain: Domain, count: int) -> tuple[Array, Array, Array]:
    """Field points [N, 2] and distances [N] in mm all over a domain, always the same."""
    rng = np.random.default_rng(count)
    field = domain.field_max * rng.uniform(-1, 1, (count, 2))
    with np.errstate(divide="ignore"):
        depth, focus = (1000 / rng.uniform(*span, count) for span in (domain.depth_dioptre, domain.focus_dioptre))
    return field, depth, focus


def judge(model: PsfModel, table: Table, held: Heldout) -> dict[str, Any]:
    """Relative L2 errors of a model and of its table against held-out kernels, and their ratios.

    Kernels between nodes without light are left out. Raises RunMismatch where some lie beyond the table, FitError
    where none is left.
    """
    errors = np.empty((2, len(held.kernels)))
    asked = (model.psf, table.psf)
    for some in parts(len(held.kernels), TRUTHS):
        for row, psf in enumerate(asked):
            found = psf(held.field[some], held.depth_mm[some], held.focus_mm[some])
            errors[row, some] = rel_l2(found, held.kernels[some])
    errors = errors[:, np.isfinite(errors).all(axis=0)]
    if not errors.size:
        raise FitError(f"no kernel of {held.path} lies between nodes of {table.path} that have light")
    of_model, of_table = map(_summary, errors)
    ratio = {name: of_table[name] / of_model[name] for name in of_model}
    return {"store": held.path, "n": errors.shape[1], "model": of_model, "table": of_table, "ratio": ratio}


def advice(store: Store) -> str | None:
    """The options that would lessen a large error of baking."""
    error, lattice = store.attrs["bake"]["error"], Lattice(store.coords)
    (focus, depth, _, columns), domain = lattice.shape, lattice.domain("table")
    if error["mean"] <= LARGE:
        return None
    finer = f"--grid {2 * columns - 1}"
    if error["field"]["mean"] < error["mean"] / 2:
        spans = (("--depth", domain.depth_mm, depth), ("--focus", domain.focus_mm, focus))
        finer = " ".join(f"{o} {near:.10g}:{far:.10g}:{2 * n - 1}" for o, (near, far), n in spans if n > 1)
    return f"more than {LARGE:.0%}: a finer table ({finer}) would follow the model more closely"


def as_text(store: Store, judged: dict[str, Any] | None) -> str:
    """What `psftrain bake` says of a table."""
    nodes, error = " x ".join(map(str, Lattice(store.coords).shape)), store.attrs["bake"]["error"]
    lines = [
        f"{store.path}: {nodes} nodes (focus, depth, y, x); psftrain.open_table reads it",
        f"error of baking (relative L2, table against model, {error['n']} random places): mean {error['mean']:.2%}, "
        f"p95 {error['p95']:.2%}; at the table's own distances {error['field']['mean']:.2%}, "
        f"{error['field']['p95']:.2%}",
        *filter(None, [advice(store)]),
    ]
    if judged is not None:
        scores = ", ".join(
            f"{name} {judged[name]['mean']:.2%} (p95 {judged[name]['p95']:.2%})" for name in ("model", "table")
        )
        lines.append(
            f"error on {judged['n']} kernels of {judged['store']}: {scores}; table / model "
            f"{judged['ratio']['mean']:.3f} in the mean, p95 {judged['ratio']['p95']:.3f}"
        )
    return "\n".join(lines)


def _summary(errors: Array) -> dict[str, float]:
    return {"mean": float(errors.mean()), "p95": float(np.quantile(errors, 0.95))}


def parts(count: int, size: int) -> list[slice]:
    """So many things in slices of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
