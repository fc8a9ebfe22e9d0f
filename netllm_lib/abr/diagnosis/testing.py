"""Rules on the test: what its table of chunks shows, and whether it was made as the baselines' were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from netllm_lib import training_rules
from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.decisions import trace_gaps
from netllm_lib.abr.diagnosis.evidence import ORIGINAL, Evidence, paired
from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.findings import Verdict, rule
from netllm_lib.stats import Interval
from netllm_lib.training_run import TrainingRun

LONG_STALL_S = 1.0


@rule("non-finite", fix=training_rules.non_finite.fix, figure="losses")
def non_finite(evidence: Evidence) -> Verdict | None:
    """Losses, weights, states and rewards are finite numbers."""
    if (problem := evidence.problems.get("non-finite")) is not None:
        return Verdict(evidence.broken, problem)
    if evidence.weights is not None and (bad := evidence.weights.not_finite):
        title = f"{len(bad)} tensors of the checkpoint hold NaN or infinity, {bad[0]} first"
        return Verdict("cause", title, {"tensors": len(bad)})
    if evidence.table is not None:
        numbers = evidence.table[["reward", "delay_ms", "rebuffer_s", "buffer_s"]].to_numpy()
        if count := int((~np.isfinite(numbers)).any(axis=1).sum()):
            return Verdict("cause", f"{count} chunks of the results hold NaN or infinity", {"chunks": count})
    training = evidence.training
    return None if training is None else training_rules.non_finite.judge(evidence, training)


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
    title = f"the results cannot be compared with the baselines: {'; '.join(words for words, _ in found)}"
    return Verdict("cause" if strong else "suspect", title, {k: v for _, numbers in found for k, v in numbers.items()})


Differences = Iterator[tuple[str, dict[str, Any]]]  # in words, and the numbers


def _mixed(evidence: Evidence, table: pd.DataFrame) -> Differences:
    """Traces that are not whole, too few, or of several tests."""
    groups = table.groupby("trace", sort=False)
    lengths, expected = groups.size(), evidence.setting.get("trace_num")
    bad = lengths[lengths != CHUNKS]
    if len(bad):
        words = f"{len(bad)} of {len(lengths)} traces have not {CHUNKS} chunks (the first: {bad.iloc[0]})"
        yield words, {"episodes_of_other_length": len(bad)}
    if repeated := int(table.duplicated(["trace", "chunk"]).sum()):
        yield f"{repeated} chunks occur twice: results of two runs are mixed", {"repeated_chunks": repeated}
    if isinstance(expected, int) and expected > 0 and expected != len(lengths):
        numbers = {"traces": len(lengths), "expected": expected}
        yield f"{len(lengths)} traces are there, the settings say {expected}", numbers
    if evidence.setting.get("original"):  # its clock runs on over all traces of a test
        begins = (groups["time_s"].first() - groups["delay_ms"].first() / 1000).to_numpy()
        if overlaps := int((begins[1:] < groups["time_s"].last().to_numpy()[:-1] - 1.0).sum()):
            words = f"{overlaps} traces begin before the one before has ended: results of several tests are mixed"
            yield words, {"overlapping_traces": overlaps}


def _other_conditions(evidence: Evidence, table: pd.DataFrame) -> Differences:
    first = table.loc[table["chunk"] == 0, "level"]
    if (other := first[first != FIRST_LEVEL]).size:
        words = f"{len(other) / len(first):.0%} of the traces do not begin with level {FIRST_LEVEL}"
        yield words, {"first_level": int(other.iloc[0])}
    if evidence.reference is not None:
        ours, theirs = set(table["trace"]), set(evidence.tables[evidence.reference]["trace"])
        if ours != theirs:
            both = len(ours & theirs)
            words = f"run and {evidence.reference} share {both} of {len(ours)} and {len(theirs)} traces"
            yield words, {"traces_in_common": both}


def _other_outcomes(evidence: Evidence, table: pd.DataFrame) -> Differences:
    """Does the simulator, given the table's levels, reproduce its delays? If not, what differs."""
    traces, video, names = evidence.traces, evidence.video, list(dict.fromkeys(table["trace"]))
    if traces is None or video is None or traces.start_ptrs is None or not set(names) <= set(traces.names):
        return
    index = np.array([traces.names.index(name) for name in names])
    starts = np.asarray(traces.start_ptrs)[index]
    episodes = Episodes(index, starts, None, np.ones((len(index), CHUNKS), dtype=np.int64), 0, True)
    level, size, delay = (
        table[name].to_numpy().reshape(len(names), CHUNKS) for name in ("level", "size_bytes", "delay_ms")
    )
    outcome = Simulator(traces, video, episodes).replay(level)
    if not np.array_equal(size, outcome.size_bytes):
        larger = float((size / outcome.size_bytes)[:, 1:].mean())
        yield f"its chunks are {larger:.2f} times as large as {video.name}'s", {"size_ratio": larger}
        return
    same = float(np.isclose(delay, outcome.delay_ms, rtol=1e-6).mean())
    if same == 1:
        return
    ratio = delay[:, 0] / outcome.delay_ms[:, 0]  # the first chunk starts at a known place
    low, high = float(ratio.min()), float(ratio.max())
    words = f"only {same:.0%} of its delays follow from traces, video and starting points"
    if low > 0.89 and high < 1.11 and not np.allclose(ratio, 1):
        words = f"its delays hold noise (factors {low:.2f} to {high:.2f}), the baselines' do not"
    yield words, {"same_delays": same, "first_delay_ratio": [low, high]}


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
    level, share, stay = int(shares.index[0]), float(shares.iloc[0]), _stay(table)
    reference = _stay(evidence.tables[evidence.reference]) if evidence.reference else 0.0
    if share > 0.9:
        title = f"{share:.0%} of all chunks are level {level}"
    elif stay > 0.98 and reference < 0.95:
        title = f"{stay:.0%} of all chunks repeat the level before"
    else:
        return None
    numbers = {"level": level, "share": share, "repeats": stay, "repeats_of_reference": reference}
    return Verdict(evidence.severity(), title, numbers)


def _stay(table: pd.DataFrame) -> float:
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
    long = {name: qoe.chosen(t)["rebuffer_s"] for name, t in (("ours", table), ("theirs", evidence.tables[reference]))}
    cost = {k: float(qoe.REBUFFER_PENALTY * s[s > LONG_STALL_S].sum() / len(s)) for k, s in long.items()}
    more, share = cost["ours"] - cost["theirs"], float((long["ours"] > LONG_STALL_S).mean())
    if more <= 0.05:
        return None
    title = (
        f"stalls of over a second cost {cost['ours']:.3f} of the mean reward, {more:.3f} more than {reference}'s, in "
    )
    title += f"{share:.2%} of the chunks"
    numbers = {"cost": cost["ours"], "reference_cost": cost["theirs"], "share": share}
    return Verdict("suspect" if evidence.failing else "note", title, numbers)


@rule("gap", fix="look at the timelines of the worst traces (notebook 06)", figure="differences", symptom=True)
def gap(evidence: Evidence, table: pd.DataFrame, reference: str, gap: Interval) -> Verdict | None:
    """The paired interval of run − reference does not lie below zero."""
    if not evidence.failing:
        return None
    parts = trace_gaps(table, evidence.tables[reference])
    lost = {name: float(-parts[name].mean()) for name in ("quality", "rebuffering", "smoothness")}
    largest, worst = max(lost, key=lambda name: lost[name]), parts["reward"]
    title = (
        f"{-gap.mean:.3f} below {reference}, mostly {largest} ({lost[largest]:.3f}); the five worst traces hold "
        f"{worst.head(5).sum() / worst.sum():.0%} of it"
    )
    numbers = {"gap": list(gap), "reference": reference, **lost, "worst_traces": list(worst.index[:5])}
    return Verdict("suspect", title, numbers)


# --- what may be claimed -------------------------------------------------------------------------------------------------


@rule("too-few-traces", fix="play more traces or seeds before calling one of them better", figure="differences")
def too_few_traces(evidence: Evidence, table: pd.DataFrame, reward: Interval) -> Verdict | None:
    """A difference is called one only when its interval holds no zero."""
    others = {name: other for name, other in evidence.tables.items() if name != evidence.run}
    unclear = [name for name, other in others.items() if not paired(table, other).excludes_zero]
    if not unclear:
        return None
    count = table["trace"].nunique()
    title = f"{count} traces cannot tell the run from {', '.join(unclear)}: the paired intervals hold zero"
    return Verdict("note", title, {"undecided": unclear, "traces": count})


@rule(
    "handicapped-baseline",
    fix="compare with the sound baseline too, not with the published one only",
    figure="differences",
)
def handicapped_baseline(evidence: Evidence) -> Verdict | None:
    """A baseline plays its own algorithm."""
    tables, better = evidence.tables, {}
    for name in tables:
        sound = name.removesuffix(ORIGINAL)
        if sound != name and sound in tables and (difference := paired(tables[sound], tables[name])).low > 0:
            better[name] = difference
    title = "; ".join(
        f"{name} as published plays below its own algorithm: without the original's mistakes it is {difference.mean:+.3f} better"
        for name, difference in better.items()
    )
    return Verdict("note", title, {name: list(difference) for name, difference in better.items()}) if better else None


@rule(
    "test-leakage",
    fix="judge by the paired difference on the clean traces too; a run tested on its own training traces shows memory only",
    figure="overlap",
)
def test_leakage(evidence: Evidence, clean: np.ndarray) -> Verdict | None:
    """No test trace shares content with a training trace."""
    if clean.all():
        return None
    numbers: dict[str, Any] = {"overlapping": int((~clean).sum()), "clean": int(clean.sum())}
    rewards = np.empty(0) if evidence.table is None else qoe.per_trace(evidence.table)["reward"].to_numpy()
    on_clean = ""
    if clean.any() and len(rewards) == len(clean):
        numbers["clean_mean"] = float(rewards[clean].mean())
        on_clean = f"; mean reward on the {clean.sum()} others: {numbers['clean_mean']:.3f}"
    title = f"{(~clean).sum()} of {len(clean)} test traces share content with the training traces{on_clean}"
    return Verdict("note", title, numbers)


@rule("selected-on-test", fix="choose on validation traces cut from the training set (notebook 04 does)")
def selected_on_test(evidence: Evidence, training: TrainingRun) -> Verdict | None:
    """The checkpoint was chosen on other traces than those of the test."""
    if not training.selected_on_test:
        return None
    title = "the checkpoint was chosen by its reward on the test traces: its mean reward is too good by what that choice gained"
    return Verdict("note", title, {"selected_on": evidence.setting.get("traces")})
