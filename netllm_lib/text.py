"""Text of others (names in files, messages about them) as it may be shown: on a terminal, in a page, in XML."""

from __future__ import annotations

import contextlib
import html
import re
import sys
from collections.abc import Iterator
from typing import Any

_ODD = re.compile(
    "(?P<colour>\x1b\\[[0-?]*[ -/]*[@-~])"  # as tracebacks have them
    "|\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # they move the cursor, or worse
    "\u2028-\u202e\u2066-\u2069"  # they turn the direction of writing
    "\ud800-\udfff\ufffe\uffff]"  # they are no characters
)


def printable(text: object) -> str:
    """The text with a question mark in place of each character that does something; line breaks and tabs stay, colours go."""
    return _ODD.sub(lambda found: "" if found["colour"] else "?", str(text))


def escaped(text: object) -> str:
    """The text as part of a page."""
    return html.escape(printable(text))


class _Printable:
    """A stream on which whatever is printed is only shown."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        bar = "\r" if text.startswith("\r") else ""  # a progress bar's own
        self.stream.write(bar + printable(text.removeprefix(bar)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Inside the block nothing that is printed can control the terminal."""
    out, problems = _Printable(sys.stdout), _Printable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(problems):
        yield
