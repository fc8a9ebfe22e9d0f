"""Reference policies: one constant level, and uniformly random levels."""

from __future__ import annotations

import numpy as np

from netllm_lib.abr.policies.base import Episodes, Observation, Policy
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.traces import CHUNKS


class Constant(Policy):
    """Always the same level."""

    def __init__(self, level: int):
        if level not in range(LEVELS):
            raise ValueError(f"level must lie in 0..{LEVELS - 1}, not {level}")
        self.level, self.name = level, f"constant-{level}"

    def act(self, observation: Observation) -> np.ndarray:
        return np.full(len(observation.episode), self.level)


class Random(Policy):
    """Uniformly random levels, from one seeded stream per episode."""

    name = "random"

    def reset(self, episodes: Episodes) -> None:
        streams = [np.random.default_rng([episodes.seed, row]) for row in range(len(episodes))]
        self._levels = np.array([stream.integers(0, LEVELS, CHUNKS) for stream in streams])

    def act(self, observation: Observation) -> np.ndarray:
        return self._levels[observation.episode, observation.chunk - 1]


class Replay(Policy):
    """Given levels [episodes, 48], for example an oracle's plan or a recorded run."""

    def __init__(self, levels: np.ndarray, name: str = "replay"):
        self.levels, self.name = np.asarray(levels), name

    def act(self, observation: Observation) -> np.ndarray:
        return self.levels[observation.episode, observation.chunk]
