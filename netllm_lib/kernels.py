"""Notebook kernels that end with the process that started them.

A kernel is a process of its own. When the process that runs the notebook is killed, ipykernel itself ends the kernel only
where it is idle; one that computes without releasing Python's lock would go on writing beside whoever takes the work up
again. On Linux the system is asked to kill it with its parent.
"""

import os
import sys
from typing import Any

from jupyter_client.manager import AsyncKernelManager

DIE_WITH_PARENT = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.getppid() == int(parent) or sys.exit(1)  # it ended before it could be asked
os.execvp(command[0], command)
"""

SPIN = "10000"
"""How long (in turns) a waiting OpenMP thread of PyTorch keeps its core. By default it is 30 times as long, and then one other
busy process on a small machine slows training more than six times; so it is two to three times, at 2 to 5 % without one."""


class BoundKernelManager(AsyncKernelManager):
    """Starts kernels that die with this process, and that know that nobody is watching."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        bound = [sys.executable, "-ISc", DIE_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
        return [*bound, *super().format_kernel_cmd(extra_arguments)]

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        await super().start_kernel(env={"GOMP_SPINCOUNT": SPIN, **os.environ, "NETLLM_HEADLESS": "1"}, **options)
