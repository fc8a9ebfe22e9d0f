"""Killing real processes at any moment: the next one goes on, and the end is the same to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import resume_worker
from llm_fixtures import tiny_network, train_on
from netllm_lib import runs
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.pool import generate_pool, load_pool
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.checkpoint import read_meta

TIMES = ("seconds", "started", "finished", "process", "checksum", "history_hash")
"""What may differ between two runs: times, the process, and the hashes of what holds them."""


class Worker:
    """A process that does jobs in processes of its own, see resume_worker.py."""

    def __init__(self) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": os.environ | one_thread}
        self.process: Any = subprocess.Popen([sys.executable, resume_worker.__file__], **pipes)
        assert self.line() == "ready"

    def start(self, job: str, path: Path, die_at: int = 0) -> int:
        """Process number of the job, in a folder that is made if it is not there."""
        path.mkdir(exist_ok=True)
        print(job, path, die_at, file=self.process.stdin, flush=True)
        return int(self.line())

    def do(self, job: str, path: Path, die_at: int = 0) -> int:
        """Wait for the job as well; its exit code, negative for a signal."""
        self.start(job, path, die_at)
        return int(self.line())

    def line(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.communicate(timeout=60)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """Every file by name: its bytes, or for tables and JSON what is in it besides times; for TensorBoard's files the curves."""
    found: dict[str, Any] = {}
    if (folder / "tensorboard").is_dir():  # as many files as sittings
        found["tensorboard"] = {name: c for name, c in curves(folder).items() if not name.endswith("/seconds")}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard"):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = without_times(runs.read_json(path))
        elif path.suffix == ".parquet":
            found[name] = pd.read_parquet(path).drop(columns=list(TIMES), errors="ignore").to_csv()
        else:
            found[name] = path.read_bytes()
    assert found
    return found


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every curve, as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_whole(folder: Path) -> int:
    """Everything under its final name can be read, whenever the kill came. Returns how far training is."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": runs.read_json,
        ".parquet": pd.read_parquet,
        ".safetensors": lambda path: (load_file(path), read_meta(path.parent)),
        "states.npy": lambda path: load_pool(path.parent),
        "tensorboard": lambda path: curves(path.parent),
    }
    for path in folder.rglob("*"):
        if not any(
            part.startswith(".") for part in path.relative_to(folder).parts
        ):  # those are still beside their place
            readers.get(path.name, readers.get(path.suffix, str))(path)
    state = folder / "state.pt"
    return torch.load(state, weights_only=True)["at"]["step"] if state.exists() else 0


def survive(worker: Worker, job: str, tmp_path: Path, kills: int, seed: int) -> None:
    """Do a job with `kills` kills, half of them at a random time, half at a random call that changes files."""
    rng, undisturbed, started = np.random.default_rng(seed), tmp_path / "undisturbed", time.monotonic()
    assert worker.do(job, undisturbed) == 0
    seconds, expected = time.monotonic() - started, content(undisturbed)

    done = attempts = 0
    while done < kills:
        attempts += 1
        folder, step = tmp_path / f"disturbed{attempts}", 0
        while True:
            from_outside = (done + seed) % 2 == 0
            process = worker.start(job, folder, 0 if from_outside or done >= kills else int(rng.integers(1, 60)))
            if from_outside and done < kills:
                time.sleep(float(rng.uniform(0, 0.7 * seconds)))
                os.kill(process, signal.SIGKILL)
            if (code := int(worker.line())) == 0:
                break
            assert code == -signal.SIGKILL
            done += 1
            reached = assert_whole(folder)
            assert reached >= step or (folder / "training.json").exists()
            step = reached
        assert content(folder) == expected
    assert worker.do(job, folder) == 0  # what is finished is left alone
    assert content(folder) == expected


@pytest.mark.parametrize("job", list(resume_worker.JOBS))
def test_the_end_is_the_same_after_two_kills(worker: Worker, tmp_path: Path, job: str) -> None:
    survive(worker, job, tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("job", list(resume_worker.JOBS))
def test_the_end_is_the_same_after_many_kills(worker: Worker, tmp_path: Path, job: str, seed: int) -> None:
    survive(worker, job, tmp_path, kills=12, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "every"), [("train", 5), ("pool", 5), ("run", 1)])
def test_a_kill_at_each_step_of_writing(worker: Worker, tmp_path: Path, job: str, every: int) -> None:
    """One kill for every (fifth) call that flushes, renames or removes, in order, until the job needs no more of them."""
    assert worker.do(job, tmp_path / "undisturbed") == 0
    expected, kills = content(tmp_path / "undisturbed"), 0
    for call in range(1, 1000, every):
        folder = tmp_path / f"{call}"
        if (code := worker.do(job, folder, call)) == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert_whole(folder)
        assert worker.do(job, folder) == 0
        assert content(folder) == expected
    assert (code, kills > 20) == (0, True)


def test_two_at_once_are_refused(worker: Worker, tmp_path: Path) -> None:
    with runs.lock(tmp_path / "pool"):
        assert worker.do("pool", tmp_path) == 1  # its error is in the captured output
    assert worker.do("pool", tmp_path) == 0


# --- a disk that fills up -----------------------------------------------------------------------------------------------


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def small_training(folder: Path, network: PolicyNetwork | None = None, **options: Any) -> Any:
    config = dataclasses.replace(resume_worker.CONFIG, epochs=1, seed=options.pop("seed", 1))
    network = network or tiny_network(rank=4, lora=False, layers=1)
    return train_on(network, resume_worker.WINDOWS, config, folder, **options)


def test_generation_goes_on_when_there_is_room_again(small_disk: Path) -> None:
    traces, video = generate_traces("t", 5, 8), generate_video("v", 1)
    episodes = sound_episodes(traces, seed=2, repeats=40)
    job: Any = partial(generate_pool, BBA(), traces, video, episodes)
    with pytest.raises(runs.StorageError, match=f"^{small_disk}: the disk is full"):
        job(path=small_disk / "pool", block=10)
    assert [path.name for path in small_disk.iterdir()] == [".pool.generating"]
    remount(small_disk, "size=16m")
    generated: list[int] = []
    pool = job(path=small_disk / "pool", block=10, progress=lambda done, total: generated.append(done))
    assert min(generated) > 100 * 48  # it did not begin from the start
    assert pool.content_hash() == job().content_hash()


def test_training_goes_on_when_there_is_room_again(small_disk: Path, tmp_path: Path) -> None:
    remount(small_disk, "size=64m")
    undisturbed, network = (tiny_network(rank=4, lora=False, layers=1) for _ in range(2))
    small_training(tmp_path / "undisturbed", undisturbed)

    def fill(done: int, *_: Any) -> None:
        if done == 3:
            with contextlib.suppress(OSError), open(small_disk / "ballast", "wb") as stream:
                while True:
                    stream.write(bytes(2**20))

    folder = small_disk / "training"
    with pytest.raises(runs.StorageError, match=f"^{folder}: the disk is full"):
        small_training(folder, network, progress=fill)
    assert {path.name for path in folder.iterdir()} == {"state.pt", "tensorboard"}
    assert assert_whole(folder) == 2
    (small_disk / "ballast").unlink()
    small_training(folder, network)
    assert all(torch.equal(p, undisturbed.trainable()[name]) for name, p in network.trainable().items())


def test_a_finished_training_is_read_from_a_read_only_disk(small_disk: Path) -> None:
    remount(small_disk, "size=64m")
    first = small_training(small_disk / "training")
    remount(small_disk, "ro")
    pd.testing.assert_frame_equal(first.history, small_training(small_disk / "training").history)
    with pytest.raises(runs.StorageError, match=f"^{small_disk}: this folder cannot be written to"):
        small_training(small_disk / "other", seed=9)


def test_what_a_kill_just_before_the_end_leaves_goes(tmp_path: Path) -> None:
    small_training(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"of the run that is finished")
    small_training(tmp_path)
    assert not (tmp_path / "state.pt").exists()
