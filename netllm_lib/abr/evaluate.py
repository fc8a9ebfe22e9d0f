"""Test policies on a whole trace set by the protocol, and what a test leaves behind.

The protocol is the original's: every trace once, in order, from its fixed starting point, without noise. The first chunk of a
trace, which no policy chooses, does not count.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from netllm_lib import runs
from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import SEED, Progress, upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import Pensieve, load_actor
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import Registry, TraceSet, Video, overlapping
from netllm_lib.measure import Measure, Scores

REWARD = Measure("reward", better="higher", sample="trace")
"""What bitrate adaptation reports: the mean reward per chunk of a trace."""

SETTING, TABLES = "setting.json", "tables"
MOST_ROWS = 10_000_000  # of a table that is read: 200,000 episodes


def baselines(video: Video, registry: Registry | None = None) -> dict[str, Policy]:
    """The baselines of a test: MPC, BBA, and Genet where there is a registry with its checkpoint.

    "(original)" marks those that the original handicaps; without that mark a policy is in its sound form. BBA has one form.
    """
    players: dict[str, Policy] = {"mpc": RobustMPC(video), "bba": BBA()}
    players["mpc (original)"] = RobustMPC(video, MPCConfig.upstream())
    if registry is not None and (folder := registry.actor_folders().get("genet")):
        players["genet"] = Pensieve(load_actor(folder))
    return players


def play_test(
    policy: Policy,
    traces: TraceSet,
    video: Video,
    *,
    trace_num: int = -1,
    fixed: bool = True,
    seed: int = SEED,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Play one policy by the protocol: its table of chunks (`Rollout.table`).

    `trace_num` is for fewer traces than all (-1), `fixed=False` for the original's shuffled order with noise, which it uses then.
    """
    how: dict[str, Any] = {"seed": seed, "draws_actions": policy.draws_actions, "clock": "episode"}
    episodes = upstream_episodes(traces, trace_num=trace_num, fixed_order=fixed, **how)
    return play(policy, Simulator(traces, video, episodes), progress=progress)


@dataclass(frozen=True)
class Test:
    """Some policies on the same traces: what they played, and all that decides it."""

    __test__ = False  # for pytest: this is no test of the library

    tables: Mapping[str, pd.DataFrame]
    """Tables of chunks by policy, in playing order."""
    subject: str = ""
    """The policy that the test is about; empty if it is about none."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """traces, video and their hashes, trace_num, fixed, seed, train_traces, clean, and what the subject says of itself."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of playing, by policy."""

    def scores(self) -> Scores:
        """Reward and its parts by policy and trace; `reward_clean`, where that is known, is NaN for traces that are not clean."""
        clean, parts = self.setting.get("clean"), []
        for name, table in self.tables.items():
            rows = qoe.chosen(table).assign(bitrate_mbps=lambda part: part["bitrate_kbps"] / 1000)
            means = rows.groupby("trace", sort=False)[list(qoe.Quality._fields)].mean()
            if clean is not None and len(clean) == len(means):
                means["reward_clean"] = means["reward"].where(np.asarray(clean, dtype=bool))
            parts.append(means.reset_index().assign(policy=name))
        where = ", ".join(str(self.setting[key]) for key in ("traces", "video") if key in self.setting)
        return Scores(REWARD, self.subject, pd.concat(parts, ignore_index=True), where)

    def part(self, traces: np.ndarray) -> Test:
        """Some of the traces, `traces` [N] bool in playing order, as they were played."""
        first = next(iter(self.tables.values()))
        names = first["trace"].unique()[np.asarray(traces, dtype=bool)]
        return Test({name: table[table["trace"].isin(names)] for name, table in self.tables.items()}, self.subject)

    def league(self) -> pd.DataFrame:
        """`Scores.league`, with the seconds that playing took where they are known."""
        league = self.scores().league()
        return league.assign(seconds=pd.Series(self.seconds)) if self.seconds else league

    def save(self, folder: Path) -> None:
        """Write setting.json, tables/<policy>.parquet and the scores: what a run folder keeps of a test."""
        for name, table in self.tables.items():
            with runs.atomic_path(folder / TABLES / f"{name}.parquet") as aside:
                table.to_parquet(aside)
        about = {"order": list(self.tables), "subject": self.subject, "seconds": self.seconds}
        runs.write_json(folder / SETTING, {**self.setting, **about})
        self.scores().save(folder)

    @classmethod
    def read(cls, folder: Path) -> Test:
        """What `save` wrote. Raises FileNotFoundError or ValueError, naming the file, for a test that is not whole."""
        folder = Path(folder)
        setting = runs.read_json(folder / SETTING)
        if not isinstance(setting, dict) or not isinstance(setting.get("order"), list):
            raise ValueError(f"{folder / SETTING}: it does not list the policies of the test (order)")
        tables = {name: _read_table(folder / TABLES / f"{name}.parquet") for name in setting.pop("order")}
        return cls(tables, setting.pop("subject", ""), setting, setting.pop("seconds", {}))


def _read_table(path: Path) -> pd.DataFrame:
    try:
        file = pq.ParquetFile(io.BytesIO(runs.read_bytes(path)))
        if file.metadata.num_rows > MOST_ROWS:  # a few bytes can stand for as many rows as they like
            raise ValueError(f"{file.metadata.num_rows} rows")
        table = file.read().to_pandas()
        table[["trace", "chunk", "reward", "bitrate_kbps", "rebuffer_s", "smoothness_mbps"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; the test is incomplete") from None
    except Exception as error:  # pyarrow has its own errors for each way of being broken
        raise ValueError(f"{path}: it cannot be read as a table of chunks ({error})") from None
    return table


def test(
    policies: Mapping[str, Policy],
    traces: TraceSet,
    video: Video,
    *,
    subject: str = "",
    seed: int = SEED,
    train_traces: TraceSet | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Test:
    """Play all policies on all traces by the protocol.

    `train_traces` tells which of the traces are clean: those that share no content with any of them. `progress` makes a policy's
    progress bar of its name. Raises ValueError if `subject` is none of the policies.
    """
    if subject and subject not in policies:
        raise ValueError(f"the test is about {subject!r}, which is none of its policies: {', '.join(policies)}")
    setting: dict[str, Any] = {"traces": traces.name, "video": video.name, "trace_num": len(traces), "fixed": True}
    setting |= {"traces_hash": traces.content_hash, "video_hash": video.content_hash, "seed": seed}
    if train_traces is not None:
        setting |= {"train_traces": train_traces.name, "clean": ~overlapping(traces, train_traces)}
    if subject:
        setting |= policies[subject].facts()
    tables, seconds = {}, {}
    for name, policy in policies.items():
        start = time.perf_counter()
        tables[name] = play_test(policy, traces, video, seed=seed, progress=progress and progress(name))
        seconds[name] = time.perf_counter() - start
    return Test(tables, subject, setting, seconds)
