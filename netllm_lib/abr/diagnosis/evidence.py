"""What is known of a run: the inputs of every rule, each of which may be missing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.traces import CHUNKS, Registry, TraceSet, Video
from netllm_lib.stats import Interval, bootstrap, bootstrap_runs

if TYPE_CHECKING:
    from netllm_lib.abr.batches import ReturnScale
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.checkpoint import CheckpointMeta

CHANCE = math.log(qoe.LEVELS)
"""Cross-entropy in nats of a model that knows nothing."""

USUAL_LOSS_BAR = 0.9
"""Stands for H(a | previous) where the pool is not at hand: that of the known pools lies between .46 and 1.13."""

PUBLISHED = {("fcc-test", "video1"): {"mpc (published)": 0.8484549686275232, "genet (published)": 0.847871379604513}}
"""Mean rewards that the original publishes, for runs whose traces are not at hand."""


@dataclass(frozen=True)
class Training:
    """What is known of a training; None where it is not."""

    losses: np.ndarray | None = None  # [micro-steps] in order
    truncated: bool = False  # the losses end in the middle of a line
    micro_steps: int | None = None  # planned or taken
    steps: int | None = None  # optimizer steps
    accumulation: int | None = None  # micro-steps in an optimizer step
    accumulation_assumed: bool = False  # the original's names do not tell it
    windows: int | None = None  # in an epoch
    crossing: int | None = None  # of them, those that span two episodes
    epochs: int | None = None
    lr: float | None = None  # asked for
    lr_peak: float | None = None  # really reached
    lr_around: float | None = None  # of the modules around the PLM
    warmup_steps: int | None = None
    final_loss: float | None = None  # mean over the last epoch, or the last 20 steps
    held_out_loss: float | None = None
    clip: str | None = None  # "step", "micro", "none"
    clipped: float | None = None  # share of the clipped steps
    selected_on_test: bool = False
    pool_hash: str | None = None

    def end_loss(self) -> float | None:
        """Loss at the end: as recorded, else the mean over the last epoch (the last tenth where its length is unknown)."""
        if self.final_loss is not None:
            return self.final_loss
        if self.losses is None or not len(self.losses):
            return None
        last = self.windows if self.windows and self.windows < len(self.losses) else max(1, len(self.losses) // 10)
        return float(self.losses[-last:].mean())


@dataclass(frozen=True)
class Subject:
    """Weights that can be played again, and how the recorded test played them."""

    network: PolicyNetwork
    meta: CheckpointMeta
    config: EvalConfig | None = None  # of the recorded test; None: not known
    test_scale: ReturnScale | None = None
    """Reward range and target return of the recorded test, where not those of `meta`."""
    lora: bool = True  # whether the recorded test played with the adapter
    played: PolicyNetwork | None = None  # the weights that the recorded test played with, where not `network`
    played_from: str = ""  # where those lie


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of a run. Leave out what is not: rules that need it are then silent."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # tables of chunks by policy
    run: str = "run"  # the policy that is diagnosed
    seeds: tuple[pd.DataFrame, ...] = ()  # the same test of further runs of the same recipe (other training seeds)
    handicapped: tuple[str, ...] = ()  # policies of `tables` that are known to play below their own algorithm
    setting: Mapping[str, Any] = field(default_factory=dict)
    """How the test was made: traces, video, trace_num, seed, choose, context, dropout, w, target_return_scale, train_video, …"""
    training: Training | None = None
    pool: ExperiencePool | None = None  # the training pool
    test_pool: ExperiencePool | None = None  # the pool that the test was given, where it is another one
    subject: Subject | None = None
    other_weights: Mapping[str, Callable[[], PolicyNetwork]] = field(default_factory=dict)
    """Further checkpoints of the run by the name of their folder: the recorded test may have played one of them."""
    problems: tuple[tuple[str, str], ...] = ()  # (finding id, sentence): what loading the files showed
    registry: Registry | None = None  # traces and videos that are at hand
    traces: TraceSet | None = None  # of the test
    video: Video | None = None
    clean: np.ndarray | None = None  # [traces] bool: the trace shares no content with the training traces
    missing: tuple[str, ...] = ()

    @property
    def table(self) -> pd.DataFrame | None:
        """The run's table of chunks."""
        return self.tables.get(self.run)

    @functools.cached_property
    def reference(self) -> str | None:
        """The baseline that the run is held against: MPC as published, else the best other policy."""
        others = [name for name in self.tables if name != self.run]
        if not others:
            return None
        if "mpc (original)" in others:
            return "mpc (original)"
        return max(others, key=lambda name: qoe.summarise(self.tables[name]).reward)

    @functools.cached_property
    def reward(self) -> Interval | None:
        """Of the run, mean over traces."""
        if self.table is None:
            return None
        values = qoe.per_trace(self.table)["reward"].to_numpy()
        return bootstrap(values) if np.isfinite(values).all() else None

    @functools.cached_property
    def gap(self) -> Interval | None:
        """Run − reference, paired over traces; against a published mean, where the traces are not at hand."""
        if self.table is None or self.reward is None:
            return None
        if self.reference is not None:
            return paired(self.table, self.tables[self.reference])
        if published := self.published:
            mean = max(published.values())
            return Interval(self.reward.mean - mean, self.reward.low - mean, self.reward.high - mean)
        return None

    @property
    def published(self) -> dict[str, float]:
        """The original's published means for the test's traces and video, if it published any."""
        if self.setting.get("trace_num") not in (None, -1, 100):
            return {}
        return PUBLISHED.get((str(self.setting.get("traces")), str(self.setting.get("video"))), {})

    @functools.cached_property
    def gap_over_seeds(self) -> Interval | None:
        """Run − reference over all runs of the recipe: another seed on other traces would lie in it. None for a single run."""
        if self.table is None or self.reference is None or not self.seeds:
            return None
        by_trace = [qoe.per_trace(table)["reward"] for table in (self.table, *self.seeds)]
        reference = qoe.per_trace(self.tables[self.reference])["reward"]
        if any(set(rewards.index) != set(reference.index) for rewards in by_trace):
            raise ValueError("the further runs were tested on other traces than the first")
        ours = np.array([rewards[reference.index].to_numpy() for rewards in by_trace])
        return bootstrap_runs(ours, reference.to_numpy()[None])

    @functools.cached_property
    def failing(self) -> bool:
        """Is the run below its reference? With a gap unknown, a mean reward below zero counts."""
        if self.gap is not None:
            return self.gap.high < 0
        if self.reward is not None:
            return self.reward.mean < 0
        mean = self.setting.get("mean_reward")
        if mean is None:
            return False
        return float(mean) < 0.9 * max(self.published.values(), default=0.0)

    @functools.cached_property
    def loss_bar(self) -> float:
        """The loss that a trained policy ends below: H(a | previous level) of the pool, or almost nothing where that is zero."""
        if self.pool is None:
            return USUAL_LOSS_BAR
        entropy, conditional = behaviour_entropy(self.pool)
        # where the previous level tells almost nothing, a policy that learnt all there is ends at the bar, not below it
        return max(0.05, conditional * (1.05 if conditional > 0.9 * entropy else 1.0))

    @property
    def learned(self) -> bool | None:
        """Did the training end below the bar? None where no loss is known."""
        loss = self.training.end_loss() if self.training else None
        return None if loss is None or not math.isfinite(loss) else loss < self.loss_bar


def paired(ours: pd.DataFrame, other: pd.DataFrame) -> Interval:
    """Difference of mean reward, ours − other, with its bootstrap interval over the traces that both played."""
    a, b = qoe.per_trace(ours)["reward"], qoe.per_trace(other)["reward"]
    common = a.index.intersection(b.index)
    if not len(common):
        raise ValueError(f"the two tables share no trace ({a.index[0]!r} …, {b.index[0]!r} …)")
    return bootstrap((a[common] - b[common]).to_numpy())


def behaviour_entropy(pool: ExperiencePool) -> tuple[float, float]:
    """(H(a), H(a | previous level)) of the behaviour policy in nats.

    A policy that has learnt nothing has a loss of ln 6 = 1.79; one that only knows how often each level occurs has H(a); one
    that only repeats what usually follows the previous level has H(a | previous).
    """
    joint = np.zeros((qoe.LEVELS, qoe.LEVELS))
    np.add.at(joint, (previous_levels(pool), np.asarray(pool.actions)), 1)
    actions, rows = joint.sum(axis=0), joint.sum(axis=1)
    return _entropy(actions), float(
        sum(total / rows.sum() * _entropy(row) for row, total in zip(joint, rows, strict=True))
    )


def previous_levels(pool: ExperiencePool) -> np.ndarray:
    """[T] level of the chunk before each transition, as its state holds it."""
    kbps = np.rint(np.asarray(pool.states[:, 0, -1], dtype=np.float64) * qoe.BITRATES_KBPS[-1])
    return np.searchsorted(qoe.BITRATES_KBPS, kbps - 0.5).clip(0, qoe.LEVELS - 1)


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def with_baselines(evidence: Evidence) -> Evidence:
    """The evidence with the baselines played over the run's own traces, where those are at hand and no baseline is there yet.

    By the original's protocol of a whole set in fixed order (no noise). A run over shuffled or fewer traces gets the
    baselines on those traces, under the recorded seed.
    """
    from netllm_lib.abr.evaluate import SEED, play_test
    from netllm_lib.abr.policies.catalogue import baselines

    table, traces, video = evidence.table, evidence.traces, evidence.video
    if table is None or traces is None or video is None or len(evidence.tables) > 1 or evidence.registry is None:
        return evidence
    played = list(dict.fromkeys(table["trace"]))
    if not set(played) <= set(traces.names):
        return evidence
    tables = dict(evidence.tables)
    fixed = bool(evidence.setting.get("fixed", len(played) == len(traces)))
    seed = int(evidence.setting.get("seed", SEED))
    for name, policy in baselines(video, evidence.registry).items():
        tables[name] = play_test(policy, traces, video, trace_num=len(played), fixed=fixed, seed=seed)
    tables = {name: t for name, t in tables.items() if set(t["trace"]) == set(played) or name == evidence.run}
    handicapped = tuple(name for name in tables if name.endswith("(original)"))
    return replace(evidence, tables=tables, handicapped=handicapped)


def chunks_per_trace(table: pd.DataFrame) -> pd.Series:
    """Number of chunks of each trace; 48 in a whole episode."""
    return table.groupby("trace", sort=False).size()


WHOLE = CHUNKS
