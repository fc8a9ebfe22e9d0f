"""The list of planted faults, and of healthy runs: what is planted, and what a diagnosis has to say about it."""

from __future__ import annotations

from dataclasses import replace

import torch

from netllm_lib.abr.policies.llm import EvalConfig
from netllm_lib.abr.policies.simple import Constant
from planted import Fault
from planted_plants import (
    FILES,
    RESULTS,
    ROLLING,
    adapter_of_gpt2,
    dropout_on,
    early_checkpoint,
    files_of_two_checkpoints,
    half_the_traces,
    imported,
    lora,
    more_files,
    noisy,
    not_a_number,
    of_log,
    of_runs,
    of_table,
    of_test,
    of_training,
    of_tree,
    of_weights,
    other_first_level,
    other_pool_at_test,
    prefer_level_2,
    repeated,
    short_files,
    slips,
    tested_early,
    tested_on_another_plm,
    tree_tested_with,
    tree_with_another_plm,
    tree_with_target,
    tree_without_adapter,
    two_runs,
    weights_of_another_run,
)
from planted_runs import EARLY_STEP, TRACES, with_outlier

ANY = ("cause", "suspect", "note")
SAMPLED = ("sampling",)
"""The original draws its levels, which costs a healthy run .125 here and brings it below sound MPC."""

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
