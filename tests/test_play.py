"""The one loop: playing in blocks is playing."""

from __future__ import annotations

import numpy as np
import pytest

from llm_fixtures import tiny_network, toy_pool
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicySettings
from netllm_lib.abr.play import play, rollout, rollout_blocks
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import Pensieve
from netllm_lib.abr.policies.simple import Constant, Prefixed, Random, Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.checkpoint import describe
from test_policies import random_actor

TRACES, VIDEO = generate_traces("t", 3, 8), generate_video("v", 1)
SIMULATOR = Simulator(TRACES, VIDEO, sound_episodes(TRACES, seed=2, repeats=3, noise=True))  # 9 episodes

POLICIES: dict[str, Policy] = {
    "bba": BBA(),
    "mpc": RobustMPC(VIDEO),
    "random": Random(),
    "constant": Constant(2),
    "genet": Pensieve(random_actor()),
    "replay": Replay(np.random.default_rng(0).integers(0, 6, (9, CHUNKS))),
    "mpc (original)": RobustMPC(VIDEO, MPCConfig.upstream()),
}


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_change_nothing(name: str) -> None:
    policy = POLICIES[name]
    whole = rollout(policy, SIMULATOR)
    for block in (1, 2, 4, 9, 50):
        blocked = rollout(policy, SIMULATOR, block=block)
        for field in ("level", "reward", "buffer_s", "delay_ms", "sleep_ms", "time_s", "states"):
            np.testing.assert_array_equal(getattr(whole, field), getattr(blocked, field))
        parts = list(rollout_blocks(policy, SIMULATOR, block))
        assert [len(part) for part in parts] == [min(block, 9 - first) for first in range(0, 9, block)]
        np.testing.assert_array_equal(np.concatenate([part.reward for part in parts]), whole.reward)
        np.testing.assert_array_equal(np.concatenate([part.states for part in parts]), whole.states)
    if policy.carries_state:
        with pytest.raises(ValueError, match="carries state"):
            next(rollout_blocks(policy, SIMULATOR, 2, first=1))
    else:
        later = next(rollout_blocks(policy, SIMULATOR, 2, first=3))
        np.testing.assert_array_equal(later.reward, whole.reward[6:8])


@pytest.mark.parametrize(
    "config", [MPCConfig(), MPCConfig.strong(), MPCConfig.upstream(), MPCConfig.upstream(pool=True)]
)
def test_mpc_plays_the_same_in_one_call_as_chunk_by_chunk(config: MPCConfig) -> None:
    policy = RobustMPC(VIDEO, config)
    asked = Prefixed(policy, np.full((9, CHUNKS), -1))
    np.testing.assert_array_equal(rollout(policy, SIMULATOR).level, rollout(asked, SIMULATOR).level)


@pytest.mark.parametrize("choose", ["argmax", "sample"])
def test_a_language_model_plays_in_blocks(choose: str) -> None:
    network = tiny_network(rank=4)
    meta = describe(network, PolicySettings(20, pool_returns(toy_pool())[1]))
    policy = LLMPolicy(network, meta, EvalConfig(choose=choose))  # type: ignore[arg-type]
    assert policy.block == 512
    whole, blocked = play(policy, SIMULATOR), play(policy, SIMULATOR, block=4)
    np.testing.assert_array_equal(whole["level"], blocked["level"])
    np.testing.assert_allclose(whole["p0"], blocked["p0"], atol=1e-6)  # matrix products round by the batch's size
    np.testing.assert_allclose(whole["return_to_go"], blocked["return_to_go"])


def test_progress_counts_chunks_of_all_episodes() -> None:
    for block, steps in ((None, 48), (4, 3 * 48)):
        seen: list[tuple[int, int]] = []
        rollout(BBA(), SIMULATOR, block=block, progress=lambda *at, seen=seen: seen.append(at))
        assert len(seen) == steps
        assert seen == sorted(seen)
        assert seen[-1] == (9 * 48, 9 * 48)
