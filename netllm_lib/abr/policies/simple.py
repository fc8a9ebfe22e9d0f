"""Reference policies (one constant level, random levels, given levels), and policies whose levels are partly replaced."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import CHUNKS, LEVELS


class Constant(Policy):
    """Always the same level."""

    def __init__(self, level: int):
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


class Prefixed(Policy):
    """Given levels [episodes, 48] up to a chunk, then another policy, which has seen everything since the episode began.

    `start` is the first chunk that the inner policy chooses, one for all episodes or [episodes]; from `CHUNKS` on it only watches.
    A given level of -1 leaves that chunk to it, too. What it would have chosen is in the extra column "wanted".
    """

    def __init__(self, policy: Policy, levels: np.ndarray, start: int | np.ndarray = CHUNKS):
        self.policy, self.name, self.block = policy, policy.name, policy.block
        self.carries_state, self.draws_actions = policy.carries_state, policy.draws_actions
        self.acts_after_last = policy.acts_after_last
        self.levels = np.where(np.arange(CHUNKS) < np.reshape(start, (-1, 1)), levels, -1)

    def reset(self, episodes: Episodes) -> None:
        if len(episodes) != len(self.levels):
            raise ValueError(f"levels of {len(self.levels)} episodes were given, {len(episodes)} are played")
        self.policy.reset(episodes)

    def act(self, observation: Observation) -> np.ndarray:
        self._wanted = self.policy.act(observation)
        if observation.chunk >= CHUNKS:  # after the last chunk nothing is played
            return self._wanted
        given = self.levels[observation.episode, observation.chunk]
        levels = np.where(given >= 0, given, self._wanted)
        self.policy.played(levels)
        return levels

    def played(self, levels: np.ndarray) -> None:
        self.policy.played(levels)

    def extras(self) -> Mapping[str, np.ndarray]:
        return {**self.policy.extras(), "wanted": self._wanted}


class Exploring(Prefixed):
    """Another policy, some of whose levels are replaced by uniformly random ones, to visit states that it would not.

    `share` is the probability of a random level, one for all episodes or [episodes]. Each episode has a stream of its own.
    """

    def __init__(self, policy: Policy, share: float | np.ndarray):
        super().__init__(policy, np.empty((0, CHUNKS)))
        self.name, self.share = f"{policy.name} exploring", np.reshape(share, (-1, 1))
        if ((self.share < 0) | (self.share > 1)).any():
            raise ValueError(f"the share of random levels must lie between 0 and 1, not {share}")

    def reset(self, episodes: Episodes) -> None:
        streams = [np.random.default_rng([episodes.seed, row, 1]) for row in range(len(episodes))]
        levels = np.array([stream.integers(0, LEVELS, CHUNKS) for stream in streams])
        chance = np.array([stream.random(CHUNKS) for stream in streams])
        self.levels = np.roll(np.where(chance < self.share, levels, -1), 1, axis=1)  # decision i is about chunk i + 1
        super().reset(episodes)
