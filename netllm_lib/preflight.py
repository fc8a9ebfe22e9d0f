"""What a training run will do, known before it starts: windows, optimizer steps, learning rates, memory and time."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from netllm_lib.abr.batches import Windows
from netllm_lib.abr.model import PolicyNetwork, action_loss
from netllm_lib.memory import Memory, estimate_memory
from netllm_lib.placement import devices_of
from netllm_lib.plm import arithmetic_dtype

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool
    from netllm_lib.train import TrainConfig

FULL = 0.95
"""Part of a device's memory that an estimate may fill."""


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What a training run will do, known before it starts. `print` it."""

    windows: int
    labels: int  # actions to predict in an epoch
    crossing: int  # windows that hold parts of two episodes
    micro_batches: int  # in all epochs
    steps: int  # optimizer steps in all epochs
    short_steps: int  # optimizer steps with fewer micro-batches than `accumulation`
    warmup_steps: int
    lr: float  # asked for
    lr_peak: float  # really reached
    lr_around_peak: float
    trainable: int  # parameters
    frozen: int
    memory: Memory  # estimated
    device_bytes: float | None  # memory of the device, if known
    seconds: float | None  # expected, without validation; None if not measured
    warnings: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """Two columns, for a notebook."""
        device = "" if self.device_bytes is None else f" of {self.device_bytes / 1e9:.1f} GB"
        rows = {
            "windows": f"{self.windows} ({self.labels} actions to predict, {self.crossing} windows cross episodes)",
            "optimizer steps": f"{self.steps} ({self.micro_batches} micro-batches)",
            "warm-up": f"{self.warmup_steps} steps = {self.warmup_steps / max(self.steps, 1):.0%} of them",
            "learning rate": f"peak {self.lr_peak:.2g} of {self.lr:.2g} for the PLM, {self.lr_around_peak:.2g} around it",
            "parameters": f"{self.trainable / 1e6:.2f} M trained, {self.frozen / 1e6:.2f} M frozen",
            "memory": self._memory_text() + device,
            "time": "not measured" if self.seconds is None else f"about {_duration(self.seconds)} without validation",
        }
        rows |= {f"warning {i}": text for i, text in enumerate(self.warnings, 1)}
        return pd.DataFrame({"what": rows.keys(), "value": rows.values()})

    @property
    def memory_bytes(self) -> float:
        """Peak of training and of the tests in between."""
        return self.memory.peak

    def _memory_text(self) -> str:
        training, testing = self.memory.train_peak / 1e9, self.memory.validate_peak / 1e9
        how = " with gradient checkpointing" if self.memory.checkpointing else ""
        return f"about {training:.1f} GB to train{how}, {testing:.1f} GB to play 100 traces meanwhile"

    def __str__(self) -> str:
        return "\n".join(f"{what:16} {value}" for what, value in self.table().itertuples(index=False))


def preflight(config: TrainConfig, pool: ExperiencePool, network: PolicyNetwork, measure: bool = True) -> Preflight:
    """Plan a training run. With `measure` one micro-batch is timed, forward and backward; nothing is changed by it.

    Before anything is loaded, `PolicyNetwork(sketch_plm(...))` does for a network; it cannot be timed.
    """
    windows = config.cut(pool)
    plan = Plan(config, len(windows))
    rates = [plan.rate(step) for step in range(plan.steps)]
    trainable = sum(p.numel() for p in network.trainable().values())
    total = sum(p.numel() for p in network.parameters())
    crossing = int(windows.crossing.sum())
    memory, device_bytes = fitting_memory(network, config)
    measure = measure and network.device.type != "meta"
    peak = max(rates, default=0.0)
    warnings = []
    if peak < 0.9:
        warnings.append(
            f"the warm-up of {plan.warmup} steps is longer than the run of {plan.steps}: "
            f"the learning rate never passes {peak:.0%} of its value"
        )
    if plan.steps < 100:
        warnings.append(f"{plan.steps} optimizer steps: the loss usually rests on a plateau for the first 40 to 60")
    if crossing:
        warnings.append(f"{crossing / len(windows):.0%} of the windows span two episodes")
    if plan.short_steps and config.last_group == "upstream":
        warnings.append(f"{plan.short_steps} steps are incomplete and count for less than the others")
    if device_bytes is not None and memory.peak > FULL * device_bytes:
        warnings.append(
            f"the memory estimate exceeds the {device_bytes / 1e9:.1f} GB of the device: fewer windows a batch, fewer "
            f"traces at once, "
            "bfloat16 or 4-bit weights, or more devices"
        )
    return Preflight(
        windows=len(windows),
        labels=windows.labels,
        crossing=crossing,
        micro_batches=plan.micro_batches,
        steps=plan.steps,
        short_steps=plan.short_steps,
        warmup_steps=plan.warmup,
        lr=config.lr,
        lr_peak=config.lr * peak,
        lr_around_peak=config.lr_around * peak,
        trainable=trainable,
        frozen=total - trainable,
        memory=memory,
        device_bytes=device_bytes,
        seconds=_seconds_per_micro_batch(network, windows, config) * plan.micro_batches if measure else None,
        warnings=tuple(warnings),
    )


class Plan:
    """Steps and learning rates of a run, from the configuration and the number of windows alone."""

    def __init__(self, config: TrainConfig, windows: int):
        self.config = config
        self.windows = windows
        sizes = [windows] * config.epochs
        if config.order is not None:
            sizes = [len(self.order_of(epoch)) for epoch in range(config.epochs)]
        micro = [-(-size // config.batch) for size in sizes]
        self.steps_of = [-(-m // config.accumulation) for m in micro]
        self.micro_batches = sum(micro)
        self.steps = sum(self.steps_of)
        self.short_steps = sum(m % config.accumulation > 0 for m in micro)
        part = max(1, round(config.warmup * self.steps))
        self.warmup = config.warmup_steps if config.warmup_steps is not None else part

    def rate(self, step: int) -> float:
        """Part of the configured learning rate that optimizer step `step` (from 0) uses."""
        if step + 1 < self.warmup or self.config.schedule == "constant":
            return min((step + 1) / max(self.warmup, 1), 1.0)
        done = (step + 1 - self.warmup) / max(self.steps - self.warmup, 1)
        return self.config.lr_end + (1 - self.config.lr_end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def order_of(self, epoch: int) -> np.ndarray:
        """Window numbers int64 in the order in which `epoch` takes them. With shuffle="torch" it draws from PyTorch's generator."""
        config = self.config
        if config.order is not None:
            order = np.asarray(config.order[epoch if len(config.order) > 1 else 0], dtype=np.int64)
            if len(order) == 0 or order.min() < 0 or order.max() >= self.windows:
                raise ValueError(f"order: epoch {epoch} needs window numbers from 0 to {self.windows - 1}")
            return order
        if config.shuffle == "torch":
            loader: Any = torch.utils.data.DataLoader(torch.arange(self.windows), batch_size=1, shuffle=True)  # type: ignore[arg-type]
            return np.array([int(number) for number in loader], dtype=np.int64)
        return np.random.default_rng([config.seed, epoch]).permutation(self.windows)


def _seconds_per_micro_batch(network: PolicyNetwork, windows: Windows, config: TrainConfig) -> float:
    batch = windows.batch(np.arange(config.batch) % len(windows)).to(network.device)
    kept = {name: p.grad for name, p in network.trainable().items()}
    training, best = network.training, math.inf
    network.train()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for _ in range(3):  # the first one also warms up
            start = time.perf_counter()
            action_loss(network, batch, arithmetic_dtype(config.precision, network.device)).backward()
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    network.train(training)
    for name, parameter in network.trainable().items():
        parameter.grad = kept[name]
    return best


def fitting_memory(network: PolicyNetwork, config: TrainConfig) -> tuple[Memory, float | None]:
    """Memory that training takes, with gradient checkpointing if it is on, or "auto" and needed, and the devices' "
    "(None: unknown)."""
    plm = network.plm.config
    device_bytes = _device_bytes(plm.device)
    memory = estimate_memory(plm, config, network.config)
    too_much = device_bytes is not None and memory.train_peak > FULL * device_bytes
    if too_much and plm.gradient_checkpointing == "auto":
        memory = estimate_memory(plm, config, network.config, checkpointing=True)
    return memory, device_bytes


def needs_checkpointing(network: PolicyNetwork, config: TrainConfig) -> bool:
    """Must gradient checkpointing be on, by what the PLM's config says and, if that is "auto", by the memory of its devices."""
    plm = network.plm
    if plm.config.gradient_checkpointing != "auto":
        return plm.config.gradient_checkpointing
    device_bytes = _device_bytes(plm.config.device)
    # most PLMs here are small and most machines are not: a generous bound, several times what is kept, spares the seconds of
    # tracing
    tokens = config.batch * config.w * network.tokens_per_step
    bound = 1e9 + 16 * sum(p.numel() for p in network.parameters()) + 300.0 * tokens * plm.layers * plm.hidden_size
    if device_bytes is None or bound < 0.5 * device_bytes:
        return False
    return fitting_memory(network, config)[0].checkpointing


def _device_bytes(device: str) -> float | None:
    """Memory of all devices that a PLM is on. All of it, not what is free now: what follows from it must not depend on the hour."""
    devices = [torch.device(name) for name in devices_of(device)]
    if all(d.type == "cuda" for d in devices) and torch.cuda.is_available():
        return float(sum(torch.cuda.get_device_properties(d).total_memory for d in devices))
    if all(d.type == "cpu" for d in devices) and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
