"""The LLM as a policy: contexts, caches, sampling, and the original's episodes and complete runs."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import GOLDEN, Golden
from llm_fixtures import episodes_of, observe, replay, tiny_network, toy_pool, train_on, write_plm
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.episodes import Observation, sound_episodes, upstream_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings, load_policy
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.pool import generate_pool, load_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import Registry
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint
from netllm_lib.checkpoint import CheckpointMeta, describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.runs import read_json
from netllm_lib.train import TrainConfig

RNG = np.random.default_rng(0)
STATES, REWARDS = RNG.random((47, 3, 6, 6)), RNG.normal(size=(47, 3))


@pytest.fixture(scope="module")
def network() -> PolicyNetwork:
    return tiny_network()


@pytest.fixture(scope="module")
def meta(network: PolicyNetwork) -> CheckpointMeta:
    return describe(network, PolicySettings(20, pool_returns(toy_pool())[1]))


def run(
    network: PolicyNetwork, meta: CheckpointMeta, chunks: int = 47, lockstep: bool = True, **config: Any
) -> tuple[np.ndarray, np.ndarray]:
    return replay(LLMPolicy(network, meta, EvalConfig(**config)), STATES[:chunks], REWARDS[:chunks], lockstep)


def test_cached_equals_rolling_within_the_window(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    _, cached = run(network, meta, context_window="cached")
    _, rolling = run(network, meta, context_window="rolling")
    difference = np.abs(cached - rolling).max(axis=(0, 2))
    assert difference[:21].max() < 1e-4
    assert difference[21:].max() > 1e-3  # later it is an approximation


def test_cached_is_exact_when_the_window_is_the_episode(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    levels, cached = run(network, meta, context_window="cached", w=47)
    expected, rolling = run(network, meta, context_window="rolling", w=47)
    np.testing.assert_array_equal(levels, expected)
    np.testing.assert_allclose(cached, rolling, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", ["cached", "rolling"])
@pytest.mark.parametrize("choose", ["argmax", "sample"])
def test_lockstep_equals_one_by_one(network: PolicyNetwork, meta: CheckpointMeta, window: Any, choose: Any) -> None:
    config: dict[str, Any] = {"context_window": window, "choose": choose, "draws": "stream"}
    together, logits = run(network, meta, chunks=24, **config)
    apart, alone = run(network, meta, chunks=24, lockstep=False, **config)
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_allclose(logits, alone, atol=1e-4, rtol=0)


def test_context_holds_the_previous_w_steps_and_the_current_one(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    """A changed state is seen by its own decision and the w after it, and by no other."""

    class SameLevels(LLMPolicy):
        def _choose(self, observation: Observation) -> np.ndarray:
            return np.zeros(len(observation.episode), dtype=int)

    policy = SameLevels(network, meta, EvalConfig(context_window="rolling", w=5))
    states = STATES[:12].copy()
    states[3] += 1
    _, plain = replay(policy, STATES[:12], REWARDS[:12])
    _, moved = replay(policy, states, REWARDS[:12])
    changed = np.abs(plain - moved).max(axis=(0, 2)) > 1e-6
    assert changed.tolist() == [3 <= decision <= 8 for decision in range(12)]


def test_return_to_go_follows_the_rewards(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    policy = LLMPolicy(network, meta, EvalConfig(target_return_scale=2.0))
    policy.reset(episodes_of(3))
    scale, target = meta.settings.scale, []
    for chunk in (1, 2, 3):
        policy.act(observe(STATES, REWARDS, chunk))
        target.append(policy.extras()["return_to_go"])
    span = (scale.max_reward - scale.min_reward) * scale.scale
    np.testing.assert_allclose(target[0], 2 * scale.target_return)  # the reward of chunk 0 is never subtracted
    expected = target[0] - (np.clip(REWARDS[1], scale.min_reward, scale.max_reward) - scale.min_reward) / span
    np.testing.assert_allclose(target[1], expected)
    assert (target[2] < target[1]).all()
    extras = policy.extras()
    np.testing.assert_allclose(sum(extras[f"p{level}"] for level in range(6)), 1, rtol=1e-6)


def test_sampling_is_that_of_random_choices(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    """One stream over all traces, 48 draws a trace, also when the last is not used."""
    policy = LLMPolicy(network, meta, EvalConfig(choose="sample", draws="stream"))
    policy.reset(episodes_of(3, seed=11))
    stream = random.Random(11)
    draws = np.array([[stream.random() for _ in range(48)] for _ in range(3)])
    for chunk in range(1, 25):
        levels = policy.act(observe(STATES, REWARDS, chunk))
        for trace in range(3):
            sums = list(accumulate(policy.probabilities[trace]))
            pick = draws[trace, chunk - 1] * float(sums[-1])
            assert levels[trace] == next((i for i, s in enumerate(sums[:5]) if pick < float(s)), 5)


def test_leaking_context_changes_the_second_trace_only(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    clear = LLMPolicy(network, meta, EvalConfig(context_window="rolling"))
    leak = LLMPolicy(network, meta, EvalConfig(context_window="rolling", context="leak"))
    assert (clear.carries_state, leak.carries_state) == (False, True)
    states = np.repeat(STATES[:10, :1], 2, axis=1)  # the same trace twice
    rewards = np.repeat(REWARDS[:10, :1], 2, axis=1)
    _, cleared = replay(clear, states, rewards, lockstep=False)
    _, leaked = replay(leak, states, rewards, lockstep=False)
    np.testing.assert_allclose(cleared[0], cleared[1], atol=1e-6)
    np.testing.assert_allclose(leaked[0], cleared[0], atol=1e-6)
    assert np.abs(leaked[1] - cleared[1]).max() > 1e-3
    with pytest.raises(ValueError, match="rolling"):
        EvalConfig(context="leak", context_window="cached")


def test_a_test_leaves_the_network_as_it_is_and_sees_what_was_trained_since(meta: CheckpointMeta) -> None:
    network = tiny_network()
    before = {name: p.clone() for name, p in network.named_parameters()}
    network.train()
    run(network, meta, chunks=3, precision="bfloat16")
    assert network.training
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    network.eval()
    policy = LLMPolicy(network, meta)
    _, first = replay(policy, STATES[:2], REWARDS[:2])
    with torch.no_grad():
        for parameter in network.plm.trainable().values():
            parameter.mul_(1.5)
    _, after = replay(policy, STATES[:2], REWARDS[:2])
    assert np.abs(after - first).max() > 1e-3


def test_dropout_is_on_only_where_asked(network: PolicyNetwork, meta: CheckpointMeta) -> None:
    config: dict[str, Any] = {"chunks": 3, "merge_lora": False, "context_window": "rolling"}
    _, off = run(network, meta, **config)
    _, on = run(network, meta, dropout=True, **config)
    _, again = run(network, meta, dropout=True, **config)
    assert np.abs(on - off).max() > 1e-4
    np.testing.assert_array_equal(on, again)  # seeded by the episodes
    assert (EvalConfig.upstream(in_training=True).dropout, EvalConfig.upstream().dropout) == (True, False)


def test_what_cannot_be_done(network: PolicyNetwork, meta: CheckpointMeta, tmp_path: Path) -> None:
    folder = str(write_plm(tmp_path / "t5", "t5-lm"))
    t5 = PolicyNetwork(load_plm(PLMConfig(folder, rank=4)), NetworkConfig(8))
    with pytest.raises(ValueError, match="rolling"):
        LLMPolicy(t5, meta)
    levels, _ = replay(LLMPolicy(t5, meta, EvalConfig(context_window="rolling")), STATES[:3], REWARDS[:3])
    assert levels.shape == (3, 3)
    short = PolicyNetwork(network.plm, NetworkConfig(8, max_timestep=1))
    with pytest.raises(ValueError, match="trained on episodes of 2"):
        replay(LLMPolicy(short, meta), STATES[:4], REWARDS[:4])


def test_from_pool_to_test(tmp_path: Path) -> None:
    """Behaviour policy, pool, training, checkpoint, play: in lock-step and one trace after the other."""
    traces, video = generate_traces("toy", 3, seed=1), generate_video("toy", seed=1)
    episodes = sound_episodes(traces, seed=1)
    pool = generate_pool(BBA(), traces, video, episodes)
    network = tiny_network(lora=False, layers=1)
    config = TrainConfig(epochs=2, batch=3, precision="float32")
    result = train_on(network, pool, config, tmp_path)
    assert result.best is not None
    loaded, meta = load_policy(result.best)
    simulator = Simulator(traces, video, episodes)
    for choose in ("argmax", "sample"):
        policy = LLMPolicy(loaded, meta, EvalConfig(choose=choose))
        together = play(policy, simulator)
        alone = pd.concat([play(policy, Simulator(traces, video, episodes.rows([i]))) for i in range(3)])
        assert len(together) == 3 * 48
        assert together["return_to_go"].isna().sum() == 3  # the first chunk is the protocol's
        pd.testing.assert_frame_equal(together, alone.reset_index(drop=True), atol=1e-4, check_exact=False)


# --- the original ---------------------------------------------------------------------------------------------------

EPISODES = sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("plm/*/episode_*.npz")) or [Path("absent")]


@pytest.mark.golden
@pytest.mark.parametrize("path", EPISODES, ids=str)
def test_greedy_episodes_of_the_original(golden: Golden, real_data: Path, path: Path) -> None:
    """Two traces: every level and reward equal, probabilities within 1e-5."""
    recorded, folder = np.load(golden(path)), golden(path).parent
    meta_file, layer = read_json(folder / "meta.json"), int(path.stem.rpartition("layer")[2])
    _, scale = pool_returns(load_pool(golden("plm", "mpc100_exp_pool.pkl")), scale=meta_file["scale"])
    plm = PLMConfig.upstream(str(folder / "plm"), layers=None if layer < 0 else layer + 1)
    network, meta = load_upstream_checkpoint(folder / "adapter", plm, scale, meta_file["w"])
    config = EvalConfig.upstream(choose="argmax", context="leak" if "noclear" in path.stem else "clear")
    registry = Registry(real_data)
    traces = registry.trace_set("fcc-test")
    episodes = upstream_episodes(traces, trace_num=-1).rows([0, 1])
    table = play(LLMPolicy(network, meta, config), Simulator(traces, registry.video("video1"), episodes))
    played = recorded["action"].reshape(2, 48)[:, :-1]
    np.testing.assert_array_equal(qoe.chosen(table)["level"], played.ravel())
    np.testing.assert_array_equal(table["reward"], recorded["reward_raw"])
    expected = torch.softmax(torch.from_numpy(recorded["logits"]).reshape(2, 48, 6)[:, :-1], dim=-1)
    probabilities = qoe.chosen(table)[[f"p{level}" for level in range(6)]]
    np.testing.assert_allclose(probabilities, expected.reshape(-1, 6), atol=1e-5, rtol=0)


RUNS = sorted(p.parent.relative_to(GOLDEN) for p in GOLDEN.glob("upstream_run/*/run.json")) or [Path("absent")]
COLUMNS = ["time_s", "bitrate_kbps", "buffer_s", "rebuffer_s", "size_bytes", "delay_ms", "smoothness_mbps", "reward"]


def setting(name: str, key: str) -> float:
    """A number from a folder's name: `rank_8_w_20_gamma_1.0_…`."""
    found = re.search(rf"(?:^|_){key}_(-?[\d.]+(?:e-?\d+)?)", name)
    assert found, f"{name} does not say {key}"
    return float(found[1])


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("path", RUNS, ids=str)
def test_complete_run_of_the_original(golden: Golden, real_data: Path, path: Path, alone: bool) -> None:
    """A test, reproduced from its checkpoint: the same level on every chunk of every trace, the same mean.

    The one that is not alone ran in the process that had trained, and began with the context in which the last evaluation ended.
    """
    folder = golden(path)
    run_file = read_json(folder / "run.json")
    (best,) = folder.glob("ft_plm/*/*/early_stop_*_best_model")
    pattern = "results_test_alone" if alone else "results"
    results = {p.name: p for p in folder.glob(f"{pattern}/**/result_sim_abr_*")}
    trained, tested = best.parent.name, next(iter(results.values())).parent.name  # the names hold the settings
    w, gamma = int(setting(trained, "w")), setting(trained, "gamma")
    layer, target_scale = int(setting(best.name, "early_stop")), setting(tested, "tgt_scale")
    _, scale = pool_returns(load_pool(folder / run_file["pool"]), gamma)
    plm = PLMConfig.upstream(str(folder / run_file["plm"]), layers=None if layer < 0 else layer + 1)
    network, meta = load_upstream_checkpoint(best, plm, scale, w)
    registry = Registry(real_data)
    traces, video = registry.trace_set(run_file["traces"]), registry.video(run_file["video"])
    episodes = upstream_episodes(traces, trace_num=run_file["trace_num"], seed=run_file["seed"])
    policy = LLMPolicy(network, meta, EvalConfig.upstream(not alone, target_return_scale=target_scale))
    simulator = Simulator(traces, video, episodes)
    if not alone:  # the best weights are those of that evaluation
        play(policy, simulator)
        policy.config = replace(policy.config, dropout=False)
    table = play(policy, simulator)
    assert len(results) == table["trace"].nunique() == run_file["trace_num"]
    for name, rows in table.groupby("trace", sort=False):
        expected = np.loadtxt(results[f"result_sim_abr_{traces.name}_{name}"])
        np.testing.assert_allclose(rows[COLUMNS], expected, rtol=1e-9, err_msg=str(name))
    assert qoe.summarise(table).reward == pytest.approx(run_file["mean_alone" if alone else "mean"], abs=1e-12)
