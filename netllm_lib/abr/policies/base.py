"""What a policy is: one class, one `act`.

A policy chooses the bitrate level of the next chunk for N episodes at once. To write your own, subclass `Policy`:

    class Rate(Policy):
        name = "rate"

        def act(self, observation):
            mbps = observation.state[:, 2, -1] * 8  # last throughput
            return np.searchsorted([0.75, 1.2, 1.85, 2.85, 4.3], 0.8 * mbps)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from netllm_lib.abr.episodes import Episodes, Observation

if TYPE_CHECKING:
    from netllm_lib.abr.simulator import Simulator


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

    def play_through(self, simulator: Simulator) -> np.ndarray | None:
        """Levels [N, 48] of all the simulator's episodes at once, equal to those of `act`, if the policy has a quicker way."""
        return None

    def played(self, levels: np.ndarray) -> None:
        """Called after `act` with the levels [N] that are played, if not all are its own: for policies that remember them."""

    def extras(self) -> Mapping[str, np.ndarray]:
        """Further columns of the table for the decision just taken, each [N]; for example probabilities."""
        return {}

    def facts(self) -> Mapping[str, Any]:
        """What a test that is about this policy records of it besides its name: JSON types."""
        return {}
