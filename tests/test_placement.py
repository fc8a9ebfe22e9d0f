"""A PLM over several devices: what goes where, and that nothing else changes. "cpu" and "cpu:0" are two names of one device, so
that hidden states are carried without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_fixtures import FAMILIES, batch_loss, stir, toy_pool, train_on, write_plm
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, load_policy
from netllm_lib.placement import device_map, devices_of, split_layers
from netllm_lib.plm import PLMConfig, load_plm, sketch_plm
from netllm_lib.train import TrainConfig

BATCH = make_windows(toy_pool()).batch([0, 1])
TWO = "cpu,cpu:0"


def test_names_of_devices() -> None:
    assert devices_of("cpu") == ["cpu"]
    assert devices_of("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="between cpu and cuda"):
        devices_of("cuda:0,cpu")
    assert devices_of("auto") == ([f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"])
    for wrong in ("gpu0", "cuda:0,,cpu", ""):
        with pytest.raises(ValueError, match="is no device"):
            devices_of(wrong)


def test_layers_are_split_as_the_original_splits_its_32() -> None:
    assert split_layers(32, 2, None) == [16, 16]
    assert split_layers(32, 3, None) == [11, 11, 10]  # i // 11
    assert split_layers(2, 3, None) == [1, 1, 0]
    assert split_layers(7, 2, (5, 2)) == [5, 2]
    for wrong in ((5, 1), (7,), (8, -1)):
        with pytest.raises(ValueError, match="add up to 7 layers"):
            split_layers(7, 2, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_place(tmp_path: Path, family: str) -> None:
    folder = str(write_plm(tmp_path / family, family, layers=3))
    model = sketch_plm(PLMConfig(folder, rank=0)).base
    places = device_map(model, ["cuda:0", "cuda:1"], (1, 2))
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert sum(name == place or name.startswith(f"{place}.") for place in places) == 1, name
    layers = {place: device for place, device in places.items() if place.rpartition(".")[2].isdigit()}
    assert len(layers) == (6 if family == "t5-lm" else 3)
    assert all(device == ("cuda:0" if place.endswith(".0") else "cuda:1") for place, device in layers.items())
    assert {device for place, device in places.items() if "norm" in place or place == "ln_f"} == {"cuda:1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices_compute_what_one_does(tmp_path: Path, family: str) -> None:
    """Logits, gradients, and decisions from a cache; from files and from random weights."""
    folder = str(write_plm(tmp_path / family, family))
    for changes in ({}, {"random_weights": True, "placement": (2, 0)}):
        config: dict[str, Any] = {"rank": 4, "lora_dropout": 0.0, "plm_dropout": 0.0, **changes}
        one = PLMConfig(folder, **(config | {"placement": None}))
        networks = [
            stir(PolicyNetwork(load_plm(plm), NetworkConfig(state_feature_dim=8)))
            for plm in (one, PLMConfig(folder, **config, device=TWO))
        ]
        hooks = [module for module in networks[1].plm.base.modules() if module._forward_pre_hooks]
        assert len(hooks) >= 3
        results = []
        for network in networks:
            loss = batch_loss(network, BATCH)
            loss.backward()
            with torch.no_grad():
                tokens = network.embed(*BATCH[:4])
                logits = network(BATCH)
                if network.plm.causal:
                    cache = network.plm.new_cache(160)
                    network.decide(tokens[:, :7], cache)
                    results.append({"cached": network.decide(tokens[:, 7:15], cache)})
                else:
                    results.append({})
            results[-1] |= {"logits": logits, "loss": loss.detach()}
            results[-1] |= {name: p.grad for name, p in network.trainable().items() if p.grad is not None}
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_training_and_testing_a_split_plm(tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, batch=2, precision="float32", order=(0, 1, 2, 3))
    losses = {}
    for device in ("cpu", TWO):
        plm = load_plm(PLMConfig("tiny-llama", rank=4, lora_dropout=0.0, device=device))
        network = PolicyNetwork(plm, NetworkConfig(state_feature_dim=8))
        result = train_on(
            network, make_windows(toy_pool(), WindowConfig(w=8)), config, tmp_path / device.replace(",", "+")
        )
        losses[device] = result.history["loss"].tolist()
        with torch.no_grad(), network.plm.using(network.plm.inference_weights(torch.bfloat16)):
            assert torch.isfinite(network(BATCH)).all()
    assert losses[TWO] == pytest.approx(losses["cpu"], abs=1e-6)
    again, meta = load_policy(result.final)  # on one device, whatever it was trained on
    assert (meta.plm.device, again.plm.config.device) == (TWO, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(BATCH), network.eval()(BATCH), atol=1e-6, rtol=1e-5)
