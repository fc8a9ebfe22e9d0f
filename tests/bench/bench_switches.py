"""What each switch between the original and sound costs: mean reward with one switch turned, paired over the test traces.

MPC: every field of MPCConfig, from sound to the original's and from the original's to sound. Training: a tiny random llama (2
layers, hidden 192) on a pool of MPC as published, trained once soundly and once for each switch, over several seeds; tested by
argmax. Test: the sound weights of the first seed, each switch of EvalConfig. Writes reports/benchmarks/switches.md.

    python tests/bench/bench_switches.py [--data DIR] [--seeds 2] [--epochs 12]

Takes about 40 minutes on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measured import publish

from netllm_lib.abr import qoe
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.evaluate import play_test
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.traces import Registry, TraceSet, Video, find_registry
from netllm_lib.checkpoint import CheckpointMeta, describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.stats import Interval, bootstrap
from netllm_lib.train import TrainConfig, train

TRAINING: dict[str, dict[str, Any]] = {
    "windows": {"windows": "upstream"},
    "warmup_steps": {"warmup_steps": 2000},
    "clip": {"clip": "micro", "batch": 1, "accumulation": 8},
    "last_group": {"last_group": "upstream", "batch": 1, "accumulation": 8},
    "shuffle": {"shuffle": "torch"},
    "lr, lr_around": {"lr": 1e-4, "lr_around": 1e-4},
    "lr_around": {"lr_around": 1e-3},
    "schedule": {"schedule": "constant"},
}
TEST: dict[str, dict[str, Any]] = {
    "choose": {"choose": "sample"},
    "draws": {"choose": "sample", "draws": "stream"},
    "context_window": {"context_window": "rolling"},
    "context": {"context": "leak", "context_window": "rolling"},
    "extra_step": {"extra_step": True, "context": "leak", "context_window": "rolling"},
    "dropout": {"dropout": True, "merge_lora": False},
    "w": {"w": 10},
    "target_return_scale 0": {"target_return_scale": 0.0},
    "target_return_scale 2": {"target_return_scale": 2.0},
}
AGAINST = {"draws": "choose", "context": "context_window", "extra_step": "context"}  # else the sound test
Trained = tuple[PolicyNetwork, CheckpointMeta]


@dataclasses.dataclass(frozen=True)
class Bench:
    registry: Registry
    traces: TraceSet
    video: Video
    epochs: int

    def play(self, policy: Policy) -> pd.Series:
        """[traces] mean reward of each trace."""
        return qoe.per_trace(play_test(policy, self.traces, self.video))["reward"]

    def pool(self) -> ExperiencePool:
        traces = self.registry.trace_set(self.registry.default_traces("train"))
        episodes = upstream_episodes(traces, trace_num=min(100, len(traces)), pool=True)
        return generate_pool(RobustMPC(self.video, MPCConfig.upstream(pool=True)), traces, self.video, episodes)

    def train(self, pool: ExperiencePool, seed: int, changes: dict[str, Any]) -> tuple[Trained, float]:
        """Trained network with its meta data, and the loss of the last epoch."""
        windows = make_windows(pool, WindowConfig(changes.get("windows", "episode")))
        rest = {key: value for key, value in changes.items() if key != "windows"}
        config = TrainConfig(epochs=self.epochs, seed=seed, precision="float32", **rest)
        plm = load_plm(PLMConfig("tiny-llama", rank=32, seed=seed))
        network = PolicyNetwork(plm, NetworkConfig(state_feature_dim=64, seed=seed))
        torch.manual_seed(seed)  # for shuffle="torch"
        with tempfile.TemporaryDirectory() as folder:
            history = train(network, windows, config, folder=Path(folder) / "run", settings=windows.settings).history
        assert history is not None
        loss = float(history[history["epoch"] == history["epoch"].max()]["loss"].mean())
        return (network, describe(network, windows.settings)), loss


def difference(ours: pd.Series, other: pd.Series) -> Interval:
    return bootstrap((ours - other).to_numpy())


def mpc_rows(bench: Bench) -> Iterator[str]:
    sound, upstream = MPCConfig(), MPCConfig.upstream()
    base, original = bench.play(RobustMPC(bench.video, sound)), bench.play(RobustMPC(bench.video, upstream))
    yield f"Sound {base.mean():.4f}, as the original {original.mean():.4f}.\n"
    yield "| field | the original's alone, in the sound MPC | sound alone, in the original's MPC |\n|---|---|---|"
    for field in dataclasses.fields(MPCConfig):
        ours, theirs = getattr(sound, field.name), getattr(upstream, field.name)
        if ours != theirs:
            worse = bench.play(RobustMPC(bench.video, dataclasses.replace(sound, **{field.name: theirs})))
            better = bench.play(RobustMPC(bench.video, dataclasses.replace(upstream, **{field.name: ours})))
            cells = (
                f"{worse.mean():.4f}: {difference(worse, base)} | {better.mean():.4f}: {difference(better, original)}"
            )
            yield f"| `{field.name}` | {cells} |"


def training_rows(bench: Bench, pool: ExperiencePool, seeds: int) -> tuple[list[str], Trained]:
    """Rows of the table, and what the sound training of seed 1 left."""
    rows = ["| switch | loss by seed | reward by seed | difference to sound |", "|---|---|---|---|"]
    base, kept = None, None
    for name, changes in {"sound": {}, **TRAINING}.items():
        runs = [bench.train(pool, seed, changes) for seed in range(1, seeds + 1)]
        played = [bench.play(LLMPolicy(*trained)) for trained, _ in runs]
        mean = pd.concat(played, axis=1).mean(axis=1)
        base, kept = (mean, runs[0][0]) if base is None else (base, kept)
        losses, means = ", ".join(f"{loss:.3f}" for _, loss in runs), ", ".join(f"{p.mean():.3f}" for p in played)
        rows.append(f"| `{name}` | {losses} | {means} | {difference(mean, base) if changes else ''} |")
        print(rows[-1], flush=True)
    assert kept is not None
    return rows, kept


def test_rows(bench: Bench, trained: Trained) -> Iterator[str]:
    played = {"sound": bench.play(LLMPolicy(*trained))}
    yield "| switch | against | reward | difference |\n|---|---|---|---|"
    yield f"| sound | | {played['sound'].mean():.4f} | |"
    for name, changes in TEST.items():
        played[name] = bench.play(LLMPolicy(*trained, EvalConfig(**changes)))
        against = AGAINST.get(name, "sound")
        yield f"| `{name}` | {against} | {played[name].mean():.4f} | {difference(played[name], played[against])} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default=None)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    start = time.perf_counter()
    registry = find_registry(arguments.data)
    traces = registry.trace_set(registry.default_traces("test"))
    bench = Bench(registry, traces, registry.video(registry.default_video()), arguments.epochs)
    pool = bench.pool()
    training, trained = training_rows(bench, pool, arguments.seeds)
    mpc, test = "\n".join(mpc_rows(bench)), "\n".join(test_rows(bench, trained))
    command = f"python tests/bench/bench_switches.py --seeds {arguments.seeds} --epochs {arguments.epochs}"
    text = f"""# What each switch costs

{traces.name}, {bench.video.name}, {len(traces)} traces in fixed order; mean reward, differences with their 95 % interval over
traces, paired. An interval that holds zero shows no difference. Regenerate with `{command}`; it took
{(time.perf_counter() - start) / 60:.0f} min on one thread.

## MPC

{mpc}

## Training

A tiny random llama (2 layers, hidden 192, LoRA rank 32), a pool of {len(pool.episode_starts)} episodes by MPC as published,
{arguments.epochs} epochs, seeds 1 to {arguments.seeds}; each row turns one switch of the sound TrainConfig to the original's value.
The intervals are over traces; with so few seeds they do not hold what another seed would move.

{chr(10).join(training)}

## Test

The soundly trained weights of seed 1, each row one switch of EvalConfig.

{test}
"""
    publish("switches", text)


if __name__ == "__main__":
    main()
