"""Rules on the test: what the table of chunks shows, and whether it was made as the baselines' were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import Evidence, chunks_per_trace, paired
from netllm_lib.abr.episodes import FIRST_LEVEL, Episodes
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import CHUNKS, TraceSet, Video
from netllm_lib.findings import Finding, Severity

LONG_STALL_S = 1.0


def testing(evidence: Evidence) -> list[Finding]:
    """Findings about the test, from its table and its settings."""
    found = [*_settings(evidence), *_selection(evidence), *_leakage(evidence)]
    if evidence.table is not None:
        found += [*_finite(evidence), *_protocol(evidence), *_levels(evidence), *_stalls(evidence), *_gap(evidence)]
        found += [*_handicapped(evidence), *_undecided(evidence)]
    return found


def _finite(evidence: Evidence) -> list[Finding]:
    table = evidence.table
    assert table is not None
    columns = table[["reward", "delay_ms", "rebuffer_s", "buffer_s"]].to_numpy()
    if np.isfinite(columns).all():
        return []
    bad = int((~np.isfinite(columns)).any(axis=1).sum())
    return [
        Finding(
            "non-finite",
            "cause",
            f"{bad} chunks of the results hold NaN or infinity",
            {"chunks": bad},
            "play the test again",
        )
    ]


def _settings(evidence: Evidence) -> list[Finding]:
    """Switches of the test that are known from its settings and were not measured by replaying it."""
    found, known = [], evidence.setting
    mild: Severity = "suspect" if evidence.failing else "note"
    if known.get("choose") == "sample":
        found.append(
            Finding(
                "sampling", "note" if known.get("original") else mild, "the levels were drawn from the policy's probabilities",
                {"choose": "sample"},
                'choose the most probable level (EvalConfig.choose = "argmax")',
            )
        )  # fmt: skip
    if known.get("context") == "leak":
        found.append(
            Finding(
                "context-leak", "note", "each trace began with the end of the previous one in its context", {"context": "leak"},
                'clear the context between traces (EvalConfig.context = "clear")',
            )
        )  # fmt: skip
    if known.get("dropout"):
        found.append(
            Finding(
                "dropout-on", mild, "dropout was on in the test", {"dropout": known["dropout"]},
                "test in evaluation mode (EvalConfig.dropout = False; in the original --test alone, not --adapt --test)",
            )
        )  # fmt: skip
    w, trained = known.get("w"), known.get("train_w")
    if w is not None and trained is not None and int(w) != int(trained):
        found.append(
            Finding(
                "window-mismatch", mild, f"the test saw {w} steps, the training {trained}", {"w": w, "train_w": trained},
                f"test with the window of the training (EvalConfig.w = None; in the original --w {trained})",
            )
        )  # fmt: skip
    scale = known.get("target_return_scale")
    if scale is not None and float(scale) != 1.0:
        found.append(
            Finding(
                "target-return", mild, f"the test asked for {float(scale):g} times the training pool's largest return",
                {"target_return_scale": float(scale)}, "ask for what was seen in training (target_return_scale = 1)",
            )
        )  # fmt: skip
    if evidence.test_pool is not None and evidence.pool is not None:
        ours, given = evidence.pool.content_hash(), evidence.test_pool.content_hash()
        if ours != given:
            found.append(
                Finding(
                    "wrong-pool",
                    mild,
                    "the test took target return and reward range from another pool than the training's",
                    {
                        "training_pool": ours,
                        "test_pool": given,
                        "training_range": [float(evidence.pool.rewards.min()), float(evidence.pool.rewards.max())],
                        "test_range": [
                            float(evidence.test_pool.rewards.min()),
                            float(evidence.test_pool.rewards.max()),
                        ],
                    },
                    "give the test the training pool (in the original --exp-pool-path; checkpoints of the companion hold it)",
                )
            )
    return found


# --- was it measured as the baselines were? ------------------------------------------------------------------------------


def _protocol(evidence: Evidence) -> list[Finding]:
    table = evidence.table
    assert table is not None
    numbers: dict[str, Any] = {}
    words = []
    lengths = chunks_per_trace(table)
    if bad := int((lengths != CHUNKS).sum()):
        numbers["episodes_of_other_length"] = bad
        words.append(
            f"{bad} of {len(lengths)} traces have not {CHUNKS} chunks (the first: {int(lengths[lengths != CHUNKS].iloc[0])})"
        )
    if repeated := int(table.duplicated(["trace", "chunk"]).sum()):
        numbers["repeated_chunks"] = repeated
        words.append(f"{repeated} chunks occur twice: results of two runs are mixed")
    expected = evidence.setting.get("trace_num")
    if isinstance(expected, int) and expected > 0 and expected != len(lengths):
        numbers |= {"traces": len(lengths), "expected": expected}
        words.append(f"{len(lengths)} traces are there, the settings say {expected}")
    if (first := table[table["chunk"] == 0]["level"]) is not None and len(first) and (first != FIRST_LEVEL).any():
        numbers["first_level"] = int(first[first != FIRST_LEVEL].iloc[0])
        words.append(f"{(first != FIRST_LEVEL).mean():.0%} of the traces do not begin with level {FIRST_LEVEL}")
    if evidence.setting.get("original") and (overlaps := _overlaps(table)):
        numbers["overlapping_traces"] = overlaps
        words.append(f"{overlaps} traces begin before the one before has ended: results of several tests are mixed")
    reference = evidence.tables.get(evidence.reference) if evidence.reference else None
    if reference is not None:
        ours, theirs = set(table["trace"]), set(reference["trace"])
        if ours != theirs:
            numbers["traces_in_common"] = len(ours & theirs)
            words.append(
                f"run and {evidence.reference} share {len(ours & theirs)} of {len(ours)} and {len(theirs)} traces"
            )
    if not words and evidence.traces is not None and evidence.video is not None:
        words, numbers = _replayed(table, evidence.traces, evidence.video)
    if not words:
        return []
    strong = evidence.failing or bool(
        numbers.keys() & {"repeated_chunks", "episodes_of_other_length", "expected", "overlapping_traces"}
    )
    return [
        Finding(
            "protocol-mismatch",
            "cause" if strong and evidence.learned is not False else "suspect",
            f"the results cannot be compared with the baselines: {'; '.join(words)}",
            numbers,
            "play run and baselines over the same traces, in fixed order, with an empty result folder (notebook 05)",
        )
    ]


def _overlaps(table: pd.DataFrame) -> int:
    """Traces that begin before the one before has ended, by the original's clock, which runs on over all traces of a test."""
    clock = table.groupby("trace", sort=False)
    begins = clock["time_s"].first() - clock["delay_ms"].first() / 1000
    ends = clock["time_s"].last()
    return int((begins.to_numpy()[1:] < ends.to_numpy()[:-1] - 1.0).sum())


def _replayed(table: pd.DataFrame, traces: TraceSet, video: Video) -> tuple[list[str], dict[str, Any]]:
    """Does the simulator, given the table's levels, reproduce its delays? If not, what differs."""
    names = list(dict.fromkeys(table["trace"]))
    if traces.start_ptrs is None or not set(names) <= set(traces.names):
        return [], {}
    index = np.array([traces.names.index(name) for name in names])
    episodes = Episodes(
        index, np.asarray(traces.start_ptrs)[index], None, np.ones((len(index), CHUNKS), dtype=np.int64), 0, True
    )
    levels = table["level"].to_numpy().reshape(len(names), CHUNKS)
    outcome = Simulator(traces, video, episodes).replay(levels)
    sizes = table["size_bytes"].to_numpy().reshape(levels.shape)
    if not np.array_equal(sizes, outcome.size_bytes):
        ratio = float((sizes / outcome.size_bytes)[:, 1:].mean())
        return [f"its chunks are {ratio:.2f} times as large as {video.name}'s"], {"size_ratio": ratio}
    delay = table["delay_ms"].to_numpy().reshape(levels.shape)
    same = np.isclose(delay, outcome.delay_ms, rtol=1e-6)
    if same.all():
        return [], {}
    ratio = delay[:, 0] / outcome.delay_ms[:, 0]  # the first chunk starts at a known place
    numbers = {"same_delays": float(same.mean()), "first_delay_ratio": [float(ratio.min()), float(ratio.max())]}
    noisy = bool(((ratio > 0.89) & (ratio < 1.11)).all() and not np.allclose(ratio, 1))
    if noisy:
        return [
            f"its delays hold noise (factors {ratio.min():.2f} to {ratio.max():.2f}), the baselines' do not"
        ], numbers
    return [f"only {same.mean():.0%} of its delays follow from traces, video and starting points"], numbers


# --- how it shows --------------------------------------------------------------------------------------------------------


def _levels(evidence: Evidence) -> list[Finding]:
    table = evidence.table
    assert table is not None
    common = qoe.chosen(table)["level"].value_counts(normalize=True)
    level, share = int(common.index[0]), float(common.iloc[0])
    stay = _stay(table)
    reference = _stay(evidence.tables[evidence.reference]) if evidence.reference else 0.0
    if share > 0.9:
        what = f"{share:.0%} of all chunks are level {level}"
    elif stay > 0.98 and reference < 0.95:
        what = f"{stay:.0%} of all chunks repeat the level before"
    else:
        return []
    healthy = evidence.learned is not False
    return [
        Finding(
            "level-collapse",
            "cause" if evidence.failing and healthy else "suspect" if evidence.failing else "note",
            what,
            {"level": level, "share": share, "repeats": stay, "repeats_of_reference": reference},
            "the policy does not react to its state: see the training, and whether the adapter acts",
        )
    ]


def _stay(table: pd.DataFrame) -> float:
    """Share of the chosen chunks that repeat the level before."""
    levels = table["level"].to_numpy()
    return float((levels[1:] == levels[:-1])[table["chunk"].to_numpy()[1:] > 0].mean())


def stall_cost(table: pd.DataFrame) -> float:
    """What stalls of over a second cost of the mean reward."""
    rows = qoe.chosen(table)
    return float(qoe.REBUFFER_PENALTY * rows.loc[rows["rebuffer_s"] > LONG_STALL_S, "rebuffer_s"].sum() / len(rows))


def _stalls(evidence: Evidence) -> list[Finding]:
    table = evidence.table
    assert table is not None
    if evidence.reference is None:
        return []
    ours, theirs = stall_cost(table), stall_cost(evidence.tables[evidence.reference])
    if ours - theirs <= 0.05:
        return []
    rows = qoe.chosen(table)
    share = float((rows["rebuffer_s"] > LONG_STALL_S).mean())
    return [
        Finding(
            "rare-bad-actions",
            "suspect" if evidence.failing else "note",
            f"stalls of over a second cost {ours:.3f} of the mean reward, {ours - theirs:.3f} more than {evidence.reference}'s, in "
            f"{share:.2%} of the chunks",
            {"cost": ours, "reference_cost": theirs, "share": share},
            "look at the decisions before the stalls (the costliest ones are in notebook 06); test by argmax; train longer",
        )
    ]


def _gap(evidence: Evidence) -> list[Finding]:
    table = evidence.table
    assert table is not None
    if evidence.reference is None or evidence.gap is None or not evidence.failing:
        return []
    parts = qoe.per_trace(table) - qoe.per_trace(evidence.tables[evidence.reference])
    parts = parts.dropna()
    losses = {
        name: float(parts[name].mean()) * (-1 if name == "quality" else 1)
        for name in ("quality", "rebuffering", "smoothness")
    }
    largest = max(losses, key=lambda name: losses[name])
    worst = parts["reward"].sort_values()
    share = float(worst.head(5).sum() / worst.sum())
    return [
        Finding(
            "gap",
            "suspect",
            f"{-evidence.gap.mean:.3f} below {evidence.reference}, mostly {largest} ({losses[largest]:.3f}); the five worst traces "
            f"hold {share:.0%} of it",
            {
                "gap": list(evidence.gap),
                "reference": evidence.reference,
                **losses,
                "worst_traces": list(worst.index[:5]),
            },
            "look at the timelines of the worst traces (notebook 06)",
        )
    ]


# --- what may be claimed -------------------------------------------------------------------------------------------------


def _handicapped(evidence: Evidence) -> list[Finding]:
    found = []
    for name in evidence.handicapped:
        sound = name.split(" ")[0]
        if name in evidence.tables and sound in evidence.tables:
            difference = paired(evidence.tables[sound], evidence.tables[name])
            if difference.low > 0:
                found.append(
                    Finding(
                        "handicapped-baseline",
                        "note",
                        f"{name} as published plays below its own algorithm: without the original's mistakes it is "
                        f"{difference.mean:+.3f} better",
                        {"difference": list(difference)},
                        f"compare with {sound}, not only with {name}",
                    )
                )
    return found


def _undecided(evidence: Evidence) -> list[Finding]:
    table = evidence.table
    assert table is not None
    unclear = [
        name
        for name, other in evidence.tables.items()
        if name != evidence.run and not paired(table, other).excludes_zero
    ]
    if not unclear:
        return []
    count = table["trace"].nunique()
    return [
        Finding(
            "too-few-traces",
            "note",
            f"{count} traces cannot tell the run from {', '.join(unclear)}: the paired intervals hold zero",
            {"undecided": unclear, "traces": count},
            "play more traces or seeds before calling one of them better",
        )
    ]


def _leakage(evidence: Evidence) -> list[Finding]:
    clean = evidence.clean
    if clean is None or clean.all():
        return []
    numbers: dict[str, Any] = {"overlapping": int((~clean).sum()), "clean": int(clean.sum())}
    on_clean = ""
    if evidence.table is not None and clean.any():
        rows = qoe.per_trace(evidence.table)["reward"].to_numpy()
        if len(rows) == len(clean):
            numbers["clean_mean"] = float(rows[clean].mean())
            on_clean = f"; mean reward on the {clean.sum()} others: {numbers['clean_mean']:.3f}"
    return [
        Finding(
            "test-leakage",
            "note",
            f"{(~clean).sum()} of {len(clean)} test traces share content with the training traces{on_clean}",
            numbers,
            "judge by the paired difference on the clean traces too; a run tested on its own training traces shows memory only",
        )
    ]


def _selection(evidence: Evidence) -> list[Finding]:
    if evidence.training is None or not evidence.training.selected_on_test:
        return []
    return [
        Finding(
            "selected-on-test",
            "note",
            "the checkpoint was chosen by its reward on the test traces: its mean reward is too good by what that choice gained",
            {"selected_on": evidence.setting.get("traces")},
            "choose on validation traces cut from the training set (notebook 04 does)",
        )
    ]
