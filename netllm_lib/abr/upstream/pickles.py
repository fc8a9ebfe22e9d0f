"""The original's experience pools, read without running anything in them, and written so that the original can read them.

The original's pool is a pickle of its class `plm_special.data.exp_pool.ExperiencePool` with four lists. What such a file refers
to is replaced by the parts below, which keep numbers and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netllm_lib.runs import atomic_path, read_bytes
from netllm_lib.safe_pickle import Part, load

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool

POOL_CLASS = ("plm_special.data.exp_pool", "ExperiencePool")
_NUMBER_TYPES = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)) | {"f2", "f4", "f8", "b1"}
_MOST_BYTES = 2**29  # about two million transitions


class _Pool(Part):
    """The original's pool: its four lists as attributes."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:  # whose keys are text: hashing something else may take for ever
            raise ValueError("a pool without lists")
        vars(self).update(state)


class _DType(Part):
    def __init__(self, code: Any, *_: Any):
        if type(code) is not str or code not in _NUMBER_TYPES:
            raise ValueError(f"numbers of a type that is none of {', '.join(sorted(_NUMBER_TYPES))}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or type(state[1]) is not str:
            raise ValueError("a number type without an order of bytes")
        self.dtype = self.dtype.newbyteorder(state[1])  # type: ignore[arg-type]


class _Array(Part):
    """An array, empty until its numbers come."""

    values: np.ndarray | None = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if type(data) not in (bytes, bytearray) or type(dtype) is not _DType or type(shape) is not tuple:
            raise ValueError("an array without numbers")
        order: Any = "F" if fortran is True else "C"
        self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)  # a view: no memory is taken


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    values = _frombuffer(data, dtype, (), "C").values
    return None if values is None else values.item()


def _encode(text: Any, *_: Any) -> bytes:
    """Protocol 2 writes bytes as text in latin1."""
    if type(text) is not str:
        raise ValueError("bytes that are no text")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    POOL_CLASS: _Pool, ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType, ("_codecs", "encode"): _encode,
}  # fmt: skip
for _core in ("numpy._core", "numpy.core"):  # NumPy 2 and NumPy 1
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Array
    _NAMES[f"{_core}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _frombuffer  # protocol 5


def read_pool(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of the original's `exp_pool.pkl`, pickled by any Python 3 (protocols 2 to 5) with NumPy 1 or 2.

    Raises ValueError for anything else; nothing in the file is run. `load_pool` makes a pool of them.
    """
    record = load(read_bytes(path, _MOST_BYTES), _NAMES)
    states = [value.values for value in _entries(record, "states", _Array)]
    if not all(state is not None and state.shape == (6, 6) and state.dtype.kind == "f" for state in states):
        raise ValueError("a state is not a 6 × 6 array of floating point numbers")
    with np.errstate(over="ignore", invalid="ignore"):  # a number beyond float32 becomes infinite, which a pool refuses
        matrices = np.array(states, dtype=np.float32).reshape(-1, 6, 6)
    return {
        "states": matrices,
        "actions": np.array(_entries(record, "actions", int), dtype=np.int64),
        "rewards": np.array(_entries(record, "rewards", int, float), dtype=np.float64),
        "dones": np.array(_entries(record, "dones", bool), dtype=np.bool_),
    }


def _entries(record: Any, name: str, *kinds: type) -> list[Any]:
    values = vars(record).get(name) if type(record) is _Pool else None
    if type(values) is not list or not all(type(value) in kinds for value in values):  # True is no level
        raise ValueError(f"no list {name!r} of {' or '.join(kind.__name__.strip('_') for kind in kinds)} in it")
    return values


def write_pool(pool: ExperiencePool, path: Path) -> Path:
    """Write a pool as the original's code pickles it; it loads there with NumPy 1 and NumPy 2."""
    record = _Pool()
    vars(record).update(
        states=list(pool.states), actions=pool.actions.tolist(), rewards=list(pool.rewards), dones=pool.dones.tolist()
    )
    data = pickle.dumps(record, protocol=3)  # in which names are lines of text
    ours, theirs = f"c{_Pool.__module__}\n{_Pool.__name__}\n", "c{}\n{}\n".format(*POOL_CLASS)
    data = data.replace(ours.encode(), theirs.encode(), 1)
    # NumPy 1 does not know NumPy 2's module name, NumPy 2 knows both
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with atomic_path(Path(path)) as aside:
        aside.write_bytes(data)
    return Path(path)
