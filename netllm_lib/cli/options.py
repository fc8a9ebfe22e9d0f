"""Options and habits that several commands share."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DIR", help="Where traces and videos are [else $NETLLM_DATA, data/netllm, the sample]."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]


def echo(line: str) -> None:
    """Print a line that is seen at once, in a log file too."""
    print(line, flush=True)


def print_json(asked: bool, answer: Any) -> None:
    """The line of JSON that ends a command's output, if it is asked for."""
    from netllm_lib.runs import plain

    if asked:
        echo(json.dumps(plain(answer), allow_nan=False))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on standard error that the block is still at work, first after two seconds: for work that cannot count its steps."""
    done, started = threading.Event(), time.monotonic()

    def speak() -> None:
        pause_s = 2.0
        while not done.wait(pause_s):
            print(f"{what}: {time.monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)
            pause_s = 10.0

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        done.set()
