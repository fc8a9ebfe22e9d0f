"""Experience pools: what a behaviour policy did, as the transitions that an offline-RL policy is trained on.

A pool on disk is a folder: one .npy file for each array, to be memory-mapped, and `config.json` (source, transitions, hash).
"""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
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
from netllm_lib.abr.upstream import pickles
from netllm_lib.arrays import array_hash, blocks
from netllm_lib.returns import episode_ends
from netllm_lib.runs import atomic_path, content_hash, lock, read_json, storage_errors, write_json

ARRAYS: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
    "states": (np.dtype(np.float32), (6, 6)),
    "actions": (np.dtype(np.int64), ()),
    "rewards": (np.dtype(np.float64), ()),
    "dones": (np.dtype(np.bool_), ()),
}
"""Number type and shape of a transition."""
CONFIG = "config.json"
BLOCK = 1024  # episodes that are played before they are written to disk: about 8 MB of a pool
PACKINGS, MAX_PACKING = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), 100
"""Of archives that are read. Pools were packed to an eighth or so; other ways of packing take the memory that a file asks for."""


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
        for name, (kind, shape) in ARRAYS.items():
            array, expected = getattr(self, name), (len(self), *shape)
            if array.shape != expected or array.dtype != kind:
                found = f"shape {array.shape} and type {array.dtype}"
                raise PoolError(f"pool: {name} has {found}, expected {expected} and {kind}")
        if len(self) == 0:
            raise PoolError("pool: it holds no transitions")
        for name, bad, what in (
            ("states", lambda states: ~np.isfinite(states).all(axis=(1, 2)), "a state that is not finite"),
            ("rewards", lambda rewards: ~np.isfinite(rewards), "a reward that is not finite"),
            ("actions", lambda levels: (levels < 0) | (levels >= LEVELS), f"a level outside 0..{LEVELS - 1}"),
        ):  # block by block, so that a mapped array stays on disk
            rows = np.concatenate([first + np.flatnonzero(bad(part)) for first, part in blocks(getattr(self, name))])
            if len(rows):
                raise PoolError(f"pool: transition {rows[0]} has {what} ({len(rows)} such transitions)")

    def __len__(self) -> int:
        return len(self.actions)

    def __repr__(self) -> str:
        counts = f"{len(self)} transitions, {len(self.episode_starts)} episodes"
        return f"ExperiencePool({counts}, states {self.states.shape}, mean reward {self.rewards.mean():.4f})"

    @property
    def episode_starts(self) -> np.ndarray:
        """[E] index of the first transition of each episode."""
        return episode_ends(self.dones) - self.episode_lengths

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

    def describe(self) -> str:
        """Shapes, histogram of levels, quantiles of rewards and returns, as text."""
        shares = np.bincount(self.actions, minlength=LEVELS) / len(self)
        levels = " ".join(f"{level}:{share:.1%}" for level, share in enumerate(shares))
        lines = [f"{self!r}\nepisode lengths     {self.episode_lengths.min()}..{self.episode_lengths.max()}"]
        means, quantiles = self.episode_returns() / self.episode_lengths, [0, 0.01, 0.25, 0.5, 0.75, 0.99, 1]
        for name, values in (("reward quantiles   ", self.rewards), ("episode mean reward", means)):
            pairs = zip(quantiles, np.quantile(values, quantiles), strict=True)
            lines += [" ".join([name, *(f"{share:.0%}: {value:.3f} " for share, value in pairs)])]
        return "\n".join([*lines, f"levels              {levels}\nsource              {self.source or 'unknown'}"])

    def save(self, folder: Path) -> Path:
        """Write the pool as `folder`, whole or not at all; a pool that is there is replaced.

        Raises FileExistsError for anything else that is there.
        """
        with atomic_path(_place(folder)) as aside:
            aside.mkdir()
            _write(aside, self, 0, len(self))
            write_json(aside / CONFIG, self._facts())
        return Path(folder)

    def _facts(self) -> dict[str, Any]:
        return {"transitions": len(self), "hash": self.content_hash(), "source": self.source}


# --- files --------------------------------------------------------------------------------------------------------------


def load_pool(path: Path) -> ExperiencePool:
    """A pool's folder, or a run folder with one in it; the arrays stay on disk and are read where they are used.

    An original's pickle (.pkl) and the `pool.npz` of earlier versions are read, too, into memory. Raises FileNotFoundError, or
    PoolError for anything that is not a sound pool; nothing in a file is executed, no size is believed that is not there.
    """
    path = next((inside for name in ("pool", "pool.npz") if (inside := Path(path) / name).exists()), Path(path))
    described = path / CONFIG if path.is_dir() else path.with_suffix(".json")
    if not (described if path.is_dir() else path).is_file():
        raise FileNotFoundError(f"{path}: no such experience pool")
    original = path.suffix == ".pkl" and not path.is_dir()
    about = {} if original or not described.is_file() else read_json(described)
    if not isinstance(about, dict) or not isinstance(source := about.get("source", {}), dict):
        raise PoolError(f"{described}: not the description of a pool; copy the pool again")
    try:
        if original:
            arrays, source = pickles.read_pool(path), {"file": path.name, "format": "original"}
        else:
            arrays = _mapped(path) if path.is_dir() else _unpacked(path)
        pool = ExperiencePool(**arrays, source=source)
    except Exception as error:  # whatever a broken file provokes is a broken file
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise PoolError(f"{path}: not a sound experience pool ({said})") from None
    if about.get("hash", digest := pool.content_hash()) != digest:
        raise PoolError(f"{path}: content does not match the hash in {described.name}; generate or copy the pool again")
    return pool


def _header(name: str, stream: IO[bytes], size_bytes: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and number type of an .npy file of that size, whose numbers come next in the stream."""
    if (version := np.lib.format.read_magic(stream)) != (1, 0):  # the only one whose header cannot be long
        raise ValueError(f"{name} has a header of version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1000)
    if fortran or dtype.hasobject or dtype.itemsize * math.prod(shape) != size_bytes - stream.tell():
        raise ValueError(f"{name}: shape {shape} and type {dtype} do not fit its {size_bytes} bytes")
    return shape, dtype


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder, as read-only maps of its files.

    A file that is cut is noticed here. One that another process cuts while it is mapped ends this process (SIGBUS): nobody may
    change a pool that is in use, and this library never does, it puts a new folder in its place.
    """
    arrays = {}
    for name in ARRAYS:
        if not (folder / f"{name}.npy").is_file():
            raise ValueError(f"{name}.npy is missing, or not a file")
        with open(folder / f"{name}.npy", "rb") as stream:
            shape, dtype = _header(name, stream, os.fstat(stream.fileno()).st_size)
            arrays[name] = np.asarray(np.memmap(stream, dtype, "r", stream.tell(), shape))
    return arrays


def _unpacked(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `pool.npz` of earlier versions. Every size is checked before memory is taken, checksums after."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.getinfo(f"{name}.npy") for name in ARRAYS}
        if sum(member.file_size for member in members.values()) > MAX_PACKING * path.stat().st_size:
            raise ValueError("it unpacks to more than any pool")
        for name, member in members.items():
            if member.compress_type not in PACKINGS:
                raise ValueError(f"{name} is packed in an unknown way")
            with archive.open(member) as stream:
                shape, dtype = _header(name, stream, member.file_size)
                arrays[name] = np.frombuffer(stream.read(), dtype).reshape(shape)
    if arrays["actions"].dtype.kind not in "iu":
        raise ValueError(f"actions of type {arrays['actions'].dtype}")
    return arrays | {"actions": arrays["actions"].astype(np.int64)}


def _place(folder: Path) -> Path:
    """`folder`, unless something lies there that a pool must not replace."""
    if Path(folder).exists() and not (Path(folder) / "states.npy").is_file():
        raise FileExistsError(f"{folder}: it is there and is no pool; name a folder that is not there yet")
    return Path(folder)


def _write(folder: Path, part: ExperiencePool, first: int, count: int) -> None:
    """Transitions `first` and following of a pool of `count` into its files, which have their full size from the start."""
    for name, (dtype, shape) in ARRAYS.items():
        path = folder / f"{name}.npy"
        if first == 0:
            np.lib.format.open_memmap(path, "w+", dtype, (count, *shape))
        with open(path, "r+b") as stream:  # not through the map: a full disk would kill the process
            _header(name, stream, path.stat().st_size)
            stream.seek(first * dtype.itemsize * math.prod(shape), os.SEEK_CUR)
            for _, rows in blocks(getattr(part, name)):
                stream.write(np.ascontiguousarray(rows).data)
            stream.flush()
            os.fsync(stream.fileno())


# --- generation ---------------------------------------------------------------------------------------------------------


def from_rollout(played: Rollout) -> ExperiencePool:
    """The transitions of a rollout."""
    levels, rewards = played.level[:, 1:].astype(np.int64), played.reward[:, 1:]
    dones = np.arange(1, CHUNKS) == np.full(levels.shape, CHUNKS - 1)
    return ExperiencePool(played.states[:, :-1].reshape(-1, 6, 6), levels.ravel(), rewards.ravel(), dones.ravel())


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
    progress: Progress | None = None,
    *,
    path: Path | None = None,
    block: int = BLOCK,
) -> ExperiencePool:
    """Play every behaviour policy's episodes and keep all transitions, one policy after the other.

    With `path`, the pool's folder, every block of `block` episodes goes to disk, so that no more than one is in memory. A
    generation that was killed goes on after its last block when it is called again with the same arguments, to the same bytes,
    and one that is finished is read back; both only if playing the last block again gives what is on disk, or it starts anew.
    A policy that carries state from trace to trace is played again from its first trace. Raises runs.Busy while another process
    writes the same pool.
    """
    described, drawn = [], []
    for policy, episodes in parts:
        known = {"episodes": len(episodes), "seed": episodes.seed, "fixed": episodes.fixed}
        named = {"traces": traces.name, "traces_hash": traces.content_hash, "video": video.name}
        described.append({"policies": [policy.name]} | named | known)
        arrays = (episodes.trace_index, episodes.start_ptr, episodes.noise, episodes.action_draws)
        drawn.append([array_hash(*(a for a in arrays if a is not None)), episodes.running_clock])
    if not sum(len(episodes) for _, episodes in parts):
        raise PoolError("pool: no episodes are to be played")
    source = _mixed(described)
    if path is None:
        return concatenate([part for _, part in _play(parts, traces, video, block, progress, 0)], source)
    key = content_hash([source, drawn, video.content_hash, block], 16)
    sizes = [min(block, len(episodes) - first) for _, episodes in parts for first in range(0, len(episodes), block)]
    ends = np.cumsum(sizes) * (CHUNKS - 1)
    path = _place(path)
    beside = path.with_name(f".{path.name}.generating")

    def blocks_from(first: int) -> Iterator[tuple[int, ExperiencePool]]:
        return _play(parts, traces, video, block, progress, first)

    def kept(folder: Path) -> list[str]:
        """Digests of the blocks in a folder; none if playing the last one again gives another."""
        there = _blocks_in(folder, key, ends)
        again = (part for number, part in blocks_from(len(there) - 1) if number == len(there) - 1)
        return there if there and next(again).content_hash() == there[-1] else []

    with lock(path), storage_errors(path.parent):
        if len(kept(path)) < len(ends):
            if not (there := kept(beside)):
                shutil.rmtree(beside, ignore_errors=True)
            for number, part in blocks_from(len(there)):
                if number >= len(there):  # others come where a policy that carries state begins from its first trace
                    beside.mkdir(exist_ok=True)
                    _write(beside, part, int(ends[number]) - len(part), int(ends[-1]))
                    there.append(part.content_hash())
                    write_json(beside / CONFIG, {"made_from": key, "blocks": there})
            facts = ExperiencePool(**_mapped(beside), source=source)._facts()
            write_json(beside / CONFIG, facts | {"made_from": key, "blocks": there})
            with atomic_path(path) as aside:
                os.replace(beside, aside)
        return load_pool(path)


def _play(
    parts: Sequence[tuple[Policy, Episodes]],
    traces: TraceSet,
    video: Video,
    block: int,
    progress: Progress | None,
    first: int,
) -> Iterator[tuple[int, ExperiencePool]]:
    """Blocks `first` and following with their numbers, counted through all policies.

    Where the policy of block `first` carries state, all of its blocks come.
    """
    number, before, total = 0, 0, sum(len(episodes) for _, episodes in parts) * CHUNKS
    for policy, episodes in parts:
        count = -(-len(episodes) // block)
        if first < number + count:
            skip = 0 if policy.carries_state else max(first - number, 0)
            report, simulator = progress and shifted(progress, before, total), Simulator(traces, video, episodes)
            played = rollout_blocks(policy, simulator, block, first=skip, progress=report)
            yield from enumerate(map(from_rollout, played), start=number + skip)
        number, before = number + count, before + len(episodes) * CHUNKS


def _blocks_in(folder: Path, key: str, ends: np.ndarray) -> list[str]:
    """Digests of the blocks of a pool, finished or not, that was made from what `key` stands for, up to the first damaged one."""
    try:
        about, arrays = read_json(folder / CONFIG), _mapped(folder)
        digests = about["blocks"] if about["made_from"] == key else []
    except (OSError, ValueError, LookupError, TypeError):
        return []
    for number, (first, end, digest) in enumerate(zip([0, *ends], ends, digests, strict=False)):
        if array_hash(*(array[first:end] for array in arrays.values())) != digest:
            return digests[:number]
    return digests
