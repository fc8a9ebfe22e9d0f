"""Sweeps: many points of a pipeline's parameters, run side by side on dask.distributed.

The engine knows notebooks, not what is in them. Each distinct run is one task, keyed by its content and handed to a worker as soon
as the runs it reads are done; points that share a run wait for the same one. What a run is, and that a finished one is reused, is
the business of `notebooks.run_notebook`; so a sweep that was interrupted, wherever, goes on when it is started again.

A run whose worker dies is done again by another one. The dead worker's kernel is killed with it and holds the run folder's lock
until it is gone (see `kernels`), so the two never write side by side. A run that fails by itself is not tried again: the points
that need it have failed, the others go on.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from netllm_lib import notebooks, pipelines, runs
from netllm_lib.notebooks import Echo, NotebookError, NotebookRun
from netllm_lib.pipelines import Step
from netllm_lib.sweep_file import Point, Sweep, describe

if TYPE_CHECKING:
    from distributed import Client, Future

KIND = "sweep"
LIBRARY = "netllm_lib"  # among the inputs of a run
POINTS, COPY = "points.parquet", "sweep.toml"
BUSY_S = 6 * 3600.0
"""How long to wait for a run folder that another process is writing, where the notebook has no time limit."""


@dataclass(frozen=True)
class RunResult:
    """What became of one run. It travels from a worker to the client."""

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


# --- before -------------------------------------------------------------------------------------------------------------


def finished_runs(sweep: Sweep) -> dict[str, NotebookRun]:
    """The runs of a sweep that are there already, by key."""
    found: dict[str, NotebookRun] = {}
    for key, one in sweep.steps.items():
        if all(need in found for need in one.needs.values()):
            folders = {name: found[need].folder for name, need in one.needs.items()}
            with contextlib.suppress(NotebookError):  # a file that it refers to is gone
                step, parameters = one.step, pipelines.resolve(one.step.parameters, folders)
                run = notebooks.find_run(step.notebook, parameters, name=one.run_name, expected=step.expected)
                if run is not None:
                    found[key] = run
    return found


def plan(sweep: Sweep, finished: Mapping[str, NotebookRun]) -> str:
    """What the sweep would do, in lines: points, steps, distinct runs, and what is finished already."""
    points, steps = len(sweep.points), list(sweep.points[0].runs)
    complete = sum(all(key in finished for key in point.runs.values()) for point in sweep.points)
    lines = [f"{sweep.name}: {points} point{'s' * (points != 1)}, {len(sweep.steps)} distinct runs"]
    lines[0] += f" ({len(sweep.steps) - len(finished)} to do, {len(finished)} finished; {complete} points complete)"
    width = max(map(len, steps))
    for step in steps:
        keys = {point.runs[step] for point in sweep.points}
        lines.append(f"  {step:{width}}  {len(keys):4} runs, {len(keys & set(finished)):4} finished")
    if sweep.seed_parameters:
        seeds = sorted({point.seed for point in sweep.points if point.seed is not None})
        lines.append(f"  seeds {', '.join(map(str, seeds))} for {', '.join(sweep.seed_parameters)}")
    for point in sweep.points:
        missing = sum(key not in finished for key in point.runs.values())
        state = f"{missing} of {len(point.runs)} runs to do" if missing else "complete"
        lines.append(f"  {point.number:4}  {label(sweep, point)}: {state}")
    return "\n".join(lines)


def label(sweep: Sweep, point: Point) -> str:
    """A point by what distinguishes it from the others."""
    shown: dict[str, Any] = {key: point.parameters[key] for key in sweep.varied if key in point.parameters}
    return describe(shown | ({} if point.seed is None else {"seed": point.seed})) or "the only point"


# --- on a worker --------------------------------------------------------------------------------------------------------


def run_step(step: Step, parameters: Mapping[str, Any], name: str, timeout_s: float) -> RunResult:
    """Run one notebook, in a process that runs nothing else; never raises. Waits while another process writes its folder."""
    limit_s = timeout_s or BUSY_S
    started = time.monotonic()

    def work() -> NotebookRun:
        pause_s = 0.1
        while True:
            try:
                return notebooks.run_notebook(
                    step.notebook,
                    parameters,
                    name=name,
                    timeout_s=timeout_s,
                    expected=step.expected,
                    echo=lambda line: None,
                )
            except runs.Busy:
                if time.monotonic() - started > limit_s:
                    raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 10.0)

    outcome = pipelines.attempt(step.name, work)
    if outcome.run is None:
        return RunResult("failed", outcome.folder, outcome.seconds, outcome.problem)
    return RunResult("reused" if outcome.run.reused else "done", outcome.run.folder, round(outcome.run.seconds, 1))


# --- on the client --------------------------------------------------------------------------------------------------------


def run_sweep(sweep: Sweep, client: Client, *, timeout_s: float | None = None, echo: Echo = print) -> list[PointResult]:
    """Run all points; returns what became of each. `echo` gets a line as each run ends.

    `timeout_s` replaces the time limit of every notebook. Raises ConnectionError when the scheduler is lost; what is finished is
    kept.
    """
    board = _Board(sweep, timeout_s if timeout_s is not None else sweep.timeout_s, echo)
    running: dict[Future, str] = {}
    alive: set[str] = set()
    while board.open:
        workers = set(client.nthreads())
        for gone in alive - workers:
            echo(f"worker {gone} is gone; what it ran is run again by another one")
        alive = workers
        board.side_by_side = max(1, len(workers))
        # one for each worker and no more: those that wait come in the order of the points, and share no worker's fate
        while len(running) < board.side_by_side and (key := board.take()):
            if future := board.start(client, key):
                running[future] = key
        for future in _ended(list(running)):
            board.end(running.pop(future), _result(future))
    for key, result in board.results.items():
        if result.good and result.folder is not None:
            made_from = runs.read_json(result.folder / runs.MANIFEST)["inputs"]
            if made_from.get(LIBRARY) != sweep.inputs.get(LIBRARY):
                echo(
                    f"{key} and perhaps others: netllm_lib was edited while the sweep ran; start it again to have all of one kind"
                )
                break
    return board.points()


def _ended(futures: list[Future], patience_s: float = 1.0) -> list[Future]:
    """Those that have ended; waits a moment for the first one."""
    from distributed import wait

    with contextlib.suppress(TimeoutError):
        wait(futures, timeout=patience_s, return_when="FIRST_COMPLETED")
    return [future for future in futures if future.done()]


def _result(future: Future) -> RunResult:
    from distributed import KilledWorker

    if future.status in ("cancelled", "lost"):
        raise ConnectionError("the scheduler is lost; finished runs are kept, start the same sweep again to go on")
    error = future.exception()
    if isinstance(error, KilledWorker):
        return RunResult("failed", problem="every worker that ran it died (often: out of memory)")
    if error is not None:
        return RunResult("failed", problem=" ".join(f"unexpected {type(error).__name__}: {error}".split()))
    return future.result()


class _Board:
    """Which runs are done, which can begin, and which cannot any more."""

    def __init__(self, sweep: Sweep, timeout_s: float | None, echo: Echo) -> None:
        self.sweep, self.timeout_s, self.echo = sweep, timeout_s, echo
        self.results: dict[str, RunResult] = {}
        self.side_by_side = 1
        self.spent: dict[str, list[float]] = {}  # seconds that runs of a notebook took, for those that were made now
        self.begun: dict[str, float] = {}
        self.first: dict[str, Point] = {}
        for point in reversed(sweep.points):
            self.first.update(dict.fromkeys(point.runs.values(), point))
        order = {key: number for number, key in enumerate(sweep.steps)}
        # deepest first within a point, points in their order: the first results come early
        self.priority = {key: (self.first[key].number, order[key]) for key in sweep.steps}
        self.ready: list[tuple[tuple[int, int], str]] = []
        for key, one in sweep.steps.items():
            if not one.needs:
                heapq.heappush(self.ready, (self.priority[key], key))

    @property
    def open(self) -> int:
        """How many runs have not ended."""
        return len(self.sweep.steps) - len(self.results)

    def take(self) -> str | None:
        """The next run that can begin, None if there is none."""
        return heapq.heappop(self.ready)[1] if self.ready else None

    def start(self, client: Client, key: str) -> Future | None:
        """Hand a run to the cluster. None if a file that it is to read was not written: it has ended then."""
        one = self.sweep.steps[key]
        self.begun[key] = time.monotonic()
        folders = {name: folder for name, need in one.needs.items() if (folder := self.results[need].folder)}
        try:
            parameters = pipelines.resolve(one.step.parameters, folders)
        except NotebookError as error:
            self.end(key, RunResult("failed", problem=str(error)))
            return None
        limit_s = one.step.timeout_s if self.timeout_s is None else self.timeout_s
        return client.submit(run_step, one.step, parameters, one.run_name, limit_s, key=key, pure=False)

    def end(self, key: str, result: RunResult) -> None:
        """Take note of a run that ended, and of all that follows from it."""
        one = self.sweep.steps[key]
        if result.state == "done":
            self.spent.setdefault(one.step.name, []).append(time.monotonic() - self.begun[key])
        self._note(key, result)
        for other, waiting in self.sweep.steps.items():
            if other in self.results or key not in waiting.needs.values():
                continue
            needed = {name: self.results.get(need) for name, need in waiting.needs.items()}
            if bad := [name for name, had in needed.items() if had is not None and not had.good]:
                self.end(other, RunResult("skipped", problem=f"it needs {bad[0]}, which did not succeed"))
            elif all(had is not None for had in needed.values()):
                heapq.heappush(self.ready, (self.priority[other], other))

    def _note(self, key: str, result: RunResult) -> None:
        self.results[key] = result
        what = f"{self.sweep.steps[key].step.name} ({label(self.sweep, self.first[key])})"
        took = {"done": f"{result.seconds:.1f} s", "reused": f"reused, took {result.seconds:.1f} s"}
        state = took.get(result.state, f"{result.state}: {result.problem}")
        left = f", about {self.seconds_left():.0f} s left" if self.open else ""
        self.echo(f"[{len(self.results)}/{len(self.sweep.steps)}] {what}: {state}{left}")

    def seconds_left(self) -> float:
        """By the seconds that runs of the same notebook took so far, and how many run side by side."""
        every = [seconds for some in self.spent.values() for seconds in some]
        if not every:
            return 0.0
        guess = {name: sum(some) / len(some) for name, some in self.spent.items()}
        waiting = [one.step.name for key, one in self.sweep.steps.items() if key not in self.results]
        total = sum(guess.get(name, sum(every) / len(every)) for name in waiting)
        return total / min(self.side_by_side, max(1, len(waiting)))

    def points(self) -> list[PointResult]:
        return [
            PointResult(point, {name: self.results[key] for name, key in point.runs.items()})
            for point in self.sweep.points
        ]


# --- what is kept -------------------------------------------------------------------------------------------------------


def open_folder(sweep: Sweep) -> runs.Run:
    """The sweep's run folder, `reports/runs/sweep/<name>-<hash>`, with a copy of its file in it."""
    steps = {
        key: {"notebook": one.step.notebook.stem, "parameters": one.step.parameters, "needs": one.needs}
        for key, one in sweep.steps.items()
    }
    points = [{"parameters": p.parameters, "seed": p.seed, "runs": p.runs} for p in sweep.points]
    run = runs.open_run(KIND, sweep.name, {"points": points, "steps": steps}, sweep.inputs)
    if not (run.folder / COPY).is_file() or (run.folder / COPY).read_bytes() != sweep.path.read_bytes():
        with runs.atomic_path(run.folder / COPY) as aside:
            shutil.copyfile(sweep.path, aside)
    return run


def points_table(results: list[PointResult]) -> pd.DataFrame:
    """One row per point: point, seed, `parameter.<key>`, state, problem, seconds (that its finished runs took when they were made),
    `run.<step>` (folders), and the metrics of its runs as `metric.<step>.<name>`, nested names joined by dots.

    Parameters that are not plain numbers, texts or truth values are JSON; so are all values of one whose types differ.
    """
    rows = []
    for result in results:
        row: dict[str, Any] = {"point": result.point.number, "seed": result.point.seed}
        row |= {f"parameter.{key}": value for key, value in result.point.parameters.items()}
        row |= {"state": result.state, "problem": result.problem}
        row["seconds"] = round(sum(run.seconds for run in result.runs.values() if run.good), 1)
        row |= {f"run.{name}": str(run.folder) if run.folder else None for name, run in result.runs.items()}
        for name, run in result.runs.items():
            if run.good and run.folder is not None:
                metrics = runs.read_json(run.folder / "metrics.json")
                row |= {f"metric.{name}.{key}": value for key, value in flatten(metrics).items()}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["seed"] = table["seed"].astype("Int64")
    for column in table:
        if str(column).startswith(("parameter.", "metric.")):
            table[column] = _one_type(table[column])
    order = ("point", "seed", "parameter.", "state", "problem", "seconds", "run.", "metric.")
    return table[sorted(table, key=lambda c: next(i for i, start in enumerate(order) if str(c).startswith(start)))]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers, texts and truth values of nested tables by their names, joined by dots; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str):
            flat[f"{prefix}{key}"] = value
    return flat


def _one_type(column: pd.Series) -> pd.Series:
    given = [value for value in column if not (value is None or value is pd.NA or value != value)]
    kinds = {float if type(value) is int else type(value) for value in given}
    if kinds <= {float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return column
    known = [isinstance(value, list | dict) or value == value for value in column]
    return pd.Series(
        [json.dumps(value) if ok and value is not None else None for value, ok in zip(column, known, strict=True)],
        column.index,
        dtype=object,
    )


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write a table of a sweep, unless the same one is there: then whoever reads it has nothing to do again."""
    path = folder / name
    if path.is_file():
        with contextlib.suppress(ValueError, OSError):
            if pd.read_parquet(path).equals(table):
                return
    with runs.atomic_path(path) as aside:
        table.to_parquet(aside)
