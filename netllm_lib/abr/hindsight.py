"""Hindsight values: what every level is worth in a state, if the rest of the trace is known and played best.

Dynamic programming backward over the chunks, on a grid of trace position and buffer, for every last level. A step is the
simulator's own, exact; only the value of the state that it leads to is interpolated between grid points, bilinearly, and across
the end of the trace, where it starts again. One table serves all states of a trace, so that labelling many episodes of a
trace costs little more than one. `oracle.continuations` searches the same values state by state, without a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from netllm_lib.abr.optimum import MBPS, in_threads
from netllm_lib.abr.play import Progress
from netllm_lib.abr.qoe import LEVELS, REBUFFER_PENALTY
from netllm_lib.abr.simulator import BUFFER_CAP_MS, Simulator, _download_chunk

Array = np.ndarray


@dataclass(frozen=True)
class Grid:
    """Distance of the grid points. Finer is nearer to the exact values, and dearer in proportion to both."""

    position_s: float = 2.0
    buffer_s: float = 2.0

    def __post_init__(self) -> None:
        if min(self.position_s, self.buffer_s) < 0.01:
            raise ValueError(f"grid points must be at least 0.01 s apart: {self}")


@njit(cache=True, nogil=True)
def _worth(table: Array, now_s: float, buffer_ms: float, level: int, position_s: float, buffer_step_ms: float) -> float:
    """The value of a state, interpolated in `table` [positions, buffers, last level]; positions go on at the trace's start."""
    positions, buffers = table.shape[0], table.shape[1]
    place = now_s / position_s
    left = int(place)
    share = place - left
    left %= positions
    right = (left + 1) % positions
    height = min(buffer_ms / buffer_step_ms, buffers - 1.0)
    low = min(int(height), buffers - 2)
    up = height - low
    return (1 - share) * ((1 - up) * table[left, low, level] + up * table[left, low + 1, level]) + share * (
        (1 - up) * table[right, low, level] + up * table[right, low + 1, level]
    )


@njit(cache=True, nogil=True)
def _tabulate(
    sizes_bytes: Array, time_s: Array, mbps: Array, positions: int, position_s: float, buffers: int, chunks: int
) -> Array:
    """[chunks + 1, positions, buffers, 6] best summed reward from each chunk on, by the level before it; zero after the last."""
    buffer_step_ms = BUFFER_CAP_MS / (buffers - 1)
    table = np.zeros((chunks + 1, positions, buffers, LEVELS))
    take = np.empty(LEVELS)
    for chunk in range(chunks - 1, 0, -1):
        ptr = 1
        for position in range(positions):
            now_s = position * position_s
            while ptr < len(time_s) - 1 and time_s[ptr] <= now_s:
                ptr += 1
            for row in range(buffers):
                for level in range(LEVELS):
                    _, stall_ms, left_ms, _, _, _, clock_s = _download_chunk(
                        sizes_bytes[level, chunk], 1.0, time_s, mbps, ptr, now_s, row * buffer_step_ms
                    )
                    ahead = _worth(table[chunk + 1], clock_s, left_ms, level, position_s, buffer_step_ms)
                    take[level] = MBPS[level] - REBUFFER_PENALTY * (stall_ms / 1000) + ahead
                for last in range(LEVELS):
                    best = -np.inf
                    for level in range(LEVELS):
                        best = max(best, take[level] - abs(MBPS[level] - MBPS[last]))
                    table[chunk, position, row, last] = best
    return table


@njit(cache=True, nogil=True)
def _label(
    table: Array,
    position_s: float,
    sizes_bytes: Array,
    time_s: Array,
    mbps: Array,
    start_ptr: int,
    levels: Array,
    values: Array,
) -> None:
    """Fill in `values` [chunks, 6] of the states that an episode with these levels visits, but for the first chunk."""
    buffer_step_ms = BUFFER_CAP_MS / (table.shape[2] - 1)
    ptr, now_s, buffer_ms = start_ptr, time_s[start_ptr - 1], 0.0
    for chunk in range(len(levels)):
        next_ptr, next_now_s, next_buffer_ms = ptr, now_s, buffer_ms
        for level in range(LEVELS):
            if chunk == 0 and level != levels[0]:
                continue
            _, stall_ms, left_ms, _, _, place, clock_s = _download_chunk(
                sizes_bytes[level, chunk], 1.0, time_s, mbps, ptr, now_s, buffer_ms
            )
            if chunk > 0:
                change = abs(MBPS[level] - MBPS[levels[chunk - 1]])
                ahead = _worth(table[chunk + 1], clock_s, left_ms, level, position_s, buffer_step_ms)
                values[chunk, level] = MBPS[level] - REBUFFER_PENALTY * (stall_ms / 1000) - change + ahead
            if level == levels[chunk]:
                next_ptr, next_now_s, next_buffer_ms = place, clock_s, left_ms
        ptr, now_s, buffer_ms = next_ptr, next_now_s, next_buffer_ms


def hindsight_values(
    simulator: Simulator,
    levels: np.ndarray,
    grid: Grid | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """[N, chunks, 6] what each level is worth in every state that a run visited: summed reward to the end of the episode.

    `levels` [N, chunks] are those that were played in the simulator's episodes. A value is the exact reward of the level plus the
    tabulated one of the state that it leads to; NaN for the first chunk, which nobody chooses. Episodes of the same trace are
    labelled together. Raises ValueError for episodes with noise: there the future of a trace depends on the episode.
    """
    if simulator.episodes.noise is not None:
        raise ValueError("hindsight values are tabulated per trace; play without noise, or use oracle.continuations")
    grid = grid or Grid()
    levels = np.ascontiguousarray(levels, dtype=np.int64)
    simulator.replay(levels)  # checks them
    values = np.full((*levels.shape, LEVELS), np.nan)
    sizes_bytes = simulator.video.sizes_bytes.astype(np.float64)
    offsets, time_s, mbps = simulator.traces.packed
    episodes = simulator.episodes
    buffers = max(2, round(BUFFER_CAP_MS / 1000 / grid.buffer_s) + 1)

    def label(trace: int) -> None:
        samples = slice(offsets[trace], offsets[trace + 1])
        times, rates = time_s[samples], mbps[samples]
        positions = max(2, round(times[-1] / grid.position_s))  # a whole number of them in a period
        step_s = times[-1] / positions
        table = _tabulate(sizes_bytes, times, rates, positions, step_s, buffers, levels.shape[1])
        for row in np.flatnonzero(episodes.trace_index == trace):
            _label(table, step_s, sizes_bytes, times, rates, int(episodes.start_ptr[row]), levels[row], values[row])

    in_threads(label, np.unique(episodes.trace_index).tolist(), threads, progress)
    return values
