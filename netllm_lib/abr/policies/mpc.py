"""RobustMPC (Yin et al., SIGCOMM 2015), sound by default and, by `MPCConfig.upstream()`, with the original's handicaps.

Predict the throughput of the next chunks, try every sequence of levels over the horizon, play the first of the best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numba import njit

from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes, Observation
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import BITRATES_KBPS, CHUNKS, LEVELS, REBUFFER_PENALTY
from netllm_lib.abr.simulator import STATE_COLUMNS, Array, Simulator, World, begin, download, episode_of
from netllm_lib.abr.traces import Video

KBPS = BITRATES_KBPS.astype(np.float64)
compiled = njit(cache=True, nogil=True, error_model="numpy")


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


@compiled
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


class Settings(NamedTuple):
    """`MPCConfig` as compiled functions take it."""

    horizon: int
    jump_limit: int
    late: int  # chunks by which the sizes are too far
    buffer_cap_s: float
    first_wins: bool
    window: int
    error_weight: float


@compiled
def choose(
    settings: Settings,
    sizes_mb: np.ndarray,  # [chunks, 6]
    chunk: int,
    throughput: np.ndarray,  # MB/s of the last chunks, the newest last
    buffer_s: float,
    last_level: int,
    memory: np.ndarray,  # the last harmonic mean, 0 before the first, then the relative errors of the last ones
) -> int:
    """The level of `chunk`, and `memory` moves on."""
    for place in range(1, len(memory) - 1):
        memory[place] = memory[place + 1]
    newest, total = throughput[-1], 0.0
    memory[-1] = abs(memory[0] - newest) / newest if memory[0] else 0.0
    count = min(settings.window, chunk, len(throughput))
    for sample in throughput[-count:]:  # summed from left to right, as the original does
        total += 1 / sample
    memory[0] = 1 / (total / count)
    mb_per_s = memory[0] / (1 + settings.error_weight * memory[1:].max())
    start = chunk + settings.late
    sizes = sizes_mb[start : start + min(settings.horizon, CHUNKS - chunk)]
    return plan(sizes, buffer_s, last_level, mb_per_s, settings.jump_limit, settings.buffer_cap_s, settings.first_wins)


@compiled
def _choose_all(
    settings: Settings, sizes_mb: Array, chunk: int, throughput: Array, buffer_s: Array, last: Array, memory: Array
) -> Array:
    """`choose` for N episodes."""
    levels = np.empty(len(buffer_s), np.int64)
    for i in range(len(levels)):
        levels[i] = choose(settings, sizes_mb, chunk, throughput[i], buffer_s[i], last[i], memory[i])
    return levels


@compiled
def _play_all(
    settings: Settings, sizes_mb: Array, world: World, decisions: int, rounded: Array, memory: Array, levels: Array
) -> None:
    """Play whole episodes: fills in `levels` [N, chunks] behind the first. A memory of one row goes from trace to trace."""
    throughput = np.empty(STATE_COLUMNS)
    for i in range(len(levels)):
        episode = episode_of(world, i)
        client, level = begin(episode), levels[i, 0]
        mine = memory[min(i, len(memory) - 1)]
        for chunk in range(1, decisions + 1):
            client, took = download(episode, client, chunk - 1, level)
            throughput[:-1] = throughput[1:].copy()
            throughput[-1] = episode.sizes_bytes[level, chunk - 1] / took.delay_ms / 1000
            if rounded[i]:
                throughput[-1] = np.float32(throughput[-1])
            level = choose(settings, sizes_mb, chunk, throughput, client.buffer_ms / 1000, level, mine)
            if chunk < levels.shape[1]:
                levels[i, chunk] = level


class RobustMPC(Policy):
    """Robust model-predictive control for one video."""

    name = "mpc"

    def __init__(self, video: Video, config: MPCConfig | None = None):
        self.config = config = config or MPCConfig()
        self.carries_state = self.acts_after_last = config.carry_history
        late = int(config.size_index == "one-late")
        if late and video.sizes_bytes.shape[1] < CHUNKS + 1:
            needed = f"needs {CHUNKS + 1} lines in each size file, found {video.sizes_bytes.shape[1]}"
            raise ValueError(
                f"video {video.name}: the original's MPC reads past the end and {needed}; play the sound form"
            )
        self._sizes_mb = np.ascontiguousarray(video.sizes_bytes.T / 1000000.0)  # [chunks, 6]
        self._settings = Settings(
            config.horizon,
            LEVELS if config.jump_limit is None else config.jump_limit,
            late,
            np.inf if config.buffer_cap_s is None else config.buffer_cap_s,
            config.ties == "first",
            config.window,
            config.error_weight if config.robust else 0.0,
        )

    def reset(self, episodes: Episodes) -> None:
        self._forget(1)

    def _forget(self, clients: int) -> None:
        self._memory = np.zeros((clients, 1 + self.config.error_window))  # see `choose`

    def act(self, observation: Observation) -> np.ndarray:
        if observation.chunk == 1 and not self.config.carry_history:
            self._forget(len(observation.episode))
        throughput = np.ascontiguousarray(observation.state[:, 2])  # MB/s
        rounded = self._rounded(observation.episode)[:, None]
        throughput = np.where(rounded, throughput.astype(np.float32).astype(np.float64), throughput)
        seen = observation.chunk, throughput, observation.buffer_s, observation.last_level
        return _choose_all(self._settings, self._sizes_mb, *seen, self._memory)

    def play_through(self, simulator: Simulator) -> np.ndarray:
        if not self.config.carry_history:
            self._forget(len(simulator))
        levels = np.full((len(simulator), CHUNKS), FIRST_LEVEL)
        decisions, rounded = CHUNKS - (not self.acts_after_last), self._rounded(simulator.rows)
        _play_all(self._settings, self._sizes_mb, simulator.world, decisions, rounded, self._memory, levels)
        return levels

    def _rounded(self, episode: np.ndarray) -> np.ndarray:
        """[N] True for the episodes whose throughput samples are rounded to float32."""
        traces = self.config.float32_throughput
        return np.full(len(episode), traces == "all") | ((traces == "first-trace") & (episode == 0))
