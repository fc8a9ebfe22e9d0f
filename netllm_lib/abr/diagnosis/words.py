"""A diagnosis in words and tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from netllm_lib.findings import Diagnosis


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


def summary(league: pd.DataFrame, diagnosis: Diagnosis, setting: Mapping[str, object], top: int = 3) -> str:
    """The end of a headless run: who got how much, and the first things to fix."""
    where = f"{setting.get('traces', 'unknown traces')}, {setting.get('video', 'unknown video')}"
    scores = league.drop(columns="seconds", errors="ignore").dropna(axis=1, how="all")
    found = diagnosis.findings
    lines = [f"{where}: mean reward per chunk, 95 % interval over traces", ""]
    lines += [scores.to_string(float_format="{:.4f}".format), "", "Findings" if found else "No findings."]
    lines += [f"{number}. {finding}" for number, finding in enumerate(found[:top], 1)]
    lines += [f"… and {len(found) - top} more in the report"] if len(found) > top else []
    return "\n".join(lines)
