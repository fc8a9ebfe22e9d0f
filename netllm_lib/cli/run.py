"""`netllm run`: a notebook, or a pipeline of them, headless.

Exit codes: 0 done; 1 a step failed (those that need it are skipped, the others were run); 2 the request was wrong, or a gate could
not be judged; 3 a gate failed. Where several are true, the first of 1, 2, 3. The JUnit file and the line of JSON are written
in all of these cases, except where the request is refused before anything runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from netllm_lib.cli.options import JsonOption, echo, print_json

GATE_FAILED = 3


def run(
    target: Annotated[str, typer.Argument(metavar="NOTEBOOK|PIPELINE.toml", help="A path, 03_experience_pool, or 03.")],
    parameters: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="KEY VALUE", help="STEP.KEY for one step only.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is there already.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Limit for each notebook; 0: none [3600, or the step's].")
    ] = None,
    fail_below: Annotated[
        list[str] | None, typer.Option(metavar="BASELINE", help="Exit with 3 unless the test is as good as mpc, …")
    ] = None,
    margin: Annotated[float | None, typer.Option(metavar="X", help="By which it may be below the baseline.")] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", dir_okay=False, help="Write JUnit XML, for CI.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a notebook, or a pipeline of them, headless.

    Results go to reports/runs/; reports/index.html lists them.
    """
    from netllm_lib import gate, pipelines
    from netllm_lib import junit as junit_xml
    from netllm_lib.reports import update_index

    read = pipelines.read_pipeline if target.endswith(".toml") else pipelines.single
    pipeline = read(target, dict(item.split("=", 1) for item in parameters or []))
    gates = gate.read_gates(pipeline.gate, target, [step.name for step in pipeline.step], fail_below or [], margin)

    outcomes = pipelines.run_steps(pipeline, timeout_s=timeout, force=force, echo=echo)
    update_index()
    verdicts = gate.judge(gates, {one.name: one.run.folder if one.run else None for one in outcomes})
    for verdict in verdicts:
        echo(f"gate {verdict.state}: {verdict.reason}")
    if junit is not None:
        junit_xml.write(junit, pipeline.name, outcomes, verdicts)
    steps: list[dict[str, Any]] = []
    for one in outcomes:
        step = {"name": one.name, "state": one.state, "run": one.folder, "seconds": round(one.seconds, 1)}
        steps.append({**step, "metrics": one.run and one.run.metrics, "problem": one.problem or None})
    print_json(as_json, {"name": pipeline.name, "steps": steps, "gates": [verdict.plain() for verdict in verdicts]})
    pipelines.raise_failures(pipeline.name, outcomes)
    if unclear := [verdict.reason for verdict in verdicts if verdict.state == "error"]:
        raise ValueError("; ".join(unclear))
    if failed := [verdict.reason for verdict in verdicts if verdict.state == "failed"]:
        print(f"netllm: gate failed: {'; '.join(failed)}", file=sys.stderr)
        raise typer.Exit(GATE_FAILED)
