"""The original's environment, one trace at a time in plain Python, written from its description: the simulator's test partner."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.traces import Trace, Video


class Chunk(NamedTuple):
    delay_ms: float
    sleep_ms: float  # as reported
    buffer_s: float
    rebuffer_s: float
    size_bytes: int


class ReferenceEnvironment:
    """One client. `download(level)` once per chunk."""

    def __init__(
        self, trace: Trace, video: Video, start_ptr: int, noise: np.ndarray | None = None, as_original: bool = False
    ):
        """`as_original` takes maxima by NumPy and lists the next sizes at every chunk, as the original does; for benchmarks."""
        self.maximum: Callable = np.maximum if as_original else max
        self.as_original = as_original
        self.time_s, self.mbps = trace.time_s.tolist(), trace.mbps.tolist()
        self.sizes = video.sizes_bytes.tolist()
        self.noise = noise
        self.chunk = 0
        self.buffer_ms = 0.0
        self.ptr = start_ptr
        self.last_s = self.time_s[start_ptr - 1]

    def _next_interval(self) -> None:
        self.last_s = self.time_s[self.ptr]
        self.ptr += 1
        if self.ptr >= len(self.mbps):
            self.ptr, self.last_s = 1, 0.0

    def download(self, level: int) -> Chunk:
        size = self.sizes[level][self.chunk]
        sent, delay = 0.0, 0.0
        while True:
            rate = self.mbps[self.ptr] * 1e6 / 8
            interval = self.time_s[self.ptr] - self.last_s
            payload = rate * interval * 0.95
            if sent + payload > size:
                part = (size - sent) / rate / 0.95
                delay += part
                self.last_s += part
                break
            sent += payload
            delay += interval
            self._next_interval()
        delay = delay * 1000.0 + 80.0
        if self.noise is not None:
            delay *= float(self.noise[self.chunk])
        rebuffer = self.maximum(delay - self.buffer_ms, 0.0)
        self.buffer_ms = self.maximum(self.buffer_ms - delay, 0.0) + 4000.0
        sleep = 0.0
        if self.buffer_ms > 60000.0:
            sleep = math.ceil((self.buffer_ms - 60000.0) / 500.0) * 500.0
            self.buffer_ms -= sleep
            while True:
                interval = self.time_s[self.ptr] - self.last_s
                if interval > sleep / 1000.0:
                    self.last_s += sleep / 1000.0
                    break
                sleep -= interval * 1000.0
                self._next_interval()
        self.chunk += 1
        if self.as_original:
            following = self.chunk if self.chunk < CHUNKS else 0
            self.next_sizes = [self.sizes[i][following] for i in range(LEVELS)]
        return Chunk(delay, sleep, self.buffer_ms / 1000.0, rebuffer / 1000.0, size)
