"""Tables of a comparison, and the run that a diagnosis looks at, read from the notebooks' run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from netllm_lib import stats
from netllm_lib.abr import qoe
from netllm_lib.abr.diagnose import Evidence, Finding
from netllm_lib.abr.pool import load_pool
from netllm_lib.runs import read_json


def league(tables: Mapping[str, pd.DataFrame], seconds: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per policy: mean reward with its 95 % interval over traces, the worst 5 % of traces, and the parts of QoE."""
    rows = {}
    for name, table in tables.items():
        quality = qoe.summarise(table)
        by_trace = qoe.per_trace(table)["reward"].to_numpy()
        interval = stats.bootstrap(by_trace)
        rows[name] = {
            "reward": quality.reward,
            "low": interval.low,
            "high": interval.high,
            "worst_5%": float(stats.worst_mean(0.05)(by_trace)),
            "bitrate_mbps": quality.bitrate_mbps,
            "rebuffer_s": quality.rebuffer_s,
            "smoothness_mbps": quality.smoothness_mbps,
        }
        if seconds:
            rows[name]["seconds"] = seconds[name]
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("reward", ascending=False)


def trace_gaps(ours: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Per trace, worst first: difference of the mean reward and what each part adds to it (reward per chunk)."""
    gap = qoe.per_trace(ours) - qoe.per_trace(baseline)
    gap["rebuffering"] *= -1
    gap["smoothness"] *= -1
    return gap.sort_values("reward")


def timeline_policies(tables: Mapping[str, pd.DataFrame], subject: str, baseline: str, count: int = 3) -> list[str]:
    """The run, its baseline, and the next best policies: at most `count` names, to keep a timeline legible."""
    ranked = sorted(tables, key=lambda name: -qoe.summarise(tables[name]).reward)
    return list(dict.fromkeys([subject, baseline, *ranked]))[:count]


def load_run(test_dir: Path, train_dir: Path | None = None, pool_dir: Path | None = None) -> Evidence:
    """What the notebooks 03, 04 and 05 left behind, as evidence for a diagnosis. Raises FileNotFoundError naming the file."""
    setting = read_json(test_dir / "setting.json")
    tables = {name: pd.read_parquet(test_dir / "tables" / f"{name}.parquet") for name in setting["order"]}
    return Evidence(
        tables=tables,
        run="llm" if "llm" in tables else setting["order"][0],
        handicapped=tuple(name for name in tables if name.endswith("(original)")),
        pool=load_pool(pool_dir / "pool.npz") if pool_dir else None,
        training=read_json(train_dir / "metrics.json") if train_dir else {},
        clean=np.array(setting["clean"]),
        setting=setting,
    )


def summary(table: pd.DataFrame, findings: Sequence[Finding], setting: Mapping[str, object], top: int = 3) -> str:
    """The end of a headless run: who got how much, and the first things to fix."""
    lines = [f"{setting['traces']}, {setting['video']}: mean reward per chunk, 95 % interval over traces", ""]
    header = f"{'policy':20} {'reward':>7}  {'interval':16} {'Mbps':>6} {'stall s':>8} {'|ΔMbps|':>8}"
    lines += [header, "-" * len(header)]
    for name, row in table.iterrows():
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        parts = f"{row['bitrate_mbps']:6.3f} {row['rebuffer_s']:8.4f} {row['smoothness_mbps']:8.3f}"
        lines.append(f"{name!s:20} {row['reward']:7.4f}  {interval:16} {parts}")
    lines += ["", "Findings" if findings else "No findings."]
    lines += [f"{number}. {finding}" for number, finding in enumerate(findings[:top], 1)]
    if len(findings) > top:
        lines.append(f"… and {len(findings) - top} more in the report")
    return "\n".join(lines)
