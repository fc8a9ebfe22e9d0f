"""The one loop that plays videos: a policy chooses a level per chunk, the simulator says what that brought.

Baselines, pool generation, tests and diagnosis are all this loop with another policy or another way to keep the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes, Progress
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Outcome, Simulator


@dataclass(frozen=True)
class Rollout(Outcome):
    """Everything that was played, as arrays [episode, chunk]."""

    simulator: Simulator
    extras: dict[str, np.ndarray]  # what the policy adds, per decision; NaN for the first chunk

    def __len__(self) -> int:
        return len(self.level)

    @property
    def episodes(self) -> Episodes:
        """Those that were played."""
        return self.simulator.episodes

    @property
    def states(self) -> np.ndarray:
        """[N, 48, 6, 6] float32: the state after each chunk, from which the next is chosen."""
        return self.simulator.states(self)

    @property
    def time_s(self) -> np.ndarray:
        """Wall clock at the end of each chunk: downloads and waits since the episode began.

        Under the original's protocol the clock runs on over all episodes and counts only the reported part of each wait.
        """
        if not self.episodes.running_clock:
            return np.cumsum(self.delay_ms + self.sleep_ms, axis=1) / 1000
        ticks = np.stack([self.delay_ms, self.residual_ms], axis=-1)
        return np.cumsum(ticks.ravel()).reshape(ticks.shape)[..., 1] / 1000

    def table(self) -> pd.DataFrame:
        """One row per episode × chunk. Columns: see docs/formats.md; what the policy adds comes last."""
        rows, chunks = self.level.shape
        names = pd.Series([self.simulator.traces.names[index] for index in self.episodes.trace_index])
        labels = [
            f"{name}#{repeat}" if repeat else name
            for name, repeat in zip(names, names.groupby(names).cumcount(), strict=True)
        ]
        columns = {
            "trace": np.repeat(np.array(labels, dtype=object), chunks),
            "chunk": np.tile(np.arange(chunks), rows),
            **{name: getattr(self, name) for name in ("level", "bitrate_kbps", "buffer_s", "rebuffer_s")},
            "size_bytes": self.size_bytes.astype(np.int64),
            **{name: getattr(self, name) for name in ("delay_ms", "smoothness_mbps", "reward", "time_s")},
            **{name: np.repeat(getattr(self.episodes, name), chunks) for name in ("start_ptr", "trace_index")},
        }
        return pd.DataFrame({name: values.ravel() for name, values in (columns | self.extras).items()})


def play(policy: Policy, simulator: Simulator, **options: Any) -> pd.DataFrame:
    """`rollout` as a table: one row per episode × chunk (see `Rollout.table`). Options are those of `rollout`."""
    return rollout(policy, simulator, **options).table()


def rollout(
    policy: Policy, simulator: Simulator, *, block: int | None = None, progress: Progress | None = None
) -> Rollout:
    """Play all episodes of the simulator with a policy.

    In lock-step, at most `block` episodes at once (None: the policy's own `block`, which for most is all of them); a policy that
    carries state from trace to trace is played one episode after the other and reset once. The result does not depend on
    the block: every random number belongs to an episode. A part of a simulator is played with the random numbers that its
    episodes have in the whole.
    """
    policy.reset(simulator.whole)
    return _play(policy, simulator, block, progress)


def rollout_blocks(
    policy: Policy, simulator: Simulator, block: int, *, first: int = 0, progress: Progress | None = None
) -> Iterator[Rollout]:
    """`rollout` as a stream of its parts, `block` episodes each, so that no more than one of them is in memory.

    Within a part as many episodes are played at once as the policy's own `block` allows. `first` skips as many parts. A policy
    that carries state from trace to trace cannot skip: it raises ValueError.
    """
    if first and policy.carries_state:
        raise ValueError(f"{policy.name} carries state from trace to trace: it cannot begin at block {first}")
    policy.reset(simulator.episodes)
    for start in range(first * block, len(simulator), block):
        part = simulator.part(range(start, min(start + block, len(simulator))))
        yield _play(policy, part, None, progress and shifted(progress, start * CHUNKS, len(simulator) * CHUNKS))


def shifted(progress: Progress, earlier: int, total: int) -> Progress:
    """`progress` for a part of the work: `earlier` chunks were played before it, of `total`."""
    return lambda done, _: progress(earlier + done, total)


def _play(policy: Policy, simulator: Simulator, block: int | None, progress: Progress | None) -> Rollout:
    extras = dict[str, np.ndarray]()
    levels = policy.play_through(simulator)
    if levels is None:
        levels = _in_lock_step(policy, simulator, block, progress, extras)
    elif progress:
        progress(levels.size, levels.size)
    # the levels say everything else: the simulator brings the rest in one call
    return Rollout(**vars(simulator.replay(levels)), simulator=simulator, extras=extras)


def _in_lock_step(
    policy: Policy,
    simulator: Simulator,
    block: int | None,
    progress: Progress | None,
    extras: dict[str, np.ndarray],
) -> np.ndarray:
    """The levels [N, 48] that `act` chooses; what the policy adds to the table goes to `extras`."""
    levels = np.full((len(simulator), CHUNKS), FIRST_LEVEL)
    size = 1 if policy.carries_state else block or policy.block or len(simulator)
    for first in range(0, len(simulator), size):
        rows = range(first, min(first + size, len(simulator)))
        together, wanted = simulator.part(rows), levels[rows, 0]
        for chunk in range(CHUNKS):
            together.step(wanted)
            levels[rows, chunk] = wanted
            if chunk + 1 < CHUNKS or policy.acts_after_last:
                wanted = policy.act(together.observe())
            if chunk + 1 < CHUNKS:
                for name, values in policy.extras().items():
                    extras.setdefault(name, np.full(levels.shape, np.nan))[rows, chunk + 1] = values
            if progress:
                progress(first * CHUNKS + (chunk + 1) * len(rows), levels.size)
    return levels
