"""Gates on tests: verdicts on tables made by hand, requests that are refused, exit codes of the command line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from netllm_lib import gate, stats
from netllm_lib.abr.evaluate import Test
from netllm_lib.gate import Gate
from netllm_lib.pipelines import read_pipeline
from test_cli import run
from test_junit import check_document
from test_notebooks import write_notebook

DIFFERENCES = [0.1, -0.1, 0.2, 0.0, -0.05, 0.05, 0.15, -0.15]


def table(rewards: list[float], first: int = 0) -> pd.DataFrame:
    """A table of chunks in which each trace gets one reward on every chunk but the first, which does not count."""
    rows = [
        {"trace": f"trace{number}", "chunk": chunk, "reward": reward if chunk else 99.0}
        for number, reward in enumerate(rewards, first)
        for chunk in range(4)
    ]
    return pd.DataFrame(rows).assign(bitrate_kbps=750, rebuffer_s=0.0, smoothness_mbps=0.0)


def save(folder: Path, **rewards: list[float]) -> Path:
    """A test of policies with these rewards by trace."""
    Test({name: table(values) for name, values in rewards.items()}, "", {"traces": "t", "video": "v"}).save(folder)
    return folder


def judge(folder: Path, baseline: str = "mpc", margin: float = 0.0, policy: str = "llm") -> gate.Verdict:
    (verdict,) = gate.judge([Gate(baseline, margin, policy=policy)], {"test": folder})
    return verdict


def test_the_lower_end_decides_and_not_the_mean(tmp_path: Path) -> None:
    theirs = np.linspace(
        -3, 3, len(DIFFERENCES)
    )  # traces differ far more than policies: only pairing sees the difference
    save(tmp_path, llm=list(theirs + DIFFERENCES), mpc=list(theirs), bba=list(theirs - 1))
    interval = stats.bootstrap(np.array(DIFFERENCES))
    assert interval.low < 0 < interval.mean
    verdict = judge(tmp_path)
    assert verdict.state == "failed"
    assert verdict.interval == pytest.approx(interval, abs=1e-6)
    assert verdict.traces == 8
    assert verdict.reason == (
        f"llm - mpc = {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}] per chunk over 8 traces (test): "
        "its lower end is under -0, the margin"
    )
    assert judge(tmp_path, margin=-interval.low + 1e-3).state == "passed"
    assert judge(tmp_path, margin=-interval.low - 1e-3).state == "failed"
    assert judge(tmp_path, "bba").state == "passed"
    assert judge(tmp_path, "llm", policy="mpc").interval == pytest.approx(
        (-interval.mean, -interval.high, -interval.low), abs=0.01
    )


def test_a_loss_of_exactly_the_margin_passes(tmp_path: Path) -> None:
    theirs = [0.1, 0.7, 1.3]
    save(tmp_path, llm=[reward - 0.05 for reward in theirs], mpc=theirs)
    verdict = judge(tmp_path, margin=0.05)
    assert verdict.state == "passed"
    assert "lower end is not under -0.05" in verdict.reason
    assert judge(tmp_path, margin=0.0499999).state == "failed"


def test_order_of_traces_does_not_matter(tmp_path: Path) -> None:
    backwards = table([3.0, 2.0, 1.0]).assign(trace=np.repeat(["trace2", "trace1", "trace0"], 4))
    Test({"llm": table([1.0, 2.0, 3.0]), "mpc": backwards}).save(tmp_path)
    assert judge(tmp_path).interval == stats.Interval(0.0, 0.0, 0.0)


def test_what_cannot_be_judged_is_an_error_and_not_a_pass(tmp_path: Path) -> None:
    save(tmp_path / "a", llm=[1.0, 2.0], mpc=[0.0, 0.0], **{"mpc (original)": [0.0, 0.0]})
    wrong = judge(tmp_path / "a", "mpc (orignal)")
    assert (wrong.state, wrong.interval) == ("error", None)
    assert wrong.reason.endswith(
        "no policy 'mpc (orignal)', did you mean 'mpc (original)'?; it has: llm, mpc, mpc (original)"
    )
    assert "no policy 'ppo'" in judge(tmp_path / "a", policy="ppo").reason

    tables = {"llm": table([1.0, 2.0]), "mpc": table([0.0, 0.0], first=1), "bba": table([0.0, 0.0, 0.0])}
    Test(tables).save(tmp_path / "b")
    for name, which in (("mpc", "2 and 2, trace0"), ("bba", "2 and 3, trace2")):
        verdict = judge(tmp_path / "b", name)
        assert verdict.state == "error"
        assert f"llm and {name} were not played on the same traces: {which} by one only" in verdict.reason

    save(tmp_path / "c", llm=[1.0], mpc=[0.0])
    assert "1 traces give no interval" in judge(tmp_path / "c").reason
    save(tmp_path / "d", llm=[1.0, float("inf")], mpc=[0.0, 0.0])
    assert "rewards of llm or mpc are not finite" in judge(tmp_path / "d").reason
    (tmp_path / "a" / "tables" / "mpc.parquet").write_bytes(b"PAR1")
    assert "mpc.parquet: it cannot be read as a table" in judge(tmp_path / "a").reason
    (tmp_path / "a" / "tables" / "mpc.parquet").unlink()
    assert "mpc.parquet: missing" in judge(tmp_path / "a").reason
    table([0.0, 0.0]).drop(columns="reward").to_parquet(tmp_path / "a" / "tables" / "mpc.parquet")
    assert "not a table of chunks, it has no column reward" in judge(tmp_path / "a").reason
    (tmp_path / "a" / "setting.json").write_text("{}")
    assert "does not list the policies" in judge(tmp_path / "a").reason
    (tmp_path / "a" / "setting.json").write_text("{")
    assert "not valid JSON" in judge(tmp_path / "a").reason
    for folder in "abcd":
        assert judge(tmp_path / folder).state == "error" or folder == "b"


def test_every_test_of_a_pipeline_is_judged_unless_a_step_is_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good", llm=[1.0, 2.0], mpc=[0.0, 0.0])
    bad = save(tmp_path / "bad", llm=[-1.0, -2.0], mpc=[0.0, 0.0])
    (tmp_path / "pool").mkdir()
    folders = {"pool": tmp_path / "pool", "one": good, "two": bad, "broken": None}
    verdicts = gate.judge([Gate("mpc"), Gate("mpc", step="one"), Gate("mpc", step="broken")], folders)
    assert [(verdict.step, verdict.state) for verdict in verdicts] == [
        ("one", "passed"), ("two", "failed"), ("one", "passed"), ("", "skipped"),
    ]  # fmt: skip
    assert verdicts[3].reason == "no test to judge: no result of broken"
    (nothing,) = gate.judge([Gate("mpc")], {"pool": tmp_path / "pool"})
    assert nothing.state == "error"
    assert "there is no test in pool" in nothing.reason


def test_gates_of_a_file_and_of_the_command_line() -> None:
    assert gate.read_gates(None, "p.toml") == ()
    row = {"fail_below": "mpc (original)", "margin": 1, "step": "05_test", "policy": "mpc"}
    (read,) = gate.read_gates(row, "p.toml")
    assert read == Gate("mpc (original)", 1, "05_test", "mpc")
    assert gate.read_gates([{"fail_below": "mpc"}, {"fail_below": "bba"}], "p.toml") == (Gate("mpc"), Gate("bba"))
    assert gate.override([read], [], None) == (read,)
    assert gate.override([read], [], 0.2) == (Gate("mpc (original)", 0.2, "05_test", "mpc"),)
    assert gate.override([read], ["bba", "genet"], 0.2) == (Gate("bba", 0.2), Gate("genet", 0.2))
    with pytest.raises(ValueError, match="--margin needs a baseline"):
        gate.override([], [], 0.2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"fail_bellow": "mpc"}, "p.toml, .gate.: unknown key 'fail_bellow', did you mean 'fail_below'"),
        ({"margin": 0.1}, "it needs fail_below"),
        ({"fail_below": 3}, "fail_below is a name, got 3"),
        ({"fail_below": "mpc", "margin": "wide"}, "margin is a number, got 'wide'"),
        ({"fail_below": "mpc", "margin": True}, "margin is a number, got True"),
        ({"fail_below": "mpc", "margin": -0.05}, "margin -0.05: give the reward per chunk that may be lost"),
        ({"fail_below": "mpc", "margin": float("nan")}, "margin nan"),
        ({"fail_below": "llm"}, "a gate compares two policies, got 'llm' twice"),
        ("mpc", "a table is expected"),
    ],
)
def test_gates_that_make_no_sense_are_refused(row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate.read_gates(row, "p.toml")


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


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline whose first step leaves the test that its parameter names, and whose second fails if told to."""
    folder = tmp_path_factory.mktemp("gated")
    write_notebook(
        folder,
        "exam",
        "import shutil\nif test:\n    shutil.copytree(test, run_dir, dirs_exist_ok=True)\nfinish()",
        parameters='test: str = ""\nrun_dir: str = ""',
    )
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
        (
            ["--fail-below", "bba"],
            3,
            ["failed"],
            "netllm: gate failed: llm - bba = -1.0000 [-1.0000, -1.0000] per chunk",
        ),
        (["--fail-below", "mpc", "--fail-below", "bba", "--margin", "0.5"], 3, ["passed", "failed"], "under -0.5"),
        (["--fail-below", "bba", "--margin", "1"], 0, ["passed"], ""),
        (["--fail-below", "mcp"], 2, ["error"], "has no policy 'mcp', did you mean 'mpc'?; it has: llm, mpc, bba"),
        (["-p", "test", ""], 2, ["error"], "netllm: error: gate on mpc: there is no test in exam, after"),
        (["-p", "good", "false", "--fail-below", "bba"], 1, ["failed"], "1 of 2 steps failed; after failed"),
        (["-p", "test", "/nowhere"], 1, ["skipped"], "1 of 2 steps failed; exam failed"),
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
    told = json.loads(shown.out.splitlines()[-1])
    assert [gate["verdict"] for gate in told["gates"]] == verdicts
    if code == 0:
        assert (told["gates"][0]["traces"], told["gates"][0]["step"]) == (3, "exam")
        assert told["gates"][0]["low"] == told["gates"][0]["difference"]
    root = ET.parse(junit).getroot()
    check_document(root)
    cases = {"passed": None, "failed": "failure", "error": "error", "skipped": "skipped"}
    for verdict, case in zip(verdicts, root.findall(".//testcase[@classname='gated.gates']"), strict=True):
        assert [child.tag for child in case if child.tag != "system-out"] == [tag for tag in [cases[verdict]] if tag]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["05_test", "-p", "policy", "x", "--fail-below", "mcp"],
            "has no policy 'mcp', did you mean 'mpc'?; it has: llm, mpc,",
        ),
        (["05_test", "--fail-below", "mpc"], "step 05_test: its test has no policy 'llm'"),
        (["03_experience_pool", "--fail-below", "mpc"], "gate on mpc: there is no test in 03_experience_pool"),
        (["05_test", "--margin", "0.1"], "--margin needs a baseline"),
        (["05_test", "--fail-below", "mpc", "--margin", "-1"], "margin -1: give the reward per chunk that may be lost"),
    ],
)
def test_wrong_gates_are_refused_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    assert run("run", *words, "--junit", str(tmp_path / "junit.xml")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_gate_on_a_step_that_is_not_there_is_refused(pipeline: Path) -> None:
    steps = read_pipeline(pipeline).steps
    with pytest.raises(ValueError, match="gate: no step 'exams', did you mean 'exam'"):
        gate.check([Gate("mpc", step="exams")], steps)
    gate.check([Gate("whatever", step="exam")], steps)  # what another's notebook plays is not known before
