"""From a poor policy to a good one: learn what every level would have earned, where the policy itself goes.

Cloning a teacher teaches its actions in its own states; a mistake leads to states that nobody has shown. Here, round by round,
the current policy plays perturbed training traces, with some random levels, so that the pool holds the states that it really
visits; hindsight dynamic programming values all six levels in each of them; the network learns these values from all rounds'
pools, starting from the round before; the level of the highest predicted value is played (dataset aggregation, Ross et al. 2011,
with values in place of actions). The values know the future of the trace, the network does not: it learns their mean over
the futures that look alike so far, which is why values can be cloned where the optimum's actions cannot.

    folder/round-1/pool/, values-<what they are of>.npz, training/     the same for every round
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from netllm_lib import checkpoint, runs, stats
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.episodes import Episodes, sound_episodes
from netllm_lib.abr.hindsight import Grid, hindsight_values
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Exploring
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces
from netllm_lib.abr.traces import Trace, TraceSet, Video, overlapping, split_validation
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, train

DECISIONS = CHUNKS - 1
SCALE = (0.6, 1.6)  # a trace's bandwidths are multiplied by a factor from here (log-uniform)
MEAN_MBPS = (
    0.45,
    4.5,
)  # the factor is cut so that the mean stays within: below all stall, above nothing is to be learnt
VALIDATION_SHARE, LATER_RATE = 0.3, 0.7  # of the traces; factor on the learning rates from the second round on
SMALL_TRAINING = TrainConfig(batch=64, lr=1e-3, lr_around=1e-3, weight_decay=0.01, max_grad_norm=1.0)


@dataclass(frozen=True)
class ImproveConfig:
    """How a policy is improved. The defaults are those of a small network; a PLM with LoRA needs a smaller batch."""

    groups: int = 120  # perturbed traces in a round
    starts: int = 8  # episodes on each, from random places
    exploration: float = 0.1  # share of random levels, in all episodes of the first round and half of the later ones
    grid: Grid = field(default_factory=Grid)  # of the hindsight values
    learn: Literal["values", "best"] = "values"  # "best": cross-entropy with the best level, to compare with
    epochs: tuple[int, ...] = (8, 5, 4, 4)  # of each round, over all pools so far; as many rounds
    train: TrainConfig = SMALL_TRAINING
    seed: int = 1  # of traces, starts, exploration and the order of windows

    def __post_init__(self) -> None:
        if not self.epochs or min(self.groups, self.starts, *self.epochs) < 1:
            raise ValueError(f"at least one round, group, start and epoch are needed: {self}")


@dataclass(frozen=True)
class Improved:
    """What improving leaves behind. The network itself holds the last round's weights."""

    rounds: pd.DataFrame  # round, episodes, pool_reward, regret (of the levels played), loss, score, seconds
    policy: Path  # checkpoint of the last round, or of an earlier one that played the validation episodes surely better


def small_network(seed: int = 1, max_timestep: int = DECISIONS - 1) -> PolicyNetwork:
    """A transformer of two layers, 0.8 M parameters, from random weights, all of it trained: what a PLM is to be held against."""
    plm = load_plm(PLMConfig("tiny-llama", rank=-1, seed=seed))
    return PolicyNetwork(plm, NetworkConfig(64, max_timestep=max_timestep, tokens="step", seed=seed))


class Split(NamedTuple):
    """Traces to improve a policy with, none of which shares content with the test traces."""

    training: TraceSet
    held: TraceSet  # for validation: no content of these is in `training`
    validation: TraceSet  # the same, bandwidths scaled into the range that is trained on
    dropped: int  # training traces that share content with a test trace


def leak_free(traces: TraceSet, test: TraceSet, *, synthetic: int = 0, seed: int = 1) -> Split:
    """Training and validation traces out of `traces` without those that share content with `test`, and `synthetic` made ones.

    Made traces are of the default `BandwidthModel`, which no trace set was fitted to. The validation traces' bandwidths are
    scaled like those that are trained on: a trace on which nobody can play decides every mean. Raises ValueError if fewer than two
    traces are left.
    """
    clean = traces.subset(np.flatnonzero(~overlapping(traces, test)))
    dropped = len(traces) - len(clean)
    if len(clean) < 2:
        raise ValueError(f"{dropped} of {len(traces)} traces of {traces.name} share content with {test.name}")
    training, held = split_validation(clean, VALIDATION_SHARE, seed)
    made = generate_traces("synthetic", synthetic, seed).traces
    whole = TraceSet(f"{traces.name} without overlap", training.traces + made)
    return Split(whole, held, perturbed(held, len(held), seed, scale=(1.0, 1.0)), dropped)


def perturbed(traces: TraceSet, count: int, seed: int, scale: tuple[float, float] = SCALE) -> TraceSet:
    """`count` traces drawn from `traces` (each as often as any other), their bandwidths multiplied by a random factor."""
    rng, (low, high) = np.random.default_rng(seed), np.log(scale)
    order = np.concatenate([rng.permutation(len(traces)) for _ in range(-(-count // len(traces)))])
    made = []
    for number, factor in enumerate(np.exp(rng.uniform(low, high, count))):
        trace = traces.traces[order[number]]
        factor = float(np.clip(factor, *(limit / trace.mean_mbps for limit in MEAN_MBPS)))
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
    player: Policy = first or RobustMPC(video)
    places = [Path(folder) / f"round-{number + 1}" for number in range(len(config.epochs))]
    pools: list[ExperiencePool] = []
    targets: list[np.ndarray] = []
    rows, tables = [], []
    for number, (place, epochs) in enumerate(zip(places, config.epochs, strict=True)):
        title = f"round {number + 1} of {len(places)}"
        playing, learning = (progress(f"{title}, {what}") if progress else None for what in ("play", "train"))
        chosen, episodes = _episodes(traces, config, number, config.groups)
        exploring = np.full(len(episodes), config.exploration)
        exploring[1::2] *= number == 0
        explorer = Exploring(player, exploring)
        pools.append(generate_pool(explorer, chosen, video, episodes, path=place / "pool", progress=playing))
        targets.append(_values(pools[-1], Simulator(chosen, video, episodes), config.grid, place))
        pool, values, shape = pools[-1], targets[-1], WindowConfig(w=DECISIONS)
        windows = make_windows(concatenate(pools), shape, values=np.concatenate(targets), learn=config.learn)
        settings, factor = windows.settings, LATER_RATE if number else 1.0
        rates: Any = {name: factor * getattr(config.train, name) for name in ("lr", "lr_around")}
        plan = dataclasses.replace(config.train, epochs=epochs, seed=config.seed + number, **rates)
        done = train(network, windows, plan, folder=place / "training", settings=settings, progress=learning)
        player = LLMPolicy(network, checkpoint.describe(network, settings))
        tables += [play(player, held)] if held is not None else []
        played = np.take_along_axis(values, pool.actions[:, None], axis=1)[:, 0]
        rows.append(
            {
                "round": number + 1,
                "episodes": len(pool.episode_starts),
                "pool_reward": float(pool.rewards.mean()),
                "regret": float((values.max(axis=1) - played).mean()),
                "loss": done.final_loss,
                "score": qoe.summarise(tables[-1]).reward if tables else float("nan"),
                "seconds": done.seconds,
            }
        )
    best = places[chosen_round(tables)] if tables else places[-1]
    return Improved(pd.DataFrame(rows), best / "training" / "final")


def _values(pool: ExperiencePool, simulator: Simulator, grid: Grid, folder: Path) -> np.ndarray:
    """[T, 6] what every level would have earned in the states of a pool; kept in `folder`, made again where that is damaged."""
    path = folder / f"values-{runs.content_hash([grid, pool.content_hash()])}.npz"
    with contextlib.suppress(Exception), np.load(path) as kept:  # each way of being broken has its own error
        values: np.ndarray = kept["values"]  # of which the file has a checksum
        return values.reshape(len(pool), 6)
    levels = np.pad(pool.actions.reshape(-1, DECISIONS), ((0, 0), (1, 0)))
    values = hindsight_values(simulator, levels, grid)[:, 1:].reshape(-1, 6).astype(np.float32)
    with runs.atomic_path(path) as aside, open(aside, "wb") as stream:
        np.savez(stream, values=values)
    return values


def _episodes(traces: TraceSet, config: ImproveConfig, number: int, groups: int) -> tuple[TraceSet, Episodes]:
    """Perturbed traces and their episodes; every `number` has others."""
    seed = config.seed * 1000 + number
    chosen = perturbed(traces, groups, seed)
    return chosen, sound_episodes(chosen, seed=seed, repeats=config.starts)


def chosen_round(tables: list[pd.DataFrame]) -> int:
    """Index of the last round, or of the best of those that were better on the same episodes with their paired interval above 0.

    A few traces with long outages decide a mean; the round of the highest mean is often the one that was lucky there.
    """
    rewards = [qoe.per_trace(table)["reward"] for table in tables]
    gains = [stats.paired(reward, rewards[-1]) for reward in rewards[:-1]]
    better = [number for number, gain in enumerate(gains) if gain.low > 0]
    return max(better, key=lambda number: gains[number].mean, default=len(gains))


def roll_pool(
    policy: Policy, traces: TraceSet, video: Video, count: int, config: ImproveConfig | None = None, **options: Any
) -> ExperiencePool:
    """A pool to clone: `count` episodes of a policy on perturbed traces, as in a round but others, and without exploration.

    Options are those of `generate_pool`.
    """
    config = config or ImproveConfig()
    chosen, episodes = _episodes(traces, config, len(config.epochs), -(-count // config.starts))
    return generate_pool(policy, chosen, video, episodes.rows(range(count)), **options)


def cloning_estimate(
    pool: ExperiencePool,
    held: Simulator,
    steps: int = 150,
    *,
    advantage: float | None = None,
    seed: int = 1,
    progress: Callable[..., None] | None = None,
) -> pd.DataFrame:
    """What a clone of the pool would earn, before hours of training: the table of chunks of a small network that copies it.

    What `small_network` cannot copy is mostly what the pool does not show: the estimate is one of the pool, not of the PLM. After
    these steps of 16 episodes it is still a little below what longer training gives. `held` holds validation episodes: no content
    of theirs may be in the pool. `advantage` weights the actions, see `make_windows`. `progress` hears of every training step.
    """
    rng, episodes, batch = np.random.default_rng(seed), len(pool.episode_starts), 16
    longest = int(pool.episode_lengths.max())
    network = small_network(seed, max_timestep=longest - 1)
    passes = [rng.permutation(episodes) for _ in range(-(-steps * batch // episodes))]
    order = tuple(np.concatenate(passes)[: steps * batch].tolist())  # of a large pool a part, of a small one many times
    config = dataclasses.replace(SMALL_TRAINING, batch=batch, epochs=1, order=order, seed=seed)
    windows = make_windows(pool, WindowConfig(w=longest), advantage=advantage)
    with tempfile.TemporaryDirectory() as folder:
        train(network, windows, config, folder=Path(folder), settings=windows.settings, progress=progress)
    return play(LLMPolicy(network, checkpoint.describe(network, windows.settings)), held)
