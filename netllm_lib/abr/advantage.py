"""Advantage weights: of a pool of mixed quality, clone what went better than usual.

An action's advantage is what its episode earned over the next chunks, less what episodes earn on average from such a state, a
ridge regression over the whole pool. Cross-entropy weighted by exp(advantage / temperature) clones the good actions most
(advantage-weighted regression, Peng et al. 2019). Asking for a high return, as the original does, leaves it to the network to find
out which actions the returns come from; luck of the trace and skill look alike there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from netllm_lib.arrays import blocks
from netllm_lib.returns import episode_ends

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool

HORIZON = 8  # chunks; an episode's end is too far away to know which action it comes from
FLOOR = -4.3  # reward of a chunk: a stall of a second, or longer; one outage must not be what the states are judged by
RIDGE = 1e-5
FEATURES = 73  # one, the state's numbers (none is negative, all are of the order of one), and their square roots
LARGEST = 20.0  # the largest weight, before all are divided by their mean, so that no lucky action decides alone


def advantages(pool: ExperiencePool, horizon: int = HORIZON) -> np.ndarray:
    """Float64 [T]: mean reward of the action and the `horizon - 1` after it in its episode, less that of such states.

    In reward units per chunk; near the end of an episode the mean is over the chunks that remain. Its own mean is zero.
    """
    ends, steps = episode_ends(pool.dones), np.arange(len(pool))
    until = np.minimum(steps + horizon, np.repeat(ends, np.diff(ends, prepend=0)))
    sums = np.concatenate([[0.0], np.cumsum(np.maximum(pool.rewards, FLOOR), dtype=np.float64)])
    earned = (sums[until] - sums[:-1]) / (until - steps)
    products, gains = np.zeros((FEATURES, FEATURES)), np.zeros(FEATURES)
    for first, states in blocks(pool.states):
        features = _features(states)
        products += features.T @ features
        gains += features.T @ earned[first : first + len(states)]
    weights = np.linalg.solve(products + RIDGE * len(pool) * np.eye(FEATURES), gains)
    for first, states in blocks(pool.states):
        earned[first : first + len(states)] -= _features(states) @ weights
    return earned - earned.mean()


def advantage_weights(pool: ExperiencePool, temperature: float) -> np.ndarray:
    """Float32 [T] of mean 1: exp(advantage / temperature), the temperature in standard deviations of the advantages."""
    gains = advantages(pool)
    raised = np.exp(np.minimum(gains / (temperature * gains.std()), np.log(LARGEST)))
    return (raised / raised.mean()).astype(np.float32)


def _features(states: np.ndarray) -> np.ndarray:
    flat = states.reshape(len(states), -1).astype(np.float64)
    return np.concatenate([np.ones((len(flat), 1)), flat, np.sqrt(np.abs(flat))], axis=1)
