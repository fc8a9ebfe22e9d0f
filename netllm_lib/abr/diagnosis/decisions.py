"""Single decisions: what others would have done in the states that a run visited, and what each decision was worth.

    simulator = Simulator(traces, video, episodes)        # the episodes that the run played
    instead = shadow(table, RobustMPC(video), simulator)  # what MPC would have chosen
    confusion(levels_of(table), instead)
    costliest(table, simulator, instead, policy)          # swap one decision, let the policy go on

Arrays of levels are [episodes, chunks] in playing order; the first chunk, which nobody chooses, never counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import FIRST_LEVEL, Progress
from netllm_lib.abr.optimum import SearchConfig, continuations
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.simple import Prefixed, Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import PAYLOAD_SHARE, RTT_MS, Simulator
from netllm_lib.abr.traces import TraceSet

UNKNOWN = -1  # in an array of levels: not computed
REPLAY_TOLERANCE = 1e-3  # of a reward; files of the original's are rounded
_BLOCK = 20_000  # counterfactual episodes that are replayed at once
_NOTHING = 1e-9  # of a gain: rounding


# --- what others would have done ----------------------------------------------------------------------------------------


def levels_of(table: pd.DataFrame) -> np.ndarray:
    """[N, chunks] int64, the levels of a table of chunks. Raises ValueError if a trace lacks a chunk."""
    return _column(table, "level").astype(np.int64)


def shadow(
    table: pd.DataFrame, policy: Policy, simulator: Simulator, progress: Progress | None = None
) -> np.ndarray:  # fmt: skip
    """[N, 48] the levels that `policy` would have chosen in each state that the run visited.

    It sees the whole episode as the run played it, and is told what was really played. Raises ValueError if the table is not of
    the simulator's episodes.
    """
    levels, _ = _replayed(table, simulator)
    wanted = rollout(Prefixed(policy, levels, CHUNKS), simulator, progress=progress).extras["wanted"]
    wanted[:, 0] = levels[:, 0]
    return wanted.astype(np.int64)


@dataclass(frozen=True, repr=False)
class Optimum:
    """What the offline optimum would have done in each state that a run visited; UNKNOWN and NaN in rows not asked for."""

    levels: np.ndarray  # [N, chunks] the best level; the run's own where it is as good
    values: np.ndarray  # [N, chunks, 6] summed reward to the end, by the level chosen here and the best ones afterwards
    lost: np.ndarray  # [N, chunks] value of the best level − that of the run's; sums up to the regret of the episode

    def __repr__(self) -> str:
        known = ~np.isnan(self.lost).all(axis=1)
        lost = np.nansum(self.lost[known], axis=1).mean() if known.any() else 0.0
        return f"Optimum({known.sum()} of {len(known)} episodes, {lost:.3f} lost per episode)"


def optimum(
    table: pd.DataFrame,
    simulator: Simulator,
    rows: Sequence[int] | None = None,
    config: SearchConfig | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Optimum:
    """The value of every level in every state that the run visited, from beam searches over the known future.

    `rows` are the episodes to look at (all). Raises ValueError if the table is not of the simulator's episodes.
    """
    levels, _ = _replayed(table, simulator)
    chosen = np.arange(len(levels)) if rows is None else np.asarray(rows, dtype=np.int64)
    values = np.full((*levels.shape, qoe.LEVELS), np.nan)
    values[chosen] = continuations(simulator, levels, chosen, config, threads=threads, progress=progress)
    played = np.take_along_axis(values, levels[..., None], axis=2)[..., 0]
    lost = np.full(levels.shape, np.nan)
    best = np.full(levels.shape, UNKNOWN)
    best[chosen, 0], lost[chosen, 0] = FIRST_LEVEL, 0.0
    later = values[chosen, 1:]
    lost[chosen, 1:] = later.max(axis=2) - played[chosen, 1:]
    best[chosen, 1:] = np.where(lost[chosen, 1:] > 0, later.argmax(axis=2), levels[chosen, 1:])
    return Optimum(best, values, lost)


def confusion(run: np.ndarray, other: np.ndarray) -> pd.DataFrame:
    """6 × 6 counts of decisions: rows are the levels of the run, columns those of the other."""
    run, other = _pair(run, other)
    known = (run >= 0) & (other >= 0)
    counts = np.zeros((qoe.LEVELS, qoe.LEVELS), dtype=np.int64)
    np.add.at(counts, (run[known], other[known]), 1)
    names = range(qoe.LEVELS)
    return pd.DataFrame(counts, index=pd.Index(names, name="run"), columns=pd.Index(names, name="other"))


def first_divergence(run: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[N] the first chunk at which they differ; the number of chunks where they never do."""
    chunks = np.shape(run)[1]
    run, other = _pair(run, other)
    differ = (run != other) & (run >= 0) & (other >= 0)
    return np.where(differ.any(axis=1), differ.argmax(axis=1) + 1, chunks)


# --- counterfactuals ----------------------------------------------------------------------------------------------------


def costliest(
    table: pd.DataFrame,
    simulator: Simulator,
    reference: np.ndarray,
    policy: Policy | None = None,
    *,
    k: int = 10,
    gap: pd.Series | None = None,
    per_trace: int = 3,
    confirm: int = 5,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The `k` decisions that cost most: each is swapped for the reference's, and the rest of the episode is played anew.

    `reference` [N, 48] is what another would have chosen in the states of the run (`shadow`, or `optimum(…).levels`). Every swap is
    first judged with the recorded levels behind it; the best `confirm` of a trace, `confirm * k` in all, are then judged with
    the policy going on behind them, in lock-step. Of a trace at most `per_trace` decisions are taken, one after the other, each
    with the earlier ones in place: several ways round the same stall count once, and the gains add up.

    Columns, best first: trace, chunk, level (the run's), instead (the reference's), gain (summed reward of the episode), share (of
    the whole gap, where `gap` gives it in mean reward per trace, as `regret(table, plans)` does), continued ("policy"; "recorded"
    where there is none, where it carries state from trace to trace, or where by itself it does not play what the run played).
    """
    if min(k, per_trace, confirm) < 1:
        raise ValueError(f"k, per_trace and confirm must be at least 1, got {k}, {per_trace} and {confirm}")
    levels, rewards = _replayed(table, simulator)
    reference = np.asarray(reference)
    if reference.shape != levels.shape:
        raise ValueError(f"the reference has levels of shape {reference.shape}, the run {levels.shape}")
    differ = (reference != levels) & (reference >= 0)
    differ[:, 0] = False
    case = _Case(simulator, levels, reference, rewards[:, 1:].sum(axis=1))
    rows, chunks = np.nonzero(differ)
    gains = case.rewards(rows, [(int(chunk),) for chunk in chunks]) - case.total[rows]
    followed = np.zeros(len(levels), dtype=bool)
    if policy is not None and not policy.carries_state and len(rows):
        order = np.argsort(-gains, kind="stable")
        rank = pd.Series(rows[order]).groupby(rows[order]).cumcount().to_numpy()
        order = order[rank < confirm][: confirm * k]
        rows, chunks = rows[order], chunks[order]
        followed = case.reproduced(policy, np.unique(rows), progress)
    picks = case.pick(rows[~followed[rows]], chunks[~followed[rows]], per_trace)
    if policy is not None and followed.any():
        picks += case.pick(rows[followed[rows]], chunks[followed[rows]], per_trace, policy, progress)
    found = pd.DataFrame(_merged(picks)[:k], columns=["row", "chunk", "gain"]).astype({"row": int, "chunk": int})
    at = (found["row"].to_numpy(), found["chunk"].to_numpy())
    whole = np.nan if gap is None else float(gap.sum()) * (levels.shape[1] - 1)
    return pd.DataFrame(
        {
            "trace": _names(table)[at[0]],
            "chunk": at[1],
            "level": levels[at],
            "instead": reference[at],
            "gain": found["gain"].astype(float),
            "share": found["gain"].astype(float) / (whole if whole > 0 else np.nan),
            "continued": np.where(followed[at[0]], "policy", "recorded"),
        }
    )


def swapped(
    table: pd.DataFrame, simulator: Simulator, decisions: pd.DataFrame, policy: Policy | None = None
) -> pd.DataFrame:
    """The table of chunks if the run had decided otherwise at `decisions` (columns trace, chunk, instead), all at once.

    The policy chooses everything else anew, in all episodes; without one the recorded levels are played.
    """
    levels, _ = _replayed(table, simulator)
    row_of = {name: row for row, name in enumerate(_names(table))}
    if unknown := set(decisions["trace"]) - set(row_of):
        raise ValueError(f"the table has no trace {sorted(unknown)[0]!r}")
    rows, chunks = decisions["trace"].map(row_of).to_numpy(dtype=np.int64), decisions["chunk"].to_numpy(dtype=np.int64)
    if len(chunks) and not ((chunks > 0) & (chunks < levels.shape[1])).all():
        raise ValueError(f"decisions are at the chunks 1..{levels.shape[1] - 1}, not {sorted(set(chunks))}")
    given = levels if policy is None else np.full_like(levels, UNKNOWN)
    given[rows, chunks] = decisions["instead"]
    return play(Replay(given) if policy is None else Prefixed(policy, given, CHUNKS), simulator)


@dataclass(frozen=True)
class _Case:
    """A run and what else it could have done."""

    simulator: Simulator
    levels: np.ndarray  # [N, chunks] of the run
    reference: np.ndarray  # [N, chunks]
    total: np.ndarray  # [N] summed reward of the run

    def rewards(
        self, rows: np.ndarray, swaps: Sequence[tuple[int, ...]], policy: Policy | None = None, progress: Progress | None = None
    ) -> np.ndarray:  # fmt: skip
        """[len(rows)] summed reward of each row's episode with the decisions at the chunks of `swaps` swapped.

        Behind the first swap the policy chooses, or without one the recorded levels go on.
        """
        sums = np.zeros(len(rows))
        for first in range(0, len(rows), _BLOCK):
            part = rows[first : first + _BLOCK]
            given = self.levels[part]
            for row, chunks in enumerate(swaps[first : first + _BLOCK]):
                if policy is not None:
                    given[row, min(chunks) :] = UNKNOWN
                given[row, list(chunks)] = self.reference[part[row], list(chunks)]
            if policy is None:
                reward = self._of(part).replay(given).reward
            else:
                reward = rollout(Prefixed(policy, given, CHUNKS), self._of(part), progress=progress).reward
            sums[first : first + _BLOCK] = reward[:, 1:].sum(axis=1)
        return sums

    def reproduced(self, policy: Policy, rows: np.ndarray, progress: Progress | None) -> np.ndarray:
        """[N] bool: of `rows`, those in which the policy by itself plays what the run played.

        One that plays something else, with other random numbers for example, cannot say how the run would have gone on.
        """
        same = np.zeros(len(self.levels), dtype=bool)
        same[rows] = (rollout(policy, self._of(rows), progress=progress).level == self.levels[rows]).all(axis=1)
        return same

    def pick(
        self, rows: np.ndarray, chunks: np.ndarray, per_trace: int, policy: Policy | None = None, progress: Progress | None = None
    ) -> list[tuple[int, int, float]]:  # fmt: skip
        """(row, chunk, gain) of the best swaps: per row the best one, then the best one besides it, and so on, while they gain."""
        picks: list[tuple[int, int, float]] = []
        taken: dict[int, tuple[int, ...]] = {}
        best = self.total.copy()
        for _ in range(per_trace):
            if not len(rows):
                break
            swaps = [(*taken.get(int(row), ()), int(chunk)) for row, chunk in zip(rows, chunks, strict=True)]
            gains = self.rewards(rows, swaps, policy, progress) - best[rows]
            order = np.lexsort((chunks, -gains, rows))
            firsts = order[np.unique(rows[order], return_index=True)[1]]  # the best of each row
            firsts = firsts[gains[firsts] > _NOTHING]
            for place in firsts:
                row = int(rows[place])
                picks.append((row, int(chunks[place]), float(gains[place])))
                taken[row] = swaps[place]
                best[row] += gains[place]
            left = np.isin(rows, rows[firsts])
            left[firsts] = False
            rows, chunks = rows[left], chunks[left]
        return picks

    def _of(self, rows: np.ndarray) -> Simulator:
        return Simulator(self.simulator.traces, self.simulator.video, self.simulator.episodes.rows(rows.tolist()))


def _merged(picks: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """By gain; but of one row in the order in which they were picked, as each gain counts on the picks before it."""
    queues: dict[int, list[tuple[int, int, float]]] = {}
    for pick in picks:
        queues.setdefault(pick[0], []).append(pick)
    merged = []
    while queues:
        row = max(queues, key=lambda r: queues[r][0][2])
        merged.append(queues[row].pop(0))
        if not queues[row]:
            del queues[row]
    return merged


# --- where the reward goes ----------------------------------------------------------------------------------------------


def breakdown(
    table: pd.DataFrame,
    by: Literal["trace", "regime", "chunk", "level"],
    traces: TraceSet | None = None,
    bands: int = 3,
) -> pd.DataFrame:
    """Mean reward per chunk and its parts in reward units, reward = quality - rebuffering - smoothness, by group.

    Columns: chunks (how many the group has), reward, quality, rebuffering, smoothness. A "regime" is a band of the traces' mean
    bandwidth, as many traces in each of the `bands`; the label has its limits in Mbps. The bandwidth is that of `traces`, or
    without them the one at which the run's own chunks came. The difference of two runs' breakdowns is that of their gap.
    """
    rows = qoe.chosen(table)
    parts = pd.DataFrame(
        {
            "reward": rows["reward"],
            "quality": rows["bitrate_kbps"] / 1000,
            "rebuffering": qoe.REBUFFER_PENALTY * rows["rebuffer_s"],
            "smoothness": rows["smoothness_mbps"],
        }
    )
    if by == "regime":
        key = rows["trace"].map(_regimes(table, traces, bands)).rename("regime")
    elif by in ("trace", "chunk", "level"):
        key = rows[by]
    else:
        raise ValueError(f'by must be "trace", "regime", "chunk" or "level", not {by!r}')
    groups = parts.groupby(key, sort=by in ("chunk", "level"), observed=True)
    means = groups.mean()
    means.insert(0, "chunks", groups.size())
    return means.sort_index() if by == "regime" else means


def mean_mbps(table: pd.DataFrame, traces: TraceSet | None = None) -> pd.Series:
    """Mean bandwidth per trace of a table: time-weighted over the whole trace, or, without `traces`, over the run's downloads."""
    names = _names(table)
    if traces is None:
        sums = table.groupby("trace", sort=False)[["size_bytes", "delay_ms"]].sum()
        transfer_s = (sums["delay_ms"] - RTT_MS * table.groupby("trace", sort=False).size()) / 1000
        return (sums["size_bytes"] * 8e-6 / PAYLOAD_SHARE / transfer_s).rename("mean_mbps")
    if "trace_index" in table:
        index = table.groupby("trace", sort=False)["trace_index"].first().to_list()
    else:
        where = {name: i for i, name in enumerate(traces.names)}
        missing = [name for name in names if name.rsplit("#", 1)[0] not in where and name not in where]
        if missing:
            raise ValueError(f"{traces.name} has no trace {missing[0]!r}: give the trace set that was played")
        index = [where[name] if name in where else where[name.rsplit("#", 1)[0]] for name in names]
    return pd.Series([traces.traces[i].mean_mbps for i in index], index=pd.Index(names, name="trace"), name="mean_mbps")


def _regimes(table: pd.DataFrame, traces: TraceSet | None, bands: int) -> pd.Series:
    """Ordered category per trace, labelled with the lowest and highest mean bandwidth in it."""
    rates = mean_mbps(table, traces)
    if not 1 <= bands <= len(rates):
        raise ValueError(f"{bands} bands of {len(rates)} traces: give 1..{len(rates)}")
    order = rates.rank(method="first").astype(int) - 1
    band = order * bands // len(rates)
    labels = [f"{b + 1}: {rates[band == b].min():.2f}–{rates[band == b].max():.2f} Mbps" for b in range(bands)]
    return pd.Series(pd.Categorical([labels[b] for b in band], categories=labels, ordered=True), index=rates.index)


def concentration(gap: pd.Series, shares: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)) -> pd.DataFrame:
    """How much of a gap lies in the worst traces: is it everywhere, or in a few?

    `gap` holds per trace what is missing (reference − run), for example `regret(table, plans)`. One row per share of the traces, at
    least one trace: traces, gap (their mean contribution to the mean gap over all traces), share of the whole gap (above 1 where
    other traces are better than the reference; NaN if nothing is missing), worst (the name of the last one counted).
    """
    if not len(gap):
        raise ValueError("no traces were given")
    worst = gap.sort_values(ascending=False, kind="stable")
    sums = worst.cumsum().to_numpy() / len(gap)
    counts = [max(1, round(share * len(gap))) for share in shares]
    rows = pd.DataFrame({"traces": counts, "gap": sums[[count - 1 for count in counts]]})
    rows["share"] = rows["gap"] / sums[-1] if sums[-1] > 0 else np.nan
    rows["worst"] = [worst.index[count - 1] for count in counts]
    return rows.set_index(pd.Index([f"{share:.0%}" for share in shares], name="worst traces")).drop_duplicates()


# --- tables and arrays --------------------------------------------------------------------------------------------------


def _names(table: pd.DataFrame) -> np.ndarray:
    """[N] trace labels in playing order."""
    return table["trace"].unique().astype(object)


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    """A column as [N, chunks]."""
    names = _names(table)
    chunks = len(table) // max(len(names), 1)
    values = table[name].to_numpy()
    order = table["chunk"].to_numpy()
    if len(table) != len(names) * chunks or not (order.reshape(len(names), chunks) == np.arange(chunks)).all():
        raise ValueError(f"the table's {len(names)} traces do not all have the chunks 0..{chunks - 1} in order")
    return values.reshape(len(names), chunks)


def _replayed(table: pd.DataFrame, simulator: Simulator) -> tuple[np.ndarray, np.ndarray]:
    """(levels, rewards) [N, chunks] of a run, replayed. Raises ValueError if that is not what the table says."""
    levels, rewards = levels_of(table), _column(table, "reward")
    if levels.shape != (len(simulator), CHUNKS):
        raise ValueError(
            f"the table has {levels.shape[0]} traces of {levels.shape[1]} chunks, the simulator {len(simulator)} of {CHUNKS}"
        )
    replayed = simulator.replay(levels).reward
    wrong = np.abs(replayed - rewards)[:, 1:] > REPLAY_TOLERANCE
    if wrong.any():
        row, chunk = np.argwhere(wrong)[0] + (0, 1)
        raise ValueError(
            f"trace {_names(table)[row]}, chunk {chunk}: the table has a reward of {rewards[row, chunk]:.4f}, replaying its levels "
            f"gives {replayed[row, chunk]:.4f}: give the traces, video, start pointers and noise that were played"
        )
    return levels, replayed


def _pair(run: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    run, other = np.asarray(run), np.asarray(other)
    if run.shape != other.shape or run.ndim != 2:
        raise ValueError(
            f"two arrays of levels [episodes, chunks] are needed, got shapes {run.shape} and {other.shape}"
        )
    return run[:, 1:], other[:, 1:]
