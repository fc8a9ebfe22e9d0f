"""How a network is trained, and what follows from it before it starts: optimizer steps, learning rates, order of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. The defaults are sound and learn within minutes on a CPU."""

    # --- steps
    epochs: int = 4
    batch: int = 8  # samples in a micro-batch
    accumulation: int = 1  # micro-batches in an optimizer step
    last_group: Literal["mean", "upstream"] = "mean"
    """"mean": the loss of a step is the mean over its labels. "upstream": the sum over its micro-batches' means divided by
    `accumulation`, also when an epoch's last step has fewer, which then counts less."""
    shuffle: Literal["seed", "torch"] = "seed"
    """"seed": an epoch's order depends on `seed` and the epoch only. "torch": `DataLoader(shuffle=True)` on PyTorch's global
    generator, as in the original, where every evaluation reseeds it and so repeats an order."""
    order: tuple[int, ...] | None = None  # explicit sample numbers in place of a shuffle, the same in every epoch
    seed: int = 1

    # --- optimizer
    lr: float = 1e-3  # LoRA, or the whole PLM for rank -1
    lr_around: float = 1e-2  # the modules around the PLM
    weight_decay: float = 1e-4
    warmup: float = 0.1  # part of the optimizer steps really taken, over which the rate rises to its peak
    warmup_steps: int | None = None  # the same as a fixed number of steps; with it the peak may never be reached
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    lr_end: float = 0.05  # of a cosine, as a part of the peak
    clip: Literal["step", "micro", "none"] = "step"
    """"step": the gradient is clipped once, before an optimizer step. "micro": the accumulated gradient is clipped after every
    micro-batch, as in the original: the last samples of a step then count far more than the first."""
    max_grad_norm: float = 0.25
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the PLM's arithmetic; "auto" is bfloat16 (autocast) where the device is faster with it. Weights stay as loaded."""

    # --- along the way
    checkpoint_steps: int | None = None  # optimizer steps between two resume points; there is one at every epoch's end
    validate_epochs: int = 1  # epochs between two calls of `validate`
    validate_when: Literal["end", "upstream"] = "end"
    """"end": after every `validate_epochs` epochs and after the last. "upstream": after epochs 0, k, 2k, … counted from 0, as the
    original does: after the very first, and after the last only if its number happens to be a multiple of k."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.accumulation, self.validate_epochs) < 1:
            raise ValueError("epochs, batch, accumulation and validate_epochs must be at least 1")

    @classmethod
    def upstream(cls, **changes: Any) -> TrainConfig:
        """The original's training with its default hyperparameters (and its documented accumulation of 32).

        Source: NetLLM, `plm_special/trainer.py` and `run_plm.py`.
        """
        original: dict[str, Any] = {"epochs": 80, "batch": 1, "accumulation": 32, "last_group": "upstream"}
        original |= {"shuffle": "torch", "seed": 100003, "lr": 1e-4, "lr_around": 1e-4, "warmup_steps": 2000}
        original |= {"schedule": "constant", "clip": "micro", "precision": "float32"}
        original |= {"validate_epochs": 2, "validate_when": "upstream"}
        return cls(**(original | changes))

    def validates_after(self, epochs: int) -> bool:
        """Is there a validation when so many epochs are done."""
        if self.validate_when == "upstream":
            return (epochs - 1) % self.validate_epochs == 0
        return epochs % self.validate_epochs == 0 or epochs == self.epochs


class Plan:
    """Steps and learning rates of a run, from the configuration and the number of samples alone."""

    def __init__(self, config: TrainConfig, samples: int):
        self.config, self.samples = config, samples
        if config.order is not None and not set(config.order) <= set(range(samples)):
            raise ValueError(f"order: the sample numbers are from 0 to {samples - 1}")
        size = samples if config.order is None else len(config.order)
        micro_batches = -(-size // config.batch)
        self.epoch_steps = -(-micro_batches // config.accumulation)
        self.micro_batches, self.steps = micro_batches * config.epochs, self.epoch_steps * config.epochs
        self.short_steps = config.epochs if micro_batches % config.accumulation else 0  # with fewer micro-batches
        part = max(1, round(config.warmup * self.steps))
        self.warmup = config.warmup_steps if config.warmup_steps is not None else part
        self.peak = max((self.rate(step) for step in range(self.steps)), default=0.0)
        """The largest part of the configured learning rate that any step uses."""

    def rate(self, step: int) -> float:
        """Part of the configured learning rate that optimizer step `step` (from 0) uses."""
        if step + 1 < self.warmup or self.config.schedule == "constant":
            return min((step + 1) / max(self.warmup, 1), 1.0)
        done = (step + 1 - self.warmup) / max(self.steps - self.warmup, 1)
        return self.config.lr_end + (1 - self.config.lr_end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def order_of(self, epoch: int) -> np.ndarray:
        """Sample numbers int64 in the order in which `epoch` takes them. With shuffle="torch" it draws from PyTorch's generator."""
        config = self.config
        if config.order is not None:
            return np.asarray(config.order, dtype=np.int64)
        if config.shuffle == "torch":
            import torch

            loader: Any = torch.utils.data.DataLoader(torch.arange(self.samples), batch_size=1, shuffle=True)  # type: ignore[arg-type]
            return np.array([int(number) for number in loader], dtype=np.int64)
        return np.random.default_rng([config.seed, epoch]).permutation(self.samples)
