"""Every command of README.md and of the pages in docs/ is run, exactly as it stands there.

Blocks marked `sh` hold commands, `python` code that is executed; `text`, `toml` and `json` are output and files. A page is run from
top to bottom in a checkout of its own (`doc_sandbox`). What takes long runs in a slow test; what cannot run here at all is listed
below, with the test or CI line that runs the same, or with the reason.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer

import doc_sandbox
from doc_sandbox import Block, Command, Sandbox
from netllm_lib import cli
from netllm_lib.runs import PROJECT
from test_cli import run

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]  # README.zh-CN.md has the same, see test_docs
CLI_PAGE = PROJECT / "docs" / "cli.md"
CI = ".ci/run"

ELSEWHERE = {
    r"make demo( .*)?": f"{CI}: make demo DATA=",
    r"make test( .*)?": f"{CI}: make test\n",
    r".*netllm run notebooks/pipelines/demo\.toml.*": f"{CI}: make demo DATA=",
    r".*netllm run (07_improve|notebooks/pipelines/(improve-|cloning|mixed-pool)).*": "tests/test_improve.py: def test_notebook_07",
    r".*netllm run 04_finetune -p track mlflow": "tests/test_tracking.py: def test_mlflow",
    r".*netllm sweep \S+ --workers.*": "tests/test_sweeps.py: def test_command",
    r".*python docs/examples/ppo\.py.*": "tests/test_ppo_example.py: def test_it_runs_as_documented",
}  # fmt: skip
"""Commands (a pattern for the whole line) that another test or CI line runs: file, and a part of its text."""

NOT_HERE = {
    r".*tensorboard --logdir .*": "a server that runs until it is stopped",
    r".*mlflow ui .*": "a server that runs until it is stopped, of a package that is not installed",
}
"""Commands that no test runs, and why."""

SLOW = (
    r".*netllm run .*",
    r".*papermill .*",
    r".*netllm check.*",
    r".*netllm diagnose .*--retrain.*",
    r".*netllm diagnose (?!.*--budget 0).*",
)
"""Commands of the slow test; those of the fast one do not need what these leave behind."""


def any_matches(patterns: Iterable[str], text: str) -> bool:
    return any(re.fullmatch(pattern, text) for pattern in patterns)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return doc_sandbox.make_sandbox(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def sandbox(made: Sandbox) -> Sandbox:
    made.restore()
    return made


def run_page(sandbox: Sandbox, path: Path, left_out: Iterable[str]) -> None:
    """Run a page's commands and code, but for commands that have another place."""
    for block in doc_sandbox.blocks(path):
        if block.language == "python":
            sandbox.execute(block)
        for command in block.commands:
            if not any_matches(left_out, command.text):
                sandbox.run(command)


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands(sandbox: Sandbox, path: Path) -> None:
    run_page(sandbox, path, [*ELSEWHERE, *NOT_HERE, *SLOW])


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_slow_commands(sandbox: Sandbox, path: Path) -> None:
    said = [command.text for block in doc_sandbox.blocks(path) for command in block.commands]
    if not any(any_matches(SLOW, text) and not any_matches([*ELSEWHERE, *NOT_HERE], text) for text in said):
        pytest.skip("no slow command")
    run_page(sandbox, path, [*ELSEWHERE, *NOT_HERE])


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_blocks_are_marked_and_can_be_read(path: Path) -> None:
    readers: dict[str, Any] = {"python": ast.parse, "toml": tomllib.loads, "json": json.loads, "sh": str, "text": str}
    for block in doc_sandbox.blocks(path):
        readers[block.language](block.text)
        hidden = re.findall(r"^(?:\.venv/bin/)?(?:netllm|make|python) [\w-].*", block.text, re.MULTILINE)
        assert block.language != "text" or not hidden or "usage" in block.text, f"{block.where}: mark {hidden[0]} as sh"


def test_the_lists_say_what_is_so() -> None:
    """What is run elsewhere is run there, and nothing is listed that no page says."""
    for place in ELSEWHERE.values():
        file, _, text = place.partition(": ")
        assert text in (PROJECT / file).read_text(), place
    said = [command.text for path in PAGES for block in doc_sandbox.blocks(path) for command in block.commands]
    for pattern in (*ELSEWHERE, *NOT_HERE, *SLOW):
        assert any(re.fullmatch(pattern, text) for text in said), f"no page has {pattern}: take it from the list"


# --- docs/cli.md --------------------------------------------------------------------------------------------------------


def documented() -> dict[str, tuple[list[str], list[int], list[set[str]]]]:
    """By command: options, exit codes, and the keys of its line of JSON, several where they depend on the options."""
    found = {}
    for line in CLI_PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`netllm ") and len(cells) == 4:
            keys = [set(re.findall(r"`(\w+)`", part)) for part in cells[3].split("; of ")]
            found[cells[0].strip("`")] = (re.findall(r"`(--[\w-]+)`", cells[1]), [*map(int, cells[2].split())], keys)
    return found


def declared(part: Any = None, name: str = "netllm") -> dict[str, list[str]]:
    """Every command of the program and the long names of its options."""
    part = part or typer.main.get_command(cli.app)
    if not hasattr(part, "commands"):
        return {name: [option.opts[-1] for option in part.params if option.param_type_name == "option"]}
    return {
        key: value for word, inner in part.commands.items() for key, value in declared(inner, f"{name} {word}").items()
    }


def test_the_page_lists_every_command_option_and_environment_variable() -> None:
    assert {name: options for name, (options, _, _) in documented().items()} == declared()
    listed = re.findall(r"^\| `(NETLLM_\w+)` \|", CLI_PAGE.read_text(), flags=re.MULTILINE)
    sources = "".join(path.read_text() for path in (PROJECT / "netllm_lib").rglob("*.py"))
    assert set(listed) == set(re.findall(r"NETLLM_[A-Z]+(?:_[A-Z]+)*", sources))


def test_inline_commands_have_the_options_that_they_name() -> None:
    """Commands in running text, `netllm … --option`, which nothing runs."""
    known = declared()
    for path in PAGES:
        for text in re.findall(r"`((?:\.venv/bin/)?netllm [^`]+)`", path.read_text()):
            words = text.removeprefix(".venv/bin/").split()
            name = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in known), "")
            groups = {" ".join(command.split()[:2]) for command in known}
            assert name or words[1].startswith("-") or words[1].isupper() or " ".join(words[:2]) in groups, text
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            assert not name or options <= {*known[name], "--help", "--debug"}, f"{name_of(path)}: {text}"


JSON_LINES = {
    "netllm data list": "",
    "netllm data fetch": "",
    "netllm data import": "lte_logs new --format mahimahi",
    "netllm data generate": "made --train 2 --test 2",
    "netllm pool show": "reports/runs/03_experience_pool/demo-*/pool",
    "netllm play": "--policy bba",
    "netllm import": "~/NetLLM",
    "netllm diagnose": "~/NetLLM --budget 0",
    "netllm reports": "",
    "netllm sweep": "notebooks/sweeps/rank.toml --dry-run",
}


def test_the_page_tells_the_keys_of_the_json_line(sandbox: Sandbox) -> None:
    """Of all commands but `check` and `run`, whose own tests look at it."""
    rows = documented()
    assert set(JSON_LINES) == set(rows) - {"netllm check", "netllm run"}
    for name, words in JSON_LINES.items():
        (command,) = Block(CLI_PAGE, 1, "sh", f"{name} --json {words}").commands
        _, codes, keys = rows[name]
        assert command.code in codes
        read = json.loads(sandbox.run(command).splitlines()[-1])
        # the columns of the index are many: only what is added to them is listed
        found = set(read[0]) & keys[0] if isinstance(read, list) else set(read)
        assert found in keys, f"{name}: {sorted(read)}"


def test_wrong_requests_exit_with_2_and_help_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for name in declared():
        assert run(*name.split()[1:], "--nosuch") == 2
        assert run(*name.split()[1:], "--help") == 0
        shown, errors = capsys.readouterr()
        assert "No such option" in errors
        assert "--json" in shown
        assert max(map(len, shown.splitlines())) <= 80


def test_completion_and_the_shell(sandbox: Sandbox) -> None:
    asked = "COMP_WORDS='netllm da' COMP_CWORD=1 _NETLLM_COMPLETE=complete_bash .venv/bin/netllm"
    assert sandbox.run(Command("here", asked)).split() == ["data"]
    for text in ("netllm play --policy nosuch", "netllm reports | grep nosuch"):
        with pytest.raises(AssertionError, match="exit code"):
            sandbox.run(Command("here", text))
    block = Block(CLI_PAGE, 10, "sh", "netllm play # exits with 2\n\nnetllm run \\\n  x  # why\n# nothing\n")
    assert [(command.text, command.code) for command in block.commands] == [("netllm play", 2), ("netllm run   x", 0)]
