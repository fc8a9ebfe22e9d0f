"""Run folders, hashes and atomic writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from netllm_lib import runs


@dataclass(frozen=True)
class Config:
    rate: float = 0.5
    path: Path = Path("a/b")


def test_same_work_same_folder(tmp_path: Path) -> None:
    first = runs.open_run("kind", "name", Config(), {"pool": "abc"}, root=tmp_path)
    assert not first.done
    first.finish({"reward": np.float64(0.5), "missing": float("nan")})
    again = runs.open_run("kind", "name", Config(), {"pool": "abc"}, root=tmp_path)
    assert again.folder == first.folder
    assert again.done
    assert runs.read_json(first.folder / "metrics.json") == {"reward": 0.5, "missing": None}
    assert runs.read_json(first.folder / "config.json") == {"rate": 0.5, "path": "a/b"}
    for config, inputs in ((Config(rate=0.6), {"pool": "abc"}), (Config(), {"pool": "abd"})):
        assert runs.open_run("kind", "name", config, inputs, root=tmp_path).folder != first.folder


def test_hashes_see_content_only(tmp_path: Path) -> None:
    assert (
        runs.content_hash({"a": 1, "b": 2})
        == runs.content_hash({"b": 2, "a": 1})
        != runs.content_hash({"a": 1, "b": 3})
    )
    a = np.arange(6)
    assert runs.array_hash(a) != runs.array_hash(a.reshape(2, 3)) != runs.array_hash(a.astype(np.int32))
    assert runs.array_hash(a.reshape(2, 3).T) == runs.array_hash(a.reshape(2, 3).T.copy())
    for name in ("one", "two"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "file").write_text("same")
    assert runs.tree_hash(tmp_path / "one") == runs.tree_hash(tmp_path / "two")
    (tmp_path / "two" / "x" / "file").write_text("other")
    assert runs.tree_hash(tmp_path / "one") != runs.tree_hash(tmp_path / "two")


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "f.json", 1)
    with pytest.raises(RuntimeError, match="half"), runs.atomic_path(tmp_path / "f.json") as aside:
        aside.write_text("half")
        raise RuntimeError("half")
    assert runs.read_json(tmp_path / "f.json") == 1
    with runs.atomic_path(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "x").write_text("new")
    with runs.atomic_path(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "y").write_text("newer")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "folder"]


def test_a_killed_writer_leaves_no_half_written_file(tmp_path: Path) -> None:
    target = tmp_path / "f.txt"
    target.write_text("old")
    code = f"""
        import os, pathlib
        from netllm_lib import runs
        with runs.atomic_path(pathlib.Path({str(target)!r})) as aside:
            aside.write_text("half")
            print("writing", flush=True)
            os.kill(os.getpid(), {signal.SIGKILL.value})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=runs.PROJECT
    )
    assert "writing" in done.stdout
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text("{")
    with pytest.raises(ValueError, match="f.json: not valid JSON"):
        runs.read_json(tmp_path / "f.json")


def test_latest_is_the_last_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run that notebook first"):
        runs.latest("05_test")
    for age, name in ((100, "old"), (10, "new")):
        runs.write_json(tmp_path / "runs" / "05_test" / name / "metrics.json", {})
        os.utime(tmp_path / "runs" / "05_test" / name / "metrics.json", (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "05_test" / "unfinished").mkdir()
    assert runs.latest("05_test").name == "new"


def test_headless_progress_prints_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("NETLLM_HEADLESS", "1")
    report = runs.progress("work", every_s=0)
    report(1, 2, {"loss": 0.5})
    report(2, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("work: 1/2  loss 0.500")
    assert len(lines) == 2
