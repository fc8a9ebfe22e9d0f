"""One source of truth: conda files, locks, Makefile, container and CI files say what `pyproject.toml` says."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import netllm_lib

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


# --- locks --------------------------------------------------------------------------------------------------------------


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """(requirement, its hashes) of every entry of a lock."""
    text = (PROJECT / f"requirements-{name}.txt").read_text()
    entries = re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    assert "://" not in text  # a mirror has the same files
    return [(Requirement(entry.split(" --hash=")[0]), entry.split(" --hash=sha256:")[1:]) for entry in entries]


@pytest.mark.parametrize("name", ["llm", "tf"])
def test_locks_fit_the_project(name: str) -> None:
    """Every package that is asked for is there in a version that fits, on each platform for which it is asked; nothing else decides
    the build of PyTorch."""
    project, makefile = PYPROJECT["project"], (PROJECT / "Makefile").read_text()
    extras = re.findall(r"^EXTRAS +:= (.+)$", makefile, flags=re.MULTILINE)[0].split(",") if name == "llm" else ["tf"]
    asked = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    entries = locked(name)
    for requirement in map(Requirement, [*asked, *PYPROJECT["build-system"]["requires"]]):
        for machine in ({"sys_platform": "linux", "platform_machine": "x86_64"}, {"sys_platform": "darwin"}):
            environment = {**machine, "python_version": "3.11", "python_full_version": "3.11.9"}
            if requirement.marker is not None and not requirement.marker.evaluate(environment):
                continue
            found = [e for e, _ in entries if e.name == canonicalize_name(requirement.name)]
            found = [e for e in found if e.marker is None or e.marker.evaluate(environment)]
            pins = [str(e.specifier).removeprefix("==") for e in found]
            if requirement.name == "torch":
                assert pins == []
                pins = re.findall(r"^TORCH +\?= torch==(.+)$", makefile, flags=re.MULTILINE)
            assert len(pins) == 1, requirement
            assert requirement.specifier.contains(pins[0]), requirement
    for requirement, hashes in entries:
        assert not re.match("torch|triton|nvidia-|cuda-", requirement.name)
        assert str(requirement.specifier).startswith("==")
        assert hashes
        assert all(re.fullmatch("[0-9a-f]{64} *", value) for value in hashes)


def test_the_language_model_is_pinned() -> None:
    ((requirement, hashes),) = locked("plm")
    assert str(requirement) in (PROJECT / "environment-llm.yml").read_text()
    assert len(hashes) == 2  # the wheel and the source


# --- what others read ---------------------------------------------------------------------------------------------------


def test_the_container_runs_both_commands() -> None:
    """Its image is of the oldest Python, what it copies is there, and `make` knows what it runs."""
    lines = [line.split(None, 1) for line in (PROJECT / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    kinds = [kind for kind, _ in lines]
    assert kinds == ["FROM", "WORKDIR", "COPY", "COPY", "RUN", "COPY", "CMD"]
    assert lines[0][1] == f"python:{PYPROJECT['project']['requires-python'].removeprefix('>=')}"
    sources = [name for kind, text in lines[:-2] if kind == "COPY" for name in text.split()[:-1]]
    assert all(list(PROJECT.glob(name)) for name in sources)
    makefile = (PROJECT / "Makefile").read_text()
    needed = set(re.findall(r"^\$\(\w+_STAMP\): (.+)$", makefile, flags=re.MULTILINE))
    assert all(any(fnmatch(name, source) for source in sources) for text in needed for name in text.split())
    asked = [*lines[4][1].split()[1:], *yaml.safe_load(lines[-1][1])[1:]]
    targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
    assert asked == ["env", "env-tf", "test", "demo"]
    assert set(asked) <= set(targets)
    assert {".venv", ".venv-tf", "data/netllm"} <= set((PROJECT / ".dockerignore").read_text().split())


def test_citation() -> None:
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (netllm_lib.__version__, PYPROJECT["project"]["license"])
    assert cited["references"][0]["title"] == "NetLLM: Adapting Large Language Models for Networking"
