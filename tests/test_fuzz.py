"""Files that come back as they were written, and files that nobody should trust: mutated, truncated, made to harm.

Whatever is in a file, reading it either works or raises the project's own error with the file's name; nothing in it is
executed, and it costs neither much time nor much memory.
"""

from __future__ import annotations

import builtins
import json
import os
import pickle
import pickletools
import random
import shutil
import struct
import sys
import time
import tracemalloc
import zipfile
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
from netllm_lib.abr.traces import read_trace, read_trace_set
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
    if event in (
        "import",
        "exec",
        "compile",
        "marshal.loads",
        "pickle.find_class",
        "open",
        "socket.connect",
    ) or event.startswith(("os.", "subprocess.", "shutil.", "ctypes.")):
        _seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[None]:
    """Fails if the block imports, compiles, executes, unpickles a name, writes, connects or starts anything."""
    global _seen
    seen: list[str] = []
    _seen = seen
    try:
        yield
    finally:
        _seen = None
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
        assert time.process_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < memory + 100 * len(data)
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# --- round trips --------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> ExperiencePool:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = sum(lengths)
    dones = np.zeros(count, dtype=bool)
    dones[np.cumsum(lengths) - 1] = True
    number: dict[str, Any] = {"allow_nan": False, "allow_infinity": False}
    return ExperiencePool(
        draw(npst.arrays(np.float32, (count, 6, 6), elements=st.floats(width=32, **number))),
        draw(npst.arrays(np.int64, count, elements=st.integers(0, 5))),
        draw(npst.arrays(np.float64, count, elements=st.floats(**number))),
        dones,
    )


@quick
@given(pools())
def test_any_pool_comes_back_from_both_formats(tmp_path: Path, pool: ExperiencePool) -> None:
    assert load_pool(pool.save(tmp_path / "pool")).content_hash() == pool.content_hash()
    path = write_pool(pool, tmp_path / "pool.pkl")
    with watched():
        assert load_pool(path).content_hash() == pool.content_hash()


@quick
@given(pools(), st.integers(2, 5), st.booleans())
def test_any_pool_of_the_original_is_read(tmp_path: Path, pool: ExperiencePool, protocol: int, numpy_1: bool) -> None:
    path = tmp_path / "exp_pool.pkl"
    path.write_bytes(upstream_pickle(protocol, numpy_1, **lists_of(pool)))
    with watched():
        read = load_pool(path)
    assert read.content_hash() == pool.content_hash()


@quick
@given(pools())
def test_the_original_reads_what_is_written(tmp_path: Path, pool: ExperiencePool) -> None:
    """With Python's own unpickler and the original's class, as the original does it."""
    path = write_pool(pool, tmp_path / "exp_pool.pkl")
    with original_class() as cls:
        record: Any = pickle.loads(path.read_bytes())
    assert type(record) is cls
    expected = lists_of(pool)
    assert set(vars(record)) == set(expected)
    assert [type(a) for a in record.actions] == [int] * len(pool)
    assert [type(d) for d in record.dones] == [bool] * len(pool)
    for name, values in expected.items():
        np.testing.assert_array_equal(np.array(getattr(record, name)), np.array(values))
        assert np.array(getattr(record, name)).dtype == np.array(values).dtype


seconds = st.floats(0.01, 1e3, allow_nan=False)
rates = st.floats(0, 1e4, allow_nan=False)


@quick
@given(st.lists(st.tuples(seconds, rates), min_size=2, max_size=12), st.sampled_from([" ", "\t", "  "]), st.booleans())
def test_any_trace_comes_back(tmp_path: Path, samples: list[tuple[float, float]], space: str, blank: bool) -> None:
    times, mbps = np.cumsum([gap for gap, _ in samples]), np.array([rate for _, rate in samples])
    times -= times[0]
    mbps[-1] += 10  # enough for a chunk
    path = tmp_path / "trace"
    text = ("\n\n" if blank else "\n").join(
        f"{t!r}{space}{m!r}" for t, m in zip(times.tolist(), mbps.tolist(), strict=True)
    )
    path.write_text(text)
    trace = read_trace(path)
    np.testing.assert_array_equal(trace.time_s, times)
    np.testing.assert_array_equal(trace.mbps, mbps)


@quick
@given(st.data())
def test_a_mutated_trace_is_read_or_refused_by_file_and_line(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(b"".join(b"%.3f %.4f\n" % (0.5 * i, 1 + i % 3) for i in range(8)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        text[start : start + data.draw(st.integers(0, 6))] = data.draw(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from([b"nan", b"inf", b"-", b"1e400", b"1_0", b"\n", b"\x00", b" 1", b"9" * 5000]),
            )
        )
    path = tmp_path / "trace"
    path.write_bytes(text)
    trace, message = attempt(lambda: read_trace(path))
    if trace is None:
        assert message.startswith(f"{path}:")
        line = message.removeprefix(f"{path}:").partition(":")[0]
        if not any(reason in message for reason in ("empty trace", "it begins at", "no chunk")):  # of the whole file
            assert 1 <= int(line) <= len(text.decode(errors="replace").splitlines())
        return
    assert np.isfinite(trace.time_s).all()
    assert (np.diff(trace.time_s) > 0).all()
    assert (trace.mbps >= 0).all()
    assert trace.mbps[1:].any()


# --- start pointers -----------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 2), min_size=1, max_size=4), st.integers(0, 5), st.data())
def test_mutated_pointer_files_are_read_or_refused(
    tmp_path: Path, pointers: list[int], protocol: int, data: st.DataObject
) -> None:
    folder = tmp_path / str(len(pointers))
    folder.mkdir(exist_ok=True)
    for i in range(len(pointers)):
        (folder / f"t{i}").write_text("0 1\n1 2\n2 3\n")
    path = folder / "mahimahi_ptrs.pkl"
    path.write_bytes(original := pickle.dumps(pointers, protocol=protocol))
    with watched():
        read = read_trace_set(folder).start_ptrs
    assert read is not None
    assert read.tolist() == pointers
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(mutated[: data.draw(st.integers(0, len(mutated)))] if data.draw(st.booleans()) else mutated))
    with watched():
        read, message = attempt(lambda: read_trace_set(folder).start_ptrs)
    assert message.startswith(str(path)) if read is None else set(read.tolist()) <= {1, 2}


def test_hostile_pointer_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("0 1\n1 2\n2 3\n")
    path = tmp_path / "mahimahi_ptrs.pkl"
    for data in (
        pickle.dumps([Call(os.system, "echo")]),
        b"\x80\x04" + b"]" * 100_000 + b".",
        b"\x80\x04]\x8e" + struct.pack("<Q", 10 * 2**30) + b"x.",
        b"\x80\x02]\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01a.",
        b"(lI" + b"9" * 10_000 + b"\na.",
        b"(lI01\na.",
        b"\x80\x02](K\x01K\x01e",
        b"",
    ):
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


HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps({"states": Call(os.system, "echo run > /dev/null")}),
    "builtins.eval": pickle.dumps(Call(builtins.eval, "1"), protocol=2),
    "nested reduce": pickle.dumps(Call(list, [Call(map, eval, ["1"])])),
    "class with __setstate__": upstream_pickle(**(GOOD | {"actions": [WithState(), WithState()]})),
    "reduce with a state": upstream_pickle(**(GOOD | {"dones": Call(list, [True], state={"a": 1})})),
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
    "object arrays": upstream_pickle(**(GOOD | {"states": [np.full((6, 6), os.system, dtype=object)] * 2})),
    "structured arrays": upstream_pickle(**(GOOD | {"states": [np.zeros((6, 6), "f4,i4")] * 2})),
    "dates": upstream_pickle(**(GOOD | {"rewards": list(np.zeros(2, "M8[s]"))})),
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
    "levels as text": upstream_pickle(**(GOOD | {"actions": ["0", "1"]})),
    "level 6": upstream_pickle(**(GOOD | {"actions": [0, 6]})),
    "level -1": upstream_pickle(**(GOOD | {"actions": [0, np.int64(-1)]})),
    "level 2**70": upstream_pickle(**(GOOD | {"actions": [0, 2**70]})),
    "reward 10**400": upstream_pickle(**(GOOD | {"rewards": [0, 10**400]})),
    "nan states": upstream_pickle(**(GOOD | {"states": [np.full((6, 6), np.nan, np.float32)] * 2})),
    "states beyond float32": upstream_pickle(**(GOOD | {"states": [np.full((6, 6), 1e300)] * 2})),
    "states of another shape": upstream_pickle(**(GOOD | {"states": [np.zeros((6, 8), np.float32)] * 2})),
    "states of integers": upstream_pickle(**(GOOD | {"states": [np.zeros((6, 6), np.int32)] * 2})),
    "one state for all": upstream_pickle(**(GOOD | {"states": np.zeros((2, 6, 6), np.float32)})),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pool_is_refused(tmp_path: Path, kind: str) -> None:
    assert_refused(tmp_path / "exp_pool.pkl", HOSTILE[kind])


def test_the_hostile_pools_are_sound_but_for_one_thing(tmp_path: Path) -> None:
    path = tmp_path / "exp_pool.pkl"
    path.write_bytes(with_lists())
    assert len(load_pool(path)) == 1


def test_every_hostile_opcode_is_unknown(tmp_path: Path) -> None:
    """A pool with one more opcode in front, of each kind that Python has, loads only if that opcode is harmless."""
    good = upstream_pickle(**GOOD)
    path = tmp_path / "exp_pool.pkl"
    harmless = {"PROTO", "FRAME"}
    for opcode in pickletools.opcodes:
        argument = b"1\n1\n" if opcode.arg and opcode.arg.n == pickletools.UP_TO_NEWLINE else bytes(8)
        data = good[:2] + opcode.code.encode("latin1") + (argument if opcode.arg else b"") + good[2:]
        if opcode.name in harmless:
            path.write_bytes(
                good[:2] + opcode.code.encode("latin1") + bytes(1 if opcode.name == "PROTO" else 8) + good[2:]
            )
            assert len(load_pool(path)) == 2
        else:
            assert_refused(path, data)


def test_large_files_need_memory_in_proportion(tmp_path: Path) -> None:
    """The costliest opcodes there are, and nothing else."""
    count, path = 2**15, tmp_path / "exp_pool.pkl"
    for body in (
        b")" * count,
        b"N" * count,
        b"K\x00\x85" * count,
        b"NN\x86" * count,
        b"]" + b"\x94" * count,
        b"(NNt" * count,
        b"]" * count,
    ):
        path.write_bytes(data := b"\x80\x04" + body + b".")
        tracemalloc.start()
        try:
            with pytest.raises(PoolError):
                load_pool(path)
            assert tracemalloc.get_traced_memory()[1] < 100 * len(data)
        finally:
            tracemalloc.stop()


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


def fuzz(count: int, seed: int, path: Path) -> tuple[int, int]:
    """(refused, read) of `count` mutated pools."""
    bases, rng = corpus(), random.Random(seed)
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(count):
            data = mutate(rng, rng.choice(bases), bases)
            path.write_bytes(data)
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
            assert time.process_time() - started < 1, data
            assert tracemalloc.get_traced_memory()[1] - before < 2**20 + 100 * len(data), data
    finally:
        tracemalloc.stop()
    return refused, count - refused


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_pools(tmp_path: Path, count: int) -> None:
    refused, read = fuzz(count, count, tmp_path / "exp_pool.pkl")
    assert refused > 0.6 * count
    assert read > 0.01 * count  # a changed number is still a pool
    assert [path.name for path in tmp_path.iterdir()] == ["exp_pool.pkl"]


# --- checkpoints --------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "ours": ("adapter_model.safetensors", "modules.safetensors"),
    "theirs": ("adapter_model.bin", "modules_except_plm.bin"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `ours` and `theirs` with the same small policy."""
    from llm_fixtures import tiny_network, toy_pool
    from netllm_lib.abr.batches import pool_returns
    from netllm_lib.abr.model import PolicySettings
    from netllm_lib.abr.upstream.checkpoints import save_upstream_checkpoint
    from netllm_lib.checkpoint import describe, save_checkpoint

    root, network = tmp_path_factory.mktemp("checkpoints"), tiny_network(rank=2, layers=1)
    _, scale = pool_returns(toy_pool())
    save_checkpoint(root / "ours", network, describe(network, PolicySettings(20, scale)))
    save_upstream_checkpoint(root / "theirs", network)
    return root


def load_again(folder: Path) -> Any:
    from llm_fixtures import toy_pool
    from netllm_lib.abr.batches import pool_returns
    from netllm_lib.abr.model import load_policy
    from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint
    from netllm_lib.plm import PLMConfig

    if folder.name == "ours":
        return load_policy(folder)[0]
    return load_upstream_checkpoint(folder, PLMConfig("tiny-llama", layers=1), pool_returns(toy_pool())[1])[0]


def fuzz_weights(checkpoints: Path, folder: Path, count: int) -> None:
    """Mutated files are refused by name, or hold the very numbers that were saved."""
    import torch

    original = load_again(checkpoints / folder.name).state_dict()
    rng = random.Random(4)
    for name in ADAPTERS[folder.name]:
        shutil.copytree(checkpoints / folder.name, folder, dirs_exist_ok=True)
        data = (folder / name).read_bytes()
        head = 600 if folder.name == "ours" else len(data)
        for _ in range(count):
            at = rng.randrange(1, len(data)) if rng.random() < 0.5 else rng.randrange(1, head)
            mutated = bytearray(data)
            mutated[at] ^= 1 << rng.randrange(8)
            if rng.random() < 0.3:
                mutated = bytearray(mutate(rng, data, [data]))
            (folder / name).write_bytes(mutated)
            network, message = attempt(lambda: load_again(folder))
            if network is None:
                assert name in message
            else:
                assert all(torch.equal(value, original[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_mutated_weights(checkpoints: Path, tmp_path: Path, kind: str, count: int) -> None:
    fuzz_weights(checkpoints, tmp_path / kind, count)


VALUES = [None, -1, 0, 10**12, 10**400, 1.5, -0.5, "", "x", True, [], {}, [None], {"a": 1}]


def fuzz_config(checkpoints: Path, folder: Path, file: str, count: int) -> int:
    """Configs with a value replaced, or with damaged text, are refused, or make a network; how many were refused."""
    shutil.copytree(checkpoints / folder.name, folder)
    text = (folder / file).read_text()
    rng, refused = random.Random(5), 0
    for _ in range(count):
        values = json.loads(text)
        target = rng.choice([values, *(values[key] for key in ("plm", "network", "scale") if key in values)])
        target[rng.choice([*target, "unknown"])] = rng.choice(VALUES)
        mutated = json.dumps(values).encode() if rng.random() < 0.7 else mutate(rng, text.encode(), [text.encode()])
        (folder / file).write_bytes(mutated)
        network, message = attempt(lambda: load_again(folder), (ValueError, FileNotFoundError))
        if network is None:
            refused += 1
            assert str(folder) in message or "no PLM" in message
    return refused


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "file"), [("ours", "config.json"), ("ours", "adapter_config.json"), ("theirs", "adapter_config.json")]
)
def test_mutated_configs(checkpoints: Path, tmp_path: Path, kind: str, file: str, count: int) -> None:
    assert fuzz_config(checkpoints, tmp_path / kind, file, count) > 0.25 * count


@pytest.mark.parametrize(
    ("reduce", "reason"),
    [
        ((bytearray, (10**10,)), "bytearray"),
        ((os.system, ("echo run > /dev/null",)), "system"),
        ((eval, ("1",)), "eval"),
        ((set, ([1],)), "set"),
    ],
)
def test_bins_name_nothing_but_tensors(checkpoints: Path, tmp_path: Path, reduce: tuple[Any, ...], reason: str) -> None:
    folder = Path(shutil.copytree(checkpoints / "theirs", tmp_path / "theirs"))
    replace_pickle(folder / "adapter_model.bin", pickle.dumps({"w": Call(reduce[0], *reduce[1])}, protocol=2))
    with pytest.raises(ValueError, match=rf"adapter_model\.bin.*{reason}"):
        load_again(folder)


def replace_pickle(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Put other opcodes into a PyTorch file, with a checksum that fits."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)


def test_packed_bins_and_wrong_checksums(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "theirs", tmp_path / "theirs"))
    path = folder / "modules_except_plm.bin"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        member = next(m for m in archive.infolist() if m.filename.endswith("/data/0"))
        number = member.header_offset + 30 + len(member.filename) + 200
    replace_pickle(path, pickled, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"modules_except_plm\.bin.*packed"):
        load_again(folder)
    path.write_bytes(whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :])
    with pytest.raises(ValueError, match=r"modules_except_plm\.bin.*CRC"):
        load_again(folder)
    path.write_bytes(whole)
    load_again(folder)


def test_weights_of_another_checkpoint_are_noticed(checkpoints: Path, tmp_path: Path) -> None:
    """The right keys and shapes with other numbers: a file copied from another run."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoints / "ours", tmp_path / "ours"))
    path = folder / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not the file that was saved"):
        load_again(folder)
