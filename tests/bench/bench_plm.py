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
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measured import publish
from original_loop import OriginalPolicy, train_windows

from llm_fixtures import stir
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, train

TRACES = 100


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    source: str
    layers: int | None
    random_weights: bool
    rounds: int
    their_traces: int  # that the original's loop plays, scaled to 100
    windows: int  # trained in a round, by each


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def write_llama(folder: Path) -> str:
    """The config of a llama of 116 million parameters (embeddings included), as the original's costs were measured with."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    LlamaConfig(vocab_size=32000, **shape).save_pretrained(folder)  # type: ignore[arg-type]
    return str(folder)


def measure(case: Case) -> list[str]:
    registry = find_registry()
    traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
    episodes = sound_episodes(traces, seed=1, repeats=-(-TRACES // len(traces))).rows(range(TRACES))
    pool = generate_pool(BBA(), traces, video, episodes.rows(range(20)))
    shape: dict[str, Any] = {"layers": case.layers, "random_weights": case.random_weights}
    ours, theirs = (
        stir(PolicyNetwork(load_plm(make(case.source, **shape)), NetworkConfig()))
        for make in (PLMConfig, PLMConfig.upstream)
    )
    config = TrainConfig(epochs=1, precision="float32", order=(tuple(range(case.windows)),))
    windows = make_windows(pool, WindowConfig.upstream())
    meta = describe(ours, windows.settings)

    def play(policy: Policy, count: int) -> Callable[[], object]:
        return lambda: rollout(policy, Simulator(traces, video, episodes.rows(range(count))))

    def fit(precision: Literal["float32", "bfloat16"]) -> float:
        """CPU seconds a window, without the first step, which warms up, and without writing checkpoints."""
        clock: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            numbers = dataclasses.replace(config, precision=precision)
            tick = lambda *_: clock.append(time.process_time())  # noqa: E731
            train(ours, windows, numbers, folder=Path(folder), settings=windows.settings, progress=tick)
        return (clock[-1] - clock[0]) / (len(clock) - 1) / config.batch

    they = OriginalPolicy(theirs, windows.scale, windows.config.w, clear=True)
    ratios: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}

    def note(what: str, seconds: float, against: float) -> None:
        times.setdefault(what, []).append(seconds)
        ratios.setdefault(what, []).append(against / seconds)

    play(they, 1)()
    for _ in range(case.rounds):
        base = cpu_seconds(play(they, case.their_traces)) * TRACES / case.their_traces
        note("test|transcription", base, base)
        note("test|ours, float32", cpu_seconds(play(LLMPolicy(ours, meta), TRACES)), base)
        half = EvalConfig(precision="bfloat16")
        note("test|ours, bfloat16", cpu_seconds(play(LLMPolicy(ours, meta, half), TRACES)), base)
    for _ in range(case.rounds):
        base = cpu_seconds(lambda: train_windows(theirs, windows, range(case.windows)))
        note("train|transcription", base / case.windows, base / case.windows)
        note("train|ours, float32", fit("float32"), base / case.windows)
        note("train|ours, bfloat16", fit("bfloat16"), base / case.windows)

    lines = []
    for what, values in times.items():
        kind, who = what.split("|")
        unit = "s for 100 traces" if kind == "test" else "s a window"
        spread = ratios[what]
        low, high = min(spread), max(spread)
        ratio = f"{statistics.median(spread):.2f} × ({low:.2f} to {high:.2f})"
        lines.append(f"| {case.name} | {kind} | {who} | {statistics.median(values):.3g} {unit} | {ratio} |")
        print(lines[-1], flush=True)
    return lines


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        llama = write_llama(Path(folder) / "llama")
        cases = [
            Case("SmolLM2, 4 layers", "smollm2", 4, False, rounds, 4, 32),
            Case("llama 12 × 768, random", llama, None, True, max(1, rounds - 1), 2, 24),
        ]
        lines = [line for case in cases for line in measure(case)]
    minutes = (time.perf_counter() - started) / 60
    text = f"""# PLM: test and training against the original's loop

LoRA rank 128, w 20, one thread, CPU seconds, {rounds} rounds in turns (one less for the llama), {platform.machine()}, {_cpu()},
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


def _cpu() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ", ".join(name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags) or "no AVX-512"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
