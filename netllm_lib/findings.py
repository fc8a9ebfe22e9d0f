"""What a diagnosis says: findings, ranked so that the first is the first thing to fix, and the rules that make them.

    @rule("too-few", fix="take more", figure="counts")
    def too_few(evidence, count):
        "There are at least ten."
        return verdict("cause", "there are only {count}", count=count) if count < 10 else None

What such a function takes besides the evidence are parts of it by name; it is not asked where one of them is None.
A task lists its rules in the order of root causes: an earlier one makes what later ones see unreadable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from netllm_lib.runs import plain, write_json
from netllm_lib.stats import Interval
from netllm_lib.text import printable

T = TypeVar("T")
FINDINGS = "findings.json"
Severity = Literal["cause", "suspect", "note"]
SEVERITIES: tuple[Severity, ...] = ("cause", "suspect", "note")


@dataclass(frozen=True)
class Effect:
    """What a fix brings (above zero is better), with its 95 % interval, and how that is known."""

    mean: float
    low: float
    high: float
    how: str

    @property
    def noise(self) -> bool:
        """True if the interval holds zero: then nothing was shown."""
        return not (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {self.how}"


@dataclass(frozen=True)
class Verdict:
    """What a rule says where something is not as it should be.

    A *cause* is a mistake that explains a gap, a *suspect* may contribute, a *note* is worth knowing and explains nothing by
    itself (a mistake that cost nothing is one).
    """

    severity: Severity
    title: str  # one sentence
    evidence: dict[str, Any] = field(default_factory=dict)  # the numbers that were judged
    fix: str = ""  # a concrete setting or command; empty: the one of the rule
    effect: Effect | None = None  # None where it was not measured
    closes: bool = False  # the fix alone brings the run to its reference (measured)


def verdict(severity: Severity, title: str, /, **numbers: Any) -> Verdict:
    """A verdict of the numbers that were judged; its title names them in braces."""
    return Verdict(severity, title.format(**numbers), numbers)


@dataclass(frozen=True)
class Rule:
    """A function that sees whether something is as it should be. Call it with the evidence: a finding, or None."""

    id: str
    should: str  # be the case
    fix: str  # a concrete setting or command
    judge: Callable[..., Verdict | None]  # of the evidence, and of parts of it by their names
    figure: str = ""  # the name of the figure that shows it, if there is one
    symptom: bool = False  # it shows that something is wrong, not what: no cause where a cause was found
    retraining: bool = False  # training anew by the sound defaults mends it

    def __call__(self, evidence: Any) -> Finding | None:
        parts = [getattr(evidence, name) for name in [*inspect.signature(self.judge).parameters][1:]]
        verdict = None if any(part is None for part in parts) else self.judge(evidence, *parts)
        return None if verdict is None else Finding(**vars(verdict) | {"fix": verdict.fix or self.fix}, rule=self)


def rule(id: str, **about: Any) -> Callable[[Callable[..., Verdict | None]], Rule]:
    """Make a `Rule` of the function that judges, whose docstring says what should be the case; `about` are the other fields."""

    def made(judge: Callable[..., Verdict | None]) -> Rule:
        should = (judge.__doc__ or "").strip().rstrip(".")
        return Rule(id, should[:1].lower() + should[1:], judge=judge, **about)

    return made


@dataclass(frozen=True)
class Finding(Verdict):
    """One thing that was found: a verdict, and the rule that spoke it."""

    rule: Rule = field(kw_only=True)

    @property
    def id(self) -> str:
        return self.rule.id

    def plain(self) -> dict[str, Any]:
        """As JSON types: id, severity, title, evidence, rule, fix, effect (null, or mean, low, high, how, noise)."""
        effect = None if self.effect is None else {**plain(self.effect), "noise": self.effect.noise}
        parts = {"id": self.id, "severity": self.severity, "title": self.title, "evidence": self.evidence}
        return plain({**parts, "rule": self.rule.should, "fix": self.fix, "effect": effect})

    def __str__(self) -> str:
        effect = "" if self.effect is None else f"\n    effect of the fix: {self.effect}"
        return f"[{self.severity}] {self.id}: {self.title}{effect}\n    fix: {self.fix}"


class Attempts:
    """Calls on parts that may be broken: each gives its value or None, and none keeps another from being made."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self._failed: dict[str, list[str]] = {}  # what failed, by the error

    def __call__(self, what: str, call: Callable[..., T], *given: Any) -> T | None:
        """What the call gives; None where it fails, and then `failed` says so of `what`."""
        try:
            return call(*given)
        except Exception as error:  # whatever a broken file provokes is a broken file
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            self.errors.append(error)
            self._failed.setdefault(f"{kind}{' '.join(str(error).split())[:300]}", []).append(what)
            return None

    @property
    def failed(self) -> tuple[str, ...]:
        """A line for every error, with what failed by it."""
        return tuple(f"{', '.join(what)} (broken: {error})" for error, what in self._failed.items())


def judged(
    rules: Sequence[Rule], evidence: Any, retrained: Effect | None = None, attempt: Attempts | None = None
) -> tuple[Finding, ...]:
    """What the rules find: causes before suspects before notes, among equals those first whose fix closes the gap, then in the
    order of the rules. A symptom is a suspect at most where something else was found to be the cause. `retrained` is what a sound
    training brought: the effect of what it mends. With `attempt` a rule that fails on broken evidence does not end the others."""
    found = []
    for rule in rules:
        finding = rule(evidence) if attempt is None else attempt(rule.id, rule, evidence)
        found += [] if finding is None else [finding]
    caused = any(f.severity == "cause" and not f.rule.symptom for f in found)
    for place, finding in enumerate(found):
        if caused and finding.severity == "cause" and finding.rule.symptom:
            found[place] = replace(finding, severity="suspect")
        if finding.rule.retraining and finding.effect is None:
            found[place] = replace(finding, effect=retrained)
    return tuple(sorted(found, key=lambda f: (SEVERITIES.index(f.severity), not f.closes)))


@dataclass(frozen=True)
class Diagnosis:
    """The answer to "why is the score poor?"."""

    findings: tuple[Finding, ...]  # most important first
    score: Interval | None = None  # of the run, mean over samples
    reference: str | None = None  # what it is held against
    gap: Interval | None = None  # run − reference, paired; below zero is worse
    regret: Interval | None = None  # run − the best that was possible, if that is known
    over_seeds: Interval | None = None  # run − reference over all runs of the recipe, if there are several
    missing: tuple[str, ...] = ()  # inputs that are not there, each with what it would add
    waterfall: Any = field(default=None, repr=False)  # pandas table: what each switch changed, if that was measured
    measure: str = "score"  # its name

    @property
    def first(self) -> Finding | None:
        """The first thing to fix; None if nothing was found."""
        return self.findings[0] if self.findings else None

    @property
    def causes(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "cause")

    def plain(self) -> dict[str, Any]:
        """As JSON types: findings (most important first), score, reference, gap, over_seeds, regret, missing, waterfall."""
        found = {"findings": [finding.plain() for finding in self.findings], "reference": self.reference}
        found |= {name: getattr(self, name) for name in ("score", "gap", "over_seeds", "regret")}
        table = None if self.waterfall is None else self.waterfall.to_dict("records")
        return plain({**found, "measure": self.measure, "missing": self.missing, "waterfall": table})

    def save(self, folder: Path) -> None:
        """Write `findings.json`."""
        write_json(folder / FINDINGS, self.plain())

    def headline(self) -> str:
        """The score, what it is compared with, and how far it is from it; empty where nothing is known of them."""
        against = f"difference to {self.reference}"
        rows = [(f"mean {self.measure}", self.score), (f"{against}:", self.gap)]
        rows += [(f"{against} over all seeds:", self.over_seeds), ("difference to the best possible:", self.regret)]
        return "\n".join(f"{what} {interval}" for what, interval in rows if interval is not None)

    def text(self, top: int | None = None) -> str:
        """The headline and the findings, or the first `top` of them."""
        shown = [f"{number}. {finding}" for number, finding in enumerate(self.findings[:top], 1)] or ["nothing found"]
        left = len(self.findings) - len(shown)
        more = [f"… and {left} more"] if left > 0 else []
        return printable("\n".join([*filter(None, [self.headline()]), *shown, *more]))

    def __str__(self) -> str:
        missing = ["", "not there:", *(f"  {text}" for text in self.missing)] if self.missing else []
        return printable("\n".join([self.text(), *missing]))
