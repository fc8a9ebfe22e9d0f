"""Checkpoints: what is saved comes back to the bit; what does not fit is refused with the reason; the original's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Golden
from llm_fixtures import FAMILIES, stir, tiny_network, toy_pool, write_plm
from netllm_lib import checkpoint
from netllm_lib.abr.batches import make_windows
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings, load_policy
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint, save_upstream_checkpoint
from netllm_lib.checkpoint import describe, load_weights, read_meta, save_checkpoint
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.returns import pool_returns

POOL = toy_pool()
_, SCALE = pool_returns(POOL)


def logits(network: PolicyNetwork) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(make_windows(POOL).batch([0, 1]))


def family_network(folder: Path, family: str, rank: int = 4) -> PolicyNetwork:
    if not folder.is_dir():
        write_plm(folder, family)
    return stir(PolicyNetwork(load_plm(PLMConfig(str(folder), rank=rank)), NetworkConfig(state_feature_dim=8)))


def save(folder: Path, network: PolicyNetwork, **known: Any) -> Path:
    return save_checkpoint(folder, network, replace(describe(network, PolicySettings(20, SCALE)), **known))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "policy", tiny_network(layers=1), step=12)


@pytest.mark.parametrize("rank", [8, 0, -1])
def test_what_is_saved_comes_back(tmp_path: Path, rank: int) -> None:
    network = tiny_network(rank=rank)
    loaded, found = load_policy(save(tmp_path / "policy", network, step=12, score=0.5, train={"epochs": 3}))
    assert found == replace(describe(network, PolicySettings(20, SCALE), {"epochs": 3}), step=12, score=0.5)
    assert torch.equal(logits(loaded), logits(network))
    assert not loaded.training


def test_adapter_is_in_the_layout_of_peft(saved: Path) -> None:
    import peft

    network, _ = load_policy(saved)
    base = load_plm(replace(network.plm.config, rank=0)).model
    adapted = peft.PeftModel.from_pretrained(base, str(saved)).eval()
    x = torch.randn(2, 5, 192)
    with torch.inference_mode():
        # the products of ours may go another way (`netllm_lib.linear`), which rounds differently
        torch.testing.assert_close(adapted.get_base_model()(inputs_embeds=x).last_hidden_state, network.plm(x))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    if path.suffix == ".safetensors":
        change(values := load_file(path))
        save_file(values, path)
    else:
        change(values := json.loads(path.read_text()))
        values.pop("checksum", None)  # as an earlier version wrote it
        path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "modules.safetensors"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop(min(weights)), "missing"),
        (lambda weights: weights.update(stranger=torch.zeros(1)), "unknown"),
        (lambda weights: weights.update({max(weights): torch.zeros(3, 2)}), "shape"),
        (lambda weights: weights[min(weights)].fill_(float("nan")), "NaN"),
    ],
)
def test_weights_that_do_not_fit(saved: Path, name: str, change: Callable[[dict], object], reason: str) -> None:
    edit(saved / name, change)
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        load_policy(saved)


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_model.safetensors", "adapter_config.json", "modules.safetensors"]
)
def test_files_that_are_missing_or_cut(saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:30])
    with pytest.raises(ValueError, match=name):
        load_policy(saved)
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_policy(saved)


def test_another_plm_or_rank_is_refused(saved: Path, tmp_path: Path) -> None:
    for family, hidden in (("llama", 192), ("gpt2", 192), ("llama", 64)):
        other = str(write_plm(tmp_path / f"{family}{hidden}", family, hidden=hidden))
        shapes = rf"another PLM.*llama \(1 layers, hidden 192.*{family} \(1 layers, hidden {hidden}"
        with pytest.raises(ValueError, match=shapes):
            load_policy(saved, plm_source=other)
    with pytest.raises(ValueError, match=r"does not fit .* of shape \[8, 192\], not .* \[4, 192\]"):
        load_weights(saved, tiny_network(rank=4, layers=1))
    edit(saved / "config.json", lambda config: config["plm"].update(rank=10**9))
    with pytest.raises(ValueError, match=r"does not fit .*, not .*1000000000"):
        load_policy(saved)


def test_checkpoints_of_before_are_read(saved: Path) -> None:
    """Format 1, when there was one task only."""
    meta = load_policy(saved)[1]
    edit(saved / "config.json", lambda config: config.update(format=1, **config.pop("settings")) or config.pop("task"))
    assert load_policy(saved)[1] == meta


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("layers"),
        lambda config: config["settings"].pop("scale"),
        lambda config: config["settings"].update(w=0),
        lambda config: config.update(task="vp"),
        lambda config: config.update(surprise=1),
        lambda config: config["plm"].update(trust_remote_code=True),
        lambda config: config.update(format=99),
    ],
)
def test_configs_that_are_not_ours(saved: Path, change: Callable[[dict], object]) -> None:
    edit(saved / "config.json", change)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_policy(saved)


def test_saving_replaces_a_folder_or_leaves_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_policy(saved)[0]
    save(saved, network, step=13)

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save(saved, network, step=14)
    assert read_meta(saved).step == 13
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# --- the original's files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_the_original_both_ways(tmp_path: Path, family: str, rank: int) -> None:
    network, plm = family_network(tmp_path / "plm", family, rank), PLMConfig(str(tmp_path / "plm"))
    if rank < 0:
        with torch.no_grad():
            for parameter in network.plm.trainable().values():
                parameter.mul_(1.01)
    folder = save_upstream_checkpoint(tmp_path / "theirs", network)
    names = {"adapter_config.json", "adapter_model.bin", "modules_except_plm.bin"} if rank > 0 else {"model.bin"}
    assert {p.name for p in folder.iterdir()} == names
    loaded, meta = load_upstream_checkpoint(folder, plm, SCALE)
    assert torch.equal(logits(loaded), logits(network))
    assert (meta.network.state_feature_dim, meta.network.max_timestep, meta.plm.rank) == (8, 46, rank)
    if rank > 0:
        weights = torch.load(folder / "adapter_model.bin", weights_only=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_model.bin").unlink()
        assert torch.equal(logits(load_upstream_checkpoint(folder, plm, SCALE)[0]), logits(network))


def test_model_bin_has_the_keys_of_the_original(tmp_path: Path) -> None:
    network = family_network(tmp_path / "plm", "llama", -1)
    keys = set(torch.load(save_upstream_checkpoint(tmp_path / "x", network) / "model.bin", weights_only=True))
    assert {"plm.embed_tokens.weight", "plm.layers.1.mlp.up_proj.weight", "plm.norm.weight"} <= keys
    assert {"state_encoder.conv3.0.weight", "embed_state6.bias", "action_head.weight"} <= keys
    assert {"modules_except_plm.0.fc6.0.bias", "modules_except_plm.1.weight", "modules_except_plm.11.bias"} <= keys
    around = [k for k in keys if not k.startswith(("plm.", "modules_except_plm."))]
    assert len(around) == len([k for k in keys if k.startswith("modules_except_plm.")])


def test_adapters_of_other_plms_pools_and_kinds(tmp_path: Path) -> None:
    """Early stop leaves out layers; the original loads those of another family or size without a word."""
    theirs = {family: tmp_path / family for family in ("llama", "gpt2", "opt")}
    for family, folder in theirs.items():
        save_upstream_checkpoint(folder / "theirs", family_network(folder / "plm", family))
    llama, plm = theirs["llama"] / "theirs", PLMConfig(str(theirs["llama"] / "plm"))
    assert load_upstream_checkpoint(llama, replace(plm, layers=1), SCALE)[1].layers == 1
    wide = PLMConfig(str(write_plm(tmp_path / "wide", "llama", hidden=128)))

    def refused(
        reason: str, folder: Path, plm: PLMConfig = plm, kind: type[Exception] = ValueError, **scale: Any
    ) -> None:
        with pytest.raises(kind, match=reason):
            load_upstream_checkpoint(folder, plm, replace(SCALE, **scale))

    refused("LoRA targets", theirs["gpt2"] / "theirs")
    refused("does not fit", theirs["opt"] / "theirs")
    refused(r"does not fit.*shape", llama, wide)
    refused("not the training pool", llama, max_timestep=40)
    edit(llama / "adapter_config.json", lambda config: config.update(r=8))
    refused(r"rank 8.*shape", llama)
    edit(llama / "adapter_config.json", lambda config: config.update(peft_type="IA3"))
    refused("IA3", llama)
    refused("model.bin", tmp_path, kind=FileNotFoundError)
    with pytest.raises(ValueError, match="frozen"):
        save_upstream_checkpoint(tmp_path / "none", tiny_network(rank=0))


@pytest.mark.golden
def test_adapters_of_the_original_are_written_back(golden: Golden, tmp_path: Path) -> None:
    """Reading and writing gives the same files: keys, shapes, numbers, and the adapter's settings."""
    folders = sorted(golden("plm").glob("*/adapter"))
    assert folders
    for folder in folders:
        network, _ = load_upstream_checkpoint(folder, PLMConfig.upstream(str(folder.parent / "plm")), SCALE)
        written = save_upstream_checkpoint(tmp_path / folder.parent.name, network)
        for name in ("adapter_model.bin", "modules_except_plm.bin"):
            ours, theirs = (torch.load(f / name, weights_only=True) for f in (written, folder))
            assert set(ours) == set(theirs)
            for key, value in theirs.items():
                np.testing.assert_array_equal(ours[key], value)
        ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (written, folder))
        for config in (ours, theirs):
            config["target_modules"] = sorted(config["target_modules"])
            config.pop("base_model_name_or_path")
        assert ours == theirs


@pytest.mark.parametrize("source", ["somebody/model", "http://127.0.0.1/x", "../x", "a//b", "-x/y\n"])
def test_what_a_checkpoint_names_is_not_looked_for_on_a_hub(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a hub was asked")

    network = tiny_network()
    meta = describe(network, PolicySettings(20, SCALE))
    save_checkpoint(tmp_path / "theirs", network, replace(meta, plm=replace(meta.plm, source=source)))
    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    with pytest.raises(FileNotFoundError, match="PLM"):
        load_policy(tmp_path / "theirs")
