"""Experience pools: generation, kills, and files, sound, damaged and hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netllm_lib.abr.episodes import Observation, sound_episodes
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.pool import (
    ExperiencePool,
    PoolError,
    concatenate,
    generate_mix,
    generate_pool,
    load_pool,
)
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.upstream.pickles import write_pool

TRACES, VIDEO = generate_traces("t", 3, 8), generate_video("v", 1)
EPISODES = sound_episodes(TRACES, seed=2)
NAMES = ["actions.npy", "config.json", "dones.npy", "rewards.npy", "states.npy"]


@pytest.fixture(scope="module")
def pool() -> ExperiencePool:
    return generate_pool(BBA(), TRACES, VIDEO, EPISODES)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_transitions_are_state_action_reward(pool: ExperiencePool, tmp_path: Path) -> None:
    played = rollout(BBA(), Simulator(TRACES, VIDEO, EPISODES))
    np.testing.assert_array_equal(pool.states, played.states[:, :-1].reshape(-1, 6, 6))
    np.testing.assert_array_equal(pool.actions, played.level[:, 1:].ravel())
    np.testing.assert_array_equal(pool.rewards, played.reward[:, 1:].ravel())
    assert np.flatnonzero(pool.dones).tolist() == [46, 93, 140]
    going_on = replace(pool, dones=pool.dones & (np.arange(141) < 140))  # an original's can end within an episode
    for one in (pool, going_on, load_pool(write_pool(going_on, tmp_path / "exp_pool.pkl"))):
        assert (one.episode_starts.tolist(), one.episode_lengths.tolist()) == ([0, 47, 94], [47] * 3)
    np.testing.assert_allclose(pool.episode_returns(), played.reward[:, 1:].sum(axis=1))


def test_seeds_work_and_mixes_keep_their_sources(pool: ExperiencePool) -> None:
    again, other = (generate_pool(BBA(), TRACES, VIDEO, sound_episodes(TRACES, seed=seed)) for seed in (2, 3))
    assert again.content_hash() == pool.content_hash() != other.content_hash()
    mix = concatenate([pool, generate_pool(Random(), TRACES, VIDEO, EPISODES)])
    assert (mix.source["policies"], len(mix.episode_starts)) == (["bba", "random"], 6)
    with pytest.raises(PoolError, match="no episodes"):
        generate_pool(BBA(), TRACES, VIDEO, EPISODES.rows([]))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("states", lambda a: np.where(np.arange(141)[:, None, None] == 5, np.float32(np.nan), a), "transition 5 has"),
        ("rewards", lambda a: np.where(np.arange(141) == 7, np.nan, a), r"transition 7 .* not finite \(1 such"),
        ("actions", lambda a: np.where(np.arange(141) > 138, 6, a), r"transition 139 has a level .* \(2 such"),
        ("actions", lambda a: a - 1, "transition 0 has a level outside"),
        ("states", lambda a: a.astype(np.float64), "float64"),
        ("states", lambda a: a[:, :5], "shape"),
        ("rewards", lambda a: a[:-1], "shape"),
    ],
)
def test_broken_pools_are_refused(pool: ExperiencePool, field: str, change: Any, message: str) -> None:
    with pytest.raises(PoolError, match=message):
        replace(pool, **{field: change(getattr(pool, field))})


# --- blocks, kills, other policies --------------------------------------------------------------------------------------

MIX = [(BBA(), EPISODES), (Random(), EPISODES), (RobustMPC(VIDEO), EPISODES)]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_change_nothing(tmp_path: Path, block: int) -> None:
    singles = concatenate([generate_pool(policy, TRACES, VIDEO, episodes) for policy, episodes in MIX])
    seen: list[tuple[int, int]] = []
    in_memory = generate_mix(MIX, TRACES, VIDEO, progress=lambda *at: seen.append(at), block=block)
    on_disk = generate_mix(MIX, TRACES, VIDEO, path=tmp_path / "pool", block=block)
    assert singles.content_hash() == in_memory.content_hash() == on_disk.content_hash()
    assert singles.source == in_memory.source == on_disk.source
    assert seen[-1] == (9 * 48, 9 * 48)
    assert seen == sorted(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    assert sorted(content(tmp_path / "pool")) == NAMES
    assert not on_disk.states.flags.writeable
    saved = content(in_memory.save(tmp_path / "saved"))
    assert all(saved[name] == data for name, data in content(tmp_path / "pool").items() if name != "config.json")


class Interrupted(BBA):
    """BBA until a certain number of decisions is asked for."""

    decisions = 0

    def __init__(self, most: int = 10**9, carries_state: bool = False):
        self.most, self.carries_state = most, carries_state

    def act(self, observation: Observation) -> np.ndarray:
        self.decisions += len(observation.episode)
        if self.decisions > self.most:
            raise KeyboardInterrupt
        return super().act(observation)


NINE = sound_episodes(TRACES, seed=2, repeats=3)


def interrupted(path: Path, carries_state: bool = False) -> None:
    """Three blocks of five are done."""
    with pytest.raises(KeyboardInterrupt):
        generate_pool(Interrupted(47 * 7, carries_state), TRACES, VIDEO, NINE, path=path, block=2)
    assert [file.name for file in path.parent.iterdir()] == [f".{path.name}.generating"]


def generated(path: Path | None, policy: Policy | None = None) -> str:
    return generate_pool(policy or BBA(), TRACES, VIDEO, NINE, path=path, block=2).content_hash()


@pytest.mark.parametrize("carries_state", [False, True])
def test_generation_goes_on_where_it_was(tmp_path: Path, carries_state: bool) -> None:
    interrupted(path := tmp_path / "pool", carries_state)
    policy, again = (Interrupted(carries_state=carries_state) for _ in range(2))
    assert generated(path, policy) == generated(None)
    assert policy.decisions == 47 * (6 + 9 if carries_state else 9 - 4)  # the last block on disk is played again
    before = content(path)
    generated(path, again)
    assert again.decisions == 47 * (9 if carries_state else 1)
    assert content(path) == before


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "rewards.npy", 200),
        lambda folder: (folder / "dones.npy").unlink(),
        lambda folder: os.replace(folder.parent / "pipe", folder / "states.npy"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: flip(folder / "rewards.npy", 128 + 8 * 100),  # in the second block
        lambda folder: flip(folder / "states.npy", -1),
    ],
)
def test_damaged_blocks_are_played_again(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    interrupted(path := tmp_path / "pool")
    os.mkfifo(tmp_path / "pipe")
    damage(tmp_path / ".pool.generating")
    assert generated(path) == generated(None)
    flip(path / "states.npy", 200)  # a finished one, too
    assert generated(path) == generated(None)


def test_another_policy_of_the_same_name_starts_anew(tmp_path: Path) -> None:
    interrupted(path := tmp_path / "pool")
    other = Constant(3)
    other.name = "bba"
    for policy in (other, BBA(), other):  # against unfinished work, then against a finished pool
        assert generated(path, policy) == generated(None, policy)


# --- folders ------------------------------------------------------------------------------------------------------------


def test_round_trips(pool: ExperiencePool, tmp_path: Path) -> None:
    folder = pool.save(tmp_path / "run" / "pool")
    for path in (folder, folder.parent, write_pool(pool, tmp_path / "exp_pool.pkl")):
        assert load_pool(path).content_hash() == pool.content_hash()
    loaded = load_pool(folder)
    assert loaded.source == pool.source
    assert not loaded.states.flags.writeable
    assert loaded.states.ctypes.data % 64 == 0
    assert content(loaded.save(folder)) == content(pool.save(tmp_path / "again"))  # over the files that it is read from
    assert "mean reward" in repr(pool)
    assert "reward quantiles" in pool.describe()


def test_a_pool_replaces_nothing_but_a_pool(pool: ExperiencePool, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    for write in (pool.save, lambda path: generate_pool(BBA(), TRACES, VIDEO, EPISODES, path=path)):
        with pytest.raises(FileExistsError, match="it is there and is no pool"):
            write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path / "none.npz", tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileNotFoundError, match="no such experience pool"):
            load_pool(path)


def npy(shape: tuple[int, ...], dtype: str, data: bytes | None = None) -> bytes:
    """An array's file; without `data` all zero."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype})
    return stream.getvalue() + (bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize) if data is None else data)


class Call:
    """Pickles as a call."""

    def __reduce__(self) -> Any:
        return os.system, ("echo run > /dev/null",)


OURS = {
    "states": npy((2, 6, 6), "<f4"),
    "actions": npy((2,), "<i8"),
    "rewards": npy((2,), "<f8"),
    "dones": npy((2,), "|b1", b"\0\1"),
}
OBJECTS = io.BytesIO()
np.save(OBJECTS, np.array([Call()] * 2, dtype=object), allow_pickle=True)

HOSTILE: dict[str, dict[str, bytes]] = {
    "huge": {"states": npy((10**9, 6, 6), "<f4", b"")},
    "huger": {"actions": npy((10**12,), "<i8", b"\0\0")},
    "truncated": {"states": npy((2, 6, 6), "<f4", bytes(280))},
    "longer": {"states": npy((2, 6, 6), "<f4", bytes(300))},
    "objects": {"rewards": OBJECTS.getvalue()},
    "code": {"dones": b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os')}".ljust(128)},
    "brackets": {"dones": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535},
    "long header": {"dones": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"},
    "pickle": {"dones": pickle.dumps([True])},
    "integers": {"dones": npy((2,), "|i1")},
    "level 6": {"actions": npy((2,), "<i8", np.array([0, 6]).tobytes())},
    "fractions": {"actions": npy((2,), "<f4")},
    "nan": {"states": npy((2, 6, 6), "<f4", np.full(72, np.nan, "f4").tobytes())},
    "short": {"dones": npy((1,), "|b1", b"\1")},
    "empty": {"dones": b""},
}


def packed(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def assert_refused(path: Path, message: str = ".") -> None:
    """The one error of ours, which names the place, for little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(PoolError, match=message) as caught:
            load_pool(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_arrays_are_refused_in_both_formats(tmp_path: Path, kind: str) -> None:
    (tmp_path / "pool").mkdir()
    for name, data in (OURS | HOSTILE[kind]).items():
        (tmp_path / "pool" / f"{name}.npy").write_bytes(data)
    (tmp_path / "pool" / "config.json").write_text("{}")
    (tmp_path / "old.npz").write_bytes(packed(OURS | HOSTILE[kind]))
    for path in (tmp_path / "pool", tmp_path / "old.npz"):
        assert_refused(path)


@pytest.mark.parametrize(
    "text", ["[]", "{", "null", '{"source": 3}', "[" * 100_000, "\xff", '{"hash": "0"}', '{"hash": 9e999}']
)
def test_hostile_descriptions(tmp_path: Path, text: str) -> None:
    (tmp_path / "pool.npz").write_bytes(packed(OURS))
    folder = load_pool(tmp_path / "pool.npz").save(tmp_path / "folder")
    for described in (tmp_path / "pool.json", folder / "config.json"):
        described.write_bytes(text.encode("latin1"))
    for path in (tmp_path / "pool.npz", folder):
        with pytest.raises(ValueError, match=str(path.with_suffix(""))):
            load_pool(path)


def test_any_damage_is_noticed(pool: ExperiencePool, tmp_path: Path) -> None:
    """A bit that is turned, and a file that is cut: an error, never other numbers, never a killed interpreter."""
    folder, rng = pool.save(tmp_path / "pool"), random.Random(0)
    for name, whole in content(folder).items():
        for place in rng.sample(range(len(whole)), 20 if name != "config.json" else 0):
            flip(folder / name, place)
            with pytest.raises(PoolError, match=str(folder)):
                load_pool(folder)
            (folder / name).write_bytes(whole)
        for size in (0, 100, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:size])
            if name != "config.json" or size < len(whole) - 1:  # its last byte is the end of the line
                with pytest.raises(ValueError, match=str(folder)):
                    load_pool(folder)
        (folder / name).write_bytes(whole)
    assert load_pool(folder).content_hash() == pool.content_hash()


# --- files of earlier versions ------------------------------------------------------------------------------------------


def test_old_files_are_read(pool: ExperiencePool, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {name: getattr(pool, name) for name in OURS} | {"actions": pool.actions.astype(np.int8)}
    for save in (np.savez_compressed, np.savez):
        save(tmp_path / "pool.npz", **arrays)
        (tmp_path / "pool.json").write_text(json.dumps({"hash": pool.content_hash(), "source": pool.source}))
        for path in (tmp_path, tmp_path / "pool.npz"):
            assert load_pool(path).content_hash() == pool.content_hash()
            assert load_pool(path).source == pool.source


def test_zip_bombs(tmp_path: Path) -> None:
    """Zeros that unpack to a thousand times their size, or that say so, or in a form that unpacks without end."""
    path, count = tmp_path / "pool.npz", 600_000
    path.write_bytes(packed(OURS | {"states": npy((count, 6, 6), "<f4"), "actions": npy((count,), "|i1")}))
    assert_refused(path, "more than any pool")
    liar = bytearray(packed(OURS))
    where = liar.index(b"PK\x01\x02")
    liar[where + 24 : where + 28] = struct.pack("<I", 2**32 - 2)  # the directory's size of the first member
    path.write_bytes(liar)
    assert_refused(path, "more than any pool")
    for packing in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        path.write_bytes(packed(OURS, packing))
        assert_refused(path, "packed in an unknown way")
    path.write_bytes(packed(OURS))
    with zipfile.ZipFile(path, "a") as archive:  # what is not needed is not unpacked
        archive.writestr(zipfile.ZipInfo("about.json"), bytes(2**26), zipfile.ZIP_BZIP2)
    tracemalloc.start()
    assert len(load_pool(path)) == 2
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_mutated_archives(tmp_path: Path) -> None:
    rng, path, base = random.Random(3), tmp_path / "pool.npz", packed(OURS)
    read = 0
    for _ in range(400):
        data = bytearray(base)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            read += len(load_pool(path)) == 2
        except PoolError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
    assert 0 < read < 400
