"""From a handful of kernels of one copy of a lens to the field of that copy: `psftrain adapt`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psfgen.errors import ConfigError, RunMismatch
from psfgen.store import open_store
from psfgen.store.schema import plain
from psftrain import checkpoint
from psftrain import run as runs
from psftrain.conditioning import conditioning_document
from psftrain.data import COPY, Examples, fingerprint, open_stores, read_examples, require_same
from psftrain.landing import landing
from psftrain.models.field import FieldCVAE
from psftrain.models.rays import relative
from psftrain.run import Trained

log = logging.getLogger(__name__)

STRANGE = 3  # times the misfit of the training copies
FARTHEST = 5  # standard deviations
SIDE = 9  # field points a side at which the expected error of the whole field is taken


@dataclass(frozen=True)
class Adapted:
    """The run that holds the copy, from how many `kernels`; mean relative L2 errors at these, of the mean copy and of
    this one, and what is expected over the whole field, before and after.
    """

    run: Path
    kernels: int
    error_before: float
    error: float
    expected_before: float
    expected: float


def adapt(trained: Trained, store: str, copy: int | None, out: Path) -> Adapted:
    """Infer the latents of the copy whose kernels a store holds, and write the model of that copy as a run.

    The run appears whole or not at all. A copy that is none of the family is warned of.

    Raises RunMismatch where the run knows no copies, the store is of another lens or sampling, or `out` exists;
    ConfigError where the store holds several copies and none is named.
    """
    model = trained.model
    if not isinstance(model, FieldCVAE) or not model.latent:
        raise RunMismatch(
            f"run {trained.path} knows one lens, of which there is nothing to infer; train model field_cvae on a store "
            "with copies (psfgen render --copies 24 --tolerances FILE)"
        )
    if out.exists() and not out.is_dir():
        raise RunMismatch(f"--out {out} is no folder; choose another --out")
    if out.exists() and any(out.iterdir()):
        raise RunMismatch(f"--out {out} is not empty; choose another --out")
    measured, field = _measured(trained, store, copy), _field(trained)
    with torch.no_grad():
        error_before, expected_before = _error(model, measured), _expected(model, field)
        known = model.adapt([open_store(store)], measured.places)
        _warn_of_a_stranger(trained, model, store, float(np.abs(known.mean).max()))
        found = Adapted(
            out, len(measured), error_before, _error(model, measured), expected_before, _expected(model, field)
        )
    _write(trained, found, store)
    return found


def _warn_of_a_stranger(trained: Trained, model: FieldCVAE, store: str, farthest: float) -> None:
    """Say so where kernels are met much worse than those of the training copies, or by latents `farthest` from 0."""
    misfit, usual = (values.square().mean().sqrt().item() for values in (model.residual, model.noise))
    if misfit > STRANGE * usual or farthest > FARTHEST:
        log.warning(
            "%s is of no such copy as %s was trained on: its kernels are met to %.2g %% RMS, theirs to %.2g %%, "
            "and a latent is %.1f standard deviations from the mean; train on more copies, or of larger tolerances",
            store,
            trained.path,
            100 * misfit,
            100 * usual,
            farthest,
        )


def _measured(trained: Trained, path: str, copy: int | None) -> Examples:
    """The kernels of one copy in a store."""
    array = trained.config.data.array
    stores, what = open_stores([path], array), f"store {path}"
    require_same(trained.fingerprint, fingerprint(stores, array), what)
    coords = stores[0].coords
    trained.conditioning.require(coords["depth_dioptre"], coords["focus_dioptre"], what)
    count = len(coords.get("copy", [0]))
    if copy is None and count > 1:
        raise ConfigError(f"{what} holds {count} copies; say which with --copy 0 to {count - 1}")
    if copy is not None and not 0 <= copy < count:
        raise ConfigError(f"--copy {copy}: {what} holds {count}, counted from 0")
    examples = read_examples(stores, trained.conditioning, array)
    chosen = examples.index[:, COPY] == (copy or 0)
    return examples.of(examples.places.select(chosen))


def _field(trained: Trained) -> torch.Tensor:
    """Conditions over the whole field, in the middle of the depths and focus distances."""
    at = torch.linspace(-1, 1, SIDE)
    return torch.nn.functional.pad(torch.cartesian_prod(at, at), (0, 2))


def _error(model: FieldCVAE, measured: Examples) -> float:
    found = model.decode(model.prior(measured.condition).mean, measured.condition)
    return float(relative(found, measured.kernels).nanmean())


def _expected(model: FieldCVAE, condition: torch.Tensor) -> float:
    expected = model.expected_error(condition)
    assert expected is not None
    return float(expected.nanmean())


def _write(trained: Trained, found: Adapted, store: str) -> None:
    config = trained.config.model_copy(update={"run": str(found.run)})
    identity: dict[str, Any] = {
        "fingerprint": trained.fingerprint,
        "conditioning": conditioning_document(trained.conditioning),
        "plan_sha256": [str(open_store(store).attrs["plan_sha256"])],
    }
    about = {
        "adapted_from": str(trained.path),
        "adapted_to": store,
        "kernels": found.kernels,
        "trained_on": trained.plans,
    }
    with landing(found.run) as folder:
        runs.prepare(folder, config, identity, about)
        state = {"model": trained.model.state_dict(), "ema": None, "step": trained.step, "ended": True}
        document = {**state, **identity, **about, "config": plain(config.model_dump())}
        checkpoint.save(folder / "checkpoints" / "best.pt", document)
        runs.finish(folder, trained.step)
