"""Chains of notebooks: parameters, references between steps, overrides, failures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from netllm_lib import cli
from netllm_lib.notebooks import NotebookError
from netllm_lib.pipelines import PipelineError, completed, read_pipeline, resolve, run_pipeline, run_steps
from test_cli import run as run_main
from test_notebooks import write_notebook

PIPELINE = """
name = "small"

[parameters]
video = "video1"

[[step]]
notebook = "make.ipynb"
expected = ["pool.txt"]

[[step]]
notebook = "use.ipynb"
name = "test"
timeout_s = 60
[step.parameters]
pool = "{make}/pool.txt"
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline file beside its two notebooks: the first writes a file, the second reads it."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_notebook(
        folder,
        "make",
        "assert size > 0, 'size must be positive'",
        "pathlib.Path(run_dir, 'pool.txt').write_text(video * size)\nfinish()",
        parameters='size: int = 1\nvideo: str = "video0"\nrun_dir: str = ""',
    )
    write_notebook(
        folder,
        "use",
        "finish(pool=pathlib.Path(pool).read_text(), video=video)",
        "pathlib.Path(run_dir, 'summary.txt').write_text('policy  reward\\nbba     0.5\\n')",
        parameters='pool: str = ""\nvideo: str = "video0"\nrun_dir: str = ""',
    )
    path = folder / "small.toml"
    path.write_text(PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield path


def test_steps_find_what_earlier_ones_wrote_and_are_reused(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(args=cli.join_parameters(["run", str(pipeline), "-p", "make.size", "2"]), standalone_mode=False)
    shown = capsys.readouterr().out
    assert "[1/2] make" in shown
    assert "policy  reward\nbba     0.5\n" in shown
    assert shown.rstrip().endswith("report.html")

    lines: list[str] = []
    done = run_pipeline(pipeline, {"make.size": "2"}, echo=lines.append)
    assert done["test"].metrics == {"pool": "video1video1", "video": "video1"}
    assert all(run.reused for run in done.values())
    assert any("reused" in line for line in lines)


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


def test_a_failing_step_stops_only_those_that_need_it(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline.with_name("parts.toml")
    path.write_text(FAILING)
    assert run_main("run", str(path), "--junit", str(tmp_path / "new" / "junit.xml"), "--json") == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert [(step["name"], step["state"]) for step in told["steps"]] == [
        ("make", "failed"),
        ("use", "skipped"),
        ("other", "done"),
        ("last", "skipped"),
    ]
    assert told["steps"][1]["problem"] == "it needs make, which failed"
    assert told["steps"][3]["problem"] == "it needs use, which was skipped"
    assert "AssertionError: size must be positive" in told["steps"][0]["problem"]
    assert [step["run"] is None for step in told["steps"]] == [False, True, False, True]
    assert "[4/4] last\n      skipped: it needs use, which was skipped" in shown.out

    error = next(
        line for line in shown.err.splitlines() if line.startswith("netllm: error:")
    )  # one line with everything
    assert "parts: 1 of 4 steps failed; make failed (make: cell 3 of 4 (" in error
    assert "AssertionError: size must be positive" in error
    assert error.endswith(
        "; use was skipped (it needs make, which failed); last was skipped (it needs use, which was skipped)"
    )

    suite = ET.parse(tmp_path / "new" / "junit.xml").getroot()[0]
    assert {key: suite.get(key) for key in ("name", "tests", "failures", "errors", "skipped")} == {
        "name": "parts", "tests": "4", "failures": "1", "errors": "0", "skipped": "2",
    }  # fmt: skip
    make, use, other, _ = suite.findall("testcase")
    failure, out = make.find("failure"), make.find("system-out")
    assert failure is not None
    assert "AssertionError: size must be positive" in str(failure.get("message"))
    assert str(failure.text).rstrip().endswith("AssertionError: size must be positive")
    assert "\x1b" not in str(failure.text)
    assert "[0;31m" not in str(failure.text)
    assert out is not None
    assert told["steps"][0]["run"] in str(out.text)
    skipped = use.find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "it needs make, which failed"
    assert len(other.findall("failure")) == 0
    assert float(other.get("time", 0)) > 0


def test_the_failures_are_named_to_a_caller(pipeline: Path) -> None:
    broken = pipeline.with_name("broken.ipynb")
    write_notebook(pipeline.parent, "broken", parameters='run_dir: str = ""')
    two = pipeline.with_name("two.toml")
    two.write_text("".join(f"[[step]]\nnotebook = '{name}.ipynb'\n" for name in ("broken", "make")))
    read = read_pipeline(two)
    broken.unlink()  # what goes wrong outside a notebook's cells is the step's failure as well
    outcomes = run_steps(read, echo=lambda line: None)
    assert [outcome.state for outcome in outcomes] == ["failed", "done"]
    assert outcomes[0].problem.startswith(f"no notebook {broken}")
    assert outcomes[0].traceback[-1].startswith(f"FileNotFoundError: no notebook {broken}")
    with pytest.raises(PipelineError, match="two: 1 of 2 steps failed; broken failed .no notebook .*broken") as caught:
        completed("two", outcomes)
    assert caught.value.outcomes == outcomes


def test_steps_that_failed_are_run_again_and_the_rest_is_reused(pipeline: Path) -> None:
    write_notebook(
        pipeline.parent,
        "flaky",
        "assert (pathlib.Path(run_dir).parent / 'fixed').exists()",
        "finish()",
        parameters='run_dir: str = ""',
    )
    path = pipeline.with_name("flaky.toml")
    path.write_text("[[step]]\nnotebook = 'make.ipynb'\n[[step]]\nnotebook = 'flaky.ipynb'\n")
    first = run_steps(read_pipeline(path), echo=lambda line: None)
    assert [outcome.state for outcome in first] == ["done", "failed"]
    assert first[1].folder is not None
    (first[1].folder.parent / "fixed").touch()
    again = run_steps(read_pipeline(path), echo=lambda line: None)
    assert [outcome.state for outcome in again] == ["reused", "done"]
    assert again[1].folder == first[1].folder


def test_references_in_any_value(tmp_path: Path) -> None:
    (tmp_path / "pool.txt").touch()
    value = {"a": ["{make}/pool.txt", 3], "b": "{make}", "c": "plain"}
    assert resolve(value, {"make": tmp_path}) == {"a": [f"{tmp_path}/pool.txt", 3], "b": str(tmp_path), "c": "plain"}
    with pytest.raises(NotebookError, match="nothing was not written by that step"):
        resolve("{make}/nothing", {"make": tmp_path})
    with pytest.raises(ValueError, match=r"\{use\} is not a finished step; those are: make"):
        resolve("{use}/pool.txt", {"make": tmp_path})


def test_a_single_notebook_writes_junit_and_json_too(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = tmp_path / "junit.xml"
    words = ("run", str(pipeline.with_name("make.ipynb")), "--junit", str(junit), "--json", "-p", "size")
    assert run_main(*words, "3") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"][0] | {"seconds": 0, "run": ""} == {
        "name": "make", "state": "done", "run": "", "seconds": 0, "metrics": {}, "problem": None,
    }  # fmt: skip
    assert told["gates"] == []
    assert ET.parse(junit).getroot()[0].get("failures") == "0"
    assert run_main(*words, "0") == 1
    assert "netllm: error: make: cell 3 of 4 (" in capsys.readouterr().err
    assert ET.parse(junit).getroot()[0].get("failures") == "1"
    assert run_main("run", str(pipeline), "--junit", str(tmp_path)) == 2
    assert "that is a folder" in capsys.readouterr().err


def test_reference_to_a_file_that_was_not_written(pipeline: Path) -> None:
    other = pipeline.with_name("lost.toml")
    other.write_text(PIPELINE.replace("{make}/pool.txt", "{make}/pool.npz"))
    with pytest.raises(NotebookError, match=r"\{make\}/pool\.npz: .* was not written by that step"):
        run_pipeline(other, {"make.size": 2}, echo=lambda line: None)


def test_strength_of_overrides(pipeline: Path) -> None:
    steps = read_pipeline(pipeline, {"video": "video2", "test.video": "video3"}).steps
    assert [step.parameters["video"] for step in steps] == ["video2", "video3"]
    assert [step.parameters["video"] for step in read_pipeline(pipeline).steps] == ["video1", "video1"]
    assert steps[1].needs == ["make"]
    assert steps[1].after == ()
    assert (steps[1].timeout_s, steps[0].expected) == (60, ("pool.txt",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("video =", "vidoe =", "no step of .* has a parameter 'vidoe', did you mean 'video'"),
        ("pool =", "poool =", "step test has no parameter 'poool', did you mean 'pool'"),
        ("timeout_s = 60", 'after = "make"', r"step test: after is a list of names .*, got 'make'"),
        ("timeout_s = 60", 'after = ["mike"]', "step test: after 'mike' is not an earlier step; those are: make"),
        ("{make}", "{mike}", r"step test: \{mike\} is not an earlier step; those are: make"),
        ("timeout_s", "timeout", "unknown key 'timeout', did you mean 'timeout_s'"),
        ('name = "test"', 'name = "make"', "another step has this name"),
        ("[[step]]", "[[stepp]]", "unknown key 'stepp'"),
        ('name = "small"', "name =", "small.toml: Invalid value"),
    ],
)
def test_mistakes_are_found_before_anything_runs(pipeline: Path, old: str, new: str, message: str) -> None:
    wrong = pipeline.parent / "wrong" / "small.toml"
    wrong.parent.mkdir(exist_ok=True)
    text = PIPELINE.replace('"make.ipynb"', f'"{pipeline.parent}/make.ipynb"')
    wrong.write_text(text.replace('"use.ipynb"', f'"{pipeline.parent}/use.ipynb"').replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_pipeline(wrong)


def test_overrides_that_nothing_takes_are_refused(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="no step of small.toml has a parameter 'sise', did you mean 'size'"):
        read_pipeline(pipeline, {"sise": "1"})
    with pytest.raises(ValueError, match="has no step for 'mke.size'; steps: make, test"):
        read_pipeline(pipeline, {"mke.size": "1"})
    with pytest.raises(ValueError, match="step make: parameter size is int, got 'x'"):
        read_pipeline(pipeline, {"size": "x"})
