"""What playing costs, on the test set's traces: the simulator, the baselines, and the offline optimum.

CPU seconds of one thread, medians over the rounds, once everything is imported and compiled. The simulator's opponent is a
transcription of the original's environment in plain Python (`tests/reference.py`). Genet is played where its checkpoint is. Writes
reports/benchmarks/play.md.

    OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python tests/bench/bench_play.py [ROUNDS]
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measured import publish

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import sound_episodes, upstream_episodes
from netllm_lib.abr.evaluate import baselines
from netllm_lib.abr.optimum import SearchConfig, best_plans, continuations
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry
from reference import ReferenceEnvironment

TRACES = 100
SEARCHES = {"narrow": SearchConfig(width=100, bin_ms=50.0), "default": SearchConfig(), "wide": SearchConfig(3000, 5.0)}


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds, after one run that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def main(rounds: int = 5) -> None:
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    episodes = sound_episodes(traces, repeats=-(-TRACES // len(traces))).rows(range(TRACES))
    simulator, levels = Simulator(traces, video, episodes), np.random.default_rng(0).integers(0, 6, (TRACES, CHUNKS))

    def step() -> None:
        simulator.reset()
        for chunk in range(CHUNKS):
            simulator.step(levels[:, chunk])

    def plain() -> None:
        for row, (index, pointer) in enumerate(zip(episodes.trace_index, episodes.start_ptr, strict=True)):
            environment = ReferenceEnvironment(traces.traces[index], video, int(pointer), as_original=True)
            for level in levels[row].tolist():
                environment.download(level)

    transcription = seconds(plain, rounds)
    lines = [
        "# Playing",
        "",
        f"{traces.name}, {video.name}, {TRACES} traces, {CHUNKS} chunks each; CPU seconds of one thread,",
    ]
    lines += [f"medians of {rounds} rounds. {platform.machine()}, Python {platform.python_version()}. Command:"]
    lines += [f"`OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python tests/bench/bench_play.py {rounds}`.", ""]
    lines += ["## Simulator", "", "| | chunks/s | against the transcription |", "|---|---|---|"]
    works: dict[str, Callable[[], object]] = {"`step`, state kept": step, "`replay`": partial(simulator.replay, levels)}
    for name, work in works.items():
        took = seconds(work, rounds)
        lines.append(f"| {name} | {levels.size / took:,.0f} | {transcription / took:.1f} × |")

    original = upstream_episodes(traces, trace_num=min(TRACES, len(traces)), draws_actions=True)
    lines += ["", "## Policies", "", "| | seconds from `play` to the table | mean reward |", "|---|---|---|"]
    for name, policy in baselines(video, registry).items():
        work = partial(play, policy, Simulator(traces, video, original if policy.carries_state else episodes))
        lines.append(f"| {name} | {seconds(work, rounds):.3f} | {qoe.summarise(work()).reward:.4f} |")

    fixed = upstream_episodes(traces, trace_num=-1)
    lines += ["", "## Offline optimum", "", "| search | states a chunk | bin (ms) | mean reward | seconds |"]
    lines += ["|---|---|---|---|---|"]
    for name, config in SEARCHES.items():
        search = partial(best_plans, traces, video, fixed, config)
        reward, took = search().reward.mean(), seconds(search, 1)
        lines.append(f"| {name} | {config.width} | {config.bin_ms:g} | {reward:.5f} | {took:.2f} |")
    exact = Simulator(traces, video, fixed)
    mpc = rollout(RobustMPC(video), exact)
    took = seconds(partial(continuations, exact, mpc.level), 1)
    lines += ["", f"The value of all six levels in the {mpc.level[:, 1:].size} states that MPC visits: {took:.1f} s."]
    publish("play", "\n".join(lines))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
