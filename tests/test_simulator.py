"""The compiled lock-step simulator against the plain reference, chunk by chunk and bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from netllm_lib.abr.episodes import Episodes, sound_episodes
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
