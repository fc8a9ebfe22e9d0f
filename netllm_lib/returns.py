"""Return-to-go: what a decision transformer is asked for.

Rewards are min-max normalised over the pool; the return-to-go of a transition is the (by default undiscounted) sum of the
normalised rewards from it to the end of its episode, divided by a scale. Source: NetLLM, `plm_special/data/dataset.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit


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


def pool_returns(
    pool: Any, gamma: float = 1.0, scale: float = 1000.0, like: ReturnScale | None = None
) -> tuple[np.ndarray, ReturnScale]:
    """Return-to-go float64 [T] of a pool's transitions, and its scale; or `like`, another pool's, whose range rewards may leave.

    A pool has `rewards`, `dones` and `content_hash()`. Raises ValueError if it is empty or all its rewards are equal.
    """
    rewards, ends = np.asarray(pool.rewards, dtype=np.float64), episode_ends(pool.dones)
    if like is not None:
        normalised = (rewards - like.min_reward) / (like.max_reward - like.min_reward)
        return _sum_backwards(normalised, ends, like.gamma, like.scale), like
    if not len(rewards):
        raise ValueError("the pool is empty")
    lowest, highest = float(rewards.min()), float(rewards.max())
    if not lowest < highest:
        raise ValueError(f"all rewards of the pool are {lowest}: there is no range to normalise them by")
    returns = _sum_backwards((rewards - lowest) / (highest - lowest), ends, gamma, scale)
    longest = int(np.diff(ends, prepend=0).max())
    return returns, ReturnScale(lowest, highest, float(returns.max()), longest - 1, gamma, scale, pool.content_hash())


def episode_ends(dones: np.ndarray) -> np.ndarray:
    """One past the last transition of every episode; transitions after the last `done` are an episode too."""
    ends, total = np.flatnonzero(np.asarray(dones)) + 1, len(dones)
    return ends if len(ends) and ends[-1] == total else np.r_[ends, total]


@njit(cache=True)
def _sum_backwards(rewards: np.ndarray, ends: np.ndarray, gamma: float, scale: float) -> np.ndarray:
    returns, start = np.empty_like(rewards), 0
    for end in ends:
        running = 0.0
        for step in range(end - 1, start - 1, -1):
            running = rewards[step] + gamma * running
            returns[step] = running / scale
        start = end
    return returns
