"""Experience pools: generation, files, and the original's pickles, sound and hostile."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netllm_lib.abr.episodes import Observation, sound_episodes
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.pool import (
    ExperiencePool,
    PoolError,
    concatenate,
    from_rollout,
    generate_mix,
    generate_pool,
    load_pool,
)
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.upstream.pickles import read_pool, write_pool
from pool_fixtures import GOOD, lists_of, upstream_pickle

TRACES, VIDEO = generate_traces("t", 3, 8), generate_video("v", 1)
EPISODES = sound_episodes(TRACES, seed=2)


@pytest.fixture(scope="module")
def pool() -> ExperiencePool:
    return generate_pool(BBA(), TRACES, VIDEO, EPISODES)


def test_transitions_are_state_action_reward(pool: ExperiencePool) -> None:
    played = rollout(BBA(), Simulator(TRACES, VIDEO, EPISODES), keep_states=True)
    assert len(pool) == 3 * 47
    assert pool.episode_starts.tolist() == [0, 47, 94]
    assert pool.episode_lengths.tolist() == [47] * 3
    assert played.states is not None
    for episode, step in ((0, 0), (1, 20), (2, 46)):
        row = 47 * episode + step
        np.testing.assert_array_equal(pool.states[row], played.states[episode, step])
        assert pool.actions[row] == played.level[episode, step + 1]
        assert pool.rewards[row] == played.reward[episode, step + 1]
        assert pool.dones[row] == (step == 46)
    np.testing.assert_allclose(pool.episode_returns(), played.reward[:, 1:].sum(axis=1))
    with pytest.raises(ValueError, match="keep_states"):
        from_rollout(rollout(BBA(), Simulator(TRACES, VIDEO, EPISODES)))


def test_seeds_work_and_mixes_keep_their_sources(pool: ExperiencePool) -> None:
    again = generate_pool(BBA(), TRACES, VIDEO, sound_episodes(TRACES, seed=2))
    other = generate_pool(BBA(), TRACES, VIDEO, sound_episodes(TRACES, seed=3))
    assert again.content_hash() == pool.content_hash() != other.content_hash()
    mix = concatenate([pool, generate_pool(Random(), TRACES, VIDEO, EPISODES)])
    assert mix.source["policies"] == ["bba", "random"]
    assert len(mix.episode_starts) == 6


def test_round_trips(pool: ExperiencePool, tmp_path: Path) -> None:
    path = pool.save(tmp_path / "pool.npz")
    loaded = load_pool(path)
    assert loaded.content_hash() == pool.content_hash()
    assert loaded.source == pool.source
    assert load_pool(write_pool(pool, tmp_path / "exp_pool.pkl")).content_hash() == pool.content_hash()
    assert "mean reward" in repr(pool)
    assert "reward quantiles" in pool.describe()


def test_changed_file_is_noticed(pool: ExperiencePool, tmp_path: Path) -> None:
    path = pool.save(tmp_path / "pool.npz")
    replace(pool, rewards=pool.rewards + 1).save(tmp_path / "other.npz")
    (tmp_path / "other.npz").rename(path)
    with pytest.raises(PoolError, match="does not match the hash"):
        load_pool(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PoolError, match="not a pool saved by this library"):
        load_pool(path)
    with pytest.raises(FileNotFoundError, match="no such experience pool"):
        load_pool(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "states",
            lambda a: np.where(np.arange(len(a))[:, None, None] == 5, np.nan, a).astype(np.float32),
            "transition 5 .* not finite",
        ),
        (
            "rewards",
            lambda a: np.where(np.arange(len(a)) == 7, np.inf, a),
            "transition 7 has a reward that is not finite",
        ),
        ("actions", lambda a: np.where(np.arange(len(a)) == 3, 6, a), "transition 3 has level 6"),
        ("actions", lambda a: np.where(np.arange(len(a)) == 3, -1, a), "transition 3 has level -1"),
        ("dones", lambda a: np.zeros_like(a), "not marked as the end"),
        ("states", lambda a: a.astype(np.float64), "float64"),
        ("states", lambda a: a[:, :5], "shape"),
        ("rewards", lambda a: a[:-1], "shape"),
    ],
)
def test_broken_pools_are_refused(pool: ExperiencePool, field: str, change, message: str) -> None:
    with pytest.raises(PoolError, match=message):
        replace(pool, **{field: change(getattr(pool, field))})


# --- hostile pickles ----------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class WithState:
    def __init__(self, target: str):
        self.target = target

    def __setstate__(self, state) -> None:
        os.mkdir(state["target"])


def nested(depth: int) -> bytes:
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["system", "eval", "nested", "setstate"])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, kind: str, protocol: int) -> None:
    target = tmp_path / "exploded"
    payload = {
        "system": Call(os.system, f"mkdir {target}"),
        "eval": Call(builtins.eval, f"__import__('os').mkdir({str(target)!r})"),
        "nested": Call(list, [Call(os.mkdir, str(target))]),
        "setstate": WithState(str(target)),
    }[kind]
    path = tmp_path / "exp_pool.pkl"
    path.write_bytes(pickle.dumps({"states": [payload]}, protocol=protocol))
    with pytest.raises(PoolError, match=str(path)):
        read_pool(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x80\x04\x8e" + struct.pack("<Q", 10 * 2**30) + b"x.",  # BINBYTES8 of 10 GB
        b"\x80\x04\x95" + struct.pack("<Q", 10 * 2**30) + b"].",  # a frame of 10 GB
        b"\x80\x04B" + struct.pack("<I", 2**31) + b"x.",
        b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo slot that would need 64 GB
        b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".",  # LONG4 of 2 GB
        nested(100_000),
        b"\x80\x04h\x05.",
        pickle.dumps([1, 2, 3]),
        pickle.dumps({"states": []}),
    ],
    ids=[
        "empty",
        "text",
        "lfs",
        "10GB",
        "10GB-frame",
        "2GB-bytes",
        "memo",
        "long4",
        "recursion",
        "unset memo",
        "list",
        "dict",
    ],
)
def test_broken_pickles_are_refused_quickly(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "exp_pool.pkl"
    path.write_bytes(data)
    with pytest.raises(PoolError, match=str(path)):
        read_pool(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"actions": [np.int64(0), np.int64(5)]}, None),
        ({"states": [np.zeros((6, 6))] * 2}, None),  # float64 states are rounded
        ({"rewards": [1, 2.5]}, None),
        ({"states": [np.zeros((6, 5), np.float32)] * 2}, r"state 0: shape \(6, 5\)"),
        ({"states": [np.zeros((6, 6), np.int64)] * 2}, "state 0: number type 'i8'"),
        ({"states": [np.full((6, 6), np.nan, np.float32)] * 2}, "not finite"),
        ({"states": [[0.0] * 36] * 2}, "state 0: not an array"),
        ({"states": [np.zeros((6, 6), object)] * 2}, "number type 'O8'"),
        ({"actions": [0, 6]}, "level 6"),
        ({"actions": [0, 1.5]}, "action 1: 1.5"),
        ({"actions": [0, True]}, "action 1: True"),
        ({"actions": [0]}, "different lengths"),
        ({"rewards": ["a", "b"]}, "reward 0"),
        ({"rewards": [float("nan"), 1.0]}, "not finite"),
        ({"dones": [False, False]}, "not marked as the end"),
        ({"dones": [0, 1]}, "done 0"),
        ({"dones": None}, "'dones' is missing"),
        ({name: [] for name in GOOD}, "no transitions"),
    ],
)
def test_pickled_values_are_checked(tmp_path: Path, changes: dict, message: str | None) -> None:
    path = tmp_path / "exp_pool.pkl"
    path.write_bytes(upstream_pickle(**(GOOD | changes)))
    if message is None:
        assert len(read_pool(path)) == 2
    else:
        with pytest.raises(PoolError, match=message):
            read_pool(path)


@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_numpy_is_read(pool: ExperiencePool, tmp_path: Path, protocol: int, numpy_1: bool) -> None:
    path = tmp_path / "exp_pool.pkl"
    path.write_bytes(data := upstream_pickle(protocol, numpy_1, **lists_of(pool)))
    assert (b"numpy.core" in data, b"numpy._core" in data) == (numpy_1, not numpy_1)
    assert read_pool(path).content_hash() == pool.content_hash()
    mixed = {"states": [np.asfortranarray(pool.states[0]), pool.states[1].astype(">f8")], "actions": [np.int8(1), 2**0]}
    path.write_bytes(upstream_pickle(protocol, numpy_1, **(GOOD | mixed)))
    read = read_pool(path)
    np.testing.assert_array_equal(read.states, pool.states[:2])
    assert read.actions.tolist() == [1, 1]


# --- large pools: blocks, maps, resuming --------------------------------------------------------------------------------


def test_saved_pools_are_mapped(pool: ExperiencePool, tmp_path: Path) -> None:
    path = pool.save(tmp_path / "pool.npz")
    mapped = load_pool(path, mmap=True)
    assert mapped.content_hash() == pool.content_hash()
    assert mapped.source == pool.source
    assert not mapped.states.flags.writeable
    assert mapped.states.flags.aligned
    assert mapped.states.ctypes.data % 64 == 0
    assert load_pool(path).states.flags.writeable  # a small one is in memory
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["states"], pool.states)
    assert pool.save(tmp_path / "again.npz").read_bytes() == path.read_bytes()
    assert mapped.save(tmp_path / "third.npz").read_bytes() == path.read_bytes()


def test_packed_pools_are_read(pool: ExperiencePool, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"states": pool.states, "actions": pool.actions.astype(np.int8), "rewards": pool.rewards}
    for save in (np.savez_compressed, np.savez):
        save(tmp_path / "pool.npz", **arrays, dones=pool.dones)
        for mmap in (None, False, True):
            assert load_pool(tmp_path / "pool.npz", mmap=mmap).content_hash() == pool.content_hash()


def test_damage_is_noticed_in_a_mapped_pool(pool: ExperiencePool, tmp_path: Path) -> None:
    path = pool.save(tmp_path / "pool.npz")
    path.with_suffix(".json").unlink()
    whole = path.read_bytes()
    assert load_pool(path, mmap=True).source == pool.source
    for place in np.random.default_rng(0).integers(0, len(whole) - 2000, 20):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            there = load_pool(path, mmap=True)
        except PoolError:
            continue
        assert there.content_hash() == pool.content_hash()  # the bit was one of the padding
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(PoolError, match="not a pool"):
            load_pool(path, mmap=True)


def test_validation_of_a_mapped_pool_counts_over_blocks(tmp_path: Path) -> None:
    count = 300_000  # 43 MB of states: several blocks
    states = np.zeros((count, 6, 6), np.float32)
    arrays: dict[str, Any] = {
        "actions": np.zeros(count, np.int8),
        "rewards": np.zeros(count),
        "dones": np.ones(count, bool),
    }
    states[[70_000, 250_000], 3, 2] = np.nan
    np.savez(tmp_path / "pool.npz", states=states, **arrays)
    with pytest.raises(PoolError, match=r"transition 70000 has a state that is not finite \(2 such"):
        load_pool(tmp_path / "pool.npz")
    states[:] = 0
    np.savez(tmp_path / "pool.npz", states=states, **arrays)
    assert not load_pool(tmp_path / "pool.npz").states.flags.writeable


MIX = [(BBA(), EPISODES), (Random(), EPISODES), (RobustMPC(VIDEO), EPISODES)]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_change_nothing(tmp_path: Path, block: int) -> None:
    singles = concatenate([generate_pool(policy, TRACES, VIDEO, episodes) for policy, episodes in MIX])
    seen: list[tuple[int, int]] = []
    in_memory = generate_mix(MIX, TRACES, VIDEO, progress=lambda *at: seen.append(at), block=block)
    on_disk = generate_mix(MIX, TRACES, VIDEO, path=tmp_path / "pool.npz", block=block)
    assert singles.content_hash() == in_memory.content_hash() == on_disk.content_hash()
    assert singles.source == in_memory.source == on_disk.source
    assert seen[-1] == (9 * 48, 9 * 48)
    assert seen == sorted(seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool.json", "pool.npz"]


class Interrupted(BBA):
    """BBA until a certain number of decisions is asked for."""

    decisions = 0

    def __init__(self, most: int, carries_state: bool = False):
        self.most, self.carries_state = most, carries_state

    def act(self, observation: Observation) -> np.ndarray:
        self.decisions += len(observation.episode)
        if self.decisions > self.most:
            raise KeyboardInterrupt
        return super().act(observation)


@pytest.mark.parametrize("carries_state", [False, True])
def test_generation_goes_on_where_it_was(tmp_path: Path, carries_state: bool) -> None:
    path, episodes = tmp_path / "pool.npz", sound_episodes(TRACES, seed=2, repeats=3)

    with pytest.raises(KeyboardInterrupt):  # three blocks of five are done
        generate_pool(Interrupted(47 * 7, carries_state), TRACES, VIDEO, episodes, path=path, block=2)
    assert [file.name for file in tmp_path.iterdir()] == [".pool.npz.blocks"]
    policy = Interrupted(10**9, carries_state)
    made = generate_pool(policy, TRACES, VIDEO, episodes, path=path, block=2)
    assert made.content_hash() == generate_pool(BBA(), TRACES, VIDEO, episodes).content_hash()
    assert policy.decisions == 47 * (9 if carries_state else 9 - 4)  # the last block on disk is played again
    before = path.read_bytes()
    again = Interrupted(10**9, carries_state)
    generate_pool(again, TRACES, VIDEO, episodes, path=path, block=2)
    assert again.decisions == 47 * (9 if carries_state else 1)
    assert path.read_bytes() == before


def test_another_policy_of_the_same_name_starts_anew(tmp_path: Path) -> None:
    path, episodes = tmp_path / "pool.npz", sound_episodes(TRACES, seed=2, repeats=2)
    with pytest.raises(KeyboardInterrupt):
        generate_pool(Interrupted(47 * 5), TRACES, VIDEO, episodes, path=path, block=2)
    other = Constant(3)
    other.name = "bba"
    expected = generate_pool(other, TRACES, VIDEO, episodes).content_hash()
    for _ in range(2):  # against unfinished work, then against a finished pool
        assert generate_pool(other, TRACES, VIDEO, episodes, path=path, block=2).content_hash() == expected
        generate_pool(BBA(), TRACES, VIDEO, episodes, path=path, block=2)
    assert load_pool(path).content_hash() == generate_pool(BBA(), TRACES, VIDEO, episodes).content_hash()


def test_a_lost_description_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "pool.npz"
    generate_pool(BBA(), TRACES, VIDEO, EPISODES, path=path)
    described = path.with_suffix(".json").read_text()
    path.with_suffix(".json").unlink()
    generate_pool(BBA(), TRACES, VIDEO, EPISODES, path=path)
    assert path.with_suffix(".json").read_text() == described
