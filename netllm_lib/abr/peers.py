"""The processes that train one policy together, each on its part of every batch. `Peers()` is a process on its own."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch

WAIT = datetime.timedelta(hours=2)
"""For the slowest of the processes: while the leading one plays the validation traces, the others wait."""


class Peers:
    """A single process: it leads, agrees with itself, and its sums are its own."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """True in the one process that reads the state of the run, validates and writes files."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """The leading process's value, in all of them. Returns when all have asked."""
        return value

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace every tensor by its sum over the processes."""


class Processes(Peers):
    """Several processes, started by `accelerate launch` or `torchrun`, which set $RANK, $WORLD_SIZE and the address to meet at.

    $NETLLM_RENDEZVOUS, a file that does not exist yet on a disk that all of them see, replaces the address.
    """

    def __init__(self, device: torch.device) -> None:
        from torch import distributed

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        file = os.environ.get("NETLLM_RENDEZVOUS")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{os.path.abspath(file)}" if file else "env://",
            rank=self.rank,
            world_size=self.size,
            timeout=WAIT,
        )

    def agree(self, value: Any) -> Any:
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor)

    def part(self) -> None:
        """Wait for all, and end."""
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()
