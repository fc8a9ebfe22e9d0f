"""What the baselines cost: seconds for 100 traces, once everything is imported and compiled.

Each policy plays the test set's traces (repeated if there are fewer than 100) in lock-step, the original's MPC one by one. The
actor's weights are loaded before; Genet is played where its checkpoint is. Writes reports/benchmarks/policies.md.

    OPENBLAS_NUM_THREADS=1 python tests/bench/bench_policies.py [ROUNDS]
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time

from measured import publish

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import Episodes, sound_episodes, upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.catalogue import Preset, make_policy
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry

TARGET_S = 0.3


def main(rounds: int = 15) -> None:
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    sound = sound_episodes(traces, repeats=-(-100 // len(traces))).rows(range(100))
    as_original = upstream_episodes(traces, trace_num=min(100, len(traces)), draws_actions=True)
    cases: list[tuple[str, str, Preset, Episodes]] = [
        ("MPC", "mpc", "sound", sound),
        ("MPC as the original plays it", "mpc", "upstream", as_original),
        ("BBA", "bba", "sound", sound),
    ]
    if "genet" in registry.actor_folders():
        cases.append(("Genet", "genet", "sound", sound))
    players: list[tuple[str, Policy, Simulator]] = [
        (label, make_policy(name, video, registry, preset), Simulator(traces, video, episodes))
        for label, name, preset, episodes in cases
    ]
    rewards = [qoe.summarise(play(policy, simulator)).reward for _, policy, simulator in players]  # compiles, too
    times: list[list[float]] = [[] for _ in players]
    for _ in range(rounds):
        for i, (_, policy, simulator) in enumerate(players):
            start = time.perf_counter()
            play(policy, simulator)
            times[i].append(time.perf_counter() - start)

    lines = [
        "# Policies",
        "",
        f"{traces.name}, {video.name}, {CHUNKS} chunks per trace, {rounds} rounds in turns, {platform.machine()}, "
        f"Python {platform.python_version()}, $OPENBLAS_NUM_THREADS {os.environ.get('OPENBLAS_NUM_THREADS', 'not set')}.",
        f"Command: `python tests/bench/bench_policies.py {rounds}`. Seconds from `play` to the table of chunks, after imports and "
        f"compilation; the target is {TARGET_S} s.",
        "",
        "| | traces | seconds (median) | slowest round | mean reward |",
        "|---|---|---|---|---|",
    ]
    for (label, _, simulator), row, reward in zip(players, times, rewards, strict=True):
        lines.append(f"| {label} | {len(simulator)} | {statistics.median(row):.3f} | {max(row):.3f} | {reward:.4f} |")
    if "genet" not in registry.actor_folders():
        lines += ["", "Genet was not measured: no checkpoint of it was found."]
    text = "\n".join(lines) + "\n"
    publish("policies", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
