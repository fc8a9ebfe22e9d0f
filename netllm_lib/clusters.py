"""Where the runs of a sweep go: worker processes of this machine, or jobs of a batch system that `dask_jobqueue` knows.

Scheduler and workers speak TLS with keys that are made for this sweep, on one named interface: nobody else can give them work.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from netllm_lib import config, runs

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

CORES_EACH, MEMORY_EACH = 2, 3 * 2**30
"""What a worker of this machine should have at least, if it has no GPU of its own."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PASSED_ON = ("NETLLM_REPORTS", "NETLLM_DATA", "NETLLM_CACHE")

# A worker gets a run when it is free, not before: those that wait come in the order of the points, and share no worker's fate.
SETTINGS = {"distributed.scheduler.worker-saturation": 1.0}


def visible_gpus() -> list[str]:
    """What $CUDA_VISIBLE_DEVICES may be set to, one entry a GPU; empty without one. Asks the driver's tool, not PyTorch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    command = "nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null"
    listed = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30).stdout.split()
    return [word for word in listed if word.isdigit()]  # without a GPU it says so in words


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
def connect(jobs: Mapping[str, Any] | None, workers: int | None, steps: int) -> Iterator[Client]:
    """A client of new workers: jobs as the table `[cluster]` of a sweep file asks for them, see `docs/sweeps.md`; without one, or
    with a number of `workers`, processes of this machine, with room for so many steps.

    ValueError for a package that is missing, and for jobs that cannot be asked for so.
    """
    jobs = None if workers else jobs
    for package in ("distributed", *(["dask_jobqueue"] if jobs else [])):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"no {package}; sweeps need: pip install -e '.[sweep]', and those of jobs '.[slurm]'")
    import dask
    from distributed import Client

    with dask.config.set(SETTINGS), contextlib.ExitStack() as stack:
        cluster = stack.enter_context(_submitted(jobs) if jobs else _local(workers, steps))
        try:
            yield stack.enter_context(Client(cluster))
        except KeyboardInterrupt:
            if not jobs:  # these workers end with this process: nobody need wait until each of them has been asked to
                stack.pop_all()
            raise


def _local(wanted: int | None, steps: int) -> SpecCluster:
    """Worker processes of one thread on this machine, see `local_workers`; they end when this process ends, however that ends."""
    from distributed import Nanny, Scheduler, Security, SpecCluster

    # when this process is ended, one of Python's removes what the workers shared, and warns of it in vain
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    security, quiet = Security.temporary(), {"silence_logs": logging.CRITICAL}
    common = {"host": "127.0.0.1", "protocol": "tls://", "security": security, "dashboard_address": "127.0.0.1:0"}
    own = {**common, **quiet, "nthreads": 1, "memory_limit": 0}
    environments = enumerate(local_workers(wanted, steps))
    workers = {number: {"cls": Nanny, "options": {**own, "env": variables}} for number, variables in environments}
    return SpecCluster(workers, {"cls": Scheduler, "options": {**common, "port": 0}}, security=security, **quiet)


def _submitted(asked: Mapping[str, Any]) -> SpecCluster:
    """One worker a job, all asked for at once; their keys lie in the reports folder, in files that only their owner reads."""
    import dask_jobqueue

    kind, interface, cores = asked.get("kind", "SLURMCluster"), asked.get("interface"), asked.get("cores", 4)
    if not interface:
        raise ValueError(
            '[cluster] needs interface = "ib0" or the like: jobs and this machine reach each other by that one alone'
        )
    known = [name for name in dir(dask_jobqueue) if name.endswith("Cluster")]
    if kind not in known:
        raise ValueError(f"[cluster] has no kind {kind}{config.did_you_mean(kind, known)}; known: {', '.join(known)}")
    exported = dict.fromkeys(THREADS, str(cores)) | {k: os.environ[k] for k in PASSED_ON if k in os.environ}
    folder = runs.reports_root() / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {
        "n_workers": 4,
        "cores": cores,
        "memory": "16GB",
        "walltime": "08:00:00",
        "processes": 1,
        "worker_extra_args": ["--nthreads", "1"],  # notebooks need a process each; the cores are for what they compute
        "job_script_prologue": [f"export {name}={shlex.quote(value)}" for name, value in exported.items()],
        "python": sys.executable,
        "log_directory": str(folder),
        "shared_temp_directory": str(folder),
        "security": True,
        "scheduler_options": {"interface": interface, "dashboard_address": "127.0.0.1:0"},
    }
    try:
        return getattr(dask_jobqueue, kind)(**own | {name: value for name, value in asked.items() if name != "kind"})
    except (TypeError, ValueError, RuntimeError) as error:  # an unknown option, an interface that is not there
        raise ValueError(f"[cluster]: {error}") from None
