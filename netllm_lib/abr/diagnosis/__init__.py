"""Why is the reward poor? Findings with their evidence, the most important first.

    evidence = load("reports/runs/import/…")      # or any folder of the original's, or of the notebooks
    print(diagnose(evidence, budget_s=90))

`evidence.py` says what may be known of a run, `inputs.py`, `learning.py` and `testing.py` hold the rules, `ablation.py` replays
the run with one switch turned at a time, `decisions.py` looks at single decisions. docs/findings.md lists all findings.
"""

from __future__ import annotations

from dataclasses import replace

from netllm_lib.abr import optimum
from netllm_lib.abr.diagnosis.evidence import (
    CHANCE,
    Evidence,
    Subject,
    Training,
    behaviour_entropy,
    paired,
    with_baselines,
)
from netllm_lib.abr.diagnosis.inputs import inputs
from netllm_lib.abr.diagnosis.replay import (
    RETRAINED,
    Ablation,
    Progress,
    ablate,
    episodes_of,
    measured,
    unexplained,
    weights,
)
from netllm_lib.abr.diagnosis.testing import testing
from netllm_lib.findings import RULES, Diagnosis, Effect, Finding, ranked
from netllm_lib.stats import Interval, bootstrap
from netllm_lib.training_rules import learning

__all__ = [
    "CHANCE",
    "RULES",
    "Ablation",
    "Diagnosis",
    "Effect",
    "Evidence",
    "Finding",
    "Subject",
    "Training",
    "ablate",
    "behaviour_entropy",
    "diagnose",
    "paired",
    "ranked",
    "regret",
    "with_baselines",
]

SYMPTOMS = ("level-collapse", "rare-bad-actions", "gap", "protocol-mismatch")
LEARNING = ("warmup-too-long", "diverged", "learning-rate", "undertrained")


def diagnose(
    evidence: Evidence, budget_s: float = 0.0, retrain_s: float = 0.0, progress: Progress | None = None
) -> Diagnosis:
    """All findings about a run, ranked, with what is missing to know more.

    With a budget the test is replayed where weights, PLM and traces are at hand (`ablate`), and `retrain_s` allows to
    train the PLM anew by the sound defaults, which shows what the fixes of the training are worth.
    """
    evidence = with_baselines(evidence)
    about_weights, evidence = weights(evidence)
    ablation = ablate(evidence, budget_s, retrain_s, progress)
    replayed = [*measured(evidence, ablation), *unexplained(evidence, ablation)] if ablation else []
    known = {finding.id for finding in replayed}
    found = [finding for finding in testing(evidence) if finding.id not in known]
    found += [*_problems(evidence), *about_weights, *inputs(evidence), *learning(evidence), *replayed]
    found = _with_retrained(_symptoms(_distinct(found)), ablation)
    return Diagnosis(
        ranked(found),
        evidence.reward,
        evidence.reference or next(iter(evidence.published), None),
        evidence.gap,
        regret(evidence) if budget_s > 0 else None,
        evidence.gap_over_seeds,
        (*evidence.missing, *([ablation.too_short] if ablation and ablation.too_short else [])),
        ablation.table() if ablation and ablation.effects else None,
    )


def regret(evidence: Evidence) -> Interval | None:
    """Run − offline optimum, paired over traces; None where the traces are not at hand, or the test had noise."""
    table, traces, video = evidence.table, evidence.traces, evidence.video
    if table is None or traces is None or video is None or not set(table["trace"]) <= set(traces.names):
        return None
    episodes = episodes_of(evidence)
    if episodes.noise is not None or list(dict.fromkeys(table["trace"])) != [
        traces.names[i] for i in episodes.trace_index
    ]:
        return None
    plans = optimum.best_plans(traces, video, episodes)
    return bootstrap(-optimum.regret(table, plans).to_numpy())


def _problems(evidence: Evidence) -> list[Finding]:
    """What loading the files showed: they do not fit each other, or are broken."""
    fixes = {
        "adapter-not-applied": "test with the adapter that was trained on this PLM (the companion refuses to load another one)",
        "wrong-checkpoint": "test the checkpoint of this run: family, hidden size, rank and layers must fit",
        "non-finite": "throw the file away; train in float32 with a lower learning rate",
    }
    return [
        Finding(
            name,
            "cause" if evidence.failing or evidence.reward is None else "suspect",
            text,
            {},
            fixes.get(name, "see the message"),
        )
        for name, text in evidence.problems
    ]


def _distinct(found: list[Finding]) -> list[Finding]:
    """One finding an id: the most severe."""
    best: dict[str, Finding] = {}
    for finding in ranked(found):
        best.setdefault(finding.id, finding)
    return list(best.values())


def _symptoms(found: list[Finding]) -> list[Finding]:
    """A symptom is no cause where a cause was found."""
    if not any(f.severity == "cause" and f.id not in SYMPTOMS for f in found):
        return found
    return [replace(f, severity="suspect") if f.severity == "cause" and f.id in SYMPTOMS else f for f in found]


def _with_retrained(found: list[Finding], ablation: Ablation | None) -> list[Finding]:
    """The worth of a sound training, on the findings about the training."""
    if ablation is None or RETRAINED not in ablation.effects:
        return found
    with_ = ablation.retrained_with or {}
    how = f"the same PLM and pool, trained by the sound defaults for {with_.get('steps')} steps ({with_.get('seconds', 0):.0f} s)"
    effect = Effect.of(ablation.effects[RETRAINED], how)
    return [replace(f, effect=effect) if f.id in LEARNING and f.effect is None else f for f in found]
