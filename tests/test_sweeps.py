"""Sweeps on a real local scheduler: shared runs, killed workers, killed clients, failures, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest

pytest.importorskip("distributed")

from dask.system import CPU_COUNT

from netllm_lib import clusters, runs, sweeps
from netllm_lib.notebooks import find_notebook, run_notebook
from netllm_lib.pipelines import Outcome, Step
from netllm_lib.sweep_file import describe, read_sweep
from test_cli import run as run_main
from test_notebooks import is_gone, wait_for, write_notebook

PIPELINE = """
name = "tiny"
[[step]]
notebook = "make.ipynb"
[[step]]
notebook = "use.ipynb"
[step.parameters]
pool = "{make}/pool.txt"
"""
SWEEP = """
pipeline = "tiny.toml"
[grid]
"use.rate" = [1.0, 2.0]
"""
MAKE = """
import time
pathlib.Path(run_dir, 'kernel').write_text(str(os.getpid()))
with open(pathlib.Path(run_dir, 'pool.txt'), 'w') as file:
    for line in range(size):
        file.write(f'{line}\\n'), file.flush(), time.sleep(pause_s)
finish(lines=size, threads=os.environ['OMP_NUM_THREADS'], worker=os.getppid())
"""
USE = """
assert rate < 9, 'rate is too high'
lines = len(pathlib.Path(pool).read_text().split())
finish(score=lines * rate, seed=seed, deep={'a': [1], 'b': 2})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline of two notebooks: the first writes lines slowly, the second counts them."""
    folder = tmp_path_factory.mktemp("sweeps")
    path = "from pathlib import Path\n"
    declared = 'size: int = 3\npause_s: float = 0.0\nseed: int = 1\nrun_dir: str = ""'
    write_notebook(folder, "make", MAKE, parameters=declared)
    declared = path + 'pool: Path = ""\nrate: float = 1.0\nseed: int = 7\nrun_dir: str = ""'
    write_notebook(folder, "use", USE, parameters=declared)
    (folder / "tiny.toml").write_text(PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield folder


def write_sweep(folder: Path, text: str, name: str = "sweep") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


# --- running ------------------------------------------------------------------------------------------------------------


def quiet(line: str) -> None:
    """An echo that says nothing."""


def test_killed_worker_shared_run_and_failing_point(folder: Path) -> None:
    """One run is shared by two points; its worker is killed while it writes; one of the points fails by itself."""
    text = SWEEP.replace("[1.0, 2.0]", "[2.0, 9.0]") + "[parameters]\nsize = 30\npause_s = 0.05\n"
    sweep = read_sweep(write_sweep(folder, text, "killed"))
    assert len(sweep.steps) == 3
    seen: dict[str, int] = {}

    def kill_when_writing() -> None:
        pool = wait_for(folder / "reports" / "runs" / "make", "tiny-*/pool.txt", lines=3)
        seen["kernel"] = int((pool.parent / "kernel").read_text())
        seen["worker"] = psutil.Process(seen["kernel"]).ppid()
        psutil.Process(seen["worker"]).kill()

    with clusters.connect(None, 2, 3) as client:
        assert all(address.startswith("tls://127.0.0.1:") for address in client.nthreads())
        before = client.run(os.getpid)
        killer = threading.Thread(target=kill_when_writing)
        killer.start()
        outcomes = sweeps.run_sweep(sweep, client, quiet)
        killer.join()
        # everything listens on the loopback interface alone
        for pid in (os.getpid(), *client.run(os.getpid).values()):
            places = [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"]
            assert set(places) <= {"127.0.0.1"}
    assert seen["worker"] in before.values()
    assert is_gone(seen["kernel"])
    rows = sweeps.rows(sweep, outcomes)
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert "rate is too high" in rows[1]["problem"]
    (shared,) = {Path(row["run"]["make"]) for row in rows}
    assert (shared / "pool.txt").read_text().split() == [str(i) for i in range(30)]
    metrics = runs.read_json(shared / "metrics.json")
    assert metrics["worker"] != seen["worker"]
    assert metrics["threads"] == str(max(1, CPU_COUNT // 2))  # shared by two workers
    assert runs.Run(shared).done

    table = sweeps.points_table(rows)
    assert list(table["parameter.use.rate"]) == [2.0, 9.0]
    assert table["metric.use.score"][0] == 60
    assert (table["metric.use.deep.a"][0], table["metric.use.deep.b"][0]) == ("[1]", 2)
    assert pd.isna(table["metric.use.score"][1])
    assert table["run.make"].nunique() == 1

    finished = sweeps.finished_runs(sweep)
    assert [key.split("-")[0] for key in finished] == ["make", "use"]
    assert "(1 to do, 2 finished)" in sweeps.plan(sweep, finished)


CLIENT = """
import sys
from netllm_lib import clusters, sweeps
from netllm_lib.sweep_file import read_sweep

if __name__ == "__main__":
    with clusters.connect(None, 1, 2) as client:
        sweeps.run_sweep(read_sweep(sys.argv[1]), client, echo=lambda line: print(line, flush=True))
"""


def test_killed_client_is_resumed(folder: Path) -> None:
    """The first point is done when the client is killed; its workers and kernels end; the next one reuses what is done."""
    text = 'notebook = "make.ipynb"\n[grid]\npause_s = [0.0, 0.1]\n[parameters]\nsize = 20\n'
    path = write_sweep(folder, text, "resumed")
    (folder / "client.py").write_text(CLIENT)
    command = [sys.executable, str(folder / "client.py"), str(path)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert client.stdout is not None
    assert client.stdout.readline().startswith("[1/2] make (pause_s=0.0)")
    pools = folder / "reports" / "runs" / "make"
    running: list[Path] = []
    while not running:
        time.sleep(0.02)
        running = [pool.parent for pool in pools.glob("run-*/pool.txt") if not runs.Run(pool.parent).done]
    started = {one.pid for one in psutil.Process(client.pid).children(recursive=True)}
    client.kill()
    client.communicate()
    end = time.monotonic() + 10
    while not all(map(is_gone, started)) and time.monotonic() < end:
        time.sleep(0.02)
    assert all(map(is_gone, started))

    sweep = read_sweep(path)
    assert len(sweeps.finished_runs(sweep)) == 1
    with clusters.connect(None, 1, 1) as connected:
        outcomes = sweeps.run_sweep(sweep, connected, quiet)
    first, second = (outcomes[point.runs["make"]] for point in sweep.points)
    assert (first.state, second.state, second.folder) == ("reused", "done", running[0])
    assert (running[0] / "pool.txt").read_text().split() == [str(i) for i in range(20)]


@pytest.mark.slow
def test_a_run_that_kills_its_workers_fails_alone(folder: Path) -> None:
    cells = ["if rate > 2: os.kill(os.getppid(), 9)", "import time; time.sleep(rate)", "finish()"]
    write_notebook(folder, "deadly", *cells)
    text = 'notebook = "deadly.ipynb"\n[grid]\nrate = [60.0, 0.1, 0.2, 0.3]\n'
    with clusters.connect(None, 1, 4) as client:
        sweep = read_sweep(write_sweep(folder, text))
        rows = sweeps.rows(sweep, sweeps.run_sweep(sweep, client, quiet))
    assert [row["state"] for row in rows] == ["failed", "done", "done", "done"]
    assert "every worker that ran it died" in rows[0]["problem"]


def test_busy_folders_are_waited_for(folder: Path) -> None:
    """Somebody else holds the run folder when the step begins; it waits. When that takes too long, it fails and says who."""
    path = write_notebook(folder, "plain", "finish(pid=os.getpid())")
    run = run_notebook(path)
    runs.Run(run.folder).note(status="started")  # or it would be reused without a lock
    results: list[Outcome] = []
    waiting = threading.Thread(target=lambda: results.append(sweeps.run_step(Step(path, "plain"), "run", {})))
    with runs.lock(run.folder):
        late = sweeps.run_step(Step(path, "plain", timeout_s=0.05), "run", {})
        assert late.state == "failed"
        assert f"process {os.getpid()} is writing it" in late.problem
        waiting.start()
        time.sleep(1)
        assert not results
    waiting.join()
    assert (results[0].state, results[0].folder) == ("done", run.folder)


# --- the file -----------------------------------------------------------------------------------------------------------


def test_points_times_grid_times_seeds(folder: Path) -> None:
    text = """
name = "many"
pipeline = "tiny.toml"
seeds = [1, 2]
seed_parameters = ["make.seed"]
[parameters]
"make.size" = 5
"use.rate" = 3.0
[grid]
"make.pause_s" = [0.0, 0.1]
[[point]]
"use.rate" = 1.0
[[point]]
"make.size" = 6
"""
    sweep = read_sweep(write_sweep(folder, text))
    given = [(*point.parameters.values(), point.seed) for point in sweep.points]
    expected = [(5, 1.0), (6, 3.0)]
    assert given == [(size, rate, pause, seed) for size, rate in expected for pause in (0.0, 0.1) for seed in (1, 2)]
    assert sweep.points[0].label == "size=5 rate=1.0 pause_s=0.0 seed=1"
    assert {one.parameters.get("seed") for one in sweep.steps.values() if one.name == "use"} == {None}
    assert describe({"a.x": 1, "b.x": 2, "a.y": 3}) == "a.x=1 b.x=2 y=3"


def test_a_shared_run_has_one_key(folder: Path) -> None:
    text = 'pipeline = "tiny.toml"\nseeds = [1, 2, 3]\nseed_parameters = ["use.seed"]\n[grid]\nrate = [1, 2]\n'
    sweep = read_sweep(write_sweep(folder, text))
    assert sorted(key.split("-")[0] for key in sweep.steps) == ["make"] + 6 * ["use"]
    assert [point.label for point in sweep.points][::5] == ["rate=1 seed=1", "rate=2 seed=3"]
    sweep = read_sweep(write_sweep(folder, 'notebook = "use.ipynb"\n[grid]\n"use.rate" = [1, 2]\n'))
    assert [one.parameters for one in sweep.steps.values()] == [{"rate": 1.0}, {"rate": 2.0}]
    sweep = read_sweep(write_sweep(folder, 'notebook = "05"\n'))
    assert (sweep.points[0].label, *sweep.points[0].runs) == ("the only point", find_notebook("05").stem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pipeline = "tiny.toml"\ngird = {}', "unknown key 'gird', did you mean 'grid'"),
        ("seeds = [1]", "one of `pipeline"),
        ('pipeline = "tiny.toml"\nseeds = [1, 1]\nseed_parameters = ["seed"]', "points 1 and 2 are the same"),
        ('pipeline = "tiny.toml"\nseeds = [1.5]', "seeds.0: it should be a valid integer"),
        ('pipeline = "tiny.toml"\nseed_parameters = ["use.seed"]', "need each other"),
        ('pipeline = "tiny.toml"\nseeds = [1]\nseed_parameters = ["seed"]\n[grid]\nseed = [1]', "seed is varied by .grid."),
        ('pipeline = "tiny.toml"\nseeds = [1]\nseed_parameters = ["use.sed"]', "no parameter 'sed', did you mean 'seed'"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = 1', "rate: it should be a valid array"),
        ('pipeline = "tiny.toml"\n[grid]\nrtae = [1, 2]', r"point 1 \(rtae=1\): .* no parameter 'rtae', did you mean 'rate'"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = ["x"]', "parameter rate is float, got 'x'"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = [1]\n[[point]]\nrate = 2', "leave it out elsewhere"),
        ('pipeline = "tiny.toml"\n[[point]]\nrate = 2\n[[point]]\n"use.rate" = 2.0', "points 1 and 2 are the same"),
        ('notebook = "use.ipynb"\n[grid]\nrate = [1]\nsize = [2]', "has no parameter 'size'"),
        ('pipeline = "demmo.toml"', r"no pipeline demmo\.toml, did you mean 'demo\.toml'"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(folder: Path, text: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        read_sweep(write_sweep(folder, text + "\n", "wrong"))
    assert "wrong.toml" in str(refusal.value)


def test_examples() -> None:
    for name, counts in (("rank", {"03": 1, "04": 12, "05": 12}), ("pools", {"03": 12})):
        sweep = read_sweep(runs.PROJECT / "notebooks" / "sweeps" / f"{name}.toml")
        assert Counter(step.name[:2] for step in sweep.steps.values()) == counts
        assert len(sweep.points) == 12


# --- clusters -----------------------------------------------------------------------------------------------------------


def test_gpus_are_found_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, found in (("1,MIG-3", ["1", "MIG-3"]), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert clusters.visible_gpus() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    tool.write_text("#!/bin/sh\necho 0; echo 1\n")
    tool.chmod(0o755)
    assert clusters.visible_gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho No devices were found\n")
    assert clusters.visible_gpus() == []


def test_workers_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(wanted: int | None, steps: int, gpus: str, cores: int, memory_gib: int) -> list[dict[str, str]]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.setattr("dask.system.CPU_COUNT", cores)
        monkeypatch.setattr("distributed.system.MEMORY_LIMIT", memory_gib * 2**30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**60))
        return clusters.local_workers(wanted, steps)

    by_gpu = made(None, 9, "0,1", 16, 1)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in by_gpu] == ["0", "1"]
    assert by_gpu[0]["OMP_NUM_THREADS"] == by_gpu[0]["NUMBA_NUM_THREADS"] == "8"
    for steps, cores, memory_gib, count in ((9, 16, 64, 8), (9, 16, 7, 2), (3, 16, 64, 3), (0, 1, 0, 1)):
        assert len(made(None, steps, "", cores, memory_gib)) == count
    three = made(3, 1, "0,1", 4, 1)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in three] == ["0", "1", "0"]
    assert three[0]["OMP_NUM_THREADS"] == "1"


def test_job_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch system would be given; there is none here, so nothing is submitted."""
    jobqueue = pytest.importorskip("dask_jobqueue")
    asked: list[int] = []
    monkeypatch.setattr(jobqueue.SLURMCluster, "scale", lambda self, n: asked.append(n))
    options = {"queue": "gpu", "job_extra_directives": ["--gres=gpu:1"]}
    jobs = {"interface": "lo", "n_workers": 2, "cores": 6, "memory": "24GB", **options}
    with clusters.connect(jobs, None, 1) as client:
        script = client.cluster.job_script()  # type: ignore[union-attr]
        keys = list((folder / "reports" / "jobs").glob(".dask-jobqueue*"))
        assert {file.stat().st_mode & 0o777 for file in keys} == {0o600}
        listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}
    assert asked[0] == 2
    lines = ["#SBATCH -p gpu", "--cpus-per-task=6", "#SBATCH -t 08:00:00", "--gres=gpu:1", "tls://", sys.executable]
    lines += ["export OMP_NUM_THREADS=6", f"export NETLLM_REPORTS={folder / 'reports'}", "--interface lo"]
    assert not [line for line in lines if line not in script]
    assert script.rpartition("--nthreads ")[2].startswith("1 ")


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ({"n_workers": 2}, r"needs interface = "),
        ({"interface": "lo", "kind": "SLURMClutser"}, "no kind SLURMClutser, did you mean 'SLURMCluster'"),
        ({"interface": "nosuch0"}, "cluster.: .*nosuch0"),
        ({"interface": "lo", "qeue": "x"}, "cluster.: .*qeue"),
    ],
)
def test_jobs_that_cannot_be_asked_for(folder: Path, jobs: dict[str, Any], message: str) -> None:
    pytest.importorskip("dask_jobqueue")
    with pytest.raises(ValueError, match=message):
        clusters.connect(jobs, None, 1).__enter__()


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[sweep\]'"):
        clusters.connect({"interface": "lo"}, None, 1).__enter__()


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: a point fails, the others are compared, the exit names it; the second time everything is reused."""
    path = write_sweep(folder, SWEEP.replace("2.0]", "2.0, 9.0]"), "whole")
    for attempt in range(2):
        assert run_main("sweep", str(path), "--workers", "2", "--json") == 1
        said = capsys.readouterr()
        assert "1 of 3 points failed: 3 (rate=9.0): use: cell 3 " in said.err
        *shown, last = said.out.splitlines()
        answer = json.loads(last)
        assert [point["state"] for point in answer["points"]] == ["done", "done", "failed"]
        assert ("make (rate=1.0): reused" in "".join(shown)) == bool(attempt)
        assert Path(answer["comparison"]).parent.name == "08_compare"
        assert any(line.startswith("report: ") for line in shown)
    assert len(list((folder / "reports" / "runs" / "08_compare").iterdir())) == 1
    points = pd.read_parquet(Path(answer["folder"]) / "points.parquet")
    assert "rate is too high" in points["problem"][2]
