"""Chains of notebooks: parameters, references between steps, overrides, failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from netllm_lib import cli
from netllm_lib.notebooks import NotebookError
from netllm_lib.pipelines import read_pipeline, run_pipeline
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


def test_a_failing_step_stops_the_pipeline(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(pipeline), "-p", "size", "0"])
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert "AssertionError: size must be positive" in shown.err
    assert "[2/2]" not in shown.out


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
    assert (steps[1].timeout_s, steps[0].expected) == (60, ("pool.txt",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("video =", "vidoe =", "no step of .* has a parameter 'vidoe', did you mean 'video'"),
        ("pool =", "poool =", "step test has no parameter 'poool', did you mean 'pool'"),
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
