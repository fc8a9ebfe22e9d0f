"""`netllm reports`: what was run so far."""

from netllm_lib.cli.options import JsonOption, print_json


def reports(as_json: JsonOption = False) -> None:
    """List all runs, the last one first, and write reports/index.html."""
    from netllm_lib.reports import list_runs, write_index

    rows = list_runs()
    for row in rows:
        score = "" if row["score"] is None else f"{row['policy']} {row['score']:.4f}"
        finished, finding = (row["finished"] or "")[:16], row["first finding"] or ""
        print("  ".join([finished, f"{row['state']:8}", f"{row['kind']}/{row['run']}", score, finding]).rstrip())
    print(f"{len(rows)} runs: {write_index()}")
    print_json(as_json, rows)
