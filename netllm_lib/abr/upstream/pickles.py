"""The original's experience pools, read without executing anything in them and written so that the original can read them.

The original's pool is a pickle of its class `plm_special.data.exp_pool.ExperiencePool` with four lists. A pickle is a
program for a machine that imports and calls whatever it is told to. No such machine is used here: a small interpreter
follows the few opcodes that such a pool consists of, knows the names that may occur in it, and builds lists, tuples, numbers
and arrays of numbers. Anything else is refused by opcode and byte. Nothing is imported, called, hashed, compared or printed
because a file says so, no size is believed before the bytes are there, and the memory needed is in proportion to the file.
"""

from __future__ import annotations

import enum
import math
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from netllm_lib.abr.pool import ExperiencePool, PoolError
from netllm_lib.opcodes import opcodes
from netllm_lib.runs import atomic_path

POOL_CLASS = ("plm_special.data.exp_pool", "ExperiencePool")

# --- reading ------------------------------------------------------------------------------------------------------------


class _Name(enum.Enum):
    """What a pool's pickle may refer to by name. None of these is the thing itself."""

    POOL = ".".join(POOL_CLASS)
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    RECONSTRUCT = "numpy's _reconstruct"  # an empty array, filled by BUILD (protocols 2 to 4)
    FROMBUFFER = "numpy's _frombuffer"  # a whole array (protocol 5)
    SCALAR = "numpy's scalar"
    ENCODE = "_codecs.encode"  # bytes, in protocol 2


_NAMES: dict[tuple[str, str], _Name] = {
    POOL_CLASS: _Name.POOL,
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("_codecs", "encode"): _Name.ENCODE,
}
for _core in ("numpy._core", "numpy.core"):  # NumPy 2 and NumPy 1
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Name.RECONSTRUCT
    _NAMES[f"{_core}.multiarray", "scalar"] = _Name.SCALAR
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _Name.FROMBUFFER

_OPCODES = frozenset(
    [
        "MEMOIZE",
        "BININT1",
        "BININT",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINGET",
        "LONG_BINGET",
        "SHORT_BINBYTES",
        "BINBYTES",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "REDUCE",
        "NEWFALSE",
        "NEWTRUE",
        "NONE",
        "BINPUT",
        "LONG_BINPUT",
        "TUPLE2",
        "TUPLE3",
        "TUPLE1",
        "MARK",
        "TUPLE",
        "BUILD",
        "APPENDS",
        "APPEND",
        "FRAME",
        "PROTO",
        "STACK_GLOBAL",
        "GLOBAL",
        "EMPTY_LIST",
        "EMPTY_DICT",
        "EMPTY_TUPLE",
        "BYTEARRAY8",
        "SETITEMS",
        "SETITEM",
        "NEWOBJ",
        "STOP",
    ]
)
_NUMBER_TYPES = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)) | {"f2", "f4", "f8", "b1"}
_ORDERS: dict[str, Literal["<", ">", "|", "="]] = {"<": "<", ">": ">", "|": "|", "=": "="}  # of bytes
_MAX_BYTES = 2 * 2**30  # ten million transitions
_MAX_CONTAINERS = 64  # a pool has four lists and a dictionary
_MAX_MARKS = 8  # nested; a pool needs four


class _Pool:
    """The original's pool object: its attributes."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: dict[str, Any] | None = None


class _DType:
    __slots__ = ("dtype",)

    def __init__(self, code: str):
        self.dtype = np.dtype(code)


class _Array:
    """An array as the file describes it; `values` is None until its data have come."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def fill(self, shape: Any, dtype: Any, order: str, data: Any) -> None:
        if type(shape) is not tuple or len(shape) > 4 or not all(type(n) is int and n >= 0 for n in shape):
            raise PoolError("an array with a shape that is no shape")
        if type(dtype) is not _DType or type(data) is not bytes:
            raise PoolError("an array without numbers")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise PoolError(f"an array of shape {shape} and type {dtype.dtype} with {len(data)} bytes of data")
        values = np.frombuffer(data, dtype=dtype.dtype)  # a view: no memory is taken
        self.values = values.reshape(shape, order="F" if order == "F" else "C")


def read_pool(path: Path) -> ExperiencePool:
    """Read the original's `exp_pool.pkl`, pickled by any Python 3 (protocols 2 to 5) with NumPy 1 or 2.

    Raises PoolError, with the file and the reason, for anything else; nothing in the file is executed.
    """
    path = Path(path)
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise PoolError(f"{path}: {size} bytes, larger than any experience pool")
    data = path.read_bytes()
    try:
        return _to_pool(_interpret(data), {"file": path.name, "format": "original"})
    except PoolError as error:
        raise PoolError(f"{path}: {str(error).removeprefix('pool: ')}") from None
    except ValueError as error:
        raise PoolError(f"{path}: not a pickled experience pool ({error}); nothing was run") from None


def _interpret(data: bytes) -> Any:
    """The object that a pickle of the allowed opcodes describes."""
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: list[Any] = []  # picklers number their slots as they come
    containers = 0
    for opcode, argument, position in opcodes(data, _OPCODES):
        try:
            match opcode:  # the most frequent ones first
                case "MEMOIZE":
                    memo.append(stack[-1])
                case "BININT1" | "BININT" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "SHORT_BINBYTES" | "BINBYTES" | "SHORT_BINUNICODE" | "BINUNICODE":
                    stack.append(argument)
                case "REDUCE":
                    arguments = stack.pop()
                    stack[-1] = _reduce(stack[-1], arguments)
                case "NEWFALSE":
                    stack.append(False)
                case "NEWTRUE":
                    stack.append(True)
                case "NONE":
                    stack.append(None)
                case "BINPUT" | "LONG_BINPUT":
                    if argument == len(memo):
                        memo.append(stack[-1])
                    elif argument < len(memo):
                        memo[argument] = stack[-1]
                    else:
                        raise PoolError(f"memo slot {argument} after {len(memo)} others")
                case "TUPLE2":
                    stack[-2:] = [(stack[-2], stack[-1])]
                case "TUPLE3":
                    stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
                case "TUPLE1":
                    if type(stack[-1]) is not int:
                        raise PoolError("a tuple of something that is not a size")
                    stack[-1] = (stack[-1],)
                case "MARK":
                    if len(marks) == _MAX_MARKS:
                        raise PoolError("nested too deeply")
                    marks.append(len(stack))
                case "TUPLE":
                    start = marks.pop()
                    stack[start:] = [tuple(stack[start:])]
                case "BUILD":
                    state = stack.pop()
                    _build(stack[-1], state)
                case "APPENDS":
                    start = marks.pop()
                    _list(stack[start - 1]).extend(stack[start:])
                    del stack[start:]
                case "APPEND":
                    value = stack.pop()
                    _list(stack[-1]).append(value)
                case "FRAME" | "PROTO":
                    pass
                case "STACK_GLOBAL":
                    name = stack.pop()
                    stack[-1] = _name(stack[-1], name)
                case "GLOBAL":
                    stack.append(_name(*argument.split(" ", 1)))
                case "EMPTY_LIST" | "EMPTY_DICT":
                    containers += 1
                    if containers > _MAX_CONTAINERS:
                        raise PoolError(f"more than {_MAX_CONTAINERS} lists")
                    stack.append([] if opcode == "EMPTY_LIST" else {})
                case "EMPTY_TUPLE":
                    stack.append(())
                case "BYTEARRAY8":
                    stack.append(bytes(argument))
                case "SETITEMS":
                    start = marks.pop()
                    _set_items(stack[start - 1], stack[start:])
                    del stack[start:]
                case "SETITEM":
                    items = stack[-2:]
                    del stack[-2:]
                    _set_items(stack[-1], items)
                case "NEWOBJ":
                    arguments = stack.pop()
                    if stack[-1] is not _Name.POOL or arguments != ():
                        raise PoolError("an object that is not an experience pool")
                    stack[-1] = _Pool()
                case "STOP":
                    if len(stack) != 1 or marks:
                        raise PoolError("more than one object")
                    return stack[0]
        except IndexError:
            raise PoolError(f"pickle opcode {opcode} at byte {position} finds nothing to work on") from None
        except (PoolError, ValueError) as error:
            raise PoolError(f"pickle opcode {opcode} at byte {position}: {error}; refused, nothing was run") from None
    raise AssertionError("opcodes end with STOP")


def _name(module: Any, name: Any) -> _Name:
    if type(module) is not str or type(name) is not str or len(module) + len(name) > 200:
        raise PoolError("a name that is no name")
    if (module, name) not in _NAMES:
        raise PoolError(f"refers to {f'{module}.{name}'!r}, which no experience pool needs")
    return _NAMES[module, name]


def _reduce(function: Any, arguments: Any) -> Any:
    """What a call would make, for the few calls that pools contain."""
    if type(arguments) is not tuple:
        raise PoolError("a call without arguments")
    if function is _Name.RECONSTRUCT:
        if arguments != (_Name.NDARRAY, (0,), b"b"):
            raise PoolError("an array of an unknown class")
        return _Array()
    if function is _Name.SCALAR and len(arguments) == 2:
        dtype, data = arguments
        if type(dtype) is not _DType or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
            raise PoolError("not a single number")
        return np.frombuffer(data, dtype=dtype.dtype).item()
    if function is _Name.ENCODE and len(arguments) == 2:
        text, encoding = arguments
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise PoolError("bytes that are not in latin1")
        return text.encode("latin1")
    if function is _Name.DTYPE and len(arguments) == 3:
        code = arguments[0]
        if type(code) is not str or code not in _NUMBER_TYPES:
            raise PoolError(f"number type {_shown(code)}, expected one of {', '.join(sorted(_NUMBER_TYPES))}")
        return _DType(code)
    if function is _Name.FROMBUFFER and len(arguments) == 4:
        data, dtype, shape, order = arguments
        array = _Array()
        array.fill(shape, dtype, "F" if type(order) is str and order == "F" else "C", data)
        return array
    raise PoolError("a call of something that is not to be called in a pool")


def _build(record: Any, state: Any) -> None:
    """Give an object its state."""
    if type(record) is _Array and type(state) is tuple and len(state) == 5:
        _, shape, dtype, fortran, data = state
        record.fill(shape, dtype, "F" if fortran is True else "C", data)
    elif type(record) is _DType and type(state) is tuple and len(state) == 8:
        order = state[1]
        if type(order) is not str or order not in _ORDERS or state[2:5] != (None, None, None):
            raise PoolError("a number type that is not plain")
        record.dtype = record.dtype.newbyteorder(_ORDERS[order])
    elif type(record) is _Pool and type(state) is dict:
        record.attributes = state
    else:
        raise PoolError("a state for something that takes none")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise PoolError("items for something that is not a list")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if type(target) is not dict or len(keys) != len(values) or not all(type(key) is str for key in keys):
        raise PoolError("attributes without names")
    target.update(zip(keys, values, strict=True))


def _shown(value: Any) -> str:
    """A value for a message. Only plain ones are printed: a hostile file can hold some that take forever."""
    return (
        f"{value!r:.40}"
        if type(value) in (int, float, bool, str, type(None))
        else f"a {type(value).__name__.strip('_')}"
    )


def _to_pool(record: Any, source: dict[str, Any]) -> ExperiencePool:
    if type(record) is not _Pool or record.attributes is None:
        raise PoolError("not the original's ExperiencePool")
    lists = {}
    for name in ("states", "actions", "rewards", "dones"):
        values = record.attributes.get(name)
        if type(values) is not list:
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
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a number beyond float32 becomes infinite, which the pool refuses
        for index, value in enumerate(values):
            try:
                out[index] = one(value)
            except (ValueError, OverflowError) as error:
                raise PoolError(f"{what} {index}: {error}") from None
    return out


def _state(value: Any) -> np.ndarray:
    if type(value) is not _Array or value.values is None:
        raise ValueError("not an array")
    values = value.values
    if values.shape != (6, 6):
        raise ValueError(f"shape {values.shape}, expected (6, 6)")
    if values.dtype.kind != "f":
        raise ValueError(f"number type {values.dtype.str[1:]!r}, expected floating point")
    return values


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{_shown(value)} is not an integer level")
    return value


def _real(value: Any) -> float:
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{_shown(value)} is not a number")
    return float(value)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{_shown(value)} is not True or False")
    return value


# --- writing ------------------------------------------------------------------------------------------------------------


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
