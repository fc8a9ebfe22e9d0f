"""Honest statistics: traces are the unit of sampling, differences are paired."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """True if zero lies outside: only then may a difference be called one."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over traces.

    `values` [traces] holds one figure per trace; pass the differences of two policies for a paired interval. `statistic`
    maps [..., traces] to [...]; the mean by default. A single trace gives an interval without bounds (NaN).
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"one figure per trace is needed, got an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{(~np.isfinite(values)).sum()} of {len(values)} figures are not finite")
    measure = statistic or (lambda sample: sample.mean(axis=-1))
    if len(values) == 1:
        return Interval(float(measure(values)), float("nan"), float("nan"))
    index = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(measure(values[index]), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(measure(values)), float(low), float(high))


def bootstrap_runs(
    values: np.ndarray,
    minus: np.ndarray | None = None,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over traces and over training seeds.

    `values` [seeds, traces] holds one row per run of the same recipe, all over the same traces. Each resample draws traces, the
    same ones for all rows, and rows; the statistic (the mean by default) is that of the traces' means over the drawn rows. With
    `minus` [other seeds, traces] it is that of the differences, trace by trace; its rows are drawn by themselves, and there may
    be fewer, down to the one of a baseline without a seed. The interval then says how well another seed on other traces would do,
    not only these. A single row is `bootstrap` over traces: nothing can be said of the seeds.
    """
    runs = [np.asarray(sample, dtype=float) for sample in (values, minus) if sample is not None]
    for sample in runs:
        if sample.ndim != 2 or sample.size == 0 or sample.shape[1] != runs[0].shape[1]:
            shapes = " and ".join(str(sample.shape) for sample in runs)
            raise ValueError(f"figures [seeds, traces] over the same traces are needed, got arrays of shape {shapes}")
        if not np.isfinite(sample).all():
            raise ValueError(f"{(~np.isfinite(sample)).sum()} of {sample.size} figures are not finite")
    measure = statistic or (lambda sample: sample.mean(axis=-1))
    signs = (1, -1)
    traces = runs[0].shape[1]
    whole = float(measure(sum(sign * run.mean(axis=0) for sign, run in zip(signs, runs, strict=False))))
    if traces == 1:
        return Interval(whole, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    index = rng.integers(0, traces, (RESAMPLES, traces))
    means = np.zeros((RESAMPLES, traces))
    for sign, run in zip(signs, runs, strict=False):
        weights = rng.multinomial(len(run), np.full(len(run), 1 / len(run)), RESAMPLES) / len(run)  # [resamples, seeds]
        means += sign * (weights @ run)
    resampled = measure(np.take_along_axis(means, index, axis=1))
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(whole, float(low), float(high))


def student(values: np.ndarray, minus: np.ndarray | None = None) -> Interval:
    """The mean of some runs' figures, or its difference to that of other runs, with Student's (or Welch's) 95 % interval.

    For a few runs a bootstrap would be too narrow. One run gives an interval without bounds (NaN).
    """
    from scipy.stats import t

    sides = [values] if minus is None else [values, minus]
    mean = float(values.mean() - (0 if minus is None else minus.mean()))
    if min(map(len, sides)) < 2:
        return Interval(mean, float("nan"), float("nan"))
    parts = np.array([side.var(ddof=1) / len(side) for side in sides])
    if not parts.any():
        return Interval(mean, mean, mean)
    freedom = parts.sum() ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    half = float(t.ppf(0.975, freedom) * np.sqrt(parts.sum()))
    return Interval(mean, mean - half, mean + half)


def worst_mean(share: float) -> Callable[[np.ndarray], np.ndarray]:
    """Statistic: mean of the worst `share` of traces (at least one), for the tail that the mean hides."""

    def measure(sample: np.ndarray) -> np.ndarray:
        count = max(1, round(share * sample.shape[-1]))
        return np.sort(sample, axis=-1)[..., :count].mean(axis=-1)

    return measure


def interquartile_mean(sample: np.ndarray) -> np.ndarray:
    """Statistic: mean of the middle half of traces, which a few broken traces do not move."""
    cut = sample.shape[-1] // 4
    return np.sort(sample, axis=-1)[..., cut : sample.shape[-1] - cut].mean(axis=-1)


def paired(ours: pd.Series, other: pd.Series) -> Interval:
    """Mean of ours − other with its bootstrap interval over the samples (the index) that both have. ValueError if there is none."""
    common = ours.index.intersection(other.index)
    if not len(common):
        raise ValueError(f"nothing pairs the two: one has {ours.index[0]!r} …, the other {other.index[0]!r} …")
    return bootstrap((ours[common] - other[common]).to_numpy())
