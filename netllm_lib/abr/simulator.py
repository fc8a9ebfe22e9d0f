"""The streaming simulator: N clients download the same video over N traces, in lock-step.

The model, per chunk: download over a piecewise constant bandwidth, add the round trip, perhaps multiply by noise (neither
advances the trace); the buffer drains during the download and rebuffering is what it lacks; then it gains one chunk of
video; above 60 s the client sleeps in steps of 500 ms, which does advance the trace.

Exact to the last bit with the original environment (Pensieve's, as NetLLM ships it): the order of all operations is the
original's. Time inside a trace is in seconds, delays and buffers are in milliseconds. A trace is what its samples say wherever
its clock begins: every pass takes as long as its samples last. Only the original's own protocol (`Episodes.running_clock`) keeps
the clock of the file and begins every later pass at 0, as it does; the same for traces that begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes, Observation
from netllm_lib.abr.qoe import CHUNKS

if TYPE_CHECKING:
    from netllm_lib.abr.traces import TraceSet, Video

Array = np.ndarray

CHUNK_MS = 4000.0
BUFFER_CAP_MS = 60000.0
SLEEP_STEP_MS = 500.0
PAYLOAD_SHARE = 0.95  # of the packets' bytes
RTT_MS = 80.0
STATE_COLUMNS = 6  # chunks that Pensieve's state remembers

MOST_INTERVALS = 1_000_000
"""Of a trace that a download or a wait may take; a chunk that needs more never arrives. No numbers make the loops endless."""

inlined = njit(cache=True, nogil=True, inline="always")
"""For small functions: a call would count references to its arrays, which takes as long as the download."""


class Episode(NamedTuple):
    """All that the downloads of one client depend on."""

    sizes_bytes: Array  # [6, chunks] float64
    noise: Array  # [chunks] factor on the delay
    time_s: Array  # [samples] of the trace
    mbps: Array  # [samples] over the interval that ends at this time
    start_ptr: int  # the sample that is used first


class Client(NamedTuple):
    """Where a client is between two chunks."""

    ptr: int  # the sample whose bandwidth holds now
    now_s: float  # time inside the trace
    buffer_ms: float


class Download(NamedTuple):
    """What one chunk took."""

    delay_ms: float
    rebuffer_ms: float
    sleep_ms: float  # waited because the buffer was full
    residual_ms: float  # the part of it that fell into its last interval: what the original reports as the sleep


@inlined
def begin(episode: Episode) -> Client:
    """The client before its first chunk."""
    return Client(episode.start_ptr, episode.time_s[episode.start_ptr - 1], 0.0)


@inlined
def next_sample(time_s: Array, ptr: int) -> tuple[int, float]:
    """Pointer and time when sample `ptr` is over. Past the end a trace starts again at sample 1: sample 0 is never used."""
    return (ptr + 1, time_s[ptr]) if ptr + 1 < len(time_s) else (1, 0.0)


@inlined
def wait(time_s: Array, ptr: int, now_s: float, wait_ms: float) -> tuple[int, float, float]:
    """Pointer and time `wait_ms` later, and the part of the wait that fell into the last interval."""
    interval_s = time_s[ptr] - now_s
    for _ in range(MOST_INTERVALS):
        if interval_s > wait_ms / 1000:
            break
        wait_ms -= interval_s * 1000
        ptr, now_s = next_sample(time_s, ptr)
        interval_s = time_s[ptr] - now_s
    return ptr, now_s + wait_ms / 1000, wait_ms


@inlined
def download(episode: Episode, client: Client, chunk: int, level: int) -> tuple[Client, Download]:
    """Download `chunk` in `level`: the client afterwards, and what it took."""
    sizes_bytes, noise, time_s, mbps, _ = episode
    ptr, now_s, buffer_ms = client
    size_bytes = sizes_bytes[level, chunk]
    sent_bytes = delay_s = 0.0
    for _ in range(MOST_INTERVALS):
        bytes_per_s = mbps[ptr] * 1e6 / 8
        interval_s = time_s[ptr] - now_s
        payload_bytes = bytes_per_s * interval_s * PAYLOAD_SHARE
        if sent_bytes + payload_bytes > size_bytes:
            break
        sent_bytes += payload_bytes
        delay_s += interval_s
        ptr, now_s = next_sample(time_s, ptr)
    else:
        delay_s, bytes_per_s = np.inf, 1.0  # no error: it would slow every download
    part_s = (size_bytes - sent_bytes) / bytes_per_s / PAYLOAD_SHARE  # of the interval in which the chunk ends
    delay_ms = ((delay_s + part_s) * 1000 + RTT_MS) * noise[chunk]
    now_s += part_s

    rebuffer_ms = max(delay_ms - buffer_ms, 0.0)
    buffer_ms = max(buffer_ms - delay_ms, 0.0) + CHUNK_MS
    sleep_ms = residual_ms = 0.0
    if buffer_ms > BUFFER_CAP_MS:
        sleep_ms = np.ceil((buffer_ms - BUFFER_CAP_MS) / SLEEP_STEP_MS) * SLEEP_STEP_MS
        buffer_ms -= sleep_ms
        ptr, now_s, residual_ms = wait(time_s, ptr, now_s, sleep_ms)
    return Client(ptr, now_s, buffer_ms), Download(delay_ms, rebuffer_ms, sleep_ms, residual_ms)


class World(NamedTuple):
    """`Episode` of N clients: one video, and all traces one after the other."""

    sizes_bytes: Array  # [6, chunks] float64
    noise: Array  # [N, chunks]
    trace_index: Array  # [N]
    offsets: Array  # [traces + 1] where each trace begins
    time_s: Array  # [all samples]
    mbps: Array  # [all samples]
    start_ptr: Array  # [N]


@inlined
def episode_of(world: World, i: int) -> Episode:
    """What client `i` downloads."""
    first, last = world.offsets[world.trace_index[i]], world.offsets[world.trace_index[i] + 1]
    time_s, mbps = world.time_s[first:last], world.mbps[first:last]
    return Episode(world.sizes_bytes, world.noise[i], time_s, mbps, world.start_ptr[i])


@njit(cache=True, nogil=True)
def _play(world: World, clients: Any, first_chunk: int, levels: Array, out: Array) -> None:
    """Download the chunks of `levels` [N, chunks]; `clients`, a `Client` of arrays [N], moves on.

    `out` [5, N, chunks] receives the fields of `Download` and the buffer.
    """
    for i in range(levels.shape[0]):
        episode = episode_of(world, i)
        client = Client(clients.ptr[i], clients.now_s[i], clients.buffer_ms[i])
        for j in range(levels.shape[1]):
            client, took = download(episode, client, first_chunk + j, levels[i, j])
            out[0, i, j], out[1, i, j], out[2, i, j], out[3, i, j] = took
            out[4, i, j] = client.buffer_ms
        clients.ptr[i], clients.now_s[i], clients.buffer_ms[i] = client


@dataclass(frozen=True)
class Outcome:
    """What one chunk of all clients, or a whole replay, brought: arrays [N] or [N, chunks]."""

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


def _newest(outcome: Outcome, following: int | np.ndarray) -> dict[int, np.ndarray]:
    """What a chunk adds to each row of Pensieve's state; `following` is the number of the next one."""
    return {
        0: outcome.bitrate_kbps / float(qoe.BITRATES_KBPS[-1]),
        1: outcome.buffer_s / 10,
        2: outcome.size_bytes / outcome.delay_ms / 1000,  # MB/s
        3: outcome.delay_ms / 1000 / 10,
        5: np.asarray((CHUNKS - following) / CHUNKS),
    }


class Simulator:
    """N episodes of one video. `reset()`, then `step(levels)` once per chunk.

    >>> simulator = Simulator(traces, video, episodes)
    >>> outcome = simulator.step(np.zeros(len(episodes), int))  # the first chunk is always level 0
    >>> observation = simulator.observe()
    """

    def __init__(self, traces: TraceSet, video: Video, episodes: Episodes):
        self.traces, self.video, self.episodes = traces, video, episodes
        samples = traces.packed if episodes.running_clock else traces.packed_from_zero
        noise: np.ndarray = np.ones((len(episodes), CHUNKS))
        if episodes.noise is not None:
            noise = np.ascontiguousarray(episodes.noise)
        index, start_ptr = (values.astype(np.int64) for values in (episodes.trace_index, episodes.start_ptr))
        lengths = np.diff(samples[0])
        # compiled code checks no index: an episode that is not there would read other memory
        if ((index < 0) | (index >= len(lengths))).any() or ((start_ptr < 1) | (start_ptr >= lengths[index])).any():
            raise ValueError(f"episodes: a trace or a starting point that {traces.name} does not have")
        if noise.shape != (len(index), CHUNKS) or not ((noise > 0) & (noise < np.inf)).all():
            raise ValueError(f"episodes: noise must be positive numbers [{len(index)}, {CHUNKS}]")
        self.world = World(video.sizes_bytes.astype(np.float64), noise, index, *samples, start_ptr)
        self.whole = episodes
        self.rows = np.arange(len(index))  # which of all episodes these are: of a part, not from 0
        self.reset()

    def __len__(self) -> int:
        return len(self.episodes)

    def part(self, rows: Sequence[int]) -> Simulator:
        """Some of the episodes; what a policy observes still says which of all of them they are."""
        part = Simulator(self.traces, self.video, self.episodes.rows(rows))
        part.whole, part.rows = self.whole, self.rows[rows]
        return part

    def episode(self, row: int) -> Episode:
        """What the compiled functions take."""
        return episode_of.py_func(self.world, row)

    def reset(self) -> None:
        """Before the first chunk: start pointers, empty buffers, zero states."""
        self.chunk = 0  # the chunk that `step` downloads next
        self._clients = self._begin()
        self._level = np.full(len(self), FIRST_LEVEL)
        self._state = np.zeros((len(self), 6, STATE_COLUMNS))
        self._reward = np.zeros(len(self))

    def step(self, levels: np.ndarray) -> Outcome:
        """Download one chunk in the given levels [N] and return what it brought.

        Raises ValueError for levels outside 0..5, IndexError past the last chunk.
        """
        if self.chunk >= CHUNKS:
            raise IndexError(f"all {CHUNKS} chunks are played: call reset()")
        brought = self._download(self._clients, self.chunk, np.asarray(levels)[..., None], self._level)
        outcome = Outcome(**{name: values[:, 0] for name, values in vars(brought).items()})
        self.chunk += 1
        self._level, self._reward = outcome.level, outcome.reward
        # a new array: observations that were handed out stay as they were
        self._state = self._state[:, :, [1, 2, 3, 4, 5, 5]]
        for row, values in _newest(outcome, self.chunk).items():
            self._state[:, row, -1] = values
        self._state[:, 4] = self._next_sizes() / 1000 / 1000  # MB
        return outcome

    def replay(self, levels: np.ndarray) -> Outcome:
        """Play given levels [N, chunks <= 48] from the start in one compiled call. Does not touch the running episode."""
        return self._download(self._begin(), 0, levels, np.full(len(self), FIRST_LEVEL))

    def states(self, played: Outcome) -> np.ndarray:
        """[N, chunks, 6, 6] float32: the states after each chunk of a replay, which `observe` shows one by one."""
        states = np.empty((*played.level.shape, 6, STATE_COLUMNS), dtype=np.float32)
        following = np.arange(1, played.level.shape[1] + 1)
        for row, values in _newest(played, following).items():
            before = np.zeros((len(self), STATE_COLUMNS - 1))
            all_columns = np.concatenate([before, np.broadcast_to(values, played.level.shape)], axis=1)
            states[:, :, row] = np.lib.stride_tricks.sliding_window_view(all_columns, STATE_COLUMNS, axis=1)
        states[:, :, 4] = self.world.sizes_bytes[:, following % CHUNKS].T / 1000 / 1000
        return states

    def observe(self) -> Observation:
        """What a policy may know now. After the last chunk the "next" sizes are those of chunk 0, as in the original."""
        buffer_s, sizes = self._clients.buffer_ms / 1000, np.broadcast_to(self._next_sizes(), (len(self), qoe.LEVELS))
        return Observation(self.chunk, self.rows, self._state, buffer_s, self._level, self._reward, sizes)

    def _next_sizes(self) -> np.ndarray:
        return self.world.sizes_bytes[:, self.chunk % CHUNKS]

    def _begin(self) -> Any:  # a Client of arrays [N]
        start_s = self.world.time_s[self.world.offsets[self.world.trace_index] + self.world.start_ptr - 1]
        return Client(self.world.start_ptr.copy(), start_s, np.zeros(len(self)))  # type: ignore[arg-type]

    def _download(self, clients: Any, first_chunk: int, levels: np.ndarray, before: np.ndarray) -> Outcome:
        """Download `levels` [N, chunks]; `before` [N] are those of the chunk before them. Moves the clients."""
        given, levels = levels, np.ascontiguousarray(levels, dtype=np.int64)
        shape = (len(self), *levels.shape[1:])
        outside = levels.shape != shape or levels.shape[1] > CHUNKS - first_chunk or (levels != given).any()
        if outside or levels.min() < 0 or levels.max() >= qoe.LEVELS:
            raise ValueError(
                f"levels must be integers 0..{qoe.LEVELS - 1} for {len(self)} episodes, got {given!r:.200}"
            )
        out = np.empty((5, *shape))
        _play(self.world, clients, first_chunk, levels, out)
        delay_ms, rebuffer_ms, sleep_ms, residual_ms, buffer_ms = out
        if not np.isfinite(delay_ms).all():
            row = np.flatnonzero(~np.isfinite(delay_ms).all(axis=1))[0]
            name = self.traces.names[self.episodes.trace_index[row]]
            raise ValueError(f"trace {name}: a chunk does not arrive within {MOST_INTERVALS:,} of its samples")
        previous = np.concatenate([before[:, None], levels[:, :-1]], axis=1)
        kbps, previous_kbps = qoe.BITRATES_KBPS[levels], qoe.BITRATES_KBPS[previous]
        rebuffer_s = rebuffer_ms / 1000
        return Outcome(
            level=levels,
            bitrate_kbps=kbps,
            size_bytes=self.world.sizes_bytes[levels, first_chunk + np.arange(levels.shape[1])],
            delay_ms=delay_ms,
            rebuffer_s=rebuffer_s,
            buffer_s=buffer_ms / 1000,
            smoothness_mbps=np.abs(kbps - previous_kbps) / 1000,
            reward=qoe.reward(kbps, rebuffer_s, previous_kbps),
            sleep_ms=sleep_ms,
            residual_ms=residual_ms,
        )
