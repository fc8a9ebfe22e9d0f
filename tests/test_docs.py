"""The documents say what the code says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pdoc
import pytest

from netllm_lib.abr import evaluate, qoe
from netllm_lib.abr.diagnosis import RULES
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig
from netllm_lib.abr.policies.mpc import MPCConfig
from netllm_lib.abr.synthetic import write_sample
from netllm_lib.abr.traces import Registry
from netllm_lib.plm import PLMConfig
from netllm_lib.runs import PROJECT, read_json
from netllm_lib.train import TrainConfig

DOCS = PROJECT / "docs"


def rows(path: Path) -> list[list[str]]:
    """Cells of every table row of a Markdown file."""
    text = path.read_text().replace("\\|", "¦")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("¦", "|") for cell in line.strip("|").split("|")] for line in lines]


def test_findings_are_listed_in_their_order_with_their_rules() -> None:
    listed = {cells[0].strip("`"): cells[1] for cells in rows(DOCS / "findings.md") if cells[0].startswith("`")}
    assert listed == {name: rule.should for name, rule in RULES.items()}
    assert list(listed) == list(RULES)


@pytest.mark.parametrize("config", [MPCConfig, TrainConfig, EvalConfig, PLMConfig])
def test_every_switch_of_the_original_is_documented(config: type) -> None:
    """A field that `upstream()` changes has a row; the row names the values."""
    sound = config()
    upstream = config.upstream(sound.source) if isinstance(sound, PLMConfig) else config.upstream()  # type: ignore[attr-defined]
    text = (DOCS / "upstream-differences.md").read_text()
    changed = [f.name for f in dataclasses.fields(sound) if getattr(sound, f.name) != getattr(upstream, f.name)]
    missing = [name for name in changed if f"`{name}`" not in text and f".{name}`" not in text]
    assert not missing, f"{config.__name__}: {missing} are not in upstream-differences.md"


def test_every_key_of_a_tests_setting_is_documented(tmp_path: Path) -> None:
    write_sample(tmp_path, train=1, test=2)
    registry = Registry(tmp_path)
    traces, video = registry.trace_set("sample-test"), registry.video("sample")
    evaluate.test({"bba": BBA()}, traces, video, train_traces=registry.trace_set("sample-train")).save(tmp_path)
    listed = {key for cells in rows(DOCS / "formats.md") for key in cells[0].split(", ")}
    assert set(read_json(tmp_path / evaluate.SETTING)) <= listed


def test_the_index_fits_a_screen_and_leads_to_every_page() -> None:
    text = (DOCS / "index.md").read_text()
    assert len(text.splitlines()) <= 26
    links = set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert links == {path.name for path in DOCS.glob("*.md")} - {"index.md"}


def test_links_and_files_that_the_documents_name_exist() -> None:
    named = re.compile(r"`((?:netllm_lib|notebooks|tests|docs|reports/benchmarks)/[\w./-]+\.\w+)`")
    for path in (*PROJECT.glob("README*.md"), *DOCS.rglob("*.md")):
        places = [path.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())]
        places += [PROJECT / name for name in named.findall(path.read_text()) if "NN_" not in name]
        assert not [place for place in places if not place.exists()], path.name


# --- the library's reference, from its docstrings -------------------------------------------------------------------------


def test_the_reference_is_made_from_docstrings(tmp_path: Path) -> None:
    """As `make docs` does, for a module."""
    pdoc.pdoc("netllm_lib.abr.qoe", output_directory=tmp_path)
    page = (tmp_path / "netllm_lib" / "abr" / "qoe.html").read_text()
    assert str(qoe.per_trace.__doc__).splitlines()[0] in re.sub(r"<[^>]+>", "", page)


def test_everything_public_has_a_docstring() -> None:
    """Modules, classes and functions; a method may speak for itself."""
    words = ["check", "--quiet", "--output-format", "concise", "--select", "D100,D101,D103,D104", "netllm_lib"]
    done = subprocess.run([sys.executable, "-m", "ruff", *words], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_chinese_readme_has_the_same_commands_code_and_figures() -> None:
    english, chinese = ((PROJECT / name).read_text() for name in ("README.md", "README.zh-CN.md"))

    def code(text: str) -> list[str]:
        return [re.sub(r"\s+# .*", "", block) for block in re.findall(r"```\w+\n.*?```", text, flags=re.DOTALL)]

    def figures(text: str) -> list[str]:
        """Numbers in the tables, and every decimal number of the text."""
        return sorted(re.findall(r"(?<![\w/.])\d*\.\d+", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))

    assert code(english) == code(chinese)
    assert figures(english) == figures(chinese)
    for part in ("\n## ", "\n| ", "\n- "):
        assert english.count(part) == chinese.count(part)
