"""Whether a model beats interpolation, on points neither has seen.

Legend: Q points of one held-out slice (store, copy, depth, focus), W wavelengths, y x bins.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen.config import RenderConfig
from psfgen.errors import PsfError, RunMismatch, progress
from psfgen.store import Store, open_store
from psfgen.store.schema import plain
from psftrain import metrics
from psftrain.baselines import CLASSICAL, Nodes, Query, brackets, nothing
from psftrain.data import (
    COLUMN,
    DEPTH,
    FOCUS,
    ROW,
    STORE,
    Examples,
    fingerprint,
    open_stores,
    read_examples,
    require_same,
    withhold,
)
from psftrain.losses import ACTIVE_NATS, kl_per_dim
from psftrain.run import Trained

log = logging.getLogger(__name__)
Array = NDArray[np.float64]
Distances = dict[str, NDArray[np.int64]]
Predict = Callable[[Examples, NDArray[np.int64]], Array]
MODEL_ROWS = ("prior_mean", "prior_sample", "posterior")
SCORES = ("rel_l2", "centroid_px", "rms_radius", "ee50", "ee80", "mtf")
SCHEMA = 1


@dataclass(frozen=True)
class Evaluation:
    """A report, and what its pictures show: the scored examples and every row's kernels and errors."""

    report: dict[str, Any]
    truth: Array  # [n, W, y, x]
    field_xy: Array  # [n, 2]
    distances_mm: Array  # [n, 2] depth, focus
    kernels: dict[str, Array]  # of the points in `shown` [s, W, y, x]
    shown: NDArray[np.int64]
    errors: dict[str, Array]  # rel_l2 [n]


def evaluate(trained: Trained, heldout: str | None, *, baselines: bool = True) -> Evaluation:
    """Score a model and the classical interpolations on the points of `heldout`, or on the training points.

    Every row is scored on the same points: those with light that every row can answer. Raises RunMismatch
    where the store does not fit the run.
    """
    array = trained.config.data.array
    train_stores = open_stores(trained.config.store, array)
    for store in train_stores:
        require_same(trained.fingerprint, fingerprint([store], array), f"training store {store.path}")
    everything = read_examples(train_stores, trained.conditioning, array)
    train = everything.of(withhold(everything.places, trained.config.data, trained.config.seed)[0])
    held, held_stores = (train, train_stores) if heldout is None else _held(trained, heldout)
    unseen = heldout is not None and not _all_trained_on(train_stores, held_stores)
    if unseen and _chose_the_best(trained, held_stores[0]):
        log.warning(
            "%s is the validation store that the best checkpoint was chosen by, which flatters the model; judge it by "
            "another",
            heldout,
        )

    rows: dict[str, Predict] = {}
    without = _why_no_baselines(train_stores) if baselines else None
    if baselines and without is None:
        rows |= _classical_rows(train_stores[0], train, _kept(train_stores[0], everything, train), held_stores)
    rows |= _model_rows(trained)

    slices = [numbers[numbers >= 0].numpy() for numbers in held.slices]
    predictions, ms_per_psf = _predict(rows, held, [numbers for numbers in slices if len(numbers)])
    scored = np.all([np.isfinite(found[:, 0, 0, 0]) for found in predictions.values()], axis=0)
    if unseen:  # points that a held-out store shares with a training store would flatter every row
        scored &= ~_trained_on(train_stores, held_stores, held)
    if not scored.any():
        raise RunMismatch("no held-out point can be answered by every row; render points inside the training grid")
    truth = held.kernels.numpy().astype(np.float64)[scored]
    sample_px = trained.fingerprint["kernel_px"] / truth.shape[-1]
    errors, table = {}, {}
    for name, found in predictions.items():
        values = metrics.compare(found[scored], truth, sample_px)
        errors[name] = values["rel_l2"]
        table[name] = {**metrics.summarise(values), "ms_per_psf": ms_per_psf[name]}
    noise = held.noise.numpy()[scored].astype(np.float64)
    nothing: dict[str, Any] = dict.fromkeys((*SCORES, "ms_per_psf"))
    floor = {"mean": noise.mean(), "median": np.median(noise), "p95": np.quantile(noise, 0.95)}
    table["noise_floor"] = {**nothing, "rel_l2": floor}

    best = min((name for name in CLASSICAL if name in table), key=lambda name: _mean(table, name), default=None)
    kl = _posterior_kl(trained, train)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "run": str(trained.path),
        "train_store": [str(store.path) for store in train_stores],
        "heldout_store": heldout,
        "held_out": unseen,
        "n": int(scored.sum()),
        "n_masked": held.masked + int((~scored).sum()),
        "no_baselines": without,
        "best_classical": best,
        "beats_best_classical": None if best is None else bool(_mean(table, "prior_mean") < _mean(table, best)),
        "model": trained.config.model.name,
        "step": trained.step,
        "kl_nats": float(kl.sum()),
        "active_dims": int((kl > ACTIVE_NATS).sum()),
        "latent_dims": trained.model.latent,
        "loss": plain(trained.config.loss.model_dump()),
        "rows": table,
    }
    if len(report["train_store"]) == 1:
        report["train_store"] = report["train_store"][0]
    shown = _spread(errors["prior_mean"])
    where = np.flatnonzero(scored)
    field = held.condition[torch.from_numpy(where), :2].numpy() * trained.conditioning.field_max
    pictures = {name: found[scored][shown] for name, found in predictions.items()}
    distances = np.array(
        [
            (held_stores[store].coords["depth"][depth], held_stores[store].coords["focus"][focus])
            for store, _, focus, depth in held.index[where, :4]
        ]
    )
    return Evaluation(report, truth, field.astype(np.float64), distances, pictures, shown, errors)


def _why_no_baselines(stores: list[Store]) -> str | None:
    """Why interpolation over the field has no single set of nodes, or None."""
    if len(stores) > 1:
        return "they take one training store"
    copies = len(stores[0].coords.get("copy", [0]))
    return f"they take one specimen, the training store holds {copies} copies" if copies > 1 else None


def _mean(table: dict[str, Any], name: str) -> float:
    return float(table[name]["rel_l2"]["mean"])


def _held(trained: Trained, path: str) -> tuple[Examples, list[Store]]:
    array = trained.config.data.array
    stores = open_stores([path], array)
    what = f"held-out store {path}"
    require_same(trained.fingerprint, fingerprint(stores, array), what)
    coords = stores[0].coords
    trained.conditioning.require(coords["depth_dioptre"], coords["focus_dioptre"], what)
    reach = max(np.abs(coords["field_x"]).max(), np.abs(coords["field_y"]).max())
    if reach > trained.conditioning.field_max * (1 + 1e-9):
        raise RunMismatch(
            f"{what}: its field reaches {reach:.4g}, the run was trained up to {trained.conditioning.field_max:.4g}; "
            f"render it with --field-max {trained.conditioning.field_max:.4g}"
        )
    return read_examples(stores, trained.conditioning, array), stores


def _all_trained_on(train_stores: list[Store], held_stores: list[Store]) -> bool:
    """Whether every held-out place, lit or not, is a place of one of the training stores."""
    axes = ("field_x", "field_y", "depth", "focus")
    return all(
        any(
            all(np.isin(held.coords[axis], train.coords[axis]).all() for axis in axes)
            for train in _of_the_same_specimens(train_stores, held)
        )
        for held in held_stores
    )


def _of_the_same_specimens(train_stores: list[Store], held: Store) -> list[Store]:
    """The training stores of the lens, and of the very copies of it, that a held-out store is of."""

    def specimens(store: Store) -> tuple[Any, ...]:
        return fingerprint([store], "psf")["lenses"], store.attrs.get("as_built")

    return [train for train in train_stores if specimens(train) == specimens(held)]


def _chose_the_best(trained: Trained, held: Store) -> bool:
    if trained.config.val is None:
        return False
    try:
        return bool(open_store(trained.config.val).attrs["plan_sha256"] == held.attrs["plan_sha256"])
    except PsfError:  # it is not there any more
        return False


def _trained_on(train_stores: list[Store], held_stores: list[Store], held: Examples) -> NDArray[np.bool_]:
    """Which held-out examples [M] are of a place of a training store."""
    columns = (("field_x", COLUMN), ("field_y", ROW), ("depth", DEPTH), ("focus", FOCUS))
    found = np.zeros(len(held), dtype=bool)
    for number, store in enumerate(held_stores):
        for train in _of_the_same_specimens(train_stores, store):
            shared = held.index[:, STORE] == number
            for axis, column in columns:
                at = np.flatnonzero(np.isin(store.coords[axis], train.coords[axis]))
                shared &= np.isin(held.index[:, column], at)
            found |= shared
    return found


def _predict(
    rows: dict[str, Predict], held: Examples, slices: list[NDArray[np.int64]]
) -> tuple[dict[str, Array], dict[str, float]]:
    """Every row's kernels for every held-out example [M, W, y, x], and its time for one in ms."""
    predictions = {name: np.full(tuple(held.kernels.shape), np.nan) for name in rows}
    seconds = dict.fromkeys(rows, 0.0)
    bar = progress(len(rows) * len(held), "eval", "psf")
    for name, predict in rows.items():
        for numbers in slices:
            predict(held, numbers[:1])  # sets interpolators up, which is not part of a kernel's time
            started = time.perf_counter()
            predictions[name][numbers] = predict(held, numbers)
            seconds[name] += time.perf_counter() - started
            bar.update(len(numbers))
    bar.close()
    return predictions, {name: 1000 * total / len(held) for name, total in seconds.items()}


def _kept(store: Store, everything: Examples, train: Examples) -> Distances:
    """The depths and focus distances of a store that were not withheld whole, as indices."""
    found = {}
    for name, column in (("focus", FOCUS), ("depth", DEPTH)):
        withheld = np.setdiff1d(everything.index[:, column], train.index[:, column])
        found[name] = np.setdiff1d(np.arange(len(store.coords[name])), withheld)
    return found


def _classical_rows(store: Store, train: Examples, kept: Distances, held_stores: list[Store]) -> dict[str, Predict]:
    side = min(len(store.coords["field_y"]), len(store.coords["field_x"]))
    return {
        name: _classical(how, store, train, kept, held_stores)
        for name, (how, needed) in CLASSICAL.items()
        if side >= needed
    }


def _classical(
    how: Callable[[Nodes], Query], store: Store, train: Examples, kept: Distances, held_stores: list[Store]
) -> Predict:
    """A classical row over every depth and focus, interpolating between those that were not withheld."""
    shape = tuple(train.kernels.shape[1:])
    focuses = len(store.coords["focus"])
    dioptres = {name: store.coords[f"{name}_dioptre"][at] for name, at in kept.items()}
    queries: dict[int, Query] = {}

    def query(number: int) -> Query:
        if number not in queries:
            numbers = train.slices[number].numpy()
            values = np.full((*numbers.shape, int(np.prod(shape))), np.nan)
            values[numbers >= 0] = train.kernels[torch.from_numpy(numbers[numbers >= 0])].flatten(1).numpy()
            nodes = Nodes(store.coords["field_y"], store.coords["field_x"], values)
            queries[number] = how(nodes) if nodes.span_the_field else nothing(nodes)
        return queries[number]

    def predict(held: Examples, numbers: NDArray[np.int64]) -> Array:
        which, _, focus, depth = held.index[numbers[0], :4]
        coords = held_stores[which].coords
        yx = np.stack([coords["field_y"][held.index[numbers, ROW]], coords["field_x"][held.index[numbers, COLUMN]]], -1)
        total = np.zeros((len(numbers), int(np.prod(shape))))
        for f, of_focus in brackets(dioptres["focus"], coords["focus_dioptre"][focus]):
            for d, of_depth in brackets(dioptres["depth"], coords["depth_dioptre"][depth]):
                slice_ = int(kept["depth"][d] * focuses + kept["focus"][f])
                total += of_focus * of_depth * query(slice_)(yx)
        return total.reshape(len(numbers), *shape)

    return predict


def _model_rows(trained: Trained) -> dict[str, Predict]:
    model = trained.model

    def prior_mean(kernels: Tensor, condition: Tensor) -> Tensor:
        return model.decode(model.prior(condition).mean, condition)

    def prior_sample(kernels: Tensor, condition: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(condition), model.latent, generator=generator)
        return model.decode(model.prior(condition).sample(noise), condition)

    def posterior(kernels: Tensor, condition: Tensor) -> Tensor:
        return model.decode(model.posterior(kernels, condition).mean, condition)

    def row(path: Callable[[Tensor, Tensor], Tensor]) -> Predict:
        def predict(held: Examples, numbers: NDArray[np.int64]) -> Array:
            chosen = torch.from_numpy(numbers)
            with torch.no_grad():
                parts = [path(held.kernels[some], held.condition[some]) for some in torch.split(chosen, 256)]
            return torch.cat(parts).double().numpy()

        return predict

    return {name: row(path) for name, path in zip(MODEL_ROWS, (prior_mean, prior_sample, posterior), strict=True)}


def _posterior_kl(trained: Trained, train: Examples) -> Array:
    """Mean KL of the posterior from the prior by latent dimension [L], in nats, on training points."""
    chosen = torch.linspace(0, len(train) - 1, min(1024, len(train))).round().long()
    condition = train.condition[chosen]
    with torch.no_grad():
        model = trained.model
        kl = kl_per_dim(model.posterior(train.kernels[chosen], condition), model.prior(condition))
    return np.asarray(kl.mean(dim=0).double())


def _spread(error: Array, count: int = 6) -> NDArray[np.int64]:
    """Examples from the best to the worst answered, evenly by rank."""
    order = np.argsort(error, kind="stable")
    return np.asarray(order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)])


def heldout_command(store: Store, run: Path) -> str:
    """The command that renders a held-out store for a training store, and judges a run on it."""
    config = store.attrs["config"]
    defaults = plain(RenderConfig().model_dump())
    keys = (
        "engine",
        "reference_um",
        "lens",
        "grid",
        "depth",
        "focus",
        "wavelength",
        "sensor_mm",
        "fnum",
        "pitch_um",
        "field_max",
        "kernel_px",
        "bins",
    )
    words = [f"--{key.replace('_', '-')} {_word(config[key])}" for key in keys if config.get(key) != defaults[key]]
    options = " ".join(["--layout cells", *words])
    return f"psfgen render {options} --out heldout.zarr && psftrain eval {shlex.quote(str(run))} --store heldout.zarr"


def _word(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    return shlex.quote(",".join(f"{item:.10g}" if isinstance(item, float) else str(item) for item in items))
