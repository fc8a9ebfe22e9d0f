"""How faults of a drawn severity are planted: what `planted_plants` lacks."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import planted_plants as plants
import planted_runs as base
from faults.cases import FaultBench
from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import previous_levels
from netllm_lib.abr.episodes import Episodes, Observation, sound_episodes
from netllm_lib.abr.model import PolicyNetwork, load_policy
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.synthetic import write_traces
from netllm_lib.abr.traces import POINTER_FILE, Trace, TraceSet
from netllm_lib.plm import load_plm
from netllm_lib.returns import ReturnScale, pool_returns
from planted_plants import Plant, Planted
from planted_runs import TRACES, TRAIN, Bench, Trained
from upstream_tree import results_path, write_results

EPISODES = 200  # of a pool
Change = Callable[[ExperiencePool], ExperiencePool]
Arrays = Callable[[np.ndarray], np.ndarray]
Graded = Callable[[FaultBench, Any], Plant]  # of how severe it is


def graded(make: Callable[[FaultBench, Path, Any], Planted]) -> Graded:
    return lambda bench, value: lambda _, root: make(bench, root, value)


def by_network(make: Callable[[Bench, Trained, Any], PolicyNetwork]) -> Graded:
    """The test played another network than the checkpoint's."""

    def play(bench: Bench, trained: Trained, value: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
        return bench.play(LLMPolicy(make(bench, trained, value).eval(), trained.meta)), {}

    return lambda _, value: plants.of_runs(lambda bench, trained: play(bench, trained, value))


# --- policies that go wrong ---------------------------------------------------------------------------------------------


class Misread(Policy):
    """Another policy that sees other states, or whose levels are read wrongly."""

    def __init__(self, inner: Policy, see: Arrays = np.asarray, play: Arrays = np.asarray):
        self.inner, self.see, self.play, self.reset = inner, see, play, inner.reset  # type: ignore[method-assign]

    def act(self, observation: Observation) -> np.ndarray:
        return self.play(self.inner.act(replace(observation, state=self.see(observation.state))))


class Blend(Policy):
    """Another policy, a share of whose decisions is a third one's; without one, they repeat the level before."""

    def __init__(self, inner: Policy, other: Policy | None, share: float):
        self.inner, self.other, self.share = inner, other, share

    def reset(self, episodes: Episodes) -> None:
        self.theirs = np.random.default_rng([episodes.seed, 6]).random((len(episodes), CHUNKS + 1)) < self.share
        for policy in filter(None, (self.inner, self.other)):
            policy.reset(episodes)

    def act(self, observation: Observation) -> np.ndarray:
        theirs = observation.last_level if self.other is None else self.other.act(observation)
        mask = self.theirs[observation.episode, observation.chunk - 1]
        levels = np.where(mask, theirs, self.inner.act(observation))
        self.inner.played(levels)
        return levels


def misread(**how: Arrays) -> Plant:
    return plants.of_table(lambda bench: bench.play(Misread(bench.trained("healthy").policy(), **how)), chain=True)


def mixed_with(other: Policy | None, share: float) -> Callable[[Bench], pd.DataFrame]:
    """The original's policy, but for a share of its decisions."""
    return lambda bench: bench.play(Blend(bench.trained("original").policy(), other, share), clock="running")


# --- pools --------------------------------------------------------------------------------------------------------------


def with_pool(bench: FaultBench, change: Change) -> Plant:
    """A changed pool of sound MPC; the validation pool came the same way."""
    return plants.of_training(bench.learn(change(bench.pool("mpc")), change(bench.validation)))


def with_rows(bench: FaultBench, rows: list[int], new: Arrays) -> Plant:
    """Some rows of the pool's states are changed."""
    return with_pool(bench, lambda pool: replace(pool, states=rows_of(rows, new)(pool.states)))


def rows_of(rows: list[int], new: Arrays) -> Arrays:
    mask = np.isin(np.arange(6), rows)[:, None]
    return lambda states: np.where(mask, new(states), states).astype(states.dtype)


def with_labels(bench: FaultBench, share: float, label: Arrays) -> Plant:
    """A share of the episodes has the labels that `label` makes of an episode's."""

    def change(pool: ExperiencePool) -> ExperiencePool:
        actions, rng = pool.actions.copy(), np.random.default_rng(3)
        for first, length in zip(pool.episode_starts, pool.episode_lengths, strict=True):
            if rng.random() < share:
                actions[first : first + length] = label(actions[first : first + length])
        return replace(pool, actions=actions)

    return with_pool(bench, change)


def with_ladder(bench: FaultBench, kbps: list[int]) -> Plant:
    """The pool was made with other bitrates."""
    ladder = np.array(kbps, dtype=float)

    def change(pool: ExperiencePool) -> ExperiencePool:
        states = pool.states.copy()
        level = np.searchsorted(qoe.BITRATES_KBPS, states[:, 0] * qoe.BITRATES_KBPS[-1] - 0.5).clip(0, LEVELS - 1)
        states[:, 0] = np.where(states[:, 0] > 0, ladder[level] / ladder[-1], 0)
        states[:, 4] *= ladder / qoe.BITRATES_KBPS
        return replace(repriced(pool, ladder=ladder), states=states)

    return with_pool(bench, change)


def repriced(pool: ExperiencePool, penalty: float = 4.3, smoothness: float = 1.0, ladder: Any = None) -> ExperiencePool:
    """The rewards by another penalty of stalls, another weight of changes, or another ladder."""
    now, before, mbps = pool.actions, previous_levels(pool), qoe.BITRATES_KBPS / 1000
    stall_s = (mbps[now] - np.abs(mbps[now] - mbps[before]) - pool.rewards) / qoe.REBUFFER_PENALTY
    mbps = mbps if ladder is None else ladder / 1000
    return replace(pool, rewards=mbps[now] - penalty * stall_s - smoothness * np.abs(mbps[now] - mbps[before]))


def with_rewards(bench: FaultBench, **how: float) -> Plant:
    """Good episodes and bad ones, which the return-to-go tells apart, with other rewards."""
    return plants.of_test(None, bench.learn(repriced(bench.pool("mixed"), **how), scale=10.0), twin="on-mixed")


def taught_by(
    bench: FaultBench, policy: Policy | None, traces: TraceSet | None = None, held: ExperiencePool | None = None
) -> Plant:
    """The pool of a policy, sound MPC unless another is given."""
    traces, policy = traces or bench.traces(TRAIN), policy or RobustMPC(bench.video())
    episodes = sound_episodes(traces, repeats=max(1, EPISODES // len(traces)))
    return plants.of_training(bench.learn(generate_pool(policy, traces, bench.video(), episodes), held))


def with_traces(bench: FaultBench, change: Callable[[Trace], Trace]) -> Plant:
    """The pool was made on changed traces."""
    return taught_by(bench, None, TraceSet(TRAIN, tuple(change(trace) for trace in bench.traces(TRAIN).traces)))


def few_traces(bench: FaultBench, count: int) -> Plant:
    return taught_by(bench, None, bench.traces(TRAIN).subset(7 * count + np.arange(count)), bench.validation)


def few_episodes(bench: FaultBench, count: int) -> Plant:
    few = base.first_episodes(bench.pool("mpc"), count)
    return plants.of_training(bench.learn(concatenate([few] * (EPISODES // count)), bench.validation))


def weak_teacher(bench: FaultBench, name: str) -> Plant:
    bba, mpc = BBA(), base.Careless(RobustMPC(bench.video()), 0.06)
    teachers = {"careless mpc": mpc, "bba": bba, "careless bba": base.Careless(bba, 0.1), "random": Random()}
    teachers |= {f"level {level}": Constant(level) for level in range(LEVELS)}
    return taught_by(bench, teachers[name])


# --- tests of other weights than the checkpoint's, and of other settings ------------------------------------------------


@by_network
def other_weights(bench: Bench, trained: Trained, which: Any) -> PolicyNetwork:
    """Of another training, of another seed, or of an early step."""
    if which == "early":
        return load_policy(trained.early)[0]
    assert isinstance(bench, FaultBench)
    return bench.trained(bench.learn_mpc(seed=which) if isinstance(which, int) else which).network


@by_network
def other_alpha(_: Bench, trained: Trained, alpha: int) -> PolicyNetwork:
    return plants.on_plm(trained, replace(trained.meta.plm, lora_alpha=alpha))


@by_network
def towards_untrained(_: Bench, trained: Trained, part: float) -> PolicyNetwork:
    """Only a part of what the training changed is there."""
    network, fresh = copy.deepcopy(trained.network), PolicyNetwork(load_plm(trained.meta.plm), trained.meta.network)
    with torch.no_grad():
        for weights, first in zip(network.parameters(), fresh.parameters(), strict=True):
            weights.copy_(first + part * (weights - first))
    return network


@by_network
def weaker_last_layer(_: Bench, trained: Trained, part: float) -> PolicyNetwork:
    """Only a part of what the PLM's last layer adds is there."""
    network = copy.deepcopy(trained.network)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if ".layers.1." in name and ("o_proj" in name or "down_proj" in name):
                weights.mul_(part)
    return network


def with_another_test(
    bench: Bench, root: Path, policy: tuple[PolicyNetwork, Any], config: EvalConfig | None = None, name: str = "healthy"
) -> Planted:
    """The run of a training with another test than its own."""
    table = bench.play(LLMPolicy(*policy, config))
    return Planted(base.write_runs(root, bench, name, table, config, policy), table, bench.test(name))


@graded
def with_dropout(bench: FaultBench, root: Path, rate: float) -> Planted:
    trained = bench.trained("healthy")
    plm = replace(trained.meta.plm, lora_dropout=rate, plm_dropout=rate)
    policy = plants.on_plm(trained, plm), replace(trained.meta, plm=plm)
    return with_another_test(bench, root, policy, EvalConfig(dropout=True))


@graded
def drawn_at(bench: FaultBench, root: Path, temperature: float) -> Planted:
    """Levels are drawn at a temperature."""
    trained, config = bench.trained("healthy"), EvalConfig(choose="sample")
    with plants.changed(list(trained.network.action_head.parameters()), lambda weights: weights / temperature):
        table = bench.play(trained.policy(config))
    return Planted(base.write_runs(root, bench, "healthy", table, config), table, bench.test("healthy"))


def with_scale(name: str, change: Callable[[ReturnScale], ReturnScale]) -> Plant:
    """The test has another return scale than the training."""

    def plant(bench: Bench, root: Path) -> Planted:
        network, meta = bench.trained(name).network, bench.trained(name).meta
        settings = replace(meta.settings, scale=change(meta.settings.scale))
        return with_another_test(bench, root, (network, replace(meta, settings=settings)), name=name)

    return plant


def with_gamma(bench: FaultBench, gamma: float) -> Plant:
    pool = bench.pool("mixed")
    return with_scale(bench.learn(pool, gamma=gamma, scale=10.0), lambda s: pool_returns(pool, 1.0, s.scale)[1])


@graded
def damaged_traces(bench: FaultBench, root: Path, how: tuple[float, bool]) -> Planted:
    """A share of the trace files was damaged when the test was played; they are still, or they have been mended since."""
    share, mended = how
    here, traces = bench.elsewhere(root / "data"), bench.traces()
    hit = np.random.default_rng(7).permutation(len(traces)) < share * len(traces)
    broken = [replace(t, mbps=t.mbps * 0.1) if h else t for t, h in zip(traces.traces, hit, strict=True)]
    pointers = (bench.data / "traces" / "test" / TRACES / POINTER_FILE).read_bytes()
    (write_traces(TraceSet(TRACES, tuple(broken)), here.data, "test") / POINTER_FILE).write_bytes(pointers)
    table = here.play(bench.trained("healthy").policy())
    folders = base.write_runs(root, here, "healthy", table)
    if mended:
        shutil.rmtree(here.data)
    return Planted(folders, table, bench.test("healthy"), {"data": bench.data if mended else here.data})


@graded
def two_seeds(bench: FaultBench, root: Path, seed: int) -> Planted:
    names = ("healthy", bench.learn_mpc(seed=seed))
    return Planted(tuple(base.write_runs(root / name, bench, name, bench.test(name))[0] for name in names))


@graded
def other_family(bench: FaultBench, root: Path, family: str) -> Planted:
    return plants.of_training("healthy")(bench.with_plm(family), root)


# --- trees of the original ----------------------------------------------------------------------------------------------


def first_steps(bench: FaultBench, samples: int) -> str:
    """The original's training, ended after so many samples."""
    return bench.learn_mpc(original=True, epochs=1, order=tuple(range(samples)))


@graded
def stopped(bench: FaultBench, root: Path, samples: int) -> Planted:
    """The training was stopped early: its log ends in a line, its folders promise 80 epochs; the best checkpoint was tested."""
    training = first_steps(bench, samples)
    table = plants.as_original(bench, training)
    base.write_tree(root, bench, training, table, parts=("console", "results", "pool"))
    log = next(root.rglob("*console.log"))
    text = log.read_text().split("Load model from")[0].replace("epochs_1_", "epochs_80_")
    log.write_text(text.replace("num_epochs=1,", "num_epochs=80,") + "Step 0 - mean tr")
    for folder in [path for path in root.rglob("*epochs_1_*") if path.is_dir()]:
        folder.rename(folder.with_name(folder.name.replace("epochs_1_", "epochs_80_")))
    return Planted((root,), table, plants.as_original(bench, "original"))


def overwritten(table: Callable[[Bench], pd.DataFrame], parts: tuple[str, ...], traces: str = TRACES) -> Plant:
    """A tree of the original's own training and test, whose result files were overwritten by others."""

    def plant(bench: Bench, root: Path) -> Planted:
        sound, other = plants.as_original(bench, "original"), table(bench)
        base.write_tree(root, bench, "original", sound, parts=parts)
        place = root / "adaptive_bitrate_streaming" / "artifacts" / "results"
        place /= results_path(base.upstream_settings(bench.trained("original")))
        shutil.rmtree(place)
        write_results(place, other, traces)
        return Planted((root,), other, sound)

    return plant
