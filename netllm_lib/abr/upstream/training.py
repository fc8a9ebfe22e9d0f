"""The training of a run of the original, from the names, losses and console log that it left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.upstream.discover import LOSSES, Found
from netllm_lib.abr.upstream.logs import Console, Losses
from netllm_lib.training_run import TrainingRun

ACCUMULATION = 32  # of the original's documentation
WARMUP, W = 2000, 20  # its defaults


def training_run(
    found: Found, losses: Losses | None, pool: ExperiencePool | None
) -> tuple[TrainingRun | None, list[str]]:
    """What is known of the training, and remarks; None where nothing is.

    Its history has the loss of every window, or else of every epoch, and `facts` say which ("rows": "windows" or "epochs"), how
    many epochs were planned, and how many windows span two episodes ("crossing").
    """
    settings, console = found.settings, found.console or Console()
    printed = [line for line in console.epochs if line.loss_mean is not None]
    scores = [(line.epoch, line.episodes_return) for line in console.epochs if line.episodes_return is not None]
    if losses is None and not printed and "lr" not in settings:
        return None, []
    epochs = len(printed) or settings.get("epochs")
    expected, crossing = (None, None) if pool is None else _windows(pool, settings)
    windows, micro_steps = expected, (expected or 0) * (epochs or 0) or None
    history: dict[str, Any] = {"epoch": [line.epoch for line in printed], "loss": [line.loss_mean for line in printed]}
    if losses is not None:
        micro_steps = len(losses.values)
        if epochs and micro_steps % epochs == 0 and (printed or windows is None):
            windows = micro_steps // epochs  # what was really trained on
        history = {"epoch": np.arange(micro_steps) // (windows or micro_steps), "loss": losses.values}
    accumulation, steps = settings.get("grad_accum_steps", ACCUMULATION), None
    if micro_steps is not None:  # an epoch's last step may be short
        whole, rest = divmod(micro_steps, windows or micro_steps + 1)
        steps = whole * -(-(windows or 0) // accumulation) + -(-rest // accumulation)
    lr, warmup = settings.get("lr"), settings.get("warmup_steps", WARMUP)
    run = TrainingRun(
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
    return run, [] if losses is None else _remarks(losses, found, expected)


def _windows(pool: ExperiencePool, settings: dict[str, Any]) -> tuple[int, int]:
    """(windows that the original cuts the pool into, those of them that span two episodes)."""
    w, step = settings.get("w", W), settings.get("sample_step")
    begins = np.arange(0, len(pool) - w + 1, min(step or w, w))
    ended = np.concatenate([[0], np.cumsum(pool.dones)])  # episodes, before each transition
    return len(begins), int((ended[begins + w - 1] > ended[begins]).sum())


def _remarks(losses: Losses, found: Found, windows: int | None) -> list[str]:
    """Whether the losses are those of this log and this pool."""
    values, epochs, notes = losses.values, found.settings.get("epochs"), []
    if losses.truncated:
        notes.append(f"{LOSSES}: the last line is cut and left out")
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        notes.append(f"{LOSSES}: not finite from micro-step {bad[0]} on")
    if losses.truncated or not epochs:
        return notes
    if found.console is not None and len(values) % epochs == 0:
        means = values.reshape(epochs, -1).mean(axis=1)
        printed = [(line.epoch, line.loss_mean) for line in found.console.epochs if line.loss_mean is not None]
        for epoch, loss in [(at, loss) for at, loss in printed if at < epochs and abs(means[at] - loss) > 1e-5][:1]:
            said = f"mean {means[epoch]:.6f} in epoch {epoch}, the console log says {loss:.6f}"
            notes.append(f"{LOSSES}: {said}: they are of two runs")
    if windows is not None and len(values) != windows * epochs:
        said = f"{len(values)} losses, and {windows * epochs} from the pool's {windows} windows in {epochs} epochs"
        notes.append(f"{LOSSES}: {said}: it is not the training pool, or training was not finished")
    return notes
