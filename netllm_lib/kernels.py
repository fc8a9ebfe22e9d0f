"""Notebook kernels that do not outlive the process that started them.

A kernel is a process of its own. When the process that runs the notebook is killed, ipykernel's poller ends the kernel after up to
two seconds if it is idle, and not at all while it computes without releasing Python's lock; until then it would go on writing
beside whoever takes the work up again. Here the system kills it with its parent (Linux), and until it is gone it holds its parent's
lock on the run folder, so that nobody else can begin (wherever there are file locks).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def bound_to(handle: int | None) -> type[KernelManager]:
    """A kernel manager class whose kernels die with this thread's process, and hold the open lock file `handle` while they live.

    Of the processes that a kernel starts, those that inherit its open files (forks, not new programs) hold the lock too.
    """
    from jupyter_client.manager import AsyncKernelManager

    class BoundKernelManager(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            command = super().format_kernel_cmd(extra_arguments)
            if not sys.platform.startswith("linux"):
                return command
            return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            kept = {} if handle is None or os.name != "posix" else {"pass_fds": (handle,)}
            await super()._async_launch_kernel(kernel_cmd, **kept, **options)

    return BoundKernelManager


def main(arguments: Sequence[str]) -> None:
    """`PARENT COMMAND…`: becomes COMMAND, after asking the system to kill it when its parent, process PARENT, ends."""
    parent, *command = arguments
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before it could be asked
        raise SystemExit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
