"""Training windows: what they cover, what they hold, and that they match the original's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Golden
from llm_fixtures import toy_pool
from netllm_lib.abr.batches import WindowConfig, Windows, make_windows
from netllm_lib.abr.pool import ExperiencePool, load_pool
from netllm_lib.returns import pool_returns
from netllm_lib.runs import read_json


def rewards_pool(*episodes: list[float]) -> ExperiencePool:
    rewards = np.array([r for episode in episodes for r in episode], dtype=np.float64)
    dones = np.zeros(len(rewards), dtype=bool)
    dones[np.cumsum([len(e) for e in episodes]) - 1] = True
    states = np.arange(len(rewards), dtype=np.float32)[:, None, None] * np.ones((1, 6, 6), np.float32)
    return ExperiencePool(states, np.arange(len(rewards)) % 6, rewards, dones)


def covered(windows: Windows) -> np.ndarray:
    """How many windows each transition is in."""
    counts = np.zeros(len(windows.actions), dtype=int)
    for start, length in zip(windows.starts, windows.lengths, strict=True):
        counts[start : start + length] += 1
    return counts


def test_return_to_go_by_hand() -> None:
    returns, scale = pool_returns(rewards_pool([-2.0, 2.0, 0.0], [2.0, -2.0]), scale=10)
    np.testing.assert_allclose(returns, np.array([0 + 1 + 0.5, 1.5, 0.5, 1.0, 0.0]) / 10)
    assert (scale.min_reward, scale.max_reward, scale.target_return, scale.max_timestep) == (-2, 2, 0.15, 2)
    discounted, _ = pool_returns(rewards_pool([-2.0, 2.0, 0.0]), gamma=0.5, scale=1)
    np.testing.assert_allclose(discounted, [0 + 0.5 * (1 + 0.5 * 0.5), 1.25, 0.5])
    with pytest.raises(ValueError, match="no range"):
        make_windows(rewards_pool([1.0, 1.0]))


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_return_to_go_equals_a_plain_loop_to_the_bit(gamma: float) -> None:
    rng = np.random.default_rng(3)
    pool = rewards_pool(*(rng.normal(size=length).tolist() for length in (47, 1, 30, 47, 300)))
    returns, scale = pool_returns(pool, gamma, scale=100)
    normalised = (pool.rewards - scale.min_reward) / (scale.max_reward - scale.min_reward)
    expected, running = np.empty(len(pool)), 0.0
    for step in reversed(range(len(pool))):
        running = normalised[step] + gamma * (0.0 if pool.dones[step] else running)
        expected[step] = running / 100
    np.testing.assert_array_equal(returns, expected)


@pytest.mark.parametrize("config", [WindowConfig(w=7), WindowConfig("stride", w=7, stride=3)])
def test_windows_of_uneven_episodes_are_those_of_each_episode(config: WindowConfig) -> None:
    lengths, expected = [9, 3, 20, 7, 9, 2, 20], []
    windows = make_windows(rewards_pool(*(np.arange(float(length)).tolist() for length in lengths)), config)
    for begin, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        alone = make_windows(rewards_pool(np.arange(float(length)).tolist()), config)
        expected += [(begin + start, min(7, length)) for start in alone.starts]
    assert list(zip(windows.starts, windows.lengths, strict=True)) == expected


def test_a_mapped_pool_gives_the_same_windows_and_stays_on_disk(tmp_path: Path) -> None:
    pool = toy_pool(5)
    mapped = load_pool(pool.save(tmp_path / "pool"))
    windows = make_windows(mapped)
    assert windows.states is mapped.states
    for ours, theirs in zip(windows.batch([0, 3, 9]), make_windows(pool).batch([0, 3, 9]), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert windows.scale == make_windows(pool).scale


def test_reward_in_a_test_is_clipped_to_the_pool() -> None:
    _, scale = pool_returns(rewards_pool([-2.0, 2.0]), scale=10)
    np.testing.assert_allclose(scale.normalise(np.array([-9.0, 0.0, 9.0])), [0, 0.05, 0.1])


@pytest.mark.parametrize("w", [1, 2, 7, 20, 24, 46, 47, 60])
def test_episode_windows_cover_every_transition_and_never_cross(w: int) -> None:
    windows = make_windows(toy_pool(3), WindowConfig(w=w))
    counts = covered(windows)
    assert counts.min() == 1
    assert counts.max() <= 2
    assert not windows.crossing.any()
    assert len(windows) == 3 * -(-47 // w)
    for number, length in enumerate(windows.lengths):
        assert bool((windows.batch([number]).timesteps[0, :length].diff() == 1).all())


def test_short_episodes_are_padded_and_masked() -> None:
    windows = make_windows(rewards_pool([0.0, 1.0, 2.0], [3.0, 1.0]), WindowConfig(w=3))
    assert windows.lengths.tolist() == [3, 2]
    assert windows.labels() == 5
    assert windows.batch([0]).mask is None
    batch = windows.batch([0, 1])
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.timesteps.tolist() == [[0, 1, 2], [0, 1, 1]]


def test_stride_windows() -> None:
    windows = make_windows(toy_pool(2), WindowConfig("stride", w=20, stride=10))
    assert windows.starts.tolist() == [0, 10, 20, 27, 47, 57, 67, 74]
    assert not windows.crossing.any()
    assert covered(windows).min() == 1


def test_upstream_windows() -> None:
    """range(0, N − w + 1, min(sample_step or w, w)) over the whole pool: some cross, the end is left over."""
    pool = toy_pool(3)  # 141 transitions
    windows = make_windows(pool, WindowConfig("upstream"))
    assert windows.starts.tolist() == [0, 20, 40, 60, 80, 100, 120]
    assert windows.crossing.tolist() == [False, False, True, False, True, False, False]
    assert make_windows(pool, WindowConfig("upstream", stride=50)).starts.tolist() == windows.starts.tolist()
    assert len(make_windows(pool, WindowConfig("upstream", stride=5))) == 25
    with pytest.raises(ValueError, match="fewer than one window"):
        make_windows(pool, WindowConfig("upstream", w=200))


def test_validation_pool_takes_the_training_scale() -> None:
    train, held = rewards_pool([-10.0, 0.0, 10.0]), rewards_pool([0.0, 5.0], [5.0, 0.0, 5.0])
    scale = make_windows(train, WindowConfig(w=2)).scale
    windows = make_windows(held, WindowConfig(w=2), like=scale)
    part = np.array([0.5, 0.75, 0.75, 0.5, 0.75]) / scale.scale
    expected = [part[0] + part[1], part[1], part[2] + part[3] + part[4], part[3] + part[4], part[4]]
    np.testing.assert_allclose(windows.returns.numpy(), expected, rtol=1e-6)
    assert windows.scale == scale


@pytest.mark.parametrize("change", [{"w": 0}, {"stride": 0}, {"windows": "other"}])
def test_impossible_windows(change: dict) -> None:
    with pytest.raises(ValueError, match=r"at least 1|use "):
        WindowConfig(**change)


@pytest.mark.golden
def test_windows_of_the_original(golden: Golden) -> None:
    pool = load_pool(golden("plm", "mpc100_exp_pool.pkl"))
    compared = 0
    for path in sorted(golden("plm").glob("*/forward_layer*.npz")):
        recorded, meta = np.load(path), read_json(path.parent / "meta.json")
        windows = make_windows(pool, WindowConfig.upstream(w=meta["w"], stride=1, scale=meta["scale"]))
        scale = windows.scale
        assert (scale.min_reward, scale.max_reward) == (meta["min_reward"], meta["max_reward"])
        assert (scale.target_return, scale.max_timestep) == (meta["target_return"], meta["max_timestep"])
        batch = windows.batch(recorded["window_index"])
        for ours, theirs in ((batch.states, "states"), (batch.actions, "labels"), (batch.timesteps, "timesteps")):
            np.testing.assert_array_equal(ours.numpy(), recorded[theirs])
        assert torch.equal(batch.returns.unsqueeze(-1), torch.from_numpy(recorded["returns"]))
        compared += 1
    assert compared
