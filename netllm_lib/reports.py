"""Pages that open offline: an executed notebook as one HTML file, and a table that sorts by a click on its head."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netllm_lib import runs

# Everything that nbconvert's template would fetch (RequireJS, MathJax, Mermaid, widgets) is left out; code folds away.
_NOTEBOOK = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
details.code > summary { cursor: pointer; color: #777; font: 12px monospace; }
#all-code { position: fixed; top: 8px; right: 12px; z-index: 9; font: 13px sans-serif; }
@media print { #all-code, details.code:not([open]) { display: none; } }
</style>
{%- endblock -%}
{%- block body_header -%}
{{ super() }}
<button id="all-code" type="button">show all code</button>
{%- endblock -%}
{%- block input -%}
<details class="code"><summary>code</summary>
{{ super() }}
</details>
{%- endblock -%}
{%- block footer_js -%}
<script>
document.getElementById("all-code").onclick = function () {
  const folded = [...document.querySelectorAll("details.code")], open = folded.some(d => !d.open);
  folded.forEach(d => { d.open = open; });
  this.textContent = open ? "hide all code" : "show all code";
};
</script>
{%- endblock -%}
"""


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
            widget = "application/vnd.jupyter.widget-view+json"
            cell.outputs = [output for output in cell.outputs if widget not in output.get("data", {})]
            joined.preprocess_cell(cell, {}, 0)  # in place
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = _ends_of_progress(output.text)
    exporter = HTMLExporter(raw_template=_NOTEBOOK, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": executed.stem}})
    with runs.atomic_path(report) as aside:
        aside.write_text(body, encoding="utf-8")


def _ends_of_progress(text: str) -> str:
    """Of each stage's progress lines only the last: who reads a report was not there to wait."""
    lines = text.splitlines(keepends=True)
    labels = [found[1] if (found := runs.PROGRESS_LINE.match(line)) else None for line in lines]
    following = [*labels[1:], None]
    return "".join(
        line for line, label, after in zip(lines, labels, following, strict=True) if label is None or label != after
    )


@dataclass(frozen=True)
class Link:
    """A cell that leads somewhere: shown text and a path relative to the page."""

    text: str
    path: str


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3em .8em; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }}
td {{ white-space: nowrap; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
th {{ cursor: pointer; position: sticky; top: 0; background: Canvas; white-space: nowrap; }}
th::after {{ content: " \\2195"; color: #8888; }}
th[aria-sort=ascending]::after {{ content: " \\2191"; color: inherit; }}
th[aria-sort=descending]::after {{ content: " \\2193"; color: inherit; }}
input {{ font: inherit; padding: .3em .5em; width: 22em; margin-bottom: 1em; }}
p {{ max-width: 60em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{text}</p>
<input id="filter" type="search" placeholder="show rows that contain …" aria-label="filter">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<script>
const body = document.querySelector("tbody");
document.querySelectorAll("th").forEach((th, column) => th.onclick = () => {{
  const down = th.getAttribute("aria-sort") === "ascending";
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.key;
  const compare = (a, b) => {{
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");  // what is missing comes last
    const order = th.className === "number" ? key(a) - key(b) : key(a).localeCompare(key(b));
    return down ? -order : order;
  }};
  [...body.rows].sort(compare).forEach(row => body.append(row));
}});
document.getElementById("filter").oninput = event => {{
  const wanted = event.target.value.toLowerCase();
  for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
}};
</script>
</body>
</html>
"""


def table_page(title: str, text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a table with one line a row, sortable and searchable, that needs no network.

    The first row's keys are the columns. Values are strings, numbers (with three decimals unless they are ints), `Link`s, or None
    and NaN, which stay empty and sort last.
    """
    columns = list(rows[0]) if rows else []
    numeric = {
        name
        for name in columns
        if any(_is_number(row[name]) for row in rows) and not any(_is_text(row[name]) for row in rows)
    }
    head = "".join(
        f'<th class="number">{html.escape(n)}</th>' if n in numeric else f"<th>{html.escape(n)}</th>" for n in columns
    )
    lines = ["<tr>" + "".join(_cell(row[name], name in numeric) for name in columns) + "</tr>" for row in rows]
    return _PAGE.format(title=html.escape(title), text=html.escape(text), head=head, rows="\n".join(lines))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | Link)


def _cell(value: Any, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    if isinstance(value, Link):
        inner = f'<a href="{html.escape(value.path)}">{html.escape(value.text)}</a>'
        return f'<td{kind} data-key="{html.escape(value.text)}">{inner}</td>'
    if _is_number(value):
        return f'<td{kind} data-key="{value!r}">{value if isinstance(value, int) else format(value, ".3f")}</td>'
    text = html.escape(value) if isinstance(value, str) else ""
    return f'<td{kind} data-key="{text}">{text}</td>'
