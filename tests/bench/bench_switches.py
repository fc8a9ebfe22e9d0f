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
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

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
from netllm_lib.runs import PROJECT
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

    def train(
        self, pool: ExperiencePool, seed: int, changes: dict[str, Any]
    ) -> tuple[PolicyNetwork, CheckpointMeta, float]:
        """Trained network, its meta data and the loss of the last epoch."""
        cut = {key: changes[key] for key in ("windows", "w", "stride", "scale") if key in changes}
        windows = make_windows(pool, WindowConfig(**cut))
        rest = {key: value for key, value in changes.items() if key not in cut}
        config = TrainConfig(epochs=self.epochs, seed=seed, precision="float32", **rest)
        plm = load_plm(PLMConfig("tiny-llama", rank=32, seed=seed))
        network = PolicyNetwork(plm, NetworkConfig(state_feature_dim=64, seed=seed))
        torch.manual_seed(seed)  # for shuffle="torch"
        with tempfile.TemporaryDirectory() as folder:
            history = train(network, windows, config, folder=Path(folder) / "run", settings=windows.settings).history
        loss = float(history[history["epoch"] == history["epoch"].max()]["loss"].mean())
        return network, describe(network, windows.settings), loss


def difference(ours: pd.Series, other: pd.Series) -> Interval:
    return bootstrap((ours - other).to_numpy())


def mpc_rows(bench: Bench) -> list[str]:
    sound, upstream = MPCConfig(), MPCConfig.upstream()
    base, original = bench.play(RobustMPC(bench.video, sound)), bench.play(RobustMPC(bench.video, upstream))
    rows = [f"Sound {base.mean():.4f}, as the original {original.mean():.4f}.", ""]
    rows += ["| field | the original's alone, in the sound MPC | sound alone, in the original's MPC |", "|---|---|---|"]
    for field in dataclasses.fields(MPCConfig):
        ours, theirs = getattr(sound, field.name), getattr(upstream, field.name)
        if ours == theirs:
            continue
        worse = bench.play(RobustMPC(bench.video, dataclasses.replace(sound, **{field.name: theirs})))
        better = bench.play(RobustMPC(bench.video, dataclasses.replace(upstream, **{field.name: ours})))
        cells = f"{worse.mean():.4f}: {difference(worse, base)} | {better.mean():.4f}: {difference(better, original)}"
        rows.append(f"| `{field.name}` | {cells} |")
    return rows


def training_rows(
    bench: Bench, pool: ExperiencePool, seeds: int
) -> tuple[list[str], tuple[PolicyNetwork, CheckpointMeta]]:
    def results(
        changes: dict[str, Any],
    ) -> tuple[pd.Series, list[float], list[float], tuple[PolicyNetwork, CheckpointMeta]]:
        played, losses, first = [], [], None
        for seed in range(1, seeds + 1):
            network, meta, loss = bench.train(pool, seed, changes)
            played.append(bench.play(LLMPolicy(network, meta)))
            losses.append(loss)
            first = first or (network, meta)
            print(f"  {changes or 'sound'} seed {seed}: loss {loss:.3f}, reward {played[-1].mean():.3f}", flush=True)
        assert first is not None
        mean = pd.Series(np.mean([p.to_numpy() for p in played], axis=0), index=played[0].index)
        return mean, losses, [float(p.mean()) for p in played], first

    base, losses, means, kept = results({})
    rows = ["| switch | loss by seed | reward by seed | difference to sound |", "|---|---|---|---|"]
    rows.append(f"| sound | {_list(losses)} | {_list(means)} | |")
    for name, changes in TRAINING.items():
        reward, losses, means, _ = results(changes)
        rows.append(f"| `{name}` | {_list(losses)} | {_list(means)} | {difference(reward, base)} |")
    return rows, kept


def test_rows(bench: Bench, kept: tuple[PolicyNetwork, CheckpointMeta]) -> list[str]:
    played = {"": bench.play(LLMPolicy(*kept))}
    rows = [
        "| switch | against | reward | difference |",
        "|---|---|---|---|",
        f"| sound | | {played[''].mean():.4f} | |",
    ]
    for name, changes in TEST.items():
        played[name] = bench.play(LLMPolicy(*kept, EvalConfig(**changes)))
        against = AGAINST.get(name, "")
        rows.append(
            f"| `{name}` | {against or 'sound'} | {played[name].mean():.4f} | {difference(played[name], played[against])} |"
        )
        print(rows[-1], flush=True)
    return rows


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


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
    mpc = mpc_rows(bench)
    training, kept = training_rows(bench, pool, arguments.seeds)
    test = test_rows(bench, kept)
    text = [
        "# What each switch costs",
        "",
        f"{traces.name}, {bench.video.name}, {len(traces)} traces in fixed order; mean reward, differences with their 95 %",
        "interval over traces, paired. An interval that holds zero shows no difference. Regenerate with",
        f"`python tests/bench/bench_switches.py --seeds {arguments.seeds} --epochs {arguments.epochs}`; it took "
        f"{(time.perf_counter() - start) / 60:.0f} min on one thread.",
        "",
        "## MPC",
        "",
        *mpc,
        "",
        "## Training",
        "",
        f"A tiny random llama (2 layers, hidden 192, LoRA rank 32), a pool of {len(pool.episode_starts)} episodes by MPC as",
        f"published, {arguments.epochs} epochs, seeds 1 to {arguments.seeds}; each row turns one switch of the sound TrainConfig",
        "to the original's value.",
        "The intervals are over traces; with so few seeds they do not hold what another seed would move.",
        "",
        *training,
        "",
        "## Test",
        "",
        "The soundly trained weights of seed 1, each row one switch of EvalConfig.",
        "",
        *test,
        "",
    ]
    path = PROJECT / "reports" / "benchmarks" / "switches.md"
    path.write_text("\n".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
