"""JUnit XML, the file by which GitHub, GitLab and Jenkins learn what a run did.

There is no one schema; what is written has the attributes that the common ones require (Ant's, Jenkins', GitLab's reading of
them): a suite with its counts, time, timestamp and host, a case for every piece of work.
"""

from __future__ import annotations

import platform
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from netllm_lib import runs

ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Colours and other orders to a terminal, as tracebacks have them."""

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, escaped or not."""

DETAIL_LINES = 60
"""As many lines of a case's details are kept, the last ones: the error is at a traceback's end."""


@dataclass(frozen=True)
class Case:
    """One case of a suite: a step, or a condition that was checked."""

    name: str
    group: str
    """Written as `classname`, by which reports are sorted."""
    state: Literal["passed", "failed", "error", "skipped"]
    """failed: the thing examined is not as it should be; error: it could not be examined."""
    seconds: float = 0.0
    message: str = ""
    """Why it failed or was skipped, in one line."""
    kind: str = ""
    """Of the failure, such as the exception's name."""
    details: str = ""
    """Text of the failure: a traceback. Its end is kept."""
    output: str = ""
    """Written as `system-out`."""


def clean(text: str) -> str:
    """`text` without terminal colours and without the characters that XML forbids."""
    return FORBIDDEN.sub("", ANSI.sub("", text))


def document(
    suite: str, cases: Sequence[Case], properties: Mapping[str, str] | None = None, started: float | None = None
) -> ET.Element:
    """The root element, `testsuites`, with one suite, which began at `started` (seconds since 1970; now by default)."""
    counts = {
        "tests": len(cases),
        "failures": sum(case.state == "failed" for case in cases),
        "errors": sum(case.state == "error" for case in cases),
        "skipped": sum(case.state == "skipped" for case in cases),
    }
    numbers = {key: str(count) for key, count in counts.items()}
    numbers["time"] = f"{sum(case.seconds for case in cases):.3f}"
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(started))  # Ant's schema has no place for a time zone
    root = ET.Element("testsuites", {"name": clean(suite), **numbers})
    about = {"id": "0", "package": clean(suite), "hostname": clean(platform.node()) or "localhost", "timestamp": stamp}
    element = ET.SubElement(root, "testsuite", {"name": clean(suite), **numbers, **about})
    listed = ET.SubElement(element, "properties")
    for key, value in (properties or {}).items():
        ET.SubElement(listed, "property", {"name": clean(key), "value": clean(value)})
    for case in cases:
        _add(element, case)
    return root


def _add(suite: ET.Element, case: Case) -> None:
    names = {"classname": clean(case.group), "name": clean(case.name), "time": f"{case.seconds:.3f}"}
    element = ET.SubElement(suite, "testcase", names)
    message = {"message": clean(case.message)}
    if case.state == "skipped":
        ET.SubElement(element, "skipped", message)
    elif case.state != "passed":
        tag = "failure" if case.state == "failed" else "error"
        problem = ET.SubElement(element, tag, {**message, "type": clean(case.kind) or case.state})
        problem.text = clean("\n".join((case.details or case.message).splitlines()[-DETAIL_LINES:]))
    if case.output:
        ET.SubElement(element, "system-out").text = clean(case.output)


def write(
    path: Path,
    suite: str,
    cases: Sequence[Case],
    properties: Mapping[str, str] | None = None,
    started: float | None = None,
) -> None:
    """Write `document` to `path`, atomically. Raises StorageError where that is not possible."""
    tree = ET.ElementTree(document(suite, cases, properties, started))
    ET.indent(tree)
    with runs.atomic_path(path) as aside:
        tree.write(aside, encoding="utf-8", xml_declaration=True)
