"""Whether a model beats interpolation, on points neither has seen.

Legend: n scored points, M held-out examples, W wavelengths, y x bins.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psfgen.errors import RunMismatch
from psfgen.store import Store
from psfgen.store.schema import plain
from psftrain import bootstrap, calibration, heldout, metrics
from psftrain.baselines import best_classical
from psftrain.config import FitConfig
from psftrain.data import Examples, read_examples, withhold
from psftrain.losses import ACTIVE_NATS, kl_per_dim
from psftrain.models.solved import SolvedCVAE
from psftrain.origin import adapted_to, stores_of
from psftrain.regression import regress
from psftrain.rows import Predict, classical_rows, kept_distances, model_rows, predict_all, regression_row
from psftrain.run import Trained
from psftrain.tracing import Traced, trace

log = logging.getLogger(__name__)
Array = NDArray[np.float64]
SCORES = ("rel_l2", "centroid_px", "rms_radius", "ee50", "ee80", "mtf")
MOST_MLP_STEPS = 10_000  # half a minute; a plain network has long stopped learning
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
    errors: dict[str, Array]  # rel_l2 [n], of the row trace of fewer points


def evaluate(
    trained: Trained, held_out: str | None, *, baselines: bool = True, mlp_steps: int | None = None
) -> Evaluation:
    """Score a model and what it is measured against on the points of `held_out`, or on the training points.

    Every row is scored on the same points: those with light that every row can answer. `mlp_steps`: steps that the
    row mlp is trained for; default: those of the run, at most MOST_MLP_STEPS. Raises RunMismatch where the store
    does not fit the run.
    """
    task = _Task.of(trained, held_out)
    rows, left_out = _rows(trained, task, baselines, mlp_steps)
    scores = _score(trained, task, rows)
    why_untraced = _add_trace(task, scores, baselines)
    left_out |= {"trace": why_untraced} if why_untraced else {}
    report = _document(trained, task, scores) | {"left_out": left_out, "rows": scores.table}
    expected = _expected(trained, task, scores)
    if expected is not None:
        scores.errors["expected"] = expected
        report["calibration"] = calibration.judge(expected, scores.errors["prior_mean"], scores.errors["noise_floor"])
    report["no_baselines"] = _why_no_baselines(task.train_stores) if baselines else None
    shown = _spread(scores.errors["prior_mean"])
    where = np.flatnonzero(scores.scored)
    field = task.held.condition[torch.from_numpy(where), :2].numpy() * trained.conditioning.field_max
    pictures = {name: kernels[shown] for name, kernels in scores.kernels.items()}
    distances_mm = task.distances_mm(where)
    return Evaluation(report, scores.truth, field.astype(np.float64), distances_mm, pictures, shown, scores.errors)


@dataclass(frozen=True)
class _Task:
    """What a run was trained on, what it is scored on (`path`: None for the same), whether it has not seen that."""

    path: str | None
    train_stores: list[Store]
    everything: Examples
    train: Examples
    held: Examples
    held_stores: list[Store]
    unseen: bool

    @classmethod
    def of(cls, trained: Trained, held_out: str | None) -> _Task:
        """Read both. Raises RunMismatch where they do not fit the run."""
        array = trained.config.data.array
        train_stores = stores_of(trained)
        everything = read_examples(train_stores, trained.conditioning, array)
        train = everything.of(withhold(everything.places, trained.config.data, trained.config.seed)[0])
        if held_out is None:
            return cls(None, train_stores, everything, train, train, train_stores, unseen=False)
        held, held_stores = heldout.read_heldout(trained, held_out)
        unseen = not heldout.all_trained_on(train_stores, held_stores)
        if unseen and heldout.chose_the_best(trained, held_stores[0]):
            log.warning(
                "%s is the validation store that the best checkpoint was chosen by, which flatters the model; judge it "
                "by another",
                held_out,
            )
        if unseen and heldout.of_another_specimen(train_stores, held_stores[0]):
            log.warning("%s is of another specimen of the lens than was trained on", held_out)
        return cls(held_out, train_stores, everything, train, held, held_stores, unseen)

    def distances_mm(self, where: NDArray[np.int64]) -> Array:
        """Depth and focus distance [n, 2] of held-out examples."""
        return np.array(
            [
                (self.held_stores[store].coords["depth"][depth], self.held_stores[store].coords["focus"][focus])
                for store, _, focus, depth in self.held.index[where, :4]
            ]
        )


def _mlp_steps(trained: Trained) -> int:
    """As many as the model was trained for; a model that was solved says nothing of that."""
    solved = isinstance(trained.model, SolvedCVAE)
    return FitConfig().steps if solved else min(trained.config.steps, MOST_MLP_STEPS)


def _rows(
    trained: Trained, task: _Task, baselines: bool, mlp_steps: int | None
) -> tuple[dict[str, Predict], dict[str, str]]:
    """Every row that answers for all points, and why others are left out."""
    rows, left_out = dict[str, Predict](), dict[str, str]()
    without = _why_no_baselines(task.train_stores)
    steps = _mlp_steps(trained) if mlp_steps is None else mlp_steps
    if baselines and without is None:
        store = task.train_stores[0]
        rows |= classical_rows(store, task.train, kept_distances(store, task.everything, task.train), task.held_stores)
    if not baselines or without is not None:
        left_out["mlp"] = without or "no baselines are asked for"
    elif not task.unseen:
        left_out["mlp"] = "the points scored are those trained on"
    elif not steps:
        left_out["mlp"] = "the run took no steps"
    else:
        parameters = sum(values.numel() for values in trained.model.state_dict().values())
        network = regress(
            task.train, trained.conditioning.grid, parameters=parameters, steps=steps, seed=trained.config.seed
        )
        rows["mlp"] = regression_row(network)
    return {**rows, **model_rows(trained)}, left_out


@dataclass(frozen=True)
class _Scores:
    """What came out: `scored` [M] of the held-out examples, and for those the truth and every row's answer."""

    scored: NDArray[np.bool_]
    truth: Array  # [n, W, y, x]
    sample_px: float
    kernels: dict[str, Array]
    errors: dict[str, Array]
    replicas: dict[str, bootstrap.Replicates]
    table: dict[str, Any]


def _score(trained: Trained, task: _Task, rows: dict[str, Predict]) -> _Scores:
    """Ask every row for every point. Raises RunMismatch where there is no point that all can answer."""
    slices = [numbers[numbers >= 0].numpy() for numbers in task.held.slices]
    predictions, ms_per_psf = predict_all(rows, task.held, [numbers for numbers in slices if len(numbers)])
    scored = np.all([np.isfinite(found[:, :, 0, 0]).all(axis=1) for found in predictions.values()], axis=0)
    if task.unseen:  # points that a held-out store shares with a training store would flatter every row
        scored &= ~heldout.trained_on(task.train_stores, task.held_stores, task.held)
    if not scored.any():
        raise RunMismatch("no held-out point can be answered by every row; render points inside the training grid")
    truth = task.held.kernels.numpy().astype(np.float64)[scored]
    kernels = {name: found[scored] for name, found in predictions.items()}
    errors = {name: metrics.rel_l2(found, truth) for name, found in kernels.items()}
    errors["noise_floor"] = task.held.noise.numpy()[scored].astype(np.float64)
    sample_px = trained.fingerprint["kernel_px"] / truth.shape[-1]
    table = {name: _row(found, truth, sample_px, ms_per_psf[name]) for name, found in kernels.items()}
    table["noise_floor"] = {
        **dict.fromkeys((*SCORES, "ms_per_psf")),
        "rel_l2": metrics.summarise_errors(errors["noise_floor"]),
    }
    replicas = bootstrap.replicates(errors)
    for name, row in table.items():
        row["rel_l2"] |= replicas[name].intervals()
    return _Scores(scored, truth, sample_px, kernels, errors, replicas, table)


def _row(kernels: Array, truth: Array, sample_px: float, ms_per_psf: float) -> dict[str, Any]:
    return {**metrics.summarise(metrics.compare(kernels, truth, sample_px)), "ms_per_psf": ms_per_psf}


def _expected(trained: Trained, task: _Task, scores: _Scores) -> Array | None:
    """The errors [n] that the model expects of itself, the noise of the truth added; None where it says nothing."""
    with torch.no_grad():
        found = trained.model.expected_error(task.held.condition[torch.from_numpy(scores.scored)])
    if found is None or not found.isfinite().any():
        return None
    return np.asarray(np.hypot(found.double().numpy(), scores.errors["noise_floor"]))


def _add_trace(task: _Task, scores: _Scores, baselines: bool) -> str | None:
    """Add the row trace, of some of the points; returns why it is left out where it is."""
    if not baselines:
        return "no baselines are asked for"
    if not task.unseen:
        return "the points scored are those trained on"
    found = trace(task.held_stores[0], task.held, scores.scored, scores.errors["prior_mean"])
    if not isinstance(found, Traced):
        return found
    at = np.searchsorted(np.flatnonzero(scores.scored), found.at)
    truth, ours = scores.truth[at], scores.errors["prior_mean"][at]
    errors = metrics.rel_l2(found.kernels, truth)
    row = _row(found.kernels, truth, scores.sample_px, found.ms_per_psf)
    row["rel_l2"] |= bootstrap.replicates({"trace": errors})["trace"].intervals()
    scores.errors["trace"] = errors
    scores.table["trace"] = {**row, "spp": found.spp, "n": len(errors), "prior_mean_there": ours.mean()}
    return None


def _document(trained: Trained, task: _Task, scores: _Scores) -> dict[str, Any]:
    """The report but for its rows."""
    table, errors, replicas = scores.table, scores.errors, scores.replicas
    best = best_classical({name: _mean(table, name) for name in table})
    ratio = None
    if best is not None and _mean(table, best) > 0:
        ratio = bootstrap.ratio(errors["prior_mean"], errors[best], (replicas["prior_mean"], replicas[best]))
    kl = _posterior_kl(trained, task.train)
    paths = [str(store.path) for store in task.train_stores]
    return {
        "schema": SCHEMA,
        "run": str(trained.path),
        "train_store": paths[0] if len(paths) == 1 else paths,
        "heldout_store": task.path,
        "adapted": adapted_to(trained) is not None,
        "held_out": task.unseen,
        "n": len(scores.truth),
        "n_masked": task.held.masked + int((~scores.scored).sum()),
        "best_classical": best,
        "beats_best_classical": None if best is None else bool(_mean(table, "prior_mean") < _mean(table, best)),
        "ratio": ratio,
        "model": trained.config.model.name,
        "step": trained.step,
        "kl_nats": float(kl.sum()),
        "active_dims": int((kl > ACTIVE_NATS).sum()),
        "latent_dims": trained.model.latent,
        "loss": plain(trained.config.loss.model_dump()),
    }


def _mean(table: dict[str, Any], name: str) -> float:
    return float(table[name]["rel_l2"]["mean"])


def _why_no_baselines(stores: list[Store]) -> str | None:
    """Why interpolation over the field has no single set of nodes, or None."""
    if len(stores) > 1:
        return "they take one training store"
    copies = len(stores[0].coords.get("copy", [0]))
    return f"they take one specimen, the training store holds {copies} copies" if copies > 1 else None


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
