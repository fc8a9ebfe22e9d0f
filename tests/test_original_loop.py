"""The plain transcription that speed is compared with computes what the library's `upstream()` presets compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from original_loop import OriginalPolicy, train_windows

from llm_fixtures import stir, tiny_network, toy_pool, train_on, write_plm
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import Observation, sound_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.returns import pool_returns
from netllm_lib.train import TrainConfig

UPSTREAM = EvalConfig.upstream()


def network(**plm: float) -> PolicyNetwork:
    config = PLMConfig.upstream("tiny-llama", rank=8, **plm)
    return stir(PolicyNetwork(load_plm(config), NetworkConfig(state_feature_dim=8)))


@pytest.mark.parametrize("w", [5, 20])
def test_the_same_decisions(w: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every decision of three traces, the one after the last chunk and the leaking context included."""
    net, (_, scale) = network(), pool_returns(toy_pool())
    traces = generate_traces("sample", 3, seed=5)
    simulator = Simulator(traces, generate_video("clip", seed=5), sound_episodes(traces, seed=3))
    theirs, ours = OriginalPolicy(net, scale, w), LLMPolicy(net, describe(net, PolicySettings(w, scale)), UPSTREAM)
    levels, logits = [], []
    for policy in (theirs, ours):
        seen: list[np.ndarray] = []

        def act(observation: Observation, original: Any = policy.act, seen: Any = seen, policy: Any = policy) -> Any:
            chosen = original(observation)
            seen.append(policy.logits)
            return chosen

        monkeypatch.setattr(policy, "act", act)
        levels.append(rollout(policy, simulator).level)
        logits.append(np.concatenate(seen))
    np.testing.assert_array_equal(levels[0], levels[1])
    assert len(np.unique(levels[0][:, 1:])) > 2
    assert len(logits[0]) == 3 * 48
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5, rtol=0)


def test_the_same_training(tmp_path: Path) -> None:
    """Losses and weights of 10 windows in 3 optimizer steps, the last one incomplete."""
    pool, order = toy_pool(4), (7, 2, 5, 0, 1, 8, 6, 3, 4, 2)
    config = TrainConfig.upstream(epochs=1, order=order, accumulation=4, warmup_steps=2, lr=1e-3, lr_around=1e-3)
    ours, theirs = network(lora_dropout=0.0), network(lora_dropout=0.0)
    windows = make_windows(pool, WindowConfig.upstream())
    history = train_on(ours, windows, config, tmp_path).history
    losses = train_windows(theirs, windows, order, lr=1e-3, warmup=2, accumulation=4)
    np.testing.assert_allclose(history["loss"], losses, atol=1e-5, rtol=0)
    before = network(lora_dropout=0.0).trainable()
    for name, value in theirs.trainable().items():
        torch.testing.assert_close(ours.trainable()[name], value, atol=1e-5, rtol=0, msg=name)
    assert any(not torch.allclose(before[name], value, atol=1e-4) for name, value in theirs.trainable().items())


def test_opt_draws_a_number_before_each_layer(tmp_path: Path) -> None:
    """In training, which moves the random stream of every dropout."""
    source, batch = str(write_plm(tmp_path, "opt")), make_windows(toy_pool(2)).batch([0])
    upstream = PLMConfig.upstream(source, rank=4, lora_dropout=0.0, plm_dropout=0.0)
    for config, draws in ((upstream, 2), (replace(upstream, layer_draws="none"), 0)):
        opt = PolicyNetwork(load_plm(config), NetworkConfig(state_feature_dim=8))
        for training in (True, False):
            torch.manual_seed(1)
            opt.train(training).loss(batch)
            after = torch.get_rng_state()
            torch.manual_seed(1)
            _ = [torch.rand([]) for _ in range(draws * training)]
            assert torch.equal(after, torch.get_rng_state())


def test_the_sound_loss_is_the_same_function() -> None:
    """Fused attention and one batch give the losses of one window at a time."""
    pool = toy_pool(2)
    windows = make_windows(pool, WindowConfig.upstream())
    fused = tiny_network(lora_dropout=0.0)
    plain = network(lora_dropout=0.0)
    numbers = list(range(len(windows)))
    losses = train_windows(plain, windows, numbers, lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        batch = windows.batch(numbers)
        logits = fused(batch)
        ours = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.actions, reduction="none").mean(1)
    np.testing.assert_allclose(ours, losses, atol=1e-5, rtol=0)
