"""Rules on what went in: the pool, its behaviour policy, traces and video."""

from __future__ import annotations

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import Evidence, pool_sizes_mb, previous_levels, throughputs_mbps
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.findings import Verdict, rule, verdict
from netllm_lib.returns import pool_returns
from netllm_lib.stats import bootstrap

FEW_EPISODES = 40
RARE_LEVEL = 0.002  # share of transitions below which a level is as good as absent


@rule(
    "label-shift",
    fix="generate the pool again: each state with the level chosen from it (notebook 03)",
    figure="labels",
)
def label_shift(evidence: Evidence, pool: ExperiencePool) -> Verdict | None:
    """The level of a transition is the last level in the state that follows it, in every episode."""
    actions, before = np.asarray(pool.actions), previous_levels(pool)
    inside = ~np.asarray(pool.dones)[:-1]
    twice = inside[:-1] & inside[1:]
    same = float((actions[:-1] == before[1:])[inside].mean()) if inside.any() else 1.0
    if same > 0.98:
        return None
    earlier = float((actions == before).mean())
    later = float((actions[:-2] == before[2:])[twice].mean()) if twice.any() else 0.0
    what = "they belong to no neighbouring state either"
    if max(earlier, later) > max(0.9, same):
        what = f"{max(earlier, later):.0%} of them are the level {'before' if earlier >= later else 'after'}"
    title = f"only {{same:.0%}} of the pool's levels are the ones that its next states show; {what}"
    return verdict(evidence.broken, title, same=same, the_level_before=earlier, the_level_after=later)


@rule(
    "weak-teacher",
    fix="generate the pool with sound MPC (notebook 03: policies mpc, preset sound)",
    figure="pool-episodes",
)
def weak_teacher(evidence: Evidence, pool: ExperiencePool) -> Verdict | None:
    """The behaviour policy of the pool is about as good as the baselines on the same traces."""
    # against MPC as published, on the training traces
    own, reference = bootstrap(pool.episode_returns() / pool.episode_lengths), _mpc_on_training(evidence)
    if reference is None or own.high >= reference - 0.1:
        return None
    title = (
        "the pool's own mean reward is {pool_reward[0]:.2f}, where MPC as published gets {mpc_reward:.2f} on the training traces: "
        "a policy that clones it is no better"
    )
    return verdict(evidence.severity(), title, pool_reward=list(own), mpc_reward=reference)


def _mpc_on_training(evidence: Evidence) -> float | None:
    """Mean reward of MPC as published over the training traces, if they are at hand."""
    registry, recipe = evidence.registry, evidence.recipe
    if registry is None:
        return None
    known, videos = registry.trace_folders(), registry.video_folders()
    try:
        traces = registry.trace_set(recipe.traces if recipe.traces in known else registry.default_traces("train"))
        video = registry.video(recipe.video if recipe.video in videos else registry.default_video())
    except (ValueError, OSError):
        return None
    policy = RobustMPC(video, MPCConfig.upstream(pool=True))
    return qoe.summarise(play(policy, Simulator(traces, video, sound_episodes(traces, seed=0)))).reward


@rule(
    "pool-too-small",
    fix="generate a pool of all training traces with a policy that uses every level (notebook 03: policies mpc, episodes 200)",
    figure="pool-levels",
)
def pool_too_small(evidence: Evidence, pool: ExperiencePool) -> Verdict | None:
    """The pool holds at least 40 episodes and every level more than a few times."""
    episodes, shares = len(pool.episode_starts), np.bincount(pool.actions, minlength=qoe.LEVELS) / len(pool)
    absent = np.flatnonzero(shares < RARE_LEVEL).tolist()
    words = ["it holds {episodes} episodes"] if episodes < FEW_EPISODES else []
    words += ["levels {absent} hardly occur in it"] if len(absent) > 1 else []
    if not words:
        return None
    title = f"the pool is too small or one-sided: {' and '.join(words)}"
    return verdict(evidence.severity(), title, episodes=episodes, shares=shares.tolist(), absent=absent)


@rule(
    "video-shift",
    fix="test on the training video, or train on a pool of this one (notebook 03: video=…)",
    figure="sizes",
)
def video_shift(evidence: Evidence) -> Verdict | None:
    """Training and test stream the same video."""
    trained, tested, ratio, larger = evidence.recipe.video, evidence.setting.get("video"), None, ""
    if evidence.pool is not None and evidence.video is not None:
        seen, there = pool_sizes_mb(evidence.pool), evidence.video.sizes_bytes.T[1:] / 1e6
        rows = min(len(seen), len(there))
        if np.allclose(seen[:rows], there[:rows], rtol=1e-5):
            return None
        ratio, larger = there.mean() / seen.mean(), ", whose chunks are {size_ratio:.2f} times as large"
    elif not (trained and tested) or trained == tested:
        return None
    title = "the policy was trained on {train_video} and tested on {video}" + larger
    return verdict(
        "cause" if evidence.severity() == "cause" else "note",
        title,
        train_video=trained or "another video",
        video=tested,
        size_ratio=ratio,
    )


@rule(
    "trace-shift", fix="train on a pool of traces like those of the test (notebook 03: traces=…)", figure="throughput"
)
def trace_shift(evidence: Evidence, pool: ExperiencePool, table: pd.DataFrame) -> Verdict | None:
    """The bandwidths at test lie where the pool's do."""
    # by the two-sample Kolmogorov–Smirnov distance of the throughputs
    from scipy.stats import ks_2samp

    seen, met = throughputs_mbps(pool, table)
    distance = float(ks_2samp(seen, met).statistic)
    if not distance > 0.35:
        return None
    title = (
        "the test meets other bandwidths than the pool: median throughput {test_mbps:.2f} Mbps against {train_mbps:.2f}"
    )
    medians = {"train_mbps": float(np.median(seen)), "test_mbps": float(np.median(met))}
    return verdict(evidence.severity(strong=distance > 0.5), title, distance=distance, **medians)


@rule("flat-returns", fix="do not expect the target return to steer the policy; clone a better one", figure="returns")
def flat_returns(evidence: Evidence, pool: ExperiencePool) -> Verdict | None:
    """The largest return-to-go at an episode's start differs from the usual one by more than 10 %."""
    if np.ptp(pool.rewards) == 0:
        return None
    returns = pool_returns(pool)[0][pool.episode_starts]
    ratio = float(returns.max() / returns.mean()) if returns.mean() > 0 else 1.0
    title = "the largest return-to-go is {ratio:.3f} times the mean one: the target return carries almost no signal"
    return None if ratio >= 1.1 else verdict("note", title, ratio=ratio)
