"""The compiled lock-step simulator against the plain reference, chunk by chunk and bit by bit."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import pytest

from netllm_lib.abr.episodes import Episodes, sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import BandwidthModel, generate_traces, generate_video
from netllm_lib.abr.traces import Trace, TraceSet, Video
from reference import ReferenceEnvironment

FAST = BandwidthModel(median_mbps=6.0, samples=60, interval_s=2.3)  # buffers fill up: clients sleep
SLOW = BandwidthModel(median_mbps=0.7, samples=25, interval_s=0.7)  # traces wrap around, clients stall


@pytest.mark.parametrize("model", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize("noise", [False, True])
def test_equals_reference_bit_by_bit(model: BandwidthModel, noise: bool) -> None:
    traces, video = generate_traces("t", 12, 5, model), generate_video("v", 3)
    episodes = sound_episodes(traces, seed=4, noise=noise)
    simulator, levels = Simulator(traces, video, episodes), np.random.default_rng(0).integers(0, 6, (12, CHUNKS))
    slept, replayed = 0.0, simulator.replay(levels)
    references = [
        ReferenceEnvironment(t, video, int(p), None if episodes.noise is None else episodes.noise[i])
        for i, (t, p) in enumerate(zip(traces.traces, episodes.start_ptr, strict=True))
    ]
    for chunk in range(CHUNKS):
        outcome = simulator.step(levels[:, chunk])
        for i, reference in enumerate(references):
            expected = reference.download(int(levels[i, chunk]))
            got = (outcome.delay_ms[i], outcome.residual_ms[i], outcome.buffer_s[i], outcome.rebuffer_s[i])
            assert got == expected[:4]
            assert outcome.size_bytes[i] == expected.size_bytes
            slept += expected.sleep_ms
        np.testing.assert_array_equal(outcome.reward, replayed.reward[:, chunk])
    assert (slept > 0) == (model is FAST)


def one(mbps: list[float], sizes: int = 1_000_000, start: int = 1) -> Simulator:
    trace = Trace("hand", np.arange(len(mbps), dtype=float) * 10, np.array(mbps))
    video = Video("hand", np.tile(np.full(CHUNKS, sizes), (6, 1)))
    episodes = Episodes(np.array([0]), np.array([start]), None, np.ones((1, CHUNKS), int), 0, True)
    return Simulator(TraceSet("hand", (trace,)), video, episodes)


def test_chunks_by_hand() -> None:
    # 8 Mbps carry 0.95 MB a second: 1 MB takes 1.0526 s, and 80 ms of round trip; all of it is rebuffering at the start.
    outcome = one([99.0, 8.0, 8.0]).step(np.array([2]))
    assert outcome.delay_ms[0] == pytest.approx(1000 / 0.95 + 80)
    assert outcome.rebuffer_s[0] == pytest.approx(1 / 0.95 + 0.08)
    assert outcome.buffer_s[0] == 4.0
    assert outcome.reward[0] == pytest.approx(1.2 - 4.3 * (1 / 0.95 + 0.08) - 0.9)
    # no bandwidth is waited out, and the first sample is never used
    outcome = one([99.0, 0.0, 8.0]).step(np.array([0]))
    assert outcome.delay_ms[0] == pytest.approx(10_000 + 1000 / 0.95 + 80)
    # 0.5 MB are left after the last interval, and come from sample 1 again
    outcome = one([99.0, 4.0, 1.0], sizes=int(10 * 1e6 / 8 * 0.95) + 500_000, start=2).step(np.array([0]))
    assert outcome.delay_ms[0] == pytest.approx(10_000 + 500_000 / (4e6 / 8 * 0.95) * 1000 + 80, rel=1e-9)


def test_state_is_pensieves() -> None:
    simulator = one([99.0, 8.0, 8.0])
    first, earlier = simulator.step(np.array([1])), simulator.observe()
    handed_out = earlier.state.copy()
    second = simulator.step(np.array([3]))
    state = simulator.observe().state[0]
    assert state[0].tolist() == [0, 0, 0, 0, 750 / 4300, 1850 / 4300]
    assert state[1, -2:].tolist() == [first.buffer_s[0] / 10, second.buffer_s[0] / 10]
    assert state[2, -1] == 1_000_000 / second.delay_ms[0] / 1000
    assert state[3, -1] == second.delay_ms[0] / 1000 / 10
    assert state[4].tolist() == [1.0] * 6
    assert state[5, -2:].tolist() == [47 / 48, 46 / 48]
    np.testing.assert_array_equal(earlier.state, handed_out)  # observations do not change afterwards


@pytest.mark.parametrize("levels", [[6], [-1], [0, 1], [0.5]])
def test_levels_are_checked(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="levels must be integers"):
        one([99.0, 8.0]).step(np.array(levels))


def test_video_ends() -> None:
    simulator = one([99.0, 8.0])
    for _ in range(CHUNKS):
        simulator.step(np.array([0]))
    with pytest.raises(IndexError, match="reset"):
        simulator.step(np.array([0]))


def test_a_clock_may_begin_anywhere() -> None:
    """Sound play takes times from a trace's first one; the original begins every later pass at 0, whatever the first time."""
    traces, video = generate_traces("t", 5, 5, SLOW), generate_video("v", 3)
    episodes, levels = sound_episodes(traces, seed=4), np.random.default_rng(0).integers(0, 6, (5, CHUNKS))
    at_zero = Simulator(traces, video, episodes).replay(levels).delay_ms
    for begin_s in (0.0, 64.0, 2.0**30):
        moved = TraceSet("moved", tuple(replace(t, time_s=np.round(t.time_s * 4) / 4 + begin_s) for t in traces.traces))
        sound, original = (Simulator(moved, video, replace(episodes, running_clock=clock)) for clock in (False, True))
        played = sound.replay(levels).delay_ms
        at_zero = at_zero if begin_s else played
        np.testing.assert_array_equal(played, at_zero)
        for row, (trace, start) in enumerate(zip(moved.traces, episodes.start_ptr.tolist(), strict=True)):
            reference = ReferenceEnvironment(trace, video, start)
            delays_ms = [reference.download(level).delay_ms for level in levels[row].tolist()]
            np.testing.assert_array_equal(original.replay(levels).delay_ms[row], delays_ms)


SOUND = Trace("t", np.arange(3.0), np.ones(3)), generate_video("v", 3)


@pytest.mark.parametrize(
    ("time_s", "mbps"),
    [
        ([0, 1], [1, np.nan]),
        ([0, np.nan], [1, 1]),
        ([0, -1], [1, 1]),
        ([-3, -2], [1, 1]),
        ([0, 1], [1, 1e-9]),
        ([0, 1e-13], [1, 1]),
        ([0, 1, 2], [1, 0, 0]),
        ([0, 1], [1, 1, 1]),
        ([[0, 1]], [[1, 1]]),
    ],
)
def test_no_numbers_make_compiled_code_loop(time_s: list, mbps: list) -> None:
    samples = {"time_s": np.array(time_s, dtype=float), "mbps": np.array(mbps, dtype=float)}
    with pytest.raises(ValueError, match="trace t, sample"):
        Trace("t", **samples)


def test_compiled_code_ends_whatever_the_numbers() -> None:
    """Of a trace that somebody got past the check."""
    rng, (trace, video) = np.random.default_rng(0), SOUND
    odd = np.array([-3, -1, 0, 0, 1e-300, 1e-13, 1e-9, 1e-3, 1, 1, 5, 1e9, 1e300, np.inf, np.nan])
    started, refused = time.process_time(), 0
    for case in range(40):
        forced, length = copy.copy(trace), int(rng.integers(2, 6))
        vars(forced).update(time_s=np.cumsum(rng.choice(odd, length)), mbps=rng.choice(odd, length))
        episodes = Episodes(np.array([0]), np.array([1]), None, np.ones((1, CHUNKS), int), 0, True, case % 2 == 0)
        with np.errstate(all="ignore"):
            try:
                play(RobustMPC(video), Simulator(TraceSet("t", (forced,)), video, episodes))
            except ValueError as error:
                refused += "does not arrive" in str(error)
    assert 10 < refused < 40
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    "change",
    [
        {"trace_index": np.array([1])},
        {"trace_index": np.array([-1])},
        {"start_ptr": np.array([0])},
        {"start_ptr": np.array([3])},
        {"noise": np.ones((1, 3))},
        {"noise": np.full((1, CHUNKS), np.inf)},
    ],
)
def test_episodes_that_are_not_there_are_refused(change: dict) -> None:
    trace, video = SOUND
    episodes = Episodes(np.array([0]), np.array([1]), None, np.ones((1, CHUNKS), int), 0, True)
    with pytest.raises(ValueError, match="episodes:"):
        Simulator(TraceSet("t", (trace,)), video, replace(episodes, **change))
    with pytest.raises(ValueError, match="levels must be"):
        Simulator(TraceSet("t", (trace,)), video, episodes).replay(np.zeros((1, CHUNKS + 1), int))
