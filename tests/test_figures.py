"""Figures of a diagnosis: each shows its numbers, with units, and not by colour alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from netllm_lib.abr import evaluate, plots, qoe
from netllm_lib.abr.diagnosis import RULES, Evidence, Finding, decisions, figures
from netllm_lib.abr.diagnosis.timeline import edges, of_trace, timeline, unrolled
from netllm_lib.abr.episodes import Observation, sound_episodes, upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import Trace
from netllm_lib.findings import Diagnosis
from netllm_lib.stats import Interval
from netllm_lib.training_run import TrainingRun

TRACES, VIDEO = generate_traces("t", 8, 8), generate_video("v", 1)
EPISODES = sound_episodes(TRACES)


class Unsure(Policy):
    """BBA that says how sure it is, as the language model does."""

    name = "llm"

    def act(self, observation: Observation) -> np.ndarray:
        self.levels = BBA().act(observation)
        self.chunk = observation.chunk
        return self.levels

    def extras(self) -> dict[str, np.ndarray]:
        columns = {f"p{level}": np.where(self.levels == level, 0.5, 0.1) for level in range(qoe.LEVELS)}
        return {**columns, "return_to_go": np.full(len(self.levels), 0.04 - 0.001 * self.chunk)}


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {p.name: play(p, Simulator(TRACES, VIDEO, EPISODES)) for p in (Unsure(), RobustMPC(VIDEO), Constant(1))}


@pytest.fixture(scope="module")
def pool() -> ExperiencePool:
    return generate_pool(BBA(), TRACES, VIDEO, EPISODES)


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


def fall() -> pd.DataFrame:
    """A waterfall: one switch that helps, one that is noise, one that harms."""
    effects = {"sampling": (0.2, 0.1, 0.3), "context-leak": (0.0, -0.1, 0.1), "window-mismatch": (-0.2, -0.3, -0.1)}
    rows = [
        {"switch": "as run", "what": "", "reward": 0.5, "effect": np.nan, "low": np.nan, "high": np.nan, "noise": False}
    ]
    for name, (mean, low, high) in effects.items():
        effect = {"effect": mean, "low": low, "high": high, "noise": low < 0 < high}
        rows.append({"switch": name, "what": f"{name} sound", "reward": 0.5 + mean, **effect})
    return pd.DataFrame(rows).assign(traces=8)


def words(ax: Axes) -> str:
    legend = ax.get_legend()
    shown = [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels(), *(legend.get_texts() if legend else [])]
    return "\n".join([ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in shown)])


def history(losses: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"loss": losses})


def test_given_axes_are_used_and_labelled(tables: dict, pool: ExperiencePool) -> None:
    ours, other = tables["llm"], tables["mpc"]
    gap = qoe.per_trace(other)["reward"] - qoe.per_trace(ours)["reward"]
    by_chunk = decisions.breakdown(ours), decisions.breakdown(other)
    counts = decisions.confusion(decisions.levels_of(ours), decisions.levels_of(other))
    costly = pd.DataFrame(
        {"trace": [r"$\odd$"], "chunk": [3], "level": [5], "instead": [1], "gain": [9.0], "share": [0.5]}
    )
    trained = TrainingRun(history=history(np.linspace(1.8, 0.5, 60)), lr=1e-3, steps=60, warmup_steps=100)
    drawings: list[Callable[..., Axes]] = [
        partial(figures.waterfall, fall()),
        partial(figures.parts, *by_chunk, ("llm", "mpc")),
        partial(figures.concentration, gap),
        partial(figures.confusion, counts, ("llm", "mpc")),
        partial(figures.costliest, costly),
        partial(figures.by_level, {"llm": np.arange(6.0)}, "share", "levels"),
        partial(figures.stalls, tables),
        partial(figures.losses, trained, {"chance": 1.79}),
        partial(figures.learning_rate, trained),
        partial(figures.shift, pool, ours),
    ]
    for draw in drawings:
        figure, ax = plt.subplots()
        assert draw(axes=ax) is ax
        assert ax.get_title()
        assert ax.get_xlabel()
        figure.savefig(io.BytesIO(), format="png", dpi=30)  # it can really be drawn


def test_waterfall_draws_noise_hollow_and_the_direction_by_hatch() -> None:
    ax: Any = figures.waterfall(fall(), {"mpc": 0.9})
    helps, noise, harms = ax.patches
    assert (helps.get_x(), helps.get_width()) == (0.5, pytest.approx(0.2))
    assert harms.get_width() == pytest.approx(-0.2)
    assert to_rgb(noise.get_facecolor()) == (1, 1, 1)
    assert to_rgb(helps.get_facecolor()) != (1, 1, 1)
    assert (helps.get_hatch() or "") != (harms.get_hatch() or "")
    assert "0.500 (+0.000, noise)" in words(ax)
    assert "mpc: 0.900" in words(ax)
    assert "context-leak\ncontext-leak sound" in words(ax)
    assert "8 traces" in ax.get_xlabel()


def test_parts_add_up_to_the_difference(tables: dict) -> None:
    for traces in (TRACES, None):
        ours, other = (decisions.breakdown(tables[name], traces) for name in ("llm", "mpc"))
        ax: Any = figures.parts(ours, other, ("llm", "mpc"))
        heights = np.array([patch.get_height() for patch in ax.patches]).reshape(3, -1)
        np.testing.assert_allclose(heights.sum(axis=0), ours["reward"] - other["reward"], atol=1e-9)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), ours["reward"] - other["reward"])
        assert len({container.patches[0].get_hatch() for container in ax.containers}) == 3
    assert "chunk index" in ax.get_xlabel()


def test_concentration_by_hand() -> None:
    ax: Any = figures.concentration(pd.Series([1.0, 6.0, 2.0, 1.0]), "regret")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 1.5, 2.0, 2.25, 2.5])
    assert "1 trace: 60%" in words(ax)
    assert "2 traces: 80%" in words(ax)


def test_the_legend_of_a_gap_is_beside_it_even_where_the_run_is_better() -> None:
    ax = figures.concentration(pd.Series([0.5, -0.2, -0.5, -0.6]))
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    legend = ax.get_legend()
    assert legend is not None
    assert not legend.get_window_extent().overlaps(ax.bbox)


def test_confusion_shows_shares_of_all_decisions() -> None:
    counts = pd.DataFrame(np.zeros((6, 6), dtype=int))
    counts.iloc[0, 0], counts.iloc[3, 1], counts.iloc[1, 2] = 50, 30, 20
    ax = figures.confusion(counts, ("llm", "mpc"))
    assert {text.get_text() for text in ax.texts} == {"50.0", "30.0", "20.0", ""}
    assert ax.get_title() == "the same: 50 %, llm higher: 30 %, lower: 20 %"
    assert (ax.get_ylabel().split()[0], ax.get_xlabel().split()[0]) == ("llm", "mpc")


def test_stalls_by_hand() -> None:
    table = pd.DataFrame({"chunk": [1, 2, 3, 4], "rebuffer_s": [0.0, 0.5, 2.0, 0.0]})
    line: Any = figures.stalls({"llm": table}).lines[0]
    at = dict(zip(np.round(line.get_xdata(), 9), line.get_ydata(), strict=True))
    assert at[min(at)] == pytest.approx(4.3 * 2.5 / 4)
    assert np.interp(1.0, line.get_xdata(), line.get_ydata()) == pytest.approx(4.3 * 2.0 / 4)
    assert at[max(at)] == 0


# --- timelines ----------------------------------------------------------------------------------------------------------


def test_timeline_links_its_panels_and_marks_stalls(tables: dict) -> None:
    name = TRACES.names[1]
    axes = timeline(tables, name, TRACES.traces[1])
    assert len(axes) == 4
    assert all(ax.get_shared_x_axes().joined(ax, axes[0]) for ax in axes[1:])
    rows = tables["llm"].query("trace == @name")
    stalls = rows.query("rebuffer_s > 0 and chunk > 0")
    assert len(axes[1].collections[0].get_offsets()) == len(stalls)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), rows["buffer_s"])
    styles = [patch.get_linestyle() for patch in axes[0].patches]
    assert len(set(styles)) == len(tables)
    shades = axes[2].collections[0].get_array()
    assert shades.shape == (6, 48)
    np.testing.assert_allclose(shades[:, 5].astype(float), rows[[f"p{level}" for level in range(6)]].iloc[5])
    np.testing.assert_allclose(axes[3].patches[0].get_data().values, rows["return_to_go"])
    assert axes[-1].get_xlabel() == "time since the start (s)"


def test_timeline_leaves_out_what_is_not_known(tables: dict) -> None:
    axes = timeline({"mpc": tables["mpc"].assign(trace=r"$\odd$")}, r"$\odd$")
    assert len(axes) == 2
    axes[0].figure.draw_without_rendering()
    assert len(timeline(tables, TRACES.names[0], subject="mpc")) == 2
    with pytest.raises(ValueError, match="not in the tables"):
        timeline(tables, "other")


def test_clock_of_the_original_starts_anew_with_each_trace() -> None:
    pointers = replace(TRACES, start_ptrs=EPISODES.start_ptr)
    running, own = (
        play(BBA(), Simulator(pointers, VIDEO, upstream_episodes(pointers, trace_num=-1, clock=clock)))
        for clock in ("running", "episode")
    )
    name = TRACES.names[3]
    assert running.query("trace == @name")["time_s"].iloc[0] > 100
    rows = of_trace(running, name)
    assert rows["elapsed_s"].iloc[0] == pytest.approx(rows["delay_ms"].iloc[0] / 1000)
    expected = own.query("trace == @name")["time_s"]
    np.testing.assert_allclose(
        rows["elapsed_s"], expected, rtol=0.05
    )  # the original's clock leaves out some of the waits
    assert edges(rows)[0] == 0
    assert len(edges(rows)) == 49


def test_unrolled_bandwidth_starts_at_the_pointer() -> None:
    trace = Trace("t", np.array([0.0, 1.0, 3.0, 4.0]), np.array([9.0, 1.0, 2.0, 3.0]))
    ends, mbps = unrolled(trace, 2, 6.0)
    assert ends.tolist() == [0.0, 2.0, 3.0, 4.0, 6.0]
    assert mbps.tolist() == [2.0, 2.0, 3.0, 1.0, 2.0]


# --- the figure of a finding --------------------------------------------------------------------------------------------


def evidence(tables: dict, pool: ExperiencePool, **known: Any) -> Evidence:
    training = TrainingRun(history=history(np.linspace(1.8, 1.6, 60)), lr=1e-3, steps=60, warmup_steps=2000)
    clean = np.arange(8) % 2 == 0
    test = evaluate.Test(tables, "llm")
    return Evidence(test, training=training, pool=pool, traces=TRACES, video=VIDEO, clean=clean, **known)


def finding(name: str, **numbers: Any) -> Finding:
    return Finding("cause", "", numbers, rule=RULES[name])


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.figure])
def test_findings_have_their_figures(name: str, tables: dict, pool: ExperiencePool) -> None:
    table = pd.concat([fall(), fall().iloc[[1]].assign(switch=name)])
    assert figures.figure_of(finding(name), evidence(tables, pool), table) is not None
    assert figures.figure_of(finding(name), Evidence()) is None


def test_gallery_draws_shared_figures_once(tables: dict, pool: ExperiencePool) -> None:
    names = ["sampling", "context-leak", "undertrained", "gap", "too-few-traces", "clipping"]
    diagnosis = Diagnosis(tuple(finding(name) for name in names), waterfall=fall())
    known = evidence(tables, pool)
    assert [name for name, _ in figures.gallery(diagnosis, known)] == ["waterfall", "losses", "differences"]
    assert [name for name, _ in figures.gallery(diagnosis, known, without=("losses",))] == ["waterfall", "differences"]


# --- words --------------------------------------------------------------------------------------------------------------


def test_gaps_by_trace_are_sums_of_their_parts(tables: dict) -> None:
    gaps = decisions.trace_gaps(tables["llm"], tables["mpc"])
    np.testing.assert_allclose(gaps["reward"], gaps[["quality", "rebuffering", "smoothness"]].sum(axis=1))
    assert gaps["reward"].is_monotonic_increasing


# --- figures of other notebooks ---------------------------------------------------------------------------------------------


def test_other_figures_take_axes_too() -> None:
    history = pd.DataFrame({"step": [0, 1], "loss": [1.5, 1.0]})
    cases: list[tuple[Any, ...]] = [
        (plots.plot_differences, {"a − b": Interval(0.1, -0.1, 0.3)}),
        (plots.plot_bandwidths, [TRACES]),
        (plots.plot_training, history, {"chance": 1.79}),
    ]
    for draw, *data in cases:
        ax: Any = plt.subplots()[1]
        assert draw(*data, axes=ax) is ax
        assert ax.get_xlabel()


def test_decomposition_marks_the_mean_reward(tables: dict) -> None:
    ax = plots.plot_decomposition(tables)
    shown = sorted(float(text.get_text()) for text in ax.texts)
    assert shown == pytest.approx(sorted(qoe.summarise(t).reward for t in tables.values()), abs=6e-4)


def test_a_pool_has_shares_and_references(pool: ExperiencePool) -> None:
    assert sum(bar.get_height() for bar in plots.plot_pool(pool)[0].patches) == pytest.approx(100)
    legend = plots.plot_pool_episodes(pool, {"other": 0.5}).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"mean: {pool.rewards.mean():.3g}", "other: 0.5"]
