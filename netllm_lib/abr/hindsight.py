"""Hindsight values: what every level is worth in a state, if the rest of the trace is known and played best.

Dynamic programming backward over the chunks, on a grid of trace position and buffer, for every last level. A step is the
simulator's own, exact; only the value of the state that it leads to is interpolated between grid points, bilinearly, and across
the end of the trace, where it starts again. One table serves all states of a trace, so that labelling many episodes of a
trace costs little more than one. `optimum.continuations` searches the same values state by state, without a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from netllm_lib.abr.optimum import SWITCH_MBPS, best_by_last, earned, in_threads
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.simulator import BUFFER_CAP_MS, Array, Client, Episode, Simulator, begin, download, inlined


@dataclass(frozen=True)
class Grid:
    """Distance of the grid points. Finer is nearer to the exact values, and dearer in proportion to both."""

    position_s: float = 2.0
    buffer_s: float = 2.0


@inlined
def _to_come(table: Array, client: Client, level: int, position_s: float) -> float:
    """The value of a state, interpolated in `table` [positions, buffers, last level]; positions go on at the trace's start."""
    positions, buffers = table.shape[0], table.shape[1]
    place, height = client.now_s / position_s, min(client.buffer_ms / BUFFER_CAP_MS * (buffers - 1), buffers - 1.0)
    left, low = int(place), min(int(height), buffers - 2)
    share, up = place - left, height - low
    before, after = table[left % positions], table[(left + 1) % positions]
    return (1 - share) * ((1 - up) * before[low, level] + up * before[low + 1, level]) + share * (
        (1 - up) * after[low, level] + up * after[low + 1, level]
    )


@njit(cache=True, nogil=True)
def _tabulate(episode: Episode, positions: int, position_s: float, buffers: int, chunks: int) -> Array:
    """[chunks + 1, positions, buffers, 6] best summed reward from each chunk on, by the level before it; zero after the last."""
    buffer_step_ms = BUFFER_CAP_MS / (buffers - 1)
    table = np.zeros((chunks + 1, positions, buffers, LEVELS))
    brings = np.empty(LEVELS)
    for chunk in range(chunks - 1, 0, -1):
        ptr = 1
        for position in range(positions):
            now_s = position * position_s
            while ptr < len(episode.time_s) - 1 and episode.time_s[ptr] <= now_s:
                ptr += 1
            for row in range(buffers):
                client = Client(ptr, now_s, row * buffer_step_ms)
                for level in range(LEVELS):
                    after, took = download(episode, client, chunk, level)
                    brings[level] = earned(took, level) + _to_come(table[chunk + 1], after, level, position_s)
                best_by_last(brings, table[chunk, position, row])
    return table


@njit(cache=True, nogil=True)
def _label(table: Array, position_s: float, episode: Episode, levels: Array, values: Array) -> None:
    """Fill in `values` [chunks, 6] of the states that an episode with these levels visits, but for the first chunk."""
    client, _ = download(episode, begin(episode), 0, levels[0])
    for chunk in range(1, len(levels)):
        for level in range(LEVELS):
            after, took = download(episode, client, chunk, level)
            reward = earned(took, level) - SWITCH_MBPS[level, levels[chunk - 1]]
            values[chunk, level] = reward + _to_come(table[chunk + 1], after, level, position_s)
        client, _ = download(episode, client, chunk, levels[chunk])


def hindsight_values(simulator: Simulator, levels: np.ndarray, grid: Grid | None = None) -> np.ndarray:
    """[N, chunks, 6] what each level is worth in every state that a run visited: summed reward to the end of the episode.

    `levels` [N, chunks] are those that were played in the simulator's episodes. A value is the exact reward of the level plus the
    tabulated one of the state that it leads to; NaN for the first chunk, which nobody chooses. Episodes of the same trace are
    labelled together. Raises ValueError for episodes with noise: there the future of a trace depends on the episode.
    """
    if simulator.episodes.noise is not None:
        raise ValueError("hindsight values are tabulated per trace; play without noise, or use optimum.continuations")
    grid = grid or Grid()
    episodes = simulator.episodes
    levels = simulator.replay(levels).level  # checked
    values = np.full((*levels.shape, LEVELS), np.nan)
    buffers = max(2, round(BUFFER_CAP_MS / 1000 / grid.buffer_s) + 1)

    def label(trace: int) -> None:
        rows = np.flatnonzero(episodes.trace_index == trace)
        episode = simulator.episode(int(rows[0]))
        period_s = float(episode.time_s[-1])
        positions = max(2, round(period_s / grid.position_s))  # a whole number of them in a period
        step_s = period_s / positions
        table = _tabulate(episode, positions, step_s, buffers, levels.shape[1])
        for row in rows.tolist():
            _label(table, step_s, simulator.episode(row), levels[row], values[row])

    in_threads(label, np.unique(episodes.trace_index).tolist())
    return values
