"""The one loop that plays videos: a policy chooses a level per chunk, the simulator says what that brought.

Baselines, pool generation, tests and diagnosis are all this loop with another policy or another way to keep the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from netllm_lib.abr.policies.base import Episodes, Policy
from netllm_lib.abr.simulator import Outcome, Simulator
from netllm_lib.abr.traces import CHUNKS

Progress = Callable[[int, int], None]  # (chunks played, chunks in all), of one lock-step or of all traces in turn
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
    policy: Policy, simulator: Simulator, *, keep_states: bool = False, progress: Progress | None = None
) -> Rollout:
    """Play all episodes of the simulator with a policy.

    In lock-step over all episodes; a policy that carries state from trace to trace is played one episode after the other
    and reset once. `keep_states` keeps the states that decisions were made from (for pools).
    """
    policy.reset(simulator.episodes)
    if policy.carries_state:
        count = len(simulator)
        parts = []
        for done, single in enumerate(simulator.each()):
            parts.append(_lockstep(policy, single, keep_states, None))
            if progress:
                progress((done + 1) * CHUNKS, count * CHUNKS)
    else:
        parts = [_lockstep(policy, simulator, keep_states, progress)]
    outcomes, states, extras = zip(*parts, strict=True)
    fields = {name: np.concatenate([part[name] for part in outcomes]) for name in outcomes[0]}
    return Rollout(
        simulator.episodes,
        simulator.traces.names,
        **fields,
        states=np.concatenate(states) if keep_states else None,
        extras={name: np.concatenate([part[name] for part in extras]) for name in extras[0]},
    )


def play(policy: Policy, simulator: Simulator, *, progress: Progress | None = None) -> pd.DataFrame:
    """`rollout` as a table: one row per episode × chunk (see `Rollout.table`)."""
    return rollout(policy, simulator, progress=progress).table()


def _lockstep(
    policy: Policy, simulator: Simulator, keep_states: bool, progress: Progress | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None, dict[str, np.ndarray]]:
    simulator.reset()
    rows = len(simulator)
    outcomes: list[Outcome] = []
    states = np.empty((rows, CHUNKS, 6, 6), dtype=np.float32) if keep_states else None
    extras: dict[str, np.ndarray] = {}
    levels = np.full(rows, FIRST_LEVEL)
    for chunk in range(CHUNKS):
        outcomes.append(simulator.step(levels))
        observation = simulator.observe()
        if states is not None:
            states[:, chunk] = observation.state
        if chunk + 1 < CHUNKS or policy.acts_after_last:
            levels = policy.act(observation)
        if chunk + 1 < CHUNKS:
            for name, values in policy.extras().items():
                extras.setdefault(name, np.full((rows, CHUNKS), np.nan))[:, chunk + 1] = values
        if progress:
            progress(chunk + 1, CHUNKS)
    fields = {name: np.stack([getattr(o, name) for o in outcomes], axis=1) for name in Outcome.__dataclass_fields__}
    return fields, states, extras
