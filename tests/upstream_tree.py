"""Small synthetic trees of the original: what one of its runs leaves behind, made from the bundled sample.

    <root>/downloaded_plms/llama/tiny/
    <root>/adaptive_bitrate_streaming/data/ft_plms/llama_tiny/<pool>_ss_<step>/rank_…/early_stop_-1_…
    <root>/adaptive_bitrate_streaming/artifacts/{exp_pools, results}/…

Pool, weights and results belong together: the results are those of the weights, tested as the original tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llm_fixtures import stir, write_plm
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.qoe import CHUNKS, summarise
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.abr.upstream import logs, names
from netllm_lib.abr.upstream.checkpoints import save_upstream_checkpoint
from netllm_lib.abr.upstream.pickles import write_pool
from netllm_lib.abr.upstream.remake import remake_pool
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm

PARTS = ("console", "losses", "best_model", "checkpoint", "results", "pool", "plm")

SETTINGS: dict[str, Any] = {
    "train_traces": "sample-train", "train_video": "sample", "pool_models": ("bba",), "pool_seed": 1, "pool_trace_num": 6,
    "pool_fixed": False, "plm_type": "llama", "plm_size": "tiny", "sample_step": None, "rank": 4, "w": 5, "gamma": 1.0,
    "state_feature_dim": 8, "lr": 0.0001, "weight_decay": 0.0001, "warmup_steps": 2000, "epochs": 3, "seed": 1,
    "early_stop": -1, "test_traces": "sample-test", "test_video": "sample", "test_trace_num": 3, "test_fixed": False,
    "test_seed": 1, "target_return_scale": 1.0,
}  # fmt: skip
"""Of the tree, in the keys of `names.settings_of`."""


@dataclass(frozen=True)
class Tree:
    """Where the parts of a synthetic tree are."""

    root: Path
    settings: dict[str, Any]
    run: Path  # the folder rank_…_seed_…
    console: Path
    losses: Path
    best_model: Path
    checkpoint: Path
    results: Path  # folder of result files
    pool: Path
    plm: Path
    mean_reward: float

    def copy(self, root: Path, parts: Collection[str] = PARTS) -> Tree:
        """A copy below `root` with only some of the parts."""
        shutil.copytree(self.root, root)
        moved = {name: root / getattr(self, name).relative_to(self.root) for name in (*PARTS, "run")}
        for part in set(PARTS) - set(parts):
            remove(moved[part])
        return Tree(root=root, settings=self.settings, mean_reward=self.mean_reward, **moved)


def remove(path: Path) -> None:
    """Delete a file or folder, and the folders that are empty without it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for parent in path.parents:
        if any(parent.iterdir()):
            return
        parent.rmdir()


def write_tree(root: Path, **changes: Any) -> Tree:
    """A whole tree below `root`; `changes` are settings. It takes about two seconds."""
    settings = {**SETTINGS, **changes}
    settings["pool"] = pool_name(settings)
    base = root / "adaptive_bitrate_streaming"
    run = base / "data" / "ft_plms" / model_path(settings)
    stop = f"early_stop_{settings['early_stop']}"
    registry = Registry(SAMPLE)

    plm = write_plm(root / "downloaded_plms" / settings["plm_type"] / settings["plm_size"], settings["plm_type"])
    pool = remake_pool(settings, registry)
    pool_file = write_pool(pool, base / "artifacts" / "exp_pools" / pool_path(settings))

    layers = None if settings["early_stop"] < 0 else settings["early_stop"] + 1
    config = PLMConfig.upstream(str(plm), layers=layers, rank=settings["rank"])
    with torch.random.fork_rng(devices=[]):
        network = stir(PolicyNetwork(load_plm(config), NetworkConfig(state_feature_dim=settings["state_feature_dim"])))
    best = save_upstream_checkpoint(run / f"{stop}_best_model", network)
    checkpoint = save_upstream_checkpoint(run / f"{stop}_checkpoint" / str(settings["epochs"] - 1), network)

    traces, video = registry.trace_set(settings["test_traces"]), registry.video(settings["test_video"])
    _, scale = pool_returns(pool, settings["gamma"])
    tested = EvalConfig.upstream(w=settings["w"], target_return_scale=settings["target_return_scale"])
    count, fixed, seed = (settings[f"test_{key}"] for key in ("trace_num", "fixed", "seed"))
    episodes = upstream_episodes(traces, trace_num=count, fixed_order=fixed, seed=seed)
    policy = LLMPolicy(network, describe(network, PolicySettings(settings["w"], scale)), tested)
    table = play(policy, Simulator(traces, video, episodes))
    results = write_results(base / "artifacts" / "results" / results_path(settings), table, traces.name)
    mean = summarise(table).reward

    step = min(settings["sample_step"] or settings["w"], settings["w"])
    windows = len(range(0, len(pool) - settings["w"] + 1, step))
    rng = np.random.default_rng(settings["seed"])
    losses = rng.normal(1.5, 0.3, (settings["epochs"], windows)).clip(0.01)
    losses_file = write_train_losses(run / f"{stop}_checkpoint" / "train_losses.txt", losses.ravel())
    console = run / f"{stop}_console.log"
    console.write_text(console_text(settings, losses, mean))
    return Tree(root, settings, run, console, losses_file, best, checkpoint, results, pool_file, plm, mean)


# --- the original's names and text files ---------------------------------------------------------------------------------


def pool_path(settings: dict[str, Any]) -> Path:
    """Where the original's pool generation writes, below `artifacts/exp_pools`."""
    s = settings
    folder = Path(f"{s['train_traces']}_{s['train_video']}", "_".join(s["pool_models"]), names.POOL.format(**s))
    return folder / "exp_pool.pkl"


def pool_name(settings: dict[str, Any]) -> str:
    """How the folders of a training run call the pool: the last three folders of its path, joined."""
    return "_".join(pool_path(settings).parent.parts)


def model_path(settings: dict[str, Any]) -> Path:
    """Where a training run goes, below `data/ft_plms`."""
    s = settings
    return Path(f"{s['plm_type']}_{s['plm_size']}", f"{s['pool']}_ss_{s['sample_step']}", names.TRAINING.format(**s))


def results_path(settings: dict[str, Any]) -> Path:
    """Where a test's result files go, below `artifacts/results`; a baseline's if the settings name a `policy`."""
    s = settings
    test = Path(f"{s['test_traces']}_{s['test_video']}", names.TEST_SET.format(**s))
    if "policy" in s:
        return test / s["policy"] / names.BASELINE.format(**s)
    return test / f"{s['plm_type']}_{s['plm_size']}" / f"early_stop_{s['early_stop']}_{names.TEST.format(**s)}"


def write_result_file(path: Path, chunks: pd.DataFrame, *, blank_line: bool = False) -> Path:
    """A trace's 48 chunks byte for byte as the original writes them; its baselines add a blank line, its LLM test does not."""
    kinds = {"bitrate_kbps": int, "size_bytes": int}
    columns = [[str(kinds.get(name, float)(value)) for value in chunks[name].tolist()] for name in logs.RESULT_COLUMNS]
    lines = ["\t".join(fields) for fields in zip(*columns, strict=True)]
    assert len(lines) == CHUNKS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + ("\n\n" if blank_line else "\n"))
    return path


def write_train_losses(path: Path, values: Iterable[float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{value:.6f}\n" for value in values))
    return path


def write_results(folder: Path, table: pd.DataFrame, traces: str, *, blank_line: bool = False) -> Path:
    """A table of chunks as the original's result files. Returns `folder`."""
    for trace, chunks in table.groupby("trace", sort=False):
        write_result_file(folder / f"{logs.RESULT_PREFIX}{traces}_{trace}", chunks, blank_line=blank_line)
    return folder


def console_text(settings: dict[str, Any], losses: np.ndarray, mean_reward: float | None = None) -> str:
    """The console log of a run with these losses [epochs, windows]: an evaluation after the first and the last epoch, both the
    best so far, and a test unless `mean_reward` is None."""
    run = f"data/ft_plms/{model_path(settings)}"
    stop, last = f"early_stop_{settings['early_stop']}", len(losses) - 1
    lines: list[str] = []
    for epoch, values in enumerate(losses):
        lines += [
            f"Step {step} - mean train loss {np.mean(values[: step + 1]):>9f}" for step in range(0, len(values), 100)
        ]
        lines += [f"{'=' * 20} Training Iteration #{epoch} {'=' * 20}", f"{'>' * 10} Training Information:"]
        numbers = {"training/train_loss_mean": values.mean(), "training/train_loss_std": values.std()}
        lines += _printed({"time/training": 10.5 + epoch, **numbers})
        if epoch in (0, last):
            lines += [f"Checkpoint saved at: {run}/{stop}_checkpoint/{epoch}"]
            lines += [f"Best model saved at: {run}/{stop}_best_model", f"{'>' * 10} Evaluation Information"]
            length, best = 47 * settings["test_trace_num"], 3.5 + epoch
            numbers = {"best_return": best, "episodes_len": length, "episodes_return": best, "time/evaluation": 67.25}
            lines += _printed(numbers)
    if mean_reward is not None:
        lines += [f"Load model from: {run}/{stop}_best_model", str(settings["test_trace_num"])]
        lines += [f"{{'time': 63.5, 'mean_reward': {mean_reward}}}", f"Test time: 63.5 \nMean reward: {mean_reward}"]
        lines += [f"Results saved at: artifacts/results/{results_path(settings)}"]
    return "\n".join(lines) + "\n"


def arguments_line(settings: dict[str, Any], pool: Path | str, *, adapt: bool = True, test: bool = True) -> str:
    """The line `Namespace(…)` that the original prints on the terminal before anything else."""
    s = settings
    values = {
        "exp_pool_path": str(pool), "sample_step": s["sample_step"], "trace": s["test_traces"],
        "trace_num": s["test_trace_num"], "video": s["test_video"], "fixed_order": s["test_fixed"], "plm_type": s["plm_type"],
        "plm_size": s["plm_size"], "rank": s["rank"], "state_feature_dim": s["state_feature_dim"], "w": s["w"],
        "gamma": s["gamma"], "lr": s["lr"], "weight_decay": s["weight_decay"], "warmup_steps": s["warmup_steps"],
        "num_epochs": s["epochs"], "eval_per_epoch": 2, "save_checkpoint_per_epoch": 2,
        "target_return_scale": s["target_return_scale"], "which_layer": s["early_stop"], "adapt": adapt, "test": test,
        "grad_accum_steps": 32, "seed": s["seed"], "scale": 1000, "model_dir": None, "device": "cuda:0",
        "device_out": "cuda:0", "device_mid": None,
    }  # fmt: skip
    return f"Arguments:\nNamespace({', '.join(f'{key}={value!r}' for key, value in values.items())})\n"


def _printed(values: dict[str, Any]) -> Sequence[str]:
    """As pprint prints a dictionary that does not fit into one line."""
    items = [f"'{key}': {value}" for key, value in values.items()]
    return ["{" + items[0] + ",", *(f" {item}," for item in items[1:-1]), f" {items[-1]}" + "}"]
