"""Comparing the settings of a sweep: tidy results, pooled intervals, effects, notebook 08."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from netllm_lib import compare, notebooks, stats
from netllm_lib.measure import Measure, Scores
from netllm_lib.parameters import notebook_run

TRACES = [f"trace{i}" for i in range(12)]
EFFECT, PRETRAINED = {8: 0.0, 32: 0.3}, 0.1
REWARD, ERROR = Measure("reward"), Measure("error", "degrees", "lower", "user")
A, B = "rank=8 random_weights=False", "rank=32 random_weights=False"
A_RANDOM, B_RANDOM = A.replace("False", "True"), B.replace("False", "True")
VALIDATION, LOSS, RANK = "04_finetune.validation", "04_finetune.held_out_loss", "04_finetune.rank"


def make_sweep(
    folder: Path, tests: bool = True, validation: bool = True, measure: Measure = REWARD, failed: bool = True
) -> Path:
    """A sweep's folder over rank × random_weights with its tests, as `netllm sweep` leaves it; rank 32 is better by any measure."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, len(TRACES))
    rows: list[dict[str, Any]] = []
    for rank, random, seed in itertools.product(EFFECT, (False, True), (1, 2, 3)):
        number = len(rows) + 1
        shift = measure.sign * (EFFECT[rank] - PRETRAINED * random + 0.02 * seed)
        values = {"llm": base + shift + rng.normal(0, 0.01, len(base)), "mpc": base, "bba": base - measure.sign * 0.2}
        row: dict[str, Any] = {"point": number, "seed": seed, "state": "done", "problem": "", "run.04_finetune": None}
        row |= {f"parameter.{RANK}": rank, "parameter.04_finetune.random_weights": random, "parameter.epochs": 4}
        row |= {f"metric.{LOSS}": 1 - shift}
        if validation:  # which prefers another setting than the test
            row[f"metric.{VALIDATION}"] = 1.0 - (rank == 32) + 0.1 * random
        if tests:
            table = pd.DataFrame({measure.sample: TRACES, **values}).melt(measure.sample, None, "policy", measure.name)
            scores = Scores(measure, "llm", table.assign(stall=0.5), "fcc-test")
            test, again = (folder / "runs" / f"{name}-{number}" for name in ("test", "again"))
            notebook_run(str(again), "06_diagnostics", test=test)  # has the same scores, of the same test
            for name, place in (("05_test", test), ("06_diagnostics", again)):
                row[f"run.{name}"] = str(place)
                scores.save(place)
        rows.append(row)
    if failed:
        rows.append(rows[0] | {"point": len(rows) + 1, f"parameter.{RANK}": 64, "state": "failed", "problem": "no"})
    points = pd.DataFrame(rows).astype({"seed": "Int64"})
    points.to_parquet(folder / compare.POINTS)
    compare.collect(points).to_parquet(folder / compare.RESULTS)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> compare.SweepTables:
    return compare.load(make_sweep(tmp_path_factory.mktemp("sweep")))


def test_a_sweep_is_read_with_its_tests(tables: compare.SweepTables, tmp_path: Path) -> None:
    assert len(tables.results) == 12 * 3 * len(TRACES)  # of each test once
    row = tables.results.iloc[0]
    assert list(row[["step", "tested_on", "subject", "policy", "sample", "measure", "stall", "seed", "setting"]]) == [
        *("05_test", "fcc-test", "llm", "llm", "trace0", "reward", 0.5, 1, A),
    ]
    assert tables.measure == Measure("reward", sample="sample")
    assert (tables.subject, tables.policies) == ("llm", ["llm", "mpc", "bba"])
    assert tables.varied == (RANK, "04_finetune.random_weights")
    assert list(tables.failed["setting"]) == ["rank=64 random_weights=False"]
    with pytest.raises(ValueError, match="no point tested the policy 'ppo'; tested: llm, mpc, bba"):
        compare.figures(tables, "ppo")
    with pytest.raises(FileNotFoundError, match=r"no points\.parquet; name a folder that `netllm sweep` made"):
        compare.load(tmp_path)
    tables.failed.drop(columns="setting").to_parquet(tmp_path / compare.POINTS)
    with pytest.raises(ValueError, match="no point is done"):
        compare.load(tmp_path)


def test_seeds_are_pooled_as_by_hand(tables: compare.SweepTables) -> None:
    """The same figures from the rows of the table, put into [seeds, samples] by hand."""
    rows = tables.results[tables.results["policy"] == "llm"].set_index(["setting", "seed", "sample"])["value"]
    by_hand = {name: np.array([[rows[name, seed, t] for t in TRACES] for seed in (1, 2, 3)]) for name in (A, B)}
    mpc = tables.results[(tables.results["policy"] == "mpc") & (tables.results["point"] == 1)]["value"].to_numpy()
    samples = compare.figures(tables, "llm")
    ranking = compare.ranking(samples)
    assert list(ranking.index) == [B, B_RANDOM, A, A_RANDOM]
    assert list(ranking.loc[A, ["mean", "low", "high"]]) == pytest.approx(stats.bootstrap_runs(by_hand[A]))
    assert list(ranking.loc[A, ["runs", "samples"]]) == [3, 12]
    assert ranking["best_run"][A] == pytest.approx(by_hand[A].mean(axis=1).max())
    baseline = compare.baseline_figures(tables, "mpc")
    assert baseline.shape == (1, 12)  # it has no seed: its twelve plays are one
    assert compare.differences(samples, baseline)[A] == pytest.approx(stats.bootstrap_runs(by_hand[A], mpc[None]))
    between = compare.differences(samples, samples[A])[B]
    assert between == pytest.approx(stats.bootstrap_runs(by_hand[B], by_hand[A]))
    assert between.mean == pytest.approx(0.3, abs=0.01)


def test_other_samples_are_not_compared() -> None:
    here, there = pd.DataFrame([[1.0, 2.0]], columns=["a", "b"]), pd.DataFrame([[3.0, 5.0]], columns=["c", "d"])
    assert compare.differences({"here": here}, there) == {}
    assert compare.differences({"here": here}, there.assign(b=1.0, a=1.0))["here"].mean == 0.5


def test_metrics_get_students_interval() -> None:
    ours, theirs = (pd.DataFrame({"metric": values}) for values in ([1.0, 2.0, 3.0], [0.0, 2.0]))
    assert compare.pooled(ours) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    reference = ttest_ind([1.0, 2.0, 3.0], [0.0, 2.0], equal_var=False).confidence_interval()
    assert compare.pooled(ours, theirs) == pytest.approx((1, reference.low, reference.high))
    assert compare.pooled(ours * 0 + 5) == (5, 5, 5)
    assert np.isnan(compare.pooled(ours.iloc[:1]).low)


def test_lower_may_be_better_and_validation_chooses(tables: compare.SweepTables, tmp_path: Path) -> None:
    assert compare.chosen(tables, compare.figures(tables, "llm"), "higher", VALIDATION) == (A_RANDOM, VALIDATION)
    errors = compare.load(make_sweep(tmp_path, validation=False, measure=ERROR))
    assert errors.measure.better == "lower"
    samples = compare.figures(errors, "llm")
    ranking = compare.ranking(samples, "lower")
    assert list(ranking.index) == [B, B_RANDOM, A, A_RANDOM]
    assert ranking["best_run"][A] < ranking["worst_run"][A]
    assert compare.chosen(errors, samples, "lower", VALIDATION) == (B, "the figures compared")


def test_effect_holds_the_others(tables: compare.SweepTables) -> None:
    samples = compare.figures(tables, "llm")
    rank = compare.effect(tables, samples, RANK)
    assert list(rank["value"]) == [8, 32]  # 64 failed
    assert list(rank["combinations"]) == [2, 2]
    assert rank["difference"][1] == pytest.approx(0.3, abs=0.01)
    assert rank["difference_low"][1] > 0.2
    random = compare.effect(tables, samples, "04_finetune.random_weights")
    assert list(random["value"]) == [False, True]
    assert random["difference"][1] == pytest.approx(-PRETRAINED, abs=0.01)
    # without one of the four settings, only the two that differ in rank alone are left
    rest = compare.effect(tables, {name: sample for name, sample in samples.items() if name != B}, RANK)
    assert list(rest["combinations"]) == [1, 1]
    assert rest["difference"][1] == pytest.approx(0.3, abs=0.01)
    # a seed that one of them lacks does not count
    fewer = compare.effect(tables, samples | {B: samples[B].iloc[:2]}, RANK)
    assert fewer["mean"][0] != rank["mean"][0]


def test_metrics_alone(tmp_path: Path) -> None:
    tables = compare.load(make_sweep(tmp_path, tests=False))
    assert tables.results.empty
    assert compare.numeric_metrics(tables.points)[0] == LOSS
    samples = compare.metric_figures(tables, LOSS)
    ranking = compare.ranking(samples, "lower")
    assert ranking.index[0] == B
    assert list(ranking.loc[B, ["samples", "mean"]]) == pytest.approx([1, 1 - 0.34])
    assert compare.effect(tables, samples, RANK)["difference"][1] == pytest.approx(-0.3)
    with pytest.raises(ValueError, match=r"no metric 'x' in numbers; known: 04_finetune\.held_out_loss"):
        compare.metric_figures(tables, "x")


@pytest.mark.parametrize("tests", [True, False], ids=["tests", "metrics"])
@pytest.mark.slow
def test_notebook(tmp_path: Path, tests: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    asked = {"sweep_dir": str(make_sweep(tmp_path / "sweep", tests, failed=tests)), "choose_by": VALIDATION}
    run = notebooks.run_notebook("08_compare", asked | ({} if tests else {"better": "lower"}), echo=lambda line: None)
    metrics = run.metrics
    assert (metrics["best"], metrics["failed"]) == (A_RANDOM if tests else B, tests)
    assert set(metrics["settings"]) == {A, B, A_RANDOM, B_RANDOM}
    assert metrics["effects"][RANK][1]["difference"] == pytest.approx(0.3 if tests else -0.3, abs=0.01)
    assert (metrics["minus_baseline"] != {}) == tests
    assert metrics["baseline"] == ("mpc" if tests else None)
    lost = "failed and not compared (1): rank=64 random_weights=False"
    assert (lost in (run.folder / "summary.txt").read_text()) == tests
    assert ("<th>problem</th>" in (run.folder / "report.html").read_text()) == tests  # no table of nothing
