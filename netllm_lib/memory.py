"""How much memory training and testing will take, from the configuration alone: nothing is loaded, nothing is computed.

The network is built without numbers and one training step and one decision are traced on it (PyTorch's fake tensors); every tensor
that comes and goes is counted. So the estimate holds for any family, and sees what is really kept for the backward pass. Layers
are alike: short PLMs are traced and the line through them is followed.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netllm_lib.abr.batches import Batch
from netllm_lib.abr.model import FEATURES, HISTORY, NetworkConfig, PolicyNetwork, action_loss
from netllm_lib.placement import devices_of
from netllm_lib.plm import PLMConfig, arithmetic_dtype, sketch_plm

if TYPE_CHECKING:
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.train import TrainConfig

LIBRARIES_BYTES = {"cpu": (0.565e9, 0.665e9), "cuda": (0.6e9, 0.6e9)}
"""Of training and of a test: Python with its libraries in main memory (measured); CUDA's context on a GPU (not measured)."""
HEAP_TENSORS = (4.3, 2.4)
"""What glibc's heap keeps of a training step beside the tensors that are alive, without and with gradient checkpointing: so
many tensors of the step's largest kind for each layer. Blocks that are freed are cut by small ones, and do not fit the next
tensor of their size.
Measured over seven cases, see reports/benchmarks/memory.md; the tensors themselves are exact, as a run with
MALLOC_MMAP_THRESHOLD_=65536 shows, which keeps nothing and is slower."""
HEAP_LIMIT_BYTES = 32 * 2**20
"""Larger tensors never come from the heap."""
FOUR_BIT_BYTES = 0.516
"""Of a weight in NF4 with double quantisation: 4 bits, and 8 + 32/256 bits for every 64 weights."""
TRACED_LAYERS = (2, 3)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes, as estimated. The two peaks include everything above them and the libraries."""

    weights: float  # of the whole network
    gradients: float
    optimizer: float  # AdamW's two moments
    activations: float  # what else a training step holds at its peak
    allocator: float  # freed, but kept by the C library during training on a CPU
    cache: float  # keys and values of all episodes of a test
    train_peak: float
    test_peak: float  # of a test after training: no gradients, no optimizer
    checkpointing: bool  # is gradient checkpointing on

    @property
    def validate_peak(self) -> float:
        """Of a test while training, beside gradients and optimizer."""
        return self.test_peak + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return max(self.train_peak, self.validate_peak)


def estimate_memory(
    plm: PLMConfig,
    train: TrainConfig | None = None,
    network: NetworkConfig | None = None,
    test: EvalConfig | None = None,
    *,
    episodes: int = 100,
    checkpointing: bool = False,
) -> Memory:
    """Memory for training with `train` and for testing `episodes` in lock-step with `test`, on the devices of `plm` together.

    Takes seconds, whatever the PLM's size. `checkpointing` adds to what `plm` asks for. Raises what `load_plm` raises for a
    configuration that does not fit.
    """
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.train import TrainConfig

    train, network, test = train or TrainConfig(), network or NetworkConfig(), test or EvalConfig()
    checkpointing = checkpointing or plm.gradient_checkpointing is True
    settings = {"device": "cpu", "placement": None, "gradient_checkpointing": checkpointing}
    whole = sketch_plm(dataclasses.replace(plm, **settings))  # type: ignore[arg-type]
    traced = [n for n in TRACED_LAYERS if n < whole.layers] if whole.layers > max(TRACED_LAYERS) else [whole.layers]
    device = torch.device(devices_of(plm.device)[0])
    points = []
    for layers in traced:
        shape = {**settings, "layers": layers, "early_stop": "all"}
        points.append(_trace(dataclasses.replace(plm, **shape), train, network, test, episodes, device))  # type: ignore[arg-type]
    first, last = points[0], points[-1]
    steps = (whole.layers - traced[0]) / max(traced[-1] - traced[0], 1)
    sizes = {name: first[name] + (last[name] - first[name]) * steps for name in first}
    # of each phase apart: with the layers that are traced another one may be the largest than with all
    step = max(size for name, size in sizes.items() if name.startswith("train "))
    decision = max(size for name, size in sizes.items() if name.startswith("test "))
    base, base_test = LIBRARIES_BYTES.get(device.type, LIBRARIES_BYTES["cpu"])
    allocator = HEAP_TENSORS[checkpointing] * whole.layers * last["largest"] if device.type == "cpu" else 0.0
    return Memory(
        weights=sizes["weights"],
        gradients=sizes["gradients"],
        optimizer=sizes["optimizer"],
        activations=step - sizes["weights"] - sizes["gradients"] - sizes["optimizer"],
        allocator=allocator,
        cache=sizes["cache"],
        train_peak=base + step + allocator,
        test_peak=base_test + decision,
        checkpointing=checkpointing,
    )


def _trace(
    plm: PLMConfig, train: TrainConfig, sizes: NetworkConfig, test: EvalConfig, episodes: int, device: torch.device
) -> dict[str, float]:
    """Bytes of a network and the peaks of a step and of a decision, all but the libraries."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        network = PolicyNetwork(sketch_plm(plm), sizes)
    if plm.gradient_checkpointing is True:
        network.plm.set_checkpointing(True)
    packed = _packed_bytes(network) if plm.dtype == "4bit" else 0.0
    dtype = arithmetic_dtype(train.precision, device)
    with FakeTensorMode():
        _fill(network)
        parameters = list(network.trainable().values())
        with _Meter() as meter:
            meter.count(network)
            weights = meter.now
            optimizer = torch.optim.AdamW(parameters, lr=1.0, foreach=device.type == "cuda")
            network.train()
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()  # from the second step on there are the optimizer's moments beside the activations
            optimizer.zero_grad(set_to_none=True)
            meter.take_peak()
            meter.largest = 0.0
            loss = action_loss(network, _batch(train), dtype)
            forward = meter.take_peak()
            loss.backward()
            del loss
            backward = meter.take_peak()
            nn.utils.clip_grad_norm_(parameters, train.max_grad_norm, foreach=False)
            optimizer.step()
            update, largest = meter.take_peak(), meter.largest
            gradients = float(sum(p.numel() * p.element_size() for p in parameters))
            optimizer.zero_grad(set_to_none=True)
            moments = float(sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim))
            optimizer.state.clear()
            gc.collect()
            network.eval()
            meter.take_peak()
            cache, merging = _decide(network, train, test, episodes, device, meter)
            decision = meter.peak
    return {
        "weights": weights - packed,
        "gradients": gradients,
        "optimizer": moments,
        "train forward": forward - packed,
        "train backward": backward - packed,
        "train update": update - packed,
        "test merging": merging - packed,
        "test decision": decision - packed,
        "cache": cache,
        "largest": largest,
    }


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, and of those that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.peak = 0.0
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

    def count(self, module: nn.Module) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            self.note(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return result


def _fill(network: nn.Module) -> None:
    """Replace the sketch's tensors by fake ones on the CPU, shared ones by shared ones. Within a FakeTensorMode."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in known:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    known[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = known[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _batch(train: TrainConfig) -> Batch:
    shape = (train.batch, train.w)
    return Batch(
        torch.zeros(*shape, FEATURES, HISTORY),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.long),
        None,
    )


@torch.no_grad()
def _decide(
    network: PolicyNetwork, train: TrainConfig, test: EvalConfig, episodes: int, device: torch.device, meter: _Meter
) -> tuple[float, float]:
    """Trace the last decision of `episodes` in lock-step; returns the bytes of its cache and the peak of preparing its weights."""
    plm, dtype = network.plm, arithmetic_dtype(test.precision, device)
    merge = test.merge_lora and not test.dropout and plm.config.dtype != "4bit"
    weights = plm.inference_weights(dtype, merge) if dtype is not None or merge else None
    merging = meter.take_peak()
    steps, w = network.config.max_timestep + 1, test.w or train.w
    rows, seen = (1, w + 1) if test.context == "leak" else (episodes, 2)
    cached = test.context_window == "cached" and plm.causal
    if not cached:
        seen = w + 1
    with plm.using(weights):
        cache = None
        if cached:
            cache = plm.new_cache((steps + 1) * network.tokens_per_step, network.context_tokens(w + 1))
            cache.skip(network.context_tokens(steps - 1))
        shape = (rows, seen)
        numbers = torch.zeros(shape, dtype=torch.long)
        tokens = network.embed(torch.zeros(*shape, FEATURES, HISTORY), numbers, torch.zeros(shape), numbers)
        tokens = tokens[:, : network.context_tokens(seen)]
        network.decide(tokens[:, -network.tokens_per_step :] if cached else tokens, cache)
    return float(cache.nbytes) if cache is not None else 0.0, merging


def _packed_bytes(network: PolicyNetwork) -> float:
    """What 4 bits save of the PLM's matrices, LoRA's own excepted."""
    named = network.plm.base.named_modules()
    matrices = [m for name, m in named if isinstance(m, nn.Linear) and "lora_" not in name]
    numbers = sum(m.weight.numel() for m in matrices)
    return numbers * (2 - FOUR_BIT_BYTES)
