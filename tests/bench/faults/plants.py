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
from faults.cases import FaultBench
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
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import write_traces, write_video
from netllm_lib.abr.traces import POINTER_FILE, Trace, TraceSet, Video
from netllm_lib.plm import load_plm
from netllm_lib.returns import ReturnScale, pool_returns
from planted_plants import Plant, Planted
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
ROLLING, RESULTS = EvalConfig(context_window="rolling"), ("results",)
Change = Callable[[ExperiencePool], ExperiencePool]
Levels = Callable[[np.ndarray], np.ndarray]

# --- policies that go wrong ---------------------------------------------------------------------------------------------


class Misread(Policy):
    """Another policy that sees other states, or whose levels are read wrongly."""

    def __init__(self, inner: Policy, see: Levels = np.asarray, play: Levels = np.asarray):
        self.inner, self.see, self.play, self.reset = inner, see, play, inner.reset  # type: ignore[method-assign]

    def act(self, observation: Observation) -> np.ndarray:
        return self.play(self.inner.act(replace(observation, state=self.see(observation.state))))


class Blend(Policy):
    """Another policy, a share of whose decisions is a third one's."""

    def __init__(self, inner: Policy, other: Policy, share: float):
        self.inner, self.other, self.share = inner, other, share

    def reset(self, episodes: Episodes) -> None:
        self.inner.reset(episodes)
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


class Late(Policy):
    """What another policy wanted some chunks ago."""

    def __init__(self, inner: Policy, chunks: int):
        self.inner, self.chunks, self.wanted = inner, chunks, list[np.ndarray]()

    def reset(self, episodes: Episodes) -> None:
        self.inner.reset(episodes)

    def act(self, observation: Observation) -> np.ndarray:
        self.wanted = [*(self.wanted if observation.chunk > 1 else []), self.inner.act(observation)]
        levels = self.wanted[max(0, len(self.wanted) - 1 - self.chunks)]
        self.inner.played(levels)
        return levels


# --- pools --------------------------------------------------------------------------------------------------------------


def rows_of(rows: list[int], new: Levels) -> Levels:
    """Some rows of states [..., 6, 6] from `new`."""
    mask = np.isin(np.arange(6), rows)[:, None]
    return lambda states: np.where(mask, new(states), states).astype(states.dtype)


def with_states(bench: FaultBench, change: Levels) -> Plant:
    """The states of the pool are others."""
    return with_pool(bench, lambda pool: replace(pool, states=change(pool.states)))


def with_pool(bench: FaultBench, change: Change) -> Plant:
    """A changed pool of sound MPC; the validation pool came the same way."""
    return plants.of_training(bench.learn(change(bench.pool("mpc")), change(bench.validation)))


def moved(states: np.ndarray, by: int) -> np.ndarray:
    """Those of other chunks."""
    return np.roll(states.reshape(-1, CHUNKS - 1, 6, 6), by, axis=1).reshape(states.shape)


def on_ladder(kbps: list[int]) -> Change:
    """The pool was made with other bitrates."""
    ladder = np.array(kbps, dtype=float)

    def change(pool: ExperiencePool) -> ExperiencePool:
        states = pool.states.copy()
        level = np.searchsorted(qoe.BITRATES_KBPS, states[:, 0] * qoe.BITRATES_KBPS[-1] - 0.5).clip(0, LEVELS - 1)
        states[:, 0] = np.where(states[:, 0] > 0, ladder[level] / ladder[-1], 0)
        states[:, 4] *= ladder / qoe.BITRATES_KBPS
        return replace(repriced(pool, ladder=ladder), states=states)

    return change


def repriced(pool: ExperiencePool, penalty: float = 4.3, smoothness: float = 1.0, ladder: Any = None) -> ExperiencePool:
    """The rewards by another penalty of stalls, another weight of changes, or another ladder."""
    now, before, mbps = pool.actions, previous_levels(pool), qoe.BITRATES_KBPS / 1000
    stall_s = (mbps[now] - np.abs(mbps[now] - mbps[before]) - pool.rewards) / qoe.REBUFFER_PENALTY
    mbps = mbps if ladder is None else ladder / 1000
    return replace(pool, rewards=mbps[now] - penalty * stall_s - smoothness * np.abs(mbps[now] - mbps[before]))


def relabelled(label: Levels, share: float) -> Change:
    """A share of the episodes has other labels, which `label` makes of an episode's."""

    def change(pool: ExperiencePool) -> ExperiencePool:
        actions, rng = pool.actions.copy(), np.random.default_rng(3)
        for first, length in zip(pool.episode_starts, pool.episode_lengths, strict=True):
            if rng.random() < share:
                actions[first : first + length] = label(actions[first : first + length])
        return replace(pool, actions=actions)

    return change


def of_teacher(
    bench: Bench, policy: Policy, traces: TraceSet | None = None, video: Video | None = None
) -> ExperiencePool:
    """The pool of a policy."""
    traces = traces or bench.traces(TRAIN)
    episodes = sound_episodes(traces, repeats=max(1, EPISODES // len(traces)))
    return generate_pool(policy, traces, video or bench.video(), episodes)


def of_traces(bench: FaultBench, change: Callable[[Trace], Trace]) -> Plant:
    """The pool was made on changed traces."""
    traces = TraceSet(TRAIN, tuple(change(trace) for trace in bench.traces(TRAIN).traces))
    return plants.of_training(bench.learn(of_teacher(bench, RobustMPC(bench.video()), traces)))


def of_weak_teacher(bench: FaultBench, name: str) -> Plant:
    bba, mpc = BBA(), RobustMPC(bench.video())
    teachers = {"bba": bba, "careless bba": Careless(bba, 0.1), "careless mpc": Careless(mpc, 0.06), "random": Random()}
    teachers |= {f"level {level}": Constant(level) for level in range(LEVELS)}
    return plants.of_training(bench.learn(of_teacher(bench, teachers[name])))


def few_episodes(bench: FaultBench, count: int) -> Plant:
    few = first_episodes(bench.pool("mpc"), count)
    return plants.of_training(bench.learn(concatenate([few] * (EPISODES // count)), bench.validation))


def few_traces(bench: FaultBench, count: int) -> Plant:
    first = 7 * count
    traces = bench.traces(TRAIN).subset(np.arange(first, first + count))
    return plants.of_training(bench.learn(of_teacher(bench, RobustMPC(bench.video()), traces), bench.validation))


def on_repriced(bench: FaultBench, **how: float) -> Plant:
    """Good episodes and bad ones, which the return-to-go tells apart, with other rewards."""
    return plants.of_test(None, bench.learn(repriced(bench.pool("mixed"), **how), scale=10.0), twin="on-mixed")


def other_bandwidths(bench: FaultBench, names: tuple[str, str]) -> Plant:
    """Trained on some traces, tested on others."""
    trained, tested = names
    sound = "healthy" if tested == "bench" else f"on-{tested}"
    return plants.of_test(None, f"on-{trained}", twin=sound, traces=f"{tested}-test", pool_traces=f"{trained}-train")


# --- tests of other weights than the checkpoint's, and of other settings ------------------------------------------------


def by_network(make: Callable[[Bench, Trained], PolicyNetwork]) -> Plant:
    """The test played another network than the checkpoint's."""
    return plants.of_runs(lambda bench, trained: (bench.play(LLMPolicy(make(bench, trained).eval(), trained.meta)), {}))


def other_weights(bench: FaultBench, which: str) -> Plant:
    """Those of another seed, of another teacher, or of an early step."""
    names = {"seed": bench.learn_mpc(seed=2), "bba": "on-careless-bba"}
    if which in names:
        return by_network(lambda bench, _: bench.trained(names[which]).network)
    return by_network(lambda _, trained: load_policy(trained.early)[0])


def with_alpha(_: FaultBench, alpha: int) -> Plant:
    return by_network(lambda _, trained: plants.on_plm(trained, replace(trained.meta.plm, lora_alpha=alpha)))


def towards_untrained(_: FaultBench, part: float) -> Plant:
    """Only a part of what the training changed is there."""

    def make(bench: Bench, trained: Trained) -> PolicyNetwork:
        network, fresh = copy.deepcopy(trained.network), PolicyNetwork(load_plm(trained.meta.plm), trained.meta.network)
        with torch.no_grad():
            for weights, first in zip(network.parameters(), fresh.parameters(), strict=True):
                weights.copy_(first + part * (weights - first))
        return network

    return by_network(make)


def weaker_last_layer(_: FaultBench, part: float) -> Plant:
    """Only a part of what the PLM's last layer adds is there."""

    def make(bench: Bench, trained: Trained) -> PolicyNetwork:
        network = copy.deepcopy(trained.network)
        with torch.no_grad():
            for name, weights in network.named_parameters():
                if ".layers.1." in name and ("o_proj" in name or "down_proj" in name):
                    weights.mul_(part)
        return network

    return by_network(make)


def noise(amount: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Noise on a matrix, as a part of its standard deviation."""
    stream = torch.Generator().manual_seed(5)
    return lambda w: w + amount * w.std(correction=0) * torch.randn(w.shape, generator=stream)


def on_noisy_plm(_: FaultBench, amount: float) -> Plant:
    """The PLM is one of the same shape with other weights."""

    def plant(bench: Bench, root: Path) -> Planted:
        import transformers as hf

        model, trained, change = (
            hf.AutoModel.from_pretrained(bench.plm),
            bench.trained("healthy"),
            noise(amount),
        )
        with torch.no_grad():
            for weights in model.parameters():
                weights.copy_(change(weights))
        model.save_pretrained(root / "plm")
        network = plants.on_plm(trained, replace(trained.meta.plm, source=str((root / "plm").resolve())))
        table = bench.play(LLMPolicy(network, trained.meta))
        return Planted(write_runs(root, bench, "healthy", table), table, bench.test("healthy"), {"plm": root / "plm"})

    return plant


def with_dropout(_: FaultBench, rate: float) -> Plant:
    def make(bench: Bench, trained: Trained) -> tuple[pd.DataFrame, dict[str, Any]]:
        plm = replace(trained.meta.plm, lora_dropout=rate, plm_dropout=rate)
        policy, config = (plants.on_plm(trained, plm), replace(trained.meta, plm=plm)), EvalConfig(dropout=True)
        return bench.play(LLMPolicy(*policy, config)), {"config": config, "policy": policy}

    return plants.of_runs(make)


def drawn_at(_: FaultBench, temperature: float) -> Plant:
    """Levels are drawn at a temperature."""

    def make(bench: Bench, trained: Trained) -> tuple[pd.DataFrame, dict[str, Any]]:
        config, head = EvalConfig(choose="sample"), trained.network.action_head
        with plants.changed(list(head.parameters()), lambda weights: weights / temperature):
            return bench.play(trained.policy(config)), {"config": config}

    return plants.of_runs(make)


def with_scale(training: str, change: Callable[[ReturnScale, Bench], ReturnScale]) -> Plant:
    """The test has another return scale than the training."""

    def plant(bench: Bench, root: Path) -> Planted:
        trained = bench.trained(training)
        settings = replace(trained.meta.settings, scale=change(trained.meta.settings.scale, bench))
        policy = trained.network, replace(trained.meta, settings=settings)
        table = bench.play(LLMPolicy(*policy))
        return Planted(write_runs(root, bench, training, table, policy=policy), table, bench.test(training))

    return plant


def with_return_scale(_: FaultBench, k: float) -> Plant:
    return with_scale("on-mixed", lambda s, _: replace(s, scale=s.scale * k, target_return=s.target_return / k))


def with_gamma(bench: FaultBench, gamma: float) -> Plant:
    name = bench.learn(bench.pool("mixed"), gamma=gamma, scale=10.0)
    return with_scale(name, lambda s, bench: pool_returns(bench.pool(name), 1.0, s.scale)[1])


def misread(see: Levels = np.asarray, play: Levels = np.asarray) -> Plant:
    return plants.of_table(lambda bench: bench.play(Misread(bench.trained("healthy").policy(), see, play)), chain=True)


def on_larger_video(bench: FaultBench, factor: float) -> Plant:
    def plant(_: Bench, root: Path) -> Planted:
        here, name = bench.elsewhere(root / "data"), "large"
        write_video(Video(name, (bench.video().sizes_bytes * factor).astype(np.int64)), here.data)
        twin = here.learn(of_teacher(here, RobustMPC(here.video(name)), video=here.video(name)))
        return replace(plants.of_test(None, twin=twin, video=name)(here, root), options={"data": here.data})

    return plant


def damaged_traces(bench: FaultBench, how: tuple[float, bool]) -> Plant:
    """Some trace files were damaged when the test was played; they are still, or they have been mended since."""
    share, mended = how

    def plant(_: Bench, root: Path) -> Planted:
        here, traces = bench.elsewhere(root / "data"), bench.traces()
        hit = np.random.default_rng(7).permutation(len(traces)) < share * len(traces)
        broken = [replace(t, mbps=t.mbps * 0.1) if h else t for t, h in zip(traces.traces, hit, strict=True)]
        pointers = (bench.data / "traces" / "test" / TRACES / POINTER_FILE).read_bytes()
        (write_traces(TraceSet(TRACES, tuple(broken)), here.data, "test") / POINTER_FILE).write_bytes(pointers)
        table = here.play(bench.trained("healthy").policy())
        folders = write_runs(root, here, "healthy", table)
        if mended:
            shutil.rmtree(here.data)
        return Planted(folders, table, bench.test("healthy"), {"data": bench.data if mended else here.data})

    return plant


def from_other_starts(bench: Bench) -> pd.DataFrame:
    rng, traces = np.random.default_rng(8), bench.traces()
    starts = np.array([rng.integers(1, len(trace.mbps)) for trace in traces.traces])
    return play(
        bench.trained("healthy").policy(), Simulator(traces, bench.video(), replace(bench.episodes(), start_ptr=starts))
    )


def two_seeds(bench: FaultBench, seed: int) -> Plant:
    names = ("healthy", bench.learn_mpc(seed=seed))

    def plant(bench: Bench, root: Path) -> Planted:
        return Planted(tuple(write_runs(root / name, bench, name, bench.test(name))[0] for name in names))

    return plant


def other_family(bench: FaultBench, family: str) -> Plant:
    other = bench.with_plm(family)
    return lambda _, root: plants.of_training("healthy")(other, root)


# --- trees of the original ----------------------------------------------------------------------------------------------


def first_steps(bench: FaultBench, samples: int) -> str:
    """The original's training, ended after so many samples."""
    return bench.learn_mpc(original=True, epochs=1, order=(tuple(range(samples)),))


def stopped(bench: FaultBench, samples: int) -> Plant:
    """The training was stopped early: its log ends in a line, its folders promise 80 epochs; the best checkpoint was tested."""
    training = first_steps(bench, samples)

    def plant(bench: Bench, root: Path) -> Planted:
        table = plants.as_original(bench, training)
        write_tree(root, bench, training, table, parts=("console", "results", "pool"))
        log = next(root.rglob("*console.log"))
        text = log.read_text().split("Load model from")[0].replace("epochs_1_", "epochs_80_")
        log.write_text(text.replace("num_epochs=1,", "num_epochs=80,") + "Step 0 - mean tr")
        for folder in [path for path in root.rglob("*epochs_1_*") if path.is_dir()]:
            folder.rename(folder.with_name(folder.name.replace("epochs_1_", "epochs_80_")))
        return Planted((root,), table, plants.as_original(bench, "original"))

    return plant


def overwritten(table: Callable[[Bench], pd.DataFrame], parts: tuple[str, ...], traces: str = TRACES) -> Plant:
    """A tree of the original's own training and test, whose result files were overwritten by others."""

    def plant(bench: Bench, root: Path) -> Planted:
        sound, other = plants.as_original(bench, "original"), table(bench)
        write_tree(root, bench, "original", sound, parts=parts)
        place = results_path(upstream_settings(bench.trained("original")))
        place = root / "adaptive_bitrate_streaming" / "artifacts" / "results" / place
        shutil.rmtree(place)
        write_results(place, other, traces)
        return Planted((root,), other, sound)

    return plant


def two_runs(share: float) -> Callable[[Bench], pd.DataFrame]:
    """A weaker run overwrote some of the result files."""

    def table(bench: Bench) -> pd.DataFrame:
        ours, theirs = plants.as_original(bench, "original"), bench.play(Careless(BBA(), 0.1), clock="running")
        first = share * len(bench.traces())
        return pd.concat([theirs[theirs["trace_index"] < first], ours[ours["trace_index"] >= first]], ignore_index=True)

    return table


def mixed_with(other: Policy, share: float) -> Callable[[Bench], pd.DataFrame]:
    """The original's policy, but for a share of its decisions."""
    return lambda bench: bench.play(Blend(bench.trained("original").policy(), other, share), clock="running")


def late(chunks: int) -> Callable[[Bench], pd.DataFrame]:
    return lambda bench: bench.play(Late(bench.trained("original").policy(), chunks), clock="running")
