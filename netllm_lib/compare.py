"""The settings of a sweep beside each other: tidy results, intervals over traces and seeds, figures.

A *setting* is a point of the sweep without its seed. Its *sample* is a table with a row per seed and a column per trace: the mean
reward of the policy on that trace. For a metric there is one column. All comparisons are functions of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from netllm_lib import runs, stats
from netllm_lib.abr import qoe
from netllm_lib.abr.evaluate import SETTING, TABLES
from netllm_lib.abr.plots import PALETTE, STYLES, given_or_new
from netllm_lib.stats import Interval
from netllm_lib.sweep_file import describe

RESULTS = "results.parquet"
COLUMNS = ("reward", "bitrate_mbps", "rebuffer_s", "smoothness_mbps")
PARAMETER, METRIC = "parameter.", "metric."
VALIDATION = "validation_reward"
NOTHING = Interval(float("nan"), float("nan"), float("nan"))

Samples = Mapping[str, pd.DataFrame]
"""By setting: figures [seeds, traces], labelled by seed and trace."""


# --- results ------------------------------------------------------------------------------------------------------------


def collect(points: pd.DataFrame) -> pd.DataFrame:
    """One row per point × test × policy × trace, from the tables of all tests (folders as notebook 05 writes them).

    `points` is the table of `sweeps.points_table`. Columns: point, seed, its parameters, step (of the test), traces, video, policy,
    trace, clean (shares no content with the training traces; missing where the test does not say), and the means per chunk:
    reward, bitrate_mbps, rebuffer_s, smoothness_mbps. Without tests the table is empty.
    """
    parts = []
    steps = [str(column) for column in points if str(column).startswith("run.")]
    parameters = [str(name) for name in points if str(name).startswith(PARAMETER)]
    for point in _records(points):
        for column in steps:
            folder = Path(point[column]) if isinstance(point[column], str) else None
            if folder is None or not (folder / TABLES).is_dir() or not (folder / SETTING).is_file():
                continue
            setting = runs.read_json(folder / SETTING)
            for policy in setting["order"]:
                part = _by_trace(pd.read_parquet(folder / TABLES / f"{policy}.parquet"))
                clean = setting.get("clean")
                part["clean"] = pd.array(clean if clean and len(clean) == len(part) else [None] * len(part), "boolean")
                known = {"point": point["point"], "seed": point["seed"]}
                known |= {name: point[name] for name in parameters}
                known |= {"step": column.removeprefix("run."), "policy": policy}
                known |= {"traces": setting["traces"], "video": setting["video"]}
                parts.append(part.assign(**known))
    order = ["point", "seed", *parameters, "step", "traces", "video", "policy", "trace", "clean", *COLUMNS]
    if not parts:
        return pd.DataFrame(columns=order)
    return pd.concat(parts, ignore_index=True)[order].astype({"seed": "Int64", "point": int})


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by the names of its columns."""
    return [dict(zip(map(str, table), row, strict=True)) for row in table.itertuples(index=False, name=None)]


def _by_trace(table: pd.DataFrame) -> pd.DataFrame:
    """Means per chunk by trace in playing order; the first chunk, which no policy chooses, is left out."""
    rows = qoe.chosen(table)
    rows = rows.assign(bitrate_mbps=rows["bitrate_kbps"] / 1000)
    return rows.groupby("trace", sort=False)[list(COLUMNS)].mean().reset_index()


@dataclass(frozen=True)
class SweepTables:
    """A sweep as it lies in its folder."""

    name: str
    points: pd.DataFrame
    """Those that are done, with their setting."""
    results: pd.DataFrame
    failed: pd.DataFrame
    varied: tuple[str, ...]
    """Parameters that differ between points, without their prefix."""


def load(folder: str | Path) -> SweepTables:
    """The tables of a sweep's folder. FileNotFoundError if it is none, ValueError if no point of it is done."""
    folder = Path(folder)
    path = folder / "points.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no points.parquet; name a folder that `netllm sweep` made")
    every = pd.read_parquet(path)
    parameters = [str(name) for name in every if str(name).startswith(PARAMETER)]
    varied = [name.removeprefix(PARAMETER) for name in parameters if every[name].nunique(dropna=False) > 1]
    shown = every[[PARAMETER + name for name in varied]].set_axis(varied, axis="columns")
    every["setting"] = [_label(row) for row in _records(shown)]
    done = every[every["state"] == "done"]
    if done.empty:
        raise ValueError(f"{path}: no point is done, there is nothing to compare")
    results = pd.read_parquet(folder / RESULTS) if (folder / RESULTS).is_file() else collect(done)
    results = results.merge(done[["point", "setting"]], on="point")
    name = runs.read_json(folder / runs.MANIFEST)["name"] if (folder / runs.MANIFEST).is_file() else folder.name
    return SweepTables(name, done, results, every[every["state"] != "done"], tuple(varied))


def _label(parameters: Mapping[str, object]) -> str:
    given = {key: _plain(value) for key, value in parameters.items() if not _missing(value)}
    return describe(given) or "as the notebooks have it"


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or value != value


def _plain(value: object) -> object:
    """A whole number that a table with gaps holds as 8.0 is 8 again."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


# --- samples ------------------------------------------------------------------------------------------------------------


def subject(results: pd.DataFrame) -> str:
    """The policy that the sweep is about: `llm`, or the first one that did not do the same in all points, or the first."""
    names = list(results["policy"].unique())
    if "llm" in names:
        return "llm"
    changed = results.groupby(["policy", "step", "traces", "trace"])["reward"].nunique().groupby("policy").max()
    return next((name for name in names if changed[name] > 1), names[0])


def reward_samples(tables: SweepTables, policy: str, column: str = "reward") -> dict[str, pd.DataFrame]:
    """Samples of a policy in all settings. ValueError if the runs of a setting have no trace in common.

    A trace that was not played in all runs of a setting is left out of it.
    """
    rows = tables.results[tables.results["policy"] == policy]
    if rows.empty:
        known = ", ".join(tables.results["policy"].unique())
        raise ValueError(f"no point tested the policy {policy!r}; tested: {known or 'none'}")
    found = {}
    for setting, part in rows.groupby("setting", sort=False):
        place = part["step"] + "/" + part["traces"] + "/" + part["video"] + "/" + part["trace"]
        seeds = part["seed"].astype(object).where(part["seed"].notna(), "-")
        sample = part.assign(place=place, row=seeds).pivot(index="row", columns="place", values=column)
        found[str(setting)] = sample.dropna(axis="columns")[
            [name for name in place.unique() if sample[name].notna().all()]
        ]
        if found[str(setting)].empty:
            raise ValueError(f"the runs of {setting} have no test trace in common")
    return found


def baseline_sample(tables: SweepTables, policy: str) -> pd.DataFrame:
    """The sample of a policy that no setting changes: a row for each different play of it, which is one if it has no seed.

    Where settings were tested on different traces it covers all of them, with the first play of each.
    """
    rows = pd.concat(reward_samples(tables, policy).values()).drop_duplicates().reset_index(drop=True)
    return rows.bfill().iloc[:1] if rows.isna().any(axis=None) else rows


def default_baseline(tables: SweepTables, policy: str) -> str:
    """The policy to compare with: mpc, or the best one but `policy`; empty where no other was tested."""
    means = tables.results.groupby("policy")["reward"].mean().drop(policy)
    return "" if means.empty else "mpc" if "mpc" in means else str(means.idxmax())


def baseline_samples(tables: SweepTables, policy: str) -> dict[str, pd.DataFrame]:
    """Samples of all policies but `policy`; named with the test's traces where there were several."""
    tests = tables.results[["traces", "video"]].drop_duplicates()
    found = {}
    for name in tables.results["policy"].unique():
        sample = baseline_sample(tables, name) if name != policy else pd.DataFrame()
        for _, (traces, video) in tests.iterrows():
            own = [place for place in sample if f"/{traces}/{video}/" in str(place)]
            if own:
                found[name if len(tests) == 1 else f"{name} on {traces}, {video}"] = sample[own]
    return found


def metric_samples(tables: SweepTables, metric: str) -> dict[str, pd.DataFrame]:
    """Samples of a metric, one column. ValueError if no run has it."""
    column = metric if metric.startswith(METRIC) else METRIC + metric
    if column not in tables.points or not pd.api.types.is_numeric_dtype(tables.points[column]):
        known = ", ".join(numeric_metrics(tables.points))
        raise ValueError(f"no metric {metric!r} in numbers; known: {known or 'none'}")
    rows = tables.points[tables.points[column].notna()]
    seeds = rows["seed"].astype(object).where(rows["seed"].notna(), "-")
    return {
        str(setting): part[[column]].astype(float).set_axis(list(seeds[part.index]), axis="index")
        for setting, part in rows.groupby("setting", sort=False)
    }


def default_metric(points: pd.DataFrame) -> str:
    """The first metric that differs between points, of the last step that has one. ValueError if there is none."""
    names = numeric_metrics(points)
    steps = [str(column).removeprefix("run.") for column in points if str(column).startswith("run.")]
    for step in reversed(steps):
        if own := [name for name in names if name.startswith(f"{step}.")]:
            return own[0]
    raise ValueError("the runs of this sweep have no test and no metric in numbers: there is nothing to compare")


def numeric_metrics(points: pd.DataFrame) -> list[str]:
    """Names, without their prefix, of the metrics that are numbers and differ between points; all, if none differs."""
    columns = [str(name) for name in points if str(name).startswith(METRIC)]
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(points[name])]
    differ = [name for name in numbers if points[name].nunique() > 1]
    return [name.removeprefix(METRIC) for name in differ or numbers]


def pooled(sample: pd.DataFrame, minus: pd.DataFrame | None = None) -> Interval:
    """The mean of a sample, or its difference to another one on the same traces, with a 95 % interval over traces and seeds.

    That of `stats.bootstrap_runs`, paired by trace. Of a metric, which has no traces, Student's t over the seeds (Welch's for a
    difference): a bootstrap of three numbers would be too narrow. NaN for samples without a trace in common; bounds are NaN where
    there is one figure.
    """
    if minus is not None:
        common = [name for name in sample if name in minus]
        if not common:
            return NOTHING
        sample, minus = sample[common], minus[common]
    if sample.shape[1] > 1:
        return stats.bootstrap_runs(sample.to_numpy(), None if minus is None else minus.to_numpy())
    return _student(sample.to_numpy()[:, 0], np.zeros(0) if minus is None else minus.to_numpy()[:, 0])


def _student(values: np.ndarray, minus: np.ndarray) -> Interval:
    from scipy.stats import t

    sides = [side for side in (values, minus) if len(side)]
    mean = float(values.mean() - (minus.mean() if len(minus) else 0.0))
    if min(map(len, sides)) < 2:
        return Interval(mean, float("nan"), float("nan"))
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    variance = sum(parts)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


# --- comparisons --------------------------------------------------------------------------------------------------------


def league(samples: Samples, higher: bool = True) -> pd.DataFrame:
    """One row per setting, the best first: runs (seeds), traces, mean with its interval, and the range of the runs' means."""
    rows = {}
    for setting, sample in samples.items():
        mean, low, high = pooled(sample)
        by_run = sample.mean(axis="columns")
        rows[setting] = {"runs": len(sample), "traces": sample.shape[1], "mean": mean, "low": low, "high": high}
        rows[setting] |= {"worst_run": by_run.min() if higher else by_run.max()}
        rows[setting] |= {"best_run": by_run.max() if higher else by_run.min()}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("mean", ascending=not higher)


def differences(samples: Samples, minus: pd.DataFrame, skip: Sequence[str] = ()) -> dict[str, Interval]:
    """Each setting − `minus`, paired by trace; settings that have no trace in common with it are left out."""
    found = {name: pooled(sample, minus) for name, sample in samples.items() if name not in skip}
    return {name: interval for name, interval in found.items() if interval.mean == interval.mean}


def parts(tables: SweepTables, policy: str) -> pd.DataFrame:
    """Means of the parts of QoE by setting: bitrate_mbps, rebuffer_s, smoothness_mbps; and reward_clean.

    The last is the mean reward on the traces that share no content with the training traces, NaN where that is not known.
    """
    rows = tables.results[tables.results["policy"] == policy]
    means = rows.groupby("setting", sort=False)[list(COLUMNS[1:])].mean()
    clean = rows[rows["clean"].fillna(False).astype(bool)].groupby("setting")["reward"].mean()
    return means.assign(reward_clean=clean.reindex(means.index))


def chosen(tables: SweepTables, samples: Samples, higher: bool = True) -> tuple[str, str]:
    """The best setting, and by what: the validation reward where every run of a test has one, else the figures compared themselves.

    Choosing by the test and then reporting that test's figure flatters the setting; by validation it does not.
    """
    columns = [str(name) for name in tables.points if str(name).endswith(f".{VALIDATION}")]
    compared = tables.points[tables.points["setting"].isin(list(samples))]
    for column in columns:
        if compared[column].notna().all():
            return str(compared.groupby("setting")[column].mean().idxmax()), column.removeprefix(METRIC)
    means = {name: float(sample.to_numpy().mean()) for name, sample in samples.items()}
    return (max if higher else min)(means, key=means.__getitem__), "the figures compared"


def effect(tables: SweepTables, samples: Samples, parameter: str) -> pd.DataFrame:
    """The effect of one parameter, all others held: a row per value with mean, low, high over combinations of the others, seeds and
    traces; difference, difference_low and difference_high to the first value; combinations (how many), and each one's mean.

    Only combinations that were run with all values count, with the seeds and traces that they share, so that nothing but the
    parameter differs between the rows. Empty if there is none.
    """
    others = [PARAMETER + name for name in tables.varied if name != parameter]
    points = tables.points.drop_duplicates("setting")
    points = points[points["setting"].isin(list(samples))]
    values = list(points[PARAMETER + parameter].drop_duplicates())
    groups = points.groupby(others, dropna=False, sort=False) if others else [((), points)]
    complete = [part for _, part in groups if len(part) == len(values)]
    if len(values) < 2 or not complete:
        return pd.DataFrame()
    by_value: list[list[pd.DataFrame]] = [[] for _ in values]
    for part in complete:
        for value, setting in zip(part[PARAMETER + parameter], part["setting"], strict=True):
            index = next(i for i, known in enumerate(values) if known == value or (_missing(known) and _missing(value)))
            by_value[index].append(samples[setting])
    every = [sample for group in by_value for sample in group]
    seeds = [seed for seed in every[0].index if all(seed in sample.index for sample in every)]
    traces = [name for name in every[0] if all(name in sample for sample in every)]
    if not seeds or not traces:
        return pd.DataFrame()
    means = [
        pd.DataFrame(np.mean([one.loc[seeds, traces].to_numpy() for one in group], axis=0), seeds, traces)
        for group in by_value
    ]
    rows = []
    for value, mean, group in zip(values, means, by_value, strict=True):
        whole, change = pooled(mean), pooled(mean, means[0])
        row = {"value": "default" if _missing(value) else _plain(value), "mean": whole.mean, "low": whole.low}
        row |= {"high": whole.high, "difference": change.mean, "difference_low": change.low}
        row |= {"difference_high": change.high, "combinations": len(group)}
        row["each"] = [float(sample.loc[seeds, traces].to_numpy().mean()) for sample in group]
        rows.append(row)
    rows[0] |= {"difference": 0.0, "difference_low": float("nan"), "difference_high": float("nan")}
    return pd.DataFrame(rows)


# --- figures ------------------------------------------------------------------------------------------------------------


def plot_league(
    samples: Samples,
    baselines: Samples | None = None,
    best: str = "",
    higher: bool = True,
    what: str = "mean reward per chunk",
    axes: Axes | None = None,
) -> Axes:
    """A mean with its interval for each setting, the best on top, each seed as a small mark; baselines in grey below."""
    table = league(samples, higher)
    below = league(baselines or {}) if baselines else pd.DataFrame()
    names = [*table.index, *below.index][::-1]
    ax = given_or_new(axes, (9, 0.42 * len(names) + 1.4))
    for row, name in enumerate(names):
        ours = name in table.index
        mean, low, high = (table if ours else below).loc[name, ["mean", "low", "high"]]
        color = PALETTE[2] if name == best else PALETTE[0] if ours else "0.5"
        ax.plot([low, high], [row, row], color=color, linewidth=2)
        ax.plot(mean, row, "o" if ours else "s", color=color)
        by_run = samples[name].mean(axis="columns").to_numpy() if ours else np.zeros(0)
        if len(by_run) > 1:
            ax.plot(by_run, np.full(len(by_run), row + 0.2), "|", color=color, markersize=7)
    for i, mean in enumerate(below["mean"] if len(below) else ()):
        ax.axvline(mean, color="0.6", linestyle=STYLES[1 + i % 3], linewidth=0.8, zorder=0)
    labels = [f"{name} (chosen)" if name == best else name for name in names]
    ax.set_yticks(range(len(names)), labels)
    ax.set(xlabel=f"{what}, 95 % interval (| one run)", ylim=(-0.7, len(names) - 0.3), title="Settings")
    return ax


def plot_effects(effects: Mapping[str, pd.DataFrame], what: str = "mean reward per chunk") -> np.ndarray:
    """A panel per parameter: the change from its first value, paired, with its interval; thin lines are combinations of the others.

    Returns the axes [lines, columns].
    """
    shown = {name: table for name, table in effects.items() if len(table)}
    columns = min(3, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.3 * lines), layout="constrained", squeeze=False, sharey=True
    )
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, (name, table) in zip(axes.flat, shown.items(), strict=False):
        ax.axhline(0, color="k", linewidth=0.8)
        for each in zip(*table["each"], strict=True):
            ax.plot(range(len(table)), np.array(each) - each[0], color="0.75", linewidth=1, marker=".", zorder=1)
        change = table["difference"].to_numpy()
        reach = np.array([change - table["difference_low"], table["difference_high"] - change], dtype=float)
        ax.errorbar(
            range(len(table)), change, np.nan_to_num(reach), color=PALETTE[0], marker="o", capsize=4, linewidth=1.8
        )
        ax.set_xticks(range(len(table)), [str(value) for value in table["value"]])
        ax.set(xlabel=name, xlim=(-0.4, len(table) - 0.6))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"change of {what}", fontsize=9)
    figure.suptitle("Change from the first value, other parameters held (grey: each combination of them)", fontsize=10)
    return axes


# --- words --------------------------------------------------------------------------------------------------------------


def summary(
    tables: SweepTables,
    table: pd.DataFrame,
    against: Mapping[str, Interval],
    best: str,
    by: str,
    what: str,
    baseline: str = "",
) -> str:
    """The end of a headless run: the settings in order, their difference to the baseline, the one chosen, what failed."""
    lines = [f"{tables.name}: {what}, 95 % interval", ""]
    width = max(7, *(len(str(name)) for name in table.index))
    minus = f"  {'− ' + baseline:24}" if against else ""
    lines += [f"{'setting':{width}} {'runs':>4} {'mean':>8}  {'interval':18}{minus}".rstrip()]
    lines += ["-" * len(lines[-1])]
    for name, row in table.iterrows():
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]" if row["low"] == row["low"] else "one run"
        gap = f"  {against[str(name)]!s:24}" if name in against else ""
        lines.append(f"{name!s:{width}} {row['runs']:4.0f} {row['mean']:8.4f}  {interval:18}{gap}".rstrip())
    lines += ["", f"chosen: {best} (by {by})"]
    if tables.failed.shape[0]:
        lines.append(
            f"failed and not compared ({len(tables.failed)}): {', '.join(dict.fromkeys(tables.failed['setting']))}"
        )
    return "\n".join(lines)
