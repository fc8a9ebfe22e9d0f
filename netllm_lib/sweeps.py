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
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from netllm_lib import notebooks, pipelines, runs
from netllm_lib.notebooks import Echo, NotebookError, NotebookRun
from netllm_lib.pipelines import Step
from netllm_lib.sweep_file import Point, Sweep

if TYPE_CHECKING:
    from distributed import Client, Future

KIND, POINTS, COPY = "sweep", "points.parquet", "sweep.toml"
BUSY_S = 6 * 3600.0
"""How long to wait for a run folder that another process is writing, where the notebook has no time limit."""


@dataclass(frozen=True)
class RunResult:
    """What became of one run. It travels between workers and client."""

    state: Literal["done", "reused", "failed", "skipped"]
    folder: Path | None = None
    seconds: float = 0.0
    """That it took when it was made; of a failed one, until then."""
    problem: str = ""

    @property
    def good(self) -> bool:
        return self.state in ("done", "reused")


@dataclass(frozen=True)
class PointResult:
    """What became of one point: done if all of its runs are."""

    point: Point
    runs: dict[str, RunResult]
    """By name of the step."""

    @property
    def state(self) -> Literal["done", "failed"]:
        return "done" if all(run.good for run in self.runs.values()) else "failed"

    @property
    def problem(self) -> str:
        """Why it failed, in one line."""
        return next((run.problem for run in self.runs.values() if run.state == "failed"), "")

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        told = {"point": self.point.number, "parameters": self.point.parameters, "seed": self.point.seed}
        told |= {"state": self.state, "problem": self.problem or None}
        return told | {"runs": {name: runs.plain(run.folder) for name, run in self.runs.items()}}


def finished_runs(sweep: Sweep) -> dict[str, NotebookRun]:
    """The runs of a sweep that are there already, by key."""
    found: dict[str, NotebookRun] = {}
    for key, one in sweep.steps.items():
        if all(need in found for need in one.needs.values()):
            folders = {name: found[need].folder for name, need in one.needs.items()}
            with contextlib.suppress(NotebookError):  # a file that it refers to is gone
                parameters = pipelines.resolve(one.step.parameters, folders)
                if run := notebooks.find_run(one.step.notebook, parameters, one.group):
                    found[key] = run
    return found


def plan(sweep: Sweep, finished: Mapping[str, NotebookRun]) -> str:
    """What the sweep would do, in lines: distinct runs of each step, points, and what is finished already."""
    counts = f"{len(sweep.steps) - len(finished)} to do, {len(finished)} finished"
    lines = [f"{sweep.name}: {len(sweep.points)} points, {len(sweep.steps)} distinct runs ({counts})"]
    for step in sweep.points[0].runs:
        keys = {point.runs[step] for point in sweep.points}
        lines.append(f"  {step}: {len(keys)} runs, {len(keys & set(finished))} finished")
    if sweep.seed_parameters:
        lines.append(f"  seeds are for {', '.join(sweep.seed_parameters)}")
    for point in sweep.points:
        missing = sum(key not in finished for key in point.runs.values())
        state = f"{missing} of {len(point.runs)} runs to do" if missing else "complete"
        lines.append(f"  {point.number:4}  {point.label}: {state}")
    return "\n".join(lines)


def run_step(step: Step, group: str, timeout_s: float, needs: Mapping[str, RunResult]) -> RunResult:
    """Run one notebook, in a process that runs nothing else; never raises. Waits while another process writes its folder."""
    if lost := [name for name, need in needs.items() if not need.good]:
        return RunResult("skipped", problem=f"it needs {lost[0]}, which did not succeed")
    folders = {name: need.folder for name, need in needs.items() if need.folder}
    end = time.monotonic() + (timeout_s or BUSY_S)
    while True:
        outcome = pipelines.attempt(step, folders, group=group, timeout_s=timeout_s, echo=lambda line: None)
        if not isinstance(outcome.error, runs.Busy) or time.monotonic() > end:
            break
        time.sleep(1)
    if outcome.run is None:
        return RunResult("failed", outcome.folder, outcome.seconds, outcome.problem)
    return RunResult("reused" if outcome.run.reused else "done", outcome.run.folder, round(outcome.run.seconds, 1))


def run_sweep(sweep: Sweep, client: Client, echo: Echo = print) -> list[PointResult]:
    """Run all points; returns what became of each. `echo` gets a line as each run ends.

    Raises ConnectionError when the scheduler is lost; what is finished is kept.
    """
    from distributed import as_completed

    futures: dict[str, Future] = {}
    for key, one in sweep.steps.items():
        needs = {name: futures[need] for name, need in one.needs.items()}
        limit_s = one.step.timeout_s if sweep.timeout_s is None else sweep.timeout_s
        # those of the first points first: their results come early
        order = {"key": key, "priority": -len(futures)}
        futures[key] = client.submit(run_step, one.step, one.group, limit_s, needs, **order)
    results: dict[str, RunResult] = {}
    started = time.monotonic()
    for future in as_completed(futures.values()):
        result = results[future.key] = _result(future)
        label = next(point.label for point in sweep.points if future.key in point.runs.values())
        took = {"done": f"{result.seconds:.1f} s", "reused": f"reused, took {result.seconds:.1f} s"}
        state = took.get(result.state, f"{result.state}: {result.problem}")
        left_s = (time.monotonic() - started) / len(results) * (len(futures) - len(results))
        left = f", about {left_s:.0f} s left" if left_s else ""
        echo(f"[{len(results)}/{len(futures)}] {sweep.steps[future.key].step.name} ({label}): {state}{left}")
    return [PointResult(point, {name: results[key] for name, key in point.runs.items()}) for point in sweep.points]


def _result(future: Future) -> RunResult:
    from distributed import KilledWorker

    if future.status in ("cancelled", "lost"):
        raise ConnectionError("the scheduler is lost; finished runs are kept, start the same sweep again to go on")
    error = future.exception()
    if isinstance(error, KilledWorker) and error.task != future.key:
        return RunResult("skipped", problem=f"it needs {error.task}, which did not succeed")
    if isinstance(error, KilledWorker):
        return RunResult("failed", problem="every worker that ran it died (often: out of memory)")
    if error is not None:
        return RunResult("failed", problem=" ".join(f"unexpected {type(error).__name__}: {error}".split()))
    return future.result()


# --- what is kept -------------------------------------------------------------------------------------------------------


def open_folder(sweep: Sweep) -> runs.Run:
    """The sweep's run folder, `reports/runs/sweep/<name>-<hash>`, with a copy of its file in it."""
    points = [{"parameters": point.parameters, "seed": point.seed, "runs": point.runs} for point in sweep.points]
    inputs: dict[str, str] = {}
    for step in {one.step.notebook: one.step for one in sweep.steps.values()}.values():
        hashes = notebooks.input_hashes(notebooks.open_notebook(step.notebook), step.parameters)
        inputs |= {f"{step.notebook.stem}, {name}": value for name, value in hashes.items()}
    run = runs.open_run(KIND, sweep.name, {"points": points}, inputs)
    with runs.atomic_path(run.folder / COPY) as aside:
        shutil.copyfile(sweep.path, aside)
    return run


def points_table(results: Sequence[PointResult]) -> pd.DataFrame:
    """One row per point: point, seed, `parameter.<key>`, state, problem, seconds (that its finished runs took when they were made),
    `run.<step>` (folders), and the metrics of its runs as `metric.<step>.<name>`, nested names joined by dots.

    Columns of lists, and those whose values differ in their type, are JSON.
    """
    rows = []
    for result in results:
        good = {name: run for name, run in result.runs.items() if run.good and run.folder}
        metrics = {name: runs.read_json(Path(str(run.folder)) / runs.METRICS) for name, run in good.items()}
        row: dict[str, Any] = {
            "point": result.point.number,
            "seed": result.point.seed,
            "parameter": result.point.parameters,
        }
        row |= {"state": result.state, "problem": result.problem}
        row |= {"seconds": round(sum(run.seconds for run in good.values()), 1)}
        row |= {"run": {name: str(run.folder) for name, run in result.runs.items() if run.folder}, "metric": metrics}
        rows.append(row)
    table = pd.json_normalize(rows).astype({"seed": "Int64"})
    for name in table:
        given = table[name].dropna()
        if given.map(type).nunique() > 1 or given.map(lambda value: isinstance(value, list | dict)).any():
            table[name] = given.map(json.dumps).reindex(table.index)
    return table


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write a table of a sweep, unless the same one is there: then whoever reads it has nothing to do again."""
    with contextlib.suppress(ValueError, OSError):
        if pd.read_parquet(folder / name).equals(table):
            return
    with runs.atomic_path(folder / name) as aside:
        table.to_parquet(aside)
