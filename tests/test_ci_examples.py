"""The examples for CI services: their structure, and every command in them, run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from netllm_lib import cli, gate, junit, notebooks, pipelines, runs
from test_junit import check_document

GITHUB, GITLAB = (runs.PROJECT / "docs" / "ci" / name for name in ("github-actions.yml", "gitlab-ci.yml"))
EXAMPLES = [GITHUB, GITLAB]
CI = runs.PROJECT / "notebooks" / "pipelines" / "ci.toml"


def jobs(path: Path) -> dict[str, Any]:
    read = yaml.safe_load(path.read_text())
    return read["jobs"] if path == GITHUB else read


def commands(path: Path) -> list[str]:
    """All commands of an example, in order."""
    found: list[str] = []
    for job in jobs(path).values():
        found += [step["run"] for step in job.get("steps", []) if "run" in step]
        found += [line for key in ("before_script", "script", "after_script") for line in job.get(key, [])]
    return found


def netllm_words(path: Path) -> list[list[str]]:
    """The words after `netllm` of each command that calls it."""
    found = [shlex.split(command) for command in commands(path)]
    return [words[1:] for words in found if Path(words[0]).name == "netllm"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_commands_are_what_the_command_line_takes(path: Path) -> None:
    assert commands(path)[0] == "make env"
    assert len(netllm_words(path)) == len(commands(path)) - 1 == 1
    command = typer.main.get_command(cli.app)
    for name, *words in netllm_words(path):
        # as the command line would read them, without running anything: options exist, values have their types
        given = command.commands[name].make_context(name, cli.join_parameters(words)).params  # type: ignore[attr-defined]
        assert Path(given["target"]) == CI.relative_to(runs.PROJECT)
        assert (given["fail_below"], given["margin"]) == (["mpc"], 0.5)
        assert given["junit"] == Path("$NETLLM_REPORTS/junit.xml")


def test_both_examples_run_the_same() -> None:
    assert netllm_words(GITHUB) == netllm_words(GITLAB)


def test_github_example() -> None:
    read = yaml.safe_load(GITHUB.read_text())
    assert set(read[True]) == {"push", "pull_request", "workflow_dispatch"}  # YAML takes the key `on` for a truth value
    (job,) = read["jobs"].values()
    assert job["runs-on"]
    assert job["env"]["NETLLM_REPORTS"] == "${{ github.workspace }}/reports"
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))
        assert "${{" not in step.get("run", "")  # or the test below would run something else than GitHub does
    cache, upload = (next(s["with"] for s in job["steps"] if name in s.get("uses", "")) for name in ("cache", "upload"))
    assert cache["path"] == ".venv"
    assert re.findall(r"hashFiles\((.+)\)", cache["key"]) == ["'pyproject.toml', 'Makefile'"]
    assert upload["path"].split() == [
        "reports/junit.xml",
        "reports/runs/**/report.html",
        "reports/runs/**/metrics.json",
    ]
    assert job["steps"][-1]["if"] == "always()"


def test_gitlab_example() -> None:
    (job,) = jobs(GITLAB).values()
    assert job["variables"]["NETLLM_REPORTS"] == "$CI_PROJECT_DIR/reports"
    assert job["artifacts"]["reports"] == {"junit": "reports/junit.xml"}
    assert job["artifacts"]["when"] == "always"
    assert "reports/runs/**/report.html" in job["artifacts"]["paths"]
    assert job["cache"]["paths"] == [".venv/"]
    assert all((runs.PROJECT / name).is_file() for name in job["cache"]["key"]["files"])


def test_pipeline_of_the_examples_is_read_and_its_gate_can_be_judged() -> None:
    pipeline = pipelines.read_pipeline(CI)
    assert [step.name[:2] for step in pipeline.steps] == ["03", "04", "05", "06"]
    assert all(step.notebook.parent == notebooks.NOTEBOOKS for step in pipeline.steps)
    assert {step.parameters["data"] for step in pipeline.steps} == {"data/sample"}
    gates = gate.read_gates(pipeline.gate, CI.name)
    assert gates == (gate.Gate("mpc", 0.5),)
    gate.check(gates, pipeline.steps)
    text = CI.read_text()
    (words,) = re.findall(r"^#   netllm (run .+ --margin .+)$", text, flags=re.MULTILINE)
    given = dict(word.split("=", 1) for word in cli.join_parameters(words.split()) if "=" in word)
    assert pipelines.read_pipeline(CI, given).steps[1].parameters["plm"] == "smollm2"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_commands_run_as_they_stand_there(path: Path, reports: Path) -> None:
    """The second example finds the runs of the first, as a second run of one job on one machine does."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    environment |= {"NETLLM_REPORTS": str(reports), "CI_PROJECT_DIR": str(runs.PROJECT)}
    environment["PATH"] = f"{runs.PROJECT / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    (reports / "junit.xml").unlink(missing_ok=True)
    for command in commands(path):
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command],
            cwd=runs.PROJECT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "gate passed: llm - mpc = " in done.stdout
    root = ET.parse(reports / "junit.xml").getroot()
    check_document(root)
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("5", "0", "0", "0")
    for case in root.findall(".//testcase[@classname='ci']"):
        (folder,) = re.findall(r"run folder: (.+)", str(case.findtext("system-out")))
        assert (runs.PROJECT / folder / notebooks.REPORT).is_file()
    assert junit.ANSI.search((reports / "junit.xml").read_text()) is None
