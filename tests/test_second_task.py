"""The spine knows no task: a regression of sines is trained, killed, resumed, kept, compared and gated, though lower is better."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from netllm_lib import arrays, gate
from netllm_lib.abr.model import load_policy
from netllm_lib.checkpoint import load_checkpoint, read_meta
from netllm_lib.measure import Measure, Scores
from netllm_lib.plm import PLM, PLMConfig, load_plm
from netllm_lib.preflight import preflight
from netllm_lib.task import Network, Numbers
from netllm_lib.train import TrainConfig, train

# --- the task -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    x: torch.Tensor  # float32 [batch, points]
    y: torch.Tensor  # float32 [batch, points]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x.to(device), self.y.to(device))


class Sines:
    """Points of sin(πx), eight a sample."""

    def __init__(self, count: int, seed: int):
        self.facts: dict[str, Any] = {"points": 8}
        self.x = np.random.default_rng(seed).uniform(-1, 1, (count, 8)).astype(np.float32)
        self.key = arrays.array_hash(self.x)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, numbers: Numbers) -> Batch:
        return Batch(torch.from_numpy(self.x[numbers]), torch.from_numpy(np.sin(np.pi * self.x[numbers])))

    def labels(self, numbers: Numbers) -> int:
        return self.x[numbers].size


@dataclass(frozen=True)
class Sizes:
    seed: int = 1


@dataclass(frozen=True)
class Settings:
    points: int = 8


class SineNetwork(Network):
    task, Config, Settings = "sine", Sizes, Settings

    def __init__(self, plm: PLM, config: Sizes):
        super().__init__()
        self.plm, self.config = plm, config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embed, self.head = nn.Linear(1, plm.hidden_size), nn.Linear(plm.hidden_size, 1)

    def around_plm(self) -> dict[str, nn.Module]:
        return {"embed": self.embed, "head": self.head}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.plm(self.embed(x.unsqueeze(-1)))).squeeze(-1)

    def loss(self, batch: Batch, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, int]:
        return (self(batch.x) - batch.y).square().sum(), batch.y.numel()


# --- what the spine does with it ----------------------------------------------------------------------------------------

DATA, TEST = Sines(64, seed=1), Sines(20, seed=2)
CONFIG = TrainConfig(epochs=8, batch=8, precision="float32", lr_around=3e-3, checkpoint_steps=3)


def make() -> SineNetwork:
    return SineNetwork(load_plm(PLMConfig("tiny-llama", rank=4, layers=1)), Sizes())


@torch.no_grad()
def errors(network: SineNetwork) -> np.ndarray:
    """The mean absolute error of every test sample."""
    batch = TEST.batch(np.arange(len(TEST)))
    return np.asarray((network(batch.x) - batch.y).abs().mean(dim=1))


def fit(network: SineNetwork, folder: Path, die_at: int = 0) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    options: dict[str, Any] = {"validate": lambda net: errors(net).mean(), "better": "lower", "held_out": TEST}
    return train(network, DATA, CONFIG, folder=folder, settings=Settings(), progress=progress, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SineNetwork, Any]:
    network = make()
    return network, fit(network, tmp_path_factory.mktemp("sine"))


def test_it_learns_and_the_lowest_error_is_kept(trained: tuple[SineNetwork, Any]) -> None:
    _, result = trained
    flight = preflight(make(), DATA, CONFIG)
    assert (flight.plan.steps, flight.labels, flight.crossing) == (result.steps, 512, 0)
    assert 0 < flight.memory.weights < flight.memory.peak
    assert result.held_out_loss < 0.1
    assert result.best_score == result.evaluations["score"].min() == read_meta(result.best).score
    assert result.best_score < result.evaluations["score"].iloc[0]


def test_a_killed_training_ends_with_the_same_bits(trained: tuple[SineNetwork, Any], tmp_path: Path) -> None:
    program = "import sys, pathlib, test_second_task as t; t.fit(t.make(), pathlib.Path(sys.argv[1]), die_at=35)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    network, result = make(), fit(resumed := make(), tmp_path)
    expected = trained[0].trainable()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.trainable().items())
    assert not all(torch.equal(value, expected[name]) for name, value in network.trainable().items())
    assert result.held_out_loss == trained[1].held_out_loss


def test_its_checkpoint_is_its_own(trained: tuple[SineNetwork, Any]) -> None:
    network, result = trained
    loaded, meta = load_checkpoint(result.final, SineNetwork)
    assert (meta.task, meta.settings, meta.network) == ("sine", Settings(), Sizes())
    np.testing.assert_array_equal(errors(loaded), errors(network))
    with pytest.raises(ValueError, match="a checkpoint of the task 'sine', not of 'abr'"):
        load_policy(result.final)


def test_it_is_compared_and_gated(trained: tuple[SineNetwork, Any], tmp_path: Path) -> None:
    ours, zero = errors(trained[0]), np.abs(np.sin(np.pi * TEST.x)).mean(axis=1)
    rows = [
        {"policy": policy, "sample": sample, "error": error}
        for policy, values in (("zero", zero), ("llm", ours))
        for sample, error in enumerate(values)
    ]
    scores = Scores(Measure("error", better="lower", sample="sample"), "llm", pd.DataFrame(rows))
    assert scores.league().index.tolist() == ["llm", "zero"]
    assert scores.measure.gain(scores.difference("llm", "zero")).low > 0 > scores.difference("llm", "zero").high
    scores.save(tmp_path)
    asked = [gate.Gate("zero"), gate.Gate("llm", policy="zero")]
    assert [verdict.state for verdict in gate.judge(asked, {"test": tmp_path})] == ["passed", "failed"]
