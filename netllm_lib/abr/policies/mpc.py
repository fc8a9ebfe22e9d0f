"""RobustMPC (Yin et al., SIGCOMM 2015), sound by default and, by `MPCConfig.upstream()`, with the original's handicaps.

Predict the throughput of the next chunks, try every sequence of levels over the horizon, play the first of the best.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        return cls(
            jump_limit=1,
            size_index="one-late",
            buffer_cap_s=None,
            ties="last",
            carry_history=True,
            float32_throughput="all" if pool else "first-trace",
        )


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
    buffer, stall, kbps, change = (
        np.full(horizon + 1, buffer_s),
        np.zeros(horizon + 1),
        np.zeros(horizon + 1),
        np.zeros(horizon + 1),
    )
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


@njit(cache=True, error_model="numpy")
def predict(past_mb_per_s: np.ndarray, errors: np.ndarray, error_weight: float) -> tuple[float, float]:
    """The throughput of the next chunks, and the harmonic mean of `past_mb_per_s` [samples] that it rests on.

    It is the mean by 1 + `error_weight` · the largest of `errors`, the relative errors of the last means.
    """
    inverse = 0.0
    for sample in past_mb_per_s:  # left to right, as the original sums
        inverse += 1 / sample
    mean = 1.0 / (inverse / len(past_mb_per_s))
    worst = 0.0
    for error in errors:
        worst = max(worst, error)
    return mean / (1 + error_weight * worst), mean


@njit(cache=True, error_model="numpy")
def _decide(
    past_mb_per_s: np.ndarray, means: np.ndarray, errors: np.ndarray, call: int, error_window: int, error_weight: float,
    sizes_mb: np.ndarray, buffer_s: np.ndarray, last_level: np.ndarray, jump_limit: int, buffer_cap_s: float, first_wins: bool,
) -> np.ndarray:  # fmt: skip
    """Levels [N]; updates the last harmonic means [N] and column `call` of `errors` [N, calls]."""
    levels = np.empty(len(past_mb_per_s), np.int64)
    for i in range(len(levels)):
        newest = past_mb_per_s[i, -1]
        if call > 0:
            errors[i, call] = abs(means[i] - newest) / newest
        recent = errors[i, max(0, call + 1 - error_window) : call + 1]
        mb_per_s, means[i] = predict(past_mb_per_s[i], recent, error_weight)
        levels[i] = plan(sizes_mb, buffer_s[i], last_level[i], mb_per_s, jump_limit, buffer_cap_s, first_wins)
    return levels


class RobustMPC(Policy):
    """Robust model-predictive control for one video."""

    name = "mpc"

    def __init__(self, video: Video, config: MPCConfig | None = None):
        self.config = config or MPCConfig()
        self.carries_state = self.acts_after_last = self.config.carry_history
        self._late = 1 if self.config.size_index == "one-late" else 0
        if self._late and video.sizes_bytes.shape[1] < CHUNKS + 1:
            raise ValueError(
                f"video {video.name}: the original's MPC reads one chunk past the end and needs {CHUNKS + 1} lines in each "
                f"size file, found {video.sizes_bytes.shape[1]}; play the sound form instead"
            )
        self._sizes_mb = video.sizes_bytes.T / 1000000.0  # [chunks, 6]

    def reset(self, episodes: Episodes) -> None:
        self._begin(1, CHUNKS * (len(episodes) if self.config.carry_history else 1))

    def _begin(self, rows: int, calls: int) -> None:
        self._errors = np.zeros((rows, calls))
        self._means = np.zeros(rows)  # the last harmonic means, not discounted
        self._calls = 0

    def act(self, observation: Observation) -> np.ndarray:
        config = self.config
        if observation.chunk == 1 and not config.carry_history:
            self._begin(len(observation.episode), CHUNKS)
        past = np.ascontiguousarray(observation.state[:, 2, -min(config.window, observation.chunk) :])  # MB/s
        first_trace = bool(observation.episode[0] == 0)
        if config.float32_throughput == "all" or (config.float32_throughput == "first-trace" and first_trace):
            past = past.astype(np.float32).astype(np.float64)
        start = observation.chunk + self._late
        levels = _decide(
            past,
            self._means,
            self._errors,
            self._calls,
            config.error_window if config.robust else 0,
            config.error_weight,
            self._sizes_mb[start : start + min(config.horizon, CHUNKS - observation.chunk)],
            observation.buffer_s,
            observation.last_level,
            LEVELS if config.jump_limit is None else config.jump_limit,
            np.inf if config.buffer_cap_s is None else config.buffer_cap_s,
            config.ties == "first",
        )
        self._calls += 1
        return levels
