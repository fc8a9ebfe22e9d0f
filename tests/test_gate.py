"""Gates on tests: verdicts on scores made by hand, requests that are refused, exit codes of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from netllm_lib import gate, stats
from netllm_lib.gate import Gate, read_gates
from netllm_lib.measure import TABLE, Measure
from netllm_lib.parameters import notebook_run
from test_cli import run
from test_measure import ERROR, REWARD, scores
from test_notebooks import write_notebook
from test_pipelines import check_counts

DIFFERENCES = [0.1, -0.1, 0.2, 0.0, -0.05, 0.05, 0.15, -0.15]


def save(folder: Path, measure: Measure = REWARD, /, **policies: list[float]) -> Path:
    """A test of policies with these scores by sample."""
    scores(measure, **policies).save(folder)
    return folder


def judge(folder: Path, baseline: str = "mpc", margin: float = 0.0, policy: str = "") -> gate.Verdict:
    (verdict,) = gate.judge([Gate(baseline, margin, policy=policy)], {"test": folder})
    return verdict


@pytest.mark.parametrize(("measure", "sign"), [(REWARD, 1), (ERROR, -1)], ids=["higher", "lower"])
def test_the_worse_end_decides_and_not_the_mean(tmp_path: Path, measure: Measure, sign: int) -> None:
    theirs = np.linspace(
        -3, 3, len(DIFFERENCES)
    )  # samples differ far more than policies: only pairing sees the difference
    ours = theirs + sign * np.array(DIFFERENCES)
    save(tmp_path, measure, llm=list(ours), mpc=list(theirs), bba=list(theirs - sign))
    difference = stats.bootstrap(ours - theirs)
    worst = measure.gain(difference).low
    assert worst < 0 < measure.gain(difference).mean
    verdict = judge(tmp_path)
    assert (verdict.state, verdict.samples) == ("failed", 8)
    assert verdict.difference == pytest.approx(difference)
    end = "lower end is under -0" if sign > 0 else "upper end is over 0"
    numbers = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    what = f"{measure.name} over 8 {measure.sample}s"
    assert verdict.reason == f"llm - mpc = {numbers} {what} (test): its {end}, the margin"
    assert judge(tmp_path, margin=-worst + 1e-3).state == "passed"
    assert judge(tmp_path, margin=-worst - 1e-3).state == "failed"
    assert judge(tmp_path, "bba").state == "passed"
    assert judge(tmp_path, "llm", policy="bba").state == "failed"


def test_a_loss_of_exactly_the_margin_passes(tmp_path: Path) -> None:
    theirs = [0.1, 0.7, 1.3]
    save(tmp_path, llm=[reward - 0.05 for reward in theirs], mpc=theirs)
    assert judge(tmp_path, margin=0.05).state == "passed"
    assert judge(tmp_path, margin=0.0499999).state == "failed"


def test_what_cannot_be_judged_is_an_error_and_not_a_pass(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", llm=[1.0, 2.0], mpc=[0.0, 0.0], other=[0.0, 0.0, 0.0])
    broken = save(tmp_path / "broken", llm=[1.0, 2.0], mpc=[0.0, 0.0])
    (broken / TABLE).write_bytes(b"PAR1")
    for verdict, reason in (
        (judge(folder, "mcp"), "no scores of 'mcp', did you mean 'mpc'?; tested: llm, mpc, other"),
        (judge(folder, policy="ppo"), "no scores of 'ppo'"),
        (judge(folder, "llm"), "the test is about llm; name the gate's policy"),
        (judge(folder, "other"), "llm and other need two traces or more, the same for both"),
        (judge(save(tmp_path / "b", llm=[1.0], mpc=[0.0])), "need two traces or more"),
        (judge(broken), f"{TABLE}: it cannot be read as a table"),
    ):
        assert (verdict.state, verdict.difference) == ("error", None)
        assert reason in verdict.reason


def test_every_test_of_a_pipeline_is_judged_unless_a_step_is_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good", llm=[1.0, 2.0], mpc=[0.0, 0.0])
    bad = save(tmp_path / "bad", llm=[-1.0, -2.0], mpc=[0.0, 0.0])
    about_good = save(tmp_path / "diagnosis", llm=[1.0, 2.0], mpc=[0.0, 0.0])
    notebook_run(str(about_good), "06_diagnostics", test=good)  # has the scores of another step's test
    folders = {"pool": tmp_path, "one": good, "two": bad, "three": about_good, "broken": None}
    verdicts = gate.judge([Gate("mpc"), Gate("mpc", step="one"), Gate("mpc", step="broken")], folders)
    assert [(verdict.step, verdict.state) for verdict in verdicts] == [
        ("one", "passed"), ("two", "failed"), ("one", "passed"), ("", "skipped"),
    ]  # fmt: skip
    (nothing,) = gate.judge([Gate("mpc")], {"pool": tmp_path})
    assert (nothing.state, "there is no test in pool" in nothing.reason) == ("error", True)


def test_gates_of_a_file_and_of_the_command_line() -> None:
    row = {"fail_below": "mpc (original)", "margin": 1, "step": "exam", "policy": "mpc"}
    known = Gate("mpc (original)", 1, "exam", "mpc")
    assert read_gates(None, "p.toml", []) == []
    assert read_gates([row, {"fail_below": "bba"}], "p.toml", ["exam"]) == [known, Gate("bba")]
    assert read_gates(row, "p.toml", ["exam"], [], 0.2) == [Gate("mpc (original)", 0.2, "exam", "mpc")]
    assert read_gates(row, "p.toml", ["exam"], ["bba", "genet"], 0.2) == [Gate("bba", 0.2), Gate("genet", 0.2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "--margin needs a baseline"),
        ({"fail_bellow": "mpc"}, "p.toml, .gate.: unknown key 'fail_bellow', did you mean 'fail_below'"),
        ({"fail_below": "mpc", "margin": -0.05}, "margin -0.05: give what may be lost to the baseline"),
        ({"fail_below": "llm", "policy": "llm"}, "a gate compares two policies, got 'llm' twice"),
        ({"fail_below": "mpc", "step": "exams"}, "gate: no step 'exams', did you mean 'exam'"),
    ],
)
def test_gates_that_make_no_sense_are_refused(row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gates(row, "p.toml", ["exam"], margin=0.2)


# --- the command line ---------------------------------------------------------------------------------------------------

PIPELINE = """
name = "gated"

[gate]
fail_below = "mpc"
margin = 0.05

[[step]]
notebook = "exam.ipynb"

[[step]]
notebook = "after.ipynb"
"""
EXAM = "import shutil\nif test:\n    shutil.copytree(test, run_dir, dirs_exist_ok=True)\nfinish()"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline whose first step leaves the test that its parameter names, and whose second fails if told to."""
    folder = tmp_path_factory.mktemp("gated")
    write_notebook(folder, "exam", EXAM, parameters='test: str = ""\nrun_dir: str = ""')
    write_notebook(folder, "after", "assert good\nfinish()", parameters='good: bool = True\nrun_dir: str = ""')
    save(folder / "good", llm=[1.0, 2.0, 3.0], mpc=[1.0, 2.0, 3.0], bba=[2.0, 3.0, 4.0])
    (folder / "gated.toml").write_text(PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield folder / "gated.toml"


@pytest.mark.parametrize(
    ("words", "code", "verdicts", "message"),
    [
        ([], 0, ["passed"], ""),
        (["--fail-below", "bba"], 3, ["failed"], "netllm: gate failed: llm - bba = -1.0000 [-1.0000, -1.0000] reward"),
        (["--fail-below", "mpc", "--fail-below", "bba", "--margin", "0.5"], 3, ["passed", "failed"], "under -0.5"),
        (["--fail-below", "mcp"], 2, ["error"], "no scores of 'mcp', did you mean 'mpc'?; tested: llm, mpc, bba"),
        (["-p", "test", ""], 2, ["error"], "netllm: error: gate on mpc: there is no test in exam, after"),
        (["-p", "good", "false", "--fail-below", "bba"], 1, ["failed"], "1 of 2 steps failed; after failed"),
        (["-p", "test", "/nowhere"], 1, ["skipped"], "1 of 2 steps failed; exam failed"),
        (["--fail-below", "mpc", "--margin", "-1"], 2, [], "margin -1: give what may be lost to the baseline"),
    ],
)
def test_exit_codes(
    pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    verdicts: list[str],
    message: str,
) -> None:
    junit = tmp_path / "junit.xml"
    given = [] if "test" in words else ["-p", "test", str(pipeline.with_name("good"))]
    assert run("run", str(pipeline), "--junit", str(junit), "--json", *given, *words) == code
    shown = capsys.readouterr()
    last = [line for line in shown.err.splitlines() if line.startswith("netllm: ")]
    assert len(last) == (code != 0)
    assert message in "".join(last)
    if not verdicts:  # refused before anything ran
        assert not junit.exists()
        return
    told = json.loads(shown.out.splitlines()[-1])
    assert [gate["verdict"] for gate in told["gates"]] == verdicts
    if code == 0:
        assert (told["gates"][0]["samples"], told["gates"][0]["step"]) == (3, "exam")
    cases = {"passed": None, "failed": "failure", "error": "error", "skipped": "skipped"}
    for verdict, case in zip(verdicts, check_counts(junit).findall("testcase[@classname='gated.gates']"), strict=True):
        assert [child.tag for child in case if child.tag != "system-out"] == [tag for tag in [cases[verdict]] if tag]
