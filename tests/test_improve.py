"""Improving a policy: perturbed traces, rounds that go on after an interruption, pools to clone and what a clone earns."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from netllm_lib import notebooks, runs
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import Batch, WindowConfig, make_windows
from netllm_lib.abr.episodes import Observation, sound_episodes
from netllm_lib.abr.hindsight import Grid
from netllm_lib.abr.improve import (
    ImproveConfig,
    Improved,
    chosen_round,
    cloning_estimate,
    improve,
    leak_free,
    perturbed,
    roll_pool,
)
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, load_policy
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.catalogue import load_llm_policy
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Constant, Exploring, Random
from netllm_lib.abr.pool import generate_pool, load_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import SAMPLE, TraceSet, overlapping
from netllm_lib.checkpoint import describe, save_checkpoint
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig

TRACES, VIDEO = generate_traces("t", 6, 3), generate_video("v", 3)
TRAINING = TrainConfig(batch=4, lr=1e-3, lr_around=1e-3, precision="float32")
SMALL = ImproveConfig(groups=4, starts=2, epochs=(2, 1), grid=Grid(10, 10), train=TRAINING)


def tiny_network(tokens: str = "step", rank: int = -1) -> PolicyNetwork:
    config = NetworkConfig(tokens=tokens, state_feature_dim=8)  # type: ignore[arg-type]
    return PolicyNetwork(load_plm(PLMConfig("tiny-llama", rank=rank)), config)


# --- what is played


def test_perturbed_traces_stay_within_their_limits() -> None:
    made, originals = perturbed(TRACES, 20, 1), {trace.name: trace for trace in TRACES.traces}
    assert len(set(made.names)) == len(made) == 20
    for trace in made.traces:
        original = originals[trace.name.partition("-")[2]]
        np.testing.assert_array_equal(trace.time_s, original.time_s)
        factors = trace.mbps / original.mbps
        assert np.ptp(factors) < 1e-12
        assert 0.6 <= factors[0] <= 1.6
        assert 0.45 - 1e-9 <= trace.mean_mbps <= 4.5 + 1e-9
    counts = pd.Series(made.names).str.partition("-")[2].value_counts()
    assert counts.max() - counts.min() <= 1
    assert perturbed(TRACES, 20, 1).content_hash == made.content_hash != perturbed(TRACES, 20, 2).content_hash


def test_exploring_replaces_a_share_of_the_levels() -> None:
    episodes = sound_episodes(TRACES, repeats=20)
    simulator, share = Simulator(TRACES, VIDEO, episodes), np.where(np.arange(120) % 2 == 0, 0.3, 0.0)
    levels = rollout(Exploring(Constant(2), share), simulator).level[:, 1:]
    assert (levels[1::2] == 2).all()
    assert (levels[::2] != 2).mean() == pytest.approx(0.3 * 5 / 6, abs=0.03)
    few = rollout(Exploring(Constant(2), share[:4]), Simulator(TRACES, VIDEO, episodes.rows(range(4))))
    np.testing.assert_array_equal(few.level[:, 1:], levels[:4])  # an episode's random numbers are its own
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"):
        Exploring(Constant(2), 1.5)


def test_no_training_trace_shares_content_with_a_test_trace() -> None:
    others = generate_traces("u", 2, 77)
    leaking = TraceSet("train", (*TRACES.traces, *others.traces[:1]))
    test = TraceSet("test", (TRACES.traces[0], others.traces[1]))
    split = leak_free(leaking, test, synthetic=3, seed=2)
    assert split.dropped == 1
    assert not overlapping(split.training, test).any()
    assert not overlapping(split.training, split.held).any()
    assert sorted([*split.training.names[:-3], *split.held.names]) == sorted([*TRACES.names[1:], *others.names[:1]])
    assert split.training.names[-3:] == ["synthetic_000", "synthetic_001", "synthetic_002"]
    assert all(0.45 - 1e-9 <= trace.mean_mbps <= 4.5 + 1e-9 for trace in split.validation.traces)
    with pytest.raises(ValueError, match="7 of 7 traces of train share content with train"):
        leak_free(leaking, leaking)


@pytest.mark.parametrize("tokens", ["step", "parts"])
def test_a_cached_test_is_the_trained_function(tokens: str) -> None:
    """All 47 decisions of an episode, computed in one pass and one after the other."""
    network = tiny_network(tokens).eval()
    simulator = Simulator(TRACES, VIDEO, sound_episodes(TRACES))
    settings = make_windows(generate_pool(BBA(), TRACES, VIDEO, simulator.episodes), WindowConfig(w=47)).settings
    seen: list[np.ndarray] = []

    class Recording(LLMPolicy):
        def act(self, observation: Observation) -> np.ndarray:
            levels = super().act(observation)
            seen.append(self.logits.copy())
            return levels

    policy = Recording(network, describe(network, settings), EvalConfig(merge_lora=False))
    played = rollout(policy, simulator)
    returns = torch.from_numpy(np.array(played.extras["return_to_go"][:, 1:], dtype=np.float32))
    states, levels = torch.from_numpy(played.states[:, :-1]), torch.from_numpy(played.level[:, 1:])
    with torch.inference_mode():
        logits = network(Batch(states, levels, returns, torch.arange(47).expand(len(TRACES), 47), None, levels))
    np.testing.assert_allclose(np.stack(seen, axis=1), logits.numpy(), atol=1e-4)


# --- rounds

HELD = Simulator(TRACES, VIDEO, sound_episodes(TRACES, seed=9))


def run(folder: Path, die: tuple[str, int] | None = None) -> tuple[PolicyNetwork, Improved]:
    """Improve a small network; `die`: interrupted at the so-manieth call of a stage's progress callback."""

    def progress(label: str) -> Callable[..., None]:
        calls = itertools.count(1)

        def report(*_: object) -> None:
            if (label, next(calls)) == die:
                raise KeyboardInterrupt

        return report

    network = tiny_network()
    return network, improve(network, TRACES, VIDEO, SMALL, folder=folder, held=HELD, progress=progress)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PolicyNetwork, Improved]:
    """Two rounds without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def test_rounds_leave_pools_values_and_a_policy(whole: tuple[Path, PolicyNetwork, Improved]) -> None:
    folder, _, improved = whole
    assert list(improved.rounds["episodes"]) == [8, 8]
    assert (improved.rounds["regret"] > 0).all()
    for number, player in enumerate(("mpc exploring", "llm exploring"), start=1):
        pool = load_pool(folder / f"round-{number}")
        assert pool.source["policies"] == [player]
        (values_path,) = (folder / f"round-{number}").glob("values-*.npz")
        values = np.load(values_path)["values"]
        assert values.shape == (len(pool), 6)
        assert np.isfinite(values).all()
        # the value of a state's last level is its reward: nothing comes after it
        last = pool.dones
        np.testing.assert_allclose(values[last, pool.actions[last]], pool.rewards[last], atol=1e-5)
    finals = [folder / f"round-{number}" / "training" / "final" for number in improved.rounds["round"]]
    tables = [play(load_llm_policy(final), HELD) for final in finals]
    np.testing.assert_allclose([qoe.summarise(table).reward for table in tables], improved.rounds["score"], atol=1e-6)
    assert improved.policy == finals[chosen_round(tables)]
    meta = load_policy(improved.policy)[1]
    assert (meta.network.tokens, (meta.train or {})["data"]["learn"]) == ("step", "values")
    with pytest.raises(ValueError, match="another configuration"):
        improve(tiny_network(), TRACES, VIDEO, replace(SMALL, learn="best"), folder=folder)


def test_damaged_values_are_made_again(whole: tuple[Path, PolicyNetwork, Improved], tmp_path: Path) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "again")
    (path,) = (folder / "round-1").glob("values-*.npz")
    good, values = path.read_bytes(), np.load(path)["values"]
    path.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    again = run(folder)[1]
    np.testing.assert_array_equal(np.load(path)["values"], values)
    np.testing.assert_array_equal(again.rounds["regret"], whole[2].rounds["regret"])


def test_an_interrupted_improvement_ends_the_same(whole: tuple[Path, PolicyNetwork, Improved], tmp_path: Path) -> None:
    for stage, calls in (("1 of 2, play", 3), ("1 of 2, train", 3), ("2 of 2, play", 20), ("2 of 2, train", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, (f"round {stage}", calls))
    resumed, improved = run(tmp_path)
    for name, weight in whole[1].state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    columns = ["pool_reward", "regret", "loss", "score"]
    np.testing.assert_array_equal(improved.rounds[columns], whole[2].rounds[columns])


def test_an_earlier_round_is_kept_only_if_it_was_surely_better() -> None:
    def table(rewards: np.ndarray) -> pd.DataFrame:
        parts = dict.fromkeys(("bitrate_kbps", "rebuffer_s", "smoothness_mbps"), 0.0)
        return pd.DataFrame({"trace": range(len(rewards)), "chunk": 1, "reward": rewards, **parts})

    last = np.random.default_rng(1).normal(1.0, 0.5, 20)
    lucky = last - 0.05
    lucky[0] += 4.0  # one outage less: the higher mean
    assert lucky.mean() > last.mean()
    assert chosen_round([table(lucky), table(last)]) == 1
    assert chosen_round([table(last + 0.05), table(last + 0.1), table(lucky), table(last)]) == 1
    assert chosen_round([table(last)]) == 0


def test_a_lora_of_the_original_shape_can_be_improved_too(tmp_path: Path) -> None:
    improved = improve(tiny_network("parts", 4), TRACES, VIDEO, replace(SMALL, epochs=(1,)), folder=tmp_path)
    assert improved.rounds["score"].isna().all()
    assert (improved.policy / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="at least one round"):
        ImproveConfig(epochs=())


@pytest.mark.slow
def test_it_learns_above_bba(tmp_path: Path) -> None:
    """A minute of rounds on synthetic traces, tested on others."""
    training, test = generate_traces("a", 40, 21), generate_traces("b", 40, 22)
    config = ImproveConfig(groups=40, starts=4, epochs=(12, 8))
    improved = improve(tiny_network(), training, VIDEO, config, folder=tmp_path)
    rewards = [
        qoe.summarise(play(player, Simulator(test, VIDEO, sound_episodes(test)))).reward
        for player in (load_llm_policy(improved.policy), BBA())
    ]
    assert rewards[0] > rewards[1] + 0.05


# --- cloning


def test_a_rolled_pool_is_as_long_as_asked_and_of_other_episodes_than_the_rounds(
    whole: tuple[Path, PolicyNetwork, Improved], tmp_path: Path
) -> None:
    rolled = roll_pool(RobustMPC(VIDEO), TRACES, VIDEO, 7, SMALL, path=tmp_path / "pool")
    assert len(rolled.episode_starts) == 7
    assert rolled.source["policies"] == ["mpc"]
    assert roll_pool(RobustMPC(VIDEO), TRACES, VIDEO, 7, SMALL).content_hash() == rolled.content_hash()
    assert not np.isin(rolled.states, load_pool(whole[0] / "round-1").states[1:]).all()


def test_an_estimate_tells_a_good_pool_from_a_bad_one() -> None:
    steps, rewards = [], {}
    for player in (RobustMPC(VIDEO), Random()):
        pool = generate_pool(player, TRACES, VIDEO, sound_episodes(TRACES, repeats=4))
        table = cloning_estimate(pool, HELD, 40, progress=lambda done, total, info: steps.append(total))
        rewards[player.name] = qoe.summarise(table).reward
    assert steps == [40] * 80
    assert rewards["mpc"] > rewards["random"] + 0.3


def test_notebook_07(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headless on the sample, at the smallest size; its pool is what notebook 04 takes."""
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path))
    network = tiny_network("parts", rank=4)
    settings = make_windows(generate_pool(BBA(), TRACES, VIDEO, sound_episodes(TRACES))).settings
    before = save_checkpoint(tmp_path / "before", network, describe(network, settings))
    small = {"groups": 4, "starts": 2, "epochs": [1, 1], "batch": 8, "synthetic": 5, "pool_episodes": 4}
    asked = {**small, "before": str(before), "data": str(SAMPLE)}
    done = notebooks.run_notebook("07_improve", asked, echo=lambda line: None)
    assert set(done.metrics["policies"]) == {"llm", "before", "mpc", "mpc (strong)", "mpc (original)", "bba"}
    assert [row["episodes"] for row in done.metrics["rounds"]] == [8, 8]
    split = runs.read_json(done.folder / "split.json")
    assert set(split["train"]).isdisjoint(split["validation"])
    assert len(load_pool(done.folder).episode_starts) == 4
    assert load_llm_policy(done.folder).name == "llm"
