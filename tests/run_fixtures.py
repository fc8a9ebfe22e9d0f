"""One small run as notebooks 03, 04 and 05 leave it: a two-layer random llama, trained for a moment on a few synthetic traces."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_fixtures import stir
from netllm_lib import runs
from netllm_lib.abr import evaluate
from netllm_lib.abr.batches import make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.policies.catalogue import load_llm_policy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.synthetic import write_sample
from netllm_lib.abr.traces import Registry, split_validation
from netllm_lib.checkpoint import describe, save_checkpoint
from netllm_lib.parameters import notebook_run
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, train


@dataclass(frozen=True)
class SmallRun:
    """Where everything of it is."""

    data: Path  # traces and a video
    reports: Path  # what $NETLLM_REPORTS would name
    name: str = "small"

    def folder(self, notebook: str, name: str = "") -> Path:
        return self.reports / "runs" / notebook / (name or self.name)

    def open(self, notebook: str, name: str = "", **parents: Path) -> runs.Run:
        return notebook_run(str(self.folder(notebook, name)), notebook, **parents)


def prepare_run(root: Path, test_traces: int = 6, epochs: int = 2) -> SmallRun:
    """Make the data, the pool, the checkpoint (without `epochs`, of random weights) and a sound test of it below `root`."""
    write_sample(root / "data", train=12, test=test_traces)
    return make_runs(SmallRun(root / "data", root / "reports"), "tiny-llama", epochs)


def make_runs(run: SmallRun, plm: str, epochs: int) -> SmallRun:
    """Make the pool, the checkpoint and the test with the data that is there."""
    registry = Registry(run.data)
    everything = registry.trace_set(registry.default_traces("train"))
    traces, held = split_validation(everything, 0.15, 1)
    video = registry.video(registry.default_video())
    made = run.open("03_experience_pool")
    for part, name in ((held, "validation_pool"), (traces, "pool")):
        pool = generate_pool(RobustMPC(video), part, video, sound_episodes(part), path=made.folder / name)
    names = {"train": traces.names, "validation": held.names}
    runs.write_json(made.folder / "split.json", {"traces": everything.name, "video": video.name, **names})
    made.finish({})

    trained = run.open("04_finetune", pool=made.folder)
    network = PolicyNetwork(load_plm(PLMConfig(plm, rank=8)), NetworkConfig(16, 46))
    windows = make_windows(pool)
    if epochs:
        config, folder = TrainConfig(epochs=epochs, lr=3e-3), trained.folder / "training" / "once"
        result = train(network, windows, config, folder=folder, settings=windows.settings)
        result.save(trained.folder)
        assert result.final is not None
        shutil.copytree(result.final, trained.folder / "policy")
    else:
        save_checkpoint(trained.folder / "policy", stir(network), describe(network, windows.settings))
    trained.finish({"pool_hash": pool.content_hash()})
    write_test(run)
    return run


def write_test(run: SmallRun, name: str = "", **switches: Any) -> Path:
    """Test the checkpoint as notebook 05 does, with fields of `EvalConfig`; returns the run folder."""
    registry = Registry(run.data)
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    policy = run.folder("04_finetune")
    players = {"llm": load_llm_policy(policy, **switches), **evaluate.baselines(video, registry)}
    tested = run.open("05_test", name, training=policy)
    training = registry.trace_set(registry.default_traces("train"))
    evaluate.test(players, traces, video, subject="llm", train_traces=training).save(tested.folder)
    tested.finish({})
    return tested.folder
