"""Arrays of any size, in memory or mapped from a file: their hash, and a walk over them that holds one block."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np


def array_hash(*arrays: np.ndarray) -> str:
    """Hex digest of arrays by dtype, shape and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        for _, part in blocks(array):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]


def blocks(array: np.ndarray, size_bytes: int = 2**23) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first row, rows) of an array, in blocks of about `size_bytes`; pages of a mapped one are given back."""
    rows = max(1, size_bytes // max(1, array[:1].nbytes)) if array.ndim else 1
    for first in range(0, len(array) if array.ndim else 1, rows):
        yield first, array[first : first + rows] if array.ndim else array
        give_back(array)


def give_back(array: np.ndarray) -> None:
    """Let the pages of a read-only memory-mapped array leave this process; they are read again when they are used again."""
    base: Any = array
    while isinstance(base, np.ndarray) and not array.flags.writeable:
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
