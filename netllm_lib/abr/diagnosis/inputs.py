"""Rules on what went in: the pool, its behaviour policy, traces and video."""

from __future__ import annotations

from typing import Any

import numpy as np

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import Evidence, previous_levels
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.traces import Video
from netllm_lib.findings import Severity, Verdict, rule
from netllm_lib.returns import pool_returns
from netllm_lib.stats import bootstrap

FEW_EPISODES = 40
RARE_LEVEL = 0.002  # share of transitions below which a level is as good as absent


def severity(evidence: Evidence, strong: bool = True) -> Severity:
    """A fault of the inputs explains a poor reward only if the policy did learn what it was given."""
    if not evidence.failing:
        return "note"
    return "cause" if strong and evidence.learned is not False else "suspect"


@rule(
    "label-shift",
    fix="generate the pool again: a transition holds the state before the decision, the level, and the reward that it brought "
    "(notebook 03)",
    figure="labels",
)
def label_shift(evidence: Evidence) -> Verdict | None:
    """The level of a transition is the last level in the state that follows it, in every episode."""
    broken: Severity = "cause" if evidence.poor else "suspect"
    if evidence.pool is not None:
        actions, before = np.asarray(evidence.pool.actions), previous_levels(evidence.pool)
        inside = ~np.asarray(evidence.pool.dones)[:-1]
        agree = float((actions[:-1] == before[1:])[inside].mean()) if inside.any() else 1.0
        twice = inside[:-1] & inside[1:]
        shifts = {
            "the level before": float((actions == before).mean()),
            "the level after": float((actions[:-2] == before[2:])[twice].mean()) if twice.any() else 0.0,
        }
        if agree <= 0.98:
            which, share = max(shifts.items(), key=lambda item: item[1])
            none = "they belong to no neighbouring state either"
            what = f"{share:.0%} of them are {which}" if share > max(0.9, agree) else none
            title = f"only {agree:.0%} of the pool's levels are the ones that its next states show; {what}"
            return Verdict(broken, title, {"agree": agree} | {k.replace(" ", "_"): v for k, v in shifts.items()})
    weights = evidence.weights
    if weights is None or weights.loss is None or weights.loss <= evidence.loss_bar:
        return None
    shift, loss = min((("before", weights.loss_before), ("after", weights.loss_after)), key=lambda item: item[1])
    if loss >= 0.5 * weights.loss:
        return None
    title = (
        f"these weights predict the level {shift} the one that is asked for (loss {loss:.2f}; {weights.loss:.2f} on the pool's own "
        "levels): the training paired states with the wrong levels"
    )
    numbers = {"checkpoint_loss": weights.loss, f"loss_level_{shift}": loss, "loss_bar": evidence.loss_bar}
    return Verdict(broken, title, numbers, "pair each state with the level chosen from it, and train again")


@rule(
    "weak-teacher",
    fix="generate the pool with a better policy: sound MPC (notebook 03: policies mpc, preset sound)",
    figure="pool-episodes",
)
def weak_teacher(evidence: Evidence) -> Verdict | None:
    """The behaviour policy of the pool is about as good as the baselines on the same traces."""
    # against MPC as published, on the training traces
    if evidence.pool is None:
        return None
    own = bootstrap(evidence.pool.episode_returns() / evidence.pool.episode_lengths)
    reference = _mpc_on_training(evidence)
    if reference is None or own.high >= reference - 0.1:
        return None
    title = (
        f"the pool's own mean reward is {own.mean:.2f}, where MPC as published gets {reference:.2f} on the training traces: a "
        "policy that clones it is no better"
    )
    numbers = {"pool_reward": list(own), "mpc_reward": reference, "difference": own.mean - reference}
    return Verdict(severity(evidence), title, numbers)


def _mpc_on_training(evidence: Evidence) -> float | None:
    """Mean reward of MPC as published over the training traces, if they are at hand."""
    from netllm_lib.abr.episodes import sound_episodes
    from netllm_lib.abr.play import play
    from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
    from netllm_lib.abr.simulator import Simulator

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
def pool_too_small(evidence: Evidence) -> Verdict | None:
    """The pool holds at least 40 episodes and every level more than a few times."""
    if (pool := evidence.pool) is None:
        return None
    episodes = len(pool.episode_starts)
    shares = np.bincount(pool.actions, minlength=qoe.LEVELS) / len(pool)
    absent = np.flatnonzero(shares < RARE_LEVEL).tolist()
    words = [f"it holds {episodes} episodes"] if episodes < FEW_EPISODES else []
    words += [f"levels {absent} hardly occur in it"] if len(absent) > 1 else []
    if not words:
        return None
    numbers = {"episodes": episodes, "transitions": len(pool), "shares": shares.tolist(), "absent": absent}
    return Verdict(severity(evidence), f"the pool is too small or one-sided: {' and '.join(words)}", numbers)


@rule(
    "video-shift",
    fix="test on the training video, or train on a pool of this one (notebook 03: video=…)",
    figure="sizes",
)
def video_shift(evidence: Evidence) -> Verdict | None:
    """Training and test stream the same video."""
    trained, tested = evidence.recipe.video, evidence.setting.get("video")
    numbers: dict[str, Any] = {"train_video": trained, "video": tested}
    larger = ""
    if evidence.pool is not None and evidence.video is not None:
        if same_video(evidence.pool, evidence.video):
            return None
        numbers["size_ratio"] = evidence.video.sizes_bytes[:, 1:].mean() / 1e6 / pool_sizes_mb(evidence.pool).mean()
        larger = f", whose chunks are {numbers['size_ratio']:.2f} times as large"
    elif not (trained and tested) or trained == tested:
        return None
    title = f"the policy was trained on {trained or 'another video'} and tested on {tested}{larger}"
    return Verdict("cause" if severity(evidence) == "cause" else "note", title, numbers)


def pool_sizes_mb(pool: ExperiencePool) -> np.ndarray:
    """[transitions of one episode, 6] sizes in MB of the chunk to choose, as the pool's first episode saw them."""
    return np.asarray(pool.states[: pool.episode_lengths[0], 4, :], dtype=np.float64)


def same_video(pool: ExperiencePool, video: Video) -> bool:
    """Do the pool's states show this video's chunk sizes?"""
    seen, there = pool_sizes_mb(pool), video.sizes_bytes.T[1:] / 1e6
    rows = min(len(seen), len(there))
    return np.allclose(seen[:rows], there[:rows], rtol=1e-5)


@rule(
    "trace-shift",
    fix="train on a pool of traces like those of the test (notebook 03: traces=…), or scale the training traces",
    figure="throughput",
)
def trace_shift(evidence: Evidence) -> Verdict | None:
    """The bandwidths at test lie where the pool's do."""
    # by the two-sample Kolmogorov–Smirnov distance of the throughputs
    from scipy.stats import ks_2samp

    if evidence.pool is None or evidence.table is None:
        return None
    train, test = throughputs_mbps(evidence.pool, evidence.table)
    distance = float(ks_2samp(train, test).statistic)
    if not distance > 0.35:
        return None
    numbers = {"distance": distance, "train_median_mbps": np.median(train), "test_median_mbps": np.median(test)}
    title = (
        f"the test meets other bandwidths than the pool: median throughput {numbers['test_median_mbps']:.2f} Mbps against "
        f"{numbers['train_median_mbps']:.2f}"
    )
    return Verdict(severity(evidence, strong=distance > 0.5), title, numbers)


def throughputs_mbps(pool: ExperiencePool, table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Throughput of the chunks that the pool's states saw last, and of those of a test."""
    rows = qoe.chosen(table)
    met = (rows["size_bytes"] / rows["delay_ms"] / 1000 * 8).to_numpy()
    return np.asarray(pool.states[:, 2, -1], dtype=np.float64) * 8, met


@rule(
    "reward-outliers",
    fix="nothing, while the target return is left alone; else clip the pool's rewards before they are normalised",
    figure="pool-rewards",
)
def reward_outliers(evidence: Evidence) -> Verdict | None:
    """90 % of the rewards fill at least a quarter of the pool's range."""
    if evidence.pool is None:
        return None
    lowest, low, high, highest = np.quantile(evidence.pool.rewards, [0, 0.05, 0.95, 1])
    if lowest == highest or (band := float((high - low) / (highest - lowest))) >= 0.25:
        return None
    title = f"one reward of {lowest:.1f} sets the range: 90 % of the normalised rewards lie in a band {band:.2f} wide"
    return Verdict("note", title, {"min": lowest, "max": highest, "band": band})


@rule(
    "flat-returns",
    fix="do not expect the target return to steer the policy; clone a better behaviour policy instead",
    figure="returns",
)
def flat_returns(evidence: Evidence) -> Verdict | None:
    """The largest return-to-go at an episode's start differs from the usual one by more than 10 %."""
    if (pool := evidence.pool) is None or np.ptp(pool.rewards) == 0:
        return None
    returns = pool_returns(pool)[0][pool.episode_starts]
    ratio = float(returns.max() / returns.mean()) if returns.mean() > 0 else 1.0
    if ratio >= 1.1:
        return None
    title = f"the largest return-to-go is {ratio:.3f} times the mean one: the target return carries almost no signal"
    return Verdict("note", title, {"max": float(returns.max()), "mean": float(returns.mean()), "ratio": ratio})
