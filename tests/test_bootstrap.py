"""Resampled intervals and ratios: against formulas, against resamples written out, and on rows that go together."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from psftrain import bootstrap
from psftrain.bootstrap import DRAWS, ratio, replicates

Array = NDArray[np.float64]


def errors(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).gamma(2.0, 0.05, count)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = errors(400)
    low, high = replicates({"a": values})["a"].intervals()["mean_interval"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


@pytest.mark.parametrize("groups", [None, [30, 20, 10]])
def test_percentiles_are_those_of_the_resamples_written_out(groups: list[int] | None) -> None:
    """And means; as numpy has them, whatever is drawn how often."""
    values = errors(60)
    found = replicates({"a": values}, groups, seed=3)["a"]
    sizes = np.array(groups or [60])
    drawn = np.concatenate(list(bootstrap._draws(sizes, np.random.default_rng(3))))
    assert len(drawn) == DRAWS
    resamples = [np.repeat(values, times) for times in drawn]
    np.testing.assert_allclose(found.mean, [resample.mean() for resample in resamples])
    np.testing.assert_allclose(found.p95, [np.quantile(resample, 0.95) for resample in resamples])


def test_points_are_drawn_alike() -> None:
    """Each as often as the others, all of a group together as many as it has."""
    drawn = np.concatenate(list(bootstrap._draws(np.array([50]), np.random.default_rng(0))))
    assert (drawn.sum(axis=1) == 50).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(50), abs=0.15)


def test_whole_groups_are_drawn() -> None:
    """Three seeds that differ: what one more would give is less sure than the points within them tell."""
    groups = [errors(200, seed) + 0.1 * seed for seed in range(3)]
    together = np.concatenate(groups)
    alone, grouped = (replicates({"a": together}, sizes)["a"].mean for sizes in (None, [200] * 3))
    assert grouped.std() > 3 * alone.std()
    drawn = np.concatenate(list(bootstrap._draws(np.array([20, 30, 10]), np.random.default_rng(0))))
    shares = drawn.reshape(DRAWS, -1)
    assert set(np.unique(shares[:, :20].sum(axis=1))) == {0, 20, 40, 60}
    assert set(np.unique(shares[:, 50:].sum(axis=1))) == {0, 10, 20, 30}


def test_rows_are_resampled_together() -> None:
    """A row that errs 10 % more at every point does so in every resample."""
    ours, theirs = 1.1 * errors(300), errors(300)
    found = replicates({"ours": ours, "theirs": theirs})
    told = ratio(ours, theirs, (found["ours"], found["theirs"]))
    assert told == pytest.approx(dict.fromkeys(("mean", "mean_bound", "p95", "p95_bound"), 1.1))


def test_the_bound_of_a_ratio_lies_above_it() -> None:
    """By 1.64 standard errors of the logarithm of a ratio of independent means."""
    ours, theirs = errors(500, 1), errors(500, 2)
    found = replicates({"ours": ours, "theirs": theirs})
    told = ratio(ours, theirs, (found["ours"], found["theirs"]))
    assert told["mean"] == pytest.approx(ours.mean() / theirs.mean())
    assert told["p95"] == pytest.approx(np.quantile(ours, 0.95) / np.quantile(theirs, 0.95))
    deviation = np.hypot(*(values.std() / values.mean() / np.sqrt(500) for values in (ours, theirs)))
    assert np.log(told["mean_bound"] / told["mean"]) == pytest.approx(1.645 * deviation, rel=0.15)
    assert told["p95_bound"] > told["p95"]


def test_the_same_seed_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of more points than are resampled at a time."""
    values = errors(100)
    first, second, third = (replicates({"a": values}, seed=seed)["a"].mean for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)
    monkeypatch.setattr(bootstrap, "BLOCK", 999)
    parts = replicates({"a": values})["a"]
    assert len(parts.mean) == len(parts.p95) == DRAWS
    assert parts.mean.std() == pytest.approx(first.std(), rel=0.1)
