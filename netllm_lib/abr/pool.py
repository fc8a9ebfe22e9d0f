"""Experience pools: what a behaviour policy did, as the transitions that an offline-RL policy is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from netllm_lib.abr.play import Progress, Rollout, rollout
from netllm_lib.abr.policies.base import Episodes, Policy
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import TraceSet, Video
from netllm_lib.runs import array_hash, atomic_path, read_json, write_json


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
        if bad := _first(~np.isfinite(self.states).all(axis=(1, 2))):
            raise PoolError(f"pool: transition {bad[0]} has a state that is not finite ({bad[1]} such transitions)")
        if bad := _first(~np.isfinite(self.rewards)):
            raise PoolError(f"pool: transition {bad[0]} has a reward that is not finite ({bad[1]} such transitions)")
        if bad := _first((self.actions < 0) | (self.actions >= LEVELS)):
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
        """Write `path` (.npz) and beside it `<stem>.json` with the source and the content hash; both atomically."""
        path = Path(path).with_suffix(".npz")
        with atomic_path(path) as aside, open(aside, "wb") as stream:
            np.savez_compressed(
                stream, states=self.states, actions=self.actions.astype(np.int8), rewards=self.rewards, dones=self.dones
            )
        write_json(
            path.with_suffix(".json"), {"hash": self.content_hash(), "transitions": len(self), "source": self.source}
        )
        return path


def load_pool(path: Path) -> ExperiencePool:
    """Read a pool saved by `ExperiencePool.save`, or the original's pickle (by its ending .pkl).

    Raises PoolError for anything that is not a sound pool; nothing in the file is executed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such experience pool")
    if path.suffix == ".pkl":
        from netllm_lib.abr.upstream import read_pool

        return read_pool(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in ("states", "actions", "rewards", "dones")}
    except Exception as error:
        raise PoolError(f"{path}: not a pool saved by this library ({type(error).__name__}: {error})") from None
    manifest = path.with_suffix(".json")
    described = read_json(manifest) if manifest.exists() else {}
    try:
        actions = _integers(values["actions"])
        pool = ExperiencePool(
            values["states"], actions, values["rewards"], values["dones"], described.get("source", {})
        )
    except PoolError as error:
        raise PoolError(f"{path}: {error}") from None
    if "hash" in described and described["hash"] != pool.content_hash():
        raise PoolError(f"{path}: content does not match the hash in {manifest.name}; generate or copy the pool again")
    return pool


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
) -> ExperiencePool:
    """Play `episodes` with a behaviour policy and keep the transitions. Mix policies with `concatenate`."""
    played = rollout(policy, Simulator(traces, video, episodes), keep_states=True, progress=progress)
    described = {
        "policies": [policy.name],
        "traces": traces.name,
        "traces_hash": traces.content_hash,
        "video": video.name,
        "episodes": len(episodes),
        "seed": episodes.seed,
        "fixed": episodes.fixed,
    }
    return from_rollout(played, described | (source or {}))


def concatenate(pools: Sequence[ExperiencePool]) -> ExperiencePool:
    """One pool of all episodes, in the given order."""
    if len(pools) == 1:
        return pools[0]
    arrays = {
        name: np.concatenate([getattr(pool, name) for pool in pools])
        for name in ("states", "actions", "rewards", "dones")
    }
    return ExperiencePool(
        **arrays,
        source={
            "policies": [policy for pool in pools for policy in pool.source.get("policies", ["unknown"])],
            "mix": [pool.source for pool in pools],
        },
    )


def _integers(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise PoolError(f"pool: actions have type {values.dtype}, expected integers")
    return values.astype(np.int64)


def _first(bad: np.ndarray) -> tuple[int, int] | None:
    """(index of the first True, how many), or None."""
    return (int(bad.argmax()), int(bad.sum())) if bad.any() else None


def _quantiles(values: np.ndarray, quantiles: Sequence[float]) -> str:
    return "  ".join(
        f"{q:.0%}: {value:.3f}" for q, value in zip(quantiles, np.quantile(values, quantiles), strict=True)
    )
