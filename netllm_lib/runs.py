"""Run folders: named by their content, described by a manifest, written whole or not at all.

A run folder is `reports/runs/<kind>/<name>-<hash>/`, where the hash covers the configuration and the hashes of all inputs.
The same work therefore lands in the same folder: it is reused when it is finished, resumed when it is not, and nothing is
ever overwritten by a different run. Its manifest names its parents: the runs that it was made from.
"""

from __future__ import annotations

import contextlib
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
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import psutil

from netllm_lib import config

PROJECT = Path(__file__).resolve().parents[1]
"""The checkout: bundled data, notebooks and the default reports folder are found from here."""

MANIFEST, METRICS = "manifest.json", "metrics.json"
VERSIONED = ("numpy", "pandas", "numba", "torch", "transformers", "peft", "papermill", "tensorflow-cpu", "tensorflow")


def reports_root() -> Path:
    """`$NETLLM_REPORTS`, or `reports/` of the checkout."""
    return Path(os.environ.get("NETLLM_REPORTS") or PROJECT / "reports")


def cache_root() -> Path:
    """`$NETLLM_CACHE`, or `data/cache/` of the checkout: what can be made again, but takes long to make."""
    return Path(os.environ.get("NETLLM_CACHE") or PROJECT / "data" / "cache")


# --- JSON and hashes ----------------------------------------------------------------------------------------------------


def plain(value: Any, finite: bool = True) -> Any:
    """`value` as JSON types: dataclasses to dicts, paths to strings, NumPy scalars and arrays to numbers and lists.

    NaN and infinity, which JSON does not have, become None unless `finite` is False.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), finite) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, finite) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), finite)
    if isinstance(value, Path):
        return str(value)
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity become null."""
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(plain(value), indent=1, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises FileNotFoundError or ValueError (with the file's name)."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # not text, not JSON, nested without end
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def content_hash(value: Any, digits: int = 10) -> str:
    """Hex digest of any JSON-like value, independent of key order."""
    text = json.dumps(plain(value, finite=False), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def file_hash(path: Path, digits: int = 16) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:digits]


def tree_hash(folder: Path, pattern: str = "**/*", digits: int = 16) -> str:
    """Hex digest of every file under `folder` that matches, by relative path and bytes; byte-code caches are ignored."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob(pattern)):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder)}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()[:digits]


# --- atomic writes ------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the place of `path` only when the block ends without an error.

    The block may create a file, or a folder that replaces an existing one. What it wrote is flushed to disk before the rename and
    the rename before this returns, so a crash leaves the old content or the new one, never a half-written one. What a killed
    process left beside `path` is cleaned up first. Raises StorageError when the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_up(path)
        aside = aside_of(path)
        try:
            yield aside
            for written in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
                flush(written)
            old = aside.with_suffix(".old")
            if aside.is_dir() and path.is_dir():
                os.replace(path, old)
            try:
                os.replace(aside, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            flush(path.parent)
            _remove(old)
        finally:
            _remove(aside)


def aside_of(path: Path) -> Path:
    """A name beside `path` to write to before it takes its place; it says who writes, so that `clean_up` knows what to leave."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def clean_up(path: Path, alone: bool = False) -> None:
    """Remove what killed processes left of writing `path` with `atomic_path`; a folder that one had moved aside comes back.

    What a living process may be writing now stays. Whether one of another machine lives is not known: what it left is removed only
    when the caller is `alone`, by a lock.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(path.parent):
            if not (match := _ASIDE.fullmatch(name)) or match["name"] != path.name:
                continue
            if psutil.pid_exists(int(match["pid"])) if match["host"] == _host() else not alone:
                continue
            if match["kind"] == "old" and not path.exists():
                os.replace(path.parent / name, path)
            else:
                _remove(path.parent / name)


_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|old)")


def flush(path: Path) -> None:
    """Make a file, or what was renamed or created in a folder, last through a crash."""
    with (
        contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext()
    ):  # some systems cannot flush folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return content_hash(platform.node(), 4)


class StorageError(OSError):
    """The disk is full, or a folder cannot be written to. The message names the folder; nothing that was there is lost."""


FULL = "the disk is full; what was there before is unchanged, free some space and run the same again"
UNWRITABLE = "this folder cannot be written to; make it writable, or name another one (for runs in $NETLLM_REPORTS)"


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


def _storage_problem(error: BaseException, folder: Path) -> str | None:
    text = str(error)
    if isinstance(error, PermissionError):
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
        return UNWRITABLE if inside else None
    code = error.errno if isinstance(error, OSError) else None
    if (
        code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text
    ):  # libraries in C++ and Rust raise their words
        return FULL
    if code == errno.EROFS or "Read-only file system" in text:
        return UNWRITABLE
    failed = isinstance(error, RuntimeError) and ("write failed" in text or "iostream error" in text)  # PyTorch's
    return FULL if failed and shutil.disk_usage(folder).free < 2**20 else None


# --- one process at a time ----------------------------------------------------------------------------------------------


class Busy(OSError):
    """Another process is writing the same files. The message names them and the process."""


@contextmanager
def lock(path: Path) -> Iterator[int | None]:
    """Only one process at a time is inside this block for `path`, a run folder or a single file.

    A second one gets `Busy` at once, in one line that names the path and the process that has it. The lock is the system's, on
    a file beside `path`, and ends with its process, however that ends. Whoever gets it removes what killed processes have
    left half-written in the folder, or beside the file. The block gets the open handle of the lock file: a process that inherits it
    holds the lock too. On a disk without such locks a file that names its owner stands for one, and there is no handle.
    """
    path = Path(path).absolute()
    beside = path.with_name(f".{path.name}.lock")
    handles: list[int] = []

    def take(kind: type[filelock.BaseFileLock], place: Path, **options: Any) -> None:
        try:
            stack.enter_context(kind(place, timeout=LOCK_S, **options))
        except filelock.Timeout:
            owner = (place.read_text().split() or ["(unknown)"])[0] if place.is_file() else "(unknown)"
            text = f"{path}: process {owner} is writing it; wait until it is done, or end that process"
            raise Busy(text) from None

    with contextlib.ExitStack() as stack:
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                take(filelock.FileLock, beside, on_acquired=lambda handle: handles.append(_signed(handle)))
                # it goes before the lock is released: filelock sees to it that nobody takes a file that is gone
                stack.callback(beside.unlink, missing_ok=True)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                    raise
                beside.unlink(missing_ok=True)
                take(filelock.SoftFileLock, beside.with_suffix(".owner"))
        clean_up(path, alone=True)
        if path.is_dir():
            for name in {match["name"] for entry in path.iterdir() if (match := _ASIDE.fullmatch(entry.name))}:
                clean_up(path / name, alone=True)
        yield handles[0] if handles else None


LOCK_S = 0.1
"""Time for two or three tries: a lock file that another process is just removing is no reason to give up."""


def _signed(handle: int) -> int:
    """A lock file with the number of its process in it; on a full disk the lock holds without."""
    with contextlib.suppress(OSError):
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    return handle


# --- run folders --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder. `folder / "config.json"` says what was asked, `manifest.json` what it was made from and with."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """What the manifest says; nothing where there is none. Raises ValueError for a broken one."""
        path = self.folder / MANIFEST
        return config.parse(dict[str, Any], read_json(path), str(path)) if path.is_file() else {}

    @property
    def done(self) -> bool:
        """True once `finish` was called: everything that the run promises is in the folder."""
        return self.manifest.get("status") == "done"

    @property
    def parents(self) -> dict[str, Path]:
        """The folders that this run was made from, by role: "pool", "training", "test", "sweep"."""
        where = f"{self.folder / MANIFEST}, parents"
        named: dict[str, str] = config.parse(dict[str, str], self.manifest.get("parents", {}), where)
        return {role: Path(os.path.normpath(self.folder.resolve() / place)) for role, place in named.items()}

    def note(self, **facts: Any) -> None:
        """Record facts in the manifest; one that is None is removed. `parents` are folders by role, empty ones are left out."""
        if (parents := facts.get("parents")) is not None:
            facts["parents"] = {role: self._from_here(Path(folder)) for role, folder in parents.items() if folder}
        known = {**self.manifest, **facts}
        write_json(self.folder / MANIFEST, {name: value for name, value in known.items() if value is not None})

    def finish(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Write `metrics.json` (if given) and mark the run as complete."""
        if metrics is not None:
            write_json(self.folder / METRICS, metrics)
        self.note(status="done", finished=time_text())

    def _from_here(self, folder: Path) -> str:
        """A folder of the same reports folder seen from this one, so that both can be moved together; any other one whole."""
        here, there = self.folder.resolve(), folder.resolve()
        together = len(here.parents) > 2 and there.is_relative_to(here.parents[2] / "runs")
        return os.path.relpath(there, here) if together else str(there)


def run_folder(
    kind: str, name: str, settings: Any, inputs: Mapping[str, str] | None = None, root: Path | None = None
) -> Path:
    """Where `open_run` puts this work; it need not be there."""
    content = content_hash({"config": settings, "inputs": inputs or {}})
    return (root or reports_root()) / "runs" / kind / f"{name}-{content}"


def open_run(
    kind: str,
    name: str,
    settings: Any,
    inputs: Mapping[str, str] | None = None,
    parents: Mapping[str, str | Path | None] | None = None,
    root: Path | None = None,
) -> Run:
    """The run folder for this work, created if need be.

    `settings` is anything JSON-like or a dataclass; `inputs` maps the name of each input to its content hash. Both decide the
    folder's name; parents (folders by role), versions, machine and git revision are recorded in the manifest but do not.
    """
    run = Run(run_folder(kind, name, settings, inputs, root))
    if not (run.folder / MANIFEST).exists():
        write_json(run.folder / "config.json", settings)
        run.note(status="started", kind=kind, name=name, inputs=inputs or {}, started=time_text(), **environment())
    if parents:
        run.note(parents=parents)
    return run


def notebook_run(run_dir: str, notebook: str, **parents: str | Path | None) -> Run:
    """The run that a notebook writes: in the folder that the runner names, or `reports/runs/<notebook>/interactive` for a person.

    It counts as started until the notebook calls `finish`. `parents` are the folders it reads, by role; empty ones are left out.
    """
    run = Run(Path(run_dir) if run_dir else reports_root() / "runs" / notebook / "interactive")
    if not run.manifest:
        run.note(status="started", kind=notebook, name=run.folder.name, started=time_text(), **environment())
    run.note(status="started", finished=None, error=None, parents=parents)
    return run


def latest(notebook: str) -> Path:
    """The run folder of a notebook that was finished last, by the manifests. Raises FileNotFoundError if there is none."""
    finished = {}
    for path in (reports_root() / "runs" / notebook).glob(f"*/{MANIFEST}"):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a broken manifest, or a run that is not finished
            finished[datetime.fromisoformat(Run(path.parent).manifest["finished"])] = path.parent
    if not finished:
        raise FileNotFoundError(
            f"no finished run of {notebook} under {reports_root() / 'runs'}: run that notebook first"
        )
    return finished[max(finished)]


def headless() -> bool:
    """True under the runner, which sets $NETLLM_HEADLESS: print lines rather than draw widgets."""
    return bool(os.environ.get("NETLLM_HEADLESS"))


PROGRESS_LINE = re.compile(r"(.+): \d+/\d+ .* s, about \d+ s left$")
"""What `progress` prints, for who wants to leave it out; the group is the label."""


def progress(label: str, every_s: float = 5.0) -> Callable[..., None]:
    """A callback `(done, total, info={})` for the library's loops: a bar for a person, a line every few seconds headless."""
    from tqdm.auto import tqdm

    bar = None if headless() else tqdm(desc=label)
    started = last = time.monotonic()

    def show(done: int, total: int, info: Mapping[str, Any] | None = None) -> None:
        nonlocal last
        loss = f"  loss {info['loss']:.3f}" if info and "loss" in info else ""
        if bar is not None:
            bar.total = total
            bar.set_postfix_str(loss.strip(), refresh=False)
            bar.update(done - bar.n)
            if done == total:
                bar.close()
        elif (now := time.monotonic()) - last >= every_s or done == total:
            last = now
            left = (now - started) / done * (total - done)
            print(f"{label}: {done}/{total}{loss}  {now - started:.0f} s, about {left:.0f} s left", flush=True)

    return show


def environment() -> dict[str, Any]:
    """Versions, machine and git revision, for a manifest. Never fails: what cannot be found is left out."""
    versions = {}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    about = {"python": platform.python_version(), "versions": versions, "machine": platform.machine()}
    return {**about, "git": git_revision()}


def git_revision() -> str | None:
    """Commit of the checkout, with "+dirty" when there are uncommitted changes; None outside a checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def time_text() -> str:
    """The time now as manifests write it."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
