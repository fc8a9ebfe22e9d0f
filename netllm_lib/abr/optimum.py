"""The offline optimum: the best levels for an episode whose whole future is known.

Nobody can play it, but it says how much reward an episode holds, and what every decision of a run was worth. It is found by beam
search on the exact simulator. Chunk by chunk, all levels are tried from every state that is kept; states that agree in level,
trace position and buffer (in bins) have the same future, so only the best of each bin stays, and of those the most promising.
How promising a state is, a *guide* says: as long as nothing stalls, the buffer alone fixes the position in the trace (video
received − video played = buffer), so the best reward to come can be tabulated by (chunk, buffer, level) in a few milliseconds. The
guide only ranks states; every plan is a sequence of levels that the simulator has really played, a lower bound of the optimum.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numba import njit

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.play import FIRST_LEVEL, Progress
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import BITRATES_KBPS, LEVELS, REBUFFER_PENALTY
from netllm_lib.abr.simulator import BUFFER_CAP_MS, CHUNK_MS, RTT_MS, SLEEP_STEP_MS, Simulator, _download_chunk
from netllm_lib.abr.traces import CHUNKS, TraceSet, Video
from netllm_lib.runs import array_hash, atomic_path, cache_root, content_hash

Array = np.ndarray

MBPS = BITRATES_KBPS / 1000
GRID_MS = 500.0
"""Step of the guide's buffer axis."""


@dataclass(frozen=True)
class OracleConfig:
    """How hard the optimum is searched for. On fcc-test, wider beams and finer bins change the mean by less than 0.0001."""

    # of whole episodes
    width: int = 1000  # states that stay per chunk
    bin_ms: float = 10.0  # of buffer and of trace position
    # of what is still to come after a single decision, of which there are thousands
    continuation_width: int = 60
    continuation_bin_ms: float = 100.0

    def __post_init__(self) -> None:
        if min(self.width, self.continuation_width) < 1 or min(self.bin_ms, self.continuation_bin_ms) < 0.01:
            raise ValueError(f"widths must be at least 1 and bins at least 0.01 ms: {self}")


@dataclass(frozen=True, repr=False)
class Plans:
    """The best levels found for each episode; `play(Replay(plans.levels), simulator)` plays them."""

    levels: np.ndarray  # [N, chunks] int64
    reward: np.ndarray  # [N] mean reward over the chosen chunks (all but the first), a lower bound of the optimum
    episodes: Episodes

    def __repr__(self) -> str:
        return (
            f"Plans({len(self.reward)} episodes × {self.levels.shape[1]} chunks, mean reward {self.reward.mean():.4f})"
        )


# --- the compiled search ------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _advance(time_s: Array, ptr: int, now_s: float, seconds: float) -> tuple[int, float]:
    """The trace position `seconds` later."""
    while True:
        interval_s = time_s[ptr] - now_s
        if interval_s > seconds:
            return ptr, now_s + seconds
        seconds -= interval_s
        now_s = time_s[ptr]
        ptr += 1
        if ptr >= len(time_s):
            ptr, now_s = 1, 0.0


@njit(cache=True, nogil=True)
def _worth(guide: Array, buffer_ms: float, level: int) -> float:
    """The guide [buffers, 6] of one chunk, linear in the buffer."""
    place = min(buffer_ms / GRID_MS, len(guide) - 1.0)
    below = min(int(place), len(guide) - 2)
    part = place - below
    return guide[below, level] * (1 - part) + guide[below + 1, level] * part


@njit(cache=True, nogil=True)
def _guide(
    sizes_bytes: Array, noise: Array, time_s: Array, mbps: Array,
    ptr: int, now_s: float, buffer_ms: float, chunk: int, chunks: int,
) -> Array:  # fmt: skip
    """[chunks + 1 - chunk, buffers, 6] about the best reward that is still to come before each chunk, by buffer and last level.

    Backwards over the chunks, taking for the trace position the one that a client has who never stalled since the given state.
    """
    buffers = int(BUFFER_CAP_MS / GRID_MS) + 1
    guide = np.zeros((chunks + 1 - chunk, buffers, LEVELS))
    take = np.empty(LEVELS)
    for ahead in range(chunks - chunk - 1, -1, -1):
        place, clock_s, elapsed_s = ptr, now_s, 0.0
        for row in range(buffers - 1, -1, -1):  # the less there is in the buffer, the more of the trace is gone
            have_ms = row * GRID_MS
            # a round trip plays the buffer down, but does not advance the trace
            gone_s = (buffer_ms + ahead * (CHUNK_MS - RTT_MS) - have_ms) / 1000
            if gone_s > elapsed_s:
                place, clock_s = _advance(time_s, place, clock_s, gone_s - elapsed_s)
                elapsed_s = gone_s
            for level in range(LEVELS):
                _, stall_ms, left_ms, _, _, _, _ = _download_chunk(
                    sizes_bytes[level, chunk + ahead], noise[chunk + ahead], time_s, mbps, place, clock_s, have_ms
                )
                gain = MBPS[level] - REBUFFER_PENALTY * stall_ms / 1000
                take[level] = gain + _worth(guide[ahead + 1], left_ms, level)
            for last in range(LEVELS):
                best = -np.inf
                for level in range(LEVELS):
                    best = max(best, take[level] - abs(MBPS[level] - MBPS[last]))
                guide[ahead, row, last] = best
    return guide


@njit(cache=True, nogil=True)
def _beam(
    sizes_bytes: Array, noise: Array, time_s: Array, mbps: Array,
    ptr: int, now_s: float, buffer_ms: float, level: int, chunk: int, chunks: int,
    guide: Array, bin_ms: float, width: int, plan: Array,
) -> float:  # fmt: skip
    """Summed reward of the best plan found for the chunks from `chunk` on; its levels are written to `plan` [chunks].

    `guide[i]` belongs to chunk `chunk + i`.
    """
    steps, room = chunks - chunk, width * LEVELS
    if steps == 0:
        return 0.0
    parents, taken = np.empty((steps, width), np.int32), np.empty((steps, width), np.int8)
    # the states that are kept, and those that follow from them
    s_reward, s_buffer, s_now, s_ptr, s_level = (
        np.empty(width), np.empty(width), np.empty(width), np.empty(width, np.int64), np.empty(width, np.int64)
    )  # fmt: skip
    n_reward, n_buffer, n_now, n_score, n_ptr, n_level, n_parent = (
        np.empty(room), np.empty(room), np.empty(room), np.empty(room),
        np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int32),
    )  # fmt: skip
    slots = 1
    while slots < 2 * room:
        slots *= 2
    keys, owners = np.empty(slots, np.int64), np.empty(slots, np.int32)
    buffer_bins = int((BUFFER_CAP_MS + SLEEP_STEP_MS) / bin_ms) + 1
    s_reward[0], s_buffer[0], s_now[0], s_ptr[0], s_level[0] = 0.0, buffer_ms, now_s, ptr, level
    count = 1
    for step in range(steps):
        keys[:] = -1
        found = 0
        for state in range(count):
            before = s_level[state]
            for choice in range(LEVELS):
                _, stall_ms, left_ms, _, _, place, clock_s = _download_chunk(
                    sizes_bytes[choice, chunk + step], noise[chunk + step], time_s, mbps,
                    s_ptr[state], s_now[state], s_buffer[state],
                )  # fmt: skip
                gain = MBPS[choice] - REBUFFER_PENALTY * (stall_ms / 1000) - abs(MBPS[choice] - MBPS[before])
                reward = s_reward[state] + gain
                score = reward + _worth(guide[step + 1], left_ms, choice)
                key = (int(clock_s * 1000 / bin_ms) * buffer_bins + int(left_ms / bin_ms)) * LEVELS + choice
                slot = (key * 0x9E3779B1) & (slots - 1)
                while keys[slot] != -1 and keys[slot] != key:
                    slot = (slot + 1) & (slots - 1)
                if keys[slot] == -1:
                    keys[slot], owners[slot] = key, found
                    at = found
                    found += 1
                else:
                    at = owners[slot]
                    if score <= n_score[at]:
                        continue
                n_reward[at], n_buffer[at], n_now[at], n_score[at] = reward, left_ms, clock_s, score
                n_ptr[at], n_level[at], n_parent[at] = place, choice, state
        ties = found  # states at the threshold that may stay
        threshold = -np.inf
        if found > width:
            threshold = np.partition(n_score[:found], found - width)[found - width]
            ties = width
            for at in range(found):
                if n_score[at] > threshold:
                    ties -= 1
        count = 0
        for at in range(found):
            if n_score[at] < threshold:
                continue
            if n_score[at] == threshold:
                if ties == 0:
                    continue
                ties -= 1
            s_reward[count], s_buffer[count], s_now[count] = n_reward[at], n_buffer[at], n_now[at]
            s_ptr[count], s_level[count] = n_ptr[at], n_level[at]
            parents[step, count], taken[step, count] = n_parent[at], n_level[at]
            count += 1
    best = int(np.argmax(s_reward[:count]))
    total = s_reward[best]
    for step in range(steps - 1, -1, -1):
        plan[chunk + step] = taken[step, best]
        best = parents[step, best]
    return total


@njit(cache=True, nogil=True)
def _plan_episode(
    sizes_bytes: Array, noise: Array, time_s: Array, mbps: Array, start_ptr: int, bin_ms: float, width: int, plan: Array
) -> None:  # fmt: skip
    """Fill in `plan` [chunks] behind its first level."""
    _, _, buffer_ms, _, _, ptr, now_s = _download_chunk(
        sizes_bytes[plan[0], 0], noise[0], time_s, mbps, start_ptr, time_s[start_ptr - 1], 0.0
    )
    chunks = len(plan)
    guide = _guide(sizes_bytes, noise, time_s, mbps, ptr, now_s, buffer_ms, 1, chunks)
    _beam(
        sizes_bytes, noise, time_s, mbps, ptr, now_s, buffer_ms, plan[0], 1, chunks, guide, bin_ms, width, plan
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _values_episode(
    sizes_bytes: Array, noise: Array, time_s: Array, mbps: Array, start_ptr: int, levels: Array,
    bin_ms: float, width: int, values: Array,
) -> None:  # fmt: skip
    """Fill in `values` [chunks, 6]: the best summed reward from each visited state on, by the level chosen there.

    The value of the level that was played is its reward plus the best value of the next state, so that the losses of an
    episode's decisions add up to its regret.
    """
    chunks = len(levels)
    played = np.empty(chunks)
    plan = np.empty(chunks, np.int64)
    ptr, now_s, buffer_ms = start_ptr, time_s[start_ptr - 1], 0.0
    for chunk in range(chunks):
        last = levels[chunk - 1] if chunk > 0 else 0
        next_ptr, next_now_s, next_buffer_ms = ptr, now_s, buffer_ms
        if chunk > 0:
            guide = _guide(sizes_bytes, noise, time_s, mbps, ptr, now_s, buffer_ms, chunk, chunks)
        for level in range(LEVELS):
            if chunk == 0 and level != levels[0]:
                continue
            _, stall_ms, left_ms, _, _, place, clock_s = _download_chunk(
                sizes_bytes[level, chunk], noise[chunk], time_s, mbps, ptr, now_s, buffer_ms
            )
            gain = MBPS[level] - REBUFFER_PENALTY * (stall_ms / 1000) - abs(MBPS[level] - MBPS[last])
            if level == levels[chunk]:
                played[chunk] = gain
                next_ptr, next_now_s, next_buffer_ms = place, clock_s, left_ms
            else:
                ahead = guide[1:]
                if stall_ms > CHUNK_MS:  # the guide of the state before it does not know such a delay
                    ahead = _guide(
                        sizes_bytes, noise, time_s, mbps, place, clock_s, left_ms, chunk + 1, chunks
                    )  # fmt: skip
                values[chunk, level] = gain + _beam(
                    sizes_bytes, noise, time_s, mbps, place, clock_s, left_ms, level, chunk + 1, chunks,
                    ahead, bin_ms, width, plan,
                )  # fmt: skip
        ptr, now_s, buffer_ms = next_ptr, next_now_s, next_buffer_ms
    to_come = 0.0
    for chunk in range(chunks - 1, 0, -1):
        values[chunk, levels[chunk]] = played[chunk] + to_come
        to_come = values[chunk].max()


# --- plans of whole episodes --------------------------------------------------------------------------------------------


def best_plans(
    traces: TraceSet,
    video: Video,
    episodes: Episodes,
    config: OracleConfig | None = None,
    *,
    chunks: int = CHUNKS,
    threads: int | None = None,
    progress: Progress | None = None,
    cached: bool = True,
) -> Plans:
    """The best plan found for each episode, with the first chunk at level 0 as in every episode; deterministic.

    A video may be cut to its first `chunks` chunks. `threads` is $NUMBA_NUM_THREADS by default (else all cores); `progress`
    counts episodes. Plans are kept in the cache folder, by the content of all that they depend on.
    """
    config = config or OracleConfig()
    if not 2 <= chunks <= CHUNKS:
        raise ValueError(f"chunks must lie in 2..{CHUNKS}, not {chunks}")
    simulator = Simulator(traces, video, episodes)
    path = cache_root() / "oracle" / f"{_key(traces, video, episodes, config, chunks)}.npz"
    levels = _read_levels(path, (len(episodes), chunks)) if cached else None
    if levels is None:
        plans = np.full((len(episodes), chunks), FIRST_LEVEL, dtype=np.int64)
        inputs = _inputs(simulator)

        def search(row: int) -> None:
            _plan_episode(*inputs(row), config.bin_ms, config.width, plans[row])

        in_threads(search, range(len(episodes)), threads, progress)
        levels = plans
        if cached:
            with suppress(OSError), atomic_path(path) as aside, open(aside, "wb") as stream:
                np.savez_compressed(stream, levels=levels.astype(np.int8))
    return Plans(levels, simulator.replay(levels).reward[:, 1:].mean(axis=1), episodes)


class Oracle(Policy):
    """The offline optimum as a policy: it plans all episodes before the first chunk."""

    name = "oracle"

    def __init__(self, traces: TraceSet, video: Video, config: OracleConfig | None = None):
        self.traces, self.video, self.config = traces, video, config

    def reset(self, episodes: Episodes) -> None:
        self._levels = best_plans(self.traces, self.video, episodes, self.config).levels

    def act(self, observation: Observation) -> np.ndarray:
        return self._levels[observation.episode, observation.chunk]


def regret(table: pd.DataFrame, plans: Plans) -> pd.Series:
    """Per trace, in playing order: the optimum's mean reward − the run's. Raises ValueError if they are of other episodes."""
    reward = qoe.per_trace(table)["reward"]
    firsts = table[table["chunk"] == 0]
    same = len(firsts) == len(plans.reward)
    for column in {"trace_index", "start_ptr"} & set(table.columns):
        same = same and np.array_equal(firsts[column], getattr(plans.episodes, column))
    if not same:
        raise ValueError(
            f"the table has {len(firsts)} episodes and the plans {len(plans.reward)}, of which not all are the same: "
            "plan for the episodes that were played"
        )
    return (plans.reward - reward).rename("regret")


def continuations(
    simulator: Simulator,
    levels: np.ndarray,
    rows: Sequence[int] | np.ndarray | None = None,
    config: OracleConfig | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """[rows, chunks, 6] what each level was worth in every state that a run visited: summed reward to the end of the episode.

    `levels` [N, chunks] are those that the run played in the simulator's episodes; `rows` are the episodes to value (all). A value
    is the level's own reward plus that of the best plan found from there on; NaN for the first chunk, which nobody chooses.
    """
    config = config or OracleConfig()
    chosen = np.arange(len(simulator)) if rows is None else np.asarray(rows, dtype=np.int64)
    levels = np.ascontiguousarray(levels, dtype=np.int64)
    simulator.replay(levels)  # checks them
    values = np.full((len(chosen), levels.shape[1], LEVELS), np.nan)
    inputs = _inputs(simulator)

    def search(place: int) -> None:
        row = int(chosen[place])
        _values_episode(*inputs(row), levels[row], config.continuation_bin_ms, config.continuation_width, values[place])

    in_threads(search, range(len(chosen)), threads, progress)
    return values


def _inputs(simulator: Simulator) -> Callable[[int], tuple[Array, Array, Array, Array, int]]:
    """What the compiled functions need of an episode: sizes, noise, the trace's samples, the start pointer."""
    episodes, sizes_bytes = simulator.episodes, simulator.video.sizes_bytes.astype(np.float64)
    noise = np.ones((len(episodes), CHUNKS)) if episodes.noise is None else np.ascontiguousarray(episodes.noise)
    offsets, time_s, mbps = simulator.traces.packed

    def inputs(row: int) -> tuple[Array, Array, Array, Array, int]:
        first, last = offsets[episodes.trace_index[row]], offsets[episodes.trace_index[row] + 1]
        return sizes_bytes, noise[row], time_s[first:last], mbps[first:last], int(episodes.start_ptr[row])

    return inputs


def in_threads(
    work: Callable[[int], None], items: Sequence[int], threads: int | None, progress: Progress | None
) -> None:
    """The compiled functions release the interpreter lock, so plain threads use all cores."""
    threads = threads or int(os.environ.get("NUMBA_NUM_THREADS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for done, future in enumerate(as_completed([pool.submit(work, item) for item in items]), start=1):
            future.result()
            if progress:
                progress(done, len(items))


def _key(traces: TraceSet, video: Video, episodes: Episodes, config: OracleConfig, chunks: int) -> str:
    arrays = [episodes.trace_index.astype(np.int64), episodes.start_ptr.astype(np.int64)]
    if episodes.noise is not None:
        arrays.append(episodes.noise)
    return content_hash([traces.content_hash, video.content_hash, array_hash(*arrays), config, chunks], digits=16)


def _read_levels(path: Path, shape: tuple[int, int]) -> Array | None:
    """Plans from the cache, or None if there are none that can be used."""
    try:
        with open(path, "rb") as stream, np.load(stream) as stored:
            levels = stored["levels"].astype(np.int64)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    whole = levels.shape == shape and (levels[:, 0] == FIRST_LEVEL).all() and (levels >= 0).all()
    return levels if whole and (levels < LEVELS).all() else None
