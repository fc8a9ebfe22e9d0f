"""The offline optimum: the best levels for an episode whose whole future is known.

Nobody can play it, but it says how much reward an episode holds, and what every decision of a run was worth. It is found by beam
search on the exact simulator. Chunk by chunk, all levels are tried from every state that is kept. States with the same level,
trace position and buffer (in bins) have the same future, so only the most promising of each bin stays, and in all no more than the
beam is wide. How promising a state is, a *guide* says: as long as nothing stalls, the buffer alone fixes the position in the trace
(video received − video played = buffer), so the best reward to come can be tabulated by (chunk, buffer, level) in a few
milliseconds. The guide only ranks states; every plan is a sequence of levels that the simulator has really played, a lower bound of
the optimum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numba import njit

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes
from netllm_lib.abr.qoe import BITRATES_KBPS, CHUNKS, LEVELS, REBUFFER_PENALTY
from netllm_lib.abr.simulator import (
    BUFFER_CAP_MS,
    CHUNK_MS,
    RTT_MS,
    SLEEP_STEP_MS,
    Array,
    Client,
    Download,
    Episode,
    Simulator,
    begin,
    download,
    inlined,
    wait,
)
from netllm_lib.abr.traces import TraceSet, Video

MBPS = BITRATES_KBPS / 1000
SWITCH_MBPS = np.abs(MBPS[:, None] - MBPS)
GUIDE_STEP_MS = 500.0
"""Of the guide's buffer axis."""


@dataclass(frozen=True)
class SearchConfig:
    """How hard the optimum is searched for. On fcc-test, wider beams and finer bins change the mean by less than 0.0001."""

    width: int = 1000  # states that stay per chunk
    bin_ms: float = 10.0  # of buffer and of trace position


@dataclass(frozen=True)
class Plans:
    """The best levels found for each episode; `play(Replay(plans.levels), simulator)` plays them."""

    levels: np.ndarray  # [N, chunks] int64
    reward: np.ndarray  # [N] mean reward over the chosen chunks (all but the first), a lower bound of the optimum
    episodes: Episodes


@inlined
def earned(took: Download, level: int) -> float:
    """The reward of a chunk but for the change of level, which depends on the level before it."""
    return MBPS[level] - REBUFFER_PENALTY * (took.rebuffer_ms / 1000)


@inlined
def best_by_last(brings: Array, best: Array) -> None:
    """`best` [6]: what is to come if the last level was this one, where `brings` [6] is what each next level brings."""
    for last in range(LEVELS):
        best[last] = -np.inf
        for level in range(LEVELS):
            best[last] = max(best[last], brings[level] - SWITCH_MBPS[level, last])


@inlined
def _promise(guide: Array, buffer_ms: float, level: int) -> float:
    """The guide [buffers, 6] of one chunk, linear in the buffer."""
    place = min(buffer_ms / GUIDE_STEP_MS, len(guide) - 1.0)
    below = min(int(place), len(guide) - 2)
    part = place - below
    return guide[below, level] * (1 - part) + guide[below + 1, level] * part


@njit(cache=True, nogil=True)
def _guide(episode: Episode, client: Client, chunk: int, chunks: int) -> Array:
    """[chunks + 1 - chunk, buffers, 6] about the best reward that is still to come before each chunk, by buffer and last level.

    Backwards over the chunks, taking for the trace position the one that a client has who never stalled since it was at `client`.
    """
    guide = np.zeros((chunks + 1 - chunk, int(BUFFER_CAP_MS / GUIDE_STEP_MS) + 1, LEVELS))
    brings = np.empty(LEVELS)
    for ahead in range(chunks - chunk - 1, -1, -1):
        ptr, now_s, passed_ms = client.ptr, client.now_s, 0.0
        for row in range(guide.shape[1] - 1, -1, -1):  # the less there is in the buffer, the more of the trace is gone
            buffer_ms = row * GUIDE_STEP_MS
            # a round trip plays the buffer down, but does not advance the trace
            gone_ms = client.buffer_ms + ahead * (CHUNK_MS - RTT_MS) - buffer_ms
            if gone_ms > passed_ms:
                ptr, now_s, _ = wait(episode.time_s, ptr, now_s, gone_ms - passed_ms)
                passed_ms = gone_ms
            for level in range(LEVELS):
                after, took = download(episode, Client(ptr, now_s, buffer_ms), chunk + ahead, level)
                brings[level] = earned(took, level) + _promise(guide[ahead + 1], after.buffer_ms, level)
            best_by_last(brings, guide[ahead, row])
    return guide


STATE = np.dtype(
    [(name, np.float64) for name in ("score", "reward", "now_s", "buffer_ms")]
    + [(name, np.int64) for name in ("ptr", "level", "parent")]
)
"""A state of the beam search: its score is the reward so far and what the guide promises, its parent the state before it."""


@njit(cache=True, nogil=True)
def _beam(
    episode: Episode, client: Client, level: int, chunk: int, guide: Array, bin_ms: float, width: int, plan: Array
) -> float:
    """Summed reward of the best plan found for the chunks from `chunk` on; its levels are written to `plan` [chunks].

    `guide[i]` is that of chunk `chunk + i`.
    """
    steps = len(plan) - chunk
    kept, found = np.empty((steps + 1, width), STATE), np.empty(width * LEVELS, STATE)
    slots = 2 ** int(np.ceil(np.log2(2 * len(found))))
    keys, places = np.empty(slots, np.int64), np.empty(slots, np.int64)  # a hash table of the bins
    start = kept[0, 0]
    start.reward, start.level = 0.0, level
    start.ptr, start.now_s, start.buffer_ms = client
    count = 1
    buffer_bins = int((BUFFER_CAP_MS + SLEEP_STEP_MS) / bin_ms) + 1
    for step in range(steps):
        children = 0
        keys[:] = -1
        for parent in range(count):
            state = kept[step, parent]
            before = Client(state.ptr, state.now_s, state.buffer_ms)
            for choice in range(LEVELS):
                after, took = download(episode, before, chunk + step, choice)
                reward = state.reward + (earned(took, choice) - SWITCH_MBPS[choice, state.level])
                score = reward + _promise(guide[step + 1], after.buffer_ms, choice)
                position, buffer = int(after.now_s * 1000 / bin_ms), int(after.buffer_ms / bin_ms)
                key = (position * buffer_bins + buffer) * LEVELS + choice
                slot = (key * 0x9E3779B1) & (slots - 1)
                while keys[slot] != key and keys[slot] != -1:
                    slot = (slot + 1) & (slots - 1)
                if keys[slot] == -1:
                    keys[slot], places[slot] = key, children
                    children += 1
                elif score <= found[places[slot]].score:
                    continue
                child = found[places[slot]]
                child.score, child.reward, child.level, child.parent = score, reward, choice, parent
                child.ptr, child.now_s, child.buffer_ms = after
        scores = found["score"][:children].copy()
        limit = np.partition(scores, children - width)[children - width] if children > width else -np.inf
        ties = width - (scores > limit).sum()  # so many of those at the limit stay
        count = 0
        for at in range(children):
            if scores[at] > limit or (scores[at] == limit and ties > 0):
                ties -= scores[at] == limit
                kept[step + 1, count] = found[at]
                count += 1
    best = int(np.argmax(kept["reward"][steps, :count]))
    total = kept[steps, best].reward
    for step in range(steps, 0, -1):
        plan[chunk + step - 1] = kept[step, best].level
        best = kept[step, best].parent
    return total


@njit(cache=True, nogil=True)
def _plan_episode(episode: Episode, bin_ms: float, width: int, plan: Array) -> None:
    """Fill in `plan` [chunks] behind its first level."""
    client, _ = download(episode, begin(episode), 0, plan[0])
    _beam(episode, client, plan[0], 1, _guide(episode, client, 1, len(plan)), bin_ms, width, plan)


@njit(cache=True, nogil=True)
def _values_episode(episode: Episode, levels: Array, bin_ms: float, width: int, values: Array) -> None:
    """Fill in `values` [chunks, 6]: the best summed reward from each visited state on, by the level chosen there.

    The value of the level that was played is its reward plus the best value of the next state, so that the losses of an
    episode's decisions add up to its regret.
    """
    chunks, plan = len(levels), np.empty(len(levels), np.int64)
    client, _ = download(episode, begin(episode), 0, levels[0])
    for chunk in range(1, chunks):
        guide = _guide(episode, client, chunk, chunks)
        for level in range(LEVELS):
            after, took = download(episode, client, chunk, level)
            values[chunk, level] = earned(took, level) - SWITCH_MBPS[level, levels[chunk - 1]]
            if level != levels[chunk]:
                ahead = guide[1:]
                if took.rebuffer_ms > CHUNK_MS:  # the guide of the state before it does not know such a delay
                    ahead = _guide(episode, after, chunk + 1, chunks)
                values[chunk, level] += _beam(episode, after, level, chunk + 1, ahead, bin_ms, width, plan)
        client, _ = download(episode, client, chunk, levels[chunk])
    to_come = 0.0
    for chunk in range(chunks - 1, 0, -1):
        values[chunk, levels[chunk]] += to_come
        to_come = values[chunk].max()


def best_plans(
    traces: TraceSet, video: Video, episodes: Episodes, config: SearchConfig | None = None, *, chunks: int = CHUNKS
) -> Plans:
    """The best plan found for each episode, with the first chunk at level 0 as in every episode; deterministic.

    A video may be cut to its first `chunks` chunks. A hundred episodes take less than two seconds of one core.
    """
    config = config or SearchConfig()
    simulator = Simulator(traces, video, episodes)
    levels = np.full((len(episodes), chunks), FIRST_LEVEL, dtype=np.int64)

    def search(row: int) -> None:
        _plan_episode(simulator.episode(row), config.bin_ms, config.width, levels[row])

    in_threads(search, range(len(episodes)))
    return Plans(levels, simulator.replay(levels).reward[:, 1:].mean(axis=1), episodes)


def regret(table: pd.DataFrame, plans: Plans) -> pd.Series:
    """Per trace, in playing order: the optimum's mean reward − the run's. Raises ValueError if they are of other episodes."""
    firsts = table[table["chunk"] == 0]
    same = len(firsts) == len(plans.reward)
    for column in {"trace_index", "start_ptr"} & set(table.columns):
        same = same and np.array_equal(firsts[column], getattr(plans.episodes, column))
    if not same:
        counts = f"the table has {len(firsts)} episodes and the plans {len(plans.reward)}"
        raise ValueError(f"{counts}, of which not all are the same: plan for the episodes that were played")
    return (plans.reward - qoe.per_trace(table)["reward"]).rename("regret")


def continuations(simulator: Simulator, levels: np.ndarray, config: SearchConfig | None = None) -> np.ndarray:
    """[N, chunks, 6] what each level was worth in every state that a run visited: summed reward to the end of the episode.

    `levels` [N, chunks] are those that the run played in the simulator's episodes. A value is the level's own reward plus that of
    the best plan found from there on; NaN for the first chunk, which nobody chooses. There are thousands of decisions, so the
    default search is narrower than that of whole episodes.
    """
    config = config or SearchConfig(60, 100.0)
    levels = simulator.replay(levels).level  # checked
    values = np.full((*levels.shape, LEVELS), np.nan)

    def search(row: int) -> None:
        _values_episode(simulator.episode(row), levels[row], config.bin_ms, config.width, values[row])

    in_threads(search, range(len(levels)))
    return values


def in_threads(work: Callable[[int], None], items: Sequence[int]) -> None:
    """Work on all cores, or as many as $NUMBA_NUM_THREADS says: compiled functions release the interpreter's lock."""
    with ThreadPoolExecutor(int(os.environ.get("NUMBA_NUM_THREADS") or os.cpu_count() or 1)) as pool:
        list(pool.map(work, items))
