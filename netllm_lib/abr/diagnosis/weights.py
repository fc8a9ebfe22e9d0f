"""Rules on the weights and how the test used them: from its settings, and from what playing it again showed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import SWITCHES, Evidence, paired
from netllm_lib.abr.diagnosis.replay import AS_RUN
from netllm_lib.findings import SEVERITIES, Effect, Rule, Severity, Verdict, rule, verdict


def switched(evidence: Evidence, name: str, fix: str = "") -> Verdict | None:
    """What turning the switch `name` alone changed when the test was played again, or at least that the test was played without
    it; None where neither is known."""
    replayed = evidence.replayed
    if replayed is None or evidence.subject is None:
        return None
    if (change := replayed.effect(name)) is None:
        hidden = name in replayed.subject.off and name not in evidence.subject.off
        title = "the recorded levels come back only without this: {sound}"
        found = verdict("suspect" if evidence.failing else "note", title, sound=SWITCHES[name][0])
        return replace(found, fix=fix) if hidden else None
    as_run, sound = replayed.tables[AS_RUN], replayed.tables[name]
    effect = Effect(*change, f"replayed on {sound['trace'].nunique()} traces")
    noise = " (noise: the interval holds zero)" if effect.noise else ""
    numbers = {"as_run": qoe.summarise(as_run).reward, "switched": qoe.summarise(sound).reward}
    title = f"with {SWITCHES[name][0]}, the same weights get {numbers['switched']:.3f} instead of {numbers['as_run']:.3f}{noise}"
    closes = closes_gap(evidence, as_run, sound)
    return Verdict(_judged_by(evidence, effect, closes), title, numbers, fix, effect, closes)


def _judged_by(evidence: Evidence, effect: Effect, closes: bool) -> Severity:
    """The severity of a mistake whose effect was measured."""
    if effect.noise or effect.mean < 0:
        return "note"
    if not evidence.failing:
        return "suspect" if effect.mean > 0.02 else "note"
    large = evidence.gap is not None and effect.mean > 0.25 * abs(evidence.gap.mean)
    return "cause" if closes or (large and evidence.learned is not False) else "suspect"


def closes_gap(evidence: Evidence, before: pd.DataFrame, after: pd.DataFrame) -> bool:
    """Does a change from one table to the other bring the run to its reference, or nearly (nine tenths of the gap)?"""
    if not evidence.failing or evidence.reference is None:
        return False
    reference = evidence.tables[evidence.reference]
    gap, left = paired(before, reference), paired(after, reference)
    return gap.mean < 0 and (left.mean > 0.1 * gap.mean or not left.high < 0)


@rule("adapter-not-applied", fix="test with the adapter that was trained on this PLM")
def adapter_not_applied(evidence: Evidence) -> Verdict | None:
    """A trained adapter is there, fits its PLM, and changes its output (LoRA's B is not zero)."""
    if (problem := evidence.problems.get("adapter-not-applied")) is not None:
        return Verdict(evidence.broken, problem)
    if evidence.weights is not None and evidence.weights.no_adapter:
        title = "LoRA's B matrices are all zero: the adapter adds nothing to the PLM"
        fix = "test the folder that the training wrote last, and check that LoRA was trained (rank, target_modules)"
        return Verdict(evidence.broken, title, {"lora_b_nonzero": 0}, fix)
    fix = "load the adapter before the test: the recorded levels are those of the PLM without it"
    return switched(evidence, "adapter-not-applied", fix)


@rule("wrong-checkpoint", fix="test the best model (in the original --model-dir …_best_model)", figure="losses")
def wrong_checkpoint(evidence: Evidence) -> Verdict | None:
    """The checkpoint predicts its pool as well as its training did at the end, and replays the recorded levels."""
    if (problem := evidence.problems.get("wrong-checkpoint")) is not None:
        fix = "test the checkpoint of this run: family, hidden size, rank and layers must fit"
        return Verdict(evidence.broken, problem, fix=fix)
    found = [_of_another_loss(evidence), switched(evidence, "wrong-checkpoint"), _not_replayed(evidence)]
    said = [verdict for verdict in found if verdict is not None]
    return min(said, key=lambda verdict: (SEVERITIES.index(verdict.severity), not verdict.closes), default=None)


def _of_another_loss(evidence: Evidence) -> Verdict | None:
    end = evidence.training.end_loss() if evidence.training else None
    loss = evidence.weights.loss if evidence.weights else None
    if end is None or loss is None or not evidence.learned or loss <= max(end + 0.3, 1.5 * end, evidence.loss_bar):
        return None
    title = (
        f"the training ended at a loss of {end:.2f}, these weights have {loss:.2f} on the same pool: they are not the ones that it "
        "ended with, or the pool is another one"
    )
    fix = "test the checkpoint of the last epoch (--model-dir …_checkpoint/<last>), or give the training pool"
    numbers = {"training_loss": end, "checkpoint_loss": loss, "loss_bar": evidence.loss_bar}
    return Verdict(evidence.broken, title, numbers, fix)


def _not_replayed(evidence: Evidence) -> Verdict | None:
    """A recorded test that these weights do not give again, whatever the settings."""
    replayed, table = evidence.replayed, evidence.table
    if replayed is None or table is None or not replayed.unexplained:
        return None
    again = replayed.tables[AS_RUN]
    recorded = table[table["trace"].isin(set(again["trace"]))]
    numbers = {"same_levels": replayed.same_levels, "replayed": qoe.summarise(again).reward}
    title = (
        f"these weights, tested as recorded, choose {replayed.same_levels:.0%} of the recorded levels and get "
        f"{numbers['replayed']:.3f}, not {qoe.summarise(recorded).reward:.3f}: the results come from other weights or another test"
    )
    how = f"these weights, tested as recorded, on {again['trace'].nunique()} traces"
    effect, closes = Effect(*paired(again, recorded), how), closes_gap(evidence, recorded, again)
    severity: Severity = "cause" if evidence.failing and closes else "note" if effect.noise else "suspect"
    severity = "suspect" if replayed.too_short else severity  # a few traces do not prove it
    fix = "test again with these weights, in a process of its own and with an empty result folder"
    return Verdict(severity, title, numbers, fix, effect, closes)


# --- settings of the test -----------------------------------------------------------------------------------------------

Off = tuple[str, dict[str, Any]] | None  # a setting that is not sound, in words and numbers


def switch(id: str, fix: str, habit: bool = False) -> Callable[[Callable[[Evidence], Off]], Rule]:
    """Make a rule of a function that says whether a setting of the test is off: judged by the measured effect, or, where nothing
    was measured, by the setting alone. `habit`: the original does so, and lives with it."""

    def made(off: Callable[[Evidence], Off]) -> Rule:
        @functools.wraps(off)
        def judge(evidence: Evidence) -> Verdict | None:
            measured = switched(evidence, id)
            if measured is not None or (found := off(evidence)) is None:
                return measured
            costs = evidence.failing and not (habit and evidence.setting.get("original"))
            return Verdict("suspect" if costs else "note", *found)

        return rule(id, fix=fix, figure="waterfall")(judge)

    return made


def setting_is(evidence: Evidence, name: str, value: object, title: str) -> Off:
    """Off where the setting `name` of the test has that value."""
    return (title, {name: value}) if evidence.setting.get(name) == value else None


@switch("sampling", fix='choose the most probable level (EvalConfig.choose = "argmax")', habit=True)
def sampling(evidence: Evidence) -> Off:
    """Levels are the most probable ones, not drawn at random."""
    return setting_is(evidence, "choose", "sample", "the levels were drawn from the policy's probabilities")


@switch(
    "dropout-on",
    fix="test in evaluation mode (EvalConfig.dropout = False; the original: --test in a process of its own)",
)
def dropout_on(evidence: Evidence) -> Off:
    """Dropout is off in a test."""
    return setting_is(evidence, "dropout", True, "dropout was on in the test")


@switch("context-leak", fix='clear the context between traces (EvalConfig.context = "clear")', habit=True)
def context_leak(evidence: Evidence) -> Off:
    """The context is cleared between traces."""
    return setting_is(evidence, "context", "leak", "each trace began with the end of the previous one in its context")


@switch("window-mismatch", fix="test with the window of the training (EvalConfig.w = None; in the original --w)")
def window_mismatch(evidence: Evidence) -> Off:
    """A test sees as many steps as training did."""
    w, trained = evidence.setting.get("w"), evidence.recipe.w
    if None in (w, trained) or w == trained:
        return None
    return f"the test saw {w} steps, the training {trained}", {"w": w, "train_w": trained}


@switch("target-return", fix="ask for what was seen in training (target_return_scale = 1)")
def target_return(evidence: Evidence) -> Off:
    """The test asks for the training pool's largest return (target_return_scale = 1)."""
    scale = evidence.setting.get("target_return_scale", 1)
    title = f"the test asked for {scale:g} times the training pool's largest return"
    return None if scale == 1 else (title, {"target_return_scale": scale})


@switch("wrong-pool", fix="give the test the training pool (in the original --exp-pool-path; our checkpoints hold it)")
def wrong_pool(evidence: Evidence) -> Off:
    """Target return and reward range at test are those of the training pool."""
    trained, tested = evidence.pool, evidence.test_pool
    if trained is None or tested is None or trained.content_hash() == tested.content_hash():
        return None
    pools = {"training_range": trained, "test_range": tested}
    numbers = {name: [pool.rewards.min(), pool.rewards.max()] for name, pool in pools.items()}
    return "the test took target return and reward range from another pool than the training's", numbers
