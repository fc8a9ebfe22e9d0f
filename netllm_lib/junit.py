"""JUnit XML, the file by which GitHub, GitLab and Jenkins learn what a run did: a case for every step and every gate."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from netllm_lib import runs

if TYPE_CHECKING:
    from netllm_lib.gate import Verdict
    from netllm_lib.pipelines import Outcome

NOT_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Colours of a terminal, as tracebacks have them, and what XML 1.0 cannot hold, escaped or not."""

TAGS = {"failed": "failure", "error": "error", "skipped": "skipped"}


def write(path: Path, suite: str, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict] = ()) -> None:
    """Write the file, atomically. Raises StorageError where that is not possible."""
    root = ET.Element("testsuites")
    element = ET.SubElement(root, "testsuite", name=suite, timestamp=time.strftime("%Y-%m-%dT%H:%M:%S"))
    for one in outcomes:
        where = f"run folder: {one.folder}" if one.folder else ""
        _add(element, suite, one.name, one.state, one.problem, "\n".join(one.traceback), where, one.seconds)
    for verdict in verdicts:
        _add(element, f"{suite}.gates", verdict.title, verdict.state, verdict.reason, verdict.reason, verdict.reason)
    for name, tag in {"failures": "failure", "errors": "error", "skipped": "skipped", "tests": "."}.items():
        for part in (root, element):
            part.set(name, str(len(element.findall(f"testcase/{tag}"))))
    ET.indent(root)
    with runs.atomic_path(path) as aside:
        ET.ElementTree(root).write(aside, encoding="utf-8", xml_declaration=True)


def _add(
    suite: ET.Element, group: str, name: str, state: str, problem: str, details: str, output: str, seconds: float = 0.0
) -> None:
    case = ET.SubElement(suite, "testcase", classname=group, name=NOT_TEXT.sub("", name), time=f"{seconds:.3f}")
    if tag := TAGS.get(state):
        ET.SubElement(case, tag, message=NOT_TEXT.sub("", problem)).text = NOT_TEXT.sub("", details)
    ET.SubElement(case, "system-out").text = NOT_TEXT.sub("", output)
