"""Rules on a training of any task: did the rate get where it should, did the loss, and what stood in the way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from netllm_lib.findings import Severity, Verdict, rule, verdict

if TYPE_CHECKING:
    from netllm_lib.training_run import TrainingRun

PLATEAU_STEPS = 60
"""Optimizer steps for which the loss usually rests before it falls; a run no longer than that says nothing about its rate."""
SLOW_LR, FAST_LR = 3e-4, 5e-3
"""LoRA: below, hundreds of steps do not leave the plateau; above, the loss does not settle."""
FEWEST_WINDOWS_A_STEP = 8  # that people use where the documented number is 32
BINS = 10
WARMUP_FIX = "give the warm-up as a part of the steps really taken"


class Trained(Protocol):
    """What a task's evidence has to tell these rules."""

    training: TrainingRun | None
    failing: bool  # the result is known to be below what it is held against
    poor: bool  # the same, or nothing is known of the result
    end_loss: float | None  # of the training, at its end
    learned: bool | None  # the loss ended below the bar; None where no loss is known
    loss_bar: float  # the loss that a model which learnt something ends below
    reference_losses: dict[str, float]  # further losses to compare with, by name


def blame(case: Trained, *, strong: bool = True) -> Severity:
    """How a mistake counts: as a cause where nothing was learnt and the result is poor; as a note where it cost nothing."""
    if case.learned or not case.poor:
        return "note"
    return "cause" if strong else "suspect"


def habit(case: Trained) -> Severity:
    """How something counts that costs some of what could be learnt, and no more."""
    return "suspect" if case.failing and not case.learned else "note"


def _past_plateau(run: TrainingRun) -> bool:
    """Were there steps enough to say something of the rate? With an assumed accumulation there may have been more of them."""
    if run.accumulation_assumed and run.micro_steps is not None:
        return run.micro_steps > PLATEAU_STEPS * FEWEST_WINDOWS_A_STEP
    return run.steps is not None and run.steps > PLATEAU_STEPS


def _numbers(case: Trained, run: TrainingRun) -> dict[str, Any]:
    names = ("lr", "lr_peak", "lr_around", "steps", "warmup_steps", "accumulation", "accumulation_assumed")
    share = None if run.lr is None or run.lr_peak is None else run.lr_peak / run.lr if run.lr else 1.0
    found = {name: getattr(run, name) for name in names} | {"peak_share": share}
    return found | {"final_loss": case.end_loss, "loss_bar": case.loss_bar}


@rule(
    "non-finite",
    fix="train in float32 (TrainConfig.precision) with a lower rate; throw these weights away",
    figure="losses",
)
def non_finite(case: Trained, training: TrainingRun) -> Verdict | None:
    """Losses are finite numbers."""
    bad = ~np.isfinite(np.empty(0) if training.losses is None else training.losses)
    if not bad.any() and (training.final_loss is None or math.isfinite(training.final_loss)):
        return None
    first = int(bad.argmax()) + 1 if bad.any() else None
    title = "the training loss is not a number any more" + (", the first at micro-step {first}" if first else "")
    return verdict("cause", title, not_finite=int(bad.sum()), first=first, final_loss=training.final_loss)


@rule("warmup-too-long", fix=WARMUP_FIX, figure="learning-rate", retraining=True)
def warmup_too_long(case: Trained, training: TrainingRun) -> Verdict | None:
    """The warm-up ends within the steps taken: the rate reaches at least 90 % of its value."""
    numbers, steps = _numbers(case, training), training.steps
    if numbers["peak_share"] is None or steps is None or numbers["peak_share"] >= 0.9:
        return None
    assumed = " (with {accumulation} windows a step, as documented)" if training.accumulation_assumed else ""
    title = f"the warm-up of {{warmup_steps}} steps outlasts the {{steps}} steps taken{assumed}: the learning rate never passed "
    title += "{peak_share:.0%} of its value, {lr_peak:.2g}"
    fix = f"{WARMUP_FIX} (TrainConfig.warmup = 0.1; in the original --warmup-steps {max(1, steps // 10)})"
    return replace(verdict(blame(case, strong=_past_plateau(training)), title, **numbers), fix=fix)


@rule(
    "diverged",
    fix='lower the learning rate by 3 to 10 times, or decay it (TrainConfig.schedule = "cosine"); clip at 0.25',
    figure="losses",
    retraining=True,
)
def diverged(case: Trained, training: TrainingRun) -> Verdict | None:
    """The loss ends near its lowest value."""
    losses = training.losses
    if losses is None or len(losses) < 40 or not np.isfinite(losses).all() or case.learned:
        return None
    parts = np.array_split(losses, min(BINS, len(losses) // 8))
    means = np.array([part.mean() for part in parts])
    errors = np.array([part.std() / math.sqrt(len(part)) for part in parts])
    place, end = int(means.argmin()), float(means[-1])
    lowest = float(means[place])
    if end - lowest < max(0.15 * lowest, 0.1, 4 * math.hypot(errors[-1], errors[place])):
        return None
    title = "the loss fell to {lowest:.2f} after {at:.0%} of the training and rose to {end:.2f} again"
    return verdict(blame(case), title, lowest=lowest, end=end, at=(place + 1) / len(means))


@rule(
    "learning-rate",
    fix="train LoRA at 1e-3 and the modules around the PLM at 1e-2 (TrainConfig.lr, lr_around; in the original --lr 0.001)",
    figure="losses",
    retraining=True,
)
def learning_rate(case: Trained, training: TrainingRun, end_loss: float) -> Verdict | None:
    """The rate moves the loss: LoRA learns between 3e-4 and 3e-3 here."""
    numbers, lr, peak = _numbers(case, training), training.lr, training.lr_peak
    if lr is None or peak is None or training.steps is None or case.learned or not _past_plateau(training):
        return None
    around = lr if training.lr_around is None else training.lr_around
    if lr < SLOW_LR:
        rate, what = lr, "too low for {steps} steps"
    elif around < SLOW_LR:
        rate, what = around, "too low for the modules around the PLM"
    elif peak > FAST_LR:
        rate, what = peak, "too high"
    else:
        return None
    title = f"a learning rate of {rate:.2g} is {what}: the loss ended at {{final_loss:.2f}}, above {{loss_bar:.2f}}"
    return verdict(blame(case, strong=numbers["peak_share"] >= 0.9 or what == "too high"), title, **numbers)


@rule(
    "undertrained",
    fix="train longer (the loss rests for its first 40 to 60 steps), with LoRA at 1e-3; see the learning rate, if it was found",
    figure="losses",
    retraining=True,
)
def undertrained(case: Trained, end_loss: float) -> Verdict | None:
    """The loss ends below that of repeating what usually follows the previous level, H(a | previous)."""
    if not math.isfinite(end_loss) or end_loss < case.loss_bar:
        return None
    steps = case.training and case.training.steps
    after = "" if steps is None else " after {steps} steps"
    title = f"the loss ended at {{final_loss:.2f}}{after}, where a trained model ends below {{loss_bar:.2f}}"
    numbers = {"final_loss": end_loss, "loss_bar": case.loss_bar, "steps": steps} | case.reference_losses
    return verdict(blame(case), title, **numbers)


@rule("clipping", fix='clip once a step (TrainConfig.clip = "step")')
def clipping(case: Trained, training: TrainingRun) -> Verdict | None:
    """The gradient of a step is clipped once, not after every micro-batch."""
    count, clipped = training.accumulation or 1, training.clipped
    if training.clip != "micro" or count <= 1:
        return None
    title = "the gradient is clipped after each of the {accumulation} windows of a step: the last count far more than the first"
    title += "" if clipped is None else "; {clipped:.0%} of them were clipped"
    return verdict(habit(case), title, accumulation=count, clipped=clipped)


@rule("crossing-windows", fix='cut windows inside episodes (WindowConfig.windows = "episode")')
def crossing_windows(case: Trained, training: TrainingRun) -> Verdict | None:
    """No training window spans two episodes."""
    if not (crossing := training.facts.get("crossing")) or not training.samples:
        return None
    share = crossing / training.samples
    return verdict(
        habit(case), "{share:.0%} of the training windows span two episodes", share=share, windows=training.samples
    )
