"""The settings of a sweep beside each other: tidy results, intervals over samples and seeds, figures.

A *setting* is a point of the sweep without its seed. Its *figures* are a table with a row per seed and a column per sample of the
test: what the policy got there. A metric of the runs has one column. All comparisons are functions of figures.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from netllm_lib import measure, runs, stats
from netllm_lib.measure import Measure, Scores
from netllm_lib.stats import Interval
from netllm_lib.sweep_file import describe

POINTS, RESULTS = "points.parquet", "results.parquet"
PARAMETER, METRIC, RUN = "parameter.", "metric.", "run."
KEYS = ("point", "step", "tested_on", "subject", "policy", "sample", "measure", "unit", "better", "value")
BLUE, GREEN = "#0173b2", "#029e73"  # of seaborn's palette for the colour-blind
NOTHING = Interval(float("nan"), float("nan"), float("nan"))

Figures = Mapping[str, pd.DataFrame]
"""By setting: figures [seeds, samples], labelled by seed and sample."""


def collect(points: pd.DataFrame) -> pd.DataFrame:
    """One row per point × test × policy × sample, from the scores of all tests; empty where nothing was tested.

    `points` is the table of `sweeps.points_table`. Columns: `KEYS` (value is that of the measure) and the parts of the scores.
    Scores that cannot be read are left out, with a line on standard error.
    """
    found = [pd.DataFrame(columns=list(KEYS))]
    for row in points.filter(regex=f"^point$|^{RUN}").to_dict("records"):
        folders = {str(name).removeprefix(RUN): Path(place) for name, place in row.items() if isinstance(place, str)}
        for step, folder in measure.tests(folders).items():
            try:
                scores = Scores.read(folder)
            except (OSError, ValueError) as error:
                print(f"not compared: {error}", file=sys.stderr)
                continue
            about = scores.measure
            key = pd.DataFrame({"policy": scores.table["policy"], "sample": scores.table[about.sample]}).astype(str)
            key = key.assign(point=row["point"], step=step, tested_on=scores.tested_on, subject=scores.subject)
            key = key.assign(measure=about.name, unit=about.unit, better=about.better, value=scores.table[about.name])
            parts = scores.table.drop(columns=[*KEYS, about.sample, about.name], errors="ignore")
            found.append(key.join(parts.select_dtypes("number")))
    return pd.concat(found[1:] or found, ignore_index=True)


@dataclass(frozen=True)
class SweepTables:
    """A sweep as it lies in its folder."""

    name: str
    points: pd.DataFrame  # those that are done, with their setting
    results: pd.DataFrame  # as `collect` made it, with seed and setting
    failed: pd.DataFrame
    varied: tuple[str, ...]  # parameters that differ between points, without their prefix

    @property
    def policies(self) -> list[str]:
        """Those that were tested."""
        return [str(name) for name in self.results["policy"].unique()]

    @property
    def measure(self) -> Measure:
        """What the tests report. ValueError if they do not report the same."""
        kinds = self.results[["measure", "unit", "better"]].drop_duplicates()
        if len(kinds) != 1:
            raise ValueError(f"{self.name}: its tests report different measures: {', '.join(kinds['measure'])}")
        name, unit, better = kinds.iloc[0]
        return Measure(name, unit, better, "sample")

    @property
    def subject(self) -> str:
        """The policy that the tests are about; the first one where they are about none."""
        return next((str(name) for name in self.results["subject"] if name), self.policies[0])


def load(folder: str | Path) -> SweepTables:
    """The tables of a sweep's folder. FileNotFoundError if it is none, ValueError if no point of it is done."""
    folder = Path(folder)
    path = folder / POINTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {POINTS}; name a folder that `netllm sweep` made")
    every = pd.read_parquet(path)
    every["seed"] = every["seed"].astype(object).where(every["seed"].notna(), "-")
    parameters = every.filter(regex=f"^{PARAMETER}").convert_dtypes().astype(object)  # 8.0, of a gap, is 8 again
    every[parameters.columns] = parameters
    shown = parameters.loc[:, parameters.nunique() > 1].rename(columns=lambda name: name.removeprefix(PARAMETER))
    given = [{str(key): value for key, value in row.items() if not pd.isna(value)} for row in shown.to_dict("records")]
    every["setting"] = [describe(row) or "as it is" for row in given]
    done = every[every["state"] == "done"]
    if done.empty:
        raise ValueError(f"{path}: no point is done, there is nothing to compare")
    results = pd.read_parquet(folder / RESULTS) if (folder / RESULTS).is_file() else collect(done)
    results = results.merge(done[["point", "seed", "setting"]], on="point")
    name = runs.Run(folder).manifest.get("name", folder.name)
    return SweepTables(name, done, results, every[every["state"] != "done"], tuple(map(str, shown)))


def figures(tables: SweepTables, policy: str) -> dict[str, pd.DataFrame]:
    """What a policy got in all settings. ValueError if the runs of a setting have no sample in common.

    A sample that is not there in all runs of a setting is left out of it.
    """
    rows, found = tables.results[tables.results["policy"] == policy], {}
    if rows.empty:
        raise ValueError(f"no point tested the policy {policy!r}; tested: {', '.join(tables.policies) or 'none'}")
    for setting, part in rows.groupby("setting", sort=False):
        place = part["step"] + "/" + part["tested_on"] + "/" + part["sample"].astype(str)
        table = part.assign(place=place).pivot(index="seed", columns="place", values="value")
        found[str(setting)] = table[place.unique()].dropna(axis="columns")
        if found[str(setting)].empty:
            raise ValueError(f"the runs of {setting} have no sample of the test in common")
    return found


def metric_figures(tables: SweepTables, metric: str) -> dict[str, pd.DataFrame]:
    """Figures of a metric of the runs, `step.name`: one column. ValueError if no run has it in numbers."""
    known, column = numeric_metrics(tables.points), METRIC + metric
    if metric not in known:
        raise ValueError(f"no metric {metric!r} in numbers; known: {', '.join(known) or 'none'}")
    rows = tables.points.dropna(subset=[column]).set_index("seed").groupby("setting", sort=False)
    return {str(setting): part[[column]].astype(float) for setting, part in rows}


def numeric_metrics(points: pd.DataFrame) -> list[str]:
    """Names, `step.name`, of the metrics that are numbers; those that differ between points come first."""
    numbers = points.filter(regex=f"^{METRIC}").select_dtypes("number")
    return [str(name).removeprefix(METRIC) for name in sorted(numbers, key=lambda name: numbers[name].nunique() < 2)]


def baseline_figures(tables: SweepTables, policy: str) -> pd.DataFrame:
    """Figures of a policy that no setting changes: a row for each different play of it, which is one if it has no seed.

    Where settings were tested on different samples it covers all of them, with the first play of each.
    """
    rows = pd.concat(figures(tables, policy).values()).drop_duplicates().reset_index(drop=True)
    return rows.bfill().iloc[:1] if rows.isna().any(axis=None) else rows


def pooled(sample: pd.DataFrame, minus: pd.DataFrame | None = None) -> Interval:
    """The mean of figures, or their difference to other ones paired by sample, with its 95 % interval over samples and seeds.

    That of `stats.bootstrap_runs`; of a metric, which has no samples, `stats.student`. NaN for figures without a sample in common.
    """
    if minus is not None:
        common = [name for name in sample if name in minus]
        if not common:
            return NOTHING
        sample, minus = sample[common], minus[common]
    ours, other = sample.to_numpy(), None if minus is None else minus.to_numpy()
    if ours.shape[1] > 1:
        return stats.bootstrap_runs(ours, other)
    return stats.student(ours[:, 0], None if other is None else other[:, 0])


def ranking(samples: Figures, better: str = "higher") -> pd.DataFrame:
    """One row per setting, the best first: runs (seeds), samples, mean with its interval, and the range of the runs' means."""
    rows = {}
    for setting, sample in samples.items():
        by_run = sample.mean(axis="columns").sort_values(ascending=better == "higher")
        rows[setting] = {"runs": len(sample), "samples": sample.shape[1], **pooled(sample)._asdict()}
        rows[setting] |= {"worst_run": by_run.iloc[0], "best_run": by_run.iloc[-1]}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("mean", ascending=better == "lower")


def differences(samples: Figures, minus: pd.DataFrame) -> dict[str, Interval]:
    """Each setting − `minus`, paired by sample; settings that have no sample in common with it are left out."""
    found = {name: pooled(sample, minus) for name, sample in samples.items()}
    return {name: interval for name, interval in found.items() if not math.isnan(interval.mean)}


def chosen(tables: SweepTables, samples: Figures, better: str = "higher", by: str = "") -> tuple[str, str]:
    """The best setting, and by what: the metric `by` of the runs where every run has it, else the figures compared themselves.

    Choosing by the test and then reporting that test's figure flatters the setting; by validation it does not.
    """
    compared = tables.points[tables.points["setting"].isin(list(samples))]
    if by in numeric_metrics(compared) and compared[METRIC + by].notna().all():
        means = compared.groupby("setting")[METRIC + by].mean()
    else:
        by = "the figures compared"
        means = pd.Series({name: sample.to_numpy().mean() for name, sample in samples.items()})
    return str(means.idxmax() if better == "higher" else means.idxmin()), by


def effect(tables: SweepTables, samples: Figures, parameter: str) -> pd.DataFrame:
    """The effect of one parameter, all others held: a row per value with mean, low, high over combinations of the others, seeds and
    samples; difference, difference_low and difference_high to the first value; combinations (how many), and each one's mean.

    Only combinations that were run with all values count, with the seeds and samples that they share, so that nothing but the
    parameter differs between the rows. Empty if there is none.
    """
    points = tables.points[tables.points["setting"].isin(list(samples))].drop_duplicates("setting")
    points = points.assign(value=points[PARAMETER + parameter].fillna("default"))
    others = [PARAMETER + name for name in tables.varied if name != parameter]
    groups = points.groupby(others, dropna=False, sort=False) if others else [((), points)]
    settings = [part.set_index("value")["setting"] for _, part in groups]
    values = list(points["value"].unique())
    complete = [[samples[one[value]] for value in values] for one in settings if len(one) == len(values)]
    if len(values) < 2 or not complete:
        return pd.DataFrame()
    every = [sample for row in complete for sample in row]
    seeds = functools.reduce(pd.Index.intersection, [sample.index for sample in every])
    names = functools.reduce(pd.Index.intersection, [sample.columns for sample in every])
    shared = np.array([[sample.loc[seeds, names] for sample in row] for row in complete])  # [combinations, values, …]
    if not shared.size:
        return pd.DataFrame()
    rows: list[dict[str, Any]] = []
    means = [pd.DataFrame(mean, columns=names) for mean in shared.mean(axis=0)]
    for number, (value, mean) in enumerate(zip(values, means, strict=True)):
        change = pooled(mean, means[0]) if number else Interval(0.0, *NOTHING[1:])
        row = {"value": value, **pooled(mean)._asdict(), "difference": change.mean, "difference_low": change.low}
        row |= {"difference_high": change.high, "combinations": len(shared)}
        rows.append(row | {"each": [float(one.mean()) for one in shared[:, number]]})
    return pd.DataFrame(rows)


def plot_ranking(samples: Figures, baselines: Figures, better: str, best: str = "", what: str = "") -> Axes:
    """A mean with its interval for each setting, the best on top, each seed as a small mark; baselines in grey below."""
    shown = pd.concat([ranking(part, better) for part in (samples, baselines) if part])[::-1]
    ax = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.4), layout="constrained")[1]
    for row, (name, mean, low, high) in enumerate(shown[["mean", "low", "high"]].itertuples(name=None)):
        color = GREEN if name == best else BLUE if name in samples else "0.5"
        ax.plot([low, high], [row, row], color=color, linewidth=2)
        ax.plot(mean, row, "o" if name in samples else "s", color=color)
        if name not in samples:
            ax.axvline(mean, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        elif len(by_run := samples[name].mean(axis="columns")) > 1:
            ax.plot(by_run, [row + 0.2] * len(by_run), "|", color=color, markersize=7)
    ax.set_yticks(range(len(shown)), [f"{name} (chosen)" if name == best else name for name in shown.index])
    ax.set(xlabel=f"{what}, 95 % interval (| one run)", ylim=(-0.7, len(shown) - 0.3))
    ax.set_title("Settings (squares: other policies)" if baselines else "Settings")
    return ax


def plot_effects(effects: Mapping[str, pd.DataFrame], what: str) -> None:
    """A panel per parameter: the change from its first value, with its interval; thin lines are combinations of the others."""
    size = (4.2 * len(effects), 3.3)
    figure, (axes,) = plt.subplots(1, len(effects), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax, (name, table) in zip(axes, effects.items(), strict=True):
        ax.axhline(0, color="k", linewidth=0.8)
        each = np.array(table["each"].tolist())  # [values, combinations]
        ax.plot(each - each[0], color="0.75", linewidth=1, marker=".", zorder=1)
        change = table["difference"]
        reach = [(change - table["difference_low"]).fillna(0), (table["difference_high"] - change).fillna(0)]
        ax.errorbar(range(len(table)), change, reach, color=BLUE, marker="o", capsize=4, linewidth=1.8)
        ax.set_xticks(range(len(table)), [str(value) for value in table["value"]])
        ax.set(xlabel=name, xlim=(-0.4, len(table) - 0.6))
    axes[0].set_ylabel(f"change of {what}")
    figure.suptitle("Change from the first value, other parameters held (grey: each combination of them)", fontsize=10)
