"""The network around the PLM: token order, causality, and the original's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import GOLDEN, Golden
from llm_fixtures import batch_loss, stir, tiny_network, toy_pool, write_plm
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.model import TOKENS_PER_STEP, Batch, NetworkConfig, PolicyNetwork
from netllm_lib.abr.pool import load_pool
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint
from netllm_lib.plm import PLMConfig, TokenCache, load_plm
from netllm_lib.returns import pool_returns
from netllm_lib.runs import read_json


def batch(w: int = 10, count: int = 3) -> Batch:
    return make_windows(toy_pool(), WindowConfig(w=w)).batch(list(range(count)))


def test_tokens_are_in_order() -> None:
    """Each input moves its own token of its own step and no other."""
    network, data = tiny_network(), batch()
    returns, actions, states = data.returns.clone(), data.actions.clone(), [data.states.clone() for _ in range(6)]
    returns[:, 4], actions[:, 4] = 1, 5
    for row, changed in enumerate(states):
        changed[:, 4, row] += 1
    inputs = [{"returns": returns}, *({"states": changed} for changed in states), {"actions": actions}]
    with torch.inference_mode():
        plain = network.embed(*data[:4])
        for token, change in enumerate(inputs):
            moved = (network.embed(*data._replace(**change)[:4]) != plain).any(-1)
            assert set(torch.nonzero(moved)[:, 1].tolist()) == {4 * TOKENS_PER_STEP + token}


def test_state_encoder_equals_a_plain_loop() -> None:
    """Level, buffer and remaining read the last column; the series are correlated with their kernels."""
    encoder: Any = tiny_network().state_encoder
    states, relu = torch.rand(4, 6, 6), torch.nn.functional.leaky_relu
    with torch.inference_mode():
        features = encoder(states)
        for n in range(4):
            for row, module in ((0, encoder.fc1), (1, encoder.fc2), (5, encoder.fc6)):
                expected = relu(states[n, row, -1] * module[0].weight[:, 0] + module[0].bias)
                torch.testing.assert_close(features[row][n], expected)
            for row, module, taps in ((2, encoder.conv3, 4), (3, encoder.conv4, 4), (4, encoder.conv5, 6)):
                kernel, bias = module[0].weight[:, 0], module[0].bias
                sums = [(kernel * states[n, row, i : i + taps]).sum(1) + bias for i in range(7 - taps)]
                torch.testing.assert_close(features[row][n], relu(torch.stack(sums, dim=1).flatten()))


def test_a_step_is_predicted_from_what_came_before_its_action() -> None:
    network, data = tiny_network(), batch()
    with torch.inference_mode():
        plain = network(data)
        for step in (0, 5, 9):
            actions, states = data.actions.clone(), data.states.clone()
            actions[:, step] = (actions[:, step] + 3) % 6
            states[:, step] += 1
            for change, first in (({"actions": actions}, step + 1), ({"states": states}, step)):
                changed = (network(data._replace(**change)) - plain).abs().amax(dim=(0, 2)) > 1e-6
                assert changed.tolist() == [i >= first for i in range(10)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_a_last_layer_that_computes_only_what_is_read(tmp_path: Path, family: str) -> None:
    """Logits, losses and gradients are those of the layer that computes everything, with and without a cache."""
    folder = str(write_plm(tmp_path / family, family))
    data, size = batch(), NetworkConfig(state_feature_dim=8)
    fast = stir(PolicyNetwork(load_plm(PLMConfig(folder, rank=4, lora_dropout=0.0)), size))
    plain = stir(PolicyNetwork(load_plm(PLMConfig(folder, rank=4, lora_dropout=0.0)), size))
    plain.plm._last_layer = None  # its layers are then never told what is read
    assert (fast.plm._last_layer is None) == (family == "opt")
    gradients = []
    for network in (fast, plain):
        loss = batch_loss(network, data)
        loss.backward()
        gradients.append({name: p.grad for name, p in network.trainable().items()} | {"loss": loss.detach()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(fast(data), plain(data), atol=1e-6, rtol=1e-5)
        tokens = fast.embed(*data[:4])
        whole = fast.plm(tokens)  # reading everything again
        torch.testing.assert_close(whole, plain.plm(tokens), atol=1e-5, rtol=1e-5)
        cache = fast.plm.new_cache(80)
        for end in (7, 15, 40):
            start = cache.tokens
            read = fast.plm(tokens[:, start:end], cache=cache, read=slice(-1, None))
            torch.testing.assert_close(read, whole[:, end - 1 : end], atol=1e-5, rtol=1e-5)


def test_a_cache_holds_what_is_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving the latest tokens to the front, now and then, changes no bit; memory is for the window, not for the episode."""
    network = tiny_network()
    tokens = torch.randn(
        3, 47 * TOKENS_PER_STEP - 1, network.plm.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    pieces = [tokens[:, :7], *tokens[:, 7:].split(TOKENS_PER_STEP, dim=1)]
    results, sizes = [], []
    for slack in (8, 64, 10_000):
        monkeypatch.setattr(TokenCache, "SLACK", slack)
        cache = network.plm.new_cache(384, attend_tokens=87)
        with torch.inference_mode():
            results.append(torch.stack([network.decide(piece, cache) for piece in pieces]))
        sizes.append(cache.nbytes)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])
    assert [round(size / sizes[2] * 384) for size in sizes] == [95, 151, 384]
    assert cache.tokens == 375
    with pytest.raises(ValueError, match="room for 95 tokens"), torch.inference_mode():
        monkeypatch.setattr(TokenCache, "SLACK", 8)
        network.plm(tokens[:, :96], cache=network.plm.new_cache(384, attend_tokens=87))


def test_lora_and_pretraining_and_seeds_matter(tmp_path: Path) -> None:
    """LoRA starts from the PLM and then changes it; the random control differs in the PLM only; a seed makes the modules."""
    data, source = batch(), str(write_plm(tmp_path / "plm", "llama"))
    pretrained, control, other = (
        PolicyNetwork(load_plm(PLMConfig(source, rank=4, random_weights=random)), NetworkConfig(8, seed=seed)).eval()
        for random, seed in ((False, 1), (True, 1), (False, 2))
    )
    fresh, frozen, trained = tiny_network(lora=False), tiny_network(rank=0), tiny_network()
    with torch.inference_mode():
        assert torch.equal(fresh(data), frozen(data))
        assert not torch.allclose(trained(data), fresh(data), atol=1e-3)
        assert torch.equal(pretrained.embed(*data[:4]), control.embed(*data[:4]))
        assert not torch.equal(pretrained.embed(*data[:4]), other.embed(*data[:4]))
        assert not torch.allclose(pretrained(data), control(data), atol=1e-2)


def test_trainable_holds_everything_that_learns() -> None:
    network = tiny_network()
    learns = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.replace("plm.", "plm.model.", 1) for name in network.trainable()} == learns


FORWARDS = sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("plm/*/forward_layer*.npz")) or [Path("absent")]


@pytest.mark.golden
@pytest.mark.parametrize("path", FORWARDS, ids=str)
def test_logits_of_the_original(golden: Golden, path: Path) -> None:
    recorded, folder = np.load(golden(path)), golden(path).parent
    meta, layer = read_json(folder / "meta.json"), int(path.stem.removeprefix("forward_layer"))
    _, scale = pool_returns(load_pool(golden("plm", "mpc100_exp_pool.pkl")), scale=meta["scale"])
    plm = PLMConfig.upstream(str(folder / "plm"), layers=None if layer < 0 else layer + 1)
    network, _ = load_upstream_checkpoint(folder / "adapter", plm, scale, meta["w"])
    assert network.plm.layers == (meta["layers"] if layer < 0 or not meta["which_layer_effective"] else layer + 1)
    states, labels = torch.from_numpy(recorded["states"]), torch.from_numpy(recorded["labels"])
    returns, timesteps = torch.from_numpy(recorded["returns"])[..., 0], torch.from_numpy(recorded["timesteps"]).long()
    with torch.inference_mode():
        embedded = network.embed(states[:1], labels[:1], returns[:1], timesteps[:1])
        np.testing.assert_allclose(embedded, recorded["inputs_embeds_ln"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(network.plm(embedded), recorded["last_hidden_state"], atol=1e-5, rtol=1e-5)
        logits = network(Batch(states, labels, returns, timesteps, None, labels))
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-5, rtol=0)
