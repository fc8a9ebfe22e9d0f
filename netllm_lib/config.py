"""Strict reading of TOML, JSON and the command line into our dataclasses, by pydantic.

Nothing is guessed: an unknown key, a missing one or a value of another type is a ValueError that says where it stands. True is
no number, a number no text, and infinity and NaN are refused.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

T = TypeVar("T")
UNIONS = (types.UnionType, typing.Union)
UNKNOWN = "unexpected_keyword_argument"  # as pydantic calls it
WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None, "null": None}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file. FileNotFoundError, or a ValueError that names the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not readable, not text, not TOML, nested without end
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def parse(kind: type[T] | Any, value: Any, where: str) -> T:
    """`value`, as JSON or TOML has it, as the type `kind`: a dataclass, or any type that pydantic knows.

    Lists become the tuples, and strings the paths, that `kind` declares. What a dataclass refuses in `__post_init__` is refused
    here. ValueError, beginning with `where` and naming the field, for everything else.
    """
    try:
        text = json.dumps([value])  # as JSON: the one form in which pydantic is strict and still reads tuples and paths
        return _adapter(kind).validate_json(text)[0]  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_problem(kind, value, error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}, got {value!r:.60}") from None


def parse_text(kind: Any, text: str, where: str) -> Any:
    """A word of the command line as the type `kind`: "true" for a bool, "a,b" or "['a', 'b']" for a list, "none" for None.

    ValueError, beginning with `where`, for a word that is nothing of the kind.
    """
    word, items = text.strip(), [item.strip() for item in text.split(",") if item.strip()]
    options = typing.get_args(kind) if typing.get_origin(kind) in UNIONS else [kind]
    for option in sorted(options, key=lambda option: option is str):  # every word is a string: that comes last
        for reading in (word, _literal(word), [_literal(item) for item in items], items):
            with contextlib.suppress(ValueError):
                return parse(option, reading, where)
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")
    raise ValueError(f"{where} is {name}, got {text!r}")


def _literal(word: str) -> Any:
    """What a word says as Python writes values; else the word itself."""
    try:
        return WORDS[word.lower()] if word.lower() in WORDS else ast.literal_eval(word)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return word


@functools.lru_cache(maxsize=256)
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    # A dataclass has no settings of its own and pydantic gives it none when it stands alone; inside a tuple it takes those here.
    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic.TypeAdapter(tuple[kind], config=strict)


def _problem(kind: Any, value: Any, error: pydantic.ValidationError) -> str:
    """The first thing that is wrong, with its place in `value`; a misspelt name before the right one that is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != UNKNOWN)
    first, place = problems[0], _place(value, problems[0]["loc"][1:])
    inside, field = _shown(place[:-1]), _shown(place)
    if first["type"] == UNKNOWN:
        known = _fields(kind, place[:-1])
        key = f"'{_shown(place[-1:])}'" + (f" in {inside}" if inside else "")
        return f"unknown key {key}{did_you_mean(place[-1], known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"it needs {'.'.join(map(str, first['loc'][1:]))}"
    before = f"{field}: " if field else ""
    if first["type"] == "value_error":
        return f"{before}{first['ctx']['error']}"
    said = [
        one["msg"].replace("Input", "it", 1) for one in problems if _place(value, one["loc"][1:]) == place
    ]  # of a union
    return f"{before}{' or '.join(dict.fromkeys(said))}, got {first['input']!r:.60}"


def _shown(place: Iterable[Any]) -> str:
    """A place for a message: names come from files, and may be long or no text."""
    return "".join(letter if letter.isprintable() else "?" for letter in ".".join(map(str, place)))[:200]


def _place(value: Any, names: Iterable[Any]) -> tuple[Any, ...]:
    """Of pydantic's path into a value the part that is there; the rest names the types that it tried."""
    found: tuple[Any, ...] = ()
    for name in names:
        if not (name in value if isinstance(value, dict) else isinstance(value, list) and isinstance(name, int)):
            break
        value, found = value[name], (*found, name)
    return found


def _fields(kind: Any, place: Sequence[Any]) -> list[str]:
    """The field names of the dataclass at a place inside the type `kind`."""
    if dataclasses.is_dataclass(kind):
        if place:
            return _fields(typing.get_type_hints(kind)[place[0]], place[1:])
        return [field.name for field in dataclasses.fields(kind)]
    inner = place if typing.get_origin(kind) in UNIONS else place[1:]
    return next((found for option in typing.get_args(kind) if (found := _fields(option, inner))), [])
