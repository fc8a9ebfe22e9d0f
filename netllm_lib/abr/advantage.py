"""Advantage weights: of a pool of mixed quality, clone what went better than usual.

An action's advantage is what its episode earned over the next chunks, less what episodes earn on average from such a state, a
ridge regression over the whole pool. Cross-entropy weighted by exp(advantage / temperature) clones the good actions most
(advantage-weighted regression, Peng et al. 2019). Asking for a high return, as the original does, leaves it to the network to find
out which actions the returns come from; luck of the trace and skill look alike there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from netllm_lib.runs import blocks

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool

HORIZON = 8  # chunks; an episode's end is too far away to know which action it comes from
FEATURES = 73
FLOOR = -4.3  # reward of a chunk: a stall of a second, or longer; one outage must not be what the states are judged by
RIDGE = 1e-5
LARGEST = 20.0  # weight, before all are divided by their mean: one lucky action must not be the whole lesson


def advantages(pool: ExperiencePool, horizon: int = HORIZON) -> np.ndarray:
    """Float64 [T]: mean reward of the action and the `horizon - 1` after it in its episode, less that of such states.

    In reward units per chunk; near the end of an episode the mean is over the chunks that remain. Its own mean is zero.
    """
    earned = np.empty(len(pool))
    _mean_ahead(np.maximum(pool.rewards, FLOOR).astype(np.float64), np.asarray(pool.dones), horizon, earned)
    products, gains = np.zeros((FEATURES, FEATURES)), np.zeros(FEATURES)
    for first, states in blocks(pool.states):
        features = _features(states)
        products += features.T @ features
        gains += features.T @ earned[first : first + len(states)]
    weights = np.linalg.solve(products + RIDGE * len(pool) * np.eye(FEATURES), gains)
    for first, states in blocks(pool.states):
        earned[first : first + len(states)] -= _features(states) @ weights
    return earned - earned.mean()


def advantage_weights(pool: ExperiencePool, temperature: float, horizon: int = HORIZON) -> np.ndarray:
    """Float32 [T] of mean 1: exp(advantage / temperature), the temperature in standard deviations of the advantages."""
    gains = advantages(pool, horizon)
    raised = np.exp(np.minimum(gains / (temperature * gains.std()), np.log(LARGEST)))
    return (raised / raised.mean()).astype(np.float32)


def _features(states: np.ndarray) -> np.ndarray:
    """Float64 [T, 73]: one, the state's numbers (none is negative, all are of the order of one), and their square roots."""
    flat = states.reshape(len(states), -1).astype(np.float64)
    return np.concatenate([np.ones((len(flat), 1)), flat, np.sqrt(np.abs(flat))], axis=1)


@njit(cache=True)
def _mean_ahead(rewards: np.ndarray, dones: np.ndarray, horizon: int, out: np.ndarray) -> None:
    end = len(rewards)
    for step in range(len(rewards) - 1, -1, -1):
        if dones[step]:
            end = step + 1
        ahead = min(horizon, end - step)
        total = 0.0
        for i in range(step, step + ahead):
            total += rewards[i]
        out[step] = total / ahead
