"""The PPO example: its parts, that it runs as documented, and (slow) that it learns to play better than BBA."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from netllm_lib.abr.traces import SAMPLE
from netllm_lib.runs import PROJECT


@pytest.fixture(scope="module")
def ppo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_example", PROJECT / "docs" / "examples" / "ppo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_advantages_against_their_definition(ppo: ModuleType) -> None:
    """Sums of discounted errors up to the end of the episode, written out."""
    config = ppo.PPOConfig(gamma=0.9, gae_lambda=0.5)
    rng = np.random.default_rng(0)
    rewards, values, last = rng.normal(size=(6, 2)), rng.normal(size=(6, 2)), rng.normal(size=2)
    ends = np.array([[0, 0], [0, 1], [1, 0], [0, 0], [0, 0], [0, 1]], dtype=float)
    following = np.vstack([values[1:], last])
    errors = rewards + 0.9 * (1 - ends) * following - values
    expected = np.zeros((6, 2))
    for t, client in np.ndindex(6, 2):
        for k in range(t, 6):
            expected[t, client] += (0.9 * 0.5) ** (k - t) * errors[k, client]
            if ends[k, client]:
                break
    tensors = [torch.tensor(array) for array in (rewards, values, ends, last)]
    np.testing.assert_allclose(ppo.advantages(*tensors, config), expected)


def test_it_runs_as_documented(ppo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Two updates: the same rewards for the same seed, another for another; the lines of the table."""
    arguments = ["--data", str(SAMPLE), "--traces", "sample-train", "--test", "sample-test", "--video", "sample"]
    arguments += ["--steps", str(2 * 47 * 128)]
    first, again = (ppo.main([*arguments, "--seed", "1"]) for _ in range(2))
    assert first == again
    assert ppo.main([*arguments, "--seed", "2"])["ppo"] != first["ppo"]
    lines = capsys.readouterr().out.splitlines()
    assert "sample-test, sample: mean reward per chunk" in lines
    assert first["mpc"] > first["bba"] > 0.5
    assert {line.split()[0] for line in lines[-4:-1]} == {"ppo", "mpc", "bba"}


@pytest.mark.slow
def test_it_learns_above_bba(ppo: ModuleType, real_data: object) -> None:
    """With half of the default's decisions; docs/gymnasium.md has the figures."""
    for data, gain in ((SAMPLE, 0.1), (real_data, 0.05)):
        rewards = ppo.main(["--data", str(data), "--steps", "300000", "--seed", "1"])
        assert rewards["ppo"] > rewards["bba"] + gain
