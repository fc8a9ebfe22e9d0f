"""Sweeps on a real local scheduler: shared runs, killed workers, killed clients, failures, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

pytest.importorskip("distributed")

import typer

from netllm_lib import clusters, runs, sweeps
from netllm_lib.cli import sweep as sweep_command
from netllm_lib.notebooks import NotebookError, find_notebook, run_notebook
from netllm_lib.sweep_file import Sweep, describe, read_sweep
from test_notebooks import write_notebook

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
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline of two notebooks: the first writes lines slowly, the second counts them."""
    folder = tmp_path_factory.mktemp("sweeps")
    declared = 'size: int = 3\npause_s: float = 0.0\nseed: int = 1\nrun_dir: str = ""'
    write_notebook(
        folder,
        "make",
        MAKE + "finish(lines=size, threads=os.environ['OMP_NUM_THREADS'], worker=os.getppid())",
        parameters=declared,
    )
    write_notebook(
        folder,
        "use",
        "assert rate < 9, 'rate is too high'",
        "lines = len(pathlib.Path(pool).read_text().split())\nfinish(score=lines * rate, seed=seed, deep={'a': [1], 'b': 2})",
        parameters='pool: str = ""\nrate: float = 1.0\nseed: int = 7\nrun_dir: str = ""',
    )
    (folder / "tiny.toml").write_text(PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield folder


def write_sweep(folder: Path, text: str, name: str = "sweep") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def workers(count: int) -> Callable[[], object]:
    environments = clusters.local_workers(count, 9, [], cores=4, memory_bytes=1e9)
    return lambda: clusters.local_cluster(environments)


def wait_for(path: Path, pattern: str, lines: int = 1, timeout_s: float = 60.0) -> Path:
    """The first file that matches, once it has so many lines."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for found in path.glob(pattern):
            if len(found.read_text().splitlines()) >= lines:
                return found
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} below {path}")


def is_gone(pid: int) -> bool:
    """No such process, or only its entry, which waits to be collected."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- running ------------------------------------------------------------------------------------------------------------


def test_killed_worker_shared_run_and_failing_point(folder: Path) -> None:
    """One run is shared by two points; its worker is killed while it writes; one of the points fails by itself."""
    text = SWEEP.replace("[1.0, 2.0]", "[2.0, 9.0]") + "[parameters]\nsize = 30\npause_s = 0.05\n"
    sweep = read_sweep(write_sweep(folder, text, "killed"))
    assert len(sweep.steps) == 3
    lines: list[str] = []
    seen: dict[str, int] = {}

    def kill_when_writing() -> None:
        pool = wait_for(folder / "reports" / "runs" / "make", "tiny-*/pool.txt", lines=3)
        seen["kernel"] = int((pool.parent / "kernel").read_text())
        seen["worker"] = psutil.Process(seen["kernel"]).ppid()
        os.kill(seen["worker"], signal.SIGKILL)

    with clusters.connect(workers(2)) as client:
        before = client.run(os.getpid)
        killer = threading.Thread(target=kill_when_writing)
        killer.start()
        results = sweeps.run_sweep(sweep, client, echo=lines.append)
        killer.join()
        # everything listens on the loopback interface alone
        for pid in (os.getpid(), *client.run(os.getpid).values()):
            places = [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"]
            assert set(places) <= {"127.0.0.1"}
    assert seen["worker"] in before.values()
    assert any("is gone; what it ran is run again" in line for line in lines)
    assert [result.state for result in results] == ["done", "failed"]
    assert "rate is too high" in results[1].problem
    assert results[1].runs["make"].good

    made = {result.runs["make"].folder for result in results}
    assert len(made) == 1
    shared = made.pop()
    assert shared is not None
    assert (shared / "pool.txt").read_text().split() == [str(i) for i in range(30)]
    assert int((shared / "kernel").read_text()) != seen["kernel"]
    metrics = runs.read_json(shared / "metrics.json")
    assert metrics["worker"] != seen["worker"]
    assert metrics["threads"] == "2"  # four cores, shared by two workers
    assert runs.Run(shared).done
    assert is_gone(seen["kernel"])
    assert not list(shared.parent.glob(".*.lock"))

    table = sweeps.points_table(results)
    assert list(table["state"]) == ["done", "failed"]
    assert list(table["parameter.use.rate"]) == [2.0, 9.0]
    assert table["metric.use.score"][0] == 60
    assert table["metric.use.deep.b"][0] == 2
    assert "metric.use.deep.a" not in table
    assert pd.isna(table["metric.use.score"][1])
    assert table["run.make"].nunique() == 1

    finished = sweeps.finished_runs(sweep)
    assert {key.split("-")[0] for key in finished} == {"make", "use"}
    assert len(finished) == 2
    assert "(1 to do, 2 finished; 1 points complete)" in sweeps.plan(sweep, finished)


CLIENT = """
import sys
from netllm_lib import clusters, sweeps
from netllm_lib.sweep_file import read_sweep

if __name__ == "__main__":
    sweep = read_sweep(sys.argv[1])
    with clusters.connect(lambda: clusters.local_cluster(clusters.local_workers(1, 9, [], 1, 1e9))) as client:
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
    for line in client.stdout:
        if line.startswith("[1/2] make"):
            break
    started = {one.pid for one in psutil.Process(client.pid).children(recursive=True)}
    pools = folder / "reports" / "runs" / "make"
    running = [p.parent for p in pools.glob("run-*/pool.txt") if not runs.Run(p.parent).done]
    while not running:
        time.sleep(0.02)
        running = [p.parent for p in pools.glob("run-*/pool.txt") if not runs.Run(p.parent).done]
    started |= {one.pid for one in psutil.Process(client.pid).children(recursive=True)}
    client.kill()
    client.wait()
    client.stdout.close()
    end = time.monotonic() + 10
    while not all(map(is_gone, started)) and time.monotonic() < end:
        time.sleep(0.02)
    assert all(map(is_gone, started))

    sweep = read_sweep(path)
    assert len(sweeps.finished_runs(sweep)) == 1
    with clusters.connect(workers(1)) as connected:
        first, second = sweeps.run_sweep(sweep, connected, echo=lambda line: None)
    assert {run.state for run in first.runs.values()} == {"reused"}
    assert {run.state for run in second.runs.values()} == {"done"}
    assert second.runs["make"].folder == running[0]
    assert (running[0] / "pool.txt").read_text().split() == [str(i) for i in range(20)]


def test_a_kernel_that_holds_pythons_lock_dies_with_its_parent(folder: Path) -> None:
    """ipykernel's own poller cannot end such a kernel; while it lives, the run folder stays locked."""
    path = write_notebook(
        folder,
        "stuck",
        "pathlib.Path(run_dir, 'kernel').write_text(str(os.getpid()))",
        "sum(range(10**11))",
        "finish()",
    )
    code = f"from netllm_lib import notebooks; notebooks.run_notebook({str(path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    kernel = int(wait_for(folder / "reports" / "runs" / "stuck", "*/kernel").read_text())
    lock = next((folder / "reports" / "runs" / "stuck").glob(".*.lock"))
    assert str(lock) in [os.path.realpath(f"/proc/{kernel}/fd/{name}") for name in os.listdir(f"/proc/{kernel}/fd")]
    time.sleep(0.3)  # until it computes
    parent.kill()
    parent.wait()
    run, end = lock.with_name(lock.name[1 : -len(".lock")]), time.monotonic() + 5
    while True:
        try:
            with runs.lock(run):
                break
        except runs.Busy:
            assert time.monotonic() < end
            time.sleep(0.001)
    # it lets go of its files as it dies; its entry stays a moment longer
    while not is_gone(kernel) and time.monotonic() < end:
        time.sleep(0.001)
    assert is_gone(kernel)


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
    # `use` has another default seed than `make`: it samples by a protocol, and keeps it
    assert sweep.seed_parameters == ("make.seed",)
    seeds = {one.step.name: one.step.parameters.get("seed") for one in sweep.steps.values()}
    assert seeds["use"] is None
    assert sweep.varied == ["make.size", "use.rate", "make.pause_s"]
    keys = list(sweep.steps)
    for key, one in sweep.steps.items():
        assert all(keys.index(need) < keys.index(key) for need in one.needs.values())
    assert describe({"a.x": 1, "b.x": 2, "a.y": 3}) == "a.x=1 b.x=2 y=3"


def test_a_shared_run_has_one_key(folder: Path) -> None:
    text = 'pipeline = "tiny.toml"\nseeds = [1, 2, 3]\nseed_parameters = ["use.seed"]\n[grid]\nrate = [1, 2]\n'
    sweep = read_sweep(write_sweep(folder, text))
    assert len(sweep.points) == 6
    assert [key.split("-")[0] for key in sweep.steps] == ["make"] + 6 * ["use"]
    assert sweep.points[0].label == "rate=1 seed=1"
    assert sweeps.label(sweep, sweep.points[5]) == "rate=2 seed=3"


def test_a_notebook_is_swept_by_its_name_or_path(folder: Path) -> None:
    sweep = read_sweep(write_sweep(folder, 'notebook = "use.ipynb"\n[grid]\nuse.rate = [1, 2]\n'))
    assert [one.step.parameters for one in sweep.steps.values()] == [{"rate": 1.0}, {"rate": 2.0}]
    assert read_sweep(write_sweep(folder, 'notebook = "05"\n')).points[0].runs.keys() == {find_notebook("05").stem}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pipeline = "tiny.toml"\ngird = {}', "unknown key 'gird', did you mean 'grid'"),
        ("seeds = [1]", "one of `pipeline"),
        ('pipeline = "tiny.toml"\nnotebook = "use.ipynb"', "one of `pipeline"),
        ('pipeline = "tiny.toml"\nseeds = 3', "seeds is a list, got 3"),
        ('pipeline = "tiny.toml"\nseeds = [1, 1]', "a seed is there twice"),
        ('pipeline = "tiny.toml"\nseeds = [1.5]', "seeds are whole numbers"),
        ('pipeline = "tiny.toml"\nseeds = []', "empty"),
        ('pipeline = "tiny.toml"\nseed_parameters = ["use.seed"]', "without seeds"),
        ('pipeline = "tiny.toml"\nseeds = [1]\n[grid]\nmake.seed = [1]', "make.seed is set by `seeds`"),
        (
            'pipeline = "tiny.toml"\nseeds = [1]\nseed_parameters = ["use.sed"]',
            "no parameter 'sed', did you mean 'seed'",
        ),
        ('pipeline = "tiny.toml"\n[grid]\nrate = 1', "rate needs a list of values"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = [1, 1]', "rate has a value twice"),
        ('pipeline = "tiny.toml"\n[grid]\nrtae = [1]', r"point 1 \(rtae=1\): no step .* 'rtae', did you mean 'rate'"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = ["x"]', "parameter rate is float, got 'x'"),
        ('pipeline = "tiny.toml"\n[parameters]\nrate = 1\n[grid]\nrate = [1]', "fixed in .* and varied"),
        ('pipeline = "tiny.toml"\n[grid]\nrate = [1]\n[[point]]\nrate = 2', "varied in .* and set in"),
        ('pipeline = "tiny.toml"\n[[point]]\nrate = 2\n[[point]]\nuse.rate = 2.0', "points 1 and 2 are the same"),
        ('pipeline = "tiny.toml"\nname = "a/b"', "becomes part of a folder's name"),
        ('pipeline = "tiny.toml"\nname =', "Invalid value"),
        ('notebook = "use.ipynb"\n[grid]\nrate = [1]\nsize = [2]', "has no parameter 'size'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_sweep(write_sweep(folder, text + "\n", "wrong"))
    assert "wrong.toml" in str(refusal.value)


def test_files_that_are_not_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pipeline demmo\.toml, did you mean 'demo\.toml'"):
        read_sweep(write_sweep(folder, 'pipeline = "demmo.toml"\n'))
    with pytest.raises(FileNotFoundError, match="no notebook 77"):
        read_sweep(write_sweep(folder, 'notebook = "77"\n'))


@pytest.mark.parametrize(
    "example", sorted((runs.PROJECT / "notebooks" / "sweeps").glob("*.toml")), ids=lambda p: p.stem
)
def test_examples(example: Path) -> None:
    if "[[step]]" in example.read_text():
        pytest.skip("a pipeline that another example sweeps")
    sweep = read_sweep(example)
    steps = [one.step.name for one in sweep.steps.values()]
    if sweep.name == "rank":
        assert [steps.count(f"0{n}_{name}") for n, name in ((3, "experience_pool"), (4, "finetune"), (5, "test"))] == [
            1,
            12,
            12,
        ]
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
    assert len(clusters.local_workers(None, 9, [], 16, 64 * gib)) == 8
    assert len(clusters.local_workers(None, 9, [], 16, 7 * gib)) == 2
    assert len(clusters.local_workers(None, 3, [], 16, 64 * gib)) == 3
    assert len(clusters.local_workers(None, 0, [], 1, 0.0)) == 1
    three = clusters.local_workers(3, 1, ["0", "1"], 4, gib)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in three] == ["0", "1", "0"]
    assert three[0]["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in clusters.local_workers(1, 1, [], 4, gib)[0]


def test_slurm_options() -> None:
    slurm = clusters.read_slurm(
        {"partition": "gpu", "cores": 8, "directives": ["--constraint=a100"]}, "cores=2, jobs=3"
    )
    assert (slurm.partition, slurm.cores, slurm.jobs, slurm.directives) == ("gpu", 2, 3, ("--constraint=a100",))
    with pytest.raises(ValueError, match="no parameter 'partion', did you mean 'partition'"):
        clusters.read_slurm({"partion": "gpu"})
    with pytest.raises(ValueError, match="cores is int, got 'many'"):
        clusters.read_slurm({}, "cores=many")
    with pytest.raises(ValueError, match="cores is at least 1"):
        clusters.read_slurm({"cores": 0})
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        clusters.read_slurm({}, "gpu")


def test_slurm_job_script(folder: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    slurm = clusters.Slurm(
        cores=6, memory="24GB", walltime="02:00:00", jobs=0, partition="gpu", gpus=1, directives=("--constraint=a100",)
    )
    with clusters.slurm_cluster(slurm) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p gpu", "--cpus-per-task=6", "#SBATCH -t 02:00:00", "--gres=gpu:1", "--constraint=a100"):
        assert line in script
    assert "export OMP_NUM_THREADS=6" in script
    assert f"export NETLLM_REPORTS='{folder / 'reports'}'" in script
    assert "--nthreads 1" in script
    assert sys.executable in script


def test_without_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[slurm\]'"):
        clusters.slurm_cluster(clusters.Slurm())
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ValueError, match="needs the package bokeh"):
        clusters.local_cluster([{}], dashboard=True)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[sweep\]'"):
        clusters.import_distributed()


@pytest.fixture(scope="module")
def scheduler(folder: Path) -> Iterator[str]:
    """A cluster of its own, started as a user would start it but for `--nthreads 1`."""
    with clusters.local_cluster(clusters.local_workers(1, 9, [], 1, 1e9)) as cluster:
        yield cluster.scheduler_address


def test_existing_cluster(folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with clusters.connect(address=scheduler) as client:
        assert len(client.nthreads()) == 1
    monkeypatch.setattr(runs, "git_revision", lambda: "another")
    with (
        pytest.raises(
            ValueError, match=r"worker tcp://\S+ differs, git revision: .* there, another here: workers need"
        ),
        clusters.connect(address=scheduler),
    ):
        pass
    monkeypatch.undo()
    monkeypatch.setenv("NETLLM_REPORTS", str(folder / "elsewhere"))
    with pytest.raises(ValueError, match="reports folder"), clusters.connect(address=scheduler):
        pass
    assert not list((folder / "elsewhere").iterdir())


def test_workers_with_several_threads_are_refused() -> None:
    class Client:
        def nthreads(self) -> dict[str, int]:
            return {"tcp://10.0.0.2:4000": 8}

    with pytest.raises(ValueError, match="worker tcp://10.0.0.2:4000 has 8 threads: start it with --nthreads 1"):
        clusters.check_workers(Client())  # type: ignore[arg-type]


def test_no_cluster_there() -> None:
    with (
        pytest.raises(ConnectionError, match="--scheduler tcp://127.0.0.1:9: no answer"),
        clusters.connect(address="tcp://127.0.0.1:9", timeout_s=0.5),
    ):
        pass


# --- the command ----------------------------------------------------------------------------------------------------------


def command(*words: str) -> None:
    app = typer.Typer()
    app.command()(sweep_command.sweep)
    app(args=list(words), standalone_mode=False)


def test_dry_run_and_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_sweep(folder, SWEEP + "[parameters]\nsize = 2\n", "dry"))
    command(path, "--dry-run", "--json")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "dry: 2 points, 3 distinct runs (3 to do, 0 finished; 0 points complete)"
    assert "1  rate=1.0: 2 of 2 runs to do" in shown[-3]
    assert json.loads(shown[-1]) == {"name": "dry", "points": 2, "runs": 3, "finished": 0}
    assert not list((folder / "reports" / "runs" / "sweep").glob("dry-*"))
    with pytest.raises(ValueError, match="--workers and --scheduler ask for different clusters"):
        command(path, "--workers", "1", "--scheduler", "tcp://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"dry.toml, \[cluster\] has no parameter 'core'"):
        command(path, "--slurm", "core=3")


@pytest.mark.slow
def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: a point fails, the others are compared, the exit names it; the second time everything is reused."""
    path = write_sweep(folder, SWEEP.replace("2.0]", "2.0, 9.0]"), "whole")
    for attempt in range(2):
        with pytest.raises(
            NotebookError, match=r"1 of 3 points failed: 3 \(rate=9.0\): use: cell 3 .* rate is too high"
        ):
            command(str(path), "--workers", "2", "--json")
        *shown, last = capsys.readouterr().out.splitlines()
        answer = json.loads(last)
        assert [point["state"] for point in answer["points"]] == ["done", "done", "failed"]
        assert ("make (rate=1.0): reused" in "".join(shown)) == bool(attempt)
        compared = runs.read_json(Path(answer["comparison"]) / "metrics.json")
        assert compared["what"] == "use.score"
        assert compared["best"] == "rate=2"
        assert (compared["points"], compared["failed"]) == (2, 1)
        assert any(line.startswith("report: ") for line in shown)
    assert len(list((folder / "reports" / "runs" / "08_compare").iterdir())) == 1
    points = pd.read_parquet(Path(answer["folder"]) / "points.parquet")
    assert "rate is too high" in points["problem"][2]


@pytest.mark.slow
def test_a_run_that_kills_its_workers_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "FAILURES", 0)
    write_notebook(folder, "deadly", "os.kill(os.getppid(), 9)\nimport time; time.sleep(60)")
    sweep = read_sweep(write_sweep(folder, 'notebook = "deadly.ipynb"\n'))
    with clusters.connect(workers(1)) as client:
        (result,) = sweeps.run_sweep(sweep, client, echo=lambda line: None)
    assert result.state == "failed"
    assert "every worker that ran it died" in result.problem


# --- tables -------------------------------------------------------------------------------------------------------------


def test_busy_folders_are_waited_for(folder: Path) -> None:
    """Somebody else holds the run folder when the step begins; it waits. When that takes too long, it fails and says who."""
    path = write_notebook(folder, "plain", "finish(pid=os.getpid())")
    run = run_notebook(path)
    (run.folder / runs.MANIFEST).unlink()  # or it would be reused without a lock
    step = sweeps.Step("plain", path, {})
    results: list[sweeps.RunResult] = []
    waiting = threading.Thread(target=lambda: results.append(sweeps.run_step(step, {}, "run", 60)))
    with runs.lock(run.folder):
        waiting.start()
        time.sleep(1)
        assert not results
    waiting.join()
    assert (results[0].state, results[0].folder) == ("done", run.folder)
    (run.folder / runs.MANIFEST).unlink()
    with runs.lock(run.folder):
        late = sweeps.run_step(step, {}, "run", 0.05)
    assert late.state == "failed"
    assert f"process {os.getpid()} is writing it" in late.problem


def test_sweep_folder_and_tables(folder: Path, tmp_path: Path) -> None:
    sweep: Sweep = read_sweep(write_sweep(folder, SWEEP, "kept"))
    run = sweeps.open_folder(sweep)
    assert run.folder.parent == folder / "reports" / "runs" / "sweep"
    assert run.folder.name.startswith("kept-")
    assert (run.folder / "sweep.toml").read_text() == SWEEP
    assert sweeps.open_folder(read_sweep(folder / "kept.toml")) == run
    assert json.loads((run.folder / "config.json").read_text())["points"][1]["parameters"] == {"use.rate": 2.0}
    table = pd.DataFrame({"point": [1, 2], "x": [1.0, None]})
    sweeps.write_table(tmp_path, "a.parquet", table)
    before = (tmp_path / "a.parquet").stat().st_mtime_ns
    sweeps.write_table(tmp_path, "a.parquet", table.copy())
    assert (tmp_path / "a.parquet").stat().st_mtime_ns == before
    sweeps.write_table(tmp_path, "a.parquet", table + 1)
    assert list(pd.read_parquet(tmp_path / "a.parquet")["point"]) == [2, 3]


def test_values_of_a_column_have_one_type() -> None:
    mixed = sweeps._one_type(pd.Series([[1, 2], [3]], dtype=object))
    assert list(mixed) == ["[1, 2]", "[3]"]
    assert list(sweeps._one_type(pd.Series([1, 2.5], dtype=object))) == [1, 2.5]
    assert list(sweeps._one_type(pd.Series([1, "a", None], dtype=object))) == ["1", '"a"', None]
    assert sweeps.flatten({"a": {"b": 1, "c": [2]}, "d": "x", "e": None}) == {"a.b": 1, "d": "x"}
