"""What a task brings along: data to learn from, and a network around the PLM. Training and checkpoints ask for no more."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from netllm_lib.plm import PLM

Numbers = np.ndarray | list[int]


class Data(Protocol):
    """Samples, numbered from 0."""

    @property
    def key(self) -> str:
        """A hash of everything that decides what a batch holds."""

    @property
    def facts(self) -> dict[str, Any]:
        """How the samples were made, for the record; `crossing` is the number of those that span two episodes."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Numbers) -> Any:
        """The samples with these numbers: a NamedTuple of tensors that has `to(device)`."""

    def labels(self, numbers: Numbers) -> int:
        """How many predictions the loss of these samples is a sum over."""


class Network(nn.Module):
    """A PLM and the modules around it. A task derives its own, made by `Kind(plm, config)`."""

    task: ClassVar[str]  # its name; a checkpoint of another task is refused
    Config: ClassVar[type]  # dataclass of the sizes around the PLM
    Settings: ClassVar[type]  # dataclass of what a test must know of the training; checkpoints keep it
    plm: PLM
    config: Any

    @abstractmethod
    def around_plm(self) -> dict[str, nn.Module]:
        """All modules but the PLM, by name."""

    @abstractmethod
    def loss(self, batch: Any, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, int]:
        """Sum of the losses of a batch's labels, and their number. The PLM computes in `dtype`; None: in that of its weights."""

    def check(self, settings: Any) -> None:
        """Raise ValueError if a network of this shape cannot be trained with these settings."""

    def rehearse(self, batch: Any, dtype: torch.dtype | None) -> Any:
        """Compute what needs the most memory in a validation, and return what that keeps; its memory is measured."""
        return self.loss(batch, dtype)

    @property
    def device(self) -> torch.device:
        """Of the modules around the PLM."""
        return self.plm.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that training changes, by name; the PLM's part under `plm.`."""
        own = dict(nn.ModuleDict(self.around_plm()).named_parameters())
        return own | {f"plm.{name}": p for name, p in self.plm.trainable().items()}
