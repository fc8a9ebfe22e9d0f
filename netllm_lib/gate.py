"""Gates: what a test must show for a pipeline to pass.

A gate compares two policies of a test (`measure.Scores`) sample by sample. It fails when the test cannot rule out that the policy
is worse than the baseline by more than the margin: when the 95 % interval of the difference reaches further than the margin on the
side that is worse. Too few samples make the interval wide, and the gate fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from netllm_lib import config, measure
from netllm_lib.measure import Scores
from netllm_lib.stats import Interval

ROUNDING = 1e-9
"""Means are rounded somewhere below this: a loss of exactly the margin passes."""


@dataclass(frozen=True)
class Gate:
    """A `[gate]` of a pipeline file: a test's policy may not be worse than `fail_below` by more than the margin."""

    fail_below: str  # the baseline, as in the test's table: mpc, bba, genet, …
    margin: float = 0.0  # what may be lost to the baseline, in units of the measure; zero or more
    step: str = ""  # whose test; empty: every test of the pipeline
    policy: str = ""  # empty: the one that the test is about

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin {self.margin:g}: give what may be lost to the baseline, zero or more")
        if self.policy == self.fail_below:
            raise ValueError(f"a gate compares two policies, got {self.policy!r} twice")


@dataclass(frozen=True)
class Verdict:
    """What became of a gate at one test."""

    gate: Gate
    step: str  # whose test; empty if there was none
    state: Literal["passed", "failed", "error", "skipped"]
    """error: it could not be judged; skipped: the test was not made, because a step failed."""
    reason: str  # one line, with the numbers
    difference: Interval | None = None  # policy − baseline, paired over samples
    samples: int = 0

    @property
    def title(self) -> str:
        """What was asked, in a few words."""
        where = f" ({self.step})" if self.step else ""
        return f"{self.gate.policy or 'the policy'} within {self.gate.margin:g} of {self.gate.fail_below}{where}"

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        numbers = dict(zip(("difference", "low", "high"), self.difference or (None,) * 3, strict=True))
        about = {"baseline": self.gate.fail_below, "margin": self.gate.margin, "policy": self.gate.policy or None}
        said = {"step": self.step, "verdict": self.state, "reason": self.reason}
        return {**about, **said, **numbers, "samples": self.samples}


def read_gates(
    table: Any, where: str, steps: Sequence[str], fail_below: Sequence[str] = (), margin: float | None = None
) -> list[Gate]:
    """The gates of a pipeline file's `[gate]` or `[[gate]]`, with the baselines and the margin of the command line instead.

    Raises ValueError, beginning with `where`, for what is no gate, and for one on a step that is not there.
    """
    rows = [] if table is None else table if isinstance(table, list) else [table]
    gates: list[Gate] = [config.parse(Gate, row, f"{where}, [gate]") for row in rows]
    if fail_below:
        gates = [Gate(name) for name in fail_below]
    elif margin is not None and not gates:
        raise ValueError("--margin needs a baseline: --fail-below mpc --margin 0.05")
    for gate in gates:
        if gate.step and gate.step not in steps:
            raise ValueError(f"gate: no step '{gate.step}'{config.did_you_mean(gate.step, steps)}; {', '.join(steps)}")
    return gates if margin is None else [replace(gate, margin=margin) for gate in gates]


def judge(gates: Sequence[Gate], folders: Mapping[str, Path | None]) -> tuple[Verdict, ...]:
    """Every gate at every test that it is about. `folders` maps each step to its run folder, None if it has no result.

    A gate without a test to judge is an error, or skipped where steps have no result, since the test may be one of theirs.
    """
    tests = measure.tests({step: folder for step, folder in folders.items() if folder is not None})
    verdicts: list[Verdict] = []
    for gate in gates:
        asked = [step for step in folders if gate.step in ("", step)]
        found = [_verdict(gate, step, tests[step]) for step in asked if step in tests]
        lost = [step for step in asked if folders[step] is None]
        if not found and lost:
            found = [Verdict(gate, "", "skipped", f"no test to judge: no result of {', '.join(lost)}")]
        elif not found:
            text = f"gate on {gate.fail_below}: there is no test in {', '.join(asked)}; a test leaves {measure.FILE}"
            found = [Verdict(gate, "", "error", text)]
        verdicts += found
    return tuple(verdicts)


def _verdict(gate: Gate, step: str, folder: Path) -> Verdict:
    try:
        scores = Scores.read(folder)
        policy, about = gate.policy or scores.subject, scores.measure
        if policy in ("", gate.fail_below):
            known = ", ".join(scores.policies)
            raise ValueError(f"the test is about {policy or 'no policy'}; name the gate's policy: {known}")
        ours, theirs = scores.of(policy), scores.of(gate.fail_below)
        if set(ours.index) != set(theirs.index) or len(ours) < 2:
            raise ValueError(f"{policy} and {gate.fail_below} need two {about.sample}s or more, the same for both")
        difference = scores.difference(policy, gate.fail_below)
    except (ValueError, OSError) as error:
        return Verdict(gate, step, "error", " ".join(f"{folder}: {error}".split()))
    passed = about.gain(difference).low >= -gate.margin - ROUNDING
    end, over = ("lower", f"under {-gate.margin:g}") if about.sign > 0 else ("upper", f"over {gate.margin:g}")
    reason = (
        f"{policy} - {gate.fail_below} = {difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] {about.name} "
        f"over {len(ours)} {about.sample}s ({step}): its {end} end is {'not ' if passed else ''}{over}, the margin"
    )
    return Verdict(replace(gate, policy=policy), step, "passed" if passed else "failed", reason, difference, len(ours))
