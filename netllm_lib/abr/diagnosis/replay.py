"""Proof by replaying: the run's own weights, tested with one switch at a time turned from as-run to sound.

All variants play the same traces from the same starting points with the same random numbers, so their differences are paired.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import decisions
from netllm_lib.abr.diagnosis.evidence import ALL_SOUND, AS_RUN, RETRAINED, SWITCHES, Evidence, Subject, paired
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.evaluate import SEED
from netllm_lib.abr.play import play
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.stats import Interval

if TYPE_CHECKING:
    from netllm_lib.abr.policies.llm import LLMPolicy
    from netllm_lib.checkpoint import CheckpointMeta

Progress = Callable[[str], None]

FEWEST_TRACES = 8
"""A replay of fewer traces shows nothing."""
CHECK_TRACES = 3
REPRODUCED = 0.995  # share of same levels from which on a replay counts as the recorded test; rounding moves a few
WINDOWS, TARGET_SCALES = (10, 20, 30, 5), (0.5, 2.0, 0.0, 10.0)  # that people try
LOSS_WINDOWS = 48


@dataclass(frozen=True)
class Ablation:
    """What each switch changes for these weights."""

    tables: dict[str, pd.DataFrame]  # by name: "as run", an id of a switch, "all sound", "retrained"
    effects: dict[str, Interval]  # of everything but "as run", against it
    seconds: float
    subject: Subject  # as it was played: `identify` may have found other settings than were recorded
    same_levels: float | None = None  # share of the recorded levels that the replay as run chose too
    too_short: str = ""  # why nothing was replayed, where the budget was too small
    retrained_with: dict[str, Any] | None = None  # how the retrained policy was trained
    with_dropout: pd.DataFrame | None = None
    """As run, but for dropout; played where the recorded test is unexplained and worse."""

    @property
    def unexplained(self) -> bool:
        """Do these weights not give the recorded levels, whatever setting was tried?"""
        config = self.subject.config
        if self.too_short or self.same_levels is None or self.same_levels >= REPRODUCED or config is None:
            return False
        # a test in the process that trained begins with a context that no file holds: then only its beginning differs
        return not config.dropout and not (config.context == "leak" and self.same_levels > 0.7)

    def table(self) -> pd.DataFrame:
        """The waterfall as rows: switch, mean reward, effect with its interval (NaN for the first row), traces."""
        rows = []
        for name, played in self.tables.items():
            effect = self.effects.get(name)
            row: dict[str, Any] = {"switch": name, "what": SWITCHES[name][0] if name in SWITCHES else ""}
            row |= {"reward": qoe.summarise(played).reward, "noise": effect is not None and not effect.excludes_zero}
            row |= dict(zip(("effect", "low", "high"), effect or (math.nan,) * 3, strict=True))
            rows.append({**row, "traces": played["trace"].nunique()})
        return pd.DataFrame(rows)


# --- variants ------------------------------------------------------------------------------------------------------------


def switched(subject: Subject) -> list[str]:
    """Ids of the switches in which the recorded test is not sound."""
    config = subject.config
    if config is None:
        return []
    is_off = {
        "adapter-not-applied": not subject.lora,
        "wrong-checkpoint": subject.played is not None,
        "sampling": config.choose == "sample",
        "dropout-on": config.dropout,
        "context-leak": config.context == "leak",
        "window-mismatch": config.w not in (None, subject.meta.settings.w),
        "target-return": config.target_return_scale != 1,
        "wrong-pool": subject.test_scale is not None,
    }
    return [name for name, wrong in is_off.items() if wrong]


def replay(subject: Subject, sound: Sequence[str], simulator: Simulator, *, cached: bool = False) -> pd.DataFrame:
    """Play the subject's policy as in the recorded test, but for the switches in `sound`. Returns the table of chunks.

    `cached` computes each token once where that is allowed (a cleared context, a causal PLM).
    """
    lora = subject.lora or "adapter-not-applied" in sound
    policy = variant(subject, sound, cached=cached and lora)
    plm = policy.network.plm
    with contextlib.nullcontext() if lora or not plm.has_lora else plm.model.disable_adapter():
        return play(policy, simulator)


def variant(subject: Subject, sound: Sequence[str], *, cached: bool = False) -> LLMPolicy:
    """The policy that `replay` plays (with the adapter)."""
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy

    config = subject.config or EvalConfig()
    for name in sound:
        config = replace(config, **SWITCHES[name][1])
    if cached and subject.network.plm.causal and config.context == "clear" and not config.dropout:
        config = replace(config, context_window="cached", merge_lora=True)
    network = subject.network if subject.played is None or "wrong-checkpoint" in sound else subject.played
    return LLMPolicy(network, subject.meta if "wrong-pool" in sound else tested_meta(subject), config, name="run")


def tested_meta(subject: Subject) -> CheckpointMeta:
    """The weights' meta data with the reward range and target return of the recorded test."""
    scale = subject.test_scale or subject.meta.settings.scale
    return replace(subject.meta, settings=replace(subject.meta.settings, scale=scale))


def can_replay(evidence: Evidence) -> bool:
    """Are weights, PLM, traces and video at hand, and is it known how the test was made?"""
    return evidence.subject is not None and evidence.subject.config is not None and evidence.played is not None


def simulator_of(evidence: Evidence, count: int | None = None) -> Simulator:
    """The test's episodes in the order of its table, or the first `count` of them; traces and video must be at hand."""
    assert evidence.played is not None
    table, traces, video = evidence.played
    traces_played = table["trace"].nunique()
    fixed, seed = evidence.setting.get("fixed", traces_played == len(traces)), evidence.setting.get("seed", SEED)
    how: dict[str, Any] = {"fixed_order": bool(fixed), "seed": int(seed), "clock": "episode"}
    episodes = upstream_episodes(traces, trace_num=traces_played, **how)
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


# --- the replay ----------------------------------------------------------------------------------------------------------


def ablate(
    evidence: Evidence, budget_s: float = 90.0, retrain_s: float = 0.0, progress: Progress | None = None
) -> Ablation | None:
    """Replay the test with each switch sound alone, and all together; then, if `retrain_s` allows, with retrained weights.

    Takes about `budget_s` seconds: fewer traces are played where that is not enough for all. None where the run cannot be
    replayed (see `can_replay`) or there is no budget; `too_short` says what a replay of a few traces would take.
    """
    if not can_replay(evidence) or (budget_s <= 0 and retrain_s <= 0):
        return None
    subject, recorded = evidence.subject, evidence.table
    assert subject is not None
    assert recorded is not None
    started = time.perf_counter()
    simulator, found = simulator_of(evidence), Ablation({AS_RUN: recorded}, {}, 0.0, subject)
    if budget_s > 0:
        found, simulator = _switches(evidence, found, budget_s, progress or (lambda line: None))
    if retrain_s > 0 and evidence.pool is not None:
        again, how = retrain(found.subject, evidence.pool, retrain_s)
        tables = found.tables | {RETRAINED: replay(again, [], simulator, cached=True)}
        found = replace(found, tables=tables, retrained_with=how)
    effects = {name: paired(table, found.tables[AS_RUN]) for name, table in found.tables.items() if name != AS_RUN}
    config = found.subject.config
    if found.unexplained and config is not None and paired(found.tables[AS_RUN], recorded).low > 0:
        noisy = replace(found.subject, config=replace(config, dropout=True, merge_lora=False))
        found = replace(found, with_dropout=replay(noisy, [], simulator))
    return replace(found, effects=effects, seconds=time.perf_counter() - started)


def _switches(evidence: Evidence, found: Ablation, budget_s: float, say: Progress) -> tuple[Ablation, Simulator]:
    """The ablation with every switch played, within the budget, and the simulator of the traces that were played."""
    subject, recorded, started = found.subject, found.tables[AS_RUN], time.perf_counter()
    check = simulator_of(evidence, CHECK_TRACES)
    same = same_levels(replay(subject, [], check), recorded)
    per_trace_s = (time.perf_counter() - started) / len(check)
    # masks of dropout depend on what is played beside: such a test cannot be told by its levels
    if same < REPRODUCED and not (subject.config and subject.config.dropout):
        subject, same = identify(evidence, subject, check, same)
    names = switched(subject)
    # as run and every switch alone, each takes about as long; all sound is cached and takes next to nothing
    alone = names if len(names) > 1 else []
    plays = len(alone) + (0 if same == 1 else 1) + 0.3
    spent_s = time.perf_counter() - started
    simulator = simulator_of(evidence)
    count = min(len(simulator), int((budget_s - spent_s) / per_trace_s / plays))
    found = replace(found, subject=subject, same_levels=same)
    if count < min(FEWEST_TRACES, len(simulator)):
        needed_s = FEWEST_TRACES * plays * per_trace_s + spent_s
        why = (
            f"time to replay the test, {per_trace_s:.1f} s a trace: what each switch changes (--budget {needed_s:.0f})"
        )
        return replace(found, too_short=why), simulator
    simulator = simulator_of(evidence, count)

    def played(name: str, sound: Sequence[str], cached: bool = False) -> pd.DataFrame:
        say(f"{name}: {count} traces")
        return replay(subject, sound, simulator, cached=cached)

    traces = {simulator.traces.names[i] for i in simulator.episodes.trace_index}
    as_run = recorded[recorded["trace"].isin(traces)] if same == 1 else played(AS_RUN, [])
    tables = {AS_RUN: as_run} | {name: played(name, [name]) for name in alone}
    if names:
        together = played(ALL_SOUND, names, cached=True)
        tables |= dict.fromkeys([*([] if alone else names), ALL_SOUND], together)
    return replace(found, tables=tables), simulator


def identify(evidence: Evidence, subject: Subject, simulator: Simulator, same: float) -> tuple[Subject, float]:
    """How the recorded test was really played, where it was not as its settings say: (the subject so played, share of same levels).

    Tries a handful of other settings on a few traces, and takes one that gives the recorded levels.
    """
    config, recorded = subject.config, evidence.table
    assert config is not None
    assert recorded is not None
    changes: list[dict[str, Any]] = [{"choose": "argmax" if config.choose == "sample" else "sample"}]
    changes += [{"context": "clear", "extra_step": False}] if config.context == "leak" else []
    changes += [{"w": w} for w in WINDOWS if w != (config.w or subject.meta.settings.w)]
    changes += [{"target_return_scale": scale} for scale in TARGET_SCALES if scale != config.target_return_scale]

    def tries() -> Iterator[Subject]:
        if subject.test_scale is not None:
            yield replace(subject, test_scale=None)
        if subject.network.plm.has_lora:
            yield replace(subject, lora=False)
        yield from (replace(subject, config=replace(config, **change)) for change in changes)
        yield from (replace(subject, played=make(), played_from=at) for at, make in evidence.other_weights.items())

    for other in tries():
        if (share := same_levels(replay(other, [], simulator), recorded)) >= REPRODUCED:
            return other, share
    return subject, same


def same_levels(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Share of the chunks in both tables that have the same level in both."""
    both = a[["trace", "chunk", "level"]].merge(b[["trace", "chunk", "level"]], on=["trace", "chunk"])
    return float((both["level_x"] == both["level_y"]).mean()) if len(both) else 0.0


def retrain(subject: Subject, pool: ExperiencePool, budget_s: float) -> tuple[Subject, dict[str, Any]]:
    """The same PLM trained on the same pool with the sound defaults, for about `budget_s` seconds.

    Returns what to play and how it was trained (epochs, steps, final loss, seconds).
    """
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
    how = {"epochs": config.epochs, "steps": run.steps, "final_loss": run.final_loss, "seconds": run.seconds}
    sound = EvalConfig() if network.plm.causal else EvalConfig(context_window="rolling")
    return Subject(network.eval(), describe(network, windows.settings), sound), how


# --- what the weights know ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """What a checkpoint shows without being played."""

    not_finite: tuple[str, ...]  # tensors that hold NaN or infinity
    no_adapter: bool  # LoRA's B matrices are there and all zero
    loss: float | None = None  # cross-entropy in nats on training windows, without dropout
    loss_before: float = math.nan  # the same against the levels one step before those that are to be predicted
    loss_after: float = math.nan  # the same against those one step after


@torch.no_grad()
def look_at(subject: Subject, pool: ExperiencePool | None, windows: int = LOSS_WINDOWS) -> Weights:
    """The weights' state, and, if they can be used and there is a pool, their loss on evenly spaced training windows of it."""
    named = list(subject.network.named_parameters())
    bad = tuple(name for name, p in named if not bool(torch.isfinite(p).all()))
    lora_b = [p for name, p in named if "lora_B" in name]
    found = Weights(bad, bool(lora_b) and not any(bool(p.any()) for p in lora_b))
    if pool is None or found.not_finite or found.no_adapter:
        return found
    from netllm_lib.abr.batches import WindowConfig, make_windows

    settings = subject.meta.settings
    scale = settings.scale
    cut = make_windows(pool, WindowConfig("stride", settings.w, gamma=scale.gamma, scale=scale.scale), like=scale)
    whole = np.flatnonzero(cut.lengths == cut.config.w)
    spread = np.unique(np.linspace(0, len(whole) - 1, windows).astype(int))
    numbers = whole[spread] if len(whole) else np.arange(len(cut))
    network, losses = subject.network.eval(), []
    for part in np.array_split(numbers, -(-len(numbers) // 8)):
        batch = cut.batch(part).to(network.device)
        logits = network(batch).float()
        a = batch.actions
        pairs = ((logits, a), (logits[:, 1:], a[:, :-1]), (logits[:, :-1], a[:, 1:]))
        losses.append([float(cross_entropy(x.flatten(0, 1), y.flatten())) for x, y in pairs])
    own, before, after = np.mean(losses, axis=0).tolist()
    return replace(found, loss=own, loss_before=before, loss_after=after)
