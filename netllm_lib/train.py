"""Fine-tuning: from a pool to a checkpoint.

`preflight` says what a configuration will do before it starts; `train` does it, can be killed and goes on where it was;
`held_out` measures the loss on another pool. `TrainConfig.upstream()` trains as the original does, step by step
(NetLLM, `plm_special/trainer.py` and `run_plm.py`); each of its habits is a field of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netllm_lib import checkpoint, runs, tracking
from netllm_lib.abr.advantage import advantage_weights
from netllm_lib.abr.batches import ReturnScale, WindowConfig, Windows, make_windows
from netllm_lib.abr.model import PolicyNetwork, action_loss, labelled
from netllm_lib.abr.peers import Peers
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.plm import arithmetic_dtype
from netllm_lib.preflight import Plan, Preflight, needs_checkpointing, preflight

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool

Progress = Callable[[int, int, dict[str, Any]], None]
Validate = Callable[[PolicyNetwork], float]

STATE = "state.pt"
HISTORY = "history.parquet"
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a policy is fine-tuned. The defaults are sound and learn within minutes on a CPU."""

    # --- windows, see windows.WindowConfig
    windows: Literal["episode", "stride", "upstream"] = "episode"
    w: int = 20  # transitions in a window
    stride: int | None = None  # transitions from one window to the next; the original's sample_step
    gamma: float = 1.0  # discount of the return-to-go
    scale: float = 1000.0  # divides the return-to-go

    learn: Literal["actions", "values", "best"] = "actions"
    """What the head predicts: the pool's actions; or, of given values of all levels, the values, or the best level. See
    `model.action_loss`."""
    advantage: float | None = None
    """Temperature of advantage weights on the actions, in standard deviations of the advantage; None: all count the same. For pools
    of mixed quality, see `advantage`. Smaller is choosier."""

    # --- steps
    epochs: int = 4
    batch: int = 8  # windows in a micro-batch
    accumulation: int = 1  # micro-batches in an optimizer step
    last_group: Literal["mean", "upstream"] = "mean"
    """"mean": the loss of a step is the mean over its labels. "upstream": the sum over its micro-batches' means divided by
    `accumulation`, also when an epoch's last step has fewer, which then counts less."""
    shuffle: Literal["seed", "torch"] = "seed"
    """"seed": an epoch's order depends on `seed` and the epoch only. "torch": `DataLoader(shuffle=True)` on PyTorch's global
    generator, as in the original, where every evaluation reseeds it and so repeats an order."""
    order: tuple[tuple[int, ...], ...] | None = None
    """Explicit window numbers in place of a shuffle: one tuple for each epoch, or a single one for all epochs."""
    seed: int = 1

    # --- optimizer
    lr: float = 1e-3  # LoRA, or the whole PLM for rank -1
    lr_around: float = 1e-2  # the modules around the PLM
    weight_decay: float = 1e-4
    warmup: float = 0.1  # part of the optimizer steps really taken, over which the rate rises to its peak
    warmup_steps: int | None = None  # the same as a fixed number of steps; with it the peak may never be reached
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    lr_end: float = 0.05  # of a cosine, as a part of the peak
    clip: Literal["step", "micro", "none"] = "step"
    """"step": the gradient is clipped once, before an optimizer step. "micro": the accumulated gradient is clipped after every
    micro-batch, as in the original: the last windows of a step then count far more than the first."""
    max_grad_norm: float = 0.25

    # --- numbers
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the PLM's arithmetic; "auto" is bfloat16 (autocast) where the device is faster with it. Weights stay as loaded."""

    # --- along the way
    checkpoint_steps: int | None = None  # optimizer steps between two resume points; there is one at every epoch's end
    validate_epochs: int = 1  # epochs between two calls of `validate`
    validate_when: Literal["end", "upstream"] = "end"
    """"end": after every `validate_epochs` epochs and after the last. "upstream": after epochs 0, k, 2k, … counted from 0, as the
    original does: after the very first, and after the last only if its number happens to be a multiple of k."""

    def __post_init__(self) -> None:
        if self.advantage is not None and (self.advantage <= 0 or self.learn != "actions"):
            raise ValueError(f'advantage={self.advantage}, learn="{self.learn}": it is above 0, and for actions only')
        for name in ("epochs", "batch", "accumulation", "w", "validate_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.order is not None and len(self.order) not in (1, self.epochs):
            raise ValueError(
                f"order has {len(self.order)} epochs, epochs={self.epochs}: give one tuple or one for each epoch"
            )

    @classmethod
    def upstream(cls, **changes: Any) -> TrainConfig:
        """The original's training with its default hyperparameters (and its documented accumulation of 32)."""
        original: dict[str, Any] = {
            "windows": "upstream",
            "epochs": 80,
            "batch": 1,
            "accumulation": 32,
            "last_group": "upstream",
            "shuffle": "torch",
            "seed": 100003,
            "lr": 1e-4,
            "lr_around": 1e-4,
            "warmup_steps": 2000,
            "schedule": "constant",
            "clip": "micro",
            "precision": "float32",
            "validate_epochs": 2,
            "validate_when": "upstream",
        }
        return cls(**(original | changes))

    def validates_after(self, epochs: int) -> bool:
        """Is there a validation when so many epochs are done."""
        if self.validate_when == "upstream":
            return (epochs - 1) % self.validate_epochs == 0
        return epochs % self.validate_epochs == 0 or epochs == self.epochs

    def cut(self, pool: ExperiencePool, like: ReturnScale | None = None, values: np.ndarray | None = None) -> Windows:
        """The pool's training windows; a validation pool's with `like`, the training windows' scale."""
        config = WindowConfig(self.windows, self.w, self.stride)
        windows = make_windows(pool, config, self.gamma, self.scale, like)
        if values is not None:
            return dataclasses.replace(windows, values=torch.from_numpy(np.asarray(values, dtype=np.float32)))
        return windows


class HeldOut(NamedTuple):
    """How well the network predicts the actions of a pool."""

    cross_entropy: float  # nats per action; ln 6 = 1.79 is chance
    accuracy: float  # part of the actions that are the most probable one
    labels: int  # actions predicted


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What training leaves behind. The network itself holds the final weights."""

    history: pd.DataFrame
    """A row per micro-batch: step, epoch, loss, grad_norm (before clipping; NaN where nothing was clipped), clipped, lr,
    lr_around, seconds (of training so far)."""
    evaluations: pd.DataFrame  # a row per validation: step, epoch, score, seconds (what it took)
    final: Path  # checkpoint of the last step
    best: Path  # checkpoint with the best score; the final one if there was no validation
    seconds: float  # of training, over all sittings, validation not counted


# --- training -----------------------------------------------------------------------------------------------------------


def train(
    network: PolicyNetwork,
    pool: ExperiencePool,
    config: TrainConfig | None = None,
    *,
    folder: Path,
    values: np.ndarray | None = None,
    validate: Validate | None = None,
    progress: Progress | None = None,
    peers: Peers | None = None,
    track: str = "",
) -> TrainResult:
    """Fine-tune `network` on `pool`; everything it leaves behind is in `folder`.

    `values` [transitions, 6] is what each level was worth, for a config that does not learn the actions.

    `validate(network)` returns a score, higher is better; it is called every `validate_epochs` epochs (see `validate_when`)
    and decides which checkpoint is the best. `progress(done_steps, total_steps, info)` is called after every optimizer step.
    A run that was killed goes on from its last resume point when called again with the same arguments, to the same result
    bit by bit on a CPU; one that is finished is read back. `peers` are processes that call this together with equal arguments,
    see `finetune`. Curves for TensorBoard are always written, into `folder / "tensorboard"`; with `track="mlflow"` they go to
    MLflow too, see `tracking`. Raises runs.Busy while another process trains in `folder`, ValueError if `folder` holds another
    run, if the pool's episodes are longer than the network's timestep table, if the loss is no longer finite, or if MLflow is
    asked for and not installed.
    """
    tracking.check(track)
    config = config or TrainConfig()
    folder = Path(folder)
    if (values is None) != (config.learn == "actions") or (values is not None and values.shape != (len(pool), LEVELS)):
        given = "none" if values is None else f"an array {values.shape}"
        raise ValueError(
            f'learn="{config.learn}" with {given} as values: "actions" needs none, others [{len(pool)}, 6]'
        )
    windows = config.cut(pool, values=values)
    if config.advantage is not None:
        windows = dataclasses.replace(windows, weights=torch.from_numpy(advantage_weights(pool, config.advantage)))
    if windows.scale.max_timestep > network.config.max_timestep:
        raise ValueError(
            f"the pool has episodes of {windows.scale.max_timestep + 1} steps, the network was made for "
            f"{network.config.max_timestep + 1}: set NetworkConfig(max_timestep={windows.scale.max_timestep})"
        )
    if network.plm.config.dtype == "4bit" and network.plm.device.type == "cpu":
        raise ValueError(
            '4-bit weights give no gradients on a CPU (bitsandbytes): train on a GPU, or use dtype="bfloat16"'
        )
    peers = peers or Peers()
    run = _Run(network, windows, config, folder, peers, track)
    if not peers.agree((folder / RESULT).is_file()):
        with runs.lock(folder) if peers.leads else contextlib.nullcontext():
            if not peers.agree((folder / RESULT).is_file()):  # by a process that has just ended
                return run.start(validate, progress)
    return run.read_back()


class _Run:
    """A training run in progress; `state.pt` is its image on disk."""

    def __init__(
        self,
        network: PolicyNetwork,
        windows: Windows,
        config: TrainConfig,
        folder: Path,
        peers: Peers | None = None,
        track: str = "",
    ):
        self.network, self.windows, self.config, self.folder = network, windows, config, folder
        self.peers, self.track, self.tracker = peers or Peers(), track, tracking.Tracker()
        self.plan = Plan(config, len(windows))
        self.meta = checkpoint.describe(network, windows.scale, config.w, runs.plain(config))
        # where the PLM lies and runs may differ between two sittings; the numbers that decide the result may not
        free: dict[str, Any] = {"source": "", "device": "cpu", "placement": None, "gradient_checkpointing": False}
        plm: Any = [network.plm.identity, network.plm.layers, dataclasses.replace(network.plm.config, **free)]
        worth = [] if windows.values is None else [runs.array_hash(windows.values.numpy())]
        self.key = runs.content_hash([config, windows.scale, network.config, plm, *worth])
        self.parameters = network.trainable()
        plm_side = [p for name, p in self.parameters.items() if name.startswith("plm.")]
        around = [p for name, p in self.parameters.items() if not name.startswith("plm.")]
        groups = [{"params": around, "peak": config.lr_around}, {"params": plm_side, "peak": config.lr}]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, weight_decay=config.weight_decay
        )
        self.step = 0  # optimizer steps taken
        self.epoch = 0
        self.step_in_epoch = 0
        self.order: np.ndarray | None = None  # of the epoch in progress
        self.rows: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.seconds = 0.0
        self.reduced: list[torch.Tensor | None] | None = (
            None  # gradients that all peers have, while they work on new ones
        )

    def start(self, validate: Validate | None, progress: Progress | None) -> TrainResult:
        """Train from the beginning, or from the last resume point if there is one."""
        keep_rng: Any = (
            contextlib.nullcontext()
            if self.config.shuffle == "torch"
            else torch.random.fork_rng(range(torch.cuda.device_count()))
        )
        self.network.plm.set_checkpointing(needs_checkpointing(self.network, self.config))
        with keep_rng:
            if self.peers.agree((self.folder / STATE).is_file()):
                self.resume()
                self.peers.agree(None)  # all have read it before it changes
            else:
                if self.config.shuffle == "seed":
                    torch.manual_seed(self.config.seed)
                self.save()  # what it starts from: initial weights and random state
            if not self.peers.leads:  # dropout of one's own
                torch.manual_seed(
                    int(np.random.SeedSequence([self.config.seed, self.peers.rank, self.step]).generate_state(1)[0])
                )
            self.tracker = self._tracker()
            with self.tracker:
                return self.go(validate, progress)

    def go(self, validate: Validate | None, progress: Progress | None) -> TrainResult:
        config, group = self.config, self.config.batch * self.config.accumulation
        while self.epoch < config.epochs:
            if self.order is None:
                self.order = self.peers.agree(self.plan.order_of(self.epoch))
            self.network.train()
            while self.step_in_epoch < self.plan.steps_of[self.epoch]:
                start = time.perf_counter()
                first = self.step_in_epoch * group
                micro_batches = len(self.rows)
                self._optimizer_step(self.order[first : first + group], start)
                self.seconds += time.perf_counter() - start
                self.step += 1
                self.step_in_epoch += 1
                self.tracker.log(*_step_point(self.rows[micro_batches:]))
                if progress is not None:
                    progress(self.step, self.plan.steps, {**self.rows[-1], "windows": len(self.windows)})
                if config.checkpoint_steps and self.step % config.checkpoint_steps == 0:
                    self.save()
            self.network.eval()
            self.epoch, self.step_in_epoch, self.order = self.epoch + 1, 0, None
            if validate is not None and config.validates_after(self.epoch):
                self._validate(validate)
            self.save()
        self.network.eval()  # also when only the end was left to do
        return self._finish(validate is not None)

    def _optimizer_step(self, numbers: np.ndarray, start: float) -> None:
        config, plan = self.config, self.plan
        rate = plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        micro_batches = [numbers[i : i + config.batch] for i in range(0, len(numbers), config.batch)]
        labels = int(self.windows.lengths[numbers].sum())
        self.optimizer.zero_grad(set_to_none=True)
        for i, micro in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            share = (
                int(self.windows.lengths[micro].sum()) / labels
                if config.last_group == "mean"
                else 1 / config.accumulation
            )
            value = self._backward(micro, share, reduce=config.clip == "micro" or last)
            norm = math.nan
            if config.clip == "micro" or (config.clip == "step" and last):
                norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm))
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at optimizer step {self.step}: lower the learning rate, or use float32"
                )
            self.rows.append(
                {
                    "step": self.step,
                    "epoch": self.epoch,
                    "loss": value,
                    "grad_norm": norm,
                    "clipped": norm > config.max_grad_norm,
                    "lr": config.lr * rate,
                    "lr_around": config.lr_around * rate,
                    "seconds": self.seconds + time.perf_counter() - start,
                }
            )
        self.optimizer.step()

    def _backward(self, micro: np.ndarray, share: float, reduce: bool) -> float:
        """Add a micro-batch's gradient, times `share`, to what is there; returns its mean loss.

        With peers each does its windows of the micro-batch; `reduce` adds up what they have found since the last time.
        """
        mine = micro[self.peers.rank :: self.peers.size]
        device, lengths = self.network.device, self.windows.lengths
        value = torch.zeros((), device=device)
        if self.peers.size > 1 and self.reduced is None:
            self.reduced = [p.grad for p in self.parameters.values()]
            for parameter in self.parameters.values():
                parameter.grad = None
        if len(mine):
            batch = self.windows.batch(mine).to(device)
            targets = self.windows.values_of(mine), self.windows.weights_of(mine)
            values, weights = (None if target is None else target.to(device) for target in targets)
            dtype = arithmetic_dtype(self.config.precision, device)
            loss = action_loss(self.network, batch, dtype, values, self.config.learn == "best", weights)
            part = int(lengths[mine].sum()) / int(lengths[micro].sum())
            (loss * (part * share)).backward()
            value = loss.detach() * part
        if self.peers.size > 1:
            self.peers.add_up([value])
            if reduce:
                self._add_up_gradients()
        return float(value)

    def _add_up_gradients(self) -> None:
        """Sum the peers' new gradients and add them to the sum so far."""
        assert self.reduced is not None
        parameters = list(self.parameters.values())
        # the leading process has windows in every micro-batch: what has no gradient there has none at all
        has = self.peers.agree([p.grad is not None for p in parameters])
        learning = [p for p, known in zip(parameters, has, strict=True) if known]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.peers.add_up([p.grad for p in learning if p.grad is not None])
        for parameter, earlier in zip(parameters, self.reduced, strict=True):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad + earlier
        self.reduced = None

    def _validate(self, validate: Validate) -> None:
        start = time.perf_counter()
        score = self.peers.agree(float(validate(self.network)) if self.peers.leads else None)
        took = time.perf_counter() - start
        if self.peers.leads and all(score > earlier["score"] for earlier in self.evaluations):
            meta = dataclasses.replace(self.meta, step=self.step, score=score)
            checkpoint.save_checkpoint(self.folder / "best", self.network, meta)
        self.evaluations.append({"step": self.step, "epoch": self.epoch, "score": score, "seconds": took})
        self.tracker.log(*_score_point(self.evaluations[-1]))

    def _finish(self, validated: bool) -> TrainResult:
        history = pd.DataFrame(self.rows)
        if self.peers.leads:
            self.tracker.finish(self.step, self._figures(history))
            self._write(history, validated)
        self.peers.agree(None)  # the files are there for all
        return self._result(history, validated)

    def _write(self, history: pd.DataFrame, validated: bool) -> None:
        meta = dataclasses.replace(self.meta, step=self.step)
        checkpoint.save_checkpoint(self.folder / "final", self.network, meta)
        with runs.atomic_path(self.folder / HISTORY) as aside:
            history.to_parquet(aside)
        result = {"key": self.key, "seconds": self.seconds, "evaluations": self.evaluations, "validated": validated}
        runs.write_json(self.folder / RESULT, result)
        (self.folder / STATE).unlink(missing_ok=True)

    def _result(self, history: pd.DataFrame, validated: bool) -> TrainResult:
        evaluations = pd.DataFrame(self.evaluations, columns=["step", "epoch", "score", "seconds"])
        best = self.folder / ("best" if validated else "final")
        return TrainResult(history, evaluations, self.folder / "final", best, self.seconds)

    # --- curves

    def _tracker(self, tensorboard: bool = True) -> tracking.Tracker:
        """Where curves go, from what is known so far on; the leading process only."""
        if not self.peers.leads:
            return tracking.Tracker()
        rows: dict[float, list[dict[str, float]]] = {}
        for row in self.rows:
            rows.setdefault(row["step"], []).append(row)
        points = [*map(_step_point, rows.values()), *map(_score_point, self.evaluations)]
        plm = self.network.plm
        settings = {"train": self.config, "plm": plm.config, "network": self.network.config, "layers": plm.layers}
        tags = {"pool_hash": self.meta.pool_hash, "plm": plm.identity, "run_key": self.key}
        if self.track:
            tags["mlflow.source.git.commit"] = runs.git_revision() or "unknown"
        return tracking.start(
            self.folder, self.track, parameters=runs.plain(settings), tags=tags,
            done=self.step, earlier=sorted(points, key=lambda point: point.step), tensorboard=tensorboard,
        )  # fmt: skip

    def _figures(self, history: pd.DataFrame) -> dict[str, float]:
        """What a run is compared by; the score is the best one, NaN without validation."""
        score = max((evaluation["score"] for evaluation in self.evaluations), default=math.nan)
        loss = float(history["loss"].tail(20).mean())
        return {"final/loss": loss, "final/score": score, "final/seconds": self.seconds}

    # --- to and from disk

    def save(self) -> None:
        if not self.peers.leads:
            return
        state = {
            "key": self.key,
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "order": None if self.order is None else torch.from_numpy(self.order),
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.network.device.type == "cuda" else [],
            "rows": self.rows,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }
        with runs.atomic_path(self.folder / STATE) as aside:
            torch.save(state, aside)
        self.tracker.flush()

    def resume(self) -> None:
        state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        self._check_key(state["key"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch, self.step_in_epoch = state["step"], state["epoch"], state["step_in_epoch"]
        self.order = None if state["order"] is None else state["order"].numpy()
        self.rows, self.evaluations, self.seconds = state["rows"], state["evaluations"], state["seconds"]
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and self.network.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])

    def read_back(self) -> TrainResult:
        result = runs.read_json(self.folder / RESULT)
        self._check_key(result["key"])
        with contextlib.suppress(OSError):  # there if it was killed just before removing it
            (self.folder / STATE).unlink(missing_ok=True)
        checkpoint.load_weights(self.folder / "final", self.network)
        self.network.eval()
        self.evaluations, self.seconds = result["evaluations"], result["seconds"]
        history = pd.read_parquet(self.folder / HISTORY)
        if self.track and self.peers.leads:  # it may be asked for only now
            self.rows = [{str(name): value for name, value in row.items()} for row in history.to_dict("records")]
            self.step = int(history["step"].iloc[-1]) + 1
            with self._tracker(tensorboard=False) as tracker:
                tracker.finish(self.step, self._figures(history))
        return self._result(history, result["validated"])

    def _check_key(self, key: str) -> None:
        if key != self.key:
            raise ValueError(
                f"{self.folder} holds a run with another configuration, pool or PLM ({key}, this is {self.key}): use another folder"
            )


def _step_point(rows: list[dict[str, float]]) -> tracking.Point:
    """The curves' values of one optimizer step from those of its micro-batches. Curves count the steps that are done."""
    last = rows[-1]
    values = {f"train/{name}": last[name] for name in ("grad_norm", "lr", "lr_around", "seconds")}
    loss = sum(row["loss"] for row in rows) / len(rows)
    return tracking.Point(int(last["step"]) + 1, {"train/loss": loss, **values})


def _score_point(evaluation: dict[str, float]) -> tracking.Point:
    values = {"validation/score": evaluation["score"], "validation/seconds": evaluation["seconds"]}
    return tracking.Point(int(evaluation["step"]), values)


@torch.inference_mode()
def held_out(network: PolicyNetwork, windows: Windows, batch: int = 32) -> HeldOut:
    """Cross-entropy of the actions in `windows` (cut with `like` of the training windows), in float32, dropout off."""
    training, nats, right = network.training, 0.0, 0
    network.eval()
    for first in range(0, len(windows), batch):
        data = windows.batch(np.arange(first, min(first + batch, len(windows)))).to(network.device)
        logits, actions = labelled(network(*data), data)
        nats += float(cross_entropy(logits, actions, reduction="sum"))
        right += int((logits.argmax(-1) == actions).sum())
    network.train(training)
    return HeldOut(nats / windows.labels, right / windows.labels, windows.labels)


__all__ = [
    "HeldOut",
    "Preflight",
    "Progress",
    "TrainConfig",
    "TrainResult",
    "held_out",
    "preflight",
    "train",
]
