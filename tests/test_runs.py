"""Run folders, hashes, atomic writes and locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from netllm_lib import arrays, runs
from netllm_lib.parameters import notebook_run


@dataclass(frozen=True)
class Config:
    rate: float = 0.5
    path: Path = Path("a/b")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_same_work_same_folder(tmp_path: Path) -> None:
    first = runs.open_run("kind", "name", Config(), {"pool": "abc"}, root=tmp_path)
    assert not first.done
    first.finish({"reward": np.float64(0.5), "missing": float("nan"), "inf": float("inf")})
    again = runs.open_run("kind", "name", Config(), {"pool": "abc"}, root=tmp_path)
    assert again.folder == first.folder
    assert again.done
    assert runs.read_json(first.folder / "metrics.json") == {"reward": 0.5, "missing": None, "inf": None}
    assert runs.read_json(first.folder / "config.json") == {"rate": 0.5, "path": "a/b"}
    for config, inputs in ((Config(rate=0.6), {"pool": "abc"}), (Config(), {"pool": "abd"})):
        assert runs.open_run("kind", "name", config, inputs, root=tmp_path).folder != first.folder


def test_hashes_see_content_only(tmp_path: Path) -> None:
    assert runs.content_hash({"a": 1, "b": 2}) == runs.content_hash({"b": 2, "a": 1}) != runs.content_hash({"a": 1})
    a = np.arange(6)
    assert arrays.array_hash(a) != arrays.array_hash(a.reshape(2, 3)) != arrays.array_hash(a.astype(np.int32))
    assert arrays.array_hash(a.reshape(2, 3).T) == arrays.array_hash(a.reshape(2, 3).T.copy())
    for name in ("one", "two"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "file").write_text("same")
    assert runs.tree_hash(tmp_path / "one") == runs.tree_hash(tmp_path / "two")
    (tmp_path / "two" / "x" / "file").write_text("other")
    assert runs.tree_hash(tmp_path / "one") != runs.tree_hash(tmp_path / "two")


def test_a_walk_over_a_mapped_array_gives_its_pages_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(4_000_000)  # 32 MB
    values.tofile(tmp_path / "values")
    mapped = np.memmap(tmp_path / "values", np.float64, "r")
    assert arrays.array_hash(mapped) == arrays.array_hash(values)
    assert sum(part.sum() for _, part in arrays.blocks(mapped)) == pytest.approx(values.sum())
    maps = Path("/proc/self/smaps")
    if maps.exists():  # how much of the map is in memory now
        after = maps.read_text().split(str(tmp_path / "values"), 1)[1]
        assert int(after.split("Rss:", 1)[1].split()[0]) == 0


def write_folder(path: Path, content: str) -> None:
    with runs.atomic_path(path) as aside:
        aside.mkdir()
        (aside / content).touch()


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "f.json", 1)
    with pytest.raises(RuntimeError, match="half"), runs.atomic_path(tmp_path / "f.json") as aside:
        aside.write_text("half")
        raise RuntimeError("half")
    assert runs.read_json(tmp_path / "f.json") == 1
    write_folder(tmp_path / "folder", "new")
    write_folder(tmp_path / "folder", "newer")
    assert names(tmp_path / "folder") == ["newer"]
    assert names(tmp_path) == ["f.json", "folder"]
    (tmp_path / "f.json").write_text("{")
    with pytest.raises(ValueError, match="f.json: not valid JSON"):
        runs.read_json(tmp_path / "f.json")


# --- one process at a time ----------------------------------------------------------------------------------------------


def python(code: str) -> subprocess.Popen[str]:
    """Another process, which writes with our library."""
    command = [
        sys.executable,
        "-c",
        "import os, pathlib, signal\nfrom netllm_lib import runs\n" + textwrap.dedent(code),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=runs.PROJECT)


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock on `path` until its input is closed."""
    process = python(f"""
        with runs.lock(pathlib.Path({str(path)!r})):
            print("holding", flush=True)
            input()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def refused(path: Path, pid: int) -> bool:
    with pytest.raises(runs.Busy) as busy, runs.lock(path):
        pass
    return str(busy.value) == f"{path}: process {pid} is writing it; wait until it is done, or end that process"


def test_a_second_process_is_told_who_is_first_until_that_ends(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    assert refused(tmp_path / "run", first.pid)
    with runs.lock(tmp_path / "another run"):
        pass
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert names(tmp_path) == [".run.lock"]
    with runs.lock(tmp_path / "run"):
        assert refused(tmp_path / "run", os.getpid())  # not twice in one process either
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_locks_of_the_system_nothing_is_written_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(runs.StorageError, match=r"has no locks.*set \$NETLLM_SOFT_LOCKS"), runs.lock(tmp_path / "run"):
        pass
    assert names(tmp_path) == []
    monkeypatch.setenv("NETLLM_SOFT_LOCKS", "1")
    with runs.lock(tmp_path / "run"):
        assert refused(tmp_path / "run", os.getpid())
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "", "a\nb", "x" * 300, "-p", "a\\b"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    """One check for runs, and so for notebooks and imports, and for pipelines, steps and sweeps, see their tests."""
    for kind, run in ((name, "run"), ("kind", name)):
        with pytest.raises(ValueError, match="needs a letter or digit first"):
            runs.open_run(kind, run, {}, root=tmp_path)
    assert names(tmp_path) == []


def killed_while_writing(path: Path) -> None:
    """A process that is killed before its last rename; an old folder is then moved away and the new one not in place."""
    process = python(f"""
        path, rename = pathlib.Path({str(path)!r}), os.replace
        os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if str(b) == str(path) else rename(a, b)
        with runs.atomic_path(path) as aside:
            aside.mkdir()
            (aside / "x").write_text("new")
    """)
    assert process.wait() == -signal.SIGKILL


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    """When the path, or the folder that it lies in, is next locked; what is written beside it stays."""
    path = tmp_path / "folder"
    with runs.atomic_path(tmp_path / "other") as other:
        other.touch()
        killed_while_writing(path)
        with runs.lock(path):
            assert names(tmp_path) == [".folder.lock", other.name]
            write_folder(path, "old")
        killed_while_writing(path)
        assert not path.exists()
        with runs.lock(path):
            assert names(path) == ["old"]
        killed_while_writing(path / "inner")
        with runs.lock(path):
            assert names(path) == ["old"]
    assert names(tmp_path) == ["folder", "other"]


# --- full and read-only disks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "torch", "safetensors"])
def test_a_full_disk_leaves_the_old_content(small_disk: Path, kind: str) -> None:
    import torch
    from safetensors.numpy import save_file

    target, data = small_disk / "f", np.zeros(2**21, np.uint8)
    target.write_text("old")
    writers: dict[str, Callable[[Path], object]] = {
        "bytes": lambda aside: aside.write_bytes(data.tobytes()),
        "torch": lambda aside: torch.save({"data": torch.from_numpy(data)}, aside),
        "safetensors": lambda aside: save_file({"data": data}, aside),
    }
    with (
        pytest.raises(runs.StorageError, match=f"^{small_disk}: the disk is full.*"),
        runs.atomic_path(target) as aside,
    ):
        writers[kind](aside)
    assert names(small_disk) == ["f"]
    assert target.read_text() == "old"


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    runs.write_json(small_disk / "f.json", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    attempts: tuple[Callable[[], object], ...] = (
        lambda: runs.write_json(small_disk / "f.json", 2),
        lambda: runs.open_run("kind", "name", {}, root=small_disk),
        lambda: notebook_run(str(small_disk / "new"), "x"),
        lambda: runs.lock(small_disk / "run").__enter__(),
    )
    for attempt in attempts:
        with pytest.raises(runs.StorageError, match=f"^{small_disk}.*cannot be written to; make it writable"):
            attempt()
    assert runs.read_json(small_disk / "f.json") == 1


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")])
def test_errors_of_the_disk_in_one_line(tmp_path: Path, code: int, message: str) -> None:
    runs.write_json(tmp_path / "f.json", 1)
    with pytest.raises(runs.StorageError, match=f"^{tmp_path}: .*{message}"), runs.atomic_path(tmp_path / "f.json"):
        try:
            raise OSError(code, os.strerror(code))
        finally:
            raise ValueError("and then it could not be closed")
    with pytest.raises(PermissionError), runs.atomic_path(tmp_path / "f.json"):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/else")  # no matter of this folder
    assert runs.read_json(tmp_path / "f.json") == 1
    assert names(tmp_path) == ["f.json"]


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_latest_is_the_last_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run that notebook first"):
        runs.latest("05_test")
    for name in ("first", "second", "broken", "started"):
        run = notebook_run(str(tmp_path / "runs" / "05_test" / name), "05_test")
        if name != "started":
            run.finish({})
    (tmp_path / "runs" / "05_test" / "broken" / runs.MANIFEST).write_text("[]")
    os.utime(tmp_path / "runs" / "05_test" / "first" / runs.MANIFEST)  # a copy changes times
    assert runs.latest("05_test").name == "second"
    assert not notebook_run(str(tmp_path / "runs" / "05_test" / "second"), "05_test").done  # it is written again
    assert runs.latest("05_test").name == "first"


def test_a_run_names_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    pool = runs.open_run("03_experience_pool", "demo", {})
    elsewhere = tmp_path / "checkpoint"
    run = notebook_run("", "05_test", pool=pool.folder, training=str(elsewhere), test="")
    assert run.folder == tmp_path / "reports" / "runs" / "05_test" / "interactive"
    assert run.parents == {"pool": pool.folder, "training": elsewhere}
    (tmp_path / "reports").rename(tmp_path / "moved")
    moved = runs.Run(tmp_path / "moved" / "runs" / "05_test" / "interactive")
    assert moved.parents["pool"] == tmp_path / "moved" / pool.folder.relative_to(tmp_path / "reports")
    assert runs.Run(tmp_path).parents == {}
    runs.write_json(moved.folder / runs.MANIFEST, {"parents": ["x"]})
    with pytest.raises(ValueError, match="not a run's manifest"):
        moved.parents  # noqa: B018
