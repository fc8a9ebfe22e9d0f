"""Small PLMs, pools and observations for the tests of the LLM policy; nothing here needs a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from netllm_lib.abr.batches import Batch, Windows, make_windows
from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig, train

FAMILIES = ("llama", "mistral", "gpt2", "opt", "t5-lm")


def write_plm(folder: Path, family: str, layers: int = 2, hidden: int = 64, shard_size: str = "1GB") -> Path:
    """A random PLM of a family in Hugging Face layout."""
    import transformers as hf

    small: dict[str, Any] = {"vocab_size": 32}
    config: hf.PreTrainedConfig
    if family in ("llama", "mistral"):
        kind = hf.LlamaConfig if family == "llama" else hf.MistralConfig
        small |= {"hidden_size": hidden, "intermediate_size": 96, "num_hidden_layers": layers}
        config = kind(**small, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    elif family == "gpt2":
        config = hf.GPT2Config(**small, n_embd=hidden, n_layer=layers, n_head=4, n_positions=128, initializer_range=0.1)
    elif family == "opt":
        small |= {"hidden_size": hidden, "ffn_dim": 96, "num_hidden_layers": layers, "word_embed_proj_dim": hidden}
        config = hf.OPTConfig(**small, num_attention_heads=4, init_std=0.1, max_position_embeddings=512)
    else:
        config = hf.T5Config(**small, d_model=hidden, d_kv=16, d_ff=96, num_layers=layers, num_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModel.from_config(config).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def tiny_network(rank: int = 8, lora: bool = True, **plm: Any) -> PolicyNetwork:
    """A network on the tiny random llama whose LoRA, unless `lora` is False, is not zero as it is at first."""
    network = PolicyNetwork(load_plm(PLMConfig("tiny-llama", rank=rank, **plm)), NetworkConfig(state_feature_dim=8))
    return stir(network) if lora and rank > 0 else network.eval()


def stir(network: PolicyNetwork) -> PolicyNetwork:
    """Give LoRA's zero matrices some values, as training would."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in network.plm.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return network.eval()


def train_on(
    network: PolicyNetwork, data: ExperiencePool | Windows, config: TrainConfig, folder: Path, **options: Any
) -> Any:
    """Train on windows, or on the default ones of a pool; its TrainingRun, in which everything is known."""
    windows = make_windows(data) if isinstance(data, ExperiencePool) else data
    return train(network, windows, config, folder=folder, settings=windows.settings, **options)


def batch_loss(network: PolicyNetwork, batch: Batch, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The mean over the labels."""
    total, count = network.loss(batch, dtype)
    return total / count


def toy_pool(episodes: int = 4, length: int = 47, seed: int = 0, learnable: bool = False) -> ExperiencePool:
    """A pool of random numbers; if `learnable`, the level follows from the buffer."""
    rng = np.random.default_rng(seed)
    count = episodes * length
    states = rng.random((count, 6, 6)).astype(np.float32)
    actions = rng.integers(0, 6, count)
    if learnable:
        actions = (states[:, 1, -1] * 6).astype(np.int64)
    dones = np.arange(count) % length == length - 1
    return ExperiencePool(states, actions, rng.normal(size=count), dones)


def episodes_of(count: int, seed: int = 7) -> Episodes:
    return Episodes(np.arange(count), np.ones(count, int), None, np.ones((count, 48), int), seed, True)


def observe(states: np.ndarray, rewards: np.ndarray, chunk: int, rows: np.ndarray | None = None) -> Observation:
    """What a policy sees before it chooses `chunk`, from scripted `states` [chunks, N, 6, 6] and `rewards` [chunks, N]."""
    rows = np.arange(states.shape[1]) if rows is None else rows
    nothing = np.zeros(len(rows))
    now = (states[chunk - 1, rows], nothing, nothing.astype(int), rewards[chunk - 1, rows], np.zeros((len(rows), 6)))
    return Observation(chunk, rows, *now)


def replay(
    policy: LLMPolicy, states: np.ndarray, rewards: np.ndarray, lockstep: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Feed scripted observations: levels [N, chunks] and logits [N, chunks, 6]."""
    chunks, count = rewards.shape
    policy.reset(episodes_of(count))
    levels, logits = np.empty((count, chunks), dtype=int), np.empty((count, chunks, 6))
    for rows in [np.arange(count)] if lockstep else [np.array([i]) for i in range(count)]:
        for chunk in range(1, chunks + 1):
            levels[rows, chunk - 1] = policy.act(observe(states, rewards, chunk, rows))
            logits[rows, chunk - 1] = policy.logits
    return levels, logits
