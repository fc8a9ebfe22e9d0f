"""The original's experience pools, read without executing anything in them and written so that the original can read them.

The original's pool is a pickle of its class `plm_special.data.exp_pool.ExperiencePool` with four lists. A pickle is a
program, so two fences stand before it: an allow-list of opcodes, checked without running any, and an unpickler that turns the
few allowed names into inert records. NumPy itself never sees the file's shapes, types or sizes before they are checked.
"""

from __future__ import annotations

import pickle
import pickletools
import sys
import types
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from netllm_lib.abr.pool import ExperiencePool, PoolError
from netllm_lib.runs import atomic_path

POOL_CLASS = ("plm_special.data.exp_pool", "ExperiencePool")

# What the pickles of Python 3 need for a class with lists of arrays and numbers (protocols 2 to 5), and nothing else.
_OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "STACK_GLOBAL",
        "NEWOBJ",
        "REDUCE",
        "BUILD",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
    ]
)


class _Record:
    """An inert stand-in for an allowed class or function: it keeps its arguments and state, and does nothing."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Pool(_Record):
    pass


class _Array(_Record):
    pass


class _Scalar(_Record):
    pass


class _DType(_Record):
    pass


class _NDArray(_Record):
    pass


_ALLOWED: dict[tuple[str, str], type[_Record]] = {
    POOL_CLASS: _Pool,
    ("numpy", "ndarray"): _NDArray,
    ("numpy", "dtype"): _DType,
}
for _module in ("numpy._core.multiarray", "numpy.core.multiarray"):
    _ALLOWED |= {(_module, "_reconstruct"): _Array, (_module, "scalar"): _Scalar}


class _PoolUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise PoolError(
                f"refers to {module}.{name}, which no experience pool needs: refused, nothing was run"
            ) from None


def read_pool(path: Path) -> ExperiencePool:
    """Read the original's `exp_pool.pkl`. Raises PoolError, with the reason, for anything else; nothing is executed."""
    path = Path(path)
    data = path.read_bytes()
    try:
        _check_opcodes(data)
        record = _PoolUnpickler(BytesIO(data)).load()
        return _to_pool(record, {"file": path.name, "format": "original"})
    except PoolError as error:
        raise PoolError(f"{path}: {str(error).removeprefix('pool: ')}") from None
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise PoolError(f"{path}: not a readable experience pool ({type(error).__name__}: {error})") from None


def _check_opcodes(data: bytes) -> None:
    count = 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            count += 1
            if opcode.name not in _OPCODES:
                raise PoolError(
                    f"pickle opcode {opcode.name} at byte {position}, which no experience pool needs: refused"
                )
            # memo slots are numbered as they come; a huge number would only make the reader allocate memory
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > count:
                raise PoolError(f"pickle memo slot {argument} at byte {position} after {count} opcodes: refused")
    except PoolError:
        raise
    except Exception as error:
        raise PoolError(f"not a whole pickle ({error})") from None


def _to_pool(record: Any, source: dict[str, Any]) -> ExperiencePool:
    if not isinstance(record, _Pool) or not isinstance(record.state, dict):
        raise PoolError("not the original's ExperiencePool")
    lists = {}
    for name in ("states", "actions", "rewards", "dones"):
        values = record.state.get(name)
        if not isinstance(values, list):
            raise PoolError(f"the list {name!r} is missing")
        lists[name] = values
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) != 1:
        raise PoolError(f"lists of different lengths: {lengths}")
    return ExperiencePool(
        states=_convert(lists["states"], _state, "state", (6, 6), np.float32),
        actions=_convert(lists["actions"], _integer, "action", (), np.int64),
        rewards=_convert(lists["rewards"], _real, "reward", (), np.float64),
        dones=_convert(lists["dones"], _boolean, "done", (), np.bool_),
        source=source,
    )


def _convert(values: list[Any], one: Callable[[Any], Any], what: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    out = np.empty((len(values), *shape), dtype=dtype)
    for index, value in enumerate(values):
        try:
            out[index] = one(value)
        except (TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
            raise PoolError(f"{what} {index}: {error}") from None
    return out


def _dtype(record: Any, kinds: str) -> np.dtype:
    """The NumPy type that a pickled dtype names: only plain numbers of the given kinds."""
    if not isinstance(record, _DType) or not record.args or not isinstance(record.args[0], str):
        raise ValueError("no plain number type")
    code = record.args[0]
    order = record.state[1] if isinstance(record.state, tuple) and len(record.state) > 1 else "|"
    if code[:1] not in kinds or not code[1:].isdigit() or order not in ("<", ">", "|", "="):
        raise ValueError(f"number type {code!r}, expected one of kind {kinds!r}")
    return np.dtype(order + code if order != "|" else code)


def _state(record: Any) -> np.ndarray:
    if not isinstance(record, _Array) or not isinstance(record.state, tuple) or len(record.state) != 5:
        raise ValueError("not an array")
    _, shape, dtype, fortran, data = record.state
    if shape != (6, 6):
        raise ValueError(f"shape {shape!r:.40}, expected (6, 6)")
    if not isinstance(data, bytes):
        raise ValueError("no array data")
    values = np.frombuffer(data, dtype=_dtype(dtype, "f"))
    if values.size != 36:
        raise ValueError(f"{values.size} values, expected 36")
    return values.reshape((6, 6), order="F" if fortran else "C")


def _number(record: Any, kinds: str) -> Any:
    if not isinstance(record, _Scalar):
        return record
    dtype, data = record.args
    if not isinstance(data, bytes):
        raise ValueError("no number")
    value = np.frombuffer(data, dtype=_dtype(dtype, kinds))
    if value.size != 1:
        raise ValueError("not a single number")
    return value[0].item()


def _integer(record: Any) -> int:
    value = _number(record, "iu")
    if type(value) is not int:
        raise ValueError(f"{value!r:.40} is not an integer level")
    return value


def _real(record: Any) -> float:
    value = _number(record, "fiu")
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)


def _boolean(record: Any) -> bool:
    value = _number(record, "b")
    if type(value) is not bool:
        raise ValueError(f"{value!r:.40} is not True or False")
    return value


def write_pool(pool: ExperiencePool, path: Path) -> Path:
    """Write a pool as the original's code pickles it; it loads there with NumPy 1 and NumPy 2."""
    cls = type(POOL_CLASS[1], (), {"__module__": POOL_CLASS[0]})
    record = cls()
    record.__dict__ |= {
        "states": list(pool.states),
        "actions": [int(action) for action in pool.actions],
        "rewards": list(pool.rewards),
        "dones": [bool(done) for done in pool.dones],
    }
    # pickle checks that a class can be imported under its name: lend it that name for the moment of writing
    parts = POOL_CLASS[0].split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[POOL_CLASS[0]], POOL_CLASS[1], cls)
        data = pickle.dumps(record, protocol=3)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    # NumPy 1 does not know NumPy 2's module name, NumPy 2 knows both
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with atomic_path(Path(path)) as aside:
        aside.write_bytes(data)
    return Path(path)
