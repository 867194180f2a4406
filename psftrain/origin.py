"""The stores that a trained model comes from, which are asked for again where it is judged or baked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from psfgen.errors import RunMismatch, StoreError
from psfgen.store import Store
from psfgen.store.place import is_url
from psftrain.data import fingerprint, open_stores, require_same
from psftrain.run import Trained, read_json


def training_stores(trained: Trained) -> list[Store]:
    """The stores that a run was trained on.

    Raises StoreError where one is not where it was, RunMismatch where another render stands in its place.
    """
    return _opened(trained, trained.config.store, trained.plans)


def stores_of(trained: Trained) -> list[Store]:
    """The stores of the specimens that a run answers for: those trained on, or that of the copy it was adapted to.

    Raises as `training_stores` does.
    """
    adapted = adapted_to(trained)
    if adapted is None:
        return training_stores(trained)
    return _opened(trained, [adapted], read_json(trained.path / "run.json").get("plan_sha256"))


def adapted_to(trained: Trained) -> str | None:
    """The store of the copy that a run was adapted to, if it was."""
    facts = trained.path / "run.json"
    found: str | None = read_json(facts).get("adapted_to") if facts.exists() else None
    return found


def _opened(trained: Trained, paths: Sequence[str], plans: Sequence[str] | None) -> list[Store]:
    for path in paths:
        if not is_url(path) and not Path(path).exists():
            here = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
            raise StoreError(
                f"store {path} does not exist{here}, from which {trained.path} comes; go to where that was trained, or "
                "put the store back"
            )
    array = trained.config.data.array
    stores = open_stores(paths, array)
    for store in stores:
        require_same(trained.fingerprint, fingerprint([store], array), f"training store {store.path}")
    for store, plan in zip(stores, plans or (), strict=False):
        if store.attrs["plan_sha256"] != plan:
            raise RunMismatch(
                f"training store {store.path} is another render than {trained.path} comes from; put that one there, or "
                "fit anew"
            )
    return stores
