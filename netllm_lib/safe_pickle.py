"""Pickles from elsewhere, read without running anything that is in them.

A pickle is a program for a machine that imports and calls whatever it is told to. The machine here is Python's own, written in
Python, with a short list of instructions and a short list of names, which the caller chooses and which stand for harmless parts.
Memory and time are in proportion to the file: no size is believed before its bytes are there, and only text is hashed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

_ALLOWED = [
    "PROTO", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "MARK", "NONE", "NEWTRUE",
    "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES",
    "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST",
    "APPEND", "APPENDS", "EMPTY_DICT", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BINPERSID",
]  # fmt: skip


class Part:
    """Something that a pickle may build in steps: only these take a state."""

    def __setstate__(self, state: Any) -> None:
        pass


def load(
    data: bytes, names: Mapping[tuple[str, str], Any] | None = None, stored: Callable[[Any], Any] | None = None
) -> Any:
    """The object that a pickle describes.

    `names` maps (module, name) to what stands for it: a subclass of `Part`, or a function that takes arguments of any type.
    All other names are refused. `stored` returns what an identifier of something outside the pickle stands for. Raises
    ValueError, in one line, for everything that does not work out.
    """
    try:
        return _Unpickler(data, names or {}, stored).load()
    except Exception as error:  # whatever a broken file provokes is a broken file
        said = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{said or type(error).__name__}; nothing was run") from None


class _Memo(list[Any]):
    """Picklers number what they remember as it comes, so a list is enough; a dictionary takes five times the memory."""

    def __setitem__(self, slot: Any, value: Any) -> None:
        self.append(value) if slot == len(self) else super().__setitem__(slot, value)


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise ValueError(f"pickle opcode {bytes([code])!r} is refused")


_Python: Any = pickle._Unpickler  # whose parts typeshed does not list


class _Unpickler(_Python):
    """Python's unpickler with some of its instructions."""

    dispatch = _Instructions({code: _Python.dispatch[code] for code in (getattr(pickle, n)[0] for n in _ALLOWED)})

    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any], stored: Callable[[Any], Any] | None):
        super().__init__(io.BytesIO(data))
        self.names, self.memo = names, _Memo()
        if stored is not None:
            self.persistent_load = stored  # without it, Python's refuses every identifier

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise ValueError(f"it refers to {f'{module}.{name}'!r:.120}")
        return self.names[module, name]

    def load_frame(self) -> None:
        self.read(8)  # a length that changes nothing

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # Python's takes the memory before it reads

    def load_setitem(self) -> None:
        self.set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(type(key) is str for key in items[::2]):
            raise ValueError("values without names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Part):
            raise ValueError("a state for something that takes none")
        self.stack[-1].__setstate__(state)

    def load_stop(self) -> None:
        if len(self.stack) != 1 or self.metastack:
            raise ValueError("more than one object")
        super().load_stop()

    for _code in ("FRAME", "BYTEARRAY8", "SETITEM", "SETITEMS", "BUILD", "STOP"):
        dispatch[getattr(pickle, _code)[0]] = locals()[f"load_{_code.lower()}"]
