"""Honest statistics: traces are the unit of sampling, differences are paired."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

RESAMPLES = 10_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """True if zero lies outside: only then may a difference be called one."""
        return self.low > 0 or self.high < 0


def bootstrap(values: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap of `values` [traces]; pass the differences of two policies for a paired interval.

    A single trace gives an interval without bounds (NaN). ValueError for another shape, or figures that are not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"one figure per trace is needed, got an array of shape {values.shape}")
    return bootstrap_runs(values[None], seed=seed)


def bootstrap_runs(values: np.ndarray, minus: np.ndarray | None = None, *, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap over traces and over training seeds.

    `values` [seeds, traces] holds one row per run of the same recipe, all over the same traces. Each resample draws traces, the
    same ones for all rows, and rows. With `minus` [other seeds, traces] it is the difference, paired by trace; its rows are drawn
    by themselves, and there may be fewer, down to the one of a baseline without a seed. The interval then says how well another
    seed on other traces would do, not only these. A single row is `bootstrap`: nothing can be said of the seeds.
    """
    runs = [np.asarray(sample, dtype=float) for sample in (values, minus) if sample is not None]
    for sample in runs:
        if sample.ndim != 2 or sample.size == 0 or sample.shape[1] != runs[0].shape[1]:
            shapes = " and ".join(str(sample.shape) for sample in runs)
            raise ValueError(f"figures [seeds, traces] over the same traces are needed, got arrays of shape {shapes}")
        if not np.isfinite(sample).all():
            raise ValueError(f"{(~np.isfinite(sample)).sum()} of {sample.size} figures are not finite")
    signed = list(zip((1, -1), runs, strict=False))
    whole, traces = float(sum(sign * run.mean(axis=0) for sign, run in signed).mean()), runs[0].shape[1]
    if traces == 1:
        return Interval(whole, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    index = rng.integers(0, traces, (RESAMPLES, traces))
    means = np.zeros((RESAMPLES, traces))
    for sign, run in signed:
        weights = rng.multinomial(len(run), np.full(len(run), 1 / len(run)), RESAMPLES) / len(run)  # [resamples, seeds]
        means += sign * (weights @ run)
    resampled = np.take_along_axis(means, index, axis=1).mean(axis=1)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(whole, float(low), float(high))


def student(values: np.ndarray, minus: np.ndarray | None = None) -> Interval:
    """The mean of some runs' figures, or its difference to that of other runs, with Student's (or Welch's) 95 % interval.

    For a few runs a bootstrap would be too narrow. One run gives an interval without bounds (NaN).
    """
    from scipy.stats import ttest_1samp, ttest_ind

    sides = [values] if minus is None else [values, minus]
    mean = float(values.mean() - (0 if minus is None else minus.mean()))
    if min(map(len, sides)) < 2:
        return Interval(mean, float("nan"), float("nan"))
    if not any(side.var() for side in sides):
        return Interval(mean, mean, mean)
    test = ttest_1samp(values, 0) if minus is None else ttest_ind(values, minus, equal_var=False)
    return Interval(mean, *map(float, test.confidence_interval(LEVEL)))


def worst_mean(values: np.ndarray, share: float) -> float:
    """Mean of the lowest `share` of the values (at least one), for the tail that the mean hides."""
    return float(np.sort(values)[: max(1, round(share * len(values)))].mean())


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half of the values, which a few broken traces do not move."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def paired(ours: pd.Series, other: pd.Series) -> Interval:
    """Mean of ours − other with its bootstrap interval over the samples (the index) that both have. ValueError if there is none."""
    common = ours.index.intersection(other.index)
    if not len(common):
        raise ValueError(f"nothing pairs the two: one has {ours.index[0]!r} …, the other {other.index[0]!r} …")
    return bootstrap((ours[common] - other[common]).to_numpy())
