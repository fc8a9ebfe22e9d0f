"""Experience pools: what a behaviour policy did, as the transitions that an offline-RL policy is trained on.

A pool on disk is a folder: one .npy file for each array, to be memory-mapped, and `config.json` (source, transitions, hash).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from netllm_lib.abr.episodes import Episodes, Progress
from netllm_lib.abr.play import Rollout, rollout_blocks, shifted
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import TraceSet, Video
from netllm_lib.arrays import array_hash, blocks
from netllm_lib.returns import episode_ends
from netllm_lib.runs import atomic_path, content_hash, flush, lock, read_json, storage_errors, write_json

ARRAYS: dict[str, tuple[type, tuple[int, ...]]] = {
    "states": (np.float32, (6, 6)),
    "actions": (np.int64, ()),
    "rewards": (np.float64, ()),
    "dones": (np.bool_, ()),
}
"""Number type and shape of a transition."""
Block = list[Any]  # of a generation: [end, digest] of its transitions, as JSON has it
CONFIG = "config.json"
BLOCK = 1024  # episodes that are played before they are written to disk: about 8 MB of a pool
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of archives that are read: other ways of packing take the memory that a file asks for."""
MAX_PACKING, SMALL_BYTES = 100, 2**26
"""Pools were packed to an eighth or so: an archive that unpacks to more than so many times its size must be small to be read."""


class PoolError(ValueError):
    """A pool that is broken, or that is not a pool at all. The message says where and what to do."""


@dataclass(frozen=True, eq=False)
class ExperiencePool:
    """Transitions of whole episodes, one after the other.

    An episode has 47 transitions: the first chunk, which no policy chooses, is dropped. A transition holds the state that
    the level was chosen from, the level, the reward that it brought, and whether the episode ended with it. The last one's may
    go on, as an original's can.
    """

    states: np.ndarray  # [T, 6, 6] float32
    actions: np.ndarray  # [T] int64, levels 0..5
    rewards: np.ndarray  # [T] float64
    dones: np.ndarray  # [T] bool
    source: dict[str, Any] = field(default_factory=dict)  # how it was made: policies, traces, video, seed

    def __post_init__(self) -> None:
        count = len(self.actions)
        for name, (kind, shape) in ARRAYS.items():
            array = getattr(self, name)
            if array.shape != (count, *shape) or array.dtype != kind:
                expected = f"{(count, *shape)} and {np.dtype(kind)}"
                raise PoolError(f"pool: {name} has shape {array.shape} and type {array.dtype}, expected {expected}")
        if count == 0:
            raise PoolError("pool: it holds no transitions")
        _refuse(self.states, lambda states: ~np.isfinite(states).all(axis=(1, 2)), "a state that is not finite")
        _refuse(self.rewards, lambda rewards: ~np.isfinite(rewards), "a reward that is not finite")
        _refuse(self.actions, lambda levels: (levels < 0) | (levels >= LEVELS), f"a level outside 0..{LEVELS - 1}")

    def __len__(self) -> int:
        return len(self.actions)

    def __repr__(self) -> str:
        return (
            f"ExperiencePool({len(self)} transitions, {len(self.episode_starts)} episodes, states {self.states.shape}, "
            f"mean reward {self.rewards.mean():.4f})"
        )

    @property
    def episode_starts(self) -> np.ndarray:
        """[E] index of the first transition of each episode."""
        return np.concatenate([[0], episode_ends(self.dones)[:-1]])

    @property
    def episode_lengths(self) -> np.ndarray:
        """[E] transitions per episode."""
        return np.diff(episode_ends(self.dones), prepend=0)

    def episode_returns(self) -> np.ndarray:
        """[E] sum of rewards per episode."""
        return np.add.reduceat(self.rewards, self.episode_starts)

    def content_hash(self) -> str:
        """Digest of the four arrays: the identity of the pool, whatever its folder is called."""
        return array_hash(self.states, self.actions, self.rewards, self.dones)

    def _facts(self) -> dict[str, Any]:
        return {"transitions": len(self), "hash": self.content_hash(), "source": self.source}

    def describe(self) -> str:
        """Shapes, histogram of levels, quantiles of rewards and returns, as text."""
        histogram = np.bincount(self.actions, minlength=LEVELS)
        shares = " ".join(f"{level}:{share:.1%}" for level, share in enumerate(histogram / len(self)))
        return "\n".join(
            [
                repr(self),
                f"episode lengths     {self.episode_lengths.min()}..{self.episode_lengths.max()}",
                f"levels              {shares}",
                f"reward quantiles    {_quantiles(self.rewards)}",
                f"episode mean reward {_quantiles(self.episode_returns() / self.episode_lengths)}",
                f"source              {self.source or 'unknown'}",
            ]
        )

    def save(self, folder: Path) -> Path:
        """Write the pool as `folder`, whole or not at all; a pool that is there is replaced.

        Raises FileExistsError for anything else that is there.
        """
        folder = _place(folder)
        with atomic_path(folder) as aside:
            aside.mkdir()
            _write(aside, self, 0, len(self))
            write_json(aside / CONFIG, self._facts())
        return folder


def _refuse(values: np.ndarray, bad: Callable[[np.ndarray], np.ndarray], what: str) -> None:
    """PoolError if any transition is bad; block by block, so that a mapped array stays on disk."""
    found = np.concatenate([first + np.flatnonzero(bad(part)) for first, part in blocks(values)])
    if len(found):
        raise PoolError(f"pool: transition {found[0]} has {what} ({len(found)} such transitions)")


def _quantiles(values: np.ndarray) -> str:
    shares = [0, 0.01, 0.25, 0.5, 0.75, 0.99, 1]
    return "  ".join(f"{q:.0%}: {value:.3f}" for q, value in zip(shares, np.quantile(values, shares), strict=True))


# --- files --------------------------------------------------------------------------------------------------------------


def load_pool(path: Path) -> ExperiencePool:
    """A pool's folder, or a run folder with one in it; the arrays stay on disk and are read where they are used.

    An original's pickle (.pkl) and the `pool.npz` of earlier versions are read, too, into memory. Raises FileNotFoundError, or
    PoolError for anything that is not a sound pool; nothing in a file is executed, no size is believed that is not there.
    """
    path = next((inside for name in ("pool", "pool.npz") if (inside := Path(path) / name).exists()), Path(path))
    if path.suffix == ".pkl" and path.is_file():
        from netllm_lib.abr.upstream.pickles import read_pool

        return read_pool(path)
    described = path / CONFIG if path.is_dir() else path.with_suffix(".json")
    if not (described if path.is_dir() else path).is_file():
        raise FileNotFoundError(f"{path}: no such experience pool")
    about = read_json(described) if described.exists() else {}
    if not isinstance(about, dict) or not isinstance(source := about.get("source", {}), dict):
        raise PoolError(f"{described}: not the description of a pool; copy the pool again")
    try:
        arrays = _maps(path) if path.is_dir() else _unpacked(path)
        pool = ExperiencePool(**arrays, source=source)
    except PoolError as error:
        raise PoolError(f"{path}: {error}") from None
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise PoolError(f"{path}: not a pool saved by this library ({type(error).__name__}: {error})") from None
    if about.get("hash", digest := pool.content_hash()) != digest:
        raise PoolError(f"{path}: content does not match the hash in {described.name}; generate or copy the pool again")
    return pool


def _mapped(path: Path) -> np.memmap:
    """The array in an .npy file, as a read-only map of it."""
    with open(path, "rb") as stream:
        _check_version(path.name, stream)
    array: np.memmap = np.load(path, mmap_mode="r")
    if path.stat().st_size != array.offset + array.nbytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {array.offset + array.nbytes}")
    return array


def _maps(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(_mapped(folder / f"{name}.npy")) for name in ARRAYS}


def _check_version(name: str, stream: IO[bytes]) -> None:
    if (version := np.lib.format.read_magic(stream)) != (1, 0):  # the only one whose header cannot be long
        raise ValueError(f"{name} has a header of version {version}")


def _unpacked(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `pool.npz` of earlier versions. Every size is checked before memory is taken, checksums after."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.getinfo(f"{name}.npy") for name in ARRAYS}
        total, size = sum(member.file_size for member in members.values()), path.stat().st_size
        if total > max(MAX_PACKING * size, SMALL_BYTES):
            raise ValueError(f"{total} bytes packed into {size}, more than any pool")
        for name, member in members.items():
            if member.compress_type not in PACKINGS:
                raise ValueError(f"{name} is packed in an unknown way")
            with archive.open(member) as stream:
                _check_version(name, stream)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1000)
                data_bytes = member.file_size - stream.tell()
                if fortran or dtype.hasobject or dtype.itemsize * math.prod(shape) != data_bytes:
                    raise ValueError(f"{name}: shape {shape} and type {dtype} do not fit its {data_bytes} bytes")
                arrays[name] = np.frombuffer(stream.read(data_bytes), dtype).reshape(shape)
    if arrays["actions"].dtype.kind not in "iu":
        raise PoolError(f"pool: actions have type {arrays['actions'].dtype}, expected integers")
    return arrays | {"actions": arrays["actions"].astype(np.int64)}


def _place(folder: Path) -> Path:
    """`folder`, unless something lies there that a pool must not replace."""
    if Path(folder).exists() and not (Path(folder) / "states.npy").is_file():
        raise FileExistsError(f"{folder}: it is there and is no pool; name a folder that is not there yet")
    return Path(folder)


def _write(folder: Path, part: ExperiencePool, first: int, count: int) -> None:
    """Transitions `first` and following of a pool of `count` into its files, which have their full size from the start."""
    for name, (kind, shape) in ARRAYS.items():
        path = folder / f"{name}.npy"
        if first == 0:
            np.lib.format.open_memmap(path, "w+", np.dtype(kind), (count, *shape))
        array = _mapped(path)
        with open(path, "r+b") as stream:  # not through the map: a full disk would kill the process
            stream.seek(array.offset + first * array[:1].nbytes)
            for _, rows in blocks(getattr(part, name)):
                stream.write(np.ascontiguousarray(rows).data)
            stream.flush()
            os.fsync(stream.fileno())


# --- generation ---------------------------------------------------------------------------------------------------------


def from_rollout(played: Rollout) -> ExperiencePool:
    """The transitions of a rollout that kept its states."""
    if played.states is None:
        raise ValueError("the rollout kept no states: play it with keep_states=True")
    dones = np.zeros_like(played.level[:, 1:], dtype=bool)
    dones[:, -1] = True
    states, levels = played.states[:, :-1].reshape(-1, 6, 6), played.level[:, 1:].ravel().astype(np.int64)
    return ExperiencePool(states, levels, played.reward[:, 1:].ravel(), dones.ravel())


def concatenate(pools: Sequence[ExperiencePool], source: dict[str, Any] | None = None) -> ExperiencePool:
    """One pool of all episodes, in the given order; its source is `source`, or those of all pools."""
    arrays = {name: np.concatenate([getattr(pool, name) for pool in pools]) for name in ARRAYS}
    return ExperiencePool(**arrays, source=source or _mixed([pool.source for pool in pools]))


def _mixed(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(sources) == 1:
        return sources[0]
    policies = [policy for source in sources for policy in source.get("policies", ["unknown"])]
    return {"policies": policies, "mix": list(sources)}


def generate_pool(policy: Policy, traces: TraceSet, video: Video, episodes: Episodes, **options: Any) -> ExperiencePool:
    """Play `episodes` with a behaviour policy and keep the transitions; options are those of `generate_mix`."""
    return generate_mix([(policy, episodes)], traces, video, **options)


def generate_mix(
    parts: Sequence[tuple[Policy, Episodes]],
    traces: TraceSet,
    video: Video,
    source: dict[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    path: Path | None = None,
    block: int = BLOCK,
) -> ExperiencePool:
    """Play every behaviour policy's episodes and keep all transitions, one policy after the other; `source` adds to the pool's.

    With `path`, the pool's folder, every block of `block` episodes goes to disk, so that no more than one is in memory. A
    generation that was killed goes on after its last block when it is called again with the same arguments, to the same bytes,
    and one that is finished is read back; both only if playing the last block again gives what is on disk, or it starts anew.
    A policy that carries state from trace to trace is played again from its first trace. Raises runs.Busy while another process
    writes the same pool.
    """
    described = [
        {"policies": [policy.name], "traces": traces.name, "traces_hash": traces.content_hash, "video": video.name}
        | {"episodes": len(episodes), "seed": episodes.seed, "fixed": episodes.fixed}
        for policy, episodes in parts
    ]
    plan = _Plan(parts, traces, video, _mixed(described) | (source or {}), progress, block)
    if block < 1 or not plan.count:
        raise PoolError(f"{plan.count} episodes are to be played, {block} at once: at least one is needed")
    if path is None:
        return concatenate([part for _, part in plan.play([])], plan.source)
    path = _place(path)
    with lock(path), storage_errors(path.parent):
        return _generate_on_disk(plan, path)


class _AnotherPool(Exception):
    """What is on disk is not what the policies play."""


@dataclass(frozen=True)
class _Plan:
    """What is to be played, in blocks of episodes that are counted through all policies."""

    parts: Sequence[tuple[Policy, Episodes]]
    traces: TraceSet
    video: Video
    source: dict[str, Any]
    progress: Progress | None
    block: int

    @property
    def count(self) -> int:
        """Episodes of all policies."""
        return sum(len(episodes) for _, episodes in self.parts)

    def key(self) -> str:
        """Digest of everything that is known without playing."""
        parts = []
        for policy, episodes in self.parts:
            noise = np.zeros(0) if episodes.noise is None else episodes.noise
            drawn = array_hash(episodes.trace_index, episodes.start_ptr, noise, episodes.action_draws)
            parts.append([policy.name, drawn, episodes.seed, episodes.fixed, episodes.running_clock])
        return content_hash([parts, self.traces.content_hash, self.video.content_hash, self.block, self.source], 16)

    def play(self, there: list[Block]) -> Iterator[tuple[Block, ExperiencePool]]:
        """The blocks that come after those that are `there`.

        Of these the last one is played again, or all of its policy if that carries state. Raises _AnotherPool if one differs.
        """
        first_block = first_episode = 0
        for policy, episodes in self.parts:
            again = max(len(there) - 1 - first_block, 0)
            if again * self.block < len(episodes):
                skip = 0 if policy.carries_state else again
                report = self.progress and shifted(self.progress, first_episode * CHUNKS, self.count * CHUNKS)
                simulator = Simulator(self.traces, self.video, episodes)
                played = rollout_blocks(policy, simulator, self.block, first=skip, keep_states=True, progress=report)
                end = (first_episode + skip * self.block) * (CHUNKS - 1)
                for number, part in enumerate(map(from_rollout, played), start=first_block + skip):
                    end += len(part)
                    made = [end, part.content_hash()]
                    if number >= len(there):
                        yield made, part
                    elif made != there[number]:
                        raise _AnotherPool
            first_block, first_episode = first_block - (-len(episodes) // self.block), first_episode + len(episodes)


def _generate_on_disk(plan: _Plan, path: Path) -> ExperiencePool:
    """The pool in `path`, made in a folder beside it; `config.json` in both lists the blocks, to go on after them."""
    key, count, beside = plan.key(), plan.count * (CHUNKS - 1), path.with_name(f".{path.name}.generating")
    with contextlib.suppress(_AnotherPool):
        there = _blocks_in(path, key)
        if there and there[-1][0] == count:
            list(plan.play(there))
            return load_pool(path)
    beside.mkdir(exist_ok=True)
    for there in (_blocks_in(beside, key), []):
        with contextlib.suppress(_AnotherPool):
            for made, part in plan.play(there):
                _write(beside, part, made[0] - len(part), count)
                there.append(made)
                write_json(beside / CONFIG, {"made_from": key, "blocks": there})
            break
    pool = ExperiencePool(**_maps(beside), source=plan.source)
    write_json(beside / CONFIG, pool._facts() | {"made_from": key, "blocks": there})
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(beside, path)  # killed before this, the next call finds the whole pool beside
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    return load_pool(path)


def _blocks_in(folder: Path, key: str) -> list[Block]:
    """The blocks of a pool, finished or not, that was made from what `key` stands for, up to the first damaged one."""
    about = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    first, made = 0, about["blocks"] if about.get("made_from") == key else []
    try:
        arrays = _maps(folder) if made else {}
    except (OSError, ValueError):
        return []
    for number, (end, digest) in enumerate(made):
        if array_hash(*(array[first:end] for array in arrays.values())) != digest:
            return made[:number]
        first = end
    return made
