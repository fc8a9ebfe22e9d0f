"""The first finding names the planted fault, and a healthy run has no cause (see planted.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from netllm_lib.abr.diagnosis import RULES, paired
from planted import Fault, examine
from planted_list import FAULTS
from planted_runs import Bench

QUICK = (
    "changed head",
    "zero adapter",
    "rare slips",
    "one level",
    "noise",
    "first level",
    "window",
    "harmless target",
    "healthy",
)
"""Faults that are planted in every test run; they need the healthy training alone, which takes ten seconds once."""


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.set_num_threads(1)
    return Bench()


def case(fault: Fault) -> object:
    return pytest.param(fault, id=fault.name, marks=() if fault.name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("fault", [case(fault) for fault in FAULTS])
def test_the_first_finding_names_the_fault(fault: Fault, bench: Bench, tmp_path: Path) -> None:
    planted, diagnosis = examine(bench, fault, tmp_path)
    assert fault.judge(diagnosis) == "", f"\n{diagnosis}"
    if fault.costs and not fault.harmless:
        assert planted.true_effect is not None
        assert planted.true_effect > 0.05, "the plant costs something, or its name is wrong"


def test_the_healthy_policy_is_above_its_reference(bench: Bench) -> None:
    gap = paired(bench.test("healthy"), bench.baselines()["mpc"])
    assert gap.low > 0


def test_the_list_of_faults() -> None:
    assert set(QUICK) <= {fault.name for fault in FAULTS}
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1
    assert all(name in RULES for fault in FAULTS for name in fault.expected)
    assert sum(not fault.harmless for fault in FAULTS) >= 28
    assert sum(fault.harmless for fault in FAULTS) >= 4
