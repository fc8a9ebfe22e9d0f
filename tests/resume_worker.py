"""Jobs that tests kill: `python resume_worker.py` reads one a line, "JOB PATH N", and does each in a process of its own.

It answers with the number of that process, and when it has ended, with how. Forking after the imports makes a start cheap.
With N > 0 the process kills itself just before its Nth call of the system that flushes, renames or removes a file.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from llm_fixtures import tiny_network, toy_pool, train_on
from netllm_lib import checkpoint, runs
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Random
from netllm_lib.abr.pool import generate_mix
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.train import TrainConfig

POOL = toy_pool(4)
WINDOWS = make_windows(POOL, WindowConfig("stride", w=8, stride=24))
CONFIG = TrainConfig(epochs=3, batch=2, precision="float32", checkpoint_steps=2)
CALLS = ("fsync", "replace", "unlink", "rmdir", "truncate", "mkdir")


def train_job(network: PolicyNetwork, path: Path) -> None:
    """Six resume points in each of three epochs, and a checkpoint that is replaced."""
    size = lambda net: float(next(iter(net.trainable().values())).detach().abs().sum())  # noqa: E731
    train_on(network, WINDOWS, CONFIG, path, validate=size)


def pool_job(_: PolicyNetwork, path: Path) -> None:
    """Thirty blocks of three policies."""
    traces, video = generate_traces("t", 5, 8), generate_video("v", 1)
    episodes = sound_episodes(traces, seed=2, repeats=8, noise=True)
    mix = [(policy, episodes) for policy in (RobustMPC(video), BBA(), Random())]
    generate_mix(mix, traces, video, path=path / "pool", block=4)


def run_job(network: PolicyNetwork, path: Path) -> None:
    """As a notebook does: a run folder with a table, a checkpoint that is written twice, and metrics."""
    run = runs.open_run("kind", "name", {"config": 1}, root=path)
    with runs.lock(run.folder):
        if run.done:
            return
        with runs.atomic_path(run.folder / "table.parquet") as aside:
            pd.DataFrame({"reward": POOL.rewards}).to_parquet(aside)
        meta = checkpoint.describe(network, WINDOWS.settings)
        for _ in range(4):
            checkpoint.save_checkpoint(run.folder / "policy", network, meta)
        run.finish({"reward": 0.5})


JOBS = {"train": train_job, "pool": pool_job, "run": run_job}


def die_at(count: int) -> None:
    """Kill this process before its `count`th call that changes files for good."""
    left = count

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def main() -> None:
    network, child = tiny_network(rank=4, lora=False, layers=1), 0
    print("ready", flush=True)
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        job, path, count = line.split()
        child = os.fork()
        if child == 0:
            if int(count):
                die_at(int(count))
            JOBS[job](network, Path(path))
            os._exit(0)
        print(child, flush=True)
        ended: Any = os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOWAIT
        )  # keeps its number: a late kill hits nobody else
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)


if __name__ == "__main__":
    main()
