"""Every decoder that transformers runs on embeddings, and none that is no decoder; small random models made from configs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_fixtures import stir, toy_pool
from netllm_lib.abr.batches import make_windows, pool_returns
from netllm_lib.abr.model import TOKENS_PER_STEP, NetworkConfig, PolicyNetwork, PolicySettings
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint, save_upstream_checkpoint
from netllm_lib.checkpoint import describe
from netllm_lib.plm import PLM, PLMConfig, load_plm

WIDTH, LAYERS = 64, 3
POOL = toy_pool(episodes=2)
_, SCALE = pool_returns(POOL)

SMALL: dict[str, Any] = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHORT: dict[str, Any] = SMALL | {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SHORT |= {"initializer_range": 0.1}
DEEP: dict[str, Any] = SHORT | {"intermediate_size": 96}
GROUPED: dict[str, Any] = DEEP | {"num_key_value_heads": 2}
HEADS: dict[str, Any] = GROUPED | {"head_dim": 16}
ROPE: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
OPT: dict[str, Any] = SHORT | {"ffn_dim": 96, "init_std": 0.1, "word_embed_proj_dim": WIDTH}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-3": ("LlamaConfig", GROUPED | {"rope_parameters": ROPE, "max_position_embeddings": 1024}),
    "mistral": ("MistralConfig", GROUPED),
    "mistral, no window": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "mistral, small window": ("MistralConfig", GROUPED | {"sliding_window": 24}),
    "gpt2": (
        "GPT2Config",
        SMALL | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "initializer_range": 0.1},
    ),
    "opt": ("OPTConfig", OPT | {"max_position_embeddings": 512}),
    "t5-lm": ("T5Config", SMALL | {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": LAYERS, "num_heads": 4}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma2": ("Gemma2Config", HEADS | {"sliding_window": 24}),
    "gemma3": ("Gemma3TextConfig", HEADS | {"sliding_window": 24}),
    "phi3": ("Phi3Config", GROUPED),
    "falcon": ("FalconConfig", SHORT),
    "gpt_neox": ("GPTNeoXConfig", DEEP),
    "bloom": ("BloomConfig", SHORT),
}
CAUSAL = [name for name in DECODERS if name != "t5-lm"]


def write(folder: Path, kind: str, values: dict[str, Any]) -> Path:
    """A random model in Hugging Face layout. Every parameter is random: biases and norms, which start as constants, too."""
    import transformers as hf

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = hf.AutoModel.from_config(getattr(hf, kind)(**values))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("zoo")

    @functools.cache
    def folder(name: str) -> str:
        return str(write(root / name.replace(" ", "-"), *DECODERS[name]))

    return folder


def tokens(count: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def network_of(config: PLMConfig) -> PolicyNetwork:
    return stir(PolicyNetwork(load_plm(config), NetworkConfig(state_feature_dim=8)))


def run(plm: PLM, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return plm(x)


# --- decoders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_lora_changes_the_output_and_gets_the_gradient(zoo: Any, name: str) -> None:
    plm = load_plm(PLMConfig(zoo(name), rank=4, lora_dropout=0.0))
    alone = load_plm(PLMConfig(zoo(name), rank=0))
    x = tokens()
    assert not alone.trainable()
    torch.testing.assert_close(run(plm, x), run(alone, x), atol=1e-5, rtol=0)  # B is zero at first
    trainable = plm.trainable()
    matrices = len(plm.lora_targets) * LAYERS * (3 if name == "t5-lm" else 1)  # t5: encoder, decoder, cross-attention
    assert len(trainable) == 2 * matrices
    plm(x).square().sum().backward()
    for key, parameter in trainable.items():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert bool(parameter.grad.any()) == ("lora_B" in key)  # with B zero no gradient passes to A
    with torch.no_grad():
        for key, parameter in trainable.items():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    assert float((run(plm, x) - run(alone, x)).abs().max()) > 1e-2
    plm(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in trainable.values() if p.grad is not None)


@pytest.mark.parametrize("name", DECODERS)
def test_early_stop_is_the_first_layers_and_the_final_norm(zoo: Any, name: str) -> None:
    """Against a whole model whose lists of layers are cut by hand."""
    x = tokens()
    cut, whole = (load_plm(PLMConfig(zoo(name), rank=0, layers=k, attention="eager")) for k in (2, None))
    expected = run(whole, x)
    for module in whole.base.modules():
        for attribute in ("layers", "h", "block"):
            if isinstance(layers := getattr(module, attribute, None), nn.ModuleList):
                setattr(module, attribute, layers[:2])
        if hasattr(module, "config"):
            module.config.num_hidden_layers = 2
    torch.testing.assert_close(run(cut, x), run(whole, x), atol=1e-5, rtol=0)
    assert float((run(cut, x) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_logits_are_the_recomputed_ones(zoo: Any, name: str) -> None:
    """Logits of the policy at every step of a window, from whole sequences and step by step."""
    network = network_of(PLMConfig(zoo(name), rank=4))
    states, actions, returns, timesteps, *_ = make_windows(POOL).batch([0, 1])
    with torch.inference_mode():
        embedded = network.embed(states, actions, returns, timesteps)[:, :-1]
        cache = network.plm.new_cache(embedded.shape[1], attend_tokens=embedded.shape[1])
        parts = embedded.split([7] + [TOKENS_PER_STEP] * (states.shape[1] - 1), dim=1)
        cached = torch.stack([network.decide(part, cache) for part in parts], dim=1)
        again = [network.decide(embedded[:, : 7 + TOKENS_PER_STEP * step]) for step in range(len(parts))]
    torch.testing.assert_close(cached, torch.stack(again, dim=1), atol=1e-4, rtol=0)
    assert float(cached.std()) > 1e-2


def test_fused_and_eager_attention_agree_for_all(zoo: Any) -> None:
    for name in DECODERS:
        fast, eager = (load_plm(PLMConfig(zoo(name), rank=0, attention=kind)) for kind in ("fast", "eager"))
        torch.testing.assert_close(run(fast, tokens(180)), run(eager, tokens(180)), atol=2e-5, rtol=0, msg=name)


def test_half_precision(zoo: Any) -> None:
    for name in ("llama", "gpt2", "opt", "t5-lm", "gemma3"):
        half, whole = (load_plm(PLMConfig(zoo(name), dtype=dtype)) for dtype in ("bfloat16", "float32"))
        hidden = run(half, tokens())
        assert (half.identity, hidden.dtype) == (whole.identity, torch.float32)
        assert 1e-4 < float((hidden - run(whole, tokens())).std() / hidden.std()) < 0.1, name


# --- a sliding window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "upstream"])
def test_sliding_window_against_an_explicit_mask(zoo: Any, kind: str) -> None:
    """transformers 4.34 kept `sliding_window` previous tokens beside the current one, later versions count it."""
    free = load_plm(PLMConfig(zoo("mistral, no window"), rank=0, attention="eager"))
    window = 24 + (kind == "upstream")
    x = tokens(167)
    distance = torch.arange(167)[:, None] - torch.arange(167)[None]
    seen = (distance >= 0) & (distance < window)
    mask = torch.zeros(2, 1, 167, 167).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = free.base(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    for attention in ("eager", "fast"):
        config = PLMConfig(zoo("mistral, small window"), rank=0, attention=attention, sliding_window=kind)  # type: ignore[arg-type]
        plm = load_plm(config)
        torch.testing.assert_close(run(plm, x), expected, atol=1e-5, rtol=0)
        cache = plm.new_cache(167)
        with torch.inference_mode():
            pieces = torch.cat([plm(part, cache=cache) for part in x.split([7] + [8] * 20, dim=1)], dim=1)
        torch.testing.assert_close(pieces, expected, atol=1e-5, rtol=0)
    assert float((run(free, x) - expected).abs().max()) > 1e-2
    assert PLMConfig.upstream("x").sliding_window == "upstream"


def test_sliding_window_and_a_limited_cache(zoo: Any) -> None:
    """The window of the PLM and that of the policy, the shorter one counts."""
    plm = load_plm(PLMConfig(zoo("mistral, small window"), rank=0, layers=1))
    x = tokens(167)
    for attend, seen in ((16, 16), (24, 24), (64, 24)):
        cache = plm.new_cache(167, attend_tokens=attend)
        with torch.inference_mode():
            last = torch.cat([plm(part, cache=cache) for part in x.split([7] + [8] * 20, dim=1)], dim=1)[:, -1]
            torch.testing.assert_close(last, plm(x[:, -seen:])[:, -1], atol=1e-5, rtol=0)


# --- positions ----------------------------------------------------------------------------------------------------------


NEO = SMALL | {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
GPTJ = SMALL | {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
LIMITED = {"OPTConfig": OPT, "GPTNeoConfig": NEO, "GPTJConfig": GPTJ}


@pytest.mark.parametrize("kind", LIMITED)
def test_too_few_positions_are_refused_before_anything_is_played(tmp_path: Path, kind: str) -> None:
    size = "n_positions" if kind == "GPTJConfig" else "max_position_embeddings"
    folders = [str(write(tmp_path / str(n), kind, LIMITED[kind] | {size: n})) for n in (375, 374, 160)]
    enough, short, tiny = (network_of(PLMConfig(folder, rank=4)) for folder in folders)
    meta = describe(enough, PolicySettings(20, SCALE))
    assert enough.plm.max_tokens == 375
    LLMPolicy(enough, meta, EvalConfig())  # 46 steps of eight tokens and the last seven
    with pytest.raises(ValueError, match=r'positions for 374 tokens, 375 are needed; use context_window="rolling"'):
        LLMPolicy(short, meta, EvalConfig())
    LLMPolicy(short, meta, EvalConfig(context_window="rolling"))
    with pytest.raises(ValueError, match="positions for 160 tokens, 167 are needed; use a smaller w"):
        LLMPolicy(tiny, meta, EvalConfig(context_window="rolling"))
    LLMPolicy(tiny, meta, EvalConfig(context_window="rolling", w=19))
    with pytest.raises(ValueError, match="positions for 160 tokens, 161 are needed"):
        run(tiny.plm, tokens(161))
    cache = tiny.plm.new_cache(200)
    with torch.inference_mode(), pytest.raises(ValueError, match="positions for 160 tokens, 180 are needed"):
        for part in tokens(180).split([140, 40], dim=1):
            tiny.plm(part, cache=cache)


# --- what is no decoder -------------------------------------------------------------------------------------------------

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", DEEP),
    "roberta": ("RobertaConfig", DEEP),
    "xlnet": ("XLNetConfig", SMALL | {"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 96}),
    "deberta-v2": ("DebertaV2Config", DEEP),
    "distilbert": ("DistilBertConfig", SMALL | {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}),
    "modernbert": ("ModernBertConfig", DEEP | {"cls_token_id": 1, "sep_token_id": 2}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / name, *ENCODERS[name])
    for random_weights in (False, True):
        with pytest.raises(ValueError, match=rf"{name} model is not a decoder.*use a decoder such as"):
            load_plm(PLMConfig(str(folder), random_weights=random_weights))


def test_encoder_decoders_other_than_t5_are_refused(tmp_path: Path) -> None:
    sizes = {f"{part}_layers": 2 for part in ("encoder", "decoder")} | {"d_model": WIDTH}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    folder = write(tmp_path / "bart", "BartConfig", SMALL | sizes | heads)
    with pytest.raises(ValueError, match=f"{folder}: a bart model does not run on inputs_embeds"):
        load_plm(PLMConfig(str(folder)))


# --- files of the original ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "t5-lm"])
@pytest.mark.parametrize("rows", [33, 30])
def test_model_bin_with_resized_token_embeddings(zoo: Any, tmp_path: Path, name: str, rows: int) -> None:
    """The original resizes them to its tokenizer: one padding token more, or fewer than the config has."""
    network = network_of(PLMConfig(zoo(name), rank=-1))
    with torch.no_grad():
        for parameter in network.plm.trainable().values():
            parameter.mul_(1.01)
    folder = save_upstream_checkpoint(tmp_path / "theirs", network)
    whole = torch.load(folder / "model.bin", weights_only=True)
    tables = [k for k, v in whole.items() if k.startswith("plm.") and v.shape == (32, WIDTH)]
    embeddings = [k for k in tables if any(word in k for word in ("embed", "wte", "shared"))]
    assert len(embeddings) == (3 if name == "t5-lm" else 1)
    for key in embeddings:
        whole[key] = torch.cat([whole[key], torch.ones(1, WIDTH)])[:rows]
    torch.save(whole, folder / "model.bin")
    loaded, _ = load_upstream_checkpoint(folder, PLMConfig(zoo(name)), SCALE)
    batch = make_windows(POOL).batch([0, 1])
    with torch.inference_mode():
        assert torch.equal(loaded(batch), network(batch))
    whole[embeddings[0]] = torch.ones(32, WIDTH + 1)
    torch.save(whole, folder / "model.bin")
    with pytest.raises(ValueError, match=r"model\.bin: does not fit.*shape"):
        load_upstream_checkpoint(folder, PLMConfig(zoo(name)), SCALE)
