"""Proof by replaying: the run's own weights, tested with one switch at a time turned from as-run to sound.

All variants play the same traces from the same starting points with the same random numbers, so their differences are paired.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import Evidence, Subject, Training, paired
from netllm_lib.abr.episodes import Episodes, upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.findings import Effect, Finding, Severity
from netllm_lib.stats import Interval

if TYPE_CHECKING:
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy

Progress = Callable[[str], None]

FEWEST_TRACES = 8
"""A replay of fewer traces shows nothing."""
CHECK_TRACES = 3
REPRODUCED = 0.995  # share of same levels from which on a replay counts as the recorded test; rounding moves a few
WINDOWS, TARGET_SCALES = (10, 20, 30, 5), (0.5, 2.0, 0.0, 10.0)  # that people try
LOSS_WINDOWS = 48
AS_RUN, ALL_SOUND, RETRAINED = "as run", "all sound", "retrained"

SWITCHES: dict[str, tuple[str, dict[str, Any], str]] = {
    "adapter-not-applied": (
        "the adapter applied", {}, "load the adapter before the test: the recorded levels are those of the PLM without it",
    ),
    "wrong-checkpoint": (
        "the weights that the training chose", {}, "test the best model (in the original --model-dir …_best_model)",
    ),
    "sampling": (
        "the most probable level chosen", {"choose": "argmax"},
        'choose the most probable level (EvalConfig.choose = "argmax")',
    ),
    "dropout-on": (
        "dropout off", {"dropout": False},
        "test in evaluation mode (EvalConfig.dropout = False; in the original --test in a process of its own)",
    ),
    "context-leak": (
        "the context cleared between traces", {"context": "clear", "extra_step": False},
        'clear the context between traces (EvalConfig.context = "clear")',
    ),
    "window-mismatch": (
        "the window of the training", {"w": None},
        "test with the window of the training (EvalConfig.w = None; in the original --w)",
    ),
    "target-return": (
        "the training pool's largest return asked for", {"target_return_scale": 1.0},
        "ask for what was seen in training (target_return_scale = 1)",
    ),
    "wrong-pool": (
        "the training pool's range and target", {}, "give the test the training pool (in the original --exp-pool-path)",
    ),
}  # fmt: skip
"""Switches of a test by finding: what is sound, as changes of EvalConfig, and how to set it."""


@dataclass(frozen=True)
class Ablation:
    """What each switch is worth for these weights."""

    tables: dict[str, pd.DataFrame]  # by name: "as run", an id of a switch, "all sound", "retrained"
    effects: dict[str, Interval]  # of everything but "as run", against it
    seconds: float
    subject: Subject  # as it was played: `identify` may have found other settings than were recorded
    same_levels: float | None = None  # share of the recorded levels that the replay as run chose too
    too_short: str = ""  # why nothing was replayed, where the budget was too small
    retrained_with: dict[str, Any] | None = None  # how the retrained policy was trained

    def table(self) -> pd.DataFrame:
        """The waterfall as rows: switch, mean reward, effect with its interval (NaN for the first row), traces."""
        rows = []
        for name, played in self.tables.items():
            effect = self.effects.get(name)
            nothing = float("nan")
            rows.append(
                {
                    "switch": name,
                    "what": SWITCHES[name][0] if name in SWITCHES else "",
                    "reward": qoe.summarise(played).reward,
                    "effect": effect.mean if effect else nothing,
                    "low": effect.low if effect else nothing,
                    "high": effect.high if effect else nothing,
                    "noise": effect is not None and not effect.excludes_zero,
                    "traces": played["trace"].nunique(),
                }
            )
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
    network = _network(subject, sound)
    off = network.plm.model.disable_adapter() if not lora and network.plm.has_lora else contextlib.nullcontext()
    with off:
        return play(variant(subject, sound, cached=cached and lora), simulator)


def _network(subject: Subject, sound: Sequence[str]) -> PolicyNetwork:
    return subject.network if subject.played is None or "wrong-checkpoint" in sound else subject.played


def variant(subject: Subject, sound: Sequence[str], *, cached: bool = False) -> LLMPolicy:
    """The policy that `replay` plays (with the adapter)."""
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy

    config = subject.config or EvalConfig()
    for name in sound:
        config = replace(config, **SWITCHES[name][1])
    if cached and subject.network.plm.causal and config.context == "clear" and not config.dropout:
        config = replace(config, context_window="cached", merge_lora=True)
    scale = subject.meta.settings.scale if subject.test_scale is None or "wrong-pool" in sound else subject.test_scale
    return LLMPolicy(
        _network(subject, sound),
        replace(subject.meta, settings=replace(subject.meta.settings, scale=scale)),
        config,
        name="run",
    )


def episodes_of(evidence: Evidence) -> Episodes:
    """The episodes that the run's table was played over, in its order."""
    assert evidence.table is not None
    assert evidence.traces is not None
    count = evidence.table["trace"].nunique()
    return upstream_episodes(
        evidence.traces,
        trace_num=count,
        fixed_order=bool(evidence.setting.get("fixed", count == len(evidence.traces))),
        seed=int(evidence.setting.get("seed", 100003)),
        clock="episode",
    )


def can_replay(evidence: Evidence) -> bool:
    """Are weights, PLM, traces and video at hand, and is it known how the test was made?"""
    return (
        evidence.subject is not None
        and evidence.subject.config is not None
        and evidence.table is not None
        and evidence.traces is not None
        and evidence.video is not None
        and set(evidence.table["trace"]) <= set(evidence.traces.names)
    )


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
    subject = evidence.subject
    assert subject is not None
    assert evidence.table is not None
    started = time.perf_counter()
    say = progress or (lambda line: None)
    simulator = _simulator(evidence, None)
    tables: dict[str, pd.DataFrame] = {}
    same, too_short = None, ""
    if budget_s > 0:
        first = min(CHECK_TRACES, len(simulator))
        clock = time.perf_counter()
        check = _simulator(evidence, first)
        same = same_levels(replay(subject, [], check), evidence.table)
        per_trace_s = (time.perf_counter() - clock) / first
        if same < REPRODUCED and not (
            subject.config and subject.config.dropout
        ):  # its masks depend on what is played beside
            subject, same = identify(evidence, subject, check, same)
        names = switched(subject)
        # as run and every switch alone, each about as dear; all sound is cached and costs next to nothing
        alone = names if len(names) > 1 else []
        plays = len(alone) + (0 if same == 1 else 1) + 0.3
        count = min(len(simulator), int((budget_s - (time.perf_counter() - started)) / per_trace_s / plays))
        if count >= min(FEWEST_TRACES, len(simulator)):
            simulator = _simulator(evidence, count)
            played = {simulator.traces.names[i] for i in simulator.episodes.trace_index}
            if same == 1:  # the recorded table is what a replay would give
                tables[AS_RUN] = evidence.table[evidence.table["trace"].isin(played)]
            else:
                say(f"{AS_RUN}: {count} traces")
                tables[AS_RUN] = replay(subject, [], simulator)
            for name in alone:
                say(f"{name}: {count} traces")
                tables[name] = replay(subject, [name], simulator)
            if names:
                say(f"{ALL_SOUND}: {count} traces")
                together = replay(subject, names, simulator, cached=True)
                tables |= {names[0]: together} if len(names) == 1 else {}
                tables[ALL_SOUND] = together
        else:
            least = FEWEST_TRACES * plays * per_trace_s + time.perf_counter() - started
            too_short = f"time to replay the test, {per_trace_s:.1f} s a trace: what each switch is worth (--budget {least:.0f})"
            tables[AS_RUN] = evidence.table
    with_ = None
    if retrain_s > 0 and evidence.pool is not None:
        say(f"{RETRAINED}: about {retrain_s:.0f} s")
        again, with_ = retrain(subject, evidence.pool, retrain_s)
        tables.setdefault(AS_RUN, evidence.table)
        tables[RETRAINED] = replay(again, [], simulator, cached=True)
    if AS_RUN not in tables:
        return None
    effects = {name: paired(table, tables[AS_RUN]) for name, table in tables.items() if name != AS_RUN}
    return Ablation(tables, effects, time.perf_counter() - started, subject, same, too_short, with_)


def identify(evidence: Evidence, subject: Subject, simulator: Simulator, same: float) -> tuple[Subject, float]:
    """How the recorded test was really played, where it was not as its settings say: (the subject so played, share of same levels).

    Tries a handful of other settings on a few traces, and takes one that gives the recorded levels.
    """
    config = subject.config
    assert config is not None
    assert evidence.table is not None
    tries: list[Callable[[], Subject]] = []
    if subject.test_scale is not None:
        tries.append(lambda: replace(subject, test_scale=None))
    if subject.network.plm.has_lora:
        tries.append(lambda: replace(subject, lora=False))
    tries.append(
        lambda: replace(subject, config=replace(config, choose="argmax" if config.choose == "sample" else "sample"))
    )
    if config.context == "leak":
        tries.append(lambda: replace(subject, config=replace(config, context="clear", extra_step=False)))
    tries += [
        lambda w=w: replace(subject, config=replace(config, w=w))  # type: ignore[misc]
        for w in WINDOWS
        if w != (config.w or subject.meta.settings.w)
    ]
    tries += [
        lambda scale=scale: replace(subject, config=replace(config, target_return_scale=scale))  # type: ignore[misc]
        for scale in TARGET_SCALES
        if scale != config.target_return_scale
    ]
    tries += [
        lambda make=make, place=place: replace(subject, played=make(), played_from=place)  # type: ignore[misc]
        for place, make in evidence.other_weights.items()
    ]
    for make in tries:
        other = make()
        share = same_levels(replay(other, [], simulator), evidence.table)
        if share >= REPRODUCED:
            return other, share
    return subject, same


def _simulator(evidence: Evidence, count: int | None) -> Simulator:
    assert evidence.traces is not None
    assert evidence.video is not None
    episodes = episodes_of(evidence)
    return Simulator(evidence.traces, evidence.video, episodes if count is None else episodes.rows(range(count)))


def same_levels(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Share of the chunks in both tables that have the same level in both."""
    both = a[["trace", "chunk", "level"]].merge(b[["trace", "chunk", "level"]], on=["trace", "chunk"])
    return float((both["level_x"] == both["level_y"]).mean()) if len(both) else 0.0


def retrain(subject: Subject, pool: ExperiencePool, budget_s: float) -> tuple[Subject, dict[str, Any]]:
    """The same PLM trained on the same pool with the sound defaults, for about `budget_s` seconds.

    Returns what to play and how it was trained (epochs, steps, final loss).
    """
    from netllm_lib.abr.batches import WindowConfig, make_windows
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.checkpoint import describe
    from netllm_lib.plm import load_plm
    from netllm_lib.train import TrainConfig, preflight, train

    network = PolicyNetwork(load_plm(subject.network.plm.config), subject.network.config)
    windows = make_windows(pool, WindowConfig(w=subject.meta.settings.w))
    config = TrainConfig(epochs=1)
    flight = preflight(network, windows, config)
    one_epoch_s = flight.seconds or budget_s
    config = replace(config, epochs=max(1, int(budget_s / max(one_epoch_s, 1e-3))))
    with tempfile.TemporaryDirectory() as folder:
        result = train(network, windows, config, folder=Path(folder) / "retrained", settings=windows.settings)
    meta = describe(network, windows.settings)
    with_ = {
        "epochs": config.epochs,
        "steps": result.steps,
        "final_loss": result.final_loss,
        "seconds": result.seconds,
    }
    sound = EvalConfig() if network.plm.causal else EvalConfig(context_window="rolling")
    return Subject(network.eval(), meta, sound), with_


# --- what the weights know ------------------------------------------------------------------------------------------------


@torch.no_grad()
def checkpoint_losses(
    subject: Subject, pool: ExperiencePool, windows: int = LOSS_WINDOWS
) -> tuple[float, float, float]:
    """Cross-entropy in nats of the weights on evenly spaced training windows of the pool, without dropout.

    Against the levels that are to be predicted, against those one step before, and against those one step after.
    """
    from netllm_lib.abr.batches import WindowConfig, make_windows

    w, scale = subject.meta.settings.w, subject.meta.settings.scale
    cut = make_windows(pool, WindowConfig("stride", w), like=scale)
    whole = np.flatnonzero(cut.lengths == w)
    numbers = (
        whole[np.unique(np.linspace(0, len(whole) - 1, windows).astype(int))] if len(whole) else np.arange(len(cut))
    )
    network, losses = subject.network.eval(), []
    for part in np.array_split(numbers, -(-len(numbers) // 8)):
        batch = cut.batch(part).to(network.device)
        logits = network(batch).float()
        a = batch.actions
        pairs = ((logits, a), (logits[:, 1:], a[:, :-1]), (logits[:, :-1], a[:, 1:]))
        losses.append([float(cross_entropy(x.flatten(0, 1), y.flatten())) for x, y in pairs])
    own, before, after = np.mean(losses, axis=0)
    return float(own), float(before), float(after)


def weights(evidence: Evidence) -> tuple[list[Finding], Evidence]:
    """Findings about the checkpoint, and the evidence with the loss that it shows where no log tells one."""
    subject, pool = evidence.subject, evidence.pool
    if subject is None:
        return [], evidence
    bad = [name for name, p in subject.network.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        return [
            Finding(
                "non-finite", "cause", f"{len(bad)} tensors of the checkpoint hold NaN or infinity, {bad[0]} first",
                {"tensors": len(bad)},
                "throw it away; train in float32 with a lower learning rate",
            )
        ], evidence  # fmt: skip
    found = []
    lora_b = [p for name, p in subject.network.named_parameters() if "lora_B" in name]
    if lora_b and not any(bool(p.any()) for p in lora_b):
        found.append(
            Finding(
                "adapter-not-applied", "cause" if evidence.failing or evidence.reward is None else "suspect",
                "LoRA's B matrices are all zero: the adapter adds nothing to the PLM", {"lora_b_nonzero": 0},
                "test the folder that the training wrote last, and check that LoRA was trained (rank, target_modules)",
            )
        )  # fmt: skip
    if pool is None:
        return found, evidence
    loss, *shifted = checkpoint_losses(subject, pool)
    known = evidence.training or Training()
    end = known.end_loss()
    numbers = {"training_loss": end, "checkpoint_loss": loss, "loss_bar": evidence.loss_bar}
    severity: Severity = "cause" if evidence.failing or evidence.reward is None else "suspect"
    if found:
        return found, evidence
    if loss > evidence.loss_bar and min(shifted) < 0.5 * loss:
        which = "before" if shifted[0] < shifted[1] else "after"
        found.append(
            Finding(
                "label-shift", severity,
                f"these weights predict the level {which} the one that is asked for (loss {min(shifted):.2f}; {loss:.2f} on the "
                "pool's own levels): the training paired states with the wrong levels",
                numbers | {"loss_level_before": shifted[0], "loss_level_after": shifted[1]},
                "pair each state with the level chosen from it (windows.py cuts a pool that way), and train again",
            )
        )  # fmt: skip
    elif end is None:
        evidence = replace(evidence, training=replace(known, final_loss=loss))
    elif evidence.learned and loss > max(end + 0.3, 1.5 * end, evidence.loss_bar):
        found.append(
            Finding(
                "wrong-checkpoint", severity,
                f"the training ended at a loss of {end:.2f}, these weights have {loss:.2f} on the same pool: they are not the ones "
                "that it ended with, or the pool is another one",
                numbers,
                "test the checkpoint of the last epoch (--model-dir …_checkpoint/<last>), or give the training pool",
            )
        )  # fmt: skip
    return found, evidence


# --- findings ------------------------------------------------------------------------------------------------------------


def measured(evidence: Evidence, ablation: Ablation) -> list[Finding]:
    """Findings from the replay: every switch with what it is worth, judged by that."""
    found: list[Finding] = []
    for name in switched(ablation.subject):
        if name not in ablation.effects:
            continue
        effect = Effect.of(ablation.effects[name], f"replayed on {ablation.tables[name]['trace'].nunique()} traces")
        closes = _closes(evidence, ablation, name)
        what, _, fix = SWITCHES[name]
        before, after = (qoe.summarise(ablation.tables[key]).reward for key in (AS_RUN, name))
        verdict = " (noise: the interval holds zero)" if effect.noise else ""
        found.append(
            Finding(
                name,
                _judged(evidence, effect, closes),
                f"with {what}, the same weights get {after:.3f} instead of {before:.3f}{verdict}",
                {"as_run": before, "switched": after},
                fix,
                effect,
                closes,
            )
        )
    return found


def unexplained(evidence: Evidence, ablation: Ablation) -> list[Finding]:
    """A recorded test that neither its own settings nor any other that was tried gives again, and by how much it differs."""
    if ablation.too_short or ablation.same_levels is None or ablation.same_levels >= REPRODUCED:
        return []
    assert evidence.table is not None
    subject, replayed = ablation.subject, ablation.tables[AS_RUN]
    if _first_decisions_leak(evidence, ablation) or (subject.config is not None and subject.config.dropout):
        return []
    difference = paired(replayed, evidence.table)
    numbers: dict[str, Any] = {"same_levels": ablation.same_levels, "replayed": qoe.summarise(replayed).reward}
    if difference.excludes_zero and difference.mean > 0 and subject.config is not None:
        noisy = replace(subject, config=replace(subject.config, dropout=True, merge_lora=False))
        traces = list(dict.fromkeys(replayed["trace"]))
        again = replay(noisy, [], _simulator(evidence, len(traces)))
        left = paired(again, evidence.table)
        numbers["with_dropout"] = qoe.summarise(again).reward
        if abs(left.mean) < 0.5 * difference.mean:
            effect = Effect.of(difference, f"replayed without dropout on {len(traces)} traces")
            found = replace(ablation, tables=ablation.tables | {"dropout-on": replayed, AS_RUN: again})
            closes = _closes(evidence, found, "dropout-on")
            title = (
                f"the recorded levels look like those of a test with dropout: it gets {numbers['with_dropout']:.3f} on the same "
                f"traces, without {numbers['replayed']:.3f}"
            )
            return [
                Finding(
                    "dropout-on",
                    _judged(evidence, effect, closes),
                    title,
                    numbers,
                    SWITCHES["dropout-on"][2],
                    effect,
                    closes,
                )
            ]
    mean = qoe.summarise(evidence.table[evidence.table["trace"].isin(set(replayed["trace"]))]).reward
    effect = Effect.of(difference, f"these weights, tested as recorded, on {replayed['trace'].nunique()} traces")
    closes = _closes(
        evidence, replace(ablation, tables={AS_RUN: evidence.table, "wrong-checkpoint": replayed}), "wrong-checkpoint"
    )
    return [
        Finding(
            "wrong-checkpoint",
            "cause" if evidence.failing and closes else "suspect" if difference.excludes_zero else "note",
            f"these weights, tested as recorded, choose {ablation.same_levels:.0%} of the recorded levels and get "
            f"{numbers['replayed']:.3f}, not {mean:.3f}: the results come from other weights or another test",
            numbers,
            "test again with these weights, in a process of its own and with an empty result folder",
            effect,
            closes,
        )
    ]


def _first_decisions_leak(evidence: Evidence, ablation: Ablation) -> bool:
    """A test in the process that trained begins with a context that no file holds: then only its beginning differs."""
    assert evidence.table is not None
    return (
        ablation.subject.config is not None
        and ablation.subject.config.context == "leak"
        and (ablation.same_levels or 0) > 0.7
    )


def _judged(evidence: Evidence, effect: Effect, closes: bool) -> Severity:
    if effect.noise or effect.mean < 0:
        return "note"
    if not evidence.failing:
        return "suspect" if effect.mean > 0.02 else "note"
    gap = abs(evidence.gap.mean) if evidence.gap is not None else float("inf")
    return "cause" if closes or (evidence.learned is not False and effect.mean > 0.25 * gap) else "suspect"


def _closes(evidence: Evidence, ablation: Ablation, name: str) -> bool:
    """Does this switch alone bring the weights to the reference, or nearly (nine tenths of the gap)?"""
    if not evidence.failing or evidence.reference is None:
        return False
    reference = evidence.tables[evidence.reference]
    left = paired(ablation.tables[name], reference)
    before = paired(ablation.tables[AS_RUN], reference)
    return before.mean < 0 and (left.mean > 0.1 * before.mean or not left.high < 0)


def policies(evidence: Evidence) -> dict[str, EvalConfig]:
    """The test's configuration as run and sound, by name; empty where the run cannot be replayed."""
    if evidence.subject is None or evidence.subject.config is None:
        return {}
    return {
        AS_RUN: evidence.subject.config,
        ALL_SOUND: variant(evidence.subject, switched(evidence.subject), cached=True).config,
    }
