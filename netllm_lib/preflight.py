"""What a training will do, known before it starts: optimizer steps, learning rates, memory and time.

Memory is found without loading anything: the network is built without numbers, one training step and one validation are traced on
it (PyTorch's fake tensors), and every tensor that comes and goes is counted. So the estimate holds for any network and any family,
and sees what is really kept for the backward pass. Layers are alike: short PLMs are traced and the line through them is followed.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from netllm_lib.placement import devices_of
from netllm_lib.plm import PLMConfig, arithmetic_dtype, sketch_plm
from netllm_lib.schedule import Plan, TrainConfig
from netllm_lib.task import Data, Network

FULL = 0.95  # part of a device's memory that an estimate may fill
LIBRARIES_BYTES = {"cpu": (0.565e9, 0.665e9), "cuda": (0.6e9, 0.6e9)}
"""Of training and of a test: Python with its libraries in main memory (measured); CUDA's context on a GPU (not measured)."""
HEAP_TENSORS = (4.3, 2.4)
"""What glibc's heap keeps of a training step beside the tensors that are alive, without and with gradient checkpointing: so
many tensors of the step's largest kind for each layer. Blocks that are freed are cut by small ones, and do not fit the next
tensor of their size. Measured over seven cases, see reports/benchmarks/memory.md."""
HEAP_LIMIT_BYTES = 32 * 2**20  # larger tensors never come from the heap
FOUR_BIT_BYTES = 0.516  # of a weight in NF4 with double quantisation: 4 bits, and 8 + 32/256 bits for every 64 weights
TRACED_LAYERS = (2, 3)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes, as estimated. The peaks include everything above them and the libraries."""

    weights: float  # of the whole network
    gradients: float
    optimizer: float  # AdamW's two moments
    activations: float  # what else a training step holds at its peak
    train_peak: float
    test_peak: float  # of a test after training: no gradients, no optimizer
    checkpointing: bool  # is gradient checkpointing on

    @property
    def validate_peak(self) -> float:
        """Of a test while training, beside gradients and optimizer."""
        return self.test_peak + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The larger one of training and of the tests meanwhile."""
        return max(self.train_peak, self.validate_peak)


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What a training will do. `print` it."""

    plan: Plan
    labels: int  # predictions in an epoch
    crossing: int  # samples that hold parts of two episodes
    trainable: int  # parameters
    frozen: int
    memory: Memory
    device_bytes: float | None  # memory of the device, if known
    seconds: float | None  # expected, without validation; None if not measured
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        plan, config, memory = self.plan, self.plan.config, self.memory
        device = "" if self.device_bytes is None else f" of {self.device_bytes / 1e9:.1f} GB"
        how = " with gradient checkpointing" if memory.checkpointing else ""
        lr, around = config.lr * plan.peak, config.lr_around * plan.peak
        rows = {
            "samples": f"{plan.samples} ({self.labels} predictions, {self.crossing} samples cross episodes)",
            "optimizer steps": f"{plan.steps} ({plan.micro_batches} micro-batches)",
            "warm-up": f"{plan.warmup} steps = {plan.warmup / max(plan.steps, 1):.0%} of them",
            "learning rate": f"peak {lr:.2g} of {config.lr:.2g} for the PLM, {around:.2g} around it",
            "parameters": f"{self.trainable / 1e6:.2f} M trained, {self.frozen / 1e6:.2f} M frozen",
            "memory": f"about {memory.train_peak / 1e9:.1f} GB to train{how}, {memory.validate_peak / 1e9:.1f} GB to test "
            f"meanwhile{device}",
            "time": "not measured" if self.seconds is None else f"about {self.seconds / 60:.1f} min without validation",
        }
        rows |= {f"warning {i}": text for i, text in enumerate(self.warnings, 1)}
        return "\n".join(f"{what:16} {value}" for what, value in rows.items())


def preflight(network: Network, data: Data, config: TrainConfig | None = None, measure: bool = True) -> Preflight:
    """Plan a training. With `measure` one micro-batch is timed, forward and backward; nothing is changed by it.

    Before anything is loaded, a network around `sketch_plm(...)` will do; it cannot be timed.
    """
    config = config or TrainConfig()
    plan, crossing = Plan(config, len(data)), int(data.facts.get("crossing") or 0)
    trainable = sum(p.numel() for p in network.trainable().values())
    memory, device_bytes = fitting_memory(network, data, config)
    timed = measure and network.device.type != "meta"
    too_much = device_bytes is not None and memory.peak > FULL * device_bytes
    late = f"the warm-up of {plan.warmup} steps is longer than the run of {plan.steps}"
    warnings = [
        (plan.peak < 0.9, f"{late}: the learning rate never passes {plan.peak:.0%} of its value"),
        (plan.steps < 100, f"{plan.steps} optimizer steps: the loss usually rests on a plateau for the first 40 to 60"),
        (crossing > 0, f"{crossing / len(data):.0%} of the samples span two episodes"),
        (plan.short_steps > 0 and config.last_group == "upstream",
         f"{plan.short_steps} steps are incomplete and count for less than the others"),
        (too_much, f"the memory estimate exceeds the {(device_bytes or 0) / 1e9:.0f} GB of the device: "
                   "a smaller batch, bfloat16 or 4-bit weights, or more devices"),
    ]  # fmt: skip
    return Preflight(
        plan,
        labels=data.labels(np.arange(len(data))),
        crossing=crossing,
        trainable=trainable,
        frozen=sum(p.numel() for p in network.parameters()) - trainable,
        memory=memory,
        device_bytes=device_bytes,
        seconds=_seconds_per_micro_batch(network, data, config) * plan.micro_batches if timed else None,
        warnings=tuple(text for applies, text in warnings if applies),
    )


def _seconds_per_micro_batch(network: Network, data: Data, config: TrainConfig) -> float:
    batch = _first_batch(data, config).to(network.device)
    parameters = list(network.trainable().values())
    training, best = network.training, math.inf
    network.train()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for _ in range(3):  # the first one also warms up
            start = time.perf_counter()
            loss = network.loss(batch, arithmetic_dtype(config.precision, network.device))[0]
            torch.autograd.grad(loss, parameters, allow_unused=True)
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    network.train(training)
    return best


def _first_batch(data: Data, config: TrainConfig) -> Any:
    return data.batch(np.arange(config.batch) % len(data))


# --- memory -------------------------------------------------------------------------------------------------------------


def fitting_memory(network: Network, data: Data, config: TrainConfig) -> tuple[Memory, float | None]:
    """Memory that training takes, with gradient checkpointing if that is on, or "auto" and needed, and that of the devices
    (None: unknown)."""
    device_bytes, asked = _device_bytes(network.plm.config.device), network.plm.config.gradient_checkpointing
    batch = _first_batch(data, config)
    memory = estimate_memory(network, batch, config, checkpointing=asked is True)
    if asked == "auto" and device_bytes is not None and memory.train_peak > FULL * device_bytes:
        memory = estimate_memory(network, batch, config, checkpointing=True)
    return memory, device_bytes


def needs_checkpointing(network: Network, data: Data, config: TrainConfig) -> bool:
    """Must gradient checkpointing be on, by what the PLM's config says and, if that is "auto", by the memory of its devices."""
    plm, device_bytes = network.plm, _device_bytes(network.plm.config.device)
    if plm.config.gradient_checkpointing != "auto" or device_bytes is None:
        return plm.config.gradient_checkpointing is True
    # most PLMs here are small and most machines are not: a generous bound, several times what is kept, spares the tracing
    tokens = sum(t.numel() for t in tree_leaves(_first_batch(data, config)) if isinstance(t, torch.Tensor))  # or fewer
    bound = 1e9 + 16 * sum(p.numel() for p in network.parameters()) + 100.0 * tokens * plm.layers * plm.hidden_size
    return bound > 0.5 * device_bytes and fitting_memory(network, data, config)[0].checkpointing


def _device_bytes(device: str) -> float | None:
    """Memory of all devices that a PLM is on. All of it, not what is free now: what follows from it must not depend on the hour."""
    devices = [torch.device(name) for name in devices_of(device)]
    if all(d.type == "cuda" for d in devices) and torch.cuda.is_available():
        return float(sum(torch.cuda.get_device_properties(d).total_memory for d in devices))
    if all(d.type == "cpu" for d in devices) and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def estimate_memory(network: Network, batch: Any, config: TrainConfig, checkpointing: bool = False) -> Memory:
    """Memory for training `network`, or one without numbers like it, on batches like `batch`, on its PLM's devices together.

    Takes seconds, whatever the PLM's size.
    """
    plm, layers = network.plm.config, network.plm.layers
    device = torch.device(devices_of(plm.device)[0])
    alone: dict[str, Any] = {"device": "cpu", "placement": None, "early_stop": "all"}
    shape = dataclasses.replace(plm, gradient_checkpointing=checkpointing, **alone)
    few, more = TRACED_LAYERS if layers > max(TRACED_LAYERS) else (layers, layers)
    first, last = (_trace(network, dataclasses.replace(shape, layers=n), batch, config, device) for n in (few, more))
    steps = (layers - few) / max(more - few, 1)
    sizes = {name: first[name] + (last[name] - first[name]) * steps for name in first}
    # of each phase apart: with the layers that are traced another one may be the largest than with all
    step = max(sizes[name] for name in ("forward", "backward", "update"))
    fixed = {name: sizes[name] for name in ("weights", "gradients", "optimizer")}
    base, base_test = LIBRARIES_BYTES.get(device.type, LIBRARIES_BYTES["cpu"])
    heap = HEAP_TENSORS[checkpointing] * layers * last["largest"] if device.type == "cpu" else 0.0
    peaks = {"train_peak": base + step + heap, "test_peak": base_test + sizes["test"]}
    return Memory(**fixed, **peaks, activations=step - sum(fixed.values()), checkpointing=checkpointing)


def _trace(like: Network, plm: PLMConfig, batch: Any, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Bytes of a network, and the peaks of the phases of a step and of a validation, all but the libraries."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        network = type(like)(sketch_plm(plm), like.config)
    network.plm.set_checkpointing(bool(plm.gradient_checkpointing))
    dtype, meter, found = arithmetic_dtype(config.precision, device), _Meter(), {}
    with FakeTensorMode():
        network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))  # `to_empty` without reading the sketch's tensors
        batch = tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), batch)
        parameters = list(network.trainable().values())
        with meter:
            for tensor in [*network.parameters(), *network.buffers()]:
                meter.note(tensor)
            found["weights"] = meter.now
            optimizer = torch.optim.AdamW(parameters, lr=1.0, foreach=device.type == "cuda")
            network.train()
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()  # from the second step on there are the optimizer's moments beside the activations
            optimizer.zero_grad(set_to_none=True)
            meter.take_peak()
            meter.largest = 0.0
            loss = network.loss(batch, dtype)[0]
            found["forward"] = meter.take_peak()
            loss.backward()
            del loss
            found["backward"] = meter.take_peak()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=False)
            optimizer.step()
            found["update"], largest = meter.take_peak(), meter.largest
            moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            gc.collect()
            network.eval()
            meter.take_peak()
            network.rehearse(batch, dtype)
            found["test"] = meter.peak
    if plm.dtype == "4bit":  # saves on the PLM's matrices, LoRA's own excepted
        named = network.plm.base.named_modules()
        matrices = [m.weight.numel() for name, m in named if isinstance(m, nn.Linear) and "lora_" not in name]
        found = {name: size - sum(matrices) * (2 - FOUR_BIT_BYTES) for name, size in found.items()}
    return {**found, "gradients": sum(p.nbytes for p in parameters), "optimizer": moments, "largest": largest}


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, and of those that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0.0
        self.largest = 0.0  # of those that come from the heap
        self.alive: dict[int, int] = {}

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = size = storage.nbytes()
            self.now += size
            self.largest = max(self.largest, size if size < HEAP_LIMIT_BYTES else 0.0)
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def take_peak(self) -> float:
        """The peak since the last time."""
        peak, self.peak = self.peak, self.now
        return peak

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return result
