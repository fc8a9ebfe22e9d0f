"""Why is the reward poor? Findings with their evidence, the most important first.

    evidence = load("reports/runs/05_test/…")      # or a run of the original, or any part of it
    print(diagnose(evidence, budget_s=90))

First everything is gathered that can be known (`evidence`, `load`; `replay` plays the test again and looks at the weights), then
the rules judge it (`inputs`, `weights`, `testing`, and `netllm_lib.training_rules`). docs/findings.md lists them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from netllm_lib import training_rules
from netllm_lib.abr import optimum
from netllm_lib.abr.diagnosis import inputs, replay, testing, weights
from netllm_lib.abr.diagnosis.evidence import (
    CHANCE,
    Evidence,
    Recipe,
    Subject,
    behaviour_entropy,
    paired,
    with_baselines,
)
from netllm_lib.abr.evaluate import REWARD
from netllm_lib.findings import Attempts, Diagnosis, Effect, Finding, Rule, judged
from netllm_lib.stats import Interval, bootstrap

__all__ = [
    "CHANCE",
    "RULES",
    "Diagnosis",
    "Effect",
    "Evidence",
    "Finding",
    "Recipe",
    "Subject",
    "behaviour_entropy",
    "diagnose",
    "paired",
    "regret",
    "with_baselines",
]

_ORDER: tuple[tuple[Any, str], ...] = (
    (testing, "non_finite"),
    (inputs, "label_shift"),
    (
        weights,
        "adapter_not_applied wrong_checkpoint sampling dropout_on context_leak window_mismatch target_return wrong_pool",
    ),
    (training_rules, "warmup_too_long diverged learning_rate undertrained clipping crossing_windows"),
    (inputs, "weak_teacher pool_too_small video_shift trace_shift flat_returns"),
    (testing, "level_collapse rare_bad_actions gap protocol_mismatch too_few_traces"),
    (testing, "test_leakage selected_on_test"),
)
RULES: dict[str, Rule] = {
    rule.id: rule for room, names in _ORDER for name in names.split() for rule in [getattr(room, name)]
}
"""By id, in the order of root causes: what the files hold, what the test did, what the training reached, what there was to learn,
how it shows, how it was measured. An earlier one makes later ones unreadable."""


def diagnose(
    evidence: Evidence, budget_s: float = 0.0, retrain_s: float = 0.0, progress: replay.Progress | None = None
) -> Diagnosis:
    """All findings about a run, ranked, with what is missing to know more.

    With a budget the test is played again where weights, PLM and traces are at hand, one switch turned at a time, and `retrain_s`
    allows to train the PLM anew by the sound defaults, which shows what the fixes of the training bring.
    """
    attempt = Attempts()
    evidence = attempt("the baselines", with_baselines, evidence) or evidence
    if evidence.subject is not None:
        weights = attempt("the loss of the weights", replay.look_at, evidence.subject, evidence.pool)
        evidence = replace(evidence, weights=weights)
    replayed = attempt("playing the test again", replay.ablate, evidence, budget_s, retrain_s, progress)
    evidence = replace(evidence, replayed=replayed)
    findings = judged(tuple(RULES.values()), evidence, _of_retraining(replayed), attempt)
    best = attempt("the regret", regret, evidence) if budget_s > 0 else None
    too_short = (replayed.too_short,) if replayed and replayed.too_short else ()
    return Diagnosis(
        findings,
        score=evidence.reward,
        reference=evidence.reference,
        gap=evidence.gap,
        regret=best,
        over_seeds=evidence.gap_over_seeds,
        missing=(*evidence.missing, *too_short, *attempt.failed),
        waterfall=replayed and replayed.table(),
        measure=REWARD.name,
    )


def _of_retraining(replayed: replay.Ablation | None) -> Effect | None:
    """What a sound training brought, where one was done."""
    if replayed is None or replayed.retrained is None or (change := replayed.effect(replay.RETRAINED)) is None:
        return None
    steps, seconds = replayed.retrained.steps, replayed.retrained.seconds
    return Effect(*change, f"the same PLM and pool, trained by the sound defaults for {steps} steps ({seconds:.0f} s)")


def regret(evidence: Evidence) -> Interval | None:
    """Run − offline optimum, paired over traces; None where the traces are not at hand, or the test had noise."""
    simulator = replay.recorded(evidence)
    if simulator is None or simulator.episodes.noise is not None or evidence.table is None:
        return None
    plans = optimum.best_plans(simulator.traces, simulator.video, simulator.episodes)
    return bootstrap(-optimum.regret(evidence.table, plans).to_numpy())
