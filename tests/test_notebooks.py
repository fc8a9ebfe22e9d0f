"""The strict runner: parameters, failures, artefacts, reuse, offline reports; and the committed notebooks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from netllm_lib import cli, notebooks, runs
from netllm_lib.notebooks import NotebookError, NotebookRun, run_notebook

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


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A small notebook for the kernel of the tests' own environment."""
    code = [new_code_cell(METRICS), *(new_code_cell(cell) for cell in cells)]
    tagged = new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[tagged, *code], metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the notebooks of this file are; run folders go below it too."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_REPORTS", str(folder / "reports"))
        yield folder


@pytest.fixture(scope="module")
def good(folder: Path) -> tuple[Path, NotebookRun, list[str]]:
    """A notebook that does all it should, its run with strings from a command line, and the lines it printed."""
    path = write_notebook(
        folder,
        "good",
        "# expected: table.txt\npathlib.Path(run_dir, 'table.txt').write_text('1 2 3')",
        "print('step 1\\rstep 2')\nprint('end')",
        "finish(smoke=repr(smoke), steps=steps, cwd=os.getcwd(), headless=os.environ['NETLLM_HEADLESS'])",
    )
    lines: list[str] = []
    return path, run_notebook(path, {"smoke": "false", "steps": "7"}, echo=lines.append), lines


def test_strings_become_the_declared_types(good: tuple[Path, NotebookRun, list[str]]) -> None:
    _, run, lines = good
    assert run.metrics == {"smoke": "False", "steps": 7, "cwd": str(runs.PROJECT), "headless": "1"}
    assert lines == ["step 2", "end"]
    assert run.executed.is_file()
    assert not run.reused


def test_same_content_is_reused_and_other_content_is_not(good: tuple[Path, NotebookRun, list[str]]) -> None:
    path, run, _ = good
    again = run_notebook(path, {"steps": 7, "smoke": False})
    assert again.reused
    assert again.folder == run.folder
    assert again.metrics == run.metrics
    manifest = runs.read_json(run.folder / runs.MANIFEST)
    assert manifest["status"] == "done"
    assert set(manifest["inputs"]) >= {"notebook", "netllm_lib"}


def test_a_lost_artefact_is_made_again_and_force_runs_again(good: tuple[Path, NotebookRun, list[str]]) -> None:
    path, run, _ = good
    (run.folder / "table.txt").unlink()
    (run.folder / "leftover").touch()
    again = run_notebook(path, {"smoke": False, "steps": 7}, force=True, echo=lambda line: None)
    assert not again.reused
    assert (run.folder / "table.txt").is_file()
    assert not (run.folder / "leftover").exists()


def test_typo_is_refused_before_anything_runs(good: tuple[Path, NotebookRun, list[str]]) -> None:
    path = good[0]
    with pytest.raises(ValueError, match=r"no parameter 'smokee', did you mean 'smoke'\?; known: smoke, steps, rate"):
        run_notebook(path, {"smokee": "true"})
    with pytest.raises(ValueError, match="parameter steps is int, got 'many'"):
        run_notebook(path, {"steps": "many"})
    with pytest.raises(ValueError, match="run_dir is set by the runner"):
        run_notebook(path, {"run_dir": "/tmp"})


def test_failing_cell_is_named_and_the_notebook_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_notebook(folder, "fails", "x = 0", "\n1 / x  # oops", "finish()")
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(path)])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "fails: cell 4 of 5 ('1 / x  # oops'): ZeroDivisionError: division by zero" in error
    executed = next((folder / "reports" / "runs" / "fails").glob("*/fails.ipynb"))
    assert str(executed) in error
    assert "ZeroDivisionError" in executed.read_text()
    assert (executed.parent / notebooks.REPORT).is_file()
    assert runs.read_json(executed.parent / runs.MANIFEST)["status"] == "failed"


def test_missing_artefact_fails(folder: Path) -> None:
    path = write_notebook(folder, "forgets", "finish()")
    with pytest.raises(NotebookError, match=r"did not write pool\.npz"):
        run_notebook(path, expected=["pool.npz"])


def test_time_limit(folder: Path) -> None:
    path = write_notebook(folder, "sleeps", "import time\ntime.sleep(60)", "finish()")
    with pytest.raises(NotebookError, match=r"cell 3 of 4 \('import time'\): time limit of 1 s reached"):
        run_notebook(path, timeout_s=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [("raise SystemExit", "stopped early"), ("os._exit(3)", "the kernel died")],
    ids=["exit", "death"],
)
def test_early_end_is_a_failure(folder: Path, line: str, message: str) -> None:
    path = write_notebook(folder, f"ends_{message[-4:]}", f"finish()\n{line}", "print('never')")
    with pytest.raises(NotebookError, match=message):
        run_notebook(path)


def test_refusals_that_need_no_kernel(folder: Path) -> None:
    path = write_notebook(folder, "plain", "finish()")
    with pytest.raises(ValueError, match="never run in place"):
        run_notebook(path, run_dir=folder)
    with pytest.raises(NotebookError, match="no Jupyter kernel named nothing"):
        run_notebook(path, kernel="nothing")
    with pytest.raises(ValueError, match="needs `run_dir"):
        run_notebook(write_notebook(folder, "homeless", parameters="a: int = 1"))
    with pytest.raises(ValueError, match="one cell tagged 'parameters', found 0"):
        nbformat.write(new_notebook(cells=[new_code_cell("1")]), folder / "none.ipynb")
        run_notebook(folder / "none.ipynb")
    with pytest.raises(FileNotFoundError, match="no notebook nosuch"):
        run_notebook("nosuch")


def test_find_notebook_by_number_stem_and_source(tmp_path: Path) -> None:
    path = write_notebook(tmp_path, "03_pool")
    write_notebook(tmp_path, "04_a")
    write_notebook(tmp_path, "04_b")
    for name in ("03", "03_pool", "03_pool.ipynb", path, path.with_suffix(".py")):
        assert notebooks.find_notebook(name, tmp_path) == path
    with pytest.raises(FileNotFoundError, match="04 could be any of 04_a, 04_b"):
        notebooks.find_notebook("04", tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean '03_pool'"):
        notebooks.find_notebook("03_pol", tmp_path)


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        ("bool", "False", False),
        ("bool", "yes", True),
        ("int", "-3", -3),
        ("float", "1e-3", 1e-3),
        ("float", 2, 2.0),
        ("str", "007", "007"),
        ("int | None", "none", None),
        ("int | None", "4", 4),
        ("str | None", "None", None),
        ("Optional[float]", "0.5", 0.5),
        ("list[int]", "1,2", [1, 2]),
        ("list[str]", "['a', 'b,c']", ["a", "b,c"]),
        ("tuple[float, ...]", [1, 2], [1.0, 2.0]),
        ("Literal['argmax', 'sample']", "sample", "sample"),
        ("dict", "{'a': 1}", {"a": 1}),
        ("'int'", "5", 5),
    ],
)
def test_fitting(annotation: str, given: object, expected: object) -> None:
    declared = {"x": notebooks.Parameter("x", annotation, None, "")}
    fitted = notebooks.fit_parameters(declared, {"x": given}, "n")["x"]
    assert fitted == expected
    assert type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        ("bool", "flase"),
        ("bool", 2),
        ("int", "1.5"),
        ("int", 1.5),
        ("int", True),
        ("float", "fast"),
        ("str", 3),
        ("list[int]", "1,b"),
        ("Literal['argmax', 'sample']", "max"),
        ("int | None", "x"),
        ("Path", "x"),
    ],
)
def test_misfits(annotation: str, given: object) -> None:
    declared = {"x": notebooks.Parameter("x", annotation, None, "")}
    with pytest.raises(ValueError, match=re.escape(f"n: parameter x is {annotation}, got {given!r}")):
        notebooks.fit_parameters(declared, {"x": given}, "n")


def test_parameters_cell_is_read_with_types_defaults_and_help() -> None:
    source = 'a: int = 3  # how many\nb = "x=y"  # an = sign\nc: float = 1 / 3\n"""A note."""\n'
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    found = notebooks.read_parameters(new_notebook(cells=[cell]))
    assert found["a"] == notebooks.Parameter("a", "int", 3, "how many")
    assert found["b"] == notebooks.Parameter("b", "str", "x=y", "an = sign")
    assert (found["c"].type, found["c"].default) == ("float", None)


def test_input_files_are_part_of_the_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "trace").write_text("0 1.5")
    before = notebooks.fingerprint(data)
    (data / "cache").mkdir()
    (data / "cache" / "weights").write_text("can be made again")
    assert notebooks.fingerprint(data) == before
    (data / "trace").write_text("0 2.5")
    assert notebooks.fingerprint(data) != before


# --- the committed notebooks ----------------------------------------------------------------------------------------

SOURCES = sorted(notebooks.NOTEBOOKS.glob("*.py"))


def test_notebooks_are_generated_from_their_sources() -> None:
    """If this fails: `make notebooks`."""
    assert sorted(notebooks.NOTEBOOKS.glob("*.ipynb")) == [source.with_suffix(".ipynb") for source in SOURCES]
    for path, text in notebooks.generate(SOURCES).items():
        assert path.read_text() == text, f"{path.name} differs from its source: make notebooks"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebooks_keep_the_rules(source: Path) -> None:
    import papermill

    path = source.with_suffix(".ipynb")
    _, declared, notebook = notebooks.open_notebook(path)
    assert notebook.metadata["kernelspec"]["name"] in ("netllm-llm", "netllm-tf")
    # papermill --help-notebook shows what our reader finds
    assert list(papermill.inspect_notebook(path)) == list(declared)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            lines = [line for line in cell.source.splitlines() if not re.match(r"(import|from) |$", line)]
            assert len(lines) <= 10, f"a long cell: {lines[0]}"
    assert json.loads(path.read_text())["nbformat"] == 4
