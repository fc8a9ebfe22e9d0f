"""Attention over a cache of earlier tokens: memory allocated once, grouped heads that share their keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ATTENTION = "netllm_grouped_sdpa"


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


def choose_attention(hf_config: Any, kind: str) -> str | None:
    """The attention to ask transformers for: "eager", or for "fast" ours where it gains; None leaves the choice to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if kind == "eager":
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
