"""What a decision costs: the language model beside the small transformer and the classical policies, on the CPU.

An episode alone, as in a player, and 100 in lock-step, as in a test. All networks with a cache, so a decision computes its own
tokens only; LoRA merged, PLM weights in float32. Weights do not matter to the time, so nothing is trained. In turns in one
process; ratios are medians of the rounds' ratios of CPU seconds to the small transformer's. Writes reports/benchmarks/decisions.md.

    python tests/bench/bench_decisions.py [ROUNDS]
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from typing import Literal

import torch
from measured import publish

from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.improve import DECISIONS, small_network
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import Video, find_registry
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.returns import ReturnScale

TOGETHER = 100
SMALL = "small transformer, one token a step"


def policies(video: Video) -> dict[str, Policy]:
    scale = ReturnScale(-4.0, 4.3, 0.05, DECISIONS - 1)

    def played(network: PolicyNetwork) -> Policy:
        return LLMPolicy(network, describe(network.eval(), PolicySettings(DECISIONS, scale)))

    def smollm2(layers: int | None, tokens: Literal["parts", "step"]) -> Policy:
        return played(
            PolicyNetwork(load_plm(PLMConfig("smollm2", layers=layers, rank=128)), NetworkConfig(tokens=tokens))
        )

    return {
        "bba": BBA(),
        "mpc, sound": RobustMPC(video),
        "mpc, strong": RobustMPC(video, MPCConfig.strong()),
        SMALL: played(small_network()),
        "SmolLM2, 4 layers, one token": smollm2(4, "step"),
        "SmolLM2, 4 layers, eight tokens": smollm2(4, "parts"),
        "SmolLM2, all 30 layers, one token": smollm2(None, "step"),
    }


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    together = sound_episodes(traces, seed=1, repeats=-(-TOGETHER // len(traces))).rows(range(TOGETHER))
    players = policies(video)
    spent: dict[str, dict[int, list[float]]] = {name: {1: [], TOGETHER: []} for name in players}
    for turn in range(rounds + 1):  # the first one warms up
        for name, player in players.items():
            for count, seconds in spent[name].items():
                simulator = Simulator(traces, video, together.rows(range(count)))
                start = time.process_time()
                rollout(player, simulator)
                if turn:
                    seconds.append((time.process_time() - start) / (count * DECISIONS))
    rows = []
    for name, by_count in spent.items():
        cells = [name]
        for count, seconds in by_count.items():
            ratios = [mine / base for mine, base in zip(seconds, spent[SMALL][count], strict=True)]
            cells += [f"{statistics.median(seconds) * 1000:.3g}", f"{statistics.median(ratios):.3g} ×"]
        rows.append("| " + " | ".join(cells) + " |")
    lines = [
        "# What a decision costs",
        "",
        f"CPU milliseconds a decision, mean over an episode of {DECISIONS}, one thread, float32; medians of {rounds} rounds "
        f"in turns, and of their ratios to the small transformer. {platform.machine()}, PyTorch {torch.__version__}. Command: "
        f"`python tests/bench/bench_decisions.py {rounds}` ({(time.perf_counter() - started) / 60:.0f} minutes).",
        "",
        "| policy | alone, ms | | of 100 together, ms | |",
        "|---|---|---|---|---|",
        *rows,
    ]
    publish("decisions", "\n".join(lines))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
