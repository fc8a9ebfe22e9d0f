"""The settings of a sweep beside each other: tidy results, intervals over samples and seeds, figures.

A *setting* is a point of the sweep without its seed. Its *figures* are a table with a row per seed and a column per sample of the
test: what the policy got there. A metric of the runs has one column. All comparisons are functions of figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


# --- results ------------------------------------------------------------------------------------------------------------


def collect(points: pd.DataFrame) -> pd.DataFrame:
    """One row per point × test × policy × sample, from the scores of all tests; empty where nothing was tested.

    `points` is the table of `sweeps.points_table`. Columns: `KEYS` (value is that of the measure), then the parts of the scores.
    """
    found = []
    for row in points.to_dict("records"):
        folders = {name.removeprefix(RUN): row[name] for name in map(str, row) if name.startswith(RUN)}
        folders = {step: Path(folder) for step, folder in folders.items() if isinstance(folder, str)}
        for step, folder in measure.tests(folders).items():
            scores = Scores.read(folder)
            about = scores.measure
            known = {"point": row["point"], "step": step, "tested_on": scores.tested_on, "subject": scores.subject}
            known |= {"measure": about.name, "unit": about.unit, "better": about.better}
            table = scores.table.rename(columns={about.sample: "sample", about.name: "value"})
            found.append(table.assign(**known))
    if not found:
        return pd.DataFrame(columns=list(KEYS))
    table = pd.concat(found, ignore_index=True)
    return table[[*KEYS, *(name for name in table if name not in KEYS)]]


@dataclass(frozen=True)
class SweepTables:
    """A sweep as it lies in its folder."""

    name: str
    points: pd.DataFrame
    """Those that are done, with their setting."""
    results: pd.DataFrame
    """As `collect` made it, with seed and setting."""
    failed: pd.DataFrame
    varied: tuple[str, ...]
    """Parameters that differ between points, without their prefix."""

    @property
    def policies(self) -> list[str]:
        """Those that were tested."""
        return [str(name) for name in self.results["policy"].unique()]

    @property
    def measure(self) -> Measure:
        """What the tests report. ValueError if they do not report the same."""
        kinds = self.results[["measure", "unit", "better"]].drop_duplicates()
        if len(kinds) != 1:
            named = ", ".join(kinds["measure"]) or "none"
            raise ValueError(f"{self.name}: its tests report different measures: {named}")
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
    parameters = [str(name) for name in every if str(name).startswith(PARAMETER)]
    varied = [name.removeprefix(PARAMETER) for name in parameters if every[name].nunique(dropna=False) > 1]
    every[parameters] = (
        every[parameters].convert_dtypes().astype(object)
    )  # 8, which a table with gaps holds as 8.0, is 8 again
    shown = every[[PARAMETER + name for name in varied]].set_axis(varied, axis="columns")
    given = [{str(key): value for key, value in row.items() if not pd.isna(value)} for row in shown.to_dict("records")]
    every["setting"] = [describe(row) or "as it is" for row in given]
    done = every[every["state"] == "done"]
    if done.empty:
        raise ValueError(f"{path}: no point is done, there is nothing to compare")
    results = pd.read_parquet(folder / RESULTS) if (folder / RESULTS).is_file() else collect(done)
    results = results.merge(done[["point", "seed", "setting"]], on="point")
    name = runs.Run(folder).manifest.get("name", folder.name)
    return SweepTables(name, done, results, every[every["state"] != "done"], tuple(varied))


# --- figures of settings ------------------------------------------------------------------------------------------------


def figures(tables: SweepTables, policy: str, column: str = "value") -> dict[str, pd.DataFrame]:
    """What a policy got in all settings. ValueError if the runs of a setting have no sample in common.

    A sample that is not there in all runs of a setting is left out of it.
    """
    rows = tables.results[tables.results["policy"] == policy]
    if rows.empty:
        raise ValueError(f"no point tested the policy {policy!r}; tested: {', '.join(tables.policies) or 'none'}")
    found = {}
    for setting, part in rows.groupby("setting", sort=False):
        place = part["step"] + "/" + part["tested_on"] + "/" + part["sample"].astype(str)
        table = part.assign(place=place, row=_seeds(part)).pivot(index="row", columns="place", values=column)
        found[str(setting)] = table[place.unique()].dropna(axis="columns")
        if found[str(setting)].empty:
            raise ValueError(f"the runs of {setting} have no sample of the test in common")
    return found


def metric_figures(tables: SweepTables, metric: str) -> dict[str, pd.DataFrame]:
    """Figures of a metric of the runs, `step.name`: one column. ValueError if no run has it in numbers."""
    column = METRIC + metric
    if metric not in numeric_metrics(tables.points):
        known = ", ".join(numeric_metrics(tables.points))
        raise ValueError(f"no metric {metric!r} in numbers; known: {known or 'none'}")
    rows = tables.points[tables.points[column].notna()]
    return {
        str(setting): part[[column]].astype(float).set_axis(list(_seeds(part)), axis="index")
        for setting, part in rows.groupby("setting", sort=False)
    }


def numeric_metrics(points: pd.DataFrame) -> list[str]:
    """Names, `step.name`, of the metrics that are numbers; those that differ between points come first."""
    columns = [str(name) for name in points if str(name).startswith(METRIC)]
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(points[name])]
    return [name.removeprefix(METRIC) for name in sorted(numbers, key=lambda name: points[name].nunique() < 2)]


def _seeds(rows: pd.DataFrame) -> pd.Series:
    return rows["seed"].astype(object).where(rows["seed"].notna(), "-")


def baseline_figures(tables: SweepTables, policy: str) -> pd.DataFrame:
    """Figures of a policy that no setting changes: a row for each different play of it, which is one if it has no seed.

    Where settings were tested on different samples it covers all of them, with the first play of each.
    """
    rows = pd.concat(figures(tables, policy).values()).drop_duplicates().reset_index(drop=True)
    return rows.bfill().iloc[:1] if rows.isna().any(axis=None) else rows


def pooled(sample: pd.DataFrame, minus: pd.DataFrame | None = None) -> Interval:
    """The mean of figures, or their difference to other ones on the same samples, with a 95 % interval over samples and seeds.

    That of `stats.bootstrap_runs`, paired by sample. Of a metric, which has no samples, Student's t over the seeds (Welch's for a
    difference): a bootstrap of three numbers would be too narrow. NaN for figures without a sample in common; bounds are NaN where
    there is one figure.
    """
    if minus is not None:
        common = [name for name in sample if name in minus]
        if not common:
            return NOTHING
        sample, minus = sample[common], minus[common]
    if sample.shape[1] > 1:
        return stats.bootstrap_runs(sample.to_numpy(), None if minus is None else minus.to_numpy())
    return stats.student(sample.to_numpy()[:, 0], None if minus is None else minus.to_numpy()[:, 0])


# --- comparisons --------------------------------------------------------------------------------------------------------


def ranking(samples: Figures, better: str = "higher") -> pd.DataFrame:
    """One row per setting, the best first: runs (seeds), samples, mean with its interval, and the range of the runs' means."""
    rows = {}
    for setting, sample in samples.items():
        by_run = sample.mean(axis="columns")
        ends = (by_run.min(), by_run.max()) if better == "higher" else (by_run.max(), by_run.min())
        rows[setting] = {"runs": len(sample), "samples": sample.shape[1], **pooled(sample)._asdict()}
        rows[setting] |= dict(zip(("worst_run", "best_run"), ends, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("mean", ascending=better == "lower")


def differences(samples: Figures, minus: pd.DataFrame, skip: Sequence[str] = ()) -> dict[str, Interval]:
    """Each setting − `minus`, paired by sample; settings that have no sample in common with it are left out."""
    found = {name: pooled(sample, minus) for name, sample in samples.items() if name not in skip}
    return {name: interval for name, interval in found.items() if interval.mean == interval.mean}


def parts(tables: SweepTables, policy: str) -> pd.DataFrame:
    """By setting, the means of the parts of the policy's scores."""
    rows = tables.results[tables.results["policy"] == policy]
    further = rows.columns.difference([*KEYS, "seed", "setting"], sort=False)
    return rows.groupby("setting", sort=False)[list(further)].mean()


def chosen(tables: SweepTables, samples: Figures, better: str = "higher", by: str = "") -> tuple[str, str]:
    """The best setting, and by what: the metric `by` of the runs where every run has it, else the figures compared themselves.

    Choosing by the test and then reporting that test's figure flatters the setting; by validation it does not.
    """
    pick: Literal["idxmax", "idxmin"] = "idxmax" if better == "higher" else "idxmin"
    compared = tables.points[tables.points["setting"].isin(list(samples))]
    if by in numeric_metrics(compared) and compared[METRIC + by].notna().all():
        return str(getattr(compared.groupby("setting")[METRIC + by].mean(), pick)()), by
    means = pd.Series({name: float(sample.to_numpy().mean()) for name, sample in samples.items()})
    return str(getattr(means, pick)()), "the figures compared"


def effect(tables: SweepTables, samples: Figures, parameter: str) -> pd.DataFrame:
    """The effect of one parameter, all others held: a row per value with mean, low, high over combinations of the others, seeds and
    samples; difference, difference_low and difference_high to the first value; combinations (how many), and each one's mean.

    Only combinations that were run with all values count, with the seeds and samples that they share, so that nothing but the
    parameter differs between the rows. Empty if there is none.
    """
    others = [PARAMETER + name for name in tables.varied if name != parameter]
    points = tables.points[tables.points["setting"].isin(list(samples))].drop_duplicates("setting")
    values = points[PARAMETER + parameter].fillna("default")
    order = list(dict.fromkeys(values))
    groups = points.groupby(others, dropna=False, sort=False) if others else [((), points)]
    parts = [part.set_index(values[part.index])["setting"] for _, part in groups]
    complete = [part for part in parts if len(part) == len(order)]
    every = [samples[name] for settings in complete for name in settings]
    if len(order) < 2 or not every:
        return pd.DataFrame()
    seeds = [seed for seed in every[0].index if all(seed in one.index for one in every)]
    names = [name for name in every[0] if all(name in one for one in every)]
    if not seeds or not names:
        return pd.DataFrame()
    rows, first = [], None
    for value in order:
        each = [samples[settings[value]].loc[seeds, names] for settings in complete]
        mean = sum(each[1:], each[0]) / len(each)
        change = NOTHING if first is None else pooled(mean, first)
        first = mean if first is None else first
        row = {"value": value, **pooled(mean)._asdict(), "difference": change.mean, "difference_low": change.low}
        row |= {"difference_high": change.high, "combinations": len(each)}
        rows.append(row | {"each": [float(one.to_numpy().mean()) for one in each]})
    rows[0]["difference"] = 0.0
    return pd.DataFrame(rows)


# --- plots --------------------------------------------------------------------------------------------------------------


def plot_ranking(
    samples: Figures, baselines: Figures, better: str, best: str = "", what: str = "", ax: Axes | None = None
) -> Axes:
    """A mean with its interval for each setting, the best on top, each seed as a small mark; baselines in grey below."""
    table, below = ranking(samples, better), ranking(baselines, better) if baselines else pd.DataFrame()
    names = [*table.index, *below.index][::-1]
    ax = ax or plt.subplots(figsize=(9, 0.42 * len(names) + 1.4), layout="constrained")[1]
    for row, name in enumerate(names):
        ours = name in table.index
        mean, low, high = (table if ours else below).loc[name, ["mean", "low", "high"]]
        color = GREEN if name == best else BLUE if ours else "0.5"
        ax.plot([low, high], [row, row], color=color, linewidth=2)
        ax.plot(mean, row, "o" if ours else "s", color=color)
        if ours and len(samples[name]) > 1:
            by_run = samples[name].mean(axis="columns").to_numpy()
            ax.plot(by_run, np.full(len(by_run), row + 0.2), "|", color=color, markersize=7)
        elif not ours:
            ax.axvline(mean, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(names)), [f"{name} (chosen)" if name == best else name for name in names])
    ax.set(xlabel=f"{what}, 95 % interval (| one run)", ylim=(-0.7, len(names) - 0.3), title="Settings")
    return ax


def plot_effects(effects: Mapping[str, pd.DataFrame], what: str) -> np.ndarray:
    """A panel per parameter: the change from its first value, paired, with its interval; thin lines are combinations of the others.

    Returns the axes [lines, columns].
    """
    columns = min(3, max(1, len(effects)))
    lines = max(1, math.ceil(len(effects) / columns))
    size = (4.2 * columns, 3.3 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax in axes.flat[len(effects) :]:
        ax.set_visible(False)
    for ax, (name, table) in zip(axes.flat, effects.items(), strict=False):
        ax.axhline(0, color="k", linewidth=0.8)
        for each in zip(*table["each"], strict=True):
            ax.plot(range(len(table)), np.array(each) - each[0], color="0.75", linewidth=1, marker=".", zorder=1)
        change = table["difference"].to_numpy()
        reach = np.array([change - table["difference_low"], table["difference_high"] - change], dtype=float)
        ax.errorbar(range(len(table)), change, np.nan_to_num(reach), color=BLUE, marker="o", capsize=4, linewidth=1.8)
        ax.set_xticks(range(len(table)), [str(value) for value in table["value"]])
        ax.set(xlabel=name, xlim=(-0.4, len(table) - 0.6))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"change of {what}", fontsize=9)
    figure.suptitle("Change from the first value, other parameters held (grey: each combination of them)", fontsize=10)
    return axes


def summary(
    tables: SweepTables,
    ranked: pd.DataFrame,
    against: Mapping[str, Interval],
    choice: tuple[str, str],
    what: str,
    baseline: str,
) -> str:
    """The end of a headless run: the settings in order, their difference to the baseline, the one chosen, what failed."""
    intervals = [
        f"[{low:.3f}, {high:.3f}]" if low == low else "one run" for low, high in ranked[["low", "high"]].to_numpy()
    ]
    shown = pd.DataFrame({"runs": ranked["runs"], "mean": ranked["mean"].round(4), "interval": intervals})
    if against:
        shown[f"− {baseline}"] = [str(against.get(str(name), "")) for name in ranked.index]
    lines = [
        f"{tables.name}: {what}, 95 % interval",
        "",
        shown.to_string(),
        "",
        f"chosen: {choice[0]} (by {choice[1]})",
    ]
    if len(tables.failed):
        names = ", ".join(dict.fromkeys(tables.failed["setting"]))
        lines.append(f"failed and not compared ({len(tables.failed)}): {names}")
    return "\n".join(lines)
