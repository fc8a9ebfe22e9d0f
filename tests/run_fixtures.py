"""One small run as notebooks 03, 04 and 05 leave it: a two-layer random llama, trained for a moment on a few synthetic traces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_fixtures import stir
from netllm_lib import runs
from netllm_lib.abr import evaluate
from netllm_lib.abr.batches import make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.policies.catalogue import baselines, load_llm_policy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.synthetic import write_sample
from netllm_lib.abr.traces import Registry
from netllm_lib.checkpoint import describe, save_checkpoint
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, preflight, train


@dataclass(frozen=True)
class SmallRun:
    """Where everything of it is."""

    data: Path  # traces and a video
    reports: Path  # what $NETLLM_REPORTS would name

    def folder(self, notebook: str, name: str = "small") -> Path:
        return self.reports / "runs" / notebook / name


def prepare_run(root: Path, test_traces: int = 6, epochs: int = 2) -> SmallRun:
    """Make the data, the pool, the checkpoint (without `epochs`, of random weights) and a sound test of it below `root`."""
    run = SmallRun(root / "data", root / "reports")
    write_sample(run.data, train=12, test=test_traces)
    registry = Registry(run.data)
    traces, video = registry.trace_set(registry.default_traces("train")), registry.video(registry.default_video())
    pool = generate_pool(RobustMPC(video), traces, video, sound_episodes(traces))
    pool.save(run.folder("03_experience_pool") / "pool")
    split = {"traces": traces.name, "video": video.name, "validation": []}
    runs.write_json(run.folder("03_experience_pool") / "split.json", split)
    runs.write_json(run.folder("03_experience_pool") / "metrics.json", {})

    network = PolicyNetwork(load_plm(PLMConfig("tiny-llama", rank=8)), NetworkConfig(16, 46))
    config = TrainConfig(epochs=max(1, epochs), lr=3e-3)
    folder = run.folder("04_finetune")
    windows = make_windows(pool)
    flight = preflight(network, windows, config, measure=False)
    loss = None
    if epochs:
        once = folder / "training" / "once"
        result = train(network, windows, config, folder=once, settings=windows.settings)
        result.save(folder)
        loss = result.final_loss
    else:
        stir(network)
    save_checkpoint(folder / "policy", network, describe(network, windows.settings))
    runs.write_json(folder / "config.json", {"parameters": {"pool_dir": str(run.folder("03_experience_pool"))}})
    known = {name: getattr(flight, name) for name in ("steps", "warmup_steps", "lr", "lr_peak", "crossing")}
    runs.write_json(
        folder / "metrics.json",
        known | {"windows": flight.samples, "final_loss": loss, "pool_hash": pool.content_hash()},
    )
    write_test(run)
    return run


def write_test(run: SmallRun, name: str = "small", **switches: Any) -> Path:
    """Test the checkpoint as notebook 05 does, with fields of `EvalConfig`; returns the run folder."""
    registry = Registry(run.data)
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    training = registry.trace_set(registry.default_traces("train"))
    policy = run.folder("04_finetune")
    players = {"llm": load_llm_policy(policy, **switches), **baselines(video, registry)}
    folder = run.folder("05_test", name)
    evaluate.test(players, traces, video, subject="llm", train_traces=training).save(folder)
    runs.write_json(folder / "metrics.json", {})
    return folder
