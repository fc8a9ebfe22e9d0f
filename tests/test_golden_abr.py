"""Simulator, policies, protocol and pools against everything that the original was recorded to do."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GOLDEN, Golden
from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies.catalogue import make_policy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import load_actor, tensorflow_python
from netllm_lib.abr.policies.simple import Replay
from netllm_lib.abr.pool import generate_pool, load_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import Registry
from netllm_lib.abr.upstream.pickles import write_pool
from netllm_lib.cli import main
from netllm_lib.runs import read_json

pytestmark = pytest.mark.golden

FIELDS = {"rebuffer_s": "rebuf_s", "size_bytes": "chunk_bytes"}  # ours: theirs
FIELDS |= {name: name for name in ("time_s", "bitrate_kbps", "buffer_s", "delay_ms", "smoothness_mbps", "reward")}
CLASSICAL = ("bba", "mpc")


def recorded(part: str) -> dict:
    path = GOLDEN / "abr" / part / "summary.json"
    return read_json(path) if path.is_file() else {}


RUNS = [(key, policy) for key, policies in recorded("results").items() for policy in policies] or [("absent", "absent")]
POOLS = list(recorded("pools")) or ["absent"]


@pytest.fixture(scope="module")
def registry(golden: Golden, real_data: Path) -> Registry:
    return Registry(real_data)


def asked(made: dict) -> dict[str, Any]:
    return {"trace_num": made["trace_num"], "fixed_order": made["fixed"], "seed": made["seed"]}


def need_actor(policy: str) -> None:
    if policy not in CLASSICAL and tensorflow_python() is None:
        pytest.skip(f"{policy}: no TensorFlow environment to read its checkpoint; run `make env-tf`")


@pytest.mark.parametrize(("key", "policy"), RUNS)
def test_run_is_bit_equal(golden: Golden, registry: Registry, key: str, policy: str) -> None:
    arrays, expected = np.load(golden("abr", "results", f"{key}_{policy}.npz")), recorded("results")[key][policy]
    need_actor(policy)
    traces, video = registry.trace_set(key.split("_")[0]), registry.video(key.split("_")[1])
    player = make_policy(policy, video, registry, "upstream")
    episodes = upstream_episodes(traces, **asked(expected), draws_actions=player.draws_actions)
    simulator = Simulator(traces, video, episodes)
    played = rollout(player, simulator)
    # the same without our policies: only the levels are the original's
    replayed = rollout(Replay(np.searchsorted(qoe.BITRATES_KBPS, arrays["bitrate_kbps"])), simulator)
    np.testing.assert_array_equal(episodes.trace_index, arrays["trace_index"])
    np.testing.assert_array_equal(episodes.start_ptr, arrays["start_ptr"])
    for ours, theirs in FIELDS.items():
        np.testing.assert_array_equal(getattr(played, ours), arrays[theirs], err_msg=ours)
        np.testing.assert_array_equal(getattr(replayed, ours), arrays[theirs], err_msg=ours)
    table = played.table()
    quality = qoe.summarise(table)
    assert quality.reward == pytest.approx(expected["upstream_mean"], abs=1e-12)
    assert table["reward"].mean() == pytest.approx(expected["mean_all48"], abs=1e-12)
    by_trace = qoe.per_trace(table)["reward"]
    assert len(by_trace) == len(expected["per_trace"])
    for name, mean in expected["per_trace"].items():
        assert by_trace[name.removeprefix(f"{traces.name}_")] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("name", POOLS)
def test_pool_is_bit_equal(golden: Golden, registry: Registry, tmp_path: Path, name: str) -> None:
    arrays, made = np.load(golden("abr", "pools", f"{name}.npz")), recorded("pools")[name]
    need_actor(made["policy"])
    traces, video = registry.trace_set(made["traces"]), registry.video(made["video"])
    player = make_policy(made["policy"], video, registry, "upstream", pool=True)
    episodes = upstream_episodes(traces, **asked(made), draws_actions=player.draws_actions, pool=True)
    pool = generate_pool(player, traces, video, episodes)
    assert len(pool) == made["transitions"]
    for field in ("states", "actions", "rewards", "dones"):
        np.testing.assert_array_equal(getattr(pool, field), arrays[field], err_msg=field)
    pickled = GOLDEN / "abr" / "pools" / f"{name}.pkl"
    if pickled.exists():
        assert load_pool(pickled).content_hash() == pool.content_hash()
    assert load_pool(write_pool(pool, tmp_path / "exp_pool.pkl")).content_hash() == pool.content_hash()


def test_actors_equal_tensorflow(golden: Golden, registry: Registry) -> None:
    recording = np.load(golden("abr", "genet_actor_io.npz"))
    names = [key.removesuffix("_probs_batch") for key in recording if key.endswith("_probs_batch")]
    assert names
    for name in names:
        need_actor(name)
        actor = load_actor(registry.actor_folders()[name])
        ours, theirs = actor.probabilities(recording["states"]), recording[f"{name}_probs_batch"]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "mean"),
    [
        ({"jump_limit": None}, 0.9797),
        ({"jump_limit": None, "size_index": "next"}, 1.0194),
        ({"size_index": "next"}, 0.8891),
        ({"ties": "first"}, 0.8545),
        ({"carry_history": False}, 0.8479),
        ({"robust": False}, 0.5475),
    ],
)
def test_what_each_handicap_of_mpc_costs(golden: Golden, registry: Registry, changes: dict, mean: float) -> None:
    traces, video = registry.trace_set("fcc-test"), registry.video("video1")
    policy = RobustMPC(video, replace(MPCConfig.upstream(), **changes))
    played = rollout(policy, Simulator(traces, video, upstream_episodes(traces)))
    assert qoe.summarise(played.table()).reward == pytest.approx(mean, abs=5e-5)


def test_command_line_prints_the_published_mean(golden: Golden, real_data: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["play", "--policy", "mpc", "--traces", "fcc-test", "--video", "video1", "--preset", "upstream", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--data", os.fspath(real_data)])
    assert not stopped.value.code
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    expected = read_json(golden("abr", "results", "summary.json"))["fcc-test_video1"]["mpc"]
    assert result["mean_reward"] == pytest.approx(expected["upstream_mean"], abs=1e-12)
    assert result["traces"] == 100
    assert result["fixed"] is True
    assert result["per_trace"] == pytest.approx(expected["per_trace"], abs=1e-12)
