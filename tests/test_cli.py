"""The command line: exit codes, one-line errors, words of `-p`."""

from __future__ import annotations

import json

import pytest

import netllm_lib
from netllm_lib import cli, envcheck
from netllm_lib.abr import checks


def run(*words: str) -> int:
    """The exit code of `netllm words…`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    return int(stop.value.code or 0)


def test_help_fits_a_screen_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 40
    assert {"check", "run", "import", "diagnose"} <= set(shown.split())
    assert run("--version") == 0
    assert capsys.readouterr().out == f"netllm {netllm_lib.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "nosuch"), "netllm: error: no notebook nosuch"),
        (("run", "nosuch.toml"), "netllm: error: nosuch.toml: no such file"),
        (("run", "nosuch", "-p", "key"), "netllm: error: -p takes two words: -p KEY VALUE"),
        (("run", "nosuch", "-p", "key=1", "x"), "netllm: error: -p key=1: write -p key 1"),
    ],
)
def test_wrong_requests_exit_2_with_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert len(shown.splitlines()) == 1
    assert run(*words, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_parameters_are_two_words() -> None:
    assert cli.join_parameters(["run", "x", "-p", "a", "b=c", "--force"]) == ["run", "x", "-p", "a=b=c", "--force"]
    assert cli.join_parameters(["-p", "lr", "-3"]) == ["-p", "lr=-3"]


def test_check_fails_with_1_and_ends_with_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "disk", "status": "fail", "found": "full", "advice": "empty it"}
    monkeypatch.setattr(checks, "llm_checks", lambda *args, **kwargs: [envcheck.Check(**row)])  # type: ignore[arg-type]
    assert run("check", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1]) == [row]
    assert "1 of 1 checks failed" in shown.err
