"""One source of truth: the conda files, the Makefile and the CI files say what `pyproject.toml` says."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


@pytest.mark.parametrize("extra", ["llm", "tf"])
def test_conda_environments_equal_the_extras(extra: str) -> None:
    environment = yaml.safe_load((PROJECT / f"environment-{extra}.yml").read_text())
    project = PYPROJECT["project"]
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": [*project["dependencies"], *project["optional-dependencies"][extra], "-e ."]}
    assert conda == ["python=3.11", "pip"]
    assert environment["name"] == f"netllm-{extra}"


def test_oldest_python_is_the_one_tested() -> None:
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == "3.11"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"
    workflow = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test-and-demo"]["steps"]
    assert [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})] == ["3.11"]
    assert [step["run"] for step in steps if "run" in step] == ["make test", "make demo"]


def test_make_lists_its_targets() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    shown = subprocess.run(["make"], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^\.PHONY: (.+)$", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)[0].split()
    assert {line.split()[1] for line in shown.splitlines()} == set(targets) - {"lint"}
