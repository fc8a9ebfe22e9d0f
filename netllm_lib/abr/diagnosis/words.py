"""A diagnosis in words and tables, and the runs that are shown beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe

if TYPE_CHECKING:
    from netllm_lib.abr.diagnosis import Diagnosis, Evidence


def trace_gaps(ours: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Per trace that both played, worst first: difference of the mean reward and what each part adds to it (reward per chunk)."""
    gap = (qoe.per_trace(ours) - qoe.per_trace(baseline)).dropna()
    gap["rebuffering"] *= -1
    gap["smoothness"] *= -1
    return gap.sort_values("reward")


def timeline_policies(tables: Mapping[str, pd.DataFrame], subject: str, baseline: str, count: int = 3) -> list[str]:
    """The run, its baseline, and the next best policies: at most `count` names, to keep a timeline legible."""
    ranked = sorted(tables, key=lambda name: -qoe.summarise(tables[name]).reward)
    return list(dict.fromkeys([subject, baseline, *ranked]))[:count]


def with_runs(evidence: Evidence, folders: Sequence[str | Path], data: str | None = None) -> Evidence:
    """The evidence with the runs of other folders beside its own tables, named after their folders, for comparisons.

    Raises ValueError for a run that was not tested on the same traces.
    """
    from netllm_lib.abr.diagnosis.load import load

    assert evidence.test is not None and evidence.table is not None  # noqa: PT018
    tables = dict(evidence.tables)
    for folder in folders:
        other = load(folder, data=data)
        if other.table is None:
            raise ValueError(f"{folder}: it holds no test, there is nothing to compare")
        if set(other.table["trace"]) != set(evidence.table["trace"]):
            raise ValueError(f"{folder}: it was tested on other traces than {evidence.run}")
        place = Path(folder)
        name = place.name if place.name not in tables else f"{place.parent.name}/{place.name}"
        tables[name] = other.table
    return replace(evidence, test=replace(evidence.test, tables=tables))


def findings_table(diagnosis: Diagnosis) -> pd.DataFrame:
    """The findings as a table for people: what was found, by which numbers and rule, the fix, and its effect."""
    columns = ["severity", "id", "found", "evidence", "rule", "fix", "effect of the fix"]
    rows = []
    for f in diagnosis.findings:
        numbers = "; ".join(f"{name} {_brief(value)}" for name, value in f.evidence.items() if value is not None)
        rows.append((f.severity, f.id, f.title, numbers, f.rule.should, f.fix, str(f.effect or "not measured")))
    return pd.DataFrame(rows, columns=columns, index=pd.RangeIndex(1, len(rows) + 1))


def _brief(value: object) -> str:
    """A value, or the first of a list, in a few characters."""
    if isinstance(value, float | np.floating):
        return f"{value:.3g}"
    if isinstance(value, list | tuple | np.ndarray):
        shown = [_brief(item) for item in value[:6]]
        return f"[{', '.join(shown)}{', …' if len(value) > 6 else ''}]"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def summary(table: pd.DataFrame, diagnosis: Diagnosis, setting: Mapping[str, object], top: int = 3) -> str:
    """The end of a headless run: who got how much, and the first things to fix."""
    where = f"{setting.get('traces', 'unknown traces')}, {setting.get('video', 'unknown video')}"
    columns = [
        "reward",
        "low",
        "high",
        "iqm",
        "worst_5%",
        "bitrate_mbps",
        "rebuffer_s",
        "smoothness_mbps",
        "reward_clean",
    ]
    shown = table[[name for name in columns if name in table and table[name].notna().any()]]
    lines = [
        f"{where}: mean reward per chunk, 95 % interval over traces",
        "",
        shown.to_string(float_format="{:.4f}".format),
    ]
    found = diagnosis.findings
    lines += ["", "Findings" if found else "No findings."]
    lines += [f"{number}. {finding}" for number, finding in enumerate(found[:top], 1)]
    return "\n".join([*lines, *([f"… and {len(found) - top} more in the report"] if len(found) > top else [])])
