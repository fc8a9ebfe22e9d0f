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
from planted import Fault, Plant, Planted
from planted_runs import (
    EARLY_STEP,
    HIDDEN,
    RANK,
    TRACES,
    VIDEO,
    Bench,
    Careless,
    Trained,
    upstream_settings,
    with_outlier,
    write_runs,
    write_test_run,
    write_tree,
)
from upstream_tree import results_path, write_results

FILES = ("losses", "results", "pool")  # of a tree of the original


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


# --- the list ------------------------------------------------------------------------------------------------------------

ANY = ("cause", "suspect", "note")
RESULTS = ("results",)
ROLLING = EvalConfig(context_window="rolling")
SAMPLED = (
    "sampling",
)  # the original draws its levels, which costs a healthy run .125 here and brings it below sound MPC

FAULTS: tuple[Fault, ...] = (
    # what the training reached
    Fault("warm-up", "a warm-up of 3000 steps in 250", ("warmup-too-long",), of_training("long-warmup"), retrain_s=12),
    Fault("rate too low", "a learning rate of 2e-5", ("learning-rate",), of_training("slow"), retrain_s=12),
    # the loss falls for a few steps and is high for the rest: too high a rate either way
    Fault("rate too high", "a learning rate of 0.3", ("learning-rate", "diverged"), of_training("fast")),
    Fault("diverged", "the rate rises to 0.3 until the end", ("diverged",), of_training("diverged")),
    Fault("undertrained", "32 steps", ("undertrained",), of_training("short"), retrain_s=12),
    Fault("not a number", "NaN from the second epoch on", ("non-finite",), not_a_number),
    Fault("NaN in the weights", "one matrix of the adapter", ("non-finite",),
          of_weights(lambda network: lora("lora_A")(network)[:1], lambda matrix: torch.full_like(matrix, torch.nan))),
    Fault("rate around too low", "1e-5 for the modules around the PLM", ("learning-rate",), of_training("slow-around")),
    Fault("two faults", "the warm-up, and levels drawn", ("warmup-too-long",),
          of_test(EvalConfig(choose="sample"), "long-warmup", twin="healthy"), budget_s=20),
    # what there was to learn
    Fault("random teacher", "the pool of a random policy", ("weak-teacher",), of_training("on-random")),
    Fault("constant teacher", "the pool of level 2 alone", ("weak-teacher",), of_training("on-constant")),
    Fault("careless teacher", "the pool of BBA with 15 % of random levels", ("weak-teacher",), of_training("on-careless-bba")),
    Fault("BBA as teacher", "the pool of BBA", ("weak-teacher",), of_training("on-bba")),
    Fault("tiny pool", "4 episodes", ("pool-too-small",), of_training("on-tiny")),
    Fault("labels shifted", "each label is the one before", ("label-shift",), of_training("on-shifted")),
    Fault("labels shuffled", "labels in random order", ("label-shift",), of_training("on-shuffled")),
    # it costs little, because the level after is a guess at what comes: the run is not below its reference
    Fault("labels late", "each label is the one after", ("label-shift",), of_training("on-later"), ANY),
    Fault("labels one less", "levels 1 to 6 read as 0 to 5", ("label-shift",), of_training("on-one-less")),
    Fault("another video", "tested on chunks 1.7 times as large", ("video-shift",),
          of_test(None, twin="on-heavy", video="heavy")),
    Fault("other bandwidths", "trained on fast traces, tested on slow ones", ("trace-shift",),
          of_test(None, "on-fast", twin="on-slow", traces="slow-test", pool_traces="fast-train")),
    # the states at test are not those of the pool, whatever the reason
    Fault("units", "the pool's throughput in Mbit/s in place of MB/s", ("trace-shift",), of_training("on-in-bits")),
    # how it was tested
    Fault("sampling", "levels drawn, after a noisy teacher", ("sampling",),
          of_test(EvalConfig(choose="sample"), "on-noisy"), budget_s=30),
    # it is above MPC as published, but below sound MPC, and would not be
    Fault("sampling, little", "levels drawn", ("sampling",), of_test(EvalConfig(choose="sample")), budget_s=20),
    Fault("dropout", "half of everything dropped in the test", ("dropout-on",), of_runs(dropout_on), budget_s=30),
    Fault("context kept", "windows of whole episodes, fast and slow traces in turns", ("context-leak",),
          of_test(replace(ROLLING, context="leak"), "whole-episodes", ROLLING, traces="turns-test"), budget_s=90),
    Fault("window", "46 steps where the training had 10", ("window-mismatch",), of_test(EvalConfig(w=46)), ("cause", "suspect"),
          budget_s=30),
    Fault("target", "a quarter of the largest return", ("target-return",),
          of_test(EvalConfig(target_return_scale=0.2), "on-mixed"), budget_s=30),
    # which weights
    Fault("weights of another run", "those of another training", ("wrong-checkpoint",), of_runs(weights_of_another_run)),
    Fault("early checkpoint", f"the weights of step {EARLY_STEP}", ("wrong-checkpoint",), of_runs(early_checkpoint)),
    Fault("files of two checkpoints", "one file copied from another", ("wrong-checkpoint",), files_of_two_checkpoints),
    Fault("another PLM", "of the same shape", ("wrong-checkpoint",), tested_on_another_plm),
    # the head was changed after the training: these are not the weights that it ended with, and they choose one level
    Fault("changed head", "its bias prefers level 2", ("wrong-checkpoint", "level-collapse"),
          of_weights(lambda network: [network.action_head.bias], prefer_level_2)),
    Fault("zero adapter", "LoRA's B is zero", ("adapter-not-applied",), of_weights(lora("lora_B"), torch.zeros_like)),
    # how it shows, and how it was measured
    Fault("rare slips", "2 % of the levels are 5", ("rare-bad-actions",), of_table(slips(0.02, 5)), ("suspect",)),
    Fault("rare slips, with weights", "the same, and everything is there", ("rare-bad-actions",),
          of_table(slips(0.02, 5), chain=True), ("cause", "suspect"), budget_s=20),
    Fault("one level", "always level 1", ("level-collapse",), of_table(lambda bench: bench.play(Constant(1)))),
    Fault("noise", "only the run's delays hold noise", ("protocol-mismatch",), of_table(noisy), ANY, costs=False),
    Fault("half the traces", "20 of the baselines' 40", ("protocol-mismatch",), of_table(half_the_traces), ANY, costs=False),
    Fault("two tables in one", "rows of two runs", ("protocol-mismatch",), of_table(repeated), ANY),
    Fault("first level", "4 in place of 0", ("protocol-mismatch",), of_table(other_first_level), ANY, costs=False),
    # the same in trees of the original
    Fault("original: warm-up", "2000 steps in 177", ("warmup-too-long",), of_tree("original-warmup")),
    Fault("original: warm-up, imported", "an import of it", ("warmup-too-long",), imported),
    Fault("original: warm-up, log", "the console log alone", ("warmup-too-long",), of_log("original-warmup", parts=("console",))),
    Fault("original: warm-up, terminal", "the log without arguments", ("warmup-too-long",),
          of_log("original-warmup", parts=("console",), terminal=False)),
    # without names nothing tells the learning rate
    Fault("original: warm-up, losses", "train_losses.txt alone", ("undertrained",), of_log("original-warmup", parts=("losses",))),
    Fault("original: warm-up, results", "result files alone", ("gap", "rare-bad-actions"),
          of_tree("original-warmup", parts=RESULTS), ("suspect",)),
    Fault("original: no adapter", "LoRA's B is zero", ("adapter-not-applied",), tree_without_adapter),
    Fault("original: adapter of gpt2", "in the folder of a llama", ("adapter-not-applied",), adapter_of_gpt2),
    Fault("original: early checkpoint", f"the weights of step {EARLY_STEP}", ("wrong-checkpoint",), tested_early(there=True)),
    Fault("original: another checkpoint", "results of weights that are not here", ("wrong-checkpoint",), tested_early(there=False),
          budget_s=60),
    Fault("original: another PLM", "of the same shape", ("wrong-checkpoint",), tree_with_another_plm),
    Fault("original: sampling", "after a noisy teacher", ("sampling",), of_tree("original-noisy"), budget_s=60),
    Fault("original: wrong pool", "one whose largest return is a sixth", ("wrong-pool",),
          other_pool_at_test("original-mixed", lambda bench: with_outlier(bench.pool("mpc"))), budget_s=60),
    Fault("original: target", "a quarter of the largest return", ("target-return",), tree_with_target(0.2), budget_s=60),
    Fault("original: slips, results", "2 % of the levels are 5, result files alone", ("rare-bad-actions",),
          of_tree("original", slips(0.02, 5, "original", clock="running"), parts=RESULTS), ("suspect",)),
    Fault("original: two runs", "the second overwrote half of the first", ("protocol-mismatch",),
          of_tree("original", two_runs, parts=FILES), ANY),
    Fault("original: short files", "47 chunks", ("protocol-mismatch",), short_files, ANY, costs=False),
    Fault("original: more files", "20 of other traces", ("protocol-mismatch",), more_files, ANY, costs=False),
    # nothing, or nothing that cost anything
    Fault("healthy", "nothing", (), of_training("healthy"), budget_s=20, harmless=True),
    Fault("healthy, rolling", "nothing", (), of_test(ROLLING, sound=ROLLING), budget_s=30, harmless=True),
    Fault("healthy original", "as the original trains and tests: sampled, leaked, clipped, crossing",
          ("sampling", "context-leak", "clipping", "crossing-windows"), of_tree("original"), budget_s=60,
          harmless=True, besides=SAMPLED),
    Fault("harmless window", "46 steps where the training had 10, of which the original cuts all but 11", ("window-mismatch",),
          tree_tested_with(46), budget_s=60, harmless=True, besides=SAMPLED),
    Fault("healthy original, log", "nothing", (), of_log("original", parts=("console",)), harmless=True),
    Fault("healthy original, results", "nothing", (), of_tree("original", parts=RESULTS), harmless=True),
    Fault("harmless warm-up", "700 steps in 500", ("warmup-too-long",), of_training("late-warmup"), harmless=True),
    Fault("harmless target", "nine tenths of the largest return", ("target-return",), of_test(EvalConfig(target_return_scale=0.9)),
          budget_s=20, harmless=True),
    Fault("harmless dropout", "the rate of the training, 5 %", ("dropout-on",), of_test(EvalConfig(dropout=True)), budget_s=20,
          harmless=True),
    Fault("few slips", "1.5 % random levels, too few to tell", ("too-few-traces",), of_table(slips(0.015)), harmless=True),
    Fault("trained on the test", "the pool is of the test's traces", ("test-leakage",),
          of_test(None, "on-test", pool_traces=TRACES), harmless=True),
    Fault("harmless pool", "another pool at test, whose target carries no signal", ("wrong-pool",),
          other_pool_at_test("original", lambda bench: bench.pool("slow")), budget_s=60, harmless=True, besides=SAMPLED),
)  # fmt: skip
