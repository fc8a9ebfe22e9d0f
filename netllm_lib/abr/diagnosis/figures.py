"""Figures of a diagnosis: pure functions of data, drawn into `axes` if given, returned in any case.

Colours are those of seaborn's colour-blind palette; what colour tells, hatches, line styles or hollow marks tell too, so that
prints in black and white stay legible. `timeline.py` draws single traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from netllm_lib.abr import plots, qoe
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.diagnosis import decisions
from netllm_lib.abr.diagnosis.evidence import CHANCE, Evidence, behaviour_entropy, paired, previous_levels
from netllm_lib.abr.diagnosis.inputs import pool_sizes_mb
from netllm_lib.abr.plots import PALETTE, STYLES, given_or_new
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.findings import Diagnosis, Finding
from netllm_lib.stats import Interval
from netllm_lib.training_run import TrainingRun

BETTER, WORSE, UNSHOWN = PALETTE[2], PALETTE[3], "0.4"
PARTS = (("quality", 1, PALETTE[0], ""), ("rebuffering", -1, PALETTE[3], "///"), ("smoothness", -1, PALETTE[1], "..."))
"""Parts of the reward: their sign in it, colour and hatch."""
LEVEL_NAMES = [f"{level}\n{kbps / 1000:g}" for level, kbps in enumerate(qoe.BITRATES_KBPS)]
SHORT = 26  # characters of a trace's name on an axis


# --- what it is worth ---------------------------------------------------------------------------------------------------


def waterfall(
    table: pd.DataFrame, references: Mapping[str, float] | None = None, axes: Axes | None = None
) -> Axes:  # fmt: skip
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
        color, hatch = _verdict(Interval(row["effect"], row["low"], row["high"]))
        face = "white" if row["noise"] else color
        ax.barh(place, row["effect"], left=start, height=0.55, facecolor=face, edgecolor=color, hatch=hatch)
        ax.errorbar(
            start + row["effect"], place, fmt="none", ecolor="k", elinewidth=1.2, capsize=3,
            xerr=[[row["effect"] - row["low"]], [row["high"] - row["effect"]]],
        )  # fmt: skip
        text = f"{row['reward']:.3f} ({row['effect']:+.3f}{', noise' if row['noise'] else ''})"
        end = start + max(row["high"], row["effect"], 0)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(text, (end, place), xytext=(8, -3), textcoords="offset points", fontsize=9, bbox=box)
    for i, (name, value) in enumerate((references or {}).items()):
        ax.axvline(value, color=PALETTE[4 + i], linestyle=STYLES[1 + i % 3], label=f"{name}: {value:.3f}")
    if references:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    labels = [f"{row['switch']}\n{row['what']}" if row["what"] else row["switch"] for row in rows]
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    left, right = ax.get_xlim()
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(left, right + 0.3 * (right - left)))
    ax.set(
        xlabel=f"mean reward per chunk, 95 % interval of the change over {rows[0]['traces']} traces",
        title="What each switch is worth for the same weights (hollow: noise)",
    )
    return ax


def regret(missing: pd.Series, axes: Axes | None = None) -> Axes:
    """Regret to the offline optimum by trace, sorted: how much reward the run left on the table, and where."""
    ax = given_or_new(axes, (9, 3.2))
    values = missing.sort_values(ascending=False).to_numpy()
    ax.bar(range(len(values)), values, width=1.0, color=PALETTE[0], edgecolor="white", linewidth=0.3)
    ax.axhline(values.mean(), color="k", linestyle="--", linewidth=1, label=f"mean {values.mean():.3f}")
    ax.axhline(np.median(values), color="k", linestyle=":", linewidth=1, label=f"median {np.median(values):.3f}")
    ax.set(xlabel="traces, sorted by regret", ylabel="regret per chunk", title="Regret to the offline optimum by trace")
    ax.legend(frameon=False, fontsize=8)
    return ax


# --- where it goes ------------------------------------------------------------------------------------------------------


def parts(ours: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str], axes: Axes | None = None) -> Axes:
    """What each part of the reward adds to the difference ours − other, by group; black is their sum.

    The two are from `decisions.breakdown`: by bandwidth regime, by chunk index, by level, by trace.
    """
    common = ours.index.intersection(other.index)
    gap = (ours.loc[common] - other.loc[common]).drop(columns="chunks")
    many = len(gap) > 12
    ax = given_or_new(axes, (9, 3.4) if many else (7, 3.4))
    places = common.to_numpy(dtype=float) if many else np.arange(len(gap), dtype=float)
    up, down = np.zeros(len(gap)), np.zeros(len(gap))
    for name, sign, color, hatch in PARTS:
        value = sign * gap[name].to_numpy()
        bottom = np.where(value >= 0, up, down)
        ax.bar(
            places, value, bottom=bottom, width=1.0 if many else 0.6, color=color, hatch=hatch, edgecolor="white",
            linewidth=0.3, label=name,
        )  # fmt: skip
        up, down = up + value.clip(min=0), down + value.clip(max=0)
    ax.plot(places, gap["reward"], "k.-" if many else "kD", linewidth=1, markersize=4 if many else 6, label="reward")
    ax.axhline(0, color="k", linewidth=0.8)
    if not many:
        ax.set_xticks(places, [f"{name}\n({int(n)} chunks)" for name, n in ours.loc[common, "chunks"].items()])
    ax.set(
        xlabel={"chunk": "chunk index", "regime": "mean bandwidth of a trace"}.get(
            str(ours.index.name), ours.index.name
        ),
        ylabel="reward per chunk",
        title=f"{names[0]} − {names[1]}: what the parts of the reward add (below zero: lost)",
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


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
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def confusion(counts: pd.DataFrame, names: tuple[str, str], axes: Axes | None = None) -> Axes:
    """6 × 6 shares of all decisions in %: rows what the run chose, columns what the other would have chosen in the same state.

    `counts` is from `decisions.confusion`.
    """
    ax = given_or_new(axes, (5.4, 4.6))
    share = 100 * counts / max(int(counts.to_numpy().sum()), 1)
    text = share.map(lambda value: "" if value == 0 else "<.1" if value < 0.1 else f"{value:.1f}")
    sns.heatmap(
        share, annot=text, fmt="", cmap="Blues", vmin=0, square=True, linewidths=0.5, linecolor="0.8", ax=ax,
        cbar_kws={"label": "share of decisions (%)"}, xticklabels=LEVEL_NAMES, yticklabels=LEVEL_NAMES, annot_kws={"size": 9},
    )  # fmt: skip
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel=f"{names[1]} would choose (level, Mbps)", ylabel=f"{names[0]} chose (level, Mbps)")
    shares = share.to_numpy()
    same, higher = np.trace(shares), np.tril(shares, -1).sum()
    ax.set_title(
        f"the same: {same:.0f} %, {names[0]} higher: {higher:.0f} %, lower: {100 - same - higher:.0f} %", fontsize=10
    )
    return ax


def divergence(first: Mapping[str, np.ndarray], chunks: int, axes: Axes | None = None) -> Axes:
    """Share of the traces in which the run has decided otherwise than another policy by chunk k.

    `first` holds `decisions.first_divergence` by the other's name.
    """
    ax = given_or_new(axes, (6, 3.2))
    for i, (name, firsts) in enumerate(first.items()):
        reached = 100 * (np.asarray(firsts)[:, None] <= np.arange(chunks)).mean(axis=0)
        ax.step(range(chunks), reached, where="post", color=PALETTE[i], linestyle=STYLES[i % 4], label=f"from {name}")
    ax.set(xlabel="chunk index", ylabel="traces that have differed (%)", ylim=(0, 103), title="First divergence")
    ax.legend(frameon=False, fontsize=8)
    return ax


def costliest(found: pd.DataFrame, what: str = "gap", axes: Axes | None = None) -> Axes:
    """The decisions whose swap would have gained most, with their shares of `what`. `found` is from `decisions.costliest`."""
    ax = given_or_new(axes, (9, 0.36 * len(found) + 1.3))
    labels = [
        f"{shortened(str(row.trace))}, chunk {row.chunk}: level {row.level} instead of {row.instead}"
        for row in found.itertuples()
    ]
    places = np.arange(len(found))
    ax.barh(places, found["gain"], color=PALETTE[0])
    for place, gain, share in zip(places, found["gain"], found["share"], strict=True):
        text = f"{gain:.2f}" + ("" if np.isnan(share) else f"  ({share:.1%} of the {what})")
        ax.annotate(text, (gain, place), xytext=(4, -3), textcoords="offset points", fontsize=8)
    ax.set_yticks(places, labels, fontsize=8)
    ax.set(ylim=(len(found) - 0.4, -0.6), xlabel="what swapping this one decision gains (summed reward of the episode)")
    ax.set_xlim(0, 1.45 * max(found["gain"].max(), 1e-9) if len(found) else 1)
    together = found["share"].sum(min_count=1)
    ax.set_title("The costliest decisions" + ("" if np.isnan(together) else f", together {together:.0%} of the {what}"))
    return ax


def levels(tables: Mapping[str, pd.DataFrame], axes: Axes | None = None) -> Axes:
    """How often each policy chose each level."""
    ax = given_or_new(axes, (7, 3.2))
    width = 0.8 / len(tables)
    for i, (name, table) in enumerate(tables.items()):
        share = np.bincount(qoe.chosen(table)["level"], minlength=qoe.LEVELS)
        places = np.arange(qoe.LEVELS) + (i - (len(tables) - 1) / 2) * width
        ax.bar(
            places, 100 * share / share.sum(), width, color=PALETTE[i], hatch=("", "//", "..", "xx")[i % 4],
            edgecolor="white", label=name,
        )  # fmt: skip
    ax.set_xticks(range(qoe.LEVELS), LEVEL_NAMES)
    ax.set(xlabel="level (Mbps below)", ylabel="share of chunks (%)", title="Levels chosen")
    ax.legend(frameon=False, fontsize=8)
    return ax


def stalls(tables: Mapping[str, pd.DataFrame], axes: Axes | None = None) -> Axes:
    """What stalls longer than x seconds cost of the mean reward, by policy: is the cost in a few long ones?"""
    ax = given_or_new(axes, (7, 3.2))
    limits = np.geomspace(0.05, 60, 120)
    for i, (name, table) in enumerate(tables.items()):
        seconds = qoe.chosen(table)["rebuffer_s"].to_numpy()
        cost = [qoe.REBUFFER_PENALTY * seconds[seconds > limit].sum() / len(seconds) for limit in limits]
        ax.plot(limits, cost, color=PALETTE[i % len(PALETTE)], linestyle=STYLES[i % 4], label=name)
    ax.axvline(1.0, color="0.6", linewidth=0.8)
    ax.set(
        xscale="log", xlabel="stalls longer than … (s)", ylabel="their cost (mean reward)", title="Cost of long stalls"
    )
    ax.set_xticks([0.1, 1, 10, 60], ["0.1", "1", "10", "60"])
    ax.legend(frameon=False, fontsize=8)
    return ax


# --- what was learnt, from what -----------------------------------------------------------------------------------------


def losses(known: TrainingRun, references: Mapping[str, float], axes: Axes | None = None) -> Axes:
    """Training loss by optimizer step, with reference losses. Raises ValueError if no losses are known."""
    if known.losses is None:
        raise ValueError("the losses of the training are not known")
    steps = np.arange(len(known.losses)) // max(1, known.accumulation or 1)
    finite = np.where(np.isfinite(known.losses), known.losses, np.nan)
    ax = plots.plot_training(pd.DataFrame({"step": steps, "loss": finite}), references, given_or_new(axes, (8, 3.5)))
    bad = ~np.isfinite(known.losses)
    if bad.any():
        ax.axvline(steps[bad.argmax()], color=WORSE, linestyle="-.", label="the first loss that is no number")
        ax.legend(frameon=False, fontsize=8)
    return ax


def reference_losses(evidence: Evidence) -> dict[str, float]:
    """Losses to hold a training against: chance, the behaviour policy's entropies, the loss on held-out episodes."""
    found = {"chance": CHANCE}
    if evidence.pool is not None:
        found |= dict(zip(("H(a)", "H(a | previous level)"), behaviour_entropy(evidence.pool), strict=True))
    if evidence.training is not None and evidence.training.held_out_loss is not None:
        found["held-out episodes"] = evidence.training.held_out_loss
    return found


def learning_rate(known: TrainingRun, axes: Axes | None = None) -> Axes:
    """The rate as it rose in the warm-up, up to the last step that was taken, against the one that was asked for."""
    ax = given_or_new(axes, (8, 3.0))
    if known.lr is None or known.steps is None or not known.warmup_steps:
        raise ValueError("learning rate, steps and warm-up of the training are not all known")
    reach = max(known.steps, known.warmup_steps)
    step = np.linspace(0, reach, 400)
    planned = known.lr * np.minimum(1, step / known.warmup_steps)
    ax.plot(step, planned, color="0.6", linestyle="--", label="as planned")
    taken = step <= known.steps
    ax.plot(step[taken], planned[taken], color=PALETTE[0], linewidth=2.5, label="warm-up, as far as steps were taken")
    ax.axhline(known.lr, color="k", linestyle=":", linewidth=1, label=f"asked for: {known.lr:.2g}")
    ax.axvline(
        known.steps, color=WORSE, linestyle="-.", linewidth=1.2, label=f"the training ended after {known.steps} steps"
    )
    ax.set(
        xlabel="optimizer step", ylabel="learning rate", title="Learning rate: asked for and reached", ylim=(0, None)
    )
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def shift(pool: ExperiencePool, table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Throughput of the chunks that the training pool saw, and of those of the test."""
    ax = given_or_new(axes, (7, 3.2))
    rows = qoe.chosen(table)
    seen = np.asarray(pool.states[:, 2, -1], dtype=np.float64) * 8
    met = (rows["size_bytes"] / rows["delay_ms"] / 1000 * 8).to_numpy()
    for i, (name, mbps) in enumerate({"training pool": seen, "test": met}.items()):
        label = f"{name}: median {np.median(mbps):.2f} Mbps"
        sns.ecdfplot(mbps[mbps > 0], ax=ax, color=PALETTE[i], linestyle=STYLES[i], label=label, log_scale=True)
    ax.set(
        xlabel="throughput of a chunk (Mbps)", ylabel="share of chunks", title="Did the training see such bandwidths?"
    )
    ticks = [0.1, 0.3, 1, 3, 10]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.legend(frameon=False, fontsize=8)
    return ax


def returns(pool: ExperiencePool, axes: Axes | None = None) -> Axes:
    """Return-to-go at the beginning of the pool's episodes; the largest one is what a test asks for."""
    ax = given_or_new(axes, (6, 3.2))
    firsts = pool_returns(pool)[0][pool.episode_starts]
    ax.hist(firsts, bins=40, color=PALETTE[0])
    ax.axvline(firsts.mean(), color="k", linestyle="--", linewidth=1.2, label=f"mean {firsts.mean():.4f}")
    ax.axvline(firsts.max(), color=WORSE, linestyle="-.", linewidth=1.2, label=f"asked for at test {firsts.max():.4f}")
    ax.set(xlabel="return-to-go at an episode's start", ylabel="episodes", title="Does the target return say anything?")
    ax.set_xlim(0, None)
    ax.legend(frameon=False, fontsize=8)
    return ax


def sizes(trained: np.ndarray, tested: np.ndarray, axes: Axes | None = None) -> Axes:
    """Mean chunk sizes in MB by level, [6] each: of the training's video and of the test's."""
    ax = given_or_new(axes, (6, 3.2))
    for i, (name, values) in enumerate({"training": trained, "test": tested}.items()):
        places = np.arange(qoe.LEVELS) + (i - 0.5) * 0.4
        ax.bar(places, values, 0.4, color=PALETTE[i], hatch=("", "//")[i], edgecolor="white", label=name)
    ax.set_xticks(range(qoe.LEVELS), LEVEL_NAMES)
    ax.set(xlabel="level (Mbps below)", ylabel="mean chunk size (MB)", title="The videos of training and test")
    ax.legend(frameon=False, fontsize=8)
    return ax


# --- the figure of a finding --------------------------------------------------------------------------------------------

TRAINED = ("learning-rate", "diverged", "undertrained", "wrong-checkpoint", "non-finite")
COMPARED = ("gap", "handicapped-baseline", "too-few-traces")
SWITCHES = ("sampling", "dropout-on", "context-leak", "window-mismatch", "target-return", "wrong-pool")


def figure_of(finding: Finding, evidence: Evidence, table: pd.DataFrame | None = None) -> Axes | None:
    """The figure that belongs to a finding; None where it has none, or what it would show is not at hand.

    `table` is the waterfall of the ablation, if it was made (`Diagnosis.waterfall`).
    """
    known, pool, run = evidence.training, evidence.pool, evidence.table
    name, reference = finding.id, evidence.reference
    others = {} if reference is None else {reference: evidence.tables[reference]}
    if name in SWITCHES and table is not None and name in set(table["switch"]):
        return waterfall(table, {other: qoe.summarise(t).reward for other, t in others.items()})
    if name == "warmup-too-long" and known is not None and None not in (known.lr, known.steps, known.warmup_steps):
        return learning_rate(known)
    if name in TRAINED and known is not None and known.losses is not None:
        extra = finding.evidence.get("checkpoint_loss")
        return losses(known, reference_losses(evidence) | ({} if extra is None else {"this checkpoint": float(extra)}))
    if pool is not None:
        if name == "label-shift":
            inside = ~np.asarray(pool.dones)[:-1]
            shown = previous_levels(pool)[1:][inside]
            pairs = [np.stack([np.zeros(len(a), dtype=np.int64), a]).T for a in (pool.actions[:-1][inside], shown)]
            return confusion(decisions.confusion(*pairs), ("the pool", "the next state"))
        if name == "pool-too-small":
            return plots.plot_pool_levels(pool)
        if name == "weak-teacher":
            reward = finding.evidence.get("mpc_reward")
            return plots.plot_pool_episodes(pool, {} if reward is None else {"MPC as published": float(reward)})
        if name == "reward-outliers":
            return plots.plot_pool_rewards(pool)
        if name == "flat-returns":
            return returns(pool)
        if name == "trace-shift" and run is not None:
            return shift(pool, run)
        if name == "video-shift" and evidence.video is not None:
            return sizes(pool_sizes_mb(pool).mean(axis=0), evidence.video.sizes_bytes.mean(axis=1) / 1e6)
    if run is None:
        return None
    if name == "level-collapse":
        return levels({evidence.run: run, **others})
    if name == "rare-bad-actions":
        return stalls({evidence.run: run, **others})
    if name in COMPARED and len(evidence.tables) > 1:
        return plots.plot_differences(differences(evidence))
    if name == "test-leakage" and others and evidence.clean is not None:
        return plots.plot_differences(_by_overlap(run, others[str(reference)], evidence.clean, str(reference)))
    return None


def gallery(diagnosis: Diagnosis, evidence: Evidence, without: Sequence[str] = ()) -> Iterator[tuple[str, Axes]]:
    """(name, axes) of the figures of all findings, the most important first; findings that share a figure share its name."""
    groups = {"waterfall": SWITCHES, "losses": TRAINED, "differences": COMPARED}
    shared = {identity: name for name, identities in groups.items() for identity in identities}
    drawn = set(without)
    for finding in diagnosis.findings:
        name = shared.get(finding.id, finding.id)
        if name not in drawn and (axes := figure_of(finding, evidence, diagnosis.waterfall)) is not None:
            drawn.add(name)
            yield name, axes


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


def _by_overlap(run: pd.DataFrame, other: pd.DataFrame, clean: np.ndarray, reference: str) -> dict[str, Interval]:
    """Paired differences over all traces, and over those that share, or do not share, content with the training."""
    names = qoe.per_trace(run).index.to_numpy()
    groups = {"all {} traces": np.ones(len(names), dtype=bool)}
    if len(clean) == len(names):
        groups |= {"the {} clean ones": clean, "the {} seen in training": ~clean}
    return {
        f"− {reference}, {group.format(int(keep.sum()))}": paired(run[run["trace"].isin(names[keep])], other)
        for group, keep in groups.items()
        if keep.any()
    }


def shortened(name: str) -> str:
    """A trace's name, its middle left out if it is long."""
    return name if len(name) <= SHORT else f"{name[:12]}…{name[-SHORT + 13 :]}"


def _verdict(effect: Interval) -> tuple[object, str]:
    """(colour, hatch) of a change: better, worse, or not shown."""
    if effect.low > 0:
        return BETTER, ""
    return (WORSE, "xx") if effect.high < 0 else (UNSHOWN, "")
