"""Figures: pure functions of data, drawn into `axes` if given, returned in any case.

Colours are those of seaborn's colour-blind palette; lines differ in style too, so that prints in black and white stay legible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from netllm_lib.abr import qoe
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.traces import TraceSet
from netllm_lib.stats import Interval

PALETTE = sns.color_palette("colorblind")
STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
"""Place of a legend to the right of the axes."""
LEVEL_NAMES = [f"{level}\n{kbps / 1000:g}" for level, kbps in enumerate(qoe.BITRATES_KBPS)]


def given_or_new(axes: Axes | None, size: tuple[float, float]) -> Axes:
    """`axes`, or those of a new figure of `size` inches."""
    return axes if axes is not None else plt.subplots(figsize=size, constrained_layout=True)[1]


def legend(axes: Axes, **place: Any) -> Axes:
    """The same legend for all figures."""
    axes.legend(frameon=False, fontsize=8, **place)
    return axes


def plot_bandwidths(trace_sets: Sequence[TraceSet], axes: Axes | None = None) -> Axes:
    """Distribution over traces of the mean bandwidth, one step curve per trace set."""
    ax = given_or_new(axes, (7, 3.2))
    for i, traces in enumerate(trace_sets):
        style = {"label": f"{traces.name} ({len(traces)} traces)", "color": PALETTE[i], "linestyle": STYLES[i % 4]}
        sns.ecdfplot(traces.describe()["mean_mbps"], ax=ax, **style)
    ax.set(xlabel="mean bandwidth of a trace (Mbps)", ylabel="share of traces", title="Bandwidth")
    return legend(ax)


def by_level(values: Mapping[str, np.ndarray], what: str, title: str, axes: Axes | None = None) -> Axes:
    """Bars by level, [6] for each name."""
    ax = given_or_new(axes, (7, 3.2))
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        places = np.arange(qoe.LEVELS) + (i - (len(values) - 1) / 2) * width
        ax.bar(places, heights, width, color=PALETTE[i], hatch=HATCHES[i % 4], edgecolor="white", label=name)
    ax.set_xticks(range(qoe.LEVELS), LEVEL_NAMES)
    ax.set(xlabel="level (Mbps below)", ylabel=what, title=title)
    return legend(ax)


def histogram(values: np.ndarray, lines: Mapping[str, float], what: str, title: str, axes: Axes | None = None) -> Axes:
    """How a figure of each episode spreads, with reference values as lines."""
    ax = given_or_new(axes, (5, 3.2))
    ax.hist(values, bins=40, color=PALETTE[2])
    for i, (name, value) in enumerate(lines.items()):
        ax.axvline(value, color="k", linestyle=STYLES[i % 4], linewidth=1.2, label=f"{name}: {value:.3g}")
    ax.set(xlabel=what, ylabel="episodes", title=title)
    return legend(ax)


def plot_pool(pool: ExperiencePool) -> np.ndarray:
    """Three panels of an experience pool: levels, rewards of transitions, mean reward of episodes. Returns the axes [3].

    The tail of the rewards, which sets the range of the returns, shows on a logarithmic axis.
    """
    axes: np.ndarray = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)[1]
    plot_pool_levels(pool, axes[0])
    axes[1].hist(pool.rewards, bins=80, color=PALETTE[1])
    axes[1].set(yscale="log", xlabel="reward of a chunk", ylabel="transitions", title="Rewards: the tail is stalls")
    plot_pool_episodes(pool, axes=axes[2])
    return axes


def plot_pool_levels(pool: ExperiencePool, axes: Axes | None = None) -> Axes:
    """How often the behaviour policy chose each level."""
    share = 100 * np.bincount(pool.actions, minlength=qoe.LEVELS) / len(pool)
    return by_level({"the pool": share}, "share of transitions (%)", "Levels chosen", axes)


def plot_pool_episodes(
    pool: ExperiencePool, references: Mapping[str, float] | None = None, axes: Axes | None = None
) -> Axes:
    """Mean reward of the pool's episodes, with reference rewards as lines (for example MPC's on the same traces)."""
    means = pool.episode_returns() / pool.episode_lengths
    lines = {"mean": float(means.mean()), **(references or {})}
    return histogram(means, lines, "mean reward of an episode", "Episodes", axes)


def plot_training(history: pd.DataFrame, references: Mapping[str, float], axes: Axes | None = None) -> Axes:
    """Training loss by optimizer step, with reference losses (for example chance, or the behaviour policy's entropy)."""
    ax = given_or_new(axes, (8, 3.5))
    steps = history.groupby("step")["loss"].mean()
    ax.plot(steps.index, steps, color="0.75", linewidth=0.8, label="loss of a step")
    ax.plot(steps.index, steps.rolling(15, min_periods=1).mean(), color=PALETTE[0], label="mean of 15 steps")
    for i, (name, value) in enumerate(references.items(), start=1):
        ax.axhline(value, color=PALETTE[i], linestyle=STYLES[i % 4], linewidth=1.2, label=f"{name}: {value:.2f}")
    ax.set(xlabel="optimizer step", ylabel="cross-entropy (nats)", title="Training loss")
    return legend(ax, **BESIDE)


def plot_decomposition(tables: Mapping[str, pd.DataFrame], axes: Axes | None = None) -> Axes:
    """Where the reward goes, by policy: bitrate gained, rebuffering and switching paid; the dot is the mean reward."""
    ax = given_or_new(axes, (8, 0.55 * len(tables) + 1.4))
    means = pd.DataFrame({name: qoe.per_trace(table).mean() for name, table in tables.items()}).T[::-1]
    stalls, switches = -means["rebuffering"], -means["smoothness"]
    ax.barh(means.index, means["quality"], color=PALETTE[0], label="quality (bitrate)")
    ax.barh(means.index, stalls, color=PALETTE[3], hatch="//", label="rebuffering")
    ax.barh(means.index, switches, left=stalls, color=PALETTE[1], hatch="..", label="smoothness")
    ax.plot(means["reward"], means.index, "ko", label="mean reward")
    for name, value in means["reward"].items():
        ax.annotate(f"{value:.3f}", (value, name), xytext=(6, 6), textcoords="offset points", fontsize=8)
    ax.axvline(0, color="k", linewidth=0.8)
    ax.set(xlabel="reward per chunk (Mbps)", title="Where the reward goes")
    return legend(ax, **BESIDE)


def plot_differences(differences: Mapping[str, Interval], axes: Axes | None = None) -> Axes:
    """Paired differences with their intervals; one whose interval holds zero is drawn hollow."""
    ax = given_or_new(axes, (8, 0.5 * len(differences) + 1.3))
    for row, interval in enumerate(list(differences.values())[::-1]):
        color = PALETTE[2] if interval.low > 0 else PALETTE[3] if interval.high < 0 else "0.4"
        ax.plot([interval.low, interval.high], [row, row], color=color, linewidth=2)
        ax.plot(interval.mean, row, "o", color=color, markerfacecolor=color if interval.excludes_zero else "white")
    ax.set_yticks(range(len(differences)), list(differences)[::-1])
    ax.axvline(0, color="k", linewidth=0.8)
    ax.set(xlabel="difference of mean reward, 95 % interval over traces", ylim=(-0.7, len(differences) - 0.3))
    ax.set_title("Paired differences (hollow: no difference shown)")
    return ax
