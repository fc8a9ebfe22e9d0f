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
pool = "{03_experience_pool}/pool.npz"     # a file in the run folder of an earlier step
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    @property
    def needs(self) -> list[str]:
        """Names of the earlier steps whose files this one reads."""
        return sorted({name for text in _strings(self.parameters) for name in REFERENCE.findall(text)})


@dataclass(frozen=True)
class Pipeline:
    """The steps of a pipeline file, in order, parameters filled in and checked."""

    name: str
    steps: tuple[Step, ...]


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
    _only_keys(table, ("name", "parameters", "step"), str(path))
    rows = table.get("step", [])
    if not rows:
        raise ValueError(f"{path}: a pipeline needs at least one [[step]]")
    everywhere = {key: value for key, value in (overrides or {}).items() if "." not in key}
    single = {key: value for key, value in (overrides or {}).items() if "." in key}

    steps: list[Step] = []
    unused = set(table.get("parameters", {})) | set(everywhere)
    declared_anywhere: set[str] = set()
    for row in rows:
        _only_keys(row, ("notebook", "name", "parameters", "expected", "timeout_s"), f"{path}, [[step]]")
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
        step = Step(name, source, parameters, tuple(row.get("expected", ())), row.get("timeout_s", notebooks.TIMEOUT_S))
        for need in step.needs:
            if need not in earlier:
                raise ValueError(
                    f"{where}: {{{need}}} is not an earlier step; those are: {', '.join(earlier) or 'none'}"
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
    return Pipeline(table.get("name", path.stem), tuple(steps))


def run_pipeline(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    force: bool = False,
    echo: notebooks.Echo = print,
) -> dict[str, NotebookRun]:
    """Run a pipeline's steps in order; returns each step's run by the step's name.

    A step whose notebook, parameters, library and input files are unchanged is reused. The first step that fails stops
    the pipeline: its NotebookError says which. At the end the last step's `summary.txt` is printed, and where its
    report lies.
    """
    pipeline = read_pipeline(path, overrides)
    done: dict[str, NotebookRun] = {}
    for number, step in enumerate(pipeline.steps, 1):
        echo(f"[{number}/{len(pipeline.steps)}] {step.name}")
        run = notebooks.run_notebook(
            step.notebook,
            _resolve(step.parameters, done),
            name=pipeline.name,
            timeout_s=step.timeout_s if timeout_s is None else timeout_s,
            expected=step.expected,
            force=force,
            echo=lambda line: echo(f"      {line}"),
        )
        done[step.name] = run
        echo(f"      {describe(run)}")
    last = done[pipeline.steps[-1].name]
    if (last.folder / SUMMARY).is_file():
        echo("\n" + (last.folder / SUMMARY).read_text().rstrip() + "\n")
    echo(f"report: {notebooks.shown(last.report)}")
    return done


def describe(run: NotebookRun) -> str:
    """One line on a finished run, for the terminal."""
    state = f"reused (took {run.seconds:.1f} s when it was made)" if run.reused else f"done in {run.seconds:.1f} s"
    return f"{state}: {notebooks.shown(run.folder)}"


def _resolve(value: Any, done: Mapping[str, NotebookRun]) -> Any:
    """`value` with every `{step}` replaced by that step's run folder; NotebookError if the file meant is not there."""
    if isinstance(value, dict):
        return {key: _resolve(item, done) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, done) for item in value]
    if not isinstance(value, str) or not REFERENCE.search(value):
        return value
    path = REFERENCE.sub(lambda match: str(done[match[1]].folder), value)
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
