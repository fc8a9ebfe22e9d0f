"""Proof by replaying: the run's own weights, tested with one switch at a time turned from as-run to sound.

All variants play the same traces from the same starting points with the same random numbers, so their differences are paired.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import decisions
from netllm_lib.abr.diagnosis.evidence import SWITCHES, Evidence, Subject, paired
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.stats import Interval
from netllm_lib.training_run import TrainingRun

if TYPE_CHECKING:
    from netllm_lib.abr.policies.llm import LLMPolicy

Progress = Callable[[str], None]

AS_RUN, ALL_SOUND, RETRAINED = "as run", "all sound", "retrained"
FEWEST_TRACES = 8
"""A replay of fewer traces shows nothing."""
CHECK_TRACES = 3  # on which other settings are tried
REPRODUCED = 0.995  # share of same levels from which on a replay counts as the recorded test; rounding moves a few
WINDOWS, TARGET_SCALES = (10, 20, 30, 5), (0.5, 2.0, 0.0, 10.0)  # that people try
LOSS_WINDOWS = 48


@dataclass(frozen=True)
class Ablation:
    """What playing the test again showed. All its tables are of the same traces."""

    subject: Subject  # as it was played: `identify` may have found other settings than were recorded
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """By name: "as run", the switches that were off, "all sound", "retrained". Of a few traces only where it is `too_short`."""
    same_levels: float | None = None  # share of the recorded levels that the replay as run chose too
    too_short: str = ""  # why no switch was turned, where the budget was too small
    retrained: TrainingRun | None = None  # of the retrained policy

    def effect(self, name: str) -> Interval | None:
        """What a variant changes against the run; None where it was not played."""
        return paired(self.tables[name], self.tables[AS_RUN]) if name in self.tables else None

    @property
    def unexplained(self) -> bool:
        """Do these weights not give the recorded levels, whatever setting was tried?"""
        config = self.subject.config
        if self.same_levels is None or self.same_levels >= REPRODUCED or config is None:
            return False
        # a test in the process that trained begins with a context that no file holds: then only its beginning differs
        return not config.dropout and not (config.context == "leak" and self.same_levels > 0.7)

    def table(self) -> pd.DataFrame | None:
        """The waterfall: switch, what, reward, effect with its interval (NaN for the first row), noise, traces."""
        rows = []
        for name, played in self.tables.items():
            effect = Interval(*(math.nan,) * 3) if name == AS_RUN else paired(played, self.tables[AS_RUN])
            what = SWITCHES[name][0] if name in SWITCHES else ""
            row: dict[str, Any] = {"switch": name, "what": what, "reward": qoe.summarise(played).reward}
            row |= {"noise": name != AS_RUN and not effect.excludes_zero, **effect._asdict()}
            rows.append({**row, "traces": played["trace"].nunique()})
        return pd.DataFrame(rows).rename(columns={"mean": "effect"}) if len(rows) > 1 else None


# --- playing -------------------------------------------------------------------------------------------------------------


def policy_of(subject: Subject, *, cached: bool = False) -> LLMPolicy:
    """The policy that the recorded test played (with the adapter).

    `cached` computes each token once where that is allowed (a cleared context, a causal PLM).
    """
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy

    config, meta = subject.config or EvalConfig(), subject.meta
    if cached and subject.network.plm.causal and config.context == "clear" and not config.dropout:
        config = replace(config, context_window="cached", merge_lora=True)
    if subject.test_scale is not None:
        meta = replace(meta, settings=replace(meta.settings, scale=subject.test_scale))
    return LLMPolicy(subject.played or subject.network, meta, config, name="run")


def replay(subject: Subject, simulator: Simulator, *, cached: bool = False) -> pd.DataFrame:
    """Play the subject's policy as in the recorded test. Returns the table of chunks; `cached` as in `policy_of`."""
    policy = policy_of(subject, cached=cached and subject.lora)
    plm = policy.network.plm
    with contextlib.nullcontext() if subject.lora or not plm.has_lora else plm.model.disable_adapter():
        return play(policy, simulator)


def can_replay(evidence: Evidence) -> bool:
    """Are weights, PLM, traces and video at hand, and is it known how the test was made?"""
    return evidence.subject is not None and evidence.subject.config is not None and evidence.played is not None


def simulator_of(evidence: Evidence, count: int | None = None) -> Simulator:
    """The test's episodes in the order of its table, or the first `count` of them; traces and video must be at hand."""
    assert evidence.played is not None
    _, traces, video = evidence.played
    how = evidence.protocol
    how["fixed_order"] = how.pop("fixed")
    episodes = upstream_episodes(traces, **how, clock="episode")
    return Simulator(traces, video, episodes.rows(range(len(episodes))[:count]))


def recorded(evidence: Evidence) -> Simulator | None:
    """The test's episodes, if the traces of its table follow each other as in them, and its levels bring its rewards; else None."""
    if evidence.played is None:
        return None
    table, traces, _ = evidence.played
    simulator = simulator_of(evidence)
    if [traces.names[i] for i in simulator.episodes.trace_index] != list(dict.fromkeys(table["trace"])):
        return None
    try:
        decisions.replayed(table, simulator)
    except ValueError:
        return None
    return simulator


def same_levels(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Share of the chunks in both tables that have the same level in both."""
    both = a[["trace", "chunk", "level"]].merge(b[["trace", "chunk", "level"]], on=["trace", "chunk"])
    return float((both["level_x"] == both["level_y"]).mean()) if len(both) else 0.0


# --- the ablation --------------------------------------------------------------------------------------------------------


def ablate(
    evidence: Evidence, budget_s: float = 90.0, retrain_s: float = 0.0, progress: Progress | None = None
) -> Ablation | None:
    """Replay the test with each switch sound alone, and all together; then, if `retrain_s` allows, with retrained weights.

    Takes about `budget_s` seconds: fewer traces are played where that is not enough for all. None where the run cannot be
    replayed (see `can_replay`) or there is no budget; `too_short` says what a replay of a few traces would take.
    """
    if not can_replay(evidence) or (budget_s <= 0 and retrain_s <= 0):
        return None
    assert evidence.subject is not None
    assert evidence.table is not None
    found = Ablation(evidence.subject)
    if budget_s > 0:
        found = _switches(evidence, evidence.subject, budget_s, progress or (lambda line: None))
    if retrain_s > 0 and evidence.pool is not None:
        tables = found.tables if found.tables and not found.too_short else {AS_RUN: evidence.table}
        again, training = retrain(found.subject, evidence.pool, retrain_s)
        played = replay(again, simulator_of(evidence, tables[AS_RUN]["trace"].nunique()), cached=True)
        found = replace(found, tables=tables | {RETRAINED: played}, retrained=training)
    return found


def _switches(evidence: Evidence, subject: Subject, budget_s: float, say: Progress) -> Ablation:
    """The ablation with every switch played, within the budget."""
    table, started = evidence.table, time.perf_counter()
    assert table is not None
    check, everything = simulator_of(evidence, CHECK_TRACES), simulator_of(evidence)
    first = replay(subject, check)
    per_trace_s = (time.perf_counter() - started) / len(check)
    if same_levels(first, table) < REPRODUCED:
        subject, first = identify(evidence, subject, first, check, until=started + budget_s / 2)
    found = Ablation(subject, {AS_RUN: first}, same_levels(first, table))
    off = [] if found.unexplained else subject.off  # what other weights did is not to be explained by a switch of these
    # as run and every switch alone, each takes about as long, and so may dropout; all sound is cached and takes next to nothing
    alone = off if len(off) > 1 else []
    plays = 1 + len(alone) + found.unexplained + 0.3
    spent_s = time.perf_counter() - started
    count = min(len(everything), int((budget_s - spent_s) / per_trace_s / plays))
    if count < min(FEWEST_TRACES, len(everything)):
        needed = f"--budget {FEWEST_TRACES * plays * per_trace_s + spent_s:.0f}"
        why = f"time to replay the test, {per_trace_s:.1f} s a trace: what each switch changes ({needed})"
        return replace(found, too_short=why)
    simulator = simulator_of(evidence, count)
    say(f"{AS_RUN}: {count} traces")
    as_run = replay(subject, simulator)
    found = Ablation(subject, {AS_RUN: as_run}, same_levels(as_run, table))
    if found.unexplained:
        return _with_dropout(found, table, simulator)
    for name in alone:
        say(f"{name}: {count} traces")
        found.tables[name] = replay(subject.sound(name), simulator)
    if off:
        say(f"{ALL_SOUND}: {count} traces")
        together = replay(subject.sound(*off), simulator, cached=True)
        found.tables.update(dict.fromkeys([*off, ALL_SOUND], together) | found.tables)
    return found


def identify(
    evidence: Evidence, subject: Subject, first: pd.DataFrame, simulator: Simulator, until: float
) -> tuple[Subject, pd.DataFrame]:
    """The subject as the recorded test really played it, and what it plays, where that is not as its settings say.

    Tries a handful of other settings on a few traces until the clock says `until`, and takes one that gives the recorded levels;
    else the subject as it is, and `first`.
    """
    config, table = subject.config, evidence.table
    assert config is not None
    assert table is not None

    def tries() -> Iterator[Subject]:
        if subject.test_scale is not None:
            yield subject.changed(test_scale=None)
        if subject.network.plm.has_lora:
            yield subject.changed(lora=False)
        yield subject.changed(choose="argmax" if config.choose == "sample" else "sample")
        if config.context == "leak":
            yield subject.sound("context-leak")
        yield from (subject.changed(w=w) for w in WINDOWS)
        yield from (subject.changed(target_return_scale=scale) for scale in TARGET_SCALES)
        yield from (subject.changed(played=load()) for load in evidence.other_weights.values())

    # masks of dropout depend on what is played beside: such a test cannot be told by its levels
    for other in () if config.dropout else tries():
        if time.perf_counter() > until:
            break
        if same_levels(played := replay(other, simulator), table) >= REPRODUCED:
            return other, played
    return subject, first


def _with_dropout(found: Ablation, table: pd.DataFrame, simulator: Simulator) -> Ablation:
    """The ablation of a test with dropout, where these weights only give the recorded rewards, on the whole, with dropout on."""
    better = paired(found.tables[AS_RUN], table)
    if not better.low > 0:
        return found
    noisy = found.subject.changed(dropout=True, merge_lora=False)
    if abs(paired(replay(noisy, simulator), table).mean) >= 0.5 * better.mean:
        return found
    as_run = table[table["trace"].isin(set(found.tables[AS_RUN]["trace"]))]
    sound = found.tables[AS_RUN]
    return replace(found, subject=noisy, tables={AS_RUN: as_run, "dropout-on": sound})


def retrain(subject: Subject, pool: ExperiencePool, budget_s: float) -> tuple[Subject, TrainingRun]:
    """The same PLM trained on the same pool with the sound defaults, for about `budget_s` seconds: what to play, the training."""
    from netllm_lib.abr.batches import WindowConfig, make_windows
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.checkpoint import describe
    from netllm_lib.plm import load_plm
    from netllm_lib.train import TrainConfig, preflight, train

    network = PolicyNetwork(load_plm(subject.network.plm.config), subject.network.config)
    windows = make_windows(pool, WindowConfig(w=subject.meta.settings.w))
    one_epoch_s = preflight(network, windows, TrainConfig(epochs=1)).seconds or budget_s
    config = TrainConfig(epochs=max(1, int(budget_s / max(one_epoch_s, 1e-3))))
    with tempfile.TemporaryDirectory() as folder:
        run = train(network, windows, config, folder=Path(folder) / "retrained", settings=windows.settings)
    sound = EvalConfig() if network.plm.causal else EvalConfig(context_window="rolling")
    return Subject(network.eval(), describe(network, windows.settings), sound), run


# --- what the weights know ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """What a checkpoint shows without being played."""

    not_finite: tuple[str, ...]  # tensors that hold NaN or infinity
    no_adapter: bool  # LoRA's B matrices are there and all zero
    loss: float | None = None  # cross-entropy in nats on training windows, without dropout


@torch.no_grad()
def look_at(subject: Subject, pool: ExperiencePool | None, windows: int = LOSS_WINDOWS) -> Weights:
    """The weights' state, and, if they can be used and there is a pool, their loss on evenly spaced training windows of it."""
    from netllm_lib.abr.batches import WindowConfig, make_windows

    named = list(subject.network.named_parameters())
    bad = tuple(name for name, p in named if not bool(torch.isfinite(p).all()))
    lora_b = [p for name, p in named if "lora_B" in name]
    found = Weights(bad, bool(lora_b) and not any(bool(p.any()) for p in lora_b))
    if pool is None or found.not_finite or found.no_adapter:
        return found
    w, scale = subject.meta.settings.w, subject.meta.settings.scale
    cut = make_windows(pool, WindowConfig("stride", w, gamma=scale.gamma, scale=scale.scale), like=scale)
    whole = np.flatnonzero(cut.lengths == w)
    spread = np.unique(np.linspace(0, len(whole) - 1, windows).astype(int))
    numbers = whole[spread] if len(whole) else np.arange(len(cut))
    network, losses = subject.network.eval(), []
    for part in np.array_split(numbers, -(-len(numbers) // 8)):
        batch = cut.batch(part).to(network.device)
        losses.append(float(cross_entropy(network(batch).float().flatten(0, 1), batch.actions.flatten())))
    return replace(found, loss=float(np.mean(losses)))
