"""The original's text files: result files, losses, console logs and folder names, whole, cut, mailed and broken."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import GOLDEN, Golden
from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry, TraceSet
from netllm_lib.abr.upstream import logs, names
from netllm_lib.abr.upstream.discover import IDENTITY, MOST_NOTES, discover
from netllm_lib.runs import read_json
from test_fuzz import attempt
from upstream_tree import (
    SETTINGS,
    arguments_line,
    console_text,
    model_path,
    pool_name,
    pool_path,
    results_path,
    write_result_file,
    write_results,
    write_train_losses,
)  # fmt: skip

RUNS = sorted(path.parent.name for path in GOLDEN.glob("upstream_run/*/run.json")) or ["absent"]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    return Registry(SAMPLE).trace_set("sample-test")


@pytest.fixture(scope="module")
def table(traces: TraceSet) -> pd.DataFrame:
    """A baseline played as the original does, with noise and in shuffled order."""
    episodes = upstream_episodes(traces, trace_num=4, seed=3)
    return play(BBA(), Simulator(traces, Registry(SAMPLE).video("sample"), episodes))


@pytest.fixture
def result_file(table: pd.DataFrame, tmp_path: Path) -> Path:
    return write_result_file(tmp_path / "result_sim_abr_x", table.iloc[:CHUNKS])


# --- result files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank_line", [False, True])
def test_result_files_come_back_to_the_bit(table: pd.DataFrame, tmp_path: Path, blank_line: bool) -> None:
    written = table.iloc[:CHUNKS]
    path = write_result_file(tmp_path / "result_sim_abr_t", written, blank_line=blank_line)
    read = logs.read_result_file(path)
    pd.testing.assert_frame_equal(read, written[read.columns.tolist()], check_exact=True)
    assert write_result_file(tmp_path / "again", read, blank_line=blank_line).read_bytes() == path.read_bytes()
    assert path.read_bytes().endswith(b"\n\n") == blank_line


def edit(line: int, column: int, value: str) -> Any:
    def change(lines: list[str]) -> list[str]:
        fields = lines[line].split("\t")
        fields[column] = value
        return [*lines[:line], "\t".join(fields), *lines[line + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[:30], r"30 lines, a result file has 48"),
        (lambda lines: [*lines[:47], lines[47][:20]], r":48: \d columns, expected 8"),
        (lambda lines: [*lines, lines[0]], r"49 lines"),
        (lambda lines: [], ":1: 1 columns"),
        (lambda lines: ["<html>"], r":1: 1 columns"),
        (lambda lines: [line + "\t1" for line in lines], r":1: 9 columns, expected 8"),
        (lambda lines: [line.replace("\t", ",") for line in lines], r":1: 1 columns"),
        (edit(3, 2, "x"), r":4: buffer_s is 'x', not a finite number"),
        (edit(3, 2, "nan"), r":4: buffer_s is 'nan', not a finite"),
        (edit(9, 7, "-inf"), r":10: reward is '-inf', not a finite"),
        (edit(5, 1, "1000"), r":6: bitrate_kbps is 1000, not one of"),
        (edit(5, 4, "-3"), r":6: size_bytes is -3, not a number of bytes"),
        (edit(5, 3, "-1.0"), r":6: rebuffer_s is -1, which cannot be negative"),
        (edit(7, 7, "0.123"), r":8: reward is 0.123, which does not follow"),
        (edit(7, 6, "0.111"), r":8: smoothness_mbps is 0.111, which is not the change of the bitrate"),
    ],
)
def test_broken_result_files(result_file: Path, change: Any, reason: str) -> None:
    lines = change(result_file.read_text().splitlines())
    result_file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=rf"{result_file.name}.*{reason}"):
        logs.read_result_file(result_file)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "result_sim_abr_x"
    with open(path, "wb") as stream:
        stream.truncate(10**9)
    with pytest.raises(ValueError, match="1000000000 bytes"):
        logs.read_result_file(path)


def test_results_are_the_table_that_was_played(table: pd.DataFrame, traces: TraceSet, tmp_path: Path) -> None:
    """In the order of playing, which the file names do not tell."""
    write_results(tmp_path, table, traces.name, blank_line=True)
    read = logs.read_results(tmp_path, traces)
    assert table["trace"].iloc[0] != min(table["trace"])  # else the order would prove nothing
    pd.testing.assert_frame_equal(read, table[read.columns.tolist()])
    assert set(table.columns) - set(read.columns) == {"start_ptr", "trace_index"}
    assert qoe.summarise(read) == qoe.summarise(table)
    assert logs.read_results(tmp_path, traces.name)["trace"].tolist() == read["trace"].tolist()
    raw = logs.read_results(tmp_path)["trace"]
    assert raw.tolist() == [f"{traces.name}_{trace}" for trace in read["trace"]]
    assert logs.trace_of("result_sim_abr_sample-test_no_such", traces) == "sample-test_no_such"
    assert logs.trace_of("result_sim_abr_a_b_c", "a_b") == "c"
    with pytest.raises(FileNotFoundError, match="no result_sim_abr_"):
        logs.read_results(tmp_path.parent)


@pytest.mark.golden
@pytest.mark.parametrize("name", RUNS)
def test_result_files_of_the_original(golden: Golden, tmp_path: Path, name: str) -> None:
    folder = golden("upstream_run", name)
    expected, compared = read_json(folder / "run.json"), 0
    for part, mean in (("results", "mean"), ("results_test_alone", "mean_alone")):
        leaf = next((folder / part).rglob("result_sim_abr_*")).parent
        for path in logs.result_files(leaf):
            again = write_result_file(tmp_path / "again", logs.read_result_file(path))
            assert again.read_bytes() == path.read_bytes()
            compared += 1
        read = logs.read_results(leaf, expected["traces"])
        assert qoe.summarise(read).reward == pytest.approx(expected[mean], abs=1e-12)
        assert read["trace"].nunique() == expected["trace_num"]
        assert read["time_s"].is_monotonic_increasing
    assert compared == 2 * expected["trace_num"]


# --- training losses ------------------------------------------------------------------------------------------------


@QUICK
@given(values=st.lists(st.floats(0, 1e6) | st.just(float("inf")), min_size=1, max_size=40), cut=st.integers(0, 12))
def test_losses_come_back_also_when_cut(tmp_path: Path, values: list[float], cut: int) -> None:
    path = write_train_losses(tmp_path / "train_losses.txt", values)
    text = path.read_text()
    path.write_text(text := text[: len(text) - cut])
    whole = text.count("\n")
    if not whole:
        with pytest.raises(ValueError, match="no losses in it"):
            logs.train_losses(path)
        return
    losses = logs.train_losses(path)
    assert losses.values.tolist() == [float(f"{value:.6f}") for value in values[:whole]]
    assert losses.values.dtype == np.float64
    assert losses.truncated == (not text.endswith("\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no losses"),
        ("1.5\n\n1.5\n", ":2: '' is not a loss"),
        ("1.5\n0x10\n", ":2: '0x10' is not a loss"),
        ("1.500000\n1_0.5\n1.500000\n", ":2: '1_0.5' is not a loss"),
        ("1.500000 1.600000\n", ":1: '1.500000 1.600000' is not a loss"),
        ("<!doctype html>\n", ":1: '<!doctype html>'"),
        ("1.500000\n1.5\x00\n", "is not a loss"),
    ],
)
def test_broken_losses(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "train_losses.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"train_losses\.txt.*{reason}"):
        logs.train_losses(tmp_path / "train_losses.txt")


@pytest.mark.golden
@pytest.mark.parametrize("name", RUNS)
def test_losses_of_the_original(golden: Golden, name: str) -> None:
    """Epoch by epoch they have the mean that the console log prints."""
    (path,) = golden("upstream_run", name).rglob("train_losses.txt")
    console = logs.read_console(next(golden("upstream_run", name).rglob("*console.log")))
    losses = logs.train_losses(path)
    assert not losses.truncated
    means = losses.values.reshape(len(console.epochs), -1).mean(axis=1)
    assert means == pytest.approx([epoch.loss_mean for epoch in console.epochs], abs=1e-6)


# --- console log ----------------------------------------------------------------------------------------------------

LOSSES = np.random.default_rng(0).uniform(0.2, 2.5, (12, 230))
NAMED = {**SETTINGS, "pool": pool_name(SETTINGS)}
TEXT = console_text(NAMED, LOSSES, -1.25)


def test_a_whole_log() -> None:
    console = logs.read_console(TEXT)
    assert [epoch.epoch for epoch in console.epochs] == list(range(12))
    assert [epoch.loss_mean for epoch in console.epochs] == pytest.approx(LOSSES.mean(axis=1).tolist(), abs=1e-12)
    assert [epoch.loss_std for epoch in console.epochs] == pytest.approx(LOSSES.std(axis=1).tolist(), abs=1e-12)
    assert [epoch.seconds for epoch in console.epochs] == [10.5 + epoch for epoch in range(12)]
    evaluated = [(e.epoch, e.episodes_return, e.saved) for e in console.epochs if e.episodes_return is not None]
    assert evaluated == [(0, 3.5, True), (11, 14.5, True)]
    assert (console.mean_reward, console.best_epoch) == (-1.25, 11)
    assert not console.cut
    assert [path.rpartition("_")[2] for path in console.folders] == ["checkpoint/0", "model", "checkpoint/11", "model"]
    assert console.arguments == []


@settings(max_examples=150, deadline=None)
@given(start=st.integers(0, len(TEXT)), length=st.integers(0, len(TEXT)))
def test_any_part_of_a_log_tells_nothing_else_than_the_whole(start: int, length: int) -> None:
    whole, part = logs.read_console(TEXT), TEXT[start : start + length]
    console, reason = attempt(lambda: logs.read_console(part))
    if console is None:
        assert "no line that the original prints" in reason
        return
    for epoch in console.epochs:
        true = vars(whole.epochs[epoch.epoch])
        assert all(value in (None, False, true[name]) for name, value in vars(epoch).items())
    assert set(console.folders) <= set(whole.folders)
    assert console.mean_reward in (None, -1.25)
    seen = [epoch.epoch for epoch in console.epochs]
    assert seen == list(range(seen[0], seen[-1] + 1) if seen else [])


@pytest.mark.parametrize(
    "end", [TEXT.index("Training Information"), TEXT.rindex("\n", 0, TEXT.index("#7 ")), TEXT.index("'mean_reward'")]
)
def test_a_log_that_is_cut(end: int) -> None:
    """Within an epoch's numbers, within an epoch, within the test."""
    console = logs.read_console(TEXT[:end])
    assert console.cut
    assert console.mean_reward is None


def test_quoted_coloured_and_mixed_with_other_output() -> None:
    noisy = "".join(
        f"> \x1b[32m2024-03-01 12:00:{i % 60:02d} {line}\x1b[0m\r\n> UserWarning: None of the inputs have requires_grad\r\n"
        for i, line in enumerate(TEXT.splitlines())
    )
    assert logs.read_console(noisy.replace("\r\n", "\n")) == logs.read_console(TEXT)


def test_numpy_2_and_losses_that_are_not_finite() -> None:
    text = re.sub(r"(train_loss_\w+': )([\d.]+)", r"\1np.float64(\2)", TEXT)
    assert text.count("np.float64") == 24
    assert logs.read_console(text).epochs == logs.read_console(TEXT).epochs
    with np.errstate(invalid="ignore"):
        console = logs.read_console(console_text(NAMED, np.array([[1.0, np.inf], [np.nan, np.nan]])))
    assert console.epochs[0].loss_mean == np.inf
    assert np.isnan(console.epochs[1].loss_mean or 0)


def test_arguments_from_the_terminal() -> None:
    line = arguments_line(NAMED, f"artifacts/exp_pools/{pool_path(NAMED)}")
    (arguments,) = logs.read_console(line + TEXT).arguments
    assert (arguments["grad_accum_steps"], arguments["lr"], arguments["sample_step"]) == (32, 0.0001, None)
    for broken in (line[:200] + "\n", line.replace("rank=4", "rank=f(4)"), "Namespace(" + "(" * 5000 + ")\n"):
        assert logs.read_console(broken + TEXT).arguments == []


def test_a_test_alone_and_several_runs_in_one_log() -> None:
    alone = TEXT[TEXT.index("Load model") :]
    console = logs.read_console(alone)
    assert (console.epochs, console.mean_reward, console.cut) == ([], -1.25, False)
    console = logs.read_console(TEXT + console_text(NAMED, LOSSES[:2] + 1, 0.5))
    assert (len(console.epochs), console.mean_reward, console.earlier_runs, console.cut) == (2, 0.5, 1, False)
    assert logs.read_console(TEXT + alone.replace("-1.25", "-2.5")).mean_reward == -2.5


@pytest.mark.parametrize("text", ["", "hello\n", "1.5\n" * 50, "\x00" * 100])
def test_what_is_no_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "some.log").write_text(text)
    with pytest.raises(ValueError, match=r"some\.log: no line that the original prints"):
        logs.read_console(tmp_path / "some.log")


@pytest.mark.parametrize(
    "piece",
    [
        "Checkpoint saved at:x", "Checkpoint saved at: ", "Best model saved at:  ", "Load model from:   ", "Namespace(", "\r",
        "Namespace(w=1,", "Step ", "Step 1", "Step 1 - mean train loss ", "Training Iteration #1", "Mean reward: 1", "'a':", "'a/",
        "'a': 1.5e", "\x1b[", "\x1b[0;", "\x1b", "_ss_", "/a_ss_1", "/genet_udr_1", "_rank_1_w_1", "/seed_1", "early_stop_1_", " ",
    ],
)  # fmt: skip
def test_the_time_is_in_proportion_to_the_text(tmp_path: Path, piece: str) -> None:
    """A megabyte of what the patterns begin with in one line, and one in many, behind what makes a path of it."""
    path, begin = tmp_path / "console.log", time.process_time()
    for before in ("", "Checkpoint saved at: "):
        line = before + piece * (19_000 // len(piece)) + "\n"
        path.write_text(TEXT + piece * (10**6 // len(piece)) + "\n" + line * 52)
        attempt(partial(discover, path))
    assert time.process_time() - begin < 10


def test_many_different_settings_take_no_time(tmp_path: Path) -> None:
    path, begin = tmp_path / "console.log", time.process_time()
    lines = (
        f"Best model saved at: x/{names.TRAINING.format(**NAMED | {'seed': seed, 'rank': seed})}\n"
        for seed in range(9000)
    )
    path.write_text("".join(lines))
    assert len(discover(path).notes) == MOST_NOTES
    assert time.process_time() - begin < 5


@pytest.mark.golden
@pytest.mark.parametrize("name", RUNS)
def test_logs_of_the_original(golden: Golden, name: str) -> None:
    folder = golden("upstream_run", name)
    (path,) = folder.rglob("*console.log")
    console = logs.read_console(path)
    assert [epoch.epoch for epoch in console.epochs] == list(range(names.settings_of(path)["epochs"]))
    assert all(None not in (e.loss_mean, e.loss_std, e.seconds) for e in console.epochs)
    assert not console.cut
    assert console.mean_reward == pytest.approx(read_json(folder / "run.json")["mean"], abs=1e-12)
    assert names.settings_of(console.folders[0])["plm_type"] == read_json(folder / "run.json")["plm_type"]
    evaluated = [epoch for epoch in console.epochs if epoch.episodes_return is not None]
    # every line is understood
    text = path.read_text()
    assert len(console.epochs) == text.count("Training Information")
    assert len(evaluated) == text.count("Evaluation Information")
    assert len(console.folders) == text.count("Checkpoint saved") + text.count("Best model saved")
    assert sum(epoch.saved for epoch in console.epochs) == text.count("Best model saved")


# --- folder names ---------------------------------------------------------------------------------------------------

POOL_KEYS = {"pool", *(key for key in SETTINGS if key.startswith(("pool_", "train_")))}
TEST_KEYS = {key for key in SETTINGS if key.startswith(("test_", "target_"))} | {*IDENTITY, "w"}
TRAIN_KEYS = SETTINGS.keys() - TEST_KEYS | POOL_KEYS | {*IDENTITY, "w"} - {"early_stop"}
ODD: dict[str, Any] = {
    "pool_models": ("genet", "udr_1", "udr_real"), "train_traces": "4G_lte_2", "train_video": "my-video.2", "pool_trace_num": -1,
    "pool_fixed": True, "plm_type": "t5-lm", "plm_size": "my_own", "sample_step": 7, "rank": -1, "gamma": 0.1 + 0.2, "lr": 1e-05,
    "weight_decay": 0.0, "early_stop": -2, "test_traces": "my_traces", "test_fixed": True, "target_return_scale": 1e-10,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, ODD, {"early_stop": 17, "lr": 12345.678, "train_traces": "a_bba_mpc"}])
def test_settings_come_back_from_the_names(changes: dict[str, Any]) -> None:
    told = SETTINGS | changes
    told["pool"] = pool_name(told)

    def some(keys: Iterable[str]) -> dict[str, Any]:
        return {key: told[key] for key in keys}

    run = Path("/somewhere/data/ft_plms") / model_path(told)
    assert names.settings_of(run) == some(TRAIN_KEYS)
    inside = run / f"early_stop_{told['early_stop']}_checkpoint" / "40" / "adapter_config.json"
    assert names.settings_of(inside) == some(TRAIN_KEYS | {"early_stop"})
    assert names.settings_of(results_path(told) / "result_sim_abr_x") == some(TEST_KEYS)
    assert names.settings_of(str(Path("artifacts/exp_pools") / pool_path(told))) == some(POOL_KEYS)
    baseline = some(key for key in TEST_KEYS if key.startswith("test_")) | {"policy": "udr_1"}
    assert names.settings_of(results_path(baseline)) == baseline


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", {}),
        ("data/ft_plms/try_llama2_7b", {}),
        ("artifacts_exp_pools_ss_None", {"pool": "artifacts_exp_pools", "sample_step": None}),
        (r"data\ft_plms\qwen_base\x_ss_3", {"pool": "x", "sample_step": 3, "plm_type": "qwen", "plm_size": "base"}),
        ("ft_plm/x_ss_3", {"pool": "x", "sample_step": 3}),
        (
            "a_b_mine_seed_1_trace_num_5_fixed_True_ss_3",
            {
                "pool": "a_b_mine_seed_1_trace_num_5_fixed_True", "train_traces": "a", "train_video": "b",
                "pool_models": ("mine",), "pool_seed": 1, "pool_trace_num": 5, "pool_fixed": True, "sample_step": 3,
            },
        ),
        (
            "my_copy/rank_128_w_20_gamma_1.0_tgt_scale_1e-05_seed_7",  # without early_stop
            {"rank": 128, "w": 20, "gamma": 1.0, "target_return_scale": 1e-5, "test_seed": 7},
        ),
        ("rank_8_w_20_gamma_1.0_sfd_256", {}),  # half a name tells nothing
    ],
)  # fmt: skip
def test_settings_of_odd_paths(path: str, told: dict[str, Any]) -> None:
    assert names.settings_of(path) == told


def test_run_and_label_of_a_path() -> None:
    place = Path("x/early_stop_-1_checkpoint/40/adapter_model.bin")
    assert names.run_of(place) == (Path("x"), -1)
    assert names.run_of(Path("x/y")) is None
    assert names.results_label(Path("artifacts/results") / results_path(NAMED)) == "results"
    assert names.results_label(Path("old_results") / results_path(NAMED)) == "old_results"
    assert names.results_label(Path("mine")) == "mine"
