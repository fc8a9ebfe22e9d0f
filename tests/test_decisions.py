"""Single decisions: confusion and counterfactuals, by hand and on real play; where the reward goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.decisions import (
    UNKNOWN,
    breakdown,
    confusion,
    costliest,
    levels_of,
    optimum,
    shadow,
)
from netllm_lib.abr.episodes import Observation, sound_episodes
from netllm_lib.abr.model import PolicySettings
from netllm_lib.abr.optimum import best_plans, regret
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.simple import Constant, Prefixed, Random, Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry, Trace, TraceSet, Video

REGISTRY = Registry(SAMPLE)
TRACES = REGISTRY.trace_set("sample-test").subset(range(8))
VIDEO = REGISTRY.video("sample")
EPISODES = sound_episodes(TRACES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path))


@pytest.fixture
def simulator() -> Simulator:
    return Simulator(TRACES, VIDEO, EPISODES)


def steady(mbps: float = 20.0) -> tuple[TraceSet, Video]:
    """Two traces without any doubt: every chunk arrives in time, in any level."""
    traces = tuple(Trace(name, np.arange(0, 400.0), np.full(400, mbps)) for name in "ab")
    sizes = (qoe.BITRATES_KBPS[:, None] * 500).repeat(CHUNKS, axis=1)
    return TraceSet("steady", traces), Video("flat", sizes)


# --- Prefixed


def test_prefix_is_played_and_the_policy_takes_over(simulator: Simulator) -> None:
    given = np.full((8, CHUNKS), 2)
    given[3, 5] = UNKNOWN
    start = np.array([1, 10, 20, 30, 40, 45, 47, 48])
    levels = rollout(Prefixed(Constant(4), given, start), simulator).level
    expected = np.where(np.arange(CHUNKS) < start[:, None], 2, 4)
    expected[:, 0], expected[3, 5] = 0, 4
    np.testing.assert_array_equal(levels, expected)
    with pytest.raises(ValueError, match="levels of 3 episodes were given, 8 are played"):
        play(Prefixed(BBA(), given[:3], 1), simulator)


@pytest.mark.parametrize("window", ["cached", "rolling"])
def test_an_llm_remembers_what_was_played_not_what_it_wanted(window: Any) -> None:
    """Behind a prefix, the LLM's probabilities equal those of one that chose the prefix itself."""
    pytest.importorskip("torch")
    from llm_fixtures import tiny_network, toy_pool
    from netllm_lib.abr.batches import pool_returns
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
    from netllm_lib.checkpoint import describe

    class Forced(LLMPolicy):
        """Chooses the given levels up to chunk 5, whatever its network says."""

        def _choose(self, observation: Observation) -> np.ndarray:
            own = super()._choose(observation)
            return given[observation.episode, observation.chunk] if observation.chunk < 5 else own

    network = tiny_network()
    meta = describe(network, PolicySettings(20, pool_returns(toy_pool())[1]))
    two = Simulator(TRACES, VIDEO, EPISODES.rows([0, 1]))
    given = np.random.default_rng(0).integers(0, 6, (2, CHUNKS))
    config = EvalConfig(context_window=window)
    expected = rollout(Forced(network, meta, config), two)
    prefixed = rollout(Prefixed(LLMPolicy(network, meta, config), given, 5), two)
    np.testing.assert_array_equal(prefixed.level, expected.level)
    for column in ("p0", "p5", "return_to_go"):
        np.testing.assert_allclose(prefixed.extras[column], expected.extras[column], atol=1e-6)
    own = rollout(LLMPolicy(network, meta, config), two)
    assert (own.level[:, 1:5] != given[:, 1:5]).any()  # it wanted something else
    watched = shadow(own.table(), LLMPolicy(network, meta, config), two)
    np.testing.assert_array_equal(watched, own.level)


# --- what others would have done


def test_shadow_of_oneself_and_of_others(simulator: Simulator) -> None:
    table = play(RobustMPC(VIDEO), simulator)
    own = shadow(table, RobustMPC(VIDEO), simulator)
    np.testing.assert_array_equal(own, levels_of(table))
    assert (shadow(table, Constant(3), simulator)[:, 1:] == 3).all()
    by_buffer = np.clip((5 * (table["buffer_s"] - 5) / 10).to_numpy().reshape(8, CHUNKS), 0, 5).astype(int)
    np.testing.assert_array_equal(shadow(table, BBA(), simulator)[:, 1:], by_buffer[:, :-1])  # of the chunk before


def test_confusion_by_hand() -> None:
    run = np.array([[5, 1, 1, 2], [0, 3, 3, 3], [0, 4, 4, 4]])
    other = np.array([[0, 1, 2, 2], [0, 3, 3, 3], [0, UNKNOWN, 5, 4]])
    counts = confusion(run, other)
    assert counts.shape == (6, 6)
    assert counts.to_numpy().sum() == 8  # neither the first chunk nor the unknown one
    assert [counts.loc[1, 1], counts.loc[1, 2], counts.loc[2, 2], counts.loc[3, 3]] == [1, 1, 1, 3]
    assert [counts.loc[4, 5], counts.loc[4, 4], counts.loc[5, 0]] == [1, 1, 0]
    assert (counts.index.name, counts.columns.name) == ("run", "other")


def test_optimum_on_a_steady_line_is_to_go_up_at_once() -> None:
    traces, video = steady()
    simulator = Simulator(traces, video, sound_episodes(traces))
    best = optimum(play(Constant(2), simulator), simulator)
    assert (best.levels[:, 1:] == 5).all()
    # before chunk c at level 2, going up to level 5 costs the change once and gains 4.3 a chunk
    chunks = np.arange(2, CHUNKS)
    np.testing.assert_allclose(best.values[1, 2:, 5], (CHUNKS - chunks) * 4.3 - 3.1)
    # staying at level 2 once more: the same one chunk later
    np.testing.assert_allclose(best.values[1, 2:-1, 2], 1.2 + (CHUNKS - chunks[:-1] - 1) * 4.3 - 3.1)
    np.testing.assert_allclose(best.lost[1, 2:-1], 4.3 - 1.2)


def test_optimum_of_real_play(simulator: Simulator) -> None:
    table = play(BBA(), simulator)
    best = optimum(table, simulator)
    played = levels_of(table)
    assert (best.lost >= 0).all()
    assert ((best.levels == played) == (best.lost == 0))[:, 1:].all()
    gap = regret(table, best_plans(TRACES, VIDEO, EPISODES)) * 47
    np.testing.assert_allclose(best.lost.sum(axis=1), gap, atol=0.3)


def test_a_table_of_other_episodes_is_an_error(simulator: Simulator) -> None:
    table = play(BBA(), simulator)
    noisy = Simulator(TRACES, VIDEO, sound_episodes(TRACES, noise=True))
    with pytest.raises(ValueError, match=r"replaying its levels gives .* noise that were played"):
        shadow(table, BBA(), noisy)
    with pytest.raises(ValueError, match="the table has 8 traces of 48 chunks, the simulator 2 of 48"):
        optimum(table, Simulator(TRACES, VIDEO, EPISODES.rows([0, 1])))
    with pytest.raises(ValueError, match="do not all have the chunks"):
        levels_of(table.drop(index=5))


# --- counterfactuals


def test_costliest_by_hand() -> None:
    """Nothing stalls: playing level 0 once between level 5 costs 4.3 − .3 + 2 × 4 of smoothness."""
    traces, video = steady()
    simulator = Simulator(traces, video, sound_episodes(traces))
    levels = np.full((2, CHUNKS), 5)
    levels[:, 0], levels[1, 7], levels[0, 20] = 0, 0, 3
    table = play(Replay(levels), simulator)
    found = costliest(
        table, simulator, np.full_like(levels, 5), k=5, gap=regret(table, best_plans(traces, video, simulator.episodes))
    )
    assert found[["trace", "chunk", "level", "instead"]].values.tolist() == [["b", 7, 0, 5], ["a", 20, 3, 5]]
    np.testing.assert_allclose(found["gain"], [4.0 + 8.0, 4.3 - 1.85 + 2 * 2.45])
    assert found["share"].sum() == pytest.approx(1)
    assert (found["continued"] == "recorded").all()
    levels[[1, 0], [7, 20]] = 5
    better = play(Replay(levels), simulator)
    assert better["reward"].sum() - table["reward"].sum() == pytest.approx(found["gain"].sum())


def test_gains_of_all_traces_add_up(simulator: Simulator) -> None:
    table = play(BBA(), simulator)
    plans = best_plans(TRACES, VIDEO, EPISODES)
    reference = optimum(table, simulator).levels
    gap = regret(table, plans)
    found = costliest(table, simulator, reference, BBA(), k=12, gap=gap)
    assert len(found) > 5
    assert found["trace"].is_unique
    assert (found["gain"] > 0).all()
    given = np.full_like(reference, UNKNOWN)
    given[[TRACES.names.index(name) for name in found["trace"]], found["chunk"]] = found["instead"]
    better = play(Prefixed(BBA(), given, CHUNKS), simulator)
    change = qoe.per_trace(better)["reward"] - qoe.per_trace(table)["reward"]
    np.testing.assert_allclose(change.sum() * 47, found["gain"].sum())
    assert 0 < found["share"].sum() <= 1 + 1e-9


def test_a_policy_that_does_not_reproduce_the_run_is_not_trusted(simulator: Simulator) -> None:
    table = play(BBA(), simulator)
    instead = shadow(table, RobustMPC(VIDEO), simulator)
    recorded = costliest(table, simulator, instead)
    assert len(recorded)
    for stranger in (Random(), RobustMPC(VIDEO, MPCConfig(carry_history=True))):
        found = costliest(table, simulator, instead, stranger, confirm=47)
        assert (found["continued"] == "recorded").all()
        pd.testing.assert_frame_equal(found, recorded)
    assert costliest(table, simulator, levels_of(table), BBA()).empty
    with pytest.raises(ValueError, match="reference has levels of shape"):
        costliest(table, simulator, instead[:2])


# --- where the reward goes


def test_breakdown_by_hand() -> None:
    rows = [  # trace, chunk, level, kbps, rebuffer_s, smoothness
        ("a", 0, 0, 300, 9.0, 0.0), ("a", 1, 1, 750, 0.0, 0.45), ("a", 2, 2, 1200, 0.5, 0.45),
        ("b", 0, 0, 300, 9.0, 0.0), ("b", 1, 2, 1200, 0.0, 0.9), ("b", 2, 2, 1200, 0.0, 0.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["trace", "chunk", "level", "bitrate_kbps", "rebuffer_s", "smoothness_mbps"])
    table["reward"] = table["bitrate_kbps"] / 1000 - 4.3 * table["rebuffer_s"] - table["smoothness_mbps"]
    by_chunk = breakdown(table)
    assert by_chunk.index.tolist() == [1, 2]
    np.testing.assert_allclose(
        by_chunk.loc[1, ["chunks", "quality", "rebuffering", "smoothness"]], [2, 0.975, 0, 0.675]
    )
    np.testing.assert_allclose(by_chunk.loc[2, ["chunks", "rebuffering"]], [2, 2.15 / 2])


def test_breakdown_by_bandwidth_adds_up(simulator: Simulator) -> None:
    table = play(BBA(), simulator)
    groups = breakdown(table, TRACES)
    assert groups["chunks"].tolist() == [3 * 47, 2 * 47, 3 * 47]
    means = TRACES.describe()["mean_mbps"].sort_values()
    limits = [groups.index[0].left, groups.index[2].right]
    np.testing.assert_allclose(limits, means.iloc[[0, -1]], atol=0.015)
    np.testing.assert_allclose(groups["reward"], groups["quality"] - groups["rebuffering"] - groups["smoothness"])
    assert np.average(groups["reward"], weights=groups["chunks"]) == pytest.approx(qoe.summarise(table).reward)
    with pytest.raises(ValueError, match="give the traces of the test"):
        breakdown(table, TRACES.subset(range(2)))
