"""Fit `synthetic.BandwidthModel` to a trace set, by moments, and compare the two.

The model's log bandwidth is the sum of a trace's level, a regime that changes at random, and an autoregression. The last two
forget at different speeds, so that they can be told apart by the variogram g(k), half the mean square of the change over
k samples, in which the traces' levels cancel:

    g(k) = A (1 - memory^k) + B (1 - q^k),  A = jitter^2 / (1 - memory^2),  B = var(regimes),  q = 1 - interval_s / regime_s

1. interval_s: the median time between marked changes (over 5 %) of the bandwidth, so that values that a log merely repeats do
   not count; the time step where those lie further apart than a 60th of a trace. Everything below is measured on traces
   averaged over intervals of that length, bytes preserved; bandwidths under the 0.1 % quantile, and under 0.001 Mbps, count
   as that.
2. A, memory, B, regime_s: least squares on the variogram, pooled over traces. The two look alike in it; the slower one is
   called regime. Where there is one speed only, it may go to either.
3. regimes: twenty quantiles of the traces' deviation from their own mean, in their own standard deviations, scaled to variance
   B, the middle at 0. The deviation has the autoregression in it, so that skewed regimes come out less skewed.
4. spread: from the variance of the traces' mean logs, less what regimes and autoregression contribute to it in traces of
   that length. median_mbps: from the mean of the traces' mean logs. samples: the median length. floor_mbps: the lowest bandwidth.
5. restless: half the standard deviation of the log of the traces' variances, less what chance contributes to it, which is
   measured on generated traces as long as the real ones.

Level and volatility are drawn independently; sets where calm traces are the slow ones are met on average only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from netllm_lib.abr.synthetic import (
    BandwidthModel,
    generate_trace,
    generate_traces,
    generate_video,
    write_traces,
    write_video,
)
from netllm_lib.abr.traces import Registry, Trace, TraceSet

MARKED = 0.05  # change of the log bandwidth that is no repetition
LEAST_MBPS = 0.001
VERY_LOW_MBPS = 0.15  # half of the lowest bitrate: a chunk takes twice as long as it plays
REGIMES = 20  # of a fitted model, so that rare deep drops have a part


def fit_model(traces: TraceSet) -> BandwidthModel:
    """The model whose traces resemble `traces`, by the method above.

    Raises ValueError if they are too short (fewer than 20 intervals each, or 200 in all) or constant.
    """
    interval_s = _interval_s(traces)
    grids = [grid for trace in traces.traces if len(grid := on_grid(trace, interval_s)) >= 20]
    if sum(len(grid) for grid in grids) < 200:
        raise ValueError(
            f"{traces.name}: too short to be fitted: {sum(len(grid) for grid in grids)} intervals of {interval_s:g} s in "
            f"{len(grids)} traces of at least 20; 200 are needed"
        )
    samples = np.concatenate(grids)
    lowest = max(float(np.quantile(samples, 0.001)), LEAST_MBPS)
    logs = [np.log(np.maximum(grid, lowest)) for grid in grids]
    wander, memory, regime, stay = _two_speeds(traces.name, logs)
    regimes = _regimes(logs, regime)
    means = np.array([log.mean() for log in logs])
    within = np.mean([_variance_of_mean(len(log), wander, memory, regime, stay) for log in logs])
    model = BandwidthModel(
        median_mbps=_digits(np.exp(means.mean() - regimes.mean())),
        spread=_digits(np.sqrt(max(means.var(ddof=1) - within, 0.0) if len(means) > 1 else 0.0)),
        samples=int(np.median([len(log) for log in logs])) + 1,
        interval_s=interval_s,
        memory=_digits(memory),
        jitter=_digits(np.sqrt(wander * (1 - memory**2))),
        regime_s=_digits(interval_s / (1 - stay)),
        regimes=tuple(_digits(value) for value in regimes),
        floor_mbps=_digits(max(float(samples.min()), LEAST_MBPS)),
    )
    return replace(model, restless=_digits(_restless(logs, model)))


def _restless(logs: list[np.ndarray], model: BandwidthModel) -> float:
    """What the spread of the traces' log variances has beyond that of model traces as long as they, all of volatility 1."""
    like = [
        np.log(generate_trace("", (0, i), replace(model, samples=len(log) + 1)).mbps[1:]) for i, log in enumerate(logs)
    ]
    spread, chance = (
        np.var([np.log(max(log.var(), 1e-6)) for log in each]) if len(each) > 1 else 0.0 for each in (logs, like)
    )
    return float(np.sqrt(max(spread - chance, 0.0))) / 2


def on_grid(trace: Trace, interval_s: float) -> np.ndarray:
    """Mean bandwidth in Mbps over intervals of `interval_s` [intervals]; a last, shorter one is left out."""
    time_s = trace.time_s - trace.time_s[0]
    megabits = np.append(0.0, np.cumsum(trace.mbps[1:] * np.diff(time_s)))
    edges_s = interval_s * np.arange(int(time_s[-1] / interval_s + 1e-6) + 1)
    return np.maximum(np.diff(np.interp(edges_s, time_s, megabits)), 0.0) / interval_s


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _interval_s(traces: TraceSet) -> float:
    duration_s = float(np.median([trace.duration_s for trace in traces.traces]))
    step_s = float(np.median([np.median(np.diff(trace.time_s)) for trace in traces.traces]))
    gaps = []
    for trace in traces.traces:
        changes = np.abs(np.diff(np.log(np.maximum(trace.mbps[1:], LEAST_MBPS)))) > MARKED
        marked_s = trace.time_s[1:-1][changes]
        if len(marked_s) > 1:
            gaps.append(np.median(np.diff(marked_s)))
    if not gaps:
        raise ValueError(f"{traces.name}: its bandwidth hardly changes, nothing can be fitted")
    gap_s = float(np.median(gaps))
    return _digits(gap_s if gap_s <= duration_s / 60 else step_s)


def _two_speeds(name: str, logs: list[np.ndarray]) -> tuple[float, float, float, float]:
    """(A, memory, B, q): variances and lag-1 correlations of autoregression and regime."""
    longest = max(int(np.median([len(log) for log in logs])) // 2, 8)
    lags = np.unique(np.round(np.geomspace(1, longest, 30)).astype(int))
    squares = [np.concatenate([(log[lag:] - log[:-lag]) ** 2 for log in logs if len(log) > lag]) for lag in lags]
    variogram = np.array([square.mean() / 2 for square in squares])
    if not (variogram > 0).all():
        raise ValueError(f"{name}: its bandwidth hardly changes, nothing can be fitted")
    weight = np.sqrt([len(square) for square in squares]) / variogram

    def error(x: np.ndarray) -> np.ndarray:
        wander, memory, regime, stay = _parameters(x, longest)
        return weight * (wander * (1 - memory**lags) + regime * (1 - stay**lags) - variogram)

    # the sum of two exponentials has several near-optima: start from different speeds
    starts = [
        np.array([np.log(variogram[-1] / 2), np.log(fast), np.log(variogram[-1] / 2), ratio])
        for fast in (0.5, 2.0, 5.0)
        for ratio in (0.0, 2.0)
    ]
    best = min((least_squares(error, start, method="trf", max_nfev=400) for start in starts), key=lambda fit: fit.cost)
    return _parameters(best.x, longest)


def _parameters(x: np.ndarray, longest: int) -> tuple[float, float, float, float]:
    """The autoregression forgets within 0.2 to longest/4 samples, a regime at least twice, at most 4 x longest as slowly."""
    share = 1 / (1 + np.exp(-np.clip(x[[1, 3]], -50, 50)))
    fast = 0.2 * (longest / 4 / 0.2) ** share[0]
    slow = 2 * fast * (4 * longest / (2 * fast)) ** share[1]
    slow = max(slow, 1.0)
    return float(np.exp(x[0])), float(np.exp(-1 / fast)), float(np.exp(x[2])), float(np.exp(-1 / slow))


def _regimes(logs: list[np.ndarray], variance: float) -> np.ndarray:
    standard = np.concatenate([(log - log.mean()) / max(log.std(), 1e-3) for log in logs])
    shape = np.quantile(standard, (np.arange(REGIMES) + 0.5) / REGIMES)
    shape *= np.sqrt(variance) / shape.std()
    return shape - np.median(shape)


def _variance_of_mean(samples: int, wander: float, memory: float, regime: float, stay: float) -> float:
    lag = np.arange(1, samples)
    tail = sum(2 * v * np.sum((1 - lag / samples) * r**lag) for v, r in ((wander, memory), (regime, stay)))
    return float((wander + regime + tail) / samples)


# --- comparison ---------------------------------------------------------------------------------------------------------


def compare(sets: dict[str, TraceSet], interval_s: float) -> pd.DataFrame:
    """How far trace sets resemble each other: one row per figure, one column per set.

    Quantiles over traces of the mean bandwidth, and over time of the bandwidth, in Mbps; the correlation of a trace's log
    bandwidth with the interval before, the share of time below 0.15 Mbps. Bandwidths are averages over `interval_s`.
    """
    columns = {}
    for name, traces in sets.items():
        grids = [grid for trace in traces.traces if len(grid := on_grid(trace, interval_s)) > 2]
        if not grids:
            raise ValueError(f"{name}: no trace is longer than two intervals of {interval_s:g} s")
        samples = np.concatenate(grids)
        deviations = [log - log.mean() for log in (np.log(np.maximum(grid, LEAST_MBPS)) for grid in grids)]
        before, after = (np.concatenate([d[part] for d in deviations]) for part in (slice(None, -1), slice(1, None)))
        quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
        figures = {
            f"trace mean, {100 * q:.0f} %": np.quantile([t.mean_mbps for t in traces.traces], q) for q in quantiles
        }
        figures |= {f"bandwidth, {100 * q:.0f} %": np.quantile(samples, q) for q in quantiles}
        figures["correlation of log"] = np.mean(before * after) / max(np.mean(np.concatenate(deviations) ** 2), 1e-12)
        figures[f"share below {VERY_LOW_MBPS} Mbps"] = np.mean(samples < VERY_LOW_MBPS)
        columns[name] = {key: float(value) for key, value in figures.items()}
    return pd.DataFrame(columns)


def write_like(
    traces: TraceSet, model: BandwidthModel, root: Path, train: int = 60, test: int = 30, seed: int = 7
) -> tuple[TraceSet, TraceSet]:
    """Trace sets `<name>-like-train` and `<name>-like-test` of a fitted model, and a video if the root has none."""
    made = (
        generate_traces(f"{traces.name}-like-train", train, seed, model),
        generate_traces(f"{traces.name}-like-test", test, seed + 1, model),
    )
    for split, generated in zip(("train", "test"), made, strict=True):
        write_traces(generated, root, split)
    if not Registry(Path(root)).video_folders():
        write_video(generate_video("sample", seed), root)
    return made
