"""Reference policies (one constant level, random levels, given levels), and policies whose levels are partly replaced."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.policies.base import Policy, Wrapper
from netllm_lib.abr.qoe import CHUNKS, LEVELS


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
    """Given levels [episodes, 48], for example the optimum's plans or a recorded run."""

    def __init__(self, levels: np.ndarray, name: str = "replay"):
        self.levels, self.name = np.asarray(levels), name

    def act(self, observation: Observation) -> np.ndarray:
        return self.levels[observation.episode, observation.chunk]


class Prefixed(Wrapper):
    """Given levels [episodes, 48] up to a chunk, then another policy, which has seen everything since the episode began.

    `start` is the first chunk that the inner policy chooses, one for all episodes or [episodes]; from `CHUNKS` on it only watches.
    A given level of -1 leaves that chunk to it, too. What it would have chosen is in the extra column "wanted".
    """

    def __init__(self, policy: Policy, levels: np.ndarray, start: int | np.ndarray):
        super().__init__(policy)
        self.levels = np.asarray(levels)
        self.start = np.broadcast_to(np.asarray(start), len(self.levels))

    def reset(self, episodes: Episodes) -> None:
        if len(episodes) != len(self.levels):
            raise ValueError(f"levels of {len(self.levels)} episodes were given, {len(episodes)} are played")
        super().reset(episodes)

    def act(self, observation: Observation) -> np.ndarray:
        rows, chunk = observation.episode, observation.chunk
        wanted = self.policy.act(observation)
        if chunk >= CHUNKS:  # after the last chunk nothing is played
            return wanted
        self._wanted, given = wanted, self.levels[rows, chunk]
        levels = np.where((chunk < self.start[rows]) & (given >= 0), given, wanted)
        self.policy.played(levels)
        return levels

    def extras(self) -> Mapping[str, np.ndarray]:
        return {**self.policy.extras(), "wanted": self._wanted}


class Exploring(Wrapper):
    """Another policy, some of whose levels are replaced by uniformly random ones, to visit states that it would not.

    `share` is the probability of a random level, one for all episodes or [episodes]. Each episode has a stream of its own.
    """

    def __init__(self, policy: Policy, share: float | np.ndarray):
        super().__init__(policy)
        self.name, self.share = f"{policy.name} exploring", np.asarray(share, dtype=float)
        if ((self.share < 0) | (self.share > 1)).any():
            raise ValueError(f"the share of random levels must lie between 0 and 1, not {share}")

    def reset(self, episodes: Episodes) -> None:
        super().reset(episodes)
        streams = [np.random.default_rng([episodes.seed, row, 1]) for row in range(len(episodes))]
        self._levels = np.array([stream.integers(0, LEVELS, CHUNKS) for stream in streams])
        chance = np.array([stream.random(CHUNKS) for stream in streams])
        self._random = chance < np.broadcast_to(self.share, len(episodes))[:, None]

    def act(self, observation: Observation) -> np.ndarray:
        rows, decision = observation.episode, observation.chunk - 1
        wanted = self.policy.act(observation)
        if observation.chunk >= CHUNKS:
            return wanted
        levels = np.where(self._random[rows, decision], self._levels[rows, decision], wanted)
        self.policy.played(levels)
        return levels
