"""What can be broken, and what is healthy or harmless: a table of operators, and `generate`, which makes a case by one of them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from faults import plants as ours
from faults.cases import GRADES, Case, FaultBench
from faults.plants import mixed_with
from netllm_lib.abr.diagnosis import paired
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.runs import plain
from planted_plants import (
    FILES,
    RESULTS,
    ROLLING,
    Plant,
    lora,
    of_log,
    of_test,
    of_training,
    of_tree,
    of_weights,
    tested_on_another_plm,
)
from planted_runs import ALL_PARTS, TRACES, Bench


@dataclass(frozen=True)
class Operator:
    """One way of breaking a run, or of having one that is as it should be."""

    name: str
    what: str  # is the case
    truth: str  # ids, see IDS; empty: it is healthy
    grades: tuple[Any, Any, Any]  # mild, medium, strong: (low, high) of a number, or a list to choose from
    plant: Callable[[FaultBench, Any], Plant]
    measurement: bool = False  # the policy is as it was, only what is said of it is wrong

    def draw(self, severity: str, seed: int) -> Any:
        """How severe it is; a wide range is drawn from by its logarithm, one of integers gives an integer."""
        grade = GRADES.index(severity)
        rng, values = np.random.default_rng([seed, grade, zlib.crc32(self.name.encode())]), self.grades[grade]
        if isinstance(values, list):
            return values[int(rng.integers(len(values)))]
        low, high = values
        wide = low > 0 and high > 3 * low
        number = float(np.exp(rng.uniform(np.log(low), np.log(high))) if wide else rng.uniform(low, high))
        return round(number) if isinstance(low, int) else number


def recipe(bench: FaultBench, **changes: Any) -> Plant:
    """The pool of sound MPC by another recipe."""
    return of_training(bench.learn_mpc(**changes))


def of_results(table: Callable[[Bench], pd.DataFrame]) -> Plant:
    """Result files alone."""
    return of_tree("original", table, parts=RESULTS)


ONCE = ([None], [None], [None])  # there are no grades of it
UNITS = ([1.25, 0.8], [10.0, 0.1], [1000.0, 10000.0])
LADDERS = (
    [300, 700, 1200, 1900, 2800, 4300],
    [200, 500, 900, 1500, 2400, 4000],
    [1000, 2500, 5000, 8000, 16000, 35000],
)
BROKEN, LABELS, LADDER = "broken-pool trace-shift", "label-shift broken-pool", "broken-pool label-shift video-shift"
PRICES, RETURNS = "reward-mismatch broken-pool wrong-pool target-return", "return-scale target-return wrong-pool"
OTHER, STALE = "wrong-checkpoint", "printed-mean mixed-results protocol-mismatch wrong-checkpoint"
SCREEN = ("console", *FILES)  # parts of a tree

_ALL: tuple[Operator, ...] = (
    # the pool, and what it was made from
    Operator("pool-throughput-unit", "the throughput in the pool's states is in another unit", BROKEN,
             ([1.05, 1.3, 0.75], [8.0, 0.125], [1000.0, 0.001]), lambda b, k: ours.with_rows(b, [2], lambda s: s * k)),
    Operator("pool-delay-unit", "the delay is", BROKEN, UNITS, lambda b, k: ours.with_rows(b, [3], lambda s: s * k)),
    Operator("pool-buffer-unit", "the buffer is", "broken-pool", UNITS, lambda b, k: ours.with_rows(b, [1], lambda s: s * k)),
    Operator("pool-size-unit", "the sizes are in another unit", "broken-pool video-shift",
             ([0.9537, 1.05], [8.0, 0.125], [1000.0, 0.001]), lambda b, k: ours.with_rows(b, [4], lambda s: s * k)),
    Operator("pool-history-turned", "the history begins with the newest chunk", BROKEN, ([[3]], [[2]], [[2, 3], [0, 2, 3]]),
             lambda b, rows: ours.with_rows(b, rows, lambda s: s[..., ::-1])),
    Operator("pool-rewards-penalty", "the rewards count stalls by another penalty", PRICES,
             ((2.5, 3.5), (0.5, 2.0), (-1.0, 0.0)), lambda b, k: ours.with_rewards(b, penalty=k)),
    Operator("pool-rewards-smoothness", "the rewards count changes of level by another weight", PRICES,
             ((0.5, 0.9), (0.0, 0.3), (3.0, 10.0)), lambda b, k: ours.with_rewards(b, smoothness=k)),
    Operator("pool-levels-reversed", "the levels of some episodes are counted from the top", LABELS,
             ((0.03, 0.1), (0.2, 0.5), (0.8, 1.0)), lambda b, share: ours.with_labels(b, share, lambda a: LEVELS - 1 - a)),
    Operator("pool-labels-shifted", "the levels of some episodes are those of k chunks before or after", LABELS,
             ([(1, 0.3), (-1, 0.3)], [(2, 1.0), (-1, 1.0)], [(5, 1.0), (-3, 1.0)]),
             lambda b, v: ours.with_labels(b, v[1], lambda a: np.roll(a, v[0]))),
    Operator("pool-labels-shuffled", "the levels of some episodes are in random order", LABELS,
             ((0.05, 0.15), (0.3, 0.6), (0.9, 1.0)),
             lambda b, share: ours.with_labels(b, share, np.random.default_rng(4).permutation)),
    Operator("pool-ladder", "the pool was made with other bitrates", LADDER,
             ([0], [1], [2]), lambda b, i: ours.with_ladder(b, LADDERS[i])),
    Operator("pool-few-episodes", "a few episodes, many times", "overfit pool-too-small",
             ((20, 40), (5, 10), (1, 3)), ours.few_episodes),
    Operator("pool-few-traces", "made on one trace, or a few", "overfit pool-too-small trace-shift",
             ((6, 10), (2, 4), (1, 1)), ours.few_traces),
    Operator("traces-bandwidth-unit", "the bandwidths of the training traces are in another unit", "broken-traces trace-shift",
             ([1.2, 0.8], [3.0, 0.3], [8.0, 0.125]), lambda b, k: ours.with_traces(b, lambda t: replace(t, mbps=t.mbps * k))),
    Operator("traces-clock-unit", "the times of the training traces are in another unit", "broken-traces trace-shift",
             ([0.5, 2.0], [0.1, 10.0], [0.001, 1e3]), lambda b, k: ours.with_traces(b, lambda t: replace(t, time_s=t.time_s * k))),
    Operator("weak-teacher", "the pool of a poor policy", "weak-teacher",
             (["careless mpc"], ["bba", "careless bba"], ["random", "level 1", "level 3"]), ours.weak_teacher),
    # training
    Operator("rate-too-low", "the learning rate is too low", "learning-rate undertrained",
             ((1e-4, 3e-4), (1e-5, 5e-5), (1e-7, 1e-6)), lambda b, rate: recipe(b, lr=rate, lr_around=rate)),
    Operator("rate-too-high", "the learning rate is too high", "learning-rate diverged",
             ((0.02, 0.03), (0.08, 0.2), (0.5, 2.0)), lambda b, rate: recipe(b, lr=rate, lr_around=rate)),
    Operator("rate-around-too-low", "the modules around the PLM hardly learn", "learning-rate undertrained",
             ((1e-4, 5e-4), (1e-5, 5e-5), (1e-8, 1e-7)), lambda b, rate: recipe(b, lr_around=rate)),
    Operator("warmup-too-long", "the warm-up is longer than the training", "warmup-too-long",
             ((600, 1000), (4000, 8000), (30000, 100000)), lambda b, steps: recipe(b, lr_around=1e-3, warmup_steps=steps)),
    Operator("few-steps", "the training is short", "undertrained",
             ((8, 14), (25, 50), (100, 250)), lambda b, batch: recipe(b, epochs=1, batch=batch)),
    Operator("rising-rate", "the rate rises until the loss does", "diverged learning-rate",
             ((0.02, 0.04), (0.1, 0.3), (0.5, 1.5)), lambda b, rate: recipe(b, lr=rate / 3, lr_around=rate, warmup=1.0)),
    Operator("weight-decay", "the weight decay is large", "weight-decay undertrained learning-rate",
             ((0.03, 0.3), (2.0, 8.0), (30.0, 90.0)), lambda b, decay: recipe(b, weight_decay=decay)),
    # checkpoint
    Operator("other-weights", "the test played the weights of another run", OTHER,
             ([2], ["on-careless-bba"], ["early"]), ours.other_weights),
    Operator("untrained-results", "the test played a network that was hardly trained", f"{OTHER} untrained adapter-not-applied",
             ((0.75, 0.9), (0.3, 0.6), (0.0, 0.0)), ours.towards_untrained),
    Operator("scaled-adapter", "the checkpoint's adapter was scaled", f"{OTHER} adapter-not-applied",
             ([0.9, 1.15], [0.3, 3.0], [0.0, 10.0]), lambda b, k: of_weights(lora("lora_B"), lambda weights: weights * k)),
    Operator("lora-alpha", "the test had another LoRA alpha", f"{OTHER} other-lora-alpha adapter-not-applied",
             ([30, 36], [8, 128], [1, 512]), ours.other_alpha),
    Operator("other-plm", "the test had another PLM of this shape", f"{OTHER} other-plm", ONCE, lambda b, _: tested_on_another_plm),
    Operator("wrong-layer", "the test left out the PLM's last layer, or a part", f"{OTHER} wrong-layer",
             ([0.9], [0.5], [0.0]), ours.weaker_last_layer),
    # test
    Operator("dropout", "dropout was on in the test", "dropout-on", ((0.02, 0.08), (0.2, 0.35), (0.5, 0.7)), ours.with_dropout),
    Operator("temperature", "levels were drawn, at some temperature", "sampling",
             ((0.2, 0.5), (1.2, 2.0), (4.0, 10.0)), ours.drawn_at),
    Operator("context-kept", "the context was kept from trace to trace", "context-leak",
             ([("healthy", TRACES)], [("whole-episodes", TRACES)], [("whole-episodes", "turns-test")]),
             lambda b, v: of_test(replace(ROLLING, context="leak"), v[0], ROLLING, traces=v[1])),
    Operator("other-window", "the test saw other windows", "window-mismatch",
             ([8, 12], [30, 46], [1, 2]), lambda b, w: of_test(EvalConfig(w=w))),
    Operator("other-target", "the test asked for another return", "target-return",
             ([0.95, 1.02], [0.6, 1.5], [0.1, 5.0]), lambda b, k: of_test(EvalConfig(target_return_scale=k), "on-mixed")),
    Operator("return-scale", "the test divided returns by another scale", RETURNS, ([1.03, 0.97], [2.0, 0.5], [100.0, 0.1]),
             lambda b, k: ours.with_scale("on-mixed", lambda s: replace(s, scale=s.scale * k, target_return=s.target_return / k))),
    Operator("gamma", "the training discounted its returns, the test did not", RETURNS,
             ((0.98, 0.995), (0.8, 0.9), (0.3, 0.5)), ours.with_gamma),
    Operator("level-mapping", "the test read the levels wrongly", f"level-mapping {OTHER}",
             ([[0, 1, 2, 3, 4, 4]], [[0, 0, 1, 2, 3, 4]], [[5, 4, 3, 2, 1, 0]]),
             lambda b, mapping: ours.misread(play=lambda a: np.array(mapping)[a])),
    Operator("test-states", "the test gave the policy states in other units", f"test-states {OTHER}",
             ([(4, 0.9537), (3, 1.1)], [(2, 8), (1, 0.1), (3, 10)], [(2, 1000), (4, 1000), (1, 10)]),
             lambda b, v: ours.misread(see=ours.rows_of([v[0]], lambda s: s * v[1]))),
    Operator("damaged-traces", "some trace files were damaged at the test, and are still or were mended since",
             "broken-traces protocol-mismatch trace-shift",
             ([(0.15, True), (0.2, False)], [(0.5, True), (0.4, False)], [(0.8, True), (0.9, False)]), ours.damaged_traces),
    # logs and trees of the original
    Operator("log-rises", "the loss falls, then rises; there is a console log only", "diverged learning-rate",
             ((0.04, 0.06), (0.15, 0.3), (0.8, 1.5)), lambda b, rate: of_log(b.learn_mpc(
                 original=True, epochs=3, lr=rate / 3, lr_around=rate, warmup_steps=350), parts=("console",))),
    Operator("log-ends-early", "the training was stopped, and its console log ends in a line", "cut-log undertrained",
             ((940, 940), (450, 700), (60, 150)), ours.stopped),
    Operator("log-of-another-test", "the log prints another mean than that of the result files", STALE,
             ((0.02, 0.05), (0.1, 0.3), (0.7, 1.0)), lambda b, share: ours.overwritten(mixed_with(Random(), share), SCREEN)),
    Operator("results-of-other-traces", "the files are of other traces than their folder's name says",
             "other-traces broken-traces protocol-mismatch trace-shift", (["fast-test"], ["turns-test"], ["slow-test"]),
             lambda b, name: ours.overwritten(lambda b: b.test("original", EvalConfig(), name), ("results", "pool"), name), True),
    # result files alone
    Operator("results-of-bba", "BBA, wholly or nearly", "plays-bba weak-teacher",
             ((0.6, 0.8), (0.85, 0.95), (1.0, 1.0)), lambda b, share: of_results(mixed_with(BBA(), share))),
    Operator("results-of-one-level", "one level, wholly or nearly", "plays-constant level-collapse",
             ([(1, 0.9)], [(2, 0.97), (0, 0.97)], [(3, 1.0), (5, 1.0)]), lambda b, v: of_results(mixed_with(Constant(v[0]), v[1]))),
    Operator("results-of-last-level", "mostly the level before", "plays-last-level level-collapse",
             ((0.8, 0.9), (0.92, 0.95), (0.97, 0.99)), lambda b, share: of_results(mixed_with(None, share))),
    Operator("results-random", "some levels are random", "plays-random sampling rare-bad-actions",
             ((0.02, 0.06), (0.15, 0.4), (0.9, 1.0)), lambda b, share: of_results(mixed_with(Random(), share))),
    Operator("results-of-few-steps", "the policy was hardly trained", "undertrained untrained warmup-too-long learning-rate",
             ((500, 940), (80, 150), (8, 40)), lambda b, samples: of_tree(ours.first_steps(b, samples), parts=RESULTS)),
    # healthy, or harmless
    Operator("healthy-seed", "another seed", "", ((2, 1000),) * 3, lambda b, seed: recipe(b, seed=seed)),
    Operator("healthy-family", "a PLM of another family", "", (["gpt2"], ["opt"], ["mistral"]), ours.other_family),
    Operator("healthy-window", "another window", "", ([20], [8], [5]), lambda b, w: recipe(b, w=w)),
    Operator("healthy-rate", "another learning rate", "", ([7e-3], [5e-3], [1.5e-2]), lambda b, rate: recipe(b, lr_around=rate)),
    Operator("healthy-clip", "gradients are clipped to almost nothing, which Adam does not mind", "",
             ((0.05, 0.1), (1e-2, 5e-2), (1e-3, 1e-2)), lambda b, norm: recipe(b, max_grad_norm=norm)),
    Operator("healthy-rolling", "the test computes every window anew", "", ONCE, lambda b, _: of_test(ROLLING, sound=ROLLING)),
    Operator("healthy-on-its-test", "the pool is of the test's traces", "", ONCE,
             lambda b, _: of_test(None, "on-test", pool_traces=TRACES)),
    Operator("healthy-two-seeds", "tests of two seeds", "", ((2, 1000),) * 3, ours.two_seeds),
    Operator("healthy-original", "a run of the original, whole or in parts", "", ([ALL_PARTS], [FILES], [RESULTS]),
             lambda b, parts: of_tree("original", parts=parts)),
    Operator("healthy-log", "its console log", "", ONCE, lambda b, _: of_log("original", parts=("console",))),
)  # fmt: skip
OPERATORS = {operator.name: operator for operator in _ALL}


def generate(name: str, severity: str, seed: int, folder: Path, bench: FaultBench | None = None) -> Case:
    """Write the run below `folder`, which then holds what a user would have and nothing of the truth."""
    bench, about = bench or shared_bench(), OPERATORS[name]
    drawn, truth, effect = about.draw(severity, seed), tuple(about.truth.split()), None
    planted = about.plant(bench, drawn)(bench, folder)
    options = {"data": str(bench.data)} | {key: str(value) for key, value in planted.options.items()}
    if truth and not about.measurement and planted.table is not None and planted.twin is not None:
        effect = paired(planted.twin, planted.table)
    return Case(name, severity, seed, planted.folders, options, truth, effect, about.measurement, plain(drawn))


def drawn_severity(name: str, seed: int) -> str:
    """The severity that a seed gives an operator if none is asked for."""
    return GRADES[np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(len(GRADES))]


@functools.cache
def shared_bench() -> FaultBench:
    return FaultBench()
