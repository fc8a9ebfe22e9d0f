"""What the library computes, as a few figures. If one of them changes, a run that was made before is not what it would give now.

Whoever changes the arithmetic on purpose raises `ARITHMETIC` in the package that changed and records the new figures here; finished
runs are then made again. Figures are rounded so that machines agree.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import netllm_lib
from netllm_lib import abr, plm, train
from netllm_lib.abr import batches, model, play, pool, qoe, synthetic
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.policies.catalogue import make_policy
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import Registry, TraceSet, Video

RECORDED: dict[tuple[str, int], dict[str, Any]] = {
    ("netllm_lib", 1): {"first loss": 1.94, "last loss": 1.83},
    ("netllm_lib.abr", 1): {"bba": 0.56946, "mpc": 0.93871, "random": -16.25779, "pool": "b8853df420dc", "windows": 18},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, TraceSet, Video, pool.ExperiencePool]:
    folder = tmp_path_factory.mktemp("arithmetic")
    synthetic.write_sample(folder, train=6, test=2)
    registry = Registry(folder)
    traces, video = registry.trace_set("sample-train"), registry.video("sample")
    experience = pool.generate_pool(make_policy("mpc", video, registry), traces, video, sound_episodes(traces))
    return registry, traces, video, experience


def test_bitrate_adaptation(data: tuple[Registry, TraceSet, Video, pool.ExperiencePool]) -> None:
    registry, traces, video, experience = data
    found: dict[str, object] = {}
    for name in ("bba", "mpc", "random"):
        table = play.play(make_policy(name, video, registry), Simulator(traces, video, sound_episodes(traces, seed=1)))
        found[name] = round(qoe.summarise(table).reward, 5)
    levels = hashlib.sha256(experience.actions.astype(np.int8).tobytes()).hexdigest()[:12]
    found |= {"pool": levels, "windows": len(batches.make_windows(experience))}
    assert found == RECORDED["netllm_lib.abr", abr.ARITHMETIC], "the arithmetic changed: raise abr.ARITHMETIC"


def test_training(data: tuple[Registry, TraceSet, Video, pool.ExperiencePool], tmp_path: Path) -> None:
    network = model.PolicyNetwork(plm.load_plm(plm.PLMConfig("tiny-llama", rank=8)), model.NetworkConfig(16, 46))
    windows, config = batches.make_windows(data[-1]), train.TrainConfig(epochs=2, lr=3e-3)
    history = train.train(network, windows, config, folder=tmp_path, settings=windows.settings).history
    assert history is not None
    found = {"first loss": round(history["loss"].iloc[0], 2), "last loss": round(history["loss"].tail(5).mean(), 2)}
    recorded = RECORDED["netllm_lib", netllm_lib.ARITHMETIC]
    assert found == pytest.approx(recorded, abs=0.011), "the arithmetic changed: raise netllm_lib.ARITHMETIC"
