"""What a diagnosis says: findings, each with the rule that judged it, ranked so that the first is the first thing to fix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from netllm_lib.runs import plain
from netllm_lib.stats import Interval

Severity = Literal["cause", "suspect", "note"]
SEVERITIES: tuple[Severity, ...] = ("cause", "suspect", "note")

RULES: dict[str, str] = {
    # what the files hold
    "non-finite": "losses, weights, states and rewards are finite numbers",
    "label-shift": "the level of a transition is the last level in the state that follows it, in every episode",
    "adapter-not-applied": "a trained adapter is there, fits its PLM, and changes its output (LoRA's B is not zero)",
    "wrong-checkpoint": "the checkpoint predicts its pool as well as its training did at the end, and replays the recorded levels",
    # what the test did, against what its weights can do
    "sampling": "levels are the most probable ones, not drawn at random",
    "dropout-on": "dropout is off in a test",
    "context-leak": "the context is cleared between traces",
    "window-mismatch": "a test sees as many steps as training did",
    "target-return": "the test asks for the training pool's largest return (target_return_scale = 1)",
    "wrong-pool": "target return and reward range at test are those of the training pool",
    # what the training reached
    "warmup-too-long": "the warm-up ends within the steps taken: the rate reaches at least 90 % of its value",
    "diverged": "the loss ends near its lowest value",
    "learning-rate": "the rate moves the loss: LoRA learns between 3e-4 and 3e-3 here",
    "undertrained": "the loss ends below that of repeating what usually follows the previous level, H(a | previous)",
    "clipping": "the gradient of a step is clipped once, not after every micro-batch",
    "crossing-windows": "no training window spans two episodes",
    # what there was to learn
    "weak-teacher": "the behaviour policy of the pool is about as good as the baselines on the same traces",
    "pool-too-small": "the pool holds at least 40 episodes and every level more than a few times",
    "video-shift": "training and test stream the same video",
    "trace-shift": "the bandwidths at test lie where the pool's do",
    "reward-outliers": "90 % of the rewards fill at least a quarter of the pool's range",
    "flat-returns": "the largest return-to-go at an episode's start differs from the usual one by more than 10 %",
    # how it shows
    "level-collapse": "no level takes more than 90 % of the chunks, and levels do not only repeat",
    "rare-bad-actions": "long stalls cost at most .05 more than the reference's",
    "gap": "the paired interval of run − reference does not lie below zero",
    # how it was measured
    "protocol-mismatch": "run and baselines are means over the same traces, chunks and conditions",
    "too-few-traces": "a difference is called one only when its interval holds no zero",
    "handicapped-baseline": "a baseline plays its own algorithm",
    "test-leakage": "no test trace shares content with a training trace",
    "selected-on-test": "the checkpoint was chosen on other traces than those of the test",
}
"""Every id with what should be the case. The order is that of root causes: an earlier one makes later ones unreadable."""

ORDER = {name: number for number, name in enumerate(RULES)}


@dataclass(frozen=True)
class Effect:
    """What a fix brings in mean reward, with its 95 % interval over traces, and how that is known."""

    mean: float
    low: float
    high: float
    how: str

    @classmethod
    def of(cls, interval: Interval, how: str) -> Effect:
        """The effect whose interval is known, and how it was measured."""
        return cls(interval.mean, interval.low, interval.high, how)

    @property
    def noise(self) -> bool:
        """True if the interval holds zero: then nothing was shown."""
        return not (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {self.how}"


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    A *cause* is a mistake that explains a gap, a *suspect* may contribute, a *note* is worth knowing and explains nothing by
    itself (a mistake that cost nothing is one).
    """

    id: str
    severity: Severity
    title: str  # one sentence
    evidence: dict[str, Any]  # the numbers that were judged
    fix: str  # a concrete setting or command
    effect: Effect | None = None  # None where it was not measured
    closes: bool = False
    """The fix alone brings the run to the reference (measured)."""

    def __post_init__(self) -> None:
        if self.id not in RULES:
            raise ValueError(f"unknown finding {self.id!r}")

    @property
    def rule(self) -> str:
        """What the evidence was held against."""
        return RULES[self.id]

    def plain(self) -> dict[str, Any]:
        """As JSON types: id, severity, title, evidence, rule, fix, effect (null, or mean, low, high, how, noise)."""
        effect = None if self.effect is None else {**plain(self.effect), "noise": self.effect.noise}
        parts = {
            "id": self.id,
            "severity": self.severity,
            "title": self.title,
            "evidence": _finite(plain(self.evidence)),
        }
        return {**parts, "rule": self.rule, "fix": self.fix, "effect": effect}

    def __str__(self) -> str:
        worth = "" if self.effect is None else f"\n    worth: {self.effect}"
        return f"[{self.severity}] {self.id}: {self.title}{worth}\n    fix: {self.fix}"


@dataclass(frozen=True)
class Diagnosis:
    """The answer to "why is the reward poor?"."""

    findings: tuple[Finding, ...]  # most important first
    reward: Interval | None = None  # of the run, mean over traces
    reference: str | None = None  # the baseline that it is held against
    gap: Interval | None = None  # run − reference, paired
    regret: Interval | None = None  # run − offline optimum, which knows the future
    over_seeds: Interval | None = None  # run − reference over all runs of the recipe, if there are several
    missing: tuple[str, ...] = ()  # inputs that are not there, each with what it would add
    waterfall: Any = field(default=None, repr=False)  # pandas table of `ablation.ablate`, if it was made

    @property
    def first(self) -> Finding | None:
        """The first thing to fix; None if nothing was found."""
        return self.findings[0] if self.findings else None

    @property
    def causes(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "cause")

    def plain(self) -> dict[str, Any]:
        """As JSON types: findings (most important first), reward, reference, gap, over_seeds, regret, missing, waterfall."""
        return {
            "findings": [finding.plain() for finding in self.findings],
            "reward": None if self.reward is None else _finite(list(self.reward)),
            "reference": self.reference,
            "gap": None if self.gap is None else _finite(list(self.gap)),
            "over_seeds": None if self.over_seeds is None else _finite(list(self.over_seeds)),
            "regret": None if self.regret is None else _finite(list(self.regret)),
            "missing": list(self.missing),
            "waterfall": None if self.waterfall is None else _finite(plain(self.waterfall.to_dict("records"))),
        }

    def __str__(self) -> str:
        lines = []
        if self.reward is not None:
            lines.append(f"mean reward {self.reward}")
        if self.gap is not None:
            lines.append(f"difference to {self.reference}: {self.gap}")
        if self.over_seeds is not None:
            lines.append(f"difference to {self.reference} over all seeds: {self.over_seeds}")
        if self.regret is not None:
            lines.append(f"difference to the offline optimum: {self.regret}")
        lines += [f"{number}. {finding}" for number, finding in enumerate(self.findings, 1)] or ["nothing found"]
        if self.missing:
            lines += ["", "not there:", *(f"  {text}" for text in self.missing)]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Causes before suspects before notes; a cause whose fix alone closes the gap first, then root causes before symptoms."""
    return tuple(
        sorted(
            findings,
            key=lambda f: (
                SEVERITIES.index(f.severity),
                not f.closes,
                ORDER[f.id],
                -(f.effect.mean if f.effect else 0),
            ),
        )
    )
