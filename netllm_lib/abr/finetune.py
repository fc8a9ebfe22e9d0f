"""Fine-tuning as a program of its own, in one process or in several that share every batch:

    python -m netllm_lib.abr.finetune job.json
    accelerate launch --num_processes 2 -m netllm_lib.abr.finetune job.json

The job is a JSON file: `pool` (its folder, or the original's exp_pool.pkl), `folder` (for everything that training leaves
behind), and,
each with defaults, `plm`, `network` and `train`: the fields of `PLMConfig`, `NetworkConfig` and `TrainConfig`; with
`"track": "mlflow"` its curves go to MLflow beside TensorBoard. A batch of
`train.batch` windows is that of all processes together, so the number of processes changes the time and, beside dropout's draws
and rounding, nothing else. Run it again to go on after a kill, also with another number of processes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from netllm_lib import runs, tracking
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.peers import Peers, Processes
from netllm_lib.abr.pool import ExperiencePool, load_pool
from netllm_lib.abr.upstream.pickles import read_pool
from netllm_lib.checkpoint import from_json
from netllm_lib.placement import devices_of
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import Progress, TrainConfig, TrainResult, train


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on what. Paths are relative to the working directory."""

    pool: str
    folder: str
    plm: PLMConfig = dataclasses.field(default_factory=PLMConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    track: str = ""  # "mlflow": curves go there too


def read_job(path: Path) -> Job:
    """Raises FileNotFoundError, or ValueError naming the field that is unknown, missing or of the wrong kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such job file")
    try:
        job: Job = from_json(Job, runs.read_json(path), "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a job ({error})") from None
    return job


def finetune(job: Job, progress: Progress | None = None) -> TrainResult:
    """Do the job, as one of $WORLD_SIZE processes. Every process gets the result; the leading one writes the files."""
    tracking.check(job.track)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    plm = dataclasses.replace(job.plm, device=_own_device(job.plm.device)) if several else job.plm
    pool = _read(Path(job.pool))
    peers = Processes(torch.device(plm.device)) if several else Peers()
    network = PolicyNetwork(load_plm(plm), job.network)
    result = train(network, pool, job.train, folder=Path(job.folder), progress=progress, peers=peers, track=job.track)
    if isinstance(peers, Processes):
        peers.part()
    return result


def _own_device(device: str) -> str:
    """The device of this process: on a machine with GPUs, each has one."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if len(devices_of(device)) > 1 or torch.device(devices_of(device)[0]).index is not None:
        raise ValueError(f'plm.device={device!r}: with several processes each takes its own: use "auto" or "cpu"')
    return devices_of(device)[0]


def _read(path: Path) -> ExperiencePool:
    return read_pool(path) if path.suffix == ".pkl" else load_pool(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        print("usage: python -m netllm_lib.abr.finetune job.json", file=sys.stderr)
        return 2
    leads = os.environ.get("RANK", "0") == "0"
    try:
        job = read_job(Path(words[0]))
        report: Any = runs.progress("fine-tuning") if leads else None
        result = finetune(job, report)
    except (ValueError, OSError) as error:
        print(f"finetune: {error}", file=sys.stderr, flush=True)
        return 2
    if leads:
        loss = result.history["loss"].tail(20).mean()
        print(
            f"{len(result.history)} micro-batches in {result.seconds:.0f} s, loss {loss:.4f} at the end; {result.final}"
        )
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code:
        os._exit(code)  # without a word to the others: their launcher ends them, or their connection breaks
    sys.exit(code)
