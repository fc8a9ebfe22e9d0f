"""Ctrl-C ends every command within two seconds, with one line and no traceback, and its runs are interrupted ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netllm_lib import runs
from run_fixtures import prepare_run
from test_notebooks import wait_for, write_notebook

LINE = "netllm: interrupted; the same command goes on from what is finished"
SWEEP = 'notebook = "{}"\n[grid]\nsteps = [1, 2]\n'


def interrupt(folder: Path, begun: str, *words: str) -> None:
    """Start `netllm words…`, and send it and its children SIGINT, as a terminal does, once there is a file or line `begun`."""
    environment = {**os.environ, "NETLLM_REPORTS": str(folder / "reports"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from netllm_lib.cli import main; main()", *words]
    errors = folder / "errors"
    with errors.open("w") as stream:
        options = {"stdout": subprocess.DEVNULL, "stderr": stream, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, cwd=runs.PROJECT, **options)  # type: ignore[call-overload]
    wait_for(folder, begun, lines=begun == errors.name)
    time.sleep(0.5)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - started < 2 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    said = [line for line in errors.read_text().splitlines() if "so far" not in line]
    assert said == [LINE]


@pytest.mark.parametrize("cell", ["import time\nfor i in range(600): print(i); time.sleep(.1)", "sum(range(10**11))"])
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_notebooks(tmp_path: Path, command: str, cell: str) -> None:
    """Also a cell that does not release Python's lock."""
    path = write_notebook(tmp_path, "slow", "pathlib.Path(run_dir, 'begun').touch()", cell, "finish()")
    (tmp_path / "many.toml").write_text(SWEEP.format(path))
    words = [str(path)] if command == "run" else [str(tmp_path / "many.toml"), "--workers", "1"]
    interrupt(tmp_path, "reports/runs/slow/*/begun", command, *words)
    made = [runs.Run(file.parent) for file in tmp_path.glob(f"reports/runs/*/*/{runs.MANIFEST}")]
    end = time.monotonic() + 10  # workers end after the command
    while {run.state for run in made} != {"interrupted"}:
        assert time.monotonic() < end, made
        time.sleep(0.05)


def test_diagnose(tmp_path: Path) -> None:
    run = prepare_run(tmp_path)
    words = (str(run.folder("05_test")), "--budget", "600", "--retrain", "600", "--data", str(run.data))
    interrupt(tmp_path, "errors", "diagnose", *words)
