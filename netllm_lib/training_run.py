"""What a training leaves behind for those who judge it: figures and tables, without weights and without PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from netllm_lib import config, runs

RESULT = "training.json"
HISTORY = "history.parquet"
FORMAT = 1
LAST_STEPS = 20  # micro-batches whose mean loss is the loss at the end


@dataclasses.dataclass(frozen=True)
class Figures:
    """The numbers of a training. What is not known is None."""

    steps: int | None = None  # optimizer steps
    micro_steps: int | None = None  # micro-batches
    accumulation: int | None = None  # micro-batches in an optimizer step
    accumulation_assumed: bool = False  # nothing says it
    samples: int | None = None  # in an epoch
    epochs: int | None = None
    lr: float | None = None  # of the PLM, asked for
    lr_peak: float | None = None  # of the PLM, really reached
    lr_around: float | None = None  # of the modules around the PLM, asked for
    warmup_steps: int | None = None
    clip: str | None = None  # "step", "micro", "none", see TrainConfig
    clipped: float | None = None  # share of the micro-batches after which the gradient was clipped
    final_loss: float | None = None  # mean over the last micro-batches, or the last epoch
    held_out_loss: float | None = None  # mean over samples that were not trained on, of the final weights
    best_score: float | None = None  # of the validations
    selected_on_test: bool = False  # was the best checkpoint chosen by the test
    truncated: bool = False  # the history ends in the middle
    data_key: str | None = None  # of the data that was trained on
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # of that data, see task.Data
    seconds: float | None = None  # of training, over all sittings, validation not counted
    key: str | None = None  # hash of the network, the data and the configuration
    final: Path | None = None  # checkpoint folder of the last step
    best: Path | None = None  # checkpoint folder with the best score; the final one if there was no validation


@dataclasses.dataclass(frozen=True)
class TrainingRun(Figures):
    """A finished training, ours or an imported one."""

    history: pd.DataFrame | None = None
    """A row per micro-batch: step, epoch, loss, grad_norm (before clipping; NaN where nothing was clipped), clipped, lr,
    lr_around, seconds (of training so far). An imported one may have the loss only."""
    evaluations: pd.DataFrame | None = None  # a row per validation: step, epoch, score, seconds (what it took)

    @property
    def losses(self) -> np.ndarray | None:
        """The history's losses; None where there is no history."""
        return None if self.history is None else self.history["loss"].to_numpy()

    def end_loss(self) -> float | None:
        """Loss at the end: as recorded, else the mean over the last epoch (the last tenth where its length is unknown)."""
        if self.final_loss is not None or self.history is None or self.history.empty:
            return self.final_loss
        losses = self.history["loss"]
        count = self.samples if self.samples and self.samples < len(losses) else max(1, len(losses) // 10)
        return float(losses.tail(count).mean())

    def save(self, folder: Path) -> None:
        """Write `history.parquet`, then `training.json`, which marks the training as finished."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Figures)}
        if self.history is not None:
            with runs.atomic_path(folder / HISTORY) as aside:
                self.history.to_parquet(aside)
            values["history_hash"] = runs.file_hash(folder / HISTORY)
        for name in ("final", "best"):
            if (path := values[name]) is not None and path.is_relative_to(folder):
                values[name] = path.relative_to(folder)
        evaluations = None if self.evaluations is None else self.evaluations.to_dict("list")
        runs.write_sealed(folder / RESULT, {"format": FORMAT, **values, "evaluations": evaluations})

    @classmethod
    def read(cls, folder: Path) -> TrainingRun:
        """What `save` wrote. Raises FileNotFoundError where there is none, ValueError for files that it did not write."""
        path = Path(folder) / RESULT
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; this training is not finished, or an older version wrote it")
        remedy = f"delete {folder} and make it again"
        values = runs.read_sealed(path, remedy)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a training of format {FORMAT}")
        evaluations, history = values.pop("evaluations", None), path.with_name(HISTORY)
        expected = values.pop("history_hash", None)  # None: there is none, or an earlier version wrote it
        if expected and (not history.is_file() or runs.file_hash(history) != expected):
            raise ValueError(f"{history}: missing, or not the one that was saved; {remedy}")
        figures = dict(vars(config.parse(Figures, values, str(path))))
        places = {name: figures[name] and Path(folder) / figures[name] for name in ("final", "best")}
        try:
            table = None if evaluations is None else pd.DataFrame(evaluations)
            return cls(
                **figures | places, evaluations=table, history=pd.read_parquet(history) if history.is_file() else None
            )
        except Exception as error:  # whatever a broken file provokes is a broken file
            raise ValueError(f"{folder}: its training is damaged ({str(error)[:200]})") from None
