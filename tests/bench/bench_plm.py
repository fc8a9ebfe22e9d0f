"""Speed of testing and training a PLM policy against a plain transcription of the original's loop, on the CPU.

The opponent (`original_loop.py`, checked by `tests/test_original_loop.py`) plays one trace at a time and recomputes its 20-step
window for every chunk; it trains one window at a time and clips after each; it has the original's eager attention and LoRA
beside the weights. Same weights, machine, thread and precision; in turns in one process; ratios are medians of the rounds' ratios
of CPU seconds. Its loop and the rolling window are linear in traces, so they are timed on a few and scaled. Beside each time: what
part of the processor's matrix peak the products of the work reach. Writes reports/benchmarks/plm.md.

    python tests/bench/bench_plm.py [ROUNDS]
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measured import publish
from original_loop import OriginalPolicy, train_windows

from llm_fixtures import stir, train_on
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry
from netllm_lib.checkpoint import describe
from netllm_lib.linear import WORTH_IT, onednn_gain, onednn_linear, processor
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig

TRACES = 100
FEW = 4  # played by the original's loop
ROLLING = 16  # played with the rolling window
WINDOWS = 32  # trained on


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def matrix_peaks() -> dict[str, float]:
    """Operations a second on one thread, by library, of a product as tests and trainings have it: the best of 40."""
    x, weight = torch.ones(800, 576), torch.ones(1536, 576)
    half = x.bfloat16(), weight.bfloat16()
    ways: dict[str, Callable[[], object]] = {"float32, MKL": lambda: nn.functional.linear(x, weight)}
    ways |= {
        "float32, oneDNN": lambda: onednn_linear(x, weight),
        "bfloat16, oneDNN": lambda: nn.functional.linear(*half),
    }
    return {name: 2 * 800 * 576 * 1536 / min(cpu_seconds(way) for _ in range(40)) for name, way in ways.items()}


def measure(rounds: int, peaks: dict[str, float]) -> list[str]:
    """Rows of the table."""
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    episodes = sound_episodes(traces, seed=1, repeats=-(-TRACES // len(traces))).rows(range(TRACES))
    windows = make_windows(generate_pool(BBA(), traces, video, episodes.rows(range(20))), WindowConfig.upstream())
    ours, theirs = (
        stir(PolicyNetwork(load_plm(make("smollm2", layers=4)))) for make in (PLMConfig, PLMConfig.upstream)
    )
    config = TrainConfig(epochs=1, order=tuple(range(WINDOWS)))
    meta, they = describe(ours, windows.settings), OriginalPolicy(theirs, windows.scale, windows.config.w, clear=True)

    def play(policy: Policy, count: int) -> float:
        return cpu_seconds(lambda: rollout(policy, Simulator(traces, video, episodes.rows(range(count)))))

    def fit(precision: Any) -> float:
        """CPU seconds a window, without the first step, which warms up, and without writing checkpoints."""
        clock: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            numbers = dataclasses.replace(config, precision=precision)
            train_on(ours, windows, numbers, Path(folder), progress=lambda *_: clock.append(time.process_time()))
        return (clock[-1] - clock[0]) / (len(clock) - 1) / config.batch

    half, rolling = EvalConfig(precision="bfloat16"), EvalConfig(context_window="rolling")
    half_rolling = dataclasses.replace(rolling, precision="bfloat16")
    best = peaks["float32, oneDNN" if onednn_gain() >= WORTH_IT else "float32, MKL"]
    mkl, halves = peaks["float32, MKL"], peaks["bfloat16, oneDNN"]
    # matrix operations, counted in bfloat16, whose products the counter knows
    test, of_rolling, training = (
        operations(work) * share
        for work, share in (
            (lambda: play(LLMPolicy(ours, meta, half), 1), TRACES),
            (lambda: play(LLMPolicy(ours, meta, half_rolling), 1), TRACES),
            (lambda: fit("bfloat16"), 1 / WINDOWS),
        )
    )
    their_test = operations(lambda: play(they, 1)) * TRACES
    their_training = operations(lambda: train_windows(theirs, windows, [0]))

    def learn() -> None:
        train_windows(theirs, windows, range(WINDOWS))

    # (what, who): operations, the peak for them, and how to measure the seconds that they take
    ways: dict[tuple[str, str], tuple[float, float, Callable[[], float]]] = {
        ("test", "transcription"): (their_test, mkl, lambda: play(they, FEW) * TRACES / FEW),
        ("test", "rolling, float32"): (
            of_rolling,
            best,
            lambda: play(LLMPolicy(ours, meta, rolling), ROLLING) * TRACES / ROLLING,
        ),
        ("test", "cached, float32"): (test, best, lambda: play(LLMPolicy(ours, meta), TRACES)),
        ("test", "cached, bfloat16"): (test, halves, lambda: play(LLMPolicy(ours, meta, half), TRACES)),
        ("train", "transcription"): (their_training, mkl, lambda: cpu_seconds(learn) / WINDOWS),
        ("train", "float32"): (training, best, lambda: fit("float32")),
        ("train", "bfloat16"): (training, halves, lambda: fit("bfloat16")),
    }
    times = pd.DataFrame([{way: seconds() for way, (_, _, seconds) in ways.items()} for _ in range(rounds)])
    lines = []
    for (kind, who), (count, peak, _) in ways.items():
        seconds, gains = times[kind, who], times[kind, "transcription"] / times[kind, who]
        unit = "s for 100 traces" if kind == "test" else "s a window"
        ratio = f"{gains.median():.2f} × ({gains.min():.2f} to {gains.max():.2f})"
        part = f"{count / seconds.median() / peak:.0%}"
        lines.append(f"| {kind} | {who} | {seconds.median():.3g} {unit} | {ratio} | {part} |")
    return lines


def operations(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    started, peaks = time.perf_counter(), matrix_peaks()
    lines = measure(rounds, peaks)
    known = "; ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items())
    cpu = " ".join(processor().get(part, "") for part in ("model name", "cpu family", "model"))
    library = "oneDNN" if onednn_gain() >= WORTH_IT else "MKL"
    minutes = (time.perf_counter() - started) / 60
    text = f"""# PLM: test and training against the original's loop

The first 4 layers of SmolLM2, LoRA rank 128, w 20, one thread, CPU seconds, {rounds} rounds in turns, PyTorch {torch.__version__},
{platform.machine()}, {cpu.strip()}. Command: `python tests/bench/bench_plm.py {rounds}` ({minutes:.0f} minutes).

The opponent is a transcription of the original's procedure (`tests/bench/original_loop.py`), in float32, with context cleared per
trace and 47 decisions a trace as ours; it plays {FEW} traces, the rolling window {ROLLING}, scaled to 100, being linear in them.
As the original really tests (48 decisions, context never cleared) it computes 8016 tokens a trace and not 6169: 1.3 times more by
count, not measured. Training: batches of 8 windows with one clip a step against one window at a time with its own.

| | | median | speed, median of the rounds (all of them) | of the matrix peak |
|---|---|---|---|---|
{chr(10).join(lines)}

Matrix peaks of one thread, measured: {known}.
What counts is the library that the work really takes: in float32 ours takes {library} here (`netllm_lib/linear.py`), the
transcription MKL. How much is gained depends on the processor: where oneDNN is not faster,
float32 cannot gain more than what is not computed.
"""
    publish("plm", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
