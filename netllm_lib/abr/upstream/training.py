"""The training of a run of the original, from the names, losses and console log that it left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.upstream.discover import Found
from netllm_lib.abr.upstream.logs import Console, Losses
from netllm_lib.training_run import TrainingRun

ACCUMULATION = 32  # of the original's documentation
WARMUP, W = 2000, 20  # its defaults


def training_run(found: Found, losses: Losses | None, pool: ExperiencePool | None) -> TrainingRun | None:
    """What is known of the training; None where nothing is.

    Its history has the loss of every window, or else of every epoch, and `facts` say which ("rows": "windows" or "epochs"), how
    many epochs were planned, and how many windows span two episodes ("crossing").
    """
    settings, console = found.settings, found.console or Console()
    printed = [line for line in console.epochs if line.loss_mean is not None]
    scores = [(line.epoch, line.episodes_return) for line in console.epochs if line.episodes_return is not None]
    if losses is None and not printed and "lr" not in settings:
        return None
    epochs = len(printed) or settings.get("epochs")
    expected, crossing = (None, None) if pool is None else _windows(pool, settings)
    windows, micro_steps = expected, (expected or 0) * (epochs or 0) or None
    history: dict[str, Any] = {"epoch": [line.epoch for line in printed], "loss": [line.loss_mean for line in printed]}
    if losses is not None:
        micro_steps = len(losses.values)
        if epochs and micro_steps % epochs == 0 and (printed or windows is None):
            windows = micro_steps // epochs  # what was really trained on
        if expected and epochs and micro_steps != expected * epochs:
            said = f"{micro_steps} losses, and the pool has {expected} windows in each of {epochs} epochs"
            found.notes.append(f"{said}: it is not the training pool, or training was not finished")
        history = {"epoch": np.arange(micro_steps) // (windows or micro_steps), "loss": losses.values}
    accumulation, steps = settings.get("grad_accum_steps", ACCUMULATION), None
    if micro_steps is not None:  # an epoch's last step may be short
        whole, rest = divmod(micro_steps, windows or micro_steps + 1)
        steps = whole * -(-(windows or 0) // accumulation) + -(-rest // accumulation)
    lr, warmup = settings.get("lr"), settings.get("warmup_steps", WARMUP)
    return TrainingRun(
        history=pd.DataFrame(history) if len(history["loss"]) else None,
        evaluations=pd.DataFrame(scores, columns=["epoch", "score"]) if scores else None,
        steps=steps,
        micro_steps=micro_steps,
        accumulation=accumulation,
        accumulation_assumed="grad_accum_steps" not in settings,
        samples=windows,
        epochs=epochs,
        lr=lr,
        lr_peak=None if lr is None or steps is None else lr * min(1.0, steps / max(1, warmup)),
        warmup_steps=warmup,
        clip="micro",
        final_loss=printed[-1].loss_mean if losses is None and printed else None,
        best_score=max((score for _, score in scores), default=None),
        selected_on_test=bool(scores),
        truncated=losses is not None and losses.truncated,
        facts={
            "crossing": crossing,
            "rows": "epochs" if losses is None else "windows",
            "epochs_planned": settings.get("epochs"),
        },
        seconds=sum(line.seconds or 0 for line in printed) or None,
    )


def _windows(pool: ExperiencePool, settings: dict[str, Any]) -> tuple[int, int]:
    """(windows that the original cuts the pool into, those of them that span two episodes)."""
    w, step = settings.get("w", W), settings.get("sample_step")
    begins = np.arange(0, len(pool) - w + 1, min(step or w, w))
    ended = np.concatenate([[0], np.cumsum(pool.dones)])  # episodes, before each transition
    return len(begins), int((ended[begins + w - 1] > ended[begins]).sum())
