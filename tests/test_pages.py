"""Reports and the index: they fetch nothing, fold the code away, and sort."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import browser
from netllm_lib import reports as pages
from netllm_lib import runs
from netllm_lib.index import COLUMNS, overview, write_index

ROWS = [
    {"run": pages.Link("b & co", "runs/b%20c/report.html"), "reward": 0.25, "finding": "gap"},
    {"run": pages.Link("a", "runs/a/report.html"), "reward": float("nan"), "finding": None},
    {"run": pages.Link("c<script>", "runs/c/report.html"), "reward": -1.5, "finding": "diverged"},
]


def fetched(html: str) -> list[str]:
    """What makes a browser fetch something."""
    return re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"'](?!data:)[^>]*>", html) + re.findall(
        r"(?:import\(|import [\w{} ,]*from |url\()[\"']?https?:[^)]*", html
    )


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The page of a notebook with two code cells, a figure, a widget and a formula."""
    widget = "application/vnd.jupyter.widget-view+json"
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    shown = new_output("display_data", {"text/plain": "a figure", "image/png": picture})
    outputs = [shown, new_output("display_data", {widget: {"model_id": "1"}, "text/plain": "interactive(…)"})]
    cells = [new_markdown_cell("# A title\n$x$"), new_code_cell("interact(plot)", outputs=outputs), new_code_cell("1")]
    notebook = new_notebook(cells=cells)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(notebook, tmp_path / "a.ipynb")
    pages.export_html(tmp_path / "a.ipynb", tmp_path / "a.html")
    return tmp_path / "a.html"


def test_a_report_fetches_nothing_and_has_its_figures_inside(report: Path) -> None:
    html = report.read_text()
    assert fetched(html) == []
    assert '<img alt="No description has been provided for this image" class="" src="data:image/png' in html.replace(
        "\n", ""
    )
    assert "interactive(" not in html


def test_a_report_keeps_the_last_line_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "headless", lambda: True)
    print("before")
    for stage in ("round 1, play", "round 1, train", "round 2, play"):
        told = runs.progress(stage, every_s=0)
        for done in (1, 2, 3):
            told(done, 3, {"loss": 0.5})
    print("after")
    lines = capsys.readouterr().out.splitlines(keepends=True)
    outputs = [new_output("stream", name="stdout", text=line) for line in lines]  # as a kernel sends them
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), tmp_path / "a.ipynb")
    pages.export_html(tmp_path / "a.ipynb", tmp_path / "a.html")
    shown = re.findall(r"^(?:<pre>)?(before|after|.*left)$", (tmp_path / "a.html").read_text(), re.MULTILINE)
    assert [line.split("  ")[0] for line in shown] == [
        "before", "round 1, play: 3/3", "round 1, train: 3/3", "round 2, play: 3/3", "after",
    ]  # fmt: skip


def test_fetched_sees_what_nbconvert_does_by_default() -> None:
    assert fetched('<script src="https://cdn/x.js"></script>')
    assert fetched('import mermaid from "https://cdn/x.mjs"'.replace('"https', "'https"))


def test_numbers_sort_as_numbers_and_nothing_is_markup(tmp_path: Path) -> None:
    html = pages.table_page("Runs & more", "text", ROWS)
    assert fetched(html) == []
    assert "<script>" not in html.split("<tbody>")[1].split("</tbody>")[0]
    assert '<th>run</th><th class="number">reward</th><th>finding</th>' in html
    assert '<td class="number" data-key="-1.5">-1.500</td>' in html
    assert '<a href="runs/b%20c/report.html">b &amp; co</a>' in html
    assert pages.table_page("Runs", "none yet", []).count("<tr>") == 1


def test_code_is_one_click_away(report: Path) -> None:
    with browser.page() as page:
        page.goto(report.as_uri())
        code = page.locator("details.code pre")
        assert code.count() == 2
        assert not code.first.is_visible()
        page.locator("details.code summary").first.click()
        assert code.first.is_visible()
        page.click("#all-code")
        assert code.last.is_visible()
        assert page.locator("#all-code").text_content() == "hide all code"
        page.click("#all-code")
        assert not code.last.is_visible()


def test_the_index_sorts_and_filters(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(pages.table_page("Runs", "text", ROWS))

    def names() -> list[str]:
        return [row.inner_text().split("\t")[0] for row in page.locator("tbody tr").all() if row.is_visible()]

    with browser.page() as page:
        page.goto((tmp_path / "index.html").as_uri())
        assert names() == ["b & co", "a", "c<script>"]
        reward = page.locator("th", has_text="reward")
        reward.click()
        assert names() == ["c<script>", "b & co", "a"]  # what is missing comes last
        reward.click()
        assert reward.get_attribute("aria-sort") == "descending"
        assert names() == ["b & co", "c<script>", "a"]
        page.locator("th", has_text="run").click()
        assert names() == ["a", "b & co", "c<script>"]
        page.fill("#filter", "GAP")
        assert names() == ["b & co"]


# --- the table of runs ----------------------------------------------------------------------------------------------


def make_run(kind: str, config: object, metrics: dict[str, object] | None) -> runs.Run:
    run = runs.open_run(kind, "x", config)
    if metrics is not None:
        run.finish(metrics)
    return run


def test_overview_reads_what_the_notebooks_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path))
    league = {
        name: {"reward": reward, "low": reward - 0.1, "high": reward + 0.1}
        for name, reward in (("mpc", 1.0), ("llm", 0.75), ("bba", 0.5))
    }
    test = make_run("05_test", 1, {"policies": league})
    (test.folder / "report.html").touch()
    diagnosis = {
        "run": "llm",
        "reward": {"llm": 0.75, "mpc": 1.0},
        "interval": [0.5, 1.0],
        "differences": {"llm − mpc": [-0.25, -0.4, -0.1], "llm − mpc (original)": [-0.125, -0.2, 0.1]},
        "regret": 0.5,
        "findings": ["undertrained", "gap"],
    }
    make_run("06_diagnostics", 2, diagnosis)
    sweep = {"what": "mean reward of llm per chunk", "best": "rank 8", "best_interval": [0.5, 0.25, 0.75]}
    make_run("08_compare", 5, {**sweep, "baseline": "mpc", "minus_baseline": {"rank 8": [-0.5, -0.75, -0.25]}})
    make_run("import", 3, {"mean_reward": {"llm": -9.5}})
    make_run("04_finetune", 4, None)
    (tmp_path / "runs" / "05_test" / "broken").mkdir()
    (tmp_path / "runs" / "05_test" / "broken" / runs.MANIFEST).write_text("{")

    rows = {(row["kind"], row["state"]): row for row in overview()}
    tested, explained = rows["05_test", "done"], rows["06_diagnostics", "done"]
    assert (tested["policy"], tested["reward"], tested["low"], tested["− mpc"]) == ("llm", 0.75, 0.65, -0.25)
    assert tested["− mpc (original)"] is None
    assert [explained[name] for name in ("reward", "low", "high", "− mpc", "− mpc (original)", "− optimum")] == [
        *(0.75, 0.5, 1.0, -0.25, -0.125, -0.5)
    ]
    assert explained["first finding"] == "undertrained"
    assert rows["import", "done"]["reward"] == -9.5
    compared = rows["08_compare", "done"]
    assert [compared[name] for name in ("policy", "reward", "low", "high", "− mpc")] == [
        "rank 8",
        0.5,
        0.25,
        0.75,
        -0.5,
    ]
    assert rows["04_finetune", "started"]["reward"] is None
    assert rows["05_test", "unreadable"]["run"] == "broken"

    html = write_index().read_text()
    assert (tmp_path / "index.html").read_text() == html
    assert html.count("<tr>") == 1 + len(rows)
    assert html.count("<a href=") == 1
    assert f'href="runs/05_test/{test.folder.name}/report.html"' in html
    assert all(f">{name}<" in html for name in COLUMNS)


def test_an_empty_reports_folder_has_an_index_too(tmp_path: Path) -> None:
    assert write_index(tmp_path).is_file()
