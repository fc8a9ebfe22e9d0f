"""Float32 products by oneDNN: the same numbers as by `F.linear`, used where a measurement, made once, finds them faster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llm_fixtures import batch_loss, replay, tiny_network, toy_pool
from netllm_lib import linear
from netllm_lib.abr.batches import make_windows, pool_returns
from netllm_lib.abr.model import PolicySettings
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.checkpoint import describe
from netllm_lib.linear import FastLinear, use_fast_linear

RNG = np.random.default_rng(0)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_gain", lambda: 2.0)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(faster: None, bias: bool) -> None:
    """Also of every second token, which does not lie in one piece, and with the weights or the inputs alone to learn."""
    plain, fast = nn.Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    fast.load_state_dict(plain.state_dict())
    use_fast_linear(nn.Sequential(fast))
    assert type(fast) is FastLinear
    data = torch.randn(3, 8, 24)
    for inputs_learn, weights_learn in ((True, True), (True, False), (False, True), (False, False)):
        gradients = []
        for layer in (plain, fast):
            layer.requires_grad_(weights_learn).zero_grad()
            x = data.clone().requires_grad_(inputs_learn)
            y = layer(x[:, ::2])
            assert y.requires_grad == (inputs_learn or weights_learn)
            if y.requires_grad:
                y.square().sum().backward()
            gradients.append([y, x.grad, *(p.grad for p in layer.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_other_numbers_go_as_ever(faster: None) -> None:
    layer = nn.Linear(24, 40)
    use_fast_linear(layer)
    x = torch.randn(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    half = layer.to(torch.bfloat16)
    assert torch.equal(half(x.bfloat16()), nn.functional.linear(x.bfloat16(), half.weight, half.bias))


def count(network: nn.Module) -> int:
    return sum(isinstance(part, FastLinear) for part in network.modules())


def test_both_ways_test_and_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All levels equal, logits and gradients to the last digits; and the exact preset has nothing to do with it."""
    windows = make_windows(pool := toy_pool())
    batch, settings = windows.batch([0, 1, 2]), PolicySettings(20, pool_returns(pool)[1])
    states, rewards = RNG.random((47, 3, 6, 6)), RNG.normal(size=(47, 3))
    results, gradients = [], []
    for gain in (1.0, 2.0):
        monkeypatch.setattr(linear, "onednn_gain", lambda gain=gain: gain)
        network = tiny_network(lora_dropout=0.0)
        assert (count(network.plm) > 0, count(network.action_head) > 0) == (gain > 1, gain > 1)
        assert count(tiny_network(attention="eager")) == 0
        results.append(replay(LLMPolicy(network, describe(network, settings)), states, rewards))
        batch_loss(network, batch).backward()
        gradients.append({name: p.grad for name, p in network.trainable().items()})
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)


def test_the_measurement_is_made_once_for_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in the cache; made again for another processor, and where the file is damaged."""
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path))
    kept, measured = tmp_path / "onednn_gain.json", iter((1.5, 1.6, 1.7))
    monkeypatch.setattr(linear, "_measure", lambda: next(measured))

    def gain() -> float:
        linear._kept_gain.cache_clear()  # as in another process
        return linear.onednn_gain()

    assert [gain(), gain()] == [1.5, 1.5]
    monkeypatch.setattr(linear, "processor", lambda: {"model name": "another"})
    assert [gain(), gain()] == [1.6, 1.6]
    assert sorted(json.loads(kept.read_text()).values()) == [1.5, 1.6]
    kept.write_text("[damaged")
    assert [gain(), gain()] == [1.7, 1.7]


def test_the_measurement() -> None:
    assert 0.3 < linear._measure() < 10
