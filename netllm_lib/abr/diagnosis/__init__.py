"""Why is the reward poor? Findings with their evidence, the most important first.

    evidence = load("reports/runs/05_test/…")      # or a run of the original, or any part of it
    print(diagnose(evidence, budget_s=90))

First everything is gathered that can be known (`evidence`, `load`; `replay` plays the test again and looks at the weights), then
the rules judge it (`inputs`, `weights`, `testing`, and `netllm_lib.training_rules`). docs/findings.md lists them.
"""

from __future__ import annotations

from dataclasses import replace

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
from netllm_lib.findings import Diagnosis, Effect, Finding, Rule, judged
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

RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in (
        # what the files hold
        testing.non_finite,
        inputs.label_shift,
        weights.adapter_not_applied,
        weights.wrong_checkpoint,
        # what the test did, against what its weights can do
        weights.sampling,
        weights.dropout_on,
        weights.context_leak,
        weights.window_mismatch,
        weights.target_return,
        weights.wrong_pool,
        # what the training reached
        training_rules.warmup_too_long,
        training_rules.diverged,
        training_rules.learning_rate,
        training_rules.undertrained,
        training_rules.clipping,
        training_rules.crossing_windows,
        # what there was to learn
        inputs.weak_teacher,
        inputs.pool_too_small,
        inputs.video_shift,
        inputs.trace_shift,
        inputs.reward_outliers,
        inputs.flat_returns,
        # how it shows
        testing.level_collapse,
        testing.rare_bad_actions,
        testing.gap,
        # how it was measured
        testing.protocol_mismatch,
        testing.too_few_traces,
        testing.handicapped_baseline,
        testing.test_leakage,
        testing.selected_on_test,
    )
}
"""By id, in the order of root causes: an earlier one makes later ones unreadable."""


def diagnose(
    evidence: Evidence, budget_s: float = 0.0, retrain_s: float = 0.0, progress: replay.Progress | None = None
) -> Diagnosis:
    """All findings about a run, ranked, with what is missing to know more.

    With a budget the test is played again where weights, PLM and traces are at hand, one switch turned at a time, and `retrain_s`
    allows to train the PLM anew by the sound defaults, which shows what the fixes of the training bring.
    """
    evidence = with_baselines(evidence)
    if evidence.subject is not None:
        evidence = replace(evidence, weights=replay.look_at(evidence.subject, evidence.pool))
    replayed = replay.ablate(evidence, budget_s, retrain_s, progress)
    evidence = replace(evidence, replayed=replayed)
    return Diagnosis(
        _with_retraining(judged(tuple(RULES.values()), evidence), replayed),
        score=evidence.reward,
        reference=evidence.reference or next(iter(evidence.published), None),
        gap=evidence.gap,
        regret=regret(evidence) if budget_s > 0 else None,
        over_seeds=evidence.gap_over_seeds,
        missing=(*evidence.missing, *([replayed.too_short] if replayed and replayed.too_short else [])),
        waterfall=replayed.table() if replayed and replayed.effects else None,
        measure=REWARD.name,
    )


def _with_retraining(findings: tuple[Finding, ...], replayed: replay.Ablation | None) -> tuple[Finding, ...]:
    """What a sound training brought, on the findings that it mends."""
    if replayed is None or replay.RETRAINED not in replayed.effects:
        return findings
    how = "the same PLM and pool, trained by the sound defaults for {steps} steps ({seconds:.0f} s)"
    effect = Effect.of(replayed.effects[replay.RETRAINED], how.format(**replayed.retrained_with or {}))
    return tuple(replace(f, effect=effect) if f.rule.retraining and f.effect is None else f for f in findings)


def regret(evidence: Evidence) -> Interval | None:
    """Run − offline optimum, paired over traces; None where the traces are not at hand, or the test had noise."""
    table, traces, video = evidence.table, evidence.traces, evidence.video
    if table is None or traces is None or video is None or not set(table["trace"]) <= set(traces.names):
        return None
    episodes = replay.episodes_of(evidence)
    names = [traces.names[i] for i in episodes.trace_index]
    if episodes.noise is not None or list(dict.fromkeys(table["trace"])) != names:
        return None
    return bootstrap(-optimum.regret(table, optimum.best_plans(traces, video, episodes)).to_numpy())
