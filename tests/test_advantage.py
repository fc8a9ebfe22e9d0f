"""What is learnt of a pool: its actions, weighted by their advantages, or the values of all levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from llm_fixtures import batch_loss, train_on
from netllm_lib import notebooks, runs
from netllm_lib.abr import advantage
from netllm_lib.abr.advantage import advantage_weights, advantages
from netllm_lib.abr.batches import Batch, WindowConfig, make_targets, make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.improve import small_network
from netllm_lib.abr.model import load_policy
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Random
from netllm_lib.abr.pool import ExperiencePool, generate_mix, load_pool
from netllm_lib.abr.synthetic import generate_traces, generate_video
from netllm_lib.abr.traces import SAMPLE
from netllm_lib.pipelines import read_pipeline
from netllm_lib.runs import PROJECT
from netllm_lib.train import TrainConfig

TRACES, VIDEO = generate_traces("t", 12, 3), generate_video("v", 3)
EPISODES = sound_episodes(TRACES, repeats=4)


@pytest.fixture(scope="module")
def mixed() -> ExperiencePool:
    """Half of it by MPC, half at random; MPC's half comes first."""
    return generate_mix([(RobustMPC(VIDEO), EPISODES), (Random(), EPISODES)], TRACES, VIDEO)


def test_an_advantage_is_what_was_earned_less_what_such_states_earn(mixed: ExperiencePool, tmp_path: Path) -> None:
    """A ridge regression is least squares with a small observation of zero for every weight; a pool on disk gives the same."""
    rewards, earned = np.maximum(mixed.rewards, advantage.FLOOR), np.empty(len(mixed))
    for start, length in zip(mixed.episode_starts, mixed.episode_lengths, strict=True):
        for step in range(start, start + length):
            earned[step] = rewards[step : min(step + 4, start + length)].mean()
    flat = mixed.states.reshape(len(mixed), -1).astype(np.float64)
    columns = np.concatenate([np.ones((len(flat), 1)), flat, np.sqrt(flat)], axis=1)
    padding = np.sqrt(advantage.RIDGE * len(mixed)) * np.eye(columns.shape[1])
    padded = np.concatenate([columns, padding]), np.concatenate([earned, np.zeros(columns.shape[1])])
    residual = earned - columns @ np.linalg.lstsq(*padded, rcond=None)[0]
    for pool in (mixed, load_pool(mixed.save(tmp_path / "pool"))):
        np.testing.assert_allclose(advantages(pool, horizon=4), residual - residual.mean(), atol=1e-6)


def test_better_players_weigh_more(mixed: ExperiencePool) -> None:
    half, order = len(mixed) // 2, np.argsort(advantages(mixed))
    for temperature in (0.3, 1.0):
        weights = advantage_weights(mixed, temperature)
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        assert weights[:half].mean() > 1.1 > 0.9 > weights[half:].mean()
        assert (np.diff(weights[order]) >= 0).all()


def test_the_loss_by_hand() -> None:
    """Actions by their weights, the distance of all levels' values to the best one's, or the best level."""
    network, steps = small_network().eval(), torch.arange(3).expand(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    actions, weights = torch.tensor([[0, 3, 5], [2, 1, 1]]), torch.tensor([[0.0, 2.0, 0.5], [3.0, 9.0, 9.0]])
    batch = Batch(torch.rand(2, 3, 6, 6), actions, torch.zeros(2, 3), steps, mask, actions, weights)
    logits, values = network(batch), torch.randn(2, 3, 6) * 10
    distances, best = (make_targets(values.flatten(0, 1).numpy(), learn) for learn in ("values", "best"))
    wanted = (values - values.max(dim=-1, keepdim=True).values).clamp(min=-8.0)
    each = cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none").view(2, 3) * weights
    cases = [
        (batch, each[mask].mean()),
        (batch._replace(mask=None), each.mean()),
        (batch._replace(targets=distances.view(2, 3, 6), weights=None), ((logits - wanted)[mask] ** 2).mean()),
        (
            batch._replace(targets=best.view(2, 3), weights=None),
            cross_entropy(logits[mask], values.argmax(dim=-1)[mask]),
        ),
    ]
    for given, expected in cases:
        torch.testing.assert_close(batch_loss(network, given), expected, rtol=1e-5, atol=0)


def test_weights_change_what_is_learnt_and_the_run_knows_it(mixed: ExperiencePool, tmp_path: Path) -> None:
    config = TrainConfig(batch=8, epochs=1, lr=1e-3, lr_around=1e-3, precision="float32")
    plain, weighted = small_network(), small_network()
    train_on(plain, make_windows(mixed, WindowConfig(w=47)), config, tmp_path / "plain")
    choosy = make_windows(mixed, WindowConfig(w=47), advantage=0.5)
    train_on(weighted, choosy, config, tmp_path / "weighted")
    assert not torch.equal(plain.action_head.weight, weighted.action_head.weight)
    with pytest.raises(ValueError, match="another configuration"):
        train_on(weighted, choosy, config, tmp_path / "plain")


def test_values_and_weights_are_asked_for_and_given_together(mixed: ExperiencePool) -> None:
    values = np.zeros((len(mixed), 6), np.float32)
    wrong: list[dict[str, Any]] = [
        {"learn": "actions", "values": values},
        {"learn": "values", "values": None},
        {"learn": "values", "values": values[1:]},
        {"advantage": 0.0},
        {"advantage": 1.0, "learn": "values", "values": values},
    ]
    for options in wrong:
        match = "for actions only" if "advantage" in options else f'learn="{options["learn"]}" with'
        with pytest.raises(ValueError, match=match):
            make_windows(mixed, **options)


@pytest.mark.parametrize("name", ["improve-small", "improve-smollm2", "cloning", "mixed-pool"])
def test_pipelines_of_the_results_are_read(name: str) -> None:
    """All parameters are those of the notebooks, and each seed is another run."""
    steps = read_pipeline(PROJECT / "notebooks" / "pipelines" / f"{name}.toml").step
    seeds = [step.parameters.get("seed") for step in steps if step.notebook.stem in ("07_improve", "04_finetune")]
    assert set(seeds) == {1, 2, 3}


def test_notebooks_03_and_04_with_every_option_of_a_mixed_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path))
    asked = {"policies": ["mpc", "random"], "episodes": 6, "estimate_steps": 3}
    made = notebooks.run_notebook("03_experience_pool", {**asked, "data": str(SAMPLE)}, echo=lambda line: None)
    assert set(made.metrics["validation_reward"]) == {"clone", "mpc", "random"}
    small = {"plm": "tiny-llama", "layers": 0, "rank": -1, "tokens": "step", "w": 47, "epochs": 1, "advantage": 0.5}
    asked = {**small, "pool_dir": str(made.folder), "data": str(SAMPLE)}
    done = notebooks.run_notebook("04_finetune", asked, echo=lambda line: None)
    meta = load_policy(done.folder / "policy")[1]
    assert (meta.network.tokens, (meta.train or {})["data"]["advantage"]) == ("step", 0.5)

    split = runs.read_json(made.folder / "split.json")
    runs.write_json(made.folder / "split.json", {**split, "validation": []})
    with pytest.raises(Exception, match="names no validation traces"):
        notebooks.run_notebook("04_finetune", {**asked, "seed": 2}, echo=lambda line: None)
