"""Parameters of notebooks: what a cell tagged `parameters` declares, and whether what is given fits.

from pathlib import Path
from typing import Literal

Choose = Literal["argmax", "sample"]

policy: Path = ""  # a file or folder: what lies there is part of what the run is made from
choose: Choose = "argmax"  # one of the values above
run_dir: str = ""  # needed: the folder to write to

`netllm run` checks what it is given before it starts anything; `notebook_run` checks it inside the kernel, for a person and for
plain papermill, which injects whatever it is given.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from netllm_lib import config, runs

KINDS = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)} | {"Path": str, "Literal": Literal}
"""What types may be made of; a path is given as text."""

PLAIN = (ast.Name, ast.Load, ast.Subscript, ast.Tuple, ast.Constant, ast.BinOp, ast.BitOr)

INJECTED = "# Parameters\n"
"""How the cell begins that papermill puts behind that of the parameters."""


@dataclass(frozen=True)
class Parameter:
    """One line of the cell. `kind` is the annotated type, with `str` for a path."""

    kind: Any
    default: Any
    is_path: bool


Declared = Mapping[str, Parameter]


def read(cell: str) -> dict[str, Parameter]:
    """The lines `name: type = value` of a cell. SyntaxError or ValueError for what is not plainly written there; nothing is run."""
    known, found = dict[str, Any](KINDS), {}
    for line in ast.parse(cell).body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            name, names = line.target.id, [node.id for node in ast.walk(line.annotation) if isinstance(node, ast.Name)]
            found[name] = Parameter(_type(line.annotation, known, name), ast.literal_eval(line.value), "Path" in names)
        elif isinstance(line, ast.Assign) and isinstance(line.value, ast.Subscript):  # a type with a name of its own
            known[ast.unparse(line.targets[0])] = _type(line.value, known, ast.unparse(line.targets[0]))
    return found


def _type(node: ast.expr, known: Mapping[str, Any], name: str) -> Any:
    parts = list(ast.walk(node))
    unknown = [part.id for part in parts if isinstance(part, ast.Name) and part.id not in known]
    if unknown or not all(isinstance(part, PLAIN) for part in parts):
        what = unknown[0] if unknown else ast.unparse(node)
        raise ValueError(f"parameter {name}: its type {what:.60} is none of {', '.join(known)}")
    return eval(compile(ast.Expression(node), name, "eval"), {"__builtins__": {}}, dict(known))


def fit(declared: Declared, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` with each value as its declared type; strings are read as that type, as the command line gives them.

    ValueError, beginning with `where`, for an unknown parameter (with the closest known one) or a value that does not fit.
    """
    fitted = {}
    for name, value in given.items():
        if name not in declared:
            hint = config.did_you_mean(name, declared)
            raise ValueError(f"{where} has no parameter '{name}'{hint}; known: {', '.join(declared)}")
        parse = config.parse_text if isinstance(value, str) else config.parse
        fitted[name] = parse(declared[name].kind, value, f"{where}: parameter {name}")
    return fitted


def notebook_run(run_dir: str, notebook: str, **parents: str | Path | None) -> runs.Run:
    """The run that a notebook writes: in the folder that the runner names, else in `reports/runs/<notebook>/`: for a person in
    `interactive`, for plain papermill in one that is named by its parameters.

    It counts as started until the notebook calls `finish`. `parents` are the folders it reads, by role; empty ones are left out.
    ValueError for parameters that the notebook does not declare, or that do not fit.
    """
    given = injected(notebook)
    name = f"papermill-{runs.content_hash(given)}" if given else "interactive"
    run = runs.Run(Path(run_dir) if run_dir else runs.reports_root() / "runs" / notebook / name)
    run.begin(notebook, run.folder.name, finished=None, error=None, parents=parents)
    return run


def injected(where: str) -> dict[str, Any]:
    """In a Jupyter kernel: what papermill injected, checked together with what a person wrote into the cell; nothing elsewhere.

    Values have to be of their type already: the cells of the notebook use them as they are. ValueError as of `fit`.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = [] if shell is None else [cell for cell in shell.user_ns.get("In", []) if isinstance(cell, str)]
    written = [cell for cell in cells if "\nrun_dir: str" in cell]
    if shell is None or not written:
        return {}
    declared = read(written[-1])
    lines = [line for cell in cells if cell.startswith(INJECTED) for line in ast.parse(cell).body]
    names = [ast.unparse(line.targets[0]) for line in lines if isinstance(line, ast.Assign)]
    fit(declared, dict.fromkeys(set(names) - set(declared)), where)
    for name, parameter in declared.items():
        value = shell.user_ns[name]
        value = str(value) if isinstance(value, Path) else value
        config.parse(parameter.kind, value, f"{where}: parameter {name}")
    return {name: shell.user_ns[name] for name in names}
