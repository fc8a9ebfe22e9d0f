"""Sweep files: which points of a pipeline's or a notebook's parameters to run.

name = "rank"
pipeline = "demo.toml"             # or notebook = "05_test"; beside this file, in notebooks/pipelines, or a path

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
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netllm_lib import notebooks, pipelines, runs
from netllm_lib.pipelines import Pipeline, Step

KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "a text"),
    "pipeline": ((str,), "a text"),
    "notebook": ((str,), "a text"),
    "parameters": ((dict,), "a table"),
    "grid": ((dict,), "a table"),
    "point": ((list,), "a list of tables, [[point]]"),
    "seeds": ((list,), "a list"),
    "seed_parameters": ((list,), "a list"),
    "timeout_s": ((int, float), "a number"),
    "cluster": ((dict,), "a table"),
}
NO_SEED: list[int | None] = [None]


@dataclass(frozen=True)
class SweepStep:
    """One run of one notebook, which several points may share."""

    key: str
    """Says all that decides the run but the library and the data: notebook, parameters, and the keys of the runs it reads."""
    step: Step
    run_name: str
    """First part of the name of the run folder, as a plain `netllm run` would have it."""
    needs: dict[str, str]
    """Key of the run that is meant by each `{step}` in its parameters."""


@dataclass(frozen=True)
class Point:
    """One row of the sweep: parameters as the file has them, and a run for each step of the pipeline."""

    number: int
    parameters: dict[str, Any]
    seed: int | None
    runs: dict[str, str]
    """Key of the run of each step, in order."""

    @property
    def label(self) -> str:
        seed = {} if self.seed is None else {"seed": self.seed}
        return describe({**self.parameters, **seed}) or "everything as the notebook has it"


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked: all points, and the distinct runs that they need."""

    path: Path
    name: str
    points: tuple[Point, ...]
    steps: dict[str, SweepStep]
    """Distinct runs by key, in an order in which each comes after those it needs."""
    seed_parameters: tuple[str, ...]
    inputs: dict[str, str]
    """Hashes of what the runs are made from: notebooks, library, data, files in parameters."""
    timeout_s: float | None
    cluster: dict[str, Any]

    @property
    def varied(self) -> list[str]:
        """Parameters, other than seeds, that do not have the same value in all points."""
        keys = dict.fromkeys(key for point in self.points for key in point.parameters)
        first = self.points[0].parameters
        return [
            key
            for key in keys
            if any(key not in p.parameters or p.parameters[key] != first.get(key) for p in self.points)
        ]


def describe(parameters: Mapping[str, Any]) -> str:
    """`{"04_finetune.rank": 8, "seed": 1}` as a person wants to read it: `rank=8 seed=1`."""
    short = [key.rpartition(".")[2] for key in parameters]
    names = [name if short.count(name) == 1 else key for name, key in zip(short, parameters, strict=True)]
    return " ".join(f"{name}={value}" for name, value in zip(names, parameters.values(), strict=True))


def read_sweep(path: str | Path) -> Sweep:
    """A sweep file, checked as far as it can be before anything runs.

    FileNotFoundError for a file, pipeline or notebook that is not there; ValueError, with the file and where in it, for whatever is
    unknown, does not fit, or is there twice.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    _check_keys(path, table)
    source, is_pipeline = _source(path, table)
    names, seeds_declared = _steps_of(source, is_pipeline)
    fixed = _flat(table.get("parameters", {}), names)
    chosen = _combinations(path, fixed, table, names)
    seeds = _seeds(path, table)
    seed_keys = tuple(_seed_parameters(path, table, seeds_declared)) if seeds else ()
    points: list[Point] = []
    steps: dict[str, SweepStep] = {}
    for parameters, seed in itertools.product(chosen, seeds or NO_SEED):
        for key in parameters:
            if key in seed_keys or (seeds and key == "seed"):
                raise ValueError(f"{path}: {key} is set by `seeds`; leave it out of the parameters")
        given = {**parameters, **dict.fromkeys(seed_keys, seed)}
        point = Point(len(points) + 1, parameters, seed, {})
        try:
            pipeline = _pipeline(source, is_pipeline, given)
        except ValueError as error:
            raise ValueError(f"{path}, point {point.number} ({point.label}): {error}") from None
        for step in pipeline.steps:
            needs = {name: point.runs[name] for name in step.needs}
            key = f"{step.name}-{_key(step, pipeline.name, needs)}"
            steps.setdefault(key, SweepStep(key, step, pipeline.name, needs))
            point.runs[step.name] = key
        for other in points:
            if other.runs == point.runs:
                raise ValueError(f"{path}: points {other.number} and {point.number} are the same ({point.label})")
        points.append(point)
    ordered = dict(sorted(steps.items(), key=lambda item: _depth(item[1], steps)))
    timeout_s = table.get("timeout_s")
    return Sweep(
        path,
        table.get("name", path.stem),
        tuple(points),
        ordered,
        seed_keys,
        _inputs(ordered),
        timeout_s,
        table.get("cluster", {}),
    )


# --- the file -----------------------------------------------------------------------------------------------------------


def _check_keys(path: Path, table: Mapping[str, Any]) -> None:
    for key in table:
        if key not in KEYS:
            raise ValueError(
                f"{path}: unknown key '{key}'{notebooks.did_you_mean(key, KEYS)}; known: {', '.join(KEYS)}"
            )
    if ("pipeline" in table) == ("notebook" in table):
        raise ValueError(f'{path}: one of `pipeline = "FILE.toml"` and `notebook = "NAME"` is needed')
    for key, value in table.items():
        kinds, words = KEYS[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {words}, got {value!r}")
    name = table.get("name", path.stem)
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"{path}: name {name!r} becomes part of a folder's name: letters, digits, - and _")


def _source(path: Path, table: Mapping[str, Any]) -> tuple[Path, bool]:
    """The pipeline file or the notebook that is swept, and which of them it is."""
    if "notebook" in table:
        beside = path.parent / table["notebook"]
        return notebooks.find_notebook(beside if beside.is_file() else table["notebook"]), False
    named = Path(table["pipeline"])
    places = (path.parent / named, named, runs.PROJECT / named, notebooks.NOTEBOOKS / "pipelines" / named)
    for place in places:
        if place.is_file():
            return place.resolve(), True
    known = sorted(file.name for file in (notebooks.NOTEBOOKS / "pipelines").glob("*.toml"))
    raise FileNotFoundError(
        f"{path}: no pipeline {named}{notebooks.did_you_mean(named.name, known)}; known: {', '.join(known) or 'none'}"
    )


def _pipeline(source: Path, is_pipeline: bool, given: Mapping[str, Any]) -> Pipeline:
    """The steps with `given` filled in; a single notebook is a pipeline of one step, named as `netllm run` names its runs."""
    if is_pipeline:
        return pipelines.read_pipeline(source, given)
    declared = notebooks.open_notebook(source)[1]
    own = {key.removeprefix(f"{source.stem}."): value for key, value in given.items()}
    step = Step(source.stem, source, notebooks.fit_parameters(declared, own, source.stem))
    if step.needs:
        raise ValueError(f"{source.stem}: {{{step.needs[0]}}} stands for a step, and a single notebook has no others")
    return Pipeline("run", (step,))


def _steps_of(source: Path, is_pipeline: bool) -> tuple[list[str], dict[str, Any]]:
    """Names of all steps; and of those that declare `seed`, its default."""
    steps = _pipeline(source, is_pipeline, {}).steps
    declared = {step.name: notebooks.open_notebook(step.notebook)[1] for step in steps}
    return list(declared), {name: found["seed"].default for name, found in declared.items() if "seed" in found}


def _flat(table: Mapping[str, Any], steps: list[str]) -> dict[str, Any]:
    """`step.key = …`, which TOML reads as a table in a table, as `{"step.key": …}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and key in steps
        flat |= {f"{key}.{name}": item for name, item in value.items()} if inner else {key: value}
    return flat


def _combinations(
    path: Path, fixed: Mapping[str, Any], table: Mapping[str, Any], steps: list[str]
) -> list[dict[str, Any]]:
    """Parameters of every point: each of the list, merged over the fixed ones, times the grid."""
    grid = _flat(table.get("grid", {}), steps)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}, [grid]: {key} needs a list of values, got {values!r}")
        if len({runs.content_hash(value) for value in values}) < len(values):
            raise ValueError(f"{path}, [grid]: {key} has a value twice: {values}")
        if key in fixed:
            raise ValueError(f"{path}: {key} is fixed in [parameters] and varied in [grid]; leave one out")
    rows = table.get("point", [{}])
    chosen = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or ("point" in table and not row):
            raise ValueError(f"{path}: each point is a table, [[point]], with at least one parameter, got {row!r}")
        own = _flat(row, steps)
        for key in own:
            if key in grid:
                raise ValueError(f"{path}: {key} is varied in [grid] and set in [[point]] {number}; leave one out")
        chosen += [
            {**fixed, **own, **dict(zip(grid, values, strict=True))} for values in itertools.product(*grid.values())
        ]
    return chosen


def _seeds(path: Path, table: Mapping[str, Any]) -> list[int]:
    seeds = table.get("seeds", [])
    if "seeds" in table and not seeds:
        raise ValueError(f"{path}: seeds is an empty list")
    if any(not isinstance(seed, int) or isinstance(seed, bool) for seed in seeds):
        raise ValueError(f"{path}: seeds are whole numbers, got {seeds}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: a seed is there twice: {seeds}")
    if "seed_parameters" in table and not seeds:
        raise ValueError(f"{path}: seed_parameters without seeds = [1, 2, …]")
    return seeds


def _seed_parameters(path: Path, table: Mapping[str, Any], declared: Mapping[str, Any]) -> list[str]:
    """Which parameters get the seed: those named, or `seed` of every step that has the first one's default.

    A step with another default keeps it: it samples by a protocol (notebook 05 has the original's 100003), so that all points are
    tested with the same random numbers.
    """
    if "seed_parameters" in table:
        named = table["seed_parameters"]
        if not named or not all(isinstance(name, str) for name in named):
            raise ValueError(f'{path}: seed_parameters is a list such as ["04_finetune.seed"], got {named}')
        return list(dict.fromkeys(named))
    if not declared:
        raise ValueError(f"{path}: no step has a parameter `seed`; name what the seeds are for in seed_parameters")
    first = next(iter(declared.values()))
    return [f"{step}.seed" for step, default in declared.items() if default == first]


# --- what the runs are ----------------------------------------------------------------------------------------------------


def _key(step: Step, run_name: str, needs: Mapping[str, str]) -> str:
    what = {"notebook": str(step.notebook), "name": run_name, "expected": step.expected}
    return runs.content_hash({**what, "parameters": step.parameters, "needs": needs})


def _depth(step: SweepStep, steps: Mapping[str, SweepStep]) -> int:
    return 1 + max((_depth(steps[key], steps) for key in step.needs.values()), default=0)


def _inputs(steps: Mapping[str, SweepStep]) -> dict[str, str]:
    """Hashes of all that the runs are made from, by name."""
    found: dict[str, str] = {}
    for path in dict.fromkeys(one.step.notebook for one in steps.values()):
        every: dict[str, list[Any]] = {}
        for one in steps.values():
            for key, value in one.step.parameters.items() if one.step.notebook == path else ():
                every.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        hashes = notebooks.input_hashes(notebooks.open_notebook(path)[2], every)
        found |= {f"notebook {path.stem}" if name == "notebook" else name: value for name, value in hashes.items()}
    return found
