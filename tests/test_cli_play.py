"""`netllm play` and `netllm data` on the bundled sample."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from netllm_lib.abr import evaluate, qoe
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.cli import main

KEYS = {
    "mean_reward", "low", "high", "mean_all48", "traces", "fixed", "seed", "bitrate_mbps", "rebuffer_s", "smoothness_mbps",
    "per_trace",
}  # fmt: skip


def netllm(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*words, *([] if {"generate", "pool"} & set(words) else ["--data", str(SAMPLE)])])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("words", "traces", "fixed"),
    [
        (["--preset", "upstream"], 30, True),
        (["--preset", "upstream", "--trace-num", "10"], 10, False),
        (["--preset", "upstream", "--trace-num", "10", "--fixed-order"], 10, True),
        (["--preset", "upstream", "--trace-num", "-1"], 30, True),
        (["--trace-num", "7"], 7, True),
    ],
)
def test_play_ends_with_one_json_line(
    capsys: pytest.CaptureFixture, tmp_path: Path, words: list[str], traces: int, fixed: bool
) -> None:
    words = [*words, "--out", str(tmp_path / "table.csv"), "--json"]
    assert netllm("play", "--policy", "bba", "--traces", "sample-test", *words) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result.keys() == KEYS
    assert (result["traces"], result["fixed"], len(result["per_trace"])) == (traces, fixed, traces)
    assert result["mean_reward"] == pytest.approx(sum(result["per_trace"].values()) / traces)
    assert result["low"] < result["mean_reward"] < result["high"]
    assert qoe.summarise(pd.read_csv(tmp_path / "table.csv")).reward == pytest.approx(result["mean_reward"])


def test_sound_play_is_the_test_of_notebook_05(tmp_path: Path) -> None:
    """The sample has no pointer files: the starting points are the protocol's, whatever the seed."""
    registry = Registry(SAMPLE)
    traces, video = registry.trace_set("sample-test"), registry.video("sample")
    assert netllm("play", "--policy", "mpc", "--seed", "5", "--out", str(tmp_path / "table.parquet")) == 0
    expected = evaluate.test({"mpc": RobustMPC(video)}, traces, video).tables["mpc"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["play", "--policy", "mcp"], "unknown policy 'mcp'; known: bba, mpc"),
        (["play", "--policy", "runs/none"], "runs/none is not there"),
        (["play", "--policy", "none.py:Mine"], "none.py is not there"),
        (
            ["play", "--policy", "bba", "--out", "table.txt"],
            "--out table.txt: give a name that ends in .parquet or .csv",
        ),
        (["play", "--policy", "mpc", "--traces", "fcc"], "there: sample-test, sample-train"),
        (["play", "--policy", "mpc", "--video", "x"], "video 'x' not found"),
        (["play", "--policy", "mpc", "--preset", "upstream", "--trace-num", "31"], "has 30 traces, 31 were asked for"),
        (["play", "--policy", "mpc", "--trace-num", "500"], "has 30 traces, 500 were asked for"),
        (["play", "--policy", "mpc", "--trace-num", "0"], "has 30 traces, 0 were asked for"),
        (["pool", "show", "/tmp"], "/tmp: no such experience pool"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert netllm(*words) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_data_list_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert netllm("data", "list", "--json") == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["traces"] for row in found["trace_sets"]] == [30, 60]
    assert found["trace_sets"][0] | {"min_s": 219.0, "median_s": 219.0, "max_s": 219.0} == found["trace_sets"][0]
    assert found["overlaps"] == {
        "sample-test": {"sample-test": 30, "sample-train": 0},
        "sample-train": {"sample-test": 0, "sample-train": 60},
    }
    assert netllm("data", "generate", str(tmp_path), "--train", "3", "--test", "2") == 0
    assert len(list(tmp_path.glob("traces/*/*/*"))) == 5


def test_data_list_of_the_real_data(real_data: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["data", "list", "--data", str(real_data), "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    sets = {row["trace set"]: row for row in found["trace_sets"]}
    assert (sets["fcc-train"]["traces"], sets["fcc-test"]["traces"]) == (235, 100)
    assert found["overlaps"]["fcc-test"] == {"fcc-test": 100, "fcc-train": 81, "fcc-valid": 41}
    assert found["overlaps"]["fcc-train"]["fcc-test"] == 180
