"""Rules on what went in: the pool, its behaviour policy, traces and video."""

from __future__ import annotations

from typing import Any

import numpy as np

from netllm_lib.abr import qoe
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.diagnosis.evidence import Evidence, previous_levels
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.traces import Video
from netllm_lib.findings import Finding, Severity
from netllm_lib.stats import bootstrap

FEW_EPISODES = 40
RARE_LEVEL = 0.002  # share of transitions below which a level is as good as absent


def inputs(evidence: Evidence) -> list[Finding]:
    """Findings about the pool and the data, from whatever is at hand."""
    found = [*_video(evidence)]
    if evidence.pool is not None:
        found += [
            *_labels(evidence),
            *_size(evidence),
            *_teacher(evidence),
            *_returns(evidence),
            *_bandwidths(evidence),
        ]
    return found


def _severity(evidence: Evidence, strong: bool = True) -> Severity:
    """A fault of the inputs explains a poor reward only if the policy did learn what it was given."""
    if not evidence.failing:
        return "note"
    return "cause" if strong and evidence.learned is not False else "suspect"


def _labels(evidence: Evidence) -> list[Finding]:
    """Each transition's level must be the last level of the next state, and its reward must fit that level."""
    pool = evidence.pool
    assert pool is not None
    before = previous_levels(pool)
    inside = ~np.asarray(pool.dones)[:-1]
    actions = np.asarray(pool.actions)
    agree = float((actions[:-1] == before[1:])[inside].mean()) if inside.any() else 1.0
    if agree > 0.98:
        return []
    offsets = {
        "the level before": float((actions == before).mean()),
        "the level after": float((actions[:-2] == before[2:])[inside[:-1] & inside[1:]].mean())
        if len(actions) > 2
        else 0.0,
    }
    best = max(offsets, key=lambda name: offsets[name])
    shift = (
        f"{offsets[best]:.0%} of them are {best}"
        if offsets[best] > max(0.9, agree)
        else "they belong to no neighbouring state either"
    )
    return [
        Finding(
            "label-shift",
            "cause" if evidence.failing or evidence.reward is None else "suspect",
            f"only {agree:.0%} of the pool's levels are the ones that its next states show; {shift}",
            {"agree": agree, **{name.replace(" ", "_"): share for name, share in offsets.items()}},
            "generate the pool again: a transition holds the state before the decision, the level, and the reward that it brought "
            "(notebook 03)",
        )
    ]


def _size(evidence: Evidence) -> list[Finding]:
    pool = evidence.pool
    assert pool is not None
    episodes = len(pool.episode_starts)
    shares = np.bincount(pool.actions, minlength=qoe.LEVELS) / len(pool)
    absent = [level for level in range(qoe.LEVELS) if shares[level] < RARE_LEVEL]
    few, narrow = episodes < FEW_EPISODES, len(absent) > 1
    if not few and not narrow:
        return []
    words = [f"it holds {episodes} episodes" if few else "", f"levels {absent} hardly occur in it" if narrow else ""]
    return [
        Finding(
            "pool-too-small",
            _severity(evidence),
            f"the pool is too small or one-sided: {' and '.join(word for word in words if word)}",
            {"episodes": episodes, "transitions": len(pool), "shares": [float(s) for s in shares], "absent": absent},
            "generate a pool of all training traces with a policy that uses every level (notebook 03: policies mpc, episodes 200)",
        )
    ]


def _teacher(evidence: Evidence) -> list[Finding]:
    """The behaviour policy against MPC as published, on traces of the pool's own bandwidths."""
    pool = evidence.pool
    assert pool is not None
    lengths = pool.episode_lengths
    means = pool.episode_returns() / lengths
    own = bootstrap(means)
    reference = _reference_on_training(evidence)
    if reference is None:
        return []
    gap = own.mean - reference
    if own.high >= reference - 0.1:
        return []
    return [
        Finding(
            "weak-teacher",
            _severity(evidence),
            f"the pool's own mean reward is {own.mean:.2f}, where MPC as published gets {reference:.2f} on the training traces: a "
            "policy that clones it is no better",
            {"pool_reward": list(own), "mpc_reward": reference, "difference": gap},
            "generate the pool with a better policy: sound MPC (notebook 03: policies mpc, preset sound)",
        )
    ]


def _reference_on_training(evidence: Evidence) -> float | None:
    """Mean reward of MPC as published over the training traces, if they are at hand."""
    from netllm_lib.abr.episodes import sound_episodes
    from netllm_lib.abr.play import play
    from netllm_lib.abr.policies.catalogue import make_policy
    from netllm_lib.abr.simulator import Simulator

    registry, name = evidence.registry, evidence.setting.get("train_traces")
    if registry is None:
        return None
    try:
        traces = registry.trace_set(str(name) if name else registry.default_traces("train"))
        video = registry.video(str(evidence.setting.get("train_video") or registry.default_video()))
        policy = make_policy("mpc", video, registry, "upstream", pool=True)
        table = play(policy, Simulator(traces, video, sound_episodes(traces, seed=0)))
    except (ValueError, OSError):
        return None
    return qoe.summarise(table).reward


def _returns(evidence: Evidence) -> list[Finding]:
    pool = evidence.pool
    assert pool is not None
    found = []
    low, high = np.quantile(pool.rewards, [0.05, 0.95])
    lowest, highest = float(pool.rewards.min()), float(pool.rewards.max())
    if lowest == highest:
        return []
    band = float((high - low) / (highest - lowest))
    if band < 0.25:
        found.append(
            Finding(
                "reward-outliers",
                "note",
                f"one reward of {lowest:.1f} sets the range: 90 % of the normalised rewards lie in a band {band:.2f} wide",
                {"min": lowest, "max": highest, "band": band},
                "nothing, while the target return is left alone; else clip the pool's rewards before they are normalised",
            )
        )
    returns = pool_returns(pool)[0][pool.episode_starts]
    ratio = float(returns.max() / returns.mean()) if returns.mean() > 0 else 1.0
    if ratio < 1.1:
        found.append(
            Finding(
                "flat-returns",
                "note",
                f"the largest return-to-go is {ratio:.3f} times the mean one: the target return carries almost no signal",
                {"max": float(returns.max()), "mean": float(returns.mean()), "ratio": ratio},
                "do not expect the target return to steer the policy; clone a better behaviour policy instead",
            )
        )
    return found


def pool_sizes_mb(pool: ExperiencePool) -> np.ndarray:
    """[transitions of one episode, 6] sizes in MB of the chunk to choose, as the pool's first episode saw them."""
    return np.asarray(pool.states[: pool.episode_lengths[0], 4, :], dtype=np.float64)


def same_video(pool: ExperiencePool, video: Video) -> bool:
    """Do the pool's states show this video's chunk sizes?"""
    seen = pool_sizes_mb(pool)
    rows = min(len(seen), video.sizes_bytes.shape[1] - 1)
    there = video.sizes_bytes.T[1 : rows + 1] / 1e6
    return bool(np.allclose(seen[:rows], there, rtol=1e-5))


def _video(evidence: Evidence) -> list[Finding]:
    trained, tested = evidence.setting.get("train_video"), evidence.setting.get("video")
    numbers: dict[str, Any] = {"train_video": trained, "video": tested}
    ratio = None
    if evidence.pool is not None and evidence.video is not None:
        if same_video(evidence.pool, evidence.video):
            return []
        seen = pool_sizes_mb(evidence.pool).mean()
        ratio = float(evidence.video.sizes_bytes[:, 1:].mean() / 1e6 / seen) if seen else None
        numbers["size_ratio"] = ratio
    elif not (trained and tested) or trained == tested:
        return []
    larger = "" if ratio is None else f", whose chunks are {ratio:.2f} times as large"
    return [
        Finding(
            "video-shift",
            "cause" if evidence.failing and evidence.learned is not False else "note",
            f"the policy was trained on {trained or 'another video'} and tested on {tested}{larger}",
            numbers,
            "test on the training video, or train on a pool of this one (notebook 03: video=…)",
        )
    ]


def _bandwidths(evidence: Evidence) -> list[Finding]:
    """Throughput that the test met against the pool's: the two-sample Kolmogorov–Smirnov distance."""
    pool = evidence.pool
    assert pool is not None
    if (table := evidence.table) is None:
        return []
    from scipy.stats import ks_2samp

    rows = qoe.chosen(table)
    test = (rows["size_bytes"] / rows["delay_ms"] / 1000 * 8).to_numpy()
    train = np.asarray(pool.states[:, 2, -1], dtype=np.float64) * 8
    distance = float(ks_2samp(train, test).statistic)
    if not distance > 0.35:
        return []
    medians = float(np.median(train)), float(np.median(test))
    return [
        Finding(
            "trace-shift",
            "cause"
            if evidence.failing and evidence.learned is not False and distance > 0.5
            else "suspect"
            if evidence.failing
            else "note",
            f"the test meets other bandwidths than the pool: median throughput {medians[1]:.2f} Mbps against {medians[0]:.2f}",
            {"distance": distance, "train_median_mbps": medians[0], "test_median_mbps": medians[1]},
            "train on a pool of traces like those of the test (notebook 03: traces=…), or scale the training traces",
        )
    ]
