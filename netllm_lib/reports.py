"""Pages that open offline: an executed notebook as one HTML file, and the index, a table of all runs that sorts by a click."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from netllm_lib import measure, runs
from netllm_lib.findings import FINDINGS
from netllm_lib.text import escaped, printable

REPORT, INDEX = "report.html", "index.html"
COLUMNS = (
    *("run", "kind", "state", "tested on", "measure", "policy", "score", "low", "high", "best other", "difference"),
    *("first finding", "seconds", "finished"),
)
NUMBERS = ("score", "low", "high", "difference", "seconds")
LONGEST = 200  # letters of a cell

WIDGET = "application/vnd.jupyter.widget-view+json"

PAGES = Path(__file__).with_name("pages")


def export_html(executed: Path, report: Path) -> None:
    """Write an executed notebook as one HTML file that opens offline: figures inside, nothing fetched, code one click away.

    Widgets are left out: their state needs scripts from the network, and the figure they show is in a cell before them.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    joined = CoalesceStreamsPreprocessor()  # each line was sent on its own
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            joined.preprocess_cell(cell, {}, 0)  # in place
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = runs.OVERTAKEN.sub("", output.text)  # who reads it was not there to wait
    template = (PAGES / "report.html.j2").read_text(encoding="utf-8")
    exporter = HTMLExporter(raw_template=template, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": executed.stem}})
    with runs.atomic_path(report) as aside:
        aside.write_text(body, encoding="utf-8")


def list_runs(root: Path | None = None) -> list[dict[str, Any]]:
    """One row per run folder below `root` (by default the reports folder), the last one first.

    Keys: `COLUMNS`, folder and report (paths). What a run does not say is None; a folder that cannot be read has the state
    "unreadable", and hides no other one.
    """
    folders = {path.parent for path in ((root or runs.reports_root()) / "runs").glob(f"*/*/{runs.MANIFEST}")}
    rows = [_row(folder) for folder in sorted(folders) if not folder.name.startswith(".")]
    return sorted(rows, key=lambda row: row["finished"] or "", reverse=True)


def _row(folder: Path) -> dict[str, Any]:
    """Whatever is in the folder's files, the row has text and finite numbers where it should."""
    found: dict[str, Any] = {"run": folder.name, "kind": folder.parent.name}
    try:
        run = runs.Run(folder)
        manifest = run.manifest
        found |= {"state": run.state, "seconds": manifest.get("seconds")}
        found["finished"] = manifest.get("finished") or manifest.get("started")
        if (folder / measure.FILE).is_file():
            found = measure.read_headline(folder) | found
        if (folder / FINDINGS).is_file() and (findings := runs.read_json(folder / FINDINGS)["findings"]):
            found["first finding"] = findings[0]["id"]
    except (OSError, ValueError, LookupError, TypeError):
        found["state"] = "unreadable"
    row = {name: (_number if name in NUMBERS else _words)(found.get(name)) for name in COLUMNS}
    return row | {"folder": folder, "report": folder / REPORT if (folder / REPORT).is_file() else None}


def _number(value: Any) -> float | None:
    with contextlib.suppress(TypeError, OverflowError):  # no number, or an integer beyond all floats
        return float(value) if math.isfinite(value) else None
    return None


def _words(value: Any) -> str | None:
    return None if value is None else printable(value).replace("\n", "?")[:LONGEST]


def write_index(root: Path | None = None) -> Path:
    """Write `index.html` into the reports folder and return its path. It shows what lies there now."""
    page = (root or runs.reports_root()) / INDEX
    rows = []
    for row in list_runs(root):
        cells = {name: row[name] if name in NUMBERS else escaped(row[name] or "") for name in COLUMNS}
        cells["finished"] = cells["finished"][:16].replace("T", " ")
        if row["report"]:
            link = quote(os.fsencode(os.path.relpath(row["report"], page.parent)))
            cells["run"] = f'<a href="{link}">{cells["run"]}</a>'
        rows.append(cells)
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(NUMBERS, float))
    with pd.option_context("display.max_colwidth", None), runs.atomic_path(page) as aside:
        shown = table.to_html(index=False, border=0, escape=False, na_rep="", float_format="{:.3f}".format)
        text = (PAGES / INDEX).read_text(encoding="utf-8").replace("TABLE", shown)
        aside.write_text(text, encoding="utf-8")
    return page


def update_index() -> None:
    """`write_index` after a run: its work is done, so a page that cannot be written is one line on standard error."""
    try:
        write_index()
    except OSError as error:
        print(f"the index of all runs was not written: {error}", file=sys.stderr)
