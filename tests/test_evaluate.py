"""A test by the protocol: what it holds, what it leaves behind, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from netllm_lib import stats
from netllm_lib.abr import evaluate, qoe
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video

TRACES, VIDEO = generate_traces("t", 8, 8), generate_video("v", 1)
TRAINING = TRACES.subset(np.arange(5), "training")


class Told(Random):
    """A policy that says something of itself."""

    def facts(self) -> dict[str, int]:
        return {"answer": 42}


@pytest.fixture(scope="module")
def tested() -> evaluate.Test:
    policies: dict[str, Policy] = {"bba": BBA(), "mine": Told(), "mpc": RobustMPC(VIDEO)}
    return evaluate.test(policies, TRACES, VIDEO, subject="mine", seed=3, train_traces=TRAINING)


def test_every_trace_is_played_once_in_order_by_the_protocol(tested: evaluate.Test) -> None:
    episodes = upstream_episodes(TRACES, trace_num=-1, seed=3, clock="episode")
    for name, policy in (("bba", BBA()), ("mine", Random())):
        pd.testing.assert_frame_equal(tested.tables[name], play(policy, Simulator(TRACES, VIDEO, episodes)))
    assert tested.setting["clean"].tolist() == [False] * 5 + [True] * 3
    assert tested.setting["answer"] == 42  # of the subject, and of no other
    assert tested.setting["traces_hash"] == TRACES.content_hash
    assert tested.seconds.keys() == tested.tables.keys()


def test_fewer_traces_are_drawn_with_noise_as_the_original_does() -> None:
    table = evaluate.play_test(Constant(1), TRACES, VIDEO, trace_num=4, fixed=False)
    episodes = upstream_episodes(TRACES, trace_num=4, clock="episode")
    assert episodes.noise is not None
    pd.testing.assert_frame_equal(table, play(Constant(1), Simulator(TRACES, VIDEO, episodes)))


def test_scores_are_means_by_trace(tested: evaluate.Test) -> None:
    scores = tested.scores()
    assert (scores.measure, scores.subject) == (evaluate.REWARD, "mine")
    for name, table in tested.tables.items():
        np.testing.assert_array_equal(scores.of(name), qoe.per_trace(table)["reward"])
    difference = qoe.per_trace(tested.tables["mine"])["reward"] - qoe.per_trace(tested.tables["mpc"])["reward"]
    assert scores.difference("mine", "mpc") == stats.bootstrap(difference.to_numpy())


def test_the_league_has_the_tail_and_the_clean_traces(tested: evaluate.Test) -> None:
    league, by_trace = tested.league(), np.sort(qoe.per_trace(tested.tables["mine"])["reward"].to_numpy())
    assert list(league.index) == sorted(tested.tables, key=lambda name: -qoe.summarise(tested.tables[name]).reward)
    row: Any = league.loc["mine"]
    quality = qoe.summarise(tested.tables["mine"])
    assert row["iqm"] == pytest.approx(by_trace[2:6].mean())
    assert row["worst_5%"] == pytest.approx(by_trace[0])
    assert row["reward_clean"] == pytest.approx(qoe.per_trace(tested.tables["mine"])["reward"].to_numpy()[5:].mean())
    assert tested.part(tested.setting["clean"]).scores().mean("mine").mean == pytest.approx(row["reward_clean"])
    assert row[list(quality._fields)].tolist() == pytest.approx(list(quality))
    plain = evaluate.Test(tested.tables).league()
    assert not {"reward_clean", "clean", "seconds"} & set(plain)
    fewer = {"mine": tested.tables["mine"][tested.tables["mine"]["trace"] != TRACES.names[0]]}
    assert "reward_clean" not in evaluate.Test(fewer, "mine", tested.setting).league()


def test_a_test_is_read_as_it_was_saved(tested: evaluate.Test, tmp_path: Path) -> None:
    tested.save(tmp_path)
    again = evaluate.Test.read(tmp_path)
    assert (list(again.tables), again.subject, again.seconds) == (list(tested.tables), "mine", tested.seconds)
    assert again.setting == {**tested.setting, "clean": tested.setting["clean"].tolist()}
    for name, table in tested.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    pd.testing.assert_frame_equal(again.league(), tested.league())

    path = tmp_path / "tables" / "mpc.parquet"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"mpc\.parquet: missing"):
        evaluate.Test.read(tmp_path)
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"mpc\.parquet: it cannot be read"):
        evaluate.Test.read(tmp_path)
    tested.tables["mpc"].drop(columns="reward").to_parquet(path)
    with pytest.raises(ValueError, match=r"mpc\.parquet: it cannot be read as a table of chunks.*reward"):
        evaluate.Test.read(tmp_path)
    bomb = pd.DataFrame({"trace": np.zeros(evaluate.MOST_ROWS + 1, dtype=bool)})
    bomb.to_parquet(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"mpc\.parquet: .* \(10000001 rows\)"):
        evaluate.Test.read(tmp_path)
    (tmp_path / "setting.json").write_text("[]")
    with pytest.raises(ValueError, match=r"setting\.json: it does not list the policies"):
        evaluate.Test.read(tmp_path)


def test_a_subject_is_one_of_the_policies() -> None:
    with pytest.raises(ValueError, match="about 'llm', which is none of its policies: bba"):
        evaluate.test({"bba": BBA()}, TRACES, VIDEO, subject="llm")
