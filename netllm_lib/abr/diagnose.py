"""Findings: what a run's numbers say about its reward, most important first.

Every finding names the rule that judged it and the numbers that it judged. A *cause* is a mistake large enough to explain a gap,
a *suspect* may contribute, a *note* is worth knowing and explains nothing by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.stats import Interval, bootstrap

Severity = Literal["cause", "suspect", "note"]
CHANCE = math.log(qoe.LEVELS)
"""Cross-entropy in nats of a model that knows nothing."""
_RANK = {"cause": 0, "suspect": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was found. `effect` is its estimated worth in mean reward, None where that was not measured."""

    id: str
    severity: Severity
    title: str
    evidence: dict[str, Any]
    rule: str  # what the evidence was held against
    fix: str
    effect: float | None = None

    def __str__(self) -> str:
        worth = "" if self.effect is None else f" (worth about {self.effect:+.3f})"
        return f"[{self.severity}] {self.id}: {self.title}{worth}\n    fix: {self.fix}"


@dataclass(frozen=True)
class Evidence:
    """What is known of a run. Leave out what is not: findings that need it are then not made."""

    tables: Mapping[str, pd.DataFrame]  # tables of chunks by policy, all over the same episodes
    run: str  # the policy that is diagnosed
    handicapped: tuple[str, ...] = ()  # policies of `tables` that are known to play below their own algorithm
    pool: ExperiencePool | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    """Of the notebook 04: steps, warmup_steps, lr, lr_peak, final_loss, crossing, windows."""
    clean: np.ndarray | None = None  # [traces] bool: the trace shares no content with the training traces
    setting: Mapping[str, Any] = field(default_factory=dict)  # traces, video, seed, how the run was tested


def diagnose(evidence: Evidence) -> list[Finding]:
    """All findings, causes first, then by effect."""
    found = [*_training(evidence), *_pool(evidence), *_reward(evidence), *_protocol(evidence)]
    return sorted(found, key=lambda f: (_RANK[f.severity], -(f.effect or 0.0)))


def paired(ours: pd.DataFrame, other: pd.DataFrame) -> Interval:
    """Difference of mean reward, ours − other, with its bootstrap interval over traces."""
    difference = qoe.per_trace(ours)["reward"] - qoe.per_trace(other)["reward"]
    return bootstrap(difference.to_numpy())


def behaviour_entropy(pool: ExperiencePool) -> tuple[float, float]:
    """(H(a), H(a | previous level)) of the behaviour policy in nats.

    A policy that has learnt nothing has a loss of ln 6 = 1.79; one that only knows how often each level occurs has H(a); one
    that only repeats what usually follows the previous level has H(a | previous).
    """
    joint = np.zeros((qoe.LEVELS, qoe.LEVELS))
    previous = np.rint(pool.states[:, 0, -1] * qoe.BITRATES_KBPS[-1])
    np.add.at(joint, (np.searchsorted(qoe.BITRATES_KBPS, previous - 0.5), pool.actions), 1)
    actions, rows = joint.sum(axis=0), joint.sum(axis=1)
    return _entropy(actions), float(
        sum(total / rows.sum() * _entropy(row) for row, total in zip(joint, rows, strict=True))
    )


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def _training(evidence: Evidence) -> list[Finding]:
    found, known = [], evidence.training
    if {"lr", "lr_peak", "warmup_steps", "steps"} <= known.keys() and known["lr_peak"] < 0.9 * known["lr"]:
        part = known["lr_peak"] / known["lr"]
        found.append(
            Finding(
                "warmup-too-long",
                "cause",
                f"the warm-up of {known['warmup_steps']} steps outlasts the {known['steps']} steps taken: the learning rate "
                f"never passed {part:.0%} of its value",
                {"peak_share": part, "steps": known["steps"], "warmup_steps": known["warmup_steps"]},
                "the learning rate should reach at least 90 % of its value",
                "give the warm-up as a part of the steps really taken (TrainConfig.warmup = 0.1)",
            )
        )
    loss = known.get("final_loss")
    if loss is not None and not math.isfinite(loss):
        found.append(
            Finding(
                "non-finite", "cause", f"the training loss ended at {loss}", {"final_loss": loss}, "losses are finite",
                "lower the learning rate, train in float32",
            )
        )  # fmt: skip
    elif loss is not None and evidence.pool is not None:
        marginal, conditional = behaviour_entropy(evidence.pool)
        if loss > conditional:
            found.append(
                Finding(
                    "undertrained",
                    "cause" if loss > marginal else "suspect",
                    f"the loss ended at {loss:.2f}: repeating what usually follows the previous level would give {conditional:.2f}",
                    {"final_loss": loss, "H(a)": marginal, "H(a|previous)": conditional, "chance": CHANCE},
                    "the final loss should lie below H(a | previous level) of the pool",
                    "train longer or with a higher learning rate; see the learning-rate finding, if any",
                )
            )
    if known.get("crossing"):
        share = known["crossing"] / known["windows"]
        found.append(
            Finding(
                "crossing-windows", "suspect", f"{share:.0%} of the training windows span two episodes",
                {"share": share}, "no window should", 'cut windows inside episodes (TrainConfig.windows = "episode")',
            )
        )  # fmt: skip
    return found


def _pool(evidence: Evidence) -> list[Finding]:
    if (pool := evidence.pool) is None:
        return []
    found = []
    low, high = np.quantile(pool.rewards, [0.05, 0.95])
    lowest, highest = pool.rewards.min(), pool.rewards.max()
    width = (high - low) / (highest - lowest)
    if width < 0.25:
        found.append(
            Finding(
                "reward-outliers",
                "note",
                f"one reward of {lowest:.1f} sets the range: 90 % of the normalised rewards lie in a band {width:.2f} wide, so "
                "the target return carries little signal",
                {"min": lowest, "max": highest, "band": width},
                "90 % of the rewards should fill at least a quarter of the range",
                "nothing to do while the target return is left alone: a policy cloned from this pool works without it",
            )
        )
    return found


def _reward(evidence: Evidence) -> list[Finding]:
    found = []
    ours = evidence.tables[evidence.run]
    others = {name: t for name, t in evidence.tables.items() if name != evidence.run}
    if not others:
        return []
    best = max(others, key=lambda name: qoe.summarise(others[name]).reward)
    gap = paired(ours, others[best])
    parts = qoe.per_trace(ours) - qoe.per_trace(others[best])
    if gap.high < 0:
        losses = {"quality": -parts["quality"].mean(), "rebuffering": parts["rebuffering"].mean()}
        losses["smoothness"] = parts["smoothness"].mean()
        largest = max(losses, key=lambda name: losses[name])
        worst = parts["reward"].sort_values()
        top = worst.head(5)
        share = top.sum() / worst.sum()
        found.append(
            Finding(
                f"gap-{largest}",
                "suspect",
                f"{-gap.mean:.3f} below {best}, mostly {largest} ({losses[largest]:.3f}); "
                f"the five worst traces hold {share:.0%} of it",
                {"gap": list(gap), "baseline": best, **losses, "worst_traces": list(top.index)},
                "the paired interval lies below zero",
                "look at the timelines of the worst traces below",
                effect=-gap.mean,
            )
        )
    chunks = qoe.chosen(ours)
    stalls = chunks["rebuffer_s"] > 0
    tail = qoe.REBUFFER_PENALTY * chunks.loc[chunks["rebuffer_s"] > 1, "rebuffer_s"].sum() / len(chunks)
    reference = qoe.chosen(others[best])
    theirs = qoe.REBUFFER_PENALTY * reference.loc[reference["rebuffer_s"] > 1, "rebuffer_s"].sum() / len(reference)
    if tail - theirs > 0.05:
        found.append(
            Finding(
                "rare-bad-actions",
                "suspect",
                f"stalls of over a second cost {tail:.3f} of the mean reward, {tail - theirs:.3f} more than {best}'s, in "
                f"{(chunks['rebuffer_s'] > 1).mean():.2%} of the chunks",
                {"cost": tail, "baseline_cost": theirs, "share_of_chunks_with_stall": float(stalls.mean())},
                "long stalls should cost at most .05 more than the best baseline's",
                "choose by argmax, not by sampling"
                if evidence.setting.get("choose") == "sample"
                else "look at the decisions before the stalls in the worst traces; train longer, or on a pool with fewer stalls",
                effect=tail - theirs,
            )
        )
    common = chunks["level"].value_counts(normalize=True)
    if common.iloc[0] > 0.9:
        found.append(
            Finding(
                "level-collapse", "cause", f"{common.iloc[0]:.0%} of all chunks are level {common.index[0]}",
                {"level": int(common.index[0]), "share": float(common.iloc[0])}, "no level should exceed 90 %",
                "the policy has not learnt to react: see the training findings",
            )
        )  # fmt: skip
    return found


def _protocol(evidence: Evidence) -> list[Finding]:
    found = []
    ours = evidence.tables[evidence.run]
    for name in evidence.handicapped:
        if name in evidence.tables and (sound := name.split(" ")[0]) in evidence.tables:
            difference = paired(evidence.tables[sound], evidence.tables[name])
            if difference.low > 0:
                found.append(
                    Finding(
                        "handicapped-baseline",
                        "note",
                        f"{name} as published plays below its own algorithm: without the original's mistakes it is "
                        f"{difference.mean:+.3f} better",
                        {"difference": list(difference)},
                        "the paired interval lies above zero",
                        f"compare with {sound}, not only with {name}",
                    )
                )
    unclear = [
        name
        for name, table in evidence.tables.items()
        if name != evidence.run and not paired(ours, table).excludes_zero
    ]
    if unclear:
        count = len(qoe.per_trace(ours))
        found.append(
            Finding(
                "too-few-traces",
                "note",
                f"{count} traces cannot tell {evidence.run} from {', '.join(unclear)}: the paired intervals hold zero",
                {"undecided": unclear, "traces": count},
                "a difference needs an interval without zero",
                "play more traces or seeds before calling one of them better",
            )
        )
    if evidence.clean is not None and not evidence.clean.all():
        rows = qoe.per_trace(ours)["reward"].to_numpy()
        clean = float(rows[evidence.clean].mean()) if evidence.clean.any() else float("nan")
        found.append(
            Finding(
                "test-leakage",
                "note",
                f"{(~evidence.clean).sum()} of {len(evidence.clean)} test traces share content with the training traces; mean "
                f"reward on the {evidence.clean.sum()} others: {clean:.3f}",
                {"overlapping": int((~evidence.clean).sum()), "clean": int(evidence.clean.sum()), "clean_mean": clean},
                "no test trace should share content with a training trace",
                "judge by the paired difference on the clean traces too",
            )
        )
    return found
