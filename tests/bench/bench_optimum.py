"""The offline optimum of 100 traces: seconds on one and on two threads, how good the plans are, and that they play as promised.

Also what the value of single decisions costs (`continuations`, on the states that MPC visits).
Writes reports/benchmarks/optimum.md.

    python tests/bench/bench_optimum.py [ROUNDS]
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from measured import publish

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.optimum import Plans, SearchConfig, best_plans, continuations
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry

SEARCHES = {
    "narrow": SearchConfig(width=100, bin_ms=50.0),
    "default": SearchConfig(),
    "wide": SearchConfig(width=3000, bin_ms=5.0),
}


def seconds(work: Callable[[int], object], rounds: int) -> list[float]:
    """Medians over the rounds, of work on one and on two threads in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for threads in (1, 2):
            start = time.perf_counter()
            work(threads)
            times[threads - 1].append(time.perf_counter() - start)
    return [statistics.median(row) for row in times]


def main(rounds: int = 3) -> None:
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    episodes = upstream_episodes(traces, trace_num=-1)
    simulator = Simulator(traces, video, episodes)

    def plan(config: SearchConfig, threads: int) -> Plans:
        return best_plans(traces, video, episodes, config, threads=threads)

    best_plans(traces, video, episodes.rows([0]))  # compiles
    mpc = rollout(RobustMPC(video), simulator)
    continuations(simulator, mpc.level, [0])
    lines = [
        "# Offline optimum",
        "",
        f"{traces.name}, {video.name}, {len(episodes)} traces in fixed order, {CHUNKS} chunks, {platform.machine()} with "
        f"{os.cpu_count()} cores, Python {platform.python_version()}.",
        f"Command: `python tests/bench/bench_optimum.py {rounds}` (medians over the rounds, after compilation).",
        "",
        "| search | states a chunk | bin (ms) | mean reward | 1 thread (s) | 2 threads (s) |",
        "|---|---|---|---|---|---|",
    ]
    for name, config in SEARCHES.items():
        plans = plan(config, 1)
        one, two = seconds(partial(plan, config), rounds)
        lines.append(
            f"| {name} | {config.width} | {config.bin_ms:g} | {plans.reward.mean():.5f} | {one:.2f} | {two:.2f} |"
        )
    plans = plan(SearchConfig(), 2)
    played = qoe.per_trace(play(Replay(plans.levels), simulator))["reward"].to_numpy()
    values = continuations(simulator, mpc.level)[:, 1:]
    lost = values.max(axis=2).sum() - np.take_along_axis(values, mpc.level[:, 1:, None], axis=2).sum()
    one, two = seconds(lambda threads: continuations(simulator, mpc.level, threads=threads), 1)
    decisions = values.shape[0] * values.shape[1]
    regret = (plans.reward - mpc.reward[:, 1:].mean(axis=1)).mean()
    lines += [
        "",
        f"Plan check: `play(Replay(plans.levels))` reproduces the reward of all {len(played)} plans of the default search, largest "
        f"difference {np.abs(played - plans.reward).max():.1e}.",
        "",
        f"Value of single decisions, all six levels in the {decisions} states that MPC visits: {one:.1f} s on one thread, "
        f"{two:.1f} s on two. The losses of its decisions add up to {lost / decisions:.4f} a chunk; "
        f"its regret to the plans is {regret:.4f}.",
    ]
    text = "\n".join(lines) + "\n"
    publish("optimum", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
