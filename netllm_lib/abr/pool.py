"""Experience pools: what a behaviour policy did, as the transitions that an offline-RL policy is trained on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from netllm_lib import npz
from netllm_lib.abr.episodes import Episodes
from netllm_lib.abr.play import Progress, Rollout, rollout_blocks, shifted
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import CHUNKS, TraceSet, Video
from netllm_lib.runs import (
    array_hash,
    atomic_path,
    blocks,
    clean_up,
    content_hash,
    lock,
    plain,
    read_json,
    storage_errors,
    write_json,
)

KINDS: dict[str, tuple[type, tuple[int, ...]]] = {
    "states": (np.float32, (6, 6)),
    "actions": (np.int8, ()),
    "rewards": (np.float64, ()),
    "dones": (np.bool_, ()),
}
"""Number type and shape of a transition in files; in memory levels are int64."""
ARRAYS = tuple(KINDS)
BLOCK = 1024
"""Episodes that are played before they are written to disk: about 7 MB of a pool."""


class PoolError(ValueError):
    """A pool that is broken, or that is not a pool at all. The message says where and what to do."""


@dataclass(frozen=True, eq=False)
class ExperiencePool:
    """Transitions of whole episodes, one after the other.

    An episode has 47 transitions: the first chunk, which no policy chooses, is dropped. A transition holds the state that
    the level was chosen from, the level, the reward that it brought, and whether the episode ended with it.
    """

    states: np.ndarray  # [T, 6, 6] float32
    actions: np.ndarray  # [T] int64, levels 0..5
    rewards: np.ndarray  # [T] float64
    dones: np.ndarray  # [T] bool
    source: dict[str, Any] = field(default_factory=dict)  # how it was made: policies, traces, video, seed

    def __post_init__(self) -> None:
        count = len(self.actions)
        shapes = {"states": (count, 6, 6), "actions": (count,), "rewards": (count,), "dones": (count,)}
        kinds = {"states": np.float32, "actions": np.int64, "rewards": np.float64, "dones": np.bool_}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != kinds[name]:
                raise PoolError(
                    f"pool: {name} has shape {array.shape} and type {array.dtype}, expected {shape} {np.dtype(kinds[name])}"
                )
        if count == 0:
            raise PoolError("pool: it holds no transitions")
        if bad := _first_bad(self.states, lambda states: ~np.isfinite(states).all(axis=(1, 2))):
            raise PoolError(f"pool: transition {bad[0]} has a state that is not finite ({bad[1]} such transitions)")
        if bad := _first_bad(self.rewards, lambda rewards: ~np.isfinite(rewards)):
            raise PoolError(f"pool: transition {bad[0]} has a reward that is not finite ({bad[1]} such transitions)")
        if bad := _first_bad(self.actions, lambda levels: (levels < 0) | (levels >= LEVELS)):
            raise PoolError(f"pool: transition {bad[0]} has level {self.actions[bad[0]]}, outside 0..{LEVELS - 1}")
        if not self.dones[-1]:
            raise PoolError("pool: the last transition is not marked as the end of an episode (done)")

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
        return np.concatenate([[0], np.flatnonzero(self.dones)[:-1] + 1])

    @property
    def episode_lengths(self) -> np.ndarray:
        """[E] transitions per episode."""
        return np.diff(np.concatenate([self.episode_starts, [len(self)]]))

    def episode_returns(self) -> np.ndarray:
        """[E] sum of rewards per episode."""
        return np.add.reduceat(self.rewards, self.episode_starts)

    def content_hash(self) -> str:
        """Digest of the four arrays: the identity of the pool, whatever its file is called."""
        return array_hash(self.states, self.actions, self.rewards, self.dones)

    def describe(self) -> str:
        """Shapes, histogram of levels, quantiles of rewards and returns, as text."""
        histogram = np.bincount(self.actions, minlength=LEVELS)
        quantiles = [0, 0.01, 0.25, 0.5, 0.75, 0.99, 1]
        shares = " ".join(f"{level}:{share:.1%}" for level, share in enumerate(histogram / len(self)))
        return "\n".join(
            [
                repr(self),
                f"episode lengths     {self.episode_lengths.min()}..{self.episode_lengths.max()}",
                f"levels              {shares}",
                f"reward quantiles    {_quantiles(self.rewards, quantiles)}",
                f"episode mean reward {_quantiles(self.episode_returns() / self.episode_lengths, quantiles)}",
                f"source              {self.source or 'unknown'}",
            ]
        )

    def save(self, path: Path) -> Path:
        """Write `path` (.npz) and beside it `<stem>.json` with the source and the content hash; both atomically.

        The .npz is not packed, so that it can be memory-mapped, and holds the .json's content too.
        """
        return _save(self, Path(path).with_suffix(".npz"))


def _save(pool: ExperiencePool, path: Path, **about: Any) -> Path:
    about = {"hash": pool.content_hash(), "transitions": len(pool), "source": pool.source, **about}
    arrays = {name: getattr(pool, name) for name in ARRAYS} | {"actions": pool.actions.astype(np.int8)}
    with atomic_path(path) as aside:
        npz.write(aside, arrays, json.dumps(plain(about), indent=1, allow_nan=False) + "\n")
        path.with_suffix(".json").unlink(missing_ok=True)  # it describes the pool that is now replaced
    write_json(path.with_suffix(".json"), about)
    return path


def load_pool(path: Path, mmap: bool | None = None) -> ExperiencePool:
    """Read a pool saved by `ExperiencePool.save`, or the original's pickle (by its ending .pkl).

    With `mmap`, by default for pools above 32 MB, states and rewards stay on disk and are read when they are used; packed files
    (older ones) are unpacked into memory. Raises PoolError for anything that is not a sound pool; nothing in the file is
    executed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such experience pool")
    if path.suffix == ".pkl":
        from netllm_lib.abr.upstream.pickles import read_pool

        return read_pool(path)
    return _load(path, mmap)[0]


def _load(path: Path, mmap: bool | None) -> tuple[ExperiencePool, dict[str, Any]]:
    """A saved pool, and what its description says."""
    try:
        values, text = npz.read(path, ARRAYS, mmap)
        inside = json.loads(text) if text else {}
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise PoolError(f"{path}: not a pool saved by this library ({type(error).__name__}: {error})") from None
    beside = path.with_suffix(".json")
    described = [_description(path, inside)]
    if beside.exists():
        described.append(_description(beside, read_json(beside)))
    try:
        actions = _integers(values["actions"])
        source = described[-1].get("source", {})
        pool = ExperiencePool(values["states"], actions, values["rewards"], values["dones"], source)
    except PoolError as error:
        raise PoolError(f"{path}: {error}") from None
    digest = pool.content_hash()
    for about in described:
        if about.get("hash", digest) != digest:
            raise PoolError(
                f"{path}: content does not match the hash in {beside.name}; generate or copy the pool again"
            )
    return pool, described[-1]


def _description(path: Path, described: Any) -> dict[str, Any]:
    if not isinstance(described, dict) or not isinstance(described.get("source", {}), dict):
        raise PoolError(f"{path}: not the description of a pool; delete it or copy it again")
    return described


def from_rollout(played: Rollout, source: dict[str, Any] | None = None) -> ExperiencePool:
    """The transitions of a rollout that kept its states."""
    if played.states is None:
        raise ValueError("the rollout kept no states: play it with keep_states=True")
    episodes, chunks = played.level.shape
    dones = np.zeros((episodes, chunks - 1), dtype=bool)
    dones[:, -1] = True
    return ExperiencePool(
        states=played.states[:, :-1].reshape(-1, 6, 6),
        actions=played.level[:, 1:].ravel().astype(np.int64),
        rewards=played.reward[:, 1:].ravel(),
        dones=dones.ravel(),
        source=source or {},
    )


def generate_pool(
    policy: Policy,
    traces: TraceSet,
    video: Video,
    episodes: Episodes,
    source: dict[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    path: Path | None = None,
    block: int = BLOCK,
) -> ExperiencePool:
    """Play `episodes` with a behaviour policy and keep the transitions; see `generate_mix`."""
    return generate_mix([(policy, episodes)], traces, video, source, progress, path=path, block=block)


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

    In blocks of `block` episodes. With `path` every block goes to disk, into a folder beside the .npz to be, so that no more
    than one is in memory; the finished pool is memory-mapped if it is large. A generation that was killed goes on after its
    last block when it is called again with the same arguments, to the same bytes, and one that is finished is read back; both only
    if playing the last block again gives what is on disk, or it starts anew. A policy that carries state from trace
    to trace is played again from its first trace. Raises runs.Busy while another process writes the same pool.
    """
    described = [_described(policy, traces, video, episodes) for policy, episodes in parts]
    about = (described[0] if len(parts) == 1 else _mixed(described)) | (source or {})
    play = _Play(parts, traces, video, block, progress)
    if path is None or not play.transitions:
        return _in_memory(play, about)
    path = Path(path).with_suffix(".npz")
    with lock(path), storage_errors(path.parent):
        return _on_disk(play, about, path)


def _described(policy: Policy, traces: TraceSet, video: Video, episodes: Episodes) -> dict[str, Any]:
    return {
        "policies": [policy.name],
        "traces": traces.name,
        "traces_hash": traces.content_hash,
        "video": video.name,
        "episodes": len(episodes),
        "seed": episodes.seed,
        "fixed": episodes.fixed,
    }


def _mixed(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    policies = [policy for source in sources for policy in source.get("policies", ["unknown"])]
    return {"policies": policies, "mix": list(sources)}


class _Play:
    """The blocks of a generation, counted over all its policies."""

    def __init__(
        self,
        parts: Sequence[tuple[Policy, Episodes]],
        traces: TraceSet,
        video: Video,
        block: int,
        progress: Progress | None,
    ):
        if block < 1:
            raise ValueError(f"block={block}: at least one episode has to be played at once")
        self.parts, self.traces, self.video, self.block, self.progress = parts, traces, video, block, progress
        sizes = [min(block, len(e) - first) for _, e in parts for first in range(0, len(e), block)]
        self.ends = np.cumsum(sizes) * (CHUNKS - 1)  # [blocks] transitions in all blocks up to each one
        self.transitions = int(self.ends[-1]) if sizes else 0

    @property
    def key(self) -> str:
        """What is played, as far as it can be told without playing."""
        parts = [[policy.name, _numbers_of(episodes)] for policy, episodes in self.parts]
        return content_hash([parts, self.traces.content_hash, self.video.content_hash, self.block], digits=16)

    def start_before(self, done: int) -> int:
        """The block to begin with so that the last of `done` blocks is played again: that one, or its policy's first one."""
        first = 0
        for policy, episodes in self.parts:
            count = -(-len(episodes) // self.block)
            if done <= first + count:
                return first if policy.carries_state else max(done - 1, 0)
            first += count
        return first

    def blocks(self, first: int) -> Iterator[tuple[int, ExperiencePool]]:
        """(number, transitions) of the blocks from `first` on."""
        number = earlier = 0
        chunks = sum(len(episodes) for _, episodes in self.parts) * CHUNKS
        for policy, episodes in self.parts:
            count = -(-len(episodes) // self.block)
            if number + count > first:
                skip = max(first - number, 0)
                report = None if self.progress is None else shifted(self.progress, earlier, chunks)
                simulator = Simulator(self.traces, self.video, episodes)
                played = rollout_blocks(policy, simulator, self.block, first=skip, keep_states=True, progress=report)
                for offset, part in enumerate(played, start=number + skip):
                    yield offset, from_rollout(part)
            number += count
            earlier += len(episodes) * CHUNKS


def _numbers_of(episodes: Episodes) -> str:
    noise = np.zeros(0) if episodes.noise is None else episodes.noise
    numbers = array_hash(episodes.trace_index, episodes.start_ptr, noise, episodes.action_draws)
    return content_hash([numbers, episodes.seed, episodes.fixed, episodes.running_clock])


def _in_memory(play: _Play, source: dict[str, Any]) -> ExperiencePool:
    arrays: dict[str, np.ndarray] = {
        name: np.empty((play.transitions, *shape), np.int64 if name == "actions" else kind)
        for name, (kind, shape) in KINDS.items()
    }
    for number, part in play.blocks(0):
        rows = slice(play.ends[number] - len(part), play.ends[number])
        for name, values in arrays.items():
            values[rows] = getattr(part, name)
    return ExperiencePool(**arrays, source=source)


def _on_disk(play: _Play, source: dict[str, Any], path: Path) -> ExperiencePool:
    key = content_hash([play.key, source], digits=16)
    work = _Work(path.with_name(f".{path.name}.blocks"), key)
    finished = _finished(path, key)
    done = len(play.ends) if finished is not None else work.resume(play.ends)
    there = work.arrays() if finished is None else {name: getattr(finished, name) for name in ARRAYS}
    try:
        for number, part in play.blocks(play.start_before(done)):
            if number >= done:
                work.append(part, number + 1)
            elif not _same(part, there, play.ends[number] - len(part)):
                raise _AnotherPool
    except _AnotherPool:
        finished = None
        work.clear()
        for number, part in play.blocks(0):
            work.append(part, number + 1)
    if finished is None:
        _save(ExperiencePool(**work.arrays(), source=source), path, made_from=key)
    elif not path.with_suffix(".json").exists():  # killed between the two files
        _save(finished, path, made_from=key)
    work.clear()
    return load_pool(path)


class _AnotherPool(Exception):
    """What is on disk is not what the policies play."""


def _finished(path: Path, key: str) -> ExperiencePool | None:
    """The pool in `path` if it was generated from the same things, whole and sound."""
    if not path.exists():
        return None
    try:
        pool, about = _load(path, None)
    except PoolError:
        return None
    return pool if about.get("made_from") == key else None


def _same(part: ExperiencePool, there: dict[str, np.ndarray], first: int) -> bool:
    rows = slice(first, first + len(part))
    return all(np.array_equal(getattr(part, name), there[name][rows]) for name in ARRAYS)


class _Work:
    """A pool in the making: raw arrays in a folder, appended block by block; `progress.json` says how much of them counts."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.transitions = 0

    def resume(self, ends: np.ndarray) -> int:
        """How many blocks are there, whole; whatever belongs to another generation is removed."""
        progress = self.folder / "progress.json"
        clean_up(progress, alone=True)
        if progress.is_file():
            found = read_json(progress)
            done = found["blocks"] if found["key"] == self.key else 0
            self.transitions = int(ends[done - 1]) if done else 0
            if done and all(self._file(name).stat().st_size >= self._bytes(name) for name in KINDS):
                return done
        self.clear()
        return 0

    def append(self, part: ExperiencePool, blocks_done: int) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, (kind, _) in KINDS.items():
            with open(self._file(name), "r+b" if self._file(name).exists() else "w+b") as stream:
                stream.truncate(self._bytes(name))  # what a kill left of a block
                stream.seek(0, os.SEEK_END)
                stream.write(np.ascontiguousarray(getattr(part, name), kind).data)
                stream.flush()
                os.fsync(stream.fileno())
        write_json(self.folder / "progress.json", {"key": self.key, "blocks": blocks_done})
        self.transitions += len(part)

    def arrays(self) -> dict[str, np.ndarray]:
        """The transitions so far, as maps of the files; the levels in memory."""
        if not self.transitions:
            return {}
        arrays: dict[str, np.ndarray] = {
            name: np.memmap(self._file(name), kind, "r", shape=(self.transitions, *shape))
            for name, (kind, shape) in KINDS.items()
        }
        return arrays | {"actions": arrays["actions"].astype(np.int64)}

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.transitions = 0

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _bytes(self, name: str) -> int:
        kind, shape = KINDS[name]
        return self.transitions * np.dtype(kind).itemsize * int(np.prod(shape))


def concatenate(pools: Sequence[ExperiencePool]) -> ExperiencePool:
    """One pool of all episodes, in the given order."""
    if len(pools) == 1:
        return pools[0]
    arrays = {
        name: np.concatenate([getattr(pool, name) for pool in pools])
        for name in ("states", "actions", "rewards", "dones")
    }
    return ExperiencePool(**arrays, source=_mixed([pool.source for pool in pools]))


def _integers(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise PoolError(f"pool: actions have type {values.dtype}, expected integers")
    return values.astype(np.int64)


def _first_bad(values: np.ndarray, bad: Callable[[np.ndarray], np.ndarray]) -> tuple[int, int] | None:
    """(index of the first bad transition, how many), or None; block by block, so that a mapped array stays on disk."""
    first, count = -1, 0
    for start, part in blocks(values):
        if (found := bad(part)).any():
            first = start + int(found.argmax()) if count == 0 else first
            count += int(found.sum())
    return (first, count) if count else None


def _quantiles(values: np.ndarray, quantiles: Sequence[float]) -> str:
    return "  ".join(
        f"{q:.0%}: {value:.3f}" for q, value in zip(quantiles, np.quantile(values, quantiles), strict=True)
    )
