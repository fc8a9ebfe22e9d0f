"""Small runs with one planted fault each, and healthy ones: what the diagnosis is judged by.

A fault is planted in the configuration, a file or the code of a run, never of the diagnosis; `planted_plants` lists them. The *true
effect* of a fault is the mean reward of its healthy twin, which is the same run without it, less its own, on the same traces.

    bench = Bench()
    planted, diagnosis = examine(bench, FAULTS[0], Path("somewhere"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import Diagnosis, diagnose
from netllm_lib.abr.diagnosis.load import load
from planted_runs import Bench


@dataclass(frozen=True)
class Planted:
    """A run on disk, and what is known of it because it was planted."""

    folders: tuple[Path, ...]
    table: pd.DataFrame | None = None  # of its test
    twin: pd.DataFrame | None = None  # of its healthy twin, on the same traces
    options: dict[str, Any] = field(default_factory=dict)  # of load

    @property
    def true_effect(self) -> float | None:
        """Mean reward of the healthy twin less the run's; None for a run that is its own twin."""
        if self.table is None or self.twin is None or self.twin is self.table:
            return None
        return qoe.summarise(self.twin).reward - qoe.summarise(self.table).reward


Plant = Callable[[Bench, Path], Planted]


@dataclass(frozen=True)
class Fault:
    """A fault to plant, and what a diagnosis has to say about it."""

    name: str
    what: str  # was done
    expected: tuple[str, ...]  # ids: the first finding has one of them; of a harmless fault: they are there as notes
    plant: Plant
    severity: tuple[str, ...] = ("cause",)  # that the first finding may have
    budget_s: float = 0.0  # for replays
    retrain_s: float = 0.0  # for a training by the sound defaults
    harmless: bool = False  # it cost nothing: no finding may be a cause
    besides: tuple[str, ...] = ()  # ids of true causes beside what was planted
    costs: bool = True  # reward; results that cannot be compared need not

    def judge(self, diagnosis: Diagnosis) -> str:
        """Empty if the diagnosis is right, else what is wrong with it."""
        shown = [f"{finding.severity} {finding.id}" for finding in diagnosis.findings[:3]]
        if self.harmless:
            if causes := [f.id for f in diagnosis.causes if f.id not in self.besides]:
                return f"{', '.join(causes)} as cause of a run that is healthy"
            absent = set(self.expected) - {f.id for f in diagnosis.findings}
            return f"{', '.join(absent)} is not mentioned" if absent else ""
        first = diagnosis.first
        if first is None or first.id not in self.expected:
            return f"expected {' or '.join(self.expected)}, found {'; '.join(shown) or 'nothing'}"
        if first.severity not in self.severity:
            return f"{first.id} is a {first.severity}, expected {' or '.join(self.severity)} ({'; '.join(shown)})"
        return ""


def examine(bench: Bench, fault: Fault, folder: Path) -> tuple[Planted, Diagnosis]:
    """Plant a fault below `folder` and diagnose it."""
    planted = fault.plant(bench, folder)
    evidence = load(*planted.folders, data=bench.data, **planted.options)
    return planted, diagnose(evidence, budget_s=fault.budget_s, retrain_s=fault.retrain_s)
