"""One trace as its viewers lived it, in linked panels over time: what came, what was chosen, and what the policy thought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from netllm_lib.abr import qoe
from netllm_lib.abr.plots import PALETTE, STYLES
from netllm_lib.abr.traces import Trace

PROBABILITIES = [f"p{level}" for level in range(qoe.LEVELS)]
SHADES = ListedColormap([(1 - 0.72 * part, 1 - 0.62 * part, 1 - 0.38 * part) for part in np.linspace(0, 1, 256)])
"""White to dark blue: lighter is always less, in colour, in grey, and for every kind of colour vision."""


def timeline(
    tables: Mapping[str, pd.DataFrame],
    label: str,
    trace: Trace | None = None,
    subject: str | None = None,
    figure: Figure | None = None,
) -> np.ndarray:
    """Linked panels of one trace: bandwidth with the chosen bitrates, buffer with stalls, probabilities, return-to-go.

    `tables` holds tables of chunks by policy, `label` is the trace's name in them. `trace` gives the bandwidth, drawn from the
    tables' start pointer on; round trips and noise do not advance a trace, so it may run ahead of the clock by a few seconds.
    The lower panels are of `subject` (the first policy); they are left out where its table lacks them. Returns the axes, from
    the top. Raises ValueError if no table has the trace.
    """
    rows = {name: of_trace(table, label) for name, table in tables.items() if label in set(table["trace"])}
    if not rows:
        raise ValueError(f"trace {label!r} is not in the tables")
    name = subject if subject in rows else next(iter(rows))
    inside = set(PROBABILITIES) <= set(rows[name].columns)
    heights = (3.0, 2.0, 1.7, 1.1) if inside else (3.0, 2.0)
    figure = figure or Figure(figsize=(10, 1.25 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    pointers = [int(r["start_ptr"].iloc[0]) for r in rows.values() if "start_ptr" in r]
    if trace is not None and pointers:
        time_s, mbps = unrolled(trace, pointers[0], max(float(r["elapsed_s"].iloc[-1]) for r in rows.values()))
        axes[0].fill_between(time_s, mbps, step="pre", color="0.87", label="bandwidth", zorder=0)
    for i, (policy, r) in enumerate(rows.items()):
        style: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "linestyle": STYLES[i % len(STYLES)]}
        mbps = r["bitrate_kbps"].to_numpy() / 1000
        axes[0].stairs(mbps, edges(r), label=policy, baseline=None, linewidth=1.6, **style)
        axes[1].plot(r["elapsed_s"], r["buffer_s"], label=policy, **style)
        stalls = r[(r["rebuffer_s"] > 0) & (r["chunk"] > 0)]
        size = 25 + 60 * stalls["rebuffer_s"].clip(upper=5)
        axes[1].scatter(stalls["elapsed_s"], stalls["buffer_s"], s=size, marker="x", color=style["color"], zorder=3)
    highest = max(float(r["bitrate_kbps"].max()) for r in rows.values()) / 1000
    axes[0].set(ylabel="Mbps", ylim=(0, max(1.35 * highest, 2.0)))
    axes[0].set_title(f"{label}: bandwidth and chosen bitrate", parse_math=False)  # a trace may have any name
    axes[0].legend(frameon=False, fontsize=8, ncols=min(5, len(rows) + 1), loc="upper right")
    axes[1].set(ylabel="buffer (s)", title="Buffer (× marks a stall, larger for longer)", ylim=(0, None))
    if inside:
        probabilities(rows[name], name, axes[2])
        returns(rows[name], name, axes[3])
    axes[-1].set_xlabel("time since the start (s)")
    return axes


def of_trace(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """The chunks of one trace, with `elapsed_s`, the seconds since its start at which each had arrived.

    The original's clock runs on from trace to trace; a trace begins where the download of its first chunk did.
    """
    rows = table[table["trace"] == label]
    return rows.assign(elapsed_s=rows["time_s"] - rows["time_s"].iloc[0] + rows["delay_ms"].iloc[0] / 1000)


def edges(rows: pd.DataFrame) -> np.ndarray:
    """[chunks + 1] seconds between which each chunk was downloaded; `rows` are from `of_trace`."""
    return np.concatenate([[0.0], rows["elapsed_s"].to_numpy()])


def probabilities(rows: pd.DataFrame, name: str, axes: Axes) -> Axes:
    """Probabilities of the six levels over time as shades, with the chosen level as a line; `rows` are from `of_trace`."""
    shown = np.ma.masked_invalid(rows[PROBABILITIES].to_numpy(dtype=float).T)
    borders = np.arange(qoe.LEVELS + 1) - 0.5
    mesh = axes.pcolormesh(edges(rows), borders, shown, cmap=SHADES, vmin=0, vmax=1, rasterized=True)
    axes.stairs(rows["level"].to_numpy(), edges(rows), color="k", linewidth=1.0, baseline=None)
    axes.figure.colorbar(mesh, ax=axes, pad=0.01, ticks=[0, 0.5, 1]).ax.tick_params(labelsize=7)
    axes.set(
        ylabel="level", yticks=range(qoe.LEVELS), title=f"Probabilities of the levels, {name} (black: the level chosen)"
    )
    return axes


def returns(rows: pd.DataFrame, name: str, axes: Axes) -> Axes:
    """The return-to-go that each decision was conditioned on, in units of the training's (reward parts / scale)."""
    axes.stairs(rows["return_to_go"].to_numpy(), edges(rows), color=PALETTE[0], baseline=None)
    axes.set(ylabel="return-to-go", title=f"Return that {name} was asked for")
    axes.margins(y=0.15)
    axes.ticklabel_format(axis="y", useOffset=False)
    return axes


def unrolled(trace: Trace, start_ptr: int, duration_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Sample ends in seconds since the start pointer and their bandwidth, repeated until `duration_s`."""
    lengths, rates = (np.roll(values, 1 - start_ptr) for values in (np.diff(trace.time_s), trace.mbps[1:]))
    times = int(np.ceil(duration_s / lengths.sum())) + 1
    ends = np.cumsum(np.tile(lengths, times))
    keep = int(np.searchsorted(ends, duration_s)) + 1
    return np.concatenate([[0.0], ends[:keep]]), np.concatenate([rates[:1], np.tile(rates, times)[:keep]])
