"""Tables of a comparison, their files, and the words at the end of a headless run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from netllm_lib import runs, stats
from netllm_lib.abr import qoe
from netllm_lib.abr.traces import TraceSet, Video

if TYPE_CHECKING:
    from netllm_lib.abr.diagnosis import Diagnosis, Evidence
    from netllm_lib.abr.policies.base import Policy

SETTING, TABLES = "setting.json", "tables"


def league(
    tables: Mapping[str, pd.DataFrame],
    seconds: Mapping[str, float] | None = None,
    clean: np.ndarray | None = None,
) -> pd.DataFrame:
    """One row per policy, the best first: mean reward with its 95 % interval over traces, the mean of the middle half of the traces
    (iqm) and of the worst 5 %, and the parts of QoE.

    `clean` [traces] marks those that share no content with the training traces; reward_clean is the mean over them (NaN for a
    policy that played other traces).
    """
    rows = {}
    for name, table in tables.items():
        quality = qoe.summarise(table)
        by_trace = qoe.per_trace(table)["reward"].to_numpy()
        interval = stats.bootstrap(by_trace)
        rows[name] = {
            "reward": quality.reward,
            "low": interval.low,
            "high": interval.high,
            "iqm": float(stats.interquartile_mean(by_trace)),
            "worst_5%": float(stats.worst_mean(0.05)(by_trace)),
            "bitrate_mbps": quality.bitrate_mbps,
            "rebuffer_s": quality.rebuffer_s,
            "smoothness_mbps": quality.smoothness_mbps,
        }
        if clean is not None:
            fits = len(clean) == len(by_trace) and bool(clean.any())
            rows[name]["reward_clean"] = float(by_trace[clean].mean()) if fits else float("nan")
        if seconds:
            rows[name]["seconds"] = seconds[name]
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("reward", ascending=False)


def against(tables: Mapping[str, pd.DataFrame], subject: str) -> dict[str, float]:
    """Traces, each policy's reward, and the paired difference to each other one: "− mpc", "− mpc low", "− mpc high"."""
    by_trace = {name: qoe.per_trace(table)["reward"] for name, table in tables.items()}
    found: dict[str, float] = {"traces": len(by_trace[subject])}
    found |= {name: float(rewards.mean()) for name, rewards in by_trace.items()}
    for name in tables:
        if name != subject:
            difference = stats.bootstrap((by_trace[subject] - by_trace[name]).to_numpy())
            found |= {f"− {name}": difference.mean, f"− {name} low": difference.low, f"− {name} high": difference.high}
    return found


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


# --- a test's files -----------------------------------------------------------------------------------------------------


def setting_of(
    traces: TraceSet,
    video: Video,
    policy: str = "",
    player: Policy | None = None,
    *,
    train_traces: str = "",
    clean: np.ndarray | None = None,
    seed: int = 100003,
) -> dict[str, Any]:
    """All that decides what a test of a whole trace set in fixed order shows, so that a diagnosis can play it again.

    `policy` is the folder of the fine-tuned policy, whose checkpoint is named by the hash of its files; `player`, which plays it,
    tells how levels were chosen and what the context was (the fields of `EvalConfig`).
    """
    setting: dict[str, Any] = {"traces": traces.name, "video": video.name, "trace_num": len(traces), "fixed": True}
    setting |= {"traces_hash": traces.content_hash, "video_hash": video.content_hash}
    setting |= {"train_traces": train_traces or None, "seed": seed, "clean": clean}
    if player is not None:
        setting |= runs.plain(getattr(player, "config", {}))
    if policy:
        folder = Path(policy)
        inner = folder / "policy" if (folder / "policy").is_dir() else folder
        setting |= {"policy": policy, "policy_hash": runs.tree_hash(inner)}
    return setting


def save_test(folder: Path, tables: Mapping[str, pd.DataFrame], setting: Mapping[str, Any]) -> None:
    """Write `setting.json` and `tables/<policy>.parquet`: what `diagnosis.load` reads."""
    for name, table in tables.items():
        with runs.atomic_path(folder / TABLES / f"{name}.parquet") as aside:
            table.to_parquet(aside)
    runs.write_json(folder / SETTING, {**setting, "order": list(tables)})


def with_runs(evidence: Evidence, folders: Sequence[str | Path], data: str | None = None) -> Evidence:
    """The evidence with the runs of other folders beside its own tables, named after their folders, for comparisons.

    Raises ValueError for a run that was not tested on the same traces.
    """
    from netllm_lib.abr.diagnosis import load as sources

    tables = dict(evidence.tables)
    for folder in folders:
        other = sources.load(folder, data=data)
        if other.table is None:
            raise ValueError(f"{folder}: it holds no test, there is nothing to compare")
        if evidence.table is not None and set(other.table["trace"]) != set(evidence.table["trace"]):
            raise ValueError(f"{folder}: it was tested on other traces than {evidence.run}")
        place = Path(folder)
        name = place.name if place.name not in tables else f"{place.parent.name}/{place.name}"
        tables[name] = other.table
    return replace(evidence, tables=tables)


# --- words --------------------------------------------------------------------------------------------------------------


def headline(diagnosis: Diagnosis) -> str:
    """The diagnosis without its findings: reward, what it is compared with, and what is not there."""
    lines = str(replace(diagnosis, findings=())).splitlines()
    return "\n".join(line for line in lines if not (diagnosis.findings and line == "nothing found"))


def findings_table(diagnosis: Diagnosis) -> pd.DataFrame:
    """The findings as a table for people: what was found, by which numbers and rule, the fix, and what it is worth."""
    rows = [
        {
            "severity": finding.severity,
            "id": finding.id,
            "found": finding.title,
            "evidence": "; ".join(
                f"{name} {_brief(value)}" for name, value in finding.evidence.items() if value is not None
            ),
            "rule": finding.rule,
            "fix": finding.fix,
            "worth": str(finding.effect or "not measured"),
        }
        for finding in diagnosis.findings
    ]
    columns = ["severity", "id", "found", "evidence", "rule", "fix", "worth"]
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
    lines = [f"{where}: mean reward per chunk, 95 % interval over traces", ""]
    clean = "reward_clean" in table and bool(table["reward_clean"].notna().any())
    header = f"{'policy':20} {'reward':>7}  {'interval':16} {'iqm':>7} {'worst 5%':>8} {'Mbps':>6} {'stall s':>8} {'|ΔMbps|':>8}"
    header += f" {'clean':>7}" if clean else ""
    lines += [header, "-" * len(header)]
    for name, row in table.iterrows():
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        tail = f"{row['iqm']:7.4f} {row['worst_5%']:8.4f}"
        parts = f"{row['bitrate_mbps']:6.3f} {row['rebuffer_s']:8.4f} {row['smoothness_mbps']:8.3f}"
        line = f"{name!s:20} {row['reward']:7.4f}  {interval:16} {tail} {parts}"
        lines.append(line + (f" {row['reward_clean']:7.4f}" if clean else ""))
    found = diagnosis.findings
    lines += ["", "Findings" if found else "No findings."]
    lines += [f"{number}. {finding}" for number, finding in enumerate(found[:top], 1)]
    if len(found) > top:
        lines.append(f"… and {len(found) - top} more in the report")
    return "\n".join(lines)
