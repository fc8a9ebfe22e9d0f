"""Training windows from an experience pool: w consecutive transitions with their return-to-go and timesteps.

Rewards are min-max normalised over the pool; the return-to-go of a transition is the (by default undiscounted) sum of the
normalised rewards from it to the end of its episode, divided by a scale. Source: NetLLM, `plm_special/data/dataset.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numba import njit

from netllm_lib.runs import give_back

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool


@dataclass(frozen=True)
class ReturnScale:
    """How a pool's rewards become return-to-go. A test must use the numbers of the training pool, so checkpoints hold them."""

    min_reward: float
    max_reward: float
    target_return: float  # largest return-to-go of the pool: what the policy is asked for at test
    max_timestep: int  # longest episode less one
    gamma: float = 1.0
    scale: float = 1000.0
    pool_hash: str = ""

    def normalise(self, rewards: np.ndarray) -> np.ndarray:
        """Rewards (any shape) clipped to the pool's range, as parts of a return-to-go: 0 … 1/scale."""
        clipped = np.clip(rewards, self.min_reward, self.max_reward)
        return (clipped - self.min_reward) / (self.max_reward - self.min_reward) / self.scale


@dataclass(frozen=True)
class WindowConfig:
    """Which windows are cut from a pool."""

    windows: Literal["episode", "stride", "upstream"] = "episode"
    """"episode": as few windows as cover each episode, spread evenly, so that every transition is in at least one;
    "stride": in each episode one window every `stride` steps, and one that ends with the episode;
    "upstream": one every min(stride or w, w) transitions of the concatenated pool, across episodes; what is left at the
    end of the pool is not used.
    With w of an episode's length, "episode" gives whole episodes; shorter episodes are padded and masked."""
    w: int = 20  # transitions in a window; the paper says 10, the original's code defaults to 20
    stride: int | None = None  # the original's sample_step; None: w


class Batch(NamedTuple):
    """Windows as the network takes them."""

    states: torch.Tensor  # float32 [batch, w, 6, 6]
    actions: torch.Tensor  # int64 [batch, w] levels
    returns: torch.Tensor  # float32 [batch, w]
    timesteps: torch.Tensor  # int64 [batch, w]
    mask: torch.Tensor | None  # bool [batch, w], False for padding; None when there is none

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Windows:
    """All windows of a pool; they share the pool's arrays, so many overlapping windows cost nothing.

    Only `batch` touches the states: those of a memory-mapped pool stay on disk until then.
    """

    states: np.ndarray  # float32 [transitions, 6, 6], the pool's own
    actions: torch.Tensor  # int64 [transitions]
    returns: torch.Tensor  # float32 [transitions]
    timesteps: torch.Tensor  # int64 [transitions]
    starts: np.ndarray  # int64 [windows] first transition
    lengths: np.ndarray  # int64 [windows] transitions that count, w unless the episode is shorter
    w: int
    scale: ReturnScale
    values: torch.Tensor | None = None  # float32 [transitions, 6] what each level was worth, if that is to be learnt
    weights: torch.Tensor | None = None  # float32 [transitions] how much each action counts; all the same if None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def labels(self) -> int:
        """Actions to predict in all windows; transitions in two windows count twice."""
        return int(self.lengths.sum())

    @property
    def crossing(self) -> np.ndarray:
        """Bool [windows]: does the window hold parts of two episodes."""
        episode = np.cumsum(self.timesteps.numpy() == 0)
        return episode[self.starts] != episode[self.starts + self.lengths - 1]

    def batch(self, numbers: np.ndarray | list[int]) -> Batch:
        """The windows with these numbers. Padding repeats the window's last transition."""
        index = self._index(numbers)
        mask = torch.from_numpy(np.arange(self.w) < self.lengths[numbers][:, None])
        states, rows = torch.from_numpy(self.states[index]), torch.from_numpy(index)
        give_back(self.states)  # a page of a mapped pool comes with a megabyte around it
        tensors = (states, self.actions[rows], self.returns[rows], self.timesteps[rows])
        return Batch(*tensors, mask=None if bool(mask.all()) else mask)

    def values_of(self, numbers: np.ndarray | list[int]) -> torch.Tensor | None:
        """Float32 [batch, w, 6]: the values of the windows' levels, None if there are none."""
        return None if self.values is None else self.values[torch.from_numpy(self._index(numbers))]

    def weights_of(self, numbers: np.ndarray | list[int]) -> torch.Tensor | None:
        """Float32 [batch, w]: how much the windows' actions count, None if all the same."""
        return None if self.weights is None else self.weights[torch.from_numpy(self._index(numbers))]

    def _index(self, numbers: np.ndarray | list[int]) -> np.ndarray:
        """[batch, w] transitions of the windows with these numbers."""
        last = self.lengths[numbers][:, None] - 1
        return self.starts[numbers][:, None] + np.minimum(np.arange(self.w), last)

    def __repr__(self) -> str:
        return f"Windows({len(self)} × {self.w} steps from {len(self.actions)} transitions, {self.labels} labels)"


def return_to_go(pool: ExperiencePool, gamma: float = 1.0, scale: float = 1000.0) -> tuple[np.ndarray, ReturnScale]:
    """Return-to-go float64 [T] of every transition and the pool's scale.

    Raises ValueError for an empty pool or one whose rewards are all equal.
    """
    rewards = np.asarray(pool.rewards, dtype=np.float64)
    if not len(rewards):
        raise ValueError("the pool is empty")
    lowest, highest = float(rewards.min()), float(rewards.max())
    if not lowest < highest:
        raise ValueError(f"all rewards of the pool are {lowest}: there is no range to normalise them by")
    normalised = (rewards - lowest) / (highest - lowest)
    ends = _episode_ends(pool)
    returns = np.empty_like(normalised)
    _sum_backwards(normalised, ends, gamma, scale, returns)
    longest = int(np.diff(np.r_[0, ends]).max())
    return returns, ReturnScale(lowest, highest, float(returns.max()), longest - 1, gamma, scale, pool.content_hash())


@njit(cache=True)
def _sum_backwards(rewards: np.ndarray, ends: np.ndarray, gamma: float, scale: float, returns: np.ndarray) -> None:
    start = 0
    for end in ends:
        running = 0.0
        for step in range(end - 1, start - 1, -1):
            running = rewards[step] + gamma * running
            returns[step] = running / scale
        start = end


def make_windows(
    pool: ExperiencePool,
    config: WindowConfig | None = None,
    gamma: float = 1.0,
    scale: float = 1000.0,
    like: ReturnScale | None = None,
) -> Windows:
    """Cut a pool into windows.

    `like` normalises with another pool's scale, as a validation pool must be. Raises ValueError when no window fits.
    """
    config = config or WindowConfig()
    if config.w < 1 or (config.stride is not None and config.stride < 1):
        raise ValueError(f"w={config.w}, stride={config.stride}: both must be at least 1")
    returns, own = return_to_go(pool, like.gamma if like else gamma, like.scale if like else scale)
    if like is not None:
        spread = (own.max_reward - own.min_reward) / (like.max_reward - like.min_reward)
        offset = (own.min_reward - like.min_reward) / (like.max_reward - like.min_reward)
        returns = returns * spread + offset * _discounted_steps(pool, like.gamma) / like.scale
    ends = _episode_ends(pool)
    begins = np.r_[0, ends[:-1]]
    timesteps = np.arange(len(returns)) - np.repeat(begins, ends - begins)
    starts, lengths = _cut(config, begins, ends)
    return Windows(
        states=pool.states,
        actions=torch.from_numpy(pool.actions.astype(np.int64)),
        returns=torch.from_numpy(returns.astype(np.float32)),
        timesteps=torch.from_numpy(timesteps.astype(np.int64)),
        starts=starts,
        lengths=lengths,
        w=config.w,
        scale=like or own,
    )


def _cut(config: WindowConfig, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, stride = config.w, config.stride or config.w
    if config.windows == "upstream":
        starts = np.arange(0, ends[-1] - w + 1, min(stride, w))
        if not len(starts):
            raise ValueError(f"the pool has {ends[-1]} transitions, fewer than one window of {w}")
        return starts.astype(np.int64), np.full(len(starts), w, dtype=np.int64)
    if config.windows not in ("episode", "stride"):
        raise ValueError(f'windows={config.windows!r}: use "episode", "stride" or "upstream"')
    starts_of: list[np.ndarray] = []
    for length in np.unique(ends - begins):
        last = max(0, length - w)  # offset of the window that ends with the episode
        if config.windows == "episode":
            offsets = np.rint(np.linspace(0, last, -(-int(length) // w)))
        else:
            offsets = np.unique(np.r_[np.arange(0, last + 1, stride), last])
        starts_of.append((begins[ends - begins == length][:, None] + offsets.astype(np.int64)).ravel())
    starts = np.sort(np.concatenate(starts_of))
    end_of = ends[np.searchsorted(ends, starts, side="right")]
    return starts, np.minimum(w, end_of - starts).astype(np.int64)


def _episode_ends(pool: ExperiencePool) -> np.ndarray:
    """One past the last transition of every episode; transitions after the last `done` are an episode too."""
    ends = np.flatnonzero(np.asarray(pool.dones)) + 1
    total = len(pool.rewards)
    return ends if len(ends) and ends[-1] == total else np.r_[ends, total]


def _discounted_steps(pool: ExperiencePool, gamma: float) -> np.ndarray:
    """Float64 [T]: sum of gamma^i over the steps from each transition to the end of its episode."""
    ends = _episode_ends(pool)
    left = np.repeat(ends, np.diff(np.r_[0, ends])) - np.arange(len(pool.rewards))
    return left.astype(np.float64) if gamma == 1 else (1 - gamma**left) / (1 - gamma)
