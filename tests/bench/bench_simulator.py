"""Simulator speed: chunks per second of the compiled lock-step simulator against the plain one-trace-at-a-time environment.

Both play the same levels over the same 100 traces, in turns in one process on one thread; ratios are medians over the rounds.
Two figures for ours: `step` is 48 lock-step calls from Python with the state kept for a policy, as `play` uses it; `replay`
is one compiled call for given levels. Writes reports/benchmarks/simulator.md.

    python tests/bench/bench_simulator.py [ROUNDS]
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measured import publish

from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry
from reference import ReferenceEnvironment


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(rounds: int = 15) -> None:
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    episodes = sound_episodes(traces, repeats=-(-100 // len(traces))).rows(range(100))
    levels = np.random.default_rng(0).integers(0, 6, (100, CHUNKS))
    simulator = Simulator(traces, video, episodes)

    def step() -> None:
        simulator.reset()
        for chunk in range(CHUNKS):
            simulator.step(levels[:, chunk])

    def plain(as_original: bool = False) -> None:
        for row, (index, pointer) in enumerate(zip(episodes.trace_index, episodes.start_ptr, strict=True)):
            environment = ReferenceEnvironment(traces.traces[index], video, int(pointer), as_original=as_original)
            for level in levels[row].tolist():
                environment.download(level)

    def replay() -> None:
        simulator.replay(levels)

    def original() -> None:
        plain(as_original=True)

    works = (step, replay, original, plain)
    for warm in works:
        warm()
    times = [tuple(seconds(work) for work in works) for _ in range(rounds)]
    chunks = levels.size
    lines = [
        "# Simulator",
        "",
        f"{traces.name}, {video.name}, 100 episodes of {CHUNKS} chunks, {rounds} rounds in turns, one thread, "
        f"{platform.machine()}, Python {platform.python_version()}. Command: `python tests/bench/bench_simulator.py {rounds}`.",
        "",
        "The opponent is a transcription of the original's environment in plain Python (`tests/reference.py`) with the original's",
        "NumPy maxima and list of next sizes; the last row is the same without them.",
        "",
        "| | chunks/s (median) | against the transcription, median of the rounds' ratios |",
        "|---|---|---|",
    ]
    for column, name in enumerate(("lock-step `step`, state kept", "`replay`", "transcription", "leaner plain Python")):
        ratio = statistics.median(row[2] / row[column] for row in times)
        rate = chunks / statistics.median(row[column] for row in times)
        lines.append(f"| {name} | {rate:,.0f} | {ratio:.1f} × |")
    text = "\n".join(lines) + "\n"
    publish("simulator", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
