"""Every command of README.md and of the pages in docs/ is run, exactly as it stands there.

Blocks marked `sh` hold commands, `python` code that is executed; `text`, `toml` and `json` are output and files. A page is run from
top to bottom in a checkout of its own (`doc_sandbox`). What takes long runs in a slow test; what cannot run here at all is listed
below, with the test or CI line that runs the same, or with the reason.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import doc_sandbox
from doc_sandbox import Block, Command, Sandbox
from netllm_lib import cli
from netllm_lib.runs import PROJECT

PAGES = sorted([*PROJECT.glob("README*.md"), *(PROJECT / "docs").rglob("*.md")])
CLI_PAGE = PROJECT / "docs" / "cli.md"
CI = ".ci/run"

ELSEWHERE = {
    r"make demo( .*)?": f"{CI}: make demo DATA=",
    r"make test( .*)?": f"{CI}: make test\n",
    r".*netllm run notebooks/pipelines/demo\.toml.*": f"{CI}: make demo DATA=",
    r".*netllm run notebooks/pipelines/(improve-\S+|cloning\.toml) .*": "tests/test_improve.py: def test_notebook_07",
    r".*netllm run notebooks/pipelines/mixed-pool\.toml .*": "tests/test_advantage.py: def test_pipelines_of_the_results_are_read",
    r".*netllm run 07_improve.*": "tests/test_improve.py: def test_notebook_07",
    r".*netllm run 04_finetune -p track mlflow": "tests/test_tracking.py: def test_mlflow_keeps_parameters_curves_and_tags",
    r".*netllm sweep \S+ --workers.*": "tests/test_sweeps.py: def test_command",
    r".*netllm sweep .*--(scheduler|slurm) .*": "tests/test_sweeps.py: def test_existing_cluster",
    r"dask (scheduler|worker) .*": "tests/test_sweeps.py: def test_existing_cluster",
    r".*python docs/examples/ppo\.py.*": "tests/test_ppo_example.py: def test_it_runs_as_documented",
}
"""Commands (a pattern for the whole line) that another test or CI line runs: file, and a part of its text."""

NOT_HERE = {
    r".*tensorboard --logdir .*": "a server that runs until it is stopped",
    r".*mlflow ui .*": "a server that runs until it is stopped, of a package that is not installed",
}
"""Commands that no test runs, and why."""

SLOW = [
    r".*netllm run .*",
    r".*netllm check.*",
    r".*netllm diagnose .*--retrain.*",
    r".*netllm diagnose (?!.*--budget 0).*",
]
"""Commands of the slow test; those of the fast one do not need what these leave behind."""


def matches(patterns: list[str] | dict[str, str], text: str) -> list[str]:
    return [pattern for pattern in patterns if re.fullmatch(pattern, text)]


def items(path: Path) -> list[Command | Block]:
    """What a page has to run, in order."""
    found: list[Command | Block] = []
    for block in doc_sandbox.blocks(path):
        found += doc_sandbox.commands(block) if block.language == "sh" else []
        found += [block] if block.language == "python" else []
    return found


def page_commands(path: Path) -> list[Command]:
    return [item for item in items(path) if isinstance(item, Command)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return doc_sandbox.make_sandbox(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def sandbox(made: Sandbox) -> Sandbox:
    made.restore()
    return made


def runs_here(command: Command) -> bool:
    return not matches(ELSEWHERE, command.text) and not matches(NOT_HERE, command.text)


def run_page(sandbox: Sandbox, path: Path, slow: bool) -> None:
    """Run a page's commands and code. What is slow only if asked for."""
    for item in items(path):
        if isinstance(item, Block):
            sandbox.execute(item)
        elif runs_here(item) and (slow or not matches(SLOW, item.text)):
            sandbox.run(item)


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def is_slow(path: Path) -> bool:
    return any(runs_here(command) and matches(SLOW, command.text) for command in page_commands(path))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands(sandbox: Sandbox, path: Path) -> None:
    run_page(sandbox, path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if is_slow(path)], ids=name_of)
def test_slow_commands(sandbox: Sandbox, path: Path) -> None:
    run_page(sandbox, path, slow=True)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_blocks_are_marked_and_can_be_read(path: Path) -> None:
    for block in doc_sandbox.blocks(path):
        where = f"{name_of(path)}:{block.line}"
        assert block.language in doc_sandbox.LANGUAGES, f"{where}: mark this block as one of {doc_sandbox.LANGUAGES}"
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "text":  # commands are not hidden among output
            lines = [
                line for line in block.text.splitlines() if re.match(r"(\.venv/bin/)?(netllm|make|python) [\w-]", line)
            ]
            assert not lines or "usage" in block.text, f"{where}: {lines[0]}: commands belong into a block marked sh"


def test_what_is_run_elsewhere_is_run_there() -> None:
    for pattern, place in ELSEWHERE.items():
        file, _, text = place.partition(": ")
        assert text in (PROJECT / file).read_text(), f"{pattern}: {file} has no {text!r}"


def test_lists_hold_nothing_that_no_page_says() -> None:
    said = [command.text for path in PAGES for command in page_commands(path)]
    for pattern in (*ELSEWHERE, *NOT_HERE, *SLOW):
        assert any(re.fullmatch(pattern, text) for text in said), f"no page has {pattern}: take it from the list"


# --- docs/cli.md ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table of commands."""

    options: list[str]
    codes: list[int]
    keys: list[set[str]]  # of the line of JSON; several where it depends on the options


def documented() -> dict[str, Row]:
    found = {}
    for line in CLI_PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`netllm ") and len(cells) == 4:
            options, codes, last = cells[1:]
            keys = [set(re.findall(r"`(\w+)`", part)) for part in last.split("; of ")]
            found[cells[0].strip("`")] = Row(
                re.findall(r"`(--[\w-]+)`", options), [int(c) for c in codes.split()], keys
            )
    return found


def declared() -> dict[str, list[str]]:
    """Every command of the program and the long names of its options."""
    found = {}

    def walk(command: Any, name: str) -> None:
        for part, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {part}")
        if not hasattr(command, "commands"):
            found[name] = [parameter.opts[-1] for parameter in command.params if parameter.param_type_name == "option"]

    walk(typer.main.get_command(cli.app), "netllm")
    return found


def test_the_page_lists_every_command_and_option() -> None:
    assert {name: row.options for name, row in documented().items()} == declared()


def test_the_page_lists_every_environment_variable() -> None:
    listed = re.findall(r"^\| `(NETLLM_\w+)` \|", CLI_PAGE.read_text(), flags=re.MULTILINE)
    sources = "".join(path.read_text() for path in (PROJECT / "netllm_lib").rglob("*.py"))
    assert set(listed) == set(re.findall(r"NETLLM_[A-Z]+(?:_[A-Z]+)*", sources))


def test_inline_commands_have_the_options_that_they_name() -> None:
    """Commands in running text, `netllm … --option`, which nothing runs."""
    known = declared()
    for path in PAGES:
        for text in re.findall(r"`((?:\.venv/bin/)?netllm [^`]+)`", path.read_text()):
            words = text.removeprefix(".venv/bin/").split()
            name = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in known), None)
            if name is None:
                groups = {" ".join(command.split()[:2]) for command in known}
                assert words[1].startswith("-") or words[1].isupper() or " ".join(words[:2]) in groups, (
                    f"{path}: {text}"
                )
                continue
            options = [word.split("=")[0] for word in words if word.startswith("--")]
            unknown = set(options) - {*known[name], "--help", "--debug"}
            assert not unknown, f"{name_of(path)}: {text}: no option {sorted(unknown)}"


JSON_LINES = [
    ("netllm data list", "", 0),
    ("netllm data fetch", "", 0),
    ("netllm data check", "", 0),
    ("netllm data check", "data/sample", 1),
    ("netllm data import", "lte_logs new --format mahimahi", 0),
    ("netllm data import", "movie.json new --format movie", 0),
    ("netllm data export", "fcc-test out --format csv", 0),
    ("netllm data generate", "made --train 2 --test 2", 0),
    ("netllm pool show", "reports/runs/03_experience_pool/demo-*", 0),
    ("netllm pool export", "reports/runs/03_experience_pool/demo-* a-v0", 0),
    ("netllm pool import", "a-v0 pool", 0),
    ("netllm play", "--policy bba", 0),
    ("netllm import", "~/NetLLM", 0),
    ("netllm diagnose", "~/NetLLM --budget 0", 0),
    ("netllm reports", "", 0),
    ("netllm sweep", "notebooks/sweeps/rank.toml --dry-run", 0),
]


def test_the_page_tells_the_keys_of_the_json_line(sandbox: Sandbox) -> None:
    """Of all commands but `check`, `run` and `sweep`, whose own tests look at it."""
    rows = documented()
    for command, words, code in JSON_LINES:
        assert code in rows[command].codes
        printed = sandbox.run(Command("here", f"{command} {words} --json", code)).splitlines()[-1]
        read = json.loads(printed)
        if isinstance(read, list):  # the columns of the index are many: only what is added to them is listed
            assert set.union(*rows[command].keys) <= set(read[0]), command
        else:
            assert set(read) in rows[command].keys, f"{command}: {sorted(read)}"
    assert {command for command, _, _ in JSON_LINES} == set(rows) - {"netllm check", "netllm run"}


@pytest.mark.parametrize("name", sorted(declared()))
def test_wrong_requests_exit_with_2_and_help_with_0(name: str) -> None:
    words = name.split()[1:]
    code, _, errors = doc_sandbox.call(*words, "--nosuch")
    assert code == 2
    assert "No such option" in errors
    code, shown, _ = doc_sandbox.call(*words, "--help")
    assert code == 0
    assert "--json" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_completion(sandbox: Sandbox) -> None:
    asked = {"COMP_WORDS": "netllm da", "COMP_CWORD": "1", "_NETLLM_COMPLETE": "complete_bash"}
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in asked.items())
    code, shown, errors = sandbox.bash(f"{given} .venv/bin/netllm")
    assert (code, shown.split()) == (0, ["data"]), errors


# --- the shell itself -----------------------------------------------------------------------------------------------------


def test_commands_of_a_block() -> None:
    text = "netllm play --policy 'a # b' # exits with 2\n\nnetllm run \\\n  x  # why\n# nothing\n"
    found = doc_sandbox.commands(Block(PROJECT / "README.md", 10, "sh", text))
    assert [(c.text, c.code, c.where) for c in found] == [
        ("netllm play --policy 'a # b'", 2, "README.md:10"),
        ("netllm run   x", 0, "README.md:13"),
    ]


def test_the_shell_fails_where_a_shell_would(sandbox: Sandbox) -> None:
    for text in (
        "netllm play --policy nosuch",
        "netllm data list --data nosuch",
        "false",
        "netllm reports | grep nosuch",
    ):
        with pytest.raises(AssertionError, match="exit code"):
            sandbox.run(Command("here", text))
    with pytest.raises(AssertionError, match="exit code 0"):
        sandbox.run(Command("here", "netllm reports", code=1))
    with pytest.raises(AssertionError, match="one command a line"):
        sandbox.run(Command("here", "netllm reports && false"))
    with pytest.raises(AssertionError, match="cannot run netllm so"):
        sandbox.run(Command("here", "time netllm reports"))
    sandbox.run(Command("here", "netllm play --policy mpc --trace-num 2 --json | tail -1 > played.json"))
    assert json.loads((sandbox.checkout / "played.json").read_text())["traces"] == 2
    assert sandbox.words("netllm 'a*' ~/NetLLM reports/runs/05_test/demo-* --x=1") == [
        *("netllm", "a*", str(sandbox.home / "NetLLM"), "reports/runs/05_test/demo-5f5f5f5f5f5f", "--x=1")
    ]


def test_restoring_undoes_everything(sandbox: Sandbox) -> None:
    data = sandbox.checkout / "data" / "netllm" / "traces"
    sandbox.run(Command("here", "netllm reports"))
    (data / "test" / "fcc-test").rename(data / "test" / "other")
    (sandbox.home / "new").touch()
    sandbox.restore()
    assert (data / "test" / "fcc-test").is_dir()
    assert not (data / "test" / "other").exists()
    assert not (sandbox.home / "new").exists()
