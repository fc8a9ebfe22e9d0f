"""What a policy is: one class, one `act`.

A policy chooses the bitrate level of the next chunk for N episodes at once. To write your own, subclass `Policy`:

    class Rate(Policy):
        name = "rate"

        def act(self, observation):
            mbps = observation.state[:, 2, -1] * 8  # last throughput
            return np.searchsorted([0.75, 1.2, 1.85, 2.85, 4.3], 0.8 * mbps)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Episodes:
    """Which episodes are played, in playing order, and every random number that the protocol draws for them.

    Drawing ahead makes lock-step play and one-trace-at-a-time play see the same numbers.
    """

    trace_index: np.ndarray  # [N] index into TraceSet.traces
    start_ptr: np.ndarray  # [N] index of the first trace sample that is used, 1..len-1
    noise: np.ndarray | None  # [N, chunks] factor on every download delay; None: no noise
    action_draws: np.ndarray  # [N, chunks] integers 1..999, one per decision, for policies that sample as Pensieve does
    seed: int  # for policies that draw from a stream of their own
    fixed: bool  # fixed trace order and no noise
    running_clock: bool = False
    """time_s goes on over all episodes, as the original's does, and under-counts waits as it does."""

    def __len__(self) -> int:
        return len(self.trace_index)

    def rows(self, index: Sequence[int]) -> Episodes:
        """The episodes at `index`, in that order."""
        noise = None if self.noise is None else self.noise[index]
        return replace(
            self,
            trace_index=self.trace_index[index],
            start_ptr=self.start_ptr[index],
            noise=noise,
            action_draws=self.action_draws[index],
        )


@dataclass(frozen=True)
class Observation:
    """What a policy may know before it chooses the level of chunk `chunk`, for N episodes."""

    chunk: int  # index of the chunk to choose, 1..48; 48 only for policies with `acts_after_last`
    episode: np.ndarray  # [N] row in Episodes
    state: np.ndarray  # [N, 6, 6] float64, the Pensieve state: rows are features, the newest sample is the last column
    buffer_s: np.ndarray  # [N] seconds of video in the buffer
    last_level: np.ndarray  # [N] level of the chunk just downloaded
    last_reward: np.ndarray  # [N] its reward
    next_sizes_bytes: np.ndarray  # [N, 6] sizes of the chunk to choose, by level


class Policy:
    """Base class of everything that chooses levels."""

    name: str = "policy"
    carries_state: bool = False
    """True if it carries state from trace to trace: it is then played one trace after the other and reset only once."""
    draws_actions: bool = False
    """True if it takes one action draw of the protocol per decision (the Pensieve family does)."""
    acts_after_last: bool = False
    """True if it is also asked after the last chunk (chunk = 48), as the original's loops do; the answer is not played."""
    block: int | None = None
    """How many episodes are played at once, the next ones afterwards; None: all. Bounds the memory of large policies."""

    def reset(self, episodes: Episodes) -> None:
        """Called before the first chunk of all episodes."""

    def act(self, observation: Observation) -> np.ndarray:
        """Levels [N], integers 0..5.

        When episodes are played in blocks, N are those of one block and `observation.episode` says which; memory of earlier
        decisions begins anew at `observation.chunk` 1.
        """
        raise NotImplementedError

    def played(self, levels: np.ndarray) -> None:
        """Told after `act` which levels [N] were played, if they are not all its own: for policies that remember their actions."""

    def extras(self) -> Mapping[str, np.ndarray]:
        """Further columns of the table for the decision just taken, each [N]; for example probabilities."""
        return {}
