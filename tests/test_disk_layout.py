"""PLMs and adapters on disk are those of transformers and peft: either side reads what the other wrote, without our code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from llm_fixtures import FAMILIES, stir, write_plm
from netllm_lib import checkpoint, runs
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings, load_policy
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.returns import ReturnScale

SCALE = ReturnScale(min_reward=-10.0, max_reward=4.3, target_return=0.05, max_timestep=46, pool_hash="none")
"""Of no pool in particular."""
X = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
"""Embeddings [batch, tokens, hidden]."""


def saved(plm: Path, folder: Path, **config: Any) -> PolicyNetwork:
    """A fine-tuned network on the PLM in a folder, and its checkpoint."""
    network = PolicyNetwork(load_plm(PLMConfig(str(plm), rank=4, **config)), NetworkConfig(state_feature_dim=8))
    stir(network)
    checkpoint.save_checkpoint(folder, network, checkpoint.describe(network, PolicySettings(8, SCALE)))
    return network


def hidden_states(model: Any, family: str) -> torch.Tensor:
    """What a plain model makes of the embeddings, fed as the original feeds each family."""
    if family == "t5-lm":  # the decoder on the encoder's output
        x = model.encoder(inputs_embeds=X).last_hidden_state
        return model.decoder(inputs_embeds=x, encoder_hidden_states=x, use_cache=False).last_hidden_state
    # the original leaves gpt2 without positions
    return model(inputs_embeds=X - model.wpe.weight[: X.shape[1]] if family == "gpt2" else X).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_our_adapter(tmp_path: Path, family: str) -> None:
    """Over plain transformers' model, from the folder that `save_pretrained` wrote and `load_plm` reads: the same hidden states."""
    plm = write_plm(tmp_path / "plm", family)
    network = saved(plm, tmp_path / "policy")
    base = transformers.AutoModel.from_pretrained(plm).eval()
    untuned = hidden_states(base, family)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
    theirs = hidden_states(adapted.get_base_model(), family)
    torch.testing.assert_close(theirs, network.plm(X), atol=2e-5, rtol=0)
    assert (theirs - untuned).abs().max() > 1e-2


def test_an_adapter_of_the_first_layers(tmp_path: Path) -> None:
    """peft finds the layers that were kept and leaves the others as they are."""
    plm = write_plm(tmp_path / "plm", "llama", layers=3)
    network = saved(plm, tmp_path / "policy", layers=2)
    base = transformers.AutoModel.from_pretrained(plm)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.2\."):  # and of no other layer
        adapted: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval().get_base_model()
    second = adapted(inputs_embeds=X, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(adapted.norm(second), network.plm(X), atol=2e-5, rtol=0)


def test_an_adapter_that_peft_wrote(tmp_path: Path) -> None:
    """Its files in the place of ours: the folder loads, and plays with peft's numbers."""
    plm, policy = write_plm(tmp_path / "plm", "llama"), tmp_path / "policy"
    network = saved(plm, policy)
    base = transformers.AutoModel.from_pretrained(plm)
    peft.PeftModel.from_pretrained(base, str(policy), is_trainable=True).save_pretrained(str(tmp_path / "again"))
    about = runs.read_sealed(policy / "config.json", "")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (policy / name).write_bytes((tmp_path / "again" / name).read_bytes())
        about["hashes"][name] = runs.file_hash(policy / name)
    runs.write_sealed(policy / "config.json", about)
    swapped, _ = load_policy(policy)
    assert torch.equal(swapped.plm(X), network.eval().plm(X))


@pytest.mark.parametrize("layout", ["one file", "shards", "half precision"])
def test_load_plm_reads_what_save_pretrained_wrote(tmp_path: Path, layout: str) -> None:
    """By the language model's class too, with its head, in shards, and in half precision."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    if layout == "half precision":
        model = model.half()
    model.save_pretrained(tmp_path / "plm", max_shard_size="100KB" if layout == "shards" else "1GB")
    assert (len(list((tmp_path / "plm").glob("*.safetensors"))) > 1) == (layout == "shards")
    plain = transformers.AutoModel.from_pretrained(tmp_path / "plm", dtype=torch.float32).eval()
    theirs = plain(inputs_embeds=X).last_hidden_state
    torch.testing.assert_close(load_plm(PLMConfig(str(tmp_path / "plm"), rank=0))(X), theirs, atol=2e-5, rtol=0)
