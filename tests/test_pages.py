"""Reports and the index: they fetch nothing, fold the code away, and sort."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from netllm_lib import cli, compare, gate, reports, runs, stats
from netllm_lib.measure import Measure, Scores
from netllm_lib.parameters import notebook_run
from netllm_lib.reports import COLUMNS, list_runs, update_index, write_index
from netllm_lib.text import escaped, printable, printable_output

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def fetched(html: str) -> list[str]:
    """What makes a browser fetch something."""
    return re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"'](?!data:)[^>]*>", html) + re.findall(
        r"(?:import\(|import [\w{} ,]*from |url\()[\"']?https?:[^)]*", html
    )


def export(folder: Path, *cells: nbformat.NotebookNode) -> Path:
    notebook = new_notebook(cells=list(cells))
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(notebook, folder / "a.ipynb")
    reports.export_html(folder / "a.ipynb", folder / "a.html")
    return folder / "a.html"


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The page of a notebook with two code cells, a figure, a widget and a formula."""
    shown = new_output("display_data", {"text/plain": "a figure", "image/png": PICTURE})
    widget = new_output("display_data", {reports.WIDGET: {"model_id": "1"}, "text/plain": "interactive(…)"})
    code = new_code_cell("interact(plot)", outputs=[shown, widget])
    return export(tmp_path, new_markdown_cell("# A title\n$x$"), code, new_code_cell("1"))


def test_a_report_fetches_nothing_and_has_its_figures_inside(report: Path) -> None:
    html = report.read_text()
    assert fetched(html) == []
    assert re.search(r'<img[^>]*src="data:image/png', html)
    assert "interactive(" not in html


def test_code_is_one_click_away(report: Path, page: Any) -> None:
    page.goto(report.as_uri())
    folded = page.locator("details.code pre")
    assert folded.count() == 2
    assert not folded.first.is_visible()
    page.locator("details.code summary").first.click()
    assert folded.first.is_visible()


def test_fetched_sees_what_nbconvert_does_by_default() -> None:
    assert fetched('<script src="https://cdn/x.js"></script>')
    assert fetched("import mermaid from 'https://cdn/x.mjs'")


def test_a_report_keeps_the_last_line_of_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print("before")
    for stage in ("round 1, play", "round 1, train", "round 2, play"):
        told = runs.progress(stage, every_s=0)
        for done in (1, 2, 3):
            told(done, 3, {"loss": 0.5})
    print("after")
    lines = capsys.readouterr().out.splitlines(keepends=True)
    outputs = [new_output("stream", name="stdout", text=line) for line in lines]  # as a kernel sends them
    html = export(tmp_path, new_code_cell("1", outputs=outputs)).read_text()
    shown = re.findall(r"^(?:<pre>)?(before|after|.*left)$", html, re.MULTILINE)
    assert [line.split("  ")[0] for line in shown] == [
        "before", "round 1, play: 3/3", "round 1, train: 3/3", "round 2, play: 3/3", "after",
    ]  # fmt: skip


def test_foreign_text_is_only_shown(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>\x1b]0;title\x07\u202eevil\udcff"
    assert printable(f"\x1b[31mred\x1b[0m {hostile}\r\n\ta\rb") == (
        "red <img src=x onerror=alert(1)>?]0;title??evil?\r\n\ta?b"
    )
    assert "<" not in escaped(hostile)
    text = hostile[:-1]
    table = pd.DataFrame({text: [text]}, [text]).to_html()  # as a notebook shows one
    outputs = [new_output("display_data", {"text/html": table}), new_output("stream", text=text)]
    assert "<img" not in export(tmp_path, new_code_cell("1", outputs=outputs)).read_text()


def test_printable_output(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_output():
        print("\rbar: 3 %\x1b[A")
        print("\x1b]0;owned\x07", file=sys.stderr)
    assert capsys.readouterr() == ("\rbar: 3 %\n", "?]0;owned?\n")


# --- the index ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reports folder: a test with a report, a diagnosis, a run that never ended, and folders that cannot be read."""
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path))
    values = pd.DataFrame({"trace": [0, 1], "llm": [0.5, 1.0], "mpc": [1.0, 1.5], "bba": [0.0, 0.5]})
    scores = Scores(Measure("reward"), "llm", values.melt("trace", None, "policy", "reward"), "fcc-test")
    for name, finding in (("b & co", "gap"), ("a", None), ("c<script>", "diverged")):
        run = notebook_run(str(tmp_path / "runs" / "05_test" / name), "05_test")
        if name == "b & co":
            scores.save(run.folder)
            (run.folder / "report.html").touch()
        if finding:
            runs.write_json(run.folder / reports.FINDINGS, {"findings": [{"id": finding}, {"id": "note"}]})
        run.finish({"policies": {"mine": 0.9}})  # whatever a notebook likes to keep
    runs.open_run("04_finetune", "x", {})
    broken = ((runs.MANIFEST, "{"), (runs.MANIFEST, "[]"), ("scores.json", '{"measure": 1}'))
    for number, (name, text) in enumerate(broken):
        run = notebook_run(str(tmp_path / "runs" / "06_diagnostics" / f"broken{number}\x1b"), "06_diagnostics")
        (run.folder / name).write_text(text)
    return tmp_path


def test_the_index_shows_every_run_and_a_bad_one_hides_no_other(root: Path) -> None:
    rows = {row["run"]: row for row in list_runs()}
    assert len(rows) == 7
    tested = rows["b & co"]
    known = ("kind", "state", "tested on", "measure", "policy", "score", "best other", "difference", "first finding")
    assert [tested[name] for name in known] == [
        *("05_test", "done", "fcc-test", "reward", "llm", 0.75, "mpc", -0.5, "gap"),
    ]
    assert tested["low"] < 0.75 < tested["high"]
    assert (rows["a"]["score"], rows["a"]["first finding"]) == (None, None)
    assert [row["state"] for row in rows.values() if row["kind"] == "04_finetune"] == ["started"]
    assert [rows[f"broken{i}?"]["state"] for i in range(3)] == ["unreadable"] * 3
    page = write_index().read_text()
    assert fetched(page) == []
    assert (page.count("<tr"), page.count("<a href="), page.count("<script")) == (1 + 7, 1, 1)
    assert '<a href="runs/05_test/b%20%26%20co/report.html">b &amp; co</a>' in page
    assert "<td>-0.500</td>" in page
    assert all(f"<th>{name}</th>" in page for name in COLUMNS)
    assert not re.search(r"<td>(?:nan|None|NaN)</td>", page)


ODD: list[Any] = [
    *(None, [], {}, "", True, -1, 3.5, 1e308, float("nan"), float("inf"), 10**400, "9" * 5000, [[[]]], {"a": {}}),
    *("<script>", "x\x1b[31m\x07", "\ud800", "../../x", "a\0b", "2026-01-01", "2026-01-01T00:00:00"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, or in JSON a value or a name replaced by an odd one."""
    if data.startswith(b"{") and rng.random() < 0.6:
        whole = at = json.loads(data)
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or rng.random() < 0.3:
                break
            at = at[key]
        if isinstance(at, dict) and rng.random() < 0.2:
            key = rng.choice(["run", "folder", "report", "state", "finished", "parents", "é"])
        if not at or rng.random() < 0.05:
            whole = rng.choice(ODD)
        else:
            at[key] = rng.choice(ODD)
        return json.dumps(whole).encode()
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at, count = rng.randrange(len(changed) + 1), rng.choice([0, 1, 1, 40])
        changed[at : at + count] = rng.randbytes(rng.choice([0, 1, 1, 20]))
    return bytes(changed)


def test_whatever_is_in_a_folder_hides_no_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 20)
    good = root / "runs" / "05_test" / "b & co"
    bad = shutil.copytree(good, good.with_name("odd"))
    runs.write_json(bad / runs.METRICS, {"policies": {"mine": 0.9}})
    kept = {path: path.read_bytes() for path in bad.iterdir() if path.suffix in (".json", ".parquet")}
    points = pd.DataFrame([{"point": 1, "run.a": str(good)}, {"point": 2, "run.b": str(bad)}])

    def others() -> list[dict[str, Any]]:
        return [row for row in list_runs() if row["folder"] != bad]

    rng, expected = random.Random(0), others()
    for number in range(int(os.environ.get("NETLLM_MUTATIONS", "50"))):
        path = rng.choice(sorted(kept))
        path.write_bytes(mutated(kept[path], rng))
        assert others() == expected, (number, path.name)
        if number % 5 == 0:
            cli.reports()
            assert (root / "index.html").read_text().count("<script") == 1
        results = compare.collect(points)
        assert 1 in set(results["point"])
        results.to_parquet()
        verdicts = gate.judge([gate.Gate("mpc", 9)], {"good": good, "bad": bad})
        assert verdicts[0].state == "passed"
        assert runs.latest("05_test").parent == good.parent
        path.write_bytes(kept[path])


def test_a_page_that_cannot_be_written_fails_no_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "index.html").mkdir()
    (root / "index.html" / "taken").touch()
    update_index()
    assert "the index of all runs was not written: " in capsys.readouterr().err


def test_an_empty_reports_folder_has_an_index_too(tmp_path: Path) -> None:
    assert write_index(tmp_path).is_file()


def test_the_index_sorts_and_filters(root: Path, page: Any) -> None:
    def names() -> list[str]:
        shown = [row.inner_text().split("\t")[0] for row in page.locator("tbody tr").all() if row.is_visible()]
        return [name for name in shown if len(name) < 10]

    page.goto(write_index().as_uri())
    run = page.locator("th", has_text="run").first
    run.click()
    assert names() == ["a", "b & co", "broken0?", "broken1?", "broken2?", "c<script>"]
    run.click()
    assert run.get_attribute("aria-sort") == "descending"
    assert names()[0] == "c<script>"
    page.locator("th", has_text="score").click()
    assert names()[0] == "b & co"  # what is missing comes last
    page.fill("#filter", "GAP")
    assert names() == ["b & co"]
