"""What makes a PLM fast without changing what it computes: a cache of earlier tokens whose memory is allocated once, grouped
heads that share their keys, and a last layer that computes only at the tokens whose hidden states are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

ATTENTION = "netllm_grouped_sdpa"
GROUPED = ("llama", "mistral", "qwen2")
"""Models whose heads can share keys in the same way."""
LAST_LAYER_PARTS = dict.fromkeys(GROUPED, ("self_attn.q_proj", "self_attn.o_proj", "mlp")) | {
    "gpt2": ("attn.c_proj", "mlp")
}
"""By `model_type`, what a decoder layer does to each token alone and no later token sees, if the layer is the last one."""


class TokenCache:
    """Keys and values of the tokens so far, for N sequences of equal length.

    Memory is allocated once, so that a step copies its own tokens only; concatenation, which transformers does, copies
    everything at every step. With `attend_tokens` a new token sees at most so many of the latest tokens (counting those
    that come with it), and memory is for these and a few more, not for `max_tokens`: now and then the latest move to the front.
    """

    SLACK = 64  # tokens between two moves

    def __init__(self, layers: int, max_tokens: int, attend_tokens: int | None = None):
        from transformers.cache_utils import Cache, DynamicLayer

        room = max_tokens if attend_tokens is None else min(max_tokens, attend_tokens + self.SLACK)

        class Preallocated(DynamicLayer):
            seen = 0  # tokens so far
            held = 0  # of them, in memory
            keys: Any
            values: Any

            def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
                batch, heads, _, _ = key_states.shape
                self.dtype, self.device = key_states.dtype, key_states.device
                self.keys = key_states.new_empty(batch, heads, room, key_states.shape[-1])
                self.values = value_states.new_empty(batch, heads, room, value_states.shape[-1])
                self.is_initialized = True

            def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not self.is_initialized:
                    self.lazy_initialization(key_states, value_states)
                new = key_states.shape[2]
                self.seen += new
                if self.seen > max_tokens:
                    raise ValueError(f"the cache holds {max_tokens} tokens a sequence and got {self.seen}")
                if new > room:
                    raise ValueError(f"the cache has room for {room} tokens and got {new} at once: give it fewer")
                if self.held + new > room:
                    assert attend_tokens is not None  # otherwise there is room for all
                    kept = max(0, attend_tokens - new)
                    for store in (self.keys, self.values):
                        store[:, :, :kept] = store[:, :, self.held - kept : self.held].clone()
                    self.held = kept
                start, self.held = self.held, self.held + new
                self.keys[:, :, start : self.held] = key_states
                self.values[:, :, start : self.held] = value_states
                attended = slice(self.held - min(self.seen, attend_tokens or self.seen), self.held)
                return self.keys[:, :, attended], self.values[:, :, attended]

            def get_seq_length(self) -> int:
                return self.seen

            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                seen = self.seen + query_length
                attended = min(seen, attend_tokens or seen)
                return attended, seen - attended

        self.tokens = 0
        """How many tokens each sequence has so far."""
        self.room = room
        self._layers: list[Any] = [Preallocated() for _ in range(layers)]
        self.states = Cache(layers=self._layers)

    def skip(self, tokens: int) -> None:
        """Go on as if so many tokens had been seen, their keys and values left as they are: for measuring."""
        self.tokens += tokens
        for layer in self._layers:
            layer.seen += tokens
            layer.held = min(layer.held + tokens, max(0, self.room - self.SLACK))

    @property
    def nbytes(self) -> int:
        """Memory that is allocated."""
        return sum(t.nbytes for layer in self._layers if layer.is_initialized for t in (layer.keys, layer.values))


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
            mask = attention_mask
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
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


def choose_attention(hf_config: Any, kind: str) -> str | None:
    """The attention to ask transformers for: "eager", or for "fast" ours where it gains; None leaves the choice to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if kind == "eager":
        return "eager"
    heads, kv_heads = (getattr(hf_config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if hf_config.model_type not in GROUPED or kv_heads in (None, heads):
        return None
    AttentionInterface.register(ATTENTION, _grouped_sdpa)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


class LastLayer:
    """Lets the last layer compute only at some tokens; elsewhere the hidden states mean nothing.

    The keys and values that a layer makes of a token matter to all later tokens, but nothing comes after the last layer: there
    queries, output projection and MLP are needed only where a hidden state is read, which is one of eight tokens.
    """

    def __init__(self, layer: nn.Module, parts: tuple[str, ...]):
        self.read: slice | None = None
        """The tokens that are computed; None: all."""
        for name in parts:
            part = layer.get_submodule(name)
            part.forward = partial(self._at_read_tokens, part.forward)

    def _at_read_tokens(self, forward: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any) -> torch.Tensor:
        if self.read is None:
            return forward(x, *args)
        # contiguous: PyTorch would otherwise multiply sequence by sequence
        computed = forward(x[:, self.read].contiguous(), *args)
        whole = computed.new_zeros(*x.shape[:2], computed.shape[-1])
        whole[:, self.read] = computed
        return whole


def last_layer(model: Any) -> LastLayer | None:
    """Prepare the last layer of a decoder; None for a family that it is not known for."""
    parts = LAST_LAYER_PARTS.get(model.config.model_type)
    layers = getattr(model, "layers", None) or getattr(model, "h", None)
    return LastLayer(layers[-1], parts) if parts and layers else None
