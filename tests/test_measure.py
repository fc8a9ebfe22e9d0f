"""Scores on tables that a reader checks by hand, for a measure where higher is better and for one where lower is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from netllm_lib import stats
from netllm_lib.measure import TABLE, Measure, Scores, read_headline

ERROR = Measure("error", "degrees", "lower", "user")
REWARD = Measure("reward")


def scores(measure: Measure, **policies: list[float]) -> Scores:
    """Scores of policies by sample, the first policy being the subject; the part "clean" lacks the first sample."""
    rows = [
        (name, f"s{i}", value, value + i, value if i else np.nan)
        for name, values in policies.items()
        for i, value in enumerate(values)
    ]
    columns = ["policy", measure.sample, measure.name, "part", "clean"]
    return Scores(measure, next(iter(policies)), pd.DataFrame(rows, columns=columns), "nowhere")


@pytest.mark.parametrize(("measure", "sign"), [(REWARD, 1), (ERROR, -1)])
def test_differences_are_paired_and_gains_are_good(measure: Measure, sign: int) -> None:
    test = scores(measure, mine=[1.0, 5.0, 9.0], base=[0.5, 4.0, 8.5, 99.0])
    difference = test.difference("mine", "base")  # over the three samples that both have
    assert difference == stats.bootstrap(np.array([0.5, 1.0, 0.5]))
    gain = measure.gain(difference)
    assert gain.mean == sign * difference.mean
    assert gain.low < gain.mean < gain.high
    with pytest.raises(ValueError, match="no scores of 'bsae', did you mean 'base'.; tested: mine, base"):
        test.of("bsae")
    with pytest.raises(ValueError, match="nothing pairs the two"):
        stats.paired(test.of("mine"), pd.Series([1.0], ["x"]))


def test_league_has_the_best_first() -> None:
    policies = {"a": [1.0] * 19 + [-19.0], "b": [0.5] * 20, "c": [2.0] * 20}
    high = scores(REWARD, **policies).league()
    assert list(high.index) == ["c", "b", "a"]
    assert list(high.columns) == ["reward", "low", "high", "iqm", "worst_5%", "part", "clean"]
    assert list(high.loc["a", ["reward", "iqm", "worst_5%", "part"]]) == [0.0, 1.0, -19.0, 9.5]
    assert high["clean"]["a"] == pytest.approx((18 - 19) / 19)
    low = scores(ERROR, **policies).league()
    assert list(low.index) == ["a", "b", "c"]
    assert low["worst_5%"]["a"] == 1.0


def test_scores_come_back_and_broken_ones_are_named(tmp_path: Path) -> None:
    test = scores(ERROR, mine=[1.0, 2.0], base=[0.5, 4.0])
    test.save(tmp_path)
    again = Scores.read(tmp_path)
    assert (again.measure, again.subject, again.tested_on) == (ERROR, "mine", "nowhere")
    pd.testing.assert_frame_equal(again.table, test.table)
    names = ("measure", "tested on", "policy", "score", "low", "high", "best other", "difference")
    assert tuple(read_headline(tmp_path).items()) == tuple(
        zip(names, ("error", "nowhere", "mine", 1.5, 1.0, 2.0, "base", -0.75), strict=True)
    )
    scores(ERROR, mine=[1.0, np.inf], base=[0.5, 4.0]).save(tmp_path)  # an odd figure is kept, and has no headline
    assert "score" not in read_headline(tmp_path)
    (tmp_path / TABLE).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"scores\.parquet: it cannot be read as a table of scores"):
        Scores.read(tmp_path)
    (tmp_path / "scores.json").write_text('{"measure": {"name": "x", "better": "bigger"}}')
    with pytest.raises(ValueError, match=r"scores\.json: measure\.better: it should be 'higher' or 'lower'"):
        Scores.read(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"policy": ["a"], "reward": [1.0]}, "no column trace; it has: policy, reward"),
        ({"policy": ["a", "a"], "trace": ["t", "t"], "reward": [1.0, 2.0]}, "scores of the same trace are there twice"),
        ({"policy": ["b"], "trace": ["t"], "reward": [1.0]}, "no scores of 'a'; tested: b"),
    ],
)
def test_tables_that_are_none_are_refused(table: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scores(REWARD, "a", pd.DataFrame(table))
