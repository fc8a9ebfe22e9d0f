"""Testing and training a 7B-shaped PLM on one GPU: time, memory, and the part of the device's peak that is used.

Mistral-7B's shape with random weights, made on the device in bfloat16: speed and memory do not depend on what the weights are.
Prints a short table last; meant to finish in less than 8 minutes on one H100. With `--device cpu --small` the same on a tiny
shape, to see that it runs.

    python tests/bench/gpu.py [--device cuda:0] [--out reports/benchmarks/gpu.md]
    python tests/bench/gpu.py --device cpu --small
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from original_loop import OriginalPolicy, train_windows

from llm_fixtures import stir
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import TOKENS_PER_STEP, NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.preflight import estimate_memory
from netllm_lib.train import TrainConfig, train

GIB = 2**30
PEAKS_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40": 181, "4090": 165, "A10": 125}
"""Dense bfloat16 peak of a device by its maker's data sheet (SXM), found by a part of its name."""
LIMIT_GIB = 20


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the PLM and of the measurements."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rank: int
    traces: int
    batches: tuple[int, ...]  # windows in a training step
    steps: int  # optimizer steps that are timed
    their_windows: int  # that the original's loop trains


FULL = Size(4096, 14336, 32, 32, 8, 128, 100, (2, 4, 8), 6, 6)
SMALL = Size(192, 256, 3, 4, 2, 4, 3, (2,), 2, 2)


def matrix_flop(size: Size, w: int) -> float:
    """Floating-point operations of the matrix products that training on one window needs: forward, and backward through frozen
    weights; LoRA's own three times. What the last layer leaves out is left out, checkpointing's second pass is not counted."""
    h, kv = size.hidden, size.hidden * size.kv_heads // size.heads
    tokens, left_out = w * TOKENS_PER_STEP, w * (TOKENS_PER_STEP - 1)
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * size.intermediate)
    keys_and_values = 2 * 2 * h * kv
    adapters, query_adapter = 2 * size.rank * (2 * h + h + kv), 2 * size.rank * 2 * h
    frozen = tokens * size.layers * layer - left_out * (layer - keys_and_values)
    return 2 * frozen + 3 * (tokens * size.layers * adapters - left_out * query_adapter)


def training_flop(size: Size, w: int) -> float:
    """The same with attention: products of every token with those up to it, and their sum; twice as much backward."""
    tokens = w * TOKENS_PER_STEP
    return matrix_flop(size, w) + 3 * size.layers * 2 * 2 * size.hidden * tokens * (tokens + 1) / 2


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def peak_gib(device: torch.device) -> float:
    """Since it was last asked; not a number on a CPU."""
    if device.type != "cuda":
        return math.nan
    peak = torch.cuda.max_memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def make(size: Size, device: torch.device, folder: Path, attention: str = "fast") -> PolicyNetwork:
    """A PLM of this size with random weights, made where it will lie."""
    from transformers import MistralConfig

    shape = {"hidden_size": size.hidden, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers}
    shape |= {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "vocab_size": 1000}
    MistralConfig(**shape).save_pretrained(folder)  # type: ignore[arg-type]
    asked: dict[str, Any] = {"rank": size.rank, "dtype": "bfloat16", "device": str(device), "attention": attention}
    with device:
        return stir(PolicyNetwork(load_plm(PLMConfig(str(folder), random_weights=True, **asked)), NetworkConfig()))


class Bench:
    """The measurements, and the rows of the table as they come."""

    def __init__(self, size: Size, device: torch.device, folder: Path):
        self.size, self.device, self.folder = size, device, folder
        self.started = time.perf_counter()
        self.rows: list[str] = []
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.traces, self.video = generate_traces("bench", size.traces, seed=1), generate_video("clip", seed=1)
        self.episodes = sound_episodes(self.traces, seed=1)
        self.pool = generate_pool(BBA(), self.traces, self.video, self.episodes.rows(range(min(20, size.traces))))
        self.windows = make_windows(self.pool)

    def say(self, what: str, value: str) -> None:
        self.rows.append(f"| {what} | {value} |")
        print(f"[{time.perf_counter() - self.started:5.0f} s] {what}: {value}", flush=True)

    def simulator(self, count: int) -> Simulator:
        return Simulator(self.traces, self.video, self.episodes.rows(range(count)))

    def test(self, network: PolicyNetwork) -> None:
        """100 traces in lock-step; the original's loop on one of them, times their number."""
        policy = LLMPolicy(network, describe(network, self.windows.settings), EvalConfig())
        rollout(policy, self.simulator(2))
        peak_gib(self.device)
        whole = self.simulator(self.size.traces)
        ours = statistics.median(seconds(self.device, lambda: rollout(policy, whole)) for _ in range(3))
        self.say(
            f"test of {self.size.traces} traces", f"{ours:.2f} s" + f", peak {peak_gib(self.device):.1f} GiB allocated"
        )
        theirs = OriginalPolicy(network, self.windows.scale, clear=True)
        rollout(theirs, self.simulator(1))
        loop = seconds(self.device, lambda: rollout(theirs, self.simulator(1))) * self.size.traces
        self.say("the original's loop, one trace scaled", f"{loop:.0f} s: {loop / ours:.1f} × as long")

    def train(self, network: PolicyNetwork) -> float:
        """Several batches; returns the windows per second of the fastest."""
        peak_tflops = next((value for part, value in PEAKS_TFLOPS.items() if part in self.name), None)
        rates = []
        for batch in self.size.batches:
            order = tuple(i % len(self.windows) for i in range(batch * (self.size.steps + 2)))
            config = TrainConfig(epochs=1, batch=batch, precision="bfloat16", order=(order,))
            ticks: list[float] = []

            def tick(*_: Any, ticks: list[float] = ticks) -> None:
                wait(self.device)
                ticks.append(time.perf_counter())

            peak_gib(self.device)
            folder, settings = self.folder / f"train{batch}", self.windows.settings
            train(network, self.windows, config, folder=folder, settings=settings, progress=tick)
            peak = peak_gib(self.device)
            rates.append((len(ticks) - 2) * batch / (ticks[-1] - ticks[1]))
            tflops = training_flop(self.size, self.windows.config.w) * rates[-1] / 1e12
            share = "" if peak_tflops is None else f" = {tflops / peak_tflops:.0%} of {peak_tflops} TFLOP/s"
            fits = f", peak {peak:.1f} GiB allocated, {'within' if peak <= LIMIT_GIB else 'not within'} {LIMIT_GIB} GiB"
            speed = f"{rates[-1]:.1f} windows/s, {tflops:.2f} TFLOP/s"
            self.say(f"training, batch {batch}", speed + share + fits)
            memory = estimate_memory(network, self.windows.batch(list(order[:batch])), config)
            predicted = f"{memory.train_peak / GIB:.1f} GiB to train, {memory.test_peak / GIB:.1f} GiB to test"
            self.say(f"predicted peak, batch {batch}", predicted)
        return max(rates)

    def train_theirs(self, network: PolicyNetwork, fastest: float) -> None:
        """The original's loop, with its attention, on the same bfloat16 weights."""
        windows = make_windows(self.pool, WindowConfig.upstream())
        train_windows(network, windows, range(1))
        loop = seconds(self.device, lambda: train_windows(network, windows, range(self.size.their_windows)))
        rate = self.size.their_windows / loop
        self.say("the original's loop, training", f"{rate:.1f} windows/s; ours {fastest / rate:.1f} × as fast")


def main(arguments: list[str] | None = None) -> list[str]:
    """The lines of the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--small", action="store_true", help="a tiny shape, to see that it runs")
    options.add_argument("--out", type=Path, help="write the table to this file as well")
    given = options.parse_args(arguments)
    device, size = torch.device(given.device), SMALL if given.small else FULL
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no GPU here for --device {device}; --device cpu --small shows that the script runs")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(size, device, Path(temporary))
        network = make(size, device, bench.folder / "plm")
        parameters = sum(p.numel() for p in network.parameters()) / 1e9
        bench.say("device", f"{bench.name}, PyTorch {torch.__version__}")
        bench.say(
            "PLM", f"{size.layers} × {size.hidden}, {parameters:.2f} G parameters, bfloat16, LoRA rank {size.rank}"
        )
        bench.test(network)
        fastest = bench.train(network)
        del network  # before there is another one
        bench.train_theirs(make(size, device, bench.folder / "plm", attention="eager"), fastest)
    took = time.perf_counter() - bench.started
    table = ["| what | measured |", "|---|---|", *bench.rows, f"| all of this | {took:.0f} s |"]
    print("\n" + "\n".join(table))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(
            "# One GPU, 7B-shaped\n\nCommand: `python tests/bench/gpu.py`\n\n" + "\n".join(table) + "\n"
        )
    return table


if __name__ == "__main__":
    main()
