"""The generator of faults draws the same case from the same seed, keeps the truth apart, and its scorer counts right."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from faults.cases import GRADES, IDS, Case, FaultBench, accepted
from faults.operators import OPERATORS, drawn_severity, generate
from faults.run import SEEDS
from faults.score import ask, judge, score, summary

from netllm_lib.config import parse
from netllm_lib.runs import plain, tree_hash
from netllm_lib.stats import Interval
from planted_runs import TRAININGS

CASE = Case("rate-too-low", "mild", 1, (), {}, ("learning-rate", "undertrained"), Interval(0.4, 0.3, 0.5), False, 1e-4)


def finding(id: str, severity: str = "cause", effect: tuple[float, float, float] | None = None) -> dict[str, Any]:
    interval = effect and dict(zip(("mean", "low", "high"), effect, strict=True))
    return {"id": id, "severity": severity, "effect": interval}


def test_the_table_of_operators() -> None:
    healthy = [operator for operator in OPERATORS.values() if not operator.truth]
    assert len(healthy) >= 8
    assert len(OPERATORS) - len(healthy) >= 25
    assert all(id in IDS for operator in OPERATORS.values() for id in operator.truth.split())
    ids = [name for id, others in IDS.items() for name in (id, *others.split())]
    assert len(ids) == len(set(ids)), "one id means one thing"
    assert not set(SEEDS["tune"]) & set(SEEDS["report"])


@pytest.mark.parametrize("name", OPERATORS)
def test_severities_are_drawn_by_seed(name: str) -> None:
    operator = OPERATORS[name]
    for grade, values in zip(GRADES, operator.grades, strict=True):
        drawn = operator.draw(grade, 1)
        assert drawn == operator.draw(grade, 1)
        assert drawn in values if isinstance(values, list) else values[0] <= drawn <= values[1]
    assert drawn_severity(name, 1) in GRADES


def test_a_case_is_the_same_every_time_and_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAININGS, "healthy", ("mpc", {"epochs": 1, "order": tuple(range(160))}))
    bench, folders = FaultBench(), (tmp_path / "one", tmp_path / "other")
    cases = [generate("level-mapping", "strong", 1, folder, bench) for folder in folders]
    tables, weights = ({tree_hash(folder / part) for folder in folders} for part in ("05/tables", "04/policy"))
    assert len(tables) == len(weights) == 1
    assert cases[0].effect == cases[1].effect
    assert cases[0].truth == ("level-mapping", "wrong-checkpoint")
    assert parse(Case, json.loads(json.dumps(plain(cases[0]))), "truth") == cases[0]
    written = [path for path in folders[0].rglob("*") if path.is_file()]
    assert not any(path.name == "truth.json" or b"level-mapping" in path.read_bytes() for path in written)


def test_what_is_right() -> None:
    def wrong(case: Case, *findings: dict[str, Any]) -> str:
        return judge(case, {"findings": findings}).wrong

    costs = {"harmful": CASE.effect, "harmless": Interval(0.04, 0.01, 0.07), "open": Interval(0.06, -0.1, 0.2)}
    assert [replace(CASE, effect=effect).kind for effect in costs.values()] == list(costs)
    harmless, open_case = (replace(CASE, effect=costs[kind]) for kind in ("harmless", "open"))
    healthy, measured = replace(CASE, effect=None, truth=()), replace(CASE, measurement=True)
    assert (healthy.kind, measured.kind) == ("harmless", "measured")
    assert wrong(CASE, finding("undertrained"), finding("weak-teacher")) == ""
    assert wrong(CASE, finding("weak-teacher"), finding("undertrained")) == "it is learning-rate"
    assert wrong(CASE, finding("undertrained", "note")) == "a mere note"
    assert wrong(CASE) == "it is learning-rate"
    assert wrong(measured, finding("undertrained", "note")) == ""
    assert wrong(harmless, finding("undertrained", "note"), finding("gap", "suspect")) == ""
    assert wrong(harmless, finding("undertrained")) == "undertrained as cause"
    assert wrong(healthy) == ""
    assert wrong(open_case, finding("undertrained")) == ""
    assert wrong(open_case, finding("clipping")) == "clipping as cause"
    assert accepted(["sampling"]) == {"sampling", "temperature"}


def test_effects_candidates_and_budget() -> None:
    answer = {
        "findings": [finding("gap", effect=(1, 0.9, 1.1)), finding("undertrained", effect=(0.5, 0.35, 0.6))],
        "candidates": [{"id": "undertrained", "probability": 0.7}, {"id": "sampling", "probability": 0.1}],
    }
    found = judge(CASE, answer, seconds=80, budget_s=60)
    assert (found.inside, found.late, found.candidates) == (True, True, ((0.7, True), (0.1, False)))
    assert judge(CASE, {"findings": [finding("undertrained", effect=(0.1, 0.0, 0.2))]}).inside is False
    text = summary([found, judge(CASE, {"findings": [finding("undertrained")]})])
    assert "first finding true: 1 of 2" in text
    assert "Brier score 0.050" in text


def test_any_command_is_a_diagnoser(tmp_path: Path) -> None:
    said = json.dumps({"findings": [finding("undertrained")]})
    (tmp_path / "diagnose.py").write_text(f"import sys; assert sys.argv[1].endswith('a run'); print({said!r})")
    case = replace(CASE, folders=(tmp_path / "a run",), options={"data": "here"})
    command = f"{sys.executable} {tmp_path / 'diagnose.py'} {{folder}} {{options}}"
    assert score(command, case).wrong == ""
    assert score(command, replace(case, folders=())).wrong.startswith("failed, ")
    assert score(f"{command} --budget 0.0001", case).late
    assert ask(lambda asked: {"name": asked.name}, case)[0] == {"name": "rate-too-low mild 1"}
