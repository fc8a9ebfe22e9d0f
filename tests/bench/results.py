"""The tables of docs/results.md: policies of several seeds on every place where they are judged, and what their differences hold.

A group of seeds is judged by the mean of its seeds on every trace; intervals are over traces, paired. Prints Markdown.

    python tests/bench/results.py DATA NAME=RUN_FOLDER[,RUN_FOLDER…] …
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from netllm_lib import stats
from netllm_lib.abr import qoe
from netllm_lib.abr.evaluate import baselines, play_test
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.catalogue import load_llm_policy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.traces import TraceSet, Video, find_registry, overlapping

STRONG = "mpc (strong)"
CLEAN = "no overlap"


def by_trace(policy: Policy, traces: TraceSet, video: Video) -> pd.Series:
    """Mean reward of every trace, by the original's protocol."""
    return qoe.per_trace(play_test(policy, traces, video))["reward"]


def main(data: str, groups: dict[str, list[str]]) -> None:
    registry = find_registry(data)
    test, valid, whole = (registry.trace_set(registry.default_traces(part)) for part in ("test", "valid", "train"))
    first, *others = (registry.video(name) for name in registry.video_folders())
    clean = test.subset(np.flatnonzero(~overlapping(test, whole)), CLEAN)
    places: dict[str, tuple[TraceSet, Video]] = {f"{test.name}, {first.name}": (test, first)}
    places |= {other.name: (test, other) for other in others}
    places[valid.name] = (valid, first)

    scores: dict[str, dict[str, list[pd.Series]]] = {}
    for place, (traces, video) in places.items():
        for name, policy in {**baselines(video, registry), STRONG: RobustMPC(video, MPCConfig.strong())}.items():
            scores.setdefault(name, {})[place] = [by_trace(policy, traces, video)]
        for name, folders in groups.items():
            played = [by_trace(load_llm_policy(Path(folder)), traces, video) for folder in folders]
            scores.setdefault(name, {})[place] = played

    whole_test = next(iter(places))
    places[CLEAN] = (clean, first)
    for found in scores.values():  # of the whole test: policies with a memory, or that draw, play other levels alone
        found[CLEAN] = [rewards[clean.names] for rewards in found[whole_test]]

    def table(rows: dict[str, list[str]], head: str) -> None:
        print(f"\n| {head} | {' | '.join(f'{place}, {len(places[place][0])} traces' for place in places)} |")
        print("|---" * (len(places) + 1) + "|")
        for name, cells in rows.items():
            print(f"| {name} | {' | '.join(cells)} |")

    def mean(name: str, place: str) -> pd.Series:
        return pd.concat(scores[name][place], axis=1).mean(axis=1)

    rewards = {}
    for name, found in scores.items():
        count = len(found[whole_test])
        for seed in range(count):
            label = name if count == 1 else f"{name}, seed {seed + 1}"
            rewards[label] = [f"{found[place][seed].mean():.4f}" for place in places]
        if count > 1:
            rewards[f"{name}, mean"] = [f"{mean(name, place).mean():.4f}" for place in places]
    table(rewards, "policy")

    pairs = [(name, other) for name in groups for other in ("mpc", STRONG)]
    names = list(groups)
    pairs += [(name, other) for i, name in enumerate(names) for other in names[i + 1 :]]
    differences = {}
    for name, other in pairs:
        intervals = [stats.bootstrap((mean(name, place) - mean(other, place)).to_numpy()) for place in places]
        differences[f"{name} − {other}"] = [f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for i in intervals]
    table(differences, "difference")


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    main(sys.argv[1], {name: folders.split(",") for name, folders in given.items()})
