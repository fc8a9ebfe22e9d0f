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
from collections.abc import Callable, Mapping
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
from netllm_lib.abr.policies.simple import Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry
from reference import ReferenceEnvironment

TRACES = 100
SEARCHES = {"narrow": SearchConfig(width=100, bin_ms=50.0), "default": SearchConfig(), "wide": SearchConfig(3000, 5.0)}


def seconds(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, run in turns, after one run of all that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(row) for name, row in times.items()}


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

    simulated = {"`step`, state kept": step, "`replay`": lambda: simulator.replay(levels), "transcription": plain}
    times = seconds(simulated, rounds)
    lines = [
        "# Playing",
        "",
        f"{traces.name}, {video.name}, {TRACES} traces, {CHUNKS} chunks each; CPU seconds of one thread,",
    ]
    lines += [f"medians of {rounds} rounds. {platform.machine()}, Python {platform.python_version()}. Command:"]
    lines += [
        f"`OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python tests/bench/bench_play.py {rounds}`.",
        "",
        "## Simulator",
        "",
    ]
    lines += ["| | chunks/s | against the transcription |", "|---|---|---|"]
    for name, took in times.items():
        lines.append(f"| {name} | {levels.size / took:,.0f} | {times['transcription'] / took:.1f} × |")

    original = upstream_episodes(traces, trace_num=min(TRACES, len(traces)), draws_actions=True)
    players = {
        name: (policy, Simulator(traces, video, original if policy.carries_state else episodes))
        for name, policy in baselines(video, registry).items()
    }
    times = seconds({name: partial(play, *pair) for name, pair in players.items()}, rounds)
    lines += ["", "## Policies", "", "| | seconds from `play` to the table | mean reward |", "|---|---|---|"]
    lines += [
        f"| {name} | {times[name]:.3f} | {qoe.summarise(play(*pair)).reward:.4f} |" for name, pair in players.items()
    ]

    fixed = upstream_episodes(traces, trace_num=-1)
    exact = Simulator(traces, video, fixed)
    lines += [
        "",
        "## Offline optimum",
        "",
        "| search | states a chunk | bin (ms) | mean reward | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, config in SEARCHES.items():
        took = seconds({name: partial(best_plans, traces, video, fixed, config)}, 1)[name]
        reward = best_plans(traces, video, fixed, config).reward.mean()
        lines.append(f"| {name} | {config.width} | {config.bin_ms:g} | {reward:.5f} | {took:.2f} |")
    plans, mpc = best_plans(traces, video, fixed), rollout(RobustMPC(video), exact)
    off = np.abs(qoe.per_trace(play(Replay(plans.levels), exact))["reward"].to_numpy() - plans.reward).max()
    start = time.process_time()
    values = continuations(exact, mpc.level)[:, 1:]
    took = time.process_time() - start
    lost = values.max(axis=2) - np.take_along_axis(values, mpc.level[:, 1:, None], axis=2)[..., 0]
    lines += [
        "",
        f"Played, the plans have the reward that the search promised; largest difference {off:.1e}. The value of all six",
    ]
    lines += [
        f"levels in the {lost.size} states that MPC visits: {took:.1f} s. Its decisions lose {lost.mean():.4f} a chunk; its"
    ]
    lines += [f"regret to the plans is {(plans.reward - mpc.reward[:, 1:].mean(axis=1)).mean():.4f}."]
    publish("play", "\n".join(lines))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
