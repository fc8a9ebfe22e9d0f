"""JUnit XML, the file by which GitHub, GitLab and Jenkins learn what a run did: a case for every step and every gate."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netllm_lib import runs
from netllm_lib.text import printable

if TYPE_CHECKING:
    from netllm_lib.gate import Verdict
    from netllm_lib.pipelines import Outcome

TAGS = {"failed": "failure", "error": "error", "skipped": "skipped"}


def write(path: Path, suite: str, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict] = ()) -> None:
    """Write the file, atomically. Raises StorageError where that is not possible."""
    root = ET.Element("testsuites")
    element = ET.SubElement(root, "testsuite", name=suite, timestamp=time.strftime("%Y-%m-%dT%H:%M:%S"))
    rows: list[tuple[Any, ...]] = []
    for o in outcomes:
        folder = f"run folder: {o.folder or 'none'}"
        rows.append((suite, o.name, o.seconds, o.state, o.problem, "\n".join(o.traceback), folder))
    rows += [(f"{suite}.gates", v.title, 0.0, v.state, v.reason, v.reason, v.reason) for v in verdicts]
    for group, name, seconds, state, *texts in rows:
        name, problem, details, output = map(printable, (name, *texts))
        case = ET.SubElement(element, "testcase", classname=group, name=name, time=f"{seconds:.3f}")
        if tag := TAGS.get(state):
            ET.SubElement(case, tag, message=problem).text = details
        ET.SubElement(case, "system-out").text = output
    for name, tag in {"failures": "failure", "errors": "error", "skipped": "skipped", "tests": "."}.items():
        for part in (root, element):
            part.set(name, str(len(element.findall(f"testcase/{tag}"))))
    ET.indent(root)
    with runs.atomic_path(path) as aside:
        ET.ElementTree(root).write(aside, encoding="utf-8", xml_declaration=True)
