"""Commands that run notebooks headless: `netllm run`.

Exit codes: 0 done; 1 a step failed (those that need it are skipped, the others were run); 2 the request was wrong, or a gate could
not be judged; 3 a gate failed. Where several are true, the first of 1, 2, 3. The JUnit file and the line of JSON are written
in all of these cases, except where the request is refused before anything runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netllm_lib.cli.options import JsonOption, echo

if TYPE_CHECKING:
    from netllm_lib.gate import Gate, Verdict
    from netllm_lib.junit import Case
    from netllm_lib.pipelines import Outcome

GATE_FAILED = 3


def run(
    target: Annotated[str, typer.Argument(metavar="NOTEBOOK|PIPELINE.toml", help="A path, 03_experience_pool, or 03.")],
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="KEY VALUE", help="A notebook's parameter; STEP.KEY for one step only."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is there already.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Limit for each notebook; 0 for none [3600, or the step's].")
    ] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="Jupyter kernel [the notebook's own].")] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BASELINE",
            help="Exit with 3 unless the test shows the policy as good as mpc, bba, … [the file's gate].",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(metavar="REWARD", help="What may be lost to the baseline, by the worse end of the interval [0]."),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write steps and gates as JUnit XML, for CI.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a notebook, or a pipeline of them, headless.

    Results go to reports/runs/; reports/index.html lists them.
    """
    from netllm_lib import notebooks, pipelines
    from netllm_lib.reports import write_index

    given = dict(item.split("=", 1) for item in parameters or [])
    if junit is not None and junit.is_dir():
        raise ValueError(f"--junit {junit}: that is a folder; name a file in it, such as {junit / 'junit.xml'}")
    if target.endswith(".toml"):
        if kernel is not None:
            raise ValueError("--kernel is for a single notebook: the notebooks of a pipeline name their own")
        pipeline = pipelines.read_pipeline(target, given)
    else:
        source, declared, _ = notebooks.open_notebook(target)
        step = pipelines.Step(source.stem, source, notebooks.fit_parameters(declared, given, source.stem))
        pipeline = pipelines.Pipeline(source.stem, (step,))
    gates: list[Gate] = []
    if pipeline.gate is not None or fail_below or margin is not None:
        from netllm_lib import gate

        gates = [*gate.override(gate.read_gates(pipeline.gate, target), fail_below or [], margin)]
        gate.check(gates, [step.name for step in pipeline.steps])

    started = time.time()
    outcomes: Sequence[Outcome]
    if target.endswith(".toml"):
        outcomes = pipelines.run_steps(pipeline, timeout_s=timeout, force=force, echo=echo)
    else:
        limit = notebooks.TIMEOUT_S if timeout is None else timeout
        settings: dict[str, Any] = {"kernel": kernel, "timeout_s": limit, "force": force, "echo": echo}
        outcomes = [pipelines.attempt(step.name, lambda: notebooks.run_notebook(source, step.parameters, **settings))]
        if outcomes[0].run:
            echo(str(outcomes[0]))
            pipelines.report_on(outcomes[0], echo)
    write_index()
    verdicts: Sequence[Verdict] = ()
    if gates:
        verdicts = gate.judge(
            gates, {outcome.name: outcome.run.folder if outcome.run else None for outcome in outcomes}
        )
    for verdict in verdicts:
        echo(f"gate {verdict.state}: {verdict.reason}")
    if junit is not None:
        from netllm_lib.junit import write

        write(junit, pipeline.name, cases(pipeline.name, outcomes, verdicts), {"target": target}, started)
    if as_json:
        print(json.dumps(summary(pipeline.name, outcomes, verdicts), allow_nan=False), flush=True)
    if not target.endswith(".toml") and outcomes[0].error is not None:
        raise outcomes[0].error
    pipelines.completed(pipeline.name, outcomes)
    if unclear := [verdict.reason for verdict in verdicts if verdict.state == "error"]:
        raise ValueError("; ".join(unclear))
    if failed := [verdict.reason for verdict in verdicts if verdict.state == "failed"]:
        print(f"netllm: gate failed: {'; '.join(failed)}", file=sys.stderr)
        raise typer.Exit(GATE_FAILED)


def cases(name: str, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> list[Case]:
    """The cases of a JUnit file: one a step, one a gate."""
    from netllm_lib import notebooks
    from netllm_lib.junit import Case

    found = []
    for outcome in outcomes:
        lines = [f"{outcome.state} in {outcome.seconds:.1f} s"]
        if outcome.folder is not None:
            lines += [f"run folder: {notebooks.shown(outcome.folder)}"]
            lines += [f"report: {notebooks.shown(outcome.folder / notebooks.REPORT)}"]
        found.append(
            Case(
                outcome.name,
                name,
                "passed" if outcome.run else "skipped" if outcome.state == "skipped" else "failed",
                outcome.seconds,
                outcome.problem,
                type(outcome.error).__name__,
                "\n".join(outcome.traceback),
                "\n".join(lines),
            )
        )
    for verdict in verdicts:
        found.append(
            Case(verdict.title, f"{name}.gates", verdict.state, 0.0, verdict.reason, "gate", "", verdict.reason)
        )
    return found


def summary(name: str, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What `--json` prints: the steps with their state, run folder, seconds and metrics, the gates with their verdict."""
    from netllm_lib import runs

    steps = [
        {
            "name": outcome.name,
            "state": outcome.state,
            "run": outcome.folder,
            "seconds": round(outcome.seconds, 1),
            "metrics": outcome.run.metrics if outcome.run else None,
            "problem": outcome.problem or None,
        }
        for outcome in outcomes
    ]
    return runs.plain({"name": name, "steps": steps, "gates": [verdict.plain() for verdict in verdicts]})
