"""For the benchmarks: time and memory of a piece of work in a process of its own, and their reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from netllm_lib.runs import PROJECT, atomic_path

MB = 2**20


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fills a dict: `seconds`, and `peak_mb` and `anonymous_mb`, the largest memory above that at the beginning.

    Memory is looked at every 2 ms. Anonymous memory is the process's own; the rest are pages of mapped files, which the
    system takes back when others need the room (told apart on Linux only).
    """
    process, found = psutil.Process(), {"seconds": 0.0, "peak_mb": 0.0, "anonymous_mb": 0.0}
    stop = threading.Event()

    def used() -> tuple[float, float]:
        memory = process.memory_info()
        return memory.rss / MB, (memory.rss - getattr(memory, "shared", 0)) / MB

    before = used()

    def look() -> None:
        while not stop.wait(0.002):
            peak, anonymous = used()
            found["peak_mb"] = max(found["peak_mb"], peak - before[0])
            found["anonymous_mb"] = max(found["anonymous_mb"], anonymous - before[1])

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    started = time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - started
        stop.set()
        watcher.join()


def in_child(script: str, *arguments: object) -> dict[str, Any]:
    """Run `script` with `arguments` on one thread and return the JSON of its last line."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | one_thread,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def publish(name: str, text: str) -> None:
    """Write a benchmark's report, reports/benchmarks/<name>.md, and print it."""
    text = text.rstrip("\n") + "\n"
    with atomic_path(PROJECT / "reports" / "benchmarks" / f"{name}.md") as aside:
        aside.write_text(text)
    print(text)
