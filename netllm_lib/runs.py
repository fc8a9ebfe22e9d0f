"""Run folders: named by their content, described by a manifest, written whole or not at all.

A run folder is `reports/runs/<kind>/<name>-<hash>/`, where the hash covers the configuration and the hashes of all inputs.
The same work therefore lands in the same folder: it is reused when it is finished, resumed when it is not, and nothing is
ever overwritten by a different run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
"""The checkout: bundled data, notebooks and the default reports folder are found from here."""

MANIFEST = "manifest.json"
VERSIONED = ("numpy", "pandas", "numba", "torch", "transformers", "peft", "papermill", "tensorflow-cpu", "tensorflow")


def reports_root() -> Path:
    """`$NETLLM_REPORTS`, or `reports/` of the checkout."""
    return Path(os.environ.get("NETLLM_REPORTS") or PROJECT / "reports")


def cache_root() -> Path:
    """`$NETLLM_CACHE`, or `data/cache/` of the checkout: what can be made again, but is dear to make."""
    return Path(os.environ.get("NETLLM_CACHE") or PROJECT / "data" / "cache")


# --- hashes -------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` as JSON types: dataclasses to dicts, paths to strings, NumPy scalars and arrays to numbers and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and value != value:
        return None
    return value


def content_hash(value: Any, digits: int = 10) -> str:
    """Hex digest of any JSON-like value, independent of key order."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def array_hash(*arrays: np.ndarray, digits: int = 16) -> str:
    """Hex digest of arrays by dtype, shape and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:digits]


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

    The block may create a file or a folder. Files are flushed to disk before the rename, so a crash leaves either the old
    content or the new one, never a half-written one. A folder replaces an existing folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield aside
        for file in [aside] if aside.is_file() else [p for p in aside.rglob("*") if p.is_file()]:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if aside.is_dir() and path.is_dir():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN becomes null."""
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(plain(value), indent=1, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises FileNotFoundError or ValueError (with the file's name)."""
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


# --- run folders --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder. `folder / "config.json"` says what was asked, `manifest.json` what it was made from and with."""

    folder: Path

    @property
    def done(self) -> bool:
        """True once `finish` was called: everything that the run promises is in the folder."""
        manifest = self.folder / MANIFEST
        return manifest.is_file() and read_json(manifest).get("status") == "done"

    def finish(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Write `metrics.json` (if given) and mark the run as complete."""
        if metrics is not None:
            write_json(self.folder / "metrics.json", metrics)
        manifest = read_json(self.folder / MANIFEST)
        write_json(self.folder / MANIFEST, manifest | {"status": "done", "finished": _now()})


def open_run(
    kind: str, name: str, config: Any, inputs: Mapping[str, str] | None = None, root: Path | None = None
) -> Run:
    """The run folder for this work, created if need be.

    `config` is anything JSON-like or a dataclass; `inputs` maps the name of each input to its content hash. Both decide the
    folder's name; versions, device and git revision are recorded in the manifest but do not.
    """
    folder = (
        (root or reports_root()) / "runs" / kind / f"{name}-{content_hash({'config': config, 'inputs': inputs or {}})}"
    )
    run = Run(folder)
    if not (folder / MANIFEST).exists():
        write_json(folder / "config.json", config)
        write_json(
            folder / MANIFEST,
            {
                "status": "started",
                "kind": kind,
                "name": name,
                "inputs": inputs or {},
                "started": _now(),
                **environment(),
            },
        )
    return run


def output_folder(run_dir: str, notebook: str) -> Path:
    """Where a notebook writes: the run folder that the runner names, or `reports/runs/<notebook>/interactive` for a person."""
    folder = Path(run_dir) if run_dir else reports_root() / "runs" / notebook / "interactive"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def latest(notebook: str) -> Path:
    """The run folder of a notebook that was finished last. Raises FileNotFoundError if there is none."""
    finished = sorted(
        (reports_root() / "runs" / notebook).glob("*/metrics.json"), key=lambda path: path.stat().st_mtime
    )
    if not finished:
        raise FileNotFoundError(
            f"no finished run of {notebook} under {reports_root() / 'runs'}: run that notebook first"
        )
    return finished[-1].parent


def headless() -> bool:
    """True under the runner, which sets $NETLLM_HEADLESS: print lines rather than draw widgets."""
    return bool(os.environ.get("NETLLM_HEADLESS"))


def progress(label: str, every_s: float = 5.0) -> Callable[..., None]:
    """A callback `(done, total, info={})` for the library's loops: a bar for a person, a line every few seconds headless."""
    if not headless():
        from tqdm.auto import tqdm

        bar = tqdm(desc=label)

        def redraw(done: int, total: int, info: Mapping[str, Any] | None = None) -> None:
            bar.total = total
            bar.set_postfix({k: f"{v:.3f}" for k, v in (info or {}).items() if k == "loss"}, refresh=False)
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return redraw
    started = last = time.monotonic()

    def line(done: int, total: int, info: Mapping[str, Any] | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s or done == total:
            last = now
            left = (now - started) / done * (total - done)
            loss = f"  loss {info['loss']:.3f}" if info and "loss" in info else ""
            print(f"{label}: {done}/{total}{loss}  {now - started:.0f} s, about {left:.0f} s left", flush=True)

    return line


def environment() -> dict[str, Any]:
    """Versions, machine and git revision, for a manifest. Never fails: what cannot be found is left out."""
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """Commit of the checkout, with "+dirty" when there are uncommitted changes; None outside a checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
