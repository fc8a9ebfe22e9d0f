"""Chains of notebooks: parameters, references between steps, overrides, failures, JUnit."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from netllm_lib import junit, runs
from netllm_lib.notebooks import NotebookError
from netllm_lib.pipelines import Outcome, read_pipeline, resolve, run_steps
from test_cli import run
from test_notebooks import write_notebook

PIPELINE = """
name = "small"
[parameters]
video = "video1"
[[step]]
notebook = "make.ipynb"
[[step]]
notebook = "use.ipynb"
name = "test"
timeout_s = 60
[step.parameters]
pool = "{make}/pool.txt"
"""
FAILING = """
name = "parts"
[[step]]
notebook = "make.ipynb"
[step.parameters]
size = 0
[[step]]
notebook = "use.ipynb"
[step.parameters]
pool = "{make}/pool.txt"
[[step]]
notebook = "make.ipynb"
name = "other"
[[step]]
notebook = "make.ipynb"
name = "last"
after = ["use"]
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline file beside its two notebooks: the first writes a file, the second reads it."""
    folder = tmp_path_factory.mktemp("pipeline")
    cells = ["assert size > 0, 'size must be positive'", "pathlib.Path(run_dir, 'pool.txt').write_text(video * size)"]
    declared = 'size: int = 1\nvideo: str = "video0"\nrun_dir: str = ""'
    write_notebook(folder, "make", *cells, "finish()", parameters=declared)
    cells = ["finish(pool=pathlib.Path(pool).read_text(), video=video)"]
    cells += ["pathlib.Path(run_dir, 'summary.txt').write_text('policy  reward\\nbba     0.5\\n')"]
    declared = 'from pathlib import Path\npool: Path = ""\nvideo: str = "video0"\nrun_dir: str = ""'
    write_notebook(folder, "use", *cells, parameters=declared)
    (folder / "small.toml").write_text(PIPELINE)
    (folder / "parts.toml").write_text(FAILING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield folder / "small.toml"


def quiet(path: Path, **overrides: object) -> list[Outcome]:
    return run_steps(read_pipeline(path, overrides), echo=lambda line: None)


def check_counts(path: Path) -> ET.Element:
    """The suite of a JUnit file, its counts checked."""
    root = ET.parse(path).getroot()
    (suite,) = root
    for key, tag in (("tests", "."), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.attrib[key]) == int(root.attrib[key]) == len(suite.findall(f"testcase/{tag}"))
    assert len({(case.attrib["classname"], case.attrib["name"]) for case in suite}) == len(suite)
    return suite


def test_steps_find_what_earlier_ones_wrote_and_are_reused(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", str(pipeline), "-p", "make.size", "2") == 0
    shown = capsys.readouterr().out
    assert "[1/2] make" in shown
    assert "policy  reward\nbba     0.5\n" in shown
    assert shown.rstrip().endswith("report.html")
    make, test = quiet(pipeline, **{"make.size": "2"})
    assert (make.state, test.state) == ("reused", "reused")
    assert test.run is not None
    assert test.run.metrics == {"pool": "video1video1", "video": "video1"}


def test_a_failing_step_stops_only_those_that_need_it(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "junit.xml"
    assert run("run", str(pipeline.with_name("parts.toml")), "--junit", str(path), "--json") == 1
    shown = capsys.readouterr()
    steps = json.loads(shown.out.splitlines()[-1])["steps"]
    assert [step["state"] for step in steps] == ["failed", "skipped", "done", "skipped"]
    assert [step["run"] is None for step in steps] == [False, True, False, True]
    make, use, _, last = (step["problem"] for step in steps)
    assert "AssertionError: size must be positive" in make
    assert (use, last) == ("it needs make, which failed", "it needs use, which was skipped")
    (error,) = [line for line in shown.err.splitlines() if line.startswith("netllm: error:")]
    assert "parts: 1 of 4 steps failed; make failed (make: cell 3 of 5 (" in error
    assert error.endswith(f"; use was skipped ({use}); last was skipped ({last})")

    suite = check_counts(path)
    assert [suite.get(key) for key in ("name", "tests", "failures", "skipped")] == ["parts", "4", "1", "2"]
    failed, skipped, done, _ = suite
    text = str(failed.findtext("failure"))
    assert text.rstrip().endswith("AssertionError: size must be positive")
    assert "[0;31m" not in text
    assert steps[0]["run"] in str(failed.findtext("system-out"))
    assert skipped.find("skipped").get("message") == use  # type: ignore[union-attr]
    assert float(done.get("time", 0)) > 0


def test_junit_holds_what_xml_cannot_and_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\x1b[1;38;5;241mred\x1b[0m nul\x00 half \ud800 pair \ufffe ]]> <&> 𝄞\x1b"
    path = tmp_path / "junit.xml"
    junit.write(path, "old", [Outcome(text, "failed", seconds=1.25, problem=text, traceback=(text,))])
    (case,) = check_counts(path)
    assert (case.get("time"), case.get("name")) == ("1.250", "red nul? half ? pair ? ]]> <&> 𝄞?")
    assert case.findtext("failure") == case.get("name")
    monkeypatch.setattr(runs.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(runs.StorageError, match="the disk is full"):
        junit.write(path, "new", [])
    assert check_counts(path).get("name") == "old"


def test_what_goes_wrong_outside_the_cells_fails_the_step_which_is_then_run_again(pipeline: Path) -> None:
    declared = 'run_dir: str = ""'
    broken = write_notebook(pipeline.parent, "broken", "finish()", parameters=declared)
    two = pipeline.with_name("two.toml")
    two.write_text("".join(f"[[step]]\nnotebook = '{name}.ipynb'\n" for name in ("broken", "make")))
    read = read_pipeline(two)
    broken.unlink()
    outcomes = run_steps(read, echo=lambda line: None)
    assert [outcome.state for outcome in outcomes] == ["failed", "done"]
    assert outcomes[0].traceback[-1].startswith(f"FileNotFoundError: no notebook {broken}")
    write_notebook(pipeline.parent, "broken", "finish()", parameters=declared)
    assert [outcome.state for outcome in quiet(two)] == ["done", "reused"]


def test_a_single_notebook_writes_junit_and_json_too(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "junit.xml"
    words = ("run", str(pipeline.with_name("make.ipynb")), "--junit", str(path), "--json", "-p", "size")
    assert run(*words, "3") == 0
    (step,) = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert (step["name"], step["state"], step["metrics"], step["problem"]) == ("make", "done", {}, None)
    assert check_counts(path).get("failures") == "0"
    assert run(*words, "0") == 1
    assert "netllm: error: make: cell 3 of 5 (" in capsys.readouterr().err
    assert check_counts(path).get("failures") == "1"
    assert run("run", str(pipeline), "--junit", str(tmp_path)) == 2


def test_references(tmp_path: Path) -> None:
    (tmp_path / "pool.txt").touch()
    value = {"a": ["{make}/pool.txt", 3], "b": "{make}", "c": "plain"}
    assert resolve(value, {"make": tmp_path}) == {"a": [f"{tmp_path}/pool.txt", 3], "b": str(tmp_path), "c": "plain"}
    with pytest.raises(NotebookError, match=r"\{make\}/nothing: .*/nothing was not written by that step"):
        resolve("{make}/nothing", {"make": tmp_path})


def test_strength_of_overrides(pipeline: Path) -> None:
    steps = read_pipeline(pipeline, {"video": "video2", "test.video": "video3"}).step
    assert [step.parameters["video"] for step in steps] == ["video2", "video3"]
    assert (steps[1].needs, steps[1].timeout_s) == (["make"], 60)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("video =", "vidoe =", "has no parameter 'vidoe', did you mean 'video'"),
        ("pool =", "poool =", "step test has no parameter 'poool', did you mean 'pool'"),
        ("timeout_s = 60", 'after = ["mike"]', "step test needs mike, which is no earlier step; those are: make"),
        ("{make}", "{mike}", "step test needs mike, which is no earlier step; those are: make"),
        ("timeout_s", "timeout", "unknown key 'timeout'.* did you mean 'timeout_s'"),
        ('name = "test"', 'name = "make"', "another step has this name"),
        ('name = "small"', 'name = "../../x"', "name"),
        ({"sise": "1"}, "", "small.toml has no parameter 'sise', did you mean 'size'"),
        ({"mke.size": "1"}, "", "has no step for 'mke.size'; steps: make, test"),
        ({"size": "x"}, "", "step make: parameter size is int, got 'x'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    pipeline: Path, old: str | dict[str, str], new: str, message: str
) -> None:
    wrong = pipeline.parent / "wrong" / "small.toml"
    wrong.parent.mkdir(exist_ok=True)
    text = PIPELINE.replace('notebook = "', f'notebook = "{pipeline.parent}/')
    given = old if isinstance(old, dict) else {}
    wrong.write_text(text if given else text.replace(str(old), new))
    with pytest.raises(ValueError, match=message):
        read_pipeline(wrong, given)
