"""The bandwidth model, and its fit to trace sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from netllm_lib.abr import fit, synthetic
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.catalogue import make_policy
from netllm_lib.abr.qoe import summarise
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import BandwidthModel, generate_traces
from netllm_lib.abr.traces import SAMPLE, Registry, Trace, TraceSet, find_registry
from netllm_lib.cli import main


def log_variance(model: BandwidthModel) -> tuple[float, float]:
    """Variance of the log bandwidth around a trace's level: (of the autoregression, of the regimes)."""
    return model.jitter**2 / (1 - model.memory**2), float(np.var(model.regimes))


def skew(values: tuple[float, ...]) -> float:
    deviation = np.array(values) - np.mean(values)
    return float(np.mean(deviation**3) / np.std(values) ** 3)


KNOWN = [
    BandwidthModel(samples=600),
    BandwidthModel(
        median_mbps=2.5,
        spread=0.25,
        samples=400,
        memory=0.5,
        jitter=0.3,
        regime_s=40,
        regimes=(-0.8, -0.4, 0.0, 0.2, 0.4),
    ),
    BandwidthModel(
        median_mbps=0.8, spread=0.6, samples=300, interval_s=5.0, memory=0.3, jitter=0.2, regime_s=150, floor_mbps=0.15
    ),
    BandwidthModel(median_mbps=1.5, spread=0.4, samples=400, restless=0.5),
]


@pytest.mark.parametrize("known", KNOWN, ids=["default", "fast", "slow, floor", "restless"])
def test_a_fit_recovers_known_parameters(known: BandwidthModel) -> None:
    fitted = fit.fit_model(generate_traces("known", 250, 11, known))
    assert fitted.interval_s == known.interval_s
    assert fitted.samples == known.samples
    assert fitted.memory == pytest.approx(known.memory, abs=0.08)
    assert fitted.jitter == pytest.approx(known.jitter, rel=0.12)
    assert fitted.regime_s == pytest.approx(known.regime_s, rel=0.35)
    assert fitted.spread == pytest.approx(known.spread, abs=0.06)
    assert fitted.restless == pytest.approx(known.restless, abs=0.12)
    np.testing.assert_allclose(log_variance(fitted), log_variance(known), rtol=0.25)
    # the middle regime is 0 by convention: what is determined is the level with their mean
    levels = [np.log(model.median_mbps) + np.mean(model.regimes) for model in (fitted, known)]
    assert levels[0] == pytest.approx(levels[1], abs=0.02 + 3 * known.spread / np.sqrt(250))
    assert skew(fitted.regimes) < -0.1
    assert skew(known.regimes) < skew(fitted.regimes), "blurred"
    if known.floor_mbps == 0.15:  # which occurs
        assert fitted.floor_mbps == 0.15
    else:
        assert fitted.floor_mbps <= generate_traces("known", 250, 11, known).packed[2].min() + 1e-4


def test_one_speed_alone_keeps_variance_and_correlation() -> None:
    """The variogram cannot say whether it is a regime or an autoregression."""
    for known in (
        BandwidthModel(samples=500, memory=0.0, jitter=1e-3),
        BandwidthModel(samples=500, regimes=(0.0,) * 5),
    ):
        traces = generate_traces("known", 150, 3, known)
        fitted = fit.fit_model(traces)
        assert sum(log_variance(fitted)) == pytest.approx(sum(log_variance(known)), rel=0.25)
        table = fit.compare({"known": traces, "fitted": generate_traces("f", 150, 4, fitted)}, 1.0)
        correlation = table.loc["correlation of log"]
        assert correlation["fitted"] == pytest.approx(correlation["known"], abs=0.03)


def test_values_that_a_log_repeats_are_one_sample() -> None:
    """Five-second samples written once a second, give or take a packet, are fitted as the five-second samples."""
    model = replace(BandwidthModel(), interval_s=5.0, samples=120, regime_s=150.0)
    traces = generate_traces("held", 150, 5, model)
    rng = np.random.default_rng(0)
    held = []
    for trace in traces.traces:
        mbps = np.append(trace.mbps[0], np.repeat(trace.mbps[1:], 5) * rng.uniform(0.99, 1.01, 5 * len(trace.mbps) - 5))
        held.append(Trace(trace.name, np.arange(len(mbps)) * 1.0, mbps))
    fitted, direct = fit.fit_model(TraceSet("held", tuple(held))), fit.fit_model(traces)
    assert fitted.interval_s == 5.0
    assert fitted.samples == direct.samples
    assert fitted.memory == pytest.approx(direct.memory, abs=0.03)
    assert log_variance(fitted) == pytest.approx(log_variance(direct), rel=0.1)


def test_on_grid_preserves_bytes() -> None:
    trace = Trace("t", np.array([0.0, 1.0, 1.5, 4.0, 4.2]), np.array([99.0, 2.0, 4.0, 1.0, 7.0]))
    assert fit.on_grid(trace, 2.0).tolist() == [(2 * 1 + 4 * 0.5 + 1 * 0.5) / 2, 1.0]
    late = Trace("t", trace.time_s + 100, trace.mbps)
    np.testing.assert_allclose(fit.on_grid(late, 2.0), fit.on_grid(trace, 2.0))


def test_what_cannot_be_fitted_is_refused() -> None:
    short = generate_traces("short", 3, 1, BandwidthModel(samples=15))
    with pytest.raises(ValueError, match="short: too short to be fitted"):
        fit.fit_model(short)
    flat = TraceSet("flat", (Trace("t", np.arange(300.0), np.full(300, 1.5)),))
    with pytest.raises(ValueError, match="flat: its bandwidth hardly changes"):
        fit.fit_model(flat)


def test_outages_do_no_harm() -> None:
    traces = generate_traces("out", 60, 2)
    with_zeros = [
        Trace(t.name, t.time_s, np.where(np.arange(len(t.mbps)) % 97 == 50, 0.0, t.mbps)) for t in traces.traces
    ]
    fitted = fit.fit_model(TraceSet("out", tuple(with_zeros)))
    assert fitted.floor_mbps == fit.LEAST_MBPS
    made = generate_traces("made", 30, 1, fitted)
    assert np.isfinite(made.packed[2]).all()
    table = fit.compare({"out": TraceSet("out", tuple(with_zeros)), "made": made}, fitted.interval_s)
    assert np.isfinite(table.to_numpy()).all()


def test_compare_by_hand() -> None:
    slow = Trace("a", np.arange(5.0), np.array([9.0, 0.1, 0.1, 1.0, 1.0]))
    fast = Trace("b", np.arange(5.0), np.array([9.0, 2.0, 2.0, 2.0, 2.0]))
    table = fit.compare({"set": TraceSet("set", (slow, fast))}, 1.0)["set"]
    assert table["trace mean, 50 %"] == pytest.approx((0.55 + 2) / 2)
    assert table["bandwidth, 50 %"] == pytest.approx(1.5)
    assert table["share below 0.15 Mbps"] == pytest.approx(2 / 8)
    assert table["correlation of log"] == pytest.approx((1 - 1 + 1) / 6 / (4 / 8))


def test_volatility_differs_from_trace_to_trace_with_mean_square_one() -> None:
    calm, wild = (
        [np.log(t.mbps).var() for t in generate_traces("t", 400, 1, BandwidthModel(restless=r, spread=0.0)).traces]
        for r in (0.0, 0.6)
    )
    assert np.std(np.log(wild)) > 2 * np.std(np.log(calm))
    assert np.mean(wild) == pytest.approx(np.mean(calm), rel=0.25)


def rewards(traces: TraceSet, repeats: int) -> np.ndarray:
    registry = find_registry()
    video = registry.video(registry.default_video())
    simulator = Simulator(traces, video, sound_episodes(traces, repeats=repeats, seed=1))
    return np.array([summarise(play(make_policy(name, video, registry), simulator)).reward for name in ("bba", "mpc")])


def test_a_fit_to_the_real_traces_resembles_them_more_than_the_default(real_data: Path) -> None:
    real = Registry(real_data).trace_set("fcc-train")
    model = fit.fit_model(real)
    fitted, default = (generate_traces("t", 1000, 7, m) for m in (model, BandwidthModel()))
    table = fit.compare({"real": real, "fitted": fitted, "default": default}, model.interval_s)
    off = table.sub(table["real"], axis=0).abs().to_dict()
    for row in ("bandwidth, 95 %", "share below 0.15 Mbps"):
        assert off["fitted"][row] < off["default"][row], row


@pytest.mark.slow
def test_policies_do_on_a_fit_more_like_on_the_real_traces(real_data: Path) -> None:
    real = Registry(real_data).trace_set("fcc-train")
    model = fit.fit_model(real)
    target = rewards(real, 4)
    distance = {}
    for name, each in (("fitted", model), ("default", BandwidthModel())):
        drawn = [rewards(generate_traces("t", 1000, seed, each), 1) for seed in (7, 8, 9)]
        distance[name] = np.abs(np.mean(drawn, axis=0) - target)
    assert (distance["fitted"] < distance["default"]).all()


def netllm(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return int(stopped.value.code or 0)


def test_generate_like(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "data",
        "generate",
        str(tmp_path),
        "--like",
        "sample-train",
        "--data",
        str(SAMPLE),
        "--train",
        "4",
        "--test",
        "3",
    ]
    assert netllm(*words, "--json") == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result["trace_sets"] == ["sample-train-like-train", "sample-train-like-test"]
    model = BandwidthModel(**(result["model"] | {"regimes": tuple(result["model"]["regimes"])}))
    assert model == fit.fit_model(Registry(SAMPLE).trace_set("sample-train"))
    written = Registry(tmp_path).trace_set("sample-train-like-test")
    assert written.traces[2].mbps.tolist() == synthetic.generate_trace("x", (8, 2), model).mbps.tolist()
    assert list(Registry(tmp_path).video_folders()) == ["sample"]
    for line in ("memory", "regimes", "bandwidth, 50 %", "correlation of log"):
        assert line in shown
    assert netllm("data", "generate", str(tmp_path), "--like", "nothing", "--data", str(SAMPLE)) == 2
    assert "there: sample-test, sample-train" in capsys.readouterr().err


def test_a_video_that_is_there_stays(tmp_path: Path) -> None:
    synthetic.write_video(synthetic.generate_video("own", 1), tmp_path)
    traces = Registry(SAMPLE).trace_set("sample-test")
    fit.write_like(traces, fit.fit_model(traces), tmp_path, 2, 1)
    assert list(Registry(tmp_path).video_folders()) == ["own"]
