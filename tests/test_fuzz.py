"""Files that come back as they were written, and files that nobody should trust: mutated, truncated, made to harm.

Whatever is in a file, reading it either works or raises the project's own error with the file's name; nothing in it is
executed, and it costs neither much time nor much memory.
"""

from __future__ import annotations

import builtins
import os
import pickle
import pickletools
import random
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from netllm_lib.abr.pool import ExperiencePool, PoolError, load_pool
from netllm_lib.abr.traces import read_trace_set
from netllm_lib.abr.upstream.pickles import write_pool
from pool_fixtures import GOOD, lists_of, original_class, upstream_pickle

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- a watch over what a reader does ------------------------------------------------------------------------------------

_seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None or event in ("os.listdir", "os.scandir"):
        return
    if event == "open" and isinstance(arguments[1], str) and arguments[1].startswith("r"):
        return
    harm = ("import", "exec", "compile", "marshal.loads", "pickle.find_class", "open", "socket.connect")
    if event in harm or event.startswith(("os.", "subprocess.", "shutil.", "ctypes.")):
        _seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_audit)


@contextmanager
def watched(*allowed: str) -> Iterator[None]:
    """Fails if the block imports, compiles, executes, unpickles a name, writes, connects or starts anything that is not allowed."""
    global _seen
    seen: list[str] = []
    _seen = seen
    try:
        yield
    finally:
        _seen = None
    seen = [event for event in seen if event.split()[0] not in allowed]
    assert not seen, f"the reader did {seen[:5]}"


def test_the_watch_sees(tmp_path: Path) -> None:
    for harm in (lambda: os.mkdir(tmp_path / "x"), lambda: pickle.loads(pickle.dumps(os.system)), lambda: eval("1")):
        with pytest.raises(AssertionError, match="the reader did"), watched():
            harm()


def attempt(read: Callable[[], Any], errors: tuple[type[Exception], ...] = (ValueError,)) -> tuple[Any, str]:
    """(what is read, "") or (None, the message of the project's own error); any other error is a failure."""
    try:
        return read(), ""
    except errors as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None, str(error)


def assert_refused(path: Path, data: bytes, memory: int = 2**20, match: str = ".") -> None:
    """Reading `data` raises PoolError with the file's name, runs nothing, takes under a second and under 100 times its size."""
    path.write_bytes(data)
    tracemalloc.start()
    started = time.process_time()
    try:
        with watched(), pytest.raises(PoolError, match=match) as caught:
            load_pool(path)
        assert time.process_time() - started < 5
        assert tracemalloc.get_traced_memory()[1] < memory + 100 * len(data)
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# --- round trips --------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> ExperiencePool:
    count, number = draw(st.integers(1, 9)), st.floats(-1e9, 1e9, width=32)
    states = draw(npst.arrays(np.float32, (count, 6, 6), elements=number))
    rewards = draw(npst.arrays(np.float64, count, elements=number))
    actions = draw(npst.arrays(np.int64, count, elements=st.integers(0, 5)))
    return ExperiencePool(states, actions, rewards, draw(npst.arrays(np.bool_, count)))  # the last may be not done


@quick
@given(pools(), st.integers(2, 5), st.booleans())
def test_any_pool_of_the_original_both_ways(tmp_path: Path, pool: ExperiencePool, protocol: int, numpy_1: bool) -> None:
    """Read from any Python's pickle; written so that Python's own unpickler and the original's class read it."""
    path, expected = tmp_path / "exp_pool.pkl", lists_of(pool)
    path.write_bytes(upstream_pickle(protocol, numpy_1, **expected))
    with watched():
        read = load_pool(path)
    assert read.content_hash() == pool.content_hash() == load_pool(write_pool(pool, path)).content_hash()
    with original_class() as cls:
        record: Any = pickle.loads(path.read_bytes())
    assert type(record) is cls
    assert set(vars(record)) == set(expected)
    assert {type(a) for a in record.actions} | {type(d) for d in record.dones} == {int, bool}
    for name, values in expected.items():
        np.testing.assert_array_equal(np.array(getattr(record, name)), np.array(values))
        assert np.array(getattr(record, name)).dtype == np.array(values).dtype


# --- start pointers -----------------------------------------------------------------------------------------------------


def test_hostile_pointer_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("0 1\n1 2\n2 3\n")
    path = tmp_path / "mahimahi_ptrs.pkl"
    own = (
        b"(lI" + b"9" * 10_000 + b"\na.",
        b"(lI01\na.",
        b"\x80\x02](K\x01K\x01e",
        pickle.dumps([Call(os.system, "echo")]),
        b"",
    )
    for data in (*own, *HOSTILE.values()):
        path.write_bytes(data)
        with watched(), pytest.raises(ValueError, match="mahimahi_ptrs"):
            read_trace_set(tmp_path)


# --- hostile pools, one by one ------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


class WithState:
    def __setstate__(self, state: Any) -> None:
        os.mkdir(state["target"])


def with_body(*opcodes: bytes) -> bytes:
    """A pool's pickle whose state is what `opcodes` leave on the stack."""
    name, cls = (b"\x8c" + bytes([len(text)]) + text for text in (b"plm_special.data.exp_pool", b"ExperiencePool"))
    return b"\x80\x04" + name + cls + b"\x93)\x81" + b"".join(opcodes) + b"b."


def text(value: bytes) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value


NDARRAY = text(b"numpy") + text(b"ndarray") + b"\x93"
ARRAY = text(b"numpy.core.multiarray") + text(b"_reconstruct") + b"\x93" + NDARRAY + b"K\x00\x85C\x01b\x87R"
DTYPE_NAME = text(b"numpy") + text(b"dtype") + b"\x93"
DTYPE = DTYPE_NAME + text(b"f4") + b"\x89\x88\x87R"
STATE = text(b"states")
NUMBERS = ARRAY + b"(K\x01K\x06K\x06\x86" + DTYPE + b"\x89C\x90" + bytes(144) + b"tb"
# each list or tuple holds the one before twice or more: few bytes, but printing, hashing or comparing one takes for ever
LIST_BOMB = b"(]q\x00" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(50)) + b"t"
TUPLE_BOMB = b"()q\x00" + b"".join((b"h" + bytes([i])) * 2 + b"\x86q" + bytes([i + 1]) for i in range(60)) + b"t"


def with_lists(**changes: bytes) -> bytes:
    """A pool of one transition whose values are what the given opcodes leave on the stack."""
    values = {"states": NUMBERS, "actions": b"K\x01", "rewards": b"K\x01", "dones": b"\x88"} | changes
    return with_body(b"}(", *(text(name.encode()) + b"]" + value + b"a" for name, value in values.items()), b"u")


def with_state_of(rows: int, columns: int, data: bytes) -> bytes:
    """A pool with one state of any shape, as protocols 2 to 4 write arrays."""
    shape = struct.pack("<ci", b"J", rows) + struct.pack("<ci", b"J", columns) + b"\x86"
    return with_lists(states=ARRAY + b"(K\x01" + shape + DTYPE + b"\x89C" + bytes([len(data)]) + data + b"tb")


CHANGED: dict[str, dict[str, Any]] = {
    "class with __setstate__": {"actions": [WithState(), WithState()]},
    "reduce with a state": {"dones": Call(list, [True], state={"a": 1})},
    "object arrays": {"states": [np.full((6, 6), os.system, dtype=object)] * 2},
    "structured arrays": {"states": [np.zeros((6, 6), "f4,i4")] * 2},
    "dates": {"rewards": list(np.zeros(2, "M8[s]"))},
    "levels as text": {"actions": ["0", "1"]},
    "level 6": {"actions": [0, 6]},
    "level -1": {"actions": [0, np.int64(-1)]},
    "level 2**70": {"actions": [0, 2**70]},
    "reward 10**400": {"rewards": [0, 10**400]},
    "nan states": {"states": [np.full((6, 6), np.nan, np.float32)] * 2},
    "states beyond float32": {"states": [np.full((6, 6), 1e300)] * 2},
    "states of another shape": {"states": [np.zeros((6, 8), np.float32)] * 2},
    "states of integers": {"states": [np.zeros((6, 6), np.int32)] * 2},
    "one state for all": {"states": np.zeros((2, 6, 6), np.float32)},
}
"""What is wrong with a list of the original's pool."""
HOSTILE: dict[str, bytes] = {
    **{name: upstream_pickle(**(GOOD | change)) for name, change in CHANGED.items()},
    "os.system": pickle.dumps({"states": Call(os.system, "echo run > /dev/null")}),
    "builtins.eval": pickle.dumps(Call(builtins.eval, "1"), protocol=2),
    "nested reduce": pickle.dumps(Call(list, [Call(map, eval, ["1"])])),
    "the class called": b"cplm_special.data.exp_pool\nExperiencePool\n)R.",
    "10 GB of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10 * 2**30) + b"x.",
    "10 GB of text": b"\x80\x04\x8d" + struct.pack("<Q", 10 * 2**30) + b"x.",
    "10 GB of bytearray": b"\x80\x05\x96" + struct.pack("<Q", 10 * 2**30) + b"x.",
    "2 GB of bytes": b"\x80\x04B" + struct.pack("<I", 2**31) + b"x.",
    "10 GB frame": b"\x80\x04\x95" + struct.pack("<Q", 10 * 2**30) + b"].",
    "huge LONG": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "negative LONG": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
    "huge LONG in text": b"L" + b"9" * 100_000 + b"L\n.",
    "memo slot": b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b".",
    "lists in lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples in tuples": b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "marks in marks": b"\x80\x04" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "deep pairs": b"\x80\x04)" + b"N\x86" * 50_000 + b".",
    "deep pairs as a key": with_body(b"})", b"N\x86" * 50_000, b"Ns"),
    "memo bomb of lists": with_lists(states=LIST_BOMB),
    "memo bomb as a list": with_body(b"}", STATE, LIST_BOMB, b"s"),
    "memo bomb as a key": with_body(b"}", TUPLE_BOMB, b"Ns"),
    "memo bomb as a shape": with_lists(states=ARRAY + b"(K\x01" + TUPLE_BOMB + DTYPE + b"\x89C\x00tb"),
    "memo bomb as a level": with_lists(actions=TUPLE_BOMB),
    "memo bomb as a reward": with_lists(rewards=LIST_BOMB),
    "memo bomb as a number type": with_lists(rewards=DTYPE_NAME + TUPLE_BOMB + b"\x89\x88\x87R"),
    "memo bomb as a name": b"\x80\x04" + TUPLE_BOMB + text(b"x") + b"\x93.",
    "persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "persistent id in text": b"Pabc\n.",
    "extension code 1": b"\x80\x02\x82\x01.",
    "extension code 2": b"\x80\x02\x83\x01\x00.",
    "extension code 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "old instance": b"(ios\nsystem\n.",
    "old object": b"(cos\nsystem\no.",
    "newobj_ex": b"\x80\x04" + text(b"plm_special.data.exp_pool") + text(b"ExperiencePool") + b"\x93)}\x92.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "negative shape": with_state_of(-1, -36, bytes(144)),
    "huge shape": with_state_of(2**31 - 1, 2**31 - 1, b""),
    "huge dtype": with_body(text(b"numpy") + text(b"dtype") + b"\x93" + text(b"S2000000000") + b"\x89\x88\x87R"),
    "array without data": with_lists(states=ARRAY),
    "pool in a pool": with_lists(states=with_lists()[2:-1]),
    "list that holds itself": with_lists(actions=b"q\x00h\x00"),
    "state before the pool": b"\x80\x04}b.",
    "nothing but stop": b".",
    "no stop": pickle.dumps(GOOD)[:-1],
    "two objects": b"\x80\x04]].",
    "missing done": upstream_pickle(**{name: values for name, values in GOOD.items() if name != "dones"}),
    # the costliest opcodes there are, and nothing else: memory in proportion to the file
    **{f"many {opcode!r}": b"\x80\x04" + opcode * 2**17 + b"." for opcode in (b")", b"N", b"K\x00\x85", b"NN\x86", b"(NNt")},
    "much to remember": b"\x80\x04]" + b"\x94" * 2**17 + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pool_is_refused(tmp_path: Path, kind: str) -> None:
    assert_refused(tmp_path / "exp_pool.pkl", HOSTILE[kind])


def test_every_hostile_opcode_is_unknown(tmp_path: Path) -> None:
    """A pool with one more opcode in front, of each kind that Python has, loads only if that opcode is harmless."""
    good, path = upstream_pickle(**GOOD), tmp_path / "exp_pool.pkl"
    for opcode in pickletools.opcodes:
        argument = b"1\n1\n" if opcode.arg and opcode.arg.n == pickletools.UP_TO_NEWLINE else bytes(8)
        argument = {"PROTO": bytes(1), "FRAME": bytes(8)}.get(opcode.name, argument if opcode.arg else b"")
        data = good[:2] + opcode.code.encode("latin1") + argument + good[2:]
        if opcode.name in ("PROTO", "FRAME"):
            path.write_bytes(data)
            assert len(load_pool(path)) == 2
        else:
            assert_refused(path, data)
    path.write_bytes(with_lists())  # the frame of the hostile ones is sound
    assert len(load_pool(path)) == 1


# --- mutated pools ------------------------------------------------------------------------------------------------------


def corpus() -> list[bytes]:
    """Sound pools of a few transitions, in every form."""
    rng = np.random.default_rng(1)
    lists: Any = {
        "states": list(rng.random((5, 6, 6)).astype(np.float32)),
        "actions": [0, np.int64(3), 5, 1, 2],
        "rewards": [*rng.normal(size=3), 1.5, -2],
        "dones": [False, True, False, np.bool_(False), True],
    }
    return [upstream_pickle(protocol, numpy_1, **lists) for protocol in (2, 3, 4, 5) for numpy_1 in (False, True)]


INSERTED = [
    b"cos\nsystem\n", b"X\x02\x00\x00\x00id\x85R", b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R", b"\x8c\x02os\x8c\x06system\x93",
    b"\x82\x01", b"\x97", b"\x8e" + struct.pack("<Q", 10 * 2**30), b"\x8b" + struct.pack("<i", 2**31 - 1), b"(" * 50, b"]" * 100,
    b"0", b"1", b"2", b"\x85" * 50, b"N\x86" * 50, b"\x81", b"R", b"b", b"s", b"u", b"e", b"a", b"t", b"Q", b"\x92",
    b"r\xff\xff\xff\xff", b"h\x00", b"h\x05", b"h\x0c", b"\x94", b"}", b".",
]  # fmt: skip


def mutate(rng: random.Random, base: bytes, others: list[bytes]) -> bytes:
    """One to four random changes."""
    data = bytearray(base)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:  # a bit
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:  # the end
                del data[at:]
            case 2 if data:  # an opcode for another
                data[at % len(data)] = ord(rng.choice(pickletools.opcodes).code)
            case 3:  # a piece of another pool
                other = rng.choice(others)
                start = rng.randrange(len(other))
                data[at : at + rng.randrange(60)] = other[start : start + rng.randrange(60)]
            case 4:
                data[at:at] = rng.choice(INSERTED)
            case 5:  # gone
                del data[at : at + rng.randrange(1, 20)]
            case _:  # a number
                data[at : at + 4] = rng.randbytes(4)
    return bytes(data)


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_pools(tmp_path: Path, count: int) -> None:
    path, bases, rng, refused = tmp_path / "exp_pool.pkl", corpus(), random.Random(count), 0
    tracemalloc.start()
    try:
        for _ in range(count):
            path.write_bytes(data := mutate(rng, rng.choice(bases), bases))
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.process_time()
            with watched():
                pool, message = attempt(lambda: load_pool(path), (PoolError,))
            if pool is None:
                refused += 1
                assert message.startswith(str(path))
            else:
                assert np.isfinite(pool.states).all()
                assert set(pool.actions) <= set(range(6))
            assert time.process_time() - started < 5, data
            assert tracemalloc.get_traced_memory()[1] - before < 2**20 + 100 * len(data), data
    finally:
        tracemalloc.stop()
    assert 0.6 * count < refused < 0.99 * count  # a changed number is still a pool
    assert [path.name for path in tmp_path.iterdir()] == ["exp_pool.pkl"]
