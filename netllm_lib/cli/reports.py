"""`netllm reports`: what was run so far."""

from __future__ import annotations

import json

from netllm_lib.cli.options import JsonOption


def reports(as_json: JsonOption = False) -> None:
    """List all runs, the last one first, and write reports/index.html."""
    from netllm_lib import runs
    from netllm_lib.reports import list_runs, write_index

    rows = list_runs()
    for row in rows:
        score = "" if row["score"] is None else f"{row['policy']} {row['score']:.4f}"
        words = (
            (row["finished"] or "")[:16],
            f"{row['state']:8}",
            f"{row['kind']}/{row['run']}",
            score,
            row["first finding"] or "",
        )
        print("  ".join(words).rstrip())
    print(f"{len(rows)} runs: {write_index()}")
    if as_json:
        print(json.dumps(runs.plain(rows)))
