"""Notebook 06 as a person uses it: JupyterLab in a real browser, on a small run that is prepared here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest

from netllm_lib import notebooks, runs
from run_fixtures import prepare_run
from test_notebooks import wait_for

QUIET = {  # no questions, no downloads; every cell is in the page, not only those in view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
RUN_MS, REDRAW_MS = 150_000, 30_000  # on a busy machine


@contextmanager
def jupyterlab(root: Path, home: Path, **variables: str) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab that serves `root`, with settings of its own below `home`; it ends with the block.

    `variables` are environment variables of the server, and so of its kernels.
    """
    for name, value in QUIET.items():
        place = home / "settings" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(value))
    environment = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={root}"]
    with open(home / "jupyterlab.log", "wb") as log:
        command = [sys.executable, "-m", "jupyter", "lab", *words]
        server = subprocess.Popen(command, env={**os.environ, **environment, **variables}, stdout=log, stderr=log)
    try:
        found = runs.read_json(wait_for(home / "runtime", f"jpserver-{server.pid}.json", lines=5))
        yield found["url"].rstrip("/"), found["token"]
    finally:
        server.terminate()  # it ends its kernels
        server.wait(20)


@pytest.mark.slow
def test_notebook_06_in_jupyterlab(page: Any, tmp_path: Path) -> None:
    """Run all cells, choose another trace, step through its chunks, turn a switch and play the trace again."""
    run = prepare_run(tmp_path, epochs=1)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.read(notebooks.NOTEBOOKS / "06_diagnostics.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = re.sub(r"^budget_s: float = .*$", "budget_s: float = 5.0", cell.source, flags=re.MULTILINE)
    nbformat.write(notebook, folder / "06_diagnostics.ipynb")
    places = {"DATA": run.data, "REPORTS": run.reports, "CACHE": tmp_path / "cache"}
    with jupyterlab(folder, tmp_path, **{f"NETLLM_{k}": str(v) for k, v in places.items()}) as (address, token):
        try:
            page.goto(f"{address}/lab/tree/06_diagnostics.ipynb?token={token}")
            run_all_cells(page)
            use_the_explorer(page)
            assert errors(page) == []
        finally:
            page.screenshot(path=tmp_path / "page.png")
    made = run.folder("06_diagnostics", "interactive")
    assert {"findings.json", "summary.txt", "timeline.png"} <= {path.name for path in made.iterdir()}


def run_all_cells(tab: Any) -> None:
    """By the menu, as a person does; returns when the widgets of the explorer are there and the kernel rests."""
    tab.locator(".jp-Notebook-cell").first.wait_for(timeout=60_000)
    # before there is a kernel, it is idle too
    tab.locator(".jp-Toolbar-kernelName", has_text="NetLLM (PyTorch)").wait_for(timeout=60_000)
    tab.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=60_000)
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_text("Run All Cells", exact=True).click()
    done = tab.locator(".jp-OutputArea-output img.widget-image, .jp-OutputArea-output[data-mime-type*=error]")
    done.first.wait_for(state="attached", timeout=RUN_MS)
    assert errors(tab) == []
    tab.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=60_000)


def use_the_explorer(tab: Any) -> None:
    """Every control changes what it should."""
    figure = tab.locator("img.widget-image")
    figure.scroll_into_view_if_needed()
    traces = tab.locator(".widget-dropdown select")
    options = traces.locator("option").all_inner_texts()
    assert len(options) == 6
    worst_first = [float(text.split()[0]) for text in options]
    assert worst_first == sorted(worst_first, reverse=True)

    shown = figure.get_attribute("src")
    traces.select_option(index=1)
    shown = changed(tab, figure, shown)
    words = tab.locator(".widget-html-content")
    tab.locator(".widget-slider .noUi-handle").press("ArrowRight")
    shown = changed(tab, figure, shown)
    words.get_by_text("chunk 2").wait_for(timeout=REDRAW_MS)
    assert "throughput of past chunks (Mbps)" in words.all_inner_texts()[-1]

    tab.get_by_role("button", name="sample").click()
    tab.get_by_role("button", name="Replay this trace").click()
    words.get_by_text(re.compile(r"reward -?\d+\.\d+ instead of -?\d+\.\d+")).wait_for(timeout=REDRAW_MS)
    changed(tab, figure, shown)
    assert "p(replay)" in words.all_inner_texts()[-1]


def changed(tab: Any, figure: Any, before: str) -> str:
    """The new source of the figure, once it is another one."""
    tab.wait_for_function("([img, old]) => img.src !== old && img.complete", arg=[figure.element_handle(), before])
    after = figure.get_attribute("src")
    assert after != before
    return str(after)


def errors(tab: Any) -> list[str]:
    """Tracebacks and warnings that the notebook shows."""
    shown = tab.locator(".jp-OutputArea-output[data-mime-type*=error], .jp-OutputArea-output[data-mime-type*=stderr]")
    return [text for text in shown.all_inner_texts() if text.strip()]
