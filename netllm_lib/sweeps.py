"""Sweeps: many points of a pipeline's parameters, run side by side on dask.distributed.

The engine knows notebooks, not what is in them. Each distinct run is one task of dask, whose inputs are the tasks that it needs;
points that share a run wait for the same one. What a run is, and that a finished one is reused, is the business of
`notebooks.run_notebook`; so a sweep that was interrupted, wherever, goes on when it is started again.

A run whose worker dies is done again by another one (the dead worker's kernel is killed with it, see `kernels`). A run that fails
by itself is not tried again: the points that need it have failed, the others go on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from netllm_lib import notebooks, pipelines, runs
from netllm_lib.notebooks import Echo, NotebookError, NotebookRun, Work
from netllm_lib.pipelines import Outcome, Step
from netllm_lib.sweep_file import Sweep

if TYPE_CHECKING:
    from distributed import Client, Future

BUSY_S = 6 * 3600.0
"""How long to wait for a run folder that another process is writing, where the notebook has no time limit."""


def finished_runs(sweep: Sweep) -> dict[str, NotebookRun]:
    """The runs of a sweep that are there already, by key."""
    found: dict[str, NotebookRun] = {}
    for key, step in sweep.steps.items():
        with contextlib.suppress(KeyError, NotebookError):  # what it needs, or a file that it refers to, is not there
            folders = {name: found[need].folder for name, need in sweep.needs[key].items()}
            parameters = pipelines.resolve(step.parameters, folders)
            if run := notebooks.find_run(step.notebook, parameters, sweep.group):
                found[key] = run
    return found


def plan(sweep: Sweep, finished: Mapping[str, NotebookRun]) -> str:
    """What the sweep would do, in lines: distinct runs of each step, points, and what is finished already."""
    counts = f"{len(sweep.steps) - len(finished)} to do, {len(finished)} finished"
    lines = [f"{sweep.name}: {len(sweep.points)} points, {len(sweep.steps)} distinct runs ({counts})"]
    for step in sweep.points[0].runs:
        keys = {point.runs[step] for point in sweep.points}
        lines.append(f"  {step}: {len(keys)} runs, {len(keys & set(finished))} finished")
    for point in sweep.points:
        missing = sum(key not in finished for key in point.runs.values())
        state = f"{missing} of {len(point.runs)} runs to do" if missing else "complete"
        lines.append(f"  {point.number:4}  {point.label}: {state}")
    return "\n".join(lines)


def run_step(step: Step, group: str, needs: Mapping[str, Outcome]) -> Outcome:
    """Run one notebook, in a process that runs nothing else; never raises. Waits while another process writes its folder."""
    end = time.monotonic() + (step.timeout_s or BUSY_S)
    while True:
        outcome = pipelines.attempt(step, needs, group=group, timeout_s=step.timeout_s, echo=lambda line: None)
        if not isinstance(outcome.error, runs.Busy) or time.monotonic() > end:
            return replace(outcome, error=None)  # errors of others may not travel
        time.sleep(1)


def run_sweep(sweep: Sweep, client: Client, echo: Echo = print) -> dict[str, Outcome]:
    """Run everything; returns what became of each run, by key. `echo` gets a line as each ends.

    Raises ConnectionError when the scheduler is lost; what is finished is kept.
    """
    from distributed import as_completed

    futures: dict[str, Future] = {}
    for key, step in sweep.steps.items():
        needs = {name: futures[need] for name, need in sweep.needs[key].items()}
        order = {"key": key, "priority": -len(futures)}  # those of the first points first: their results come early
        futures[key] = client.submit(run_step, step, sweep.group, needs, **order)
    outcomes: dict[str, Outcome] = {}
    started = time.monotonic()
    for future in as_completed(futures.values()):
        done = outcomes[str(future.key)] = _result(future, sweep)
        label = next(point.label for point in sweep.points if future.key in point.runs.values())
        took = f"{'reused, took ' if done.state == 'reused' else ''}{done.run.seconds:.1f} s" if done.run else str(done)
        left_s = (time.monotonic() - started) / len(outcomes) * (len(futures) - len(outcomes))
        left = f", about {left_s:.0f} s left" if left_s else ""
        echo(f"[{len(outcomes)}/{len(futures)}] {done.name} ({label}): {took}{left}")
    return outcomes


def _result(future: Future, sweep: Sweep) -> Outcome:
    from distributed import KilledWorker

    if future.status in ("cancelled", "lost"):
        raise ConnectionError("the scheduler is lost; finished runs are kept, start the same sweep again to go on")
    if (error := future.exception()) is None:
        return future.result()
    name, problem = sweep.steps[str(future.key)].name, " ".join(f"unexpected {type(error).__name__}: {error}".split())
    if isinstance(error, KilledWorker):
        problem = "every worker that ran it died (often: out of memory)"
        if error.task != future.key:
            return Outcome(name, "skipped", problem=f"it needs {sweep.steps[str(error.task)].name}, which failed")
    return Outcome(name, "failed", problem=problem)


# --- what is kept -------------------------------------------------------------------------------------------------------


def work(sweep: Sweep) -> Work:
    """What `reports/runs/sweep/<name>-<hash>`, the folder of the sweep, is named after."""
    points = [{"parameters": point.parameters, "seed": point.seed, "runs": point.runs} for point in sweep.points]
    inputs: dict[str, str] = {}
    for step in {step.notebook: step for step in sweep.steps.values()}.values():
        hashes = notebooks.input_hashes(notebooks.open_notebook(step.notebook), step.parameters)
        inputs |= {f"{step.notebook.stem}, {name}": value for name, value in hashes.items()}
    return "sweep", sweep.name, {"points": points}, inputs


def rows(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """What became of each point: point, seed, parameter (by key), state ("done" or "failed"), problem, seconds (that its finished
    runs took when they were made), run (folder by step), metric (the metrics of its runs by step).
    """
    found = []
    for point in sweep.points:
        made = {name: outcomes[key] for name, key in point.runs.items()}
        good = {name: one.run for name, one in made.items() if one.run}
        row: dict[str, Any] = {"point": point.number, "seed": point.seed, "parameter": point.parameters}
        row["state"] = "done" if len(good) == len(made) else "failed"
        row["problem"] = next((one.problem for one in made.values() if one.state == "failed"), "")
        row["seconds"] = round(sum(run.seconds for run in good.values()), 1)
        row["run"] = {name: str(one.folder) for name, one in made.items() if one.folder}
        found.append(row | {"metric": {name: run.metrics for name, run in good.items()}})
    return found


def points_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The same as a table: `parameter.<key>`, `run.<step>`, `metric.<step>.<name>`, nested names joined by dots.

    Columns of lists, and those whose values differ in their type, are JSON.
    """
    table = pd.json_normalize(list(rows)).astype({"seed": "Int64"})  # type: ignore[arg-type]
    for name in table:
        given = table[name].dropna()
        if given.map(type).nunique() > 1 or given.map(lambda value: isinstance(value, list | dict)).any():
            table[name] = given.map(json.dumps).reindex(table.index)
    return table
