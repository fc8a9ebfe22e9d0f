"""Comparing the settings of a sweep: tidy results, pooled intervals, effects, notebook 08."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from netllm_lib import compare as comparing
from netllm_lib import notebooks, runs, stats
from netllm_lib.abr import qoe
from netllm_lib.abr.evaluate import Test

TRACES = [f"trace{i}" for i in range(12)]
EFFECT = {8: 0.0, 32: 0.3}
PRETRAINED = 0.1


def chunks(mean_level: float, rng: np.random.Generator) -> pd.DataFrame:
    """A table of chunks of all traces, four chunks each, with levels around `mean_level`."""
    level = np.clip(np.rint(rng.normal(mean_level, 1, (len(TRACES), 4))), 0, 5).astype(int)
    kbps = qoe.BITRATES_KBPS[level]
    before = np.concatenate([np.full((len(TRACES), 1), 750), kbps[:, :-1]], axis=1)
    stall = rng.exponential(0.02, level.shape)
    table = {
        "trace": np.repeat(TRACES, 4),
        "chunk": np.tile(range(4), len(TRACES)),
        "bitrate_kbps": kbps.ravel(),
        "rebuffer_s": stall.ravel(),
        "smoothness_mbps": np.abs(kbps - before).ravel() / 1000,
        "reward": qoe.reward(kbps, stall, before).ravel(),
    }
    return pd.DataFrame(table)


def make_sweep(folder: Path, tests: bool = True, validation: bool = True, seeds: tuple[int, ...] = (1, 2, 3)) -> Path:
    """A sweep's folder over rank × random_weights with its tests, as `netllm sweep` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    base = chunks(2, rng)
    rows: list[dict[str, Any]] = []
    for rank in EFFECT:
        for random in (False, True):
            for seed in seeds:
                test = folder / "runs" / f"{rank}-{random}-{seed}"
                llm = base.copy()
                shift = EFFECT[rank] - PRETRAINED * random + 0.02 * seed
                llm["reward"] += shift + rng.normal(0, 0.01, len(llm))
                if tests:
                    setting = {"traces": "fcc-test", "video": "video1", "clean": [i % 2 == 0 for i in range(12)]}
                    played = {"llm": llm, "mpc": base, "bba": base.assign(reward=base["reward"] - 0.2)}
                    Test(played, "llm", setting).save(test)
                row: dict[str, Any] = {"point": len(rows) + 1, "seed": seed, "parameter.04_finetune.rank": rank}
                row |= {"parameter.04_finetune.random_weights": random, "parameter.epochs": 4}
                row |= {
                    "state": "done",
                    "problem": "",
                    "seconds": 10.0,
                    "run.04_finetune": None,
                    "run.05_test": str(test),
                }
                row["metric.04_finetune.held_out_loss"] = 1 - shift
                if validation:  # which prefers another setting than the test
                    row["metric.04_finetune.validation_reward"] = 1.0 - (rank == 32) + 0.1 * random
                rows.append(row)
    rows.append(
        rows[0] | {"point": len(rows) + 1, "parameter.04_finetune.rank": 64, "state": "failed", "problem": "no"}
    )
    points = pd.DataFrame(rows).astype({"seed": "Int64"})
    points.to_parquet(folder / "points.parquet")
    comparing.collect(points).to_parquet(folder / comparing.RESULTS)
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def tables(sweep: Path) -> comparing.SweepTables:
    return comparing.load(sweep)


A, B = "rank=8 random_weights=False", "rank=32 random_weights=False"


def test_results_are_tidy(sweep: Path) -> None:
    results = pd.read_parquet(sweep / comparing.RESULTS)
    assert len(results) == 13 * 3 * len(TRACES)  # the failed point's test is there, it failed elsewhere
    table = pd.read_parquet(sweep / "runs" / "32-True-2" / "tables" / "llm.parquet")
    rows = results[(results["parameter.04_finetune.rank"] == 32) & results["parameter.04_finetune.random_weights"]]
    rows = rows[(rows["seed"] == 2) & (rows["policy"] == "llm")].set_index("trace")
    assert list(rows.index) == TRACES
    assert rows["reward"].mean() == pytest.approx(qoe.summarise(table).reward)
    assert rows["bitrate_mbps"].mean() == pytest.approx(qoe.summarise(table).bitrate_mbps)
    assert rows["rebuffer_s"].mean() == pytest.approx(qoe.summarise(table).rebuffer_s)
    assert rows["smoothness_mbps"].mean() == pytest.approx(qoe.summarise(table).smoothness_mbps)
    assert list(rows["clean"][:2]) == [True, False]
    assert set(rows["step"]) == {"05_test"}


def test_load(tables: comparing.SweepTables, tmp_path: Path) -> None:
    assert tables.varied == ("04_finetune.rank", "04_finetune.random_weights")
    assert len(tables.points) == 12
    assert list(tables.failed["setting"]) == ["rank=64 random_weights=False"]
    assert comparing.subject(tables.results) == "llm"
    assert comparing.subject(tables.results.replace("llm", "mine")) == "mine"
    with pytest.raises(FileNotFoundError, match="no points.parquet; name a folder that `netllm sweep` made"):
        comparing.load(tmp_path)
    tables.failed.drop(columns="setting").to_parquet(tmp_path / "points.parquet")
    with pytest.raises(ValueError, match="no point is done"):
        comparing.load(tmp_path)


def test_seeds_are_pooled_as_by_hand(tables: comparing.SweepTables) -> None:
    """The same figures from the rows of the table, put into [seeds, traces] by hand."""
    rows = tables.results[tables.results["policy"] == "llm"]
    by_hand = {
        name: np.array([[rows[(rows["setting"] == name) & (rows["seed"] == s) & (rows["trace"] == t)]["reward"].item()
                         for t in TRACES] for s in (1, 2, 3)])
        for name in (A, B)
    }  # fmt: skip
    mpc = tables.results[(tables.results["policy"] == "mpc") & (tables.results["point"] == 1)]["reward"].to_numpy()
    samples = comparing.reward_samples(tables, "llm")
    league = comparing.league(samples)
    assert list(league.loc[A, ["mean", "low", "high"]]) == pytest.approx(stats.bootstrap_runs(by_hand[A]))
    assert list(league.loc[A, ["runs", "traces"]]) == [3, 12]
    assert list(league.index) == [B, B.replace("False", "True"), A, A.replace("False", "True")]
    assert league.loc[A, "best_run"] == pytest.approx(by_hand[A].mean(axis=1).max())
    baseline = comparing.baseline_sample(tables, "mpc")
    assert baseline.shape == (1, 12)  # it has no seed: its twelve plays are one
    against = comparing.differences(samples, baseline)
    assert against[A] == pytest.approx(stats.bootstrap_runs(by_hand[A], mpc[None]))
    assert against[A].mean == pytest.approx(0.04, abs=0.01)
    between = comparing.differences(samples, samples[A], skip=[A])
    assert between[B] == pytest.approx(stats.bootstrap_runs(by_hand[B], by_hand[A]))
    assert between[B].mean == pytest.approx(0.3, abs=0.01)
    assert comparing.parts(tables, "llm").loc[A, "reward_clean"] == pytest.approx(by_hand[A][:, ::2].mean())


def test_other_traces_are_not_compared() -> None:
    here, there = pd.DataFrame([[1.0, 2.0]], columns=["a", "b"]), pd.DataFrame([[3.0, 5.0]], columns=["c", "d"])
    assert comparing.differences({"here": here}, there) == {}
    assert comparing.differences({"here": here}, there.assign(b=1.0, a=1.0))["here"].mean == 0.5


def test_metrics_get_students_interval() -> None:
    ours, theirs = (pd.DataFrame({"metric": values}) for values in ([1.0, 2.0, 3.0], [0.0, 2.0]))
    assert comparing.pooled(ours) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    welch = comparing.pooled(ours, theirs)
    assert welch.mean == 1
    reference = ttest_ind([1.0, 2.0, 3.0], [0.0, 2.0], equal_var=False).confidence_interval()
    assert (welch.low, welch.high) == pytest.approx((reference.low, reference.high))
    assert np.isnan(comparing.pooled(ours.iloc[:1]).low)


def test_choice_is_by_validation_where_there_is_one(tables: comparing.SweepTables, tmp_path: Path) -> None:
    samples = comparing.reward_samples(tables, "llm")
    assert comparing.chosen(tables, samples) == (A.replace("False", "True"), "04_finetune.validation_reward")
    without = comparing.load(make_sweep(tmp_path, validation=False))
    assert comparing.chosen(without, comparing.reward_samples(without, "llm")) == (B, "the figures compared")


def test_effect_holds_the_others(tables: comparing.SweepTables) -> None:
    samples = comparing.reward_samples(tables, "llm")
    rank = comparing.effect(tables, samples, "04_finetune.rank")
    assert list(rank["value"]) == [8, 32]  # 64 failed
    assert list(rank["combinations"]) == [2, 2]
    assert rank["difference"][1] == pytest.approx(0.3, abs=0.01)
    assert rank["difference_low"][1] > 0.2
    random = comparing.effect(tables, samples, "04_finetune.random_weights")
    assert list(random["value"]) == [False, True]
    assert random["difference"][1] == pytest.approx(-PRETRAINED, abs=0.01)
    # without one of the four settings, only the two that differ in rank alone are left
    lacking = {name: sample for name, sample in samples.items() if name != B}
    rest = comparing.effect(tables, lacking, "04_finetune.rank")
    assert list(rest["combinations"]) == [1, 1]
    assert rest["difference"][1] == pytest.approx(0.3, abs=0.01)
    # a seed that one of them lacks does not count
    fewer = samples | {B: samples[B].iloc[:2]}
    assert comparing.effect(tables, fewer, "04_finetune.rank")["mean"][0] != rank["mean"][0]


def test_metrics_alone(tmp_path: Path) -> None:
    tables = comparing.load(make_sweep(tmp_path, tests=False))
    assert tables.results.empty
    assert comparing.default_metric(tables.points) == "04_finetune.held_out_loss"
    samples = comparing.metric_samples(tables, "04_finetune.held_out_loss")
    league = comparing.league(samples, higher=False)
    assert league.index[0] == B
    assert list(league["traces"].unique()) == [1]
    assert list(league.loc[B, ["mean", "low"]]) == pytest.approx(comparing.pooled(samples[B])[:2])
    assert league["mean"][B] == pytest.approx(1 - 0.34)
    effect = comparing.effect(tables, samples, "04_finetune.rank")
    assert effect["difference"][1] == pytest.approx(-0.3)
    with pytest.raises(ValueError, match=r"no metric 'x' in numbers; known: 04_finetune\.held_out_loss"):
        comparing.metric_samples(tables, "x")


def test_figures(tables: comparing.SweepTables) -> None:
    samples, others = comparing.reward_samples(tables, "llm"), comparing.baseline_samples(tables, "llm")
    assert set(others) == {"mpc", "bba"}
    ax = comparing.plot_league(samples, others, best=A)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[-1] == B
    assert f"{A} (chosen)" in names
    axes = comparing.plot_effects({name: comparing.effect(tables, samples, name) for name in tables.varied})
    assert [label.get_text() for label in axes[0, 0].get_xticklabels()] == ["8", "32"]
    plt.close("all")


@pytest.mark.parametrize("tests", [True, False], ids=["tests", "metrics"])
@pytest.mark.slow
def test_notebook(tmp_path: Path, tests: bool) -> None:
    folder = make_sweep(tmp_path / "sweep", tests)
    run = notebooks.run_notebook(
        "08_compare", {"sweep_dir": str(folder)}, run_dir=tmp_path / "run", kernel="python3", echo=lambda line: None
    )
    metrics = run.metrics
    assert metrics["best"] == A.replace("False", "True")
    assert metrics["failed"] == 1
    assert set(metrics["settings"]) == {A, B, A.replace("False", "True"), B.replace("False", "True")}
    effect = metrics["effects"]["04_finetune.rank"]
    assert effect[1]["difference"] == pytest.approx(0.3 if tests else -0.3, abs=0.01)
    assert (metrics["minus_baseline"] != {}) == tests
    assert metrics["baseline"] == ("mpc" if tests else None)
    assert (run.folder / "effects.png").is_file()
    words = (run.folder / "summary.txt").read_text()
    assert "chosen: rank=8 random_weights=True (by 04_finetune.validation_reward)" in words
    assert "failed and not compared (1): rank=64 random_weights=False" in words
    assert runs.read_json(run.folder / "metrics.json")["higher_is_better"] == tests
