"""Testing and training a 7B-shaped PLM on one GPU: time, memory, and the part of the device's peak that is used.

Mistral-7B's shape with random weights, made on the device in bfloat16: speed and memory do not depend on what the weights are.
Prints a short table last; meant to finish in less than 8 minutes on one H100. With `--device cpu --small` the same on a tiny
shape, to see that it runs.

    python tests/bench/gpu.py [--device cuda:0]
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from original_loop import OriginalPolicy, train_windows

from llm_fixtures import stir
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.preflight import estimate_memory
from netllm_lib.train import TrainConfig, train

GIB = 2**30
LIMIT_GIB = 20
PEAKS_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40": 181, "4090": 165, "A10": 125}
"""Dense bfloat16 peak of a device by its maker's data sheet (SXM), found by a part of its name."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the PLM and of the measurements."""

    plm: dict[str, int]
    rank: int
    traces: int
    batches: tuple[int, ...]  # windows in a training step
    steps: int  # optimizer steps that are timed, and windows that the original's loop trains


def shape(*sizes: int) -> dict[str, int]:
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    return dict(zip(names.split(), sizes, strict=True))


FULL = Size(shape(4096, 14336, 32, 32, 8, 1000), 128, 100, (2, 4, 8), 6)
SMALL = Size(shape(192, 256, 3, 4, 2, 1000), 4, 3, (2,), 2)


class Bench:
    """The measurements, and the rows of the table as they come."""

    def __init__(self, size: Size, device: torch.device, folder: Path):
        self.size, self.device, self.folder, self.started = size, device, folder, time.perf_counter()
        self.rows: list[str] = []
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        traces, video = generate_traces("bench", size.traces, seed=1), generate_video("clip", seed=1)
        episodes = sound_episodes(traces, seed=1)
        self.simulator = lambda count: Simulator(traces, video, episodes.rows(range(count)))
        self.pool = generate_pool(BBA(), traces, video, episodes.rows(range(min(20, size.traces))))
        self.windows = make_windows(self.pool)

    def say(self, what: str, value: str) -> None:
        self.rows.append(f"| {what} | {value} |")
        print(f"[{time.perf_counter() - self.started:5.0f} s] {what}: {value}", flush=True)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def peak_gib(self) -> float:
        """Since it was last asked; not a number on a CPU."""
        if self.device.type != "cuda":
            return math.nan
        peak = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def make(self, attention: str = "fast") -> PolicyNetwork:
        """A PLM of this size with random weights, made where it will lie."""
        MistralConfig(**self.size.plm).save_pretrained(self.folder)  # type: ignore[arg-type]
        asked: dict[str, Any] = {"rank": self.size.rank, "dtype": "bfloat16", "attention": attention}
        asked |= {"device": str(self.device), "random_weights": True}
        with self.device:
            return stir(PolicyNetwork(load_plm(PLMConfig(str(self.folder), **asked))))

    def test(self, network: PolicyNetwork) -> None:
        """All traces in lock-step; the original's loop on one of them, times their number."""

        def play(policy: Policy, count: int) -> float:
            return self.seconds(lambda: rollout(policy, self.simulator(count)))

        policy, traces = LLMPolicy(network, describe(network, self.windows.settings)), self.size.traces
        play(policy, 2)
        self.peak_gib()
        ours = statistics.median(play(policy, traces) for _ in range(3))
        self.say(f"test of {traces} traces", f"{ours:.2f} s, peak {self.peak_gib():.1f} GiB allocated")
        theirs = OriginalPolicy(network, self.windows.scale, clear=True)
        loop = min(play(theirs, 1) for _ in range(2)) * traces
        self.say("the original's loop, one trace scaled", f"{loop:.0f} s: {loop / ours:.1f} × as long")

    def train(self, network: PolicyNetwork) -> float:
        """Several batches; returns the windows per second of the fastest."""
        peak_tflops, rates = next((value for part, value in PEAKS_TFLOPS.items() if part in self.name), None), []
        for batch in self.size.batches:
            order = tuple(i % len(self.windows) for i in range(batch * (self.size.steps + 2)))
            config = TrainConfig(epochs=1, batch=batch, precision="bfloat16", order=order)
            ticks: list[float] = []
            tick = lambda *_, ticks=ticks: ticks.append(self.clock())  # noqa: E731
            self.peak_gib()
            folder, settings = self.folder / f"train{batch}", self.windows.settings
            train(network, self.windows, config, folder=folder, settings=settings, progress=tick)
            peak, some = self.peak_gib(), self.windows.batch(list(order[:batch]))
            rates.append((len(ticks) - 2) * batch / (ticks[-1] - ticks[1]))
            with FlopCounterMode(display=False) as counter:
                network.loss(some.to(self.device), torch.bfloat16)[0].backward()
            tflops = counter.get_total_flops() / batch * rates[-1] / 1e12
            share = "" if peak_tflops is None else f" = {tflops / peak_tflops:.0%} of {peak_tflops} TFLOP/s"
            fits = f"peak {peak:.1f} GiB allocated, {'within' if peak <= LIMIT_GIB else 'not within'} {LIMIT_GIB} GiB"
            self.say(f"training, batch {batch}", f"{rates[-1]:.1f} windows/s, {tflops:.2f} TFLOP/s{share}, {fits}")
            memory = estimate_memory(network, some, config)
            predicted = f"{memory.train_peak / GIB:.1f} GiB to train, {memory.test_peak / GIB:.1f} GiB to test"
            self.say(f"predicted peak, batch {batch}", predicted)
        return max(rates)

    def train_theirs(self, network: PolicyNetwork, fastest: float) -> None:
        """The original's loop, with its attention, on the same bfloat16 weights."""
        windows, count = make_windows(self.pool, WindowConfig.upstream()), self.size.steps
        train_windows(network, windows, range(1))
        rate = count / self.seconds(lambda: train_windows(network, windows, range(count)))
        self.say("the original's loop, training", f"{rate:.1f} windows/s; ours {fastest / rate:.1f} × as fast")


def main(arguments: list[str] | None = None) -> list[str]:
    """The lines of the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--small", action="store_true", help="a tiny shape, to see that it runs")
    given = options.parse_args(arguments)
    device, size = torch.device(given.device), SMALL if given.small else FULL
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no GPU here for --device {device}; --device cpu --small shows that the script runs")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(size, device, Path(temporary))
        network = bench.make()
        parameters = sum(p.numel() for p in network.parameters()) / 1e9
        bench.say("device", f"{bench.name}, PyTorch {torch.__version__}")
        bench.say("PLM", f"{size.plm}, {parameters:.2f} G parameters, bfloat16, LoRA rank {size.rank}")
        bench.test(network)
        fastest = bench.train(network)
        del network  # before there is another one
        bench.train_theirs(bench.make(attention="eager"), fastest)
    table = [
        "| what | measured |",
        "|---|---|",
        *bench.rows,
        f"| all of this | {time.perf_counter() - bench.started:.0f} s |",
    ]
    print("\n" + "\n".join(table))
    return table


if __name__ == "__main__":
    main()
