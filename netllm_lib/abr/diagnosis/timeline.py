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
TARGET = "return_to_go"
SHADES = ListedColormap([(1 - 0.72 * part, 1 - 0.62 * part, 1 - 0.38 * part) for part in np.linspace(0, 1, 256)])
"""White to dark blue: lighter is always less, in colour, in grey, and for every kind of colour vision."""


def timeline(
    tables: Mapping[str, pd.DataFrame],
    label: str,
    trace: Trace | None = None,
    start_ptr: int | None = None,
    subject: str | None = None,
    figure: Figure | None = None,
) -> np.ndarray:
    """Linked panels of one trace: bandwidth with the chosen bitrates, buffer with stalls, probabilities, return-to-go.

    `tables` holds tables of chunks by policy, `label` is the trace's name in them. `trace` gives the bandwidth, drawn from its
    start pointer on (`start_ptr`, else the tables' column); round trips and noise do not advance a trace, so it may lead the clock
    by a few seconds. The lower panels are of `subject` (the first policy); they are left out where its table lacks them.
    Returns the axes, from the top. Raises ValueError if no table has the trace.
    """
    rows = {name: of_trace(table, label) for name, table in tables.items()}
    rows = {name: r for name, r in rows.items() if len(r)}
    if not rows:
        raise ValueError(f"trace {label!r} is not in the tables")
    of_subject = rows.get(subject or next(iter(rows)))
    inside = of_subject is not None and set(PROBABILITIES) <= set(of_subject.columns)
    heights = (3.0, 2.0, 1.7, 1.1) if inside else (3.0, 2.0)
    figure = figure or Figure(figsize=(10, 1.25 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    if trace is not None:
        pointer = start_ptr if start_ptr is not None else _pointer(rows)
        if pointer is not None:
            end_s = max(float(r["elapsed_s"].iloc[-1]) for r in rows.values())
            time_s, mbps = unrolled(trace, pointer, end_s)
            axes[0].fill_between(time_s, mbps, step="pre", color="0.87", label="bandwidth", zorder=0)
    for i, (name, r) in enumerate(rows.items()):
        style: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "linestyle": STYLES[i % len(STYLES)]}
        _bitrate(axes[0], r, name, style)
        _buffer(axes[1], r, name, style)
    highest = max(float(r["bitrate_kbps"].max()) for r in rows.values()) / 1000
    axes[0].set(ylabel="Mbps", title=f"{label}: bandwidth and chosen bitrate", ylim=(0, max(1.35 * highest, 2.0)))
    axes[0].legend(frameon=False, fontsize=8, ncols=min(5, len(rows) + 1), loc="upper right")
    axes[1].set(ylabel="buffer (s)", title="Buffer (× marks a stall, larger for longer)", ylim=(0, None))
    if inside:
        assert of_subject is not None
        name = subject or next(iter(rows))
        probabilities(of_subject, name, axes[2])
        returns(of_subject, name, axes[3])
    axes[-1].set_xlabel("time since the start (s)")
    return axes


def of_trace(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """The chunks of one trace, with `elapsed_s`, the seconds since its start at which each had arrived.

    The original's clock runs on from trace to trace; a trace begins where the download of its first chunk did.
    """
    rows = table[table["trace"] == label]
    if rows.empty:
        return rows.assign(elapsed_s=np.zeros(0))
    start_s = rows["time_s"].iloc[0] - rows["delay_ms"].iloc[0] / 1000
    return rows.assign(elapsed_s=rows["time_s"] - start_s)


def edges(rows: pd.DataFrame) -> np.ndarray:
    """[chunks + 1] seconds between which each chunk was downloaded."""
    return np.concatenate([[0.0], rows["elapsed_s"].to_numpy()])


def probabilities(rows: pd.DataFrame, name: str, axes: Axes) -> Axes:
    """Probabilities of the six levels over time as shades, with the level that was chosen as a line.

    `rows` are those of one trace, from `of_trace`.
    """
    shown = rows[PROBABILITIES].to_numpy(dtype=float).T
    borders = np.arange(qoe.LEVELS + 1) - 0.5
    mesh = axes.pcolormesh(
        edges(rows), borders, np.ma.masked_invalid(shown), cmap=SHADES, vmin=0, vmax=1, rasterized=True
    )
    axes.stairs(rows["level"].to_numpy(), edges(rows), color="k", linewidth=1.0, baseline=None)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, ticks=[0, 0.5, 1])
    bar.ax.tick_params(labelsize=7)
    axes.set(
        ylabel="level", yticks=range(qoe.LEVELS), title=f"Probabilities of the levels, {name} (black: the level chosen)"
    )
    return axes


def returns(rows: pd.DataFrame, name: str, axes: Axes) -> Axes:
    """The return-to-go that each decision was conditioned on, in units of the training's (reward parts / scale)."""
    axes.stairs(rows[TARGET].to_numpy(), edges(rows), color=PALETTE[0], baseline=None)
    axes.set(ylabel="return-to-go", title=f"Return that {name} was asked for")
    axes.margins(y=0.15)
    axes.ticklabel_format(axis="y", useOffset=False)
    return axes


def unrolled(trace: Trace, start_ptr: int, duration_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Sample ends in seconds since the start pointer and their bandwidth, repeated until `duration_s`."""
    lengths, rates = np.diff(trace.time_s), trace.mbps[1:]
    first = start_ptr - 1
    lengths, rates = np.roll(lengths, -first), np.roll(rates, -first)
    times = int(np.ceil(duration_s / lengths.sum())) + 1
    ends = np.cumsum(np.tile(lengths, times))
    keep = int(np.searchsorted(ends, duration_s)) + 1
    return np.concatenate([[0.0], ends[:keep]]), np.concatenate([rates[:1], np.tile(rates, times)[:keep]])


def _pointer(rows: Mapping[str, pd.DataFrame]) -> int | None:
    known = [int(r["start_ptr"].iloc[0]) for r in rows.values() if "start_ptr" in r]
    return known[0] if known else None


def _bitrate(axes: Axes, rows: pd.DataFrame, name: str, style: dict[str, Any]) -> None:
    axes.stairs(rows["bitrate_kbps"].to_numpy() / 1000, edges(rows), label=name, baseline=None, linewidth=1.6, **style)


def _buffer(axes: Axes, rows: pd.DataFrame, name: str, style: dict[str, Any]) -> None:
    axes.plot(rows["elapsed_s"], rows["buffer_s"], label=name, **style)
    stalls = rows[(rows["rebuffer_s"] > 0) & (rows["chunk"] > 0)]
    size = 25 + 60 * stalls["rebuffer_s"].clip(upper=5)
    axes.scatter(stalls["elapsed_s"], stalls["buffer_s"], s=size, marker="x", color=style["color"], zorder=3)
