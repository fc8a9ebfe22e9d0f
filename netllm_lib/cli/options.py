"""Options and habits that several commands share."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DIR", help="Where traces and videos are [else $NETLLM_DATA, data/netllm, the sample]."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]


class Preset(StrEnum):
    """Whether policies and protocol are sound, or as in the original."""

    sound = "sound"
    upstream = "upstream"


def echo(line: str) -> None:
    """Print a line that is seen at once, in a log file too."""
    print(line, flush=True)


@contextmanager
def waiting(what: str, after_s: float = 2.0, every_s: float = 10.0) -> Iterator[None]:
    """Say on standard error that the block is still at work, first after two seconds: for work that cannot count its steps."""
    done, started = threading.Event(), time.monotonic()

    def speak() -> None:
        pause = after_s
        while not done.wait(pause):
            print(f"{what}: {time.monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)
            pause = every_s

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def counting(what: str, after_s: float = 2.0) -> Callable[..., None]:
    """A progress callback that says nothing for two seconds, then a line every two."""
    last = time.monotonic()

    def line(done: int, total: int, info: object = None) -> None:
        nonlocal last
        if time.monotonic() - last >= after_s:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return line
