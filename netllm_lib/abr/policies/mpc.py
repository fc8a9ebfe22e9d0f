"""RobustMPC (Yin et al., SIGCOMM 2015), sound by default and, by `MPCConfig.upstream()`, with the original's handicaps.

Predict the throughput of the next chunks, try every sequence of levels over the horizon, play the first of the best.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import numpy as np
from numba import njit

from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import BITRATES_KBPS, CHUNKS, LEVELS, REBUFFER_PENALTY
from netllm_lib.abr.traces import Video

KBPS = BITRATES_KBPS.astype(np.float64)


@dataclass(frozen=True)
class MPCConfig:
    """Settings of RobustMPC. Defaults are sound; `upstream()` is what the original plays, bit for bit."""

    # planning
    horizon: int = 5  # chunks looked ahead; fewer at the end of the video
    jump_limit: int | None = None  # largest step between consecutive levels of a plan; the original: 1
    size_index: Literal["next", "one-late"] = "next"  # the original plans with the sizes of one chunk too far
    buffer_cap_s: float | None = 60.0  # the client's buffer cap inside the plan; the original: none
    ties: Literal["first", "last"] = "first"  # which of equally good plans, in lexicographic order; the original: last
    # prediction
    robust: bool = True  # divide the harmonic mean by 1 + the largest recent relative error
    window: int = 5  # throughput samples in the harmonic mean
    error_window: int = 5  # errors in the maximum
    error_weight: float = 1.0  # by which the largest error counts
    carry_history: bool = False
    """Keep estimates and errors from trace to trace, so that the order of the traces matters, as the original does."""
    float32_throughput: Literal["none", "first-trace", "all"] = "none"
    """The traces whose throughput samples are rounded to float32."""

    @classmethod
    def strong(cls) -> MPCConfig:
        """The setting that did best on validation traces: a longer look ahead, and more caution after errors."""
        return cls(horizon=8, error_window=8, error_weight=1.25)

    @classmethod
    def upstream(cls, pool: bool = False) -> MPCConfig:
        """As the original evaluates, or (`pool=True`) as it generates pools: there all states are float32."""
        rounded: Literal["first-trace", "all"] = "all" if pool else "first-trace"
        handicaps = cls(jump_limit=1, size_index="one-late", buffer_cap_s=None, ties="last", carry_history=True)
        return replace(handicaps, float32_throughput=rounded)


@njit(cache=True)
def plan(
    sizes_mb: np.ndarray,  # [horizon, 6]
    buffer_s: float,
    last_level: int,
    mb_per_s: float,  # predicted throughput
    jump_limit: int,
    buffer_cap_s: float,
    first_wins: bool,  # of equally good plans
) -> int:
    """First level of the best sequence over the horizon, by depth-first search in lexicographic order.

    Branches that cannot reach the best score any more, even at the top level without stalls, are cut.
    Returns 0 for an empty horizon. The order of additions is the original's, so scores are bit-equal to it.
    """
    horizon = len(sizes_mb)
    slack = 1e-6  # far above rounding, so that cutting never decides a tie
    best, best_first = -np.inf, 0
    choice = np.full(horizon + 1, -1)
    # by depth, sums over the levels chosen so far
    buffer, (stall, kbps, change) = np.full(horizon + 1, buffer_s), np.zeros((3, horizon + 1))
    depth = 0 if horizon else -1
    while depth >= 0:
        before = choice[depth - 1] if depth else last_level
        level = choice[depth] = max(choice[depth] + 1, before - jump_limit)
        if level >= LEVELS or level > before + jump_limit:
            choice[depth] = -1
            depth -= 1
            continue
        deeper = depth + 1
        download_s = sizes_mb[depth, level] / mb_per_s
        short_s = download_s - buffer[depth]
        stall[deeper] = stall[depth] + short_s if short_s > 0 else stall[depth]
        buffer[deeper] = min((0.0 if short_s > 0 else buffer[depth] - download_s) + 4.0, buffer_cap_s)
        kbps[deeper] = kbps[depth] + KBPS[level]
        change[deeper] = change[depth] + abs(KBPS[level] - KBPS[before])
        score = kbps[deeper] / 1000 - REBUFFER_PENALTY * stall[deeper] - change[deeper] / 1000
        if deeper < horizon:
            if score + (horizon - deeper) * (KBPS[-1] / 1000) + slack >= best:
                depth = deeper
        elif score > best or (score == best and not first_wins):
            best, best_first = score, choice[0]
    return best_first


@njit(cache=True)
def _plans(
    sizes_mb: np.ndarray, buffer_s: np.ndarray, last_level: np.ndarray, mb_per_s: np.ndarray, jump: int, cap_s: float, first: bool
) -> np.ndarray:  # fmt: skip
    levels = np.empty(len(buffer_s), np.int64)
    for i in range(len(levels)):
        levels[i] = plan(sizes_mb, buffer_s[i], last_level[i], mb_per_s[i], jump, cap_s, first)
    return levels


class RobustMPC(Policy):
    """Robust model-predictive control for one video."""

    name = "mpc"

    def __init__(self, video: Video, config: MPCConfig | None = None):
        self.config = config or MPCConfig()
        self.carries_state = self.acts_after_last = self.config.carry_history
        self._late = int(self.config.size_index == "one-late")
        if self._late and video.sizes_bytes.shape[1] < CHUNKS + 1:
            needed = f"needs {CHUNKS + 1} lines in each size file, found {video.sizes_bytes.shape[1]}"
            raise ValueError(
                f"video {video.name}: the original's MPC reads past the end and {needed}; play the sound form"
            )
        self._sizes_mb = video.sizes_bytes.T / 1000000.0  # [chunks, 6]

    def reset(self, episodes: Episodes) -> None:
        self._errors = deque[np.ndarray](maxlen=self.config.error_window)  # relative errors [N] of the last means
        self._mean: np.ndarray | None = None  # the last harmonic mean [N]

    def act(self, observation: Observation) -> np.ndarray:
        config, chunk = self.config, observation.chunk
        if chunk == 1 and not config.carry_history:
            self._errors.clear()
            self._mean = None
        past = observation.state[:, 2, -min(config.window, chunk) :]  # MB/s
        first_trace = config.float32_throughput == "first-trace" and observation.episode[0] == 0
        if config.float32_throughput == "all" or first_trace:
            past = past.astype(np.float32).astype(np.float64)
        newest = past[:, -1]
        self._errors.append(np.zeros(len(past)) if self._mean is None else abs(self._mean - newest) / newest)
        self._mean = 1 / (
            sum(1 / sample for sample in past.T) / past.shape[1]
        )  # summed from left to right, as the original does
        weight = config.error_weight if config.robust else 0.0
        start = chunk + self._late
        return _plans(
            self._sizes_mb[start : start + min(config.horizon, CHUNKS - chunk)],
            observation.buffer_s,
            observation.last_level,
            self._mean / (1 + weight * reduce(np.maximum, self._errors)),
            LEVELS if config.jump_limit is None else config.jump_limit,
            np.inf if config.buffer_cap_s is None else config.buffer_cap_s,
            config.ties == "first",
        )
