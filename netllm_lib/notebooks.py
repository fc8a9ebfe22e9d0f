"""Strict headless runs of notebooks, on papermill.

Papermill alone only warns about an unknown parameter, injects "false" as a (true) string, sets no time limit and
succeeds when nothing was written. Here a run starts only when every parameter is known and fits its declared type, and
it succeeds only when every cell was executed and every promised file is there.

A notebook has a cell tagged `parameters`, see `parameters`; `run_dir` becomes the folder it writes to. It writes `metrics.json`
there and, if it promises more files, says so in a comment `# expected: pool/config.json, table.parquet` in any code cell.
Notebooks run in the project's folder, where relative paths start.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import pkgutil
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netllm_lib
from netllm_lib import config, runs
from netllm_lib import parameters as declarations
from netllm_lib import reports as pages

NOTEBOOKS = runs.PROJECT / "notebooks"
REPORT = pages.REPORT
"""The executed notebook as a page that opens offline."""

TIMEOUT_S = 3600.0
"""Time limit of one notebook where nothing else is asked for; zero means none."""

LARGE_BYTES = 64 * 2**20
"""Input files above this size are identified by size and time of change, not by content."""

CACHES = {"__pycache__", ".git", "cache"}
"""Folders whose content is never an input: `data/cache` holds what can be made again."""

Echo = Callable[[str], None]
Work = tuple[str, str, dict[str, Any], dict[str, str]]
"""Kind, name, settings and inputs of a run: what its folder is named after."""

# jsonschema, which nbformat imports, would build a grammar of web addresses for seconds; notebooks have none to check
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


class NotebookError(RuntimeError):
    """A notebook did not do what it promises. The message names the cell; `executed` is the notebook so far."""

    def __init__(self, message: str, executed: Path | None = None, traceback: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.executed = executed
        self.traceback = tuple(traceback)


@dataclass(frozen=True)
class NotebookRun:
    """What a finished run left behind."""

    folder: Path
    metrics: dict[str, Any]
    seconds: float
    reused: bool
    """True when nothing was executed: the same content had been run before."""


# --- notebooks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notebook:
    """A notebook as it lies on the disk, checked. `content` is an nbformat node, `kernel` the name of a Jupyter kernel."""

    path: Path
    content: Any
    kernel: str
    parameters: dict[str, declarations.Parameter]
    """All but `run_dir`, which the runner sets."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def code(self) -> list[str]:
        """The sources of its code cells."""
        return [cell.source for cell in self.content.cells if cell.cell_type == "code"]

    @property
    def promised(self) -> list[str]:
        """Files that it promises: `metrics.json`, and those in its `# expected: a, b` comments."""
        lines = re.findall(r"^# expected: *(.+)$", "\n".join(self.code), flags=re.MULTILINE)
        return [runs.METRICS, *re.findall(r"[^\s,]+", " ".join(lines))]

    def fit(self, given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """`given` as `parameters.fit` checks it. ValueError, beginning with `where`, for what does not fit."""
        if "run_dir" in given:
            raise ValueError(f"{where or self.name}: run_dir is set by the runner")
        return declarations.fit(self.parameters, given, where or self.name)


def find_notebook(name: str | Path, folder: Path = NOTEBOOKS) -> Path:
    """The notebook meant by a path, a stem (`03_experience_pool`) or a number (`03`, `3`), or FileNotFoundError."""
    path = Path(name)
    if path.suffix in (".py", ".ipynb"):  # the source of a notebook stands for the notebook
        path = path.with_suffix(".ipynb")
        for candidate in (path, runs.PROJECT / path, folder / path):
            if os.path.isfile(candidate):  # also of a name that no file can have
                return candidate.resolve()
    known = {candidate.stem: candidate for candidate in sorted(folder.glob("*.ipynb"))}
    wanted = str(name).zfill(2) if str(name).isdigit() else str(name)
    matches = [stem for stem in known if stem == wanted or stem.startswith(f"{wanted}_")]
    if len(matches) == 1:
        return known[matches[0]].resolve()
    problem = f"{name} could be any of {', '.join(matches)}" if matches else f"no notebook {name}"
    raise FileNotFoundError(f"{problem}{config.did_you_mean(path.stem, known)}; known: {', '.join(known) or 'none'}")


def open_notebook(name: str | Path) -> Notebook:
    """The notebook that `find_notebook` finds; ValueError, with its path, if the runner cannot work with it."""
    import nbformat

    path = find_notebook(name)
    try:
        content = nbformat.read(path, as_version=4)
        nbformat.validate(content)
        kernel = str(content.metadata.get("kernelspec", {}).get("name", "python3"))
        tagged = [cell.source for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
        parameters = declarations.read("\n".join(tagged))
        if parameters.pop("run_dir", None) is None:
            raise ValueError('a cell tagged `parameters` needs `run_dir: str = ""`, the folder to write to')
    except Exception as error:  # whatever nbformat and its parsers come up with for a file that is no notebook
        raise ValueError(f"{path}: {str(error).strip().partition(chr(10))[0]}") from None
    return Notebook(path, content, kernel, parameters)


# --- what a run is made from --------------------------------------------------------------------------------------------


def input_hashes(notebook: Notebook, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Hashes, by name, of all that decides a run's outcome beside its parameters.

    These are the notebook's cells, the constant `ARITHMETIC` of every package of this library that it imports (whoever changes what
    the library computes raises it; other changes leave finished runs as they are), and what its paths lead to. An empty `data`
    stands for the data that is found without it.
    """
    cells = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.content.cells]
    found = {"notebook": runs.content_hash(cells, digits=16)}
    imports = " ".join(re.findall(r"^\s*(?:from|import)\s+(netllm_lib.*)$", "\n".join(notebook.code), re.MULTILINE))
    packages = [name for _, name, is_package in pkgutil.iter_modules(netllm_lib.__path__) if is_package]
    used = [f"netllm_lib.{name}" for name in packages if re.search(rf"\b{name}\b", imports)]
    for module in map(importlib.import_module, ["netllm_lib", *used] if imports else []):
        if (version := getattr(module, "ARITHMETIC", None)) is not None:
            found[module.__name__] = str(version)
    for name, parameter in notebook.parameters.items():
        value = parameters.get(name, parameter.default) if parameter.is_path else []
        for text in value if isinstance(value, list) else [value or ""]:
            place = runs.PROJECT / re.sub(r"(\.py):\w+$", r"\1", text)  # FILE.py:NAME is something in that file
            if text and os.path.exists(place):
                try:
                    found[f"{name}: {_portable(text)}"] = fingerprint(place)
                except OSError as error:
                    raise ValueError(f"{notebook.name}: parameter {name}: {runs.first_line(error)}") from None
            elif not text and name == "data":
                found["data"] = fingerprint(Path(os.environ.get("NETLLM_DATA") or runs.PROJECT / "data"))
    return found


def fingerprint(place: Path) -> str:
    """What a file or folder holds, as a hash. A finished run is not read: its name and when it was finished say it all."""
    for folder in (place, *place.parents):
        if (run := runs.Run(folder)).done:
            inside = str(place.relative_to(folder))
            return runs.content_hash([folder.name, run.manifest.get("finished"), inside], digits=16)
    found = []
    for file in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
        if not CACHES & set(file.relative_to(place).parts):
            status = file.stat()
            large = status.st_size > LARGE_BYTES
            content = f"{status.st_size}-{status.st_mtime_ns}" if large else runs.file_hash(file)
            found.append((str(file.relative_to(place)), content))
    return runs.content_hash(found, digits=16)


def _portable(value: Any) -> Any:
    """Paths inside the project relative to it, so that a moved checkout still finds its runs."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return value.removeprefix(f"{runs.PROJECT}{os.sep}") if isinstance(value, str) else value


# --- running ------------------------------------------------------------------------------------------------------------


def run_notebook(
    name: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    group: str = "run",
    timeout_s: float = TIMEOUT_S,
    force: bool = False,
    echo: Echo = print,
) -> NotebookRun:
    """Run a notebook headless and return what it left behind.

    The run folder is `reports/runs/<notebook>/<group>-<hash>/`; the hash covers the parameters and `input_hashes`. A finished
    folder of the same content is reused, unless `force`, which empties it first. An unfinished one is continued: the notebook
    finds what it left there. `echo` gets the notebook's standard output, one line at a time, as it appears.

    Raises FileNotFoundError (no such notebook), ValueError (parameters) and runs.Busy (another process is at it) before
    anything runs, and NotebookError when a cell fails, the time is up, or a promised file is missing; the notebook so far
    is in the run folder then.
    """
    notebook, fitted, work = _prepare(name, parameters or {}, group)
    folder = runs.run_folder(*work)
    if not force and (finished := _finished(notebook, folder)):
        return finished
    with runs.lock(folder), runs.storage_errors(folder):
        if force and folder.exists():
            (folder / runs.MANIFEST).unlink(missing_ok=True)  # first: half-emptied, it must not pass for a finished run
            shutil.rmtree(folder)
        run = runs.open_run(*work)
        executed = folder / notebook.path.name
        for stale in (runs.METRICS, executed.name, REPORT):  # those of an earlier attempt would pass for ours
            (folder / stale).unlink(missing_ok=True)
        started = time.monotonic()
        try:
            _execute(notebook, executed, {**fitted, "run_dir": str(folder)}, timeout_s, echo)
            if missing := [name for name in notebook.promised if not (folder / name).exists()]:
                problem = f"{notebook.name} ran, but did not write {', '.join(missing)} to {folder}"
                raise NotebookError(problem, executed)
            metrics = _metrics(folder)
        except KeyboardInterrupt:
            run.note(status="interrupted")
            raise
        except NotebookError as error:
            run.note(status="failed", error=str(error))
            raise
        finally:
            if executed.is_file() and run.state != "interrupted":
                pages.export_html(executed, folder / REPORT)
        seconds = time.monotonic() - started
        run.note(seconds=round(seconds, 1), error=None)
        run.finish()
    return NotebookRun(folder, metrics, seconds, reused=False)


def find_run(name: str | Path, parameters: Mapping[str, Any], group: str = "run") -> NotebookRun | None:
    """The finished run that `run_notebook` would reuse, if there is one. Raises what that raises before anything runs."""
    notebook, _, work = _prepare(name, parameters, group)
    return _finished(notebook, runs.run_folder(*work))


def _prepare(name: str | Path, parameters: Mapping[str, Any], group: str) -> tuple[Notebook, dict[str, Any], Work]:
    """The notebook, its parameters, and kind, name, config and inputs of the run: what its folder is named after."""
    notebook = open_notebook(name)
    fitted = notebook.fit(parameters)
    asked: dict[str, Any] = {"notebook": notebook.name, "kernel": notebook.kernel}
    asked |= {"parameters": {key: _portable(value) for key, value in fitted.items()}}
    return notebook, fitted, (notebook.name, group, asked, input_hashes(notebook, fitted))


def _finished(notebook: Notebook, folder: Path) -> NotebookRun | None:
    """A run that is done, with everything that was promised still there."""
    run = runs.Run(folder)
    if not run.done or not all((folder / name).exists() for name in (*notebook.promised, REPORT)):
        return None
    return NotebookRun(folder, _metrics(folder), float(run.manifest.get("seconds", 0.0)), reused=True)


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return config.parse(dict[str, Any], runs.read_json(folder / runs.METRICS), str(folder / runs.METRICS))
    except ValueError as error:
        raise NotebookError(str(error)) from None


def _execute(notebook: Notebook, executed: Path, parameters: dict[str, Any], timeout_s: float, echo: Echo) -> None:
    """Papermill with a deadline for the whole notebook; every failure becomes a NotebookError that names the cell."""
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from netllm_lib.envcheck import kernel_problem
    from netllm_lib.kernels import BoundKernelManager, ended_by_interrupt

    if problem := kernel_problem(notebook.kernel):
        raise NotebookError(f"{notebook.name}: {problem}")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what goes wrong is said by the errors below
    deadline = time.monotonic() + timeout_s
    failure, traceback, lines = "", [], _Lines(echo)
    try:
        with ended_by_interrupt():
            papermill.execute_notebook(
                notebook.path,
                executed,
                parameters=parameters,
                kernel_name=notebook.kernel,
                cwd=runs.PROJECT,
                progress_bar=False,
                stdout_file=lines,
                timeout_func=lambda cell: max(1, int(deadline - time.monotonic())) if timeout_s > 0 else None,
                start_timeout=120,
                kernel_manager_class=BoundKernelManager,
            )
    except papermill.PapermillExecutionError as error:
        failure, traceback = f"{error.ename}: {error.evalue}".strip(": "), error.traceback
    except CellTimeoutError:
        failure = f"time limit of {timeout_s:g} s reached"
    except DeadKernelError:
        failure = "the kernel died (often: out of memory)"
    except RuntimeError as error:
        raise NotebookError(f"{notebook.name}: the kernel {notebook.kernel} did not start: {error}") from None
    finally:
        lines.write("\n" if lines.rest else "")

    added = {"injected-parameters", "papermill-error-cell-tag"}
    kept = [c for c in nbformat.read(executed, as_version=4).cells if not added & set(c.metadata.get("tags", []))]
    code = [(number, cell) for number, cell in enumerate(kept, 1) if cell.cell_type == "code"]
    begun = [(number, cell) for number, cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    if not failure and len(begun) < len(code):
        failure = "stopped early, by sys.exit or the like; the cells after it were not run"
    if failure:
        number, cell = begun[-1] if begun else (0, {"source": ""})
        place = f"{notebook.name}: cell {number} of {len(kept)} ({cell['source'].strip().partition(chr(10))[0]!r})"
        raise NotebookError(f"{place}: {failure}; executed so far: {executed}", executed, traceback)


class _Lines(io.TextIOBase):
    """Takes a notebook's standard output and passes on whole lines; of a redrawn line, its last state."""

    def __init__(self, echo: Echo) -> None:
        self.echo, self.rest = echo, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.echo(line.rstrip("\r").rpartition("\r")[2])
        return len(text)


# --- sources ------------------------------------------------------------------------------------------------------------


def generate(source: Path) -> str:
    """The text of the `.ipynb` beside a `.py` source (jupytext's percent format), without outputs; always the same."""
    import jupytext

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = str(number)  # jupytext draws them
    return jupytext.writes(notebook, fmt="ipynb") + "\n"


if __name__ == "__main__":
    for source in sorted(NOTEBOOKS.glob("*.py")):
        source.with_suffix(".ipynb").write_text(generate(source))
