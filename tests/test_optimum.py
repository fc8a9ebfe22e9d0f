"""The offline optimum: against enumeration of every plan, against the player, and on the original's test."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import sound_episodes, upstream_episodes
from netllm_lib.abr.optimum import SearchConfig, best_plans, continuations, regret
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random, Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import Registry

TRACES, VIDEO = generate_traces("t", 6, 21), generate_video("v", 5)
EPISODES = sound_episodes(TRACES, repeats=2)
NOISY = sound_episodes(TRACES, seed=3, noise=True)


def enumerated(simulator: Simulator, row: int, prefix: list[int], chunks: int) -> tuple[float, np.ndarray]:
    """(summed reward behind the prefix, levels) of the best of all plans that begin with the prefix."""
    tails = np.array(list(itertools.product(range(6), repeat=chunks - len(prefix))))
    plans = np.concatenate([np.tile(prefix, (len(tails), 1)), tails], axis=1)
    same = Simulator(simulator.traces, simulator.video, simulator.episodes.rows([row] * len(plans)))
    sums = same.replay(plans).reward[:, len(prefix) :].sum(axis=1)
    return float(sums.max()), plans[sums.argmax()]


@pytest.mark.parametrize("episodes", [EPISODES, NOISY], ids=["exact", "noisy"])
@pytest.mark.parametrize("chunks", [2, 5])
def test_short_videos_equal_the_enumeration_of_all_plans(episodes, chunks: int) -> None:
    simulator = Simulator(TRACES, VIDEO, episodes)
    plans = best_plans(TRACES, VIDEO, episodes, chunks=chunks)
    for row in range(len(episodes)):
        best, levels = enumerated(simulator, row, [0], chunks)
        assert plans.reward[row] * (chunks - 1) == pytest.approx(best, abs=1e-9), (row, plans.levels[row], levels)


def test_a_full_buffer_and_the_end_of_a_trace_are_planned_exactly() -> None:
    """Small chunks: the buffer fills up and the client sleeps; short traces: they start again."""
    small = replace(VIDEO, sizes_bytes=VIDEO.sizes_bytes // 40)
    traces = replace(
        TRACES, traces=tuple(replace(t, time_s=t.time_s[:30], mbps=t.mbps[:30] / 12) for t in TRACES.traces)
    )
    episodes = sound_episodes(traces)
    simulator = Simulator(traces, small, episodes)
    played = rollout(Constant(0), simulator)
    assert (played.sleep_ms > 0).any()
    values = continuations(simulator, played.level)
    for row in range(len(episodes)):
        for chunk in (CHUNKS - 1, CHUNKS - 3):
            best, plan = enumerated(simulator, row, played.level[row, :chunk].tolist(), CHUNKS)
            assert values[row, chunk, plan[chunk]] == pytest.approx(best, abs=1e-9)


def test_plans_play_as_promised_and_beat_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for episodes in (EPISODES, NOISY):
        simulator, plans = Simulator(TRACES, VIDEO, episodes), best_plans(TRACES, VIDEO, episodes)
        monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
        np.testing.assert_array_equal(plans.levels, best_plans(TRACES, VIDEO, episodes).levels)
        assert (plans.levels[:, 0] == 0).all()
        table = play(Replay(plans.levels), simulator)
        np.testing.assert_allclose(qoe.per_trace(table)["reward"], plans.reward, atol=1e-9, rtol=0)
        for policy in (RobustMPC(VIDEO), Random(), *map(Constant, range(6))):
            assert (regret(play(policy, simulator), plans) >= 0).all()


def test_a_wide_search_finds_hardly_more() -> None:
    usual = best_plans(TRACES, VIDEO, EPISODES).reward
    wide = best_plans(TRACES, VIDEO, EPISODES, SearchConfig(width=8000, bin_ms=2.0)).reward
    narrow = best_plans(TRACES, VIDEO, EPISODES, SearchConfig(width=1)).reward
    np.testing.assert_allclose(usual, wide, atol=2e-3)
    assert (narrow < usual - 0.01).any()  # so the comparison can fail


def test_continuations_equal_enumeration_at_the_end_of_the_video() -> None:
    for episodes in (EPISODES, NOISY):
        simulator = Simulator(TRACES, VIDEO, episodes)
        played = rollout(Random(), simulator)
        rows = [1, 4]
        values = continuations(simulator.part(rows), played.level[rows])
        np.testing.assert_array_equal(np.isnan(values[..., 0]), np.tile(np.arange(CHUNKS) == 0, (2, 1)))
        for place, row in enumerate(rows):
            for chunk in range(CHUNKS - 4, CHUNKS):
                prefix = played.level[row, :chunk].tolist()
                best, plan = enumerated(simulator, row, prefix, CHUNKS)
                assert values[place, chunk].max() == pytest.approx(best, abs=1e-9)
                assert values[place, chunk, plan[chunk]] == pytest.approx(best, abs=1e-9)


def test_losses_of_decisions_add_up_to_the_regret() -> None:
    episodes = EPISODES.rows(range(5, 11))
    simulator, plans = Simulator(TRACES, VIDEO, episodes), best_plans(TRACES, VIDEO, episodes)
    for policy in (RobustMPC(VIDEO), Random()):
        played = rollout(policy, simulator)
        values = continuations(simulator, played.level)[:, 1:]
        lost = values.max(axis=2) - np.take_along_axis(values, played.level[:, 1:, None], axis=2)[..., 0]
        assert (lost >= 0).all()
        whole = (plans.reward - played.reward[:, 1:].mean(axis=1)) * (CHUNKS - 1)
        # exactly the best continuation of the first state, which a narrower search may have missed by a little
        np.testing.assert_allclose(lost.sum(axis=1), values[:, 0].max(axis=1) - played.reward[:, 1:].sum(axis=1))
        np.testing.assert_allclose(lost.sum(axis=1), whole, atol=0.5)
        assert (lost.sum(axis=1) <= whole + 1e-6).mean() > 0.7


def test_regret_is_of_the_episodes_that_were_played() -> None:
    moved = replace(EPISODES, start_ptr=EPISODES.start_ptr % 100 + 1)
    for episodes in (EPISODES.rows(range(6)), moved):
        with pytest.raises(ValueError, match=r"the plans 12.*plan for the episodes that were played"):
            regret(play(Constant(1), Simulator(TRACES, VIDEO, episodes)), best_plans(TRACES, VIDEO, EPISODES))


@pytest.mark.golden
def test_optimum_of_the_original_test(real_data: Path) -> None:
    registry = Registry(real_data)
    traces, video = registry.trace_set("fcc-test"), registry.video("video1")
    episodes = upstream_episodes(traces, trace_num=-1)
    plans = best_plans(traces, video, episodes)
    assert plans.reward.mean() >= 1.2220
    table = play(Replay(plans.levels), Simulator(traces, video, episodes))
    np.testing.assert_allclose(qoe.per_trace(table)["reward"], plans.reward, atol=1e-9, rtol=0)
