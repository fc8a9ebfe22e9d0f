"""Strict reading of files and of words of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from netllm_lib import config


@dataclass(frozen=True)
class Rates:
    lr: float
    steps: int | None = None


@dataclass(frozen=True)
class Job:
    name: str
    rates: Rates
    layers: tuple[int, ...] = ()
    mode: Literal["step", "micro"] = "step"
    folder: Path | None = None
    more: list[Rates] = field(default_factory=list)
    size: int | str = 1

    def __post_init__(self) -> None:
        if self.name == "..":
            raise ValueError("name '..' is no name")


def test_a_file_becomes_the_dataclass(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        'name = "a"\nlayers = [1, 2]\nfolder = "x/y"\nsize = "big"\n[rates]\nlr = 1\n[[more]]\nlr = 0.5\nsteps = 3\n'
    )
    job: Job = config.parse(Job, config.read_toml(tmp_path / "job.toml"), "job.toml")
    assert job == Job("a", Rates(1.0), (1, 2), folder=Path("x/y"), more=[Rates(0.5, 3)], size="big")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nam": "b"}, "f: unknown key 'nam', did you mean 'name'?; known: name, rates, layers, mode, folder, more, size"),
        ({"more": [{"lr": 1, "xlr": 1}]}, "f: unknown key 'xlr' in more.0, did you mean 'lr'?; known: lr, steps"),
        ({"rates": {"lr": True}}, "f: rates.lr: it should be a valid number, got True"),
        ({"rates": {"lr": float("inf")}}, "f: rates.lr: it should be a finite number, got inf"),
        ({"rates": {"lr": 1, "steps": 1.0}}, "f: rates.steps: it should be a valid integer, got 1.0"),
        ({"rates": {}}, "f: it needs rates.lr"),
        ({"layers": [1, "2"]}, "f: layers.1: it should be a valid integer, got '2'"),
        ({"mode": "macro"}, "f: mode: it should be 'step' or 'micro', got 'macro'"),
        ({"size": 1.5}, "f: size: it should be a valid integer or it should be a valid string, got 1.5"),
        ({"name": ".."}, "f: name '..' is no name"),
        ({"name": object()}, "f: Object of type object is not JSON serializable"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        config.parse(Job, {"name": "a", "rates": {"lr": 1}} | given, "f")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"a = 1\nb = ?", "line 2"), (b"\xff\xfe", "not valid"), (b"a = " + b"[" * 10_000, "not valid")]
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "f.toml"
    with pytest.raises(FileNotFoundError, match="no such file"):
        config.read_toml(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        config.read_toml(path)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (bool, "true", True), (bool, "No", False), (int, "-3", -3), (float, "1e-3", 1e-3), (str, "5", "5"), (Path, "a", Path("a")),
        (int | None, "none", None), (int | str, "5", 5), (int | str, "x", "x"), (str | None, "None", None),
        (Literal["a", 2], "2", 2), (list[int], "1, 2", [1, 2]), (list[int], "8", [8]), (list[str], "['a,b', 'c']", ["a,b", "c"]),
        (list[str], "1,a", ["1", "a"]), (list[str], "", []), (list[bool], "true,false", [True, False]), (Any, "a", "a"),
        (tuple[float, ...], "1,2", (1.0, 2.0)), (dict[str, int], "{'a': 1}", {"a": 1}), (Annotated[str, "a path"], "x/y", "x/y"),
    ],
)  # fmt: skip
def test_words_of_the_command_line(kind: Any, text: str, value: Any) -> None:
    found = config.parse_text(kind, text, "p")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (bool, "maybe", "p is bool, got 'maybe'"),
        (int, "1.5", "p is int, got '1.5'"),
        (float, "nan", "p is float, got 'nan'"),
        (Literal["argmax", "sample"], "greedy", r"p is Literal\['argmax', 'sample'\], got 'greedy'"),
        (list[int], "1,x", r"p is list\[int\], got '1,x'"),
        (dict[str, int], "__import__('os')", "p is dict"),
    ],
)
def test_words_that_are_nothing_of_the_kind(kind: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.parse_text(kind, text, "p")
