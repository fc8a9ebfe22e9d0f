"""Gates: what a test must show for a pipeline to pass.

A gate compares two policies of a test (what notebook 05 writes: `setting.json` and `tables/`) trace by trace. It fails when the
lower end of the 95 % interval of the difference, policy − baseline, is under −margin: when the test cannot rule out that the
policy is worse than the baseline by more than the margin. Too few traces make the interval wide, and the gate fails.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from netllm_lib import notebooks, runs, stats
from netllm_lib.abr import qoe
from netllm_lib.abr.evaluate import SETTING, TABLES
from netllm_lib.pipelines import Step

POLICY = "llm"
"""The fine-tuned policy's name in a test of notebook 05."""

ROUNDING = 1e-9
"""Means of 47 rewards are rounded somewhere below this: a difference of exactly the margin passes."""


@dataclass(frozen=True)
class Gate:
    """(policy − baseline) may not be under −margin."""

    baseline: str
    """As in the test's table: mpc, mpc (original), bba, genet, …"""
    margin: float = 0.0
    """Reward per chunk that may be lost to the baseline; zero or more."""
    step: str = ""
    """Whose test; empty: every test of the pipeline."""
    policy: str = POLICY

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin {self.margin:g}: give the reward per chunk that may be lost, zero or more")
        if self.policy == self.baseline:
            raise ValueError(f"a gate compares two policies, got {self.policy!r} twice")


@dataclass(frozen=True)
class Verdict:
    """What became of a gate at one test."""

    gate: Gate
    step: str
    """Whose test; empty if there was none."""
    state: Literal["passed", "failed", "error", "skipped"]
    """error: it could not be judged; skipped: the test was not made, because a step failed."""
    reason: str
    """One line, with the numbers."""
    interval: stats.Interval | None = None
    """Of the difference in mean reward per chunk, paired over traces."""
    traces: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        numbers = dict(zip(("difference", "low", "high"), self.interval or (None,) * 3, strict=True))
        gate = {field.name: getattr(self.gate, field.name) for field in fields(self.gate) if field.name != "step"}
        return {
            **gate,
            "step": self.step,
            "verdict": self.state,
            "reason": self.reason,
            **numbers,
            "traces": self.traces,
        }


# --- asking -------------------------------------------------------------------------------------------------------------


def read_gates(table: Any, where: str) -> tuple[Gate, ...]:
    """The gates of a pipeline file's `[gate]` or `[[gate]]`: fail_below, and if need be margin, step, policy.

    None gives no gates. ValueError, beginning with `where`, for what is unknown or does not fit.
    """
    rows = [] if table is None else table if isinstance(table, list) else [table]
    return tuple(_read(row, f"{where}, [gate]") for row in rows)


def _read(row: Any, where: str) -> Gate:
    if not isinstance(row, Mapping):
        raise ValueError(f'{where}: a table is expected: [gate], then fail_below = "mpc" and margin = 0.05')
    known = {"fail_below": "baseline", "margin": "margin", "step": "step", "policy": "policy"}
    for key, value in row.items():
        if key not in known:
            raise ValueError(
                f"{where}: unknown key '{key}'{notebooks.did_you_mean(key, known)}; known: {', '.join(known)}"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number if key == "margin" else isinstance(value, str)):
            raise ValueError(f"{where}: {key} is a {'number' if key == 'margin' else 'name'}, got {value!r}")
    if not row.get("fail_below"):
        raise ValueError(f'{where}: it needs fail_below, the baseline\'s name, such as "mpc"')
    try:
        return Gate(**{known[key]: value for key, value in row.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def override(gates: Sequence[Gate], fail_below: Sequence[str], margin: float | None) -> tuple[Gate, ...]:
    """The gates with what the command line says instead: other baselines (for every test), another margin."""
    if fail_below:
        return tuple(Gate(name, margin or 0.0) for name in fail_below)
    if margin is None:
        return tuple(gates)
    if not gates:
        raise ValueError("--margin needs a baseline: --fail-below mpc --margin 0.05")
    return tuple(replace(gate, margin=margin) for gate in gates)


def check(gates: Sequence[Gate], steps: Sequence[Step]) -> None:
    """Refuse, before anything runs, gates that can be known not to be judgeable.

    What a notebook of this project plays is known; the tables of others only when they have run. Raises ValueError.
    """
    names = [step.name for step in steps]
    ours = {step.name: _played(step) for step in steps if step.notebook.parent == notebooks.NOTEBOOKS}
    for gate in gates:
        if gate.step and gate.step not in names:
            raise ValueError(
                f"gate: no step '{gate.step}'{notebooks.did_you_mean(gate.step, names)}; {', '.join(names)}"
            )
        asked = [gate.step] if gate.step else names
        if all(name in ours and ours[name] is None for name in asked):
            raise ValueError(f"gate on {gate.baseline}: {_no_test(asked)}")
        for name in asked:
            if played := ours.get(name):
                _require(gate, played, f"step {name}")


def _played(step: Step) -> list[str] | None:
    """The policies that a notebook of this project will play in its test; None if it makes none, empty if it is not known yet."""
    from netllm_lib.abr.policies.catalogue import baselines
    from netllm_lib.abr.traces import find_registry

    _, declared, notebook = notebooks.open_notebook(step.notebook)
    if SETTING not in notebooks.expected_files(notebook):
        return None
    values = {name: parameter.default for name, parameter in declared.items()} | step.parameters
    try:
        data = values.get("data")
        registry = find_registry(runs.PROJECT / data if data else None)
        found = list(baselines(registry.video(values.get("video") or registry.default_video()), registry))
    except (ValueError, OSError):  # the step will say what is wrong with the data
        return []
    return [POLICY, *found] if values.get("policy") else found


def _no_test(names: Iterable[str]) -> str:
    return (
        f"there is no test in {', '.join(names)}; a test is what notebook 05 writes: {SETTING} and {TABLES}/*.parquet"
    )


def _require(gate: Gate, names: Collection[str], where: str) -> None:
    for name in (gate.policy, gate.baseline):
        if name not in names:
            hint = notebooks.did_you_mean(name, names)
            raise ValueError(f"{where}: its test has no policy '{name}'{hint}; it has: {', '.join(names)}")


# --- judging ------------------------------------------------------------------------------------------------------------


def judge(gates: Sequence[Gate], folders: Mapping[str, Path | None]) -> tuple[Verdict, ...]:
    """Every gate at every test that it is about. `folders` maps each step to its run folder, None if it has no result.

    A gate without a test to judge is an error, or skipped where steps have no result, since the test may be one of theirs.
    """
    verdicts: list[Verdict] = []
    for gate in gates:
        asked = {name: folder for name, folder in folders.items() if gate.step in ("", name)}
        tests = {name: folder for name, folder in asked.items() if folder is not None and (folder / SETTING).is_file()}
        verdicts += [_verdict(gate, name, folder) for name, folder in tests.items()]
        lost = [name for name, folder in asked.items() if folder is None]
        if not tests and lost:
            verdicts.append(Verdict(gate, "", "skipped", f"no test to judge: no result of {', '.join(lost)}"))
        elif not tests:
            verdicts.append(Verdict(gate, "", "error", f"gate on {gate.baseline}: {_no_test(asked)}"))
    return tuple(verdicts)


def _verdict(gate: Gate, step: str, folder: Path) -> Verdict:
    try:
        differences = paired_differences(folder, gate)
        interval = stats.bootstrap(differences.to_numpy())
    except (ValueError, OSError) as error:
        return Verdict(gate, step, "error", " ".join(str(error).split()))
    passed = interval.low >= -gate.margin - ROUNDING
    means = f"{gate.policy} - {gate.baseline} = {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    reason = (
        f"{means} per chunk over {len(differences)} traces ({step}): its lower end is "
        f"{'not ' if passed else ''}under -{gate.margin:g}, the margin"
    )
    return Verdict(gate, step, "passed" if passed else "failed", reason, interval, len(differences))


def paired_differences(folder: Path, gate: Gate) -> pd.Series:
    """Mean reward per chunk of the gate's policy less its baseline's, by trace, in the test that `folder` holds.

    Raises ValueError if there is no such policy, for tests on different traces or on fewer than two, and for files that cannot
    be read.
    """
    setting = runs.read_json(folder / SETTING)
    order = setting.get("order") if isinstance(setting, dict) else None
    if not isinstance(order, list):
        raise ValueError(f"{folder / SETTING}: it does not list the policies of the test (order); make the test again")
    _require(gate, order, str(folder))
    ours, theirs = (qoe.per_trace(_table(folder, name))["reward"] for name in (gate.policy, gate.baseline))
    if others := sorted(set(ours.index) ^ set(theirs.index)):
        raise ValueError(
            f"{folder}: {gate.policy} and {gate.baseline} were not played on the same traces: "
            f"{len(ours)} and {len(theirs)}, {others[0]} by one only"
        )
    if len(ours) < 2:
        raise ValueError(f"{folder}: {len(ours)} traces give no interval; test on more")
    differences = ours - theirs.reindex(ours.index)
    if not differences.map(math.isfinite).all():
        raise ValueError(f"{folder}: rewards of {gate.policy} or {gate.baseline} are not finite")
    return differences


def _table(folder: Path, policy: str) -> pd.DataFrame:
    path = folder / TABLES / f"{policy}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the test is incomplete")
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow has its own errors for each way of being broken
        raise ValueError(f"{path}: it cannot be read as a table ({error})") from None
    needed = ("trace", "chunk", "reward", "bitrate_kbps", "rebuffer_s", "smoothness_mbps")
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{path}: not a table of chunks, it has no column {', '.join(missing)}")
    return table
