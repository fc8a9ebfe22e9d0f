"""What planted faults are made of: synthetic data, small trainings, and runs as the notebooks and as the original leave them.

A two-layer random llama learns sound MPC from a pool within seconds on one thread, and then passes MPC as published. Trainings are
kept on disk, by their configuration, their pool and the code that made them.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

import llm_fixtures
from llm_fixtures import write_plm
from netllm_lib import plm as plm_module
from netllm_lib import runs
from netllm_lib import train as training
from netllm_lib.abr import batches as windows
from netllm_lib.abr import model, qoe, synthetic
from netllm_lib.abr.batches import WindowConfig
from netllm_lib.abr.episodes import Episodes, Observation, sound_episodes, upstream_episodes
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.catalogue import baselines
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import BandwidthModel, generate_traces, generate_video, write_traces, write_video
from netllm_lib.abr.traces import CHUNKS, POINTER_FILE, Registry, TraceSet, Video, overlapping
from netllm_lib.abr.upstream.checkpoints import save_upstream_checkpoint
from netllm_lib.abr.upstream.pickles import write_pool
from netllm_lib.abr.upstream.remake import remake_pool
from netllm_lib.checkpoint import CheckpointMeta, describe, save_checkpoint
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, preflight, train
from netllm_lib.training_run import RESULT
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
TRACES, VIDEO = "bench-test", "bench"
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

    name: str
    network: PolicyNetwork
    meta: CheckpointMeta
    config: TrainConfig
    windows: WindowConfig
    history: pd.DataFrame
    pool: str
    metrics: dict[str, Any]  # as notebook 04 writes them
    early: Path  # checkpoint after EARLY_STEP steps


# --- what can be trained on what ----------------------------------------------------------------------------------------

SOUND: dict[str, Any] = {"epochs": 4, "precision": "float32"}
ORIGINAL: dict[str, Any] = {"epochs": 3, "accumulation": 8, "seed": 1, "shuffle": "seed"}
FIXED = ORIGINAL | {
    "epochs": 4, "lr": 1e-3, "lr_around": 1e-2, "warmup_steps": 40, "schedule": "cosine", "clip": "step", "last_group": "mean",
}  # fmt: skip
"""The original's loop as somebody mended it: as it is, it takes minutes to learn here."""

WINDOWS = {field.name for field in dataclasses.fields(WindowConfig)}

TRAININGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: pool, changes of SOUND (of FIXED for those of the original, but its own warm-up is ORIGINAL), changes of the PLMConfig
    "healthy": ("mpc", {}, {}),
    "long-warmup": ("mpc", {"epochs": 2, "lr_around": 1e-3, "warmup_steps": 3000}, {}),
    "slow": ("mpc", {"epochs": 2, "lr": 2e-5, "lr_around": 2e-5}, {}),
    "fast": ("mpc", {"epochs": 2, "lr": 0.3, "lr_around": 0.3}, {}),
    "diverged": ("mpc", {"epochs": 3, "lr_around": 0.3, "lr": 0.1, "warmup": 1.0}, {}),
    "short": ("mpc", {"epochs": 1, "batch": 32}, {}),
    "on-random": ("random", {"epochs": 2}, {}),
    "on-constant": ("constant", {"epochs": 1}, {}),
    "on-careless-bba": ("careless-bba", {"epochs": 3}, {}),
    "on-noisy": ("noisy-mpc", {"epochs": 3}, {}),
    "on-tiny": ("tiny", {"epochs": 100}, {}),
    "on-shifted": ("shifted", {"epochs": 2}, {}),
    "on-later": ("later", {"epochs": 2}, {}),
    "on-one-less": ("one-less", {"epochs": 2}, {}),
    "on-in-bits": ("in-bits", {"epochs": 2}, {}),
    "on-bba": ("bba", {"epochs": 2}, {}),
    "slow-around": ("mpc", {"epochs": 2, "lr_around": 1e-5}, {}),
    "late-warmup": ("mpc", {"warmup_steps": 700}, {}),
    "on-shuffled": ("shuffled", {"epochs": 2}, {}),
    "on-fast": ("fast", {}, {}),
    "on-slow": ("slow", {}, {}),
    "on-heavy": ("heavy", {}, {}),
    "on-mixed": ("mixed", {"scale": 10.0}, {}),
    "whole-episodes": ("both", {"w": 47, "epochs": 8}, {}),
    "on-test": ("test", {}, {}),
    "original": ("mpc", {}, {}),
    "original-mixed": ("mixed", {"scale": 10.0, "windows": "episode"}, {}),
    "original-noisy": ("noisy-mpc", {"epochs": 3}, {}),
    "original-warmup": ("upstream-mpc", {}, {}),
}


def shifted(pool: ExperiencePool) -> ExperiencePool:
    """Each transition has the level of the one before it, as an index that is off by one gives it."""
    actions = np.roll(pool.actions, 1)
    actions[pool.episode_starts] = 0
    return replace(pool, actions=actions)


def later(pool: ExperiencePool) -> ExperiencePool:
    """Each transition has the level of the one after it."""
    actions = np.roll(pool.actions, -1)
    actions[np.flatnonzero(pool.dones)] = 0
    return replace(pool, actions=actions)


def one_less(pool: ExperiencePool) -> ExperiencePool:
    """Levels were counted from 1 when they were written, and from 0 when they were read."""
    return replace(pool, actions=(pool.actions - 1).clip(0))


def in_bits(pool: ExperiencePool) -> ExperiencePool:
    """Throughput in Mbit/s, where the simulator's states have MB/s."""
    states = pool.states.copy()
    states[:, 2] *= 8
    return replace(pool, states=states)


def shuffled(pool: ExperiencePool) -> ExperiencePool:
    return replace(pool, actions=np.random.default_rng(0).permutation(pool.actions))


def clipped(pool: ExperiencePool) -> ExperiencePool:
    """Without outliers, so that the return-to-go tells good episodes from bad ones."""
    return replace(pool, rewards=pool.rewards.clip(-5, None))


def with_outlier(pool: ExperiencePool) -> ExperiencePool:
    """One reward is beyond all others: the largest return is then far below that of the pool as it was."""
    rewards = pool.rewards.copy()
    rewards[100] = 200.0
    return replace(pool, rewards=rewards)


def first_episodes(pool: ExperiencePool, count: int) -> ExperiencePool:
    end = int(pool.episode_lengths[:count].sum())
    return ExperiencePool(pool.states[:end], pool.actions[:end], pool.rewards[:end], pool.dones[:end])


UPSTREAM_MPC: dict[str, Any] = {
    "train_traces": "bench-train", "train_video": VIDEO, "pool_models": ("mpc",), "pool_seed": 1, "pool_trace_num": 100,
    "pool_fixed": False,
}  # fmt: skip
OWN_POOL = UPSTREAM_MPC | {"pool_models": ("mine",)}  # a pool that nobody can make anew from its name


def write_pointers(folder: Path, traces: TraceSet) -> None:
    """Fixed starting points, as NetLLM's test set has them."""
    rng = np.random.default_rng(len(traces.name))
    (folder / POINTER_FILE).write_bytes(pickle.dumps([int(rng.integers(1, len(t.mbps))) for t in traces.traces]))


class Bench:
    """Data, PLM, pools, trainings and tests that the runs are made of."""

    def __init__(self, root: Path | None = None):
        code = [runs.file_hash(Path(module.__file__ or "")) for module in (synthetic, llm_fixtures)]
        key = runs.content_hash([HIDDEN, SLOW, FAST, code])
        self.root = root or runs.cache_root() / "planted" / key
        self.data, self.plm = self.root / "data", self.root / "downloaded_plms" / "llama" / "tiny"
        if not (self.root / "done").is_file():
            self._write()
            (self.root / "done").touch()
        self.registry = Registry(self.data)
        self.reused = False  # a training was done by an earlier process
        self._pools: dict[str, ExperiencePool] = {}
        self._trained: dict[str, Trained] = {}
        self._tables: dict[Any, pd.DataFrame] = {}

    def _write(self) -> None:
        sets = {"bench": BandwidthModel(), "slow": SLOW, "fast": FAST}
        tests: dict[str, TraceSet] = {}
        for number, (name, bandwidths) in enumerate(sets.items()):
            write_traces(generate_traces(f"{name}-train", 100, 20 + number, bandwidths), self.data, "train")
            test = generate_traces(f"{name}-test", 40, 30 + number, bandwidths)
            folder = write_traces(test, self.data, "test")
            write_pointers(folder, test)
            tests[name] = test
        pairs = zip(tests["fast"].traces[:20], tests["slow"].traces[:20], strict=True)
        turns = [replace(trace, name=f"turns_{i:02d}") for i, trace in enumerate(t for pair in pairs for t in pair)]
        write_pointers(
            write_traces(TraceSet("turns-test", tuple(turns)), self.data, "test"), TraceSet("turns-test", tuple(turns))
        )
        video = generate_video(VIDEO, 11)
        write_video(video, self.data)
        write_video(Video("heavy", (video.sizes_bytes * 1.7).astype(np.int64)), self.data)
        write_plm(self.plm, "llama", layers=2, hidden=HIDDEN)

    # --- pools and trainings

    def traces(self, name: str = TRACES) -> TraceSet:
        return self.registry.trace_set(name)

    def video(self, name: str = VIDEO) -> Video:
        return self.registry.video(name)

    def pool(self, name: str) -> ExperiencePool:
        """The pool `name`; the same every time."""
        if name not in self._pools:
            self._pools[name] = self._make_pool(name)
        return self._pools[name]

    def _make_pool(self, name: str) -> ExperiencePool:
        video = self.video("heavy" if name == "heavy" else VIDEO)
        mpc = RobustMPC(video)
        played = {
            "mpc": (mpc, 2), "heavy": (mpc, 2), "fast": (mpc, 2), "slow": (mpc, 2), "random": (Random(), 1),
            "constant": (Constant(2), 1), "careless-bba": (Careless(BBA(), 0.15), 2), "noisy-mpc": (Careless(mpc, 0.25), 2),
            "top": (Constant(qoe.LEVELS - 1), 1), "bba": (BBA(), 2), "test": (mpc, 4),
        }  # fmt: skip
        if name in played:
            traces = self.traces(f"{name}-train" if name in ("fast", "slow") else "bench-train")
            policy, repeats = played[name]
            if name == "test":
                traces = self.traces()
            episodes = sound_episodes(traces, repeats=repeats)
            return generate_pool(policy, traces, video, episodes.rows(range(50)) if name == "top" else episodes)
        made: dict[str, Callable[[], ExperiencePool]] = {
            "upstream-mpc": lambda: remake_pool(UPSTREAM_MPC, self.registry),
            "tiny": lambda: first_episodes(self.pool("mpc"), 4),
            "shifted": lambda: shifted(self.pool("mpc")),
            "shuffled": lambda: shuffled(self.pool("mpc")),
            "later": lambda: later(self.pool("mpc")),
            "one-less": lambda: one_less(self.pool("mpc")),
            "in-bits": lambda: in_bits(self.pool("mpc")),
            "mixed": lambda: clipped(concatenate([first_episodes(self.pool("mpc"), 150), self.pool("top")])),
            "both": lambda: concatenate([first_episodes(self.pool(name), 100) for name in ("fast", "slow")]),
        }
        return made[name]()

    def trained(self, name: str) -> Trained:
        """The training `name` of TRAININGS; done once, read back later."""
        if name not in self._trained:
            pool_name, changes, plm = TRAININGS[name]
            cut = {"w": W} | {key: value for key, value in changes.items() if key in WINDOWS}
            changes = {key: value for key, value in changes.items() if key not in WINDOWS}
            if name.startswith("original"):
                asked = ORIGINAL if name == "original-warmup" else FIXED | changes
                config, made = TrainConfig.upstream(**asked), WindowConfig.upstream(**cut)
            else:
                config, made = TrainConfig(**SOUND | changes), WindowConfig(**cut)
            self._trained[name] = self._train(name, pool_name, config, made, plm)
        return self._trained[name]

    def _train(
        self, name: str, pool_name: str, config: TrainConfig, made: WindowConfig, plm: Mapping[str, Any]
    ) -> Trained:
        pool = self.pool(pool_name)
        data = windows.make_windows(pool, made)
        plm_config = PLMConfig(str(self.plm.resolve()), rank=RANK, **plm)
        network = PolicyNetwork(load_plm(plm_config), NetworkConfig(state_feature_dim=FEATURE_DIM))
        code = [runs.file_hash(Path(module.__file__ or "")) for module in (training, model, plm_module, windows)]
        key = runs.content_hash([config, dict(plm), data.key, code])
        folder = self.root / "trainings" / f"{name}-{key}"
        early = folder.parent / f"{folder.name}-early"
        meta = describe(network, data.settings, {**runs.plain(config), "data": data.facts})
        flight = preflight(network, data, config)

        def keep(done: int, total: int, info: dict[str, Any]) -> None:
            if done == EARLY_STEP:
                save_checkpoint(early, network, replace(meta, step=done))

        self.reused |= (folder / RESULT).is_file()
        result = train(network, data, config, folder=folder, settings=data.settings, progress=keep)
        metrics = {
            "steps": flight.steps, "warmup_steps": flight.warmup_steps, "lr": flight.lr, "lr_peak": flight.lr_peak,
            "windows": flight.samples, "crossing": flight.crossing, "final_loss": result.final_loss,
            "pool_hash": pool.content_hash(),
        }  # fmt: skip
        meta = replace(meta, step=flight.steps)
        return Trained(name, network.eval(), meta, config, made, result.history, pool_name, metrics, early)

    # --- tests

    def episodes(self, traces: str = TRACES, clock: Literal["running", "episode"] = "episode") -> Episodes:
        return upstream_episodes(self.traces(traces), trace_num=-1, seed=TEST_SEED, clock=clock)

    def play(self, policy: Policy, traces: str = TRACES, video: str = VIDEO, **how: Any) -> pd.DataFrame:
        """The table of chunks of any policy over a whole test set."""
        return play(policy, Simulator(self.traces(traces), self.video(video), self.episodes(traces, **how)))

    def test(
        self, training: str, config: EvalConfig | None = None, traces: str = TRACES, video: str = VIDEO, **how: Any
    ) -> pd.DataFrame:
        """The table of chunks of a training's policy; the same test is played once."""
        key = (training, config, traces, video, tuple(how.items()))
        if key not in self._tables:
            trained = self.trained(training)
            policy = LLMPolicy(trained.network, trained.meta, config or EvalConfig())
            self._tables[key] = self.play(policy, traces, video, **how)
        return self._tables[key]

    @functools.cache  # noqa: B019 - one bench lives as long as its process
    def baselines(self, traces: str = TRACES, video: str = VIDEO) -> dict[str, pd.DataFrame]:
        return {
            name: self.play(policy, traces, video)
            for name, policy in baselines(self.video(video), self.registry).items()
        }


# --- runs as the notebooks leave them -----------------------------------------------------------------------------------


def write_pool_run(folder: Path, bench: Bench, name: str, traces: str = "bench-train", video: str = VIDEO) -> Path:
    """As notebook 03."""
    bench.pool(name).save(folder / "pool")
    runs.write_json(folder / "split.json", {"traces": traces, "video": video, "train": [], "validation": []})
    runs.write_json(folder / "metrics.json", {"hash": bench.pool(name).content_hash()})
    return folder


def write_training_run(
    folder: Path,
    trained: Trained,
    pool_run: Path | None,
    policy: Path | tuple[PolicyNetwork, CheckpointMeta] | None = None,
) -> Path:
    """As notebook 04; `policy` in place of the weights that it ended with."""
    if isinstance(policy, Path):
        shutil.copytree(policy, folder / "policy")
    else:
        save_checkpoint(folder / "policy", *(policy or (trained.network, trained.meta)))
    runs.write_json(folder / "metrics.json", trained.metrics)
    runs.write_json(folder / "config.json", {"parameters": {} if pool_run is None else {"pool_dir": str(pool_run)}})
    (folder / "training" / "one").mkdir(parents=True)
    trained.history.to_parquet(folder / "training" / "one" / "history.parquet")
    return folder


def write_test_run(
    folder: Path,
    bench: Bench,
    table: pd.DataFrame,
    config: EvalConfig | None = None,
    policy: Path | None = None,
    traces: str = TRACES,
    video: str = VIDEO,
    others: Mapping[str, pd.DataFrame] | None = None,
    train_traces: str = "bench-train",
) -> Path:
    """As notebook 05."""
    tables = {"llm": table} | dict(bench.baselines(traces, video) if others is None else others)
    for name, played in tables.items():
        with runs.atomic_path(folder / "tables" / f"{name}.parquet") as aside:
            played.to_parquet(aside)
    clean = ~overlapping(bench.traces(traces), bench.traces(train_traces))
    setting = {"traces": traces, "video": video, "clean": clean, "order": list(tables), "seed": TEST_SEED}
    if policy is not None:
        setting |= runs.plain(config or EvalConfig()) | {"policy": str(policy)}
    runs.write_json(folder / "setting.json", setting)
    runs.write_json(folder / "metrics.json", {})
    return folder


def write_runs(
    root: Path,
    bench: Bench,
    training: str,
    table: pd.DataFrame,
    config: EvalConfig | None = None,
    policy: Path | tuple[PolicyNetwork, CheckpointMeta] | None = None,
    traces: str = TRACES,
    video: str = VIDEO,
    pool_traces: str = "bench-train",
    pool_video: str = VIDEO,
) -> tuple[Path, ...]:
    """A whole chain of runs 03, 04, 05; the test's folder, which names the others."""
    trained = bench.trained(training)
    pool_run = write_pool_run(root / "03", bench, trained.pool, pool_traces, pool_video)
    training_run = write_training_run(root / "04", trained, pool_run, policy)
    return (write_test_run(root / "05", bench, table, config, training_run, traces, video, None, pool_traces),)


# --- runs as the original leaves them -----------------------------------------------------------------------------------

ALL_PARTS = ("console", "losses", "weights", "results", "pool", "plm")


def upstream_settings(trained: Trained, **changes: Any) -> dict[str, Any]:
    """The settings of a tree of the original, in the keys of `upstream_logs.settings_of`."""
    config = trained.config
    pool = UPSTREAM_MPC if trained.pool == "upstream-mpc" else OWN_POOL
    settings: dict[str, Any] = pool | {
        "plm_type": "llama", "plm_size": "tiny", "rank": RANK,
        "sample_step": trained.windows.stride, "w": trained.windows.w, "gamma": trained.windows.gamma,
        "state_feature_dim": FEATURE_DIM, "lr": config.lr, "weight_decay": config.weight_decay,
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
    pool: ExperiencePool | None = None,
    parts: tuple[str, ...] = ALL_PARTS,
    terminal: bool = True,
    **changes: Any,
) -> Path:
    """A tree of the original; `table` is its test, `network` the weights in it, `terminal` whether its log has the arguments."""
    trained = bench.trained(training)
    settings = upstream_settings(trained, **changes)
    base = root / "adaptive_bitrate_streaming"
    run = base / "data" / "ft_plms" / model_path(settings)
    values = trained.history["loss"].to_numpy() if losses is None else losses
    by_epoch = values.reshape(settings["epochs"], -1)
    if "console" in parts:
        mean = None if table is None else qoe.summarise(table).reward
        arguments = arguments_line(settings, "exp_pool.pkl")
        arguments = arguments.replace("grad_accum_steps=32", f"grad_accum_steps={trained.config.accumulation}")
        arguments = arguments.replace("scale=1000,", f"scale={trained.windows.scale:g},")
        run.mkdir(parents=True, exist_ok=True)
        text = console_text(settings, by_epoch, mean)
        (run / "early_stop_-1_console.log").write_text(arguments + text if terminal else text)
    if "losses" in parts:
        write_train_losses(run / "early_stop_-1_checkpoint" / "train_losses.txt", values)
    if "weights" in parts:
        save_upstream_checkpoint(run / "early_stop_-1_best_model", network or trained.network)
    if "results" in parts and table is not None:
        write_results(base / "artifacts" / "results" / results_path(settings), table, settings["test_traces"])
    if "pool" in parts:
        write_pool(pool or bench.pool(trained.pool), base / "artifacts" / "exp_pools" / pool_path(settings))
    if "plm" in parts:
        shutil.copytree(bench.plm, root / "downloaded_plms" / "llama" / "tiny")
    return root
