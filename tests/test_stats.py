"""Bootstrap intervals on matrices that a reader checks by hand."""

from __future__ import annotations

import numpy as np
import pytest

from netllm_lib import stats


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [stats.bootstrap(rng.normal(1.0, 2.0, 40), seed=i) for i in range(200)]
    assert 0.90 <= np.mean([i.low <= 1.0 <= i.high for i in intervals]) <= 0.99
    assert stats.bootstrap(np.full(10, 2.5)) == (2.5, 2.5, 2.5)


def test_one_trace_has_no_width_and_what_is_no_sample_is_refused() -> None:
    single = stats.bootstrap(np.array([3.0]))
    assert single.mean == 3.0
    assert np.isnan(single.low)
    assert not single.excludes_zero
    with pytest.raises(ValueError, match="1 of 2 figures are not finite"):
        stats.bootstrap(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="shape"):
        stats.bootstrap(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(4, 60\) and \(2, 50\)"):
        stats.bootstrap_runs(np.zeros((4, 60)), np.zeros((2, 50)))


def test_tail_and_middle() -> None:
    values = np.array([5.0, -10, 1, 2, 3, 4, 6, 7])
    assert stats.worst_mean(values, 0.05) == -10
    assert stats.worst_mean(values, 0.25) == -4.5
    assert stats.interquartile_mean(values) == 3.5


def test_equal_traces_leave_the_seeds_and_equal_seeds_leave_the_traces() -> None:
    """By hand: two seeds of 0 and 1 on any number of equal traces are drawn as 0 0, 0 1, 1 0, 1 1."""
    assert stats.bootstrap_runs(np.array([[0.0] * 50, [1.0] * 50])) == (0.5, 0.0, 1.0)
    values, other = np.random.default_rng(4).normal(size=(2, 30))
    assert stats.bootstrap_runs(np.tile(values, (5, 1))) == pytest.approx(stats.bootstrap(values))
    assert stats.bootstrap_runs(values[None], other[None]) == pytest.approx(stats.bootstrap(values - other))


def test_seeds_that_differ_widen_the_interval_and_it_covers_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling the seeds' traces as if they were independent would cover far too rarely."""
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    covered = pooled = 0
    for i in range(100):
        values = 1 + rng.normal(0, 0.5, (8, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 0.3, (8, 40))
        interval, naive = stats.bootstrap_runs(values, seed=i), stats.bootstrap(values.ravel(), seed=i)
        covered += interval.low <= 1 <= interval.high
        pooled += naive.low <= 1 <= naive.high
        assert interval.high - interval.low > naive.high - naive.low
    assert 0.87 <= covered / 100 <= 0.99
    assert pooled / 100 < 0.75


def test_runs_are_paired_by_trace_whatever_their_seeds() -> None:
    rng = np.random.default_rng(6)
    traces = rng.normal(0, 5, 60)
    ours, other = traces + 0.3 + rng.normal(0, 0.2, (4, 60)), traces + rng.normal(0, 0.2, (2, 60))
    difference = stats.bootstrap_runs(ours, other)
    assert difference.excludes_zero
    assert difference.mean == pytest.approx(ours.mean() - other.mean())
    assert stats.bootstrap_runs(ours).low < stats.bootstrap_runs(other).high
    assert stats.bootstrap_runs(ours, traces[None]).excludes_zero
