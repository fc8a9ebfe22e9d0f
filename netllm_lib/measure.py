"""What a task reports: a measure, its value for every policy and sample, and the statistics over them.

Gates, comparisons of sweeps and the index of runs read `Scores` and nothing else, so they work for any task: for a reward, which
is better when it is higher, as for an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from netllm_lib import config, runs, stats
from netllm_lib.stats import Interval

FILE, TABLE = "scores.json", "scores.parquet"


@dataclass(frozen=True)
class Measure:
    """A figure by which policies are compared."""

    name: str  # also the column of a table that holds it
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    sample: str = "trace"  # what is drawn, and what pairs two policies; also the column of a table that names it

    @property
    def sign(self) -> int:
        """1 if higher is better, −1 if lower is."""
        return 1 if self.better == "higher" else -1

    def gain(self, difference: Interval) -> Interval:
        """A difference with its sign turned so that above zero is better."""
        mean, low, high = difference
        return difference if self.sign > 0 else Interval(-mean, -high, -low)


@dataclass(frozen=True)
class _About:
    """`scores.json`."""

    measure: Measure
    subject: str = ""
    tested_on: str = ""
    headline: dict[str, str | float | None] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> _About:
        return config.parse(_About, runs.read_json(folder / FILE), str(folder / FILE))


@dataclass(frozen=True, eq=False)
class Scores:
    """What a test measured. ValueError for a table that is not as described."""

    measure: Measure
    subject: str
    """The policy that the run is about; empty if it tested only others."""
    table: pd.DataFrame
    """One row per policy and sample: columns policy, that of the sample, that of the measure, and further numbers, the parts
    (NaN where a part does not apply to a sample)."""
    tested_on: str = ""
    """The test set in words; scores on two different ones have no sample in common, whatever their samples' names."""

    def __post_init__(self) -> None:
        keys = ["policy", self.measure.sample]
        if missing := [name for name in (*keys, self.measure.name) if name not in self.table]:
            there = ", ".join(map(str, self.table))
            raise ValueError(f"a table of scores has no column {', '.join(missing)}; it has: {there}")
        if self.measure.name in keys or not self.table.columns.is_unique:
            raise ValueError(f"columns of a table of scores have the same name: {', '.join(map(str, self.table))}")
        if not pd.api.types.is_numeric_dtype(self.table[self.measure.name]):
            raise ValueError(f"the scores in {self.measure.name} are no numbers")
        if len(twice := self.table[self.table.duplicated(keys)]):
            raise ValueError(f"scores of the same {self.measure.sample} are there twice: {list(twice[keys].iloc[0])}")
        if self.subject:
            self.of(self.subject)

    @property
    def policies(self) -> list[str]:
        """In the order of the table."""
        return [str(name) for name in self.table["policy"].unique()]

    def of(self, policy: str) -> pd.Series:
        """The measure by sample, in the order of the table. ValueError if there is no such policy."""
        rows = self.table[self.table["policy"] == policy]
        if rows.empty:
            hint = config.did_you_mean(policy, self.policies)
            raise ValueError(f"there are no scores of {policy!r}{hint}; tested: {', '.join(self.policies)}")
        return rows.set_index(self.measure.sample)[self.measure.name]

    def mean(self, policy: str) -> Interval:
        """The mean with its 95 % interval over samples."""
        return stats.bootstrap(self.of(policy).to_numpy())

    def difference(self, policy: str, other: str) -> Interval:
        """Mean of policy − other over the samples that both have, paired, with its 95 % interval. ValueError if there is none."""
        return stats.paired(self.of(policy), self.of(other))

    def league(self) -> pd.DataFrame:
        """A row per policy, the best first: the mean (named as the measure) with its interval (low, high), the means of the middle
        half of the samples (iqm) and of the worst 5 %, and the means of the parts."""
        name, sign, rows = self.measure.name, self.measure.sign, {}
        for policy, part in self.table.groupby("policy", sort=False):
            values = part[name].to_numpy(dtype=float)
            row = dict(zip((name, "low", "high"), stats.bootstrap(values), strict=True))
            row |= {"iqm": stats.interquartile_mean(values), "worst_5%": sign * stats.worst_mean(sign * values, 0.05)}
            rows[policy] = row | dict(part.drop(columns=["policy", self.measure.sample, name]).mean())
        return pd.DataFrame.from_dict(rows, orient="index").sort_values(name, ascending=sign < 0, kind="stable")

    def save(self, folder: Path) -> None:
        """Write `scores.json` and `scores.parquet`."""
        with runs.atomic_path(folder / TABLE) as aside:
            self.table.to_parquet(aside, index=False)
        runs.write_json(folder / FILE, _About(self.measure, self.subject, self.tested_on, self._headline()))

    def _headline(self) -> dict[str, Any]:
        """What the index shows: the subject (or the best policy), its mean, and its difference to the best other one."""
        best_first = sorted(self.policies, key=lambda policy: -self.measure.sign * float(self.of(policy).mean()))
        policy = self.subject or best_first[0]
        found: dict[str, Any] = {"policy": policy}
        with contextlib.suppress(ValueError):  # figures that are not finite, or policies that share no sample
            found |= dict(zip(("score", "low", "high"), self.mean(policy), strict=True))
            if others := [name for name in best_first if name != policy]:
                found |= {"best other": others[0], "difference": self.difference(policy, others[0]).mean}
        return found

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """What `save` wrote. FileNotFoundError if there is nothing, ValueError, with the file, if it is broken."""
        about, path = _About.read(folder), folder / TABLE
        try:
            return cls(about.measure, about.subject, pd.read_parquet(path), about.tested_on)
        except FileNotFoundError:
            raise
        except Exception as error:  # pyarrow has its own errors for each way of being broken
            raise ValueError(
                f"{path}: it cannot be read as a table of scores ({' '.join(str(error).split())})"
            ) from None


def tests(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Of some run folders, by name, those that hold a test of their own: not those that report on another one's (its parent)."""
    found = {name: folder for name, folder in folders.items() if (folder / FILE).is_file()}
    places = [folder.resolve() for folder in found.values()]
    parents = dict.fromkeys(found, Path())
    for name, folder in found.items():
        with contextlib.suppress(OSError, ValueError):  # a broken manifest names no parent
            parents[name] = runs.Run(folder).parents.get("test", Path())
    return {name: folder for name, folder in found.items() if parents[name] not in places}


def read_headline(folder: Path) -> dict[str, Any]:
    """Of the scores in a folder what the index shows, without reading their table. ValueError if the file is broken.

    Keys: measure, tested on, and, where they are known, policy, score, low, high, best other, difference.
    """
    about = _About.read(folder)
    return {"measure": about.measure.name, "tested on": about.tested_on, **about.headline}
