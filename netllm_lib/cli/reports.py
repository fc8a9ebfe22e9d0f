"""`netllm reports`: what was run so far."""

from __future__ import annotations

import json

from netllm_lib.cli.options import JsonOption


def reports(as_json: JsonOption = False) -> None:
    """List all runs, the last one first, and write reports/index.html."""
    from netllm_lib import runs
    from netllm_lib.index import COLUMNS, overview, write_index

    rows = overview()
    for row in rows:
        reward = "" if row["reward"] is None else f"{row['policy']} {row['reward']:.4f}"
        print(
            f"{row['finished'][:16]}  {row['state']:8} {row['kind']}/{row['run']}  {reward}  {row['first finding'] or ''}".rstrip()
        )
    print(f"{len(rows)} runs: {write_index()}")
    if as_json:
        print(json.dumps(runs.plain([{name: row[name] for name in (*COLUMNS, "folder", "report")} for row in rows])))
