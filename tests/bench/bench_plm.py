"""Speed of testing and training a PLM policy against a plain transcription of the original's loop, on the CPU.

The opponent (`original_loop.py`, checked by `tests/test_original_loop.py`) plays one trace at a time and recomputes its 20-step
window for every chunk; it trains one window at a time and clips after each; it has the original's eager attention and LoRA
beside the weights. Same weights, machine, thread and precision; in turns in one process; ratios are medians of the rounds' ratios
of CPU seconds. Its loop is linear in traces, so it is timed on a few and scaled. Writes reports/benchmarks/plm.md.

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
from transformers import LlamaConfig

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
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig

TRACES = 100
LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
"""116 million parameters with 32,000 embeddings, as the original's costs were measured with."""


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, plm: dict[str, Any], rounds: int, their_traces: int, count: int) -> list[str]:
    """Rows of the table for a PLM; the original's loop plays so many traces, and both train on `count` windows."""
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    episodes = sound_episodes(traces, seed=1, repeats=-(-TRACES // len(traces))).rows(range(TRACES))
    windows = make_windows(generate_pool(BBA(), traces, video, episodes.rows(range(20))), WindowConfig.upstream())
    ours, theirs = (stir(PolicyNetwork(load_plm(make(**plm)))) for make in (PLMConfig, PLMConfig.upstream))
    config = TrainConfig(epochs=1, order=tuple(range(count)))
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

    play(they, 1)
    rows = []
    for _ in range(rounds):
        base = play(they, their_traces) * TRACES / their_traces
        times = {"transcription": base, "ours, float32": play(LLMPolicy(ours, meta), TRACES)}
        times["ours, bfloat16"] = play(LLMPolicy(ours, meta, EvalConfig(precision="bfloat16")), TRACES)
        rows += [("test", who, seconds, base / seconds) for who, seconds in times.items()]
    for _ in range(rounds):
        base = cpu_seconds(lambda: train_windows(theirs, windows, range(count))) / count
        times = {"transcription": base, "ours, float32": fit("float32"), "ours, bfloat16": fit("bfloat16")}
        rows += [("train", who, seconds, base / seconds) for who, seconds in times.items()]
    lines = []
    for (kind, who), found in pd.DataFrame(rows).groupby([0, 1], sort=False):
        unit = "s for 100 traces" if kind == "test" else "s a window"
        ratio = f"{found[3].median():.2f} × ({found[3].min():.2f} to {found[3].max():.2f})"
        lines.append(f"| {name} | {kind} | {who} | {found[2].median():.3g} {unit} | {ratio} |")
        print(lines[-1], flush=True)
    return lines


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(vocab_size=32000, **LLAMA).save_pretrained(folder)  # type: ignore[arg-type]
        lines = measure("SmolLM2, 4 layers", {"source": "smollm2", "layers": 4}, rounds, 4, 32)
        llama = {"source": folder, "random_weights": True}
        lines += measure("llama 12 × 768, random", llama, max(1, rounds - 1), 2, 24)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = ", ".join(name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags) or "no AVX-512"
    minutes = (time.perf_counter() - started) / 60
    text = f"""# PLM: test and training against the original's loop

LoRA rank 128, w 20, one thread, CPU seconds, {rounds} rounds in turns (one less for the llama), {platform.machine()}, {cpu},
PyTorch {torch.__version__}. Command: `python tests/bench/bench_plm.py {rounds}` ({minutes:.0f} minutes).

The opponent is a transcription of the original's procedure (`tests/bench/original_loop.py`), in float32, with context cleared per
trace and 47 decisions a trace as ours; it plays 4 traces (the llama: 2) and is scaled to 100, being linear in them. As the original
really tests (48 decisions, context never cleared) it computes 8016 tokens a trace and not 6169: 1.3 times more by count, not
measured. Training: batches of 8 windows with one clip a step against one window at a time with its own.

| PLM | | | median | speed, median of the rounds (all of them) |
|---|---|---|---|---|
{chr(10).join(lines)}

In float32 both trainings run at the processor's matrix peak: there the gain is the last layer, computed only where it is read,
which is less of 12 layers than of 4. bfloat16 is what `precision="auto"` takes where the processor multiplies it faster.
"""
    publish("plm", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
