"""How rollouts grow: 10, 100, 1000 and 10000 episodes, time and memory, for BBA, RobustMPC and a tiny language model.

Episodes are the bundled test traces, repeated from other starting points. Each row is a process of its own on one thread;
memory is what the rollout adds to what the process held before. Writes reports/benchmarks/scaling.md.

    python tests/bench/bench_scaling.py
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from measured import in_child, measured, publish

from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicySettings
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry, Video

SIZES = (10, 100, 1000, 10_000)
POLICIES = {"bba": "BBA", "mpc": "RobustMPC", "llm": "language model (one layer of tiny-llama, cached, blocks of 512)"}


def policy_named(name: str, video: Video) -> Policy:
    if name != "llm":
        return BBA() if name == "bba" else RobustMPC(video)
    from llm_fixtures import tiny_network, toy_pool
    from netllm_lib.abr.batches import pool_returns
    from netllm_lib.abr.policies.llm import LLMPolicy
    from netllm_lib.checkpoint import describe

    network = tiny_network(layers=1)
    return LLMPolicy(network, describe(network, PolicySettings(20, pool_returns(toy_pool())[1])))


def child(name: str, count: int) -> None:
    registry = Registry(SAMPLE)
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    policy = policy_named(name, video)

    def simulator(episodes: int) -> Simulator:
        repeats = -(-episodes // len(traces))
        return Simulator(traces, video, sound_episodes(traces, repeats=repeats).rows(range(episodes)))

    rollout(policy, simulator(2))  # compiles
    work = simulator(count)
    with measured() as first:
        rollout(policy, work)
    seconds = [first["seconds"]]
    while len(seconds) < 5 and sum(seconds) < 5:
        with measured() as again:
            rollout(policy, work)
        seconds.append(again["seconds"])
    with measured() as drawing:
        simulator(count)
    print(json.dumps(first | {"seconds": statistics.median(seconds), "draw_seconds": drawing["seconds"]}))


def main() -> None:
    text = f"""# Rollouts of 10 to 10,000 episodes

The bundled test traces, repeated from other starting points; each row a process of its own, one thread,
{platform.machine()}, Python {platform.python_version()}. Command: `python tests/bench/bench_scaling.py`.

Seconds are the median of up to five rollouts; memory is the peak that the first one adds to the process. Growth is the
time per episode against the row above: 1 is linear; below 1, the fixed cost of a call is spread over more episodes.
"""
    for name, title in POLICIES.items():
        text += f"""
## {title}

| episodes | rollout, s | ms per episode | growth | added memory, MB | kB per episode | drawing the episodes, s |
|---|---|---|---|---|---|---|
"""
        before = None
        for count in SIZES:
            found = in_child(__file__, name, count)
            each = found["seconds"] / count
            growth = "" if before is None else f"{each / before:.2f}"
            memory = f"{found['peak_mb']:.1f} | {found['peak_mb'] * 1024 / count:.1f}"
            time = f"{found['seconds']:.3f} | {each * 1000:.3f} | {growth}"
            text += f"| {count:,} | {time} | {memory} | {found['draw_seconds']:.2f} |\n"
            before = each
    publish("scaling", text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        main()
