"""Notebook kernels that end with the process that started them, and at once on Ctrl-C.

A kernel is a process of its own. When the process that runs the notebook is killed, ipykernel itself ends the kernel only
where it is idle; one that computes without releasing Python's lock would go on writing beside whoever takes the work up
again. On Linux the system is asked to kill it with its parent.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jupyter_client.manager import AsyncKernelManager

from netllm_lib import runs

DIE_WITH_PARENT = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.getppid() == int(parent) or sys.exit(1)  # it ended before it could be asked
os.execvp(command[0], command)
"""


class BoundKernelManager(AsyncKernelManager):
    """Starts kernels that die with this process, and that know that nobody is watching."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        bound = [sys.executable, "-ISc", DIE_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
        return [
            *bound,
            *super().format_kernel_cmd(extra_arguments),
            "--log-level=CRITICAL",
        ]  # our errors say what is wrong

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        await super().start_kernel(env={"GOMP_SPINCOUNT": runs.SPIN, **os.environ, "NETLLM_HEADLESS": "1"}, **options)

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
        await super().shutdown_kernel(now or interrupted.is_set(), restart)


interrupted = threading.Event()


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Ctrl-C inside the block cancels the tasks of its event loop and kills its kernel; KeyboardInterrupt is raised at the end.

    Raised in the middle, it would leave tasks behind, which print tracebacks, and wait for a kernel that is asked to end.
    """
    if threading.current_thread() is not threading.main_thread():  # a worker of a sweep: its process is ended
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        tasks = [] if interrupted.is_set() else _tasks()
        interrupted.set()
        if not tasks:
            raise KeyboardInterrupt
        for task in tasks:
            task.get_loop().call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            interrupted.clear()
            raise KeyboardInterrupt


def _tasks() -> set[asyncio.Task[Any]]:
    try:
        return asyncio.all_tasks()
    except RuntimeError:  # no loop is running
        return set()
