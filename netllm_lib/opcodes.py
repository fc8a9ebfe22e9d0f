"""The opcodes of a pickle, one after the other, without unpickling it.

A pickle is a program for a machine that imports and calls whatever it is told to. Readers of the original's files look at the
program instead: only the opcodes that they name are decoded, and no size is believed before the bytes are there.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection, Iterator
from io import BytesIO
from typing import Any


def opcodes(data: bytes, allowed: Collection[str]) -> Iterator[tuple[str, Any, int]]:
    """(name, argument, position in bytes) of each opcode up to STOP, named as in `pickletools`.

    Raises ValueError, saying where, at the first opcode that is not in `allowed`, before its argument is read, and for a
    pickle that is cut or damaged.
    """
    readers = {
        op.code.encode("latin1"): (op.name, op.arg and op.arg.reader)
        for op in pickletools.opcodes
        if op.name in allowed
    }
    stream = BytesIO(data)
    while True:
        position = stream.tell()
        code = stream.read(1)
        if code not in readers:
            raise ValueError(
                f"pickle opcode {_NAMES.get(code, code)} at byte {position} is refused" if code else "it is cut short"
            )
        name, reader = readers[code]
        try:
            argument = _global(stream) if name == "GLOBAL" else reader(stream) if reader else None
        except ValueError as error:
            raise ValueError(f"pickle opcode {name} at byte {position}: {error}") from None
        yield name, argument, position
        if name == "STOP":
            return


_NAMES = {op.code.encode("latin1"): op.name for op in pickletools.opcodes}


def _global(stream: BytesIO) -> str:
    """ "module name", as it is written; pickletools would resolve escapes, which no unpickler does."""
    lines = stream.readline(), stream.readline()
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("no name")
    return " ".join(line[:-1].decode() for line in lines)
