"""What planted faults are made of: synthetic data, small trainings, and runs as the notebooks and as the original leave them.

A two-layer random llama learns sound MPC from a pool within seconds on one thread, and then passes MPC as published. Trainings are
kept on disk, by their configuration, their pool and the code that made them.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llm_fixtures
from llm_fixtures import write_plm
from netllm_lib import plm, runs, train
from netllm_lib.abr import batches, model, qoe, synthetic
from netllm_lib.abr.batches import WindowConfig
from netllm_lib.abr.episodes import Episodes, Observation, sound_episodes, upstream_episodes
from netllm_lib.abr.evaluate import Test, baselines
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import BandwidthModel, generate_traces, generate_video, write_traces, write_video
from netllm_lib.abr.traces import POINTER_FILE, Registry, TraceSet, Video, overlapping
from netllm_lib.abr.upstream.checkpoints import save_upstream_checkpoint
from netllm_lib.abr.upstream.pickles import write_pool
from netllm_lib.abr.upstream.remake import remake_pool
from netllm_lib.checkpoint import CheckpointMeta, describe, save_checkpoint
from netllm_lib.parameters import notebook_run
from netllm_lib.plm import PLMConfig
from netllm_lib.train import TrainConfig
from netllm_lib.training_run import RESULT, TrainingRun
from upstream_tree import (
    arguments_line,
    console_text,
    model_path,
    pool_name,
    pool_path,
    results_path,
    write_results,
    write_train_losses,
)

W, HIDDEN, RANK, FEATURE_DIM = 10, 96, 16, 64
TRACES, TRAIN, VIDEO = "bench-test", "bench-train", "bench"
TEST_SEED = 1
EARLY_STEP = 25  # of a checkpoint that is saved along the way

SLOW = BandwidthModel(median_mbps=0.5, spread=0.25)
FAST = BandwidthModel(median_mbps=3.2, spread=0.25)


class Careless(Policy):
    """Another policy, but for a share of its decisions, which are random."""

    def __init__(self, inner: Policy, share: float, lowest: int = 0):
        self.inner, self.share, self.lowest, self.name = inner, share, lowest, f"careless-{inner.name}"

    def reset(self, episodes: Episodes) -> None:
        self.inner.reset(episodes)
        rng = np.random.default_rng([episodes.seed, 5])
        self.slips = rng.random((len(episodes), CHUNKS)) < self.share
        self.levels = rng.integers(self.lowest, qoe.LEVELS, (len(episodes), CHUNKS))

    def act(self, observation: Observation) -> np.ndarray:
        rows, chunk = observation.episode, observation.chunk - 1
        levels = np.where(self.slips[rows, chunk], self.levels[rows, chunk], self.inner.act(observation))
        self.inner.played(levels)
        return levels


@dataclass(frozen=True)
class Trained:
    """A training that was done."""

    network: PolicyNetwork
    meta: CheckpointMeta
    config: TrainConfig
    windows: WindowConfig
    run: TrainingRun
    pool: str
    early: Path  # checkpoint after EARLY_STEP steps

    def policy(self, config: EvalConfig | None = None) -> LLMPolicy:
        return LLMPolicy(self.network, self.meta, config or EvalConfig())


# --- what can be trained on what ----------------------------------------------------------------------------------------

SOUND: dict[str, Any] = {"w": W, "epochs": 4, "precision": "float32"}
ORIGINAL: dict[str, Any] = {"w": W, "epochs": 3, "accumulation": 8, "seed": 1, "shuffle": "seed"}
FIXED = ORIGINAL | {
    "epochs": 4, "lr": 1e-3, "lr_around": 1e-2, "warmup_steps": 40, "schedule": "cosine", "clip": "step", "last_group": "mean",
}  # fmt: skip
"""The original's loop as somebody mended it: as it is, it takes minutes to learn here."""
WINDOWS = {field.name for field in dataclasses.fields(WindowConfig)}

TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: pool, changes of SOUND (of FIXED for those of the original, but its own warm-up is ORIGINAL)
    "healthy": ("mpc", {}),
    "long-warmup": ("mpc", {"epochs": 2, "lr_around": 1e-3, "warmup_steps": 3000}),
    "slow": ("mpc", {"epochs": 2, "lr": 2e-5, "lr_around": 2e-5}),
    "fast": ("mpc", {"epochs": 2, "lr": 0.3, "lr_around": 0.3}),
    "diverged": ("mpc", {"epochs": 3, "lr_around": 0.3, "lr": 0.1, "warmup": 1.0}),
    "short": ("mpc", {"epochs": 1, "batch": 32}),
    "slow-around": ("mpc", {"epochs": 2, "lr_around": 1e-5}),
    "late-warmup": ("mpc", {"warmup_steps": 700}),
    "on-random": ("random", {"epochs": 2}),
    "on-constant": ("constant", {"epochs": 1}),
    "on-careless-bba": ("careless-bba", {"epochs": 3}),
    "on-noisy": ("noisy-mpc", {"epochs": 3}),
    "on-tiny": ("tiny", {"epochs": 100}),
    "on-shifted": ("shifted", {"epochs": 2}),
    "on-later": ("later", {"epochs": 2}),
    "on-one-less": ("one-less", {"epochs": 2}),
    "on-in-bits": ("in-bits", {"epochs": 2}),
    "on-bba": ("bba", {"epochs": 2}),
    "on-shuffled": ("shuffled", {"epochs": 2}),
    "on-fast": ("fast", {}),
    "on-slow": ("slow", {}),
    "on-heavy": ("heavy", {}),
    "on-mixed": ("mixed", {"scale": 10.0}),
    "whole-episodes": ("both", {"w": 47, "epochs": 8}),
    "on-test": ("test", {}),
    "original": ("mpc", {}),
    "original-mixed": ("mixed", {"scale": 10.0, "windows": "episode"}),
    "original-noisy": ("noisy-mpc", {"epochs": 3}),
    "original-warmup": ("upstream-mpc", {}),
}

UPSTREAM_MPC: dict[str, Any] = {
    "train_traces": TRAIN, "train_video": VIDEO, "pool_models": ("mpc",), "pool_seed": 1, "pool_trace_num": 100,
    "pool_fixed": False,
}  # fmt: skip
OWN_POOL = UPSTREAM_MPC | {"pool_models": ("mine",)}  # a pool that nobody can make anew from its name


def first_episodes(pool: ExperiencePool, count: int) -> ExperiencePool:
    end = int(pool.episode_lengths[:count].sum())
    return ExperiencePool(pool.states[:end], pool.actions[:end], pool.rewards[:end], pool.dones[:end], pool.source)


def moved(pool: ExperiencePool, by: int) -> ExperiencePool:
    """Each transition has the level of the one `by` before it, as an index that is off by one gives it."""
    actions = np.roll(pool.actions, by)
    actions[pool.episode_starts if by > 0 else np.flatnonzero(pool.dones)] = 0
    return replace(pool, actions=actions)


def with_outlier(pool: ExperiencePool) -> ExperiencePool:
    """One reward is beyond all others: the largest return is then far below that of the pool as it was."""
    rewards = pool.rewards.copy()
    rewards[100] = 200.0
    return replace(pool, rewards=rewards)


class Bench:
    """Data, PLM, pools, trainings and tests that the runs are made of."""

    def __init__(self) -> None:
        self.code = {
            m: runs.file_hash(Path(m.__file__ or "")) for m in (synthetic, llm_fixtures, train, model, plm, batches)
        }
        key = runs.content_hash([HIDDEN, SLOW, FAST, self.code[synthetic], self.code[llm_fixtures]])
        self.root = runs.cache_root() / "planted" / key
        self.data, self.plm = self.root / "data", self.root / "downloaded_plms" / "llama" / "tiny"
        if not (self.root / "done").is_file():
            self._write()
            (self.root / "done").touch()
        self.registry = Registry(self.data)
        self.reused = False  # a training was done by an earlier process

    def _write(self) -> None:
        tests: dict[str, TraceSet] = {}
        for number, (name, bandwidths) in enumerate({"bench": BandwidthModel(), "slow": SLOW, "fast": FAST}.items()):
            write_traces(generate_traces(f"{name}-train", 100, 20 + number, bandwidths), self.data, "train")
            tests[name] = generate_traces(f"{name}-test", 40, 30 + number, bandwidths)
        pairs = zip(tests["fast"].traces[:20], tests["slow"].traces[:20], strict=True)
        turns = [replace(trace, name=f"turns_{i:02d}") for i, trace in enumerate(t for pair in pairs for t in pair)]
        for test in (*tests.values(), TraceSet("turns-test", tuple(turns))):
            rng = np.random.default_rng(len(test.name))  # fixed starting points, as NetLLM's test set has them
            pointers = pickle.dumps([int(rng.integers(1, len(t.mbps))) for t in test.traces])
            (write_traces(test, self.data, "test") / POINTER_FILE).write_bytes(pointers)
        video = generate_video(VIDEO, 11)
        write_video(video, self.data)
        write_video(Video("heavy", (video.sizes_bytes * 1.7).astype(np.int64)), self.data)
        write_plm(self.plm, "llama", layers=2, hidden=HIDDEN)

    def traces(self, name: str = TRACES) -> TraceSet:
        return self.registry.trace_set(name)

    def video(self, name: str = VIDEO) -> Video:
        return self.registry.video(name)

    # --- pools and trainings

    @functools.cache  # noqa: B019 - one bench lives as long as its process
    def pool(self, name: str) -> ExperiencePool:
        """The pool `name`; the same every time."""
        video = self.video("heavy" if name == "heavy" else VIDEO)
        mpc = RobustMPC(video)
        played = {
            "mpc": (mpc, 2), "heavy": (mpc, 2), "fast": (mpc, 2), "slow": (mpc, 2), "random": (Random(), 1),
            "constant": (Constant(2), 1), "careless-bba": (Careless(BBA(), 0.15), 2), "noisy-mpc": (Careless(mpc, 0.25), 2),
            "top": (Constant(qoe.LEVELS - 1), 1), "bba": (BBA(), 2), "test": (mpc, 4),
        }  # fmt: skip
        if name in played:
            own = {"fast": "fast-train", "slow": "slow-train", "test": TRACES}
            traces, (policy, repeats) = self.traces(own.get(name, TRAIN)), played[name]
            episodes = sound_episodes(traces, repeats=repeats)
            return generate_pool(policy, traces, video, episodes.rows(range(50)) if name == "top" else episodes)
        made: dict[str, Callable[[ExperiencePool], ExperiencePool]] = {
            "upstream-mpc": lambda pool: remake_pool(UPSTREAM_MPC, self.registry),
            "tiny": lambda pool: first_episodes(pool, 4),
            "shifted": lambda pool: moved(pool, 1),
            "later": lambda pool: moved(pool, -1),
            "shuffled": lambda pool: replace(pool, actions=np.random.default_rng(0).permutation(pool.actions)),
            "one-less": lambda pool: replace(pool, actions=(pool.actions - 1).clip(0)),  # counted from 1, read from 0
            "in-bits": lambda pool: replace(
                pool, states=pool.states * np.where(np.arange(6) == 2, 8, 1)[:, None].astype(np.float32)
            ),
            "mixed": lambda pool: concatenate([first_episodes(pool, 150), self.pool("top")]),
            "both": lambda pool: concatenate([first_episodes(self.pool(part), 100) for part in ("fast", "slow")]),
        }
        pool = made[name](self.pool("mpc"))
        # without outliers the return-to-go tells good episodes from bad ones
        return replace(pool, rewards=pool.rewards.clip(-5, None)) if name == "mixed" else pool

    @functools.cache  # noqa: B019
    def trained(self, name: str) -> Trained:
        """The training `name` of TRAININGS; done once, read back later."""
        pool, changes = TRAININGS[name]
        original = name.startswith("original")
        asked = (ORIGINAL if name == "original-warmup" else FIXED if original else SOUND) | changes
        kinds = (TrainConfig.upstream, WindowConfig.upstream) if original else (TrainConfig, WindowConfig)
        config = kinds[0](**{key: value for key, value in asked.items() if key not in WINDOWS})
        windows = kinds[1](**{key: value for key, value in asked.items() if key in WINDOWS})
        data = batches.make_windows(self.pool(pool), windows)
        network = PolicyNetwork(plm.load_plm(PLMConfig(str(self.plm.resolve()), rank=RANK)), NetworkConfig(FEATURE_DIM))
        code = [self.code[module] for module in (train, model, plm, batches)]
        folder = self.root / "trainings" / f"{name}-{runs.content_hash([config, data.key, code])}"
        early = folder.parent / f"{folder.name}-early"
        meta = describe(network, data.settings, {**runs.plain(config), "data": data.facts})

        def keep(done: int, total: int, info: dict[str, Any]) -> None:
            if done == EARLY_STEP:
                save_checkpoint(early, network, replace(meta, step=done))

        self.reused |= (folder / RESULT).is_file()
        run = train.train(network, data, config, folder=folder, settings=data.settings, progress=keep)
        return Trained(network.eval(), replace(meta, step=run.steps), config, windows, run, pool, early)

    # --- tests

    def episodes(self, traces: str = TRACES, **how: Any) -> Episodes:
        return upstream_episodes(self.traces(traces), trace_num=-1, seed=TEST_SEED, **{"clock": "episode"} | how)

    def play(self, policy: Policy, traces: str = TRACES, video: str = VIDEO, **how: Any) -> pd.DataFrame:
        """The table of chunks of any policy over a whole test set."""
        return play(policy, Simulator(self.traces(traces), self.video(video), self.episodes(traces, **how)))

    @functools.cache  # noqa: B019
    def test(
        self, training: str, config: EvalConfig | None = None, traces: str = TRACES, video: str = VIDEO, **how: Any
    ) -> pd.DataFrame:
        """The table of chunks of a training's policy."""
        return self.play(self.trained(training).policy(config), traces, video, **how)

    @functools.cache  # noqa: B019
    def baselines(self, traces: str = TRACES, video: str = VIDEO) -> dict[str, pd.DataFrame]:
        players = baselines(self.video(video), self.registry)
        return {name: self.play(policy, traces, video) for name, policy in players.items()}


# --- runs as the notebooks leave them -----------------------------------------------------------------------------------


def write_test_run(
    folder: Path,
    bench: Bench,
    table: pd.DataFrame,
    config: EvalConfig | None = None,
    training: Path | None = None,
    traces: str = TRACES,
    video: str = VIDEO,
    train_traces: str = TRAIN,
) -> Path:
    """As notebook 05."""
    clean = ~overlapping(bench.traces(traces), bench.traces(train_traces))
    setting = {"traces": traces, "video": video, "clean": clean, "seed": TEST_SEED, "train_traces": train_traces}
    setting |= {} if training is None else runs.plain(config or EvalConfig())
    run = notebook_run(str(folder), "05_test", training=training)
    Test({"llm": table} | bench.baselines(traces, video), "llm", setting).save(folder)
    run.finish({})
    return folder


def write_runs(
    root: Path,
    bench: Bench,
    training: str,
    table: pd.DataFrame,
    config: EvalConfig | None = None,
    policy: tuple[PolicyNetwork, CheckpointMeta] | None = None,
    pool_traces: str = TRAIN,
    **tested: str,
) -> tuple[Path, ...]:
    """A whole chain of runs 03, 04, 05, with `policy` in place of the weights that the training ended with; the test's folder,
    which names the others."""
    trained = bench.trained(training)
    pool_run = notebook_run(str(root / "03"), "03_experience_pool")
    bench.pool(trained.pool).save(root / "03" / "pool")
    pool_run.finish({})
    training_run = notebook_run(str(root / "04"), "04_finetune", pool=root / "03")
    save_checkpoint(root / "04" / "policy", *(policy or (trained.network, trained.meta)))
    trained.run.save(root / "04")
    training_run.finish({})
    return (write_test_run(root / "05", bench, table, config, root / "04", train_traces=pool_traces, **tested),)


# --- runs as the original leaves them -----------------------------------------------------------------------------------

ALL_PARTS = ("console", "losses", "weights", "results", "pool", "plm")


def upstream_settings(trained: Trained, **changes: Any) -> dict[str, Any]:
    """The settings of a tree of the original, in the keys of `names.settings_of`."""
    config, windows = trained.config, trained.windows
    settings: dict[str, Any] = (UPSTREAM_MPC if trained.pool == "upstream-mpc" else OWN_POOL) | {
        "plm_type": "llama", "plm_size": "tiny", "rank": RANK, "sample_step": windows.stride, "w": windows.w,
        "gamma": windows.gamma, "state_feature_dim": FEATURE_DIM, "lr": config.lr, "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup_steps, "epochs": config.epochs, "seed": config.seed, "early_stop": -1,
        "test_traces": TRACES, "test_video": VIDEO, "test_trace_num": 40, "test_fixed": True, "test_seed": TEST_SEED,
        "target_return_scale": 1.0,
    }  # fmt: skip
    settings |= changes
    return settings | {"pool": pool_name(settings)}


def write_tree(
    root: Path,
    bench: Bench,
    training: str,
    table: pd.DataFrame | None,
    network: PolicyNetwork | None = None,
    losses: np.ndarray | None = None,
    parts: tuple[str, ...] = ALL_PARTS,
    terminal: bool = True,
    **changes: Any,
) -> Path:
    """A tree of the original; `table` is its test, `network` the weights in it, `terminal` whether its log has the arguments."""
    trained = bench.trained(training)
    settings = upstream_settings(trained, **changes)
    base = root / "adaptive_bitrate_streaming"
    run = base / "data" / "ft_plms" / model_path(settings)
    values = trained.run.losses if losses is None else losses
    assert values is not None
    if "console" in parts:
        mean = None if table is None else qoe.summarise(table).reward
        arguments = arguments_line(settings, "exp_pool.pkl")
        arguments = arguments.replace("grad_accum_steps=32", f"grad_accum_steps={trained.config.accumulation}")
        arguments = arguments.replace("scale=1000,", f"scale={trained.windows.scale:g},")
        run.mkdir(parents=True, exist_ok=True)
        text = console_text(settings, values.reshape(settings["epochs"], -1), mean)
        (run / "early_stop_-1_console.log").write_text(arguments + text if terminal else text)
    if "losses" in parts:
        write_train_losses(run / "early_stop_-1_checkpoint" / "train_losses.txt", values)
    if "weights" in parts:
        save_upstream_checkpoint(run / "early_stop_-1_best_model", network or trained.network)
    if "results" in parts and table is not None:
        write_results(base / "artifacts" / "results" / results_path(settings), table, settings["test_traces"])
    if "pool" in parts:
        write_pool(bench.pool(trained.pool), base / "artifacts" / "exp_pools" / pool_path(settings))
    if "plm" in parts:
        shutil.copytree(bench.plm, root / "downloaded_plms" / "llama" / "tiny")
    return root
