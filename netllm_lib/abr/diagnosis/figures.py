"""Figures of a diagnosis: pure functions of data, drawn into `axes` if given, returned in any case.

Colours are those of seaborn's colour-blind palette; what colour tells, hatches, line styles or hollow marks tell too, so that
prints in black and white stay legible. `timeline.py` draws single traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from netllm_lib.abr import plots, qoe
from netllm_lib.abr.diagnosis import decisions
from netllm_lib.abr.diagnosis.evidence import Evidence, paired, pool_sizes_mb, previous_levels, throughputs_mbps
from netllm_lib.abr.plots import BESIDE, LEVEL_NAMES, PALETTE, STYLES, by_level, given_or_new, legend
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.findings import Diagnosis, Finding
from netllm_lib.returns import pool_returns
from netllm_lib.stats import Interval
from netllm_lib.training_run import TrainingRun

BETTER, WORSE, UNSHOWN = PALETTE[2], PALETTE[3], "0.4"
PARTS = (("quality", 1, PALETTE[0], ""), ("rebuffering", -1, PALETTE[3], "///"), ("smoothness", -1, PALETTE[1], "..."))
"""Parts of the reward: their sign in it, colour and hatch."""


# --- what a change gives ------------------------------------------------------------------------------------------------


def waterfall(table: pd.DataFrame, references: Mapping[str, float] | None = None, axes: Axes | None = None) -> Axes:
    """From the run's reward to the best that its weights can give: each switch alone, all together, retrained.

    `table` is `Ablation.table()`. A bar goes from the run's reward to the switched one, the thin line is the 95 % interval of that
    change; it is hollow where the interval holds zero (noise). `references` are rewards of other policies.
    """
    rows = table.to_dict("records")
    ax = given_or_new(axes, (9, 0.55 * len(rows) + 1.5))
    start = float(rows[0]["reward"])
    ax.axvline(start, color="k", linewidth=0.8)
    ax.plot(start, 0, "ko")
    ax.annotate(f"{start:.3f}", (start, 0), xytext=(8, -3), textcoords="offset points", fontsize=9)
    for place, row in enumerate(rows[1:], start=1):
        color, hatch = (BETTER, "") if row["low"] > 0 else (WORSE, "xx") if row["high"] < 0 else (UNSHOWN, "")
        face = "white" if row["noise"] else color
        ax.barh(place, row["effect"], left=start, height=0.55, facecolor=face, edgecolor=color, hatch=hatch)
        reach = [[row["effect"] - row["low"]], [row["high"] - row["effect"]]]
        ax.errorbar(start + row["effect"], place, xerr=reach, fmt="none", ecolor="k", elinewidth=1.2, capsize=3)
        text = f"{row['reward']:.3f} ({row['effect']:+.3f}{', noise' if row['noise'] else ''})"
        end = start + max(row["high"], row["effect"], 0)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(text, (end, place), xytext=(8, -3), textcoords="offset points", fontsize=9, bbox=box)
    for i, (name, value) in enumerate((references or {}).items()):
        ax.axvline(value, color=PALETTE[4 + i], linestyle=STYLES[1 + i % 3], label=f"{name}: {value:.3f}")
    if references:
        legend(ax, **BESIDE)
    labels = [f"{row['switch']}\n{row['what']}" if row["what"] else row["switch"] for row in rows]
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    left, right = ax.get_xlim()
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(left, right + 0.3 * (right - left)))
    ax.set_xlabel(f"mean reward per chunk, 95 % interval of the change over {rows[0]['traces']} traces")
    ax.set_title("What each switch changes for the same weights (hollow: noise)")
    return ax


# --- where it goes ------------------------------------------------------------------------------------------------------


def parts(ours: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str], axes: Axes | None = None) -> Axes:
    """What each part of the reward adds to the difference ours − other, by group; black is their sum.

    The two are from `decisions.breakdown`: by bandwidth, or by chunk index.
    """
    common = ours.index.intersection(other.index)
    gap = (ours.loc[common] - other.loc[common]).drop(columns="chunks")
    many = len(gap) > 12
    ax = given_or_new(axes, (9, 3.4) if many else (7, 3.4))
    places = common.to_numpy(dtype=float) if many else np.arange(len(gap), dtype=float)
    up, down = np.zeros(len(gap)), np.zeros(len(gap))
    for name, sign, color, hatch in PARTS:
        value = sign * gap[name].to_numpy()
        style = {"width": 1.0 if many else 0.6, "color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
        ax.bar(places, value, bottom=np.where(value >= 0, up, down), label=name, **style)
        up, down = up + value.clip(min=0), down + value.clip(max=0)
    ax.plot(places, gap["reward"], "k.-" if many else "kD", linewidth=1, markersize=4 if many else 6, label="reward")
    ax.axhline(0, color="k", linewidth=0.8)
    if not many:
        counts = zip(common, ours.loc[common, "chunks"], strict=True)
        ax.set_xticks(places, [f"{band.left:.4g} to {band.right:.4g}\n({n:.0f} chunks)" for band, n in counts])
    group = str(ours.index.name)
    ax.set_xlabel({"chunk": "chunk index"}.get(group, group))
    ax.set_ylabel("reward per chunk")
    ax.set_title(f"{names[0]} − {names[1]}: what the parts of the reward add (below zero: lost)")
    return legend(ax, **BESIDE)


def concentration(gap: pd.Series, what: str = "gap", axes: Axes | None = None) -> Axes:
    """How much of the gap lies in the k worst traces; the straight line is a gap that is spread evenly.

    `gap` is per trace what is missing (reference − run).
    """
    ax = given_or_new(axes, (6, 3.4))
    values = np.sort(gap.to_numpy(dtype=float))[::-1]
    count, total = len(values), float(values.mean())
    reached = np.concatenate([[0.0], np.cumsum(values) / count])
    ax.plot(range(count + 1), reached, color=PALETTE[0], linewidth=2, label="the worst traces")
    ax.plot([0, count], [0, total], color="k", linestyle="--", linewidth=1, label="spread evenly")
    for k in sorted({1, 5, round(0.1 * count), round(0.5 * count)} & set(range(1, count))) if total > 0 else []:
        ax.plot(k, reached[k], "ko", markersize=4)
        words = f"{k} {'trace' if k == 1 else 'traces'}: {reached[k] / total:.0%}"
        ax.annotate(words, (k, reached[k]), xytext=(6, -10), textcoords="offset points", fontsize=8)
    ax.set(xlabel="traces, the worst first", ylabel=f"{what} in them (mean reward)", xlim=(0, count))
    ax.set_title(f"Is the {what} everywhere, or in a few traces?")
    return legend(ax, **BESIDE)


def confusion(counts: pd.DataFrame, names: tuple[str, str], axes: Axes | None = None) -> Axes:
    """6 × 6 shares of all decisions in %: rows what the run chose, columns what the other would have chosen in the same state.

    `counts` is from `decisions.confusion`.
    """
    ax = given_or_new(axes, (5.4, 4.6))
    share = 100 * counts / max(int(counts.to_numpy().sum()), 1)
    text = share.map(lambda value: "" if value == 0 else "<.1" if value < 0.1 else f"{value:.1f}")
    style: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "square": True, "linewidths": 0.5, "linecolor": "0.8"}
    style |= {"xticklabels": LEVEL_NAMES, "yticklabels": LEVEL_NAMES, "annot_kws": {"size": 9}}
    sns.heatmap(share, annot=text, fmt="", ax=ax, cbar_kws={"label": "share of decisions (%)"}, **style)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel=f"{names[1]} would choose (level, Mbps)", ylabel=f"{names[0]} chose (level, Mbps)")
    same, higher = np.trace(share.to_numpy()), np.tril(share.to_numpy(), -1).sum()
    title = f"the same: {same:.0f} %, {names[0]} higher: {higher:.0f} %, lower: {100 - same - higher:.0f} %"
    ax.set_title(title, fontsize=10)
    return ax


def costliest(found: pd.DataFrame, what: str = "gap", axes: Axes | None = None) -> Axes:
    """The decisions whose swap would have gained most, with their shares of `what`. `found` is from `decisions.costliest`."""
    ax = given_or_new(axes, (9, 0.36 * len(found) + 1.3))
    names = [name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}" for name in found["trace"].astype(str)]
    swaps = [f", chunk {row.chunk}: level {row.level} instead of {row.instead}" for row in found.itertuples()]
    bars = ax.barh(range(len(found)), found["gain"], color=PALETTE[0])
    of_gap = ["" if np.isnan(share) else f"  ({share:.1%} of the {what})" for share in found["share"]]
    texts = [f"{gain:.2f}{text}" for gain, text in zip(found["gain"], of_gap, strict=True)]
    ax.bar_label(bars, texts, padding=4, fontsize=8)
    labels = [name + swap for name, swap in zip(names, swaps, strict=True)]
    ax.set_yticks(range(len(found)), labels, fontsize=8, parse_math=False)  # a trace may have any name
    ax.set(ylim=(len(found) - 0.4, -0.6), xlabel="what swapping this one decision gains (summed reward of the episode)")
    ax.set_xlim(0, 1.45 * max(found["gain"].max(), 1e-9) if len(found) else 1)
    together = found["share"].sum(min_count=1)
    ax.set_title("The costliest decisions" + ("" if np.isnan(together) else f", together {together:.0%} of the {what}"))
    return ax


def stalls(tables: Mapping[str, pd.DataFrame], axes: Axes | None = None) -> Axes:
    """What stalls longer than x seconds cost of the mean reward, by policy: is the cost in a few long ones?"""
    ax = given_or_new(axes, (7, 3.2))
    limits = np.geomspace(0.05, 60, 120)
    for i, (name, table) in enumerate(tables.items()):
        seconds = qoe.chosen(table)["rebuffer_s"].to_numpy()
        cost = [qoe.REBUFFER_PENALTY * seconds[seconds > limit].sum() / len(seconds) for limit in limits]
        ax.plot(limits, cost, color=PALETTE[i % len(PALETTE)], linestyle=STYLES[i % 4], label=name)
    ax.set(xscale="log", xlabel="stalls longer than … (s)", ylabel="cost (mean reward)", title="Cost of long stalls")
    ax.set_xticks([0.1, 1, 10, 60], ["0.1", "1", "10", "60"])
    return legend(ax)


# --- what was learnt, from what -----------------------------------------------------------------------------------------


def losses(known: TrainingRun, references: Mapping[str, float], axes: Axes | None = None) -> Axes:
    """Training loss by optimizer step, with reference losses. The training must have recorded its losses."""
    assert known.losses is not None
    steps = np.arange(len(known.losses)) // max(1, known.accumulation or 1)
    bad = ~np.isfinite(known.losses)
    history = pd.DataFrame({"step": steps, "loss": np.where(bad, np.nan, known.losses)})
    ax = plots.plot_training(history, references, given_or_new(axes, (8, 3.5)))
    if bad.any():
        ax.axvline(steps[bad.argmax()], color=WORSE, linestyle="-.", label="the first loss that is no number")
        legend(ax)
    return ax


def reference_losses(evidence: Evidence) -> dict[str, float]:
    """Losses to hold a training against: chance, the behaviour policy's entropies, the loss on held-out episodes."""
    held_out = evidence.training.held_out_loss if evidence.training else None
    return evidence.reference_losses | ({} if held_out is None else {"held-out episodes": held_out})


def learning_rate(known: TrainingRun, axes: Axes | None = None) -> Axes:
    """The rate as it rose in the warm-up, up to the last step that was taken, against the one that was asked for.

    Learning rate, steps and warm-up of the training must be known.
    """
    assert known.lr is not None and known.steps is not None and known.warmup_steps  # noqa: PT018
    ax = given_or_new(axes, (8, 3.0))
    step = np.linspace(0, max(known.steps, known.warmup_steps), 400)
    planned = known.lr * np.minimum(1, step / known.warmup_steps)
    taken = step <= known.steps
    ax.plot(step, planned, color="0.6", linestyle="--", label="as planned")
    ax.plot(step[taken], planned[taken], color=PALETTE[0], linewidth=2.5, label="warm-up, as far as steps were taken")
    ax.axhline(known.lr, color="k", linestyle=":", linewidth=1, label=f"asked for: {known.lr:.2g}")
    ax.axvline(known.steps, color=WORSE, linestyle="-.", label=f"the training ended after {known.steps} steps")
    ax.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    ax.set_title("Learning rate: asked for and reached")
    return legend(ax, loc="lower right")


def shift(pool: ExperiencePool, table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Throughput of the chunks that the training pool saw, and of those of the test."""
    ax = given_or_new(axes, (7, 3.2))
    for i, (name, mbps) in enumerate(zip(("training pool", "test"), throughputs_mbps(pool, table), strict=True)):
        label = f"{name}: median {np.median(mbps):.2f} Mbps"
        sns.ecdfplot(mbps[mbps > 0], ax=ax, color=PALETTE[i], linestyle=STYLES[i], label=label, log_scale=True)
    ax.set(xlabel="throughput of a chunk (Mbps)", ylabel="share of chunks")
    ax.set_title("Did the training see such bandwidths?")
    ax.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    return legend(ax)


# --- the figure of a finding --------------------------------------------------------------------------------------------


def gallery(diagnosis: Diagnosis, evidence: Evidence, without: Sequence[str] = ()) -> Iterator[tuple[str, Axes]]:
    """(name, axes) of the figures of all findings, the most important first; each figure once, and none of `without`."""
    drawn = {"", *without}
    for finding in diagnosis.findings:
        name = finding.rule.figure
        if name not in drawn and (axes := figure_of(finding, evidence, diagnosis.waterfall)) is not None:
            drawn.add(name)
            yield name, axes


def figure_of(finding: Finding, evidence: Evidence, table: pd.DataFrame | None = None) -> Axes | None:
    """The figure that belongs to a finding (its rule's); None where it has none, or what it would show is not at hand.

    `table` is the waterfall of the ablation, if it was made (`Diagnosis.waterfall`).
    """
    run, pool, training, reference = evidence.table, evidence.pool, evidence.training, evidence.reference
    numbers, others = finding.evidence, {} if reference is None else {reference: evidence.tables[reference]}
    match finding.rule.figure:
        case "waterfall" if table is not None and finding.id in set(table["switch"]):
            return waterfall(table, {name: qoe.summarise(other).reward for name, other in others.items()})
        case "losses" if training is not None and training.losses is not None:
            extra = numbers.get("checkpoint_loss")
            more = {} if extra is None else {"this checkpoint": float(extra)}
            return losses(training, reference_losses(evidence) | more)
        case "learning-rate" if training is not None and training.lr and training.steps and training.warmup_steps:
            return learning_rate(training)
        case "labels" if pool is not None:
            inside = ~np.asarray(pool.dones)[:-1]
            pairs = (pool.actions[:-1][inside], previous_levels(pool)[1:][inside])
            counts = decisions.confusion(*(np.stack([np.zeros_like(levels), levels], axis=1) for levels in pairs))
            return confusion(counts, ("the pool", "the next state"))
        case "pool-levels" if pool is not None:
            return plots.plot_pool_levels(pool)
        case "pool-episodes" if pool is not None:
            reward = numbers.get("mpc_reward")
            return plots.plot_pool_episodes(pool, {} if reward is None else {"MPC as published": float(reward)})
        case "returns" if pool is not None:
            firsts = pool_returns(pool)[0][pool.episode_starts]
            lines = {"mean": float(firsts.mean()), "asked for at test": float(firsts.max())}
            return plots.histogram(firsts, lines, "return-to-go at an episode's start", "Is there a return to ask for?")
        case "throughput" if pool is not None and run is not None:
            return shift(pool, run)
        case "sizes" if pool is not None and evidence.video is not None:
            sizes = {
                "training": pool_sizes_mb(pool).mean(axis=0),
                "test": evidence.video.sizes_bytes.mean(axis=1) / 1e6,
            }
            return by_level(sizes, "mean chunk size (MB)", "The videos of training and test")
        case "levels" if run is not None:
            levels = {name: qoe.chosen(table)["level"] for name, table in {evidence.run: run, **others}.items()}
            shares = {
                name: 100 * np.bincount(chosen, minlength=qoe.LEVELS) / len(chosen) for name, chosen in levels.items()
            }
            return by_level(shares, "share of chunks (%)", "Levels chosen")
        case "stalls" if run is not None:
            return stalls({evidence.run: run, **others})
        case "differences" if run is not None and len(evidence.tables) > 1:
            return plots.plot_differences(differences(evidence))
        case "overlap" if run is not None and others and evidence.clean is not None:
            names, clean = run["trace"].unique(), evidence.clean
            groups = {f"the {clean.sum()} clean traces": names[clean], f"the {(~clean).sum()} others": names[~clean]}
            ours = {group: run[run["trace"].isin(part)] for group, part in groups.items() if len(part)}
            return plots.plot_differences(
                {group: paired(part, next(iter(others.values()))) for group, part in ours.items()}
            )
    return None


def differences(evidence: Evidence) -> dict[str, Interval]:
    """Paired differences of the run to every other policy that played some of its traces."""
    run = evidence.table
    assert run is not None, "a run is compared with others only where there is one"
    names = set(run["trace"])
    return {
        f"{evidence.run} − {name}": paired(run, other)
        for name, other in evidence.tables.items()
        if name != evidence.run and names & set(other["trace"])
    }
