"""The streaming simulator: N clients download the same video over N traces, in lock-step.

Exact to the last bit with the original environment (Pensieve's, as NetLLM ships it): the order of all floating-point
operations below is the original's. Units are in the names; time inside a trace is in seconds, buffers in milliseconds.

The model, per chunk: download over a piecewise constant bandwidth, add the round trip, perhaps multiply by noise (neither
advances the trace); the buffer drains during the download and rebuffering is what it lacks; then it gains one chunk of
video; above 60 s the client sleeps in steps of 500 ms, which does advance the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.traces import CHUNKS, TraceSet, Video

Array = np.ndarray

CHUNK_MS = 4000.0
BUFFER_CAP_MS = 60000.0
SLEEP_STEP_MS = 500.0
PAYLOAD_SHARE = 0.95  # of the packets' bytes
RTT_MS = 80.0
TOP_KBPS = float(qoe.BITRATES_KBPS[-1])


@njit(cache=True)
def _download_chunk(
    size_bytes: float, noise: float, time_s: Array, mbps: Array, ptr: int, now_s: float, buffer_ms: float
) -> tuple[float, float, float, float, float, int, float]:
    """One chunk of one client.

    Returns delay_ms, rebuffer_ms, buffer_ms, sleep_ms, residual_ms, ptr, now_s. `residual_ms` is the part of the sleep that
    fell into its last interval: the original reports that as the sleep.
    """
    samples = len(mbps)
    sent_bytes = 0.0
    delay_s = 0.0
    while True:
        bytes_per_s = mbps[ptr] * 1e6 / 8
        interval_s = time_s[ptr] - now_s
        payload_bytes = bytes_per_s * interval_s * PAYLOAD_SHARE
        if sent_bytes + payload_bytes > size_bytes:
            break
        sent_bytes += payload_bytes
        delay_s += interval_s
        now_s = time_s[ptr]
        ptr += 1
        if ptr >= samples:  # past the end a trace starts again at sample 1
            ptr, now_s = 1, 0.0
    part_s = (size_bytes - sent_bytes) / bytes_per_s / PAYLOAD_SHARE  # of the interval in which the chunk ends
    delay_s += part_s
    now_s += part_s

    delay_ms = (delay_s * 1000 + RTT_MS) * noise
    rebuffer_ms = max(delay_ms - buffer_ms, 0.0)
    buffer_ms = max(buffer_ms - delay_ms, 0.0) + CHUNK_MS

    sleep_ms = residual_ms = 0.0
    if buffer_ms > BUFFER_CAP_MS:
        sleep_ms = residual_ms = np.ceil((buffer_ms - BUFFER_CAP_MS) / SLEEP_STEP_MS) * SLEEP_STEP_MS
        buffer_ms -= sleep_ms
        while True:
            interval_s = time_s[ptr] - now_s
            if interval_s > residual_ms / 1000:
                now_s += residual_ms / 1000
                break
            residual_ms -= interval_s * 1000
            now_s = time_s[ptr]
            ptr += 1
            if ptr >= samples:  # past the end a trace starts again at sample 1
                ptr, now_s = 1, 0.0
    return delay_ms, rebuffer_ms, buffer_ms, sleep_ms, residual_ms, ptr, now_s


@njit(cache=True)
def _step(
    levels: Array, chunk: int, sizes_bytes: Array, noise: Array, trace_index: Array, offsets: Array, time_s: Array, mbps: Array,
    ptr: Array, now_s: Array, buffer_ms: Array, out: Array,
) -> None:  # fmt: skip
    """One chunk for all clients; `ptr`, `now_s`, `buffer_ms` [N] are updated, `out` [5, N] receives the results."""
    for i in range(len(levels)):
        first, last = offsets[trace_index[i]], offsets[trace_index[i] + 1]
        delay_ms, rebuffer_ms, buffer_ms[i], sleep_ms, residual_ms, ptr[i], now_s[i] = _download_chunk(
            sizes_bytes[levels[i], chunk],
            noise[i, chunk],
            time_s[first:last],
            mbps[first:last],
            ptr[i],
            now_s[i],
            buffer_ms[i],
        )
        out[0, i], out[1, i], out[2, i], out[3, i], out[4, i] = (
            delay_ms,
            rebuffer_ms,
            buffer_ms[i],
            sleep_ms,
            residual_ms,
        )


@njit(cache=True)
def _replay(
    levels: Array, sizes_bytes: Array, noise: Array, trace_index: Array, offsets: Array, time_s: Array, mbps: Array,
    ptr: Array, now_s: Array, buffer_ms: Array, out: Array,
) -> None:  # fmt: skip
    """All chunks of `levels` [N, chunks], one client after the other; `out` [5, N, chunks]."""
    for i in range(levels.shape[0]):
        first, last = offsets[trace_index[i]], offsets[trace_index[i] + 1]
        trace_time_s, trace_mbps = time_s[first:last], mbps[first:last]
        position, clock_s, video_ms = ptr[i], now_s[i], buffer_ms[i]
        for chunk in range(levels.shape[1]):
            delay_ms, rebuffer_ms, video_ms, sleep_ms, residual_ms, position, clock_s = _download_chunk(
                sizes_bytes[levels[i, chunk], chunk],
                noise[i, chunk],
                trace_time_s,
                trace_mbps,
                position,
                clock_s,
                video_ms,
            )
            out[0, i, chunk], out[1, i, chunk], out[2, i, chunk] = delay_ms, rebuffer_ms, video_ms
            out[3, i, chunk], out[4, i, chunk] = sleep_ms, residual_ms


@njit(cache=True)
def _roll(
    before: Array,
    after: Array,
    kbps: Array,
    buffer_s: Array,
    size_bytes: Array,
    delay_ms: Array,
    next_sizes: Array,
    left: float,
) -> None:
    """Pensieve's states `after` a chunk from those `before` it, [N, 6, 6]; `left` is the share of chunks that remain."""
    for i in range(len(kbps)):
        for row in range(6):
            for column in range(5):
                after[i, row, column] = before[i, row, column + 1]
        after[i, 0, 5] = kbps[i] / TOP_KBPS
        after[i, 1, 5] = buffer_s[i] / 10
        after[i, 2, 5] = size_bytes[i] / delay_ms[i] / 1000  # MB/s
        after[i, 3, 5] = delay_ms[i] / 1000 / 10
        for level in range(6):
            after[i, 4, level] = next_sizes[level] / 1000 / 1000  # MB
        after[i, 5, 5] = left


@dataclass(frozen=True)
class Outcome:
    """What one chunk, or a whole replay, brought: arrays [N] or [N, chunks]."""

    level: np.ndarray
    bitrate_kbps: np.ndarray
    size_bytes: np.ndarray
    delay_ms: np.ndarray
    rebuffer_s: np.ndarray
    buffer_s: np.ndarray  # after the chunk was added and a full buffer drained
    smoothness_mbps: np.ndarray
    reward: np.ndarray
    sleep_ms: np.ndarray  # time waited because the buffer was full
    residual_ms: np.ndarray  # the part of it that the original reports


class Simulator:
    """N episodes of one video. `reset()`, then `step(levels)` once per chunk.

    >>> simulator = Simulator(traces, video, episodes)
    >>> outcome = simulator.step(np.zeros(len(episodes), int))  # the first chunk is always level 0
    >>> observation = simulator.observe()
    """

    def __init__(self, traces: TraceSet, video: Video, episodes: Episodes):
        self.traces, self.video, self.episodes = traces, video, episodes
        self._trace = np.ascontiguousarray(episodes.trace_index, dtype=np.int64)
        self._noise = np.ones((len(episodes), CHUNKS)) if episodes.noise is None else episodes.noise
        self._sizes = video.sizes_bytes.astype(np.float64)
        self._sizes_by_chunk = np.ascontiguousarray(self._sizes.T)
        self._rows = np.arange(len(episodes))
        self.reset()

    def __len__(self) -> int:
        return len(self.episodes)

    def part(self, rows: Sequence[int]) -> Simulator:
        """Some of the episodes; what a policy observes still says which of all of them they are."""
        part = Simulator(self.traces, self.video, self.episodes.rows(rows))
        part._rows = self._rows[rows]
        return part

    def reset(self) -> None:
        """Before the first chunk: start pointers, empty buffers, zero states."""
        offsets, time_s, _ = self.traces.packed
        self._ptr = self.episodes.start_ptr.astype(np.int64)
        self._now_s = time_s[offsets[self._trace] + self._ptr - 1]
        self._buffer_ms = np.zeros(len(self))
        self._level = np.zeros(len(self), dtype=np.int64)
        self._state = np.zeros((len(self), 6, 6))
        self._reward = np.zeros(len(self))
        self.chunk = 0  # the chunk that `step` downloads next

    def step(self, levels: np.ndarray) -> Outcome:
        """Download one chunk in the given levels [N] and return what it brought.

        Raises ValueError for levels outside 0..5, IndexError past the last chunk.
        """
        if self.chunk >= CHUNKS:
            raise IndexError(f"all {CHUNKS} chunks are played: call reset()")
        levels = _checked(levels, (len(self),))
        out = np.empty((5, len(self)))
        _step(
            levels, self.chunk, self._sizes, self._noise, self._trace, *self.traces.packed,
            self._ptr, self._now_s, self._buffer_ms, out,
        )  # fmt: skip
        outcome = self._outcome(levels, self._level, self._sizes[levels, self.chunk], out)
        self.chunk += 1
        self._level, self._reward = levels, outcome.reward
        self._remember(outcome)
        return outcome

    def replay(self, levels: np.ndarray) -> Outcome:
        """Play given levels [N, chunks <= 48] from the start in one compiled call. Does not touch the running episode."""
        levels = _checked(levels, (len(self), np.shape(levels)[1]))
        chunks = levels.shape[1]
        offsets, time_s, mbps = self.traces.packed
        ptr = self.episodes.start_ptr.astype(np.int64)
        now_s, buffer_ms = time_s[offsets[self._trace] + ptr - 1], np.zeros(len(self))
        out = np.empty((5, len(self), chunks))
        _replay(levels, self._sizes, self._noise, self._trace, offsets, time_s, mbps, ptr, now_s, buffer_ms, out)
        previous = np.concatenate([np.zeros((len(self), 1), dtype=np.int64), levels[:, :-1]], axis=1)
        return self._outcome(levels, previous, self._sizes[levels, np.arange(chunks)], out)

    def observe(self) -> Observation:
        """What a policy may know now. After the last chunk the "next" sizes are those of chunk 0, as in the original."""
        return Observation(
            chunk=self.chunk,
            episode=self._rows,
            state=self._state,
            buffer_s=self._buffer_ms / 1000,
            last_level=self._level,
            last_reward=self._reward,
            next_sizes_bytes=np.broadcast_to(self._next_sizes(), (len(self), qoe.LEVELS)),
        )

    def _next_sizes(self) -> np.ndarray:
        """[6] sizes of the chunk that comes next; after the last one, those of chunk 0."""
        return self._sizes_by_chunk[self.chunk if self.chunk < CHUNKS else 0]

    @staticmethod
    def _outcome(levels: np.ndarray, previous: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> Outcome:
        delay_ms, rebuffer_ms, buffer_ms, sleep_ms, residual_ms = out
        kbps, previous_kbps, rebuffer_s = qoe.BITRATES_KBPS[levels], qoe.BITRATES_KBPS[previous], rebuffer_ms / 1000
        return Outcome(
            level=levels,
            bitrate_kbps=kbps,
            size_bytes=sizes,
            delay_ms=delay_ms,
            rebuffer_s=rebuffer_s,
            buffer_s=buffer_ms / 1000,
            smoothness_mbps=np.abs(kbps - previous_kbps) / 1000,
            reward=qoe.reward(kbps, rebuffer_s, previous_kbps),
            sleep_ms=sleep_ms,
            residual_ms=residual_ms,
        )

    def _remember(self, outcome: Outcome) -> None:
        """Pensieve's state: roll the history to the left, newest sample in the last column, next sizes in row 4."""
        state = np.empty_like(self._state)  # a new array: observations already handed out stay as they were
        remaining = (CHUNKS - self.chunk) / CHUNKS
        _roll(
            self._state, state, outcome.bitrate_kbps, outcome.buffer_s, outcome.size_bytes, outcome.delay_ms,
            self._next_sizes(), remaining,
        )  # fmt: skip
        self._state = state


def _checked(levels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.ascontiguousarray(levels, dtype=np.int64)
    whole = array is levels or not (array != levels).any()
    # as unsigned numbers, negative levels are large
    if array.shape != shape or not whole or array.view(np.uint64).max() >= qoe.LEVELS:
        raise ValueError(
            f"levels must be integers 0..{qoe.LEVELS - 1} of shape {shape}, got {np.asarray(levels)!r:.200}"
        )
    return array
