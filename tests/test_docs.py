"""The documents say what the code says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from netllm_lib.abr import report
from netllm_lib.abr.diagnosis import RULES
from netllm_lib.abr.policies.llm import EvalConfig
from netllm_lib.abr.policies.mpc import MPCConfig
from netllm_lib.abr.synthetic import write_sample
from netllm_lib.abr.traces import Registry
from netllm_lib.abr.train import TrainConfig
from netllm_lib.plm import PLMConfig
from netllm_lib.runs import PROJECT, read_json

DOCS = PROJECT / "docs"


def rows(path: Path) -> list[list[str]]:
    """Cells of every table row of a Markdown file."""
    text = path.read_text().replace("\\|", "¦")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("¦", "|") for cell in line.strip("|").split("|")] for line in lines]


def test_findings_are_listed_in_their_order_with_their_rules() -> None:
    listed = {cells[0].strip("`"): cells[1] for cells in rows(DOCS / "findings.md") if cells[0].startswith("`")}
    assert listed == RULES
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
    (tmp_path / "policy").mkdir()
    traces, video = registry.trace_set("sample-test"), registry.video("sample")
    setting = report.setting_of(traces, video, str(tmp_path / "policy"), train_traces="t", clean=np.ones(2, bool))
    report.save_test(tmp_path, {}, setting)
    listed = {key for cells in rows(DOCS / "formats.md") for key in cells[0].split(", ")}
    assert set(read_json(tmp_path / report.SETTING)) <= listed


def test_files_that_the_documents_name_exist() -> None:
    named = re.compile(r"`((?:netllm_lib|notebooks|tests|docs|reports/benchmarks)/[\w./-]+\.\w+)`")
    for path in (PROJECT / "README.md", *DOCS.glob("*.md")):
        for name in named.findall(path.read_text()):
            assert "NN_" in name or (PROJECT / name).exists(), f"{path.name} names {name}"
