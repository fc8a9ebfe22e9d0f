"""Single decisions: what others would have done in the states that a run visited, and what each decision cost.

    simulator = Simulator(traces, video, episodes)        # the episodes that the run played
    instead = shadow(table, RobustMPC(video), simulator)  # what MPC would have chosen
    confusion(levels_of(table), instead)
    costliest(table, simulator, instead, policy)          # swap one decision, let the policy go on

Arrays of levels are [episodes, chunks] in playing order; the first chunk, which nobody chooses, never counts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import FIRST_LEVEL
from netllm_lib.abr.optimum import continuations
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.simple import Prefixed
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import TraceSet

UNKNOWN = -1  # in an array of levels: not computed, or left to the policy
REPLAY_TOLERANCE = 1e-3  # of a reward; files of the original's are rounded


# --- what others would have done ----------------------------------------------------------------------------------------


def levels_of(table: pd.DataFrame) -> np.ndarray:
    """[N, chunks] int64, the levels of a table of chunks. Raises ValueError if a trace lacks a chunk."""
    return _column(table, "level").astype(np.int64)


def shadow(table: pd.DataFrame, policy: Policy, simulator: Simulator) -> np.ndarray:
    """[N, 48] the levels that `policy` would have chosen in each state that the run visited.

    It sees the whole episode as the run played it. Raises ValueError if the table is not of the simulator's episodes.
    """
    levels, _ = replayed(table, simulator)
    wanted = rollout(Prefixed(policy, levels, CHUNKS), simulator).extras["wanted"]
    wanted[:, 0] = levels[:, 0]
    return wanted.astype(np.int64)


class Optimum(NamedTuple):
    """What the offline optimum would have done in each state that a run visited."""

    levels: np.ndarray  # [N, chunks] the best level; the run's own where it is as good
    values: np.ndarray  # [N, chunks, 6] summed reward to the end, by the level chosen here and the best ones afterwards
    lost: np.ndarray  # [N, chunks] value of the best level − that of the run's; sums up to the regret of the episode


def optimum(table: pd.DataFrame, simulator: Simulator) -> Optimum:
    """The value of every level in every state that the run visited, from beam searches over the known future.

    Raises ValueError if the table is not of the simulator's episodes.
    """
    levels, _ = replayed(table, simulator)
    values = continuations(simulator, levels)
    lost = values.max(axis=2) - np.take_along_axis(values, levels[..., None], axis=2)[..., 0]
    best = np.where(lost > 0, values.argmax(axis=2), levels)
    best[:, 0], lost[:, 0] = FIRST_LEVEL, 0.0
    return Optimum(best, values, lost)


def confusion(run: np.ndarray, other: np.ndarray) -> pd.DataFrame:
    """6 × 6 counts of decisions: rows are the levels of the run, columns those of the other."""
    known = (run[:, 1:] >= 0) & (other[:, 1:] >= 0)
    counts = np.zeros((qoe.LEVELS, qoe.LEVELS), dtype=np.int64)
    np.add.at(counts, (run[:, 1:][known], other[:, 1:][known]), 1)
    names = range(qoe.LEVELS)
    return pd.DataFrame(counts, index=pd.Index(names, name="run"), columns=pd.Index(names, name="other"))


# --- counterfactuals ----------------------------------------------------------------------------------------------------


def costliest(
    table: pd.DataFrame,
    simulator: Simulator,
    reference: np.ndarray,
    policy: Policy | None = None,
    *,
    k: int = 10,
    gap: pd.Series | None = None,
    confirm: int = 5,
) -> pd.DataFrame:
    """The decision of each trace that cost most, of the `k` traces where it cost most.

    Decisions are swapped for the reference's, and the rest of the episode is played anew. `reference` [N, 48] is what another would
    have chosen in the states of the run (`shadow`, or `optimum(…).levels`). Every swap is first judged with the recorded levels
    behind it; the best `confirm` of a trace are then judged with the policy going on behind them.

    Columns, best first: trace, chunk, level (the run's), instead (the reference's), gain (summed reward of the episode), share (of
    the whole gap, where `gap` gives it in mean reward per trace, as `regret(table, plans)` does), continued ("policy"; "recorded"
    where there is none, where it carries state from trace to trace, or where by itself it does not play what the run played).
    """
    levels, rewards = replayed(table, simulator)
    if reference.shape != levels.shape:
        raise ValueError(f"the reference has levels of shape {reference.shape}, the run {levels.shape}")
    differ = (reference != levels) & (reference >= 0)
    differ[:, 0] = False
    row, chunk = np.nonzero(differ)
    total = rewards[:, 1:].sum(axis=1)

    def gains(row: np.ndarray, chunk: np.ndarray, follower: Policy | None) -> np.ndarray:
        """What each episode gains by its swap; behind it the follower chooses, without one the recorded levels go on."""
        given, swaps = levels[row], np.arange(len(row))
        if follower is not None:
            given[np.arange(CHUNKS) > chunk[:, None]] = UNKNOWN
        given[swaps, chunk] = reference[row, chunk]
        again = alone(simulator, row.tolist())
        played = again.replay(given) if follower is None else rollout(Prefixed(follower, given, CHUNKS), again)
        return played.reward[:, 1:].sum(axis=1) - total[row]

    found = pd.DataFrame({"row": row, "chunk": chunk, "gain": gains(row, chunk, None) if len(row) else 0.0})
    found = found.sort_values("gain", ascending=False, kind="stable")
    followed = np.zeros(len(levels), dtype=bool)
    if policy is not None and not policy.carries_state and len(found):
        rows = found["row"].drop_duplicates().head(confirm * k).to_numpy()
        # a policy that plays something else, with other random numbers for example, cannot say how the run would have gone on
        followed[rows] = (rollout(policy, alone(simulator, rows.tolist())).level == levels[rows]).all(axis=1)
        found = found.groupby("row").head(confirm)
        judged = followed[found["row"]]
        if judged.any():
            swaps = found[judged]
            found.loc[judged, "gain"] = gains(swaps["row"].to_numpy(), swaps["chunk"].to_numpy(), policy)
            found = found.sort_values("gain", ascending=False, kind="stable")
    found = found[found["gain"] > 1e-9].groupby("row").head(1).head(k)  # less is rounding
    row, chunk = found["row"].to_numpy(), found["chunk"].to_numpy()
    whole = np.nan if gap is None else float(gap.sum()) * (CHUNKS - 1)
    return pd.DataFrame(
        {
            "trace": _names(table)[row],
            "chunk": chunk,
            "level": levels[row, chunk],
            "instead": reference[row, chunk],
            "gain": found["gain"].to_numpy(),
            "share": found["gain"].to_numpy() / (whole if whole > 0 else np.nan),
            "continued": np.where(followed[row], "policy", "recorded"),
        }
    )


def alone(simulator: Simulator, rows: list[int]) -> Simulator:
    """Some of the episodes, as if there were no others."""
    return Simulator(simulator.traces, simulator.video, simulator.episodes.rows(rows))


# --- where the reward goes ----------------------------------------------------------------------------------------------


def trace_gaps(ours: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Per trace that both played, worst first: difference of the mean reward and what each part adds to it (reward per chunk)."""
    gap = (qoe.per_trace(ours) - qoe.per_trace(other)).dropna()
    gap[["rebuffering", "smoothness"]] *= -1
    return gap.sort_values("reward")


def breakdown(table: pd.DataFrame, traces: TraceSet | None = None, bands: int = 3) -> pd.DataFrame:
    """Mean reward per chunk and its parts in reward units, reward = quality − rebuffering − smoothness, by chunk index; with the
    `traces` of the test by their mean bandwidth, as many traces in each of the `bands`.

    Columns: chunks (how many the group has), reward, quality, rebuffering, smoothness. Raises ValueError for other traces.
    """
    rows = qoe.chosen(table)
    parts = rows[["reward"]].assign(
        quality=rows["bitrate_kbps"] / 1000,
        rebuffering=qoe.REBUFFER_PENALTY * rows["rebuffer_s"],
        smoothness=rows["smoothness_mbps"],
    )
    by = rows["chunk"]
    if traces is not None:
        means = traces.describe()["mean_mbps"]
        if unknown := set(rows["trace"]) - set(means.index):
            raise ValueError(f"trace {min(unknown)!r} is not in {traces.name}: give the traces of the test")
        regimes = pd.qcut(means[rows["trace"].unique()], bands, precision=2, duplicates="drop")
        by = rows["trace"].map(regimes).rename("mean bandwidth of a trace (Mbps)")
    groups = parts.groupby(by, observed=True)
    return groups.mean().assign(chunks=groups.size())


# --- tables and arrays --------------------------------------------------------------------------------------------------


def _names(table: pd.DataFrame) -> np.ndarray:
    """[N] trace labels in playing order."""
    return table["trace"].unique().astype(object)


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    """A column as [N, chunks]."""
    count = max(table["trace"].nunique(), 1)
    chunks = len(table) // count
    if not np.array_equal(table["chunk"].to_numpy(), np.tile(np.arange(chunks), count)):
        raise ValueError(f"the table's {count} traces do not all have the chunks 0..{chunks - 1} in order")
    return table[name].to_numpy().reshape(count, chunks)


def replayed(table: pd.DataFrame, simulator: Simulator) -> tuple[np.ndarray, np.ndarray]:
    """(levels, rewards) [N, chunks] of a run, replayed. Raises ValueError if that is not what the table says."""
    levels, rewards = levels_of(table), _column(table, "reward")
    if levels.shape != (len(simulator), CHUNKS):
        raise ValueError(
            f"the table has {levels.shape[0]} traces of {levels.shape[1]} chunks, the simulator {len(simulator)} of {CHUNKS}"
        )
    again = simulator.replay(levels).reward
    wrong = np.abs(again - rewards)[:, 1:] > REPLAY_TOLERANCE
    if wrong.any():
        row, chunk = np.argwhere(wrong)[0] + (0, 1)
        raise ValueError(
            f"trace {_names(table)[row]}, chunk {chunk}: the table has a reward of {rewards[row, chunk]:.4f}, replaying its levels "
            f"gives {again[row, chunk]:.4f}: give the traces, video, start pointers and noise that were played"
        )
    return levels, again
