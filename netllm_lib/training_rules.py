"""Rules on the training: did the rate get where it should, did the loss, and what stood in the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from netllm_lib.abr.diagnosis.evidence import CHANCE, Evidence, Training, behaviour_entropy
from netllm_lib.findings import Finding, Severity

PLATEAU_STEPS = 60
"""Optimizer steps for which the loss usually rests before it falls; a run no longer than that says nothing about its rate."""
SLOW_LR, FAST_LR = (
    3e-4,
    5e-3,
)  # LoRA: below, hundreds of steps do not leave the plateau; above, the loss does not settle
FEWEST_WINDOWS_A_STEP = 8  # that people use where the documented number is 32
BINS = 10


def learning(evidence: Evidence) -> list[Finding]:
    """Findings about the training, from whatever is known of it."""
    known = evidence.training
    if known is None:
        return []
    return [*_finite(evidence), *_rate(evidence), *_diverged(evidence), *_undertrained(evidence), *_habits(evidence)]


def blame(evidence: Evidence, *, strong: bool = True) -> Severity:
    """How a mistake counts: as a cause where it left the policy unlearnt and the reward poor; as a note where it cost nothing."""
    poor = evidence.failing or (evidence.reward is None and evidence.setting.get("mean_reward") is None)
    if evidence.learned or not poor:
        return "note"
    return "cause" if strong else "suspect"


def _past_plateau(known: Training) -> bool:
    """Were there steps enough to say something of the rate? With an assumed accumulation there may have been more of them."""
    assert known.steps is not None
    if known.accumulation_assumed and known.micro_steps is not None:
        return known.micro_steps > PLATEAU_STEPS * FEWEST_WINDOWS_A_STEP
    return known.steps > PLATEAU_STEPS


def _finite(evidence: Evidence) -> list[Finding]:
    losses = evidence.training.losses if evidence.training else None
    loss = evidence.training.final_loss if evidence.training else None
    bad = 0 if losses is None else int((~np.isfinite(losses)).sum())
    if not bad and (loss is None or math.isfinite(loss)):
        return []
    first = int((~np.isfinite(losses)).argmax()) if losses is not None and bad else None
    where = "" if first is None else f", the first at micro-step {first + 1}"
    return [
        Finding(
            "non-finite",
            "cause",
            f"the training loss is not a number any more{where}",
            {"not_finite": bad, "first": first, "final_loss": loss},
            "train in float32 (TrainConfig.precision) with a lower learning rate; throw these weights away",
        )
    ]


def _rate(evidence: Evidence) -> list[Finding]:
    known, found = evidence.training, []
    assert known is not None
    if known.lr is None or known.lr_peak is None or known.steps is None:
        return []
    part = known.lr_peak / known.lr if known.lr else 1.0
    numbers = {
        "lr": known.lr,
        "lr_peak": known.lr_peak,
        "steps": known.steps,
        "warmup_steps": known.warmup_steps,
        "accumulation": known.accumulation,
        "accumulation_assumed": known.accumulation_assumed,
        "final_loss": known.end_loss(),
        "loss_bar": evidence.loss_bar,
    }
    outlasts = part < 0.9
    if outlasts:
        assumed = (
            f" (with {known.accumulation} windows a step, the documented value)" if known.accumulation_assumed else ""
        )
        found.append(
            Finding(
                "warmup-too-long",
                blame(evidence, strong=_past_plateau(known)),
                f"the warm-up of {known.warmup_steps} steps outlasts the {known.steps} steps taken{assumed}: the learning rate "
                f"never passed {part:.0%} of its value, {known.lr_peak:.2g}",
                numbers | {"peak_share": part},
                f"give the warm-up as a part of the steps really taken (TrainConfig.warmup = 0.1; in the original "
                f"--warmup-steps {max(1, known.steps // 10)})",
            )
        )
    loss = known.end_loss()
    if evidence.learned or loss is None:
        return found
    if known.lr < SLOW_LR and _past_plateau(known):
        found.append(
            Finding(
                "learning-rate",
                blame(evidence, strong=not outlasts),
                f"a learning rate of {known.lr:.2g} is too low for {known.steps} steps: the loss ended at {loss:.2f}, "
                f"above {evidence.loss_bar:.2f}",
                numbers,
                "train LoRA at 1e-3 and the modules around the PLM at 1e-2 (TrainConfig.lr, lr_around; in the original --lr 0.001)",
            )
        )
    elif known.lr_around is not None and known.lr_around < SLOW_LR and _past_plateau(known):
        found.append(
            Finding(
                "learning-rate",
                blame(evidence, strong=not outlasts),
                f"a learning rate of {known.lr_around:.2g} is too low for the modules around the PLM: the loss ended at "
                f"{loss:.2f}, above {evidence.loss_bar:.2f}",
                numbers | {"lr_around": known.lr_around},
                "train the modules around the PLM at 1e-2 (TrainConfig.lr_around)",
            )
        )
    elif known.lr_peak > FAST_LR and _past_plateau(known):
        found.append(
            Finding(
                "learning-rate",
                blame(evidence),
                f"a learning rate of {known.lr_peak:.2g} is too high: the loss ended at {loss:.2f}, above {evidence.loss_bar:.2f}",
                numbers,
                "train LoRA at 1e-3 (TrainConfig.lr; in the original --lr 0.001)",
            )
        )
    return found


def _binned(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of about ten consecutive parts of the losses, and the standard error of each."""
    parts = np.array_split(losses, min(BINS, max(1, len(losses) // 8)))
    means = np.array([part.mean() for part in parts])
    return means, np.array([part.std() / math.sqrt(len(part)) for part in parts])


def _diverged(evidence: Evidence) -> list[Finding]:
    known = evidence.training
    losses = known.losses if known is not None else None
    if losses is None or len(losses) < 40 or not np.isfinite(losses).all() or evidence.learned:
        return []
    means, errors = _binned(losses)
    lowest = int(means.argmin())
    rise = float(means[-1] - means[lowest])
    sure = 4 * math.hypot(float(errors[-1]), float(errors[lowest]))
    if rise < max(0.15 * float(means[lowest]), 0.1, sure):
        return []
    return [
        Finding(
            "diverged",
            blame(evidence),
            f"the loss fell to {means[lowest]:.2f} after {(lowest + 1) / len(means):.0%} of the training and rose to "
            f"{means[-1]:.2f} again",
            {"lowest": float(means[lowest]), "end": float(means[-1]), "at": (lowest + 1) / len(means)},
            'lower the learning rate by 3 to 10 times, or decay it (TrainConfig.schedule = "cosine"); clip at 0.25',
        )
    ]


def _undertrained(evidence: Evidence) -> list[Finding]:
    known, loss = evidence.training, evidence.training.end_loss() if evidence.training else None
    assert known is not None
    if loss is None or not math.isfinite(loss) or loss < evidence.loss_bar:
        return []
    numbers: dict[str, Any] = {
        "final_loss": loss,
        "loss_bar": evidence.loss_bar,
        "chance": CHANCE,
        "steps": known.steps,
    }
    what = "a trained policy usually ends below"
    if evidence.pool is not None:
        entropy, conditional = behaviour_entropy(evidence.pool)
        numbers |= {"H(a)": entropy, "H(a|previous)": conditional, "majority": _majority(evidence)}
        what = "repeating what usually follows the previous level would give"
    steps = "" if known.steps is None else f" after {known.steps} steps"
    return [
        Finding(
            "undertrained",
            blame(evidence),
            f"the loss ended at {loss:.2f}{steps}: {what} {evidence.loss_bar:.2f}",
            numbers,
            "train longer (the loss rests for its first 40 to 60 steps), with LoRA at 1e-3; see the learning rate, if it was found",
        )
    ]


def _majority(evidence: Evidence) -> float:
    """Share of the pool's most frequent level: the accuracy of always predicting it."""
    assert evidence.pool is not None
    counts = np.bincount(evidence.pool.actions)
    return float(counts.max() / counts.sum())


def _habits(evidence: Evidence) -> list[Finding]:
    """Habits of the original's training that cost some of what could be learnt, and no more."""
    known, found = evidence.training, []
    assert known is not None
    mild: Severity = "suspect" if evidence.failing and not evidence.learned else "note"
    if known.clip == "micro" and (known.accumulation or 1) > 1:
        share = "" if known.clipped is None else f"; {known.clipped:.0%} of them were clipped"
        found.append(
            Finding(
                "clipping",
                mild,
                f"the gradient is clipped after each of the {known.accumulation} windows of a step, so that the last count far "
                f"more than the first{share}",
                {"accumulation": known.accumulation, "clipped": known.clipped},
                'clip once a step (TrainConfig.clip = "step")',
            )
        )
    if known.crossing and known.windows:
        part = known.crossing / known.windows
        found.append(
            Finding(
                "crossing-windows",
                mild,
                f"{part:.0%} of the training windows span two episodes",
                {"share": part, "windows": known.windows},
                'cut windows inside episodes (TrainConfig.windows = "episode")',
            )
        )
    return found
