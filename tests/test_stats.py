"""Bootstrap intervals on matrices that a reader checks by hand."""

from __future__ import annotations

import numpy as np
import pytest

from netllm_lib import stats


def test_constant_values_have_no_width() -> None:
    assert stats.bootstrap(np.full(10, 2.5)) == (2.5, 2.5, 2.5)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [stats.bootstrap(rng.normal(1.0, 2.0, 40), seed=i) for i in range(200)]
    assert 0.90 <= np.mean([i.low <= 1.0 <= i.high for i in intervals]) <= 0.99


def test_paired_differences_see_what_unpaired_do_not() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 5, 60)
    better = base + 0.3 + rng.normal(0, 0.1, 60)
    assert stats.bootstrap(better - base).excludes_zero
    assert stats.bootstrap(better).low < stats.bootstrap(base).high


def test_same_seed_same_interval_and_errors() -> None:
    values = np.arange(8.0)
    assert stats.bootstrap(values) == stats.bootstrap(values)
    single = stats.bootstrap(np.array([3.0]))
    assert single.mean == 3.0
    assert np.isnan(single.low)
    assert not single.excludes_zero
    with pytest.raises(ValueError, match="not finite"):
        stats.bootstrap(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="shape"):
        stats.bootstrap(np.zeros((2, 2)))


def test_tail_and_middle() -> None:
    values = np.array([-10.0, 1, 2, 3, 4, 5, 6, 7])
    assert stats.worst_mean(0.05)(values) == -10
    assert stats.worst_mean(0.25)(values) == -4.5
    assert stats.interquartile_mean(values) == 3.5
    assert stats.worst_mean(0.5)(np.stack([values, values + 1])).tolist() == [-1.0, 0.0]
