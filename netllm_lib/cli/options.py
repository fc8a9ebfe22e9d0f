"""Options and habits that several commands share."""

from __future__ import annotations

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
    sound = "sound"
    upstream = "upstream"


def echo(line: str) -> None:
    """Print a line that is seen at once, in a log file too."""
    print(line, flush=True)
