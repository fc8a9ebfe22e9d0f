"""Which episodes are played, and the random numbers of the protocol: the original's, or seeded per trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from netllm_lib.abr.qoe import CHUNKS

if TYPE_CHECKING:
    from netllm_lib.abr.traces import TraceSet

UPSTREAM_ENVIRONMENT_SEED = 998244353
SEED = 100003  # of tests, unless another is asked for: the original's
NOISE_LOW, NOISE_HIGH = 0.9, 1.1
DRAWS = 1000  # action draws are integers 1..999
FIRST_LEVEL = 0  # of every episode; chosen by the protocol, not by the policy

Progress = Callable[[int, int], None]  # (done, in all), of chunks or of episodes


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
    """Time as the original counts it: the table's time_s goes on over all episodes and under-counts waits, and the clock of a trace
    that does not begin at 0 is taken as it is, though every later pass begins at 0."""

    def __len__(self) -> int:
        return len(self.trace_index)

    def rows(self, index: Sequence[int]) -> Episodes:
        """The episodes at `index`, in that order."""
        arrays: dict[str, Any] = {
            name: values[index] for name, values in vars(self).items() if isinstance(values, np.ndarray)
        }
        return replace(self, **arrays)


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


def sound_episodes(traces: TraceSet, *, seed: int = 0, repeats: int = 1, noise: bool = False) -> Episodes:
    """Every trace `repeats` times, each episode with its own random stream, so that adding traces changes nothing else.

    The first repeat starts at the pointer file's positions where there is one; all other starts are random.
    """
    count = len(traces)
    trace_index = np.tile(np.arange(count), repeats)
    start, draws = np.empty(len(trace_index), np.int64), np.empty((len(trace_index), CHUNKS), np.int64)
    factors = np.empty(draws.shape)
    for row, index in enumerate(trace_index):
        rng = np.random.default_rng([seed, row // count, index])
        start[row] = rng.integers(1, len(traces.traces[index].mbps))
        factors[row] = rng.uniform(NOISE_LOW, NOISE_HIGH, CHUNKS)
        draws[row] = rng.integers(1, DRAWS, CHUNKS)
    if traces.start_ptrs is not None:
        start[:count] = traces.start_ptrs
    return Episodes(trace_index, start, factors if noise else None, draws, seed=seed, fixed=not noise)


def upstream_episodes(
    traces: TraceSet,
    *,
    trace_num: int = 100,
    fixed_order: bool = False,
    seed: int = SEED,
    draws_actions: bool = False,
    pool: bool = False,
    clock: Literal["running", "episode"] = "running",
) -> Episodes:
    """The episodes of the original's evaluation, or with `pool=True` of its pool generation, with its random stream.

    The environment seeds NumPy's legacy generator, shuffles the traces (unless the order is fixed) and draws one start
    pointer per trace in playing order (unless there is a pointer file). An evaluation reseeds after that; pool generation
    seeds before, so its seed has no effect. Then, trace by trace and chunk by chunk: the noise (unless fixed), then one
    action draw for policies of the Pensieve family (`draws_actions`). `trace_num` -1 means all; an evaluation of all traces
    has a fixed order, pool generation only for -1. `clock="episode"` is for sound play: see `Episodes.running_clock`.
    """
    count = len(traces)
    if trace_num == -1:
        trace_num, fixed_order = count, True
    if not 1 <= trace_num <= count:
        raise ValueError(f"{traces.name} has {count} traces, {trace_num} were asked for (-1: all)")
    fixed = fixed_order or (trace_num == count and not pool)

    rng = np.random.RandomState(UPSTREAM_ENVIRONMENT_SEED)
    order = list(range(count))
    if not fixed:
        rng.shuffle(order)
    given = traces.start_ptrs
    start = [rng.randint(1, len(traces.traces[i].mbps)) if given is None else int(given[i]) for i in order]
    if not pool:
        rng = np.random.RandomState(seed)

    noise = np.ones((trace_num, CHUNKS))
    draws = np.zeros((trace_num, CHUNKS), dtype=np.int64)
    for chunk in np.ndindex(noise.shape):
        if not fixed:
            noise[chunk] = rng.uniform(NOISE_LOW, NOISE_HIGH)
        if draws_actions:
            draws[chunk] = rng.randint(1, DRAWS)
    index, pointers = np.array(order[:trace_num]), np.array(start[:trace_num])
    return Episodes(index, pointers, None if fixed else noise, draws, seed, fixed, running_clock=clock == "running")
