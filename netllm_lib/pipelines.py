"""Pipelines: notebooks run one after another, each finding what the earlier ones left.

name = "demo"

[parameters]              # goes to every step that declares the parameter
video = "video1"

[[step]]
notebook = "03_experience_pool"

[[step]]
notebook = "04_finetune"
timeout_s = 1200
[step.parameters]
pool_dir = "{03_experience_pool}"   # the run folder of an earlier step; "{…}/file" for a file in it

[[step]]
notebook = "check.ipynb"
after = ["04_finetune"]   # needs that step to have succeeded, though no parameter names its files

A step that fails stops those that need it, by `{step}` or `after`; the others go on. The table `[gate]` is read by `gate`.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from netllm_lib import config, notebooks, runs
from netllm_lib.notebooks import NotebookError, NotebookRun

REFERENCE = re.compile(r"\{([\w.-]+)\}")
SUMMARY = "summary.txt"
"""What the last notebook of a pipeline may write for the terminal."""

Name = Annotated[str, AfterValidator(runs.check_name)]


@dataclass(frozen=True)
class Step:
    """One notebook of a pipeline: a `[[step]]` as it stands in the file, and as it is run."""

    notebook: Path
    """A path, a stem or a number in the file; then the path."""
    name: Name = ""
    """By default the notebook's."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """`{step}` inside a string stands for the run folder of an earlier step."""
    timeout_s: float = notebooks.TIMEOUT_S
    after: tuple[str, ...] = ()
    """Earlier steps that must have succeeded, beside those that `parameters` refer to."""

    @property
    def needs(self) -> list[str]:
        """Names of the earlier steps without which this one is not run."""
        return sorted({*REFERENCE.findall(json.dumps(self.parameters)), *self.after})


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file as it stands there, or with its steps named, their parameters filled in and checked."""

    step: tuple[Step, ...]
    name: Name = ""
    """By default the file's; the first part of the names of the run folders."""
    parameters: dict[str, Any] = field(default_factory=dict)
    gate: Any = None
    """The file's `[gate]`, unchecked: `gate.read_gates` reads it."""


def single(name: str | Path, given: Mapping[str, Any]) -> Pipeline:
    """A notebook as a pipeline of one step, checked as `read_pipeline` does it."""
    notebook = notebooks.find_notebook(name)
    return _checked(Pipeline((Step(notebook),), "run"), notebook.stem, notebook.parent, given)


def read_pipeline(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Pipeline:
    """A pipeline file, checked as far as it can be before anything runs.

    `overrides` maps `key` (every step that declares it) or `step.key` (that step) to a value. From weak to strong:
    `[parameters]`, the step's own table, `key`, `step.key`. FileNotFoundError if there is no such file, ValueError for whatever is
    unknown, unused or does not fit.
    """
    path = Path(path)
    table: Pipeline = config.parse(Pipeline, config.read_toml(path), str(path))
    return _checked(
        replace(table, name=table.name or runs.check_name(path.stem)), path.name, path.parent, overrides or {}
    )


def _checked(table: Pipeline, where: str, folder: Path, overrides: Mapping[str, Any]) -> Pipeline:
    """The same with its notebooks found, its steps named, and their parameters filled in."""
    if not table.step:
        raise ValueError(f"{where}: a pipeline needs at least one [[step]]")
    steps: dict[str, Step] = {}
    unused, known = {*table.parameters, *overrides}, set[str]()
    for row in table.step:
        beside = folder / row.notebook
        try:
            notebook = notebooks.open_notebook(beside if os.path.isfile(beside) else row.notebook)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from None
        name = row.name or notebook.name
        place = where if where == name else f"{where}, step {name}"
        if name in steps:
            raise ValueError(f"{place}: another step has this name")
        own = {key.removeprefix(f"{name}."): value for key, value in overrides.items() if key.startswith(f"{name}.")}
        weak = {key: value for key, value in table.parameters.items() if key in notebook.parameters}
        strong = {key: value for key, value in overrides.items() if key in notebook.parameters}
        given = notebook.fit({**weak, **row.parameters, **strong, **own}, place)
        step = steps[name] = replace(row, notebook=notebook.path, name=name, parameters=given)
        if missing := [need for need in step.needs if need not in steps or need == name]:
            earlier = ", ".join([*steps][:-1]) or "none"
            raise ValueError(f"{place} needs {missing[0]}, which is no earlier step; those are: {earlier}")
        known |= {*notebook.parameters}
        unused -= {*notebook.parameters, *(f"{name}.{key}" for key in own)}
    for key in sorted(unused):
        if "." in key:
            raise ValueError(f"{where} has no step for '{key}'; steps: {', '.join(steps)}")
        hint = config.did_you_mean(key, known)
        raise ValueError(f"{where} has no parameter '{key}'{hint}; known: {', '.join(sorted(known))}")
    return Pipeline(tuple(steps.values()), table.name, gate=table.gate)


# --- running ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    state: Literal["done", "reused", "failed", "skipped"]
    run: NotebookRun | None = None
    """None unless done or reused."""
    folder: Path | None = None
    """Its run folder; of a failed step, where the notebook so far is. None if nothing was executed."""
    seconds: float = 0.0
    """Spent on it now: next to nothing where an earlier run was reused."""
    problem: str = ""
    """Why it failed or was skipped, in one line."""
    traceback: tuple[str, ...] = ()
    """Lines of the failed cell's traceback, or of the error's own if it did not come from a notebook."""
    error: Exception | None = None
    """What it failed with."""

    def __str__(self) -> str:
        if self.run is None:
            return f"{self.state}: {self.problem}"
        took = f"reused (took {self.run.seconds:.1f} s when it was made)"
        return f"{took if self.run.reused else f'done in {self.seconds:.1f} s'}: {shown(self.run.folder)}"


def run_steps(
    pipeline: Pipeline, *, timeout_s: float | None = None, force: bool = False, echo: notebooks.Echo = print
) -> list[Outcome]:
    """Run the steps in order; returns what became of each, in the same order.

    A step whose notebook, parameters and inputs are unchanged is reused. A step that fails, for whatever reason, stops only
    those that need it. `timeout_s` replaces the limit of every step. At the end, if all went well, the last step's
    `summary.txt` goes to `echo`, and where its report lies.
    """
    outcomes: dict[str, Outcome] = {}
    for number, step in enumerate(pipeline.step, 1):
        echo(f"[{number}/{len(pipeline.step)}] {step.name}")
        options: dict[str, Any] = {"timeout_s": step.timeout_s if timeout_s is None else timeout_s, "force": force}
        options |= {"group": pipeline.name, "echo": lambda line: echo(f"      {line}")}
        outcomes[step.name] = attempt(step, outcomes, **options)
        echo(f"      {outcomes[step.name]}")
    last = outcomes[pipeline.step[-1].name].run
    if last and all(outcome.run for outcome in outcomes.values()):
        if (last.folder / SUMMARY).is_file():
            echo("\n" + (last.folder / SUMMARY).read_text().rstrip() + "\n")
        echo(f"report: {shown(last.folder / notebooks.REPORT)}")
    return list(outcomes.values())


def attempt(step: Step, before: Mapping[str, Outcome], **options: Any) -> Outcome:
    """Run one step by `run_notebook`, unless one of those `before` that it needs did not succeed.

    Raises nothing but KeyboardInterrupt: whatever the error is, it is this step's, and others may go on.
    """
    started = time.monotonic()
    if lost := next((before[name] for name in step.needs if before[name].run is None), None):
        state = "failed" if lost.state == "failed" else "was skipped"
        return Outcome(step.name, "skipped", problem=f"it needs {lost.name}, which {state}")
    try:
        folders = {name: one.run.folder for name, one in before.items() if one.run}
        done = notebooks.run_notebook(step.notebook, resolve(step.parameters, folders), **options)
    except Exception as error:
        expected = isinstance(error, NotebookError | ValueError | OSError)
        problem = " ".join(f"{'' if expected else f'unexpected {type(error).__name__}: '}{error}".split())
        executed, lines = getattr(error, "executed", None), getattr(error, "traceback", None)
        lines = "\n".join(traceback.format_exception(error) if lines is None else lines).splitlines()
        folder, seconds = executed and executed.parent, time.monotonic() - started
        return Outcome(step.name, "failed", None, folder, seconds, problem, tuple(lines), error)
    return Outcome(step.name, "reused" if done.reused else "done", done, done.folder, time.monotonic() - started)


def raise_failures(pipeline: str, outcomes: Sequence[Outcome]) -> None:
    """NotebookError if steps failed; it names them and those that were skipped. The error itself of a pipeline of one step."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed and len(outcomes) == 1:
        raise failed[0].error or AssertionError
    if failed:
        parts = [f"{one.name} failed ({one.problem})" for one in failed]
        parts += [f"{one.name} was skipped ({one.problem})" for one in outcomes if one.state == "skipped"]
        counts = f"{len(failed)} of {len(outcomes)} steps failed"
        raise NotebookError(f"{pipeline}: {'; '.join([counts, *parts])}", traceback=failed[0].traceback)


def resolve(value: Any, folders: Mapping[str, Path]) -> Any:
    """`value` with every `{step}` in a string, also in lists and tables, replaced by that step's run folder.

    Raises NotebookError if the file meant is not there.
    """
    if isinstance(value, dict):
        return {key: resolve(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, folders) for item in value]
    if not isinstance(value, str) or not REFERENCE.search(value):
        return value
    path = REFERENCE.sub(lambda match: str(folders[match[1]]), value)
    if not os.path.exists(runs.PROJECT / path):
        raise NotebookError(f"{value}: {path} was not written by that step")
    return path


def shown(path: Path) -> str:
    """A path as a person wants to read it: from the working directory if it lies below, else whole."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
