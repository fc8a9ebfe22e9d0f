"""Pools as Minari datasets: read by Minari itself, and back to the same pool."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from typer.testing import CliRunner

from llm_fixtures import toy_pool
from netllm_lib.abr import minari as minari_pool
from netllm_lib.abr.env import AbrEnv
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.minari import export_minari, import_minari
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.simple import Random
from netllm_lib.abr.pool import ExperiencePool, PoolError, generate_mix, generate_pool, load_pool
from netllm_lib.abr.traces import SAMPLE, Registry, split_validation
from netllm_lib.cli import pool as commands

REGISTRY = Registry(SAMPLE)
TRAINING, _ = split_validation(REGISTRY.trace_set("sample-train"), 0.2, 1)
VIDEO = REGISTRY.video("sample")
EPISODES = sound_episodes(TRAINING, seed=1, noise=True).rows(range(6))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Minari keeps its datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("NETLLM_DATA", str(SAMPLE))
    return tmp_path / "datasets"


@pytest.fixture(scope="module")
def pool() -> ExperiencePool:
    return generate_mix([(BBA(), EPISODES), (Random(), EPISODES)], TRAINING, VIDEO)


def test_there_and_back(pool: ExperiencePool, store: Path) -> None:
    folder = export_minari(pool, "abr/mix-v0", author="A. Researcher")
    assert folder == store / "abr" / "mix-v0"
    assert list(minari.list_local_datasets()) == ["abr/mix-v0"]
    dataset = minari.load_dataset("abr/mix-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (12, len(pool))
    for number, episode in enumerate(dataset.iterate_episodes()):
        rows = slice(number * 47, number * 47 + 47)
        np.testing.assert_array_equal(episode.observations[:-1], pool.states[rows])
        assert not episode.observations[-1].any()
        np.testing.assert_array_equal(episode.actions, pool.actions[rows])
        np.testing.assert_array_equal(episode.rewards, pool.rewards[rows])
        np.testing.assert_array_equal(episode.terminations, pool.dones[rows])
        assert not episode.truncations.any()
        assert all(observation in dataset.observation_space for observation in episode.observations)
    about = dataset.storage.metadata
    assert (about["algorithm_name"], about["author"]) == ("bba, random", {"A. Researcher"})
    assert dataset.recover_environment().unwrapped.noise
    again = import_minari("abr/mix-v0")
    assert (again.content_hash(), again.source) == (pool.content_hash(), pool.source)


def test_the_environment_comes_back_and_plays_what_the_pool_holds(pool: ExperiencePool) -> None:
    """Without noise, from the same trace and sample, the actions of an episode bring its states and rewards."""
    quiet = sound_episodes(TRAINING, seed=1).rows(range(2))
    export_minari(generate_pool(BBA(), TRAINING, VIDEO, quiet), "quiet-v0")
    dataset = minari.load_dataset("quiet-v0")
    made = dataset.recover_environment()
    assert isinstance(made.unwrapped, AbrEnv)
    assert not made.unwrapped.noise
    assert made.observation_space == dataset.observation_space
    for row, episode in enumerate(dataset.iterate_episodes()):
        start = {"trace": TRAINING.names[quiet.trace_index[row]], "start": int(quiet.start_ptr[row])}
        state, _ = made.reset(seed=0, options=start)
        for seen, action, reward in zip(episode.observations, episode.actions, episode.rewards, strict=False):
            np.testing.assert_array_equal(state, seen)
            state, brought, *_ = made.step(action)
            assert brought == reward
    # states that the environment of that name cannot bring
    export_minari(dataclasses.replace(pool, states=pool.states * 100), "other-v0")
    other = minari.load_dataset("other-v0")
    assert other.env_spec is None
    assert other[0].observations[5] in other.observation_space


def test_episodes_of_any_length_and_source() -> None:
    """A pool that says nothing of itself, with an episode of a single transition."""
    toy = toy_pool(3, length=20)
    ends = toy.dones | (np.arange(60) == 0) | (np.arange(60) == 33)
    odd = ExperiencePool(-toy.states, toy.actions, toy.rewards, ends)
    export_minari(odd, "odd-v3")
    assert import_minari("odd-v3").content_hash() == odd.content_hash()
    dataset = minari.load_dataset("odd-v3")
    assert dataset.env_spec is None
    assert [len(episode.actions) for episode in dataset] == [1, 19, 14, 6, 20]


def test_a_dataset_is_whole_or_not_there(pool: ExperiencePool, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = list(minari_pool._episodes(pool))

    def broken(_: ExperiencePool) -> Any:
        yield from episodes[:3]
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(minari_pool, "_episodes", broken)
        export_minari(pool, "abr/mix-v0")
    assert [path.name for path in (store / "abr").iterdir()] == ["namespace_metadata.json"]
    export_minari(pool, "abr/mix-v0")
    with pytest.raises(FileExistsError, match="count the version up"):
        export_minari(pool, "abr/mix-v0")
    with pytest.raises(ValueError, match="Malformed dataset ID"):
        export_minari(pool, "no version")


@pytest.mark.filterwarnings("ignore:.* None")
def test_datasets_that_others_recorded(pool: ExperiencePool) -> None:
    """An episode of `AbrEnv`, written by Minari's own functions; one without an end; one that was changed; another task's."""
    single = AbrEnv()
    spaces = {"observation_space": single.observation_space, "action_space": single.action_space}
    steps = [single.step(action) for action in [single.reset(seed=1)[1]["level"], *[3] * 46]]
    states = [np.zeros((6, 6), np.float32), *(step[0] for step in steps)]
    episode = {"observations": states, "actions": [0, *[3] * 46], "rewards": [step[1] for step in steps]}
    episode |= {"terminations": [step[2] for step in steps], "truncations": [step[3] for step in steps]}
    minari.create_dataset_from_buffers("own-v0", [EpisodeBuffer(**episode)], algorithm_name="threes", **spaces)
    assert import_minari("own-v0").source == {"minari": "own-v0", "policies": ["threes"]}
    open_end = EpisodeBuffer(**episode | {"terminations": [False] * 47})
    minari.create_dataset_from_buffers("open-v0", [open_end], **spaces)
    with pytest.raises(PoolError, match="open-v0: episode 0 does not end"):
        import_minari("open-v0")
    export_minari(pool, "changed-v0")
    minari.load_dataset("changed-v0").update_dataset_from_buffer([EpisodeBuffer(**episode)])
    with pytest.raises(PoolError, match="not those of the pool that was exported"):
        import_minari("changed-v0")
    two = gymnasium.spaces.Discrete(2)
    buffer = EpisodeBuffer(observations=[0, 1], actions=[1], rewards=[1.0], terminations=[True], truncations=[False])
    minari.create_dataset_from_buffers("other-v0", [buffer], observation_space=two, action_space=two)
    with pytest.raises(PoolError, match="other-v0: observations Discrete"):
        import_minari("other-v0")
    with pytest.raises(FileNotFoundError, match="missing-v0"):
        import_minari("missing-v0")


def test_without_minari_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ValueError, match=r"netllm-companion\[gym\]"):
        import_minari("x-v0")


def test_commands(pool: ExperiencePool, tmp_path: Path, store: Path) -> None:
    path, runner = str(pool.save(tmp_path / "pool")), CliRunner()
    shown = runner.invoke(commands.app, ["show", path], catch_exceptions=False)
    assert pool.describe() in shown.output
    for asked in (["show", path], ["export", path, "abr/mix-v0"], ["import", "abr/mix-v0", str(tmp_path / "back")]):
        done = runner.invoke(commands.app, [*asked, "--json"], catch_exceptions=False)
        assert json.loads(done.output.splitlines()[-1])["hash"] == pool.content_hash()
    assert load_pool(tmp_path / "back").content_hash() == pool.content_hash()
