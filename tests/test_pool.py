"""Experience pools: generation, files, and the original's pickles, sound and hostile."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.simple import Random
from netllm_lib.abr.pool import ExperiencePool, PoolError, concatenate, from_rollout, generate_pool, load_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.upstream import POOL_CLASS, read_pool, write_pool

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


def upstream_pickle(**lists) -> bytes:
    """A pickle of the original's class with any attributes."""
    import types

    module = types.ModuleType(POOL_CLASS[0])
    cls = type(POOL_CLASS[1], (), {"__module__": POOL_CLASS[0]})
    setattr(module, POOL_CLASS[1], cls)
    names = {"plm_special": types.ModuleType("plm_special"), "plm_special.data": types.ModuleType("plm_special.data")}
    sys.modules.update(names | {POOL_CLASS[0]: module})
    try:
        record = cls()
        record.__dict__.update(lists)
        return pickle.dumps(record)
    finally:
        for name in [*names, POOL_CLASS[0]]:
            del sys.modules[name]


GOOD = {
    "states": [np.zeros((6, 6), np.float32)] * 2,
    "actions": [0, 1],
    "rewards": [np.float64(1), np.float64(2)],
    "dones": [False, True],
}


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
        ({"states": [np.zeros((6, 6), object)] * 2}, "state 0"),
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


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_pools_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    original = bytearray(upstream_pickle(**GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.pkl"
    path.write_bytes(
        bytes(original[: data.draw(st.integers(0, len(original)))]) if data.draw(st.booleans()) else bytes(original)
    )
    try:
        pool = read_pool(path)
    except PoolError:
        return
    assert len(pool) == 2
