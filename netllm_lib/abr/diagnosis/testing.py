"""Rules on the test: what its table of chunks shows, and whether it was made as the baselines' were."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from netllm_lib import training_rules
from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.decisions import trace_gaps
from netllm_lib.abr.diagnosis.evidence import Evidence, paired
from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.findings import Verdict, rule, verdict
from netllm_lib.stats import Interval
from netllm_lib.training_run import TrainingRun

LONG_STALL_S = 1.0


@rule("non-finite", fix=training_rules.non_finite.fix, figure="losses")
def non_finite(evidence: Evidence) -> Verdict | None:
    """Losses, weights, states and rewards are finite numbers."""
    if (problem := evidence.problems.get("non-finite")) is not None:
        return Verdict(evidence.broken, problem)
    if evidence.weights is not None and (bad := evidence.weights.not_finite):
        title = "{tensors} tensors of the checkpoint hold NaN or infinity, {first} first"
        return verdict("cause", title, tensors=len(bad), first=bad[0])
    if evidence.table is not None:
        numbers = evidence.table[["reward", "delay_ms", "rebuffer_s", "buffer_s"]].to_numpy()
        if count := int((~np.isfinite(numbers)).any(axis=1).sum()):
            return verdict("cause", "{chunks} chunks of the results hold NaN or infinity", chunks=count)
    return None if evidence.training is None else training_rules.non_finite.judge(evidence, evidence.training)


# --- was it measured as the baselines were? ------------------------------------------------------------------------------


@rule(
    "protocol-mismatch",
    fix="play run and baselines over the same traces, in fixed order, with an empty result folder (notebook 05)",
    symptom=True,
)
def protocol_mismatch(evidence: Evidence) -> Verdict | None:
    """Run and baselines are means over the same traces, chunks and conditions."""
    if (problem := evidence.problems.get("protocol-mismatch")) is not None:
        return Verdict(evidence.broken, problem)
    if (table := evidence.table) is None:
        return None
    mixed, other = list(_mixed(evidence, table)), list(_other_conditions(evidence, table))
    found = [*mixed, *other] or list(_other_outcomes(evidence, table))
    if not found:
        return None
    strong = (evidence.failing or mixed) and evidence.learned is not False
    title = "the results cannot be compared with the baselines: {differences}"
    return verdict("cause" if strong else "suspect", title, differences="; ".join(found))


def _mixed(evidence: Evidence, table: pd.DataFrame) -> Iterator[str]:
    """Traces that are not whole, too few, or of several tests."""
    groups = table.groupby("trace", sort=False)
    lengths, expected = groups.size(), evidence.setting.get("trace_num")
    bad = lengths[lengths != CHUNKS]
    if len(bad):
        yield f"{len(bad)} of {len(lengths)} traces have not {CHUNKS} chunks (the first: {bad.iloc[0]})"
    if repeated := int(table.duplicated(["trace", "chunk"]).sum()):
        yield f"{repeated} chunks occur twice: results of two runs are mixed"
    if isinstance(expected, int) and expected > 0 and expected != len(lengths):
        yield f"{len(lengths)} traces are there, the settings say {expected}"
    if evidence.setting.get("original"):  # its clock runs on over all traces of a test
        begins = (groups["time_s"].first() - groups["delay_ms"].first() / 1000).to_numpy()
        if overlaps := int((begins[1:] < groups["time_s"].last().to_numpy()[:-1] - 1.0).sum()):
            yield f"{overlaps} traces begin before the one before has ended: results of several tests are mixed"


def _other_conditions(evidence: Evidence, table: pd.DataFrame) -> Iterator[str]:
    first = table.loc[table["chunk"] == 0, "level"]
    if (share := float((first != FIRST_LEVEL).mean())) > 0:
        yield f"{share:.0%} of the traces do not begin with level {FIRST_LEVEL}"
    if evidence.reference is not None:
        ours, theirs = set(table["trace"]), set(evidence.tables[evidence.reference]["trace"])
        if ours != theirs:
            yield f"run and {evidence.reference} share {len(ours & theirs)} of {len(ours)} and {len(theirs)} traces"


def _other_outcomes(evidence: Evidence, table: pd.DataFrame) -> Iterator[str]:
    """Does the simulator, given the table's levels, reproduce its sizes and delays?"""
    if evidence.played is None or evidence.played[1].start_ptrs is None:
        return
    _, traces, video = evidence.played
    names = list(dict.fromkeys(table["trace"]))
    index = np.array([traces.names.index(name) for name in names])
    starts = np.asarray(traces.start_ptrs)[index]
    episodes = Episodes(index, starts, None, np.ones((len(index), CHUNKS), dtype=np.int64), 0, True)
    level, size, delay = (table[name].to_numpy().reshape(-1, CHUNKS) for name in ("level", "size_bytes", "delay_ms"))
    outcome = Simulator(traces, video, episodes).replay(level)
    if not np.array_equal(size, outcome.size_bytes):
        larger = (size / outcome.size_bytes)[:, 1:].mean()
        yield f"its chunks are {larger:.2f} times as large as {video.name}'s"
    elif not (same := np.isclose(delay, outcome.delay_ms, rtol=1e-6)).all():
        yield f"only {same.mean():.0%} of its delays follow from traces, video and starting points (noise, or other traces)"


# --- how it shows --------------------------------------------------------------------------------------------------------


@rule(
    "level-collapse",
    fix="the policy does not react to its state: see the training, and whether the adapter acts",
    figure="levels",
    symptom=True,
)
def level_collapse(evidence: Evidence, table: pd.DataFrame) -> Verdict | None:
    """No level takes more than 90 % of the chunks, and levels do not only repeat."""
    shares = qoe.chosen(table)["level"].value_counts(normalize=True)
    share, stay = float(shares.iloc[0]), _repeats(table)
    of_reference = _repeats(evidence.tables[evidence.reference]) if evidence.reference else 0.0
    if share > 0.9:
        title = "{share:.0%} of all chunks are level {level}"
    elif stay > 0.98 and of_reference < 0.95:
        title = "{repeats:.0%} of all chunks repeat the level before"
    else:
        return None
    numbers = {"level": int(shares.index[0]), "share": share, "repeats": stay, "repeats_of_reference": of_reference}
    return verdict(evidence.severity(), title, **numbers)


def _repeats(table: pd.DataFrame) -> float:
    """Share of the chosen chunks that repeat the level before."""
    levels = table["level"].to_numpy()
    return float((levels[1:] == levels[:-1])[table["chunk"].to_numpy()[1:] > 0].mean())


@rule(
    "rare-bad-actions",
    fix="look at the decisions before the stalls (the costliest ones are in notebook 06); test by argmax; train longer",
    figure="stalls",
    symptom=True,
)
def rare_bad_actions(evidence: Evidence, table: pd.DataFrame, reference: str) -> Verdict | None:
    """Long stalls cost at most .05 more than the reference's."""
    ours, theirs = (qoe.chosen(t)["rebuffer_s"] for t in (table, evidence.tables[reference]))
    cost, other = (float(qoe.REBUFFER_PENALTY * s[s > LONG_STALL_S].sum() / len(s)) for s in (ours, theirs))
    if cost - other <= 0.05:
        return None
    title = (
        "stalls of over a second cost {cost:.3f} of the mean reward, {more:.3f} more than {reference}'s, in {share:.2%} of the "
        "chunks"
    )
    numbers = {"cost": cost, "more": cost - other, "share": float((ours > LONG_STALL_S).mean()), "reference": reference}
    return verdict("suspect" if evidence.failing else "note", title, **numbers)


@rule("gap", fix="look at the timelines of the worst traces (notebook 06)", figure="differences", symptom=True)
def gap(evidence: Evidence, table: pd.DataFrame, reference: str, gap: Interval) -> Verdict | None:
    """The paired interval of run − reference does not lie below zero."""
    if not evidence.failing:
        return None
    parts = trace_gaps(table, evidence.tables[reference])
    lost = {name: float(-parts[name].mean()) for name in ("quality", "rebuffering", "smoothness")}
    most, worst = max(lost, key=lambda name: lost[name]), parts["reward"]
    title = "{below:.3f} below {reference}, mostly {most} ({lost:.3f}); the five worst traces hold {in_worst:.0%} of it"
    said = {"below": -gap.mean, "reference": reference, "most": most, "lost": lost[most], "gap": list(gap), **lost}
    return verdict(
        "suspect", title, in_worst=worst.head(5).sum() / worst.sum(), worst_traces=list(worst.index[:5]), **said
    )


# --- what may be claimed -------------------------------------------------------------------------------------------------


@rule("too-few-traces", fix="play more traces or seeds before calling one of them better", figure="differences")
def too_few_traces(evidence: Evidence, table: pd.DataFrame, reward: Interval) -> Verdict | None:
    """A difference is called one only when its interval holds no zero."""
    others = {name: other for name, other in evidence.tables.items() if name != evidence.run}
    unclear = [name for name, other in others.items() if not paired(table, other).excludes_zero]
    if not unclear:
        return None
    title = "{traces} traces cannot tell the run from {undecided}: the paired intervals hold zero"
    return verdict("note", title, traces=table["trace"].nunique(), undecided=", ".join(unclear))


@rule(
    "test-leakage",
    fix="judge by the paired difference on the clean traces too; a run tested on its own training traces shows memory only",
    figure="overlap",
)
def test_leakage(evidence: Evidence, clean: np.ndarray) -> Verdict | None:
    """No test trace shares content with a training trace."""
    if clean.all():
        return None
    overlapping, others = int((~clean).sum()), int(clean.sum())
    rewards = np.empty(0) if evidence.table is None else qoe.per_trace(evidence.table)["reward"].to_numpy()
    mean = float(rewards[clean].mean()) if others and len(rewards) == len(clean) else None
    title = f"{{overlapping}} of {len(clean)} test traces share content with the training traces"
    title += "" if mean is None else "; mean reward on the {clean} others: {clean_mean:.3f}"
    return verdict("note", title, overlapping=overlapping, clean=others, clean_mean=mean)


@rule("selected-on-test", fix="choose on validation traces cut from the training set (notebook 04 does)")
def selected_on_test(evidence: Evidence, training: TrainingRun) -> Verdict | None:
    """The checkpoint was chosen on other traces than those of the test."""
    title = "the checkpoint was chosen by its reward on the test traces: its mean reward is too good by what that choice gained"
    return Verdict("note", title) if training.selected_on_test else None
