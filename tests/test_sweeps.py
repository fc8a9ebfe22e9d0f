"""Sweeps on a real local scheduler: shared runs, killed workers, killed clients, failures, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

pytest.importorskip("distributed")

from dask.system import CPU_COUNT

from netllm_lib import clusters, runs, sweeps
from netllm_lib.notebooks import find_notebook, run_notebook
from netllm_lib.pipelines import Step
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
use.rate = [1.0, 2.0]
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
        os.kill(seen["worker"], signal.SIGKILL)

    with clusters.connect(None, 2, None, 3) as client:
        assert all(address.startswith("tls://127.0.0.1:") for address in client.nthreads())
        before = client.run(os.getpid)
        killer = threading.Thread(target=kill_when_writing)
        killer.start()
        results = sweeps.run_sweep(sweep, client, echo=lambda line: None)
        killer.join()
        # everything listens on the loopback interface alone
        for pid in (os.getpid(), *client.run(os.getpid).values()):
            places = [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"]
            assert set(places) <= {"127.0.0.1"}
    assert seen["worker"] in before.values()
    assert [result.state for result in results] == ["done", "failed"]
    assert "rate is too high" in results[1].problem
    assert results[1].runs["make"].good

    (shared,) = {result.runs["make"].folder for result in results}
    assert shared is not None
    assert (shared / "pool.txt").read_text().split() == [str(i) for i in range(30)]
    assert int((shared / "kernel").read_text()) != seen["kernel"]
    metrics = runs.read_json(shared / "metrics.json")
    assert metrics["worker"] != seen["worker"]
    assert metrics["threads"] == str(max(1, CPU_COUNT // 2))  # shared by two workers
    assert runs.Run(shared).done
    assert is_gone(seen["kernel"])

    table = sweeps.points_table(results)
    assert list(table["state"]) == ["done", "failed"]
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
    sweep = read_sweep(sys.argv[1])
    with clusters.connect(None, 1, None, 2) as client:
        sweeps.run_sweep(sweep, client, echo=lambda line: print(line, flush=True))
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
    with clusters.connect(None, 1, None, 1) as connected:
        first, second = sweeps.run_sweep(sweep, connected, echo=lambda line: None)
    assert (first.runs["make"].state, second.runs["make"].state) == ("reused", "done")
    assert second.runs["make"].folder == running[0]
    assert (running[0] / "pool.txt").read_text().split() == [str(i) for i in range(20)]


@pytest.mark.slow
def test_a_run_that_kills_its_workers_fails_alone(folder: Path) -> None:
    cells = ["if rate > 2: os.kill(os.getppid(), 9)", "import time; time.sleep(rate)", "finish()"]
    write_notebook(folder, "deadly", *cells)
    text = 'notebook = "deadly.ipynb"\n[grid]\nrate = [60.0, 0.1, 0.2, 0.3]\n'
    with clusters.connect(None, 1, None, 4) as client:
        results = sweeps.run_sweep(read_sweep(write_sweep(folder, text)), client, echo=lambda line: None)
    assert [result.state for result in results] == ["failed", "done", "done", "done"]
    assert "every worker that ran it died" in results[0].problem


def test_busy_folders_are_waited_for(folder: Path) -> None:
    """Somebody else holds the run folder when the step begins; it waits. When that takes too long, it fails and says who."""
    path = write_notebook(folder, "plain", "finish(pid=os.getpid())")
    run = run_notebook(path)
    runs.Run(run.folder).note(status="started")  # or it would be reused without a lock
    step = Step(path, "plain")
    results: list[sweeps.RunResult] = []
    waiting = threading.Thread(target=lambda: results.append(sweeps.run_step(step, "run", 60, {})))
    with runs.lock(run.folder):
        late = sweeps.run_step(step, "run", 0.05, {})
        assert late.state == "failed"
        assert f"process {os.getpid()} is writing it" in late.problem
        waiting.start()
        time.sleep(1)
        assert not results
    waiting.join()
    assert (results[0].state, results[0].folder) == ("done", run.folder)
    lost = sweeps.run_step(step, "run", 60, {"make": late})
    assert (lost.state, lost.problem) == ("skipped", "it needs make, which did not succeed")


# --- the file -----------------------------------------------------------------------------------------------------------


def test_points_times_grid_times_seeds(folder: Path) -> None:
    text = """
name = "many"
pipeline = "tiny.toml"
seeds = [1, 2]
[parameters]
"make.size" = 5
use.rate = 3.0
[grid]
"make.pause_s" = [0.0, 0.1]
[[point]]
use.rate = 1.0
[[point]]
make.size = 6
"""
    sweep = read_sweep(write_sweep(folder, text))
    given = [(*point.parameters.values(), point.seed) for point in sweep.points]
    expected = [(5, 1.0), (6, 3.0)]
    assert given == [(size, rate, pause, seed) for size, rate in expected for pause in (0.0, 0.1) for seed in (1, 2)]
    assert sweep.points[0].label == "size=5 rate=1.0 pause_s=0.0 seed=1"
    # `use` has another default seed than `make`: it samples by a protocol, and keeps it
    assert sweep.seed_parameters == ("make.seed",)
    assert {one.step.parameters.get("seed") for one in sweep.steps.values() if one.step.name == "use"} == {None}
    keys = list(sweep.steps)
    for key, one in sweep.steps.items():
        assert all(keys.index(need) < keys.index(key) for need in one.needs.values())
    assert describe({"a.x": 1, "b.x": 2, "a.y": 3}) == "a.x=1 b.x=2 y=3"


def test_a_shared_run_has_one_key(folder: Path) -> None:
    text = 'pipeline = "tiny.toml"\nseeds = [1, 2, 3]\nseed_parameters = ["use.seed"]\n[grid]\nrate = [1, 2]\n'
    sweep = read_sweep(write_sweep(folder, text))
    assert sorted(key.split("-")[0] for key in sweep.steps) == ["make"] + 6 * ["use"]
    assert [point.label for point in sweep.points][::5] == ["rate=1 seed=1", "rate=2 seed=3"]
    sweep = read_sweep(write_sweep(folder, 'notebook = "use.ipynb"\n[grid]\nuse.rate = [1, 2]\n'))
    assert [one.step.parameters for one in sweep.steps.values()] == [{"rate": 1.0}, {"rate": 2.0}]
    sweep = read_sweep(write_sweep(folder, 'notebook = "05"\n'))
    assert (sweep.points[0].label, *sweep.points[0].runs) == ("the only point", find_notebook("05").stem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pipeline = "tiny.toml"\ngird = {}', "unknown key 'gird', did you mean 'grid'"),
        ("seeds = [1]", "one of `pipeline"),
        ('pipeline = "tiny.toml"\nnotebook = "use.ipynb"', "one of `pipeline"),
        ('pipeline = "tiny.toml"\nseeds = [1, 1]', "points 1 and 2 are the same"),
        ('pipeline = "tiny.toml"\nseeds = [1.5]', "seeds.0: it should be a valid integer"),
        ('pipeline = "tiny.toml"\nseed_parameters = ["use.seed"]', "without seeds"),
        ('pipeline = "tiny.toml"\nseeds = [1]\n[grid]\nmake.seed = [1]', "make.seed is varied by .grid. or `seeds`"),
        ('pipeline = "tiny.toml"\nseeds = [1]\nseed_parameters = ["use.sed"]', "no parameter 'sed', did you mean 'seed'"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = 1', "rate: it should be a valid array"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = [1, 1]', "points 1 and 2 are the same"),
        ('pipeline = "tiny.toml"\n[grid]\nrtae = [1, 2]', r"point 1 \(rtae=1\): no step .* 'rtae', did you mean 'rate'"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = ["x"]', "parameter rate is float, got 'x'"),
        ('pipeline = "tiny.toml"\n[parameters]\nrate = 1\n[grid]\nrate = [1]', "leave it out elsewhere"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = [1]\n[[point]]\nrate = 2', "leave it out elsewhere"),
        ('pipeline = "tiny.toml"\n[[point]]\nrate = 2\n[[point]]\nuse.rate = 2.0', "points 1 and 2 are the same"),
        ('pipeline = "tiny.toml"\nname = "a/b"', "name"),
        ('pipeline = "tiny.toml"\n[cluster]\ncore = 3', "unknown key 'core' in cluster, did you mean 'cores'"),
        ('pipeline = "tiny.toml"\n[cluster]\ncores = 0', "cluster.cores"),
        ('notebook = "use.ipynb"\n[grid]\nrate = [1]\nsize = [2]', "has no parameter 'size'"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_sweep(write_sweep(folder, text + "\n", "wrong"))
    assert "wrong.toml" in str(refusal.value)


def test_files_that_are_not_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pipeline demmo\.toml, did you mean 'demo\.toml'"):
        read_sweep(write_sweep(folder, 'pipeline = "demmo.toml"\n'))
    with pytest.raises(FileNotFoundError, match="no notebook 77"):
        read_sweep(write_sweep(folder, 'notebook = "77"\n'))


@pytest.mark.parametrize("name", ["rank", "pools"])
def test_examples(name: str) -> None:
    sweep = read_sweep(runs.PROJECT / "notebooks" / "sweeps" / f"{name}.toml")
    steps = [one.step.name[:2] for one in sweep.steps.values()]
    assert {number: steps.count(number) for number in sorted(set(steps))} == (
        {"03": 1, "04": 12, "05": 12} if name == "rank" else {"03": 12}
    )
    assert len(sweep.points) == 12


# --- clusters -----------------------------------------------------------------------------------------------------------


def test_gpus_are_found_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,MIG-3")
    assert clusters.visible_gpus() == ["1", "MIG-3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert clusters.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clusters.visible_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0; echo 1\n")
    tool.chmod(0o755)
    assert clusters.visible_gpus() == ["0", "1"]


def test_workers_of_this_machine() -> None:
    gib = 2**30
    by_gpu = clusters.local_workers(None, 9, ["0", "1"], cores=16, memory_bytes=gib)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in by_gpu] == ["0", "1"]
    assert by_gpu[0]["OMP_NUM_THREADS"] == by_gpu[0]["NUMBA_NUM_THREADS"] == "8"
    for steps, cores, memory, count in ((9, 16, 64, 8), (9, 16, 7, 2), (3, 16, 64, 3), (0, 1, 0, 1)):
        assert len(clusters.local_workers(None, steps, [], cores, memory * gib)) == count
    three = clusters.local_workers(3, 1, ["0", "1"], 4, gib)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in three] == ["0", "1", "0"]
    assert three[0]["OMP_NUM_THREADS"] == "1"


def test_slurm_job_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch would be given; there is no SLURM here, so nothing is submitted."""
    jobqueue = pytest.importorskip("dask_jobqueue")
    monkeypatch.setattr(jobqueue.SLURMCluster, "scale", lambda self, jobs: None)
    slurm = clusters.Slurm(cores=6, memory="24GB", partition="gpu", gpus=1, directives=("--constraint=a100",))
    with clusters.connect(slurm, None, None, 1) as client:
        script = client.cluster.job_script()  # type: ignore[union-attr]
    lines = [
        "#SBATCH -p gpu",
        "--cpus-per-task=6",
        "#SBATCH -t 08:00:00",
        "--gres=gpu:1",
        "--constraint=a100",
        "tls://",
    ]
    lines += ["export OMP_NUM_THREADS='6'", f"export NETLLM_REPORTS='{folder / 'reports'}'", "--nthreads 1"]
    for line in (*lines, sys.executable):
        assert line in script, line


def test_existing_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        address = cluster.scheduler_address
        with clusters.connect(None, None, address, 1) as client:
            assert len(client.nthreads()) == 1
        monkeypatch.setattr(runs, "PROJECT", folder)
        with pytest.raises(ValueError, match=r"worker tcp://\S+ differs, checkout: .* there, .* here: workers need"):
            clusters.connect(None, None, address, 1).__enter__()
        monkeypatch.undo()
        monkeypatch.setenv("NETLLM_REPORTS", str(folder / "elsewhere"))
        with pytest.raises(ValueError, match="differs, reports folder"):
            clusters.connect(None, None, address, 1).__enter__()
        assert not list((folder / "elsewhere").iterdir())


def test_clusters_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def nthreads(self) -> dict[str, int]:
            return {"tcp://10.0.0.2:4000": 8}

    with pytest.raises(ValueError, match=r"worker tcp://10.0.0.2:4000 has 8 threads: start it with --nthreads 1"):
        clusters.check_workers(Client())  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="--scheduler tcp://127.0.0.1:9: no scheduler with a worker answers"):
        clusters._existing("tcp://127.0.0.1:9", timeout_s=0.5).__enter__()
    with pytest.raises(ValueError, match="--workers is for this machine"):
        clusters.connect(None, 1, "tcp://127.0.0.1:9", 1)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[sweep\]'"):
        clusters.connect(clusters.Slurm(), None, None, 1)


# --- the command --------------------------------------------------------------------------------------------------------


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_sweep(folder, SWEEP + "[parameters]\nsize = 2\n", "dry"))
    assert run_main("sweep", path, "--dry-run", "--json") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "dry: 2 points, 3 distinct runs (3 to do, 0 finished)"
    assert "1  rate=1.0: 2 of 2 runs to do" in shown[-3]
    assert json.loads(shown[-1]) == {"name": "dry", "points": 2, "runs": 3, "finished": 0}
    assert not list((folder / "reports" / "runs" / "sweep").glob("dry-*"))


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


def test_sweep_folder_and_tables(folder: Path, tmp_path: Path) -> None:
    run = sweeps.open_folder(read_sweep(write_sweep(folder, SWEEP, "kept")))
    assert run.folder.parent == folder / "reports" / "runs" / "sweep"
    assert run.folder.name.startswith("kept-")
    assert (run.folder / "sweep.toml").read_text() == SWEEP
    assert sweeps.open_folder(read_sweep(folder / "kept.toml")) == run
    assert runs.read_json(run.folder / "config.json")["points"][1]["parameters"] == {"use.rate": 2.0}
    table = pd.DataFrame({"point": [1, 2], "x": [1.0, None]})
    sweeps.write_table(tmp_path, "a.parquet", table)
    before = (tmp_path / "a.parquet").stat().st_mtime_ns
    sweeps.write_table(tmp_path, "a.parquet", table.copy())
    assert (tmp_path / "a.parquet").stat().st_mtime_ns == before
    sweeps.write_table(tmp_path, "a.parquet", table + 1)
    assert list(pd.read_parquet(tmp_path / "a.parquet")["point"]) == [2, 3]
