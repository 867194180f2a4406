"""Looking at a model while it trains: a spread of examples, both paths, the same however many at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fitting import prepared, two_depths
from training import job

from psftrain import validation
from psftrain.conditioning import conditioning_of
from psftrain.data import catalogue, open_stores
from psftrain.ddp import Ranks
from psftrain.feed import Feed
from psftrain.validation import Rows, errors, gallery, validate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_depths(tmp_path_factory.mktemp("validation") / "s.zarr")


def spread(feed: Feed, most: int, dtype: torch.dtype = torch.float32) -> Rows:
    stores = open_stores(feed.config.store, "psf_binned")
    places = catalogue(stores, conditioning_of(stores), "psf_binned")
    return Rows.spread(places, feed.source, most, CPU, dtype)


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 2), (12, 12), (49, 49), (1000, 49)])
def test_a_spread_is_even_and_no_more_than_there_are(store: Path, tmp_path: Path, most: int, count: int) -> None:
    _, feed = prepared(job(store, tmp_path))
    rows = spread(feed, most)
    assert (len(rows.kernels), len(rows.condition)) == (count, count)
    assert len(torch.unique(rows.condition, dim=0)) == count, "none twice"
    assert torch.equal(rows.condition[0], feed.condition[0])
    assert most == 1 or torch.equal(rows.condition[-1], feed.condition[-1])
    depths = rows.condition[:, 2]
    assert most < 12 or 0.4 < float((depths > 0).float().mean()) < 0.6, "of both depths alike"


def test_rows_are_of_the_precision_that_trains(store: Path, tmp_path: Path) -> None:
    rows = spread(prepared(job(store, tmp_path))[1], 5, torch.float64)
    assert (rows.kernels.dtype, rows.condition.dtype) == (torch.float64, torch.float64)


def test_errors_do_not_depend_on_how_many_are_looked_at_together(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, feed = prepared(job(store, tmp_path, precision="float64"))
    rows = spread(feed, 49, torch.float64)
    whole = errors(stepper.model, rows)
    monkeypatch.setattr(validation, "BATCH", 10)
    for name, found in errors(stepper.model, rows).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-10, atol=1e-12)
    means = {name: float(found.mean()) for name, found in whole.items()}
    assert validate(stepper.model, rows, Ranks(0, 1, CPU)) == pytest.approx(means)


def test_shares_of_several_processes_are_all_rows(store: Path, tmp_path: Path) -> None:
    rows = spread(prepared(job(store, tmp_path))[1], 49)
    shares = [rows.every(rank, 3) for rank in range(3)]
    assert [len(share.kernels) for share in shares] == [17, 16, 16]
    found = torch.cat([share.condition for share in shares])
    assert len(torch.unique(found, dim=0)) == 49


def test_a_gallery_shows_truth_posterior_and_prior(store: Path, tmp_path: Path) -> None:
    stepper, feed = prepared(job(store, tmp_path))
    rows = spread(feed, 6)
    truth, posterior, prior = gallery(stepper.model, rows)
    assert torch.equal(truth, rows.kernels)
    off = {
        name: ((found - truth).flatten(1).norm(dim=-1) / truth.flatten(1).norm(dim=-1))
        for name, found in (("posterior", posterior), ("prior", prior))
    }
    for name, found in errors(stepper.model, rows).items():
        torch.testing.assert_close(off[name], found)
