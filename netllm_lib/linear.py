"""Linear layers whose float32 products go the fastest way that this processor has.

`F.linear` multiplies float32 matrices with MKL; oneDNN, which is in the same PyTorch, is faster on some processors: 1.13 times on
AMD's Zen 4, about twice on Zen 5. A measurement of less than a second decides, once for each processor and version of PyTorch:
its result is kept in the cache folder. The two ways round differently, in the last bits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from netllm_lib import runs

WORTH_IT = 1.05
"""oneDNN has to be faster by this factor, twice the noise of the measurement, so that a machine does not waver."""
PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")


class FastLinear(nn.Linear):
    """`nn.Linear` that multiplies float32 on the CPU with oneDNN, and all else as it always does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = x.dtype != torch.float32 or self.weight.dtype != torch.float32 or x.device.type != "cpu"
        if plain or torch.is_autocast_enabled("cpu"):
            return linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return onednn_linear(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return (
            None if weight is None else onednn_linear(gradient, weight.t()),
            None if x is None else onednn_linear(rows.t(), x.flatten(0, -2).t()),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias, as `torch.nn.functional.linear`; x is [..., inputs], weight [outputs, inputs], both float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def use_fast_linear(module: nn.Module) -> None:
    """Let all linear layers of `module` go the fastest way; nothing changes where `F.linear` is that."""
    if onednn_gain() >= WORTH_IT:
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = FastLinear


def processor() -> dict[str, str]:
    """What tells this processor from others; on Linux with its instruction sets, as "flags"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {"model name": platform.processor()}
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {name: known[name] for name in PROCESSOR if name in known}


def onednn_gain() -> float:
    """How much faster than `F.linear` oneDNN multiplies float32 here; 0 where PyTorch does not have it."""
    return _kept_gain(runs.cache_root() / "onednn_gain.json")


@functools.cache
def _kept_gain(path: Path) -> float:
    machine = runs.content_hash([torch.__version__, processor()])
    try:
        kept = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        kept = {}
    if not isinstance(kept.get(machine), float):
        kept[machine] = _measure()
        with contextlib.suppress(OSError):  # a cache that cannot be written to
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(path, kept)
    return kept[machine]


def _measure() -> float:
    x, weight = torch.ones(800, 576), torch.ones(1536, 576)  # as a test of 100 traces has them
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return statistics.median(
                _seconds(linear, x, weight) / _seconds(onednn_linear, x, weight) for _ in range(20)
            )
    except (RuntimeError, AttributeError):  # a build without oneDNN
        return 0.0
    finally:
        torch.set_num_threads(threads)


def _seconds(way: Callable[..., torch.Tensor], *factors: torch.Tensor) -> float:
    start = time.thread_time()
    way(*factors)
    return time.thread_time() - start
