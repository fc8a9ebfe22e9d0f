"""Where the runs of a sweep go: worker processes of this machine, an existing dask cluster, or jobs of SLURM."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import psutil
from pydantic import Field

from netllm_lib import runs

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

CORES_EACH, MEMORY_EACH = 2, 3 * 2**30
"""What a worker of this machine should have at least, if it has no GPU of its own."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PASSED_ON = ("NETLLM_REPORTS", "NETLLM_DATA", "NETLLM_CACHE")

# A worker gets a run when it is free, not before: those that wait come in the order of the points, and share no worker's fate.
ANSWER_S = 30.0
SETTINGS = {"distributed.scheduler.worker-saturation": 1.0}


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What each job of SLURM asks for, by the names that `dask_jobqueue.SLURMCluster` has for it; one worker a job."""

    n_workers: Annotated[int, Field(ge=1)] = 4
    job_cpu: Annotated[int, Field(ge=1)] = 4
    memory: str = "16GB"
    walltime: str = "08:00:00"
    queue: str | None = None
    account: str | None = None
    interface: str | None = None
    """Network interface that jobs and the submitting machine reach each other by; the default one if None."""
    job_extra_directives: tuple[str, ...] = ()
    """Further options of sbatch, such as `--gres=gpu:1`."""


def visible_gpus() -> list[str]:
    """What $CUDA_VISIBLE_DEVICES may be set to, one entry a GPU; empty without one. Asks the driver's tool, not PyTorch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        command = "nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null"
        listed = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30).stdout.split()
        return [word for word in listed if word.isdigit()]  # without a GPU it says so in words
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def local_workers(wanted: int | None, steps: int) -> list[dict[str, str]]:
    """Environment variables of each worker of this machine.

    `wanted` of them; else one a GPU; else as many as there are pairs of cores and 3 GiB of memory, never more than there are
    `steps` to run. The cores are shared out among them.
    """
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    memory_bytes, gpus = min(psutil.virtual_memory().available, MEMORY_LIMIT), visible_gpus()
    room = len(gpus) or min(CPU_COUNT // CORES_EACH, memory_bytes // MEMORY_EACH)
    count = wanted or max(1, min(room, steps))
    threads = dict.fromkeys(THREADS, str(max(1, CPU_COUNT // count)))
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}) for n in range(count)]


@contextmanager
def connect(slurm: Slurm | None, workers: int | None, scheduler: str | None, steps: int) -> Iterator[Client]:
    """A client of the cluster that is asked for: an existing one, jobs of SLURM, or this machine, with room for so many steps.

    ValueError for a package that is missing and for workers that do not fit, OSError where no scheduler with a worker answers.
    """
    for package in ("distributed", *(["dask_jobqueue"] if slurm else [])):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"no {package}; sweeps need: pip install -e '.[sweep]', and jobs of SLURM '.[slurm]'")
    if scheduler is not None and workers is not None:
        raise ValueError("--workers is for this machine, --scheduler for an existing cluster; give one of them")
    import dask
    from distributed import Client

    with dask.config.set(SETTINGS), contextlib.ExitStack() as stack:
        if scheduler is not None:
            client = stack.enter_context(Client(scheduler, timeout=ANSWER_S))
            client.wait_for_workers(1, timeout=ANSWER_S)
            check_workers(client)
        else:
            cluster = _slurm(slurm) if slurm is not None and workers is None else _local(workers, steps)
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        yield client


def _local(wanted: int | None, steps: int) -> SpecCluster:
    """Worker processes of one thread on this machine, see `local_workers`; they end when this process ends, however that ends.

    Everything listens on the loopback interface and speaks TLS with keys that are made for this sweep, so other users of the
    machine can give it no work.
    """
    from distributed import Nanny, Scheduler, Security, SpecCluster

    security, quiet = Security.temporary(), {"silence_logs": logging.CRITICAL}
    common = {"host": "127.0.0.1", "protocol": "tls://", "security": security, "dashboard_address": "127.0.0.1:0"}
    own = {**common, **quiet, "nthreads": 1, "memory_limit": 0}
    environments = enumerate(local_workers(wanted, steps))
    workers = {number: {"cls": Nanny, "options": {**own, "env": variables}} for number, variables in environments}
    return SpecCluster(workers, {"cls": Scheduler, "options": {**common, "port": 0}}, security=security, **quiet)


def _slurm(asked: Slurm) -> SpecCluster:
    """Workers that are jobs of SLURM, asked for at once; they speak TLS with keys that lie in the reports folder."""
    from dask_jobqueue import SLURMCluster

    exported = dict.fromkeys(THREADS, str(asked.job_cpu)) | {k: os.environ[k] for k in PASSED_ON if k in os.environ}
    folder = runs.reports_root() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    return SLURMCluster(
        **dataclasses.asdict(asked),
        cores=1,  # threads of the worker: notebooks need a process each; `job_cpu` is for what they compute
        processes=1,
        job_script_prologue=[f"export {name}={shlex.quote(value)}" for name, value in exported.items()],
        python=sys.executable,
        log_directory=str(folder),
        shared_temp_directory=str(folder),
        security=True,
        scheduler_options={"dashboard_address": ":0"},
    )


def check_workers(client: Client) -> None:
    """ValueError, with the worker's address, for one that has another checkout, environment or reports folder, or many threads."""
    mine = {**checkout(), "threads": 1}
    for worker, found in client.run(checkout).items():
        theirs = {**found, "threads": client.nthreads()[worker]}
        if different := [
            f"{name} {theirs[name]} there, {mine[name]} here" for name in mine if theirs[name] != mine[name]
        ]:
            need = "workers need this checkout and reports folder, and its environment, and --nthreads 1"
            raise ValueError(f"worker {worker} differs, {different[0]}: {need}")


def checkout() -> dict[str, Any]:
    """What has to be the same on the client and on all workers for their runs to be one sweep."""
    places = {"checkout": runs.PROJECT, "reports folder": runs.reports_root().resolve(), "Python": sys.prefix}
    return {**places, "code": runs.tree_hash(runs.PROJECT / "netllm_lib", "**/*.py"), **runs.environment()["versions"]}
