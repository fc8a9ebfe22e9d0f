"""Checkpoints: what is saved comes back to the bit; what does not fit is refused with the reason; the original's files."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_fixtures import FAMILIES, stir, tiny_network, toy_pool, write_plm
from netllm_lib.abr.batches import make_windows, pool_returns
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings, load_policy
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint, save_upstream_checkpoint
from netllm_lib.checkpoint import CheckpointMeta, describe, load_weights, read_meta, save_checkpoint
from netllm_lib.plm import PLMConfig, load_plm

POOL = toy_pool()
_, SCALE = pool_returns(POOL)


def logits(network: PolicyNetwork) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(make_windows(POOL).batch([0, 1]))


def family_network(folder: Path, family: str, rank: int = 4, **plm: object) -> PolicyNetwork:
    if not folder.is_dir():
        write_plm(folder, family)
    config = PLMConfig(str(folder), rank=rank, **plm)  # type: ignore[arg-type]
    return stir(PolicyNetwork(load_plm(config), NetworkConfig(state_feature_dim=8)))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PolicyNetwork, CheckpointMeta]:
    network = tiny_network(layers=1)
    meta = replace(describe(network, PolicySettings(20, SCALE), {"epochs": 3}), step=12, score=0.5)
    return save_checkpoint(tmp_path / "policy", network, meta), network, meta


@pytest.mark.parametrize("rank", [8, 0, -1])
def test_what_is_saved_comes_back(tmp_path: Path, rank: int) -> None:
    network = tiny_network(rank=rank)
    meta = describe(network, PolicySettings(20, SCALE))
    loaded, found = load_policy(save_checkpoint(tmp_path / "policy", network, meta))
    assert found == meta
    assert torch.equal(logits(loaded), logits(network))
    assert not loaded.training


def test_meta_holds_what_a_test_needs(saved: tuple[Path, PolicyNetwork, CheckpointMeta]) -> None:
    folder, _, meta = saved
    found = read_meta(folder, PolicyNetwork)
    assert found == meta
    settings = found.settings
    assert settings.pool_hash == POOL.content_hash()
    assert (settings.scale.min_reward, settings.scale.max_reward) == (POOL.rewards.min(), POOL.rewards.max())
    assert (found.layers, found.hidden_size, settings.w, found.step) == (1, 192, 20, 12)


def test_adapter_is_in_the_layout_of_peft(saved: tuple[Path, PolicyNetwork, CheckpointMeta]) -> None:
    import peft

    folder, network, _ = saved
    base = load_plm(replace(network.plm.config, rank=0)).model
    adapted = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    x = torch.randn(2, 5, 192)
    with torch.inference_mode():
        assert torch.equal(adapted.get_base_model()(inputs_embeds=x).last_hidden_state, network.plm(x))


def edit(path: Path, change: Callable[[dict], None]) -> None:
    values = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    change(values)
    if path.suffix == ".safetensors":
        save_file(values, path)
    else:
        path.write_text(json.dumps(values))


def drop_one(weights: dict) -> None:
    weights.pop(sorted(weights)[0])


def add_one(weights: dict) -> None:
    weights["stranger"] = torch.zeros(1)


def widen_one(weights: dict) -> None:
    key = sorted(weights)[-1]
    weights[key] = torch.zeros(*weights[key].shape, 2)


def spoil_one(weights: dict) -> None:
    weights[sorted(weights)[0]].fill_(float("nan"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "modules.safetensors"])
@pytest.mark.parametrize(
    ("change", "reason"), [(drop_one, "missing"), (add_one, "unknown"), (widen_one, "shape"), (spoil_one, "NaN")]
)
def test_weights_that_do_not_fit(
    saved: tuple[Path, PolicyNetwork, CheckpointMeta], name: str, change: Callable[[dict], None], reason: str
) -> None:
    edit(saved[0] / name, change)
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        load_policy(saved[0])


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_model.safetensors", "adapter_config.json", "modules.safetensors"]
)
def test_files_that_are_missing_or_cut(saved: tuple[Path, PolicyNetwork, CheckpointMeta], name: str) -> None:
    path = saved[0] / name
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=name):
        load_policy(saved[0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_policy(saved[0])


def test_another_plm_is_refused(saved: tuple[Path, PolicyNetwork, CheckpointMeta], tmp_path: Path) -> None:
    folder = saved[0]
    for family, hidden in (("llama", 192), ("gpt2", 192), ("llama", 64)):
        other = write_plm(tmp_path / f"{family}{hidden}", family, hidden=hidden)
        with pytest.raises(
            ValueError, match=rf"another PLM.*llama \(1 layers, hidden 192.*{family} \(1 layers, hidden {hidden}"
        ):
            load_policy(folder, plm_source=str(other))
    edit(folder / "config.json", lambda config: config["plm"].update(layers=2))
    with pytest.raises(ValueError, match="another PLM"):
        load_policy(folder)


def test_another_rank_is_refused(saved: tuple[Path, PolicyNetwork, CheckpointMeta]) -> None:
    folder = saved[0]
    with pytest.raises(ValueError, match=r"does not fit .* of shape \[8, 192\], not .* \[4, 192\]"):
        load_weights(folder, tiny_network(rank=4, layers=1))
    edit(folder / "config.json", lambda config: config["plm"].update(rank=10**9))
    with pytest.raises(ValueError, match=r"does not fit .*, not .*1000000000"):
        load_policy(folder)


def test_checkpoints_of_before_are_read(saved: tuple[Path, PolicyNetwork, CheckpointMeta]) -> None:
    """Format 1, when there was one task only."""
    folder, _, meta = saved

    def older(config: dict) -> None:
        config.update(format=1, **config.pop("settings"))
        config.pop("task")

    edit(folder / "config.json", older)
    assert load_policy(folder)[1] == meta


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
def test_configs_that_are_not_ours(
    saved: tuple[Path, PolicyNetwork, CheckpointMeta], change: Callable[[dict], None]
) -> None:
    edit(saved[0] / "config.json", change)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_policy(saved[0])


def test_saving_replaces_a_folder_or_leaves_it(
    saved: tuple[Path, PolicyNetwork, CheckpointMeta], monkeypatch: pytest.MonkeyPatch
) -> None:
    from netllm_lib import checkpoint

    folder, network, meta = saved
    save_checkpoint(folder, network, replace(meta, step=13))
    assert read_meta(folder).step == 13

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, network, replace(meta, step=14))
    assert read_meta(folder).step == 13
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# --- the original's files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_the_original_both_ways(tmp_path: Path, family: str, rank: int) -> None:
    network = family_network(tmp_path / "plm", family, rank)
    if rank < 0:
        with torch.no_grad():
            for parameter in network.plm.trainable().values():
                parameter.mul_(1.01)
    folder = save_upstream_checkpoint(tmp_path / "theirs", network)
    names = {"adapter_config.json", "adapter_model.bin", "modules_except_plm.bin"} if rank > 0 else {"model.bin"}
    assert {p.name for p in folder.iterdir()} == names
    loaded, meta = load_upstream_checkpoint(folder, PLMConfig(str(tmp_path / "plm")), SCALE)
    assert torch.equal(logits(loaded), logits(network))
    assert (meta.network.state_feature_dim, meta.network.max_timestep, meta.plm.rank) == (8, 46, rank)


def test_model_bin_has_the_keys_of_the_original(tmp_path: Path) -> None:
    network = family_network(tmp_path / "plm", "llama", -1)
    keys = set(torch.load(save_upstream_checkpoint(tmp_path / "x", network) / "model.bin", weights_only=True))
    assert {"plm.embed_tokens.weight", "plm.layers.1.mlp.up_proj.weight", "plm.norm.weight"} <= keys
    assert {"state_encoder.conv3.0.weight", "embed_state6.bias", "action_head.weight"} <= keys
    assert {"modules_except_plm.0.fc6.0.bias", "modules_except_plm.1.weight", "modules_except_plm.11.bias"} <= keys
    around = [k for k in keys if not k.startswith(("plm.", "modules_except_plm."))]
    assert len(around) == len([k for k in keys if k.startswith("modules_except_plm.")])


def test_adapter_in_safetensors(tmp_path: Path) -> None:
    network = family_network(tmp_path / "plm", "llama")
    folder = save_upstream_checkpoint(tmp_path / "theirs", network)
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    loaded, _ = load_upstream_checkpoint(folder, PLMConfig(str(tmp_path / "plm")), SCALE)
    assert torch.equal(logits(loaded), logits(network))


def test_early_stop_leaves_out_layers_that_it_never_reaches(tmp_path: Path) -> None:
    network = family_network(tmp_path / "plm", "llama")
    folder = save_upstream_checkpoint(tmp_path / "theirs", network)
    loaded, meta = load_upstream_checkpoint(folder, PLMConfig(str(tmp_path / "plm"), layers=1), SCALE)
    assert meta.layers == 1
    assert torch.equal(loaded.embed_action.weight, network.embed_action.weight)


def test_adapter_of_another_family_or_size(tmp_path: Path) -> None:
    """The original loads these without a word."""
    theirs = {family: tmp_path / family for family in ("llama", "gpt2", "opt")}
    for family, folder in theirs.items():
        save_upstream_checkpoint(folder / "theirs", family_network(folder / "plm", family))
    with pytest.raises(ValueError, match="LoRA targets"):
        load_upstream_checkpoint(theirs["gpt2"] / "theirs", PLMConfig(str(theirs["llama"] / "plm")), SCALE)
    with pytest.raises(ValueError, match="does not fit"):
        load_upstream_checkpoint(theirs["opt"] / "theirs", PLMConfig(str(theirs["llama"] / "plm")), SCALE)
    wide = write_plm(tmp_path / "wide", "llama", hidden=128)
    with pytest.raises(ValueError, match=r"does not fit.*shape"):
        load_upstream_checkpoint(theirs["llama"] / "theirs", PLMConfig(str(wide)), SCALE)


def test_wrong_pool_or_rank_or_files(tmp_path: Path) -> None:
    folder = save_upstream_checkpoint(tmp_path / "theirs", family_network(tmp_path / "plm", "llama"))
    plm = PLMConfig(str(tmp_path / "plm"))
    with pytest.raises(ValueError, match="not the training pool"):
        load_upstream_checkpoint(folder, plm, replace(SCALE, max_timestep=40))
    edit(folder / "adapter_config.json", lambda config: config.update(r=8))
    with pytest.raises(ValueError, match=r"rank 8.*shape"):
        load_upstream_checkpoint(folder, plm, SCALE)
    edit(folder / "adapter_config.json", lambda config: config.update(peft_type="IA3"))
    with pytest.raises(ValueError, match="IA3"):
        load_upstream_checkpoint(folder, plm, SCALE)
    with pytest.raises(FileNotFoundError, match="model.bin"):
        load_upstream_checkpoint(tmp_path, plm, SCALE)
    with pytest.raises(ValueError, match="frozen"):
        save_upstream_checkpoint(tmp_path / "none", tiny_network(rank=0))


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("name", ["adapter_model.bin", "modules_except_plm.bin"])
def test_hostile_and_broken_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    network = family_network(tmp_path / "plm", "llama")
    clean = save_upstream_checkpoint(tmp_path / "clean", network)
    plm = PLMConfig(str(tmp_path / "plm"))

    def refused(how: Callable[[Path], object]) -> None:
        folder = Path(shutil.copytree(clean, tmp_path / "theirs", dirs_exist_ok=True))
        how(folder / name)
        with pytest.raises(ValueError, match=name):
            load_upstream_checkpoint(folder, plm, SCALE)

    refused(lambda path: torch.save({"weight": Evil()}, path))
    refused(lambda path: path.write_bytes(pickle.dumps(Evil())))
    refused(lambda path: path.write_bytes(path.read_bytes()[:500]))
    refused(lambda path: path.write_bytes(b""))
    refused(lambda path: path.write_bytes(b"<html>"))
    refused(lambda path: torch.save([1, 2], path))
    refused(lambda path: torch.save({"weight": 3}, path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.golden
def test_adapters_of_the_original_are_written_back(golden: Path, tmp_path: Path) -> None:
    """Reading and writing gives the same files: keys, shapes, numbers, and the adapter's settings."""
    compared = 0
    for folder in sorted(golden.glob("plm/*/adapter")):
        network, _ = load_upstream_checkpoint(folder, PLMConfig.upstream(str(folder.parent / "plm")), SCALE)
        written = save_upstream_checkpoint(tmp_path / folder.parent.name, network)
        for name in ("adapter_model.bin", "modules_except_plm.bin"):
            ours, theirs = (torch.load(f / name, weights_only=True) for f in (written, folder))
            assert list(ours) == list(theirs) or set(ours) == set(theirs)
            for key, value in theirs.items():
                np.testing.assert_array_equal(ours[key], value)
        ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (written, folder))
        for config in (ours, theirs):
            config["target_modules"] = sorted(config["target_modules"])
            config.pop("base_model_name_or_path")
        assert ours == theirs
        compared += 1
    assert compared
