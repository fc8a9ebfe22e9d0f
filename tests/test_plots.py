"""Figures: drawn from data alone, showing what they should."""

from __future__ import annotations

from typing import Any

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from netllm_lib.abr import plots, qoe
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.simple import Constant
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.stats import Interval

TRACES, VIDEO = generate_traces("t", 5, 8), generate_video("v", 1)
EPISODES = sound_episodes(TRACES)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {p.name: play(p, Simulator(TRACES, VIDEO, EPISODES)) for p in (BBA(), Constant(1))}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_given_axes_are_used(tables: dict) -> None:
    history = pd.DataFrame({"step": [0, 1], "loss": [1.5, 1.0]})
    cases: list[tuple[Any, ...]] = [
        (plots.plot_differences, {"a − b": Interval(0.1, -0.1, 0.3)}),
        (plots.plot_bandwidths, [TRACES]),
        (plots.plot_training, history, {"chance": 1.79}),
    ]
    for draw, *data in cases:
        _, ax = plt.subplots()
        assert draw(*data, axes=ax) is ax
        assert ax.get_xlabel()


def test_decomposition_marks_the_mean_reward(tables: dict) -> None:
    ax = plots.plot_decomposition(tables)
    shown = sorted(float(text.get_text()) for text in ax.texts)
    assert shown == pytest.approx(sorted(qoe.summarise(t).reward for t in tables.values()), abs=6e-4)


def test_a_pool_has_shares_and_references() -> None:
    pool = generate_pool(BBA(), TRACES, VIDEO, EPISODES)
    assert sum(bar.get_height() for bar in plots.plot_pool(pool)[0].patches) == pytest.approx(100)
    legend = plots.plot_pool_episodes(pool, {"other": 0.5}).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"mean: {pool.rewards.mean():.3g}", "other: 0.5"]
