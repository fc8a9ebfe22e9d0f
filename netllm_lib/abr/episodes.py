"""Which episodes are played, and the random numbers of the protocol: the original's, or seeded per trace."""

from __future__ import annotations

from typing import Literal

import numpy as np

from netllm_lib.abr.policies.base import Episodes
from netllm_lib.abr.traces import CHUNKS, TraceSet

UPSTREAM_ENVIRONMENT_SEED = 998244353
NOISE_LOW, NOISE_HIGH = 0.9, 1.1
DRAWS = 1000  # action draws are integers 1..999


def sound_episodes(traces: TraceSet, *, seed: int = 0, repeats: int = 1, noise: bool = False) -> Episodes:
    """Every trace `repeats` times, each episode with its own random stream, so that adding traces changes nothing else.

    The first repeat starts at the pointer file's positions where there is one; all other starts are random.
    """
    count = len(traces)
    start = np.empty(repeats * count, dtype=np.int64)
    noises = np.empty((repeats * count, CHUNKS)) if noise else None
    draws = np.empty((repeats * count, CHUNKS), dtype=np.int64)
    for row in range(repeats * count):
        repeat, index = divmod(row, count)
        rng = np.random.default_rng([seed, repeat, index])
        fixed = traces.start_ptrs[index] if traces.start_ptrs is not None and repeat == 0 else None
        pointer = int(rng.integers(1, len(traces.traces[index].mbps)))
        start[row] = pointer if fixed is None else int(fixed)
        noise_of_episode = rng.uniform(NOISE_LOW, NOISE_HIGH, CHUNKS)
        if noises is not None:
            noises[row] = noise_of_episode
        draws[row] = rng.integers(1, DRAWS, CHUNKS)
    return Episodes(
        trace_index=np.tile(np.arange(count), repeats),
        start_ptr=start,
        noise=noises,
        action_draws=draws,
        seed=seed,
        fixed=not noise,
    )


def upstream_episodes(
    traces: TraceSet,
    *,
    trace_num: int = 100,
    fixed_order: bool = False,
    seed: int = 100003,
    draws_actions: bool = False,
    pool: bool = False,
    clock: Literal["running", "episode"] = "running",
) -> Episodes:
    """The episodes of the original's evaluation, or with `pool=True` of its pool generation, with its random stream.

    The environment seeds NumPy's legacy generator, shuffles the traces (unless the order is fixed) and draws one start
    pointer per trace in playing order (unless there is a pointer file). An evaluation reseeds after that; pool generation
    seeds before, so its seed has no effect. Then, trace by trace and chunk by chunk: the noise (unless fixed), then one
    action draw for policies of the Pensieve family (`draws_actions`). `trace_num` -1 means all; an evaluation of all traces
    has a fixed order, pool generation only for -1. `clock="episode"` starts the table's time_s anew with every trace.
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
    if traces.start_ptrs is not None:
        start = [int(traces.start_ptrs[index]) for index in order]
    else:
        start = [int(rng.randint(1, len(traces.traces[index].mbps))) for index in order]
    if not pool:
        rng = np.random.RandomState(seed)

    noise = np.ones((trace_num, CHUNKS))
    draws = np.zeros((trace_num, CHUNKS), dtype=np.int64)
    for episode in range(trace_num):
        for chunk in range(CHUNKS):
            if not fixed:
                noise[episode, chunk] = rng.uniform(NOISE_LOW, NOISE_HIGH)
            if draws_actions:
                draws[episode, chunk] = rng.randint(1, DRAWS)
    return Episodes(
        trace_index=np.array(order[:trace_num]),
        start_ptr=np.array(start[:trace_num]),
        noise=None if fixed else noise,
        action_draws=draws,
        seed=seed,
        fixed=fixed,
        running_clock=clock == "running",
    )
