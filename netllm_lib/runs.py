"""Run folders: named by their content, described by a manifest, written whole or not at all.

A run folder is `reports/runs/<kind>/<name>-<hash>/`, where the hash covers the configuration and the hashes of all inputs.
The same work therefore lands in the same folder: it is reused when it is finished, resumed when it is not, and nothing is
ever overwritten by a different run. Its manifest names its parents: the runs that it was made from.
"""

from __future__ import annotations

import codecs
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import filelock
import numpy as np
import psutil

PROJECT = Path(__file__).resolve().parents[1]
"""The checkout: bundled data, notebooks and the default reports folder are found from here."""

MANIFEST, METRICS = "manifest.json", "metrics.json"
MOST_BYTES = 200_000_000  # of a file that is read at once


SPIN = "10000"
"""$GOMP_SPINCOUNT for what runs PyTorch: how long (in turns) a waiting OpenMP thread keeps its core. By default it is 30 times as
long, and then one other busy process on a small machine slows training more than six times; so it is two to three times, at 2 to
5 % without one."""


def reports_root() -> Path:
    """`$NETLLM_REPORTS`, or `reports/` of the checkout."""
    return Path(os.environ.get("NETLLM_REPORTS") or PROJECT / "reports")


def cache_root() -> Path:
    """`$NETLLM_CACHE`, or `data/cache/` of the checkout: what can be made again, but takes long to make."""
    return Path(os.environ.get("NETLLM_CACHE") or PROJECT / "data" / "cache")


def plain(value: Any, finite: bool = True) -> Any:
    """`value` as JSON types: dataclasses to dicts, paths to strings, NumPy scalars and arrays to numbers and lists.

    NaN and infinity, which JSON does not have, become None unless `finite` is False.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, finite) for item in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity become null."""
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises ValueError for a pipe or device, which may never end, and for more than `most` bytes."""
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a file")
    if found.st_size > most:
        raise ValueError(f"{path}: {found.st_size} bytes, more than such a file can have")
    return Path(path).read_bytes()


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file, see `decoded`. Errors as of `read_bytes`."""
    return decoded(read_bytes(path, most))


def decoded(data: bytes) -> str:
    """Text with single line ends, from UTF-8, or from UTF-16 with its mark, as PowerShell's `>` writes it.

    Bytes of other encodings become marks of replacement, which no reader takes for a number.
    """
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if marked else "utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises FileNotFoundError or ValueError (with the file's name)."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:  # not text, not JSON, nested without end
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def first_line(error: Exception) -> str:
    """The first line of an error, without the name and password of an address in it; its type where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"//[^/@\s]*@", "//", line)[:200]


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_json`, with a checksum, for what decides a result when `read_sealed` reads it back."""
    known = plain(value)
    write_json(path, {**known, "checksum": content_hash(known, 16)})


def read_sealed(path: Path, remedy: str) -> Any:
    """What `write_sealed`, or an earlier version without a checksum, wrote. Raises ValueError, with `remedy`, if it is damaged."""
    try:
        value = read_json(path)
        checksum = value.pop("checksum", None) if isinstance(value, dict) else None
        if checksum not in (None, content_hash(value, 16)):
            raise ValueError(f"{path}: damaged, its checksum is wrong")
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    return value


def content_hash(value: Any, digits: int = 10) -> str:
    """Hex digest of any JSON-like value, independent of key order."""
    text = json.dumps(plain(value, finite=False), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def file_hash(path: Path, digits: int = 16) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:digits]


def tree_hash(folder: Path, pattern: str = "**/*") -> str:
    """Hex digest of every file under `folder` that matches, by relative path and bytes; byte-code caches are ignored."""
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file() and "__pycache__" not in path.parts]
    text = "".join(f"{path.relative_to(folder)}\0{file_hash(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- atomic writes ------------------------------------------------------------------------------------------------------

ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.(?P<kind>partial|old)")
"""A name beside a file or folder that is being written."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the place of `path` only when the block ends without an error.

    The block may create a file, or a folder that replaces an existing one. All is flushed to disk before this returns, so a crash
    leaves the old content or the new one; what a killed process left beside it goes when the path is next locked. Raises
    StorageError when the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        old = aside.with_suffix(".old")
        try:
            yield aside
            for written in [aside, *aside.rglob("*")]:
                flush(written)
            if aside.is_dir() and path.is_dir():
                os.replace(path, old)
            os.replace(aside, path)
            flush(path.parent)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            _remove(aside)
            _remove(old)


def flush(path: Path) -> None:
    """Make a file, or what was renamed or created in a folder, last through a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean(folder: Path, name: str = "") -> None:
    """Remove what killed processes left of writing `name`, or anything, in a folder; a folder that was moved aside comes back."""
    for entry in os.listdir(folder):
        if (match := ASIDE.fullmatch(entry)) and name in ("", match["name"]):
            if match["kind"] == "old" and not (folder / match["name"]).exists():
                os.replace(folder / entry, folder / match["name"])
            _remove(folder / entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class StorageError(OSError):
    """The disk is full, or a folder cannot be written to. The message names the folder; nothing that was there is lost."""


FULL = "the disk is full; what was there before is unchanged, free some space and run the same again"
NO_LOCKS = "this disk has no locks, so two processes could write the same files: name another folder, or set $NETLLM_SOFT_LOCKS"
CLOSED = "this folder cannot be written to; make it writable, or name another one (for runs in $NETLLM_REPORTS)"


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Errors of a full or unwritable disk inside the block, as one StorageError that names `folder` and says what to do."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # what failed later because of it may have come on top
            if problem := _storage_problem(cause, folder):
                raise StorageError(f"{folder}: {problem}") from error
            cause = cause.__cause__ or cause.__context__
        raise


def _storage_problem(error: BaseException, folder: Path) -> str:
    """`FULL`, `CLOSED`, or nothing. Libraries in C++ and Rust raise errors of their own, which only say it in words."""
    text, code = str(error), getattr(error, "errno", None)
    denied = isinstance(error, PermissionError) and Path(os.fsdecode(error.filename or "/")).is_relative_to(folder)
    if denied or code == errno.EROFS or "Read-only file system" in text:
        return CLOSED
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return FULL
    cut = isinstance(error, RuntimeError) and ("write failed" in text or "iostream error" in text)  # PyTorch's
    return FULL if cut and shutil.disk_usage(folder).free < 2**20 else ""


class Busy(OSError):
    """Another process is writing the same files. The message names them and the process."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process at a time is inside this block for `path`, a run folder or a single file.

    A second one gets `Busy` at once, in one line that names the path and the process that has it. The lock is the system's, on
    a file beside `path`, and ends with its process, however that ends. Whoever gets it removes what killed processes have
    left half-written in the folder, or beside the file.
    """
    path = Path(path).absolute()
    beside = path.with_name(f".{path.name}.lock")
    soft = bool(os.environ.get("NETLLM_SOFT_LOCKS"))
    # a few tries: another process may be removing the file just now
    held = filelock.FileLock(beside, timeout=0.1, fallback_to_soft=soft)
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except filelock.Timeout:
            owner = (beside.read_text().split() if beside.is_file() else []) or ["(unknown)"]
            text = f"{path}: process {owner[0]} is writing it; wait until it is done, or end that process"
            raise Busy(text) from None
        except OSError as error:
            beside.unlink(missing_ok=True)
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise StorageError(f"{path.parent}: {NO_LOCKS}") from None
            raise
    try:
        with suppress(OSError):  # on a full disk the lock holds without
            beside.write_text(f"{os.getpid()}\n")
        _clean(path.parent, path.name)
        if path.is_dir():
            _clean(path)
        yield
    finally:
        # before the lock is released; filelock sees to it that nobody takes a file that is gone
        beside.unlink(missing_ok=True)
        held.release()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder. `folder / "config.json"` says what was asked, `manifest.json` what it was made from and with."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """What the manifest says; nothing where there is none. Raises ValueError for a broken one."""
        path = self.folder / MANIFEST
        found = read_json(path) if path.is_file() else {}
        if not isinstance(found, dict) or not isinstance(found.get("parents", {}), dict):
            raise ValueError(f"{path}: not a run's manifest; make the run again")
        return found

    @property
    def state(self) -> str:
        """ "started", "done", "failed" or "interrupted"; the last also where the process of this machine that began it is gone."""
        found = self.manifest
        begun = found.get("status") == "started" and found.get("host") == content_hash(platform.node())
        lost = begun and found.get("process") not in psutil.pids()
        return "interrupted" if lost else str(found.get("status") or "unknown")

    @property
    def done(self) -> bool:
        """True once `finish` was called: everything that the run promises is in the folder."""
        return self.state == "done"

    @property
    def parents(self) -> dict[str, Path]:
        """The folders that this run was made from, by role: "pool", "training", "test", "sweep"."""
        here, named = self.folder.resolve(), self.manifest.get("parents", {})
        return {role: Path(os.path.normpath(here / str(place))) for role, place in named.items()}

    def note(self, **facts: Any) -> None:
        """Record facts in the manifest; one that is None is removed. `parents` are folders by role, empty ones are left out."""
        if "parents" in facts:
            facts["parents"] = {role: self._from_here(Path(at)) for role, at in facts["parents"].items() if at}
        known = {**self.manifest, **facts}
        write_json(self.folder / MANIFEST, {name: value for name, value in known.items() if value is not None})

    def begin(self, kind: str, name: str, **facts: Any) -> None:
        """Mark the run as started, by this process; a new one gets its name, the time, and what it is made with."""
        new = {} if self.manifest else {"kind": kind, "name": name, "started": _now(), **environment()}
        self.note(**new, **facts, status="started", process=os.getpid(), host=content_hash(platform.node()))

    def finish(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Write `metrics.json` (if given) and mark the run as complete."""
        if metrics is not None:
            write_json(self.folder / METRICS, metrics)
        self.note(status="done", finished=_now())

    def _from_here(self, folder: Path) -> str:
        """A folder of the same reports folder seen from this one, so that both can be moved together; any other one whole."""
        here, there = self.folder.resolve(), folder.resolve()
        together = len(here.parents) > 2 and there.is_relative_to(here.parents[2] / "runs")
        return os.path.relpath(there, here) if together else str(there)


NAME = re.compile(r"\w[\w .,+=@()-]{0,99}")


def check_name(name: str) -> str:
    """The same, if it can be a part of a run folder's name: of a run, a pipeline, a step, a sweep. ValueError if it cannot."""
    if not NAME.fullmatch(name) or len(name.encode()) > 200:
        raise ValueError(
            f"the name {name!r:.60} needs a letter or digit first, then letters, digits, spaces or . , + = @ ( ) - _"
        )
    return name


def run_folder(
    kind: str, name: str, settings: Any, inputs: Mapping[str, str] | None = None, root: Path | None = None
) -> Path:
    """Where `open_run` puts this work; it need not be there."""
    content = content_hash({"config": settings, "inputs": inputs or {}})
    return (root or reports_root()) / "runs" / check_name(kind) / f"{check_name(name)}-{content}"


def open_run(
    kind: str, name: str, settings: Any, inputs: Mapping[str, str] | None = None, root: Path | None = None
) -> Run:
    """The run folder for this work, created if need be; what is not finished in it is this process's from now on.

    `settings` is anything JSON-like or a dataclass; `inputs` maps the name of each input to its content hash. Both decide the
    folder's name; versions, machine and git revision are recorded in the manifest but do not.
    """
    run = Run(run_folder(kind, name, settings, inputs, root))
    if not (run.folder / MANIFEST).exists():
        write_json(run.folder / "config.json", settings)
    if not run.done:
        run.begin(kind, name, inputs=inputs or {})
    return run


def latest(notebook: str) -> Path:
    """The run folder of a notebook that was finished last, by the manifests. Raises FileNotFoundError if there is none."""
    finished = {}
    for path in (reports_root() / "runs" / notebook).glob(f"*/{MANIFEST}"):
        with suppress(OSError, ValueError, TypeError, KeyError, OverflowError):  # broken, or not finished
            finished[datetime.fromisoformat(Run(path.parent).manifest["finished"]).timestamp()] = path.parent
    if not finished:
        where = reports_root() / "runs"
        raise FileNotFoundError(f"no finished run of {notebook} under {where}: run that notebook first")
    return finished[max(finished)]


def environment() -> dict[str, Any]:
    """Versions of all that is installed, machine and git revision, for a manifest. What cannot be found is left out."""
    versions = {str(found.name): found.version for found in importlib.metadata.distributions()}
    about = {
        "python": platform.python_version(),
        "versions": dict(sorted(versions.items())),
        "machine": platform.machine(),
    }
    return {**about, "git": git_revision()}


def git_revision() -> str | None:
    """Commit of the checkout, with "+dirty" when there are uncommitted changes; None outside a checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def headless() -> bool:
    """True under the runner, which sets $NETLLM_HEADLESS: no widgets, as nobody can use them."""
    return bool(os.environ.get("NETLLM_HEADLESS"))


OVERTAKEN = re.compile(r"^(.+): \d+/\d+ .* s, about \d+ s left\n(?=\1: \d+/\d+ )", re.MULTILINE)
"""A line that `progress` printed and the next one of the same label took further."""


def progress(label: str, stream: TextIO | None = None, every_s: float = 5.0) -> Callable[..., None]:
    """A callback `(done, total, info={})` for the library's loops, which prints a line every few seconds, and a last one."""
    started = last = time.monotonic()

    def show(done: int, total: int, info: Mapping[str, Any] | None = None) -> None:
        nonlocal last
        now, loss = time.monotonic(), f"  loss {info['loss']:.3f}" if info and "loss" in info else ""
        if now - last >= every_s or done == total:
            last, left = now, (now - started) / done * (total - done)
            line = f"{label}: {done}/{total}{loss}  {now - started:.0f} s, about {left:.0f} s left"
            print(line, file=stream, flush=True)

    return show
