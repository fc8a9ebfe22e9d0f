"""The examples for CI services: their structure, and every command in them, run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from netllm_lib import cli, gate, notebooks, pipelines, runs
from test_pipelines import check_counts

GITHUB, GITLAB = (runs.PROJECT / "docs" / "ci" / name for name in ("github-actions.yml", "gitlab-ci.yml"))
CI = runs.PROJECT / "notebooks" / "pipelines" / "ci.toml"
KEPT = ["reports/junit.xml", "reports/runs/**/report.html", "reports/runs/**/metrics.json"]


def job(path: Path) -> dict[str, Any]:
    read = yaml.safe_load(path.read_text())
    (only,) = (read["jobs"] if path == GITHUB else read).values()
    return only


def commands(path: Path) -> list[str]:
    """All commands of an example, in order."""
    found = [step["run"] for step in job(path).get("steps", []) if "run" in step]
    return found + [line for key in ("before_script", "script", "after_script") for line in job(path).get(key, [])]


def test_both_examples_run_the_same_and_the_command_line_takes_it() -> None:
    for path in (GITHUB, GITLAB):
        made, ran = commands(path)
        program, name, *words = shlex.split(ran)
        assert (made, Path(program).name) == ("make env", "netllm")
        # as the command line would read them, without running anything: options exist, values have their types
        command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
        given = command.make_context(name, cli.join_parameters(words)).params
        assert runs.PROJECT / given["target"] == CI
        assert (given["fail_below"], given["margin"]) == (["mpc"], 0.5)
        assert given["junit"] == Path("$NETLLM_REPORTS/junit.xml")


def test_what_the_services_keep() -> None:
    found = job(GITHUB)
    assert found["env"]["NETLLM_REPORTS"] == "${{ github.workspace }}/reports"
    for step in found["steps"]:
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) if "uses" in step else "${{" not in step["run"]
    assert found["steps"][-1]["with"]["path"].split() == KEPT
    assert found["steps"][-1]["if"] == "always()"

    found = job(GITLAB)
    assert found["variables"]["NETLLM_REPORTS"] == "$CI_PROJECT_DIR/reports"
    assert found["artifacts"]["reports"] == {"junit": KEPT[0]}
    assert found["artifacts"]["when"] == "always"
    assert set(KEPT[1:]) <= set(found["artifacts"]["paths"])


def test_pipeline_of_the_examples_is_read_and_its_gate_can_be_judged() -> None:
    pipeline = pipelines.read_pipeline(CI)
    assert [step.name[:2] for step in pipeline.step] == ["03", "04", "05", "06"]
    assert {step.parameters["data"] for step in pipeline.step} == {"data/sample"}
    gates = gate.read_gates(pipeline.gate, CI.name, [step.name for step in pipeline.step])
    assert [(one.fail_below, one.margin) for one in gates] == [("mpc", 0.5)]
    (words,) = re.findall(r"^#   netllm (run .+ --margin .+)$", CI.read_text(), flags=re.MULTILINE)
    given = dict(word.split("=", 1) for word in cli.join_parameters(words.split()) if "=" in word)
    assert pipelines.read_pipeline(CI, given).step[1].parameters["plm"] == "smollm2"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.mark.slow
@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=lambda path: path.stem)
def test_commands_run_as_they_stand_there(path: Path, reports: Path) -> None:
    """The second example finds the runs of the first, as a second run of one job on one machine does."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    environment |= {"NETLLM_REPORTS": str(reports), "CI_PROJECT_DIR": str(runs.PROJECT)}
    environment["PATH"] = f"{runs.PROJECT / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    (reports / "junit.xml").unlink(missing_ok=True)
    for command in commands(path):
        words = ["bash", "-e", "-o", "pipefail", "-c", command]
        done = subprocess.run(words, cwd=runs.PROJECT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "gate passed: llm - mpc = " in done.stdout
    suite = check_counts(reports / "junit.xml")
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["5", "0", "0", "0"]
    for case in suite.findall("testcase[@classname='ci']"):
        (folder,) = re.findall(r"run folder: (.+)", str(case.findtext("system-out")))
        assert (Path(folder) / notebooks.REPORT).is_file()
