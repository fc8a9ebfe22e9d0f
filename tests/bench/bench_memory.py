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
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measured import publish

GB = 1e9
EPISODES = 100  # of a test, in lock-step, as the prediction has it


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    plm: dict[str, Any]
    what: str = "train"  # or "test"
    batch: int = 8
    precision: str = "float32"
    checkpointing: bool = False


def cases() -> list[Case]:
    """Several sizes; one whole PLM, one of the width of a larger one."""
    smol = {"source": "smollm2"}
    return [
        Case("SmolLM2, 4 layers", {**smol, "layers": 4}),
        Case("SmolLM2, 4 layers, bf16 arithmetic", {**smol, "layers": 4}, precision="bfloat16"),
        Case("SmolLM2, 8 layers, batch 32", {**smol, "layers": 8}, batch=32),
        Case("SmolLM2, 30 layers", smol),
        Case("SmolLM2, 30 layers, checkpointing", smol, checkpointing=True),
        Case("SmolLM2, 30 layers, bf16 weights", {**smol, "dtype": "bfloat16"}, precision="bfloat16"),
        Case("llama 6 × 1536, rank 32", {"source": "wide", "random_weights": True, "rank": 32}, batch=4),
        Case("SmolLM2, 4 layers", {**smol, "layers": 4}, "test"),
        Case("SmolLM2, 30 layers", smol, "test"),
        Case("SmolLM2, 30 layers, bf16 weights", {**smol, "dtype": "bfloat16"}, "test"),
        Case("llama 6 × 1536, rank 32", {"source": "wide", "random_weights": True, "rank": 32}, "test"),
    ]


def write_wide(folder: Path) -> None:
    from transformers import LlamaConfig

    shape = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 12}
    LlamaConfig(vocab_size=1000, num_key_value_heads=4, **shape).save_pretrained(folder)  # type: ignore[arg-type]


def measure(case: Case) -> float:
    """Bytes, in this process."""
    import torch

    from llm_fixtures import stir, toy_pool
    from netllm_lib.abr.batches import make_windows
    from netllm_lib.abr.episodes import sound_episodes
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.play import play
    from netllm_lib.abr.policies.llm import LLMPolicy
    from netllm_lib.abr.simulator import Simulator
    from netllm_lib.abr.synthetic import generate_traces, generate_video
    from netllm_lib.checkpoint import describe
    from netllm_lib.plm import PLMConfig, load_plm
    from netllm_lib.train import TrainConfig, train

    torch.set_num_threads(1)
    plm = PLMConfig(**case.plm, gradient_checkpointing=case.checkpointing)
    network = stir(PolicyNetwork(load_plm(plm)))
    windows = make_windows(toy_pool(max(2, case.batch)))
    steps = tuple(range(3 * case.batch))
    config = TrainConfig(epochs=1, batch=case.batch, precision=case.precision, order=(steps,))  # type: ignore[arg-type]
    traces = generate_traces("memory", EPISODES, seed=1)
    simulator = Simulator(traces, generate_video("clip", seed=1), sound_episodes(traces))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if case.what == "train":
        with tempfile.TemporaryDirectory() as folder:
            train(network, windows, config, folder=Path(folder), settings=windows.settings)
    else:
        play(LLMPolicy(network, describe(network, windows.settings)), simulator)
    return _peak()


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    from netllm_lib.abr.batches import example_batch
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.plm import PLMConfig, sketch_plm
    from netllm_lib.preflight import estimate_memory
    from netllm_lib.train import TrainConfig

    started = time.perf_counter()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        write_wide(Path(folder) / "wide")
        for case in cases():
            plm: dict[str, Any] = {k: str(Path(folder) / v) if v == "wide" else v for k, v in case.plm.items()}
            case = dataclasses.replace(case, plm=plm)
            train = TrainConfig(batch=case.batch, precision=case.precision)  # type: ignore[arg-type]
            network = PolicyNetwork(sketch_plm(PLMConfig(**plm)))
            memory = estimate_memory(network, example_batch(case.batch), train, case.checkpointing)
            predicted = memory.train_peak if case.what == "train" else memory.test_peak
            command = [sys.executable, __file__, json.dumps(dataclasses.asdict(case))]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            measured = float(done.stdout.split()[-1])
            part = f"batch {case.batch}" if case.what == "train" else f"{EPISODES} episodes"
            gb = f"{predicted / GB:.2f} | {measured / GB:.2f} | {predicted / measured - 1:+.0%}"
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
