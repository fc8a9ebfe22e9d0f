"""Strict headless runs of notebooks, on papermill.

Papermill alone only warns about an unknown parameter, injects "false" as a (true) string, sets no time limit and
succeeds when nothing was written. Here a run starts only when every parameter is known and fits its declared type, and
it succeeds only when every cell was executed and every promised file is there.

What a notebook has to offer: a cell tagged `parameters` with annotated assignments, among them `run_dir: str = ""`,
which becomes the folder it writes to; a `metrics.json` written there; and, if it promises more files, a comment
`# expected: pool.npz, table.parquet` in any code cell. Notebooks run in the project's folder, so relative paths in
parameters start there.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netllm_lib
from netllm_lib import kernels, runs
from netllm_lib import reports as pages

NOTEBOOKS = runs.PROJECT / "notebooks"
REPORT = pages.REPORT
TIMEOUT_S = 3600.0
"""Time limit of one notebook unless told otherwise; zero means none."""

LARGE_BYTES = 64 * 2**20
"""Input files above this size are identified by size and time of change, not by content."""

# jsonschema, which nbformat imports, would build a grammar of web addresses for seconds; notebooks have none to check
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

SKIPPED = {"__pycache__", ".git", "cache"}
"""Folders whose content is never an input: `data/cache` holds what can be made again."""

Echo = Callable[[str], None]


SPIN = "10000"
"""How long (in turns) a waiting OpenMP thread of PyTorch keeps its core. By default it is 30 times as long, and then one other
busy process on a small machine slows training more than six times; so it is two to three times, at 2 to 5 % without one."""


class NotebookError(RuntimeError):
    """A notebook did not do what it promises. The message names the cell; `executed` is the notebook so far."""

    def __init__(self, message: str, executed: Path | None = None, traceback: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.executed = executed
        self.traceback = tuple(traceback)


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's parameters cell."""

    name: str
    type: str
    """The annotation as written, or the type of the default."""
    default: Any
    """None where the default is not a literal."""
    help: str


@dataclass(frozen=True)
class NotebookRun:
    """What a finished run left behind."""

    folder: Path
    executed: Path
    report: Path
    metrics: dict[str, Any]
    seconds: float
    reused: bool
    """True when nothing was executed: the same content had been run before."""


# --- finding and reading notebooks ----------------------------------------------------------------------------------


def find_notebook(name: str | Path, folder: Path = NOTEBOOKS) -> Path:
    """The notebook meant by a path, a stem (`03_experience_pool`) or a number (`03`), or FileNotFoundError."""
    path = Path(name)
    if path.suffix == ".py":  # the source of a notebook stands for the notebook
        path = path.with_suffix(".ipynb")
    if path.suffix == ".ipynb":
        for candidate in (path, runs.PROJECT / path, folder / path):
            if candidate.is_file():
                return candidate.resolve()
    known = {candidate.stem: candidate for candidate in sorted(folder.glob("*.ipynb"))}
    matches = [stem for stem in known if str(name) == stem or stem.startswith(f"{name}_")]
    if len(matches) == 1:
        return known[matches[0]].resolve()
    problem = f"{name} could be any of {', '.join(matches)}" if len(matches) > 1 else f"no notebook {name}"
    raise FileNotFoundError(f"{problem}{did_you_mean(path.stem, known)}; known: {', '.join(known) or 'none'}")


def open_notebook(name: str | Path) -> tuple[Path, dict[str, Parameter], Any]:
    """A notebook's path, the parameters it declares, and its content (an nbformat node).

    FileNotFoundError if there is none; ValueError, with its path, if the runner cannot work with it.
    """
    import nbformat

    path = find_notebook(name)
    notebook = nbformat.read(path, as_version=4)
    try:
        declared = read_parameters(notebook)
        if "run_dir" not in declared:
            raise ValueError('the parameters cell needs `run_dir: str = ""`, the folder to write to')
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: {error}") from None
    return path, declared, notebook


def read_parameters(notebook: Any) -> dict[str, Parameter]:
    """The parameters that a notebook (an nbformat node) declares, by name.

    ValueError when there is no cell tagged `parameters` or it holds anything but assignments.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"a notebook needs one cell tagged 'parameters', found {len(cells)}")
    source = cells[0].source
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            name, annotation = node.target.id, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, annotation = node.targets[0].id, ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        else:
            raise ValueError(
                f"parameters cell, line {node.lineno}: only assignments belong here, found {ast.unparse(node)}"
            )
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            default = None
        annotation = annotation or ("Any" if default is None else type(default).__name__)
        found[name] = Parameter(name, annotation, default, comments.get(node.end_lineno or node.lineno, ""))
    return found


def expected_files(notebook: Any) -> list[str]:
    """Files that a notebook promises: `metrics.json`, and those in its `# expected: a, b` comments."""
    found = ["metrics.json"]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for names in re.findall(r"^# expected: *(.+)$", cell.source, flags=re.MULTILINE):
                found += [name.strip() for name in names.split(",") if name.strip()]
    return list(dict.fromkeys(found))


# --- parameters -----------------------------------------------------------------------------------------------------


def fit_parameters(declared: Mapping[str, Parameter], given: Mapping[str, Any], notebook: str) -> dict[str, Any]:
    """`given` with each value as its declared type; strings from a command line are read as that type.

    ValueError names an unknown parameter (with the closest known one) or a value that does not fit.
    """
    fitted = {}
    for name, value in given.items():
        if name not in declared:
            known = [other for other in declared if other != "run_dir"]
            raise ValueError(
                f"{notebook} has no parameter '{name}'{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}"
            )
        if name == "run_dir":
            raise ValueError(f"{notebook}: run_dir is set by the runner")
        try:
            fitted[name] = _fit(ast.parse(declared[name].type, mode="eval").body, value)
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(f"{notebook}: parameter {name} is {declared[name].type}, got {value!r}") from None
    return fitted


def _fit(annotation: ast.expr, value: Any) -> Any:
    """`value` as the annotated type, or ValueError."""
    match annotation:
        case ast.Constant(value=str() as quoted):
            return _fit(ast.parse(quoted, mode="eval").body, value)
        case ast.Constant(value=None):
            if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
                return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fit_any([left, right], value)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _fit_any([inner, ast.Constant(None)], value)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            allowed = ast.literal_eval(choices)
            for choice in allowed if isinstance(allowed, tuple) else (allowed,):
                if value == choice or str(value) == str(choice):
                    return choice
        case ast.Subscript(value=ast.Name(id="list" | "tuple"), slice=inner):
            item = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return [_fit(item, part) for part in _as_list(value)]
        case ast.Subscript(value=ast.Name(id="dict")):
            return _fit(ast.Name("dict"), value)
        case ast.Name(id=name):
            return _fit_plain(name, value)
    raise ValueError(value)


def _fit_any(annotations: list[ast.expr], value: Any) -> Any:
    # None and str come last: "None" is a legal string, and every number is one too.
    for annotation in sorted(annotations, key=lambda a: isinstance(a, ast.Name) and a.id == "str"):
        try:
            return _fit(annotation, value)
        except ValueError:
            continue
    raise ValueError(value)


def _fit_plain(name: str, value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else None
    if name == "Any":
        return value
    if name == "str" and text is not None:
        return value
    if name == "bool":
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
    if name == "int" and not isinstance(value, bool | float):
        return int(value)
    if name == "float" and not isinstance(value, bool):
        return float(value)
    if name in ("list", "tuple"):
        return list(_as_list(value))
    if name == "dict":
        found = ast.literal_eval(text) if text is not None else value
        if isinstance(found, dict):
            return found
    raise ValueError(value)


def _as_list(value: Any) -> Sequence[Any]:
    """A sequence as it is; a string as a Python list, or split at its commas."""
    if isinstance(value, str):
        text = value.strip()
        value = (
            ast.literal_eval(text) if text[:1] in "[(" and text else [part.strip() for part in text.split(",") if part]
        )
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


# --- what a run is made from ----------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Hash of a file, or of all files in a folder: content, or size and time of change above `LARGE_BYTES`."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if SKIPPED & set(file.relative_to(path).parts):
            continue
        status = file.stat()
        large = status.st_size > LARGE_BYTES
        content = f"{status.st_size}-{status.st_mtime_ns}" if large else runs.file_hash(file)
        digest.update(f"{file.relative_to(path)}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def shown(path: Path) -> str:
    """A path as a person wants to read it: from the working directory if it lies below, else whole."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def input_hashes(notebook: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Hashes, by name, of all that may change the outcome: cells, library, data found by default, files in parameters."""
    sources = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
    found = {
        "notebook": runs.content_hash(sources, digits=16),
        "netllm_lib": runs.tree_hash(Path(netllm_lib.__file__).parent, "**/*.py"),
    }
    places = {"data": runs.PROJECT / "data", "$NETLLM_DATA": Path(os.environ.get("NETLLM_DATA") or os.devnull)}
    for name, value in parameters.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and 0 < len(text) < 1024:
                file = re.sub(r"(\.py):\w+$", r"\1", text)  # FILE.py:NAME is something in that file
                places[f"{name}: {_portable(text)}"] = runs.PROJECT / file
    for name, place in places.items():
        if place.is_file() or place.is_dir():
            found[name] = fingerprint(place)
    return found


def _portable(value: Any) -> Any:
    """Paths inside the project relative to it, so that a moved checkout still finds its runs."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    prefix = f"{runs.PROJECT}{os.sep}"
    return value.removeprefix(prefix) if isinstance(value, str) else value


# --- running one notebook -------------------------------------------------------------------------------------------


def run_notebook(
    path: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    name: str = "run",
    run_dir: Path | None = None,
    kernel: str | None = None,
    timeout_s: float = TIMEOUT_S,
    expected: Sequence[str] = (),
    force: bool = False,
    echo: Echo = print,
) -> NotebookRun:
    """Run a notebook headless and return what it left behind.

    The run folder is `reports/runs/<notebook>/<name>-<hash>/` unless `run_dir` is given; the hash covers the notebook,
    the parameters, the library's sources and the files that parameters point to. A finished folder of the same content
    is reused, unless `force`, which empties it first. An unfinished one is continued: the notebook finds what it left
    there. `echo` gets one line at a time: the notebook's standard output as it appears.

    Raises FileNotFoundError (no such notebook), ValueError (parameters) and runs.Busy (another process is at it) before
    anything runs, and NotebookError when a cell fails, the time is up, or a promised file is missing; the notebook so far
    is in the run folder then.
    """
    source, declared, notebook = open_notebook(path)
    fitted = fit_parameters(declared, parameters or {}, source.stem)
    kernel = kernel or _kernel(notebook)
    promised = list(dict.fromkeys([*expected_files(notebook), *expected]))

    if run_dir is None:
        config, inputs = _identity(source, notebook, fitted, kernel)
        run = runs.open_run(source.stem, name, config, inputs)
        if not force and (finished := _finished(run, source, promised)):
            return finished
        folder = run.folder
    else:
        folder = Path(run_dir).resolve()
    executed = folder / source.name
    if executed.resolve() == source:
        raise ValueError(f"{source}: a notebook is never run in place; give another run folder")

    with runs.lock(folder) as handle, runs.storage_errors(folder):
        if run_dir is None and force and run.done:
            (folder / runs.MANIFEST).unlink()  # first: half-emptied, the folder must not pass for a finished run
            shutil.rmtree(folder)
            runs.open_run(source.stem, name, config, inputs)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("metrics.json", source.name, REPORT):  # those of an earlier attempt would pass for ours
            (folder / stale).unlink(missing_ok=True)
        started = time.monotonic()
        try:
            _execute(source, executed, {**fitted, "run_dir": str(folder)}, kernel, timeout_s, echo, handle)
            if missing := _missing(folder, promised):
                raise NotebookError(f"{source.stem} ran, but did not write {', '.join(missing)} to {folder}", executed)
            metrics = _metrics(folder)
        except NotebookError as error:
            _note(folder, status="failed", error=str(error))
            raise
        finally:
            if executed.is_file():
                pages.export_html(executed, folder / REPORT)
        seconds = time.monotonic() - started
        if run_dir is None:
            _note(folder, seconds=round(seconds, 1), error=None)
            runs.Run(folder).finish()
    return NotebookRun(folder, executed, folder / REPORT, metrics, seconds, reused=False)


def find_run(
    path: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    name: str = "run",
    kernel: str | None = None,
    expected: Sequence[str] = (),
) -> NotebookRun | None:
    """The finished run that `run_notebook` would reuse for these arguments, if there is one. Raises what that raises for them."""
    source, declared, notebook = open_notebook(path)
    fitted = fit_parameters(declared, parameters or {}, source.stem)
    config, inputs = _identity(source, notebook, fitted, kernel or _kernel(notebook))
    run = runs.Run(runs.run_folder(source.stem, name, config, inputs))
    return _finished(run, source, [*expected_files(notebook), *expected])


def _kernel(notebook: Any) -> str:
    return notebook.metadata.get("kernelspec", {}).get("name", "python3")


def _identity(
    source: Path, notebook: Any, fitted: Mapping[str, Any], kernel: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """(config, inputs) of a run: what its folder is named after."""
    portable = {key: _portable(value) for key, value in fitted.items()}
    config = {"notebook": source.stem, "kernel": kernel, "parameters": portable}
    return config, input_hashes(notebook, fitted)


def _finished(run: runs.Run, source: Path, promised: Sequence[str]) -> NotebookRun | None:
    """A run that is done, with everything that was promised still there."""
    if not run.done or _missing(run.folder, [*promised, REPORT]):
        return None
    seconds = float(runs.read_json(run.folder / runs.MANIFEST).get("seconds", 0.0))
    executed, report = run.folder / source.name, run.folder / REPORT
    return NotebookRun(run.folder, executed, report, _metrics(run.folder), seconds, reused=True)


def _missing(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not (folder / name).exists()]


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics = runs.read_json(folder / "metrics.json")
    except ValueError as error:
        raise NotebookError(str(error)) from None
    if not isinstance(metrics, dict):
        raise NotebookError(f"{folder / 'metrics.json'}: a JSON object is expected")
    return metrics


def _note(folder: Path, **facts: Any) -> None:
    manifest = folder / runs.MANIFEST
    if manifest.is_file():
        runs.write_json(manifest, runs.read_json(manifest) | facts)


def _execute(
    source: Path,
    executed: Path,
    parameters: dict[str, Any],
    kernel: str,
    timeout_s: float,
    echo: Echo,
    handle: int | None,
) -> None:
    """Papermill with a deadline for the whole notebook; every failure becomes a NotebookError naming the cell.

    The kernel ends with this process, however that ends, and until it has, it holds the lock file `handle`.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from netllm_lib.envcheck import kernel_problem

    if problem := kernel_problem(kernel):
        raise NotebookError(f"{source.stem}: {problem}")
    deadline = time.monotonic() + timeout_s

    def seconds_left(_cell: Any) -> int | None:
        return max(1, int(deadline - time.monotonic())) if timeout_s > 0 else None

    lines = _Lines(echo)
    failure, traceback = "", []
    try:
        with _environment(NETLLM_HEADLESS="1", GOMP_SPINCOUNT=os.environ.get("GOMP_SPINCOUNT", SPIN)):
            papermill.execute_notebook(
                source,
                executed,
                parameters=parameters,
                kernel_name=kernel,
                cwd=runs.PROJECT,
                progress_bar=False,
                stdout_file=lines,
                timeout_func=seconds_left,
                start_timeout=120,
                kernel_manager_class=kernels.bound_to(handle),
            )
    except papermill.PapermillExecutionError as error:
        failure, traceback = f"{error.ename}: {error.evalue}".strip(": "), error.traceback
    except CellTimeoutError:
        failure = f"time limit of {timeout_s:g} s reached"
    except DeadKernelError:
        failure = "the kernel died (often: out of memory)"
    except RuntimeError as error:
        raise NotebookError(f"{source.stem}: the kernel {kernel} did not start: {error}") from None
    finally:
        lines.close()

    cells = nbformat.read(executed, as_version=4).cells
    cells = [
        c for c in cells if not {"injected-parameters", "papermill-error-cell-tag"} & set(c.metadata.get("tags", []))
    ]
    code = [(number, cell) for number, cell in enumerate(cells, 1) if cell.cell_type == "code"]
    begun = [(number, cell) for number, cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    if not failure and len(begun) < len(code):
        failure = "stopped early, by sys.exit or the like; the cells after it were not run"
    if failure:
        number, cell = begun[-1] if begun else (0, {"source": ""})
        first = next((line.strip() for line in cell["source"].splitlines() if line.strip()), "")
        raise NotebookError(
            f"{source.stem}: cell {number} of {len(cells)} ({first!r}): {failure}; executed so far: {executed}",
            executed,
            traceback,
        )


class _Lines(io.TextIOBase):
    """Takes a notebook's standard output and passes on whole lines; of a redrawn line, its last state."""

    def __init__(self, echo: Echo) -> None:
        self.echo = echo
        self.rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.echo(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def close(self) -> None:
        if self.rest:
            self.write("\n")


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the kernels started inside the block."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


# --- sources --------------------------------------------------------------------------------------------------------


def generate(sources: Sequence[Path]) -> dict[Path, str]:
    """The text of the `.ipynb` beside each `.py` source (jupytext's percent format), without outputs."""
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(shutil.copy(source, scratch)) for source in sources]
        made = [copy.with_suffix(".ipynb") for copy in copies]
        for command in (["jupytext", "--quiet", "--to", "ipynb", *copies], ["nbstripout", *made]):
            if copies:
                subprocess.run([sys.executable, "-m", *map(str, command)], check=True)
        return {source.with_suffix(".ipynb"): file.read_text() for source, file in zip(sources, made, strict=True)}


def main() -> None:
    """Regenerate `notebooks/*.ipynb` where they differ from their sources."""
    for path, text in generate(sorted(NOTEBOOKS.glob("*.py"))).items():
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(runs.PROJECT)}")


if __name__ == "__main__":
    main()
