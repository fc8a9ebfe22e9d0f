"""Fine-tuning as a program: jobs, and several processes that share every batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from llm_fixtures import toy_pool
from netllm_lib import runs
from netllm_lib.abr import finetune
from netllm_lib.abr.finetune import Job, read_job
from netllm_lib.abr.model import NetworkConfig
from netllm_lib.abr.peers import Peers
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.checkpoint import load_checkpoint
from netllm_lib.plm import PLMConfig
from netllm_lib.train import TrainConfig

PLM = PLMConfig("tiny-llama", rank=4, layers=1, lora_dropout=0.0)
SOUND = TrainConfig(epochs=2, batch=5, w=8, precision="float32", windows="stride", stride=6, accumulation=2)
UPSTREAM = TrainConfig.upstream(epochs=1, accumulation=4, w=8, warmup_steps=2, lr=1e-3, lr_around=1e-3, shuffle="seed")


def write_job(folder: Path, name: str, train: TrainConfig, **changes: Any) -> Path:
    """A job on a pool of four episodes, the last one shorter than the others and than a window."""
    pool = folder / "pool"
    if not pool.exists():
        whole, count = toy_pool(4, length=20), 66
        dones = whole.dones[:count] | (np.arange(count) == count - 1)
        ExperiencePool(whole.states[:count], whole.actions[:count], whole.rewards[:count], dones).save(pool)
    job = Job(str(pool), str(folder / name), PLM, NetworkConfig(state_feature_dim=8), train)
    path = folder / f"{name}.json"
    runs.write_json(path, runs.plain(job) | changes)
    return path


def start(job: Path, rank: int, size: int, rendezvous: Path) -> subprocess.Popen[str]:
    env = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "NETLLM_RENDEZVOUS": str(rendezvous),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "NETLLM_HEADLESS": "1",
    }
    command = [sys.executable, "-m", "netllm_lib.abr.finetune", str(job)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def together(job: Path, size: int = 2, timeout_s: float = 120) -> list[tuple[int, str]]:
    """Run a job in `size` processes; exit code and output of each. They are ended, by their ids, if one fails or time is up."""
    rendezvous = job.with_suffix(".rendezvous")
    processes = [start(job, rank, size, rendezvous) for rank in range(size)]
    try:
        end = time.monotonic() + timeout_s
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [(process.wait(), process.communicate()[0]) for process in processes]


def losses(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "history.parquet")


@pytest.mark.parametrize("train", [SOUND, UPSTREAM], ids=["sound", "upstream"])
def test_two_processes_train_as_one(tmp_path: Path, train: TrainConfig) -> None:
    """Losses, gradient norms and final weights; batches of odd size, of one window, and windows of unequal length."""
    assert finetune.main([str(write_job(tmp_path, "one", train))]) == 0
    for code, output in together(write_job(tmp_path, "two", train)):
        assert code == 0, output
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(two["grad_norm"], one["grad_norm"], atol=1e-4, rtol=1e-3)
    assert one["loss"].nunique() > 3
    networks = [load_checkpoint(tmp_path / name / "final")[0].trainable() for name in ("one", "two")]
    for name, value in networks[0].items():
        torch.testing.assert_close(networks[1][name], value, atol=2e-4, rtol=0, msg=name)
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "two" / "state.pt").exists()


def test_a_failure_is_one_line_and_ends_them(tmp_path: Path) -> None:
    job = write_job(tmp_path, "broken", SOUND, pool=str(tmp_path / "nothing.npz"))
    failed = [output for code, output in together(job) if code == 2]
    assert failed
    assert all(output.count("\n") == 1 and "nothing.npz" in output for output in failed)


def test_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path, "job", SOUND)
    job = read_job(path)
    assert (job.train, job.plm, job.network.state_feature_dim) == (SOUND, PLM, 8)
    path.write_text(json.dumps({"pool": "p.npz", "folder": "f"}))
    assert read_job(path) == Job("p.npz", "f")
    for wrong, reason in (
        ({"pool": "p.npz"}, "folder"),
        ({"pool": "p", "folder": "f", "epochs": 3}, "epochs"),
        ({"pool": "p", "folder": "f", "train": {"epochs": "3"}}, "train.epochs"),
        ([], "expected Job"),
    ):
        path.write_text(json.dumps(wrong))
        assert finetune.main([str(path)]) == 2
        assert reason in capsys.readouterr().err
    assert finetune.main([str(tmp_path / "no.json")]) == 2
    assert finetune.main([]) == 2


def test_a_job_goes_on_and_is_read_back(tmp_path: Path) -> None:
    path = write_job(tmp_path, "job", dataclasses.replace(SOUND, epochs=1))
    seen: list[int] = []
    result = finetune.finetune(read_job(path), progress=lambda done, total, info: seen.append(done))
    again = finetune.finetune(read_job(path), progress=lambda *_: pytest.fail("it trains again"))
    assert seen == list(range(1, len(seen) + 1))
    pd.testing.assert_frame_equal(again.history, result.history)


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert finetune._own_device("cuda") == finetune._own_device("auto") == "cuda:3"
    assert finetune._own_device("cpu") == "cpu"
    for shared in ("cuda:0", "cuda:0,cuda:1"):
        with pytest.raises(ValueError, match="each takes its own"):
            finetune._own_device(shared)


def test_a_process_alone_agrees_with_itself() -> None:
    tensor = torch.ones(2)
    Peers().add_up([tensor])
    assert Peers().leads
    assert Peers().agree("x") == "x"
    assert tensor.tolist() == [1, 1]


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path: Path) -> None:
    """By the documented command; another process may take the port between its choice and its use, so it may try again."""
    import socket

    write_job(tmp_path, "one", SOUND)
    assert finetune.main([str(tmp_path / "one.json")]) == 0
    for attempt in range(3):
        job = write_job(tmp_path, f"launched{attempt}", SOUND)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        command += [
            "--main_process_port",
            str(port),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "NETLLM_HEADLESS": "1"}
        command += ["-m", "netllm_lib.abr.finetune", str(job)]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=180)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    launched = losses(tmp_path / f"launched{attempt}")
    np.testing.assert_allclose(launched["loss"], losses(tmp_path / "one")["loss"], atol=1e-5, rtol=0)
