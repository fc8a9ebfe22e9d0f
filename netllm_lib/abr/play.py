"""The one loop that plays videos: a policy chooses a level per chunk, the simulator says what that brought.

Baselines, pool generation, tests and diagnosis are all this loop with another policy or another way to keep the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from netllm_lib.abr.episodes import Episodes
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.simulator import Outcome, Simulator
from netllm_lib.abr.traces import CHUNKS

Progress = Callable[[int, int], None]  # (chunks played, chunks in all), over all episodes
FIRST_LEVEL = 0  # of every episode; chosen by the protocol, not by the policy


@dataclass(frozen=True)
class Rollout:
    """Everything that was played, as arrays with axes [episode, chunk]."""

    episodes: Episodes
    trace_names: list[str]
    level: np.ndarray
    bitrate_kbps: np.ndarray
    buffer_s: np.ndarray
    rebuffer_s: np.ndarray
    size_bytes: np.ndarray
    delay_ms: np.ndarray
    smoothness_mbps: np.ndarray
    reward: np.ndarray
    sleep_ms: np.ndarray
    residual_ms: np.ndarray
    states: np.ndarray | None = None  # [N, 48, 6, 6] float32: the state after each chunk, from which the next is chosen
    extras: dict[str, np.ndarray] = field(default_factory=dict)  # per decision; NaN for the first chunk

    def __len__(self) -> int:
        return len(self.episodes)

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
        """One row per episode × chunk. Columns: see docs/formats.md; policy extras come last."""
        rows, chunks = self.level.shape
        names = np.array(self.trace_names, dtype=object)[self.episodes.trace_index]
        repeat = pd.Series(names).groupby(names).cumcount().to_numpy()
        labels = np.where(repeat > 0, [f"{name}#{r}" for name, r in zip(names, repeat, strict=True)], names)
        columns = {
            "trace": np.repeat(labels, chunks),
            "chunk": np.tile(np.arange(chunks), rows),
            "level": self.level.ravel(),
            "bitrate_kbps": self.bitrate_kbps.ravel(),
            "buffer_s": self.buffer_s.ravel(),
            "rebuffer_s": self.rebuffer_s.ravel(),
            "size_bytes": self.size_bytes.ravel().astype(np.int64),
            "delay_ms": self.delay_ms.ravel(),
            "smoothness_mbps": self.smoothness_mbps.ravel(),
            "reward": self.reward.ravel(),
            "time_s": self.time_s.ravel(),
            "start_ptr": np.repeat(self.episodes.start_ptr, chunks),
            "trace_index": np.repeat(self.episodes.trace_index, chunks),
        }
        return pd.DataFrame(columns | {name: values.ravel() for name, values in self.extras.items()})


def rollout(
    policy: Policy,
    simulator: Simulator,
    *,
    block: int | None = None,
    keep_states: bool = False,
    progress: Progress | None = None,
) -> Rollout:
    """Play all episodes of the simulator with a policy.

    In lock-step, at most `block` episodes at once (None: the policy's own `block`, which for most is all of them); a policy that
    carries state from trace to trace is played one episode after the other and reset once. The result does not depend on
    the block: every random number belongs to an episode. `keep_states` keeps the states that decisions were made from (for pools).
    """
    policy.reset(simulator.episodes)
    tape = _Tape(len(simulator), keep_states)
    for rows in _in_turn(policy, len(simulator), block):
        _lockstep(policy, simulator.part(rows), tape, rows, progress)
    return tape.rollout(simulator)


def rollout_blocks(
    policy: Policy,
    simulator: Simulator,
    block: int,
    *,
    first: int = 0,
    keep_states: bool = False,
    progress: Progress | None = None,
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
        tape = _Tape(len(part), keep_states)
        report = None if progress is None else shifted(progress, start * CHUNKS, len(simulator) * CHUNKS)
        for rows in _in_turn(policy, len(part), None):
            _lockstep(policy, part.part(rows), tape, rows, report)
        yield tape.rollout(part)


def shifted(progress: Progress, earlier: int, total: int) -> Progress:
    """`progress` for a part of the work: `earlier` chunks were played before it, of `total`."""
    return lambda done, _: progress(earlier + done, total)


def play(
    policy: Policy, simulator: Simulator, *, block: int | None = None, progress: Progress | None = None
) -> pd.DataFrame:
    """`rollout` as a table: one row per episode × chunk (see `Rollout.table`)."""
    return rollout(policy, simulator, block=block, progress=progress).table()


def _in_turn(policy: Policy, episodes: int, block: int | None) -> Iterator[range]:
    """The rows that are played together, one group after the other."""
    size = 1 if policy.carries_state else block or policy.block or episodes
    if size < 1:
        raise ValueError(f"block={size}: at least one episode has to be played at once")
    for first in range(0, episodes, size):
        yield range(first, min(first + size, episodes))


class _Tape:
    """What is recorded while playing: arrays [episodes, chunks], filled group by group."""

    def __init__(self, episodes: int, keep_states: bool):
        self.shape = (episodes, CHUNKS)
        self.fields: dict[str, np.ndarray] = {}
        self.extras: dict[str, np.ndarray] = {}
        self.states = np.empty((*self.shape, 6, 6), dtype=np.float32) if keep_states else None

    def record(self, rows: slice, chunk: int, outcome: Outcome) -> None:
        for name in Outcome.__dataclass_fields__:
            values = getattr(outcome, name)
            if name not in self.fields:
                self.fields[name] = np.empty(self.shape, dtype=values.dtype)
            self.fields[name][rows, chunk] = values

    def rollout(self, simulator: Simulator) -> Rollout:
        return Rollout(
            simulator.episodes, simulator.traces.names, **self.fields, states=self.states, extras=self.extras
        )


def _lockstep(policy: Policy, simulator: Simulator, tape: _Tape, group: range, progress: Progress | None) -> None:
    """Play the simulator's episodes together and record them as the rows `group` of `tape`."""
    simulator.reset()
    rows = slice(group.start, group.stop)
    levels = np.full(len(simulator), FIRST_LEVEL)
    for chunk in range(CHUNKS):
        tape.record(rows, chunk, simulator.step(levels))
        observation = simulator.observe()
        if tape.states is not None:
            tape.states[rows, chunk] = observation.state
        if chunk + 1 < CHUNKS or policy.acts_after_last:
            levels = policy.act(observation)
        if chunk + 1 < CHUNKS:
            for name, values in policy.extras().items():
                tape.extras.setdefault(name, np.full(tape.shape, np.nan))[rows, chunk + 1] = values
        if progress:
            progress(group.start * CHUNKS + (chunk + 1) * len(group), tape.shape[0] * CHUNKS)
