"""The house stays small and in order: sizes, floors, no circles, and a spine that knows no task."""

from __future__ import annotations

import ast
import graphlib
from functools import cache
from pathlib import Path

from netllm_lib.runs import PROJECT

LIBRARY = PROJECT / "netllm_lib"
FILES = {".".join(p.relative_to(PROJECT).with_suffix("").parts): p for p in sorted(LIBRARY.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
LARGEST_FILE, MOST_FLOORS = 450, 10
LARGEST_LIBRARY, LARGEST_TESTS = 14_900, 14_500
"""The aim is a library of 11,500 lines, and no more tests than library. Benchmarks, in tests/bench, are no tests."""
TASKS = ("abr",)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@cache
def imported(module: str) -> frozenset[str]:
    """Our modules that a module imports, also inside functions; not what it needs for type hints alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                found.update(f"{child.module}.{name.name}" for name in child.names)
                found.add(child.module)
            if isinstance(child, ast.Import):
                found.update(name.name for name in child.names)
            visit(child)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    ours = found & MODULES.keys()
    # `from package import module` needs the module; a package itself counts where nothing in it is named
    return frozenset(name for name in ours - {module} if not any(other.startswith(f"{name}.") for other in ours))


def test_library_and_files_are_small() -> None:
    sizes = {name: lines(path) for name, path in MODULES.items()}
    assert sum(sizes.values()) <= LARGEST_LIBRARY
    tests = {path.name: lines(path) for path in (PROJECT / "tests").rglob("*.py")}
    assert sum(lines(path) for path in (PROJECT / "tests").glob("*.py")) <= LARGEST_TESTS
    assert {name: size for name, size in (sizes | tests).items() if size > LARGEST_FILE} == {}


def test_imports_have_no_circle_and_few_floors() -> None:
    graph = {module: imported(module) for module in MODULES}
    floors: dict[str, int] = {}
    for module in graphlib.TopologicalSorter(graph).static_order():  # CycleError names a circle
        floors[module] = 1 + max((floors[other] for other in graph[module]), default=0)
    highest = max(floors, key=lambda module: floors[module])
    assert floors[highest] <= MOST_FLOORS, f"{highest} is on floor {floors[highest]}"


def test_the_spine_knows_no_task() -> None:
    """Only the command line joins the tasks to the spine."""
    for module in MODULES:
        if module.split(".")[1:2] not in [[task] for task in (*TASKS, "cli")]:
            tasks = {other for other in imported(module) if other.split(".")[1] in TASKS}
            assert not tasks, f"{module} imports {', '.join(sorted(tasks))}"
