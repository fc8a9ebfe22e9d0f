"""What is known of a run: parts that are there as a whole or not at all, and what follows from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from netllm_lib import stats
from netllm_lib.abr import qoe
from netllm_lib.abr.evaluate import SEED, Test, baselines, play_test
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.traces import Registry, TraceSet, Video
from netllm_lib.findings import Severity
from netllm_lib.stats import Interval, bootstrap, bootstrap_runs
from netllm_lib.training_run import TrainingRun

if TYPE_CHECKING:
    from netllm_lib.abr.diagnosis.replay import Ablation, Weights
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.checkpoint import CheckpointMeta
    from netllm_lib.returns import ReturnScale

SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter-not-applied": ("the adapter applied", {"lora": True}),
    "wrong-checkpoint": ("the weights that the training chose", {"played": None}),
    "sampling": ("the most probable level chosen", {"choose": "argmax"}),
    "dropout-on": ("dropout off", {"dropout": False}),
    "context-leak": ("the context cleared between traces", {"context": "clear", "extra_step": False}),
    "window-mismatch": ("the window of the training", {"w": None}),
    "target-return": ("the training pool's largest return asked for", {"target_return_scale": 1.0}),
    "wrong-pool": ("the training pool's range and target", {"test_scale": None}),
}
"""Switches of a test by finding: what is sound, in words and as changes of a `Subject` or its `EvalConfig`."""

CHANCE = math.log(qoe.LEVELS)
"""Cross-entropy in nats of a model that knows nothing."""

USUAL_LOSS_BAR = 0.9
"""Stands for H(a | previous) where the pool is not at hand: that of the known pools lies between .46 and 1.13."""

ORIGINAL = " (original)"  # the end of a baseline's name that plays with the original's mistakes


@dataclass(frozen=True)
class Subject:
    """Weights that can be played again, and how the recorded test played them."""

    network: PolicyNetwork
    meta: CheckpointMeta
    config: EvalConfig | None = None  # of the recorded test; None: not known
    test_scale: ReturnScale | None = None  # reward range and target return at test, where not those of `meta`
    lora: bool = True  # the adapter was applied
    played: PolicyNetwork | None = None  # the weights that the recorded test played with, where not `network`

    def changed(self, **changes: Any) -> Subject:
        """The subject with other fields of its own or of its `config`, which must be known."""
        own = {name: changes.pop(name) for name in ("test_scale", "lora", "played") if name in changes}
        assert self.config is not None
        config = replace(self.config, **changes)
        return replace(self, **own, config=replace(config, w=config.w or self.meta.settings.w))

    def sound(self, *switches: str) -> Subject:
        """The subject with some switches turned to what is sound."""
        return self.changed(**{name: value for switch in switches for name, value in SWITCHES[switch][1].items()})

    @property
    def off(self) -> list[str]:
        """Switches in which the recorded test was not sound; none where it is not known how it was made."""
        return [] if self.config is None else [name for name in SWITCHES if self.sound(name) != self.changed()]


@dataclass(frozen=True)
class Recipe:
    """How the training's data were made; None where it is not known."""

    traces: str | None = None
    video: str | None = None
    w: int | None = None  # steps in a window


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of a run. Leave out what is not: rules that need it are then silent."""

    test: Test | None = None
    seeds: tuple[Test, ...] = ()  # of further runs of the same recipe (other training seeds), on the same traces
    training: TrainingRun | None = None
    recipe: Recipe = Recipe()
    pool: ExperiencePool | None = None  # the training pool
    test_pool: ExperiencePool | None = None  # the pool that the test was given, where it is another one
    subject: Subject | None = None
    other_weights: Mapping[str, Callable[[], PolicyNetwork]] = field(default_factory=dict)
    """Further checkpoints of the run by the name of their folder: the recorded test may have played one of them."""
    printed_reward: float | None = None  # the mean that the console log of the run ends with
    problems: Mapping[str, str] = field(default_factory=dict)  # by id of a finding: what loading the files showed
    registry: Registry | None = None  # traces and videos that are at hand
    traces: TraceSet | None = None  # of the test
    video: Video | None = None
    clean: np.ndarray | None = None  # [traces] bool: the trace shares no content with the training traces
    missing: tuple[str, ...] = ()
    weights: Weights | None = None  # what was measured on the checkpoint
    replayed: Ablation | None = None  # what playing the test again showed

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Tables of chunks by policy."""
        return self.test.tables if self.test else {}

    @property
    def setting(self) -> Mapping[str, Any]:
        """How the test was made: traces, video, trace_num, seed, choose, context, dropout, w, target_return_scale, …"""
        return self.test.setting if self.test else {}

    @property
    def run(self) -> str:
        """The policy that is diagnosed."""
        return self.test.subject if self.test else "run"

    @property
    def table(self) -> pd.DataFrame | None:
        """The run's table of chunks."""
        return self.tables.get(self.run)

    @property
    def played(self) -> tuple[pd.DataFrame, TraceSet, Video] | None:
        """The run's table, its traces and its video; None unless all of them are at hand."""
        table, traces, video = self.table, self.traces, self.video
        if table is None or traces is None or video is None or not set(table["trace"]) <= set(traces.names):
            return None
        return table, traces, video

    @property
    def protocol(self) -> dict[str, Any]:
        """By which the test was made, as `play_test` takes it; the traces must be at hand."""
        assert self.played is not None
        table, traces, _ = self.played
        count = table["trace"].nunique()
        fixed, seed = self.setting.get("fixed", count == len(traces)), self.setting.get("seed", SEED)
        return {"trace_num": count, "fixed": bool(fixed), "seed": int(seed)}

    # --- is it poor?

    @functools.cached_property
    def reference(self) -> str | None:
        """The baseline that the run is held against: MPC, else MPC as the original plays it, else the best other policy."""
        means = {name: qoe.summarise(table).reward for name, table in self.tables.items() if name != self.run}
        others = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        known = [name for name in ("mpc", f"mpc{ORIGINAL}") if name in others]
        return next(iter(known), None) or max(others, key=lambda name: others[name], default=None)

    @functools.cached_property
    def reward(self) -> Interval | None:
        """Of the run, mean over traces."""
        if self.table is None:
            return None
        values = qoe.per_trace(self.table)["reward"].to_numpy()
        return bootstrap(values) if np.isfinite(values).all() else None

    @functools.cached_property
    def gap(self) -> Interval | None:
        """Run − reference, paired over traces."""
        if self.table is None or self.reward is None or self.reference is None:
            return None
        return paired(self.table, self.tables[self.reference])

    @functools.cached_property
    def gap_over_seeds(self) -> Interval | None:
        """Run − reference over all runs of the recipe: another seed on other traces would lie in it. None for a single run."""
        if self.test is None or self.reference is None or not self.seeds:
            return None
        by_trace = [qoe.per_trace(test.tables[test.subject])["reward"] for test in (self.test, *self.seeds)]
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
        return self.printed_reward is not None and self.printed_reward < 0

    @property
    def poor(self) -> bool:
        """Is it failing, or is nothing known of the result?"""
        return self.failing or (self.reward is None and self.printed_reward is None)

    @property
    def broken(self) -> Severity:
        """How something counts that makes a run worthless."""
        return "cause" if self.poor else "suspect"

    def severity(self, strong: bool = True) -> Severity:
        """How a fault of the inputs counts: it explains a poor reward only if the policy did learn what it was given."""
        if not self.failing:
            return "note"
        return "cause" if strong and self.learned is not False else "suspect"

    # --- did it learn?

    @functools.cached_property
    def reference_losses(self) -> dict[str, float]:
        """Losses to hold a training against: chance, the behaviour policy's entropies."""
        names = ("H(a)", "H(a | previous level)")
        entropies = {} if self.pool is None else dict(zip(names, behaviour_entropy(self.pool), strict=True))
        return {"chance": CHANCE} | entropies

    @functools.cached_property
    def loss_bar(self) -> float:
        """The loss that a trained policy ends below: H(a | previous level) of the pool, or almost nothing where that is zero."""
        if self.pool is None:
            return USUAL_LOSS_BAR
        _, entropy, conditional = self.reference_losses.values()
        # where the previous level tells almost nothing, a policy that learnt all there is ends at the bar, not below it
        return max(0.05, conditional * (1.05 if conditional > 0.9 * entropy else 1.0))

    @property
    def end_loss(self) -> float | None:
        """The loss at the end of the training, as recorded; else the one that the checkpoint has on the training pool."""
        recorded = self.training.end_loss() if self.training else None
        return self.weights.loss if recorded is None and self.weights else recorded

    @property
    def learned(self) -> bool | None:
        """Did the training end below the bar? None where no loss is known."""
        loss = self.end_loss
        return None if loss is None or not math.isfinite(loss) else loss < self.loss_bar


def with_baselines(evidence: Evidence) -> Evidence:
    """The evidence with the baselines played over the run's own traces by the protocol of a test, where those are at hand and no
    baseline is there yet."""
    test, registry = evidence.test, evidence.registry
    if test is None or registry is None or evidence.played is None or len(test.tables) > 1:
        return evidence
    table, traces, video = evidence.played
    missing = evidence.missing
    try:
        players = baselines(video, registry)
    except (ValueError, OSError, RuntimeError) as error:
        # Genet's checkpoint takes TensorFlow to be read for the first time
        players, missing = baselines(video), (*missing, f"Genet among the baselines ({error})")
    played = {name: play_test(policy, traces, video, **evidence.protocol) for name, policy in players.items()}
    same = {name: other for name, other in played.items() if set(other["trace"]) == set(table["trace"])}
    return replace(evidence, test=replace(test, tables={**test.tables, **same}), missing=missing)


def paired(ours: pd.DataFrame, other: pd.DataFrame) -> Interval:
    """Difference of mean reward, ours − other, with its bootstrap interval over the traces that both played."""
    return stats.paired(qoe.per_trace(ours)["reward"], qoe.per_trace(other)["reward"])


def behaviour_entropy(pool: ExperiencePool) -> tuple[float, float]:
    """(H(a), H(a | previous level)) of the behaviour policy in nats.

    A policy that has learnt nothing has a loss of ln 6 = 1.79; one that only knows how often each level occurs has H(a); one
    that only repeats what usually follows the previous level has H(a | previous).
    """
    from scipy.stats import entropy

    joint = np.zeros((qoe.LEVELS, qoe.LEVELS))
    np.add.at(joint, (previous_levels(pool), np.asarray(pool.actions)), 1)
    met = joint[joint.any(axis=1)]
    return float(entropy(joint.sum(axis=0))), float(met.sum(axis=1) / met.sum() @ entropy(met, axis=1))


def previous_levels(pool: ExperiencePool) -> np.ndarray:
    """[T] level of the chunk before each transition, as its state holds it."""
    kbps = np.rint(np.asarray(pool.states[:, 0, -1], dtype=np.float64) * qoe.BITRATES_KBPS[-1])
    return np.searchsorted(qoe.BITRATES_KBPS, kbps - 0.5).clip(0, qoe.LEVELS - 1)


def pool_sizes_mb(pool: ExperiencePool) -> np.ndarray:
    """[transitions of one episode, 6] sizes in MB of the chunk to choose, as the pool's first episode saw them."""
    return np.asarray(pool.states[: pool.episode_lengths[0], 4, :], dtype=np.float64)


def throughputs_mbps(pool: ExperiencePool, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Throughput of the chunks that the pool's states saw last, and of those of a test."""
    rows = qoe.chosen(table)
    met = (rows["size_bytes"] / rows["delay_ms"] / 1000 * 8).to_numpy()
    return np.asarray(pool.states[:, 2, -1], dtype=np.float64) * 8, met
