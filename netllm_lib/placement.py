"""On which device each part of a PLM lies: one device, or its layers in order over several.

`PLMConfig.device` names them: "cpu", "cuda", "cuda:1", "auto" (all GPUs, or the CPU if there is none), or several in order,
separated
by commas. `PLMConfig.placement` says how many layers each takes. accelerate's hooks carry hidden states from one to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LAYER_LISTS = ("layers", "h", "decoder.layers", "encoder.block", "decoder.block")
"""Where decoders (llama, mistral, qwen2, …; gpt2; opt) and t5 (both of its stacks) keep their layers."""
BEHIND = ("norm", "ln_f", "project_out")
"""Parts of these names come behind the layers."""


def devices_of(device: str) -> list[str]:
    """The devices that a `PLMConfig.device` names, in order."""
    if device == "auto":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    names = [name.strip() for name in device.split(",")]
    for name in names:
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(
                f'device={device!r}: {name!r} is not a device; use "cpu", "cuda:0", "cuda:0,cuda:1" or "auto"'
            ) from None
    kinds = {torch.device(name).type for name in names}
    if len(kinds) > 1:
        raise ValueError(
            f"device={device!r}: layers cannot be split between {' and '.join(sorted(kinds))}; name GPUs only, or the CPU"
        )
    return names


def upstream_devices(device: str, device_out: str | None = None, device_mid: str | None = None) -> str:
    """`PLMConfig.device` for the original's `--device`, `--device-out` and `--device-mid`.

    The original puts the first layers on `device`, the last ones on `device_out` and those between on `device_mid`, if given:
    as even a split as can be, larger parts first. Its device map is written for exactly 32 layers; here any number is split.
    """
    if device_mid is not None and device_out is None:
        raise ValueError("device_mid needs device_out: the last layers go there")
    return ",".join(dict.fromkeys(name for name in (device, device_mid, device_out) if name is not None))


def split_layers(layers: int, devices: int, placement: tuple[int, ...] | None) -> list[int]:
    """How many layers each device takes. Evenly by default, the first ones taking more, as the original does."""
    if placement is not None:
        if len(placement) != devices or sum(placement) != layers or min(placement) < 0:
            raise ValueError(
                f"placement={placement}: give {devices} numbers, one for each device, that add up to {layers} layers"
            )
        return list(placement)
    most = -(-layers // devices)
    return [max(0, min(most, layers - most * i)) for i in range(devices)]


def device_map(model: nn.Module, devices: list[str], placement: tuple[int, ...] | None) -> dict[str, str]:
    """Device of every part of a model, by the part's name, as accelerate wants it.

    What comes before the layers lies with the first of them, what comes behind (the last norm) with the last.
    """
    stacks = {
        name: list(module)
        for name, module in model.named_modules()
        if name in LAYER_LISTS and isinstance(module, nn.ModuleList)
    }
    if not stacks:
        kind = getattr(model.config, "model_type", "model")
        raise ValueError(f"a {kind} cannot be split over devices: its layers are not at any of {LAYER_LISTS}")
    places: dict[str, str] = {}
    last = devices[0]
    for stack, layers in stacks.items():
        counts = split_layers(len(layers), len(devices), placement)
        owners = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
        places |= {f"{stack}.{i}": owner for i, owner in enumerate(owners)}
        last = owners[-1]
    inside = tuple(f"{stack}." for stack in stacks)
    parents = {stack.rsplit(".", 1)[0] for stack in stacks if "." in stack}
    for name, _ in model.named_modules():
        above = not name or name in parents or name in stacks
        if not above and not name.startswith(inside) and not any(name.startswith(f"{known}.") for known in places):
            places[name] = last if any(word in name for word in BEHIND) else devices[0]
    return places


def dispatch(model: Any, devices: list[str], placement: tuple[int, ...] | None) -> Any:
    """Move a model to its devices, with hooks where hidden states change device; returns the model."""
    if len(devices) == 1:
        if placement is not None:
            raise ValueError(
                f"placement={placement} needs several devices, separated by commas; device names {devices[0]}"
            )
        return model.to(devices[0])
    from accelerate.hooks import ModelHook, add_hook_to_module
    from accelerate.utils import send_to_device

    class Carry(ModelHook):
        """Brings what a part is called with to where the part lies."""

        def __init__(self, device: str):
            self.device = device

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    places = device_map(model, devices, placement)
    for name, device in places.items():
        add_hook_to_module(model.get_submodule(name).to(device), Carry(device))
    model.hf_device_map = places
    return model
