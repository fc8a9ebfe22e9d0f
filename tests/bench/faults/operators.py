"""What can be broken, and what is healthy or harmless. An operator draws how severe it is, and says how to plant it."""

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

from faults.cases import Draw, FaultBench, operator
from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis.evidence import previous_levels
from netllm_lib.abr.episodes import Episodes, Observation, sound_episodes
from netllm_lib.abr.model import PolicyNetwork, load_policy
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import write_traces, write_video
from netllm_lib.abr.traces import POINTER_FILE, Trace, TraceSet, Video
from netllm_lib.checkpoint import CheckpointMeta
from netllm_lib.plm import load_plm
from netllm_lib.returns import ReturnScale, pool_returns
from planted_plants import (
    Plant,
    Planted,
    as_original,
    changed,
    lora,
    noisy,
    of_log,
    of_runs,
    of_table,
    of_test,
    of_training,
    of_tree,
    of_weights,
    on_plm,
    other_first_level,
)
from planted_runs import (
    TRACES,
    TRAIN,
    Bench,
    Careless,
    Trained,
    first_episodes,
    upstream_settings,
    write_runs,
    write_tree,
)
from upstream_tree import results_path, write_results

EPISODES = 200  # of a pool
RESULTS = ("results",)
Change = Callable[[ExperiencePool], ExperiencePool]

# --- policies that go wrong ---------------------------------------------------------------------------------------------


class Wrapped(Policy):
    """Another policy, with something wrong between it and the player."""

    def __init__(self, inner: Policy):
        self.inner, self.name = inner, "llm"

    def reset(self, episodes: Episodes) -> None:
        self.inner.reset(episodes)

    def act(self, observation: Observation) -> np.ndarray:
        return self.inner.act(observation)


class Mapped(Wrapped):
    """Its levels are read wrongly."""

    def __init__(self, inner: Policy, mapping: Callable[[np.ndarray], np.ndarray]):
        super().__init__(inner)
        self.mapping = mapping

    def act(self, observation: Observation) -> np.ndarray:
        return self.mapping(self.inner.act(observation))


class Misled(Wrapped):
    """It sees other states than those that are."""

    def __init__(self, inner: Policy, change: Callable[[np.ndarray], np.ndarray]):
        super().__init__(inner)
        self.change = change

    def act(self, observation: Observation) -> np.ndarray:
        return self.inner.act(replace(observation, state=self.change(observation.state)))


class Blend(Wrapped):
    """A share of its decisions is another policy's."""

    def __init__(self, inner: Policy, other: Policy, share: float):
        super().__init__(inner)
        self.other, self.share = other, share

    def reset(self, episodes: Episodes) -> None:
        super().reset(episodes)
        self.other.reset(episodes)
        self.theirs = np.random.default_rng([episodes.seed, 6]).random((len(episodes), CHUNKS + 1)) < self.share

    def act(self, observation: Observation) -> np.ndarray:
        theirs = self.theirs[observation.episode, observation.chunk - 1]
        levels = np.where(theirs, self.other.act(observation), self.inner.act(observation))
        self.inner.played(levels)
        return levels


class LastLevel(Policy):
    """The level of the chunk before."""

    def act(self, observation: Observation) -> np.ndarray:
        return observation.last_level


class Late(Wrapped):
    """It plays what was right some chunks ago."""

    def __init__(self, inner: Policy, chunks: int):
        super().__init__(inner)
        self.chunks, self.wanted = chunks, list[np.ndarray]()

    def act(self, observation: Observation) -> np.ndarray:
        self.wanted = [*(self.wanted if observation.chunk > 1 else []), self.inner.act(observation)]
        levels = self.wanted[max(0, len(self.wanted) - 1 - self.chunks)]
        self.inner.played(levels)
        return levels


class Tempered(LLMPolicy):
    """Levels are drawn at a temperature."""

    temperature = 1.0

    def _logits(self) -> torch.Tensor:
        return super()._logits() / self.temperature


# --- pools --------------------------------------------------------------------------------------------------------------


def scaled(row: int, factor: float) -> Change:
    factors = np.where(np.arange(6) == row, factor, 1.0)[:, None].astype(np.float32)
    return lambda pool: replace(pool, states=pool.states * factors)


def repriced(pool: ExperiencePool, penalty: float = 4.3, smoothness: float = 1.0, ladder: Any = None) -> ExperiencePool:
    """The rewards by another penalty of stalls, another weight of changes, or another ladder."""
    now, before = pool.actions, previous_levels(pool)
    mbps, change = qoe.BITRATES_KBPS / 1000, np.abs(qoe.BITRATES_KBPS[now] - qoe.BITRATES_KBPS[before]) / 1000
    stall_s = (mbps[now] - change - pool.rewards) / qoe.REBUFFER_PENALTY
    mbps = mbps if ladder is None else ladder / 1000
    return replace(pool, rewards=mbps[now] - penalty * stall_s - smoothness * np.abs(mbps[now] - mbps[before]))


def relabelled(label: Callable[[np.ndarray], np.ndarray], share: float) -> Change:
    """A share of the episodes has other labels, which `label` makes of an episode's."""

    def change(pool: ExperiencePool) -> ExperiencePool:
        actions, rng = pool.actions.copy(), np.random.default_rng(3)
        for first, length in zip(pool.episode_starts, pool.episode_lengths, strict=True):
            if rng.random() < share:
                actions[first : first + length] = label(actions[first : first + length])
        return replace(pool, actions=actions)

    return change


def of_teacher(bench: FaultBench, policy: Policy, traces: TraceSet, video: Video | None = None) -> ExperiencePool:
    repeats = max(1, EPISODES // len(traces))
    return generate_pool(policy, traces, video or bench.video(), sound_episodes(traces, repeats=repeats))


def on_mixed(bench: FaultBench, **recipe: Any) -> str:
    """Good episodes and bad ones, with rewards below -5 clipped: the return-to-go tells which."""
    return bench.learn(bench.pool("mixed"), **{"scale": 10.0} | recipe) if recipe else "on-mixed"


BROKEN = "broken-pool trace-shift"


@operator("pool", BROKEN)
def pool_throughput_unit(bench: FaultBench, draw: Draw) -> Plant:
    """The throughput in the pool's states is in another unit."""
    return of_training(bench.learn_changed(scaled(2, draw.one_of((1.05, 1.3, 0.75), (8, 0.125), (1000, 0.001)))))


@operator("pool", BROKEN)
def pool_delay_unit(bench: FaultBench, draw: Draw) -> Plant:
    """The delay in the pool's states is in another unit."""
    return of_training(bench.learn_changed(scaled(3, draw.one_of((0.8, 1.25), (10, 0.1), (1000, 10000)))))


@operator("pool", "broken-pool")
def pool_buffer_unit(bench: FaultBench, draw: Draw) -> Plant:
    """The buffer in the pool's states is in another unit."""
    return of_training(bench.learn_changed(scaled(1, draw.one_of((0.9, 1.2), (10, 0.25), (1000, 10000)))))


@operator("pool", "broken-pool video-shift")
def pool_size_unit(bench: FaultBench, draw: Draw) -> Plant:
    """The sizes in the pool's states are in another unit."""
    return of_training(bench.learn_changed(scaled(4, draw.one_of((0.9537, 1.05), (8, 0.125), (1000, 0.001)))))


@operator("pool", "broken-pool video-shift")
def pool_sizes_of_another_chunk(bench: FaultBench, draw: Draw) -> Plant:
    """The sizes in the pool's states are those of another chunk."""
    by = draw.one_of((1,), (2, -2), (10, 20))

    def change(pool: ExperiencePool) -> ExperiencePool:
        states = pool.states.copy()
        states[:, 4] = np.roll(states[:, 4].reshape(-1, CHUNKS - 1, 6), by, axis=1).reshape(-1, 6)
        return replace(pool, states=states)

    return of_training(bench.learn_changed(change))


@operator("pool", BROKEN)
def pool_history_turned(bench: FaultBench, draw: Draw) -> Plant:
    """The history in the pool's states begins with the newest chunk."""
    rows = draw.one_of(([3],), ([2],), ([2, 3], [0, 2, 3]))

    def change(pool: ExperiencePool) -> ExperiencePool:
        states = pool.states.copy()
        states[:, rows] = states[:, rows, ::-1]
        return replace(pool, states=states)

    return of_training(bench.learn_changed(change))


@operator("pool", "reward-mismatch broken-pool wrong-pool target-return")
def pool_rewards_by_another_penalty(bench: FaultBench, draw: Draw) -> Plant:
    """The pool's rewards count stalls by another penalty."""
    pool = repriced(bench.pool("mixed"), penalty=draw.between((2.5, 3.5), (0.5, 2.0), (-1.0, 0.0)))
    return of_test(None, bench.learn(pool, scale=10.0), twin="on-mixed")


@operator("pool", "reward-mismatch broken-pool wrong-pool target-return")
def pool_rewards_by_another_smoothness(bench: FaultBench, draw: Draw) -> Plant:
    """The pool's rewards count changes of level by another weight."""
    pool = repriced(bench.pool("mixed"), smoothness=draw.between((0.5, 0.9), (0.0, 0.3), (3.0, 10.0)))
    return of_test(None, bench.learn(pool, scale=10.0), twin="on-mixed")


@operator("pool", "label-shift broken-pool")
def pool_levels_reversed(bench: FaultBench, draw: Draw) -> Plant:
    """The levels of a share of the pool's episodes are counted from the top."""
    share = draw.between((0.03, 0.1), (0.2, 0.5), (0.8, 1.0))
    return of_training(bench.learn_changed(relabelled(lambda levels: qoe.LEVELS - 1 - levels, share)))


@operator("pool", "label-shift broken-pool")
def pool_labels_shifted(bench: FaultBench, draw: Draw) -> Plant:
    """The levels of the pool are those of some chunks before or after."""
    share, by = draw.one_of(((0.3, 1), (0.3, -1)), ((1, 1), (1, -2)), ((1, 3), (1, -5)))
    return of_training(bench.learn_changed(relabelled(lambda levels: np.roll(levels, by), share)))


@operator("pool", "label-shift broken-pool")
def pool_labels_shuffled(bench: FaultBench, draw: Draw) -> Plant:
    """The levels of a share of the pool's episodes are in random order."""
    share, rng = draw.between((0.05, 0.15), (0.3, 0.6), (0.9, 1.0)), np.random.default_rng(4)
    return of_training(bench.learn_changed(relabelled(rng.permutation, share)))


@operator("pool", "broken-pool label-shift video-shift reward-mismatch")
def pool_of_another_ladder(bench: FaultBench, draw: Draw) -> Plant:
    """The pool was made with other bitrates."""
    ladders = (
        ([300, 700, 1200, 1900, 2800, 4300],),
        ([200, 500, 900, 1500, 2400, 4000],),
        ([1000, 2500, 5000, 8000, 16000, 35000],),
    )
    ladder = np.array(draw.one_of(*ladders), dtype=float)

    def change(pool: ExperiencePool) -> ExperiencePool:
        states = pool.states.copy()
        level = np.searchsorted(qoe.BITRATES_KBPS, states[:, 0] * qoe.BITRATES_KBPS[-1] - 0.5).clip(0, 5)
        states[:, 0] = np.where(states[:, 0] > 0, ladder[level] / ladder[-1], 0)
        states[:, 4] *= ladder / qoe.BITRATES_KBPS
        return replace(repriced(pool, ladder=ladder), states=states)

    return of_training(bench.learn_changed(change))


@operator("pool", "overfit pool-too-small")
def pool_of_few_episodes(bench: FaultBench, draw: Draw) -> Plant:
    """The pool repeats a few episodes many times."""
    count = draw.count((20, 40), (5, 10), (1, 3))
    few = first_episodes(bench.pool("mpc"), count)
    return of_training(bench.learn(concatenate([few] * (EPISODES // count)), bench.validation))


@operator("pool", "overfit pool-too-small trace-shift")
def pool_of_few_traces(bench: FaultBench, draw: Draw) -> Plant:
    """The pool was made on one trace, or a few."""
    first, count = int(draw.rng.integers(90)), draw.count((6, 10), (2, 4), (1, 1))
    traces = bench.traces(TRAIN).subset(np.arange(first, first + count))
    return of_training(bench.learn(of_teacher(bench, RobustMPC(bench.video()), traces), bench.validation))


def pool_of_traces(bench: FaultBench, change: Callable[[Trace], Trace]) -> Plant:
    traces = TraceSet(TRAIN, tuple(change(trace) for trace in bench.traces(TRAIN).traces))
    return of_training(bench.learn(of_teacher(bench, RobustMPC(bench.video()), traces)))


@operator("pool", "broken-traces trace-shift")
def traces_bandwidth_unit(bench: FaultBench, draw: Draw) -> Plant:
    """The bandwidths of the training traces are in another unit."""
    factor = draw.one_of((1.2, 0.8), (3, 0.3), (8, 0.125))
    return pool_of_traces(bench, lambda trace: replace(trace, mbps=trace.mbps * factor))


@operator("pool", "broken-traces trace-shift")
def traces_clock_unit(bench: FaultBench, draw: Draw) -> Plant:
    """The times of the training traces are in another unit."""
    factor = draw.one_of((0.5, 2.0), (0.1, 10.0), (0.001, 1000.0))
    return pool_of_traces(bench, lambda trace: replace(trace, time_s=trace.time_s * factor))


@operator("pool", "weak-teacher")
def weak_teacher(bench: FaultBench, draw: Draw) -> Plant:
    """The pool is that of a poor policy."""
    mpc = RobustMPC(bench.video())
    teachers = ((Careless(mpc, 0.06),), (BBA(), Careless(BBA(), 0.1)), (Random(), Constant(1), Constant(3)))
    return of_training(bench.learn(of_teacher(bench, draw.one_of(*teachers), bench.traces(TRAIN)), epochs=3))


# --- training -----------------------------------------------------------------------------------------------------------


@operator("training", "learning-rate undertrained")
def rate_too_low(bench: FaultBench, draw: Draw) -> Plant:
    """The learning rate is too low."""
    rate = draw.between((2e-4, 5e-4), (1e-5, 5e-5), (1e-7, 1e-6))
    return of_training(bench.learn_mpc(epochs=2, lr=rate, lr_around=rate))


@operator("training", "learning-rate diverged")
def rate_too_high(bench: FaultBench, draw: Draw) -> Plant:
    """The learning rate is too high."""
    rate = draw.between((0.02, 0.03), (0.08, 0.2), (0.5, 2.0))
    return of_training(bench.learn_mpc(epochs=2, lr=rate, lr_around=rate))


@operator("training", "learning-rate undertrained")
def rate_around_too_low(bench: FaultBench, draw: Draw) -> Plant:
    """The modules around the PLM hardly learn."""
    return of_training(bench.learn_mpc(epochs=2, lr_around=draw.between((2e-4, 1e-3), (1e-5, 5e-5), (1e-8, 1e-7))))


@operator("training", "warmup-too-long")
def warmup_too_long(bench: FaultBench, draw: Draw) -> Plant:
    """The warm-up is longer than the training."""
    steps = draw.count((300, 700), (1500, 4000), (2e4, 1e5))
    return of_training(bench.learn_mpc(epochs=2, lr_around=1e-3, warmup_steps=steps))


@operator("training", "undertrained")
def few_steps(bench: FaultBench, draw: Draw) -> Plant:
    """The training is short."""
    return of_training(bench.learn_mpc(epochs=1, batch=draw.count((8, 14), (25, 50), (100, 250))))


@operator("training", "diverged learning-rate")
def rising_rate(bench: FaultBench, draw: Draw) -> Plant:
    """The rate rises until the loss does."""
    rate = draw.between((0.02, 0.04), (0.1, 0.3), (0.5, 1.5))
    return of_training(bench.learn_mpc(epochs=3, lr=rate / 3, lr_around=rate, warmup=1.0))


@operator("training", "weight-decay undertrained learning-rate")
def large_weight_decay(bench: FaultBench, draw: Draw) -> Plant:
    """The weight decay is large."""
    return of_training(bench.learn_mpc(epochs=3, weight_decay=draw.between((0.03, 0.3), (2, 8), (30, 90))))


# --- checkpoint ---------------------------------------------------------------------------------------------------------

Played = tuple[pd.DataFrame, dict[str, Any]]
OTHER_WEIGHTS = "wrong-checkpoint"


def played_by(bench: Bench, network: PolicyNetwork, meta: CheckpointMeta) -> Played:
    """The test of another network than the checkpoint's."""
    return bench.play(LLMPolicy(network, meta)), {}


@operator("checkpoint", OTHER_WEIGHTS)
def other_weights(bench: FaultBench, draw: Draw) -> Plant:
    """The test played the weights of another run."""
    grade = draw.grade

    def make(bench: Bench, trained: Trained) -> Played:
        if grade == 2:
            return played_by(bench, *load_policy(trained.early))
        other = bench.trained(learnt[grade])
        return played_by(bench, other.network, other.meta)

    learnt = (bench.learn_mpc(seed=2), "on-careless-bba")
    return of_runs(make)


@operator("checkpoint", f"{OTHER_WEIGHTS} untrained adapter-not-applied")
def untrained_results(bench: FaultBench, draw: Draw) -> Plant:
    """The results are those of a network that was hardly trained."""
    part = draw.between((0.75, 0.9), (0.3, 0.6), (0.0, 0.0))

    def make(bench: Bench, trained: Trained) -> Played:
        network, fresh = copy.deepcopy(trained.network), PolicyNetwork(load_plm(trained.meta.plm), trained.meta.network)
        with torch.no_grad():
            for (_, weights), (_, first) in zip(network.named_parameters(), fresh.named_parameters(), strict=True):
                weights.copy_(first + part * (weights - first))
        return played_by(bench, network.eval(), trained.meta)

    return of_runs(make)


@operator("checkpoint", OTHER_WEIGHTS)
def damaged_weights(bench: FaultBench, draw: Draw) -> Plant:
    """The checkpoint's weights are noisy."""
    amount, stream = draw.between((0.02, 0.06), (0.2, 0.4), (0.8, 1.5)), torch.Generator().manual_seed(5)

    def change(weights: torch.Tensor) -> torch.Tensor:
        return weights + amount * weights.std(correction=0) * torch.randn(weights.shape, generator=stream)

    return of_weights(lambda network: list(network.trainable().values()), change)


@operator("checkpoint", f"{OTHER_WEIGHTS} adapter-not-applied")
def scaled_adapter(bench: FaultBench, draw: Draw) -> Plant:
    """The checkpoint's adapter was scaled."""
    factor = draw.one_of((0.9, 1.15), (0.3, 3.0), (0.0, 10.0))
    return of_weights(lora("lora_B"), lambda weights: weights * factor)


@operator("checkpoint", f"{OTHER_WEIGHTS} other-lora-alpha adapter-not-applied")
def other_lora_alpha(bench: FaultBench, draw: Draw) -> Plant:
    """The test had another LoRA alpha than the training."""
    alpha = draw.one_of((30, 36), (8, 128), (1, 512))

    def make(bench: Bench, trained: Trained) -> Played:
        return played_by(bench, on_plm(trained, replace(trained.meta.plm, lora_alpha=alpha)), trained.meta)

    return of_runs(make)


@operator("checkpoint", f"{OTHER_WEIGHTS} other-plm")
def other_plm(bench: FaultBench, draw: Draw) -> Plant:
    """The test had a PLM of the same shape with other weights."""
    amount = draw.between((0.01, 0.05), (0.2, 0.5), (1.0, 2.0))

    def plant(bench: Bench, root: Path) -> Planted:
        import transformers as hf

        model, trained = hf.AutoModel.from_pretrained(bench.plm), bench.trained("healthy")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(5)
            for weights in model.parameters():
                weights.add_(amount * weights.std(correction=0) * torch.randn_like(weights))
        model.save_pretrained(root / "plm")
        network = on_plm(trained, replace(trained.meta.plm, source=str((root / "plm").resolve())))
        table, _ = played_by(bench, network, trained.meta)
        return Planted(write_runs(root, bench, "healthy", table), table, bench.test("healthy"), {"plm": root / "plm"})

    return plant


@operator("checkpoint", f"{OTHER_WEIGHTS} wrong-layer")
def fewer_layers(bench: FaultBench, draw: Draw) -> Plant:
    """The test left out a part of the PLM's last layer, or all of it."""
    part = draw.one_of((0.9,), (0.5,), (0.0,))
    return of_runs(lambda bench, trained: with_weaker_last_layer(bench, trained, part))


def with_weaker_last_layer(bench: Bench, trained: Trained, part: float) -> Played:
    network = copy.deepcopy(trained.network)
    out = [
        p for name, p in network.named_parameters() if "layers.1." in name and ("o_proj" in name or "down_proj" in name)
    ]
    assert out, "it adds to the stream of layer 0 by these alone"
    with changed(out, lambda weights: weights * part):
        return played_by(bench, network, trained.meta)


# --- test ---------------------------------------------------------------------------------------------------------------


@operator("test", "dropout-on")
def dropout_at_test(bench: FaultBench, draw: Draw) -> Plant:
    """Dropout was on in the test."""
    rate = draw.between((0.02, 0.08), (0.2, 0.35), (0.5, 0.7))

    def make(bench: Bench, trained: Trained) -> Played:
        plm = replace(trained.meta.plm, lora_dropout=rate, plm_dropout=rate)
        policy, config = (on_plm(trained, plm), replace(trained.meta, plm=plm)), EvalConfig(dropout=True)
        return bench.play(LLMPolicy(*policy, config)), {"config": config, "policy": policy}

    return of_runs(make)


@operator("test", "sampling")
def temperature(bench: FaultBench, draw: Draw) -> Plant:
    """Levels were drawn, at some temperature."""
    value = draw.between((0.2, 0.5), (1.2, 2.0), (4.0, 10.0))

    def make(bench: Bench, trained: Trained) -> Played:
        policy = Tempered(trained.network, trained.meta, EvalConfig(choose="sample"))
        policy.temperature = value
        return bench.play(policy), {"config": policy.config}

    return of_runs(make)


@operator("test", "context-leak")
def context_kept(bench: FaultBench, draw: Draw) -> Plant:
    """The context was kept from trace to trace."""
    rolling, traces = EvalConfig(context_window="rolling"), "turns-test" if draw.grade == 2 else TRACES
    training = "healthy" if draw.grade == 0 else "whole-episodes"
    return of_test(replace(rolling, context="leak"), training, rolling, traces=traces)


@operator("test", "window-mismatch")
def other_window(bench: FaultBench, draw: Draw) -> Plant:
    """The test saw other windows than the training."""
    return of_test(EvalConfig(w=draw.one_of((8, 12), (30, 46), (1, 2))))


@operator("test", "target-return")
def other_target(bench: FaultBench, draw: Draw) -> Plant:
    """The test asked for another return than the pool's largest."""
    factor = draw.one_of((0.95, 1.02), (0.6, 1.5), (0.1, 5.0))
    return of_test(EvalConfig(target_return_scale=factor), on_mixed(bench))


def of_scale(training: str, change: Callable[[ReturnScale, Bench], ReturnScale]) -> Plant:
    """A test with another return scale than that of the training."""

    def make(bench: Bench, root: Path) -> Planted:
        trained = bench.trained(training)
        settings = replace(trained.meta.settings, scale=change(trained.meta.settings.scale, bench))
        policy = trained.network, replace(trained.meta, settings=settings)
        table = bench.play(LLMPolicy(*policy))
        return Planted(write_runs(root, bench, training, table, policy=policy), table, bench.test(training))

    return make


@operator("test", "return-scale target-return wrong-pool")
def other_return_scale(bench: FaultBench, draw: Draw) -> Plant:
    """The test divided returns by another scale than the training."""
    k = draw.one_of((1.03, 0.97), (2.0, 0.5), (100.0, 0.1))
    return of_scale(on_mixed(bench), lambda s, _: replace(s, scale=s.scale * k, target_return=s.target_return / k))


@operator("test", "return-scale target-return wrong-pool")
def other_gamma(bench: FaultBench, draw: Draw) -> Plant:
    """The training discounted its returns, the test did not."""
    training = on_mixed(bench, gamma=draw.between((0.98, 0.995), (0.8, 0.9), (0.3, 0.5)))
    return of_scale(training, lambda s, bench: pool_returns(bench.pool(training), 1.0, s.scale)[1])


@operator("test", "level-mapping wrong-checkpoint")
def levels_mapped(bench: FaultBench, draw: Draw) -> Plant:
    """The test read the levels wrongly."""
    mappings = ([lambda levels: levels.clip(0, 4)], [lambda levels: (levels - 1).clip(0)], [lambda levels: 5 - levels])
    mapping = draw.one_of(*mappings)
    return of_table(lambda bench: bench.play(Mapped(bench.trained("healthy").policy(), mapping)), chain=True)


@operator("test", "test-states wrong-checkpoint")
def states_at_test(bench: FaultBench, draw: Draw) -> Plant:
    """The test gave the policy states in other units."""
    row, factor = draw.one_of(((4, 0.9537), (3, 1.1)), ((2, 8), (1, 0.1), (3, 10)), ((2, 1000), (4, 1000), (1, 10)))
    factors = np.where(np.arange(6) == row, factor, 1.0)[:, None]
    return of_table(
        lambda bench: bench.play(Misled(bench.trained("healthy").policy(), lambda state: state * factors)), chain=True
    )


@operator("test", "video-shift")
def other_video(bench: FaultBench, draw: Draw) -> Plant:
    """The test streamed a video with larger chunks."""
    factor = draw.between((1.05, 1.15), (1.5, 1.8), (2.2, 3.0))

    def plant(_: Bench, root: Path) -> Planted:
        here, name = bench.elsewhere(root / "data"), "large"
        write_video(Video(name, (bench.video().sizes_bytes * factor).astype(np.int64)), here.data)
        video = here.video(name)
        twin = here.learn(of_teacher(here, RobustMPC(video), here.traces(TRAIN), video), epochs=3)
        planted = of_test(None, twin=twin, video=name)(here, root)
        return replace(planted, options={"data": here.data})

    return plant


@operator("test", "trace-shift")
def other_bandwidths(bench: FaultBench, draw: Draw) -> Plant:
    """The training had other bandwidths than the test."""
    if draw.grade == 2:
        return of_test(None, "on-fast", twin="on-slow", traces="slow-test", pool_traces="fast-train")
    training = ("on-slow", "on-fast")[draw.grade]
    return of_test(None, training, twin="healthy", pool_traces=training.removeprefix("on-") + "-train")


@operator("test", "broken-traces protocol-mismatch trace-shift")
def damaged_traces(bench: FaultBench, draw: Draw) -> Plant:
    """Some trace files were damaged when the test was played; they are still, or they have been mended since."""
    share, mended = draw.between((0.1, 0.25), (0.4, 0.6), (0.8, 1.0)), bool(draw.rng.integers(2))
    factor = float(draw.rng.choice([0.05, 0.125]))

    def plant(_: Bench, root: Path) -> Planted:
        here, traces = bench.elsewhere(root / "data"), bench.traces()
        hit = np.random.default_rng(7).permutation(len(traces)) < share * len(traces)
        broken = [replace(t, mbps=t.mbps * factor) if h else t for t, h in zip(traces.traces, hit, strict=True)]
        pointers = (bench.data / "traces" / "test" / TRACES / POINTER_FILE).read_bytes()
        (write_traces(TraceSet(TRACES, tuple(broken)), here.data, "test") / POINTER_FILE).write_bytes(pointers)
        table = here.play(bench.trained("healthy").policy())
        folders = write_runs(root, here, "healthy", table)
        if mended:
            shutil.rmtree(here.data)
        return Planted(folders, table, bench.test("healthy"), {"data": bench.data if mended else here.data})

    return plant


@operator("test", "protocol-mismatch", measurement=True)
def other_conditions(bench: FaultBench, draw: Draw) -> Plant:
    """The run alone was tested with noise, from other starting points, or with another first level."""

    def other_starts(bench: Bench) -> pd.DataFrame:
        episodes, rng = bench.episodes(), np.random.default_rng(8)
        starts = np.array([rng.integers(1, len(trace.mbps)) for trace in bench.traces().traces])
        simulator = Simulator(bench.traces(), bench.video(), replace(episodes, start_ptr=starts))
        return play(bench.trained("healthy").policy(), simulator)

    return of_table(draw.one_of((noisy,), (other_starts,), (other_first_level,)))


# --- logs and trees of the original -------------------------------------------------------------------------------------


@operator("logs", "diverged learning-rate")
def log_rises(bench: FaultBench, draw: Draw) -> Plant:
    """The loss falls, then rises, and the console log is all there is."""
    rate = draw.between((0.04, 0.06), (0.15, 0.3), (0.8, 1.5))
    recipe = {"epochs": 3, "lr": rate / 3, "lr_around": rate, "warmup_steps": 350}
    return of_log(bench.learn_mpc(original=True, **recipe), parts=("console",))


@operator("logs", "cut-log undertrained")
def log_ends_early(bench: FaultBench, draw: Draw) -> Plant:
    """The training was stopped early, and its console log ends in an epoch; the results are those of the last checkpoint."""
    samples = draw.count((940, 940), (450, 700), (60, 150))
    order = (tuple(range(samples)),)
    short = bench.learn_mpc(original=True, epochs=1, order=order)

    def plant(bench: Bench, root: Path) -> Planted:
        table = as_original(bench, short)
        tree = write_tree(root / "tree", bench, short, table, parts=("console", "results", "pool"))
        log = next(tree.rglob("*console.log"))
        text = log.read_text().split("Load model from")[0].replace("epochs_1_", "epochs_80_")
        log.write_text(text.replace("num_epochs=1,", "num_epochs=80,") + "Step 0 - mean tr")
        for folder in [path for path in tree.rglob("*epochs_1_*") if path.is_dir()]:
            folder.rename(folder.with_name(folder.name.replace("epochs_1_", "epochs_80_")))
        return Planted((tree,), table, as_original(bench, "original"))

    return plant


def tree_with_results(table: Callable[[Bench], pd.DataFrame], parts: tuple[str, ...], prefix: str = TRACES) -> Plant:
    """A tree of the original's own training and test, whose result files were overwritten by others."""

    def plant(bench: Bench, root: Path) -> Planted:
        sound, other = as_original(bench, "original"), table(bench)
        write_tree(root, bench, "original", sound, parts=parts)
        place = root / "adaptive_bitrate_streaming" / "artifacts" / "results"
        place /= results_path(upstream_settings(bench.trained("original")))
        shutil.rmtree(place)
        write_results(place, other, prefix)
        return Planted((root,), other, sound)

    return plant


def blended(other: Policy, share: float) -> Callable[[Bench], pd.DataFrame]:
    """The original's policy, but for a share of its decisions."""
    return lambda bench: bench.play(Blend(bench.trained("original").policy(), other, share), clock="running")


@operator("logs", "printed-mean wrong-checkpoint protocol-mismatch mixed-results")
def log_of_another_test(bench: FaultBench, draw: Draw) -> Plant:
    """The console log prints another mean than the result files beside it hold."""
    share = draw.between((0.02, 0.05), (0.1, 0.3), (0.7, 1.0))
    return tree_with_results(blended(Random(), share), ("console", "losses", "results", "pool"))


@operator("logs", "other-traces broken-traces protocol-mismatch trace-shift", measurement=True)
def results_of_other_traces(bench: FaultBench, draw: Draw) -> Plant:
    """The result files are of other traces than their folder's name says."""
    traces = draw.one_of(("fast-test",), ("turns-test",), ("slow-test",))
    return tree_with_results(lambda bench: bench.test("original", EvalConfig(), traces), ("results", "pool"), traces)


@operator("logs", "mixed-results protocol-mismatch wrong-checkpoint printed-mean")
def results_of_two_runs(bench: FaultBench, draw: Draw) -> Plant:
    """A weaker run overwrote some of the result files."""
    share = draw.between((0.1, 0.2), (0.4, 0.6), (0.8, 0.9))

    def table(bench: Bench) -> pd.DataFrame:
        ours, theirs = as_original(bench, "original"), bench.play(Careless(BBA(), 0.1), clock="running")
        hit = theirs["trace_index"] < share * 40
        return pd.concat([theirs[hit], ours[~(ours["trace_index"] < share * 40)]], ignore_index=True)

    return tree_with_results(table, ("console", "losses", "weights", "results", "pool", "plm"))


# --- results alone ------------------------------------------------------------------------------------------------------


@operator("results", "plays-bba weak-teacher")
def results_of_bba(bench: FaultBench, draw: Draw) -> Plant:
    """The policy plays like BBA, wholly or for a share of its decisions."""
    return of_tree("original", blended(BBA(), draw.between((0.6, 0.8), (0.85, 0.95), (1.0, 1.0))), parts=RESULTS)


@operator("results", "plays-constant level-collapse")
def results_of_one_level(bench: FaultBench, draw: Draw) -> Plant:
    """The policy plays one level."""
    level = draw.one_of((1,), (2, 0), (3, 5))
    share = draw.between((0.85, 0.95), (0.95, 1.0), (1.0, 1.0))
    return of_tree("original", blended(Constant(level), share), parts=RESULTS)


@operator("results", "plays-last-level level-collapse")
def results_of_last_level(bench: FaultBench, draw: Draw) -> Plant:
    """The policy copies the last level."""
    share = draw.between((0.8, 0.9), (0.92, 0.95), (0.97, 0.99))
    return of_tree("original", blended(LastLevel(), share), parts=RESULTS)


@operator("results", "plays-random sampling rare-bad-actions")
def results_with_random_levels(bench: FaultBench, draw: Draw) -> Plant:
    """A share of the levels is random."""
    share = draw.between((0.02, 0.06), (0.15, 0.4), (0.9, 1.0))
    return of_tree("original", blended(Random(), share), parts=RESULTS)


@operator("results", "undertrained untrained warmup-too-long learning-rate")
def results_of_few_steps(bench: FaultBench, draw: Draw) -> Plant:
    """The policy was hardly trained."""
    samples = draw.count((300, 600), (80, 150), (8, 40))
    return of_tree(bench.learn_mpc(original=True, epochs=1, order=(tuple(range(samples)),)), parts=RESULTS)


@operator("results", "late")
def results_late(bench: FaultBench, draw: Draw) -> Plant:
    """The policy reacts late."""
    chunks = draw.one_of((1,), (2,), (4, 6))
    return of_tree(
        "original", lambda bench: bench.play(Late(bench.trained("original").policy(), chunks)), parts=RESULTS
    )


# --- healthy, or harmless -----------------------------------------------------------------------------------------------


@operator("healthy")
def healthy_seed(bench: FaultBench, draw: Draw) -> Plant:
    """Another seed."""
    return of_training(bench.learn_mpc(seed=int(draw.rng.integers(2, 1000))))


@operator("healthy")
def healthy_family(bench: FaultBench, draw: Draw) -> Plant:
    """A PLM of another family."""
    other = bench.with_plm(draw.one_of(("gpt2",), ("opt",), ("mistral",)))
    return lambda _, root: of_training("healthy")(other, root)


@operator("healthy")
def healthy_recipe(bench: FaultBench, draw: Draw) -> Plant:
    """Another recipe that works as well."""
    recipes = (
        ({"w": 20}, {"w": 5, "scale": 100.0}),
        ({"lr": 3e-4, "lr_around": 5e-3},),
        ({"schedule": "constant", "batch": 16},),
    )
    return of_training(bench.learn_mpc(**draw.one_of(*recipes)))


@operator("healthy")
def healthy_clip(bench: FaultBench, draw: Draw) -> Plant:
    """The gradient is clipped to almost nothing, which Adam does not mind."""
    return of_training(bench.learn_mpc(max_grad_norm=draw.between((0.05, 0.1), (1e-2, 5e-2), (1e-3, 1e-2))))


@operator("healthy")
def healthy_rolling(bench: FaultBench, draw: Draw) -> Plant:
    """The test computes every window anew."""
    rolling = EvalConfig(context_window="rolling")
    return of_test(rolling, sound=rolling)


@operator("healthy")
def healthy_on_its_test(bench: FaultBench, draw: Draw) -> Plant:
    """The pool is of the test's traces."""
    return of_test(None, "on-test", pool_traces=TRACES)


@operator("healthy")
def healthy_two_seeds(bench: FaultBench, draw: Draw) -> Plant:
    """Tests of two seeds."""

    def plant(bench: Bench, root: Path) -> Planted:
        folders = [write_runs(root / str(i), bench, name, bench.test(name))[0] for i, name in enumerate(names)]
        return Planted(tuple(folders), bench.test("healthy"), bench.test("healthy"))

    names = ("healthy", bench.learn_mpc(seed=2))
    return plant


@operator("healthy")
def healthy_original(bench: FaultBench, draw: Draw) -> Plant:
    """A run of the original that works, whole or in parts."""
    parts = draw.one_of(
        (("console", "losses", "weights", "results", "pool", "plm"),), (("losses", "results", "pool"),), (RESULTS,)
    )
    return of_tree("original", parts=parts)


@operator("healthy")
def healthy_log(bench: FaultBench, draw: Draw) -> Plant:
    """The console log of a run of the original that works."""
    return of_log("original", parts=("console",))
