"""Training: from data to a checkpoint, for any task's `Network` and `Data`.

`train` can be killed at any moment and goes on where it was. `TrainConfig.upstream()` trains as the original does, step by step
(NetLLM, `plm_special/trainer.py` and `run_plm.py`); each of its habits is a field of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from netllm_lib import checkpoint, runs, tracking
from netllm_lib.plm import arithmetic_dtype
from netllm_lib.preflight import needs_checkpointing, preflight
from netllm_lib.schedule import Plan, TrainConfig
from netllm_lib.task import Data, Network
from netllm_lib.training_run import LAST_STEPS, RESULT, TrainingRun

N = TypeVar("N", bound=Network)
Progress = Callable[[int, int, dict[str, Any]], None]

STATE = "state.pt"


def train(
    network: N,
    data: Data,
    config: TrainConfig | None = None,
    *,
    folder: Path,
    settings: Any,
    validate: Callable[[N], float] | None = None,
    better: Literal["higher", "lower"] = "higher",
    held_out: Data | None = None,
    progress: Progress | None = None,
    track: str = "",
) -> TrainingRun:
    """Fine-tune `network` on `data`; everything that this leaves behind is in `folder`, and the network has the final weights.

    `settings` are the task's, which checkpoints keep. `validate(network)` returns a score, see `TrainConfig.validate_epochs`; the
    best checkpoint is that of the highest score, or of the lowest with `better="lower"`. The loss on `held_out` is measured at the
    end. `progress(done_steps, total_steps, info)` is called after every step; `track="mlflow"` see `tracking`.

    A run that was killed goes on when called again with the same arguments, to the same result bit by bit on a CPU; one that is
    finished is read back. Raises runs.Busy while another process trains in `folder`, ValueError if `folder` holds another run or a
    damaged one, if network, data and settings do not fit, if the loss is no longer finite, or if MLflow is not installed.
    """
    tracking.check(track)
    network.check(settings)
    if network.plm.config.dtype == "4bit" and network.plm.device.type == "cpu":
        raise ValueError('4-bit weights give no gradients on a CPU: train on a GPU, or use dtype="bfloat16"')
    run = _Run(network, data, config or TrainConfig(), Path(folder), settings)
    run.validate, run.progress = validate, progress
    run.best_of = max if better == "higher" else min
    if not run.finished:
        with runs.lock(run.folder):
            if not run.finished:  # by a process that has just ended
                return run.start(track, held_out)
    return run.read_back()


@torch.inference_mode()
def mean_loss(network: Network, data: Data, batch: int = 32) -> float:
    """Mean loss per label, in the arithmetic of the weights, dropout off."""
    training, total, labels = network.training, 0.0, 0
    network.eval()
    for first in range(0, len(data), batch):
        part = data.batch(np.arange(first, min(first + batch, len(data))))
        loss, count = network.loss(part.to(network.device))
        total, labels = total + float(loss), labels + count
    network.train(training)
    return total / labels


@dataclasses.dataclass
class _Position:
    """How far a run is."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    step_in_epoch: int = 0
    order: torch.Tensor | None = None  # of the epoch in progress
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class _Run:
    """A training run in progress; `state.pt` is its image on disk."""

    validate: Callable[[Any], float] | None
    progress: Progress | None
    best_of: Callable[..., Any]  # of several scores
    curves: tracking.Curves

    def __init__(self, network: Any, data: Data, config: TrainConfig, folder: Path, settings: Any):
        self.network, self.data, self.config, self.folder = network, data, config, folder
        self.plan, self.at = Plan(config, len(data)), _Position()
        self.meta = checkpoint.describe(network, settings, {**runs.plain(config), "data": runs.plain(data.facts)})
        # where the PLM lies and runs may differ between two sittings; the numbers that decide the result may not
        free: dict[str, Any] = {"source": "", "device": "cpu", "placement": None, "gradient_checkpointing": False}
        plm = [network.plm.identity, network.plm.layers, dataclasses.replace(network.plm.config, **free)]
        self.key = runs.content_hash([config, data.key, settings, network.task, network.config, plm])
        self.parameters: dict[str, nn.Parameter] = network.trainable()
        around = [p for name, p in self.parameters.items() if not name.startswith("plm.")]
        inside = [p for name, p in self.parameters.items() if name.startswith("plm.")]
        groups = [{"params": around, "peak": config.lr_around}, {"params": inside, "peak": config.lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    def start(self, track: str, held_out: Data | None) -> TrainingRun:
        """Train from the beginning, or from the last resume point if there is one."""
        seeded, plm, resumes = self.config.shuffle == "seed", self.network.plm, (self.folder / STATE).is_file()
        plm.set_checkpointing(needs_checkpointing(self.network, self.data, self.config))
        shown = {"train": self.meta.train, "plm": plm.config, "network": self.network.config, "layers": plm.layers}
        tags = {"data": self.data.key, "plm": plm.identity, "git": runs.git_revision() or "unknown"}
        own_stream: Any = torch.random.fork_rng(range(torch.cuda.device_count()), enabled=seeded)
        with own_stream, tracking.Curves(self.folder, track, runs.plain(shown), tags) as self.curves:
            if resumes:
                self.resume()
                self.draw(self.at.history, self.at.evaluations)
            else:
                if seeded:
                    torch.manual_seed(self.config.seed)
                self.save()  # what it starts from: initial weights and random state
            while self.at.epoch < self.config.epochs:
                self.train_epoch()
            self.network.eval()  # also when only the end was left to do
            return self.finish(held_out)

    def train_epoch(self) -> None:
        """Train what is left of the epoch in progress, and validate."""
        config, at, group = self.config, self.at, self.config.batch * self.config.accumulation
        if at.order is None:
            at.order = torch.from_numpy(self.plan.order_of(at.epoch))
        self.network.train()
        while at.step_in_epoch < self.plan.epoch_steps:
            first = at.step_in_epoch * group
            rows = self.optimizer_step(at.order[first : first + group].numpy())
            at.history += rows
            at.step += 1
            at.step_in_epoch += 1
            self.draw(rows, [])
            if self.progress is not None:
                self.progress(at.step, self.plan.steps, {**rows[-1], "samples": len(self.data)})
            if config.checkpoint_steps and at.step % config.checkpoint_steps == 0:
                self.save()
        self.network.eval()
        at.epoch, at.step_in_epoch, at.order = at.epoch + 1, 0, None
        if self.validate is not None and config.validates_after(at.epoch):
            self.take_score(self.validate)
        self.save()

    def optimizer_step(self, numbers: np.ndarray) -> list[dict[str, float]]:
        """Take one step on these samples; returns a row of the history per micro-batch."""
        config, at, start, rows = self.config, self.at, time.perf_counter(), []
        rate, labels = self.plan.rate(at.step), self.data.labels(numbers)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(numbers), config.batch):
            batch = self.data.batch(numbers[first : first + config.batch]).to(self.network.device)
            total, count = self.network.loss(batch, arithmetic_dtype(config.precision, self.network.device))
            part = 1 / labels if config.last_group == "mean" else 1 / (count * config.accumulation)
            (total * part).backward()
            loss, norm = float(total.detach()) / count, math.nan
            if config.clip == "micro" or (config.clip == "step" and first + config.batch >= len(numbers)):
                norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm))
            if not math.isfinite(loss):
                where = f"the loss is {loss} at optimizer step {at.step}"
                raise ValueError(f"{where}: lower the learning rate, or use float32")
            row = {"step": at.step, "epoch": at.epoch, "loss": loss, "grad_norm": norm}
            row |= {"clipped": norm > config.max_grad_norm, "seconds": at.seconds + time.perf_counter() - start}
            rows.append(row | {"lr": config.lr * rate, "lr_around": config.lr_around * rate})
        self.optimizer.step()
        at.seconds += time.perf_counter() - start
        return rows

    def take_score(self, validate: Callable[[Any], float]) -> None:
        """Validate; the best network so far is kept."""
        start, at = time.perf_counter(), self.at
        score = float(validate(self.network))
        took = time.perf_counter() - start
        earlier = [evaluation["score"] for evaluation in at.evaluations]
        if not earlier or (score not in earlier and score == self.best_of([*earlier, score])):
            meta = dataclasses.replace(self.meta, step=at.step, score=score)
            checkpoint.save_checkpoint(self.folder / "best", self.network, meta)
        at.evaluations.append({"step": at.step, "epoch": at.epoch, "score": score, "seconds": took})
        self.draw([], at.evaluations[-1:])

    def finish(self, held_out: Data | None) -> TrainingRun:
        """Write what is left behind, the mark of a finished run last."""
        at, config, meta = self.at, self.config, dataclasses.replace(self.meta, step=self.at.step)
        final = checkpoint.save_checkpoint(self.folder / "final", self.network, meta)
        history, scores = pd.DataFrame(at.history), [evaluation["score"] for evaluation in at.evaluations]
        known: dict[str, Any] = {"steps": at.step, "samples": len(self.data), "epochs": at.epoch, "seconds": at.seconds}
        known |= {"lr": config.lr, "lr_peak": config.lr * self.plan.peak, "lr_around": config.lr_around}
        known |= {"accumulation": config.accumulation, "warmup_steps": self.plan.warmup, "clip": config.clip}
        known |= {"data_key": self.data.key, "facts": runs.plain(self.data.facts), "key": self.key}
        result = TrainingRun(
            **known,
            history=history,
            micro_steps=len(history),
            evaluations=pd.DataFrame(at.evaluations, columns=["step", "epoch", "score", "seconds"]),
            clipped=float(history["clipped"].mean()),
            final_loss=float(history["loss"].tail(LAST_STEPS).mean()),
            held_out_loss=None if held_out is None else mean_loss(self.network, held_out),
            best_score=self.best_of(scores, default=None),
            final=final,
            best=self.folder / "best" if scores else final,
        )
        final_figures = {"loss": result.final_loss, "score": result.best_score, "seconds": result.seconds}
        self.curves.log(at.step, {f"final/{name}": value for name, value in final_figures.items()})
        self.curves.finished = True
        result.save(self.folder)
        (self.folder / STATE).unlink(missing_ok=True)
        return result

    def draw(self, history: list[dict[str, float]], evaluations: list[dict[str, float]]) -> None:
        """Add points to the curves, which count the steps that are done."""
        for step, group in itertools.groupby(history, lambda row: row["step"]):
            rows = list(group)
            values = {f"train/{name}": rows[-1][name] for name in ("grad_norm", "lr", "lr_around", "seconds")}
            self.curves.log(int(step) + 1, values | {"train/loss": sum(row["loss"] for row in rows) / len(rows)})
        for evaluation in evaluations:
            values = {f"validation/{name}": evaluation[name] for name in ("score", "seconds")}
            self.curves.log(int(evaluation["step"]), values)

    # --- to and from disk

    def save(self) -> None:
        self.curves.flush()
        state = {
            "key": self.key,
            "at": vars(self.at),
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.network.device.type == "cuda" else [],
        }
        with runs.atomic_path(self.folder / STATE) as aside:
            torch.save(state, aside)

    def resume(self) -> None:
        path = self.folder / STATE
        try:
            # PyTorch's reader does not compare the checksums that its files have
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"the checksum of {broken} is wrong")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken file provokes is a broken file
            reason = runs.first_line(error)
            raise ValueError(f"{path}: damaged ({reason}); delete it to begin this training anew") from None
        self.check_key(state["key"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.at = _Position(**state["at"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and self.network.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])

    def read_back(self) -> TrainingRun:
        """The result of a finished run, whose final weights the network gets."""
        result = TrainingRun.read(self.folder)
        self.check_key(result.key)
        with contextlib.suppress(OSError):  # there if it was killed just before removing it
            (self.folder / STATE).unlink(missing_ok=True)
        try:
            checkpoint.load_weights(self.folder / "final", self.network)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; or delete {self.folder} to begin this training anew") from None
        self.network.eval()
        return result

    def check_key(self, key: str | None) -> None:
        if key != self.key:
            differs = f"holds a run with another configuration, data or PLM ({key}, this is {self.key})"
            raise ValueError(f"{self.folder} {differs}: use another folder")


__all__ = ["Plan", "Progress", "TrainConfig", "TrainingRun", "mean_loss", "preflight", "train"]
