"""The gymnasium environments: gymnasium's own checks, and equality with `play` and with each other to the last bit."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from netllm_lib.abr import env
from netllm_lib.abr.env import AbrEnv, AbrVectorEnv
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.simple import Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import SAMPLE, Trace, TraceSet
from netllm_lib.runs import PROJECT

TRACES, VIDEO = generate_traces("t", 7, 5), generate_video("v", 2)


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 6, shape)


@pytest.mark.parametrize("noise", [False, True])
def test_gymnasium_finds_no_fault(noise: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gymnasium.make(env.ENV_ID, data=str(SAMPLE), noise=noise)
        check_env(made.unwrapped)


def test_made_by_name_with_strings_only() -> None:
    single = gymnasium.make("netllm_lib.abr.env:netllm/Abr-v0", data=str(SAMPLE), traces="sample-test", video="sample")
    assert isinstance(single.unwrapped, AbrEnv)
    assert single.unwrapped.traces.name == "sample-test"
    assert single.spec is not None
    assert gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(single.spec.to_json())).spec is not None
    many = gymnasium.make_vec(env.ENV_ID, num_envs=3, vectorization_mode="vector_entry_point", data=str(SAMPLE))
    assert isinstance(many, AbrVectorEnv)
    assert many.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert "autoreset_mode" not in AbrEnv.metadata
    assert many.reset(seed=0)[0] in many.observation_space


def test_an_episode_is_what_play_plays() -> None:
    """States, rewards and what info holds, from the same starts, against the one loop."""
    episodes = sound_episodes(TRACES, seed=3).rows(range(3))
    chosen = levels(len(episodes), CHUNKS)
    played = rollout(Replay(chosen), Simulator(TRACES, VIDEO, episodes))
    single = AbrEnv(TRACES, VIDEO)
    for row, (index, start) in enumerate(zip(episodes.trace_index, episodes.start_ptr, strict=True)):
        state, info = single.reset(seed=1, options={"trace": TRACES.names[index], "start": int(start)})
        assert (info["trace"], info["start"], info["level"], info["chunk"]) == (TRACES.names[index], start, 0, 0)
        for chunk in range(1, CHUNKS):
            np.testing.assert_array_equal(state, played.states[row, chunk - 1])
            state, reward, terminated, truncated, info = single.step(chosen[row, chunk])
            assert (reward, terminated, truncated) == (played.reward[row, chunk], chunk == CHUNKS - 1, False)
            assert all(info[name] == getattr(played, name)[row, chunk] for name in env.INFO)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_vector_form_is_as_many_single_ones(mode: AutoresetMode, noise: bool) -> None:
    """Every array of three episodes, infos and masks included, against gymnasium's loop over single environments."""
    count = 4
    loop = SyncVectorEnv([lambda: AbrEnv(TRACES, VIDEO, noise=noise)] * count, autoreset_mode=mode)
    compiled = AbrVectorEnv(count, TRACES, VIDEO, noise=noise, autoreset_mode=mode)
    for space in ("single_observation_space", "observation_space", "action_space"):
        assert getattr(compiled, space) == getattr(loop, space)
    assert_same(compiled.reset(seed=11), loop.reset(seed=11))
    ends, handed_out = 0, []
    for actions in levels(2 * CHUNKS + 5, count, seed=1):
        mine, theirs = compiled.step(actions), loop.step(actions)
        assert_same(mine, theirs)
        handed_out += [(array, array.copy()) for array in mine[:2]]
        ends += bool(mine[2].all())
        if mine[2].all() and mode is AutoresetMode.DISABLED:
            with pytest.raises(gymnasium.error.ResetNeeded):
                compiled.step(actions)
            everyone = {"reset_mask": np.ones(count, dtype=bool)}
            assert_same(compiled.reset(options=dict(everyone)), loop.reset(options=everyone))
    assert ends == 2
    for array, before in handed_out:  # what was handed out stays as it was
        np.testing.assert_array_equal(array, before)
    assert_same(compiled.reset(seed=[5, 6, 7, 8]), loop.reset(seed=[5, 6, 7, 8]))


def assert_same(mine: Any, theirs: Any) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = tuple(mine.values()), tuple(theirs[key] for key in mine)
    if isinstance(mine, tuple):
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)
    else:
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(np.stack(mine), np.stack(theirs))


def test_bounds_hold_on_hard_traces() -> None:
    """Long stretches without bandwidth, irregular samples, a late first sample, and far too much bandwidth."""
    rng = np.random.default_rng(4)
    hard = [
        Trace("outage", np.arange(60.0), np.where(np.arange(60) == 30, 0.8, 0.0)),
        Trace("late", 40 + np.cumsum(rng.uniform(0.1, 9, 50)), rng.uniform(0, 0.3, 50)),
        Trace("fast", np.arange(40.0), np.full(40, 5000.0)),
        Trace("two", np.array([0.0, 3.0]), np.array([1.0, 0.05])),
    ]
    many = AbrVectorEnv(64, TraceSet("hard", tuple(hard)), VIDEO, noise=True, autoreset_mode=AutoresetMode.SAME_STEP)
    state, _ = many.reset(seed=1)
    reached = state.max(axis=0)
    for actions in levels(6 * CHUNKS, 64):
        state, _, ended, _, info = many.step(actions)
        assert state in many.observation_space
        if ended[0]:
            assert np.stack(info["final_obs"]) in many.observation_space
        reached = np.maximum(reached, state.max(axis=0))
    high = many.single_observation_space.high  # type: ignore[attr-defined]
    assert (reached[:3] > 0.9 * high[:3]).any(axis=1).all()
    assert reached[3].max() > 0.2 * high[3].max()


def test_seeds_fix_traces_and_starts() -> None:
    def starts(seed: int | None) -> list[tuple[str, int]]:
        infos = [single.reset(seed=seed)[1]] + [single.reset()[1] for _ in range(60)]
        return [(info["trace"], info["start"]) for info in infos]

    single = AbrEnv(TRACES, VIDEO)
    first = starts(1)
    assert starts(1) == first != starts(2)
    assert {name for name, _ in first} == set(TRACES.names)
    assert starts(None) != starts(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "x"}, "'x'.* not in t"),
        ({"start": 0}, "start 0 is outside 1..219"),
        ({"start": 220}, "outside"),
        ({"tracee": "x"}, "unknown reset options"),
    ],
)
def test_what_is_asked_of_reset(options: dict[str, Any], message: str) -> None:
    many = AbrVectorEnv(3, TRACES, VIDEO)
    _, info = many.reset(seed=0, options={"trace": TRACES.names[:3], "start": [5, 6, 7]})
    assert (info["trace"].tolist(), info["start"].tolist()) == (TRACES.names[:3], [5, 6, 7])
    assert many.reset(options={"trace": "t_002"})[1]["trace"].tolist() == ["t_002"] * 3
    for made in (many, AbrEnv(TRACES, VIDEO)):
        with pytest.raises(ValueError, match=message):
            made.reset(options=options)
    for asked in ({"seed": [1, 2]}, {"options": {"start": [1, 2]}}, {"options": {"reset_mask": np.arange(3) > 0}}):
        with pytest.raises(ValueError, match="lock-step|broadcast"):
            many.reset(**asked)


def test_steps_out_of_turn_and_levels_that_are_none() -> None:
    pairs: list[tuple[Any, Any]] = [
        (AbrEnv(TRACES, VIDEO), np.int64(0)),
        (AbrVectorEnv(2, TRACES, VIDEO), np.zeros(2, np.int64)),
    ]
    for made, level in pairs:
        with pytest.raises(gymnasium.error.ResetNeeded):
            made.step(level)
        made.reset(seed=0)
        for wrong in (level + 6, level - 1):
            with pytest.raises(ValueError, match=r"integers 0\.\.5"):
                made.step(wrong)


def test_without_gymnasium_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['gymnasium'] = None; import netllm_lib.abr.env"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'netllm-companion[gym]'")


def test_optional_packages_are_imported_only_where_they_are_used() -> None:
    """At import time only the environments need gymnasium; nothing needs the others."""
    found = set()
    for path in (PROJECT / "netllm_lib").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for part in ast.walk(node) if isinstance(node, ast.Try) else [node]:
                names = [part.module or ""] if isinstance(part, ast.ImportFrom) else []
                names += [alias.name for alias in part.names] if isinstance(part, ast.Import) else []
                packages = {name.split(".")[0] for name in names}
                found |= {(path.name, name) for name in packages & {"gymnasium", "mlflow", "tensorboard"}}
    assert found == {("env.py", "gymnasium")}
