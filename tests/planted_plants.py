"""How each fault is planted in a run: in its configuration, a file, or the code that made it (see planted.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llm_fixtures import write_plm
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.model import PolicyNetwork, load_policy
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.simple import Constant
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.upstream import logs
from netllm_lib.abr.upstream.checkpoints import save_upstream_checkpoint
from netllm_lib.abr.upstream.discover import LOSSES
from netllm_lib.abr.upstream.imports import import_run
from netllm_lib.abr.upstream.pickles import write_pool
from netllm_lib.checkpoint import CheckpointMeta, load_weights, save_checkpoint
from netllm_lib.plm import PLMConfig, load_plm
from planted import Plant, Planted
from planted_runs import (
    HIDDEN,
    RANK,
    TRACES,
    VIDEO,
    Bench,
    Careless,
    Trained,
    upstream_settings,
    write_runs,
    write_test_run,
    write_tree,
)
from upstream_tree import results_path, write_results

FILES = ("losses", "results", "pool")  # of a tree of the original
RESULTS = ("results",)
ROLLING = EvalConfig(context_window="rolling")


def of_training(training: str) -> Plant:
    """A whole chain of runs with the training `training`."""
    return of_test(None, training, twin="healthy")


def of_test(
    config: EvalConfig | None,
    training: str = "healthy",
    sound: EvalConfig | None = None,
    twin: str | None = None,
    traces: str = TRACES,
    video: str = VIDEO,
    **pool: Any,
) -> Plant:
    """A whole chain of runs whose test is `config`; the twin's is `sound`."""

    def plant(bench: Bench, root: Path) -> Planted:
        table = bench.test(training, config, traces, video)
        folders = write_runs(root, bench, training, table, config, traces=traces, video=video, **pool)
        return Planted(folders, table, bench.test(twin or training, sound, traces, video))

    return plant


def of_runs(make: Callable[[Bench, Trained], tuple[pd.DataFrame, dict[str, Any]]], twin: str = "healthy") -> Plant:
    """A whole chain of runs of the healthy training, with the table and the arguments of `write_runs` that `make` gives."""

    def plant(bench: Bench, root: Path) -> Planted:
        table, how = make(bench, bench.trained("healthy"))
        return Planted(write_runs(root, bench, "healthy", table, **how), table, bench.test(twin))

    return plant


def dropout_on(bench: Bench, trained: Trained) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The test of healthy weights, with dropout rates that were raised, was made in training mode."""
    plm = replace(trained.meta.plm, lora_dropout=0.5, plm_dropout=0.5)
    policy, config = (on_plm(trained, plm), replace(trained.meta, plm=plm)), EvalConfig(dropout=True)
    return bench.play(LLMPolicy(*policy, config)), {"config": config, "policy": policy}


def weights_of_another_run(bench: Bench, trained: Trained) -> tuple[pd.DataFrame, dict[str, Any]]:
    other = bench.trained("on-careless-bba")
    return bench.test("on-careless-bba"), {"policy": (other.network, other.meta)}


def early_checkpoint(bench: Bench, trained: Trained) -> tuple[pd.DataFrame, dict[str, Any]]:
    early = load_policy(trained.early)
    return bench.play(LLMPolicy(*early)), {"policy": early}


def files_of_two_checkpoints(bench: Bench, root: Path) -> Planted:
    """The modules around the PLM lie beside another checkpoint's adapter, copied by hand."""
    other = bench.trained("on-careless-bba")
    table = bench.test("on-careless-bba")
    folders = write_runs(root, bench, "healthy", table)
    save_checkpoint(root / "other", other.network, other.meta)
    shutil.copy(root / "other" / "modules.safetensors", root / "04" / "policy" / "modules.safetensors")
    return Planted(folders, table, bench.test("healthy"))


@contextmanager
def changed(parameters: list[torch.nn.Parameter], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Parameters with other values for as long as the block lasts."""
    kept = [p.data for p in parameters]
    for p in parameters:
        p.data = change(p.data)
    try:
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def of_weights(
    pick: Callable[[PolicyNetwork], list[torch.nn.Parameter]], change: Callable[[torch.Tensor], torch.Tensor]
) -> Plant:
    """A whole chain of runs whose checkpoint and test have changed weights; not finite ones choose the first level always."""

    def plant(bench: Bench, root: Path) -> Planted:
        trained = bench.trained("healthy")
        with changed(pick(trained.network), change):
            finite = all(bool(torch.isfinite(p).all()) for p in pick(trained.network))
            table = bench.play(trained.policy() if finite else Constant(0))
            folders = write_runs(root, bench, "healthy", table)
        return Planted(folders, table, bench.test("healthy"))

    return plant


def lora(which: str) -> Callable[[PolicyNetwork], list[torch.nn.Parameter]]:
    return lambda network: [p for name, p in network.named_parameters() if which in name]


def prefer_level_2(bias: torch.Tensor) -> torch.Tensor:
    return bias + 30 * (torch.arange(qoe.LEVELS) == 2)


def on_plm(trained: Trained, plm: PLMConfig) -> PolicyNetwork:
    """The network of a training with another PLM in it."""
    network = PolicyNetwork(load_plm(plm), trained.meta.network)
    assert trained.run.final is not None
    load_weights(trained.run.final, network)
    return network.eval()


def another_plm(bench: Bench, folder: Path, trained: Trained) -> tuple[Path, PolicyNetwork]:
    """A PLM of the same shape with other weights, and the trained network with it."""
    import transformers as hf

    with torch.random.fork_rng():
        torch.manual_seed(5)
        hf.AutoModel.from_config(hf.AutoConfig.from_pretrained(bench.plm)).save_pretrained(folder)
    return folder, on_plm(trained, replace(trained.meta.plm, source=str(folder.resolve())))


def tested_on_another_plm(bench: Bench, root: Path) -> Planted:
    trained = bench.trained("healthy")
    plm, network = another_plm(bench, root / "plm", trained)
    table = bench.play(LLMPolicy(network, trained.meta))
    return Planted(write_runs(root, bench, "healthy", table), table, bench.test("healthy"), {"plm": plm})


# --- faults of a test's table --------------------------------------------------------------------------------------------


def of_table(make: Callable[[Bench], pd.DataFrame], chain: bool = False) -> Plant:
    """A test alone whose table is what `make` gives; with `chain` the healthy training and pool are there, too."""

    def plant(bench: Bench, root: Path) -> Planted:
        table = make(bench)
        folders = write_runs(root, bench, "healthy", table) if chain else (write_test_run(root / "05", bench, table),)
        return Planted(folders, table, bench.test("healthy"))

    return plant


def slips(share: float, lowest: int = 0, training: str = "healthy", **how: Any) -> Callable[[Bench], pd.DataFrame]:
    """A share of the levels is random."""
    return lambda bench: bench.play(Careless(bench.trained(training).policy(), share, lowest), **how)


def noisy(bench: Bench) -> pd.DataFrame:
    """The run alone was played with noise on its delays, all of it above 1."""
    noise = np.random.default_rng(0).uniform(0.9, 1.1, (40, CHUNKS))
    episodes = replace(bench.episodes(), noise=noise)
    return play(bench.trained("healthy").policy(), Simulator(bench.traces(), bench.video(), episodes))


def half_the_traces(bench: Bench) -> pd.DataFrame:
    table = bench.test("healthy")
    return table[table["trace_index"] < 20]


def repeated(bench: Bench) -> pd.DataFrame:
    """The rows of two runs in one table."""
    return pd.concat([bench.test("healthy"), bench.test("on-careless-bba")], ignore_index=True)


def other_first_level(bench: Bench) -> pd.DataFrame:
    table = bench.test("healthy")
    levels = table["level"].to_numpy().reshape(-1, CHUNKS).copy()
    levels[:, 0] = 4
    outcome = Simulator(bench.traces(), bench.video(), bench.episodes()).replay(levels)
    names = [name for name in ("level", "bitrate_kbps", *logs.RESULT_COLUMNS) if hasattr(outcome, name)]
    return table.assign(**{name: np.asarray(getattr(outcome, name)).ravel() for name in names})


# --- trees of the original -----------------------------------------------------------------------------------------------


def as_original(bench: Bench, training: str, **changes: Any) -> pd.DataFrame:
    """The test of a training as the original tests."""
    return bench.test(training, EvalConfig.upstream(**changes), clock="running")


def play_original(bench: Bench, network: PolicyNetwork, meta: CheckpointMeta) -> pd.DataFrame:
    return bench.play(LLMPolicy(network, meta, EvalConfig.upstream()), clock="running")


def of_tree(training: str, table: Callable[[Bench], pd.DataFrame] | None = None, **how: Any) -> Plant:
    """A tree of the original whose training is `training`, and its test, unless another is given."""

    def plant(bench: Bench, root: Path) -> Planted:
        played = as_original(bench, training) if table is None else table(bench)
        return Planted((write_tree(root, bench, training, played, **how),), played, as_original(bench, "original"))

    return plant


def of_log(training: str, **how: Any) -> Plant:
    """The console log of a run, or its losses, alone in a folder without a name that tells anything."""

    def plant(bench: Bench, root: Path) -> Planted:
        table = as_original(bench, training)
        tree = write_tree(root / "tree", bench, training, table, **how)
        (root / "mailed").mkdir()
        for path in (*tree.rglob("*console.log"), *tree.rglob(LOSSES)):
            shutil.copy(path, root / "mailed" / path.name.removeprefix("early_stop_-1_"))
        return Planted((root / "mailed",), table, as_original(bench, "original"))

    return plant


def tree_without_adapter(bench: Bench, root: Path) -> Planted:
    trained = bench.trained("original")
    with changed(lora("lora_B")(trained.network), torch.zeros_like):
        table = play_original(bench, trained.network, trained.meta)
        write_tree(root, bench, "original", table)
    return Planted((root,), table, as_original(bench, "original"))


def adapter_of_gpt2(bench: Bench, root: Path) -> Planted:
    """The adapter of another family: the original loads it without a word, and nothing of it fits."""
    planted = tree_without_adapter(bench, root)
    write_plm(root / "other" / "gpt2", "gpt2", hidden=HIDDEN)
    plm = load_plm(PLMConfig.upstream(str(root / "other" / "gpt2"), rank=RANK))
    save_upstream_checkpoint(root / "other" / "saved", PolicyNetwork(plm, bench.trained("original").meta.network))
    best = next(root.rglob("early_stop_-1_best_model"))
    for name in ("adapter_model.bin", "adapter_config.json"):
        shutil.copy(root / "other" / "saved" / name, best / name)
    shutil.rmtree(root / "other")
    return planted


def tree_with_another_plm(bench: Bench, root: Path) -> Planted:
    trained = bench.trained("original")
    plm, network = another_plm(bench, root / "aside" / "plm", trained)
    table = play_original(bench, network, trained.meta)
    tree = write_tree(root / "tree", bench, "original", table)
    shutil.rmtree(tree / "downloaded_plms")
    shutil.copytree(plm, tree / "downloaded_plms" / "llama" / "tiny")
    return Planted((tree,), table, as_original(bench, "original"))


def imported(bench: Bench, root: Path) -> Planted:
    """A tree of the original, imported by `netllm import`, and then gone."""
    planted = of_tree("original-warmup")(bench, root / "tree")
    run = import_run(root / "tree", data=bench.data, root=root / "reports")
    shutil.rmtree(root / "tree" / "adaptive_bitrate_streaming")
    return replace(planted, folders=(run.folder,))


def not_a_number(bench: Bench, root: Path) -> Planted:
    """The loss became NaN in the second epoch, and the original went on; so are the weights, and each choice is the last level."""
    losses = np.array(bench.trained("original").run.losses)
    losses[len(losses) // 2 :] = np.nan
    table = bench.play(Constant(qoe.LEVELS - 1), clock="running")
    write_tree(root, bench, "original", table, losses=losses, parts=("console", "losses", "results", "pool"))
    return Planted((root,), table, as_original(bench, "original"))


def tested_early(there: bool) -> Plant:
    """The results are those of an early checkpoint; `there`: it lies in the tree, else that of the training's end does."""

    def plant(bench: Bench, root: Path) -> Planted:
        network, meta = load_policy(bench.trained("original").early)
        table = play_original(bench, network, meta)
        write_tree(root, bench, "original", table, network=network if there else None)
        return Planted((root,), table, as_original(bench, "original"))

    return plant


def other_pool_at_test(training: str, make: Callable[[Bench], ExperiencePool]) -> Plant:
    """The test took target return and reward range from the pool that `make` gives."""

    def plant(bench: Bench, root: Path) -> Planted:
        trained, other = bench.trained(training), make(bench)
        _, scale = pool_returns(other, trained.windows.gamma, trained.windows.scale)
        meta = replace(trained.meta, settings=replace(trained.meta.settings, scale=scale))
        table = play_original(bench, trained.network, meta)
        write_tree(root / "tree", bench, training, table)
        path = write_pool(other, root / "other" / "exp_pool.pkl")
        return Planted((root / "tree",), table, as_original(bench, training), {"pool": path})

    return plant


def tree_with_target(scale: float) -> Plant:
    def plant(bench: Bench, root: Path) -> Planted:
        table = as_original(bench, "original-mixed", target_return_scale=scale)
        write_tree(root, bench, "original-mixed", table, target_return_scale=scale)
        return Planted((root,), table, as_original(bench, "original-mixed"))

    return plant


def tree_tested_with(w: int) -> Plant:
    def plant(bench: Bench, root: Path) -> Planted:
        table = as_original(bench, "original", w=w)
        write_tree(root, bench, "original", None)
        place = results_path(upstream_settings(bench.trained("original"), w=w))
        write_results(root / "adaptive_bitrate_streaming" / "artifacts" / "results" / place, table, TRACES)
        return Planted((root,), table, as_original(bench, "original"))

    return plant


def two_runs(bench: Bench) -> pd.DataFrame:
    """A second test, of an undertrained policy, overwrote the results of the first and was stopped halfway."""
    table, second = as_original(bench, "original"), as_original(bench, "original-warmup")
    return pd.concat([second[second["trace_index"] < 20], table[table["trace_index"] >= 20]], ignore_index=True)


def short_files(bench: Bench, root: Path) -> Planted:
    """Every result file has lost its last chunk."""
    planted = of_tree("original", parts=FILES)(bench, root)
    for path in root.rglob(f"{logs.RESULT_PREFIX}*"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: CHUNKS - 1]))
    return planted


def more_files(bench: Bench, root: Path) -> Planted:
    """Results of other traces lie among those of the test."""
    planted = of_tree("original", parts=FILES)(bench, root)
    other = bench.test("original", EvalConfig(), "slow-test")
    write_results(next(root.rglob(f"{logs.RESULT_PREFIX}*")).parent, other[other["trace_index"] < 20], "slow-test")
    return planted
