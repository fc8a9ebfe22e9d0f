"""From a poor policy to a good one: learn what every level would have been worth, where the policy itself goes.

Cloning a teacher teaches its actions in its own states; a mistake leads to states that nobody has shown. Here, round by round,
the current policy plays perturbed training traces, with some random levels, so that the pool holds the states that it really
visits; hindsight dynamic programming values all six levels in each of them; the network learns these values from all rounds'
pools, starting from the round before; the level of the highest predicted value is played (dataset aggregation, Ross et al. 2011,
with values in place of actions). The values know the future of the trace, the network does not: it learns their mean over
the futures that look alike so far, which is why values can be cloned where the optimum's actions cannot.

    folder/round-0/pool, values.npy, training/     the same for every round
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from netllm_lib import checkpoint, runs
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.diagnosis.evidence import paired
from netllm_lib.abr.episodes import Episodes, Progress, sound_episodes
from netllm_lib.abr.hindsight import Grid, hindsight_values
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Exploring
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces
from netllm_lib.abr.traces import CHUNKS, Trace, TraceSet, Video, overlapping, split_validation
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, train

DECISIONS = CHUNKS - 1


def _training() -> TrainConfig:
    return TrainConfig(batch=64, lr=1e-3, lr_around=1e-3, weight_decay=0.01, max_grad_norm=1.0)


@dataclass(frozen=True)
class ImproveConfig:
    """How a policy is improved. The defaults are those of a small network; a PLM with LoRA needs a smaller batch."""

    # --- what is played
    groups: int = 120  # perturbed traces in a round
    starts: int = 8  # episodes on each, from random places
    scale: tuple[float, float] = (
        0.6,
        1.6,
    )  # the bandwidths of a trace are multiplied by a factor from here (log-uniform)
    mean_mbps: tuple[float, float] = (0.45, 4.5)  # the factor is cut so that the trace's mean stays within
    exploration: float = (
        0.1  # part of the levels that are random, in all episodes of the first round and half of the later ones
    )

    # --- what is learnt
    grid: Grid = field(default_factory=Grid)  # of the hindsight values
    learn: Literal["values", "best"] = "values"  # "best": cross-entropy with the best level, to compare with
    epochs: tuple[int, ...] = (8, 5, 4, 4)  # of each round, over all pools so far; as many rounds
    later_rate: float = 0.7  # factor on the learning rates from the second round on
    train: TrainConfig = field(default_factory=_training)
    seed: int = 1  # of traces, starts, exploration and the order of windows

    def __post_init__(self) -> None:
        if not self.epochs or min(self.groups, self.starts, *self.epochs) < 1:
            raise ValueError(f"at least one round, group, start and epoch are needed: {self}")
        if not 0 < self.scale[0] <= self.scale[1] or not 0 < self.mean_mbps[0] < self.mean_mbps[1]:
            raise ValueError(f"scale={self.scale}, mean_mbps={self.mean_mbps}: (lowest, highest), both positive")


@dataclass(frozen=True)
class Improved:
    """What improving leaves behind. The network itself holds the last round's weights."""

    rounds: (
        pd.DataFrame
    )  # a row per round: round, episodes, pool_reward, regret (of the states' levels), loss, score, seconds
    policy: Path  # checkpoint of the last round, or of an earlier one that played the validation episodes surely better
    pools: list[Path]  # of each round


def small_network(seed: int = 1, state_feature_dim: int = 64, max_timestep: int = DECISIONS - 1) -> PolicyNetwork:
    """A transformer of two layers, 0.8 M parameters, from random weights, all of it trained: what a PLM is to be held against."""
    plm = load_plm(PLMConfig("tiny-llama", rank=-1, seed=seed))
    config = NetworkConfig(state_feature_dim, max_timestep=max_timestep, tokens="step", seed=seed)
    return PolicyNetwork(plm, config)


class Split(NamedTuple):
    """Traces to improve a policy with, none of which shares content with the test traces."""

    training: TraceSet
    held: TraceSet  # for validation: no content of these is in `training`
    validation: TraceSet  # the same, bandwidths scaled into the range that is trained on
    dropped: int  # training traces that share content with a test trace


def leak_free(
    traces: TraceSet,
    test: TraceSet,
    *,
    share: float = 0.3,
    synthetic: int = 0,
    mean_mbps: tuple[float, float] = (0.45, 4.5),
    seed: int = 1,
) -> Split:
    """Training and validation traces out of `traces` without those that share content with `test`, and `synthetic` made ones.

    Made traces are of the default `BandwidthModel`, which no trace set was fitted to. The validation traces' bandwidths are
    scaled into `mean_mbps`, like those that are trained on: a trace on which nobody can play decides every mean. Raises
    ValueError if fewer than two traces are left.
    """
    clean = traces.subset(np.flatnonzero(~overlapping(traces, test)))
    if len(clean) < 2:
        raise ValueError(
            f"{len(traces) - len(clean)} of {len(traces)} traces of {traces.name} share content with {test.name}"
        )
    training, held = split_validation(clean, share, seed)
    validation = perturbed(held, len(held), (1.0, 1.0), mean_mbps, seed)
    made = generate_traces("synthetic", synthetic, seed).traces
    whole = TraceSet(f"{traces.name} without overlap", training.traces + made)
    return Split(whole, held, validation, len(traces) - len(clean))


def perturbed(
    traces: TraceSet, count: int, scale: tuple[float, float], mean_mbps: tuple[float, float], seed: int
) -> TraceSet:
    """`count` traces drawn from `traces` (each as often as any other), their bandwidths multiplied by a random factor."""
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(traces))
    order = np.concatenate([rng.permutation(len(traces)) for _ in range(rounds)])[:count]
    factors = np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1]), count))
    made = []
    for number, (index, factor) in enumerate(zip(order, factors, strict=True)):
        trace = traces.traces[index]
        factor = float(np.clip(factor, mean_mbps[0] / trace.mean_mbps, mean_mbps[1] / trace.mean_mbps))
        made.append(Trace(f"{number:04d}-{trace.name}", trace.time_s, trace.mbps * factor))
    return TraceSet(f"{traces.name} (perturbed)", tuple(made))


def improve(
    network: PolicyNetwork,
    traces: TraceSet,
    video: Video,
    config: ImproveConfig | None = None,
    *,
    folder: Path,
    first: Policy | None = None,
    held: Simulator | None = None,
    progress: Callable[[str], Callable[..., None]] | None = None,
) -> Improved:
    """Improve `network` on training traces, round by round; everything it leaves behind is in `folder`.

    The first round's states are those of `first` (sound MPC by default; a diagnosed policy will do), the later ones' are the
    network's own. Each round is played on `held`, validation episodes, see `chosen_round`. `progress(label)` makes a callback
    for one stage of a round. A killed call goes on where it was when it is made again with the same arguments.
    """
    config = config or ImproveConfig()
    folder = Path(folder)
    pools: list[ExperiencePool] = []
    values: list[np.ndarray] = []
    rows, tables, policies = [], [], []
    player: Policy = first or RobustMPC(video)
    report = progress or (lambda label: lambda *told: None)
    for number, epochs in enumerate(config.epochs):
        place, label = folder / f"round-{number}", f"round {number + 1} of {len(config.epochs)}"
        pool, worth = _play(player, traces, video, config, number, place, report(f"{label}, play"))
        pools.append(pool)
        values.append(worth)
        training = dataclasses.replace(
            config.train,
            epochs=epochs,
            seed=config.seed + number,
            lr=config.train.lr * (config.later_rate if number else 1),
            lr_around=config.train.lr_around * (config.later_rate if number else 1),
        )
        windows = make_windows(
            concatenate(pools), WindowConfig(w=DECISIONS), values=np.concatenate(values), learn=config.learn
        )
        done = train(
            network,
            windows,
            training,
            folder=place / "training",
            settings=windows.settings,
            progress=report(f"{label}, train"),
        )
        player = LLMPolicy(network, checkpoint.describe(network, windows.settings))
        if held is not None:
            tables.append(play(player, held))
        played = np.take_along_axis(worth, pool.actions[:, None], axis=1)[:, 0]
        rows.append(
            {
                "round": number,
                "episodes": len(pool.episode_starts),
                "pool_reward": float(pool.rewards.mean()),
                "regret": float((worth.max(axis=1) - played).mean()),
                "loss": done.final_loss,
                "score": qoe.summarise(tables[-1]).reward if tables else float("nan"),
                "seconds": done.seconds,
            }
        )
        policies.append(place / "training" / "final")
    best = chosen_round(tables) if tables else len(rows) - 1
    return Improved(pd.DataFrame(rows), policies[best], [folder / f"round-{n}" / "pool" for n in range(len(rows))])


def roll_pool(
    policy: Policy,
    traces: TraceSet,
    video: Video,
    count: int,
    config: ImproveConfig | None = None,
    *,
    path: Path | None = None,
    progress: Progress | None = None,
) -> ExperiencePool:
    """A pool to clone: `count` episodes of a policy on perturbed traces, as in a round but others, and without exploration."""
    config = config or ImproveConfig()
    chosen, episodes = _episodes(traces, config, len(config.epochs), -(-count // config.starts))
    return generate_pool(policy, chosen, video, episodes.rows(range(count)), path=path, progress=progress)


def _episodes(traces: TraceSet, config: ImproveConfig, number: int, groups: int) -> tuple[TraceSet, Episodes]:
    """Perturbed traces and their episodes; every `number` has others."""
    seed = config.seed * 1000 + number
    chosen = perturbed(traces, groups, config.scale, config.mean_mbps, seed)
    return chosen, sound_episodes(chosen, seed=seed, repeats=config.starts)


def chosen_round(tables: list[pd.DataFrame]) -> int:
    """The last round, or the best of those that were better on the same episodes with their paired interval above zero.

    A few traces with long outages decide a mean; the round of the highest mean is often the one that was lucky there.
    """
    gains = [paired(table, tables[-1]) for table in tables[:-1]]
    better = [number for number, gain in enumerate(gains) if gain.low > 0]
    return max(better, key=lambda number: gains[number].mean, default=len(gains))


def _play(
    player: Policy,
    traces: TraceSet,
    video: Video,
    config: ImproveConfig,
    number: int,
    place: Path,
    progress: Progress | None,
) -> tuple[ExperiencePool, np.ndarray]:
    """A round's pool and the values [T, 6] of all levels in its states."""
    chosen, episodes = _episodes(traces, config, number, config.groups)
    exploring = np.arange(len(episodes)) % 2 == 0 if number else np.ones(len(episodes), dtype=bool)
    explorer = Exploring(player, config.exploration * exploring)
    pool = generate_pool(explorer, chosen, video, episodes, path=place / "pool", progress=progress)
    path, key = place / "values.npy", runs.content_hash([config.grid, pool.content_hash()])
    if path.is_file() and runs.read_json(place / "values.json")["made_from"] == key:
        return pool, np.load(path)
    levels = np.concatenate([np.zeros((len(episodes), 1), np.int64), pool.actions.reshape(-1, DECISIONS)], axis=1)
    worth = hindsight_values(Simulator(chosen, video, episodes), levels, config.grid)[:, 1:].reshape(-1, 6)
    worth = worth.astype(np.float32)
    runs.write_json(place / "values.json", {"made_from": key})
    with runs.atomic_path(path) as aside, open(aside, "wb") as stream:
        np.save(stream, worth)
    return pool, worth
