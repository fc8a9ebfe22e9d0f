"""Sweep files: which points of a pipeline's or a notebook's parameters to run.

name = "rank"
pipeline = "demo.toml"             # or notebook = "05_test"; beside this file, in notebooks/pipelines, or a path
seeds = [1, 2, 3]

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netllm_lib import config, notebooks, pipelines, runs
from netllm_lib.clusters import Slurm
from netllm_lib.pipelines import Name, Pipeline, Step

PIPELINES = notebooks.NOTEBOOKS / "pipelines"


@dataclass(frozen=True)
class SweepTable:
    """A sweep file."""

    name: Name = ""
    pipeline: str | None = None
    notebook: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    point: tuple[dict[str, Any], ...] = ({},)
    seeds: tuple[int, ...] = ()
    seed_parameters: tuple[str, ...] = ()
    timeout_s: float | None = None
    cluster: Slurm | None = None

    def __post_init__(self) -> None:
        if (self.pipeline is None) == (self.notebook is None):
            raise ValueError('one of `pipeline = "FILE.toml"` and `notebook = "NAME"` is needed')
        if self.seed_parameters and not self.seeds:
            raise ValueError("seed_parameters without seeds = [1, 2, …]")


@dataclass(frozen=True)
class SweepStep:
    """One run of one notebook, which several points may share."""

    step: Step
    group: str
    """First part of the name of the run folder, as a plain `netllm run` would have it."""
    needs: dict[str, str]
    """Key of the run that is meant by each `{step}` in its parameters."""

    @property
    def key(self) -> str:
        """Says all that decides the run but the library and the data."""
        what = [str(self.step.notebook), self.group, self.step.parameters, self.needs]
        return f"{self.step.name}-{runs.content_hash(what)}"


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
    steps: dict[str, SweepStep]
    """Distinct runs by key; each comes after those that it needs."""
    seed_parameters: tuple[str, ...]
    timeout_s: float | None
    cluster: Slurm | None


def read_sweep(path: str | Path) -> Sweep:
    """A sweep file, checked as far as it can be before anything runs.

    FileNotFoundError for a file, pipeline or notebook that is not there; ValueError, with the file and where in it, for whatever is
    unknown, does not fit, or is there twice.
    """
    path = Path(path)
    table: SweepTable = config.parse(SweepTable, config.read_toml(path), str(path))
    plain = _pipeline(path, table, {})
    seeded = table.seed_parameters or (_seed_parameters(plain) if table.seeds else ())
    if table.seeds and not seeded:
        raise ValueError(f"{path}: no step has a parameter `seed`; name what the seeds are for in seed_parameters")
    chosen = list(_combinations(path, table, [step.name for step in plain.steps], seeded))
    points: list[Point] = []
    steps: dict[str, SweepStep] = {}
    for parameters, seed in itertools.product(chosen, table.seeds or (None,)):
        number = len(points) + 1
        label = describe(_differing(parameters, chosen), seed) or "the only point"
        try:
            pipeline = _pipeline(path, table, {**parameters, **dict.fromkeys(seeded, seed)})
        except ValueError as error:
            raise ValueError(f"{path}, point {number} ({label}): {error}") from None
        keys: dict[str, str] = {}
        for step in pipeline.steps:
            one = SweepStep(step, pipeline.name, {name: keys[name] for name in step.needs})
            steps.setdefault(one.key, one)
            keys[step.name] = one.key
        for other in points:
            if other.runs == keys:
                raise ValueError(f"{path}: points {other.number} and {number} are the same ({label})")
        points.append(Point(number, parameters, seed, label, keys))
    return Sweep(path, table.name or path.stem, tuple(points), steps, tuple(seeded), table.timeout_s, table.cluster)


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
        name = notebooks.find_notebook(beside if beside.is_file() else table.notebook)
        return pipelines.single(name, {key.removeprefix(f"{name.stem}."): value for key, value in given.items()})
    named = Path(str(table.pipeline))
    for place in (path.parent / named, named, runs.PROJECT / named, PIPELINES / named):
        if place.is_file():
            return pipelines.read_pipeline(place, given)
    known = sorted(file.name for file in PIPELINES.glob("*.toml"))
    raise FileNotFoundError(
        f"{path}: no pipeline {named}{config.did_you_mean(named.name, known)}; known: {', '.join(known)}"
    )


def _seed_parameters(pipeline: Pipeline) -> tuple[str, ...]:
    """`seed` of every step that has the first one's default.

    A step with another default keeps it: it samples by a protocol (notebook 05 has the original's 100003), so that all points are
    tested with the same random numbers.
    """
    declared = {step.name: notebooks.open_notebook(step.notebook).parameters.get("seed") for step in pipeline.steps}
    defaults = {name: parameter.default for name, parameter in declared.items() if parameter is not None}
    return tuple(f"{name}.seed" for name in defaults if defaults[name] == next(iter(defaults.values())))


def _combinations(path: Path, table: SweepTable, steps: list[str], seeded: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Parameters of every point but for the seed: each of the list, merged over the fixed ones, times the grid."""
    fixed, *rows = (_flat(row, steps) for row in (table.parameters, *table.point))
    grid: dict[str, list[Any]] = config.parse(dict[str, list[Any]], _flat(table.grid, steps), f"{path}, [grid]")
    named = [*grid, *seeded, *dict.fromkeys(key for row in (fixed, *rows) for key in row)]
    if twice := [key for key in named if named.count(key) > 1]:
        raise ValueError(f"{path}: {twice[0]} is varied by [grid] or `seeds`; leave it out elsewhere")
    for row, values in itertools.product(rows, itertools.product(*grid.values())):
        yield {**fixed, **row, **dict(zip(grid, values, strict=True))}


def _flat(table: Mapping[str, Any], steps: list[str]) -> dict[str, Any]:
    """`step.key = …`, which TOML reads as a table in a table, as `{"step.key": …}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and key in steps
        flat |= {f"{key}.{name}": item for name, item in value.items()} if inner else {key: value}
    return flat


def _differing(parameters: Mapping[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of a point's parameters that do not have the same value in all points."""
    return {key: value for key, value in parameters.items() if any(point.get(key) != value for point in points)}
