"""Sweep files: which points of a pipeline's or a notebook's parameters to run.

name = "rank"
pipeline = "demo.toml"             # or notebook = "05_test"; beside this file, in notebooks/pipelines, or a path
seeds = [1, 2, 3]
seed_parameters = ["04_finetune.seed"]   # what gets them

[parameters]                       # for all points; `key` or `step.key`, as in `netllm run -p`
"04_finetune.epochs" = 4

[grid]                             # every combination of these values …
"04_finetune.rank" = [8, 128]

[[point]]                          # … with each of these points, which may also override [parameters]
"04_finetune.lr" = 1e-3

[[point]]
"04_finetune.lr" = 1e-4
"05_test.choose" = "sample"
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from netllm_lib import config, notebooks, pipelines, runs
from netllm_lib.pipelines import Name, Pipeline, Step

PIPELINES = notebooks.NOTEBOOKS / "pipelines"


@dataclass(frozen=True)
class SweepTable:
    """A sweep file as it stands there."""

    name: Name = ""
    pipeline: str | None = None
    notebook: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    point: tuple[dict[str, Any], ...] = ({},)
    seeds: tuple[int, ...] = ()
    seed_parameters: tuple[str, ...] = ()
    timeout_s: float | None = None
    cluster: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.pipeline is None) == (self.notebook is None):
            raise ValueError('one of `pipeline = "FILE.toml"` and `notebook = "NAME"` is needed')
        if bool(self.seed_parameters) != bool(self.seeds):
            raise ValueError(
                'seeds = [1, 2, …] and seed_parameters = ["STEP.seed", …], what gets them, need each other'
            )


@dataclass(frozen=True)
class Point:
    """One row of the sweep: parameters as the file has them, and a run for each step of the pipeline."""

    number: int
    parameters: dict[str, Any]
    seed: int | None
    label: str
    """What distinguishes it from the other points."""
    runs: dict[str, str]
    """Key of the run of each step, in order."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked: all points, and the distinct runs that they need."""

    path: Path
    name: str
    points: tuple[Point, ...]
    steps: dict[str, Step]
    """Distinct runs by key, which says all that decides the run but the library and the data."""
    needs: dict[str, dict[str, str]]
    """By the same key: the key of the run that is meant by each `{step}` in its parameters, which comes before it."""
    group: str
    """First part of the names of the run folders, as a plain `netllm run` would have it."""
    cluster: dict[str, Any] | None


def read_sweep(path: str | Path) -> Sweep:
    """A sweep file, checked as far as it can be before anything runs.

    FileNotFoundError for a file, pipeline or notebook that is not there; ValueError, with the file and where in it, for whatever is
    unknown, does not fit, or is there twice.
    """
    path = Path(path)
    table: SweepTable = config.parse(SweepTable, config.read_toml(path), str(path))
    varied_by, elsewhere = [*table.grid, *table.seed_parameters], {*table.parameters, *itertools.chain(*table.point)}
    if twice := [key for key in varied_by if key in elsewhere or varied_by.count(key) > 1]:
        raise ValueError(f"{path}: {twice[0]} is varied by [grid] or `seeds`; leave it out elsewhere")
    grid = [dict(zip(table.grid, values, strict=True)) for values in itertools.product(*table.grid.values())]
    chosen = [{**table.parameters, **row, **values} for row, values in itertools.product(table.point, grid)]
    points: list[Point] = []
    steps: dict[str, Step] = {}
    needs: dict[str, dict[str, str]] = {}
    group = ""
    for number, (given, seed) in enumerate(itertools.product(chosen, table.seeds or (None,)), 1):
        varied = {key: value for key, value in given.items() if any(other.get(key) != value for other in chosen)}
        label = describe(varied, seed) or "the only point"
        try:
            pipeline = _pipeline(path, table, {**given, **dict.fromkeys(table.seed_parameters, seed)})
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{path}, point {number} ({label}): {error}") from None
        group, keys = pipeline.name, dict[str, str]()
        for step in pipeline.step:
            before = {name: keys[name] for name in step.needs}
            decides = [str(step.notebook), pipeline.name, step.parameters, before]
            key = keys[step.name] = f"{step.name}-{runs.content_hash(decides)}"
            needs[key] = before
            steps[key] = step if table.timeout_s is None else replace(step, timeout_s=table.timeout_s)
        if twin := next((other.number for other in points if other.runs == keys), None):
            raise ValueError(f"{path}: points {twin} and {number} are the same ({label})")
        points.append(Point(number, given, seed, label, keys))
    return Sweep(path, table.name or path.stem, tuple(points), steps, needs, group, table.cluster)


def describe(parameters: Mapping[str, Any], seed: int | None = None) -> str:
    """`{"04_finetune.rank": 8}` and a seed as a person wants to read them: `rank=8 seed=1`."""
    short = [key.rpartition(".")[2] for key in parameters]
    names = [name if short.count(name) == 1 else key for name, key in zip(short, parameters, strict=True)]
    words = [f"{name}={value}" for name, value in zip(names, parameters.values(), strict=True)]
    return " ".join([*words, *([] if seed is None else [f"seed={seed}"])])


def _pipeline(path: Path, table: SweepTable, given: Mapping[str, Any]) -> Pipeline:
    """The pipeline or the notebook that is swept, with `given` filled in."""
    if table.notebook is not None:
        beside = path.parent / table.notebook
        return pipelines.single(beside if os.path.isfile(beside) else table.notebook, given)
    named = Path(str(table.pipeline))
    for place in (path.parent / named, named, runs.PROJECT / named, PIPELINES / named):
        if os.path.isfile(place):
            return pipelines.read_pipeline(place, given)
    known = sorted(file.name for file in PIPELINES.glob("*.toml"))
    hint = config.did_you_mean(named.name, known)
    raise FileNotFoundError(f"{path}: no pipeline {named}{hint}; known: {', '.join(known)}")
