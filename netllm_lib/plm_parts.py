"""What is changed of a Hugging Face model before it is a `PLM`, and what is looked up or checked in it."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import nn

LORA_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),  # the original names q_proj and v_proj, which gpt2 does not have
    "t5": ("q", "v"),
    "phi3": ("qkv_proj",),
}


class _SilentEmbedding(nn.Embedding):
    """Adds nothing: gpt2's positions, which the original leaves out when it feeds embeddings."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.weight.new_zeros(*input.shape, self.embedding_dim)


def add_lora(model: Any, rank: int, alpha: int, dropout: float, targets: tuple[str, ...] | None) -> nn.Module:
    """The model with LoRA on its linear layers named `targets`, else on those that are usual for its family.

    Raises ValueError if it has no such layers.
    """
    import peft

    kind = model.config.model_type
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if getattr(m, "weight", None) is not None}
    targets = targets or LORA_TARGETS.get(kind)
    if targets is None:
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = ("q_proj", "v_proj") if {"q_proj", "v_proj"} <= names else tuple(known.get(kind, ()))
    if not targets or not set(targets) <= names:
        raise ValueError(
            f"LoRA targets {tuple(targets)} are not all in this {kind} model; set target_modules, e.g. from {sorted(names)}"
        )
    transposed = kind == "gpt2"  # so it stores its projections
    sizes: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "fan_in_fan_out": transposed}
    lora = peft.LoraConfig(target_modules=list(targets), task_type=peft.TaskType.FEATURE_EXTRACTION, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something that was renamed
        return peft.get_peft_model(model, lora)


def opt_draws(model: Any) -> None:
    """In training, draw a random number before each layer of opt, as transformers 4.34 does, for a LayerDrop that is off."""

    def draw(layer: nn.Module, _: Any) -> None:
        if layer.training:
            torch.rand([])

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(draw)


def drop_embeddings(model: Any, keep_tokens: bool) -> None:
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
            elif model.config.model_type == "gpt2" and name == "wpe":
                silent = _SilentEmbedding(child.num_embeddings, child.embedding_dim, _weight=child.weight.data)
                setattr(parent, name, silent.requires_grad_(False))


def position_table(model: Any) -> int | None:
    """How many positions a model knows, if it looks them up in a table (opt); rotary ones are computed."""
    for name, module in model.named_modules():
        is_table = name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings", "position_embedding")
        if is_table and isinstance(module, nn.Embedding) and not isinstance(module, _SilentEmbedding):
            return module.num_embeddings - getattr(module, "offset", 0)
    tables = [b for name, b in model.named_buffers() if name.endswith("embed_positions")]  # gptj, codegen
    return len(tables[0]) if tables else None


@torch.no_grad()
def check_decoder(model: Any, source: str) -> None:
    """Refuse a model that lets a token see later ones: as a policy it would be trained on the actions that it has to predict.

    No field of a config says so for all models; changing the last of a few random tokens does.
    """
    kind, weight = model.config.model_type, model.get_input_embeddings().weight
    x = torch.randn(2, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x[1, :-1] = x[0, :-1]
    x = x.to(weight.device, weight.dtype)
    try:
        first, second = model.eval()(inputs_embeds=x, use_cache=False).last_hidden_state.float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source}: a {kind} model does not run on inputs_embeds ({reason:.100})") from None
    if float((first - second)[:-1].abs().max()) > 1e-3 * float((first - second)[-1].abs().max()):
        raise ValueError(
            f"{source}: a {kind} model is not a decoder, its tokens see later ones; use a decoder such as llama, mistral, gpt2, "
            "opt or qwen2, or t5-lm"
        )


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Digest of the first numbers of every layer's weights. Compared in bfloat16, it does not depend on the dtype loaded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        packed = parameter.dtype == torch.uint8  # 4-bit weights are other weights, and say so
        if parameter.ndim == 2 and (parameter.requires_grad or packed):  # not the embeddings, which are not used
            head = parameter.flatten()[:256].to("cpu")
            head = head if packed else head.to(torch.bfloat16).view(torch.int16)
            digest.update(name.encode() + head.numpy().tobytes())
    return digest.hexdigest()[:16]
