"""JUnit XML: counts and attributes that readers require, and text that XML cannot hold."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from netllm_lib import junit, runs
from netllm_lib.junit import Case

CASES = [
    Case("make", "demo", "passed", 1.25, output="run folder: a"),
    Case(
        "use",
        "demo",
        "failed",
        2.0,
        'cell 3: "<&>"',
        "NotebookError",
        "Traceback\n\x1b[0;31mValueError\x1b[0m: x ]]> y",
    ),
    Case("last", "demo", "skipped", message="it needs use, which failed"),
    Case("gate", "demo.gates", "error", message="no test", kind="gate"),
]

REQUIRED = {
    "testsuites": {"name", "tests", "failures", "errors", "time"},
    # Ant's schema, the strictest
    "testsuite": {"id", "package", "name", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"classname", "name", "time"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
    "property": {"name", "value"},
}
CHILDREN = {
    "testsuites": ["testsuite"],
    "testsuite": ["properties", "testcase", "system-out", "system-err"],
    "properties": ["property"],
    "testcase": ["skipped", "error", "failure", "system-out", "system-err"],
}


def check_document(root: ET.Element) -> None:
    """What the schemas demand: attributes, children and their order, types, counts that add up."""
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.attrib) >= REQUIRED.get(element.tag, set()), element.tag
        order = [CHILDREN.get(element.tag, []).index(child.tag) for child in element]
        assert order == sorted(order), element.tag
        if "time" in element.attrib:
            assert re.fullmatch(r"\d+\.\d{3}", element.attrib["time"])
    for suite in root:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        cases = suite.findall("testcase")
        assert int(suite.attrib["tests"]) == len(cases)
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[key]) == sum(case.find(tag) is not None for case in cases)
        assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)


def test_document_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "junit.xml"
    junit.write(path, "demo", CASES, {"target": "demo.toml"}, started=0.0)
    root = ET.parse(path).getroot()
    check_document(root)
    (suite,) = root
    assert suite.attrib["timestamp"] == "1970-01-01T00:00:00"
    assert suite.attrib["time"] == "3.250"
    assert suite.find("properties/property[@name='target']") is not None
    make, use, last, gate = suite.findall("testcase")
    assert [child.tag for child in make] == ["system-out"]
    assert make.findtext("system-out") == "run folder: a"
    failure = use.find("failure")
    assert failure is not None
    assert failure.attrib == {"message": 'cell 3: "<&>"', "type": "NotebookError"}
    assert failure.text == "Traceback\nValueError: x ]]> y"
    assert [child.attrib["message"] for child in last] == ["it needs use, which failed"]
    assert [(child.tag, child.text) for child in gate] == [("error", "no test")]
    assert [file.name for file in path.parent.iterdir()] == ["junit.xml"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b[1;38;5;241mred\x1b[0m\x1b[K", "red"),
        ("\x1b]8;;file:///a\x1b\\link\x1b]8;;\x07", "link"),
        ("nul\x00 bell\x07 delete\x7f tab\t line\nreturn\r", "nul bell delete\x7f tab\t line\nreturn\r"),
        ("half \ud800 pair, \ufffe, \uffff, 𝄞 ok", "half  pair, , , 𝄞 ok"),
        ("a lone \x1b", "a lone "),
    ],
)
def test_what_xml_forbids_is_removed(text: str, left: str) -> None:
    assert junit.clean(text) == left
    case = Case(text, text, "failed", 0.0, text, text, text, text)
    written = ET.tostring(junit.document(text, [case], {text: text}), encoding="utf-8")
    (read,) = ET.fromstring(written).iter("testcase")
    assert read.get("name") == left
    assert read.findtext("failure") == left.rstrip("\r")


def test_only_the_end_of_a_long_traceback_is_kept() -> None:
    details = "\n".join(f"line {number}" for number in range(1000))
    root = junit.document("demo", [Case("make", "demo", "failed", details=details)])
    lines = str(root.findtext("testsuite/testcase/failure")).splitlines()
    assert (len(lines), lines[-1]) == (junit.DETAIL_LINES, "line 999")


def test_an_older_file_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "junit.xml"
    junit.write(path, "old", CASES)
    monkeypatch.setattr(runs, "_flush", lambda aside: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(runs.StorageError, match="the disk is full"):
        junit.write(path, "new", CASES)
    assert ET.parse(path).getroot().attrib["name"] == "old"
