"""Pipelines: notebooks run one after another, each finding what the earlier ones left.

name = "demo"

[parameters]              # goes to every step that declares the parameter
video = "video1"

[[step]]
notebook = "03_experience_pool"

[[step]]
notebook = "04_finetune"
timeout_s = 1200
expected = ["policy/adapter_model.safetensors"]
[step.parameters]
pool = "{03_experience_pool}/pool"         # what lies in the run folder of an earlier step

[[step]]
notebook = "check.ipynb"
after = ["04_finetune"]   # needs that step to have succeeded, though no parameter names its files

A step that fails stops those that need it, by `{step}` or `after`, and those that need these; the others go on. A table
`[gate]` is kept for the command line, which knows what it means.
"""

from __future__ import annotations

import re
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from netllm_lib import notebooks, runs
from netllm_lib.notebooks import NotebookError, NotebookRun

REFERENCE = re.compile(r"\{([\w.-]+)\}")
SUMMARY = "summary.txt"
"""What the last notebook of a pipeline may write for the terminal."""


@dataclass(frozen=True)
class Step:
    """One notebook of a pipeline."""

    name: str
    notebook: Path
    parameters: dict[str, Any]
    """Typed; `{step}` inside a string stands for the run folder of an earlier step."""
    expected: tuple[str, ...] = ()
    timeout_s: float = notebooks.TIMEOUT_S
    after: tuple[str, ...] = ()
    """Earlier steps that must have succeeded, beside those that `parameters` refer to."""

    @property
    def needs(self) -> list[str]:
        """Names of the earlier steps without which this one is not run."""
        referred = {name for text in _strings(self.parameters) for name in REFERENCE.findall(text)}
        return sorted(referred | set(self.after))


@dataclass(frozen=True)
class Pipeline:
    """The steps of a pipeline file, in order, parameters filled in and checked."""

    name: str
    steps: tuple[Step, ...]
    gate: Any = None
    """The file's `[gate]` (or `[[gate]]`) as it stands there, unchecked."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    state: Literal["done", "reused", "failed", "skipped"]
    run: NotebookRun | None
    """None unless done or reused."""
    seconds: float
    """Spent on it now: next to nothing where an earlier run was reused."""
    problem: str = ""
    """Why it failed or was skipped, in one line."""
    error: Exception | None = None
    """What it failed with."""

    @property
    def folder(self) -> Path | None:
        """Its run folder; of a failed step, where the notebook so far is. None if nothing was executed."""
        executed = getattr(self.error, "executed", None)
        return self.run.folder if self.run else executed.parent if executed else None

    @property
    def traceback(self) -> list[str]:
        """Lines of the failed cell's traceback, or of the error's own if it did not come from a notebook."""
        if isinstance(self.error, NotebookError) or self.error is None:
            return [line for text in getattr(self.error, "traceback", ()) for line in text.splitlines()]
        return "".join(traceback.format_exception(self.error)).splitlines()

    def __str__(self) -> str:
        return describe(self.run) if self.run else f"{self.state}: {self.problem}"


class PipelineError(NotebookError):
    """Steps failed. The message names them and those that were skipped, and says why; `outcomes` has all steps."""

    def __init__(self, pipeline: str, outcomes: Sequence[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        skipped = [outcome for outcome in outcomes if outcome.state == "skipped"]
        parts = [f"{len(failed)} of {len(outcomes)} steps failed"]
        parts += [f"{outcome.name} failed ({outcome.problem})" for outcome in failed]
        parts += [f"{outcome.name} was skipped ({outcome.problem})" for outcome in skipped]
        executed = getattr(failed[0].error, "executed", None)
        super().__init__(f"{pipeline}: {'; '.join(parts)}", executed, failed[0].traceback)
        self.outcomes = tuple(outcomes)


def read_pipeline(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Pipeline:
    """A pipeline file, checked as far as it can be before anything runs.

    `overrides` maps `key` (every step that declares it) or `step.key` (that step) to a value. From weak to strong:
    `[parameters]`, the step's own table, `key`, `step.key`. ValueError for whatever is unknown, unused or does not fit.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    _only_keys(table, ("name", "parameters", "step", "gate"), str(path))
    rows = table.get("step", [])
    if not rows:
        raise ValueError(f"{path}: a pipeline needs at least one [[step]]")
    everywhere = {key: value for key, value in (overrides or {}).items() if "." not in key}
    single = {key: value for key, value in (overrides or {}).items() if "." in key}

    steps: list[Step] = []
    unused = set(table.get("parameters", {})) | set(everywhere)
    declared_anywhere: set[str] = set()
    for row in rows:
        _only_keys(row, ("notebook", "name", "parameters", "expected", "timeout_s", "after"), f"{path}, [[step]]")
        beside = path.parent / row.get("notebook", "")
        source, declared = notebooks.open_notebook(beside if beside.is_file() else row.get("notebook", ""))[:2]
        name = row.get("name", source.stem)
        where = f"{path.name}, step {name}"
        earlier = [step.name for step in steps]
        if name in earlier:
            raise ValueError(f"{where}: another step has this name")
        given = {key: value for key, value in table.get("parameters", {}).items() if key in declared}
        given |= row.get("parameters", {})
        given |= {key: value for key, value in everywhere.items() if key in declared}
        given |= {key.removeprefix(f"{name}."): single.pop(key) for key in list(single) if key.startswith(f"{name}.")}
        parameters = notebooks.fit_parameters(declared, given, where)
        expected, after = _names(row, "expected", where), _names(row, "after", where)
        step = Step(name, source, parameters, expected, row.get("timeout_s", notebooks.TIMEOUT_S), after)
        for need in step.needs:
            if need not in earlier:
                written = f"after '{need}'" if need in after else f"{{{need}}}"
                raise ValueError(
                    f"{where}: {written} is not an earlier step; those are: {', '.join(earlier) or 'none'}"
                )
        steps.append(step)
        unused -= set(declared)
        declared_anywhere |= set(declared) - {"run_dir"}
    if single:
        raise ValueError(
            f"{path.name} has no step for '{next(iter(single))}'; steps: {', '.join(s.name for s in steps)}"
        )
    for key in sorted(unused):
        hint = notebooks.did_you_mean(key, declared_anywhere)
        raise ValueError(
            f"no step of {path.name} has a parameter '{key}'{hint}; known: {', '.join(sorted(declared_anywhere))}"
        )
    return Pipeline(table.get("name", path.stem), tuple(steps), table.get("gate"))


def run_pipeline(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    force: bool = False,
    echo: notebooks.Echo = print,
) -> dict[str, NotebookRun]:
    """Run a pipeline file; returns each step's run by the step's name. See `run_steps`.

    Raises ValueError for what `read_pipeline` refuses, and PipelineError at the end if a step failed. A `[gate]` is not looked at.
    """
    pipeline = read_pipeline(path, overrides)
    outcomes = run_steps(pipeline, timeout_s=timeout_s, force=force, echo=echo)
    return completed(pipeline.name, outcomes)


def completed(pipeline: str, outcomes: Sequence[Outcome]) -> dict[str, NotebookRun]:
    """Each step's run by the step's name. Raises PipelineError if a step failed."""
    if any(outcome.state == "failed" for outcome in outcomes):
        raise PipelineError(pipeline, outcomes)
    return {outcome.name: outcome.run for outcome in outcomes if outcome.run is not None}


def run_steps(
    pipeline: Pipeline, *, timeout_s: float | None = None, force: bool = False, echo: notebooks.Echo = print
) -> tuple[Outcome, ...]:
    """Run the steps in order; returns what became of each, in the same order.

    A step whose notebook, parameters, library and input files are unchanged is reused. A step that fails, for whatever reason,
    stops only those that need it. `timeout_s` replaces the limit of every step. At the end, if all went well, the last step's
    `summary.txt` goes to `echo`, and where its report lies.
    """
    outcomes: dict[str, Outcome] = {}
    for number, step in enumerate(pipeline.steps, 1):
        echo(f"[{number}/{len(pipeline.steps)}] {step.name}")
        outcome = _outcome(pipeline.name, step, outcomes, timeout_s, force, lambda line: echo(f"      {line}"))
        outcomes[step.name] = outcome
        echo(f"      {outcome}")
    if all(outcome.run for outcome in outcomes.values()):
        report_on(outcomes[pipeline.steps[-1].name], echo)
    return tuple(outcomes.values())


def _outcome(
    pipeline: str,
    step: Step,
    earlier: Mapping[str, Outcome],
    timeout_s: float | None,
    force: bool,
    echo: notebooks.Echo,
) -> Outcome:
    for need in step.needs:
        if earlier[need].run is None:
            state = "failed" if earlier[need].state == "failed" else "was skipped"
            return Outcome(step.name, "skipped", None, 0.0, f"it needs {need}, which {state}")
    folders = {name: outcome.run.folder for name, outcome in earlier.items() if outcome.run}
    return attempt(
        step.name,
        lambda: notebooks.run_notebook(
            step.notebook,
            resolve(step.parameters, folders),
            name=pipeline,
            timeout_s=step.timeout_s if timeout_s is None else timeout_s,
            expected=step.expected,
            force=force,
            echo=echo,
        ),
    )


def attempt(name: str, work: Callable[[], NotebookRun]) -> Outcome:
    """What became of `work`, which runs a notebook: done, reused or failed. Raises nothing but KeyboardInterrupt and the like."""
    started = time.monotonic()
    try:
        run = work()
    except Exception as error:  # whatever it is, it is this step's: others may go on
        known = isinstance(error, NotebookError | ValueError | OSError)
        problem = " ".join(f"{'' if known else f'unexpected {type(error).__name__}: '}{error}".split())
        return Outcome(name, "failed", None, time.monotonic() - started, problem, error)
    return Outcome(name, "reused" if run.reused else "done", run, time.monotonic() - started)


def report_on(outcome: Outcome, echo: notebooks.Echo) -> None:
    """The end of a run that went well: its notebook's `summary.txt`, if it wrote one, and where the report lies."""
    assert outcome.run is not None
    if (outcome.run.folder / SUMMARY).is_file():
        echo("\n" + (outcome.run.folder / SUMMARY).read_text().rstrip() + "\n")
    echo(f"report: {notebooks.shown(outcome.run.report)}")


def describe(run: NotebookRun) -> str:
    """One line on a finished run, for the terminal."""
    state = f"reused (took {run.seconds:.1f} s when it was made)" if run.reused else f"done in {run.seconds:.1f} s"
    return f"{state}: {notebooks.shown(run.folder)}"


def resolve(value: Any, done_folders: Mapping[str, Path]) -> Any:
    """`value` with every `{step}` in a string, also in lists and tables, replaced by that step's run folder.

    Raises NotebookError if the file meant is not there, ValueError if `done_folders` has no such step.
    """
    if isinstance(value, dict):
        return {key: resolve(item, done_folders) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, done_folders) for item in value]
    if not isinstance(value, str) or not REFERENCE.search(value):
        return value
    if unknown := [name for name in REFERENCE.findall(value) if name not in done_folders]:
        raise ValueError(
            f"{value}: {{{unknown[0]}}} is not a finished step; those are: {', '.join(done_folders) or 'none'}"
        )
    path = REFERENCE.sub(lambda match: str(done_folders[match[1]]), value)
    if not (runs.PROJECT / path).exists():
        raise NotebookError(f"{value}: {path} was not written by that step")
    return path


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _only_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key '{key}'{notebooks.did_you_mean(key, known)}; known: {', '.join(known)}"
            )


def _names(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = row.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: {key} is a list of names such as ["a", "b"], got {names!r}')
    return tuple(names)
