"""Where the runs of a sweep go: worker processes of this machine, an existing dask cluster, or jobs of SLURM."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import netllm_lib
from netllm_lib import notebooks, runs

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

LOOPBACK = "127.0.0.1"
CORES_EACH, MEMORY_EACH = 2, 3 * 2**30
"""What a worker of this machine should have at least, if it has no GPU of its own."""

FAILURES = 3
"""How many workers may die under a step before it counts as failed (dask's `allowed-failures`)."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Slurm:
    """What each job of SLURM asks for; one worker a job."""

    cores: int = 4
    memory: str = "16GB"
    walltime: str = "08:00:00"
    jobs: int = 4
    partition: str | None = None
    account: str | None = None
    gpus: int = 0
    interface: str | None = None
    """Network interface that jobs and the submitting machine reach each other by; the default one if None."""
    directives: tuple[str, ...] = ()
    """Further options of sbatch, such as `--constraint=a100`."""


def read_slurm(table: Mapping[str, Any], text: str | None = None, where: str = "[cluster]") -> Slurm:
    """The `[cluster]` table of a sweep file, with `partition=gpu,cores=4,…` of the command line over it.

    ValueError for an unknown key, or a value that is not of its type.
    """
    declared = {
        name: notebooks.Parameter(name, str(field.type).replace("tuple[str, ...]", "list[str]"), field.default, "")
        for name, field in Slurm.__dataclass_fields__.items()
    }
    given = dict(table)
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--slurm {item}: write KEY=VALUE; known: {', '.join(declared)}")
        given[key.strip()] = value.strip()
    fitted = notebooks.fit_parameters(declared, given, where)
    for key in ("cores", "jobs"):
        if fitted.get(key, 1) < 1:
            raise ValueError(f"{where}: {key} is at least 1, got {fitted[key]}")
    fitted["directives"] = tuple(fitted.get("directives", ()))
    return Slurm(**fitted)


def visible_gpus() -> list[str]:
    """What $CUDA_VISIBLE_DEVICES may be set to, one entry a GPU; empty without one. Asks the driver's tool, not PyTorch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip().isdigit()]


def machine() -> tuple[int, float]:
    """Cores and bytes of free memory that this process may use; limits of a container count."""
    import psutil
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    return CPU_COUNT, min(psutil.virtual_memory().available, MEMORY_LIMIT)


def local_workers(
    wanted: int | None, steps: int, gpus: Sequence[str], cores: int, memory_bytes: float
) -> list[dict[str, str]]:
    """Environment variables of each worker of this machine.

    `wanted` of them; else one a GPU; else as many as there are pairs of cores and 3 GiB of memory, never more than there are
    `steps` to run. The cores are shared out among them.
    """
    room = len(gpus) or max(1, min(cores // CORES_EACH, int(memory_bytes // MEMORY_EACH)))
    count = wanted or max(1, min(room, steps))
    threads = str(max(1, cores // count))
    found = []
    for number in range(count):
        own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        found.append({**dict.fromkeys(THREADS, threads), **own})
    return found


# --- clusters -----------------------------------------------------------------------------------------------------------


def import_distributed() -> Any:
    """The package `distributed`, or a ValueError that says how to get it."""
    try:
        import distributed
    except ImportError as error:
        raise ValueError(
            f"sweeps run on dask.distributed, which is not there ({error}): pip install -e '.[sweep]'"
        ) from None
    return distributed


def local_cluster(environments: Sequence[Mapping[str, str]], dashboard: bool = False) -> SpecCluster:
    """A scheduler in this process and a worker process of one thread for each environment, all on the loopback interface.

    The workers end when this process ends, however it ends.
    """
    import dask

    distributed = import_distributed()
    if dashboard:
        _need_bokeh()
    dask.config.set({"distributed.scheduler.allowed-failures": FAILURES})
    scheduler = {"host": LOOPBACK, "port": 0, "dashboard": dashboard}
    scheduler["dashboard_address"] = f"{LOOPBACK}:{8787 if dashboard else 0}"
    common = {"host": LOOPBACK, "nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.CRITICAL}
    workers = {
        number: {"cls": distributed.Nanny, "options": {**common, "env": dict(environment)}}
        for number, environment in enumerate(environments)
    }
    return distributed.SpecCluster(
        scheduler={"cls": distributed.Scheduler, "options": scheduler},
        workers=workers,
        silence_logs=logging.CRITICAL,
    )


def slurm_cluster(slurm: Slurm, dashboard: bool = False) -> Any:
    """A scheduler in this process whose workers are jobs of SLURM, asked for at once. ValueError without dask-jobqueue."""
    import dask

    import_distributed()
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ValueError(
            f"SLURM is reached through dask-jobqueue, which is not there ({error}): pip install -e '.[slurm]'"
        ) from None
    if dashboard:
        _need_bokeh()
    dask.config.set({"distributed.scheduler.allowed-failures": FAILURES})
    logs = runs.reports_root() / "slurm"
    gpus = [f"--gres=gpu:{slurm.gpus}"] if slurm.gpus else []
    cluster = SLURMCluster(
        queue=slurm.partition,
        account=slurm.account,
        cores=1,  # threads of the worker: notebooks need a process each; the cores are for what they compute
        job_cpu=slurm.cores,
        processes=1,
        memory=slurm.memory,
        walltime=slurm.walltime,
        interface=slurm.interface,
        job_extra_directives=[*gpus, *slurm.directives],
        job_script_prologue=[
            *(f"export {name}={slurm.cores}" for name in THREADS),
            *(
                f"export {name}='{os.environ[name]}'"
                for name in ("NETLLM_REPORTS", "NETLLM_DATA", "NETLLM_CACHE")
                if name in os.environ
            ),
        ],
        python=sys.executable,
        log_directory=str(logs),
        n_workers=0,
        scheduler_options={"dashboard": dashboard, "dashboard_address": ":8787" if dashboard else ":0"},
    )
    cluster.scale(jobs=slurm.jobs)
    return cluster


def _need_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise ValueError("--dashboard needs the package bokeh: pip install bokeh") from None


@contextmanager
def connect(
    start: Callable[[], Any] | None = None, address: str | None = None, timeout_s: float = 30.0
) -> Iterator[Client]:
    """A client of the cluster that `start` makes, closed at the end, or of the scheduler at `address`, which is left alone.

    Raises ConnectionError where nobody answers at `address`, ValueError where its workers do not fit (see `check_workers`).
    """
    distributed = import_distributed()
    if address is None:
        assert start is not None
        with start() as cluster, distributed.Client(cluster) as client:
            yield client
        return
    try:
        client = distributed.Client(address, timeout=timeout_s)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConnectionError(
            f"--scheduler {address}: no answer ({error}); is `dask scheduler` running there?"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=timeout_s)
        except TimeoutError:
            raise ConnectionError(
                f"--scheduler {address} has no workers; start some with `dask worker {address} --nthreads 1`"
            ) from None
        check_workers(client)
        yield client


# --- do the workers run the same code -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkout:
    """What has to be the same on the client and on all workers for their runs to be one sweep."""

    project: str
    reports: str
    python: str
    git: str | None
    library: str
    versions: tuple[tuple[str, str], ...]

    def difference(self, other: Checkout) -> str | None:
        """The first thing in which a worker's checkout `other` differs, in words."""
        names = {"project": "checkout", "reports": "reports folder ($NETLLM_REPORTS)", "git": "git revision"}
        names |= {"library": "hash of netllm_lib", "versions": "packages"}
        for key, mine in asdict(self).items():
            theirs = getattr(other, key)
            if mine == theirs:
                continue
            if key == "versions":
                mine, theirs = (", ".join(f"{k} {v}" for k, v in sorted(set(a) - set(b))) or "none of these"
                                for a, b in ((mine, theirs), (theirs, mine)))  # fmt: skip
            return f"{names.get(key, key)}: {theirs} there, {mine} here"
        return None


def checkout() -> Checkout:
    """That of this process."""
    known = runs.environment()
    return Checkout(
        str(runs.PROJECT),
        str(runs.reports_root().resolve()),
        known["python"],
        known["git"],
        runs.tree_hash(Path(netllm_lib.__file__).parent, "**/*.py"),
        tuple(known["versions"].items()),
    )


def _look(probe: str) -> tuple[Checkout, bool]:
    return checkout(), Path(probe).is_file()


def check_workers(client: Client) -> None:
    """ValueError, with the worker's address, unless all workers have one thread, this checkout's code, packages and reports folder.

    Notebooks run side by side only in processes of their own, so a worker has one thread.
    """
    for address, threads in client.nthreads().items():
        if threads != 1:
            raise ValueError(f"worker {address} has {threads} threads: start it with --nthreads 1")
    mine = checkout()
    probe = runs.reports_root().resolve() / f".probe-{uuid.uuid4().hex[:8]}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    try:
        answers = client.run(_look, str(probe), on_error="return")
    finally:
        probe.unlink()
    for address, answer in answers.items():
        advice = "workers need this checkout and reports folder, and its environment"
        if isinstance(answer, BaseException):
            raise ValueError(f"worker {address} cannot run netllm_lib ({type(answer).__name__}: {answer}): {advice}")
        theirs, shared = answer
        if difference := mine.difference(theirs):
            raise ValueError(f"worker {address} differs, {difference}: {advice}")
        if not shared:
            raise ValueError(f"worker {address} does not see files of {mine.reports}: it has to be on a shared disk")
