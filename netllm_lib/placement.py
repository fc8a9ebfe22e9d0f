"""On which device each part of a PLM lies: `PLMConfig.device` and `PLMConfig.placement` say it, see there."""

from __future__ import annotations

import torch
from torch import nn

LAYER_LISTS = ("layers", "h", "decoder.layers", "encoder.block", "decoder.block")
"""Where decoders (llama, mistral, qwen2, …; gpt2; opt) and t5 (both of its stacks) keep their layers."""
BEHIND = ("norm", "ln_f", "project_out")
"""Parts of these names come behind the layers."""


def devices_of(device: str) -> list[str]:
    """The devices that a `PLMConfig.device` names, in order. Raises ValueError for what is none, or GPUs and the CPU at once."""
    if device == "auto":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    names = [name.strip() for name in device.split(",")]
    try:
        kinds = {torch.device(name).type for name in names}
    except RuntimeError:
        raise ValueError(f'device={device!r} is no device; use "cpu", "cuda:0", "cuda:0,cuda:1" or "auto"') from None
    if len(kinds) > 1:
        raise ValueError(f"device={device!r}: layers cannot be split between {' and '.join(sorted(kinds))}")
    return names


def split_layers(layers: int, devices: int, placement: tuple[int, ...] | None) -> list[int]:
    """How many layers each device takes. Evenly by default, the first ones taking more, as the original does."""
    if placement is None:
        most = -(-layers // devices)
        return [max(0, min(most, layers - most * i)) for i in range(devices)]
    if len(placement) != devices or sum(placement) != layers or min(placement) < 0:
        raise ValueError(
            f"placement={placement}: give a number for each of {devices} devices; they have to add up to {layers} layers"
        )
    return list(placement)


def device_map(model: nn.Module, devices: list[str], placement: tuple[int, ...] | None) -> dict[str, str]:
    """Device of every part of a model, by the part's name, as accelerate wants it; the model may be on the meta device.

    What comes before the layers lies with the first of them, what comes behind (the last norm) with the last.
    """
    places: dict[str, str] = {}
    for stack, layers in model.named_modules():
        if stack in LAYER_LISTS and isinstance(layers, nn.ModuleList):
            counts = split_layers(len(layers), len(devices), placement)
            owners = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
            places |= {f"{stack}.{i}": owner for i, owner in enumerate(owners)}
    if not places:
        raise ValueError(f"a {type(model).__name__} cannot be split: its layers are at none of {LAYER_LISTS}")
    layer_names, last = tuple(f"{name}." for name in places), owners[-1]
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(layer_names):
            part = name.rpartition(".")[0]
            places[part] = last if any(word in part for word in BEHIND) else devices[0]
    return places


def dispatch(model: nn.Module, places: dict[str, str]) -> None:
    """Move the parts of a model to their devices; where there are several, each part brings to its own what it is called with."""
    from accelerate.utils import send_to_device

    for name, device in places.items():
        part = model.get_submodule(name).to(device)
        if len(places) > 1:
            part.register_forward_pre_hook(
                lambda _, args, kwargs, device=device: send_to_device((args, kwargs), device), with_kwargs=True
            )
