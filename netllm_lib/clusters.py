"""Where the runs of a sweep go: worker processes of this machine, an existing dask cluster, or jobs of SLURM."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import netllm_lib
from netllm_lib import runs

if TYPE_CHECKING:
    from distributed import Client

CORES_EACH, MEMORY_EACH = 2, 3 * 2**30
"""What a worker of this machine should have at least, if it has no GPU of its own."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PASSED_ON = ("NETLLM_REPORTS", "NETLLM_DATA", "NETLLM_CACHE")

# A worker gets a run when it is free, not before: those that wait come in the order of the points, and share no worker's fate.
SETTINGS = {"distributed.scheduler.worker-saturation": 1.0}


@dataclass(frozen=True)
class Slurm:
    """What each job of SLURM asks for; one worker a job."""

    cores: Annotated[int, Field(ge=1)] = 4
    memory: str = "16GB"
    walltime: str = "08:00:00"
    jobs: Annotated[int, Field(ge=1)] = 4
    partition: str | None = None
    account: str | None = None
    gpus: int = 0
    interface: str | None = None
    """Network interface that jobs and the submitting machine reach each other by; the default one if None."""
    directives: tuple[str, ...] = ()
    """Further options of sbatch, such as `--constraint=a100`."""


def visible_gpus() -> list[str]:
    """What $CUDA_VISIBLE_DEVICES may be set to, one entry a GPU; empty without one. Asks the driver's tool, not PyTorch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return [word for word in listed if word.isdigit()]  # without a GPU it says so in words


def local_workers(
    wanted: int | None, steps: int, gpus: Sequence[str], cores: int, memory_bytes: float
) -> list[dict[str, str]]:
    """Environment variables of each worker of this machine.

    `wanted` of them; else one a GPU; else as many as there are pairs of cores and 3 GiB of memory, never more than there are
    `steps` to run. The cores are shared out among them.
    """
    room = len(gpus) or max(1, min(cores // CORES_EACH, int(memory_bytes // MEMORY_EACH)))
    count = wanted or max(1, min(room, steps))
    threads = dict.fromkeys(THREADS, str(max(1, cores // count)))
    own = [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {} for number in range(count)]
    return [{**threads, **one} for one in own]


def connect(
    slurm: Slurm | None, workers: int | None, scheduler: str | None, steps: int
) -> AbstractContextManager[Client]:
    """A client of the cluster that is asked for: an existing one, jobs of SLURM, or this machine. It starts when it is entered."""
    try:
        import distributed  # noqa: F401

        if slurm is not None:
            import dask_jobqueue  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; sweeps need: pip install -e '.[sweep]', and jobs of SLURM '.[slurm]'") from None
    if scheduler is not None:
        if workers is not None:
            raise ValueError("--workers is for this machine, --scheduler for an existing cluster; give one of them")
        return _existing(scheduler)
    return _local(workers, steps) if slurm is None or workers is not None else _slurm(slurm)


@contextmanager
def _local(wanted: int | None, steps: int) -> Iterator[Client]:
    """Worker processes of one thread on this machine, see `local_workers`; they end when this process ends, however that ends.

    Everything listens on the loopback interface and speaks TLS with keys that are made for this sweep, so other users of the
    machine can give it no work.
    """
    import dask
    import psutil
    from dask.system import CPU_COUNT
    from distributed import Client, Nanny, Scheduler, Security, SpecCluster
    from distributed.system import MEMORY_LIMIT

    free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    environments = local_workers(wanted, steps, visible_gpus(), CPU_COUNT, free)
    security = Security.temporary()
    common = {"host": "127.0.0.1", "protocol": "tls://", "security": security, "dashboard_address": "127.0.0.1:0"}
    own = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    workers = {
        number: {"cls": Nanny, "options": {**common, **own, "env": environment}}
        for number, environment in enumerate(environments)
    }
    with dask.config.set(SETTINGS):
        scheduler = {"cls": Scheduler, "options": {**common, "port": 0}}
        cluster = SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL)
    with cluster, Client(cluster) as client:
        yield client


@contextmanager
def _slurm(asked: Slurm) -> Iterator[Client]:
    """Workers that are jobs of SLURM, asked for at once; they speak TLS with keys that lie in the reports folder."""
    import dask
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    gpus = [f"--gres=gpu:{asked.gpus}"] if asked.gpus else []
    exported = dict.fromkeys(THREADS, str(asked.cores)) | {k: os.environ[k] for k in PASSED_ON if k in os.environ}
    folder = runs.reports_root() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    with dask.config.set(SETTINGS):
        cluster = SLURMCluster(
            queue=asked.partition,
            account=asked.account,
            cores=1,  # threads of the worker: notebooks need a process each; the cores are for what they compute
            job_cpu=asked.cores,
            processes=1,
            memory=asked.memory,
            walltime=asked.walltime,
            interface=asked.interface,
            job_extra_directives=[*gpus, *asked.directives],
            job_script_prologue=[f"export {name}='{value}'" for name, value in exported.items()],
            python=sys.executable,
            log_directory=str(folder),
            shared_temp_directory=str(folder),
            security=True,
            scheduler_options={"dashboard_address": ":0"},
        )
    with cluster, Client(cluster) as client:
        cluster.scale(jobs=asked.jobs)
        yield client


@contextmanager
def _existing(address: str, timeout_s: float = 30.0) -> Iterator[Client]:
    """The cluster of the scheduler at `address`, which is left alone at the end.

    Raises ConnectionError where nobody answers, ValueError where its workers do not fit (see `check_workers`).
    """
    from distributed import Client

    try:
        client = Client(address, timeout=timeout_s)
        client.wait_for_workers(1, timeout=timeout_s)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConnectionError(
            f"--scheduler {address}: no scheduler with a worker answers ({error}); start them with `dask scheduler` "
            f"and `dask worker {address} --nthreads 1`"
        ) from None
    with client:
        check_workers(client)
        yield client


def checkout(probe: Path) -> dict[str, Any]:
    """What has to be the same on the client and on all workers for their runs to be one sweep."""
    known, reports = runs.environment(), str(runs.reports_root().resolve())
    library = runs.tree_hash(Path(netllm_lib.__file__).parent, "**/*.py")
    places = {"checkout": str(runs.PROJECT), "reports folder": reports, "files in it": probe.is_file()}
    return {**places, "netllm_lib": library, "Python": known["python"], **known["versions"]}


def check_workers(client: Client) -> None:
    """ValueError, with the worker's address, unless all workers have one thread, and this checkout, its packages and its reports.

    Notebooks run side by side only in processes of their own, so a worker has one thread.
    """
    for address, threads in client.nthreads().items():
        if threads != 1:
            raise ValueError(f"worker {address} has {threads} threads: start it with --nthreads 1")
    runs.reports_root().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=runs.reports_root(), prefix=".probe-") as probe:
        mine = checkout(Path(probe.name))
        for address, theirs in client.run(checkout, Path(probe.name)).items():
            for name in mine:
                if theirs.get(name) != mine[name]:
                    raise ValueError(
                        f"worker {address} differs, {name}: {theirs.get(name)} there, {mine[name]} here: workers need this "
                        "checkout, its environment, and the reports folder on a shared disk"
                    )
