"""Pickles of the original's pool class with any content, as any Python 3 and either NumPy would write them."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.upstream.pickles import POOL_CLASS

GOOD: dict[str, Any] = {
    "states": [np.zeros((6, 6), np.float32)] * 2,
    "actions": [0, 1],
    "rewards": [np.float64(1), np.float64(2)],
    "dones": [False, True],
}


@contextmanager
def original_class() -> Iterator[Any]:
    """The original's class, importable under its name for as long as the block lasts."""
    module, package, root = (types.ModuleType(name) for name in (POOL_CLASS[0], "plm_special.data", "plm_special"))
    cls = type(POOL_CLASS[1], (), {"__module__": POOL_CLASS[0]})
    setattr(module, POOL_CLASS[1], cls)
    modules = {m.__name__: m for m in (root, package, module)}
    sys.modules.update(modules)
    try:
        yield cls
    finally:
        for name in modules:
            del sys.modules[name]


def upstream_pickle(protocol: int = pickle.DEFAULT_PROTOCOL, numpy_1: bool = False, **attributes: Any) -> bytes:
    """A pickle of the original's class with any attributes."""
    with original_class() as cls:
        record = cls()
        record.__dict__.update(attributes)
        data = pickle.dumps(record, protocol=protocol)
    if numpy_1 and protocol < 4:
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
    elif numpy_1:  # strings have their length before them; frame lengths, which our reader ignores, stay
        for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
            short = name.replace(b"_core", b"core")
            data = data.replace(bytes([len(name)]) + name, bytes([len(short)]) + short)
    return data


def lists_of(pool: ExperiencePool) -> dict[str, Any]:
    """A pool's arrays as the original keeps them."""
    return {
        "states": list(pool.states),
        "actions": [int(action) for action in pool.actions],
        "rewards": list(pool.rewards),
        "dones": [bool(done) for done in pool.dones],
    }
