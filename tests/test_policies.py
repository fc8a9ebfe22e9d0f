"""Classical policies: against exhaustive search and by hand; tests/test_play.py plays them one by one against lock-step."""

from __future__ import annotations

import itertools
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import Observation, sound_episodes, upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.catalogue import make_policy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC, plan
from netllm_lib.abr.policies.pensieve import (
    CONV,
    DENSE,
    HIDDEN,
    OUT,
    SHAPES,
    Actor,
    Pensieve,
    latest_checkpoint,
    load_actor,
    sampled_action,
    save_actor,
)
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import SAMPLE, Registry

TRACES, VIDEO = generate_traces("t", 10, 11), generate_video("v", 2)


def best_by_enumeration(sizes_mb, buffer_s, last, mb_per_s, jump, cap_s, first_wins):
    best, level = -np.inf, 0
    for plan_levels in itertools.product(range(6), repeat=len(sizes_mb)):
        steps = (last, *plan_levels)
        if jump is not None and any(abs(a - b) > jump for a, b in itertools.pairwise(steps)):
            continue
        buffer, stall, kbps, change, before = buffer_s, 0.0, 0.0, 0.0, last
        for position, choice in enumerate(plan_levels):
            download = sizes_mb[position][choice] / mb_per_s
            if buffer < download:
                stall += download - buffer
                buffer = 0.0
            else:
                buffer -= download
            buffer = min(buffer + 4, cap_s)
            kbps += float(qoe.BITRATES_KBPS[choice])
            change += abs(float(qoe.BITRATES_KBPS[choice]) - float(qoe.BITRATES_KBPS[before]))
            before = choice
        score = kbps / 1000 - 4.3 * stall - change / 1000
        if score > best or (score == best and not first_wins):
            best, level = score, plan_levels[0] if plan_levels else 0
    return level


@pytest.mark.parametrize("jump", [None, 1])
@pytest.mark.parametrize("first_wins", [True, False])
def test_mpc_plan_equals_exhaustive_enumeration(jump: int | None, first_wins: bool) -> None:
    rng = np.random.default_rng(0)
    for case in range(40):
        horizon = case % 5  # level 0 where nothing is left to plan
        sizes = VIDEO.sizes_bytes.T[case : case + horizon] / 1e6
        if case % 3 == 0:  # equal sizes and a full buffer: many plans tie
            sizes = np.tile(sizes[:, :1], (1, 6))
        buffer_s, last, rate = float(rng.uniform(0, 50)), int(rng.integers(6)), float(rng.uniform(0.02, 0.8))
        cap = 60.0 if case % 2 else np.inf
        expected = best_by_enumeration(sizes.tolist(), buffer_s, last, rate, jump, cap, first_wins)
        got = plan(np.ascontiguousarray(sizes), buffer_s, last, rate, 6 if jump is None else jump, cap, first_wins)
        assert got == expected, (case, horizon, buffer_s, last, rate)


@pytest.mark.parametrize("name", ["jump_limit", "size_index", "carry_history"])
def test_upstream_switches_of_mpc_matter(name: str) -> None:
    simulator = Simulator(TRACES, VIDEO, upstream_episodes(TRACES, trace_num=-1))
    config = replace(MPCConfig(), **{name: getattr(MPCConfig.upstream(), name)})
    sound, switched = (play(RobustMPC(VIDEO, setting), simulator)["level"] for setting in (MPCConfig(), config))
    assert (sound != switched).any()


def test_upstream_mpc_needs_a_49th_chunk() -> None:
    short = replace(VIDEO, sizes_bytes=VIDEO.sizes_bytes[:, :48])
    RobustMPC(short)
    with pytest.raises(ValueError, match="49 lines"):
        RobustMPC(short, MPCConfig.upstream())


@pytest.mark.parametrize(
    ("buffer_s", "level"), [(0, 0), (4.999, 0), (5, 0), (7, 1), (9.1, 2), (14.99, 4), (15, 5), (60, 5)]
)
def test_bba_by_hand(buffer_s: float, level: int) -> None:
    zero = np.zeros(1)
    seen = Observation(3, np.arange(1), np.zeros((1, 6, 6)), np.array([buffer_s]), zero, zero, np.zeros((1, 6)))
    assert BBA().act(seen).tolist() == [level]


def random_actor(seed: int = 0) -> Actor:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in SHAPES.items():
        weights[f"{name}/W"] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        weights[f"{name}/b"] = (rng.standard_normal(shape[-1]) * 0.1).astype(np.float32)
    return Actor(weights)


def test_actor_equals_a_full_convolution() -> None:
    """Only tap 1 of the four meets data: pad a length of 1 to (1 before, 2 after) and convolve in full."""
    actor, states = random_actor(), np.random.default_rng(1).random((5, 6, 6)).astype(np.float32)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        weight = actor._weights[f"{name}/W"]
        if name in CONV:
            x = np.pad(x[:, None], ((0, 0), (1, 2), (0, 0)))
            return np.einsum("ntc,tck->nk", x, weight[:, 0]) + actor._weights[f"{name}/b"]
        return x @ weight + actor._weights[f"{name}/b"]

    names = (*DENSE[:2], *CONV, DENSE[2])
    parts = [linear(states[:, i] if name in CONV else states[:, i, -1:], name) for i, name in enumerate(names)]
    logits = linear(np.maximum(linear(np.maximum(np.concatenate(parts, 1), 0), HIDDEN), 0), OUT)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(actor.probabilities(states), expected, atol=1e-6)


def test_sampled_action_is_the_first_to_exceed_the_draw() -> None:
    p = np.array([[0.2, 0.3, 0.5]] * 4, dtype=np.float32)
    assert sampled_action(p, np.array([100, 200, 499, 999])).tolist() == [0, 1, 1, 2]
    assert sampled_action(np.zeros((1, 3), np.float32), np.array([5])).tolist() == [0]


def test_actor_moves_by_one_level_and_samples_from_the_protocols_stream() -> None:
    policy = Pensieve(random_actor())
    first, other = (play(policy, Simulator(TRACES, VIDEO, sound_episodes(TRACES, seed=seed))) for seed in (1, 2))
    assert first.groupby("trace")["level"].diff().abs().max() == 1
    assert (other["level"] != first["level"]).any()


def test_latest_checkpoint_has_the_highest_step(tmp_path) -> None:
    for step in (900, 57400, 57600):
        (tmp_path / f"nn_model_ep_{step}.ckpt.index").touch()
    assert latest_checkpoint(tmp_path).name == "nn_model_ep_57600.ckpt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        latest_checkpoint(tmp_path / "none")


def test_a_damaged_actor_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's part is played by one that writes random weights."""
    (tmp_path / "genet").mkdir()
    for end in ("index", "data-00000-of-00001"):
        (tmp_path / "genet" / f"nn_model_ep_1.ckpt.{end}").write_text("checkpoint")
    exports, weights = [], random_actor()._weights

    def export(command: list[str], **_: object) -> subprocess.CompletedProcess:
        exports.append(command)
        save_actor(weights, Path(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETLLM_TF_PYTHON", "python")
    monkeypatch.setattr(subprocess, "run", export)
    load_actor(tmp_path / "genet")
    (path,) = (tmp_path / "cache").glob("actors/*")
    whole = path.read_bytes()
    for count, damaged in enumerate((b"", whole[:-9], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]), start=2):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            Actor.load(path)
        assert load_actor(tmp_path / "genet")._weights.keys() == weights.keys()
        assert load_actor(tmp_path / "genet")._weights.keys() == weights.keys()
        assert len(exports) == count


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: bba, mpc"):
        make_policy("mcp", VIDEO, Registry(SAMPLE))
    assert make_policy("constant-4", VIDEO, Registry(SAMPLE)).name == "constant-4"


def test_a_class_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\nfrom netllm_lib.abr.policies.base import Policy\n\n\nclass Mine(Policy):\n"
        "    name = 'mine'\n\n    def act(self, observation):\n        return np.ones(len(observation.episode), int)\n"
    )
    policy = make_policy(f"{path}:Mine", VIDEO, Registry(SAMPLE))
    assert policy.name == "mine"
    table = play(policy, Simulator(TRACES, VIDEO, sound_episodes(TRACES)))
    assert set(table["level"]) == {0, 1}
    with pytest.raises(ValueError, match=r"mine\.py: it has no class Other that is"):
        make_policy(f"{path}:Other", VIDEO, Registry(SAMPLE))
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        make_policy(f"{tmp_path / 'none.py'}:Mine", VIDEO, Registry(SAMPLE))
