"""Peak memory of training and testing on the CPU against what preflight predicts from the configuration alone.

Each case runs in a process of its own, which loads the PLM, resets the kernel's record of its peak, and then takes a few
optimizer steps, or plays episodes in lock-step; the peak of its resident memory (VmHWM) is what is compared. Writes
reports/benchmarks/memory.md. Linux only.

    python tests/bench/bench_memory.py
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measured import in_child, publish

from llm_fixtures import stir, toy_pool, train_on
from netllm_lib.abr.batches import example_batch, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm, sketch_plm
from netllm_lib.preflight import estimate_memory
from netllm_lib.train import TrainConfig

EPISODES = 100  # of a test, in lock-step, as the prediction has it
WIDE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 12}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    plm: dict[str, Any]
    what: str = "train"  # or "test"
    batch: int = 8
    precision: Any = "float32"
    checkpointing: bool = False


def cases(wide: str) -> list[Case]:
    """Several sizes; one whole PLM, one of the width of a larger one."""
    smol, large = {"source": "smollm2"}, {"source": wide, "random_weights": True, "rank": 32}
    few, half = {**smol, "layers": 4}, {**smol, "dtype": "bfloat16"}
    return [
        Case("SmolLM2, 4 layers", few),
        Case("SmolLM2, 4 layers, bf16 arithmetic", few, precision="bfloat16"),
        Case("SmolLM2, 8 layers, batch 32", {**smol, "layers": 8}, batch=32),
        Case("SmolLM2, 30 layers", smol),
        Case("SmolLM2, 30 layers, checkpointing", smol, checkpointing=True),
        Case("SmolLM2, 30 layers, bf16 weights", half, precision="bfloat16"),
        Case("llama 6 × 1536, rank 32", large, batch=4),
        Case("SmolLM2, 4 layers", few, "test"),
        Case("SmolLM2, 30 layers", smol, "test"),
        Case("SmolLM2, 30 layers, bf16 weights", half, "test"),
        Case("llama 6 × 1536, rank 32", large, "test"),
    ]


def measure(case: Case) -> float:
    """Bytes, in this process."""
    torch.set_num_threads(1)
    network = stir(PolicyNetwork(load_plm(PLMConfig(**case.plm, gradient_checkpointing=case.checkpointing))))
    windows = make_windows(toy_pool(max(2, case.batch)))
    order = tuple(range(3 * case.batch))
    config = TrainConfig(epochs=1, batch=case.batch, precision=case.precision, order=order)
    traces = generate_traces("memory", EPISODES, seed=1)
    simulator = Simulator(traces, generate_video("clip", seed=1), sound_episodes(traces))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if case.what == "train":
        with tempfile.TemporaryDirectory() as folder:
            train_on(network, windows, config, Path(folder))
    else:
        play(LLMPolicy(network, describe(network, windows.settings)), simulator)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    started, lines = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(vocab_size=1000, num_key_value_heads=4, **WIDE).save_pretrained(folder)  # type: ignore[arg-type]
        for case in cases(folder):
            network, config = PolicyNetwork(sketch_plm(PLMConfig(**case.plm))), TrainConfig(precision=case.precision)
            memory = estimate_memory(network, example_batch(case.batch), config, case.checkpointing)
            predicted = (memory.train_peak if case.what == "train" else memory.test_peak) / 1e9
            measured = float(in_child(__file__, json.dumps(dataclasses.asdict(case)))) / 1e9  # type: ignore[arg-type]
            part = f"batch {case.batch}" if case.what == "train" else f"{EPISODES} episodes"
            gb = f"{predicted:.2f} | {measured:.2f} | {predicted / measured - 1:+.0%}"
            lines.append(f"| {case.what} | {case.name} | {part} | {gb} |")
            print(lines[-1], flush=True)
    text = f"""# Memory: predicted before loading, and measured

Peak resident memory in GB (10⁹ bytes) on the CPU, one process a case, {platform.machine()}. w 20, LoRA rank 128 unless said.
Command: `python tests/bench/bench_memory.py` ({time.perf_counter() - started:.0f} s).

| | PLM | | predicted | measured | |
|---|---|---|---|---|---|
{chr(10).join(lines)}
"""
    publish("memory", text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(Case(**json.loads(sys.argv[1]))))
    else:
        main()
