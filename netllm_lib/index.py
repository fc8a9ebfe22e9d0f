"""All runs of a reports folder in one table, and as the page `reports/index.html`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from netllm_lib import runs
from netllm_lib.notebooks import REPORT
from netllm_lib.reports import Link, table_page

INDEX = "index.html"
BASELINES = ("mpc", "mpc (original)")
COLUMNS = (
    *("run", "kind", "state", "policy", "reward", "low", "high"),
    *(f"− {name}" for name in (*BASELINES, "optimum")),
    *("first finding", "seconds", "finished"),
)


def overview(root: Path | None = None) -> list[dict[str, Any]]:
    """One row per run folder below `root` (by default the reports folder), the last one first.

    Keys: `COLUMNS`, then `folder` and `report` (paths; report is None where there is no page). Rewards are means per chunk with
    their 95 % interval; "− mpc" and the like are differences of means over the same traces. What a run does not tell is None.
    """
    folders = sorted(
        {path.parent for name in (runs.MANIFEST, "metrics.json") for path in _runs(root).glob(f"*/*/{name}")}
    )
    rows = [_row(folder) for folder in folders if not folder.name.startswith(".")]
    return sorted(rows, key=lambda row: row["finished"], reverse=True)


def write_index(root: Path | None = None) -> Path:
    """Write `index.html` into the reports folder and return its path. It shows what lies there now."""
    page = (root or runs.reports_root()) / INDEX
    rows = []
    for row in overview(root):
        shown = {name: row[name] for name in COLUMNS} | {"finished": row["finished"][:16].replace("T", " ")}
        if row["report"] is not None:
            shown["run"] = Link(row["run"], quote(os.path.relpath(row["report"], page.parent)))
        rows.append(shown)
    text = (
        "Mean reward per chunk with its 95 % interval over traces; differences are over the same traces. "
        "A click on a column's head sorts; a run's name opens its report."
    )
    with runs.atomic_path(page) as aside:
        aside.write_text(table_page("Runs", text, rows), encoding="utf-8")
    return page


def _runs(root: Path | None) -> Path:
    return (root or runs.reports_root()) / "runs"


def _row(folder: Path) -> dict[str, Any]:
    manifest, metrics = (_read(folder / name) for name in (runs.MANIFEST, "metrics.json"))
    state = manifest.get("status", "by hand" if metrics else "unreadable")
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"run": folder.name, "kind": folder.parent.name, "state": state, "seconds": manifest.get("seconds")}
    row |= {"finished": manifest.get("finished") or manifest.get("started") or ""}
    row |= _rewards(metrics)
    findings = metrics.get("findings")
    if isinstance(findings, list) and findings:
        row["first finding"] = str(findings[0])
    report = folder / REPORT
    return {name: _finite(value) for name, value in row.items()} | {
        "folder": folder,
        "report": report if report.is_file() else None,
    }


def _rewards(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Policy, reward, interval and differences, as far as a notebook's (or an import's) metrics tell them."""
    found: dict[str, Any] = {}
    if isinstance(league := metrics.get("policies"), Mapping) and league:  # notebook 05
        name = "llm" if "llm" in league else max(league, key=lambda policy: league[policy]["reward"])
        found |= {"policy": name, **{key: league[name][key] for key in ("reward", "low", "high")}}
        found |= {f"− {other}": found["reward"] - league[other]["reward"] for other in BASELINES if other in league}
    elif isinstance(rewards := metrics.get("reward"), Mapping) and metrics.get("run") in rewards:  # notebook 06
        found |= {"policy": metrics["run"], "reward": rewards[metrics["run"]]}
        found |= dict(zip(("low", "high"), metrics.get("interval") or (), strict=False))
        differences = {key.rpartition(" − ")[2]: interval for key, interval in metrics.get("differences", {}).items()}
        found |= {f"− {other}": differences[other][0] for other in BASELINES if other in differences}
        regret = metrics.get("regret")
        found["− optimum"] = None if regret is None else -regret
    elif str(metrics.get("what")).startswith("mean reward") and "best_interval" in metrics:  # notebook 08
        found |= dict(zip(("reward", "low", "high"), metrics["best_interval"], strict=True)) | {
            "policy": metrics["best"]
        }
        name, against = metrics.get("baseline"), metrics.get("minus_baseline", {}).get(metrics["best"])
        if name in BASELINES and against:
            found[f"− {name}"] = against[0]
    elif isinstance(means := metrics.get("mean_reward"), Mapping) and means:  # an import
        name = next(iter(means))
        found |= {"policy": name, "reward": means[name]}
    return found


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is none or it is broken: one bad folder must not hide the others."""
    try:
        value = runs.read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
