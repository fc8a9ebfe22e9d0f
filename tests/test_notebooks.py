"""The strict runner: parameters, failures, artefacts, reuse; and the committed notebooks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import netllm_lib
from netllm_lib import abr, notebooks, runs
from netllm_lib.notebooks import NotebookError, run_notebook

PARAMETERS = """
smoke: bool = True  # tiny sizes
steps: int = 5
rate: float = 1e-3
run_dir: str = ""
"""
METRICS = """
import json, os, pathlib
def finish(**metrics):
    pathlib.Path(run_dir, "metrics.json").write_text(json.dumps(metrics))
"""


CHOSEN = "notebook_run(run_dir, 'chooses').finish({'choose': choose})"


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, kernel: str = "python3") -> Path:
    """A small notebook for the kernel of the tests' own environment."""
    code = [new_code_cell(METRICS), *map(new_code_cell, cells)]
    tagged = new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    spec = {"name": kernel, "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[tagged, *code], metadata={"kernelspec": spec}), path)
    return path


def wait_for(path: Path, pattern: str, lines: int = 1, timeout_s: float = 60.0) -> Path:
    """The first file that matches, once it has so many lines."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for found in path.glob(pattern):
            if len(found.read_text().splitlines()) >= lines:
                return found
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} below {path}")


def is_gone(pid: int) -> bool:
    """No such process, or only its entry, which waits to be collected."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the notebooks of this file are; run folders go below it too."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield folder


def test_a_run_is_strict_reused_and_made_again(folder: Path) -> None:
    """Strings become the declared types; the same content is reused; lost files are made again; `force` empties the folder."""
    table = "# expected: table.txt\npathlib.Path(run_dir, 'table.txt').write_text('1 2 3')"
    asked = "finish(smoke=repr(smoke), steps=steps, cwd=os.getcwd(), headless=os.environ['NETLLM_HEADLESS'])"
    path = write_notebook(folder, "good", table, "print('step 1\\rstep 2')\nprint('end')", asked)
    lines: list[str] = []
    run = run_notebook(path, {"smoke": "false", "steps": "7"}, echo=lines.append)
    assert run.metrics == {"smoke": "False", "steps": 7, "cwd": str(runs.PROJECT), "headless": "1"}
    assert lines == ["step 2", "end"]
    assert (run.folder / notebooks.REPORT).is_file()
    again = run_notebook(path, {"steps": 7, "smoke": False})
    assert (again.reused, again.folder, again.metrics) == (True, run.folder, run.metrics)
    (run.folder / "table.txt").unlink()
    (run.folder / "leftover").touch()
    assert not run_notebook(path, {"smoke": False, "steps": 7}).reused
    assert (run.folder / "leftover").is_file()
    assert not run_notebook(path, {"smoke": False, "steps": 7}, force=True).reused
    assert (run.folder / "table.txt").is_file()
    assert not (run.folder / "leftover").exists()
    for given, message in (
        ({"smokee": "true"}, r"good has no parameter 'smokee', did you mean 'smoke'\?; known: smoke, steps, rate"),
        ({"steps": "many"}, "good: parameter steps is int, got 'many'"),
        ({"rate": True}, "good: parameter rate"),
        ({"run_dir": "/tmp"}, "run_dir is set by the runner"),
    ):
        with pytest.raises(ValueError, match=message):
            run_notebook(path, given)


def test_notebooks_that_cannot_be_run_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs `run_dir"):
        run_notebook(write_notebook(folder, "homeless", parameters="a: int = 1"))
    (folder / "broken.ipynb").write_text("[]")
    with pytest.raises(ValueError, match=r"broken\.ipynb"):
        run_notebook(folder / "broken.ipynb")
    for kind, message in (
        ("Tensor", "its type Tensor is none of"),
        ("__import__('os').fork()", "type"),
        ("'int'()", "type"),
    ):
        with pytest.raises(ValueError, match=rf"strange\.ipynb: parameter x: .*{message}"):
            run_notebook(write_notebook(folder, "strange", parameters=f'x: {kind} = 1\nrun_dir: str = ""'))


CHOICES = """
from pathlib import Path
from typing import Literal

Choose = Literal["argmax", "sample"]
choose: Choose = "argmax"
steps: int | None = None
folders: list[Path] = []
run_dir: str = ""
"""


def test_choices_are_declared_and_checked_by_plain_papermill_too(folder: Path) -> None:
    """A person, and each choice of papermill's parameters, gets a folder of its own."""
    import papermill

    path = write_notebook(
        folder, "chooses", "from netllm_lib.parameters import notebook_run", CHOSEN, parameters=CHOICES
    )
    assert run_notebook(path, {"choose": "sample", "steps": "none"}).metrics == {"choose": "sample"}
    with pytest.raises(ValueError, match=r"parameter choose is Literal\['argmax', 'sample'\], got 'greedy'"):
        run_notebook(path, {"choose": "greedy"})
    for given, message in (
        ({"choosee": "sample"}, "chooses has no parameter 'choosee', did you mean 'choose'"),
        ({"choose": "greedy"}, "chooses: parameter choose: it should be 'argmax' or 'sample', got 'greedy'"),
        ({"steps": "false"}, "chooses: parameter steps: it should be a valid integer, got 'false'"),
    ):
        with pytest.raises(papermill.PapermillExecutionError, match=re.escape(message)):
            papermill.execute_notebook(path, folder / "out.ipynb", given, cwd=runs.PROJECT, progress_bar=False)
    for fitting in (
        dict[str, object](choose="sample"),
        dict[str, object](choose="sample", steps=2),
        dict[str, object](),
    ):
        papermill.execute_notebook(path, folder / "out.ipynb", fitting, cwd=runs.PROJECT, progress_bar=False)
    made = sorted(place.name.partition("-")[0] for place in (folder / "reports" / "runs" / "chooses").iterdir())
    assert made == ["interactive", "papermill", "papermill", "run"]


def test_failing_cell_is_named_and_the_notebook_kept(folder: Path) -> None:
    path = write_notebook(folder, "fails", "x = 0", "\n1 / x  # oops", "finish()")
    with pytest.raises(NotebookError, match=r"fails: cell 4 of 5 \('1 / x  # oops'\): ZeroDivisionError") as failed:
        run_notebook(path)
    executed = next((folder / "reports" / "runs" / "fails").glob("*/fails.ipynb"))
    assert failed.value.executed == executed
    assert "ZeroDivisionError" in executed.read_text()
    assert (executed.parent / notebooks.REPORT).is_file()
    assert runs.Run(executed.parent).manifest["status"] == "failed"


@pytest.mark.parametrize(
    ("name", "cells", "message"),
    [
        ("forgets", ["# expected: pool.npz", "finish()"], r"did not write pool\.npz"),
        ("sleeps", ["import time\ntime.sleep(60)"], r"cell 3 of 3 \('import time'\): time limit of 1 s reached"),
        ("exits", ["finish()\nraise SystemExit", "print('never')"], "stopped early"),
        ("dies", ["finish()\nos._exit(3)", "print('never')"], "the kernel died"),
        ("lists", ["pathlib.Path(run_dir, 'metrics.json').write_text('[]')"], "metrics.json"),
    ],
)
def test_other_failures(folder: Path, name: str, cells: list[str], message: str) -> None:
    path = write_notebook(folder, name, *cells)
    with pytest.raises(NotebookError, match=message):
        run_notebook(path, timeout_s=1 if name == "sleeps" else 60)


def test_a_kernel_that_holds_pythons_lock_dies_with_its_parent(folder: Path) -> None:
    """ipykernel's own poller cannot end such a kernel. Whoever takes the work up again is then alone."""
    kernel = "pathlib.Path(run_dir, 'kernel').write_text(str(os.getpid()))"
    path = write_notebook(folder, "stuck", kernel, "sum(range(10**11))", "finish()")
    code = f"from netllm_lib import notebooks; notebooks.run_notebook({str(path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    written = wait_for(folder / "reports" / "runs" / "stuck", "*/kernel")
    with pytest.raises(runs.Busy), runs.lock(written.parent):
        pass
    time.sleep(0.3)  # until it computes
    parent.kill()
    parent.wait()
    end = time.monotonic() + 5
    while not is_gone(int(written.read_text())) and time.monotonic() < end:
        time.sleep(0.001)
    assert is_gone(int(written.read_text()))
    with runs.lock(written.parent):
        pass


def test_find_notebook_by_number_stem_and_source(tmp_path: Path) -> None:
    path = write_notebook(tmp_path, "03_pool")
    write_notebook(tmp_path, "04_a")
    write_notebook(tmp_path, "04_b")
    for name in ("03", "3", "03_pool", "03_pool.ipynb", path, path.with_suffix(".py")):
        assert notebooks.find_notebook(name, tmp_path) == path
    with pytest.raises(FileNotFoundError, match="04 could be any of 04_a, 04_b"):
        notebooks.find_notebook("04", tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean '03_pool'"):
        notebooks.find_notebook("03_pol", tmp_path)


# --- what a run is made from --------------------------------------------------------------------------------------------


def test_inputs_are_what_paths_lead_to_and_the_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_DATA", str(tmp_path / "data"))
    declared = 'from pathlib import Path\n\ndata: Path = ""\nmore: list[Path] = []\nword: str = ""\nrun_dir: str = ""'
    cells = ["from netllm_lib.abr import qoe"]
    opened = notebooks.open_notebook(write_notebook(tmp_path, "reads", *cells, parameters=declared))
    (tmp_path / "data" / "cache").mkdir(parents=True)
    file = tmp_path / "data" / "trace"
    file.write_text("0 1.5")
    given = {"more": [str(file)], "word": str(file)}
    found = notebooks.input_hashes(opened, given)
    assert set(found) == {"notebook", "netllm_lib", "netllm_lib.abr", "data", f"more: {file}"}

    (tmp_path / "data" / "cache" / "weights").write_text("can be made again")
    assert notebooks.input_hashes(opened, given) == found
    file.write_text("0 2.5")
    changed = notebooks.input_hashes(opened, given)
    assert {name for name in found if found[name] != changed[name]} == {"data", f"more: {file}"}
    monkeypatch.setattr(abr, "ARITHMETIC", 99)
    assert notebooks.input_hashes(opened, given)["netllm_lib.abr"] == "99"
    plain = notebooks.open_notebook(write_notebook(tmp_path, "plain", "import netllm_lib.runs as runs"))
    assert notebooks.input_hashes(plain, {}).items() > {"netllm_lib": str(netllm_lib.ARITHMETIC)}.items()


def test_a_finished_run_is_known_by_its_name_and_when_it_was_finished(tmp_path: Path) -> None:
    run = runs.open_run("pool", "a", {}, root=tmp_path)
    (run.folder / "pool").touch()
    run.finish({})
    before = [notebooks.fingerprint(place) for place in (run.folder, run.folder / "pool")]
    assert before[0] != before[1]
    (run.folder / "pool").write_text("nobody writes into a finished run")
    assert [notebooks.fingerprint(place) for place in (run.folder, run.folder / "pool")] == before
    run.note(finished="later")
    assert notebooks.fingerprint(run.folder) != before[0]


# --- the committed notebooks --------------------------------------------------------------------------------------------

SOURCES = sorted(notebooks.NOTEBOOKS.glob("*.py"))


def test_notebooks_are_generated_from_their_sources() -> None:
    """If this fails: `make notebooks`."""
    assert sorted(notebooks.NOTEBOOKS.glob("*.ipynb")) == [source.with_suffix(".ipynb") for source in SOURCES]
    for source in SOURCES:
        assert source.with_suffix(".ipynb").read_text() == notebooks.generate(source), f"{source}: make notebooks"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebooks_keep_the_rules(source: Path) -> None:
    notebook = notebooks.open_notebook(source)
    assert notebook.kernel in ("netllm-llm", "netllm-tf")
    tagged = next(cell for cell in notebook.content.cells if "parameters" in cell.metadata.get("tags", []))
    written = re.findall(r"^(\w+): ", tagged.source, flags=re.MULTILINE)
    assert written == [*notebook.parameters, "run_dir"], "papermill cannot read one of them"
    for code in notebook.code:
        lines = [line for line in code.splitlines() if not re.match(r"(import|from) |$", line)]
        assert code == tagged.source or len(lines) <= 10, f"a long cell: {lines[0]}"
    assert json.loads(notebook.path.read_text())["nbformat"] == 4
